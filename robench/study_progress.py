"""The progress of a study: one line with what is done, what failed, and the time left. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from robench.study_run import RunState

LINE_S: Final = 10.0
SHOW_S: Final = 0.5
"""Seconds between two looks at all runs, of which there may be thousands."""


class StudyProgress:
    """Shows a study's runs and units; on a terminal as one live bar, elsewhere as a line every ten seconds.

    The time left of a run is that of its units still to do, at the mean of those done; before the first, at the time
    guessed when it was planned, corrected by how the guesses for other runs turned out.
    """

    def __init__(self, label: str, workers: int, *, enabled: bool = True) -> None:
        """Prepares the display.

        Args:
            label: the study's name.
            workers: tasks that are done at once.
            enabled: False shows nothing.
        """
        self.label, self.workers, self.enabled = label, workers, enabled
        self.taken: dict[str, list[float]] = {}
        self.started = self.printed = time.monotonic()
        self.line, self.fraction = "planning", 0.0
        self.told: set[str] = set()
        self.shown = -SHOW_S
        self.bar: RichProgress | None = None

    def __enter__(self) -> Self:
        """Starts the display."""
        console = Console(stderr=True)
        if self.enabled and console.is_terminal:
            self.bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=console
            )
            self.task = self.bar.add_task(self.label, total=1.0, text=self.line)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display."""
        if self.bar is not None:
            self.bar.stop()
        elif self.enabled and error is None:
            self._print()

    def finished(self, run: str, seconds: float) -> None:
        """Notes a finished unit and its time."""
        self.taken.setdefault(run, []).append(seconds)

    def heard(self, passes: int, kind: str) -> None:
        """Keeps the display alive while units are under way."""
        del passes, kind
        if self.bar is None and self.enabled and time.monotonic() - self.printed >= LINE_S:
            self._print()

    def is_due(self) -> bool:
        """Whether it is time to show the state of all runs again."""
        return time.monotonic() - self.shown >= SHOW_S

    def show(self, states: Sequence[RunState], audits: Mapping[str, str]) -> None:
        """Shows the state of all runs; a run that failed is told at once."""
        self.shown = time.monotonic()
        for state in states:
            if self.enabled and state.problem and state.run.name not in self.told:
                self.told.add(state.run.name)
                self._say(f"{self.label}: {state.run.name} failed: {state.problem}")
        planned = [state for state in states if state.planned is not None]
        if len(planned) + len(self.told) < len(states):
            self.line = f"planned {len(planned)} of {len(states)} runs"
        else:
            self._measure(states, audits)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.fraction, text=self.line)
        else:
            self.heard(0, "")

    def left(self, states: Sequence[RunState]) -> float:
        """Seconds left of all runs, by all workers together."""
        guesses = {state.run.name: _guess(state) for state in states}
        known = [(sum(seconds), len(seconds) * guesses.get(run, 0.0)) for run, seconds in self.taken.items()]
        guessed = sum(guess for _, guess in known)
        ratio = sum(seconds for seconds, _ in known) / guessed if guessed > 0 else 1.0
        total = 0.0
        for state in states:
            taken = self.taken.get(state.run.name)
            each = sum(taken) / len(taken) if taken else ratio * guesses[state.run.name]
            total += 0.0 if state.problem else each * len(state.left)
        return total / self.workers

    def _measure(self, states: Sequence[RunState], audits: Mapping[str, str]) -> None:
        units = sum(len(state.planned.units) for state in states if state.planned is not None)
        open_units = sum(len(state.left) for state in states if not state.problem)
        closed = sum(not state.left and not state.problem for state in states)
        elapsed, left = time.monotonic() - self.started, self.left(states)
        self.fraction = elapsed / max(elapsed + left, 1e-9)
        failed = f", {len(self.told)} failed" if self.told else ""
        audited = f", {len(audits)} audits" if audits else ""
        time_left = f"{left:.0f} s left" if open_units else "units done"
        self.line = (
            f"{closed} of {len(states)} runs, {units - open_units} of {units} units{failed}{audited}, "
            f"{elapsed:.0f} s, {time_left}"
        )

    def _print(self) -> None:
        self.printed = time.monotonic()
        self._say(f"{self.label}: {self.line}")

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _guess(state: RunState) -> float:
    """Seconds of one unit, as guessed when the run was planned."""
    planned = state.planned
    return planned.seconds / len(planned.units) if planned is not None and planned.units else 0.0
