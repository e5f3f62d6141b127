"""A training run: where it stands, what it has measured, and its checkpoint file."""

from __future__ import annotations

import copy
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor

from robench.data import Dataset, draw_stratified
from robench.defense import Defense, in_eval_mode
from robench.errors import DataError, UsageError
from robench.files import write_atomic
from robench.precision import mixes_precision, training_precision
from robench.rng import seed_for, seeded
from robench.train.recipe import Recipe, Stage
from robench.train.split import split_images
from robench.types import Images, Labels

CHECKPOINT: Final = "checkpoint.pt"
CHECKPOINT_SECONDS = 60.0
LOOKED_AT: Final = 256
SLOW_DOWN: Final = "Lower the learning rate with --lr-scale, such as --lr-scale 0.3"
ENTRIES: Final = {"identity", "state", "measured", "checks", "weights", "optimizer", "recipe", "good"}


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        seed: seeds the order of the images and all that the defense draws; 0 or larger.
        holdout: training images kept aside for the figures of the card.
        scale: multiplies the iterations of every stage; 0.01 is a smoke test.
        device: `cpu` or `cuda`.
        tensorboard: also write losses and figures for TensorBoard, into the folder of the checkpoint.
        init: weights to start from, instead of random ones.
        first_stage: the stage to begin with, for weights that are past the ones before; empty: the first.
        precision: `auto` takes bfloat16 where the device has it (see `autocast`), `float32` does not.
        lr_scale: multiplies the learning rate of every stage.
    """

    seed: int = 0
    holdout: int = 500
    scale: float = 1.0
    device: str = "cpu"
    tensorboard: bool = False
    init: Path | None = None
    first_stage: str = ""
    precision: str = "auto"
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks the seed, the precision, and the scales of iterations and learning rate.

        Raises:
            UsageError: the seed is below 0, the precision is neither `auto` nor `float32`, or a scale is not positive
                and finite.
        """
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0; got {self.seed}")
        for name, scale in (("scale", self.scale), ("lr-scale", self.lr_scale)):
            if not 0 < scale < math.inf:
                raise UsageError(f"{name} must be positive and finite; got {scale}")
        if self.precision not in ("auto", "float32"):
            raise UsageError(f'training takes precision auto or float32; got "{self.precision}"')


@dataclass
class Position:
    """Where training stands: the stage, its next iteration, the steps of all stages so far.

    And in this stage: checks that failed in a row, and roll-backs.
    """

    stage: int = 0
    iteration: int = 0
    step: int = 0
    seconds: float = 0.0
    failures: int = 0
    roll_backs: int = 0


