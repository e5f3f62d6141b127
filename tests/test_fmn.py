"""FMN: known distances, also where the box stands in the way, what it costs, and foolbox's version of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import foolbox
import pytest
import torch
from torch import Tensor, nn

from robench import ThreatModel, Victim, load_data, wrap
from robench.attacks.fmn import FMN
from robench.defense import Defense
from robench.errors import UsageError
from robench.losses import margin
from robench.rng import seeded
from robench.testing import LinearToy, NoisyLinearToy
from robench.testing.toys import REACH
from robench.threat import NORMS

FAR: Final = {"linf": 1.0, "l2": 100.0, "l1": 1000.0, "l0": 784.0}
SHORT: Final = FMN(steps=20)


def attack(
    defense: Defense, x: Tensor, y: Tensor, threat: ThreatModel, fmn: FMN = SHORT, *, eot: int = 10
) -> tuple[Tensor, Victim]:
    victim = Victim(defense, "gradient", len(x), eot=eot)
    with seeded("fmn"):
        return fmn(victim, x, y, threat), victim


def passes(victim: Victim) -> list[tuple[int, int]]:
    return list(zip(victim.ledger.forwards.tolist(), victim.ledger.backwards.tolist(), strict=True))


# known distances


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("steps", [20, 100])
def test_distances_are_within_5_percent(norm: str, channels: int, steps: int) -> None:
    """In l0 the exact count of pixels, with one and with three channels."""
    defense = LinearToy(channels)
    x, y = defense.examples(12, norm)
    threat = ThreatModel(norm, FAR[norm])
    x_adv, _ = attack(defense, x, y, threat, FMN(steps=steps))
    reached = threat.distance(x, x_adv) / REACH[norm]
    assert bool((margin(defense(x_adv), y) > 0).all())
    assert bool(((reached > 1 - 1e-5) & (reached <= (1.0 if norm == "l0" else 1.05))).all())


def two_classes(weight: Tensor) -> Defense:
    """A linear classifier that answers 1 where `weight . x` is positive."""
    linear = nn.Linear(len(weight), 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
    return wrap(nn.Sequential(nn.Flatten(), linear), num_classes=2, input_shape=(1, 4, 4))


def grow_until_wrong(weight: Tensor, x: Tensor, delta: Callable[[float], Tensor]) -> Tensor:
    """The smallest error on the path `delta`, clipped to the box, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        wrong = bool((x + delta(middle)).clamp(0, 1) @ weight > 0)
        low, high = (low, middle) if wrong else (middle, high)
    return (x + delta(high)).clamp(0, 1) - x


def distance_in_box(weight: Tensor, x: Tensor, norm: str) -> float:
    """The exact distance of a linear classifier's image from class 0 to class 1 inside the box.

    linf: all values go alike; l2: in proportion to the weights; l1: the largest weights first, each to the end of the
    box; l0: the largest gains first.
    """
    if norm == "linf":
        return float(grow_until_wrong(weight, x, lambda size: size * weight.sign()).abs().max())
    if norm == "l2":
        return float(grow_until_wrong(weight, x, lambda size: size * weight).norm())
    room = torch.where(weight > 0, 1 - x, x)
    gain, missing = room * weight.abs(), -float(x @ weight)
    order = (weight.abs() if norm == "l1" else gain).argsort(descending=True)
    used = gain[order].cumsum(0)
    full = int((used <= missing).sum())
    if norm == "l0":
        return full + 1
    rest = missing - (float(used[full - 1]) if full else 0.0)
    return float(room[order][:full].sum()) + rest / float(weight[order][full].abs())


