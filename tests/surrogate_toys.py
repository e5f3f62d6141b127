"""Surrogates for the tests of transfer, which loads them by name: `surrogate_toys:Untrained`."""

from __future__ import annotations

import torch
from torch import nn

from robench.defense import Defense
from robench.testing import LinearToy
from robench.types import Images, Logits


class Untrained(Defense):
    """A linear net of ten classes as its constructor draws it."""

    name = "untrained"
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))

    def forward(self, x: Images) -> Logits:
        return self.net(x)


class Counted(LinearToy):
    """The linear toy with noise too small to matter, which counts the images that it classifies."""

    name = "counted"
    randomized = True
    seen = 0

    def forward(self, x: Images) -> Logits:
        Counted.seen += len(x)
        logits = super().forward(x)
        return logits + 1e-3 * torch.randn_like(logits)


class TwoClasses(Defense):
    """Two classes by the sign of the mean."""

    name = "two_classes"
    num_classes = 2
    input_shape = (1, 2, 2)

    def forward(self, x: Images) -> Logits:
        mean = x.flatten(1).mean(1)
        return torch.stack([mean, 1 - mean], dim=1)
