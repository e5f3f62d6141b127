"""The null control: a defense that errs with probability q whatever the image has an accuracy of 1 - q."""

from __future__ import annotations

import pytest
import torch

import robench
from robench.result import Estimate
from robench.testing import LinearToy, NoisyLinearToy, NullDefense
from robench.threat import ThreatModel

SEEDS = range(8)
N = 250
Q = (0.02, 0.05, 0.1)


def covers(estimate: Estimate | None, truth: float) -> bool:
    assert estimate is not None
    return estimate.low <= truth <= estimate.high


def evaluate_null(q: float, attacks: str, seed: int) -> robench.Evaluation:
    x, _ = LinearToy().examples(N)
    data = (x, torch.zeros(N, dtype=torch.int64))
    return robench.evaluate(
        NullDefense(q), attacks, ThreatModel("linf", 0.1), data, seed=seed, eot=2, judge_repeats=20, device="cpu"
    )


@pytest.mark.parametrize("attacks", ["pgd(steps=2)", "quick"])
@pytest.mark.parametrize("q", Q)
def test_robust_accuracy_of_the_null_defense_is_its_clean_accuracy(q: float, attacks: str) -> None:
    """Not lower, also where each image's worst of several attacks is chosen: that is judged on fresh draws."""
    found = [evaluate_null(q, attacks, seed) for seed in SEEDS]
    assert sum(not covers(result.robust_accuracy, 1 - q) for result in found) <= 1
    assert sum(not covers(result.clean_accuracy, 1 - q) for result in found) <= 1
    clean = sum(result.clean_accuracy.value for result in found) / len(SEEDS)
    robust = sum(estimate.value for result in found if (estimate := result.robust_accuracy)) / len(SEEDS)
    deviation = (q * (1 - q) / (len(SEEDS) * N * 20)) ** 0.5
    assert robust == pytest.approx(1 - q, abs=4 * deviation)
    assert clean == pytest.approx(1 - q, abs=4 * deviation)
    widths = [result.clean_accuracy.high - result.clean_accuracy.low for result in found]
    assert max(widths) < 0.05, "an interval that covers all says nothing"


def test_worst_of_several_is_biased_without_fresh_draws() -> None:
    """What the test above would see if the worst case were reported on the draws that chose it."""
    found = [evaluate_null(0.1, "quick", seed) for seed in SEEDS]
    lowest = [
        result.table[result.table["attack"].isin(result.per_attack)].groupby("index")["accuracy"].min().mean()
        for result in found
    ]
    assert sum(covers(result.robust_accuracy, low) for result, low in zip(found, lowest, strict=True)) <= 1
    assert max(lowest) < 0.88


@pytest.mark.parametrize("sigma", [1.2, 3.0])
def test_clean_accuracy_of_noisy_logits_is_the_closed_form(sigma: float) -> None:
    defense = NoisyLinearToy(sigma=sigma)
    x, y = defense.examples(N)
    truth = defense.probability_right(x, y).mean().item()
    assert 0.5 < truth < 0.99
    found = [
        robench.evaluate(defense, "fgsm", ThreatModel("linf", 0.0), (x, y), seed=seed, eot=1, device="cpu")
        for seed in SEEDS
    ]
    assert sum(not covers(result.clean_accuracy, truth) for result in found) <= 1
    assert sum(not covers(result.robust_accuracy, truth) for result in found) <= 1  # eps = 0: the same images