@pytest.mark.parametrize("norm", NORMS)
def test_distances_where_the_box_stands_in_the_way(norm: str) -> None:
    """Half of the values lie at an end of the box; there the published algorithm stops short of the boundary."""
    weight = torch.cos(7.0 * torch.arange(16.0)) + 0.3
    rows = torch.stack([((torch.arange(16) * k) % 5 / 4.0) for k in range(1, 9)])
    rows = torch.where((rows @ weight > -0.5)[:, None] & (weight > 0), 0.0, rows)
    rows = rows[rows @ weight < -0.5]
    assert len(rows) >= 4
    threat = ThreatModel(norm, FAR[norm])
    x, y = rows.view(-1, 1, 4, 4), torch.zeros(len(rows), dtype=torch.int64)
    defense = two_classes(weight)
    x_adv, _ = attack(defense, x, y, threat, FMN())
    exact = torch.tensor([distance_in_box(weight, row, norm) for row in rows])
    reached = threat.distance(x, x_adv) / exact
    assert bool((margin(defense(x_adv), y) > 0).all())
    assert bool(((reached > 1 - 1e-4) & (reached <= (1.0 if norm == "l0" else 1.05))).all())


def test_l0_counts_a_pixel_once_for_all_channels() -> None:
    """One pixel of three channels suffices where each value alone does not."""
    weight = torch.zeros(3, 4, 4)
    weight[:, 1, 2], weight[0, 3, :] = 1.0, 1.5
    linear = nn.Linear(48, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.zeros(48), weight.flatten()]))
        linear.bias.copy_(torch.tensor([0.0, -2.0]))
    defense = wrap(nn.Sequential(nn.Flatten(), linear), num_classes=2, input_shape=(3, 4, 4))
    x, y = torch.zeros(1, 3, 4, 4), torch.tensor([0])
    x_adv, _ = attack(defense, x, y, ThreatModel("l0", 1))
    assert defense(x_adv).argmax(1).tolist() == [1]
    assert (x_adv != x).nonzero()[:, 1:].tolist() == [[0, 1, 2], [1, 1, 2], [2, 1, 2]]


def test_a_distant_error_is_pulled_in() -> None:
    """A single step goes far beyond the boundary; the final bisection comes back to it."""
    defense = LinearToy()
    x, y = defense.examples(6, "l2")
    threat = ThreatModel("l2", 10.0)
    far, near = (
        threat.distance(x, attack(defense, x, y, threat, FMN(steps=2, gamma=0.9, refine=refine))[0]) / REACH["l2"]
        for refine in (0, 8)
    )
    assert bool((far > 1.02).all())
    assert bool((near < 1.01).all())


def test_l0_changes_no_pixel_without_need() -> None:
    """With as many tries as pixels, none of those changed can be taken back; few steps alone leave such pixels."""
    with seeded("l0 pixels", 3):
        weight, x = torch.randn(16), torch.rand(64, 16)
    x = x[x @ weight < -0.3]
    y, defense = torch.zeros(len(x), dtype=torch.int64), two_classes(weight)

    def count_needless(refine: int) -> int:
        x_adv, _ = attack(defense, x.view(-1, 1, 4, 4), y, ThreatModel("l0", 16), FMN(steps=8, refine=refine))
        changed = x_adv.flatten(1)
        restored = torch.where(torch.eye(16, dtype=torch.bool), x[:, None], changed[:, None])  # b pixel d
        assert bool((changed @ weight > 0).all())
        return int(((restored @ weight > 1e-5) & (changed != x)).sum())

    assert count_needless(0) > 0
    assert count_needless(16) == 0


# what is left alone, and what it costs


@pytest.mark.parametrize("norm", NORMS)
def test_an_error_beyond_the_bound_gives_the_original(norm: str) -> None:
    defense = LinearToy()
    x, y = defense.examples(4, norm)
    x_adv, _ = attack(defense, x, y, ThreatModel(norm, math.floor(0.5 * REACH[norm]) or 0.9 * REACH[norm]))
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize("norm", NORMS)
def test_the_search_does_not_depend_on_the_bound(norm: str) -> None:
    defense = LinearToy()
    x, y = defense.examples(4, norm)
    near, _ = attack(defense, x, y, ThreatModel(norm, 3.0 if norm == "l0" else 1.1 * REACH[norm]))
    far, _ = attack(defense, x, y, ThreatModel(norm, FAR[norm]))
    assert torch.equal(near, far)
    assert bool((near != x).flatten(1).any(1).all())


