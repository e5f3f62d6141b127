"""Two runs on the same images: by how much one defense keeps more than the other, and whether chance explains it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from robench.bundle import MANIFEST, read_bundle
from robench.errors import DataError, UsageError
from robench.estimate import Answers, Estimate
from robench.files import Place
from robench.plan import RunSpec
from robench.result import Evaluation
from robench.stats import PairedTest, paired_test
from robench.store import SPEC_FILE
from robench.threat import ThreatModel, exact_eps
from robench.unit_table import CLEAN, WORST

LEVEL: Final = 0.05
"""Of the paired test, two-sided, at which two defenses count as distinct."""
TOLD: Final = ("protocol", "query_budget", "precision", "robench_version", "torch_version", "device")
TOLD_OF_DRAWS: Final = ("eot", "judge_repeats")
"""What is told of two runs where they differ in it; the latter where both defenses draw."""


@dataclass(frozen=True)
class Difference:
    """One accuracy of both runs on the images that both have.

    Attributes:
        what: `clean`, an attack's key, or `worst`.
        eps: the bound; 0 of `clean`.
        first: the first run's.
        second: the second run's.
        gap: first minus second, image by image.
    """

    what: str
    eps: float
    first: Estimate
    second: Estimate
    gap: PairedTest

    @property
    def distinct(self) -> bool:
        """Whether chance does not explain it."""
        return self.gap.p <= LEVEL

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        gap = {key: round(value, 6) for key, value in asdict(self.gap).items() if key != "p"}
        return {
            "what": self.what,
            "eps": self.eps,
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "difference": gap,
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
        differences: the clean accuracy; then at each bound of both the worst case, and before it each attack of both,
            where its figures are of one kind.
        notes: in what the runs are unlike, so that a difference may not be the defenses'.
    """

    first: RunSpec
    second: RunSpec
    images: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: the defenses, or where they have one name, which of the two."""
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
        unlike = "" if _keys(self.first) == _keys(self.second) else ", under unlike attacks"
        on = f"on the same {count_images(self.images)} (p = {gap.p:.2g}){unlike}"
        if not one.distinct:
            return (
                f"{threat}: {first} and {second} cannot be told apart {on}; "
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
    (one, of_first), (other, of_second) = (_read(place) for place in (first, second))
    comparison = compare_runs(one, other)
    verdicts = {"first": of_first, "second": of_second}
    told = [
        f"the audit calls the {word} {verdict}" for word, verdict in verdicts.items() if verdict not in ("", "pass")
    ]
    return replace(comparison, notes=(*told, *comparison.notes))


def compare_runs(first: Evaluation, second: Evaluation) -> Comparison:
    """Compares the accuracies of two runs on the images that both have, image by image; see `paired_test`.

    What scatters between images is the same for both, so that far smaller differences show than the intervals of the
    two accuracies would let one think.

    Raises:
        UsageError: the runs are of other data or another norm, or have no bound or no image in common.
        DataError: a run's table does not fit together.
    """
    for what in ("norm", "dataset"):
        one, other = (getattr(run.spec, what) or "images of the caller" for run in (first, second))
        if one != other:
            raise UsageError(f"two runs to compare need one {what}; these have {one} and {other}")
    bounds = [
        (eps, same) for eps in first.spec.eps for same in second.spec.eps if math.isclose(eps, same, rel_tol=1e-6)
    ]
    if not bounds:
        told = (", ".join(exact_eps(eps, run.spec.norm) for eps in run.spec.eps) for run in (first, second))
        raise UsageError(f"the runs have no bound in common: {' and '.join(told)}")
    clean = shared_answers(first, second, CLEAN)
    if clean is None:
        raise UsageError(_why_apart(first, second))
    found, images = tuple(_differences(first, second, bounds)), len(clean[0].labels)
    notes = (*_tell_images(first.spec, second.spec, images), *_notes(first.spec, second.spec))
    return Comparison(first.spec, second.spec, images, found, (*notes, *_tell_failed(first, second, bounds)))


def shared_answers(
    first: Evaluation, second: Evaluation, what: str, bounds: tuple[float | None, float | None] = (None, None)
) -> tuple[Answers, Answers] | None:
    """The judge's answers of both runs on the images that both have, in one order.

    None if an attack failed in one of them, if no images are shared, or if those of one position bear different labels:
    then the runs are of different data.

    Args:
        first: a run.
        second: the other one.
        what: `clean`, an attack's key, or `worst`.
        bounds: that of each; None: the largest.

    Raises:
        DataError: a run's table does not fit together.
    """
    of_caller = not (first.spec.dataset and second.spec.dataset)
    if of_caller and first.spec.data_digest != second.spec.data_digest:
        return None
    found = [_placed_answers(run, what, eps) for run, eps in zip((first, second), bounds, strict=True)]
    if found[0] is None or found[1] is None:
        return None
    _, *rows = np.intersect1d(found[0][0], found[1][0], assume_unique=True, return_indices=True)
    one, other = (
        Answers(answers.votes[row], answers.labels[row])
        for (_, answers), row in zip((found[0], found[1]), rows, strict=True)
    )
    return (one, other) if len(one.labels) and (one.labels == other.labels).all() else None


def compare_answers(first: Answers, second: Answers) -> PairedTest:
    """How much larger the first accuracy is on the same images, below 0 if it is smaller."""
    return paired_test(first.right / first.repeats, second.right / second.repeats)


def count_images(images: int) -> str:
    """`1 image`, `2 images`."""
    return f"{images} image{'' if images == 1 else 's'}"


def _placed_answers(run: Evaluation, what: str, eps: float | None) -> tuple[Any, Answers] | None:
    """Positions in the dataset, and the answers there."""
    answers = run.answers(what, eps)
    if answers is None:
        return None
    bound = 0.0 if what == CLEAN else run.spec.eps[-1] if eps is None else eps
    places = run.table[(run.table["attack"] == what) & (run.table["eps"] == bound)]["index"].to_numpy()
    asked = (answers.votes.sum(1) == max(answers.repeats, 1)).all()
    if not (asked and np.array_equal(np.sort(places), np.unique(run.indices))):
        whose = run.folder or f"the evidence of {run.spec.defense or run.spec.defense_name}"
        raise DataError(f'{whose}: its table does not hold the answers under "{what}" to each of its images')
    return places, answers


def _differences(first: Evaluation, second: Evaluation, bounds: Sequence[tuple[float, float]]) -> Iterator[Difference]:
    keys = _like_attacks(first.spec, second.spec)
    for what, pair in [(CLEAN, (0.0, 0.0)), *((what, pair) for pair in bounds for what in (*keys, WORST))]:
        failed = what == WORST and (first.failed_at(pair[0]) or second.failed_at(pair[1]))
        answers = None if failed else shared_answers(first, second, what, pair)
        if answers is not None:
            gap = compare_answers(*answers)
            yield Difference(what, pair[0], answers[0].accuracy(), answers[1].accuracy(), gap)


def _keys(spec: RunSpec) -> list[str]:
    return [entry.key for entry in spec.attacks]


def _like_attacks(first: RunSpec, second: RunSpec) -> list[str]:
    """The attacks of both whose figures are of one kind.

    In a cascade an attack's figure is of what those before it left, and of a randomized defense it counts answers anew.
    """
    mine, others = _keys(first), _keys(second)
    if not (first.cascade or second.cascade):
        return [key for key in mine if key in others]
    if first.cascade != second.cascade or first.randomized != second.randomized:
        return []
    same = [one == other for one, other in zip(mine, others, strict=False)]
    return mine[: same.index(False) if False in same else len(same)]


def _why_apart(first: Evaluation, second: Evaluation) -> str:
    one, other = first.spec, second.spec
    if not one.dataset:
        return "images of the caller compare only where both runs have the same; these have others"
    if set(first.indices) & set(second.indices):
        return f"images of {one.dataset} at one position bear other labels: the runs are of different splits or parts"
    if one.seed != other.seed:
        return (
            f"the runs have no images in common: seed {one.seed} drew {one.n} and seed {other.seed} {other.n} others. "
            "Run both with one --seed"
        )
    return f"the runs have no images of {one.dataset} in common"


def _tell_images(first: RunSpec, second: RunSpec, images: int) -> Iterator[str]:
    if images < min(first.n, second.n):
        seeds = f", drawn by seeds {first.seed} and {second.seed}; run both with one --seed"
        why = "" if first.seed == second.seed else seeds
        yield f"only {count_images(images)} of {first.n} and {second.n} are in both{why}"


def _notes(first: RunSpec, second: RunSpec) -> Iterator[str]:
    names = (*TOLD, *TOLD_OF_DRAWS) if first.randomized and second.randomized else TOLD
    for name in names:
        one, other = (getattr(spec, name) for spec in (first, second))
        if one != other:
            yield f"{name.replace('_', ' ')}: {one or 'none'} and {other or 'none'}"
    if first.defense == second.defense and first.weights_digest != second.weights_digest:
        yield f"weights: {first.weights_digest[:16]} and {second.weights_digest[:16]}"
    keys, others, like = _keys(first), _keys(second), _like_attacks(first, second)
    for mine, theirs, word in ((keys, others, "first"), (others, keys, "second")):
        if alone := [key for key in mine if key not in theirs]:
            yield f"only the {word} was attacked by {', '.join(alone)}"
    if hidden := [key for key in keys if key in others and key not in like]:
        yield (
            f"not compared one by one: {', '.join(hidden)}. In a cascade an attack's figure depends on those before it "
            "and on whether the defense draws"
        )


def _tell_failed(first: Evaluation, second: Evaluation, bounds: Sequence[tuple[float, float]]) -> Iterator[str]:
    for pair in bounds:
        for run, eps, word in zip((first, second), pair, ("first", "second"), strict=True):
            if failed := ", ".join(run.failed_at(eps)):
                yield f"no robust accuracy of the {word} at {ThreatModel(run.spec.norm, eps)}: {failed} failed"


def _read(place: Place) -> tuple[Evaluation, str]:
    """The run at a place, and the verdict of the audit that lies with it."""
    if (place / MANIFEST).exists():
        bundle = read_bundle(place)
        return bundle.figures, "" if bundle.audit is None else str(bundle.audit["verdict"])
    if not (place / SPEC_FILE).exists():
        raise UsageError(f"{place} is neither a run folder nor the evidence of a row (leaderboards/evidence/DIGEST)")
    return Evaluation.load(place), ""
