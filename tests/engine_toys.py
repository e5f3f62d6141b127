"""Toys of the engine's tests. The command line finds them too: `tests/engine_toys.py:Slow`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench.attack import Attack
from robench.defense import Defense
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Labels, Logits
from robench.victim import Victim

if TYPE_CHECKING:
    from _typeshed import HasFileno

CLASSES, SHAPE = 3, (2, 3, 3)


class Linear(Defense):
    """Three classes on 2 x 3 x 3 images: logits = gain * W (x - 1/2), W of cosines. Deterministic."""

    name = "linear"
    num_classes = CLASSES
    input_shape = SHAPE

    def __init__(self, gain: float = 3.0) -> None:
        super().__init__()
        rows = torch.arange(18.0) * torch.arange(1.0, CLASSES + 1)[:, None]  # k d
        self.weight = nn.Parameter(gain * torch.cos(rows + torch.arange(CLASSES)[:, None]))
        self.freeze()

    def forward(self, x: Images) -> Logits:
        return (x - 0.5).flatten(1) @ self.weight.T


class Noisy(Linear):
    """The linear toy with Gaussian noise on its logits."""

    name = "noisy"
    randomized = True

    def __init__(self, gain: float = 3.0, sigma: float = 2.0) -> None:
        super().__init__(gain)
        self.sigma = sigma

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits + self.sigma * torch.randn_like(logits)


class Calm(Noisy):
    """The noisy toy, which can do without its noise."""

    name = "calm"

    @contextlib.contextmanager
    def without_randomness(self) -> Iterator[None]:
        sigma, self.sigma = self.sigma, 0.0
        try:
            yield
        finally:
            self.sigma = sigma


class NoisyHead(Linear):
    """Gaussian noise behind a first layer, which several draws share; the head is nonlinear."""

    name = "noisy_head"
    randomized = True
    draws_per_pass = False

    def __init__(self) -> None:
        super().__init__(1.0)
        self.first, self.seen = 0, list[int]()

    def first_layer(self, x: Images) -> Tensor:
        """Counts its rows."""
        self.first += len(x)
        return (x.flatten(1) - 0.5).tanh()

    def head(self, hidden: Tensor) -> Logits:
        """Noise, and logits."""
        return (hidden + 0.3 * torch.randn_like(hidden)).square() @ self.weight.T

    def forward(self, x: Images) -> Logits:
        return self.head(self.first_layer(x))

    def forward_draws(self, x: Images, draws: int) -> Tensor:
        self.seen.append(len(x))
        return self.head(self.first_layer(x).repeat(draws, 1)).unflatten(0, (draws, -1))


class NoisyHeadBelow(NoisyHead):
    """The same with a `forward` of its own, of which the inherited `forward_draws` knows nothing."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x)


class NoisyInput(Linear):
    """Gaussian noise on the images before a nonlinear toy, so that the gradient depends on the draw."""

    name = "noisy_input"
    randomized = True

    def forward(self, x: Images) -> Logits:
        return super().forward((x + 0.3 * torch.randn_like(x)).sin())


class OneNoise(Linear):
    """One noise for all images of a pass; notes the rows of each pass."""

    name = "one_noise"
    randomized = True

    def __init__(self, gain: float = 3.0) -> None:
        super().__init__(gain)
        self.passes: list[int] = []

    def forward(self, x: Images) -> Logits:
        self.passes.append(len(x))
        return super().forward((x + torch.randn(())).sin())


class TwoClasses(Linear):
    """The first two classes of the linear toy alone."""

    name = "two_classes"
    num_classes = 2

    def forward(self, x: Images) -> Logits:
        return super().forward(x)[:, :2]


class TwoPaths(Linear):
    """Two gradient modes: the first gives no gradient to speak of, the second the true one."""

    name = "two_paths"
    gradient_modes = ("flat", "full")

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        logits = self(x)
        return logits.detach() + 0.0 * logits if self.check_mode(mode) == "flat" else logits


class NoGradient(Linear):
    """Differentiates nothing and offers no stand-in."""

    name = "no_gradient"

    def forward(self, x: Images) -> Logits:
        return super().forward(x.detach())


class Broken(Linear):
    """Answers NaN, or logits of the wrong shape."""

    name = "broken"

    def __init__(self, how: str = "nan") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits[:, :2] if self.how == "shape" else logits.fill_(float(self.how))


