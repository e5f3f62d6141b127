"""The decoys keep their classifier's answers, and those that are trained train as their papers say."""

from __future__ import annotations

import math

import pytest
import torch
from engine_toys import Prototypes
from torch import Tensor

from robench import Defense, ThreatModel, load_data
from robench.audit import audit
from robench.data import load_dataset
from robench.rng import seeded
from robench.testing.decoy_training import (
    TEMPERATURE,
    DistillationRecipe,
    Distilled,
    OneStep,
    OneStepRecipe,
    Trades,
    Winners,
)
from robench.testing.decoys import PLANTED, TRAINED, Decoy, Hashed, JpegLike, OutOfBall, Snapped
from robench.types import Images, Labels


@pytest.fixture(scope="module")
def data() -> tuple[Images, Labels]:
    return load_data("fashion_mnist", n=60, seed=2)


def accuracy(defense: Defense, data: tuple[Images, Labels]) -> float:
    x, y = data
    with torch.no_grad(), seeded("decoys"):
        return float((defense(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("name", PLANTED)
def test_a_decoy_answers_nearly_as_its_classifier(name: str, data: tuple[Images, Labels]) -> None:
    """But for the noise on the logits, which costs more."""
    base = Prototypes()
    decoy = PLANTED[name].make(base, data[0], 0.1)
    lost = accuracy(base, data) - accuracy(decoy, data)
    assert lost <= (0.5 if name == "logit noise" else 0.2)
    assert isinstance(decoy, Decoy)
    decoy.check_traits()


@pytest.mark.parametrize("name", TRAINED)
def test_trained_decoys_are_found(name: str) -> None:
    """By the check that is named; the whole audit is benchmarks/audit_controls.py."""
    planted = TRAINED[name]
    data = load_dataset("fashion_mnist", "test", 128, 0)
    decoy = planted.make(Prototypes(), data.x, planted.eps)
    checks = ("distortion", "finite_differences", "loss_choice")
    found = audit(decoy, ThreatModel("linf", planted.eps), data, checks=checks)
    assert found.verdict == "masked"
    assert set(found.failed) & set(planted.checks)


def test_trades_is_no_decoy() -> None:
    data = load_dataset("fashion_mnist", "test", 64, 0)
    checks = ("distortion", "finite_differences", "zero_gradients", "loss_surface", "stability")
    assert audit(Trades.load().freeze(), ThreatModel("linf", 0.1), data, checks=checks).verdict == "pass"


def test_a_decoy_is_as_random_as_it_says(data: tuple[Images, Labels]) -> None:
    x, _ = data
    for planted in PLANTED.values():
        decoy = planted.make(Prototypes(), x, 0.1)
        with torch.no_grad(), seeded("draws"):
            assert torch.equal(decoy(x), decoy(x)) != decoy.randomized, decoy.name


def test_the_hash_decides_the_noise(data: tuple[Images, Labels]) -> None:
    x, _ = data
    decoy = Hashed(Prototypes())
    first = decoy.change(x) - x
    moved = x.clone()
    moved[0, 0, 0, 0] = 0.5
    again = decoy.change(moved) - moved
    assert torch.allclose(first[1:], again[1:])
    assert not torch.allclose(first[0], again[0], atol=0.01)


def test_the_cosine_basis_is_orthonormal(data: tuple[Images, Labels]) -> None:
    """Without the rounding the blocks would come back; with it no pixel moves by more than 16 half steps allow."""
    x, _ = data
    change = (JpegLike(Prototypes()).change(x) - x).abs()
    assert 0 < change.max().item() <= 16 * 0.075 * 0.5 * 1.71
    assert change.mean().item() < 0.05


def test_far_images_are_answered_as_the_nearest_known_one(data: tuple[Images, Labels]) -> None:
    x, _ = data
    decoy = OutOfBall(Prototypes(), x, 0.1)
    near, far = (x + 0.09).clamp(0, 1), (x + 0.3 * torch.rand_like(x)).clamp(0, 1)
    assert torch.equal(decoy.change(near), near)
    assert torch.equal(decoy.change(far), x)


def test_snapping_keeps_every_answer(data: tuple[Images, Labels]) -> None:
    x, _ = data
    assert torch.equal(Snapped(Prototypes())(x).argmax(1), Prototypes()(x).argmax(1))


def test_winners_keep_their_share() -> None:
    net = Winners()
    seen: list[Tensor] = []
    for layer in net.net:
        if isinstance(layer, torch.nn.Mish):
            layer.register_forward_hook(lambda _layer, _inputs, out: seen.append(out))
    with seeded("winners"):
        net(torch.rand(3, 1, 28, 28))
    assert len(seen) == 6
    for values in seen:
        flat = values.flatten(1)
        kept = (flat != 0).sum(1).double() / flat.shape[1]
        assert bool((kept <= 0.1 + 1 / flat.shape[1]).all())
        assert bool((kept > 0.05).all())


def test_distillation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher (50, 0), student (0, 0): soft labels p = e / (1 + e), cross-entropy to the student's halves is log 2."""
    student = Distilled(width=8)
    recipe = student.recipe()
    assert isinstance(recipe, DistillationRecipe)
    logits = {id(recipe.teacher): torch.tensor([[TEMPERATURE, 0.0]]), id(student): torch.tensor([[0.0, 0.0]])}
    monkeypatch.setattr("robench.testing.decoy_training._logits", lambda net, x: logits[id(net)])
    x, y = torch.zeros(1, 1, 28, 28), torch.tensor([0])
    assert recipe.student_loss(x, y).item() == pytest.approx(math.log(2))
    assert recipe.teacher_loss(x, y).item() == pytest.approx(math.log(1 + math.exp(-1)))
    logits[id(student)] = torch.tensor([[2 * TEMPERATURE, 0.0]])
    p = math.e / (1 + math.e)
    expected = -(p * math.log(math.e**2 / (1 + math.e**2)) + (1 - p) * math.log(1 / (1 + math.e**2)))
    assert recipe.student_loss(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_one_step_has_no_watch() -> None:
    recipe = OneStep(width=8).recipe()
    assert isinstance(recipe, OneStepRecipe)
    assert (recipe.inner.steps, recipe.inner.step, recipe.inner.start) == (1, 1.0, "near")
    x, y = load_data("fashion_mnist", n=20)
    stage = recipe.stages()[-1]
    recipe.best_pgd = 1.0
    figures, fine = recipe.check(stage, x, y)
    assert fine
    assert set(figures) == {"accuracy", "fgsm", "pgd20"}
