"""Does it matter which loss the attack climbs?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.evidence import Evidence
from robench.audit.statistics import compare

TOLERANCE = 0.10


def judge(evidence: Evidence) -> Outcome:
    """Fails where the margin breaks far more than cross-entropy: the softmax hides the gradient."""
    plain, margin = evidence.right("pgd"), evidence.right("pgd, margin loss")
    if plain is None or margin is None:
        return not_run("an attack failed")
    gap = compare(plain, margin)
    reason = f"PGD on the margin breaks {gap} that PGD on cross-entropy leaves right{gap.power()}"
    return Outcome(gap.verdict(TOLERANCE), gap.mean, TOLERANCE, reason)


CHECK = Check(
    "loss_choice",
    "Carlini and Wagner 2016 (arXiv 1607.04311) on distillation; Croce and Hein 2020 (arXiv 2003.01690), section 4",
    judge,
    runs=("pgd", "pgd, margin loss"),
)
