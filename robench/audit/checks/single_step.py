"""Is one step weaker than many?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, compare_runs
from robench.audit.evidence import Evidence

TOLERANCE = 0.05


def judge(evidence: Evidence) -> Outcome:
    """Fails where FGSM leaves a lower accuracy than PGD."""
    reason = "the accuracy under PGD less that under FGSM, which should not be above 0: {gap}"
    return compare_runs(evidence, "pgd", "fgsm", TOLERANCE, reason)


CHECK = Check(
    "single_step",
    "Athalye et al. 2018 (arXiv 1802.00420), section 3.1; Lamb et al. 2018 (arXiv 1804.02485)",
    judge,
    runs=("fgsm", "pgd"),
)
