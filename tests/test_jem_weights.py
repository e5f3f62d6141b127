"""The weights that JEM ships: those of their cards, as accurate as these say, and with a density that was learned."""

from __future__ import annotations

import math

import pytest
import torch

from robench import load_data, load_defense
from robench.defense import weights_digest
from robench.defenses.jem import JEM
from robench.rng import seeded
from robench.weights import read_card, shipped_weights, weights_folder

CARD_FIELDS = {"recipe", "train_digest", "seed", "device", "wall_time_s", "test", "known_breakage", "weights_digest"}


LEAST = {"fashion_mnist": 0.85, "mnist": 0.96, "cifar10": 0.4}
"""Accuracy of 500 images below which the weights would be no use."""
NEEDS_FILES = {"mnist", "cifar10"}


def test_weights_are_shipped() -> None:
    assert {"fashion_mnist", "mnist"} <= set(shipped_weights(JEM)) <= set(LEAST)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset",
    [pytest.param(name, marks=[pytest.mark.data] * (name in NEEDS_FILES)) for name in shipped_weights(JEM)],
)
def test_shipped_weights_are_those_of_their_card(dataset: str) -> None:
    """Accuracy of 500 fresh test images within the binomial noise of both samples (3.5 standard errors)."""
    model = load_defense("jem", dataset)
    path = weights_folder(JEM) / f"{dataset}.safetensors"
    card = read_card(path)
    assert set(card) >= CARD_FIELDS
    assert card["weights_digest"] == weights_digest(model)
    assert (card["defense"], card["dataset"]) == ("jem", dataset)
    assert path.stat().st_size < 4_000_000
    x, y = load_data(dataset, n=500, seed=1)
    with torch.no_grad():
        accuracy = torch.cat([model(rows).argmax(1) for rows in x.split(250)]).eq(y).double().mean().item()
    claimed, images = card["test"]["clean_accuracy"], card["test"]["images"]
    error = math.sqrt(claimed * (1 - claimed) * (1 / len(x) + 1 / images))
    assert abs(accuracy - claimed) < 3.5 * error
    assert accuracy > LEAST[dataset]


@pytest.mark.slow
def test_shipped_density_knows_images_from_noise() -> None:
    """Images are far likelier than noise of the same mean and deviation: not only the labels were learned."""
    model = JEM.load("fashion_mnist").freeze()
    x, _ = load_data("fashion_mnist", n=200)
    with torch.no_grad(), seeded("noise images"):
        noise = (x.mean() + x.std() * torch.randn_like(x)).clamp(0, 1)
        gap = model.log_density(2 * x - 1).mean() - model.log_density(2 * noise - 1).mean()
    assert gap.item() > 1
