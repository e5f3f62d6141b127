"""What a run found: the per-example table, its estimates, the leaderboard row. Computed from units alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from robench.advice import tell_reason
from robench.errors import DataError
from robench.estimate import TRIES, Answers, Estimate, tell_guess
from robench.files import Place, as_place
from robench.plan import RunSpec, plan_units
from robench.store import RESULT_FILE, ROW_FILE, RunStore
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST, X_ADV, notes_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


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
        units: the units' tables, joined, as Arrow, without the adversarial images.
        notes: what a reader of the figures has to know: how units came about, and of a clean accuracy near chance.
    """

    def __init__(
        self,
        spec: RunSpec,
        units: Sequence[pa.Table],
        *,
        folder: Place | None,
        created: str,
        seconds: float | None = None,
        failures: Mapping[str, str] | None = None,
    ) -> None:
        """Keeps the units' tables; use `evaluate` or `load`.

        Args:
            spec: of the run.
            units: the table of each unit; those of a run folder without images, which are read when asked for.
            folder: the run folder.
            created: the day of the run.
            seconds: wall time of all units, where known.
            failures: tracebacks of attacks that failed.
        """
        import pyarrow as pa

        self.spec, self.folder, self.created, self.seconds = spec, folder, created, seconds
        self.failures, self.source = dict(failures or {}), dict[str, str]()
        self.notes = tuple(f"unit {number}: {note}" for number, unit in enumerate(units) for note in notes_of(unit))
        self._held = [unit for unit in units if X_ADV in unit.column_names]
        self.units = pa.concat_tables([_without_images(unit) for unit in units])
        frame: pd.DataFrame = self.units.to_pandas()
        votes = np.stack(frame["votes"].tolist())
        repeats, right = votes.sum(1), votes[np.arange(len(frame)), frame["label"].to_numpy()]
        with np.errstate(invalid="ignore", divide="ignore"):
            frame["accuracy"] = np.where(repeats > 0, right / np.maximum(repeats, 1), np.nan)
        self.table = frame
        self.notes += tuple(filter(None, [tell_guess(self.answers(CLEAN))]))

    @classmethod
    def load(cls, folder: str | Place) -> Evaluation:
        """Reads a finished run folder; its images stay on disk.

        Raises:
            UsageError: not a run folder.
            DataError: a unit is missing or damaged.
        """
        store = RunStore.open(as_place(folder))
        units = [unit.drop_columns([X_ADV]) for unit in store.read_all(plan_units(store.spec))]
        seconds = sum(store.timings().values()) or None
        failures = store.failures()
        try:
            result = cls(
                store.spec, units, folder=store.folder, created=store.created, seconds=seconds, failures=failures
            )
        except (ValueError, IndexError) as error:  # counts of votes that differ, labels beyond the classes
            raise DataError(f"{folder}: the units' tables do not fit together: {error}") from None
        result.source = store.source
        return result

    def __str__(self) -> str:
        spec = self.spec
        failed = list(self.reasons)
        parts = [
            f"{spec.defense_name} on {spec.dataset or 'images of the caller'}, {spec.n} images, {self.threat}",
            f"clean {self.clean_accuracy}",
            f"robust {'not known' if self.robust_accuracy is None else self.robust_accuracy}",
        ]
        return "; ".join([*parts, f"failed: {', '.join(failed)}"] if failed else parts)

    def __repr__(self) -> str:
        return f"<Evaluation: {self}>"

    def under(self, spec: RunSpec, created: str | None = None) -> Evaluation:
        """The same units under another spec, not stored; for one that differs in names only."""
        return Evaluation(spec, list(self._whole_units()), folder=None, created=created or self.created)

    def save(self, folder: str | Place | None = None) -> Place:
        """Writes result.json and row.csv into the run folder, or a whole run folder elsewhere; returns it.

        Raises:
            DataError: no folder known or given.
            UsageError: the folder holds a run already, or cannot be written.
        """
        from robench.leaderboard import row_csv

        target = as_place(folder) if folder is not None else self.folder
        if target is None:
            raise DataError("this evaluation has no run folder; give one: save(folder)")
        if target != self.folder:
            store = RunStore.create(target, self.spec, self.created, self.source)
            for unit, table in zip(plan_units(self.spec), self._whole_units(), strict=True):
                store.write(unit, table)
            self.folder = target
        store = RunStore.open(target)
        store.write_file(RESULT_FILE, self.to_json())
        store.write_file(ROW_FILE, row_csv(self.row()))
        return target

    def _whole_units(self) -> Iterator[pa.Table]:
        """The table of each unit with its images."""
        if self._held or self.folder is None:
            return iter(self._held)
        return RunStore.open(self.folder).read_all(plan_units(self.spec))

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
            DataError: there are none of that name, or a stored unit is damaged.
        """
        rows = self._rows(attack, eps)
        keys = rows["chosen"] if attack == WORST else rows["attack"]
        wanted = {key: place for place, key in enumerate(zip(rows["eps"], keys, rows["index"], strict=True))}
        found = np.empty((len(rows), *self.spec.image_shape), dtype=np.float32)
        missing = len(rows)
        for unit in self._whole_units() if wanted else ():
            columns = (unit.column(name).to_pylist() for name in ("eps", "attack", "index"))
            blobs = unit.column(X_ADV)
            for row, key in enumerate(zip(*columns, strict=True)):
                place = wanted.get(key)
                blob = blobs[row].as_py() if place is not None else None
                if place is not None and blob is not None:
                    found[place] = np.frombuffer(blob, dtype="<f4").reshape(self.spec.image_shape)
                    missing -= 1
        if missing or not wanted:
            raise DataError(f'no adversarial images of "{attack}" in this run')
        return found

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
        """Worst case over all attacks per example, at the largest bound; None if an attack failed at any bound."""
        return self.robust_at(self.spec.eps[-1]) if self.complete else None

    def robust_at(self, eps: float) -> Estimate | None:
        """Worst case over all attacks per example, at a bound of the run; None if an attack failed at this bound."""
        answers = None if self.failed_at(eps) else self.answers(WORST, eps)
        return answers.accuracy() if answers else None

    def failed_at(self, eps: float) -> list[str]:
        """The attacks that failed on any image at a bound of the run."""
        rows = self.table[(self.table["eps"] == eps) & (self.table["status"] == "failed")]
        failed = set(rows["attack"])
        return [entry.key for entry in self.spec.attacks if entry.key in failed]

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
        """Robust accuracy of a vote over the judge's repeats, at the largest bound; None if an attack failed."""
        answers = self.answers(WORST) if self.complete else None
        return answers.majority() if answers else None

    @property
    def clean_majority(self) -> Estimate | None:
        """Clean accuracy of a vote over the judge's repeats."""
        answers = self.answers(CLEAN)
        return answers.majority() if answers else None

    @property
    def best_of(self) -> dict[int, Estimate]:
        """Robust accuracy at the largest bound if the attacker may try N times, by N; empty if an attack failed."""
        return self._tries(WORST) if self.complete else {}

    @property
    def clean_best_of(self) -> dict[int, Estimate]:
        """The same on clean images: what mere repetition does."""
        return self._tries(CLEAN)

    def other_counts(self) -> list[tuple[str, Estimate | None, Estimate | None]]:
        """A randomized defense's answers by majority and after the most tries: what it is, robust, clean; else none."""
        if not (self.spec.randomized and self.complete):
            return []
        counts = [("by majority vote", self.majority, self.clean_majority)]
        best, clean = self.best_of, self.clean_best_of
        return counts + [(f"after {tries} tries", best[tries], clean[tries]) for tries in sorted(best)[-1:]]

    def _tries(self, attack: str) -> dict[int, Estimate]:
        answers = self.answers(attack)
        if answers is None:
            return {}
        return {tries: answers.best_of(tries) for tries in TRIES if tries <= answers.repeats}

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Robust accuracy against eps, clean accuracy first: `eps`, `value`, `low`, `high`; None as in `robust_at`."""
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
        it found. Of a randomized defense only an image on which no answer was right counts as an error, and its
        distance is no nearest one, as what such an attack found is moved out to the bound.

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

        Empty for a cascade, whose attacks see only what is left and show the errors of others on the rest, and for a
        randomized defense, see `distances`.
        """
        found: dict[str, float | None] = {}
        if self.spec.cascade or self.spec.randomized:
            return found
        for entry in self.spec.attacks:
            if entry.goal == "minimal" and self.answers(entry.key) is not None:
                median = float(np.median(self.distances(entry.key)))
                found[entry.key] = round(median, 6) if np.isfinite(median) else None
        return found

    def queries(self, eps: float | None = None) -> dict[str, float]:
        """Forward and backward passes per example of all attacks together, at a bound (default the largest)."""
        rows = self.table[(self.table["eps"] == self._bound(eps)) & ~self.table["attack"].isin([CLEAN, WORST])]
        return {kind: float(rows[kind].sum()) / self.spec.n for kind in ("forwards", "backwards")}

    def row(self, eps: float | None = None) -> dict[str, str]:
        """The leaderboard row at a bound (default the largest), every value as it stands in the CSV.

        With the verdict of the audit inside the run's folder, if there is one.
        """
        from robench.leaderboard import make_row
        from robench.publish import find_audit

        bound = self._bound(eps)
        return make_row(self, bound, find_audit(self, bound))

    @property
    def reasons(self) -> dict[str, str]:
        """Why attacks failed, by key: the exception that ended them, in a line that says where a plugin raised it."""
        failed = set(self.table[self.table["status"] == "failed"]["attack"])
        found = {}
        for key in (entry.key for entry in self.spec.attacks if entry.key in failed):
            traces = [self.failures[name] for name in self.failures if name == key or name[6:] == failure_stem(key)]
            found[key] = tell_reason(traces[0]) if traces else "the reason was not kept"
        return found

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types; what `--json` prints but for the run folder and the time.

        Where `complete` is false an attack failed, `failures` says why, and what rests on the worst case is null; on
        the curve at the bounds at which it failed.
        """
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
            **({"notes": list(self.notes)} if self.notes else {}),
            **({} if self.complete else {"failures": self.reasons}),
            "row": self.row(),
        }

    @property
    def threat(self) -> ThreatModel:
        """The threat model at the largest bound."""
        return ThreatModel(self.spec.norm, self.spec.eps[-1])


def failure_stem(key: str) -> str:
    """An attack's key as it stands in the name of the file that holds its traceback."""
    return re.sub(r"[^A-Za-z0-9_.=@-]+", "_", key)


def _without_images(unit: pa.Table) -> pa.Table:
    kept = unit.drop_columns([X_ADV]) if X_ADV in unit.column_names else unit
    return kept.replace_schema_metadata(None)
