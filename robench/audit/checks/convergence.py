"""Is the attack at its end: do more steps, restarts or draws change nothing?"""

from __future__ import annotations

import dataclasses

from robench.audit.checks.base import Check, Outcome, accuracy_curve, compare_runs, not_run
from robench.audit.evidence import Evidence
from robench.audit.finding import Plot

TOLERANCE = 0.10
DOUBLED = {"steps": "pgd, double steps", "restarts": "pgd, double restarts", "draws": "pgd, double draws"}

LEAST = {"steps": ("fgsm",), "restarts": (), "draws": ("pgd, one draw",)}
"""The runs with one step or draw, for the plot."""


def _judge(evidence: Evidence, what: str) -> Outcome:
    name = DOUBLED[what]
    if reason := evidence.applies(name):
        return not_run(reason)
    reason = f"the accuracy under PGD less that with twice the {what}: {{gap}}"
    outcome = compare_runs(evidence, "pgd", name, TOLERANCE, reason)
    return outcome if outcome.verdict == "not run" else dataclasses.replace(outcome, plot=_plot(evidence, what))


def _plot(evidence: Evidence, what: str) -> Plot:
    """Accuracy against the effort, over the runs of the audit that differ in nothing else."""
    usual = {"steps": evidence.effort.steps, "restarts": 1, "draws": evidence.effort.eot}[what]
    runs = {**dict.fromkeys(LEAST[what], 1), "pgd": usual, DOUBLED[what]: 2 * usual}
    known = {float(at): estimate for name, at in runs.items() if (estimate := evidence.estimate(name))}
    return Plot(what, "accuracy (%)", (accuracy_curve("PGD", known),))


def _make(what: str) -> Check:
    return Check(
        f"double_{what}",
        "Carlini et al. 2019 (arXiv 1902.06705), section 4; Athalye et al. 2018 (arXiv 1802.00420) for the draws",
        lambda evidence: _judge(evidence, what),
        runs=("pgd", DOUBLED[what], *LEAST[what]),
        only="randomized" if what == "draws" else "",
    )


CHECKS = tuple(_make(what) for what in DOUBLED)
