"""Does judging an attack that changes nothing give the clean accuracy?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.evidence import Evidence
from robench.audit.statistics import compare_both_ways

TOLERANCE = 0.05


def judge(evidence: Evidence) -> Outcome:
    """Compares clean answers with those after an attack with bound 0, which returns the images themselves."""
    after = evidence.right("nothing")
    if after is None:
        return not_run("the attack with bound 0 failed")
    gap = compare_both_ways(evidence.clean, after)
    reason = f"an attack with bound 0 moves the accuracy by {gap}, where it may not move it beyond noise"
    return Outcome(gap.verdict(TOLERANCE), gap.mean, TOLERANCE, reason)


CHECK = Check(
    "null_control",
    "Tramer et al. 2020 (arXiv 2002.08347); a null control of the judge",
    judge,
    runs=("nothing",),
)
