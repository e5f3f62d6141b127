"""A leaderboard as a table in other texts: Markdown, LaTeX, CSV, JSON, and RobustBench's model_info."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from robench.board import Board, Entry
from robench.errors import UsageError
from robench.files import write_text
from robench.leaderboard import Row, is_complete, is_masked, percent, protocol_name, row_name, rows_csv
from robench.protocol import PROTOCOLS
from robench.report.markdown import markdown_table

LOG: Final = logging.getLogger("robench")
FEWEST: Final = 1000
"""Images; the export names rows of fewer. RobustBench's own figures are of 10,000."""
HEADINGS: Final = ("rank", "defense", "clean, %", "robust, %", "found most errors", "audit", "n", "protocol")


def _percent(row: Row, kind: str) -> str:
    found = percent(row, kind)
    return "not known" if found is None else "{:.1f} [{:.1f}, {:.1f}]".format(*found)


def table_cells(board: Board) -> list[tuple[str, ...]]:
    """The rows of a leaderboard for a table in a text: see `HEADINGS`.

    After a rank `~` says that the next row may be as good, `?` that the two could not be compared. A row whose evidence
    is missing, damaged or says otherwise is marked.
    """
    following: list[Entry | None] = [*board.entries[1:], None] if board.entries else []
    return [
        (
            entry.row["rank"] + _neighbour_sign(entry, after),
            entry.row["defense"]
            + (" (randomized)" if entry.row["randomized"] == "yes" else "")
            + (" (not backed by evidence)" if entry.problem else ""),
            _percent(entry.row, "clean"),
            _percent(entry.row, "robust"),
            entry.found_most,
            entry.row["audit_verdict"],
            entry.row["n"],
            protocol_name(entry.row),
        )
        for entry, after in zip(board.entries, following, strict=True)
    ]


def _neighbour_sign(entry: Entry, after: Entry | None) -> str:
    if entry.below is not None:
        return "" if entry.below.distinct else "~"
    ranked = after is not None and after.row["rank"] and after.row["protocol"] == entry.row["protocol"]
    return "?" if entry.row["rank"] and ranked else ""


def as_markdown(board: Board) -> str:
    """A Markdown table."""
    return markdown_table(HEADINGS, table_cells(board))


def as_latex(board: Board) -> str:
    """A LaTeX table of the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escape(cell) for cell in cells) + r" \\"

    rows = "\n".join(line(cells) for cells in table_cells(board))
    columns = "rlrrllrl"
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(HEADINGS)}\n\\midrule\n{rows}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def as_json(board: Board) -> str:
    """The rows as a JSON array of objects, every value as it stands in the CSV."""
    return json.dumps([entry.row for entry in board.entries], indent=2, ensure_ascii=False) + "\n"


def as_robustbench(board: Board) -> str:
    """RobustBench's model_info of each row that can be exported, as a JSON array; see `model_infos`."""
    return json.dumps(list(model_infos(board).values()), indent=2) + "\n"


def write_robustbench(board: Board, folder: Path) -> list[Path]:
    """Writes `<folder>/<dataset>/<Linf or L2>/<model>.json` for each row, as RobustBench lays them out.

    Raises:
        UsageError: RobustBench has no such norm, or a file cannot be written.
    """
    infos = model_infos(board)
    place = folder / board.dataset / _THREATS[board.norm]
    return [write_text(place / f"{name}.json", json.dumps(info, indent=2) + "\n") for name, info in infos.items()]


def model_infos(board: Board) -> dict[str, dict[str, object]]:
    """What RobustBench keeps of a model, by the name of its file; it has no intervals.

    Rows that miss a number or are not backed by their evidence are left out. So are those of no full protocol, since
    RobustBench ranks by `external`, whatever was run; how many is told on standard error. robench's protocol is not
    AutoAttack: its figure stands under `external`, there is no `autoattack_acc`, and no `reported`, which is the
    authors' own claim. What a row does not know is to be filled in by hand: authors, venue and architecture are empty,
    whether other data was trained on and how many forward passes an answer takes are null. Rows of few images or
    without a passed audit, for which the format has a footnote alone, are named on standard error.

    Raises:
        UsageError: RobustBench has no such norm.
    """
    if board.norm not in _THREATS:
        raise UsageError(f"RobustBench has leaderboards in {', '.join(_THREATS)}; {board.name} is of {board.norm}")
    found: dict[str, dict[str, object]] = {}
    full = [name for name, protocol in PROTOCOLS.items() if protocol.full]
    entries = [entry for entry in board.entries if entry.row["protocol"] in full]
    if others := len(board.entries) - len(entries):
        rows = "1 row is" if others == 1 else f"{others} rows are"
        LOG.warning("%s: %s left out of what RobustBench gets: not of %s", board.name, rows, " or ".join(full))
    entries = [entry for entry in entries if is_complete(entry.row) and not entry.problem]
    weak = [row for row in (entry.row for entry in entries) if int(row["n"]) < FEWEST or row["audit_verdict"] != "pass"]
    if weak:
        named = "; ".join(f"{row_name(row)} ({row['n']} images, audit: {row['audit_verdict']})" for row in weak)
        reason = f"of fewer than {FEWEST:,} images, or with an audit that is not pass"
        LOG.warning("%s: %s; RobustBench has a footnote alone for it: %s", board.name, reason, named)
    for entry in entries:
        name = re.sub(r"[^\w.=-]+", "_", f"{entry.row['defense']}-{protocol_name(entry.row)}").strip("_")
        found[name if name not in found else f"{name}-{entry.row['evidence']}"] = _model_info(board, entry.row)
    return found


def _model_info(board: Board, row: Row) -> dict[str, object]:
    draws = f", {row['judge_repeats']} answers behind each verdict" if row["randomized"] == "yes" else ""
    low, high = (f"{100 * float(row[f'robust_{end}']):.2f}" for end in ("low", "high"))
    return {
        "link": "",
        "name": row["defense"],
        "authors": "",
        "additional_data": None,
        "number_forward_passes": None,
        "dataset": board.dataset,
        "venue": "",
        "architecture": "",
        "eps": board.eps,
        "clean_acc": f"{100 * float(row['clean_acc']):.2f}",
        "external": f"{100 * float(row['robust_acc']):.2f}",
        "unreliable": is_masked(row),
        "footnote": f"robench {protocol_name(row)}, {row['n']} images, 95 % interval "
        f"{low} to {high}{draws}; audit: {row['audit_verdict']}.",
    }


def as_csv(board: Board) -> str:
    """The file itself."""
    return rows_csv([entry.row for entry in board.entries])


FORMATS: Final[dict[str, Callable[[Board], str]]] = {
    "csv": as_csv,
    "md": as_markdown,
    "latex": as_latex,
    "json": as_json,
    "robustbench": as_robustbench,
}

_THREATS: Final = {"linf": "Linf", "l2": "L2"}

LATEX: Final = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\n": " ",
    "\r": " ",
}


def _escape(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)
