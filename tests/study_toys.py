"""Defenses that misbehave in all ways that a study has to survive; each is right until it is attacked, but for some."""

from __future__ import annotations

import os
import time

import torch
from engine_toys import Prototypes
from torch import Tensor

from robench.data import load_dataset
from robench.errors import PluginError
from robench.types import Images, Logits


class Attacked(Prototypes):
    """Misbehaves when it is asked for a gradient."""

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        if torch.is_grad_enabled():
            self.misbehave()
        return super().adaptive_forward(x, mode)

    def misbehave(self) -> None:
        raise NotImplementedError


class Hangs(Attacked):
    name = "hangs"

    def misbehave(self) -> None:
        time.sleep(1e6)


class HangsWhenLoaded(Prototypes):
    name = "hangs_when_loaded"

    def __init__(self) -> None:
        super().__init__()
        time.sleep(1e6)


class Glutton(Attacked):
    name = "glutton"

    def misbehave(self) -> None:
        hoard = []
        while True:
            hoard.append(torch.ones(50_000_000))


class Exits(Attacked):
    name = "exits"

    def misbehave(self) -> None:
        raise SystemExit(3)


class ExitsHard(Attacked):
    name = "exits_hard"

    def misbehave(self) -> None:
        os._exit(3)


class Chatty(Prototypes):
    name = "chatty"

    def forward(self, x: Images) -> Logits:
        print("{")  # noqa: T201 - what a study has to survive
        os.write(1, b"}\n")
        return super().forward(x)


class Drifts(Prototypes):
    name = "drifts"
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Images) -> Logits:
        self.seen.add_(len(x))
        return super().forward(x)


class Seeds(Prototypes):
    name = "seeds"

    def forward(self, x: Images) -> Logits:
        torch.manual_seed(0)  # noqa: TID251 - what a plugin must not do
        return super().forward(x)


class SeedsLate(Attacked):
    name = "seeds_late"

    def misbehave(self) -> None:
        torch.manual_seed(0)  # noqa: TID251 - what a plugin must not do


class OwnError(PluginError):
    """A plugin's own kind of error, which says nothing."""


class RaisesItsOwn(Prototypes):
    name = "raises_its_own"

    def __init__(self) -> None:
        super().__init__()
        raise OwnError


class RaisesLate(Prototypes):
    """Raises at the first image of the third unit of four images."""

    name = "raises_late"

    def __init__(self) -> None:
        super().__init__()
        self.fatal = load_dataset("fashion_mnist", "test", 12, 0, None).x[8]

    def forward(self, x: Images) -> Logits:
        if bool((x[0] == self.fatal).all()):
            raise ValueError("planted")
        return super().forward(x)