PROTOTYPES = (
    (12, 50, 51, 14, 17, 57, 56, 20, 3, 56, 57, 5, 2, 56, 57, 4),
    (0, 47, 53, 0, 1, 48, 50, 1, 1, 40, 40, 1, 1, 35, 35, 1),
    (9, 51, 52, 11, 22, 60, 59, 26, 27, 58, 57, 30, 24, 40, 40, 26),
    (1, 43, 45, 1, 2, 49, 50, 4, 2, 53, 55, 3, 1, 50, 53, 1),
    (4, 52, 54, 5, 18, 69, 67, 22, 25, 68, 67, 29, 22, 46, 47, 25),
    (0, 1, 5, 6, 1, 10, 25, 25, 17, 30, 32, 32, 8, 13, 4, 7),
    (7, 44, 45, 9, 18, 56, 55, 21, 18, 55, 54, 21, 14, 46, 47, 17),
    (0, 0, 1, 0, 1, 16, 43, 30, 29, 47, 50, 44, 1, 2, 2, 2),
    (4, 14, 15, 6, 29, 49, 49, 36, 41, 67, 66, 47, 23, 47, 44, 24),
    (0, 2, 22, 16, 0, 9, 68, 55, 20, 49, 73, 62, 20, 34, 21, 26),
)
"""Mean brightness of each class of Fashion-MNIST on a 4 x 4 grid, in hundredths."""


class Prototypes(Defense):
    """The nearest of ten class means on a 4 x 4 grid of Fashion-MNIST. Deterministic, 58 % right."""

    name = "prototypes"
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(PROTOTYPES) / 100)
        self.freeze()

    def forward(self, x: Images) -> Logits:
        return self.classify(functional.avg_pool2d(x, 7).flatten(1))

    def classify(self, cells: Tensor) -> Logits:
        """Logits of 16 cells: minus half the squared distance from each class mean, but for what all classes share."""
        return 10 * (cells @ self.weight.T - self.weight.pow(2).sum(1) / 2)


class Thresholds(Defense):
    """Ten ranges of the mean brightness: no weights, and no tensor at all. Deterministic."""

    name = "thresholds"
    num_classes = 10
    input_shape = (1, 28, 28)

    def forward(self, x: Images) -> Logits:
        centres = torch.arange(10) / 10 + 0.05
        return -(x.mean((1, 2, 3))[:, None] - centres.to(x.device)).abs()  # b k


