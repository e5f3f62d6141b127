"""Accuracy against eps as a picture, one curve with its 95 % band for every run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from robench.errors import UsageError
from robench.files import Place
from robench.report.drawing import find_figure
from robench.result import Evaluation
from robench.threat import format_eps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = logging.getLogger("robench")
FORMATS: Final = (".png", ".svg", ".pdf")
AXES: Final = {
    "linf": "eps (linf, images in [0, 1])",
    "l2": "eps (l2, images in [0, 1])",
    "l1": "eps (l1, images in [0, 1])",
    "l0": "eps (l0, pixels changed)",
}


def plot_runs(folders: Sequence[Place], out: Path) -> list[str]:
    """Draws the curves of finished runs into one picture; returns their labels.

    Bounds at which an attack failed are left out, and named on standard error.

    Args:
        folders: run folders, all in one norm and on one dataset.
        out: the picture; its ending is its format.

    Raises:
        UsageError: matplotlib is missing, the runs do not belong in one picture, or the file cannot be written.
        DataError: a run is not finished or damaged.
    """
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f'the picture must end in {", ".join(FORMATS)}; got "{out.name}"')
    results = [Evaluation.load(folder) for folder in folders]
    for what in ("norm", "dataset"):
        values = sorted({getattr(result.spec, what) or "images of the caller" for result in results})
        if len(values) != 1:
            raise UsageError(f"curves of one picture need one {what}; these runs have {', '.join(values)}")
    labels = _labels(results)
    figure = find_figure("robench plot")(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (result, label) in enumerate(zip(results, labels, strict=True)):
        _tell_missing(result)
        draw_curve(axes, result, label, number)
    spec = results[0].spec
    axes.set(xlabel=AXES[spec.norm], ylabel="accuracy (%)", ylim=(0, 100), title=f"robust accuracy on {spec.dataset}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title="95 % interval shaded", fontsize="small")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
    return labels


def draw_curve(axes: Axes, result: Evaluation, label: str, number: int) -> None:
    """Draws one run: its points joined by a line, the band of the intervals, a marker of its own."""
    points = [point for point in result.curve if point["value"] is not None]
    eps = [point["eps"] for point in points]
    percent = {key: [100 * point[key] for point in points] for key in ("value", "low", "high")}
    (line,) = axes.plot(eps, percent["value"], marker="osD^vP*X"[number % 8], markersize=5, label=label)
    axes.fill_between(eps, percent["low"], percent["high"], alpha=0.15, color=line.get_color(), linewidth=0)


def _tell_missing(result: Evaluation) -> None:
    """Warns of the bounds that have no point, because an attack failed there."""
    for eps in result.spec.eps:
        if failed := result.failed_at(eps):
            bound = format_eps(eps, result.spec.norm)
            LOG.warning("%s: no point at eps %s, where %s failed", result.folder, bound, ", ".join(failed))


def _labels(results: Sequence[Evaluation]) -> list[str]:
    """The defense's name, with what tells two runs of one defense apart."""
    names = [result.spec.defense or result.spec.defense_name for result in results]
    attacks = [result.spec.protocol or ", ".join(entry.key for entry in result.spec.attacks) for result in results]
    several = len(set(attacks)) > 1 or len(set(names)) < len(names)
    return [f"{name}, {attack}" if several else name for name, attack in zip(names, attacks, strict=True)]
