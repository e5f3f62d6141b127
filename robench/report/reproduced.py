"""A paper's tables beside ours: on the terminal, as a CSV file, and as a page in Markdown."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from robench.data_names import find_data_root
from robench.errors import DataError, UsageError
from robench.files import write_atomic
from robench.leaderboard import csv_line
from robench.paper import Cell, Figure, Outcome
from robench.report.markdown import escape, markdown_table
from robench.report.paper_curves import draw_curves
from robench.reproduce import ReproduceRequest
from robench.settings import Settings
from robench.shell import join_words

LOG = logging.getLogger("robench")
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
        if lines := _at_a_glance(group):
            table = Table(*lines[0], title=_title_at_a_glance(protocol), title_justify="left")
            for row in lines[1:]:
                table.add_row(*row)
            console.print(table)


def write_outcomes(
    outcomes: Sequence[Outcome], request: ReproduceRequest, pictures: Mapping[str, str] | None = None
) -> None:
    """Writes `OUTPUTS` into the request's folder; those of a call with other words are renamed.

    Both may be published: where the data lie on this machine is left out.
    """
    page = request.folder / OUTPUTS[1]
    if page.exists() and f"`{_command(request)}`" not in page.read_text(encoding="utf-8"):
        _set_aside(request.folder)
    root = find_data_root(request.data_dir)
    texts = (as_csv(outcomes, request.protocol), as_page(outcomes, request, pictures))
    for name, text in zip(OUTPUTS, texts, strict=True):
        write_atomic(request.folder / name, (text.replace(f"{root}/", "") if root else text).encode())


def _set_aside(folder: Path) -> None:
    """Renames `OUTPUTS` to the first of tables-1, tables-2, ... that is free."""
    number = next(k for k in itertools.count(1) if not any(folder.glob(f"tables-{k}.*")))
    for name in OUTPUTS:
        if (folder / name).exists():
            (folder / name).rename(folder / name.replace("tables", f"tables-{number}"))
    LOG.warning("the tables of an earlier call, of other words, are %s now", folder / f"tables-{number}.md")


def finish_outcomes(outcomes: Sequence[Outcome], request: ReproduceRequest) -> list[str]:
    """Writes `OUTPUTS` with the curves of the tables that have some; returns the names of all files in the folder."""
    pictures: dict[str, str] = {}
    try:
        pictures = draw_curves(outcomes, request.protocol, request.folder)
    except UsageError as error:
        LOG.warning("no picture: %s", error)
    write_outcomes(outcomes, request, pictures)
    return [*OUTPUTS, *pictures.values()]


def as_page(outcomes: Sequence[Outcome], request: ReproduceRequest, pictures: Mapping[str, str] | None = None) -> str:
    """The command that measures the tables of a paper, and these in Markdown."""
    head = (
        f"# The tables of `{request.name}`'s paper, measured again\n\n"
        f"`{_command(request)}`\n\n95 % intervals in brackets; accuracies in percent. The CSV beside this page has the "
        "number of images behind each figure.\n"
    )
    return head + as_tables(outcomes, request.protocol, pictures)


def as_tables(outcomes: Sequence[Outcome], protocol: str, pictures: Mapping[str, str] | None = None) -> str:
    """One table in Markdown for each of the paper's, with its picture above and what differs below it.

    Where most bounds are under more than two attacks, what the protocol leaves there comes first, each once.
    """
    parts = []
    for name, group in _by_table(outcomes):
        picture = (pictures or {}).get(name)
        shown = f"![accuracy against eps, {escape(name)}]({picture})\n\n" if picture else ""
        rows = [_cells(outcome, protocol) for outcome in group]
        parts.append(f"\n## {escape(name)}\n\n{shown}")
        if lines := _at_a_glance(group):
            glance = markdown_table(lines[0], lines[1:])
            parts.append(f"{_title_at_a_glance(protocol, '`')}:\n\n{glance}\nAttack by attack:\n\n")
        parts.append(f"{markdown_table(_headings(protocol), rows)}\n")
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
        "precision": None if request.precision == Settings.precision else request.precision,
        "unit-size": None if request.unit_size == Settings.unit_size else request.unit_size,
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


def _title_at_a_glance(protocol: str, mark: str = "") -> str:
    return f"What {mark}{protocol}{mark} leaves, and of how many images"


def _at_a_glance(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """What the protocol leaves of each defense at each of the paper's columns, below a line of headings.

    Empty unless most of these figures stand more than twice in the table.
    """
    left = {(one.cell.column, one.cell.defense): f"{one.worst} of {one.worst.n}" for one in outcomes if one.worst}
    if sum(one.worst is not None for one in outcomes) <= 2 * len(left):
        return []
    columns, defenses = (list(dict.fromkeys(names)) for names in zip(*left, strict=True))
    return [["", *defenses], *([column, *(left.get((column, one), "") for one in defenses)] for column in columns)]


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader has to know of a table: each remark once, with the cells it is about unless it is about all."""
    about: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for remark in _remarks_on(outcome):
            about.setdefault(remark, []).append(outcome)
    lines = [
        remark if len(those) == len(outcomes) or _is_plain(remark, those) else f"{_name(those, outcomes)}: {remark}"
        for remark, those in about.items()
    ]
    counts = {
        "n": {outcome.ours.n for outcome in outcomes if outcome.ours},
        "under the protocol": {outcome.worst.n for outcome in outcomes if outcome.worst},
    }
    told = ", ".join(f"{name} = {' or '.join(map(str, sorted(found)))}" for name, found in counts.items() if found)
    return [*lines, *([f"95 % intervals; {told}"] if told else [])]


def _is_plain(remark: str, those: Sequence[Outcome]) -> bool:
    """Whether a remark is of one dataset that its cells name anyway, so that nobody has to be told which they are."""
    cells = [each.cell for each in those]
    told = all(re.search(rf"(?<!\w){cell.dataset}(?!\w)", f"{cell.table} {cell.row} {cell.column}") for cell in cells)
    return told and remark in {_other_data(cell) for cell in cells}


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
        yield _other_data(cell)
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


def _other_data(cell: Cell) -> str:
    return f"the paper's data are {cell.published_on}, ours {cell.dataset}: not comparable"


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


def from_csv(text: str, cells: Sequence[Cell]) -> tuple[list[Outcome], str]:
    """The outcomes that `as_csv` wrote, in its order, and the protocol ("": none).

    Args:
        text: a file of `as_csv`.
        cells: of the paper.

    Raises:
        DataError: a line is of no cell of these, or not one of `as_csv`.
    """
    known = {(cell.table, cell.row, cell.column): cell for cell in cells}
    lines = list(csv.DictReader(io.StringIO(text)))
    try:
        outcomes = [
            _outcome(known[line["table"], line["row"].removeprefix("'"), line["column"]], line) for line in lines
        ]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"no table of the cells of this paper: {error!r}") from None
    return outcomes, next((line["protocol"] for line in lines if line["protocol"]), "")


def _outcome(cell: Cell, line: Mapping[str, str]) -> Outcome:
    ours = _figure(line, "ours", "low", "high", "n")
    trained = line["recipe"] if cell.recipe and ours else ""
    return Outcome(cell, ours, _figure(line, "worst", "worst_low", "worst_high", "worst_n"), line["problem"], trained)


def _figure(line: Mapping[str, str], value: str, low: str, high: str, n: str) -> Figure | None:
    return Figure(float(line[value]), float(line[low]), float(line[high]), int(line[n])) if line[value] else None
