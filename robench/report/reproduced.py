"""A paper's tables beside ours, on the terminal and as a CSV file."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from robench.reproduce import Outcome

COLUMNS = (
    "table",
    "row",
    "column",
    "published",
    "published_on",
    "measured_on",
    "ours",
    "low",
    "high",
    "n",
    "difference",
    "standard",
    "standard_low",
    "standard_high",
    "problem",
    "note",
)


def print_outcomes(outcomes: Sequence[Outcome], protocol: str) -> None:
    """Prints one table for each of the paper's, with what differs below it."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for name, group in itertools.groupby(outcomes, key=lambda outcome: outcome.cell.table):
        rows = list(group)
        console.print(_table(name, rows, protocol))
        for line in dict.fromkeys(_remarks(rows)):
            console.print(f"  {line}")


def _table(name: str, outcomes: Sequence[Outcome], protocol: str) -> Table:
    table = Table(title=name, title_justify="left")
    for heading in ("row", "column", "paper", "ours", "difference", protocol or "protocol"):
        table.add_column(heading, justify="left" if heading in ("row", "column") else "right")
    for outcome in outcomes:
        cell, difference = outcome.cell, outcome.difference
        table.add_row(
            cell.row,
            cell.column,
            "" if cell.published is None else f"{cell.published:g}",
            str(outcome.ours) if outcome.ours else "not measured",
            "" if difference is None else f"{difference:+.2f}",
            str(outcome.standard) if outcome.standard else "",
        )
    return table


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        cell = outcome.cell
        if _plain(cell.published_on) != _plain(cell.dataset):
            lines.append(f"{cell.row}: the paper's data are {cell.published_on}, ours {cell.dataset}: not comparable")
        if outcome.problem:
            lines.append(f"{cell.row}, {cell.column}: {outcome.problem}")
        if cell.note:
            lines.append(f"{cell.row}: {cell.note}")
        if outcome.ours:
            lines.append(f"95 % intervals; n = {outcome.ours.n}")
    return lines


def _plain(name: str) -> str:
    """A dataset's name as papers and robench both write it: Fashion-MNIST and fashion_mnist are one."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes one line for each cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for outcome in outcomes:
            content = outcome.to_json()
            ours, standard = content.pop("ours") or {}, content.pop("standard") or {}
            writer.writerow(
                {
                    **content,
                    "ours": ours.get("value"),
                    **{key: ours.get(key) for key in ("low", "high", "n")},
                    "standard": standard.get("value"),
                    "standard_low": standard.get("low"),
                    "standard_high": standard.get("high"),
                }
            )
