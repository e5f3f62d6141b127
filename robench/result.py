"""What a run found: estimates with intervals, the per-example table, the leaderboard row. Computed from units alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from robench.errors import DataError
from robench.plan import RunSpec, plan_units
from robench.stats import mean_interval, wilson
from robench.store import RunStore
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

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
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

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

    def accuracy(self) -> Estimate:
        """Expected accuracy of a single answer: the mean over draws, then over examples."""
        fractions = self.right / self.repeats
        return Estimate(float(fractions.mean()), *mean_interval(fractions, self.repeats))

    def majority(self) -> Estimate:
        """Accuracy of a vote over all repeats; a tie counts as wrong."""
        others = self.votes.copy()
        others[np.arange(len(self.labels)), self.labels] = -1
        won = int((self.right > others.max(1)).sum())
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


class Evaluation:
    """The result of a run at one or several bounds. The single-bound properties speak of the largest bound.

    Attributes:
        spec: what determined the numbers.
        table: a pandas DataFrame, one row per example, attack and bound; see robench.unit.run_unit for its columns
            (the adversarial images are left out; see `images`).
        folder: the run folder, None if nothing was stored.
        created: the day of the run.
        seconds: wall time of all units, where known.
        failures: tracebacks of attacks that failed, by attack (of a stored run, by file name).
        units: the units' tables, joined, as Arrow, with the adversarial images.
    """

    def __init__(
        self,
        spec: RunSpec,
        units: pa.Table,
        *,
        folder: Path | None,
        created: str,
        seconds: float | None = None,
        failures: Mapping[str, str] | None = None,
    ) -> None:
        """Keeps the units' tables, joined; use `evaluate` or `load`."""
        self.spec, self.folder, self.created, self.seconds = spec, folder, created, seconds
        self.failures = dict(failures or {})
        self.units = units
        frame: pd.DataFrame = units.drop_columns(["x_adv"]).to_pandas()
        votes = np.stack(frame["votes"].tolist())
        repeats, right = votes.sum(1), votes[np.arange(len(frame)), frame["label"].to_numpy()]
        with np.errstate(invalid="ignore", divide="ignore"):
            frame["accuracy"] = np.where(repeats > 0, right / np.maximum(repeats, 1), np.nan)
        self.table = frame

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Reads a finished run folder.

        Raises:
            UsageError: not a run folder.
            DataError: a unit is missing or damaged.
        """
        import pyarrow as pa

        store = RunStore.open(Path(folder))
        units = [store.read(unit) for unit in plan_units(store.spec)]
        seconds = sum(store.timings().values()) or None
        table = pa.concat_tables([unit.replace_schema_metadata(None) for unit in units])
        failures = store.failures()
        return cls(store.spec, table, folder=store.folder, created=store.created, seconds=seconds, failures=failures)

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes result.json and row.csv into the run folder, or a whole run folder elsewhere; returns it.

        Raises:
            DataError: no folder known or given.
            UsageError: the folder holds a run already, or cannot be written.
        """
        from robench.leaderboard import row_csv

        target = Path(folder) if folder is not None else self.folder
        if target is None:
            raise DataError("this evaluation has no run folder; give one: save(folder)")
        if target != self.folder:
            store = RunStore.create(target, self.spec, self.created)
            for unit in plan_units(self.spec):
                store.write(unit, self._unit_table(unit.start, unit.stop))
            self.folder = target
        store = RunStore.open(target)
        store.write_file("result.json", self.to_json())
        store.write_file("row.csv", row_csv(self.row()))
        return target

    def _unit_table(self, start: int, stop: int) -> pa.Table:
        order = self.table.groupby(["eps", "attack"], sort=False).cumcount().to_numpy()
        return self.units.filter((order >= start) & (order < stop))

    def answers(self, attack: str, eps: float | None = None) -> Answers | None:
        """The judge's answers on an attack's images (or `clean`, `worst`); None if the attack failed anywhere."""
        rows = self._rows(attack, eps)
        if not len(rows) or (rows["status"] == "failed").any():
            return None
        return Answers(np.stack(rows["votes"].tolist()).astype(np.int64), rows["label"].to_numpy())

    @property
    def indices(self) -> npt.NDArray[np.int64]:
        """The position of each image of the run in the dataset."""
        found: npt.NDArray[np.int64] = self._rows(CLEAN, None)["index"].to_numpy()
        return found

    def images(self, attack: str, eps: float | None = None) -> npt.NDArray[np.float32]:
        """The adversarial images of an attack, `n c h w`; those of `worst` are each taken from the chosen attack.

        Raises:
            DataError: there are none of that name.
        """
        rows = self._rows(attack, eps)
        keys = rows["chosen"] if attack == WORST else rows["attack"]
        blobs = self.units.column("x_adv")
        lookup = {
            key: row
            for row, key in enumerate(zip(self.table["eps"], self.table["attack"], self.table["index"], strict=True))
        }
        wanted = [lookup.get(key) for key in zip(rows["eps"], keys, rows["index"], strict=True)]
        found = [blobs[row].as_py() if row is not None else None for row in wanted]
        whole = [blob for blob in found if blob is not None]
        if not whole or len(whole) < len(found):
            raise DataError(f'no adversarial images of "{attack}" in this run')
        return np.stack([np.frombuffer(blob, dtype="<f4").reshape(self.spec.image_shape) for blob in whole])

    def _bound(self, eps: float | None) -> float:
        return self.spec.eps[-1] if eps is None else eps

    def _rows(self, attack: str, eps: float | None) -> pd.DataFrame:
        bound = 0.0 if attack == CLEAN else self._bound(eps)
        return self.table[(self.table["attack"] == attack) & (self.table["eps"] == bound)]

    @property
    def complete(self) -> bool:
        """False if an attack failed, so that the worst case is not known."""
        return not (self.table["status"] == "failed").any()

    @property
    def clean_accuracy(self) -> Estimate:
        """Expected accuracy of a single answer on the clean images."""
        answers = self.answers(CLEAN)
        if answers is None:
            raise DataError("the run has no clean pass")
        return answers.accuracy()

    @property
    def robust_accuracy(self) -> Estimate | None:
        """Worst case over all attacks per example, at the largest bound; None if every attack failed."""
        return self.robust_at(self.spec.eps[-1])

    def robust_at(self, eps: float) -> Estimate | None:
        """Worst case over all attacks per example, at a bound of the run."""
        answers = self.answers(WORST, eps)
        return answers.accuracy() if answers else None

    @property
    def per_attack(self) -> dict[str, Estimate | None]:
        """Accuracy under each attack at the largest bound; None where it failed."""
        return self.attacks_at(self.spec.eps[-1])

    def attacks_at(self, eps: float) -> dict[str, Estimate | None]:
        """Accuracy under each attack at a bound of the run; None where it failed."""
        found = {entry.key: self.answers(entry.key, eps) for entry in self.spec.attacks}
        return {key: answers.accuracy() if answers else None for key, answers in found.items()}

    @property
    def majority(self) -> Estimate | None:
        """Robust accuracy of a vote over the judge's repeats, at the largest bound."""
        answers = self.answers(WORST)
        return answers.majority() if answers else None

    @property
    def clean_majority(self) -> Estimate | None:
        """Clean accuracy of a vote over the judge's repeats."""
        answers = self.answers(CLEAN)
        return answers.majority() if answers else None

    @property
    def best_of(self) -> dict[int, Estimate]:
        """Robust accuracy at the largest bound if the attacker may try N times, by N."""
        return self._tries(WORST)

    @property
    def clean_best_of(self) -> dict[int, Estimate]:
        """The same on clean images: what mere repetition does."""
        return self._tries(CLEAN)

    def _tries(self, attack: str) -> dict[int, Estimate]:
        answers = self.answers(attack)
        if answers is None:
            return {}
        return {tries: answers.best_of(tries) for tries in TRIES if tries <= answers.repeats}

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Robust accuracy against eps, clean accuracy first: `eps`, `value`, `low`, `high`."""
        points: list[dict[str, Any]] = [{"eps": 0.0, **self.clean_accuracy.to_json()}]
        for eps in self.spec.eps:
            estimate = self.robust_at(eps)
            points.append({"eps": eps, **(estimate.to_json() if estimate else dict.fromkeys(("value", "low", "high")))})
        return points

    def worst_attack(self, eps: float | None = None) -> str:
        """The attack that did most at a bound (default the largest).

        In a cascade the one that found most of the worst cases in which an attack made the answer worse; else the one
        under which accuracy is lowest, the first by name of equals.
        """
        if self.spec.cascade:
            return self._most_chosen(self._bound(eps))
        known = [(found.value, key) for key, found in self.attacks_at(self._bound(eps)).items() if found is not None]
        return min(known)[1] if known else ""

    def _most_chosen(self, eps: float) -> str:
        worst, clean = self._rows(WORST, eps), self._rows(CLEAN, None)
        gained = worst["chosen"][worst["accuracy"].to_numpy() < clean["accuracy"].to_numpy()]
        counts = gained.value_counts()
        return min((-count, str(key)) for key, count in counts.items())[1] if len(counts) else ""

    def distances(self, attack: str, eps: float | None = None) -> npt.NDArray[np.float64]:
        """Distance of each image's error under an attack within a bound (default the largest).

        0 where it is wrong without an attack, inf where none was found. Of a minimal-norm attack the nearest error that
        it found; of a randomized defense only an image on which no answer was right counts as an error.

        Raises:
            DataError: the attack is not part of the run, or failed.
        """
        rows = self._rows(attack, eps)
        if not len(rows) or (rows["status"] == "failed").any():
            raise DataError(f'no distances of "{attack}" in this run')
        found: npt.NDArray[np.float64] = np.where(rows["accuracy"] == 0, rows["distance"], np.inf)
        return found

    def median_distances(self) -> dict[str, float | None]:
        """Of each minimal-norm attack the median distance of the errors; None where half the images have none.

        Empty for a cascade, whose attacks see only what is left and show the errors of others on the rest.
        """
        found = {}
        for entry in self.spec.attacks:
            if entry.goal == "minimal" and not self.spec.cascade and self.answers(entry.key) is not None:
                median = float(np.median(self.distances(entry.key)))
                found[entry.key] = round(median, 6) if np.isfinite(median) else None
        return found

    def queries(self, eps: float | None = None) -> dict[str, float]:
        """Forward and backward passes per example of all attacks together, at a bound (default the largest)."""
        rows = self.table[(self.table["eps"] == self._bound(eps)) & ~self.table["attack"].isin([CLEAN, WORST])]
        return {kind: float(rows[kind].sum()) / self.spec.n for kind in ("forwards", "backwards")}

    def row(self, eps: float | None = None) -> dict[str, str]:
        """The leaderboard row at a bound (default the largest), every value as it stands in the CSV."""
        from robench.leaderboard import make_row

        return make_row(self, self._bound(eps))

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types; what `--json` prints but for the run folder and the time."""
        per_attack = {key: estimate.to_json() if estimate else None for key, estimate in self.per_attack.items()}
        robust, majority, clean_majority = self.robust_accuracy, self.majority, self.clean_majority
        return {
            "defense": self.spec.defense_name,
            "dataset": self.spec.dataset,
            "threat": {"norm": self.spec.norm, "eps": self.spec.eps[-1]},
            "complete": self.complete,
            "clean_accuracy": self.clean_accuracy.to_json(),
            "robust_accuracy": robust.to_json() if robust else None,
            "per_attack": per_attack,
            "majority": {
                "clean": clean_majority.to_json() if clean_majority else None,
                "robust": majority.to_json() if majority else None,
            },
            "best_of": {
                "clean": {str(n): estimate.to_json() for n, estimate in self.clean_best_of.items()},
                "robust": {str(n): estimate.to_json() for n, estimate in self.best_of.items()},
            },
            "curve": self.curve,
            "worst_attack": self.worst_attack(),
            "queries": self.queries(),
            "n": self.spec.n,
            "seed": self.spec.seed,
            "eot": self.spec.eot,
            "judge_repeats": self.spec.judge_repeats,
            "protocol": self.spec.protocol,
            "cascade": self.spec.cascade,
            "precision": self.spec.precision,
            "median_distance": self.median_distances(),
            "row": self.row(),
        }

    @property
    def threat(self) -> ThreatModel:
        """The threat model at the largest bound."""
        return ThreatModel(self.spec.norm, self.spec.eps[-1])


def dump_json(content: dict[str, Any]) -> str:
    """One JSON object as text; refuses NaN."""
    return json.dumps(content, indent=2, allow_nan=False)
