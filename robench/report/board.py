"""The page of all leaderboards: one self-contained file, made from the CSV files and the evidence beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robench.audit.effort import read_effort
from robench.board import Board, Entry
from robench.bundle import Bundle
from robench.check_names import QUESTIONS
from robench.leaderboard import attack_columns, percent, protocol_name
from robench.protocol import find_protocol
from robench.registry import builtin_names, parse_spec, resolve
from robench.report.board_charts import (
    Point,
    draw_curves,
    draw_findings,
    draw_scatter,
    points_of,
    points_under_pgd,
)
from robench.report.drawing import Drawings, page_style
from robench.report.page import load_template
from robench.report.pictures import make_pictures
from robench.threat import format_eps

LOG = logging.getLogger("robench")


def render_boards(boards: Sequence[Board], data_dir: Path | None = None) -> str:
    """The page; the same leaderboards give the same bytes.

    Args:
        boards: as `robench.board.load_boards` gives them.
        data_dir: folder with datasets, for the originals of the adversarial images; a row whose data is not at hand is
            shown without images.

    Raises:
        UsageError: Jinja2 or matplotlib is missing.
    """
    page = load_template("board.html", "the leaderboards'")
    from markupsafe import Markup

    drawings = Drawings()
    with page_style():
        sections = [
            {
                "board": board,
                "scatter": Markup(drawings.svg(draw_scatter(board))),  # every text in it is escaped
                "curves": Markup(drawings.svg(draw_curves(board, boards))),
                "rows": [
                    {**_show(number, entry, drawings, data_dir), "points": _show_points(entry, board, boards)}
                    for number, entry in enumerate(board.entries, 1)
                ],
                "protocols": _show_protocols(board),
            }
            for board in boards
        ]
    for dataset in _without_images(sections):
        LOG.warning(
            "the page has no adversarial images of %s, whose test split is not at hand: see --data-dir",
            dataset,
        )
    return page.render(
        sections=sections,
        drawn=Markup(drawings.css()),
        questions=QUESTIONS,
        datasets=sorted({board.dataset for board in boards}),
        norms=sorted({board.norm for board in boards}),
        protocols=sorted({protocol_name(entry.row) for board in boards for entry in board.entries}, reverse=True),
        verdicts=sorted({entry.row["audit_verdict"] for board in boards for entry in board.entries}),
    )


def _show_protocols(board: Board) -> dict[str, str]:
    """The protocols of a board in their order, and in words what they run."""
    found = {}
    for row in (entry.row for entry in board.entries):
        protocol = find_protocol(row["protocol"])
        attacks = protocol.attacks.get(board.norm, ()) if protocol is not None else ()
        cascade = ", each on the images that those before left" if protocol is not None and protocol.cascade else ""
        found[protocol_name(row)] = ", ".join(attacks) + cascade if attacks else "the attacks that its row names"
    return found


def _without_images(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """The datasets of rows that have adversarial images which could not be drawn."""
    rows = [row for section in sections for row in section["rows"]]
    return sorted({row["entry"].bundle.spec.dataset for row in rows if _lacks_images(row)})


def _lacks_images(row: Mapping[str, Any]) -> bool:
    bundle = row["entry"].bundle
    return bundle is not None and bool(bundle.encodings) and not row["pictures"]


def _show(number: int, entry: Entry, drawings: Drawings, data_dir: Path | None) -> dict[str, Any]:
    from markupsafe import Markup

    audit = entry.bundle.audit if entry.bundle is not None else None
    return {
        "number": number,
        "digest": entry.bundle.digest if entry.bundle is not None else "",
        "entry": entry,
        "row": entry.row,
        "protocol": protocol_name(entry.row),
        "kinds": _kinds(entry),
        "percent": {name: percent(entry.row, name) for name in ("clean", "robust")},
        "attacks": _show_attacks(entry),
        "audit": audit,
        "effort": read_effort(audit) if audit is not None else None,
        "missed": [one for one in audit["findings"] if one["verdict"] == "not run"] if audit is not None else [],
        "plots": [Markup(drawings.svg(one)) for one in draw_findings(audit)] if audit is not None else [],
        "pictures": make_pictures(entry.bundle, data_dir) if entry.bundle is not None else [],
    }


def _kinds(entry: Entry) -> list[str]:
    """What a row's defense is; whether it is generative is asked of robench's own alone, others are not imported."""
    kinds = ["randomized" if entry.row["randomized"] == "yes" else "deterministic"]
    name = parse_spec(entry.bundle.spec.defense)[0] if entry.bundle is not None and entry.bundle.spec.defense else ""
    if name in builtin_names("defense") and getattr(resolve("defense", name), "generative", False):
        kinds.append("generative")
    return kinds


def _show_attacks(entry: Entry) -> dict[str, Any]:
    """The attacks' cells of a row in the order of the run, under a heading that says what they are.

    In a cascade an image that an attack settled is wrong under all later ones, so that a cell is what is left then; of
    a randomized defense only an image without any right answer is settled.
    """
    spec = entry.bundle.spec if entry.bundle is not None else None
    if not entry.cascade:
        heading = "under each attack"
    elif entry.row["randomized"] == "yes":
        heading = "under each attack in turn; an image without any right answer stays wrong"
    else:
        heading = "left standing after each attack, in order"
    order = [one.key for one in spec.attacks] if spec is not None else attack_columns([entry.row])
    known = [key for key in order if entry.row.get(key)]
    attacked = _count_attacked(entry.bundle) if entry.bundle is not None else {}
    return {
        "heading": heading,
        "lines": [(key, 100 * float(entry.row[key]), attacked.get(key)) for key in known],
    }


def _show_points(entry: Entry, board: Board, boards: Sequence[Board]) -> list[tuple[str, str, Point]]:
    """What the curves of a row are drawn from: the bound, the attacks, and the point."""
    worst = f"worst case, {protocol_name(entry.row)}"
    shown = [(worst if point.eps else "none", point) for point in points_of(entry, board, boards)]
    shown += [(f"{'PGD' if point.eps else 'none'}, in the audit", point) for point in points_under_pgd(entry)]
    return [(format_eps(point.eps, board.norm), name, point) for name, point in shown]


def _count_attacked(bundle: Bundle) -> dict[str, int]:
    """On how many images each attack was run: those right without one and, in a cascade, not settled before."""
    table = bundle.figures.table
    return {key: int(((table["attack"] == key) & (table["status"] == "ok")).sum()) for key in table["attack"].unique()}
