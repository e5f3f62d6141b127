"""A piece of work that a runner hands to a worker, what comes back, and what a worker may use up."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from robench.errors import DataError, PluginError, RobenchError, StorageError, UsageError

Hear = Callable[[int, str], None]
"""Hears of passes through a defense: how many, and who asked (`judge` or `attack`)."""

TRIES_BY_SIGNAL: Final = 5
"""Workers lost to a signal on one task before the task counts as failed: the machine may have taken them."""
TRIES_BY_EXIT: Final = 2
"""The same of workers that ended by themselves: the task's code did that."""


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        kind: a function of `robench.runners.work`.
        request: its argument; picklable.
        run: the name of the run that it belongs to.
    """

    kind: str
    request: Any
    run: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: the task.
        value: what its function returned.
        error: why there is none.
        seconds: wall time.
    """

    task: Task
    value: Any = None
    error: RobenchError | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a worker may use.

    Attributes:
        threads: of torch.
        stall_s: seconds without a finished pass through the defense after which a worker counts as hung.
        task_s: seconds that a unit may take; None: no limit.
        memory_gb: memory that a worker may allocate on the CPU; None: its share of the machine's.
        gpus: of each worker; a fraction on Ray only.
    """

    threads: int = 1
    stall_s: float = 1800.0
    task_s: float | None = None
    memory_gb: float | None = None
    gpus: float = 0


Runner = Callable[["deque[Task]", Callable[[Task], bool], "Hear | None"], Generator[Outcome]]
"""Takes tasks from the left of a queue, to which tasks may be added meanwhile, and yields what became of each; tasks
for which the function says False are dropped."""


def perform(task: Task, hear: Hear | None = None) -> Outcome:
    """Does a task in this process.

    Raises:
        SystemExit: the task's code called `exit()`, or whoever runs this process ends it; it must not pass for an
            attack that failed.
    """
    from robench.runners import work

    started = time.monotonic()
    try:
        value = work.FUNCTIONS[task.kind](task.request, hear)
    except RobenchError as error:
        return Outcome(task, error=_portable(error), seconds=time.monotonic() - started)
    except Exception as error:  # noqa: BLE001 - a plugin may fail in any way; the study goes on
        return Outcome(task, error=PluginError(_describe(error)), seconds=time.monotonic() - started)
    return Outcome(task, value, seconds=time.monotonic() - started)


def _portable(error: RobenchError) -> RobenchError:
    """The error as one of robench's own classes: a plugin's cannot be read by a process that has not imported it."""
    base = next(
        one for one in (StorageError, UsageError, DataError, PluginError, RobenchError) if isinstance(error, one)
    )
    return base(str(error) or type(error).__name__)


def _describe(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"


@dataclass
class Losses:
    """Counts the workers lost on each task.

    Attributes:
        counts: by task.
    """

    counts: Counter[Task] = field(default_factory=Counter)

    def give_up(self, task: Task, reason: str, tries: int) -> Outcome | None:
        """Notes a loss; the outcome if the task is not to be tried again."""
        self.counts[task] += 1
        if self.counts[task] < tries:
            return None
        times = f" ({tries} times)" if tries > 1 else ""
        return Outcome(task, error=PluginError(f"{reason}{times}"))


def memory_share(workers: int) -> float:
    """The memory of this machine, or of this container, that each of some workers may take; in GB."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            amounts.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # "max" where there is no limit
            continue
    return 0.9 * min(amounts) / workers / 1e9
