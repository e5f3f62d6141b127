"""Is one step weaker than many?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.evidence import Evidence
from robench.audit.statistics import compare

TOLERANCE = 0.05


def judge(evidence: Evidence) -> Outcome:
    """Fails where FGSM leaves a lower accuracy than PGD."""
    one, many = evidence.right("fgsm"), evidence.right("pgd")
    if one is None or many is None:
        return not_run("an attack failed")
    gap = compare(many, one)
    reason = f"PGD leaves {gap} more right than FGSM, where it should leave less{gap.power()}"
    return Outcome(gap.verdict(TOLERANCE), gap.mean, TOLERANCE, reason)


CHECK = Check(
    "single_step",
    "Athalye et al. 2018 (arXiv 1802.00420), section 3.1; Lamb et al. 2018 (arXiv 1804.02485)",
    judge,
    runs=("fgsm", "pgd"),
)
