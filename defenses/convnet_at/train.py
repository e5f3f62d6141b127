"""Adversarial training in linf: the loss is taken at the images that a short PGD finds for the current weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from robench.attack import Attack
from robench.registry import load_attack
from robench.threat import ThreatModel
from robench.train.recipe import Recipe, Stage
from robench.types import Images, Labels
from robench.victim import Victim

from .model import ConvNetAT


@dataclass(frozen=True)
class Inner:
    """The inner maximisation.

    Attributes:
        steps: gradient steps from a random start.
        step: length of a step, as a fraction of eps.
    """

    steps: int
    step: float


INNER: Final = {"madry": Inner(7, 0.25), "fast": Inner(2, 0.75)}
"""`madry`: Madry et al. 2018 with 7 steps. `fast`: as Wong et al. 2020 (arXiv 2001.03994), with a second step, since
one step alone can overfit to itself catastrophically at a bound this large."""


class AdversarialRecipe(Recipe):
    """Clean images first, so that the net leaves the plateau of the start; then adversarial images alone."""

    def __init__(self, defense: ConvNetAT, name: str) -> None:
        """Keeps the net to train."""
        self.defense, self.name, self.inner = defense, name, INNER[name]
        self.threat = ThreatModel("linf", defense.train_eps)

    def stages(self) -> list[Stage]:
        """Under one epoch of clean images, then about six of adversarial ones."""
        parameters = list(self.defense.parameters())
        return [
            Stage("clean", 300, self.clean_loss, parameters, 1e-3, flat=1.0, batch_size=128, clip=5.0),
            Stage("adversarial", 2800, self.adversarial_loss, parameters, 1e-3, flat=0.4, batch_size=128, clip=5.0),
        ]

    def clean_loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy on the images themselves."""
        return self._loss(x, y)

    def adversarial_loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy on adversarial images."""
        return self._loss(self.perturb(x, y), y)

    def perturb(self, x: Images, y: Labels) -> Images:
        """The images that the inner PGD finds; the weights count as constants meanwhile."""
        x_adv = self.threat.random_start(x)
        for _ in range(self.inner.steps):
            leaf = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self._loss(leaf, y), leaf)
            x_adv = self.threat.project(x, x_adv + self.inner.step * self.threat.eps * grad.sign())
        return x_adv.detach()

    def _loss(self, x: Images, y: Labels) -> Tensor:
        # bfloat16 in the convolutions (1.7 times as fast on CPUs that have it); weights, loss and update stay float32
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits = self.defense(x)
        return nn.functional.cross_entropy(logits.float(), y)

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy on clean images, after one step and after twenty: far apart, the net has overfitted to one step."""
        rows = {"accuracy": x}
        for name, attack in {"fgsm": "fgsm", "pgd20": "pgd(steps=20)"}.items():
            rows[name] = self._attacked(load_attack(attack), x, y)
        with torch.no_grad():
            return {
                name: round((self.defense(found).argmax(1) == y).float().mean().item(), 4)
                for name, found in rows.items()
            }

    def _attacked(self, attack: Attack, x: Images, y: Labels) -> Images:
        return attack(Victim(self.defense, attack.access, len(x)), x, y, self.threat)
