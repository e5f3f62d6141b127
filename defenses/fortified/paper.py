"""The tables of the thesis's chapter 2 (arXiv 1804.02485) that can be measured again; see `robench reproduce`.

The paper trains a net for each attack and bound. Here each dataset has one bound of training, 0.3 for MNIST and 0.1 for
Fashion-MNIST, and PGD by default; the rows with `train_attack=fgsm` are trained as in the paper.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench.data import load_dataset
from robench.defense import wrap
from robench.paper import Cell, Context, Figure, leave_out
from robench.protocol import default_eps
from robench.registry import load_attack, load_defense
from robench.rng import seeded
from robench.settings import RANDOMIZED_REPEATS
from robench.stats import mean_interval, paired_interval
from robench.threat import ThreatModel, parse_eps
from robench.types import Images, PerExample
from robench.victim import Victim

from .blackbox import Protocol, answers, hand_over
from .fortify import FortifiedModule, fortify, reconstruction_losses

FULL: Final = "fortified"
PLAIN: Final = "fortified(layers=[])"
PLAIN_CIFAR: Final = "fortified(layers=[], augment=True)"
ALL_CIFAR: Final = "the paper trains on all 50,000 images, in a pipeline whose eps are not in pixels of [0, 1]"
NO_LOSSES: Final = "fortified(lambda_rec=0, lambda_adv=0)"
NO_ADV: Final = "fortified(lambda_adv=0)"
FULL_FGSM: Final = "fortified(train_attack=fgsm)"
PLAIN_FGSM: Final = "fortified(layers=[], train_attack=fgsm)"
PLAIN_RELU: Final = "fortified(layers=[], activation=relu)"
RECIPES: Final = {
    (NO_LOSSES, "mnist"): "pgd",
    (NO_ADV, "mnist"): "pgd",
    (PLAIN_RELU, "fashion_mnist"): "pgd",
    (FULL_FGSM, "mnist"): "fgsm",
    (PLAIN_FGSM, "mnist"): "fgsm",
    (FULL_FGSM, "fashion_mnist"): "fgsm",
    (PLAIN_FGSM, "fashion_mnist"): "fgsm",
    (PLAIN_CIFAR, "cifar10"): "pgd",
}
"""Of the nets without shipped weights, by their data; the one of CIFAR-10 is trained on shifted and mirrored images, as
the shipped net with autoencoders."""
PGD: Final = "pgd(steps=40)"

MLP_IMAGES: Final = 10_000
MLP_ITERATIONS: Final = 400
MLP_EPS: Final = 0.1
CAPACITIES: Final = (4, 16, 64, 256)


def blackbox_accuracy(context: Context, spec: str, eps: float) -> Figure:
    """Accuracy in percent on what FGSM finds on a substitute (table 2.6), over images the attacker does not hold.

    These are n, or as many as the split leaves: 9,850 of MNIST's 10,000, as in the paper.

    Raises:
        UsageError: no weights or no data.
    """
    options = {} if context.weights is None else {"weights": context.weights}
    defense = load_defense(spec, "mnist", **options).to(context.device)
    held = Protocol().seeds
    data = load_dataset("mnist", "test", context.n + held, context.seed, context.data_dir, at_most=True)
    x, y = data.x.to(context.device), data.y.to(context.device)
    with seeded(context.seed, "black box", spec, device=context.device):
        order = torch.randperm(len(x)).to(context.device)
        seeds, rest = order[:held], order[held:]
        x_adv = hand_over(defense, x[seeds], x[rest], y[rest], eps)
        repeats = RANDOMIZED_REPEATS if defense.randomized else 1
        right = torch.stack([answers(defense, x_adv) == y[rest] for _ in range(repeats)]).double().mean(0)
    fractions = right.cpu().numpy()
    low, high = mean_interval(fractions, repeats)
    return Figure(100 * float(fractions.mean()), 100 * low, 100 * high, len(fractions))


def error_ratio(context: Context, layer: str, capacity: int) -> Figure:
    """Reconstruction error of adversarial over clean images (figure 2.4), for one autoencoder.

    An MLP (784-512-512-10, ReLU) is trained with its autoencoder on 10,000 digits, for 400 batches of 128, by
    cross-entropy and L_rec; the attack is PGD with 10 steps at linf 0.1 through both. The paper gives none of this.

    Args:
        context: data, device and seed.
        layer: `pixels` for the input space, `hidden` for the last hidden layer.
        capacity: length of the autoencoder's code.

    Raises:
        UsageError: the data is not at hand.
    """
    train = load_dataset("mnist", "train", MLP_IMAGES, context.seed, context.data_dir)
    test = load_dataset("mnist", "test", context.n, context.seed, context.data_dir)
    x, y = test.x.to(context.device), test.y.to(context.device)
    with seeded(context.seed, "error ratio", layer, capacity, device=context.device):
        net = _train_mlp(train.x.to(context.device), train.y.to(context.device), layer, capacity)
        defense = wrap(net, num_classes=10, input_shape=(1, 28, 28), randomized=True, name="mlp")
        attack = load_attack("pgd")
        x_adv = attack(Victim(defense, attack.access, len(x)), x, y, ThreatModel("linf", MLP_EPS))
        with torch.no_grad():
            clean, adversarial = net.trace(x).error(), net.trace(x_adv).error()
    return ratio_of_means(adversarial, clean)


def ratio_of_means(above: PerExample, below: PerExample) -> Figure:
    """Mean of `above` over mean of `below` on the same examples, with its 95 % interval (delta method)."""
    first, second = below.double().cpu().numpy(), above.double().cpu().numpy()
    ratio = float(second.mean() / first.mean())
    _, low, high = paired_interval(ratio * first, second)
    return Figure(ratio, ratio + low / float(first.mean()), ratio + high / float(first.mean()), len(first))


def make_mlp() -> nn.Sequential:
    """784-512-512-10 with ReLU; `pixels` is the flat image, `hidden` the last hidden layer."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            pixels=nn.Flatten(),
            first=nn.Sequential(nn.Linear(784, 512), nn.ReLU()),
            hidden=nn.Sequential(nn.Linear(512, 512), nn.ReLU()),
            head=nn.Linear(512, 10),
        )
    )


