"""AUROC and calibration against cases worked out by hand; intervals against simulated data with a known truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from robench import UsageError
from robench.detection import auroc, calibration_interval, expected_calibration_error, reliability_table
from robench.rng import seeded
from robench.stats import wilson


def two_classes(confidence: list[float]) -> Tensor:
    """Rows that answer class 0 with the given confidence."""
    first = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1)


# AUROC


def test_auroc_by_hand() -> None:
    """Of the six pairs of (1, 2, 3) and (2, 4) four and a half are in order; DeLong's variance is 1/16 + 1/48."""
    found = auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0]))
    assert found.value == pytest.approx(4.5 / 6)
    effective = 0.75 * 0.25 / (1 / 16 + 1 / 48)
    assert (found.low, found.high) == pytest.approx(wilson(0.75 * effective, effective))


@pytest.mark.parametrize(("inside", "outside", "value"), [([0.0, 1], [2.0, 3], 1.0), ([2.0, 3], [0.0, 1], 0.0)])
def test_auroc_of_what_is_told_apart(inside: list[float], outside: list[float], value: float) -> None:
    """The variance is 0, but four images say little: the interval is that of the smaller sample."""
    found = auroc(torch.tensor(inside), torch.tensor(outside))
    assert found.value == value
    assert (found.low, found.high) == pytest.approx(wilson(2 * value, 2))


def test_auroc_of_equal_scores_is_one_half() -> None:
    found = auroc(torch.zeros(5), torch.zeros(7))
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.3
    assert found.high > 0.7


def test_auroc_of_the_two_the_other_way_round() -> None:
    with seeded("auroc"):
        inside, outside = torch.randn(40), 0.5 + torch.randn(30)
    assert auroc(inside, outside).value == pytest.approx(1 - auroc(outside, inside).value)


def test_auroc_interval_covers_the_truth() -> None:
    """Normal scores one deviation apart: the truth is Phi(1 / sqrt 2) = 0.760."""
    truth = float(norm.cdf(0.5**0.5))
    held, widths = 0, 0.0
    for number in range(400):
        with seeded("auroc", number):
            found = auroc(torch.randn(60), 1 + torch.randn(80))
        held += found.low <= truth <= found.high
        widths += (found.high - found.low) / 400
    assert 0.92 <= held / 400 <= 0.985
    assert widths < 0.2


@pytest.mark.parametrize(
    ("inside", "outside"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0]), ([1.0], [float("inf")])]
)
def test_auroc_refuses_what_cannot_be_ranked(inside: list[float], outside: list[float]) -> None:
    with pytest.raises(UsageError, match=r"^auroc takes two lists of finite scores, none empty; got \d and \d scores$"):
        auroc(torch.tensor(inside), torch.tensor(outside))


# calibration


def test_calibration_by_hand() -> None:
    """Bins of a fifth: (0.8, 1] has confidence 0.9 and accuracy 1/2, (0.6, 0.8] confidence 0.7 and accuracy 1."""
    probabilities, y = two_classes([0.95, 0.85, 0.7]), torch.tensor([0, 1, 0])
    table = reliability_table(probabilities, y, bins=5)
    assert [row.images for row in table] == [0, 0, 0, 1, 2]
    assert [(row.low, row.high) for row in table] == [(i / 5, (i + 1) / 5) for i in range(5)]
    assert [row.confidence for row in table] == pytest.approx([0, 0, 0, 0.7, 0.9])
    assert [row.accuracy for row in table] == [0, 0, 0, 1, 0.5]
    assert expected_calibration_error(probabilities, y, bins=5) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.3)


def test_one_bin_is_confidence_less_accuracy() -> None:
    probabilities, y = two_classes([0.95, 0.85, 0.7]), torch.tensor([0, 1, 0])
    assert expected_calibration_error(probabilities, y, bins=1) == pytest.approx(2.5 / 3 - 2 / 3)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    table = reliability_table(two_classes([1.0, 1.0]), torch.tensor([0, 0]))
    assert [row.images for row in table] == [0] * 14 + [2]
    assert expected_calibration_error(two_classes([1.0, 1.0]), torch.tensor([0, 0])) == 0
    assert expected_calibration_error(two_classes([1.0, 1.0]), torch.tensor([1, 1])) == 1


def test_calibrated_answers_have_a_small_error() -> None:
    """Labels drawn with the probability that is claimed; the same confidence made larger is an error of that much."""
    with seeded("calibrated"):
        confidence = 0.5 + 0.4 * torch.rand(20_000, dtype=torch.float64)
        y = (torch.rand(20_000) > confidence).long()
    assert expected_calibration_error(two_classes(confidence.tolist()), y) < 0.02
    boasting = two_classes((confidence + 0.1).tolist())
    assert expected_calibration_error(boasting, y) == pytest.approx(0.1, abs=0.01)


def test_calibration_interval_covers_the_truth() -> None:
    """Confidence 0.9 and accuracy 0.7 throughout: the error is 0.2, and its estimate has no bias."""
    held = 0
    for number in range(150):
        with seeded("interval", number):
            y = (torch.rand(120) > 0.7).long()
        found = calibration_interval(two_classes([0.9] * 120), y, draws=200)
        assert found.low <= found.value <= found.high
        held += found.low <= 0.2 <= found.high
    assert 0.89 <= held / 150 <= 0.99


def test_one_image_says_nothing_of_calibration() -> None:
    found = calibration_interval(two_classes([0.9]), torch.tensor([0]))
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == (0.0, 1.0)


def test_calibration_interval_is_the_same_on_every_call() -> None:
    """And leaves torch's generator where it was."""
    probabilities, y = two_classes([0.9, 0.8, 0.7] * 10), torch.tensor([0, 0, 1] * 10)
    before = torch.get_rng_state()
    assert calibration_interval(probabilities, y, draws=50) == calibration_interval(probabilities, y, draws=50)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("figure", [reliability_table, expected_calibration_error, calibration_interval])
@pytest.mark.parametrize(
    "rows", [[[2.0, -1.0]], [[0.7, 0.7]], [[float("nan"), 0.5]]], ids=["logits", "no sum of 1", "NaN"]
)
def test_calibration_refuses_what_is_no_probability(figure: Callable[..., Any], rows: list[list[float]]) -> None:
    with pytest.raises(UsageError, match=r"^calibration takes probabilities, rows that sum to 1; of logits .*softmax"):
        figure(torch.tensor(rows), torch.tensor([0]))


def test_calibration_refuses_no_bins() -> None:
    with pytest.raises(UsageError, match=r"^calibration takes at least one bin; got 0$"):
        reliability_table(two_classes([0.9]), torch.tensor([0]), bins=0)
