"""The training loop of all defenses: stages, progress, checkpoint and resume, a card at the end.

Every iteration is seeded by itself, so a run that was cut off and resumed ends in the same weights, bit for bit on the
same kind of device, as one that was not.
"""

from __future__ import annotations

import io
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from robench.data import Dataset
from robench.defense import Defense
from robench.errors import DataError, UsageError
from robench.progress import Progress
from robench.rng import reseed, seed_for, seeded
from robench.store import write_atomic
from robench.train.recipe import Recipe, Stage
from robench.types import Images, Labels

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        seed: seeds the order of the images and all that the defense draws.
        holdout: training images kept aside for the figures of the card.
        scale: multiplies the iterations of every stage; 0.01 is a smoke test.
        device: `cpu` or `cuda`.
    """

    seed: int = 0
    holdout: int = 500
    scale: float = 1.0
    device: str = "cpu"


@dataclass
class _State:
    """Where training stands; what a checkpoint holds besides weights and optimizer."""

    stage: int = 0
    iteration: int = 0
    seconds: float = 0.0


class _Run:
    """One training run: the position, its checkpoint file and what has been measured so far."""

    def __init__(
        self, defense: Defense, recipe: Recipe, data: Dataset, folder: Path, settings: TrainSettings, variant: str
    ) -> None:
        if len(data.x) <= settings.holdout:
            raise UsageError(
                f"training keeps {settings.holdout} images aside; the split has {len(data.x)}. Train on a larger one"
            )
        self.defense, self.recipe, self.settings = defense, recipe, settings
        self.path = folder / "checkpoint.pt"
        self.state = _State()
        self.measured: dict[str, dict[str, float]] = {}
        self.identity = f"{defense.name} {recipe.name} {data.name} {data.digest[:16]} {asdict(settings)}{variant}"
        with seeded("split", settings.seed):
            order = torch.randperm(len(data.x))
        held, kept = order[: settings.holdout], order[settings.holdout :]
        self.x, self.y = data.x[kept], data.y[kept]
        self.x_held, self.y_held = data.x[held].to(settings.device), data.y[held].to(settings.device)
        self.started = time.monotonic()

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Writes the checkpoint in one atomic step."""
        now = time.monotonic()
        self.state.seconds, self.started = self.state.seconds + now - self.started, now

        buffer = io.BytesIO()
        torch.save(
            {
                "identity": self.identity,
                "state": asdict(self.state),
                "measured": self.measured,
                "weights": self.defense.state_dict(),
                "optimizer": optimizer.state_dict() if optimizer else None,
            },
            buffer,
        )
        write_atomic(self.path, buffer.getvalue())

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
        if not (
            isinstance(content, dict) and content.keys() >= {"identity", "state", "measured", "weights", "optimizer"}
        ):
            raise DataError(f"checkpoint {self.path} is damaged: it is no checkpoint. Delete it to start over")
        if content["identity"] != self.identity:
            raise UsageError(
                f'checkpoint {self.path} is of another run: expected "{self.identity}", got "{content["identity"]}". '
                "Choose another --out, or train without --resume"
            )
        self.state = _State(**content["state"])
        self.measured = content["measured"]
        self.defense.load_state_dict(content["weights"])
        return content["optimizer"]

    def batch(self, stage: Stage, iteration: int) -> tuple[Images, Labels]:
        """The batch of an iteration: an order of all images drawn for each epoch from the seed alone."""
        per_epoch = max(len(self.x) // stage.batch_size, 1)
        epoch, position = divmod(iteration, per_epoch)
        generator = torch.Generator().manual_seed(seed_for(self.settings.seed, stage.name, "order", epoch))
        order = torch.randperm(len(self.x), generator=generator)
        rows = order[position * stage.batch_size : (position + 1) * stage.batch_size]
        return self.x[rows].to(self.settings.device), self.y[rows].to(self.settings.device)

    def measure(self, name: str) -> None:
        """Measures the held-out figures after a stage."""
        self.defense.eval()
        with seeded(self.settings.seed, name, "measure", device=self.settings.device):
            self.measured[name] = self.recipe.measure(self.x_held, self.y_held)


def train(
    defense: Defense,
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    settings: TrainSettings,
    *,
    resume: bool = False,
    variant: str = "",
) -> dict[str, Any]:
    """Trains a defense in place and returns its card (without test accuracy, which the caller measures).

    Args:
        defense: untrained; its weights change.
        recipe: the stages.
        data: the training split.
        folder: where the checkpoint goes; made if missing.
        settings: seed, device and so on.
        resume: continue from the checkpoint in `folder`.
        variant: the defense's options as text; a checkpoint of another variant is refused.

    Raises:
        UsageError: a checkpoint of another run, none to resume, too few images, or a folder that cannot be made.
        RobenchError: the loss is no longer finite.
    """
    run = _Run(defense, recipe, data, folder, settings, variant)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}. Choose another --out") from None
    defense.to(settings.device)
    recipe.prepare(run.x)
    with seeded(settings.seed, "init", device=settings.device):
        optimizer_state = run.load() if resume else None
        stages = recipe.stages()
        for index in range(run.state.stage, len(stages)):
            _train_stage(run, stages[index], optimizer_state)
            run.measure(stages[index].name)
            run.state.stage, run.state.iteration, optimizer_state = index + 1, 0, None
            run.save(None)
    defense.freeze()
    return _card(run, data)


