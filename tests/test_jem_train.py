"""Training JEM: the loss and its sign by hand, where chains come from, the watch and its roll-back, a cut-off run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

from robench import DataError
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.defenses.jem import JEM
from robench.defenses.jem import train as jem_train
from robench.defenses.jem.sgld import Sampler
from robench.defenses.jem.train import JEMRecipe
from robench.rng import seeded
from robench.train import Stage, TrainSettings, train
from robench.train import run as train_run

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = TrainSettings(holdout=64)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jem_train, "BUFFER", 100)
    monkeypatch.setattr(jem_train, "CHECKED_CHAINS", 50)


@pytest.fixture(scope="module")
def images() -> Dataset:
    """256 images of the embedded split, standing in for a training split, plus those held out."""
    return load_dataset("fashion_mnist", n=256 + SETTINGS.holdout, seed=5)


def make_recipe(name: str = "informative", **options: Any) -> JEMRecipe:
    with seeded("jem training"):
        recipe = JEM(**{"width": 4, **options}).recipe(name)
    assert isinstance(recipe, JEMRecipe)
    recipe.sampler = dataclasses.replace(recipe.sampler, steps=3)
    return recipe


class Short(JEMRecipe):
    """The recipe with few iterations; it may be cut off, and pushed off its course."""

    def __init__(self, name: str, iterations: tuple[int, int], check_every: int = 0, cut: int = 0) -> None:
        inner = make_recipe(name)
        super().__init__(inner.defense, name)
        self.sampler = dataclasses.replace(self.sampler, steps=3)
        self.iterations, self.check_every, self.cut = iterations, check_every, cut
        self.rate = 1e-3
        self.calls = 0
        self.cured = True

    def stages(self) -> list[Stage]:
        return [
            dataclasses.replace(
                stage, iterations=count, learning_rate=self.rate, batch_size=32, check_every=every, flat=1.0
            )
            for stage, count, every in zip(super().stages(), self.iterations, (0, self.check_every), strict=True)
        ]

    def joint_loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.cut:
            raise CutOffError
        return super().joint_loss(x, y)

    def density_loss(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Planted: until it is rolled back, the training drives the two densities apart, the wrong way round."""
        loss = super().density_loss(inside, outside)
        return loss if self.cured else 100 * (inside.mean() - outside.mean())

    def roll_back(self, stage: Stage) -> None:
        super().roll_back(stage)
        self.cured = True


class CutOffError(Exception):
    """Stands for the power going out in the middle of an iteration."""


# the loss


def test_density_loss_by_hand() -> None:
    """(2 + 5) / 2 - (1 + 3) / 2 = 1.5, and the penalty on (1 + 9) / 2 + (4 + 25) / 2 = 19.5."""
    recipe = make_recipe()
    recipe.penalty = 0.1
    inside, outside = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])
    assert recipe.density_loss(inside, outside).item() == pytest.approx(1.5 + 0.1 * 19.5)


def test_sign_of_the_loss_raises_the_density_of_images_against_samples() -> None:
    """The slides print the sign reversed; minimised as printed, this would make images less likely than noise."""
    recipe = make_recipe()
    optimizer = torch.optim.Adam(recipe.defense.parameters(), lr=1e-3)
    with seeded("sign"):
        data, noise = 0.3 * torch.randn(32, 1, 28, 28) - 0.5, 0.3 * torch.randn(32, 1, 28, 28) + 0.5
    gaps = []
    for _ in range(10):
        inside, outside = recipe.defense.log_density(data), recipe.defense.log_density(noise)
        gaps.append((inside.mean() - outside.mean()).item())
        optimizer.zero_grad()
        recipe.density_loss(inside, outside).backward()
        optimizer.step()
    assert gaps[-1] > gaps[0] + 0.05


def test_joint_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy of all images, the density of the first two alone, samples planted; here with numpy."""
    recipe = make_recipe()
    recipe.density_weight = 0.7
    rng = np.random.Generator(np.random.PCG64(0))
    weight = rng.normal(size=(10, 784)).astype(np.float32) / 30
    planted = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    planted[1].weight.data = torch.from_numpy(weight)
    recipe.defense.net = planted
    monkeypatch.setattr(jem_train, "CHAINS", 2)
    monkeypatch.setattr(jem_train, "DATA_NOISE", 0.0)
    monkeypatch.setattr(jem_train, "autocast", lambda _x: torch.autocast("cpu", enabled=False))
    with seeded("joint"):
        x, samples = torch.rand(5, 1, 28, 28), torch.rand(2, 1, 28, 28)
    monkeypatch.setattr(recipe, "draw_samples", lambda count: samples[:count])
    y = torch.tensor([3, 1, 4, 1, 5])
    logits = (2 * x - 1).flatten(1).numpy() @ weight.T
    inside, outside = (logsumexp(rows, axis=1) for rows in (logits[:2], samples.flatten(1).numpy() @ weight.T))
    entropy = (logsumexp(logits, axis=1) - logits[np.arange(5), y.numpy()]).mean()
    drift = recipe.penalty * ((inside**2).mean() + (outside**2).mean())
    expected = entropy + 0.7 * (outside.mean() - inside.mean() + drift)
    assert recipe.joint_loss(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_samples_are_constants_of_the_loss() -> None:
    """The weights' gradient goes through the density of the samples, not through the chains that made them."""
    recipe = make_recipe()
    with seeded("samples"):
        chains = recipe.draw_samples(8)
    assert not chains.requires_grad
    assert all(parameter.grad is None for parameter in recipe.defense.parameters())


