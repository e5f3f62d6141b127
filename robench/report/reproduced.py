"""A paper's tables beside ours: on the terminal, as a CSV file, and as a page in Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from robench.data_names import find_data_root
from robench.files import write_atomic
from robench.leaderboard import csv_line
from robench.paper import Outcome
from robench.report.markdown import escape, markdown_table
from robench.reproduce import ReproduceRequest
from robench.shell import join_words

COLUMNS: Final = (
    "table",
    "row",
    "column",
    "published",
    "published_on",
    "published_with",
    "measured_on",
    "recipe",
    "ours",
    "low",
    "high",
    "n",
    "difference",
    "protocol",
    "worst",
    "worst_low",
    "worst_high",
    "worst_n",
    "problem",
    "note",
)
NAMES: Final = ("row", "column")
"""Headings of a table's columns that hold text; the others hold figures."""
OUTPUTS: Final = ("tables.csv", "tables.md")
"""What `write_outcomes` writes: a line for each cell, and a page to read."""


def print_outcomes(outcomes: Sequence[Outcome], protocol: str) -> None:
    """Prints one table for each of the paper's, with what differs below it."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for name, group in _by_table(outcomes):
        table = Table(title=name, title_justify="left")
        for heading in _headings(protocol):
            table.add_column(heading, justify="left" if heading in NAMES else "right")
        for outcome in group:
            table.add_row(*_cells(outcome, protocol))
        console.print(table)
        for line in _remarks(group):
            console.print(f"  {line}")


def write_outcomes(outcomes: Sequence[Outcome], request: ReproduceRequest) -> None:
    """Writes `OUTPUTS` into the request's folder.

    Both may be published: where the data lie on this machine is left out.
    """
    root = find_data_root(request.data_dir)
    for name, text in zip(OUTPUTS, (as_csv(outcomes, request.protocol), as_page(outcomes, request)), strict=True):
        write_atomic(request.folder / name, (text.replace(f"{root}/", "") if root else text).encode())


def as_page(outcomes: Sequence[Outcome], request: ReproduceRequest) -> str:
    """One table in Markdown for each of the paper's, with what differs below it and the command that measures it."""
    parts = [
        f"# The tables of `{request.name}`'s paper, measured again\n\n",
        f"`{_command(request)}`\n\n95 % intervals in brackets; accuracies in percent. The CSV beside this page has the "
        "images behind each figure.\n",
    ]
    for name, group in _by_table(outcomes):
        rows = [_cells(outcome, request.protocol) for outcome in group]
        parts.append(f"\n## {escape(name)}\n\n{markdown_table(_headings(request.protocol), rows)}\n")
        parts += [f"- {escape(line)}\n" for line in _remarks(group)]
    return "".join(parts)


def _command(request: ReproduceRequest) -> str:
    texts = {"--table": request.tables, "--row": request.rows, "--column": request.columns}
    chosen = [(option, text) for option, each in texts.items() for text in each]
    options = {
        "n": request.n,
        "protocol": request.protocol or "none",
        "protocol-n": request.protocol_n,
        "seed": request.seed,
        "dataset": request.dataset or None,
        "precision": None if request.precision == "float32" else request.precision,
        "scale": None if request.scale == 1 else f"{request.scale:g}",
    }
    told = [*chosen, *((f"--{name}", str(value)) for name, value in options.items() if value is not None)]
    words = ["robench", "reproduce", request.name, *itertools.chain.from_iterable(told)]
    return join_words([*words, *(["--train"] if request.train else [])])


def _by_table(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    for name, group in itertools.groupby(outcomes, key=lambda outcome: outcome.cell.table):
        yield name, list(group)


def _headings(protocol: str) -> list[str]:
    return [*NAMES, "paper", "ours", "difference", *([protocol] if protocol else [])]


def _cells(outcome: Outcome, protocol: str) -> list[str]:
    cell, difference = outcome.cell, outcome.difference
    return [
        cell.row,
        cell.column,
        "" if cell.published is None else f"{cell.published:g}",
        str(outcome.ours) if outcome.ours else "not measured",
        "" if difference is None else f"{difference:+.2f}",
        *([str(outcome.worst) if outcome.worst else ""] if protocol else []),
    ]


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader has to know of a table: each remark once, with the cells it is about unless it is about all."""
    about: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for remark in _remarks_on(outcome):
            about.setdefault(remark, []).append(outcome)
    lines = [
        remark if len(those) == len(outcomes) else f"{_name(those, outcomes)}: {remark}"
        for remark, those in about.items()
    ]
    counts = {
        "n": {outcome.ours.n for outcome in outcomes if outcome.ours},
        "under the protocol": {outcome.worst.n for outcome in outcomes if outcome.worst},
    }
    told = ", ".join(f"{name} = {' or '.join(map(str, sorted(found)))}" for name, found in counts.items() if found)
    return [*lines, *([f"95 % intervals; {told}"] if told else [])]


def _name(those: Sequence[Outcome], outcomes: Sequence[Outcome]) -> str:
    """Cells of a table by their rows, with the columns where not all of a row are meant."""
    columns, whole = _by_row(those), _by_row(outcomes)
    return "; ".join(row if few == whole[row] else f"{row} ({', '.join(few)})" for row, few in columns.items())


def _by_row(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.cell.row, []).append(outcome.cell.column)
    return rows


def _remarks_on(outcome: Outcome) -> Iterator[str]:
    cell = outcome.cell
    if cell.published_on not in ("", cell.dataset):
        yield f"the paper's data are {cell.published_on}, ours {cell.dataset}: not comparable"
    if cell.published_with:
        yield cell.published_with
    if outcome.trained:
        yield f"a training of its own: {outcome.trained}"
    elif cell.recipe and not outcome.problem:
        yield f"not measured without a training of its own, {cell.recipe}: --train"
    if outcome.problem:
        yield outcome.problem
    if cell.note:
        yield cell.note


def as_csv(outcomes: Sequence[Outcome], protocol: str) -> str:
    """One line for each cell, none of which is a formula to a spreadsheet."""
    return "".join(csv_line(cells) for cells in (COLUMNS, *(_csv_cells(outcome, protocol) for outcome in outcomes)))


def _csv_cells(outcome: Outcome, protocol: str) -> list[str]:
    content = outcome.to_json()
    ours, worst = content["ours"] or {}, content["worst"] or {}
    content |= {
        "ours": ours.get("value"),
        **{key: ours.get(key) for key in ("low", "high", "n")},
        "protocol": protocol if worst else "",
        "worst": worst.get("value"),
        **{f"worst_{key}": worst.get(key) for key in ("low", "high", "n")},
    }
    return ["" if content[name] is None else str(content[name]) for name in COLUMNS]
