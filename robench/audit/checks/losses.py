"""Does it matter which loss the attack climbs?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, compare_runs
from robench.audit.evidence import Evidence

TOLERANCE = 0.10


def judge(evidence: Evidence) -> Outcome:
    """Fails where the margin breaks far more than cross-entropy: the softmax hides the gradient."""
    reason = "the accuracy under PGD on cross-entropy less that under PGD on the margin: {gap}"
    return compare_runs(evidence, "pgd", "pgd, margin loss", TOLERANCE, reason)


CHECK = Check(
    "loss_choice",
    "Carlini and Wagner 2016 (arXiv 1607.04311) on distillation; Croce and Hein 2020 (arXiv 2003.01690), section 4",
    judge,
    runs=("pgd", "pgd, margin loss"),
)
