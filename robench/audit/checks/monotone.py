"""Does a larger bound break at least as much?"""

from __future__ import annotations

import itertools

from robench.audit.checks.base import Check, Outcome, accuracy_curve, not_run
from robench.audit.evidence import RUNS, Evidence
from robench.audit.finding import Plot
from robench.audit.statistics import compare

TOLERANCE = 0.05
SWEEPS = {
    "fgsm": ("fgsm, half eps", "fgsm", "fgsm, double eps"),
    "pgd": ("pgd, half eps", "pgd", "pgd, double eps"),
}


def judge(evidence: Evidence) -> Outcome:
    """The largest rise of accuracy from one bound to the next, of FGSM and of PGD, each bound attacked by itself."""
    worst, where = None, ""
    curves = []
    for attack, names in SWEEPS.items():
        rights = [evidence.right(name) for name in names]
        if any(right is None for right in rights):
            continue
        known = [right for right in rights if right is not None]
        at = {evidence.bound(RUNS[name].factor): estimate for name in names if (estimate := evidence.estimate(name))}
        curves.append(accuracy_curve(attack, at))
        for low, high in itertools.pairwise(known):
            gap = compare(high, low)
            if worst is None or gap.mean > worst.mean:
                worst, where = gap, attack
    if worst is None:
        return not_run("an attack failed")
    reason = f"accuracy under {where} changes by {worst} at the next larger bound, where it should not rise"
    plot = Plot("eps", "accuracy (%)", tuple(curves))
    return Outcome(worst.verdict(TOLERANCE), worst.mean, TOLERANCE, reason + worst.power(TOLERANCE), plot)


CHECK = Check(
    "monotone",
    "Athalye et al. 2018 (arXiv 1802.00420), section 3.1; Andriushchenko and Flammarion 2020 (arXiv 2007.02617)",
    judge,
    runs=tuple(name for names in SWEEPS.values() for name in names),
)
