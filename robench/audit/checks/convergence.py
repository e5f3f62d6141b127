"""Is the attack at its end: do more steps, restarts or draws change nothing?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, compare_runs, not_run
from robench.audit.evidence import Evidence

TOLERANCE = 0.10
DOUBLED = {"steps": "pgd, double steps", "restarts": "pgd, double restarts", "draws": "pgd, double draws"}


def _judge(evidence: Evidence, what: str) -> Outcome:
    name = DOUBLED[what]
    if reason := evidence.applies(name):
        return not_run(reason)
    return compare_runs(
        evidence, "pgd", name, TOLERANCE, f"the accuracy under PGD less that with twice the {what}: {{gap}}"
    )


def _make(what: str) -> Check:
    return Check(
        f"double_{what}",
        "Carlini et al. 2019 (arXiv 1902.06705), section 4; Athalye et al. 2018 (arXiv 1802.00420) for the draws",
        lambda evidence: _judge(evidence, what),
        runs=("pgd", DOUBLED[what]),
        only="randomized" if what == "draws" else "",
    )


CHECKS = tuple(_make(what) for what in DOUBLED)
