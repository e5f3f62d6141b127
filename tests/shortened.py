"""A defense's own recipe in a few steps, to be watched and cut off."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robench import Defense
from robench.rng import seeded
from robench.train import Recipe, Stage

Loss = Callable[[Tensor, Tensor], Tensor]


class CutOffError(Exception):
    """Stands for the power going out in the middle of an iteration."""


class Shortened(Recipe):
    """A recipe with fewer iterations and smaller batches; all but the figures after a stage is left to it.

    Attributes:
        calls: iterations so far, of all stages.
        on_call: called with `calls` in each iteration, after the loss.
        before: each stage's own loss on `watch` before its first iteration.
        after: the same after its last one.
    """

    def __init__(
        self,
        defense: Defense,
        inner: Recipe,
        iterations: dict[str, int],
        *,
        batch_size: int,
        check_every: int = 0,
        watch: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Takes a recipe.

        Args:
            defense: what it trains.
            inner: the recipe.
            iterations: of each stage by name; the others have one.
            batch_size: images in a batch.
            check_every: of the stages that have checks; 0 for none.
            watch: images and labels that the losses are compared on; None for none.
        """
        self.defense, self.inner, self.iterations, self.batch_size = defense, inner, iterations, batch_size
        self.check_every, self.watch, self.name = check_every, watch, inner.name
        self.calls = 0
        self.on_call: Callable[[int], None] = lambda _number: None
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def prepare(self, x: Tensor) -> None:
        self.inner.prepare(x)

    def begin(self) -> None:
        self.inner.begin()

    def stages(self) -> list[Stage]:
        return [
            dataclasses.replace(
                stage,
                iterations=self.iterations.get(stage.name, 1),
                batch_size=self.batch_size,
                check_every=self.check_every if stage.check_every else 0,
                loss=functools.partial(self.watched_loss, stage),
            )
            for stage in self.inner.stages()
        ]

    def watched_loss(self, stage: Stage, x: Tensor, y: Tensor) -> Tensor:
        if self.watch is not None and stage.name not in self.before:
            self.before[stage.name] = self.objective(stage.loss, *self.watch)
        loss = stage.loss(x, y)
        self.calls += 1
        self.on_call(self.calls)
        return loss

    def objective(self, loss: Loss, x: Tensor, y: Tensor) -> float:
        """A loss as training takes it, always with the same noise; leaves no trace."""
        weights, state, training = copy.deepcopy(self.defense.state_dict()), self.inner.state(), self.defense.training
        self.defense.train()
        with torch.enable_grad(), seeded("objective"):
            value = loss(x, y).item()
        self.defense.train(training)
        self.defense.load_state_dict(weights)
        self.inner.load_state(state)
        return value

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """No figures; the stage that is done is the last one that was begun."""
        del x, y
        if self.watch is not None:
            name = list(self.before)[-1]
            (stage,) = [stage for stage in self.inner.stages() if stage.name == name]
            self.after[name] = self.objective(stage.loss, *self.watch)
        return {}

    def check(self, stage: Stage, x: Tensor, y: Tensor) -> tuple[dict[str, float], bool]:
        return self.inner.check(stage, x, y)

    def look(self, stage: Stage, x: Tensor, y: Tensor) -> dict[str, float]:
        return self.inner.look(stage, x, y)

    def roll_back(self, stage: Stage) -> None:
        self.inner.roll_back(stage)
        self.rate_share = self.inner.rate_share

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.inner.load_state(state)
        self.rate_share = self.inner.rate_share

    def facts(self) -> dict[str, object]:
        return self.inner.facts()
