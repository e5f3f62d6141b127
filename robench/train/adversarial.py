"""What adversarial recipes share: the inner maximisation, a short PGD, and the figures that watch over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from robench.defense import Defense
from robench.registry import load_attack
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

OVERFITTED: Final = 0.4
"""Where twenty steps leave less than this share of what one step leaves, the net has overfitted to its attack.

A net for MNIST at 0.3 is at 0.55 after 400 iterations (71.6 and 39.4 %): far from robust yet, not overfitted."""

LARGEST_FALL: Final = 0.25
"""How far an accuracy may be below that of the best check."""
SLOWER: Final = 0.5
"""What a fall that is no overfitting leaves of the learning rate."""


@dataclass(frozen=True)
class Inner:
    """A short PGD.

    Attributes:
        steps: gradient steps.
        step: length of a step, as a fraction of eps.
        start: `ball` draws the start from the whole ball; `near` adds normal noise of a hundredth of eps, as TRADES
            does, whose loss has no gradient at the image itself.
    """

    steps: int
    step: float
    start: str = "ball"


def perturb(loss: Callable[[Images], Tensor], x: Images, threat: ThreatModel, inner: Inner) -> Images:
    """Images within the threat model that raise the loss; no gradient reaches the weights' `.grad`.

    Works under `torch.no_grad`.

    Args:
        loss: maps images to the scalar to raise.
        x: images in [0, 1].
        threat: norm and bound.
        inner: steps and step length.
    """
    start = threat.random_start(x) if inner.start == "ball" else x + 0.01 * threat.eps * torch.randn_like(x)
    x_adv = threat.project(x, start)
    for _ in range(inner.steps):
        leaf = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(loss(leaf), leaf)
        x_adv = threat.project(x, x_adv + inner.step * threat.eps * threat.steepest(grad))
    return x_adv.detach()


def has_overfitted(figures: Mapping[str, float]) -> bool:
    """Whether the figures of `measure_attacked` are those of catastrophic overfitting to a short attack."""
    return figures["pgd20"] < OVERFITTED * figures["fgsm"]


def judge(figures: Mapping[str, float], best_accuracy: float, best_pgd: float) -> Literal["fine", "overfitted", "fell"]:
    """What the figures of `measure_attacked` say of a training that has been watched for a while.

    `overfitted`: twenty steps break what one step does not, whether compared with each other or with before.
    `fell`: the net has lost what it had, on clean images or under both attacks; NaN counts as lost.

    Args:
        figures: those of this check.
        best_accuracy: clean accuracy at the best check that was fine, as a fraction; 0 before the first.
        best_pgd: the same after twenty steps.
    """
    floor = best_pgd - LARGEST_FALL
    if has_overfitted(figures) or figures["pgd20"] < floor < figures["fgsm"]:
        return "overfitted"
    kept = figures["pgd20"] >= floor and figures["accuracy"] >= best_accuracy - LARGEST_FALL
    return "fine" if kept else "fell"


def measure_attacked(defense: Defense, x: Images, y: Labels, threat: ThreatModel) -> dict[str, float]:
    """Accuracy on clean images (`accuracy`), after one step (`fgsm`) and after twenty (`pgd20`).

    One step and twenty far apart say that the net has overfitted to one step.
    """
    rows = {"accuracy": x}
    for name, spec in {"fgsm": "fgsm", "pgd20": "pgd(steps=20)"}.items():
        attack = load_attack(spec)
        rows[name] = attack(Victim(defense, attack.access, len(x)), x, y, threat)
    with torch.no_grad():
        return {name: round((defense(found).argmax(1) == y).float().mean().item(), 4) for name, found in rows.items()}