def test_an_image_that_is_wrong_costs_one_forward() -> None:
    defense = LinearToy()
    x, y = defense.examples(3, "linf")
    y[1] = (y[1] + 1) % 4
    x_adv, victim = attack(defense, x, y, ThreatModel("linf", 1.0))
    each = (SHORT.steps + 2 + SHORT.refine, SHORT.steps)
    assert torch.equal(x_adv[1], x[1])
    assert passes(victim) == [each, (1, 0), each]
    assert sum(each) == SHORT.passes()


def test_a_zero_bound_asks_nothing() -> None:
    defense = LinearToy()
    x, y = defense.examples(3, "linf")
    x_adv, victim = attack(defense, x, y, ThreatModel("linf", 0.0))
    assert torch.equal(x_adv, x)
    assert passes(victim) == [(0, 0)] * 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_luck_counts_for_little_on_a_randomized_defense(norm: str) -> None:
    """The least distance over many noisy answers would be far below the one at which the mean answer is wrong."""
    defense = NoisyLinearToy(sigma=1.0)
    x, y = defense.examples(12, norm)
    threat = ThreatModel(norm, FAR[norm])
    x_adv, victim = attack(defense, x, y, threat, FMN(steps=60))
    reached = threat.distance(x, x_adv) / REACH[norm]
    assert 0.93 < reached.mean() < 1.07
    assert defense.probability_right(x_adv, y).mean() < 0.55
    assert min(backwards for _, backwards in passes(victim)) == 10 * 60


@pytest.mark.parametrize(("eot", "left"), [(1, 0.15), (3, 0.1), (10, 0.07)])
def test_errors_in_l0_last_on_a_randomized_defense(eot: int, left: float) -> None:
    """Means over fresh draws that agree three times would leave 0.24, 0.17 and 0.10 here."""
    defense = NoisyLinearToy(sigma=2.0)
    x, y = defense.examples(24, "l0")
    x_adv, victim = attack(defense, x, y, ThreatModel("l0", 16.0), FMN(steps=60), eot=eot)
    assert float(defense.probability_right(x, y).min()) > 0.9
    assert float(defense.probability_right(x_adv, y).mean()) < left
    assert float((x_adv != x).any(1).flatten(1).sum(1).float().mean()) < 1.25 * REACH["l0"]
    assert max(forwards for forwards, _ in passes(victim)) < 4 * eot * 60


# options


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"step_size": 0.0},
        {"step_size": math.inf},
        {"gamma": 0.0},
        {"gamma": 1.0},
        {"gamma": math.nan},
        {"refine": -1},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        FMN(**options)


# reference

PEERS: Final[dict[str, Any]] = {
    "linf": foolbox.attacks.LInfFMNAttack,
    "l2": foolbox.attacks.L2FMNAttack,
    "l1": foolbox.attacks.L1FMNAttack,
    "l0": foolbox.attacks.L0FMNAttack,
}


@pytest.mark.reference
@pytest.mark.parametrize("norm", NORMS)
def test_median_distance_is_not_above_foolboxs(norm: str) -> None:
    """Equal steps on an untrained net and its own answers; 3 % for the nonconvex search. One channel: pixel = value."""
    with seeded("reference net"):
        net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.Mish(), nn.Flatten(), nn.Linear(8 * 144, 10)).eval()
    net.requires_grad_(False)
    x, _ = load_data("fashion_mnist", n=16)
    y = net(x).argmax(1)
    threat = ThreatModel(norm, FAR[norm])
    ours, _ = attack(wrap(net, num_classes=10, input_shape=(1, 28, 28)), x, y, threat, FMN(steps=50))
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    peer, _, _ = PEERS[norm](steps=50)(model, x, y, epsilons=None)
    peer_distance = torch.where(net(peer).argmax(1) != y, threat.distance(x, peer), torch.inf)
    assert bool((net(ours).argmax(1) != y).all())
    assert bool(peer_distance.median().isfinite())
    assert threat.distance(x, ours).median() <= 1.03 * peer_distance.median()
