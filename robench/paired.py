"""Two runs on the same images: by how much one defense keeps more than the other, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from robench.audit.statistics import Gap, compare
from robench.bundle import MANIFEST, read_bundle
from robench.errors import UsageError
from robench.estimate import Answers, Estimate
from robench.files import Place
from robench.plan import RunSpec
from robench.result import Evaluation
from robench.threat import ThreatModel, format_eps
from robench.unit_table import CLEAN, WORST

LEVEL: Final = 0.05
"""Of the paired test, two-sided, at which two defenses count as distinct."""
TOLD: Final = ("protocol", "cascade", "query_budget", "precision", "robench_version", "torch_version", "device")
"""What is told of two runs where they differ in it."""


@dataclass(frozen=True)
class Difference:
    """One accuracy of both runs on the images that both have.

    Attributes:
        what: `clean`, an attack's key, or `worst`.
        eps: the bound; 0 of `clean`.
        first: the first run's.
        second: the second run's.
        gap: first minus second, image by image, with the two-sided level of its test.
    """

    what: str
    eps: float
    first: Estimate
    second: Estimate
    gap: Gap

    @property
    def distinct(self) -> bool:
        """Whether chance does not explain it."""
        return self.gap.p <= LEVEL

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        gap = {"mean": self.gap.mean, "low": self.gap.low, "high": self.gap.high}
        return {
            "what": self.what,
            "eps": self.eps,
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "difference": {key: round(value, 6) for key, value in gap.items()},
            "p": self.gap.p,
            "distinct": self.distinct,
        }


@dataclass(frozen=True)
class Comparison:
    """What two runs say of two defenses.

    Attributes:
        first: the spec of one run.
        second: that of the other.
        images: how many images both have.
        differences: the clean accuracy, then at each bound of both each attack of both and the worst case.
        notes: in what the runs are unlike, so that a difference may not be the defenses'.
    """

    first: RunSpec
    second: RunSpec
    images: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: the defenses, or where they have one name, what tells them apart."""
        first, second = (spec.defense or spec.defense_name for spec in (self.first, self.second))
        return (first, second) if first != second else (f"{first} (first)", f"{second} (second)")

    @property
    def worst(self) -> tuple[Difference, ...]:
        """The robust accuracies, at each bound at which no attack failed."""
        return tuple(one for one in self.differences if one.what == WORST)

    def verdict(self, one: Difference) -> str:
        """A robust accuracy's difference in a sentence."""
        first, second = self.names
        threat, gap = ThreatModel(self.first.norm, one.eps), one.gap
        on = f"on the same {self.images} images (p = {gap.p:.2g})"
        if not one.distinct:
            return (
                f"{threat}: {first} and {second} cannot be told apart {on}: "
                f"the difference is between {100 * gap.low:+.1f} and {100 * gap.high:+.1f} points"
            )
        size, low, high, more, less = (
            (gap.mean, gap.low, gap.high, first, second)
            if gap.mean > 0
            else (-gap.mean, -gap.high, -gap.low, second, first)
        )
        return (
            f"{threat}: {more} keeps {100 * size:.1f} points [{100 * low:.1f}, {100 * high:.1f}] more than {less}, {on}"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "first": self.names[0],
            "second": self.names[1],
            "dataset": self.first.dataset,
            "norm": self.first.norm,
            "images": self.images,
            "differences": [one.to_json() for one in self.differences],
            "notes": list(self.notes),
        }


def compare_places(first: Place, second: Place) -> Comparison:
    """Compares two run folders or evidence bundles; see `compare_runs`.

    Raises:
        UsageError: see `compare_runs`, or one of them is neither.
        DataError: one of them is damaged.
    """
    return compare_runs(*(_read(place) for place in (first, second)))


