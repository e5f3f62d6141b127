"""Does an attack without a bound reach chance?"""

from __future__ import annotations

from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.evidence import Evidence
from robench.audit.statistics import HINT, LEVEL
from robench.check_names import Verdict


def judge(evidence: Evidence) -> Outcome:
    """Fails where PGD in a ball that holds every image leaves more than chance, one in the number of classes.

    Tested on whole images: an image counts as left where most of its answers are right.
    """
    from scipy.stats import binomtest

    right = evidence.right("pgd, unbounded")
    if right is None:
        return not_run("the attack failed")
    chance = 1 / evidence.defense.num_classes
    left, n = int((right > 0.5).sum()), len(right)
    level = float(binomtest(left, n, chance, alternative="greater").pvalue)
    verdict: Verdict = "fail" if level <= LEVEL and left / n > 1.5 * chance else "suspect" if level <= HINT else "pass"
    reason = f"without a bound PGD leaves {100 * left / n:.1f} % of the images right; chance is {100 * chance:.0f} %"
    return Outcome(verdict, left / n, chance, reason)


CHECK = Check(
    "unbounded",
    "Athalye et al. 2018 (arXiv 1802.00420), section 3.1; Pintor et al. 2022 (arXiv 2106.09947), indicator 6",
    judge,
    runs=("pgd, unbounded",),
)
