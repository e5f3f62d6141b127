"""The charts of the leaderboards' page, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from robench.board import Board, Entry
from robench.leaderboard import identity, percent, protocol_name
from robench.report.drawing import INK, row_id

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS: Final = 6
"""Plots of an audit's findings shown of a row."""
MARKERS: Final = "osD^vP*X"
SWEEP: Final = 3
"""Points from which on a line joins them; between a clean accuracy and one bound it would be made up."""
Interval = tuple[float, float, float]


def _plain(text: str) -> str:
    """A text that matplotlib shows in a legend: a leading underscore would hide it."""
    return "\u200b" + text if text.startswith("_") else text


def _label(entry: Entry, board: Board) -> str:
    """A row's name in a legend: with its rank, and with its protocol where the board has several."""
    rank, protocol = entry.row["rank"], protocol_name(entry.row)
    several = len({protocol_name(one.row) for one in board.entries}) > 1
    return _plain((f"{rank}. " if rank else "") + entry.row["defense"] + (f", {protocol}" if several else ""))


@contextmanager
def _of_row(axes: Axes, number: int) -> Iterator[str]:
    """What is drawn within belongs to a row of the board, by whose number the page finds it; gives the row's colour."""
    before = set(axes.get_children())
    yield f"C{number - 1}"
    for artist in set(axes.get_children()) - before:
        artist.set_gid(row_id(number))


def draw_scatter(board: Board) -> Figure:
    """Robust against clean accuracy, with both intervals."""
    figure, axes = _board_axes(board)
    for number, entry in enumerate(board.entries, 1):
        clean, robust = (percent(entry.row, kind) for kind in ("clean", "robust"))
        if clean is None or robust is None:
            continue
        with _of_row(axes, number) as color:
            drawn = axes.errorbar(
                clean[0],
                robust[0],
                xerr=_arms(clean),
                yerr=_arms(robust),
                fmt=MARKERS[number % len(MARKERS)],
                color=color,
                fillstyle="none" if entry.masked else "full",
                capsize=2,
            )
            drawn[0].set_label(_label(entry, board) + (" (masked)" if entry.masked else ""))
    axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)", ylim=(-3, 103))
    return _finish(figure, axes)


def _arms(estimate: Interval) -> list[list[float]]:
    value, low, high = estimate
    return [[max(value - low, 0)], [max(high - value, 0)]]


@dataclass(frozen=True)
class Point:
    """An accuracy of a row's defense at a bound.

    Attributes:
        eps: the bound.
        accuracy: in percent, with its 95 % interval.
        images: how many it was measured on.
    """

    eps: float
    accuracy: Interval
    images: int


def points_of(entry: Entry, board: Board, boards: Sequence[Board]) -> list[Point]:
    """The row's worst case by eps, over the leaderboards of its data and norm; the clean accuracy at 0.

    Of another leaderboard it takes the row of the same `identity`, so under the same attacks.
    """
    known = [(0.0, percent(entry.row, "clean"), entry.row)]
    for other in boards:
        if (other.dataset, other.norm) == (board.dataset, board.norm):
            rows = (one.row for one in other.entries if identity(one.row) == identity(entry.row))
            known += [(_number(other.eps), percent(row, "robust"), row) for row in rows]
    found = {eps: Point(eps, accuracy, int(row["n"])) for eps, accuracy, row in known if accuracy is not None}
    return [found[eps] for eps in sorted(found)]


def points_under_pgd(entry: Entry) -> list[Point]:
    """The accuracies under PGD alone in the row's audit, each bound attacked by itself; empty without an audit."""
    audit = entry.bundle.audit if entry.bundle is not None else None
    if audit is None:
        return []
    factors = {"clean": 0.0, "pgd, half eps": 0.5, "pgd": 1.0, "pgd, double eps": 2.0}
    known = audit["accuracies"]
    return [Point(at * audit["eps"], tuple(known[name]), audit["n"]) for name, at in factors.items() if name in known]


def draw_curves(board: Board, boards: Sequence[Board]) -> Figure:
    """Accuracy against eps: what was run as markers, joined where it is a sweep; dashed under PGD in the audit."""
    figure, axes = _board_axes(board)
    for number, entry in enumerate(board.entries, 1):
        points, under_pgd = points_of(entry, board, boards), points_under_pgd(entry)
        if not points:
            continue
        label = _label(entry, board) + (f" (dashed: {under_pgd[0].images} images)" if under_pgd else "")
        marker = MARKERS[number % len(MARKERS)]
        with _of_row(axes, number) as color:
            drawn = axes.errorbar(
                [point.eps for point in points],
                [point.accuracy[0] for point in points],
                yerr=np.hstack([_arms(point.accuracy) for point in points]),
                fmt=marker,
                linestyle="-" if len(points) >= SWEEP else "none",
                color=color,
                markersize=4,
                capsize=2,
            )
            drawn[0].set_label(label)
            if under_pgd:
                at = [point.eps for point in under_pgd]
                middle, low, high = zip(*(point.accuracy for point in under_pgd), strict=True)
                axes.plot(
                    at, middle, linestyle="--", linewidth=1, color=color, marker=marker, markersize=3, fillstyle="none"
                )
                axes.fill_between(at, low, high, alpha=0.1, color=color, linewidth=0)
    axes.set(xlabel=f"eps ({board.norm})", ylabel="accuracy (%)", ylim=(-3, 103))
    axes.locator_params(axis="x", nbins=5)  # more would touch, at 0.175 and 0.200
    return _finish(figure, axes)


def _number(eps: str) -> float:
    above, _, below = eps.partition("/")
    return float(above) / float(below or 1)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart of a size in inches, small enough that a phone need not shrink its letters of 8 and 9 points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _board_axes(board: Board) -> tuple[Figure, Axes]:
    """An empty chart with room below for a line of the legend for each row, so that long names fit a phone."""
    return _axes(4.2, 3.2 + 0.17 * len(board.entries))


def _finish(figure: Figure, axes: Axes) -> Figure:
    """Adds the legend, whose lines belong to the rows that they name."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return figure
    legend = figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False, labelspacing=0.3)
    for handle, shown, text in zip(handles, legend.legend_handles, legend.get_texts(), strict=True):
        text.set(color=INK, gid=handle.get_gid())
        if shown is not None:
            shown.set_gid(handle.get_gid())
    return figure


def draw_findings(audit: Mapping[str, Any]) -> list[Figure]:
    """The plots of an audit's findings, those that failed first."""
    order = {"fail": 0, "suspect": 1}
    drawn = sorted(
        (finding for finding in audit["findings"] if finding.get("plot")),
        key=lambda finding: order.get(finding["verdict"], 2),
    )
    return [_draw_finding(finding) for finding in drawn[:PLOTS]]


def _draw_finding(finding: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(3.4, 2.7)
    plot = finding["plot"]
    for number, curve in enumerate(plot["curves"]):
        marker, label = MARKERS[number % len(MARKERS)], _plain(curve["label"])
        (line,) = axes.plot(curve["x"], curve["y"], marker=marker, markersize=3, label=label)
        if curve["low"]:
            axes.fill_between(curve["x"], curve["low"], curve["high"], alpha=0.15, color=line.get_color())
    axes.set_title(f"{finding['check']}: {finding['verdict']}", fontsize="medium")
    axes.set(xlabel=_plain(plot["x_label"]), ylabel=_plain(plot["y_label"]))
    axes.legend(fontsize="small", frameon=False, labelcolor=INK)
    return figure
