"""The published figures of JEM (Grathwohl et al., ICLR 2020, and its slides), each with what is measured beside it.

The published model is a WRN-28-10 trained for hundreds of GPU hours; ours is a net of four convolutions and minutes of
training. Its out-of-distribution table is of CIFAR-10 against sets of which only the interpolations can be made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from robench.data import load_data
from robench.detection import auroc, calibration_interval
from robench.outliers import make_outliers
from robench.paper import Cell, Context, Figure, leave_out
from robench.registry import load_defense
from robench.rng import seeded
from robench.threat import format_eps
from robench.weights import has_weights

if TYPE_CHECKING:
    from robench.defense import Defense
    from robench.types import Images, PerExample

    from .model import JEM

CLEAN: Final = "clean accuracy"
DETECTION: Final = "out-of-distribution AUROC"
CALIBRATION: Final = "calibration (ECE)"
CURVES: Final = "refinement curves"
WIDE: Final = "the paper's net is a WRN-28-10"
ROWS: Final = 250

SCORES: Final = {
    "log_px": "log p(x)",
    "max_py": "max p(y|x)",
    "grad_norm": "-|d log p(x) / dx|",
    "undefended": "max p(y|x), undefended classifier",
}
"""The detection scores of JEM-0, and what a plain classifier has without a density."""
PUBLISHED_DETECTION: Final = {
    "log_px": {"svhn": 0.67, "interpolation": 0.65, "CIFAR-100": 0.67, "CelebA": 0.75},
    "max_py": {"svhn": 0.89, "interpolation": 0.75, "CIFAR-100": 0.87, "CelebA": 0.79},
    "grad_norm": {"svhn": 0.83, "interpolation": 0.78, "CIFAR-100": 0.82, "CelebA": 0.79},
    "undefended": {"svhn": 0.93, "interpolation": 0.77, "CIFAR-100": 0.85, "CelebA": 0.62},
}
"""Slides: CIFAR-10 inside, the columns outside."""
NOT_READ: Final = ("CIFAR-100", "CelebA")
OURS_AGAINST: Final = (
    ("fashion_mnist", "mnist"),
    ("fashion_mnist", "interpolation"),
    ("mnist", "fashion_mnist"),
    ("mnist", "interpolation"),
    ("cifar10", "mnist"),
    ("cifar10", "fashion_mnist"),
)
"""Pairs that the slides do not have: inside, outside."""

LINF: Final = {"fashion_mnist": (0.02, 0.05, 0.1), "mnist": (0.1, 0.2, 0.3), "cifar10": (2 / 255, 4 / 255, 8 / 255)}
L2: Final = {"fashion_mnist": (0.5, 1.0, 2.0), "mnist": (1.0, 2.0, 3.0), "cifar10": (50 / 255, 100 / 255, 200 / 255)}
PIXELS: Final = (5, 20)
REFINEMENTS: Final = (0, 1, 10)
PGD_STEPS: Final = 40
QUERIES: Final = 1000


def measure_auroc(inside: str, outside: str, kind: str) -> Callable[[Context], Figure]:
    """How well a score tells test images of `inside` from those of `outside`, as a measurement.

    A score of JEM-0, but for `undefended`: the largest probability of the undefended ConvNet.
    """

    def measure(context: Context) -> Figure:
        context.check_images()
        model = load_defense(_scored_by(kind), inside).to(context.device)

        def score(rows: Images) -> PerExample:
            if kind == "undefended":
                return -model(rows).softmax(1).amax(1)  # larger on outliers, as `detection_score`
            return cast("JEM", model).detection_score(rows, kind)

        own, _ = load_data(inside, "test", context.n, context.seed, context.data_dir)
        scores = [
            torch.cat([score(rows.to(context.device)).detach() for rows in x.split(ROWS)])
            for x in (own, make_outliers(outside, own, context.n, context.seed, context.data_dir).x)
        ]
        found = auroc(*scores)
        return Figure(found.value, found.low, found.high, len(own))

    return measure


def _scored_by(kind: str) -> str:
    """The defense behind a score."""
    return "convnet" if kind == "undefended" else "jem"


def measure_calibration(name: str, dataset: str) -> Callable[[Context], Figure]:
    """Expected calibration error in percent, 15 bins, of a defense's test probabilities, as a measurement."""

    def measure(context: Context) -> Figure:
        context.check_images()
        model: Defense = load_defense(name, dataset).to(context.device)
        x, y = load_data(dataset, "test", context.n, context.seed, context.data_dir)
        with torch.no_grad(), seeded(context.seed, "calibration", device=context.device):
            logits = torch.cat([model(rows.to(context.device)) for rows in x.split(ROWS)])
        found = calibration_interval(logits.softmax(1), y)
        return Figure(100 * found.value, 100 * found.low, 100 * found.high, len(x))

    return measure


