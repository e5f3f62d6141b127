"""What a check says, and what all of them together say of a defense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from robench.check_names import Overall, Verdict, overall
from robench.shares import in_percent
from robench.types import Images

TOLD: Final = ("clean", "fgsm", "pgd", "square", "transfer")
"""The runs whose accuracies an audit tells where it is printed: those at the bound of the claim."""


@dataclass(frozen=True)
class Curve:
    """Points for a plot of a finding.

    Attributes:
        label: in the legend.
        x: positions.
        y: values.
        low: lower ends of 95 % intervals; () if there are none.
        high: upper ends.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A plot of a finding.

    Attributes:
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        curves: what is drawn.
        log_x: a logarithmic horizontal axis.
    """

    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: the check's name.
        verdict: `fail` is a sign of gradient masking beyond noise, `suspect` one that may be noise or have a harmless
            cause, `not run` says that the check does not apply or could not be made.
        statistic: what was measured; None where nothing was.
        threshold: the value of the statistic at which the check fails.
        reason: a sentence for the report.
        paper: where the check comes from.
        plot: the evidence as curves; None if there is none to draw.
        seconds: time of the check's own measurements.
    """

    check: str
    verdict: Verdict
    statistic: float | None
    threshold: float | None
    reason: str
    paper: str
    plot: Plot | None = field(default=None, repr=False)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        content: dict[str, Any] = {
            "check": self.check,
            "verdict": self.verdict,
            "statistic": None if self.statistic is None else round(self.statistic, 6),
            "threshold": self.threshold,
            "reason": self.reason,
            "paper": self.paper,
        }
        if self.plot is not None:
            content["plot"] = {
                "x_label": self.plot.x_label,
                "y_label": self.plot.y_label,
                "curves": [vars(curve) for curve in self.plot.curves],
            }
        return content


@dataclass(frozen=True)
class Audit:
    """The audit of a defense in one threat model.

    Attributes:
        defense: its name.
        dataset: the data's name.
        threat: the threat model, as text.
        n: images.
        seed: seeded everything.
        findings: of each check, in the order of the list of checks.
        accuracies: clean accuracy and that under each run of the audit, in percent: value, low, high.
        seconds: wall time.
        facts: what else identifies the audit: norm, eps, eot, effort, digests of data and weights, versions.
        examples: rows of images `b c h w` for the report: originals, what PGD made of them, the difference.
        notes: what the verdict does not say and a reader has to know: of a clean accuracy near chance.
    """

    defense: str
    dataset: str
    threat: str
    n: int
    seed: int
    findings: tuple[Finding, ...]
    accuracies: Mapping[str, tuple[float, float, float]]
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    examples: Mapping[str, Images] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> dict[str, list[float]]:
        """The accuracies as every display rounds them; see `robench.shares`."""
        return {name: [in_percent(one / 100) for one in found] for name, found in self.accuracies.items()}

    def __str__(self) -> str:
        told = [(name, self.shown[name]) for name in TOLD if name in self.accuracies]
        parts = [
            f"audit of {self.defense} on {self.dataset or 'images of the caller'}, {self.n} images, {self.threat}",
            f"verdict {self.verdict}",
            *([f"failed: {', '.join(self.failed)}"] if self.failed else []),
            *(f"{name} {value:.1f} % [{low:.1f}, {high:.1f}]" for name, (value, low, high) in told),
            *self.notes,
        ]
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"<Audit: {self}>"

    @property
    def verdict(self) -> Overall:
        """`pass`, `suspect` or `masked`; see `overall`."""
        return overall({finding.verdict for finding in self.findings})

    @property
    def failed(self) -> list[str]:
        """The checks that failed, for the leaderboard row."""
        return [finding.check for finding in self.findings if finding.verdict == "fail"]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "defense": self.defense,
            "dataset": self.dataset,
            "threat": self.threat,
            "n": self.n,
            "seed": self.seed,
            **self.facts,
            "verdict": self.verdict,
            "failed": self.failed,
            **({"notes": list(self.notes)} if self.notes else {}),
            "findings": [finding.to_json() for finding in self.findings],
            "accuracies": {name: list(values) for name, values in self.accuracies.items()},
            "seconds": round(self.seconds, 1),
        }
