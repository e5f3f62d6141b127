"""Does the attack's loss rise to its end, and is what it finds on the way kept?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robench.audit.checks.base import Check, Outcome, graded_share, not_run, quantile_curve
from robench.audit.evidence import Evidence
from robench.audit.finding import Plot
from robench.errors import PluginError
from robench.losses import margin
from robench.rng import seeded

IMAGES = 64
SUSPECT, FAIL = 0.1, 0.3
"""Of `silent_success`."""
ATTRIBUTE = "_trajectory"


@dataclass(frozen=True)
class Trajectory:
    """Plain PGD on cross-entropy that keeps its last point.

    Attributes:
        loss: of each step and image, `steps + 1 images`.
        wrong: where the answer was wrong, likewise.
    """

    loss: npt.NDArray[np.float64]
    wrong: npt.NDArray[np.bool_]


def _walk(evidence: Evidence) -> Trajectory:
    """Walks once; other checks get the same walk.

    Raises:
        PluginError: the defense gives no gradient.
    """
    known: Trajectory | None = evidence.shared.get(ATTRIBUTE)
    if known is not None:
        return known
    x, y, threat = evidence.x[:IMAGES], evidence.y[:IMAGES], evidence.threat
    steps = evidence.effort.steps
    with seeded(evidence.seed, "audit", "walk", device=evidence.device):
        point = threat.random_start(x)
    losses, wrong = [], []
    for number in range(steps + 1):
        found = evidence.gradient(point, y, "ce", purpose=f"walk {number}")
        losses.append(found.loss.double().cpu().numpy())
        wrong.append((margin(found.logits, y) > 0).cpu().numpy())
        point = threat.project(x, point + 2.5 * threat.eps / steps * threat.steepest(found.grad))
    walk = Trajectory(np.array(losses), np.array(wrong))
    evidence.shared[ATTRIBUTE] = walk
    return walk


def judge_silent(evidence: Evidence) -> Outcome:
    """The share of images that were misclassified on the way and not at the end."""
    try:
        walk = _walk(evidence)
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    share, verdict = graded_share(walk.wrong.any(0) & ~walk.wrong[-1], SUSPECT, FAIL)
    reason = f"{100 * share:.0f} % of the images are broken on the way and right at PGD's last step"
    if evidence.defense.randomized:
        return Outcome("suspect" if share >= FAIL else "pass", share, None, f"{reason} (chance plays a part)")
    return Outcome(verdict, share, FAIL, reason)


def judge_incomplete(evidence: Evidence) -> Outcome:
    """The share of images still right whose loss, scaled to [0, 1], rises by over 0.05 in the last tenth of the steps.

    An attack that needs more steps is no sign of masking by itself: suspect at most.
    """
    try:
        walk = _walk(evidence)
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    best = np.maximum.accumulate(walk.loss, axis=0)
    span = np.maximum(best[-1] - best[0], 1e-12)
    rise = (best[-1] - best[-1 - max(len(best) // 10, 1)]) / span
    left = ~walk.wrong[-1]
    share = float((rise > 0.05)[left].mean()) if left.any() else 0.0
    steps = [float(step) for step in range(len(walk.loss))]
    plot = Plot("step", "cross-entropy", (quantile_curve("loss", steps, list(walk.loss)),))
    reason = f"the loss still rises at the end for {100 * share:.0f} % of the {int(left.sum())} images that stay right"
    suspect = share >= 0.5 and int(left.sum()) >= 0.1 * len(left) and not evidence.defense.randomized
    return Outcome("suspect" if suspect else "pass", share, None, reason, plot)


def judge_break_point(evidence: Evidence) -> Outcome:
    """The mean of 1 - |cos b|, with b the angle where the loss curve, scaled to the unit square, bends most.

    1 for a curve that rises at once and then stays (a sound attack), 0 for a straight line. The published code returns
    |cos b| instead, whose orientation is the opposite; this is the paper's. Informative only.
    """
    try:
        walk = _walk(evidence)
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    values = [_bend(column) for column in walk.loss.T]
    value = float(np.mean(values))
    return Outcome("pass", value, None, f"the loss curves bend by {value:.2f} (1: at once, 0: not at all)")


def _bend(loss: npt.NDArray[np.float64]) -> float:
    best = np.maximum.accumulate(loss)
    if best[-1] - best[0] <= 1e-12:
        return 0.0
    y = (best - best[0]) / (best[-1] - best[0])
    x = np.linspace(0, 1, len(y))
    corner = int(np.argmax(y - x))  # farthest above the chord from (0, 0) to (1, 1)
    first, second = np.array([x[corner], y[corner]]), np.array([1 - x[corner], 1 - y[corner]])
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return 1 - abs(float(first @ second) / norms) if norms > 0 else 0.0


CHECKS = (
    Check(
        "silent_success",
        "Pintor et al. 2022 (arXiv 2106.09947), indicator 3",
        judge_silent,
    ),
    Check(
        "incomplete_optimisation",
        "Pintor et al. 2022 (arXiv 2106.09947), indicator 4",
        judge_incomplete,
    ),
    Check(
        "break_point",
        "Pintor et al. 2021 (arXiv 2106.09947v1), break-point angle",
        judge_break_point,
    ),
)
