"""What `robench leaderboard build` and `export` do between parsing and printing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from robench.board import Board, load_boards
from robench.errors import UsageError
from robench.files import write_text
from robench.leaderboard import is_complete, row_name
from robench.protocol import PROTOCOLS

LOG = logging.getLogger("robench")
FEWEST_TOLD: Final = 1000
"""Images; RobustBench's own figures are of 10,000."""


def build_page(folder: Path, names: Sequence[str], out: Path | None, data_dir: Path | None) -> Path:
    """Writes the page of the leaderboards in a folder; returns its path.

    Raises:
        RobenchError: no leaderboard, a damaged one, a missing package, or a folder that cannot be written.
    """
    from robench.report.board import render_boards

    page = render_boards(load_told(folder, names), data_dir)
    return write_text(out or folder / "index.html", page)


def load_told(folder: Path, names: Sequence[str]) -> list[Board]:
    """The leaderboards in a folder; tells on standard error which rows their evidence does not back.

    Raises:
        UsageError: no leaderboard of that name.
        DataError: a leaderboard is damaged.
    """
    found = load_boards(folder, names)
    for board in found:
        for entry in board.entries:
            if entry.problem:
                LOG.warning("%s: %s: %s", board.name, row_name(entry.row), entry.problem)
    return found


def print_tables(folder: Path, names: Sequence[str], kind: str, others: Sequence[str] = ()) -> str:
    """The leaderboards in a folder as text in a format of `robench.report.tables.FORMATS`.

    Args:
        folder: of the CSV files.
        names: the leaderboards; none: all.
        kind: the format.
        others: formats that the command has beside these, for the message.

    Raises:
        UsageError: no such format, no leaderboard of that name, or several where the format holds one.
        DataError: a leaderboard is damaged.
    """
    from robench.report.tables import FORMATS

    if kind not in FORMATS:
        raise UsageError(f'--format must be {", ".join((*others, *FORMATS))}; got "{kind}"')
    found = load_told(folder, names)
    if len(found) > 1 and kind not in ("md", "latex"):
        raise UsageError(f"{kind} holds one leaderboard; choose with --board: {', '.join(one.name for one in found)}")
    if len(found) == 1:
        text = FORMATS[kind](found[0])
        if kind == "robustbench":
            tell_weak(found[0])
        return text
    sign = "### " if kind == "md" else "% "
    return "\n".join(f"{sign}{one.name}\n\n{FORMATS[kind](one)}" for one in found)


def tell_weak(board: Board) -> None:
    """Tells on standard error of which rows RobustBench's figures say too little: few images, or no passed audit.

    Its format has no place for either but the footnote, and it ranks such a row like all others.
    """
    weak = []
    for entry in board.entries:
        row, protocol = entry.row, PROTOCOLS.get(entry.row["protocol"])
        is_exported = protocol is not None and protocol.full and is_complete(row) and not entry.problem
        if is_exported and (int(row["n"]) < FEWEST_TOLD or row["audit_verdict"] != "pass"):
            weak.append(f"{row_name(row)} ({row['n']} images, audit: {row['audit_verdict']})")
    if weak:
        reason = f"of fewer than {FEWEST_TOLD:,} images, or with an audit that is not pass"
        LOG.warning("%s: %s; RobustBench has a footnote alone for it: %s", board.name, reason, "; ".join(weak))
