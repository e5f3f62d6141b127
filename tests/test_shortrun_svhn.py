"""Short Run on larger images, as the thesis's SVHN: shrunk inside, differentiable, trained from the hub's layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hub_toys import write_svhn

from robench import UsageError
from robench.data import load_dataset
from robench.defenses.shortrun import ShortRun
from robench.rng import seeded
from robench.train import TrainSettings, train
from robench.train.named import TrainJob, train_named


@pytest.fixture(scope="module")
def svhn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits of 48 (train) and 20 images (extra) in SVHN's layout on the hub."""
    return write_svhn(tmp_path_factory.mktemp("hub"), train=48, extra=20)


def test_images_are_shrunk_and_pictures_are_not() -> None:
    model = ShortRun(channels=3, side=32, steps=2, n_chains=1).freeze()
    x = torch.rand(2, 3, 32, 32)
    assert model.target(x).shape == (2, 3, 28, 28)
    grey = torch.full((1, 3, 32, 32), 0.25)
    assert torch.allclose(model.target(grey), torch.full((1, 3, 28, 28), -0.5), atol=1e-6)
    assert {row.shape for row in model.pictures(x).values()} == {x.shape}
    same = ShortRun(channels=3).target(x[:, :, :28, :28])
    assert torch.equal(same, 2 * x[:, :, :28, :28] - 1)


def test_gradient_reaches_the_large_image() -> None:
    """Against finite differences along a random direction, in float64 with frozen noise."""
    with seeded("svhn"):
        model = ShortRun(channels=3, side=32, steps=3).double().freeze()
        x, direction = torch.rand(1, 3, 32, 32).double(), torch.randn(1, 3, 32, 32).double()

    def value(images: torch.Tensor) -> torch.Tensor:
        with seeded("svhn", "noise"):
            return model.adaptive_forward(images)[0, 0]

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    expected = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert (grad * direction).sum().item() == pytest.approx(expected.item(), rel=1e-4)


def test_recipe_runs_from_the_hubs_layout(svhn: Path, tmp_path: Path) -> None:
    data = load_dataset("svhn", "train", data_dir=svhn)
    model = ShortRun(**ShortRun.options_for((3, 32, 32), 10))
    recipe = model.recipe()
    inner = recipe.stages
    recipe.stages = lambda: [  # type: ignore[method-assign]
        dataclasses.replace(stage, iterations=1, batch_size=4, check_every=0) for stage in inner()
    ]
    card = train(model, recipe, data, tmp_path, TrainSettings(holdout=8))
    assert card["dataset"] == "svhn"
    assert {"generative", "discriminative", "bptt"} <= card["held_out"].keys()


def test_extra_images_are_joined_to_the_training_split(svhn: Path) -> None:
    """The thesis's 80,000 and 120,000 unlabelled images are more than the training split has."""
    train_split, extra, both = (load_dataset("svhn", name, data_dir=svhn) for name in ("train", "extra", "train+extra"))
    assert torch.equal(both.x, torch.cat([train_split.x, extra.x]))
    assert torch.equal(both.y, torch.cat([train_split.y, extra.y]))
    drawn = load_dataset("svhn", "train+extra", n=30, seed=1, data_dir=svhn)
    assert torch.equal(drawn.x, both.x[drawn.index])
    assert int((drawn.index >= 48).sum()) not in (0, 30)
    fewer, more = (load_dataset("svhn", "extra", n=n, seed=1, data_dir=svhn, at_most=True) for n in (12, 30))
    assert torch.equal(fewer.index, load_dataset("svhn", "extra", n=12, seed=1, data_dir=svhn).index)
    assert torch.equal(more.x, extra.x)
    with pytest.raises(UsageError, match="n takes 1 to 20"):
        load_dataset("svhn", "extra", n=30, seed=1, data_dir=svhn)
    with pytest.raises(UsageError, match="has the splits train and test"):
        load_dataset("mnist", "extra", data_dir=svhn)
    with pytest.raises(UsageError, match="split takes a name"):
        load_dataset("svhn", "train+train", data_dir=svhn)
    with pytest.raises(UsageError, match="training does not take the test split"):
        train_named(TrainJob("convnet", "svhn", svhn / "out", data_dir=svhn, split="train+test"))


def test_small_images_are_refused() -> None:
    with pytest.raises(UsageError, match="side must be at least 28"):
        ShortRun(side=20)
    with pytest.raises(UsageError, match="side 28 or more"):
        ShortRun.options_for((3, 16, 16), 10)
