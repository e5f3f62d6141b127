"""The published figures of the Short Run thesis (E. M. Fischer, UCLA 2020), each with what is measured beside it.

All of them are of SVHN (28x28, in [-1, 1], 10,000 labelled and 1,000 test images). They are measured on SVHN, on models
trained for it, and on Fashion-MNIST, on the shipped ones where these will do. The thesis says neither which of its
three models it attacked nor in which scale it counts eps, so each eps stands twice: as a bound on pixels in [0, 1], and
halved, as the same bound would be if the thesis counted in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from robench.data import load_dataset
from robench.defenses.convnet.model import THESIS_WIDTH
from robench.paper import Cell, Context, Figure, leave_out
from robench.registry import load_defense
from robench.rng import seeded

from .figures import misfit, reconstruct

if TYPE_CHECKING:
    from .model import ShortRun

SVHN: Final = "svhn"
FASHION: Final = "fashion_mnist"
LABELLED: Final = 10_000
SET_SIZES: Final = (40_000, 80_000, 120_000)
"""The thesis's images without labels, for stage 1."""
SPLITS: Final = {SVHN: "train+extra", FASHION: "train"}
"""The thesis's 80,000 and 120,000 images need SVHN's third split; all its models share it and the labelled images."""
TRAINING_IMAGES: Final = {SVHN: 73_257 + 531_131, FASHION: 60_000}
PUBLISHED: Final = {
    "MSE": (3.74, 3.74, 3.70),
    "FID": (66.76, 63.66, 59.81),
    "Short Run": (79.0, 80.0, 80.8),
}
CONVNET_CLEAN: Final = 86.5
ATTACKED: Final = {"Short Run": {0.01: 68.4, 0.03: 48.4}, "ConvNet": {0.01: 59.5, 0.03: 30.6}}
SCALES: Final = {"eps in [0, 1]": 1.0, "eps in [-1, 1]": 0.5}

OURS_LABELLED: Final = (1_000, 3_000, LABELLED)
OURS_UNLABELLED: Final = (1_000, 10_000, 40_000)

MSE_NOTE: Final = (
    "summed over pixels in [-1, 1], test images; the thesis does not say what it sums over, and its 3.74 fits neither "
    "a mean over pixels (largest possible: 4) nor a sum over an image"
)
FID_NOTE: Final = "FID takes an Inception network for colour photographs, which robench does not have"
ALL_LABELLED: Final = "the shipped weights, trained on all images, all of them labelled"
SHIPPED: Final = {
    "Short Run": {"defense": "shortrun", "note": ALL_LABELLED},
    "ConvNet": {"defense": "convnet", "note": ALL_LABELLED},
}


def measure_mse(dataset: str) -> Callable[[Context], Figure]:
    """Squared error of the thesis's reconstruction of test images, summed over pixels in the scale [-1, 1].

    The interval is the mean plus or minus 1.96 standard errors.
    """

    def measure(context: Context) -> Figure:
        context.check_images()
        options = {} if context.weights is None else {"weights": context.weights}
        model = cast("ShortRun", load_defense("shortrun", dataset, **options)).to(context.device)
        data = load_dataset(dataset, "test", n=context.n, seed=context.seed, data_dir=context.data_dir)
        with torch.no_grad(), seeded(context.seed, "reconstruction", device=context.device):
            parts = data.x.to(context.device).split(model.batch_rows)
            errors = torch.cat([misfit(model, x, reconstruct(model, x)).cpu() for x in parts]).double()
        mean, half = errors.mean().item(), 1.96 * errors.std().item() / len(errors) ** 0.5
        return Figure(mean, mean - half, mean + half, len(errors))

    return measure


def _short_run(dataset: str, labelled: int = 0, unlabelled: int = 0) -> dict[str, Any]:
    """The parts of a cell that name a training on so many images; 0: all."""
    recipe = f"thesis(labelled={labelled}, unlabelled={unlabelled})"
    return {"defense": "shortrun", "recipe": recipe, "split": SPLITS[dataset]}


