"""Confidence intervals for accuracies. All are 95 % unless another level is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, binom, chi2, norm, t


def wilson(right: float, n: float, level: float = 0.95, quantile: float | None = None) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): sound also at 0 and at n of n.

    Args:
        right: successes; may be fractional when `n` is an effective sample size.
        n: trials.
        level: two-sided confidence.
        quantile: the quantile to use instead of the normal one (for small samples, Student's).
    """
    if n <= 0:
        return 0.0, 1.0
    z = quantile if quantile is not None else float(norm.ppf((1 + level) / 2))
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(p * (1 - p), 0) / n + z * z / (4 * n * n))
    low = 0.0 if p == 0 else max(centre - half, 0.0)
    return low, 1.0 if p == 1 else min(centre + half, 1.0)


def mean_interval(fractions: npt.NDArray[np.float64], repeats: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of per-example accuracies, each the fraction of `repeats` draws that were right.

    Wilson's interval at an effective sample size: that of independent answers with the same variance of the mean as
    the examples show. It lies between the number of examples (an example is either always or never right) and
    examples times repeats (all examples are alike and only the draws vary). With one repeat it is Wilson's interval.
    Where all answers agree the variance says nothing, and the number of examples is used, the conservative end.
    Student's quantile makes up for the variance being estimated, and one example that is always right and one that
    never is, added to those of which the variance is taken, for rare kinds of examples that the sample happens to lack:
    without them 64 examples of which 1 % are never right would be covered in half of all samples only.
    """
    n = len(fractions)
    if n == 0:
        return 0.0, 1.0
    p = float(fractions.mean())
    if repeats == 1 or n == 1 or p in (0.0, 1.0):
        return wilson(p * n, n, level)
    padded = np.append(fractions, (0.0, 1.0))
    centre, variance = float(padded.mean()), float(padded.var(ddof=1)) / (n + 2)
    effective = min(max(centre * (1 - centre) / variance, n), n * repeats)
    return wilson(p * effective, effective, level, quantile=float(t.ppf((1 + level) / 2, n - 1)))


@dataclass(frozen=True)
class SharedNoise:
    """By how much the right answers of one pass scatter more than independent ones.

    Some defenses draw once for a whole batch, one of several nets for example; then the images of a pass are right or
    wrong together.

    Attributes:
        total: the variance of the sum of the right answers, as a multiple of that of independent ones; at least 1.
        each: how many images say together what one independent image would: their number over the effective rank
            (trace C)^2 / trace C^2 of the correlations C of their answers; at least 1.
    """

    total: float = 1.0
    each: float = 1.0


INDEPENDENT: Final = SharedNoise()


def shared_noise(passes: Sequence[npt.NDArray[np.bool_]]) -> SharedNoise:
    """What the images of a pass share, measured; `INDEPENDENT` unless their correlations are beyond chance (5 sigma).

    Args:
        passes: for each batch of images, whether each answer was right: `repeats b`, several repeats.
    """
    seen = alone = count = excess = chance = 0.0
    for right in passes:
        repeats = len(right)
        gaps = right[:, right.any(0) & ~right.all(0)].astype(float)
        images = gaps.shape[1]
        if repeats < 3 or images < 2:
            continue
        gaps -= gaps.mean(0)
        variances = gaps.var(0, ddof=1)
        seen += float(gaps.sum(1).var(ddof=1))
        alone += float(variances.sum())
        gram = gaps / variances**0.5 @ (gaps / variances**0.5).T / (repeats - 1)
        squares = float((gram**2).sum())  # of the correlations of all pairs, each image with itself included
        excess += (
            squares - images - images * (images - 1) / (repeats - 1)
        )  # chance alone gives a pair 1 / (repeats - 1)
        chance += 2 * images**2 / (repeats - 1) ** 2
        count += images
    if excess <= 5 * math.sqrt(chance):
        return INDEPENDENT
    return SharedNoise(max(seen / alone, 1.0), 1 + excess / count)


def answers_differ(
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    tries: int,
    again: int,
    level: float = 0.001,
    noise: SharedNoise = INDEPENDENT,
) -> bool:
    """True if right answers of the same examples, counted twice, cannot come from the same chances of being right.

    Given how many of an example's answers were right in both counts together, the first count is hypergeometric, which
    gives the gap of the two shares its exact variance; so nothing in the counts can widen the noise that is allowed.
    Two things are asked: whether the sum of the gaps is beyond noise (normal, two-sided at `level`), and whether the
    gaps of single examples are, by the sum of their squares over their variances. Its expectation is the number of
    examples that are not always right or never; half as much again is allowed beyond chance, for images that rounding
    has moved a little.

    Args:
        first: right answers of each example, of `tries`.
        second: the same of `again` fresh ones.
        tries: answers behind the first counts.
        again: answers behind the second.
        level: two-sided.
        noise: what the examples share.
    """
    total = tries + again
    pooled = (first + second) / total
    gaps = second / again - first / tries
    variances = pooled * (1 - pooled) * (1 / tries + 1 / again) * total / max(total - 1, 1)
    open_ones = variances > 0  # elsewhere both counts are all or nothing alike, and the gap is 0
    count = int(open_ones.sum())
    if count == 0:
        return False
    quantile = float(norm.ppf(1 - level / 2))
    if abs(float(gaps.sum())) > quantile * math.sqrt(noise.total * float(variances.sum())):
        return True
    scatter = float((gaps[open_ones] ** 2 / variances[open_ones]).sum())
    return scatter > 1.5 * noise.each * float(chi2.ppf(1 - level, count / noise.each))


def majorities_differ(
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    level: float = 0.001,
    noise: SharedNoise = INDEPENDENT,
    splits: int = 4000,
) -> bool:
    """True if the votes of the same examples, taken twice, cannot give majorities so different by chance.

    Given both counts together, any share of the answers may have been the first (multivariate hypergeometric), so that
    the gap between the numbers of examples whose majority is right has a known distribution. It is sampled.

    Args:
        first: votes for each class: `examples classes`; as many answers for each example.
        second: the same of fresh answers.
        labels: the right class of each example.
        level: two-sided.
        noise: what the examples share.
        splits: of the sample. 1,000 examples take a second.
    """
    pooled = first + second
    answers = int(first[0].sum())
    random = np.random.default_rng(0)
    gaps = np.zeros(splits)
    for votes, label in zip(pooled, labels, strict=True):
        if (votes > 0).sum() > 1:
            split = random.multivariate_hypergeometric(votes, answers, splits)
            gaps += majority_right(split, label) * 1.0 - majority_right(votes - split, label)
    gap = majority_right(first, labels).sum() - majority_right(second, labels).sum()
    bound = np.quantile(np.abs(gaps), 1 - level, method="higher")
    return bool(abs(gap) > math.sqrt(max(noise.total, noise.each)) * bound)


def majority_right(votes: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | np.int64) -> npt.NDArray[np.bool_]:
    """Whether the right class has more votes than any other; a tie counts as wrong.

    Args:
        votes: for each class: `examples classes`.
        labels: the right class of each example, or of all.
    """
    places = np.arange(len(votes))
    others = votes.copy()
    others[places, labels] = -1
    right: npt.NDArray[np.bool_] = votes[places, labels] > others.max(1)
    return right


def most_by_chance(n: int, rate: float, level: float = 0.001) -> int:
    """How many of n independent trials chance explains at a rate: more come with a probability of at most `level`."""
    return int(binom.isf(level, n, rate))


def smallest_shown(n: int, most: int, power: float = 0.9) -> float:
    """The rate at which more than `most` of n trials come with the probability `power`; 1 where `most` is n."""
    return float(beta.ppf(power, most + 1, n - most)) if most < n else 1.0


def paired_interval(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of second minus first over the same examples, and the ends of its interval (Student's t).

    Of fewer than two examples, whose scatter is not known, the interval is all that accuracies can differ by: -1 to 1.
    """
    gaps = second - first
    mean = float(gaps.mean()) if len(gaps) else 0.0
    if len(gaps) < 2:
        return mean, -1.0, 1.0
    half = float(t.ppf((1 + level) / 2, len(gaps) - 1)) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class PairedTest:
    """How much larger one accuracy is than another on the same examples; see `paired_test`.

    Attributes:
        mean: the mean difference, first minus second, in [-1, 1].
        low: lower end of its 95 % interval.
        high: upper end.
        p: the two-sided level of the test.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_test(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], level: float = 0.95) -> PairedTest:
    """Tests whether two accuracies on the same examples differ; the interval holds 0 just where the test sees nothing.

    Where every example is right or wrong in both: McNemar's exact test of those that differ. Its interval is the wider
    of two at either end: Clopper and Pearson's of the share of these that the first has right, which is the test turned
    about but takes their number for given, and Student's with one pair added in either direction. If none differs, it
    reaches to the share of which none would be seen. Where examples have shares of right answers: Student's paired
    test, which is not exact. One example tells nothing.

    Args:
        first: a value in [0, 1] for each example.
        second: the same of the other accuracy.
        level: two-sided confidence.
    """
    gaps = first - second
    n, mean = len(gaps), float(gaps.mean()) if len(gaps) else 0.0
    if n < 2:
        return PairedTest(mean, -1.0, 1.0, 1.0)
    is_share = not np.isin(gaps, (-1.0, 0.0, 1.0)).all()
    spread = gaps if is_share and gaps.std() > 0 else np.concatenate([gaps, (-1.0, 1.0)])
    error = float(spread.std(ddof=1)) / math.sqrt(len(spread))
    half = float(t.ppf((1 + level) / 2, n - 1)) * error
    if is_share:
        p = 2 * float(t.sf(abs(mean) / error, n - 1))
        return PairedTest(mean, max(mean - half, -1.0), min(mean + half, 1.0), p)
    differ, ahead, tail = int(np.count_nonzero(gaps)), int((gaps > 0).sum()), (1 - level) / 2
    behind = differ - ahead
    p = min(1.0, 2 * float(binom.cdf(min(ahead, behind), differ, 0.5)))
    low = (2 * float(beta.ppf(tail, ahead, behind + 1)) - 1) * differ / n if ahead else -differ / n
    high = (2 * float(beta.ppf(1 - tail, ahead + 1, behind)) - 1) * differ / n if behind else differ / n
    half = half if differ else max(half, 1 - tail ** (1 / n))
    return PairedTest(mean, max(min(low, mean - half), -1.0), min(max(high, mean + half), 1.0), p)
