"""The published figures of the Short Run thesis (E. M. Fischer, UCLA 2020), each with what is measured beside it.

All of them are of SVHN (28x28, in [-1, 1], 1,000 test images); ours are of Fashion-MNIST. The thesis says neither which
of its three models it attacked nor in which scale it counts eps, so each eps stands twice: as a bound on pixels in
[0, 1], and halved, as the same bound would be if the thesis counted in [-1, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import torch

from robench.data import load_dataset
from robench.registry import load_defense
from robench.reproduce import Cell, Context, Figure, leave_out
from robench.rng import seeded

from .figures import misfit, reconstruct

if TYPE_CHECKING:
    from .model import ShortRun

SVHN: Final = "svhn"
DATASET: Final = "fashion_mnist"
SET_SIZES: Final = ("40,000", "80,000", "120,000")
OUR_SET: Final = "ours: one model, stage 1 on the images that its card names, all of them labelled"
MSE_NOTE: Final = (
    "summed over pixels in [-1, 1], test images; the thesis does not say what it sums over, and its 3.74 fits neither "
    "a mean over pixels (largest possible: 4) nor a sum over an image"
)

FID_NOTE: Final = "FID takes an Inception network for colour photographs; these images are grey"


def measure_mse(context: Context) -> Figure:
    """Squared error of the thesis's reconstruction of test images, summed over pixels in the scale [-1, 1].

    The interval is the mean plus or minus 1.96 standard errors.
    """
    model = cast("ShortRun", load_defense("shortrun", DATASET)).to(context.device)
    data = load_dataset(DATASET, "test", n=context.n, seed=context.seed, data_dir=context.data_dir)
    with torch.no_grad(), seeded(context.seed, "reconstruction", device=context.device):
        errors = torch.cat(
            [misfit(model, x, reconstruct(model, x)).cpu() for x in data.x.to(context.device).split(model.batch_rows)]
        ).double()
    mean, half = errors.mean().item(), 1.96 * errors.std().item() / len(errors) ** 0.5
    return Figure(mean, mean - half, mean + half, len(errors))


def _table_4_1() -> list[Cell]:
    mse = (3.74, 3.74, 3.70)
    fid = (66.76, 63.66, 59.81)
    note = f"{MSE_NOTE}; {OUR_SET}"
    return [
        *(
            Cell("table 4.1", "MSE", size, value, SVHN, DATASET, measure=measure_mse, note=note)
            for size, value in zip(SET_SIZES, mse, strict=True)
        ),
        *(
            Cell("table 4.1", "FID", size, value, SVHN, DATASET, measure=leave_out, note=FID_NOTE)
            for size, value in zip(SET_SIZES, fid, strict=True)
        ),
    ]


def _table_4_2() -> list[Cell]:
    published = (79.0, 80.0, 80.8)
    cells = [
        Cell("table 4.2", "Short Run", size, value, SVHN, DATASET, "shortrun", note=OUR_SET)
        for size, value in zip(SET_SIZES, published, strict=True)
    ]
    return [*cells, Cell("table 4.2", "ConvNet", "labelled set", 86.5, SVHN, DATASET, "convnet", note=OUR_SET)]


def _figure_4_4() -> list[Cell]:
    published = {"shortrun": {0.01: 68.4, 0.03: 48.4}, "convnet": {0.01: 59.5, 0.03: 30.6}}
    rows = {"shortrun": "Short Run", "convnet": "ConvNet"}
    return [
        Cell(
            "figure 4.4", rows[name], f"FGSM {eps:g}, {scale}", value, SVHN, DATASET, name, "fgsm", "linf", eps * share
        )
        for name, values in published.items()
        for eps, value in values.items()
        for scale, share in (("eps in [0, 1]", 1.0), ("eps in [-1, 1]", 0.5))
    ]


TABLES: Final = [*_table_4_1(), *_table_4_2(), *_figure_4_4()]
