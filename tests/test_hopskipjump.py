"""HopSkipJump: near the nearest error from labels alone, within its queries, on deterministic and noisy defenses."""

from __future__ import annotations

from typing import Literal

import foolbox
import pytest
import torch
from torch import Tensor

from robench import Defense, ThreatModel, UsageError, Victim
from robench.attacks import hopskipjump
from robench.attacks.hopskipjump import HopSkipJump, estimate_gradient, leap
from robench.bridges.foolbox import adopt
from robench.bridges.foreign import show
from robench.decisions import Oracle
from robench.rng import seeded
from robench.testing.attacks import SpyVictim, attack_once, count_errors, linear_case
from robench.testing.toys import REACH, LinearToy, NoisyLinearToy
from robench.types import Images, Labels, Logits

NORMS = ["l2", "linf"]


def ratios(found: Tensor, defense: LinearToy, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distance found over the known one."""
    return ThreatModel(norm, 1).distance(x, found) / defense.distance(x, y, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_comes_near_the_known_distance(norm: str) -> None:
    defense, x, y = linear_case(norm)
    found = attack_once(HopSkipJump(), defense, x, y, ThreatModel(norm, 4 * REACH[norm]))
    assert count_errors(defense, found, y) == len(x)
    reached = ratios(found, defense, x, y, norm)
    assert float(reached.min()) >= 1
    assert float(reached.max()) <= 1.05


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_too_far_stays_the_original(norm: str) -> None:
    defense, x, y = linear_case(norm)
    assert torch.equal(attack_once(HopSkipJump(), defense, x, y, ThreatModel(norm, 0.99 * REACH[norm])), x)


@pytest.mark.parametrize(("queries", "directions"), [(10, 100), (40, 100), (333, 20), (1000, 100)])
def test_queries_are_the_most_that_is_asked(queries: int, directions: int) -> None:
    defense, x, y = linear_case("l2")
    victim = SpyVictim(defense, "decisions", len(x))
    with seeded("queries"):
        HopSkipJump(queries=queries, directions=directions)(victim, x, y, ThreatModel("l2", 1))
    spent = victim.ledger.forwards
    assert int(spent.max()) <= queries
    assert queries < 100 or int(spent.max()) > queries - 2 * directions, "and not much less"
    assert victim.used == {"decisions"}


def test_more_queries_come_nearer() -> None:
    defense, x, y = linear_case("l2")
    medians = []
    for queries in (100, 500, 4000):
        found = attack_once(HopSkipJump(queries=queries), defense, x, y, ThreatModel("l2", 4))
        medians.append(float(ratios(found, defense, x, y, "l2").median()))
    assert medians == sorted(medians, reverse=True)
    assert medians[-1] < 1.02 < 1.2 < medians[0]


def test_gradient_of_the_linear_toy() -> None:
    """At the boundary of two classes of a linear net the gradient is the difference of their weights."""
    defense, x, y = linear_case("l2", 4)
    logits = defense(x)
    other = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    normal = (defense.weight[other] - defense.weight[y]).view_as(x)
    unit = normal / normal.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    at = x + 1.0001 * REACH["l2"] * unit
    oracle = Oracle(Victim(defense, "decisions", 4), y, 10_000)
    with seeded("gradient"):
        grad = estimate_gradient(oracle, at, torch.full((4,), 0.01), 3000)
    cosine = torch.nn.functional.cosine_similarity(grad.flatten(1), unit.flatten(1))
    assert float(cosine.min()) > 0.98
    assert oracle.left == 7000


def test_gradient_where_all_noise_is_wrong() -> None:
    """The mean of the signs must not be taken off then: nothing would be left."""
    defense, x, y = linear_case("l2", 4)
    wrong = (y + 1) % 4
    with seeded("gradient"):
        grad = estimate_gradient(Oracle(Victim(defense, "decisions", 4), wrong, 100), x, torch.full((4,), 1e-4), 50)
    assert bool((grad.flatten(1).norm(dim=1) > 0).all())


def test_leap_halves_for_those_that_are_right_and_gives_up() -> None:
    defense, x, y = linear_case("linf", 4)
    towards = torch.zeros_like(x)
    wrong = y.clone()
    wrong[1] = (y[1] + 1) % 4  # wrong at once, wherever it goes
    victim = Victim(defense, "decisions", 4)
    moved = leap(Oracle(victim, wrong, 100), x, towards + 1, torch.full((4,), 1e-5))
    torch.testing.assert_close(moved[1], x[1] + 1e-5)
    assert torch.equal(moved[[0, 2, 3]], x[[0, 2, 3]])
    assert victim.ledger.forwards.tolist() == [12, 1, 12, 12]


@pytest.mark.parametrize("norm", NORMS)
def test_noisy_defense_is_attacked_to_the_end(norm: str) -> None:
    """Answers that do not repeat neither stop the attack nor lead it out of its bound."""
    defense = NoisyLinearToy(sigma=0.5)
    x, y = defense.examples(8, norm)
    threat = ThreatModel(norm, 2 * REACH[norm])
    victim = Victim(defense, "decisions", 8, eot=5)
    with seeded("noisy"):
        found = HopSkipJump(queries=2000)(victim, x, y, threat)
    assert bool(threat.contains(x, found).all())
    assert 5 * 1500 < int(victim.ledger.forwards.max()) <= 5 * 2000
    before, after = (defense.probability_right(images, y).mean() for images in (x, found))
    assert float(after) < 0.65 < 0.95 < float(before)


class Jittery(Defense):
    """Two classes, linear in 28x28 pixels with noise of 0.03 each; `examples` lie at 1.4 in l2, 0.05 in linf."""

    name = "jittery"
    randomized = True
    num_classes = 2
    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        pattern = torch.arange(784).mul(7).remainder(13).remainder(2) * 2 - 1
        self.pattern = torch.nn.Parameter(pattern.float().view(1, 28, 28))
        self.freeze()

    def examples(self, count: int) -> tuple[Images, Labels]:
        y = torch.arange(count) % 2
        return 0.5 + 0.05 * (1 - 2 * y).view(-1, 1, 1, 1) * self.pattern, y

    def forward(self, x: Images) -> Logits:
        score = ((x + 0.03 * torch.randn_like(x) - 0.5) * self.pattern).flatten(1).sum(1)
        return torch.stack((score, -score), 1)


def test_each_draw_of_a_randomized_defense_answers_for_a_probe_of_its_own() -> None:
    """As many passes tell more of the direction where none is spent on a vote."""
    defense = Jittery()
    x, y = defense.examples(8)
    towards = (1 - 2 * y).view(-1, 1, 1, 1) * defense.pattern / 28
    at = x - 1.4 * towards
    cosines = []
    for eot, count, left in ((5, 100, 900), (1, 100, 900), (1, 500, 500)):
        victim = Victim(defense, "decisions", 8, eot=eot)
        oracle = Oracle(victim, y, 1000)
        with seeded("jittery"):
            grad = estimate_gradient(oracle, at, torch.full((8,), 0.4), count)
        assert victim.ledger.forwards.tolist() == [eot * count] * 8
        assert oracle.left == left
        cosines.append(float(torch.nn.functional.cosine_similarity(grad.flatten(1), -towards.flatten(1)).mean()))
    assert cosines[0] > 1.5 * cosines[1]
    assert abs(cosines[0] - cosines[2]) < 0.05


@pytest.mark.parametrize(("norm", "known"), [("l2", 1.4), ("linf", 0.05)])
def test_probes_tell_more_than_the_noise_of_the_defense(
    norm: str, known: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the paper's length, a 784th of the distance, the answers of a randomized defense are chance alone."""
    x, y = Jittery().examples(8)
    threat = ThreatModel(norm, 20 * known)
    reached = []
    for share in (hopskipjump.RANDOMIZED_PROBE, 1 / 784):
        monkeypatch.setattr(hopskipjump, "RANDOMIZED_PROBE", share)
        with seeded("jittery"):
            found = HopSkipJump(queries=2000)(Victim(Jittery(), "decisions", 8, eot=5), x, y, threat)
        reached.append(float(threat.distance(x, found).median()) / known)
    assert reached[0] < 2.5
    assert reached[1] > 2 * reached[0]


def test_options_out_of_range() -> None:
    for queries, directions in ((9, 100), (1000, 1)):
        with pytest.raises(UsageError, match="directions at least 2"):
            HopSkipJump(queries=queries, directions=directions)
    assert HopSkipJump(queries=700).passes() == 700


@pytest.mark.reference
@pytest.mark.parametrize("norm", NORMS)
def test_not_farther_than_foolbox_in_as_many_queries(norm: Literal["l2", "linf"]) -> None:
    defense, x, y = linear_case(norm)
    victim = SpyVictim(defense, "decisions", len(x))
    peer = foolbox.attacks.HopSkipJumpAttack(steps=5, constraint=norm)
    with seeded("peer"):
        theirs = peer.run(adopt(show(victim, "decisions", x)), x, y)
    victim.closing.remove()
    queries = int(victim.ledger.forwards.max())
    ours = attack_once(HopSkipJump(queries=queries), defense, x, y, ThreatModel(norm, 1))
    medians = [float(ratios(found, defense, x, y, norm).median()) for found in (ours, theirs)]
    assert 1 <= medians[0] <= 1.02 * medians[1], f"{medians} in {queries} queries"


@pytest.mark.reference
def test_foolbox_demands_that_answers_repeat() -> None:
    """Why the attack does not stand on foolbox's: on a noisy defense that one stops."""
    defense = NoisyLinearToy(sigma=3.0)
    x, y = defense.examples(8)
    model = adopt(show(Victim(defense, "decisions", 8), "decisions", x))
    with seeded("noisy"), pytest.raises((AssertionError, ValueError)):
        foolbox.attacks.HopSkipJumpAttack(steps=5).run(model, x, y)
