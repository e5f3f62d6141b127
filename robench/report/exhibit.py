"""What `robench show` found, as pictures and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from robench.errors import UsageError
from robench.report.drawing import find_figure
from robench.types import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from robench.show import Exhibit

DRAWN: Final = ("pictures.png", "reliability.png", "scores.png")


def print_exhibit(exhibit: Exhibit) -> None:
    """Prints the figures and where the pictures are."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    request = exhibit.request
    table = Table(title=f"{exhibit.name} on {request.dataset}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column()
    table.add_row("images", f"{request.n} (seed {request.seed})")
    table.add_row("clean accuracy", str(exhibit.accuracy))
    table.add_row("expected calibration error", str(exhibit.calibration))
    for name, value in exhibit.diagnostics.items():
        table.add_row(name, f"{value:.4g}")
    if exhibit.outliers_made:
        table.add_row(f"images of {request.against}", exhibit.outliers_made)
    for score in exhibit.scores:
        table.add_row(
            f"AUROC against {request.against}, {score.kind}",
            _share(score.auroc.value, score.auroc.low, score.auroc.high),
        )
    console.print(table)
    for name in DRAWN:
        if (request.folder / name).exists():
            console.print(str(request.folder / name))


def _share(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def draw_exhibit(exhibit: Exhibit) -> None:
    """Draws the rows of pictures, the reliability plot and, where there are scores, their histograms.

    Raises:
        UsageError: matplotlib is missing, or the folder cannot be written.
    """
    new, folder = find_figure("robench show"), exhibit.request.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in DRAWN:
            (folder / name).unlink(missing_ok=True)  # of an earlier call with other options
        title = f"{exhibit.name} on {exhibit.request.dataset}"
        _save(draw_rows(exhibit.pictures, title, new), folder / "pictures.png")
        _save(_draw_reliability(exhibit, new), folder / "reliability.png")
        if exhibit.scores:
            _save(_draw_scores(exhibit, new), folder / "scores.png")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}. Choose another --out") from None


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)


def draw_rows(rows: Mapping[str, Images], title: str, new: type[Figure]) -> Figure:
    """Draws rows of images in [0, 1], each with its name before it."""
    most = max(len(images) for images in rows.values())
    figure = new(figsize=(1.6 + 0.8 * most, 0.85 * len(rows) + (0.5 if title else 0)), layout="constrained")
    grid = figure.subplots(len(rows), most, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=False):
            axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].text(-0.15, 0.5, name.replace("_", " "), transform=line[0].transAxes, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def _draw_reliability(exhibit: Exhibit, new: type[Figure]) -> Figure:
    figure = new(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    filled = [row for row in exhibit.reliability if row.images]
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    axes.bar(
        [(row.low + row.high) / 2 for row in filled],
        [row.accuracy for row in filled],
        width=[row.high - row.low for row in filled],
        edgecolor="white",
        alpha=0.8,
        label="accuracy in the bin",
    )
    axes.scatter(
        [row.confidence for row in filled],
        [row.accuracy for row in filled],
        s=[8 + 120 * row.images / exhibit.request.n for row in filled],
        color="black",
        zorder=3,
        label="mean confidence (area: images)",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_title(f"{exhibit.name} on {exhibit.request.dataset}: ECE {exhibit.calibration}", fontsize="medium")
    axes.legend(fontsize="small", loc="upper left")
    return figure


def _draw_scores(exhibit: Exhibit, new: type[Figure]) -> Figure:
    figure = new(figsize=(4.0 * len(exhibit.scores), 3.4), layout="constrained")
    request = exhibit.request
    for axes, score in zip(figure.subplots(1, len(exhibit.scores), squeeze=False)[0], exhibit.scores, strict=True):
        low = float(min(score.inside.min(), score.outside.min()))
        high = float(max(score.inside.max(), score.outside.max()))
        span = (low, high if high > low else low + 1)
        for values, label in ((score.inside, request.dataset), (score.outside, request.against)):
            axes.hist(values.numpy(), bins=40, range=span, alpha=0.6, label=label)
        axes.set(title=f"{score.kind}: AUROC {score.auroc.value:.3f}", xlabel="score (higher: more suspicious)")
        axes.set_ylabel("images")
        axes.legend(fontsize="small")
    return figure
