"""Runners on this machine: this process, or worker processes that are watched and replaced when they die or hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final

from robench.errors import PluginError
from robench.plan import Unit
from robench.runners.task import (
    TRIES_BY_EXIT,
    TRIES_BY_SIGNAL,
    Hear,
    Limits,
    Losses,
    Outcome,
    Task,
    memory_share,
)
from robench.runners.worker import DONE, PASSES, READY, serve

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

STILLBORN: Final = 3
"""Workers in a row that die before they take a task, after which there is no point in starting more."""

AWAY_S: Final = 2.0
"""Seconds between two looks at the workers beyond which the time is not held against them."""
GOODBYE_S: Final = 5.0
"""Seconds that a worker without a task has to end."""


def run_here(units: Iterable[Unit], work: Callable[[Unit], None]) -> None:
    """Runs `work` on each unit in order. An interrupt leaves finished units stored, and drafts of the one at work."""
    for unit in units:
        work(unit)


def threads_for(workers: int) -> int:
    """Threads of each worker, so that all together use every core once."""
    return max(len(os.sched_getaffinity(0)) // workers, 1)


def run_in_processes(
    queue: deque[Task],
    wanted: Callable[[Task], bool],
    hear: Hear | None = None,
    *,
    workers: int = 1,
    limits: Limits | None = None,
) -> Generator[Outcome]:
    """Does tasks in worker processes, each with one task at a time; see `Runner`.

    A worker that dies is replaced and its task done again; one that hangs or takes too long is killed. Workers die
    with this process. What a task prints goes to standard error.

    Raises:
        PluginError: no worker can be started.
    """
    team = _Team(workers, limits or Limits())
    try:
        while True:
            team.assign(queue, wanted)
            if not team.is_busy():
                return
            yield from team.listen(queue, hear)
    finally:
        team.stop()


class _Worker:
    """One process, its pipe, and the task that it has."""

    def __init__(self, number: int, limits: Limits) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection[Any, Any]
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=serve, args=(theirs, limits, number))
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.ready = False
        self.started = self.heard = time.monotonic()

    def take(self, task: Task) -> None:
        self.task = task
        self.started = self.heard = time.monotonic()
        with contextlib.suppress(OSError):  # it died meanwhile; `listen` finds out
            self.pipe.send(task)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(GOODBYE_S)
        self.pipe.close()


class _Team:
    """All workers."""

    def __init__(self, size: int, limits: Limits) -> None:
        self.size = size
        self.limits = limits if limits.memory_gb else replace(limits, memory_gb=memory_share(size))
        self.workers: dict[int, _Worker] = {}
        self.losses, self.stillborn = Losses(), 0
        self.listened = time.monotonic()

    def is_busy(self) -> bool:
        return any(worker.task is not None for worker in self.workers.values())

    def assign(self, queue: deque[Task], wanted: Callable[[Task], bool]) -> None:
        """Gives a task to each worker that has none, and starts workers as far as there are tasks."""
        for number in range(self.size):
            worker = self.workers.get(number)
            if worker is not None and worker.task is not None:
                continue
            while queue and not wanted(queue[0]):
                queue.popleft()
            if not queue:
                return
            if worker is None:
                worker = self.workers[number] = _Worker(number, self.limits)
            worker.take(queue.popleft())

    def listen(self, queue: deque[Task], hear: Hear | None) -> Iterator[Outcome]:
        """Waits for a moment, and yields what was finished; lost tasks go back to the queue."""
        away = time.monotonic() - self.listened
        for worker in self.workers.values() if away > AWAY_S else ():  # this process was busy or stopped, not they
            worker.heard, worker.started = worker.heard + away, worker.started + away
        by_pipe = {worker.pipe: number for number, worker in self.workers.items()}
        for pipe in wait(list(by_pipe), timeout=1.0):
            outcome = self._receive(by_pipe[pipe], queue, hear)  # type: ignore[index]
            if outcome is not None:
                yield outcome
        self.listened = time.monotonic()
        for number, worker in list(self.workers.items()):
            reason = "" if worker.pipe.poll() else self._overdue(worker)
            if reason and worker.task is not None:
                worker.kill()
                del self.workers[number]
                yield Outcome(worker.task, error=PluginError(reason))

    def _receive(self, number: int, queue: deque[Task], hear: Hear | None) -> Outcome | None:
        worker = self.workers[number]
        try:
            message, *content = worker.pipe.recv()
        except (EOFError, OSError):
            return self._bury(number, queue)
        worker.heard = time.monotonic()
        if message == READY:
            worker.ready, self.stillborn = True, 0
        elif message == PASSES and hear is not None:
            hear(*content)
        elif message == DONE:
            worker.task = None
            outcome: Outcome = content[0]
            return outcome
        return None

    def _bury(self, number: int, queue: deque[Task]) -> Outcome | None:
        """Takes a dead worker's task back; the outcome if it killed too many."""
        worker = self.workers.pop(number)
        worker.process.join(GOODBYE_S)
        code, task = worker.process.exitcode or 0, worker.task
        worker.pipe.close()
        if not worker.ready:
            self.stillborn += 1
            if self.stillborn == STILLBORN:
                raise PluginError(f"worker processes die before they take up work (exit status {code})")
        if task is None:
            return None
        if worker.ready:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            reason = f"its worker process ended with {how}"
            outcome = self.losses.give_up(task, reason, TRIES_BY_SIGNAL if code < 0 else TRIES_BY_EXIT)
            if outcome is not None:
                return outcome
        queue.appendleft(task)
        return None

    def _overdue(self, worker: _Worker) -> str:
        now, limits = time.monotonic(), self.limits
        if worker.task is None:
            return ""
        if limits.task_s is not None and worker.task.kind == "unit" and now - worker.started > limits.task_s:
            return f"not done after {limits.task_s:g} s"
        if now - worker.heard > limits.stall_s:
            return f"hung: no pass through the defense was finished in {limits.stall_s:g} s"
        return ""

    def stop(self) -> None:
        """Ends all workers: those without a task in good order, the others at once."""
        for worker in self.workers.values():
            if worker.task is None:
                worker.pipe.close()
            else:
                worker.process.kill()
        for worker in self.workers.values():
            worker.process.join(GOODBYE_S)
            worker.kill()