def test_images_are_shifted_and_mirrored_as_asked() -> None:
    """A row that rises to the right falls where it is mirrored; digits in colour are only shifted, grey images not."""
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)

    def disturb(channels: int, **options: Any) -> Tensor:
        with seeded("augment"):
            return make_recipe(channels=channels, side=32, **options).disturb(ramp[:, :channels])

    def count_rising(images: Tensor) -> int:
        return int(((images[..., 20:24] - images[..., 8:12]).mean((1, 2, 3)) > 0).sum())

    mirrored, shifted, grey = disturb(3, augment="mirror"), disturb(3), disturb(1)
    assert mirrored.shape == ramp.shape
    assert 15 < count_rising(mirrored) < 49
    assert count_rising(shifted) == 64
    assert (shifted - (2 * ramp - 1)).mean((0, 1, 2)).abs().max() > 0.05
    noise = grey - (2 * ramp[:, :1] - 1)
    assert noise.std().item() == pytest.approx(0.03, rel=0.02)


# the chains


def test_chains_are_taken_up_again() -> None:
    """The buffer's images change where a chain moved, by the chain's step, and nowhere else."""
    recipe = make_recipe("uniform")
    recipe.sampler = Sampler(steps=1, noise=0.1)
    with seeded("first"):
        recipe.draw_samples(1)
        assert recipe.buffer is not None
        before = recipe.buffer.images.clone()
        came = recipe.draw_samples(10)
    moved = (recipe.buffer.images != before).flatten(1).any(1)
    assert int(moved.sum()) == 10
    assert {float(row.sum()) for row in recipe.buffer.images[moved].float()} == {
        float(row.sum()) for row in came.half().float()
    }


def test_where_chains_start() -> None:
    """Informative: from the Gaussians of the images of the warm-up; uniform: anywhere in the cube."""
    informative, uniform = make_recipe(), make_recipe("uniform")
    dark, light = torch.full((40, 1, 28, 28), 0.1), torch.full((40, 1, 28, 28), 0.9)
    for recipe in (informative, uniform):
        recipe.warmup_loss(torch.cat([dark, light]), torch.tensor([0, 1] * 40).sort().values)
        with seeded("starts"):
            recipe.draw_samples(4)
            starts = recipe.draw_starts(300).mean((1, 2, 3))
        if recipe is uniform:
            assert starts.abs().max().item() < 0.1
        else:
            assert bool(((starts + 0.8).abs() < 0.01).any() and ((starts - 0.8).abs() < 0.01).any())
    torch.testing.assert_close(informative.defense.gaussians.mean[1], torch.full((1, 28, 28), 0.8))


@pytest.mark.parametrize("name", ["informative", "classifier"])
def test_the_classifier_alone_has_no_chains(name: str) -> None:
    recipe = make_recipe(name)
    recipe.stages()[1].loss(torch.rand(4, 1, 28, 28), torch.arange(4))
    assert (recipe.buffer is None) is (name == "classifier")


# training


def test_training_makes_images_likelier_than_where_chains_start(images: Dataset, tmp_path: Path) -> None:
    recipe = Short("uniform", (6, 16))
    recipe.density_weight = 1.0
    gaps = []
    for trained in (False, True):
        if trained:
            train(recipe.defense, recipe, images, tmp_path, SETTINGS)
        with torch.no_grad(), seeded("starts"):
            starts = recipe.defense.log_density(recipe.draw_starts(100)).mean()
            gaps.append((recipe.defense.log_density(2 * images.x - 1).mean() - starts).item())
    assert gaps[1] > gaps[0] + 0.2


def run_to_the_end(folder: Path, images: Dataset, *, cut: int = 0, resume: bool = False) -> str | None:
    """Trains for a few iterations; returns the weights' digest, None where it was cut off in that joint iteration."""
    recipe = Short("informative", (4, 6), check_every=2, cut=cut)
    try:
        train(recipe.defense, recipe, images, folder, SETTINGS, resume=resume)
    except CutOffError:
        return None
    return weights_digest(recipe.defense)


