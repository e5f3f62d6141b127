"""The training loop of all defenses: stages, progress, checks with roll-back, checkpoint and resume, a card at the end.

Every iteration is seeded by itself, so a run that was cut off and resumed ends in the same weights, bit for bit on the
same kind of device, as one that was not.
"""

from __future__ import annotations

import logging
import math
import platform
from pathlib import Path
from typing import Any, Final

import torch

import robench
from robench.data import Dataset
from robench.defense import Defense
from robench.errors import DataError, UsageError
from robench.files import locked
from robench.precision import training_precision
from robench.progress import Progress
from robench.rng import reseed, seeded
from robench.store import LOCK_FILE
from robench.train.log import Log, open_log
from robench.train.recipe import Recipe, Stage
from robench.train.run import SLOW_DOWN, Run, TrainSettings
from robench.types import Images, Labels
from robench.weights import load_weights, read_card

HISTORY: Final = (
    "weights_digest",
    "init",
    "dataset",
    "recipe",
    "stages",
    "train_digest",
    "seed",
    "split_seed",
    "scale",
    "lr_scale",
    "precision",
    "device",
    "wall_time_s",
    "held_out",
)
"""What a card says of the weights that training started from."""
PARTS: Final = 5
"""How many parts a stage without checks has at most; held-out images are looked at between them."""
LOG = logging.getLogger("robench")


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
        UsageError: a checkpoint of another run, none to resume, too few images, no weights or stage to start from, or
            a folder that cannot be made, or that another process trains into.
        DataError: the loss is no longer finite, too many checks failed, or the weights to start from do not fit.
    """
    run = Run(defense, recipe, data, folder, settings, variant)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}. Choose another --out") from None
    defense.to(settings.device)
    first = _first_stage(recipe, settings.first_stage)
    recipe.prepare(run.images_of(recipe.stages()[first]))
    if settings.init is not None:  # after `prepare`: constants fitted to the images are part of the weights
        load_weights(defense, settings.init)
    recipe.begin()
    if run.split.seen_before:
        LOG.warning(
            f"{settings.init} may have been trained on what is held out now: its card does not tell what was, or that "
            "is too little"
        )
    with (
        locked(folder / LOCK_FILE),
        training_precision(settings.precision),
        seeded(settings.seed, "init", device=settings.device),
        open_log(folder, settings.tensorboard) as log,
    ):
        optimizer_state = run.load() if resume else None
        stages = recipe.stages()[first:]
        run.check_demands(stages)
        for index in range(run.state.stage, len(stages)):
            _train_stage(run, stages[index], optimizer_state, log)
            run.end_stage(stages[index])
            log.figures(run.state.step, stages[index].name, run.measured[stages[index].name])
            optimizer_state = None
    defense.freeze()
    return _card(run, stages, data)


def _first_stage(recipe: Recipe, name: str) -> int:
    names = [stage.name for stage in recipe.stages()]
    if name and name not in names:
        raise UsageError(f'recipe "{recipe.name}" has no stage "{name}"; its stages are: {", ".join(names)}')
    return names.index(name) if name else 0


def _train_stage(run: Run, stage: Stage, optimizer_state: dict[str, Any] | None, log: Log) -> None:
    defense, settings = run.defense, run.settings
    defense.train()
    for parameter in defense.parameters():
        parameter.requires_grad_(False)
    for parameter in stage.parameters:
        parameter.requires_grad_(True)
    iterations = _iterations(stage, settings)
    optimizer = stage.optimizer(stage.parameters, stage.learning_rate)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    elif stage.check_every:
        run.keep(optimizer)
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
            rate = settings.lr_scale * run.recipe.rate_share * stage.rate(int(iteration / settings.scale))
            loss = _update(stage, optimizer, x, y, rate)
            if _is_sane(loss):
                average += (loss - average) * max(0.02, 1 / (iteration - first + 1))
            run.state.iteration, run.state.step = iteration + 1, run.state.step + 1
            checks = len(run.checks)
            _look(run, stage, optimizer, loss)
            log.loss(run.state.step, stage.name, loss)
            for figures in run.checks[checks:]:
                log.figures(run.state.step, stage.name, figures)
            progress.advance(note=f"iteration {iteration + 1}/{iterations}, loss {average:.4g}{run.note}")
            checkpoint()


def _iterations(stage: Stage, settings: TrainSettings) -> int:
    return max(int(stage.iterations * settings.scale), 1)


def _is_due(stage: Stage, iteration: int, settings: TrainSettings) -> bool:
    """Whether a check follows an iteration: as often as in a training of scale 1, and at the end of the stage."""
    if not stage.check_every:
        return False
    every = max(round(stage.check_every * settings.scale), 1)
    return iteration % every == 0 or iteration == _iterations(stage, settings)


def _is_a_part_done(iteration: int, iterations: int) -> bool:
    """Whether an iteration ends one of `PARTS` parts of a stage; the end itself is measured anyway."""
    return iteration < iterations and iteration % math.ceil(iterations / PARTS) == 0


def _update(stage: Stage, optimizer: torch.optim.Optimizer, x: Images, y: Labels, rate: float) -> float:
    """One step; a loss that is not finite is returned without a step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = stage.loss(x, y)
    value = loss.item()
    if _is_sane(value):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters, stage.clip)
        optimizer.step()
    return value


