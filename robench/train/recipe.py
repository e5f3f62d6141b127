"""What a defense brings to be trained: stages, each with its loss, its parameters and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robench.errors import UsageError
from robench.precision import mixes_precision
from robench.registry import find_near, parse_spec
from robench.types import Images, Labels

OptimizerFactory = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def check_recipe(defense: str, known: Collection[str], name: str) -> str:
    """The name of a recipe, of a defense that has several without options.

    Raises:
        UsageError: it has none of that name, or options stand behind it.
    """
    if name in known:
        return name
    bare, bracket, _ = name.partition("(")
    if bracket and bare in known:
        raise UsageError(f'{defense}: the recipe "{bare}" takes no options; got "{name}"')
    near = find_near(bare, known).strip()
    raise UsageError(f'{defense} has the recipes {", ".join(known)}; got "{name}"{near and f"; {near}"}')


def parse_recipe(defense: str, name: str, spec: str, known: Mapping[str, type]) -> dict[str, Any]:
    """The options in a text such as `thesis(labelled=10000)`, of a defense that has one recipe.

    Args:
        defense: its name.
        name: the recipe's.
        spec: the text.
        known: the recipe's options, each with int or float.

    Raises:
        UsageError: another name, an option that it does not have, or a value of another kind.
    """
    came, options = parse_spec(spec)
    if came != name:
        raise UsageError(f'{defense} has one recipe, "{name}"; got "{came}"')
    for option, value in options.items():
        if option not in known:
            raise UsageError(f'{defense}: the recipe "{name}" takes {", ".join(known)}; got "{option}"')
        whole = known[option] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise UsageError(f"{defense}: {option} takes a {'whole ' if whole else ''}number; got {value!r}")
    return options


def adam(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adam with torch's defaults."""
    return torch.optim.Adam(parameters, lr=learning_rate)


def ranger(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Ranger: RAdam, Lookahead (k 6, alpha 0.5) and gradient centralisation, with the reference's constants."""
    from pytorch_optimizer import Ranger

    return Ranger(parameters, lr=learning_rate, degenerated_to_sgd=True)


def autocast(x: Images) -> torch.autocast:
    """A context in which convolutions run in bfloat16 where the device has it: 1.7 times as fast on such CPUs.

    Elsewhere they stay in float32: an AVX2 CPU emulates bfloat16, and a step of the ConvNet took 21 times as long.
    So they do where `TrainSettings.precision` says so.
    Only the passes go inside; logits are turned back to float32 for the loss, and weights and update stay float32.
    """
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=mixes_precision(x.device.type))


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
        check_every: iterations between two calls of `Recipe.check`, multiplied by `TrainSettings.scale` as the stage's
            own; the last iteration is checked in any case. 0: none.
        roll_backs: how often a check may fail before training stops.
        images: draw from a subset of that many training images; 0 takes all. Two stages of one number draw from the
            same ones, and a smaller subset is part of a larger one.
        by_class: the subset has as many images of each class; False: it is drawn without a look at the labels, for a
            stage that is not to know them. The two kinds are drawn independently.
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
    check_every: int = 0
    roll_backs: int = 5
    images: int = 0
    by_class: bool = True

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        done = iteration / max(self.iterations, 1)
        if done < self.flat:
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - self.flat) / (1 - self.flat)))


def clean_accuracy(defense: nn.Module, x: Images, y: Labels) -> dict[str, float]:
    """The share of images that one answer is right on, under `accuracy`; the look of most recipes."""
    with torch.no_grad():
        return {"accuracy": round((defense(x).argmax(1) == y).float().mean().item(), 4)}


class Recipe:
    """The stages of a defense and what to measure after each.

    Attributes:
        name: what `--recipe` calls it.
        rate_share: multiplies the learning rate of every stage. A recipe whose `roll_back` lowers it has it in `state`.
    """

    name: str = "default"
    rate_share: float = 1.0

    def prepare(self, x: Images) -> None:
        """Fits constants to the images of the first stage that is run (Short Run: sigma). Default: nothing."""

    def begin(self) -> None:
        """Takes up what `prepare` and weights to start from (`--init`) left in the model; default: nothing."""

    def stages(self) -> list[Stage]:
        """The stages in order; asked for before `prepare` too, as the first tells which images that is given."""
        raise NotImplementedError

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Figures on held-out images for the card, by name; called after each stage in eval mode."""
        raise NotImplementedError

    def check(self, stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        """Figures of the training so far on held-out images, and whether it goes well; called in eval mode.

        Where it does not, the loop takes weights and optimizer back to the last check that went well, or to the start
        of the stage, and calls `roll_back`. Default: the figures of `measure`, and well.
        """
        del stage
        return self.measure(x, y), True

    def look(self, stage: Stage, x: Images, y: Labels) -> dict[str, float]:
        """Cheap figures on held-out images in the middle of a stage without checks; called in eval mode.

        They are shown and stand in the card, and nothing follows from them. Must not change what is trained.
        Default: none.
        """
        del stage, x, y
        return {}

    def roll_back(self, stage: Stage) -> None:
        """Changes the recipe so that what went wrong does not happen again; default: nothing."""

    def state(self) -> dict[str, Any]:
        """What beyond weights and optimizer a checkpoint must hold: numbers, texts, tensors. Default: nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave; called when a run is resumed and when it is rolled back before `roll_back`."""

    def facts(self) -> dict[str, object]:
        """Further entries of the card, such as constants fitted in `prepare`."""
        return {}
