"""`robench verify`: judges saved adversarial images again under fresh randomness and checks the claim."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robench.bundle import MANIFEST, read_bundle
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.errors import DataError, UsageError
from robench.estimate import Answers, Estimate
from robench.judge import check_bounds, judge_in_units
from robench.leaderboard import Row
from robench.plan import RunSpec
from robench.registry import builtin_names, load_defense, parse_spec
from robench.result import Evaluation
from robench.rng import seeded
from robench.settings import Settings
from robench.stats import differ
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST


@dataclass
class Report:
    """What a verification found.

    Attributes:
        folder: the run.
        lines: one line per claim, in words.
        failures: the claims that do not hold; empty if all do.
    """

    folder: Path
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """True if every claim held."""
        return not self.failures

    def check(self, claim: str, held: bool, detail: str) -> None:
        """Notes one claim."""
        self.lines.append(f"{'holds' if held else 'DOES NOT HOLD'}: {claim} ({detail})")
        if not held:
            self.failures.append(f"{claim} ({detail})")

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"run": str(self.folder), "holds": self.holds, "claims": self.lines, "failures": self.failures}

    def __str__(self) -> str:
        verdict = "holds" if self.holds else f"does not hold: {len(self.failures)} of {len(self.lines)} claims fail"
        return "\n".join([*self.lines, f"{self.folder}: {verdict}"])


def verify(path: Path, *, device: str = "auto", data_dir: Path | None = None, trust: bool = False) -> Report:
    """Verifies a run folder or an evidence bundle; see `verify_run` and `verify_evidence`."""
    if (path / MANIFEST).exists():
        return verify_evidence(path, device=device, data_dir=data_dir, trust=trust)
    return verify_run(path, device=device, data_dir=data_dir)


def verify_run(folder: Path, *, device: str = "auto", data_dir: Path | None = None) -> Report:
    """Re-judges a run: digests, box and eps, and every accuracy under fresh randomness.

    A deterministic defense must give the same answers; of a randomized one each accuracy must agree within the noise
    of two runs of the judge (a paired test over the examples at the 0.1 % level).

    Raises:
        UsageError: the defense or the data cannot be had by name.
        DataError: the run folder is damaged or incomplete.
    """
    result = Evaluation.load(folder)
    report = Report(folder)
    data = _load_data(result.spec, folder, data_dir)
    _verify(report, result, data, device)
    return report


def verify_evidence(
    folder: Path, *, row: Row | None = None, device: str = "auto", data_dir: Path | None = None, trust: bool = False
) -> Report:
    """Re-judges the bundle of a leaderboard row: its files, its row, and then as `verify_run` does.

    Args:
        folder: the bundle.
        row: the row as published; None checks the bundle alone.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        trust: run the defense's code also where it comes from a file or a package that is not robench's.

    Raises:
        UsageError: something that the check needs is missing; the message says what.
    """
    report = Report(folder)
    try:
        bundle = read_bundle(folder)
        published = bundle.row()
    except DataError as error:
        report.check("files are those that were published", held=False, detail=str(error))
        return report
    report.check("files are those that were published", held=True, detail=f"digest {bundle.digest}")
    if row is not None:
        changed = [
            f"{key} {row.get(key, '')!r}, not {value!r}"
            for key, value in published.items()
            if key != "rank" and row.get(key, "") != value
        ]
        report.check("row is that of the evidence", not changed, ", ".join(changed) or f"{len(published)} cells")
    name = bundle.spec.defense
    if not trust and name and parse_spec(name)[0] not in builtin_names("defense"):
        raise UsageError(
            f'{folder} cannot be checked: defense "{name}" is not one of robench\'s. --trust runs its code'
        )
    data = _load_data(bundle.spec, folder, data_dir)
    if data.digest == bundle.spec.data_digest:  # else _verify says so, and the images would not fit the originals
        try:
            result = bundle.result(data.x)
        except (ValueError, KeyError) as error:
            report.check("images can be read", held=False, detail=str(error))
            return report
    else:
        result = bundle.figures
    _verify(report, result, data, device)
    return report


def _load_data(spec: RunSpec, folder: Path, data_dir: Path | None) -> Dataset:
    if not spec.defense or not spec.dataset:
        raise UsageError(f"{folder} cannot be checked: it names no defense or no dataset to load")
    return load_dataset(spec.dataset, "test", spec.n, spec.seed, data_dir)


def _verify(report: Report, result: Evaluation, data: Dataset, device: str) -> None:
    spec = result.spec
    device = Settings(device=device).resolve_device()
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    digest = weights_digest(defense)
    report.check("weights are those of the run", digest == spec.weights_digest, f"digest {digest[:16]}")
    report.check("images are those of the run", data.digest == spec.data_digest, f"digest {data.digest[:16]}")
    clean = result.answers(CLEAN)
    if clean is not None:
        wrong = int((clean.labels != data.y.numpy()).sum()) if len(clean.labels) == len(data.y) else len(data.y)
        report.check("labels are those of the data", wrong == 0, f"{wrong} of {len(data.y)} differ")
    if report.failures:
        return
    defense.to(device)

    def fresh(x: torch.Tensor) -> Answers:
        votes = judge_in_units(defense, x.to(device), spec.judge_repeats, spec.unit_size)
        return Answers(votes.numpy(), data.y.numpy())

    with seeded(spec.seed, "verify", device=device):
        claims = [("clean accuracy", clean, data.x)]
        for eps in spec.eps:
            claim, stored = f"robust accuracy at eps {eps:g}", result.answers(WORST, eps)
            claims.append((claim, stored, data.x))
            if stored is None:
                continue
            x_adv = torch.from_numpy(result.images(WORST, eps))
            bounds = check_bounds(data.x, x_adv, ThreatModel(spec.norm, eps))
            rule = bounds.broken_rule()
            report.check(f"images at eps {eps:g} are within the bounds", rule is None, rule or f"{len(x_adv)} images")
            claims[-1] = (claim, stored, x_adv)
            if rule is not None:
                claims.pop()  # no answer on such images is a claim about this threat model, and NaN has none
        for claim, stored, x in claims:
            if stored is None:
                report.check(claim, held=False, detail="an attack failed, so there is no claim")
                continue
            _compare(report, claim, stored, fresh(x))


def _compare(report: Report, claim: str, stored: Answers, fresh: Answers) -> None:
    before, now = stored.right / stored.repeats, fresh.right / fresh.repeats
    old, new = stored.accuracy(), fresh.accuracy()
    if stored.repeats == 1:
        changed = int((before != now).sum())
        report.check(claim, changed == 0, f"stored {_text(old)}, now {_text(new)}, {changed} answers differ")
        return
    report.check(claim, not differ(np.asarray(before), np.asarray(now)), f"stored {_text(old)}, now {_text(new)}")


def _text(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