def _train_mlp(x: Images, y: Tensor, layer: str, capacity: int) -> FortifiedModule:
    net = fortify(make_mlp(), [layer], input_shape=(1, 28, 28), hidden=capacity).to(x.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(MLP_ITERATIONS):
        rows = torch.randint(len(x), (128,), device=x.device)
        trace = net.trace(x[rows])
        loss = functional.cross_entropy(trace.output, y[rows]) + 2 * reconstruction_losses(trace, None).rec
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return net


def _accuracies(
    table: str,
    dataset: str,
    attacks: dict[str, tuple[str, float]],
    rows: dict[str, tuple[str, list[float | None]]],
    **more: Any,
) -> list[Cell]:
    """One cell for each row and attack; a row is a defense with the published figures."""
    return [
        Cell(
            table,
            row,
            column,
            published,
            dataset,
            dataset,
            defense,
            attack,
            eps=eps,
            note=_note(defense, dataset, eps),
            recipe=RECIPES.get((defense, dataset), ""),
            **more,
        )
        for row, (defense, figures) in rows.items()
        for (column, (attack, eps)), published in zip(attacks.items(), figures, strict=True)
    ]


def _note(defense: str, dataset: str, eps: float) -> str:
    bound = default_eps(dataset, "linf")
    attack = "FGSM" if "fgsm" in defense else "PGD"
    told = f"ours is trained with {attack} at {bound}"
    return told + ("" if eps == parse_eps(bound) else f", attacked at {eps:g}")


def _black_box() -> list[Cell]:
    rows = {
        "adversarial training": (PLAIN, 93.83, 98.95),
        "fortified, no L_rec, no L_adv": (NO_LOSSES, 96.98, 99.17),
        "fortified": (FULL, 97.82, 98.93),
    }
    note = "oracle trained with PGD at 0.3; 150 of the drawn test images are the attacker's"
    cells = []
    for row, (spec, attacked, clean) in rows.items():
        measure = partial(blackbox_accuracy, spec=spec, eps=0.3)
        recipe = RECIPES.get((spec, "mnist"), "")
        cells += [
            Cell(
                "table 2.6",
                row,
                "black-box FGSM 0.3",
                attacked,
                "mnist",
                "mnist",
                spec if recipe else "",
                measure=measure,
                note=note,
                recipe=recipe,
                reads="" if recipe else spec,
            ),
            Cell("table 2.6", row, "clean", clean, "mnist", "mnist", spec, recipe=recipe),
        ]
    return cells


def _left_out(table: str, dataset: str, note: str, rows: dict[str, dict[str, float]]) -> list[Cell]:
    """Rows that the paper prints and that are not measured here: figures by row and column."""
    return [
        Cell(table, row, column, published, dataset, dataset, measure=leave_out, note=note)
        for row, columns in rows.items()
        for column, published in columns.items()
    ]


FASHION_ATTACKS: Final = {"FGSM 0.1": ("fgsm", 0.1), "FGSM 0.3": ("fgsm", 0.3), "PGD 0.1": (PGD, 0.1)}
QUOTED: Final = "not measured: the paper quotes it of another"
BESIDE_2_1: Final = "printed in the text beside the table"

TABLES: Final[list[Cell]] = [
    *_left_out(
        "table 2.1",
        "mnist",
        QUOTED,
        {
            "adversarial training (Madry et al.)": {"FGSM 0.3": 95.60},
            "adversarial training (Buckman et al.)": {"FGSM 0.3": 96.17},
            "quantized (Buckman et al.)": {"FGSM 0.3": 96.29},
            "one-hot (Buckman et al.)": {"FGSM 0.3": 96.22},
            "thermometer (Buckman et al.)": {"FGSM 0.3": 95.84},
        },
    ),
    *_accuracies(
        "table 2.1",
        "mnist",
        {"FGSM 0.3": ("fgsm", 0.3)},
        {"adversarial training": (PLAIN, [96.36])},
        published_with="by its caption the paper's net is not in leaky ReLU throughout; ours is, as in the next row",
    ),
    *_accuracies(
        "table 2.1",
        "mnist",
        {"FGSM 0.3": ("fgsm", 0.3)},
        {
            "adversarial training, leaky ReLU everywhere (the caption)": (PLAIN, [99.2]),
            "adversarial training, autoencoder without its losses (No-Rec)": (NO_LOSSES, [96.47]),
            "fortified, no L_adv": (NO_ADV, [96.46]),
            "fortified": (FULL, [97.97]),
            "adversarial training (one step)": (PLAIN_FGSM, [96.36]),
            "fortified (one step)": (FULL_FGSM, [97.97]),
        },
    ),
    *_accuracies(
        "table 2.1", "mnist", {"FGSM 0.1": ("fgsm", 0.1)}, {"fortified": (FULL, [98.34])}, published_with=BESIDE_2_1
    ),
    *_left_out("table 2.1", "mnist", f"{QUOTED}; {BESIDE_2_1}", {"A3T (Erraqabi et al.)": {"FGSM 0.1": 96.10}}),
    *_accuracies(
        "table 2.2",
        "mnist",
        {"PGD 0.1": (PGD, 0.1)},
        {"adversarial training": (PLAIN, [96.98]), "fortified": (FULL, [98.09])},
    ),
    *_accuracies(
        "table 2.3",
        "cifar10",
        {"FGSM 0.3": ("fgsm", 0.3)},
        {"adversarial training": (PLAIN_CIFAR, [79.57]), "fortified": (FULL, [80.47])},
        published_with=ALL_CIFAR,
    ),
    *_left_out(
        "table 2.4",
        "cifar10",
        QUOTED,
        {
            "quantized (Buckman et al.)": {"FGSM 0.03": 53.53},
            "one-hot (Buckman et al.)": {"FGSM 0.03": 68.76},
            "thermometer (Buckman et al.)": {"FGSM 0.03": 80.97},
        },
    ),
    *_left_out(
        "table 2.4",
        "cifar10",
        "not measured: robench has no autoencoder in the space of images",
        {"autoencoder in input space, with the loss in hidden space": {"FGSM 0.03": 79.77}},
    ),
    *_accuracies(
        "table 2.4",
        "cifar10",
        {"FGSM 0.03": ("fgsm", 0.03)},
        {"adversarial training": (PLAIN_CIFAR, [79.34]), "fortified": (FULL, [81.80])},
        published_with=ALL_CIFAR,
    ),
    *_left_out("table 2.5", "fashion_mnist", QUOTED, {"DefenseGAN (Samangouei et al.)": {"FGSM 0.3": 89.60}}),
    *_accuracies(
        "table 2.5",
        "fashion_mnist",
        FASHION_ATTACKS,
        {
            "adversarial training, ReLU": (PLAIN_RELU, [86.14, 90.66, 77.49]),
            "adversarial training, LReLU": (PLAIN, [89.10, 88.80, 77.90]),
            "fortified": (FULL, [89.86, 91.31, 79.54]),
            "adversarial training, LReLU (one step)": (PLAIN_FGSM, [89.10, 88.80, None]),
            "fortified (one step)": (FULL_FGSM, [89.86, 91.31, None]),
        },
    ),
    *_left_out(
        "table 2.6",
        "mnist",
        QUOTED,
        {
            "one-hot (Buckman et al.)": {"black-box FGSM 0.3": 95.96, "clean": 98.83},
            "thermometer (Buckman et al.)": {"black-box FGSM 0.3": 96.97, "clean": 98.08},
            "DefenseGAN, fc to conv (Samangouei et al.)": {"black-box FGSM 0.3": 92.21},
            "DefenseGAN, conv to conv (Samangouei et al.)": {"black-box FGSM 0.3": 93.12},
            "adversarial training, fc to conv (Samangouei et al.)": {"black-box FGSM 0.3": 96.68},
            "adversarial training, conv to conv (Samangouei et al.)": {"black-box FGSM 0.3": 96.54},
        },
    ),
    *_black_box(),
    *(
        Cell(
            "figure 2.4",
            {"hidden": "hidden space", "pixels": "input space"}[layer],
            f"capacity {capacity}",
            None,
            "mnist",
            "mnist",
            measure=partial(error_ratio, layer=layer, capacity=capacity),
            note="ratio of errors, adversarial over clean",
            published_with="the paper shows a curve",
        )
        for layer in ("hidden", "pixels")
        for capacity in CAPACITIES
    ),
    *_accuracies(
        "figure 2.5",
        "fashion_mnist",
        {f"PGD {eps:g}": (PGD, eps) for eps in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)},
        {"fortified": (FULL, [None] * 6)},
    ),
]
