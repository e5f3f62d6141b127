"""Toys of the command line's tests, found by path: `tests/cli_toys.py:Squares`. Some of them break the contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robench.attack import Attack
from robench.defense import Defense
from robench.threat import ThreatModel
from robench.train.recipe import Recipe, Stage, ranger
from robench.types import Images, Labels, Logits
from robench.victim import Victim


class Squares(Defense):
    """Answers the brightest quadrant of a 1 x 4 x 4 image: deterministic, with known margins."""

    name = "squares"
    num_classes = 4
    input_shape: tuple[int, int, int] = (1, 4, 4)

    def __init__(self, gain: float = 5.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Images) -> Logits:
        return self.gain * nn.functional.adaptive_avg_pool2d(x, 2).mean(1).flatten(1)


class NoisySquares(Squares):
    """The same with noise on its logits."""

    name = "noisy_squares"
    randomized = True

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits + 0.3 * torch.randn_like(logits)


class ColourSquares(Squares):
    """Takes images of CIFAR's and SVHN's shape."""

    name = "colour_squares"
    input_shape = (3, 32, 32)


class GreySquares(Squares):
    """Takes images of MNIST's shape, of which it knows four classes in ten."""

    name = "grey_squares"
    input_shape = (1, 28, 28)
    num_classes = 10

    def forward(self, x: Images) -> Logits:
        return nn.functional.pad(super().forward(x), (0, 6))


class Nan(Squares):
    """Offends: NaN for every image."""

    name = "nan"

    def forward(self, x: Images) -> Logits:
        return super().forward(x) / 0 * 0


class LateNan(Squares):
    """Offends: NaN as soon as the bright quadrant was dimmed, so that the first answers are fine."""

    name = "late_nan"

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return torch.where((x.flatten(1).amax(1) < 0.58)[:, None], torch.nan, logits)


class TooManyClasses(Squares):
    """Offends: one logit more than it declares."""

    name = "too_many_classes"

    def forward(self, x: Images) -> Logits:
        return nn.functional.pad(super().forward(x), (0, 1))


class WrongShape(Squares):
    """Offends: one answer for the whole batch."""

    name = "wrong_shape"

    def forward(self, x: Images) -> Logits:
        return super().forward(x).mean(0)


class Undeclared(NoisySquares):
    """Offends: random, and declared deterministic."""

    name = "undeclared"
    randomized = False


class Trainable(Squares):
    """A small classifier that draws noise while it trains, with a recipe of two stages."""

    name = "trainable"
    input_shape = (1, 28, 28)
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(49, 10))

    def forward(self, x: Images) -> Logits:
        return self.gain * self.net(x)

    def recipe(self, name: str | None = None) -> Recipe:
        """There is one."""
        del name
        return TrainableRecipe(self)


class TrainableRecipe(Recipe):
    """Cross-entropy with noise on the images, first on the linear layer alone."""

    name = "noise"

    def __init__(self, defense: Trainable) -> None:
        self.defense = defense

    def stages(self) -> list[Stage]:
        """Two stages of 100 iterations."""
        linear = list(self.defense.net.parameters())
        return [
            Stage("first", 100, self.loss, linear, 1e-2, batch_size=16, optimizer=ranger),
            Stage("second", 100, self.loss, [*linear, self.defense.gain], 1e-3, batch_size=16),
        ]

    def loss(self, x: Images, y: Labels) -> torch.Tensor:
        """Cross-entropy on noisy images."""
        return nn.functional.cross_entropy(self.defense((x + 0.1 * torch.randn_like(x)).clamp(0, 1)), y)

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": (self.defense(x).argmax(1) == y).double().mean().item()}


@dataclass(frozen=True)
class Raises(Attack):
    """An attack that fails."""

    name = "raises"
    norms = ("linf",)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        del victim, x, y, threat
        raise ValueError("the planted failure")


@dataclass(frozen=True)
class Interrupts(Attack):
    """Ctrl-C in the middle of an attack."""

    name = "interrupts"
    norms = ("linf",)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        del victim, x, y, threat
        raise KeyboardInterrupt
