"""Accuracies with intervals, and the judge's answers that they are computed from."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from robench.shares import in_percent
from robench.stats import majority_right, mean_interval, wilson

GUESS_CAUSES = (
    "Are labels shifted, classes in another order, pixels wanted in another range than [0, 1], or weights not loaded?"
)
TRIES = (2, 5, 10, 20, 50, 100)
"""The N of `best_of[N]`, as far as there are draws."""


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{in_percent(self.value):.1f} % [{in_percent(self.low):.1f}, {in_percent(self.high):.1f}]"

    def to_json(self) -> dict[str, float]:
        """As JSON types, rounded to what the interval can carry."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Answers:
    """The judge's answers on one set of images: votes per class, over the repeats.

    Attributes:
        votes: `examples classes`.
        labels: the right class of each example.
    """

    votes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def repeats(self) -> int:
        """Answers per example."""
        return int(self.votes[0].sum()) if len(self.votes) else 1

    @property
    def right(self) -> npt.NDArray[np.int64]:
        """Right answers of each example."""
        counts: npt.NDArray[np.int64] = self.votes[np.arange(len(self.labels)), self.labels]
        return counts

    @property
    def won(self) -> npt.NDArray[np.bool_]:
        """Whether the right class has more votes than any other, of each example."""
        return majority_right(self.votes, self.labels)

    def accuracy(self) -> Estimate:
        """Expected accuracy of a single answer: the mean over draws, then over examples."""
        fractions = self.right / self.repeats
        return Estimate(float(fractions.mean()), *mean_interval(fractions, self.repeats))

    def majority(self) -> Estimate:
        """Accuracy of a vote over all repeats; a tie counts as wrong."""
        won = int(self.won.sum())
        return Estimate(won / len(self.labels), *wilson(won, len(self.labels)))

    def best_of(self, tries: int) -> Estimate:
        """Accuracy if the attacker may ask `tries` times and needs one error: unbiased, from the repeats."""
        fractions = self.all_right(tries)
        return Estimate(float(fractions.mean()), *mean_interval(fractions, self.repeats))

    def all_right(self, tries: int) -> npt.NDArray[np.float64]:
        """Of each example, the fraction of all choices of `tries` of its answers in which every answer is right."""
        fractions = np.ones(len(self.labels))
        for step in range(tries):
            fractions *= np.clip(self.right - step, 0, None) / (self.repeats - step)
        return fractions


def tell_guess(clean: Answers | None) -> str:
    """Says of answers on clean images that guessing would do as well, as far as the images tell; empty if it would not.

    That is where the interval reaches down to chance and not half the way up from there (a few images may do that to a
    good classifier), or lies whole below 2 / (classes + 1), which is a guess at twice the odds.
    """
    if clean is None:
        return ""
    accuracy, classes = clean.accuracy(), clean.votes.shape[1]
    chance = 1 / classes
    reaches = accuracy.low <= chance and accuracy.high < (1 + chance) / 2
    if not (reaches or accuracy.high < 2 / (classes + 1)):
        return ""
    return f"clean accuracy {accuracy} is about that of guessing among {classes} classes. {GUESS_CAUSES}"
