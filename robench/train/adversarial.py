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
from robench.train.recipe import Recipe, Stage, clean_accuracy
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

    @classmethod
    def of_steps(cls, steps: int, start: str = "ball") -> Inner:
        """So many steps, the shorter the more there are: 0.75 eps each of two, 0.5 of three, 0.25 of six and more."""
        return cls(steps, max(0.25, 1.5 / steps), start)


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


class WatchedRecipe(Recipe):
    """A recipe of adversarial training: whether it overfits to its attack or loses what it had, and what then changes.

    Attributes:
        best_accuracy: clean accuracy at the best check that was fine, as a fraction; 0 before the first.
        best_pgd: the same after twenty steps.
        overfitted: whether the last check found that, so that a roll-back adds a step; a loss taken since says no.
    """

    defense: Defense
    best_accuracy: float = 0.0
    best_pgd: float = 0.0
    overfitted: bool = False

    def look(self, stage: Stage, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy on clean images; the attacks of `measure` would cost more than the iterations between."""
        del stage
        return clean_accuracy(self.defense, x, y)

    def watch(self, figures: Mapping[str, float], *, attacked: bool = True) -> bool:
        """Whether all is fine by the figures of `measure_attacked`; if so, they count for the best.

        Args:
            figures: those of this check.
            attacked: False: by the clean accuracy alone, whatever the attacks leave.
        """
        if attacked:
            found = judge(figures, self.best_accuracy, self.best_pgd)
        else:
            found = judge({**figures, "pgd20": figures["fgsm"]}, self.best_accuracy, 0.0)
        self.overfitted = found == "overfitted"
        if found == "fine":
            self.best_accuracy = max(self.best_accuracy, figures["accuracy"])
            self.best_pgd = max(self.best_pgd, figures["pgd20"])
        return found == "fine"

    def add_step(self) -> None:
        """Makes the training attack stronger by a step."""
        raise NotImplementedError

    def roll_back(self, stage: Stage) -> None:
        """Takes one more step in the training attack from now on, after overfitting; else half the learning rate."""
        del stage
        if self.overfitted:
            self.add_step()
        else:
            self.rate_share *= SLOWER

    def state(self) -> dict[str, float]:
        """The share of the learning rate, which roll-backs change, and the best check's figures."""
        return {"rate_share": self.rate_share, "best_accuracy": self.best_accuracy, "best_pgd": self.best_pgd}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes up what `state` gave."""
        self.rate_share = state["rate_share"]
        self.best_accuracy, self.best_pgd = state["best_accuracy"], state["best_pgd"]

    def facts(self) -> dict[str, object]:
        """The share of the learning rate, where a roll-back has changed it."""
        return {"rate_share": self.rate_share} if self.rate_share != 1 else {}


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
