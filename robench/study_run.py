"""Does a study: plans its runs, does on a runner what is not stored, audits, and writes a table of what became of it.

study.csv    one row for each run: its figures, or what went wrong
.lock        held while a process works on the study
<run>/       run folders; <audit>/ folders of audits
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from robench.errors import Interrupted, StorageError, UsageError
from robench.files import Place, as_place, locked, make_folder, write_atomic
from robench.report.page import load_template
from robench.runners.task import Limits, Outcome, Runner, Task
from robench.shell import join_words
from robench.store import LOCK_FILE, RunStore
from robench.study import STUDY_CSV, Study, StudyRun, read_study
from robench.study_progress import StudyProgress

if TYPE_CHECKING:
    from robench.runners.work import Figures, Planned

LOG = logging.getLogger("robench")
RUNNERS: Final = ("local", "ray")


@dataclass(frozen=True)
class StudySettings:
    """How a study is done.

    Attributes:
        out: the study's folder; may be a URL.
        workers: tasks at once; None: one for each GPU or for each group of threads.
        runner: `local` or `ray`.
        ray: address of a Ray cluster; None: one on this machine.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        dry: plan only, and leave all folders as they are.
        progress: show progress on standard error.
    """

    out: Place
    workers: int | None = None
    runner: str = "local"
    ray: str | None = None
    device: str = "auto"
    data_dir: Path | None = None
    dry: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: a setting is out of range.
        """
        if self.runner not in RUNNERS:
            raise UsageError(f'runner must be one of {", ".join(RUNNERS)}; got "{self.runner}"')
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1; got {self.workers}")


@dataclass
class RunState:
    """What became of a run so far.

    Attributes:
        run: the run.
        planned: its units; None until it is planned.
        left: units that are still to be done, by number.
        problem: why it will not be finished; empty where nothing went wrong.
        figures: what came out, once all units are stored.
        store: its folder, open once it is planned.
    """

    run: StudyRun
    planned: Planned | None = None
    left: set[int] = field(default_factory=set)
    problem: str = ""
    figures: Figures | None = None
    store: RunStore | None = None

    @property
    def status(self) -> str:
        """`finished`, `incomplete` (an attack failed), `failed`, or `planned`."""
        if self.problem:
            return "failed"
        if self.figures is None:
            return "planned"
        return "finished" if self.figures.complete else "incomplete"

    @property
    def reason(self) -> str:
        """What went wrong, in one line."""
        return self.problem or (self.figures.reason if self.figures is not None else "")


@dataclass
class StudyResult:
    """A study as far as it came.

    Attributes:
        folder: the study's.
        runs: all runs, in the order of the study.
        audits: verdict or problem of each audit, by the name of its folder.
        workers: tasks that were done at once.
    """

    folder: Place
    runs: list[RunState]
    audits: dict[str, str]
    workers: int

    @property
    def failures(self) -> list[str]:
        """One line for each run or audit that failed or is incomplete."""
        lines = [f"{one.run.name}: {one.reason}" for one in self.runs if one.reason]
        return lines + [f"{name}: {text}" for name, text in self.audits.items() if text.startswith(FAILED)]


FAILED: Final = "failed: "


def do_study(path: Path, settings: StudySettings) -> StudyResult:
    """Does the study in a file, or what of it is not stored yet.

    Raises:
        UsageError: the file, or a run that it names, says something that cannot be done; nothing was begun.
        Interrupted: the message names the command that goes on.
    """
    study = read_study(path)
    try:
        return run_study(study, settings)
    except KeyboardInterrupt:
        words = ["robench", "run", str(path), "--out", str(settings.out)]
        for option, value in (
            ("--workers", settings.workers),
            ("--ray", settings.ray),
            ("--device", settings.device),
            ("--data-dir", settings.data_dir),
        ):
            words += [] if value is None else [option, str(value)]
        words += [] if settings.runner == "local" or settings.ray else ["--runner", settings.runner]
        raise Interrupted(f"interrupted; what is finished is stored. Go on with: {join_words(words)}") from None


def run_study(study: Study, settings: StudySettings) -> StudyResult:
    """Does a study; see `do_study`.

    A run whose defense breaks, or takes its worker down again and again, is given up and named; the others go on.

    Raises:
        UsageError: a run cannot be done; nothing was begun. Or nothing more can be stored.
    """
    folder = as_place(settings.out)
    if study.audit and not isinstance(folder, Path):
        raise UsageError(f"audits are written to a folder, not to {folder}; leave audit out, or give another --out")
    if study.audit:
        load_template("audit.html", "the audit's")  # a missing package is told before any work
    if settings.dry:
        return _Driver(study, settings, folder).work()
    make_folder(folder)
    with locked(folder / LOCK_FILE):
        return _Driver(study, settings, folder).work()


