"""Do the gradient paths that a defense offers agree on what they break?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.evidence import Evidence
from robench.audit.statistics import compare

TOLERANCE = 0.10


def judge(evidence: Evidence) -> Outcome:
    """Fails where a stand-in for the gradient breaks far more than the path that the defense calls strongest."""
    modes = evidence.defense.gradient_modes
    if len(modes) < 2:
        return not_run("the defense offers one gradient path")
    first = evidence.right("pgd")
    worst, which = None, ""
    for mode in modes[1:]:
        other = evidence.right(f"pgd@{mode}")
        if first is None or other is None:
            continue
        gap = compare(first, other)
        if worst is None or gap.mean > worst.mean:
            worst, which = gap, mode
    if worst is None:
        return not_run("an attack failed")
    reason = f"the accuracy under PGD along {modes[0]} less that along {which}: {worst}{worst.power(TOLERANCE)}"
    return Outcome(worst.verdict(TOLERANCE), worst.mean, TOLERANCE, reason)


CHECK = Check(
    "gradient_modes",
    "Athalye et al. 2018 (arXiv 1802.00420), BPDA; Lee and Kim 2023 (arXiv 2303.09051)",
    judge,
    runs=("pgd",),
)
