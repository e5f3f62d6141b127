"""A blur before a fixed linear classifier."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from robench import Defense
from robench.types import Images, Logits


class ExampleBlur(Defense):
    """A box blur before a fixed linear layer: an example, no defense, and not trained. Deterministic.

    The layer compares the image with ten waves. No guarantee. Cost of a forward: 16 k multiply-adds.

    Args:
        width: side of the box, odd.
    """

    name = "example_blur"
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self, width: int = 3) -> None:
        """Builds the classifier."""
        super().__init__()
        self.width = width
        place = torch.arange(28 * 28) / (28 * 28)
        waves = torch.cos(torch.arange(1.0, 11)[:, None] * torch.pi * place)
        self.weight = nn.Parameter(waves / 28)

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1]."""
        blurred = functional.avg_pool2d(x, self.width, stride=1, padding=self.width // 2)
        return blurred.flatten(1) @ self.weight.T