def _train_stage(run: _Run, stage: Stage, optimizer_state: dict[str, Any] | None) -> None:
    defense, settings = run.defense, run.settings
    defense.train()
    for parameter in defense.parameters():
        parameter.requires_grad_(False)
    for parameter in stage.parameters:
        parameter.requires_grad_(True)
    iterations = max(int(stage.iterations * settings.scale), 1)
    optimizer = stage.optimizer(stage.parameters, stage.learning_rate)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    average = 0.0
    label = f"{defense.name}: {stage.name}"
    with (
        Progress(label, {"iterations": iterations}, done=run.state.iteration) as progress,
        run.checkpoints(optimizer) as checkpoint,
    ):
        first = run.state.iteration
        for iteration in range(first, iterations):
            x, y = run.batch(stage, iteration)
            reseed(settings.seed, stage.name, iteration)
            loss = _update(stage, optimizer, x, y, stage.rate(int(iteration / settings.scale)))
            average += (loss - average) * max(0.02, 1 / (iteration - first + 1))
            run.state.iteration = iteration + 1
            progress.advance(note=f"iteration {iteration + 1}/{iterations}, loss {average:.4g}")
            checkpoint()


def _update(stage: Stage, optimizer: torch.optim.Optimizer, x: Images, y: Labels, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = stage.loss(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(stage.parameters, stage.clip)
    optimizer.step()
    value = loss.item()
    if not abs(value) < 1e30:
        raise DataError(f'training diverged in stage "{stage.name}": the loss is {value}. Lower the learning rate')
    return value


def _card(run: _Run, data: Dataset) -> dict[str, Any]:
    settings = run.settings
    stages = [
        {
            "name": stage.name,
            "iterations": max(int(stage.iterations * settings.scale), 1),
            "batch_size": stage.batch_size,
            "learning_rate": stage.learning_rate,
            "flat": stage.flat,
            "optimizer": stage.optimizer.__name__,
        }
        for stage in run.recipe.stages()
    ]
    device = settings.device if settings.device == "cpu" else torch.cuda.get_device_name()
    return {
        "defense": run.defense.name,
        "dataset": data.name,
        "recipe": run.recipe.name,
        "stages": stages,
        "train_images": len(run.x),
        "train_digest": data.digest,
        "seed": settings.seed,
        "device": f"{device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__.split("+")[0],
        "wall_time_s": round(run.state.seconds),
        "held_out": {"images": len(run.x_held), **run.measured},
        **run.recipe.facts(),
    }
