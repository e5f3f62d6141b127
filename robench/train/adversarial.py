"""The inner maximisation of adversarial training: a short PGD against the weights of the moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robench.threat import ThreatModel
from robench.types import Images


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
