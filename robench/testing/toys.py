"""Toy defenses with known answers: what an attack must reach, what none can, and what an evaluation must report."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from robench.defense import Defense
from robench.errors import UsageError
from robench.rng import seeded
from robench.threat import NORMS
from robench.types import Images, Labels, Logits, PerExample

SIDE: Final = 4
CLASSES: Final = 4
GAIN: Final = 80.0
REACH: Final[dict[str, float]] = {"linf": 0.04, "l2": 0.11, "l1": 0.32, "l0": 2.0}
"""The distance of `LinearToy.examples` from the nearest error, where none is asked for."""


def _patterns() -> Tensor:
    """Four orthogonal patterns of +-1 on 16 pixels of which no pixel has the same sign in all (their product is -1).

    So every pixel tells some class from the others, and no gradient of a loss vanishes anywhere.
    """
    bits = _signs()
    return torch.stack([bits[0], bits[1], bits[2], -bits[0] * bits[1] * bits[2]])


def _signs() -> Tensor:
    numbers = torch.arange(SIDE * SIDE)
    return torch.stack([1.0 - 2.0 * ((numbers >> bit) & 1) for bit in range(4)])


class LinearToy(Defense):
    """Four classes, linear, deterministic: the distance to the nearest error is known in every norm.

    The logit of class k is `gain` times the mean of h_k (x - 1/2) over pixels and channels, h_k orthogonal patterns of
    +-1. The distance of an image to the decision against class k is its margin over the dual norm of the difference of
    the two weights. For l0 it counts the pixels that, taken to the end of the box, use the margin up.

    Attributes:
        weight: `4 d`, one row for each class.
    """

    name = "linear_toy"

    def __init__(self, channels: int = 1, gain: float = GAIN) -> None:
        """Builds the toy for images `channels` x 4 x 4, ready for use."""
        super().__init__()
        self.num_classes = CLASSES
        self.input_shape = (channels, SIDE, SIDE)
        rows = _patterns().repeat(1, channels)
        self.weight = nn.Parameter(gain / rows.shape[1] * rows)
        self.freeze()

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1]."""
        return (x - 0.5).flatten(1) @ self.weight.T

    def distance(self, x: Images, y: Labels, norm: str) -> PerExample:
        """Distance of each image to the nearest error, 0 where it is one.

        Exact in l0. In the other norms the box is left out: exact where it does not stand in the way, as for
        `examples`, and otherwise a lower bound.

        Raises:
            UsageError: unknown norm.
        """
        logits = LinearToy.forward(self, x)
        gaps = logits.gather(1, y[:, None]) - logits  # b k
        steps = self.weight[y][:, None] - self.weight  # b k d
        if norm == "l0":
            found = self._pixels_needed(x, gaps, steps)
        elif norm in _DUALS:
            found = gaps / steps.norm(p=_DUALS[norm], dim=2)
        else:
            raise UsageError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
        return found.scatter(1, y[:, None], torch.inf).amin(1).clamp_min(0)

    def _pixels_needed(self, x: Images, gaps: Tensor, steps: Tensor) -> Tensor:
        room = torch.where(steps > 0, x.flatten(1)[:, None], 1 - x.flatten(1)[:, None])  # b k d
        worth = (room * steps.abs()).unflatten(2, (x.shape[1], -1)).sum(2)  # b k pixels
        reached = worth.sort(dim=2, descending=True).values.cumsum(2)
        return (reached < gaps[:, :, None]).sum(2) + (gaps > 0).to(x.dtype)

    def examples(self, n: int, norm: str = "linf", reach: float | None = None) -> tuple[Images, Labels]:
        """Images, all different, and their labels; each lies at the distance `reach` from the nearest error.

        Args:
            n: images.
            norm: the norm of the distance.
            reach: the distance; default `REACH[norm]`. The box does not stand in the way up to 4 times that (l0: 2).
        """
        reach = REACH[norm] if reach is None else reach
        size = math.prod(self.input_shape)
        height = {
            "linf": reach,
            "l2": reach * math.sqrt(2 / size),
            "l1": reach * 2 / size,
            "l0": (reach - 0.5) * 0.55 / (SIDE * SIDE / 2 + 0.5 - reach),
        }[norm]
        number = torch.arange(n)
        y = number % CLASSES
        nearest = (y + 1 + number // CLASSES % (CLASSES - 1)) % CLASSES
        share = torch.full((n, CLASSES), -0.05)
        share.scatter_(1, nearest[:, None], 0.0).scatter_(1, y[:, None], height)
        signs = _signs()
        texture = torch.stack([signs[3], signs[3] * signs[0], signs[3] * signs[1]])  # orthogonal to all patterns
        waves = 0.01 * torch.cos(number[:, None] + torch.arange(3.0))
        flat = 0.5 + share @ _patterns() + waves @ texture
        return flat.repeat(1, self.input_shape[0]).view(n, *self.input_shape), y


_DUALS: Final[dict[str, float]] = {"linf": 1, "l2": 2, "l1": math.inf}


class NoisyLinearToy(LinearToy):
    """The linear toy with normal noise on the logits: randomized, and the probability of a right answer is known.

    Attributes:
        sigma: standard deviation of the noise.
    """

    name = "noisy_linear_toy"
    randomized = True

    def __init__(self, channels: int = 1, gain: float = GAIN, sigma: float = 1.0) -> None:
        """Builds the toy for images `channels` x 4 x 4, ready for use."""
        super().__init__(channels, gain)
        self.sigma = sigma

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1], each time a little differently."""
        logits = super().forward(x)
        return logits + self.sigma * torch.randn_like(logits)

    def probability_right(self, x: Images, y: Labels) -> PerExample:
        """The probability that one answer is y: an integral over the noise of logit y, on a grid."""
        logits = LinearToy.forward(self, x).double()
        gaps = (logits.gather(1, y[:, None]) - logits) / self.sigma  # b k
        noise = torch.linspace(-9, 9, 4001, dtype=torch.float64)
        normal = torch.special.ndtr(gaps[:, :, None] + noise)  # b k grid
        beaten = normal.scatter(1, y[:, None, None].expand(-1, 1, len(noise)), 1.0).prod(1)
        density = torch.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi)
        return torch.trapezoid(beaten * density, noise).to(x.dtype)


class NullDefense(Defense):
    """Answers class 0, but with probability q another class, whatever the image: no attack can change its accuracy.

    With labels all 0 its clean and its robust accuracy are 1 - q. Its gradient is finite and not zero, and of no use.

    Attributes:
        q: probability of a wrong answer.
    """

    name = "null"
    randomized = True

    def __init__(self, q: float, num_classes: int = 4, input_shape: tuple[int, int, int] = (1, SIDE, SIDE)) -> None:
        """Builds the null defense.

        Raises:
            UsageError: q is not a probability.
        """
        super().__init__()
        if not 0 <= q <= 1:
            raise UsageError(f"q must be a probability; got {q}")
        self.q, self.num_classes, self.input_shape = q, num_classes, input_shape
        self.freeze()

    def forward(self, x: Images) -> Logits:
        """Answers without regard to x: it moves the logits by less than the gap between them."""
        wrong = torch.rand(len(x), device=x.device) < self.q
        other = torch.randint(1, self.num_classes, (len(x),), device=x.device)
        answer = torch.where(wrong, other, 0)
        bait = torch.linspace(-0.1, 0.1, self.num_classes, device=x.device, dtype=x.dtype)
        return nn.functional.one_hot(answer, self.num_classes).to(x.dtype) + x.flatten(1).mean(1)[:, None] * bait


class ConvToy(Defense):
    """A small random convolutional net of five classes on 3x6x6 images: deterministic, not linear, no known answers."""

    name = "conv_toy"

    def __init__(self) -> None:
        """Builds the net, ready for use; the weights are always the same."""
        super().__init__()
        self.num_classes = 5
        self.input_shape = (3, 6, 6)
        with seeded("robench.testing", "ConvToy"):
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),  # b 3 6 6 -> b 8 6 6
                nn.Tanh(),
                nn.Conv2d(8, 8, 3, stride=2, padding=1),  # -> b 8 3 3
                nn.Mish(),
                nn.Flatten(),
                nn.Linear(72, self.num_classes),
            )
            for parameter in self.net[5].parameters():
                nn.init.normal_(parameter)
        self.register_buffer("centre", torch.tensor(0.5))
        self.centre: Tensor
        self.freeze()

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1]."""
        return self.net(4 * (x - self.centre))
