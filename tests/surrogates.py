"""Surrogates of `transfer` for the contract's toys, found by path: `tests/surrogates.py:Chameleon`."""

from __future__ import annotations

from torch import nn

from robench.defense import Defense
from robench.testing import ConvToy, LinearToy
from robench.types import Images, Logits


class Chameleon(Defense):
    """Answers as the contract's toy of the same image shape does; a class that the toy lacks gets no chance."""

    name = "chameleon"

    def __init__(self) -> None:
        super().__init__()
        toys = [ConvToy(), LinearToy(), LinearToy(channels=3)]
        self.toys = nn.ModuleList(toys)
        self.places = {toy.input_shape: place for place, toy in enumerate(toys)}
        self.num_classes, self.input_shape = toys[0].num_classes, toys[0].input_shape
        self.freeze()

    def forward(self, x: Images) -> Logits:
        logits = self.toys[self.places[x.shape[1], x.shape[2], x.shape[3]]](x)
        return nn.functional.pad(logits, (0, self.num_classes - logits.shape[1]), value=-1e3)
