"""The null control: a defense that errs with probability q whatever the image has an accuracy of 1 - q."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

import robench
from robench.attack import Attack
from robench.estimate import Estimate
from robench.lineup import plan_attacks
from robench.protocol import PROTOCOLS
from robench.registry import load_attack
from robench.testing import LinearToy, NoisyLinearToy, NullDefense
from robench.threat import ThreatModel

SEEDS = range(8)
N = 250
Q = (0.02, 0.05, 0.1)


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    """Without the type checks of the tests, which cost more than the toys."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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


def shrink(attack: Attack) -> Attack:
    """The same attack with fewer steps, restarts, targets and queries: the judge is as it is after the full search."""
    limits = {"steps": 3, "restarts": 2, "targets": 2, "queries": 20, "tries": 5, "binary_search_steps": 2}
    fields = {field.name for field in dataclasses.fields(attack)} & set(limits)
    return dataclasses.replace(attack, **{name: min(getattr(attack, name), limits[name]) for name in fields})


@pytest.fixture
def short_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every protocol with all its attacks, each of them shortened."""
    short = {}
    for name, protocol in PROTOCOLS.items():
        lists = {
            norm: tuple(shrink(load_attack(spec)).spec() for spec in protocol.attacks[norm])
            for norm in protocol.attacks
        }
        short[name] = dataclasses.replace(protocol, attacks=lists)
    monkeypatch.setattr("robench.protocol.PROTOCOLS", short)


def protocols_and_norms() -> list[Any]:
    """All pairs; those beyond linf are slow together."""
    return [
        pytest.param(name, norm, marks=[] if norm == "linf" else pytest.mark.slow)
        for name, protocol in PROTOCOLS.items()
        for norm in protocol.attacks
    ]


@pytest.mark.usefixtures("short_protocols", "as_users_have_it")
@pytest.mark.parametrize(("protocol", "norm"), protocols_and_norms())
def test_no_protocol_scores_by_luck(protocol: str, norm: str) -> None:
    """20 seeds: the 95 % interval may miss 1 - q now and then (four times or more: 1.6 %), and not to one side."""
    q, n, seeds = 0.1, 100, range(20)
    data = LinearToy().examples(n)[0], torch.zeros(n, dtype=torch.int64)
    threat = ThreatModel(norm, 2.0 if norm == "l0" else 0.1)
    entries, _ = plan_attacks(protocol, NullDefense(q), norm, "")
    found = []
    for seed in seeds:
        result = robench.evaluate(
            NullDefense(q), protocol, threat, data, seed=seed, eot=1, judge_repeats=20, device="cpu"
        )
        assert (list(result.spec.attacks), result.complete) == (entries, True)
        assert result.robust_accuracy is not None
        found.append(result.robust_accuracy)
    assert sum(not covers(estimate, 1 - q) for estimate in found) <= 3
    deviation = (q * (1 - q) / (len(seeds) * n * 20)) ** 0.5
    assert sum(estimate.value for estimate in found) / len(seeds) == pytest.approx(1 - q, abs=4 * deviation)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_full_protocol_scores_by_luck(protocol: str) -> None:
    """With every query that it makes, at few images."""
    q, n, seeds = 0.1, 40, range(3)
    data = LinearToy().examples(n)[0], torch.zeros(n, dtype=torch.int64)
    for seed in seeds:
        result = robench.evaluate(
            NullDefense(q), protocol, ThreatModel("linf", 0.1), data, seed=seed, eot=1, judge_repeats=100, device="cpu"
        )
        assert result.complete
        assert covers(result.robust_accuracy, 1 - q)


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
