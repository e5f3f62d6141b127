"""The charts of the leaderboards' page, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from robench.board import Board, Entry
from robench.leaderboard import Row
from robench.report.drawing import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS: Final = 6
"""Plots of an audit's findings shown of a row."""
MARKERS: Final = "osD^vP*X"


def percent(row: Row, kind: str) -> tuple[float, float, float] | None:
    """The clean or robust accuracy of a row with its interval, in percent; None where a number is missing."""
    cells = [row[f"{kind}_{end}"] for end in ("acc", "low", "high")]
    if not all(cells):
        return None
    value, low, high = (100 * float(cell) for cell in cells)
    return value, low, high


def _plain(text: str) -> str:
    """A text that matplotlib shows in a legend: a leading underscore would hide it."""
    return "\u200b" + text if text.startswith("_") else text


def _label(entry: Entry) -> str:
    rank = entry.row["rank"]
    return _plain(f"{rank}. {entry.row['defense']}" if rank else entry.row["defense"])


def draw_scatter(board: Board) -> Figure:
    """Robust against clean accuracy, with both intervals."""
    figure, axes = _axes()
    for number, entry in enumerate(board.entries):
        clean, robust = (percent(entry.row, kind) for kind in ("clean", "robust"))
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


def draw_curves(board: Board, boards: Sequence[Board]) -> Figure:
    """Worst-case accuracy against eps over all leaderboards of the data and norm, from the clean accuracy on."""
    figure, axes = _axes()
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
    found = {0.0: percent(entry.row, "clean")} | {eps: percent(row, "robust") for eps, row in rows}
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


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", fontsize="small", frameon=False)
        for text in legend.get_texts():
            text.set_color(INK)
    return figure


def draw_findings(audit: Mapping[str, Any]) -> Figure | None:
    """The plots of an audit's findings in one figure, those that failed first."""
    from matplotlib.figure import Figure

    order = {"fail": 0, "suspect": 1}
    drawn = sorted(
        (finding for finding in audit["findings"] if finding.get("plot")),
        key=lambda finding: order.get(finding["verdict"], 2),
    )[:PLOTS]
    if not drawn:
        return None
    lines = -(-len(drawn) // 3)
    figure = Figure(figsize=(9.6, 2.7 * lines), layout="constrained")
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