def compare_runs(first: Evaluation, second: Evaluation) -> Comparison:
    """Compares the accuracies of two runs on the images that both have, image by image.

    What scatters between images is the same for both, so that far smaller differences show than the intervals of the
    two accuracies would let one think. Where each image is right or wrong in both, the test is McNemar's, exact; where
    the answers of a randomized defense make shares of it, Student's paired test.

    Raises:
        UsageError: the runs are of other data or another norm, or have no bound or no image in common.
    """
    for what in ("norm", "dataset"):
        one, other = (getattr(run.spec, what) or "images of the caller" for run in (first, second))
        if one != other:
            raise UsageError(f"two runs to compare need one {what}; these have {one} and {other}")
    bounds = [eps for eps in first.spec.eps if eps in second.spec.eps]
    if not bounds:
        told = (", ".join(format_eps(eps, run.spec.norm) for eps in run.spec.eps) for run in (first, second))
        raise UsageError(f"the runs have no bound in common: {' and '.join(told)}")
    clean = shared_answers(first, second, CLEAN)
    if clean is None:
        raise UsageError("the runs have no images in common: their data or splits are others")
    found = _differences(first, second, bounds)
    notes = (*_notes(first.spec, second.spec), *_tell_failed(first, second, bounds))
    return Comparison(first.spec, second.spec, len(clean[0].labels), tuple(found), notes)


def shared_answers(
    first: Evaluation, second: Evaluation, what: str, eps: float | None = None
) -> tuple[Answers, Answers] | None:
    """The judge's answers of both runs on the images that both have, in one order.

    None if an attack failed in one of them, if no images are shared, or if those of one position bear different labels:
    then the runs are of different data.

    Args:
        first: a run.
        second: the other one.
        what: `clean`, an attack's key, or `worst`.
        eps: the bound; None: the largest of each.
    """
    found = [run.answers(what, eps) for run in (first, second)]
    if found[0] is None or found[1] is None:
        return None
    if not first.spec.dataset and first.spec.data_digest != second.spec.data_digest:
        return None
    _, *places = np.intersect1d(first.indices, second.indices, assume_unique=True, return_indices=True)
    one, other = (
        Answers(answers.votes[rows], answers.labels[rows])
        for answers, rows in zip((found[0], found[1]), places, strict=True)
    )
    return (one, other) if len(one.labels) and (one.labels == other.labels).all() else None


def compare_answers(first: Answers, second: Answers) -> Gap:
    """How much larger the first accuracy is on the same images, below 0 if it is smaller, with the two-sided level."""
    one, other = (answers.right / answers.repeats for answers in (first, second))
    gap = compare(one, other)
    return replace(gap, p=min(2 * gap.p, 2 * compare(other, one).p, 1.0))


def _differences(first: Evaluation, second: Evaluation, bounds: list[float]) -> Iterator[Difference]:
    keys = [entry.key for entry in first.spec.attacks if entry.key in {other.key for other in second.spec.attacks}]
    for what, eps in [(CLEAN, 0.0), *((what, eps) for eps in bounds for what in (*keys, WORST))]:
        failed = what == WORST and (first.failed_at(eps) or second.failed_at(eps))
        answers = None if failed else shared_answers(first, second, what, eps)
        if answers is not None:
            yield Difference(what, eps, answers[0].accuracy(), answers[1].accuracy(), compare_answers(*answers))


def _notes(first: RunSpec, second: RunSpec) -> Iterator[str]:
    for name in TOLD:
        one, other = (getattr(spec, name) for spec in (first, second))
        if one != other:
            yield f"{name.replace('_', ' ')}: {one or 'none'} and {other or 'none'}"
    if first.randomized and second.randomized and first.eot != second.eot:
        yield f"eot: {first.eot} and {second.eot}"
    keys = [[entry.key for entry in spec.attacks] for spec in (first, second)]
    for mine, others, word in ((keys[0], keys[1], "first"), (keys[1], keys[0], "second")):
        if alone := [key for key in mine if key not in others]:
            yield f"only the {word} was attacked by {', '.join(alone)}"


def _tell_failed(first: Evaluation, second: Evaluation, bounds: list[float]) -> Iterator[str]:
    for eps in bounds:
        for run, word in ((first, "first"), (second, "second")):
            if failed := ", ".join(run.failed_at(eps)):
                yield f"no robust accuracy of the {word} at {ThreatModel(run.spec.norm, eps)}: {failed} failed"


def _read(place: Place) -> Evaluation:
    return read_bundle(place).figures if (place / MANIFEST).exists() else Evaluation.load(place)
