"""What `robench compare` found, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from robench.paired import count_images
from robench.threat import format_eps
from robench.unit_table import CLEAN, WORST

if TYPE_CHECKING:
    from robench.paired import Comparison, Difference

SMALLEST_P: Final = 0.001
"""Below it a table tells no more of a p than that; `--json` does."""


def print_comparison(comparison: Comparison) -> None:
    """Prints the accuracies side by side with their differences, what is unlike, and a sentence for each bound."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(comparison_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {note}")
    for one in comparison.worst:
        console.print(comparison.verdict(one))


def comparison_table(comparison: Comparison) -> Table:
    """A row for each accuracy, within 80 columns; the differences are in points, first minus second."""
    first = comparison.first
    table = Table(
        title=f"accuracy, %: {first.dataset or 'images of the caller'}, {first.norm}, the same "
        f"{count_images(comparison.images)}",
        title_justify="left",
        caption="difference in points, image by image; [low, high]: 95 % interval; p: two-sided, of the paired test",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    for heading in ("", *comparison.names, "difference", "p"):
        table.add_column(heading, overflow="fold")
    several = len({one.eps for one in comparison.differences if one.what != CLEAN}) > 1
    word = "after" if first.cascade and comparison.second.cascade else "under"
    for one in comparison.differences:
        bound = f" at {format_eps(one.eps, first.norm)}" if several and one.what != CLEAN else ""
        gap = one.gap
        table.add_row(
            f"{_heading(one, word)}{bound}",
            str(one.first).replace(" %", ""),
            str(one.second).replace(" %", ""),
            f"{100 * gap.mean:+.1f} [{100 * gap.low:.1f}, {100 * gap.high:.1f}]",
            f"{gap.p:.2g}" if gap.p >= SMALLEST_P else f"<{SMALLEST_P}",
            end_section=one.what in (CLEAN, WORST),
        )
    return table


def _heading(one: Difference, word: str) -> str:
    named = {CLEAN: "clean", WORST: "robust"}
    return named.get(one.what, f"{word} {one.what}")
