"""The time left is that of the work that is needed: less than planned where images go wrong before an attack's end."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from engine_toys import Linear, Noisy, grid_images

from robench import Defense, ThreatModel, evaluate
from robench.attacks.fgsm import FGSM
from robench.attacks.pgd import PGD
from robench.progress import Progress
from robench.types import Images, Labels
from robench.victim import Victim


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that Progress sees; the test moves it."""
    now = [0.0]
    monkeypatch.setattr("robench.progress.time.monotonic", lambda: now[0])
    return now


def test_what_was_not_begun_needs_the_same_share_as_what_was(clock: list[float]) -> None:
    """100 of 1,000 steps took 10 s; of 500 begun 300 are spared, so 400 are needed in all: 300 more, 0.1 s each."""
    progress = Progress("toy", {"attack": 1000}, enabled=False)
    progress.begin(500, "attack")
    clock[0] = 10.0
    progress.advance(100)
    assert progress.left() == pytest.approx(90.0)
    progress.spare(300, "attack")
    assert progress.left() == pytest.approx(30.0)


def test_time_left_is_never_negative(clock: list[float]) -> None:
    progress = Progress("toy", {"attack": 100}, enabled=False)
    progress.begin(100, "attack")
    clock[0] = 5.0
    progress.advance(80)
    progress.spare(60, "attack")
    assert progress.left() == 0


@dataclass(frozen=True)
class Failing(PGD):
    """PGD that gives up at its end."""

    name: ClassVar[str] = "failing"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        super().__call__(victim, x, y, threat)
        raise RuntimeError("given up")


HERE = f"{Path(__file__)}:Failing"


def hear(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The passes that runs tell of from here on, by kind."""
    told: Counter[str] = Counter()
    monkeypatch.setattr(
        sys.modules["robench.evaluate"], "_hear", lambda _progress, passes, kind: told.update({kind: passes})
    )
    return told


@pytest.mark.parametrize("cascade", [True, False], ids=["cascade", "side_by_side"])
@pytest.mark.parametrize(
    ("defense", "attacks"),
    [
        (Linear(), "fgsm,pgd(steps=5),square(queries=30)"),
        (Noisy(), "fgsm,pgd(steps=5)"),
        (Linear(), "fmn(steps=8),pgd(steps=5)"),
        (Linear(), f"{HERE},pgd(steps=5)"),
    ],
    ids=["deterministic", "randomized", "minimal", "failing"],
)
def test_units_tell_what_was_begun_and_what_of_it_was_not_needed(
    defense: Defense, attacks: str, cascade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = hear(monkeypatch)
    x = torch.rand(12, *defense.input_shape, generator=torch.Generator().manual_seed(0))
    y = defense(x).argmax(1)
    bounds = [ThreatModel("linf", eps) for eps in (0.02, 0.1)]
    evaluate(defense, attacks, bounds, (x, y), unit_size=6, eot=2, cascade=cascade)
    assert told["begun"] - told["spared"] == told["attack"] > 0


def test_the_one_search_of_a_minimal_norm_attack_is_expected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left of a search for three bounds had been three times too long."""
    told = hear(monkeypatch)
    bounds = [ThreatModel("linf", eps) for eps in (0.02, 0.1, 0.3)]
    evaluate(Noisy(), "hopskipjump(queries=50),fgsm", bounds, grid_images(6), eot=2, judge_repeats=20)
    assert told["begun"] == 6 * 2 * (50 + 3 * FGSM().passes())


@pytest.mark.parametrize(("norm", "passes"), [("l0", 50 * 10), ("l2", 9 * 10 + 41 * 2)])
def test_as_many_draws_are_expected_as_the_attack_takes_in_the_norm(
    norm: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = hear(monkeypatch)
    evaluate(Noisy(), "pointwise(max_queries=50)", ThreatModel(norm, 3), grid_images(6), eot=10, judge_repeats=20)
    assert told["begun"] == 6 * passes
