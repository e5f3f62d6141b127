"""What the leaderboards' page says of each row, to be compared with the CSV files that it is made from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape

from robench.board import Board
from robench.leaderboard import Row, attack_columns, percent

SECTION = re.compile(r'<h2 id="([^"]*)">(.*?)</section>', re.DOTALL)
ROW = re.compile(r'<tr class="entry.*?(?=<tr class="entry|</tbody>\s*(?:<tbody>|</table></div>))', re.DOTALL)


def find_unlike(page: str, boards: Sequence[Board]) -> list[str]:
    """The rows, as `board: digest`, of which the page does not say in their place what their leaderboard says.

    Looked at are the cells of the table with what they are sorted by, and the figures and digests of the panel.
    """
    sections = dict(SECTION.findall(page))
    if [*sections] != [board.name for board in boards]:
        return [f"the boards are {', '.join(sections)}"]
    unlike = []
    for board in boards:
        shown = [row[0] for row in ROW.finditer(sections[board.name])]
        rows = [entry.row for entry in board.entries]
        if len(shown) != len(rows):
            unlike.append(f"{board.name}: {len(shown)} rows")
        unlike += [
            f"{board.name}: {row['evidence']}" for row, text in zip(rows, shown, strict=False) if not _agrees(row, text)
        ]
    return unlike


def _agrees(row: Row, text: str) -> bool:
    line, _, panel = text.partition('<tr class="panel"')
    cells = re.findall(r"<td([^>]*)>(.*?)</td>", line, re.DOTALL)
    told = [_plain(cell) for _, cell in cells]
    sorted_by = [re.findall(r'data-value="([^"]*)"', attributes) for attributes, _ in cells]
    figures = [percent(row, kind) for kind in ("robust", "clean")]
    expected = [f"{one[0]:.1f} [{one[1]:.1f}, {one[2]:.1f}]" if one else "not known" for one in figures]
    values = [[str(one[0]) if one else ""] for one in figures]
    facts = [row[name] for name in ("weights_digest", "data_digest", "evidence")]
    several = row["randomized"] == "yes" and row["majority_acc"]
    facts += [f"by majority vote {100 * float(row['majority_acc']):.1f} ["] if several else []
    facts += [f" {key} {100 * float(row[key]):.1f} %" for key in attack_columns([row]) if row[key]]
    return (
        told[0].partition("~")[0].strip() == (row["rank"] or "no rank")
        and told[1].startswith(row["defense"])
        and told[2:4] == expected
        and sorted_by[2:4] == values
        and told[4].startswith(row["audit_verdict"])
        and (told[6], told[7]) == (row["n"], row["date"])
        and all(fact in _plain(panel) for fact in facts)
    )


def _plain(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())
