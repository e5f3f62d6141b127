"""The page of all leaderboards: one self-contained file, made from the CSV files and the evidence beside them."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from robench.board import Board, Entry
from robench.bundle import Bundle
from robench.check_names import QUESTIONS
from robench.data import load_dataset
from robench.errors import RobenchError
from robench.leaderboard import Row, attack_columns
from robench.protocol import find_protocol
from robench.report.drawing import INK, Drawings, page_style
from robench.report.page import load_template
from robench.unit_table import CLEAN, WORST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES: Final = 8
"""Adversarial images shown of a row."""
PLOTS: Final = 6
"""Plots of an audit's findings shown of a row."""
LOG = logging.getLogger("robench")
MARKERS: Final = "osD^vP*X"


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
    from matplotlib.figure import Figure

    drawings = Drawings()
    with page_style():
        sections = [
            {
                "board": board,
                "scatter": Markup(drawings.svg(_draw_scatter(board, Figure))),  # every text in it is escaped
                "curves": Markup(drawings.svg(_draw_curves(board, boards, Figure))),
                "rows": [_show(number, entry, drawings, data_dir) for number, entry in enumerate(board.entries, 1)],
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
        verdicts=sorted({entry.row["audit_verdict"] for board in boards for entry in board.entries}),
    )


def _without_images(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """The datasets of rows that have adversarial images which could not be drawn."""
    rows = [row for section in sections for row in section["rows"]]
    return sorted({row["entry"].bundle.spec.dataset for row in rows if _has_images(row["entry"]) and not row["grid"]})


def _has_images(entry: Entry) -> bool:
    return entry.bundle is not None and bool(entry.bundle.encodings)


def _show(number: int, entry: Entry, drawings: Drawings, data_dir: Path | None) -> dict[str, Any]:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    audit = entry.bundle.audit if entry.bundle is not None else None
    plots = _draw_findings(audit, Figure) if audit is not None else None
    return {
        "number": number,
        "entry": entry,
        "row": entry.row,
        "percent": {name: _percent(entry.row, name) for name in ("clean", "robust")},
        "attacks": _show_attacks(entry),
        "audit": audit,
        "plots": Markup(drawings.svg(plots)) if plots is not None else "",
        "grid": _pictures(entry.bundle, data_dir) if entry.bundle is not None else "",
    }


def _show_attacks(entry: Entry) -> dict[str, Any]:
    """The attacks' cells of a row in the order of the run, under a heading that says what they are.

    In a cascade an image that an attack settled is wrong under all later ones, so that a cell is what is left then; of
    a randomized defense only an image without any right answer is settled.
    """
    spec = entry.bundle.spec if entry.bundle is not None else None
    protocol = find_protocol(entry.row["protocol"])
    if not (spec.cascade if spec is not None else protocol is not None and protocol.cascade):
        heading = "under each attack"
    elif entry.row["randomized"] == "yes":
        heading = "under each attack, in order, on images with right answers left"
    else:
        heading = "left standing after each attack, in order"
    order = [one.key for one in spec.attacks] if spec is not None else attack_columns([entry.row])
    known = [key for key in order if entry.row.get(key)]
    attacked = _count_attacked(entry.bundle) if entry.bundle is not None else {}
    return {
        "heading": heading,
        "lines": [(key, 100 * float(entry.row[key]), attacked.get(key)) for key in known],
    }


def _count_attacked(bundle: Bundle) -> dict[str, int]:
    """On how many images each attack was run: those right without one and, in a cascade, not settled before."""
    table = bundle.figures.table
    return {key: int(((table["attack"] == key) & (table["status"] == "ok")).sum()) for key in table["attack"].unique()}


def _percent(row: Row, kind: str) -> tuple[float, float, float] | None:
    cells = [row[f"{kind}_{end}"] for end in ("acc", "low", "high")]
    if not all(cells):
        return None
    value, low, high = (100 * float(cell) for cell in cells)
    return value, low, high


# plots


def _plain(text: str) -> str:
    """A text that matplotlib shows in a legend: a leading underscore would hide it."""
    return "\u200b" + text if text.startswith("_") else text


def _label(entry: Entry) -> str:
    rank = entry.row["rank"]
    return _plain(f"{rank}. {entry.row['defense']}" if rank else entry.row["defense"])


def _draw_scatter(board: Board, new: type[Figure]) -> Figure:
    """Robust against clean accuracy, with both intervals."""
    figure, axes = _axes(new)
    for number, entry in enumerate(board.entries):
        clean, robust = (_percent(entry.row, kind) for kind in ("clean", "robust"))
        if clean is None or robust is None:
            continue
        axes.errorbar(
            clean[0],
            robust[0],
            xerr=_arms(clean),
            yerr=_arms(robust),
            fmt=MARKERS[number % len(MARKERS)],
            label=_label(entry) + (" (masked)" if entry.masked else ""),
            fillstyle="none" if entry.masked else "full",
            capsize=2,
        )
    axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)", ylim=(-3, 103))
    return _finish(figure, axes)


def _arms(estimate: tuple[float, float, float]) -> list[list[float]]:
    value, low, high = estimate
    return [[max(value - low, 0)], [max(high - value, 0)]]


def _draw_curves(board: Board, boards: Sequence[Board], new: type[Figure]) -> Figure:
    """Worst-case accuracy against eps over all leaderboards of the data and norm, from the clean accuracy on."""
    figure, axes = _axes(new)
    for number, entry in enumerate(board.entries):
        points = _points(entry, [one for one in boards if (one.dataset, one.norm) == (board.dataset, board.norm)])
        if not points:
            continue
        at = sorted(points)
        middle, low, high = zip(*(points[eps] for eps in at), strict=True)
        (line,) = axes.plot(at, middle, marker=MARKERS[number % len(MARKERS)], markersize=4, label=_label(entry))
        axes.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        under_pgd = _points_under_pgd(entry, _number(board.eps))
        if under_pgd:
            axes.plot(*zip(*under_pgd, strict=True), linestyle="--", linewidth=1, color=line.get_color())
    axes.set(xlabel=f"eps ({board.norm})", ylabel="accuracy (%)", ylim=(-3, 103))
    return _finish(figure, axes)


def _points(entry: Entry, boards: Sequence[Board]) -> dict[float, tuple[float, float, float]]:
    """Accuracies of a row's defense by eps, over the leaderboards of one kind of threat model; the clean one at 0."""
    rows = [(_number(board.eps), one.row) for board in boards for one in board.entries if _same(one.row, entry.row)]
    found = {0.0: _percent(entry.row, "clean")} | {eps: _percent(row, "robust") for eps, row in rows}
    return {eps: value for eps, value in found.items() if value is not None}


def _points_under_pgd(entry: Entry, eps: float) -> list[tuple[float, float]]:
    """Accuracies under PGD in the row's audit, each bound attacked by itself; empty without one."""
    audit = entry.bundle.audit if entry.bundle is not None else None
    if audit is None:
        return []
    factors = {"clean": 0.0, "pgd, half eps": 0.5, "pgd": 1.0, "pgd, double eps": 2.0}
    known = audit["accuracies"]
    return [(factor * eps, known[name][0]) for name, factor in factors.items() if name in known]


def _same(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in ("defense", "protocol", "weights_digest"))


def _number(eps: str) -> float:
    above, _, below = eps.partition("/")
    return float(above) / float(below or 1)


def _axes(new: type[Figure]) -> tuple[Figure, Axes]:
    figure = new(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", fontsize="small", frameon=False)
        for text in legend.get_texts():
            text.set_color(INK)
    return figure


def _draw_findings(audit: Mapping[str, Any], new: type[Figure]) -> Figure | None:
    """The plots of an audit's findings in one figure, those that failed first."""
    order = {"fail": 0, "suspect": 1}
    drawn = sorted(
        (finding for finding in audit["findings"] if finding.get("plot")),
        key=lambda finding: order.get(finding["verdict"], 2),
    )[:PLOTS]
    if not drawn:
        return None
    lines = -(-len(drawn) // 3)
    figure = new(figsize=(9.6, 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, 3, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.set_axis_off()
    for axes, finding in zip(grid.flat, drawn, strict=False):
        plot = finding["plot"]
        for number, curve in enumerate(plot["curves"]):
            marker, label = MARKERS[number % len(MARKERS)], _plain(curve["label"])
            (line,) = axes.plot(curve["x"], curve["y"], marker=marker, markersize=3, label=label)
            if curve["low"]:
                axes.fill_between(curve["x"], curve["low"], curve["high"], alpha=0.15, color=line.get_color())
        axes.set_title(f"{finding['check']}: {finding['verdict']}", fontsize="small")
        axes.set(xlabel=_plain(plot["x_label"]), ylabel=_plain(plot["y_label"]))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", frameon=False, labelcolor=INK)
    return figure


# images


def _pictures(bundle: Bundle, data_dir: Path | None) -> str:
    """Originals, adversarial images and differences as PNG in base64, broken images first; "" without the data."""
    from PIL import Image

    worst, clean = bundle.figures.answers(WORST), bundle.figures.answers(CLEAN)
    if worst is None or clean is None or not bundle.encodings:
        return ""
    spec = bundle.spec
    try:
        data = load_dataset(spec.dataset, "test", spec.n, spec.seed, data_dir)
    except RobenchError:
        return ""
    if data.digest != spec.data_digest:
        return ""
    broken = torch.from_numpy(worst.right < clean.right).nonzero()[:, 0].tolist()
    places = (broken or list(range(spec.n)))[:PICTURES]
    x = data.x[places]
    x_adv = bundle.pictures(places, x)
    spread = (x_adv - x).abs().amax().clamp_min(1e-12)
    rows = torch.stack([x, x_adv, 0.5 + (x_adv - x) / (2 * spread)])  # 3 k c h w
    framed = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
    pixels = (255 * framed.clamp(0, 1)).round().to(torch.uint8).permute(0, 3, 1, 4, 2)  # 3 h k w c
    sheet = pixels.reshape(3 * pixels.shape[1], -1, pixels.shape[-1]).numpy()
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
