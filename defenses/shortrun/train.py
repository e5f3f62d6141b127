"""The three learning stages of the Short Run classifier (thesis, Algorithm 1)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from robench.errors import UsageError
from robench.precision import mixes_precision
from robench.train.recipe import Recipe, Stage, autocast, parse_recipe, ranger
from robench.types import Images, Labels

from .figures import measure_chains, misfit, r_squared
from .model import auto_sigma

if TYPE_CHECKING:
    from .model import ShortRun

RECONSTRUCTION: Final = 10.0
LEAST_SIGMA: Final = 0.8
"""Stage 3 may lower sigma to this share of where it started; at two thirds of it the chains of MNIST blew up."""
CHECKED: Final = 128
FITTED_AT_ONCE: Final = 2048
FORGOTTEN: Final = 0.1
"""What a batch's loss weighs in the average that the checks go by."""


class ShortRunRecipe(Recipe):
    """Generative, discriminative, then back-propagation through the chain.

    The thesis gives the optimizer (Ranger), the learning rates (5e-4, then 1e-4) and the schedule (flat, then cosine
    after 75 % of the classification stages), but neither batch size nor iterations. Here the rates are higher because
    the training is short; on held-out images batches of 32 did better than twice the images in half the updates.

    Departures: stages 2 and 3 take Adam, and stage 3 is flat in its first part and a cosine from the start in its
    second, not flat for 75 %. A first part of stage 3 differentiates the last steps of the chain only (`depth`): the
    gradient through 5 of 20 steps has a cosine of 0.94 with the whole one at half the cost, while that of the same
    batch under other noise has 0.1. Stage 3 also learns sigma, the weight of the data term, down to a floor that rises
    where the chain becomes unstable, and holds the generator to its reconstructions (`reconstruction`). Chains in
    training are swept in bfloat16 where the device has it, which moves a gradient by 0.6 %; codes, losses and weights
    stay in float32.
    """

    def __init__(
        self,
        defense: ShortRun,
        name: str = "thesis",
        *,
        reconstruction: float = RECONSTRUCTION,
        labelled: int = 0,
        unlabelled: int = 0,
        depth: int = 5,
        batch: int = 32,
    ) -> None:
        """Keeps the model to train.

        Args:
            defense: the model.
            name: the recipe as it was asked for, options included.
            reconstruction: w in the loss of stage 3, L_dis + w |x - g(z_k)|^2 / (2 sigma^2 D) for D pixels; 0 as in the
                thesis.
            labelled: stages 2 and 3 see that many training images, the same ones, drawn by class (thesis: 10,000);
                0: all.
            unlabelled: stage 1 sees that many (thesis: 40,000, 80,000 and 120,000), and so does the fit of sigma; drawn
                without a look at labels, so that they need not hold the labelled ones; 0: all.
            depth: the steps of the chain that a first part of stage 3, `bptt_truncated`, differentiates; 0: stage 3
                differentiates all steps throughout.
            batch: images in a batch.

        Raises:
            UsageError: an option is out of range.
        """
        if min(labelled, unlabelled, depth) < 0 or batch < 1 or not reconstruction >= 0:
            raise UsageError(
                "shortrun: labelled, unlabelled, reconstruction and depth must be at least 0 and batch at least 1; got "
                f"{labelled}, {unlabelled}, {reconstruction}, {depth} and {batch}"
            )
        self.defense, self.name = defense, name
        self.labelled, self.unlabelled, self.batch = labelled, unlabelled, batch
        self.reconstruction, self.depth = reconstruction, depth
        self.sigma_start = math.nan
        self.floor = 1e-6
        self.recent, self.best = math.nan, math.inf

    def prepare(self, x: Images) -> None:
        """Fits sigma to the images of stage 1 (`auto_sigma`), without their labels, where the model asks for it."""
        if self.defense.fits_sigma:
            with torch.no_grad():
                parts = (self.defense.target(part) for part in x.split(FITTED_AT_ONCE))
                self.defense.log_sigma.fill_(math.log(auto_sigma(parts, self.defense.step_size)))
        self.sigma_start = self.defense.log_sigma.exp().item()
        self.floor = LEAST_SIGMA * self.sigma_start

    def begin(self) -> None:
        """Takes up the sigma of weights that training starts from; a floor above it would move it at the first step.

        Raises:
            UsageError: the model was given another as a number.
        """
        sigma = self.defense.log_sigma.exp().item()
        if not self.defense.fits_sigma and not math.isclose(sigma, self.sigma_start, rel_tol=0.01):
            raise UsageError(
                f"shortrun: the weights of --init have sigma {sigma:.4g}, not {self.sigma_start:.4g}. Leave sigma out"
            )
        self.sigma_start, self.floor = sigma, min(self.floor, sigma)

    def stages(self) -> list[Stage]:
        """The thesis's three stages."""
        model = self.defense
        generator, classifier = list(model.generator.parameters()), list(model.classifier.parameters())
        everything = [*generator, *classifier, *([model.log_sigma] if model.preset == "repaired" else [])]
        stage = functools.partial(Stage, batch_size=self.batch)
        first = stage("generative", 700, self.reconstruction_loss, generator, 1e-3, flat=1.0, optimizer=ranger)
        second = stage("discriminative", 200, self.label_loss, classifier, 2e-3)
        last = functools.partial(stage, parameters=everything, learning_rate=1e-3, clip=5.0, check_every=150)
        truncated = functools.partial(self.unrolled_loss, depth=self.depth)
        third = [last("bptt", 3000, self.unrolled_loss, flat=0.4)]
        if self.depth:
            third = [
                last("bptt_truncated", 3000, truncated, flat=1.0),
                last("bptt", 700, self.unrolled_loss, flat=0.0),
            ]
        return [
            replace(first, images=self.unlabelled, by_class=False),
            replace(second, images=self.labelled),
            *(replace(part, images=self.labelled) for part in third),
        ]

    def reconstruction_loss(self, x: Images, y: Labels) -> Tensor:
        """Stage 1: -log p(x, z_k) in the generator's weights, z_k held fixed: |x - g(z_k)|^2 / (2 sigma^2)."""
        del y
        with self._quick_sweeps():
            codes = self.defense.infer(x)
        return self._misfit(x, codes)

    def label_loss(self, x: Images, y: Labels) -> Tensor:
        """Stage 2: cross-entropy of the classifier on z_k; the chain is not differentiated."""
        with self._quick_sweeps():
            codes = self.defense.infer(x)
        return nn.functional.cross_entropy(self.defense.classifier(codes), y)

    def unrolled_loss(self, x: Images, y: Labels, depth: int | None = None) -> Tensor:
        """Stage 3: the same loss with the last `depth` steps differentiated (None: all), and w times the misfit."""
        with torch.no_grad():
            self.defense.log_sigma.clamp_(min=math.log(self.floor))
        with self._quick_sweeps():
            codes = self.defense.infer_differentiably(x, depth=depth)
        loss = nn.functional.cross_entropy(self.defense.classifier(codes), y)
        came = loss.item()
        self.recent = came if math.isnan(self.recent) else self.recent + FORGOTTEN * (came - self.recent)
        if self.reconstruction:
            loss = loss + self.reconstruction / self.defense.target(x[:1]).numel() * self._misfit(x, codes)
        return loss

    def _misfit(self, x: Images, codes: Tensor) -> Tensor:
        with autocast(x):
            images = self.defense.generate(codes)
        summed = (images.to(x.dtype) - self.defense.target(x)).square().flatten(1).sum(1)
        return summed.mean() / (2 * (2 * self.defense.log_sigma.detach()).exp())

    @contextmanager
    def _quick_sweeps(self) -> Iterator[None]:
        device = self.defense.log_sigma.device.type
        self.defense.sweep_dtype = torch.bfloat16 if mixes_precision(device) else None
        try:
            yield
        finally:
            self.defense.sweep_dtype = None

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy by number of chains and aggregate, R2 of the reconstruction, and the chains' agreement (ICC)."""
        return measure_chains(self.defense, x, y)

    def check(self, stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        """Cross-entropy and R2 of one chain on held-out images, and the cross-entropy of the last batches.

        Wrong where the latter is half as much again as at its best: so it looks when the chain leaves the sizes of step
        and sigma at which it is stable. On held-out images a model that overfits a few labels would look the same.
        """
        found = self.look(stage, x, y)
        fine = not self.recent >= 1.5 * self.best + 0.1
        self.best = min(self.best, self.recent)
        figures = {"cross_entropy": found["cross_entropy"], "trained_cross_entropy": self.recent}
        figures |= {"reconstruction_r2": found["reconstruction_r2"]}
        return {**figures, "sigma": self.defense.log_sigma.exp().item()}, fine

    def look(self, stage: Stage, x: Images, y: Labels) -> dict[str, float]:
        """Cross-entropy and R2 of one chain on held-out images."""
        del stage
        x, y = x[:CHECKED], y[:CHECKED]
        with torch.no_grad():
            codes = self.defense.infer(x)
            loss = nn.functional.cross_entropy(self.defense.classifier(codes), y).item()
            explained = r_squared(self.defense, x, misfit(self.defense, x, codes))
        return {"cross_entropy": loss, "reconstruction_r2": explained}

    def roll_back(self, stage: Stage) -> None:
        """Keeps sigma larger from here on: the chain is stable where s (1 + lambda_1 / sigma^2) is under 2."""
        del stage
        self.floor *= 1.1

    def state(self) -> dict[str, Any]:
        """The least sigma, the average of the last losses, and its least at a check so far."""
        return {"floor": self.floor, "recent": self.recent, "best": self.best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes them up."""
        self.floor, self.recent, self.best = state["floor"], state["recent"], state["best"]

    def facts(self) -> dict[str, object]:
        """What was fitted or chosen."""
        return {
            "preset": self.defense.preset,
            "sigma_start": round(self.sigma_start, 4),
            "sigma_floor": round(self.floor, 4),
            "reconstruction_weight": self.reconstruction,
            "depth": self.depth or "all",
            "labelled": self.labelled or "all",
            "unlabelled": self.unlabelled or "all",
        }


def make_recipe(defense: ShortRun, spec: str | None) -> ShortRunRecipe:
    """The recipe of a text such as `thesis(labelled=10000, reconstruction=0)`; None: `thesis`.

    `repaired` is another name of it, after the preset whose nets it trains.

    Raises:
        UsageError: another name, or an option that it does not have or that is out of range.
    """
    spec = re.sub(r"^repaired\b", "thesis", spec or "thesis")
    whole = dict.fromkeys(("labelled", "unlabelled", "depth", "batch"), int)
    return ShortRunRecipe(defense, spec, **parse_recipe("shortrun", "thesis", spec, {"reconstruction": float, **whole}))
