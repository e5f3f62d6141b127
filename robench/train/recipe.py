"""What a defense brings to be trained: stages, each with its loss, its parameters and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.types import Images, Labels

OptimizerFactory = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def adam(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adam with torch's defaults."""
    return torch.optim.Adam(parameters, lr=learning_rate)


def ranger(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Ranger: RAdam, Lookahead (k 6, alpha 0.5) and gradient centralisation, with the reference's constants."""
    from pytorch_optimizer import Ranger

    return Ranger(parameters, lr=learning_rate, degenerated_to_sgd=True)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: shown in the progress and the card.
        iterations: optimizer steps.
        loss: maps a batch (images in [0, 1], labels) to the scalar to minimise.
        parameters: what the stage updates; everything else stays as it is.
        learning_rate: the rate of the flat part.
        flat: fraction of the iterations at the full rate; the rest falls to 0 as a half cosine. 1 means constant.
        batch_size: images in a batch.
        optimizer: builds the optimizer.
        clip: largest gradient norm; longer gradients are shortened to it.
    """

    name: str
    iterations: int
    loss: Callable[[Images, Labels], Tensor]
    parameters: list[nn.Parameter]
    learning_rate: float
    flat: float = 0.75
    batch_size: int = 64
    optimizer: OptimizerFactory = adam
    clip: float = math.inf

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        done = iteration / max(self.iterations, 1)
        if done < self.flat:
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - self.flat) / (1 - self.flat)))


class Recipe:
    """The stages of a defense and what to measure after each.

    Attributes:
        name: what `--recipe` calls it.
    """

    name: str = "default"

    def prepare(self, x: Images) -> None:
        """Fits constants to the training images before the first stage (Short Run: sigma). Default: nothing."""

    def stages(self) -> list[Stage]:
        """The stages in order."""
        raise NotImplementedError

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Figures on held-out images for the card, by name; called after each stage in eval mode."""
        raise NotImplementedError

    def facts(self) -> dict[str, object]:
        """Further entries of the card, such as constants fitted in `prepare`."""
        return {}