def _convnet(dataset: str, labelled: int = 0) -> dict[str, Any]:
    """The same of the undefended net, as wide as the thesis's."""
    note = "on whole images of 32x32; the thesis shrinks them to 28x28" if dataset == SVHN else ""
    defense = f"convnet(width={THESIS_WIDTH})"
    return {"defense": defense, "recipe": f"clean(labelled={labelled})", "split": SPLITS[dataset], "note": note}


def _by_set_size(table: str, row: str, dataset: str, **more: Any) -> list[Cell]:
    """A row of the thesis's tables 4.1 and 4.2: a cell for each count of images without labels."""
    cells = []
    for size, value in zip(SET_SIZES, PUBLISHED[row], strict=True):
        how = {**_short_run(dataset, LABELLED, size), **more}
        if size > TRAINING_IMAGES[dataset]:
            how = {"measure": leave_out, "note": f"{dataset} has {TRAINING_IMAGES[dataset]:,} images to train on"}
        cells.append(Cell(f"{table}, {dataset}", row, f"{size:,}", value, SVHN, dataset, **how))
    return cells


def _table_4_1(dataset: str) -> list[Cell]:
    table = "table 4.1"
    fid = [
        Cell(f"{table}, {dataset}", "FID", f"{size:,}", value, SVHN, dataset, measure=leave_out, note=FID_NOTE)
        for size, value in zip(SET_SIZES, PUBLISHED["FID"], strict=True)
    ]
    return [*_by_set_size(table, "MSE", dataset, measure=measure_mse(dataset), note=MSE_NOTE), *fid]


def _table_4_2(dataset: str) -> list[Cell]:
    table, column, how = "table 4.2", f"{LABELLED:,} labelled", _convnet(dataset, LABELLED)
    return [
        *_by_set_size(table, "Short Run", dataset),
        Cell(f"{table}, {dataset}", "ConvNet", column, CONVNET_CLEAN, SVHN, dataset, **how),
    ]


def _figure_4_4(dataset: str, how: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    table = f"figure 4.4, {dataset}"
    return [
        Cell(table, row, f"FGSM {eps:g}, {scale}", value, SVHN, dataset, attack="fgsm", eps=eps * share, **how[row])
        for row, values in ATTACKED.items()
        for eps, value in values.items()
        for scale, share in SCALES.items()
    ]


def _set_sizes() -> list[Cell]:
    """Clean accuracy against the counts of images with and without labels; the thesis varies the latter alone."""
    sizes = [(labelled, OURS_UNLABELLED[-1]) for labelled in OURS_LABELLED]
    sizes += [(LABELLED, unlabelled) for unlabelled in OURS_UNLABELLED[:-1]]
    named = [
        ("Short Run", f"{labelled:,} labelled, {unlabelled:,} unlabelled", _short_run(FASHION, labelled, unlabelled))
        for labelled, unlabelled in sizes
    ]
    named += [("Short Run", "all labelled", _short_run(FASHION))]
    named += [("ConvNet", f"{labelled:,} labelled", _convnet(FASHION, labelled)) for labelled in OURS_LABELLED]
    named += [("ConvNet", "all labelled", _convnet(FASHION))]
    return [Cell("set sizes, fashion_mnist", row, column, None, "", FASHION, **how) for row, column, how in named]


def _tables() -> list[Cell]:
    """The thesis's tables on both datasets; it does not say which of its models it attacked."""
    trained = {"Short Run": _short_run(SVHN, LABELLED, SET_SIZES[0]), "ConvNet": _convnet(SVHN, LABELLED)}
    return [
        cell
        for dataset, attacked in ((FASHION, SHIPPED), (SVHN, trained))
        for cell in (*_table_4_1(dataset), *_table_4_2(dataset), *_figure_4_4(dataset, attacked))
    ]


TABLES: Final = [*_tables(), *_set_sizes()]
