"""Is the gradient the derivative of what is judged?"""

from __future__ import annotations

import numpy as np

from robench.audit.checks.base import Check, Outcome, graded, not_run, quantile_curve
from robench.audit.evidence import Evidence
from robench.audit.finding import Plot
from robench.errors import PluginError
from robench.losses import margin

STEPS = (0.02, 0.1)
"""Lengths of the difference, as shares of eps: short ones drown in float32's rounding, long ones in curvature."""
SLOPE_SUSPECT, SLOPE_FAIL = 0.5, 0.15
SUSPECT, FAIL = 0.25, 0.5


def judge(evidence: Evidence) -> Outcome:
    """Compares the rise of the margin along the gradient's steepest direction with what the gradient promises.

    The rise is that of `forward`, by central differences, under the same draws on both sides. Rise / promise is 1 at
    each image for an exact gradient, near 0 for a stand-in that says nothing, negative for a flipped one, and
    another number at each image where the classifier jumps. The statistic is the median over the images of its distance
    from its own median, relative to that (so that a gradient with a constant factor does not count as wrong), of the
    better of two step lengths.
    """
    x, y, threat = evidence.x, evidence.y, evidence.threat
    try:
        grad = evidence.gradient(x, y, margin, draws=evidence.effort.local_draws, purpose="difference").grad
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    direction = threat.steepest(grad)
    promised = (grad * direction).flatten(1).sum(1).double().cpu().numpy()
    usable = np.isfinite(promised) & (promised > 0)
    if usable.mean() < 0.5:
        return not_run("the gradient is zero at most images")
    ratios = []
    for part in STEPS:
        step = part * threat.eps
        up, down = (
            evidence.losses((x + sign * step * direction).clamp(0, 1), y, margin, purpose="difference")
            for sign in (1, -1)
        )
        moved = (x + step * direction).clamp(0, 1) - (x - step * direction).clamp(0, 1)
        expected = (grad * moved).flatten(1).sum(1).double().cpu().numpy()
        kept = usable & (np.abs(expected) > 1e-12)
        ratios.append((up - down)[kept] / expected[kept])
    slopes = [float(np.median(ratio)) for ratio in ratios]
    spreads = [
        float(np.median(np.abs(ratio / max(slope, SLOPE_FAIL) - 1)))
        for slope, ratio in zip(slopes, ratios, strict=True)
    ]
    spread, slope = min(zip(spreads, slopes, strict=True))
    verdict = graded(spread, SUSPECT, FAIL)
    if verdict == "pass" and not SLOPE_SUSPECT <= slope <= 1 / SLOPE_SUSPECT:
        verdict = "suspect"
    reason = (
        f"along the gradient the margin rises {slope:.2f} times as fast as the gradient says (median of the images; "
        f"half of them differ from that by {100 * spread:.0f} % or more)"
    )
    curve = quantile_curve("rise / promise", list(STEPS), ratios)
    return Outcome(verdict, spread, FAIL, reason, Plot("step / eps", "rise / promise", (curve,)))


CHECK = Check(
    "finite_differences",
    "Athalye et al. 2018 (arXiv 1802.00420), shattered gradients; Carlini et al. 2019 (arXiv 1902.06705)",
    judge,
)
