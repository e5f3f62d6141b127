"""Progress with the time left: a bar on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0


class Progress:
    """Shows how far a known amount of work has come.

    On a terminal this is one live bar; where the output is no terminal it is a plain line at most every ten seconds,
    and one at the end.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        """Prepares the display of `total` steps of which `start` are done; shows nothing unless `enabled`."""
        self.enabled = enabled
        self.label, self.total, self.done, self.first = label, total, start, start
        self.note = ""
        self.started = self.printed = time.monotonic()
        self.bar: RichProgress | None = None

    def __enter__(self) -> Self:
        """Starts the display."""
        console = Console(stderr=True)
        if self.enabled and console.is_terminal:
            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self.task = self.bar.add_task(self.label, total=self.total, completed=self.done, note="")
            self.bar.start()
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Counts finished steps; `note` is a short figure to show, such as the loss."""
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif self.enabled and time.monotonic() - self.printed >= LINE_SECONDS:
            self._print()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display."""
        if self.bar is not None:
            self.bar.stop()
        elif self.enabled:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        elapsed = self.printed - self.started
        finished = self.done - self.first
        remaining = max(self.total - self.done, 0)
        left = (
            "done" if not remaining else f"{elapsed / finished * remaining:.0f} s left" if finished else "just started"
        )
        sys.stderr.write(
            f"{self.label}: {self.done}/{self.total}, {elapsed:.0f} s, {left}  {self.note}".rstrip() + "\n"
        )
        sys.stderr.flush()