def _is_sane(loss: float) -> bool:
    return abs(loss) < 1e30  # False for NaN


def _look(run: Run, stage: Stage, optimizer: torch.optim.Optimizer, loss: float) -> None:
    """Rolls back where the loss or a check that is due says so; a stage without checks is only looked at.

    Raises:
        DataError: the loss is not finite in a stage without checks, or there were too many roll-backs.
    """
    if not _is_sane(loss):
        if not stage.check_every:
            raise DataError(f'training diverged in stage "{stage.name}": the loss is {loss}. {SLOW_DOWN}')
        run.roll_back(stage, optimizer, f"the loss is {loss}")
    elif _is_due(stage, run.state.iteration, run.settings):
        if run.check(stage):
            run.keep(optimizer)
        else:
            run.roll_back(stage, optimizer, f"checked: {run.checks[-1]}")
    elif not stage.check_every and _is_a_part_done(run.state.iteration, _iterations(stage, run.settings)):
        run.look(stage)


def _card(run: Run, stages: list[Stage], data: Dataset) -> dict[str, Any]:
    settings = run.settings
    listed = [
        {
            "name": stage.name,
            "iterations": _iterations(stage, settings),
            "batch_size": stage.batch_size,
            "learning_rate": settings.lr_scale * stage.learning_rate,
            "flat": stage.flat,
            "optimizer": stage.optimizer.__name__,
        }
        for stage in stages
    ]
    device = settings.device if settings.device == "cpu" else torch.cuda.get_device_name()
    return {
        "defense": run.defense.name,
        "dataset": data.name,
        **({"split": data.split} if data.split != "train" else {}),
        "recipe": run.recipe.name,
        **({"init": _origin(settings.init)} if settings.init is not None else {}),
        "stages": listed,
        "train_images": len(run.x),
        "train_digest": data.digest,
        "seed": settings.seed,
        "split_seed": run.split.seed,
        "scale": settings.scale,
        **({"lr_scale": settings.lr_scale} if settings.lr_scale != 1 else {}),
        "precision": run.precision,
        "device": f"{device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "robench": robench.__version__,
        "torch": torch.__version__.split("+")[0],
        "wall_time_s": round(run.state.seconds),
        "held_out": {
            "images": len(run.x_held),
            **({"seen_before": True} if run.split.seen_before else {}),
            **run.measured,
        },
        **({"checks": run.checks} if run.checks else {}),
        **run.recipe.facts(),
    }


def _origin(weights: Path) -> dict[str, Any]:
    """What the card of the weights that training started from says of their own training."""
    card = read_card(weights)
    return {name: card[name] for name in HISTORY if name in card}