def _spec(steps: int) -> str:
    """JEM with so many steps of refinement, as on the command line."""
    return f"jem(refine_steps={steps})" if steps else "jem"


def _clean_cells() -> list[Cell]:
    published = {"cifar10": 92.9, "svhn": 96.7}
    known = [
        Cell(
            CLEAN,
            "JEM-0",
            data,
            figure,
            data,
            data,
            "jem",
            published_with=f"{WIDE}, trained on all images",
            recipe="" if has_weights("jem", data) else "informative",
        )
        for data, figure in published.items()
    ]
    new = [
        Cell(CLEAN, f"JEM-{steps}", data, None, "", data, _spec(steps), note="not in the paper")
        for steps in REFINEMENTS
        for data in LINF
        if steps or data not in published
    ]
    unread = Cell(
        CLEAN, "JEM-0", "CIFAR-100", 72.2, "cifar100", "cifar100", published_with=WIDE, **_not_read("CIFAR-100")
    )
    return [*known, unread, *new]


def _not_read(data: str) -> dict[str, Any]:
    """The parts of a cell that is not measured, as robench has not the data."""
    return {
        "measure": leave_out,
        "note": f"not measured: {data} is none of the datasets that robench reads by name",
    }


def _detection_cells() -> list[Cell]:
    cells = []
    for kind, row in SCORES.items():
        for outside, figure in PUBLISHED_DETECTION[kind].items():
            column = f"cifar10 against {outside}"
            how: dict[str, Any] = {"measure": measure_auroc("cifar10", outside, kind), "reads": _scored_by(kind)}
            if outside in NOT_READ:
                how = _not_read(outside)
            cells.append(Cell(DETECTION, row, column, figure, "cifar10", "cifar10", published_with=WIDE, **how))
        for inside, outside in OURS_AGAINST:
            measure = measure_auroc(inside, outside, kind)
            column = f"{inside} against {outside}"
            note = "not in the paper"
            reads = _scored_by(kind)
            cells.append(Cell(DETECTION, row, column, None, "", inside, measure=measure, note=note, reads=reads))
    return cells


def _calibration_cells() -> list[Cell]:
    note = "the slides show the plot for CIFAR-100 without a figure in print"
    return [
        Cell(
            CALIBRATION,
            row,
            data,
            None,
            "cifar100",
            data,
            measure=measure_calibration(name, data),
            reads=name,
            note=note,
            published_with=WIDE,
        )
        for data in ("fashion_mnist", "mnist", "cifar10")
        for row, name in (("JEM-0", "jem"), ("undefended ConvNet", "convnet"))
    ]


def _curve_cells() -> list[Cell]:
    """Figure 5 of the paper: accuracy against eps under white-box and label-only attacks, by steps of refinement."""
    cells = []
    for data, steps in ((data, steps) for data in LINF for steps in REFINEMENTS):
        white = [f"pgd(steps={PGD_STEPS}){path}" for path in ("", *(("@bpda", "@detached") if steps else ()))]
        black = {"linf": f"hopskipjump(queries={QUERIES})", "l2": f"boundary(queries={QUERIES})"}
        pointwise = f"pointwise(max_queries={QUERIES})"
        threats = [("linf", eps) for eps in LINF[data]] + [("l2", eps) for eps in L2[data]]
        wanted = [(norm, eps, attack) for norm, eps in threats for attack in (*white, black[norm], pointwise)]
        wanted += [("l0", eps, pointwise) for eps in PIXELS]
        for norm, eps, attack in wanted:
            cells.append(
                Cell(
                    CURVES,
                    f"JEM-{steps}, {attack}",
                    f"{data}, {norm} {format_eps(eps, norm)}",
                    None,
                    "cifar10",
                    data,
                    _spec(steps),
                    attack,
                    norm,
                    eps,
                    note=_curve_note(norm, attack),
                    published_with=f"{WIDE}; it shows a curve without figures in print",
                )
            )
    return cells


def _curve_note(norm: str, attack: str) -> str:
    if norm == "l0":
        return "pixels, which the attack was made to keep few; the paper reads it in linf and l2"
    if attack.startswith("hopskipjump"):
        return "stands for the boundary attack, which is of l2"
    if attack.endswith("bpda"):
        return "the released script's gradient: refinement taken for the identity on the way back"
    if attack.endswith("detached"):
        return "the gradient of the net without refinement, at the image itself"
    return ""


TABLES: Final = [*_clean_cells(), *_detection_cells(), *_calibration_cells(), *_curve_cells()]