class _Driver:
    """Hands out the tasks of a study, and takes in what became of them."""

    def __init__(self, study: Study, settings: StudySettings, folder: Place) -> None:
        self.study, self.settings, self.folder = study, settings, folder
        self.device = settings.device if settings.device != "auto" else "cuda" if _gpus() else "cpu"
        limits = study.limits
        self.limits = dataclasses.replace(limits, gpus=(limits.gpus or 1) if self.device == "cuda" else 0)
        self.workers = settings.workers or _room(self.device, self.limits)
        self.states = {run.name: RunState(run) for run in study.runs}
        self.audits: dict[str, str] = {}
        self.queue: deque[Task] = deque()
        self.place = folder.resolve() if isinstance(folder, Path) else folder  # as workers on other machines see it
        self.refused: list[str] = []

    def work(self) -> StudyResult:
        queue = self.queue
        queue.extend(Task("plan", self._plan_request(run), run.name) for run in self.study.runs)
        planning = len(queue)
        with (
            StudyProgress(self.study.name, self.workers, enabled=self.settings.progress) as progress,
            contextlib.closing(self._runner()(queue, self._is_wanted, progress.heard)) as outcomes,
        ):
            for outcome in outcomes:
                self._take(outcome, progress)
                planning -= outcome.task.kind == "plan"
                if outcome.task.kind == "plan" and not planning and not self.settings.dry:
                    self._refuse()
                    queue.extend(self._units())
                    queue.extend(self._audits())
                if outcome.error is not None or progress.is_due():
                    progress.show(list(self.states.values()), self.audits)
            self._refuse()
            progress.show(list(self.states.values()), self.audits)
        if not self.settings.dry:
            self._finish()
        return StudyResult(self.folder, list(self.states.values()), self.audits, self.workers)

    def _runner(self) -> Runner:
        if self.settings.runner == "local":
            from robench.runners.local import run_in_processes

            return lambda *given: run_in_processes(*given, workers=self.workers, limits=self.limits)
        from robench.runners.cluster import run_on_ray

        address, workers = self.settings.ray, self.settings.workers
        return lambda *given: run_on_ray(*given, address=address, workers=workers, limits=self.limits)

    def _plan_request(self, run: StudyRun) -> Any:
        from robench.runners.work import PlanRequest

        settings = {
            **self.study.settings,
            "n": self.study.n,
            "seed": run.seed,
            "device": self.device,
            "data_dir": self._data_dir(),
        }
        place = str(self.place / run.name)
        return PlanRequest(
            place, run.defense, run.dataset, self.study.attacks, run.norm, run.eps, settings, self.settings.dry
        )

    def _units(self) -> list[Task]:
        from robench.runners.work import UnitRequest

        data_dir = str(self._data_dir() or "")
        tasks = []
        for name, state in self.states.items():
            for unit in state.planned.missing if state.planned is not None else ():
                request = UnitRequest(str(self.place / name), unit, data_dir, shared=True)
                tasks.append(Task("unit", request, name))
        return tasks

    def _audits(self) -> list[Task]:
        from robench.audit import DEFAULT_N
        from robench.runners.work import AuditWork

        tasks = []
        for name, run in self.study.audits().items():
            few = self.study.n if self.study.n is not None and self.study.n < DEFAULT_N else None  # else its own number
            settings = {"n": few, "seed": run.seed, "device": self.device, "data_dir": self._data_dir()}
            known = _verdict(self.folder / name)
            if known:
                self.audits[name] = known
                continue
            request = AuditWork(str(self.place / name), run.defense, run.dataset, run.norm, run.eps[0], settings)
            tasks.append(Task("audit", request, name))
        return tasks

    def _data_dir(self) -> Path | None:
        return None if self.settings.data_dir is None else self.settings.data_dir.resolve()

    def _is_wanted(self, task: Task) -> bool:
        return task.run not in self.states or not self.states[task.run].problem

    def _take(self, outcome: Outcome, progress: StudyProgress) -> None:
        task, error = outcome.task, outcome.error
        if task.kind == "audit":
            self.audits[task.run] = f"{FAILED}{error}" if error is not None else str(outcome.value)
            return
        state = self.states[task.run]
        if isinstance(error, StorageError):
            raise error  # nothing more can be stored
        if task.kind == "plan":
            if isinstance(error, UsageError):
                self.refused.append(f"{task.run}: {error}")
            state.problem = "" if error is None else str(error)
            state.planned = outcome.value
            if state.planned is not None:
                state.left = {unit.index for unit in state.planned.missing}
                for note in state.planned.notes:
                    LOG.warning(note)
                state.store = None if self.settings.dry else RunStore.open(self.folder / task.run)
                self._close(state)
        elif error is not None:
            number = f"unit {task.request.unit.index}: " if task.kind == "unit" else ""
            state.problem = f"{number}{error}"
        elif task.kind == "close":
            state.figures = outcome.value
        else:
            progress.finished(task.run, outcome.seconds)
            if state.store is not None:
                state.store.note_time(task.request.unit, outcome.value)
            state.left.discard(task.request.unit.index)
            self._close(state)

    def _close(self, state: RunState) -> None:
        """Has a run's figures computed and its row written once all units are stored."""
        if not state.left and state.store is not None:
            state.store.flush_times()
            self.queue.appendleft(Task("close", str(self.place / state.run.name), state.run.name))

    def _refuse(self) -> None:
        """Ends a study of which runs cannot be done at all: the user has to know before hours of work."""
        if self.refused:
            more = f" ({len(self.refused) - 1} more of {len(self.states)} runs)" if len(self.refused) > 1 else ""
            raise UsageError(f"{self.refused[0]}{more}. Mend the study, or leave the run out with [[exclude]]")

    def _finish(self) -> None:
        from robench.report.study import study_csv

        write_atomic(self.folder / STUDY_CSV, study_csv(list(self.states.values()), self.audits).encode())


def _verdict(folder: Place) -> str:
    """The verdict of the audit in a folder; empty where there is none that can be read."""
    try:
        return str(json.loads((folder / "audit.json").read_bytes())["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _room(device: str, limits: Limits) -> int:
    """Workers that this machine has room for."""
    if device == "cuda":
        return max(_gpus() // max(round(limits.gpus), 1), 1)
    return max(len(os.sched_getaffinity(0)) // limits.threads, 1)


__all__ = ["RunState", "StudyResult", "StudySettings", "do_study", "run_study"]
