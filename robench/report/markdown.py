"""Tables in Markdown, for pages that are read on a forge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

SIGNS: Final = {**{sign: f"\\{sign}" for sign in "\\|*_`<>&~$"}, "\n": " ", "\r": " "}


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, in which every cell shows as it is."""
    return "".join(
        [_line([escape(cell) for cell in headings]), _line(["---"] * len(headings))]
        + [_line([escape(cell) for cell in row]) for row in rows]
    )


def escape(text: str) -> str:
    """A text that Markdown takes for nothing but text, on one line; an interval in brackets stays readable."""
    return re.sub(r"\](?=[(\[])", r"\]", "".join(SIGNS.get(sign, sign) for sign in text))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"
