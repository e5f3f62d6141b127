"""The runner in this process: one unit after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from robench.plan import Unit


def run_here(units: Iterable[Unit], work: Callable[[Unit], None]) -> None:
    """Runs `work` on each unit in order. An interrupt leaves all finished units stored."""
    for unit in units:
        work(unit)
