"""The oracle that holds its draws: what it calls wrong, whom it lets leave, and what it asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from robench import ThreatModel, Victim
from robench.decisions import HeldOracle
from robench.defense import Defense
from robench.rng import seeded
from robench.testing.toys import LinearToy, NoisyLinearToy
from robench.types import Images, Labels

LEFT = 100


def oracle_of(defense: Defense, x: Images, y: Labels, *, draws: int, left: int = LEFT) -> HeldOracle:
    return HeldOracle.begin(Victim(defense, "decisions", len(x), eot=10), x, y, left, draws)


def at_the_boundary(defense: LinearToy, count: int) -> tuple[Images, Labels, Images]:
    """Originals, labels, and candidates of which about half of the answers are wrong."""
    x, y = defense.examples(count, "l2")
    logits = LinearToy.forward(defense, x)
    second = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    step = (defense.weight[second] - defense.weight[y]).view_as(x)
    step = step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return x, y, x + defense.distance(x, y, "l2").view(-1, 1, 1, 1) * step


def test_asks_the_same_draws_every_time() -> None:
    defense = NoisyLinearToy(sigma=2.0)
    x, y, candidates = at_the_boundary(defense, 64)
    with seeded("held"):
        oracle, other = (oracle_of(defense, x, y, draws=1) for _ in range(2))
        first = oracle.is_wrong(candidates)
        again, others = oracle.is_wrong(candidates), other.is_wrong(candidates)
    assert torch.equal(first, again)
    assert not torch.equal(first, others)
    assert 10 < int(first.sum()) < 54
    assert oracle.left == LEFT - 3


def test_an_error_of_many_draws_is_wrong_in_those_to_come() -> None:
    defense = NoisyLinearToy(sigma=2.0)
    x, y, candidates = at_the_boundary(defense, 400)
    steps = torch.linspace(0.5, 3, 400).view(-1, 1, 1, 1)
    candidates = (x + steps * (candidates - x)).clamp(0, 1)
    right = []
    with seeded("held"):
        for draws in (1, 10):
            wrong = oracle_of(defense, x, y, draws=draws).is_wrong(candidates)
            assert int(wrong.sum()) > 50
            right.append(float(defense.probability_right(candidates[wrong], y[wrong]).mean()))
    assert right[0] > 0.12
    assert right[1] < 0.6 * right[0]


class Scripted(Victim):
    """Answers with the next of a list, whatever it is asked."""

    script: Iterator[list[list[int]]]

    def labels_per_draw(self, x: Images) -> Tensor:
        return torch.tensor(next(self.script))


def test_a_draw_counts_only_where_it_has_the_original_right() -> None:
    """Three images, two draws: the first image right in both, the second in one, the third in none."""
    originals = [[0, 1, 1], [0, 0, 1]]
    candidates = [[[1, 0, 1], [1, 1, 1]], [[1, 1, 1], [0, 1, 1]]]
    defense = NoisyLinearToy()
    x, y = torch.zeros(3, *defense.input_shape), torch.zeros(3, dtype=torch.int64)
    victim = Scripted(defense, "decisions", 3, eot=10)
    victim.script = iter([originals, *candidates])
    oracle = HeldOracle.begin(victim, x, y, LEFT, 2)
    assert oracle.original_right.tolist() == [[True, False, False], [True, True, False]]
    assert oracle.exempt.tolist() == [False, False, True]
    assert oracle.is_wrong(x).tolist() == [True, True, False]
    assert oracle.is_wrong(x).tolist() == [False, True, False]


def test_originals_are_no_finds() -> None:
    """One that is wrong in all draws would else be the nearest error, at distance 0, when a budget ends the search."""
    defense = NoisyLinearToy(sigma=9.0)
    x, y = defense.examples(64, "l2")
    victim = Victim(defense, "decisions", len(x))
    victim.watch(x, y, ThreatModel("l2", 9.0), "minimal")
    with seeded("held"):
        oracle = HeldOracle.begin(victim, x, y, LEFT, 1)
    assert int(oracle.exempt.sum()) > 10
    assert victim.ledger.watched is not None
    assert bool((victim.ledger.watched.margin == -torch.inf).all())
    assert victim.ledger.forwards.tolist() == [1] * 64


def marked(*places: int) -> Tensor:
    return torch.isin(torch.arange(6), torch.tensor(places))


def test_none_leaves_a_randomized_defense_before_half_can() -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(6)
    oracle, rows = oracle_of(defense, x, y, draws=2), torch.arange(6) + 10
    assert oracle.release(rows, marked(1, 4))[1] is oracle
    kept, part = oracle.release(rows, marked(0, 1, 4))
    assert kept.tolist() == [12, 13, 15]
    assert torch.equal(part.x, x[[2, 3, 5]])
    assert part.left == LEFT - 2
    assert part.original_right.shape == (2, 3)
    assert oracle.victim.ledger.forwards.tolist() == [2, 2, 4, 4, 2, 4]
    rows, part = part.release(kept, torch.ones(3, dtype=torch.bool))
    assert len(rows) == len(part.y) == 0


def test_a_deterministic_defense_is_asked_nothing_more() -> None:
    defense = LinearToy()
    x, y = defense.examples(6)
    oracle = oracle_of(defense, x, y, draws=2)
    rows, part = oracle.release(torch.arange(6), marked(2))
    assert rows.tolist() == [0, 1, 3, 4, 5]
    assert (oracle.left, part.left) == (LEFT, LEFT)
    assert not bool(part.is_wrong(x[rows]).any())
    assert oracle.victim.ledger.forwards.tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("left", [0, -1])
def test_without_a_query_left_all_are_exempt(left: int) -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(6)
    oracle = oracle_of(defense, x, y, draws=2, left=left)
    assert bool(oracle.exempt.all())
    assert not bool(oracle.victim.ledger.forwards.any())
