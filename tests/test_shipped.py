"""Every weights file that is shipped: it is the one of its card, small enough, and as accurate as the card says."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

import pytest
import torch

from robench import Defense
from robench.data import load_dataset
from robench.defense import weights_digest
from robench.registry import names, resolve
from robench.rng import seeded
from robench.testing.decoy_training import Distilled, OneStep, Trades, Winners
from robench.train.split import FEWEST
from robench.weights import build, build_and_load, read_card, shipped_weights, weights_folder, weights_stem

LARGEST, LARGEST_TOTAL = 4_000_000, 40_000_000
IMAGES = 500
SLOW = {"shortrun"}
CONTROLS: tuple[type[Defense], ...] = (Distilled, OneStep, Winners, Trades)


def shipped() -> list[tuple[type[Defense], Path]]:
    classes = [cls for name in names("defense") if isinstance(cls := resolve("defense", name), type)]
    built_in = [(cls, weights_folder(cls) / f"{stem}.safetensors") for cls in classes for stem in shipped_weights(cls)]
    stems = [weights_stem(cls, "fashion_mnist", {}) for cls in CONTROLS]
    return built_in + [
        (cls, weights_folder(cls) / f"{stem}.safetensors") for cls, stem in zip(CONTROLS, stems, strict=True)
    ]


SHIPPED = shipped()


def marks(cls: type[Defense], path: Path) -> list[pytest.MarkDecorator]:
    """Slow where a pass is, and with data that may not be at hand."""
    slow = [pytest.mark.slow] if cls.name in SLOW else []
    return slow if path.stem.startswith("fashion_mnist") else [*slow, pytest.mark.data]


def test_sizes() -> None:
    sizes = {str(path): path.stat().st_size for _, path in SHIPPED}
    assert len(sizes) >= 5
    assert all(size <= LARGEST for size in sizes.values()), sizes
    assert sum(sizes.values()) <= LARGEST_TOTAL


@pytest.mark.parametrize(("cls", "path"), SHIPPED, ids=[f"{cls.name}-{path.stem}" for cls, path in SHIPPED])
def test_card_tells_what_the_file_is(cls: type[Defense], path: Path) -> None:
    card = read_card(path)
    missing = {"recipe", "train_digest", "seed", "device", "wall_time_s", "test", "known_breakage"} - card.keys()
    assert not missing, f"the card lacks {missing}"
    assert card["defense"] == cls.name
    assert path.stem.partition("-")[0] == card["dataset"]
    defense = build_and_load(cls, None, path, {})
    assert weights_digest(defense) == card["weights_digest"]


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("name", ["convnet", "convnet_at", "fortified", "jem", "shortrun"])
def test_card_compares_what_was_reached_with_what_was_aimed_at(name: str, dataset: str) -> None:
    path = weights_folder(resolve("defense", name)) / f"{dataset}.safetensors"
    told = read_card(path)["against_target"]
    assert "aimed at" in told
    assert "reached" in told


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{cls.name}-{path.stem}") for cls, path in SHIPPED])
def test_card_tells_what_was_held_out_all_the_way_back(path: Path) -> None:
    """So that training may go on from the weights without images that it is measured on."""
    card = read_card(path)
    while card:
        assert isinstance(card["seed"], int)
        assert card["held_out"]["images"] >= FEWEST
        card = card.get("init", {})


OWN: Final = [(cls, path) for cls, path in SHIPPED if cls not in CONTROLS]


@pytest.mark.parametrize(("cls", "path"), OWN, ids=[f"{cls.name}-{path.stem}" for cls, path in OWN])
def test_recipe_of_the_card_is_of_the_stages_that_it_tells(cls: type[Defense], path: Path) -> None:
    """Of all of them, or of the last ones where training went on; else the card says what has changed since."""
    card = read_card(path)
    attack = {"train_attack": card["recipe"]} if cls.name == "fortified" else {}
    recipe = build(cls, {**card["options"], **attack}).recipe(card["recipe"])
    now = [(stage.name, stage.batch_size, stage.learning_rate, stage.flat) for stage in recipe.stages()]
    then = [tuple(stage[key] for key in ("name", "batch_size", "learning_rate", "flat")) for stage in card["stages"]]
    is_same = then == (now[-len(then) :] if "init" in card else now)
    assert is_same == ("recipe_since" not in card), f"{then}, now {now}"


@pytest.mark.parametrize(
    ("cls", "path"),
    [pytest.param(cls, path, id=f"{cls.name}-{path.stem}", marks=marks(cls, path)) for cls, path in SHIPPED],
)
def test_clean_accuracy_is_that_of_the_card(cls: type[Defense], path: Path) -> None:
    """On the card's own images, but for two of 2,000: another processor rounds otherwise.

    A randomized defense to a point, which is three times its noise. A slow one on the first 500, to two points: its
    card tells what it answered there three times, with a standard deviation of half a point.
    """
    card = read_card(path)
    told, count = card["test"]["clean_accuracy"], card["test"]["images"]
    defense = build_and_load(cls, None, path, {}).freeze()
    data = load_dataset(card["dataset"], n=count, seed=0)
    assert data.digest == card["test"]["digest"]
    allowed = 0.01 if defense.randomized else 0.00101
    if cls.name in SLOW:
        told, count, allowed = statistics.mean(card["test"]["first_500_thrice"]), IMAGES, 0.02
    with torch.no_grad(), seeded("shipped"):
        logits = torch.cat([defense(rows) for rows in data.x[:count].split(defense.batch_rows or 250)])
    accuracy = (logits.argmax(1) == data.y[:count]).double().mean().item()
    assert abs(accuracy - told) <= allowed, f"{accuracy:.4f} here, {told} in the card"
