"""`robench train` as a function: from names to a weights file with its card."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from robench.data import Dataset, load_dataset
from robench.data_names import KNOWN, list_plugins
from robench.defense import Defense, state_digest
from robench.errors import UsageError
from robench.protocol import default_eps
from robench.registry import parse_spec, resolve
from robench.rng import seeded
from robench.stats import wilson
from robench.threat import parse_eps
from robench.train.loop import train
from robench.train.run import TrainSettings
from robench.weights import build, round_to_half, save_weights, weights_stem

TEST_IMAGES = 2000
HARMLESS = 0.001
"""The change of clean accuracy up to which weights are stored in half precision."""


@dataclass(frozen=True)
class TrainJob:
    """What to train and where to put it.

    Attributes:
        defense: a registry name, with options if need be: `shortrun(preset="paper_literal")`.
        dataset: a dataset's name.
        folder: checkpoint and weights go there.
        recipe: the recipe's name; None takes the defense's default.
        data_dir: see `load_dataset`.
        split: what to train on: `train`, or `train+extra` of SVHN.
        test_images: test images behind the card's clean accuracy, or all where there are fewer.
        settings: seed, device and so on.
    """

    defense: str
    dataset: str
    folder: Path
    recipe: str | None = None
    data_dir: Path | None = None
    split: str = "train"
    test_images: int = TEST_IMAGES
    settings: TrainSettings = field(default_factory=TrainSettings)


def train_named(job: TrainJob, *, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Trains a defense and writes `<folder>/<dataset>[-<variant>].safetensors` and its card; returns both.

    Raises:
        UsageError: unknown names, no recipe, data not at hand, a checkpoint of another run.
        DataError: the training diverged, or a file is damaged.
    """
    if job.dataset not in (known := [*KNOWN, *list_plugins()]):
        raise UsageError(
            f"training takes a named dataset ({', '.join(known)}), which has a training and a test split; "
            f'got "{job.dataset}". Name Parquet files <name>/{{train,test}}-*.parquet and their folder with --data-dir'
        )
    if "test" in job.split.split("+"):
        raise UsageError(
            "training does not take the test split, which measures what was learnt. Choose another --split"
        )
    name, written = parse_spec(job.defense)
    cls = cast("type[Defense]", resolve("defense", name))
    test = load_dataset(job.dataset, "test", n=job.test_images, data_dir=job.data_dir, at_most=True)
    shape = cast("tuple[int, int, int]", tuple(test.x.shape[1:]))
    written |= customary_bound(cls, job.dataset, written)
    options = {**cls.options_for(shape, len(test.class_names)), **written}
    with seeded(job.settings.seed, "weights"):
        defense = build(cls, options)
    recipe = defense.recipe(job.recipe)
    data = load_dataset(job.dataset, job.split, data_dir=job.data_dir)  # takes seconds, after all that may be misspelt
    variant = f" {written}" if written else ""
    card = train(defense, recipe, data, job.folder, job.settings, resume=resume, variant=variant)
    card["options"] = options
    card["test"], half = round_if_harmless(defense, test, job.settings)
    card["stored_as"] = "float16" if half else "float32"
    card["weights_digest"] = state_digest(defense)
    path = job.folder / f"{weights_stem(cls, job.dataset, options)}.safetensors"
    save_weights(defense, path, card, half=half)
    return path, card


def customary_bound(cls: type[Defense], dataset: str, written: dict[str, Any]) -> dict[str, Any]:
    """The option `train_eps` of a defense that leaves it to the dataset (its default is None) where none is written.

    Raises:
        UsageError: the dataset has no customary bound.
    """
    parameters = inspect.signature(cls).parameters
    if "train_eps" not in parameters or parameters["train_eps"].default is not None:
        return {}
    if written.get("train_eps") is not None:
        return {}
    norm = str(written.get("train_norm", "linf"))
    build(cls, {"train_norm": norm} if "train_norm" in written else {})  # a norm that it does not train in is refused
    try:
        return {"train_eps": parse_eps(default_eps(dataset, norm))}
    except UsageError:
        raise UsageError(
            f'no customary bound to train {cls.name} with on dataset "{dataset}" in {norm}; '
            f"give one: --defense '{cls.name}(train_eps=...)'"
        ) from None


def find_trained(folder: Path, dataset: str) -> Path | None:
    """The weights that a training for a dataset left in a folder; None where it is not at its end."""
    done = (path for path in sorted(folder.glob(f"{dataset}*.safetensors")) if path.with_suffix(".json").exists())
    return next(done, None)


def round_if_harmless(defense: Defense, test: Dataset, settings: TrainSettings) -> tuple[dict[str, Any], bool]:
    """Rounds the weights to half precision unless that changes the test accuracy by more than `HARMLESS`.

    Returns:
        The clean accuracy of the weights as they are then, and whether they were rounded.
    """
    found = test_accuracy(defense, test, settings)
    before = {name: value.clone() for name, value in defense.state_dict().items()}
    if not round_to_half(defense):
        return found, False
    rounded = test_accuracy(defense, test, settings)
    if abs(rounded["clean_accuracy"] - found["clean_accuracy"]) <= HARMLESS:
        return rounded, True
    defense.load_state_dict(before)
    return found, False


def test_accuracy(defense: Defense, test: Dataset, settings: TrainSettings) -> dict[str, Any]:
    """Clean accuracy of one answer per test image, with its 95 % interval (Wilson)."""
    right = 0
    rows = defense.batch_rows or 256
    with torch.no_grad(), seeded(settings.seed, "test", device=settings.device):
        for x, y in zip(test.x.split(rows), test.y.split(rows), strict=True):
            right += int((defense(x.to(settings.device)).argmax(1).cpu() == y).sum())
    low, high = wilson(right, len(test.y))
    return {
        "images": len(test.y),
        "digest": test.digest,
        "clean_accuracy": round(right / len(test.y), 4),
        "clean_low": round(low, 4),
        "clean_high": round(high, 4),
    }
