"""When a difference between two runs on the same images is more than noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, t

from robench.check_names import Verdict
from robench.stats import paired_test, wilson

LEVEL: Final = 0.005
"""A check fails only at this one-sided level: with about 15 checks a sound defense fails by chance once in 14 audits
if every null hypothesis held with equality, and the tolerance below makes it rarer."""
HINT: Final = 0.05
"""The level from which a check is suspect."""


@dataclass(frozen=True)
class Gap:
    """How much larger one quantity is than another on the same images.

    Attributes:
        mean: the mean difference.
        low: lower end of its 95 % interval.
        high: upper end.
        p: the one-sided level at which the difference is above 0.
        n: images.
        error: the standard error behind `p` where Student's test was used; None where it was McNemar's.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    error: float | None

    def verdict(self, tolerance: float) -> Verdict:
        """`fail`: at least the tolerance and above 0 at `LEVEL`; `suspect`: half of it and `HINT`."""
        if self.mean >= tolerance and self.p <= LEVEL:
            return "fail"
        return "suspect" if self.mean >= tolerance / 2 and self.p <= HINT else "pass"

    def power(self, tolerance: float) -> str:
        """What gap so few images could not tell, and how many would tell the tolerance; "" if these do.

        Of McNemar's test where all images that differ do so in one direction, of Student's by the variance of these.
        """
        if self.error is None:
            needed = math.ceil(math.log(LEVEL) / math.log(0.5))  # images that must differ, all in one direction
            smallest, order = needed / self.n, 1
        else:
            smallest, order = float(t.isf(LEVEL, max(self.n - 1, 1))) * self.error, 2
        if smallest <= tolerance:
            return ""
        enough = math.ceil(round(self.n * (smallest / tolerance) ** order, 6))
        return (
            f"; {self.n} images cannot tell a gap under {100 * smallest:.0f} points, "
            f"{enough} would tell {100 * tolerance:.0f}"
        )

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} points [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def compare(larger: npt.NDArray[np.float64], smaller: npt.NDArray[np.float64]) -> Gap:
    """Tests whether `larger` exceeds `smaller` on the same images, one value in [0, 1] for each.

    Where all values are 0 or 1 the exact McNemar test of the images that differ, else Student's paired test, one-sided;
    the interval is that of `paired_test`.
    """
    p, error = _test(larger - smaller)
    found = paired_test(larger, smaller)
    return Gap(found.mean, found.low, found.high, p, len(larger), error)


def compare_both_ways(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> Gap:
    """As `compare`, in the direction in which they differ, unnamed before: the level is that of two sides."""
    gap = max(compare(one, other), compare(other, one), key=lambda gap: gap.mean)
    return replace(gap, p=min(2 * gap.p, 1.0))


def _test(gaps: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """The one-sided level, and the standard error of Student's test; None where the test is McNemar's."""
    n, up, down = len(gaps), int((gaps > 0).sum()), int((gaps < 0).sum())
    if up + down == 0:
        return 1.0, None
    if np.isin(gaps, (-1.0, 0.0, 1.0)).all():
        return float(binomtest(up, up + down, 0.5, alternative="greater").pvalue), None
    error = float(gaps.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if error == 0:
        return (0.0 if gaps.mean() > 0 else 1.0), error
    return float(t.sf(float(gaps.mean()) / error, n - 1)), error


def share_interval(hits: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """The share of true values with its 95 % interval (Wilson)."""
    count = int(hits.sum())
    return (count / len(hits), *wilson(count, len(hits))) if len(hits) else (0.0, 0.0, 1.0)
