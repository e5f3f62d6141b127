"""Is the way to the image of a single step as right as its end?"""

from __future__ import annotations

import numpy as np

from robench.audit.checks.base import Check, Outcome, graded_share, not_run
from robench.audit.evidence import Evidence
from robench.audit.finding import Curve, Plot
from robench.errors import PluginError
from robench.losses import margin

SUSPECT, FAIL = 0.03, 0.10
LEAST = 10
"""Images that have to be right at both ends for a share of them to mean anything."""


def judge(evidence: Evidence) -> Outcome:
    """The share of images, right at the original and a whole step of size eps away, with a wrong one between the two.

    Adversarial training on one step can teach a net that one step (catastrophic overfitting): its accuracy under FGSM
    is high because FGSM's image lies beyond the wrong ones. Other nets have next to no such images. A randomized
    defense is asked under the same draws at all points, and its mean margin counts.
    """
    x, y, threat = evidence.x, evidence.y, evidence.threat
    try:
        direction = threat.steepest(evidence.gradient(x, y, purpose="distortion").grad)
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    points = evidence.effort.step_points
    steps = [number / points for number in range(points + 1)]
    wrong = np.stack(
        [
            evidence.losses((x + step * threat.eps * direction).clamp(0, 1), y, margin, purpose="distortion") > 0
            for step in steps
        ]
    )
    right_at_both = ~wrong[0] & ~wrong[-1]
    if right_at_both.sum() < LEAST:
        return not_run(f"a single step leaves {int(right_at_both.sum())} images right, too few to tell")
    inside = wrong[1:-1][:, right_at_both].max(axis=0)
    share, verdict = graded_share(inside, SUSPECT, FAIL)
    reason = f"{int(inside.sum())} of {len(inside)} images, right before and after a single step, are wrong in between"
    accuracy = tuple(float(100 * (1 - row.mean())) for row in wrong)
    plot = Plot("share of the step", "accuracy (%)", (Curve("along the single step", tuple(steps), accuracy),))
    return Outcome(verdict, share, FAIL, reason, plot)


CHECK = Check(
    "distortion",
    "Kim et al. 2021 (arXiv 2010.01799), distorted decision boundaries; Wong et al. 2020 (arXiv 2001.03994)",
    judge,
)
