"""Figures of detectors and of confidence: AUROC with its interval, expected calibration error, reliability table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from robench.errors import UsageError
from robench.estimate import Estimate
from robench.rng import seeded
from robench.stats import wilson
from robench.types import Labels

BINS = 15
BOOTSTRAP_DRAWS = 1000


def auroc(inside: Float[Tensor, " m"], outside: Float[Tensor, " n"]) -> Estimate:
    """The chance that an outlier is more suspicious than an inlier, ties counting half, with its 95 % interval.

    The variance is DeLong's (DeLong, DeLong, Clarke-Pearson 1988, Biometrics 44, 837-845). The interval is Wilson's at
    the number of independent answers with that variance, which stays in [0, 1]: no fewer than the smaller of the two
    samples, which also stands in where the variance is zero, and no more than the pairs.

    Args:
        inside: scores of images of the training distribution, higher is more suspicious.
        outside: scores of other images.

    Raises:
        UsageError: one is empty or not finite.
    """
    low, high = (part.detach().cpu().double().numpy() for part in (inside, outside))
    if not (len(low) and len(high) and np.isfinite(low).all() and np.isfinite(high).all()):
        raise UsageError(f"auroc takes two lists of finite scores, none empty; got {len(low)} and {len(high)} scores")
    ranks = rankdata(np.concatenate([low, high]))
    of_outside = (ranks[len(low) :] - rankdata(high)) / len(low)  # share of inliers below this outlier
    of_inside = 1 - (ranks[: len(low)] - rankdata(low)) / len(high)  # share of outliers above this inlier
    value = float(of_outside.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (of_outside, of_inside) if len(part) > 1)
    smallest = min(len(low), len(high))
    effective = value * (1 - value) / variance if variance > 0 else smallest
    effective = min(max(effective, smallest), len(low) * len(high))
    return Estimate(value, *wilson(value * effective, effective))


class ReliabilityBin(NamedTuple):
    """One bar of a reliability plot.

    Attributes:
        low: lower end of the bin's confidences, not part of it.
        high: upper end, part of it.
        images: how many are in it.
        confidence: their mean confidence; 0 where there are none.
        accuracy: the share that is right; 0 where there are none.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def reliability_table(probabilities: Float[Tensor, "b k"], y: Labels, bins: int = BINS) -> list[ReliabilityBin]:
    """Confidence beside accuracy in bins of equal width (Guo et al. 2017, arXiv 1706.04599, figure 1).

    Args:
        probabilities: of the classes; the largest is the confidence.
        y: labels.
        bins: how many.

    Raises:
        UsageError: rows that are no probabilities (logits, say), no images, or no bins.
    """
    confidence, right = _answers(probabilities, y, bins)
    return _bin(confidence, right, bins)


def expected_calibration_error(probabilities: Float[Tensor, "b k"], y: Labels, bins: int = BINS) -> float:
    """The mean gap of confidence and accuracy over the bins, weighted by their images (Guo et al. 2017, eq. 3).

    Args:
        probabilities: of the classes; the largest is the confidence.
        y: labels.
        bins: how many, of equal width.

    Raises:
        UsageError: see `reliability_table`.
    """
    return _error(*_answers(probabilities, y, bins), bins)


def calibration_interval(
    probabilities: Float[Tensor, "b k"], y: Labels, bins: int = BINS, draws: int = BOOTSTRAP_DRAWS
) -> Estimate:
    """`expected_calibration_error` with its basic bootstrap interval, 95 %; the draws are the same on every call.

    The error is biased upwards in small samples, the more so of resampled ones; the basic interval (twice the estimate
    less the quantiles) takes the second bias off, not the first. One image says nothing: the interval is [0, 1].

    Raises:
        UsageError: see `reliability_table`.
    """
    confidence, right = _answers(probabilities, y, bins)
    value = _error(confidence, right, bins)
    if len(right) == 1:
        return Estimate(value, 0.0, 1.0)
    with seeded("calibration", len(right)):
        rows = torch.randint(len(right), (draws, len(right))).numpy()
    resampled = np.array([_error(confidence[row], right[row], bins) for row in rows])
    low, high = (2 * value - float(np.quantile(resampled, part)) for part in (0.975, 0.025))
    return Estimate(value, min(max(low, 0.0), value), max(high, value))


def _answers(probabilities: Tensor, y: Labels, bins: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    rows = probabilities.detach().cpu().double()
    if not (len(rows) and bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all())):
        raise UsageError("calibration takes probabilities, rows that sum to 1; of logits take the softmax first")
    if bins < 1:
        raise UsageError(f"calibration takes at least one bin; got {bins}")
    confidence, answer = rows.max(1)
    return confidence.numpy(), (answer == y.cpu()).double().numpy()


def _bin(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.float64], bins: int) -> list[ReliabilityBin]:
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.maximum(count, 1)
    means = [np.bincount(place, weights=part, minlength=bins) / filled for part in (confidence, right)]
    return [
        ReliabilityBin(i / bins, (i + 1) / bins, int(count[i]), float(means[0][i]), float(means[1][i]))
        for i in range(bins)
    ]


def _error(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.float64], bins: int) -> float:
    table = _bin(confidence, right, bins)
    return sum(row.images * abs(row.confidence - row.accuracy) for row in table) / len(right)
