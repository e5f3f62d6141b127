"""Noise: weak by design, and it spends its queries where they can still change something."""

from __future__ import annotations

import pytest
import torch

from robench.attacks.noise import Noise
from robench.defense import Defense
from robench.errors import UsageError
from robench.rng import seeded
from robench.testing import LinearToy, NoisyLinearToy
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Labels, Logits
from robench.victim import Victim


class Flaky(Defense):
    """Always wrong on images brighter than 0.54 in the mean, and three times in ten on all others: class 1 for 0."""

    name = "flaky"
    randomized = True
    num_classes = 2
    input_shape = (1, 4, 4)

    def forward(self, x: Images) -> Logits:
        wrong = self.is_lost(x) | (torch.rand(len(x)) < 0.3)
        return torch.stack([~wrong, wrong], dim=1).float()

    @staticmethod
    def is_lost(x: Images) -> torch.Tensor:
        return x.flatten(1).mean(1) > 0.54


def attack(defense: Defense, x: Images, y: Labels, threat: ThreatModel, *, tries: int = 100) -> tuple[Images, Victim]:
    victim = Victim(defense, "decisions", len(x), eot=3)
    with seeded("noise"):
        return Noise(tries=tries)(victim, x, y, threat), victim


def test_no_try_is_refused() -> None:
    with pytest.raises(UsageError, match="tries must be at least 1; got 0"):
        Noise(tries=0)


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_costs_nothing_more_once_it_is_wrong(norm: str) -> None:
    defense = LinearToy()
    x, y = defense.examples(6, norm)
    y[:3] = (defense(x[:3]).argmax(1) + 1) % 4  # wrong as they are, and so under little noise
    x_adv, victim = attack(defense, x, y, ThreatModel(norm, 1.0 if norm == "l0" else 0.01), tries=7)
    assert victim.ledger.forwards.tolist() == [1, 1, 1, 7, 7, 7]
    assert bool((x_adv != x).flatten(1).any(1).all()), "an image that stays right keeps the last draw, not the original"


def test_the_image_returned_is_the_wrong_one() -> None:
    defense = LinearToy()
    x, y = defense.examples(12)
    x_adv, victim = attack(defense, x, y, ThreatModel("linf", 0.1), tries=30)
    wrong = defense(x_adv).argmax(1) != y
    left_early = victim.ledger.forwards < 30
    assert 0 < int(left_early.sum()) < 12
    assert bool((wrong | ~left_early).all())


def test_a_randomized_defense_lets_no_image_leave() -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(4)
    _, victim = attack(defense, x, y, ThreatModel("linf", 1.0), tries=5)
    assert victim.ledger.forwards.tolist() == [3 * 5] * 4


def test_a_lucky_error_does_not_stand_against_a_lasting_one() -> None:
    """One draw in twelve is always wrong; to keep the first that is wrong would find it for three in ten images."""
    x, y = torch.full((50, 1, 4, 4), 0.5), torch.zeros(50, dtype=torch.int64)
    x_adv, _ = attack(Flaky(), x, y, ThreatModel("linf", 0.2))
    assert int(Flaky.is_lost(x_adv).sum()) >= 45
