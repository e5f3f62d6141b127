"""What `robench leaderboard build` and `export` do between parsing and printing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from robench.board import Board, load_boards
from robench.errors import UsageError
from robench.files import write_text
from robench.leaderboard import row_name

LOG = logging.getLogger("robench")


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
        return FORMATS[kind](found[0])
    sign = "### " if kind == "md" else "% "
    return "\n".join(f"{sign}{one.name}\n\n{FORMATS[kind](one)}" for one in found)
