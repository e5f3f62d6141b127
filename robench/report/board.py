"""The page of all leaderboards: one self-contained file, made from the CSV files and the evidence beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from robench.audit.effort import read_effort
from robench.board import Board, Entry, Neighbours
from robench.bundle import Bundle
from robench.check_names import QUESTIONS
from robench.defense import Defense
from robench.estimate import Estimate
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
from robench.shares import in_percent
from robench.threat import format_eps
from robench.weights import find_card

LOG = logging.getLogger("robench")
URGENCY: Final = {"fail": 0, "suspect": 1}
"""Which findings of an audit come first."""


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
        rows = {board.name: _show_rows(board, boards, drawings, data_dir) for board in boards}
        sections = [
            {
                "board": board,
                "scatter": Markup(drawings.svg(draw_scatter(board))),  # every text in it is escaped
                "curves": Markup(drawings.svg(draw_curves(board, boards))),
                "rows": rows[board.name],
                "trained": _count_trained(rows[board.name]),
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


def _show_rows(
    board: Board, boards: Sequence[Board], drawings: Drawings, data_dir: Path | None
) -> list[dict[str, Any]]:
    return [
        {
            **_show(number, entry, drawings, data_dir),
            "points": _show_points(entry, board, boards),
            "tie": _tell_tie(entry.below, entry.below.name if entry.below is not None else ""),
            "tie_above": _tell_tie(above.below, f"{above.row['rank']}. {above.row['defense']}") if above else "",
        }
        for number, (above, entry) in enumerate(zip([None, *board.entries], board.entries, strict=False), 1)
    ]


def _count_trained(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many images robench's own nets of a board were trained on: the fewest and the most, or the one count."""
    counts = [row["card"]["train_images"] for row in rows if "train_images" in row["card"]]
    return sorted({min(counts), max(counts)}) if counts else []


def _show_protocols(board: Board) -> dict[str, str]:
    """The protocols of a board in their order, and in words what they run."""
    found = {}
    for row in (entry.row for entry in board.entries):
        protocol = find_protocol(row["protocol"])
        attacks = protocol.attacks.get(board.norm, ()) if protocol is not None else ()
        cascade = ", each on the images that those before left" if protocol is not None and protocol.cascade else ""
        found[protocol_name(row)] = ", ".join(attacks) + cascade if attacks else "the attacks that its row names"
    return found


def _tell_tie(found: Neighbours | None, name: str) -> str:
    """That a paired test cannot tell a row from a neighbour of that name; empty where it can, or there is none."""
    if found is None or found.distinct:
        return ""
    return f"not distinguishable from {name} (paired test on {found.images} images)"


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
        "card": _card(entry),
        "draws": _show_draws(entry),
        "attacks": _show_attacks(entry),
        "audit": audit,
        **_show_findings(audit),
        "plots": [Markup(drawings.svg(one)) for one in draw_findings(audit)] if audit is not None else [],
        "pictures": make_pictures(entry.bundle, data_dir) if entry.bundle is not None else [],
    }


def _show_findings(audit: Mapping[str, Any] | None) -> dict[str, Any]:
    """The findings of an audit that doubt the row, those that do not, those not made, and in words why a verdict fell.

    That the effort was reduced belongs to the reasons: fewer attempts find less.
    """
    found: list[Mapping[str, Any]] = audit["findings"] if audit is not None else []
    doubts = sorted((one for one in found if one["verdict"] in URGENCY), key=lambda one: URGENCY[one["verdict"]])
    effort = read_effort(audit) if audit is not None else None
    return {
        "doubts": doubts,
        "passed": [one for one in found if one["verdict"] not in (*URGENCY, "not run")],
        "missed": [one for one in found if one["verdict"] == "not run"],
        "effort": effort,
        "reasons": [one["check"] for one in doubts] + (["reduced effort"] if effort and effort.reduced else []),
    }


def _show_draws(entry: Entry) -> list[tuple[str, Any, Any]]:
    """`Evaluation.other_counts` of a row, in percent with their intervals."""
    lines = entry.bundle.figures.other_counts() if entry.bundle is not None else []
    return [(name, _in_percent(robust), _in_percent(clean)) for name, robust, clean in lines]


def _in_percent(estimate: Estimate | None) -> tuple[float, float, float] | None:
    if estimate is None:
        return None
    low, middle, high = (in_percent(one) for one in (estimate.low, estimate.value, estimate.high))
    return middle, low, high


def _builtin(entry: Entry) -> type[Defense] | None:
    """The class of a row's defense where it is one of robench's own; others are not imported for a page."""
    name = parse_spec(entry.bundle.spec.defense)[0] if entry.bundle is not None and entry.bundle.spec.defense else ""
    found: type[Defense] | None = resolve("defense", name) if name in builtin_names("defense") else None
    return found


def _card(entry: Entry) -> dict[str, Any]:
    """The model card of a row's weights; empty where robench does not ship these."""
    defense = _builtin(entry)
    return find_card(defense, entry.row["weights_digest"]) if defense is not None else {}


def _kinds(entry: Entry) -> list[str]:
    """What a row's defense is; whether it is generative is asked of robench's own alone."""
    kinds = ["randomized" if entry.row["randomized"] == "yes" else "deterministic"]
    if getattr(_builtin(entry), "generative", False):
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
