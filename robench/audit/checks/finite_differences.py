"""Is the gradient the derivative of what is judged?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from robench.audit.checks.base import Check, Outcome, graded, not_run, quantile_curve
from robench.audit.evidence import Evidence
from robench.audit.finding import Plot
from robench.check_names import Verdict
from robench.defense import Defense
from robench.errors import PluginError
from robench.losses import margin
from robench.types import Images

STEPS: Final = (0.02, 0.1)
"""Lengths of the difference, as shares of eps: short ones drown in float32's rounding, long ones in curvature."""
SLOPE_SUSPECT, SLOPE_FAIL = 0.5, 0.15
SUSPECT, FAIL = 0.25, 0.5


@dataclass(frozen=True)
class _Rises:
    """How the margin rises along a gradient.

    Attributes:
        ratios: rise / promise of the images, for each length of the difference.
        slope: their median, at the length of the smaller spread.
        spread: the median distance of the images from that, relative to it.
    """

    ratios: list[npt.NDArray[np.float64]]
    slope: float
    spread: float

    @property
    def verdict(self) -> Verdict:
        verdict = graded(self.spread, SUSPECT, FAIL)
        if verdict == "pass" and not SLOPE_SUSPECT <= self.slope <= 1 / SLOPE_SUSPECT:
            return "suspect"
        return verdict


def judge(evidence: Evidence) -> Outcome:
    """Compares the rise of the margin along the gradient's steepest direction with what the gradient promises.

    The rise is that of `forward`, by central differences, under the same draws on both sides. Rise / promise is 1 at
    each image for an exact gradient, near 0 for a stand-in that says nothing, negative for a flipped one, and
    another number at each image where the classifier jumps. The statistic is the median over the images of its distance
    from its own median, relative to that (so that a gradient with a constant factor does not count as wrong), of the
    better of two step lengths.

    Suspect at most where a path of the defense's own (`adaptive_forward`) leads past a `forward` whose own gradient is
    no derivative of it either, or missing: a stand-in for a step, which is its purpose. What it is worth is told by the
    attacks that do without it. Where `forward` could be differentiated, a path that says otherwise fails.
    """
    x, y = evidence.x, evidence.y
    try:
        grad = evidence.gradient(x, y, margin, draws=evidence.effort.local_draws, purpose="difference").grad
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    rises = _measure(evidence, grad)
    if rises is None:
        return not_run("the gradient is zero at most images")
    verdict = rises.verdict
    reason = (
        f"along the gradient the margin rises {rises.slope:.2f} times as fast as the gradient says (median of the "
        f"images; half of them differ from that by {100 * rises.spread:.0f} % or more)"
    )
    if verdict == "fail" and _is_stand_in(evidence):
        verdict = "suspect"
        reason += "; adaptive_forward stands in for a forward without a derivative: square, noise and transfer decide"
    curve = quantile_curve("rise / promise", list(STEPS), rises.ratios)
    return Outcome(verdict, rises.spread, FAIL, reason, Plot("step / eps", "rise / promise", (curve,)))


def _measure(evidence: Evidence, grad: Images) -> _Rises | None:
    """The rise of the margin of `forward` along a gradient; None where it is zero or not finite at most images."""
    x, y, threat = evidence.x, evidence.y, evidence.threat
    direction = threat.steepest(grad)
    promised = (grad * direction).flatten(1).sum(1).double().cpu().numpy()
    usable = np.isfinite(promised) & (promised > 0)
    if usable.mean() < 0.5:
        return None
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
    return _Rises(ratios, slope, spread)


def _is_stand_in(evidence: Evidence) -> bool:
    """Whether the gradient is that of a path of the defense's own, and that of `forward` is no derivative either."""
    if type(evidence.defense).adaptive_forward is Defense.adaptive_forward:
        return False
    try:
        rises = _measure(evidence, _differentiate(evidence))
    except RuntimeError:  # no graph from the images to the logits
        return True
    return rises is None or rises.verdict == "fail"


def _differentiate(evidence: Evidence) -> Images:
    """The gradient of the margin of `forward` itself, averaged over the draws of the check."""

    def pull(x: Images, y: torch.Tensor) -> Images:
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(margin(evidence.defense(leaf), y).sum(), leaf)
        return grad

    with torch.enable_grad():
        return evidence.average(pull, evidence.x, evidence.y, None, "difference")


CHECK = Check(
    "finite_differences",
    "Athalye et al. 2018 (arXiv 1802.00420), shattered gradients; Carlini et al. 2019 (arXiv 1902.06705)",
    judge,
)