class Blindfold(Prototypes):
    """Randomized: each answer sees one corner of the image, drawn by chance, at a fixed grey."""

    name = "blindfold"
    randomized = True

    def forward(self, x: Images) -> Logits:
        corner = torch.randint(4, (len(x),), device=x.device)
        return self.with_corner_hidden(x, corner)

    def with_corner_hidden(self, x: Images, corner: Labels) -> Logits:
        cells = functional.avg_pool2d(x, 7).flatten(1)
        grid = torch.arange(16, device=x.device)
        place = 2 * (grid // 8) + grid % 4 // 2  # corner of each cell
        return self.classify(torch.where(place == corner[:, None], 0.3, cells))


class OneCorner(Blindfold):
    """Draws the corner once for all images of a pass; corner 0 takes most of what tells the classes apart."""

    name = "one_corner"

    def forward(self, x: Images) -> Logits:
        corner = torch.randint(4, (1,), device=x.device).expand(len(x))
        return self.with_corner_hidden(x, corner)


class Moody(Prototypes):
    """Tells all images of every other pass, as it happens, the class after theirs."""

    name = "moody"
    randomized = True

    def forward(self, x: Images) -> Logits:
        return super().forward(x).roll(int(torch.randint(2, ()).item()), 1)


class GrainyCorner(OneCorner):
    """A corner for the pass and, on top, noise of each image's own: no look at copies in a pass finds the first."""

    name = "grainy_corner"

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits + 0.01 * torch.randn_like(logits)


class GrainyMood(Moody):
    """A mood for the pass and, on top, noise of each image's own."""

    name = "grainy_mood"

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits + 0.01 * torch.randn_like(logits)


class Stairs(Prototypes):
    """Rounds what it sees to eight greys, so that its gradient is zero: masked."""

    name = "stairs"

    def forward(self, x: Images) -> Logits:
        return super().forward((x * 8).round() / 8)


class Slow(Blindfold):
    """Sleeps in each pass and before each write to disk, so that a test can kill it at any point."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__()
        self.pause = float(os.environ.get("ROBENCH_TOY_PAUSE", "0"))
        if self.pause:
            slow_down_disk(5 * self.pause)

    def forward(self, x: Images) -> Logits:
        time.sleep(self.pause)
        return super().forward(x)


def slow_down_disk(pause: float) -> None:
    """Makes each fsync of this process take longer: it stands between a temporary file and its final name."""
    sync = os.fsync

    def slow_sync(fd: int | HasFileno) -> None:
        time.sleep(pause)
        sync(fd)

    os.fsync = slow_sync


@dataclass(frozen=True)
class Still(Attack):
    """Returns the originals and asks nothing."""

    name = "still"
    norms = NORMS
    access = "none"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        return x


@dataclass(frozen=True)
class Nudge(Attack):
    """Moves every pixel by the bound (linf), up or down; asks nothing."""

    name = "nudge"
    norms = NORMS
    access = "none"

    up: bool = True

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        return threat.project(x, x + (threat.eps if self.up else -threat.eps))


@dataclass(frozen=True)
class Partial(Attack):
    """One step along the gradient's sign, over a share of the bound."""

    name = "partial"
    norms = NORMS

    share: float = 0.5

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        _, grad = victim.loss_grad(x, y, "margin")
        return threat.project(x, x + self.share * threat.eps * grad.sign())


@dataclass(frozen=True)
class Onward(Attack):
    """Brightens all pixels by 0.02 from where it ended within a smaller bound; asks nothing."""

    name = "onward"
    norms = NORMS
    access = "none"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        return threat.project(x, (x if victim.start is None else victim.start) + 0.02)


@dataclass(frozen=True)
class Upward(Attack):
    """Minimal-norm: brightens all pixels in steps of 0.02; 40 answers an image, whatever the bound is."""

    name = "upward"
    norms = NORMS
    access = "decisions"
    goal = "minimal"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        nearest = x
        for step in range(40, 0, -1):
            brighter = (x + 0.02 * step).clamp(0, 1)
            wrong = victim.labels(brighter) != y
            nearest = torch.where(wrong.view(-1, 1, 1, 1), brighter, nearest)
        return torch.where(threat.contains(x, nearest).view(-1, 1, 1, 1), nearest, x)


@dataclass(frozen=True)
class FailsBeyond(Attack):
    """Darkens all pixels by the bound, and raises where the bound is larger than `limit`."""

    name = "fails_beyond"
    norms = NORMS
    access = "none"

    limit: float = 0.15

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        if threat.eps > self.limit:
            raise RuntimeError("planted")
        return threat.project(x, x - threat.eps)


@dataclass(frozen=True)
class Bad(Attack):
    """Breaks a rule: raises, far, nan, box, shape, dtype; `some` raises where the first pixel is `first`."""

    name = "bad"
    norms = NORMS

    how: str = "raises"
    first: float = -1.0

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        if self.how == "raises" or (self.how == "some" and x[0, 0, 0, 0].item() == self.first):
            raise RuntimeError("planted")
        return {
            "far": (x + 2 * threat.eps).clamp(0, 1),
            "nan": torch.full_like(x, torch.nan),
            "box": x - 2,
            "shape": x[:, :1],
            "dtype": x.double(),
            "some": x,
        }[self.how]


@dataclass(frozen=True)
class Wander(Attack):
    """Queries images ever farther away, in and out of the bound, until a budget stops it."""

    name = "wander"
    norms = NORMS
    access = "scores"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        for step in range(10_000):
            victim.logits((x + 0.25 * step * threat.eps).clamp(0, 1))
        return x


def grid_images(n: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """`n` images for `Linear` in [0.1, 0.9] and the labels that it gives them; deterministic."""
    count = torch.arange(n * 18, dtype=torch.float64) + 1000 * salt
    x = (0.1 + 0.8 * (count * 0.618034 % 1)).float().view(n, *SHAPE)
    return x, Linear()(x).argmax(1)


def some_wrong(n: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Images of `Linear` of which every fifth has another label."""
    x, y = grid_images(n, salt)
    y[::5] = (y[::5] + 1) % 3
    return x, y