def test_the_buffer_is_part_of_the_checkpoint(images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the chains would start anew, and other weights come out."""
    whole = run_to_the_end(tmp_path / "whole", images)
    monkeypatch.setattr(train_run, "CHECKPOINT_SECONDS", -1.0)  # after every iteration
    folder = tmp_path / "forgetful"
    assert run_to_the_end(folder, images, cut=4) is None
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["recipe"]["buffer"].shape == (100, 1, 28, 28)
    torch.save(saved | {"recipe": saved["recipe"] | {"buffer": None}}, folder / "checkpoint.pt")
    assert run_to_the_end(folder, images, resume=True) != whole


@pytest.mark.parametrize("grid", [True, False])
def test_images_of_the_warm_up_are_taken_up_as_they_are(images: Dataset, tmp_path: Path, *, grid: bool) -> None:
    """Bytes in the checkpoint where pixels are whole 255ths; else the Gaussians that they give would be others."""
    if not grid:
        images = dataclasses.replace(images, x=images.x**1.1)
    whole = run_to_the_end(tmp_path / "whole", images)
    assert (
        run_to_the_end(tmp_path / "cut", images, cut=1) is None
    )  # between the stages, before the Gaussians are fitted
    saved = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["recipe"]["seen_x"]
    assert saved.dtype == (torch.uint8 if grid else torch.float32)
    assert run_to_the_end(tmp_path / "cut", images, resume=True) == whole


# the watch


@pytest.mark.parametrize(
    ("accuracy", "inside", "outside", "well"),
    [
        (0.8, 3.0, 5.0, True),
        (0.75, 3.0, 5.0, True),
        (0.65, 3.0, 5.0, False),
        (0.8, 30.0, 5.0, False),
        (0.8, -30.0, 5.0, False),
        (0.8, float("nan"), 5.0, False),
        (float("nan"), 3.0, 5.0, False),
    ],
)
def test_check_sees_a_fall_and_densities_that_run_apart(
    accuracy: float, inside: float, outside: float, well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    recipe.best_accuracy = 0.8
    figures = {"accuracy": accuracy, "log_px_images": inside, "log_px_samples": outside}
    monkeypatch.setattr(recipe, "measure", lambda _x, _y: figures)
    stage = recipe.stages()[1]
    assert recipe.check(stage, torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64)) == (figures, well)


def test_a_classifier_may_have_logits_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log p(x) has an arbitrary offset, and no samples to be compared with."""
    recipe = make_recipe("classifier")
    x, y = torch.zeros(2, 1, 28, 28), torch.tensor([3, 3])
    with torch.no_grad():
        list(recipe.defense.parameters())[-1].add_(1000.0)
        figures, well = recipe.check(recipe.stages()[-1], x, y)
    assert figures["log_px_images"] > 900
    assert well
    monkeypatch.setattr(recipe, "measure", lambda _x, _y: {**figures, "log_px_images": math.nan})
    assert not recipe.check(recipe.stages()[-1], x, y)[1]


@pytest.mark.parametrize("name", ["informative", "classifier"])
def test_check_sees_weights_that_are_not_finite(name: str) -> None:
    """An update may leave them so where the loss before it was finite; they are rolled back."""
    recipe = make_recipe(name)
    with torch.no_grad():
        list(recipe.defense.parameters())[-1].fill_(torch.nan)
        figures, well = recipe.check(recipe.stages()[-1], torch.zeros(2, 1, 28, 28), torch.tensor([0, 0]))
    assert math.isnan(figures["cross_entropy"])
    assert not well


def test_training_recovers_from_a_planted_divergence(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reversed loss drives the densities apart until the first check; then a longer chain, and a new buffer."""
    recipe = Short("informative", (20, 40), check_every=10)
    recipe.cured, recipe.rate = False, 3e-3
    monkeypatch.setattr(jem_train, "LARGEST_GAP", 3.0)
    card = train(recipe.defense, recipe, images, tmp_path, SETTINGS)
    checks = [check for check in card["checks"] if "fine" in check]
    fine = [check["fine"] for check in checks]
    assert fine == [False, True, True, True]
    assert card["roll_backs"] == 1
    assert card["sgld"] == {"steps": 5, "step_size": 1.0, "noise": pytest.approx(0.015)}
    first, last = checks[0], checks[-1]
    assert abs(first["log_px_images"] - first["log_px_samples"]) > 3
    assert abs(last["log_px_images"] - last["log_px_samples"]) < 3


def test_training_that_never_recovers_stops_with_the_reason(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Short("informative", (20, 90), check_every=10)
    recipe.cured, recipe.rate = False, 3e-3
    monkeypatch.setattr(jem_train, "LARGEST_GAP", 3.0)
    recipe.roll_back = lambda stage: None  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r'^training diverged in stage "joint" .*after 5 roll-backs'):
        train(recipe.defense, recipe, images, tmp_path, SETTINGS)


def test_roll_backs_add_up_to_a_limit() -> None:
    recipe = make_recipe()
    stage = recipe.stages()[1]
    steps = []
    for _ in range(9):
        recipe.roll_back(stage)
        steps.append(recipe.sampler.steps)
    assert steps[:4] == [5, 8, 12, 18]
    assert steps[-1] == jem_train.MOST_STEPS
    assert recipe.facts()["roll_backs"] == 9
