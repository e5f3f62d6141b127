"""Carlini and Wagner's attack: known distances, what its options do, what it costs, and foolbox's version of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import foolbox
import pytest
import torch
from torch import Tensor, nn

from robench import ThreatModel, Victim, load_data, wrap
from robench.attacks.cw import CW
from robench.defense import Defense
from robench.errors import UsageError
from robench.losses import margin
from robench.rng import seeded
from robench.testing import LinearToy, NoisyLinearToy
from robench.testing.toys import REACH

FAR = ThreatModel("l2", 10.0)
SHORT = CW(steps=25, binary_search_steps=4)


def attack(cw: CW, defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel = FAR) -> tuple[Tensor, Victim]:
    victim = Victim(defense, "gradient", len(x), eot=10)
    with seeded("cw"):
        return cw(victim, x, y, threat), victim


def passes(victim: Victim) -> list[int]:
    return (victim.ledger.forwards + victim.ledger.backwards).tolist()


# known distances


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("abort_early", [True, False])
def test_distances_are_within_5_percent(channels: int, abort_early: bool) -> None:
    defense = LinearToy(channels)
    x, y = defense.examples(12, "l2")
    x_adv, _ = attack(CW(abort_early=abort_early), defense, x, y)
    reached = FAR.distance(x, x_adv) / REACH["l2"]
    assert bool((margin(defense(x_adv), y) > 0).all())
    assert bool(((reached > 1 - 1e-5) & (reached <= 1.05)).all())


@pytest.mark.parametrize("initial_c", [1e-5, 100.0])
def test_any_first_c_finds_the_errors(initial_c: float) -> None:
    defense = LinearToy()
    x, y = defense.examples(4, "l2")
    x_adv, _ = attack(CW(initial_c=initial_c, binary_search_steps=14, steps=40, abort_early=False), defense, x, y)
    assert bool((FAR.distance(x, x_adv) <= 1.05 * REACH["l2"]).all())
    assert bool((margin(defense(x_adv), y) > 0).all())


def test_confidence_is_the_margin_of_the_error() -> None:
    defense = LinearToy()
    x, y = defense.examples(4, "l2")
    x_adv, _ = attack(CW(confidence=2.0, binary_search_steps=4), defense, x, y)
    margins = margin(defense(x_adv), y)
    assert bool(((margins > 2) & (margins < 2.5)).all())


def test_images_at_the_ends_of_the_box_move() -> None:
    """There the tanh variable is infinite, and its derivative zero."""
    weight = torch.linspace(-4, 4, 16)
    x = (weight > 0).float().view(1, 1, 4, 4).repeat(2, 1, 1, 1)
    x[1] = 1 - x[1]
    defense = two_classes(weight, bias=0.0)
    y = torch.tensor([1, 0])
    x_adv, _ = attack(CW(steps=60, binary_search_steps=4), defense, x, y)
    assert bool((margin(defense(x_adv), y) > 0).all())
    assert bool((FAR.distance(x, x_adv) < 3).all())


# what is left alone, and what it costs


def test_an_error_beyond_the_bound_gives_the_original() -> None:
    defense = LinearToy()
    x, y = defense.examples(4, "l2")
    x_adv, _ = attack(SHORT, defense, x, y, ThreatModel("l2", 0.9 * REACH["l2"]))
    assert torch.equal(x_adv, x)


def test_the_search_does_not_depend_on_the_bound() -> None:
    defense = LinearToy()
    x, y = defense.examples(4, "l2")
    near, _ = attack(SHORT, defense, x, y, ThreatModel("l2", 1.5 * REACH["l2"]))
    far, _ = attack(SHORT, defense, x, y, FAR)
    assert torch.equal(near, far)
    assert not torch.equal(near, x)


def test_an_image_that_is_wrong_costs_one_forward() -> None:
    defense = LinearToy()
    x, y = defense.examples(4, "l2")
    y[1] = (y[1] + 1) % 4
    x_adv, victim = attack(SHORT, defense, x, y)
    assert torch.equal(x_adv[1], x[1])
    assert passes(victim)[1] == 1
    assert min(passes(victim)[i] for i in (0, 2, 3)) > 50
    assert bool((FAR.distance(x, x_adv)[[0, 2, 3]] > 0).all())


def test_a_zero_bound_asks_nothing() -> None:
    defense = LinearToy()
    x, y = defense.examples(4, "l2")
    x_adv, victim = attack(CW(), defense, x, y, ThreatModel("l2", 0.0))
    assert torch.equal(x_adv, x)
    assert passes(victim) == [0] * 4


def test_each_image_ends_its_descent_by_itself() -> None:
    """The c given suits the nearer image; how long an image takes must not depend on the other."""
    defense = LinearToy()
    cw = CW(initial_c=0.01, binary_search_steps=1)
    x, y = (torch.cat(parts) for parts in zip(defense.examples(1, "l2"), defense.examples(1, "l2", 0.4), strict=True))
    _, together = attack(cw, defense, x, y)
    alone = [attack(cw, defense, x[i : i + 1], y[i : i + 1])[1] for i in range(2)]
    assert passes(together) == [passes(victim)[0] for victim in alone]
    assert passes(together)[0] < passes(together)[1] <= cw.passes()


def test_without_early_abort_every_step_is_taken() -> None:
    defense = LinearToy()
    _, victim = attack(dataclasses.replace(SHORT, abort_early=False), defense, *defense.examples(2, "l2"))
    assert passes(victim) == [SHORT.passes()] * 2


def test_luck_counts_for_little_on_a_randomized_defense() -> None:
    """The least distance over many noisy answers would be far below the one at which the mean answer is wrong."""
    defense = NoisyLinearToy(sigma=1.0)
    x, y = defense.examples(12, "l2")
    cw = CW(binary_search_steps=4)
    x_adv, victim = attack(cw, defense, x, y)
    reached = FAR.distance(x, x_adv) / REACH["l2"]
    assert 0.9 < reached.mean() < 1.1
    assert defense.probability_right(x_adv, y).mean() < 0.6
    assert min(passes(victim)) >= 10 * (cw.passes() - 1)


# options


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"binary_search_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"initial_c": -1.0},
        {"initial_c": math.nan},
        {"confidence": -0.1},
        {"confidence": math.nan},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        CW(**options)


# reference


def two_classes(weight: Tensor, bias: float) -> Defense:
    """A linear classifier that answers 1 where `weight . (x - 1/2) + bias` is positive."""
    linear = nn.Linear(len(weight), 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        linear.bias.copy_(torch.tensor([0.0, bias - 0.5 * float(weight.sum())]))
    return wrap(nn.Sequential(nn.Flatten(), linear), num_classes=2, input_shape=(1, 4, 4))


def foolbox_distances(net: nn.Module, x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    peer = foolbox.attacks.L2CarliniWagnerAttack(**options)
    x_adv, _, _ = peer(model, x, y, epsilons=None)
    return torch.where(net(x_adv).argmax(1) != y, FAR.distance(x, x_adv), torch.inf)


@pytest.mark.reference
@pytest.mark.parametrize("abort_early", [True, False])
def test_distances_on_a_net_are_not_above_foolboxs(abort_early: bool) -> None:
    """Equal settings on an untrained net and its own answers; 3 % for the nonconvex search."""
    with seeded("reference net"):
        net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.Mish(), nn.Flatten(), nn.Linear(8 * 144, 10)).eval()
    net.requires_grad_(False)
    x, _ = load_data("fashion_mnist", n=16)
    y = net(x).argmax(1)
    x_adv, _ = attack(
        CW(steps=40, binary_search_steps=4, abort_early=abort_early),
        wrap(net, num_classes=10, input_shape=(1, 28, 28)),
        x,
        y,
    )
    options = {"steps": 40, "binary_search_steps": 4, "stepsize": 0.05, "initial_const": 0.1}
    peer = foolbox_distances(net, x, y, {**options, "abort_early": abort_early})
    ours = FAR.distance(x, x_adv)
    assert bool((net(x_adv).argmax(1) != y).all())
    assert bool(peer.isfinite().all())
    assert ours.median() <= 1.03 * peer.median()