class Run:
    """One training run: the position, its checkpoint file and what has been measured so far.

    Attributes:
        split: which images are held out.
        precision: `bfloat16` where `autocast` runs passes in it, else `float32`.
        measured: the figures after each stage that is done.
        checks: the figures of each check, in order, with `fine`; and of each look, without it.
        good: weights, optimizer and recipe of the last check that went well; None before the first of a stage.
    """

    def __init__(
        self, defense: Defense, recipe: Recipe, data: Dataset, folder: Path, settings: TrainSettings, variant: str
    ) -> None:
        if len(data.x) <= settings.holdout:
            raise UsageError(
                f"training keeps {settings.holdout} images aside; the split has {len(data.x)}. Train on a larger one"
            )
        self.defense, self.recipe, self.settings = defense, recipe, settings
        self.path = folder / CHECKPOINT
        self.state = Position()
        self.measured: dict[str, dict[str, float]] = {}
        self.checks: list[dict[str, Any]] = []
        self.good: dict[str, Any] | None = None
        self.split = split_images(data, settings.seed, settings.holdout, settings.init)
        with training_precision(settings.precision):
            self.precision = "bfloat16" if mixes_precision(torch.device(settings.device).type) else "float32"
        told = {name: value for name, value in asdict(settings).items() if name not in ("tensorboard", "lr_scale")}
        told |= {"lr_scale": settings.lr_scale} if settings.lr_scale != 1 else {}
        told |= {
            "precision": self.precision,
            "split": (self.split.seed, len(self.split.held)),
            "defense": f"{defense.name}{variant}",
            "recipe": recipe.name,
            "data": f"{data.name} {data.digest[:16]}",
        }
        self.identity = {name: str(value) for name, value in told.items()}
        held, kept = self.split.held, self.split.kept
        self.x, self.y = data.x[kept], data.y[kept]
        self.x_held, self.y_held = data.x[held].to(settings.device), data.y[held].to(settings.device)
        self.subsets: dict[tuple[int, bool], Tensor] = {}
        self.started = time.monotonic()

    @property
    def note(self) -> str:
        """The figures of the last check, for the progress line."""
        if not self.checks:
            return ""
        figures = [f"{name} {value:.3g}" for name, value in self.checks[-1].items() if isinstance(value, float)]
        return f" ({', '.join(figures)})"

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Writes the checkpoint in one atomic step."""
        now = time.monotonic()
        self.state.seconds, self.started = self.state.seconds + now - self.started, now
        content = {
            "identity": self.identity,
            "state": asdict(self.state),
            "measured": self.measured,
            "checks": self.checks,
            "good": self.good,
            **self._learned(optimizer),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomic(self.path, buffer.getvalue())

    def _learned(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        return {
            "weights": self.defense.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "recipe": self.recipe.state(),
        }

    def keep(self, optimizer: torch.optim.Optimizer) -> None:
        """Remembers this moment as one to go back to."""
        self.good = copy.deepcopy(self._learned(optimizer))
        self.state.failures = 0

    def roll_back(self, stage: Stage, optimizer: torch.optim.Optimizer, reason: str) -> None:
        """Goes back to the last moment that went well, iterations still counted, and lets the recipe change itself.

        Raises:
            DataError: it happened too often in this stage.
        """
        self.state.failures += 1
        self.state.roll_backs += 1
        if self.good is None or self.state.roll_backs > stage.roll_backs:
            raise DataError(
                f'training diverged in stage "{stage.name}" ({reason}) after {self.state.roll_backs - 1} roll-backs. '
                f"{SLOW_DOWN}"
            )
        good = copy.deepcopy(self.good)
        self.defense.load_state_dict(good["weights"])
        optimizer.load_state_dict(good["optimizer"])
        self.recipe.load_state(good["recipe"])
        for _ in range(self.state.failures):  # what one change did not cure, two may
            self.recipe.roll_back(stage)

    def check(self, stage: Stage) -> bool:
        """Measures on the held-out images how the stage goes."""
        iteration = self.state.iteration
        draws = seeded(self.settings.seed, stage.name, "check", iteration, device=self.settings.device)
        with in_eval_mode(self.defense), draws:
            figures, fine = self.recipe.check(stage, self.x_held, self.y_held)
        self.checks.append({"stage": stage.name, "iteration": iteration, "fine": fine, **figures})
        return fine

    def look(self, stage: Stage) -> None:
        """Takes figures of a stage without checks on a part of the held-out images; training is as without them."""
        iteration = self.state.iteration
        draws = seeded(self.settings.seed, stage.name, "look", iteration, device=self.settings.device)
        with in_eval_mode(self.defense), draws:
            figures = self.recipe.look(stage, self.x_held[:LOOKED_AT], self.y_held[:LOOKED_AT])
        if figures:
            self.checks.append({"stage": stage.name, "iteration": iteration, **figures})

    @contextmanager
    def checkpoints(self, optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
        """Yields a function to call after each iteration: it saves when a minute has gone by, and on Ctrl-C.

        An interrupt waits for the end of the iteration, so that no half-made update is saved; a second one does not.
        """
        saved, interrupted = time.monotonic(), False

        def note_interrupt(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            del number, frame
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True

        def after_iteration() -> None:
            nonlocal saved
            if interrupted or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save(optimizer)
                saved = time.monotonic()
            if interrupted:
                raise KeyboardInterrupt

        is_main = threading.current_thread() is threading.main_thread()  # only it may set a handler
        previous = signal.signal(signal.SIGINT, note_interrupt) if is_main else None
        try:
            yield after_iteration
        finally:
            if is_main:
                signal.signal(signal.SIGINT, previous or signal.SIG_DFL)

    def load(self) -> dict[str, Any] | None:
        """Reads the checkpoint and returns the optimizer's state, None between two stages.

        Raises:
            UsageError: there is none, or it is of another run.
            DataError: it is damaged.
        """
        if not self.path.exists():
            raise UsageError(f"nothing to resume: {self.path} does not exist")
        try:
            content = torch.load(self.path, weights_only=True, map_location=self.settings.device)
        except Exception as error:  # noqa: BLE001 - torch raises many kinds for a damaged file
            raise DataError(f"checkpoint {self.path} is damaged: {error}. Delete it to start over") from None
        if not (isinstance(content, dict) and content.keys() >= ENTRIES):
            raise DataError(f"checkpoint {self.path} is damaged: it is no checkpoint. Delete it to start over")
        if content["identity"] != self.identity:
            raise UsageError(
                f"checkpoint {self.path} is of another run: {self._tell_apart(content['identity'])}. "
                "Choose another --out, or delete the file to start over"
            )
        self.state = Position(**content["state"])
        self.measured, self.checks, self.good = content["measured"], content["checks"], content["good"]
        self.defense.load_state_dict(content["weights"])
        self.recipe.load_state(content["recipe"])
        return content["optimizer"]

    def _tell_apart(self, other: object) -> str:
        """What a checkpoint's identity has that is not this run's."""
        if not isinstance(other, dict):
            return "an earlier version of robench wrote it"
        names = [name for name in {**self.identity, **other} if self.identity.get(name) != other.get(name)]
        return "; ".join(f"{name}: expected {self.identity.get(name)}, got {other.get(name)}" for name in names)

    def check_demands(self, stages: Sequence[Stage]) -> None:
        """Checks that there are as many training images as each stage takes.

        Raises:
            UsageError: a stage takes more.
        """
        for stage in stages:
            if stage.images > len(self.x):
                raise UsageError(f"stage {stage.name} takes {stage.images} training images; there are {len(self.x)}")

    def batch(self, stage: Stage, iteration: int) -> tuple[Images, Labels]:
        """The batch of an iteration: an order of the stage's images drawn for each epoch from the seed alone."""
        count = stage.images or len(self.x)
        per_epoch = max(count // stage.batch_size, 1)
        epoch, position = divmod(iteration, per_epoch)
        generator = torch.Generator().manual_seed(seed_for(self.settings.seed, stage.name, "order", epoch))
        order = torch.randperm(count, generator=generator)
        if stage.images:
            order = self._subset(stage)[order]
        rows = order[position * stage.batch_size : (position + 1) * stage.batch_size]
        return self.x[rows].to(self.settings.device), self.y[rows].to(self.settings.device)

    def images_of(self, stage: Stage) -> Images:
        """The images that a stage may see.

        Raises:
            UsageError: it takes more than there are.
        """
        self.check_demands([stage])
        return self.x[self._subset(stage)] if stage.images else self.x

    def _subset(self, stage: Stage) -> Tensor:
        key = stage.images, stage.by_class
        if key not in self.subsets:
            self.subsets[key] = self._draw_by_class(stage) if stage.by_class else self._draw_unlabelled(stage)
        return self.subsets[key]

    def _draw_by_class(self, stage: Stage) -> Tensor:
        return draw_stratified(self.y, stage.images, self.settings.seed)

    def _draw_unlabelled(self, stage: Stage) -> Tensor:
        with seeded(self.settings.seed, "unlabelled"):
            return torch.randperm(len(self.x))[: stage.images].sort().values

    def end_stage(self, stage: Stage) -> None:
        """Measures the held-out figures, goes on to the next stage and saves."""
        self.defense.eval()
        with seeded(self.settings.seed, stage.name, "measure", device=self.settings.device):
            self.measured[stage.name] = self.recipe.measure(self.x_held, self.y_held)
        self.state = Position(stage=self.state.stage + 1, step=self.state.step, seconds=self.state.seconds)
        self.good = None
        self.save(None)
