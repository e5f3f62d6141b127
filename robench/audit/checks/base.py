"""What a check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robench.audit.evidence import Evidence
from robench.audit.finding import Curve, Plot
from robench.audit.statistics import compare, share_interval
from robench.check_names import QUESTIONS, Verdict
from robench.estimate import Estimate


@dataclass(frozen=True)
class Outcome:
    """What a check found; see `Finding` for the fields."""

    verdict: Verdict
    statistic: float | None
    threshold: float | None
    reason: str
    plot: Plot | None = None


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: as in `--checks` and the leaderboard.
        paper: where it comes from.
        judge: from the evidence to the outcome.
        runs: the runs that it needs.
        only: `randomized` or `deterministic` where it makes sense for such a defense only.
    """

    name: str
    paper: str
    judge: Callable[[Evidence], Outcome]
    runs: tuple[str, ...] = ()
    only: str = ""

    @property
    def question(self) -> str:
        """What it asks, one line."""
        return QUESTIONS[self.name]


def not_run(reason: str) -> Outcome:
    """The outcome of a check that could not be made."""
    return Outcome("not run", None, None, reason)


def compare_runs(evidence: Evidence, larger: str, smaller: str, tolerance: float, reason: str) -> Outcome:
    """The outcome of a paired test whether more images are right after the run `larger` than after `smaller`.

    Args:
        evidence: has the runs.
        larger: the run after which, where something is wrong, more is right.
        smaller: the other one.
        tolerance: the gap from which the check fails, where it is beyond noise.
        reason: the sentence, with `{gap}` for the gap.
    """
    first, second = evidence.right(larger), evidence.right(smaller)
    if first is None or second is None:
        return not_run("an attack failed")
    gap = compare(first, second)
    return Outcome(gap.verdict(tolerance), gap.mean, tolerance, reason.format(gap=gap) + gap.power(tolerance))


def graded(value: float, suspect: float, fail: float, *, high_is_bad: bool = True) -> Verdict:
    """The verdict on a statistic by its two thresholds."""
    sign = 1 if high_is_bad else -1
    if sign * value >= sign * fail:
        return "fail"
    return "suspect" if sign * value >= sign * suspect else "pass"


def graded_share(
    hits: npt.NDArray[np.bool_], suspect: float, fail: float, *, high_is_bad: bool = True
) -> tuple[float, Verdict]:
    """The share of images that are hits, and the verdict on it.

    As `graded`, but what fails is suspect only where the share's 95 % interval (Wilson) holds the suspect threshold.
    """
    share, low, high = share_interval(hits)
    verdict = graded(share, suspect, fail, high_is_bad=high_is_bad)
    beyond = low > suspect if high_is_bad else high < suspect
    return share, "suspect" if verdict == "fail" and not beyond else verdict


def points(estimate: Estimate) -> tuple[float, float, float]:
    """An accuracy with its interval, in percent."""
    return 100 * estimate.value, 100 * estimate.low, 100 * estimate.high


def accuracy_curve(label: str, at: dict[float, Estimate]) -> Curve:
    """Accuracies in percent against a quantity."""
    xs = sorted(at)
    values = [points(at[x]) for x in xs]
    return Curve(label, tuple(xs), *(tuple(column) for column in zip(*values, strict=True)))


def quantile_curve(label: str, x: list[float], rows: list[npt.NDArray[np.float64]]) -> Curve:
    """Medians of some samples against a quantity, with their quartiles as the band."""
    low, middle, high = (tuple(float(np.quantile(row, part)) for row in rows) for part in (0.25, 0.5, 0.75))
    return Curve(label, tuple(x), middle, low, high)
