"""Accuracy against eps for a paper's tables that have several bounds of one norm: a picture for each table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from robench.errors import UsageError
from robench.paper import Figure, Outcome
from robench.report.curve import AXES
from robench.report.drawing import find_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

POINTS: Final = 3
"""Bounds that make a curve."""
WIDTH: Final = 3.4
HEIGHT: Final = 2.8
"""Inches of one panel."""
LEGEND_ROW: Final = 0.2
"""Inches of a row of the legend."""
MARKERS: Final = "osD^vP*X"

Curve = tuple[str, str, str]
"""The defense (with the recipe of a training of its own), the attack ("": the protocol), and what it is called."""
Panels = dict[tuple[str, str], dict[Curve, list[tuple[float, Figure]]]]
"""By dataset and norm: the curves, each with bounds and what is left there."""


def draw_curves(outcomes: Sequence[Outcome], protocol: str, folder: Path, prefix: str = "curves-") -> dict[str, str]:
    """Draws each table in which a row has three bounds or more of one norm on one dataset; returns files by table.

    A panel for each dataset and norm; a colour for each defense, a marker for each attack, dotted what the protocol
    leaves, at however many bounds; the bars are 95 % intervals.

    Args:
        outcomes: the cells of any tables.
        protocol: what it is called.
        folder: of the pictures.
        prefix: what their names begin with.

    Raises:
        UsageError: matplotlib is missing, or a picture cannot be written.
    """
    drawn = {}
    for table in dict.fromkeys(outcome.cell.table for outcome in outcomes):
        panels = _panels([outcome for outcome in outcomes if outcome.cell.table == table], protocol)
        if panels:
            name = f"{prefix}{re.sub(r'[^a-z0-9]+', '-', table.lower()).strip('-')}.png"
            _draw(panels, folder / name)
            drawn[table] = name
    return drawn


def _panels(outcomes: Sequence[Outcome], protocol: str) -> Panels:
    """The curves of a table."""
    panels: Panels = {}
    for outcome in outcomes:
        cell = outcome.cell
        if not cell.attack:
            continue
        defense = f"{cell.defense} {cell.recipe}".strip()
        worst = (defense, "", f"{defense}, {protocol}")  # the same whatever the attack beside it
        panel = panels.setdefault((cell.dataset, cell.norm), {})
        for key, figure in (((defense, cell.attack, cell.row), outcome.ours), (worst, outcome.worst)):
            points = panel.setdefault(key, [])
            if figure is not None and all(eps != cell.eps for eps, _ in points):
                points.append((cell.eps, figure))
    for panel in panels.values():
        for key in [key for key, points in panel.items() if len(points) < (POINTS if key[1] else 1)]:
            del panel[key]
    return {key: panel for key, panel in panels.items() if any(attack for _, attack, _ in panel)}


def _draw(panels: Panels, file: Path) -> None:
    curves = list(dict.fromkeys(key for panel in panels.values() for key in panel))
    defenses, attacks = (list(dict.fromkeys(key[place] for key in curves)) for place in (0, 1))
    curves.sort(key=lambda key: defenses.index(key[0]))
    datasets, norms = (list(dict.fromkeys(key[place] for key in panels)) for place in (0, 1))
    columns = max(len(norms), 2)
    legend = LEGEND_ROW * (-(-len(curves) // columns) + 1)
    size = (WIDTH * columns, HEIGHT * len(datasets) + legend)
    figure = find_figure("the picture of the curves")(figsize=size, layout="constrained")
    grid = figure.subplots(len(datasets), len(norms), sharey=True, squeeze=False)
    handles: dict[Curve, Line2D] = {}
    for (row, dataset), (column, norm) in itertools.product(enumerate(datasets), enumerate(norms)):
        axes: Axes = grid[row][column]
        if (dataset, norm) not in panels:
            axes.set_axis_off()
            continue
        for key, points in panels[dataset, norm].items():
            defense, attack, _ = key
            handles[key] = _draw_curve(axes, points, f"C{defenses.index(defense)}", attacks.index(attack), attack)
        axes.set(xlabel=AXES[norm], title=dataset, ylim=(0, 100))
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
        if column == 0:
            axes.set_ylabel("accuracy (%)")
    shown, labels = [handles[key] for key in curves], [label for _, _, label in curves]
    figure.legend(shown, labels, loc="outside lower center", ncols=columns, fontsize="small")
    try:
        figure.savefig(file, dpi=100)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from None


def _draw_curve(axes: Axes, points: Sequence[tuple[float, Figure]], colour: str, marker: int, attack: str) -> Line2D:
    """One curve with its intervals; returns what the legend shows."""
    eps, figures = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    below = [figure.value - figure.low for figure in figures]
    above = [figure.high - figure.value for figure in figures]
    line: Line2D = axes.errorbar(
        eps,
        [figure.value for figure in figures],
        yerr=(below, above),
        color=colour,
        marker=MARKERS[marker % len(MARKERS)] if attack else ".",
        linestyle="-" if attack else ":",
        linewidth=1 if attack else 2.5,
        markersize=4,
        elinewidth=0.5,
        alpha=0.8,
    )[0]
    return line
