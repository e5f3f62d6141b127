"""What is held out where training goes on from weights, and the precision that training runs in."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_toys import Trainable, TrainableRecipe
from torch import Tensor

from robench import UsageError, precision
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.defenses.convnet.model import ConvNet
from robench.rng import seeded
from robench.train import Recipe, Stage, TrainSettings, train
from robench.train.split import split_images
from robench.weights import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = 100


@pytest.fixture(scope="module")
def images() -> Dataset:
    """256 images of the embedded split, standing in for a training split."""
    return load_dataset("fashion_mnist", n=256, seed=5)


class Noting(TrainableRecipe):
    """One iteration a stage; notes which images it is given."""

    def prepare(self, x: Tensor) -> None:
        self.trained_on = rows_of(x)

    def stages(self) -> list[Stage]:
        return [dataclasses.replace(stage, iterations=1) for stage in super().stages()]

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        self.held_out = rows_of(x)
        return super().measure(x, y)


def rows_of(x: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def fit(images: Dataset, folder: Path, **settings: Any) -> tuple[Noting, dict[str, Any], Path]:
    """Trains the toy and writes its weights; returns the recipe, the card and the weights file."""
    with seeded("toy"):
        defense = Trainable()
    recipe = Noting(defense)
    card = train(defense, recipe, images, folder, TrainSettings(**settings))
    path = folder / "weights.safetensors"
    save_weights(defense, path, card)
    return recipe, card, path


def held_by(seed: int, count: int, of: int = 256) -> list[int]:
    """As trainings without weights to start from have always held out their images."""
    with seeded("split", seed):
        return torch.randperm(of)[:count].tolist()


def write_card(folder: Path, card: dict[str, Any]) -> Path:
    (folder / "weights.json").write_text(json.dumps(card))
    return folder / "weights.safetensors"


@pytest.mark.parametrize(("seed", "holdout", "count"), [(0, HELD, HELD), (1, HELD, HELD), (1, 150, HELD), (0, 60, 60)])
def test_what_is_held_out_was_not_trained_on_before(
    seed: int, holdout: int, count: int, images: Dataset, tmp_path: Path
) -> None:
    """Over three trainings, each from the weights of the one before, whatever the seed and the images asked for."""
    first, card, path = fit(images, tmp_path / "first", holdout=HELD)
    second, further, path = fit(images, tmp_path / "second", seed=seed, holdout=holdout, init=path)
    third, last, _ = fit(images, tmp_path / "third", seed=2, holdout=HELD, init=path)
    assert len(second.held_out) == count
    assert not second.held_out & (first.trained_on | second.trained_on)
    assert not third.held_out & (first.trained_on | second.trained_on | third.trained_on)
    assert third.held_out == second.held_out
    assert [one["split_seed"] for one in (card, further, last)] == [0, 0, 0]
    assert [one["seed"] for one in (card, further, last)] == [0, seed, 2]
    assert further["held_out"]["images"] == last["held_out"]["images"] == count
    assert not any("seen_before" in one["held_out"] for one in (card, further, last))


def test_cards_without_a_split_tell_it_by_their_seeds(images: Dataset, tmp_path: Path) -> None:
    """They held out the first images in the order of their own seed, whatever the weights had seen before."""
    inner = {"seed": 3, "held_out": {"images": 200}}
    card = {"dataset": images.name, "train_digest": images.digest, "seed": 4, "held_out": {"images": 180}}
    alone = split_images(images, 9, 500, write_card(tmp_path, card))
    assert alone.held.tolist() == held_by(4, 180)
    chained = split_images(images, 9, 70, write_card(tmp_path, card | {"init": inner}))
    unseen = [row for row in held_by(3, 200) if row in held_by(4, 180)]
    assert len(unseen) > 70
    assert (chained.held.tolist(), chained.seed, chained.seen_before) == (unseen[:70], 3, False)
    assert sorted([*chained.held.tolist(), *chained.kept.tolist()]) == list(range(256))


def test_training_of_another_dataset_saw_nothing_of_this_one(images: Dataset, tmp_path: Path) -> None:
    card = {"dataset": "mnist", "train_digest": "other", "seed": 4, "held_out": {"images": 180}}
    found = split_images(images, 9, HELD, write_card(tmp_path, card))
    assert (found.held.tolist(), found.seed, found.seen_before) == (held_by(9, HELD), 9, False)
    inner = {"dataset": images.name, "train_digest": images.digest, "seed": 3, "held_out": {"images": 200}}
    found = split_images(images, 9, HELD, write_card(tmp_path, card | {"init": inner}))
    assert (found.held.tolist(), found.seed) == (held_by(3, HELD), 3)


@pytest.mark.parametrize(
    "change",
    [
        {"held_out": {}},
        {"held_out": [64]},
        {"held_out": {"images": HELD, "seen_before": True}},
        {"split_seed": "zero"},
        {"train_digest": "of fewer images"},
        {"init": {"seed": 0}},
        {"init": {"seed": 5, "held_out": {"images": 30}}},
        None,
    ],
    ids=str,
)
def test_a_card_that_does_not_tell_what_was_held_out(
    change: dict[str, Any] | None, images: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next card says so, one line is printed, and what that card's weights saw stays unknown."""
    _, card, path = fit(images, tmp_path, holdout=HELD)
    path.with_suffix(".json").write_text(json.dumps({} if change is None else card | change))
    with caplog.at_level(logging.WARNING, "robench"):
        recipe, further, onward = fit(images, tmp_path / "on", seed=1, holdout=HELD, init=path)
        (line,) = caplog.messages
        _, last, _ = fit(images, tmp_path / "further", seed=1, holdout=HELD, init=onward)
    assert line.startswith(f"{path} may have been trained on what is held out now")
    assert further["held_out"]["seen_before"] is last["held_out"]["seen_before"] is True
    assert (further["split_seed"], len(recipe.held_out)) == (1, HELD)


# precision


class Once(Recipe):
    """Four batches through a ConvNet."""

    def __init__(self, inner: Recipe) -> None:
        self.inner, self.name = inner, inner.name

    def stages(self) -> list[Stage]:
        return [dataclasses.replace(stage, iterations=4, batch_size=8) for stage in self.inner.stages()]

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        del x, y
        return {}


@pytest.mark.parametrize("has", [True, False], ids=["has_bfloat16", "emulates_it"])
def test_float32_switches_mixed_precision_off(
    has: bool, images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _device: has)
    found = {}
    for asked in ("auto", "float32"):
        with seeded("precision"):
            defense = ConvNet(width=8)
        settings = TrainSettings(holdout=8, precision=asked)
        card = train(defense, Once(defense.recipe()), images, tmp_path / asked, settings)
        found[asked] = (card["precision"], weights_digest(defense))
    assert found["float32"][0] == "float32"
    assert found["auto"][0] == ("bfloat16" if has else "float32")
    assert (found["auto"] == found["float32"]) == (not has)
    assert precision.mixes_precision("cpu") == has  # as before, outside training


def test_a_run_is_not_resumed_in_another_precision(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _device: True)
    defense = Trainable()
    train(defense, Noting(defense), images, tmp_path, TrainSettings(holdout=8))
    with pytest.raises(UsageError, match=r"is of another run: .*float32.*bfloat16"):
        train(defense, Noting(defense), images, tmp_path, TrainSettings(holdout=8, precision="float32"), resume=True)
