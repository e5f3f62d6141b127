"""Are there gradients at all?"""

from __future__ import annotations

import torch

from robench.audit.checks.base import Check, Outcome, graded_share
from robench.audit.evidence import Evidence
from robench.errors import PluginError
from robench.rng import seeded

SUSPECT, FAIL = 0.02, 0.10


def judge(evidence: Evidence) -> Outcome:
    """The share of images at which the gradient of cross-entropy is missing, zero or not finite.

    Taken at the images and at a random point of the ball around each, where an attack starts.
    """
    x, y = evidence.x, evidence.y
    with seeded(evidence.seed, "audit", "start", device=evidence.device):
        start = evidence.threat.random_start(x)
    bad = []
    for name, images in (("clean", x), ("start", start)):
        try:
            grad = evidence.gradient(images, y, purpose=f"zero {name}").grad
        except (PluginError, RuntimeError) as error:
            reason = f"the defense gives no gradient, so that no attack with gradients was run: {_first_line(error)}"
            return Outcome("fail", 1.0, FAIL, reason)
        flat = grad.flatten(1)
        bad.append(~flat.isfinite().all(1) | (flat == 0).all(1))
    share, verdict = graded_share(torch.stack(bad).any(0).cpu().numpy(), SUSPECT, FAIL)
    reason = f"the gradient of cross-entropy is zero or not finite at {100 * share:.1f} % of the images"
    return Outcome(verdict, share, FAIL, reason)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


CHECK = Check(
    "zero_gradients",
    "Pintor et al. 2022 (arXiv 2106.09947), indicator 1; Croce et al. 2020 (arXiv 2003.01690)",
    judge,
)
