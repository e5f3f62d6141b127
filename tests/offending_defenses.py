"""Defenses each of which breaks one rule. See test_offenders.py."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robench.rng import reseed, seeded
from robench.testing import ConvToy
from robench.types import Images, Logits

CALLS = itertools.count(1)


class Toy(ConvToy):
    """Keeps every rule; the base of the offenders."""

    name = "toy"


class BareToy(Toy):
    name = "bare"


class Namefree(Toy):
    """No name."""

    name = ""


class Listed(Toy):
    """A list where a tuple is due."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = list(self.input_shape)  # type: ignore[assignment]  # planted


class Doubled(Toy):
    """Two gradient modes of one name."""

    gradient_modes = ("full", "full")


class NanOnBlack(Toy):
    """Divides by the brightness."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x / x.amax((1, 2, 3), keepdim=True))


class OneTooFew(Toy):
    """Returns four logits of five."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x)[:, :4]


class Squeezed(Toy):
    """Drops the batch axis of a single image."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x).squeeze(0)


class Doubles(Toy):
    """Returns float64."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x).double()


class WrongScore(Toy):
    """A detection score for each logit."""

    def detection_score(self, x: Images, kind: str | None = None) -> Tensor:
        del kind
        return self(x)


class WrongPictures(Toy):
    """Pictures in the scale -1 to 1."""

    def pictures(self, x: Images) -> dict[str, Images]:
        return {"original": 2 * x - 1}


class HiddenDice(Toy):
    """Random, but declared deterministic."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x + 0.01 * torch.randn_like(x))


class NoDice(Toy):
    """Deterministic, but declared randomized."""

    randomized = True


class FixedDice(HiddenDice):
    """Seeds itself at each call, so that its noise is always the same."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        with seeded("always"):
            return super().forward(x)


class ReseedsDice(HiddenDice):
    """Seeds the global generator at each call, from a counter: two calls differ, but not by the engine's seed."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        reseed(next(CALLS))
        return super().forward(x)


class OwnDice(Toy):
    """Draws from Python's generator."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        return super().forward(x + 0.1 * random.random())


class Centred(Toy):
    """Subtracts the mean of the batch."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x - x.mean(0) + 0.5)


class BatchNormed(Toy):
    """BatchNorm that normalises by the batch also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.freeze()

    def forward(self, x: Images) -> Logits:
        return super().forward(self.norm(x))


class StillLearning(Toy):
    """BatchNorm left in train mode by a `freeze` that forgets it: its statistics follow the images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.freeze()
        self.norm.train()

    def forward(self, x: Images) -> Logits:
        return super().forward(self.norm(x))


class Counts(Toy):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Images) -> Logits:
        self.calls += 1
        return super().forward(x)


class Overwrites(Toy):
    """Scales x in place."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x.sub_(0.01) if not x.requires_grad else x)


class Flip(torch.autograd.Function):
    """The identity with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def flip(x: Images) -> Images:
    """Calls Flip; torch's stub has no types for `apply`."""
    apply: Callable[[Tensor], Tensor] = Flip.apply
    return apply(x)


class WrongSign(Toy):
    """Its gradient points the other way."""

    def forward(self, x: Images) -> Logits:
        return super().forward(flip(x))


class StandIn(Toy):
    """A stand-in under the name of the full gradient."""

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        self.check_mode(mode)
        return self(x.square())


class Detached(Toy):
    """A softmax without a graph."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x).softmax(1).detach()


class Rounded(Toy):
    """Rounds the image to 4 levels, through which no gradient passes."""

    def forward(self, x: Images) -> Logits:
        return super().forward((4 * x).round() / 4)


class InfiniteSlope(Toy):
    """The root of a value that is 0."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x + (x - x).sqrt())


class SecondModeFails(Toy):
    """Offers a second gradient mode that is none."""

    gradient_modes = ("full", "none")

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        return self(x if self.check_mode(mode) == "full" else x.detach() + 0 * x)


class AnyMode(Toy):
    """Takes any gradient mode for its own."""

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        return self(x)


class LooseWeights(Toy):
    """Keeps weights in a plain attribute, which no weights file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.randn(5)

    def forward(self, x: Images) -> Logits:
        return super().forward(x) + self.offset
