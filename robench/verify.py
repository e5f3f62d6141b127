"""`robench verify`: judges a run's saved adversarial images again under fresh randomness and checks the claim."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robench.data import load_dataset
from robench.defense import weights_digest
from robench.errors import UsageError
from robench.judge import check_bounds, judge
from robench.registry import load_defense
from robench.result import Answers, Estimate, Evaluation
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


def verify_run(folder: Path, *, device: str = "auto", data_dir: Path | None = None) -> Report:
    """Re-judges a run: digests, box and eps, and every accuracy under fresh randomness.

    A deterministic defense must give the same answers; of a randomized one each accuracy must agree within the noise
    of two runs of the judge (a paired test over the examples at the 0.1 % level).

    Raises:
        UsageError: the defense or the data cannot be had by name.
        DataError: the run folder is damaged or incomplete.
    """
    result = Evaluation.load(folder)
    spec = result.spec
    if not spec.defense or not spec.dataset:
        raise UsageError(f"{folder} cannot be checked: it names no defense or no dataset to load")
    report = Report(folder)
    device = Settings(device=device).resolve_device()
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    digest = weights_digest(defense)
    report.check("weights are those of the run", digest == spec.weights_digest, f"digest {digest[:16]}")
    data = load_dataset(spec.dataset, "test", spec.n, spec.seed, data_dir)
    report.check("images are those of the run", data.digest == spec.data_digest, f"digest {data.digest[:16]}")
    if report.failures:
        return report
    defense.to(device)

    def fresh(x: torch.Tensor) -> Answers:
        parts = [judge(defense, rows, spec.judge_repeats) for rows in x.to(device).split(spec.unit_size)]
        return Answers(torch.cat(parts).numpy(), data.y.numpy())

    with seeded(spec.seed, "verify", device=device):
        claims = [("clean accuracy", result.answers(CLEAN), data.x)]
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
    return report


def _compare(report: Report, claim: str, stored: Answers, fresh: Answers) -> None:
    before, now = stored.right / stored.repeats, fresh.right / fresh.repeats
    old, new = stored.accuracy(), fresh.accuracy()
    if stored.repeats == 1:
        changed = int((before != now).sum())
        report.check(claim, changed == 0, f"stored {_text(old)}, now {_text(new)}, {changed} answers differ")
        return
    report.check(claim, not differ(np.asarray(before), np.asarray(now)), f"stored {_text(old)}, now {_text(new)}")


def _text(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f} %"
