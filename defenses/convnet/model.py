"""The ConvNet of table A.3, without any defense: the row that every other one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import nn

from robench.defense import Defense
from robench.errors import UsageError
from robench.types import Images, Logits

if TYPE_CHECKING:
    from robench.train.recipe import Recipe


THESIS_WIDTH: Final = 64
THESIS_SIDE: Final = 28
SMALLEST_SIDE: Final = 20
"""Below it nothing is left of the image after the second pooling."""


def make_convnet(channels: int, num_classes: int = 10, width: int = THESIS_WIDTH, side: int = 28) -> nn.Sequential:
    """Table A.3: four convolutions, two poolings, three linear layers, Mish; no padding, no normalisation.

    As printed a Mish follows the last layer too; it is left out, since it cuts negative logits off at -0.31.
    891,438 parameters at 3x28x28 and the thesis's width; `width` scales the channels of all four convolutions, and
    images of another `side` only change the first linear layer.
    """
    last = 200 * width // THESIS_WIDTH
    left = ((side - 6) // 2 - 5) // 2
    return nn.Sequential(
        nn.Conv2d(channels, width, 4),  # b c 28 28 -> b 64 25 25
        nn.Mish(),
        nn.Conv2d(width, 2 * width, 4),  # -> b 128 22 22
        nn.Mish(),
        nn.MaxPool2d(2),  # -> b 128 11 11
        nn.Conv2d(2 * width, 2 * width, 4),  # -> b 128 8 8
        nn.Mish(),
        nn.Conv2d(2 * width, last, 3),  # -> b 200 6 6
        nn.Mish(),
        nn.MaxPool2d(2),  # -> b 200 3 3
        nn.Flatten(),
        nn.Linear(left * left * last, 140),
        nn.Mish(),
        nn.Linear(140, 80),
        nn.Mish(),
        nn.Linear(80, num_classes),
    )


class ConvNet(Defense):
    """The undefended ConvNet (E. M. Fischer, MSc thesis, UCLA 2020, table A.3): deterministic, no defense at all.

    It takes images in the thesis's scale, [-1, 1], mapped inside. Cost of a forward: 90.7 M multiply-adds at 3x28x28.
    """

    name = "convnet"
    needs_weights = True
    recipes: ClassVar[Mapping[str, str]] = {"clean": "clean images; clean(labelled=10000) takes so many of them"}

    def __init__(self, channels: int = 1, width: int | None = None, side: int = 28) -> None:
        """Builds an untrained net for `channels` x `side` x `side` images.

        Args:
            channels: image channels.
            width: channels of the first layer; the others scale with it. None takes the thesis's 64 for 28x28 images
                and half of it for larger ones, which keeps the weights small.
            side: height and width of the images.

        Raises:
            UsageError: a width that the layers cannot be scaled by, or images too small for them.
        """
        super().__init__()
        width = _usual_width(side) if width is None else width
        if width < 1 or 200 * width % THESIS_WIDTH:
            raise UsageError(f"{self.name}: width must be a positive multiple of 8; got {width}")
        if channels < 1 or side < SMALLEST_SIDE:
            raise UsageError(
                f"{self.name}: channels must be at least 1 and side at least {SMALLEST_SIDE}; got {channels} and {side}"
            )
        self.num_classes = 10
        self.input_shape = (channels, side, side)
        self.net = make_convnet(channels, width=width, side=side)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1]."""
        return self.net((2 * x - 1).contiguous(memory_format=torch.channels_last))

    @classmethod
    def options_for(cls, input_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The constructor's options for a dataset of square images of 10 classes."""
        channels, height, width = input_shape
        if height != width or num_classes != 10:
            raise UsageError(
                f"{cls.name} takes square images of 10 classes; the dataset has {input_shape}, {num_classes}"
            )
        return {"channels": channels} if height == THESIS_SIDE else {"channels": channels, "side": height}

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The width, where one other than usual for images of that side is asked for."""
        width = options.get("width")
        return "" if width in (None, _usual_width(options.get("side", THESIS_SIDE))) else f"width{width}"

    def recipe(self, name: str | None = None) -> Recipe:
        """Plain training on clean images, `clean`; `clean(labelled=10000)` takes a subset."""
        from robench.train.recipe import parse_recipe

        from .train import ConvNetRecipe

        spec = name or "clean"
        return ConvNetRecipe(self, spec, **parse_recipe("convnet", "clean", spec, {"labelled": int}))


def _usual_width(side: int) -> int:
    return THESIS_WIDTH if side == THESIS_SIDE else THESIS_WIDTH // 2
