"""Progress with the time left: a bar on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0
REDRAW_SECONDS = 0.1


class Progress:
    """Shows how far a known amount of work has come, where the work may be of several kinds of different speed.

    The time left is that of the steps left of each kind at the speed seen so far; a kind not seen yet is taken to
    differ from the others as its `weights` say. Where `begin` and `spare` tell how much of what was begun is not needed
    after all, what was not begun is taken to need the same share. On a terminal this is one live bar; where the output
    is no terminal it is a plain line at most every ten seconds, and one at the end.
    """

    def __init__(
        self,
        label: str,
        totals: Mapping[str, int],
        *,
        done: int = 0,
        weights: Mapping[str, float] | None = None,
        enabled: bool = True,
        brief: bool = False,
    ) -> None:
        """Prepares the display.

        Args:
            label: what is being done.
            totals: steps of each kind.
            done: steps of the first kind that were done before.
            weights: how long a step of a kind takes against one of the others; default 1.
            enabled: False shows nothing.
            brief: work that is often short: no line at the end where none was due before.
        """
        self.label, self.totals, self.weights, self.enabled = label, dict(totals), dict(weights or {}), enabled
        self.brief = brief
        self.before = dict.fromkeys(totals, 0)
        self.before[next(iter(totals))] = done
        self.steps = dict(self.before)
        self.seconds = dict.fromkeys(totals, 0.0)
        self.begun, self.spared = dict.fromkeys(totals, 0), dict.fromkeys(totals, 0)
        self.note = ""
        self.started = self.printed = self.seen = time.monotonic()
        self.bar: RichProgress | None = None

    def __enter__(self) -> Self:
        """Starts the display."""
        self.started = self.printed = self.seen = time.monotonic()
        console = Console(stderr=True)
        if self.enabled and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = RichProgress(*columns, console=console)
            self.task = self.bar.add_task(self.label, total=1.0, text="")
            self.bar.start()
        return self

    def advance(self, steps: int = 1, kind: str = "", note: str = "") -> None:
        """Counts finished steps of a kind (default the first); `note` is a short figure to show, such as the loss."""
        kind = kind or next(iter(self.totals))
        now = time.monotonic()
        self.steps[kind] = min(self.steps[kind] + steps, self.totals[kind])
        self.seconds[kind] += now - self.seen
        self.seen = now
        self.note = note or self.note
        if self.bar is not None and now - self.printed >= REDRAW_SECONDS:
            self._draw()
        elif self.bar is None and self.enabled and now - self.printed >= LINE_SECONDS:
            self._print()

    def recall(self, steps: int, kind: str) -> None:
        """Counts steps of a kind that were done before: they say nothing of the speed."""
        self.seen = time.monotonic()
        self.steps[kind] = min(self.steps[kind] + steps, self.totals[kind])
        self.before[kind] = min(self.before[kind] + steps, self.steps[kind])

    def begin(self, steps: int, kind: str) -> None:
        """Notes that work of at most so many steps of a kind was begun."""
        self.begun[kind] += steps

    def spare(self, steps: int, kind: str) -> None:
        """Notes that so many steps of what was begun are not needed."""
        self.spared[kind] += steps

    def needed(self, kind: str) -> float:
        """Steps of a kind that are expected to be needed in all."""
        share = 1 - self.spared[kind] / self.begun[kind] if self.begun[kind] else 1.0
        return max(self.totals[kind] * share, self.steps[kind])

    def left(self) -> float | None:
        """Seconds left, None while nothing is known."""
        rates = {
            kind: self.seconds[kind] / (self.steps[kind] - self.before[kind])
            for kind in self.totals
            if self.steps[kind] > self.before[kind]
        }
        if not rates:
            return None
        unit = sum(rate / self.weights.get(kind, 1.0) for kind, rate in rates.items()) / len(rates)
        return sum(
            (self.needed(kind) - self.steps[kind]) * rates.get(kind, unit * self.weights.get(kind, 1.0))
            for kind in self.totals
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display."""
        if error is None:
            self.steps = dict(self.totals)
        if self.bar is not None:
            self._draw()
            self.bar.stop()
        elif self.enabled and not (self.brief and self.printed == self.started):
            self._print()

    def _text(self) -> tuple[float, str]:
        self.printed = time.monotonic()
        elapsed, left = self.printed - self.started, self.left()
        done = sum(self.steps.values()) >= sum(self.totals.values())
        fraction = 1.0 if done else 0.0 if left is None else elapsed / max(elapsed + left, 1e-9)
        remaining = "done" if done else "just started" if left is None else f"{left:.0f} s left"
        return fraction, f"{100 * fraction:.0f} %, {elapsed:.0f} s, {remaining}  {self.note}".rstrip()

    def _draw(self) -> None:
        fraction, text = self._text()
        if self.bar is not None:
            self.bar.update(self.task, completed=fraction, text=text)

    def _print(self) -> None:
        sys.stderr.write(f"{self.label}: {self._text()[1]}\n")
        sys.stderr.flush()
