"""Does the loss rise along the gradient, and more than along random directions?"""

from __future__ import annotations

import numpy as np
import torch

from robench.audit.checks.base import Check, Outcome, graded_share, not_run, quantile_curve
from robench.audit.evidence import Evidence
from robench.audit.finding import Plot
from robench.errors import PluginError
from robench.losses import margin
from robench.rng import seeded

SHARES = (0.1, 0.25, 0.5, 1.0)
JUDGED = 0.5
SUSPECT, FAIL = 0.75, 0.5


def judge(evidence: Evidence) -> Outcome:
    """The share of images at which a step of eps / 2 along the gradient raises the margin more than random ones do.

    Random ones: the best of several directions of the same length, so that chance alone would win once in as many.
    """
    x, y, threat = evidence.x, evidence.y, evidence.threat
    try:
        along = threat.steepest(evidence.gradient(x, y, margin, purpose="surface").grad)
    except (PluginError, RuntimeError):
        return not_run("the defense gives no gradient")
    start = evidence.losses(x, y, margin, purpose="surface")
    with seeded(evidence.seed, "audit", "directions", device=evidence.device):
        random = [threat.steepest(torch.randn_like(x)) for _ in range(evidence.effort.directions)]
    gains = {"gradient": [], "random": []}  # type: dict[str, list[np.ndarray]]
    beaten = np.zeros(len(x), dtype=bool)
    for share in SHARES:
        step = share * threat.eps
        gain = evidence.losses((x + step * along).clamp(0, 1), y, margin, purpose="surface") - start
        tried = random if share == JUDGED else random[:1]
        others = [
            evidence.losses((x + step * other).clamp(0, 1), y, margin, purpose="surface") - start for other in tried
        ]
        gains["gradient"].append(gain)
        gains["random"].append(others[0])
        if share == JUDGED:
            beaten = gain > np.max(others, axis=0)
    won, verdict = graded_share(beaten, SUSPECT, FAIL, high_is_bad=False)
    curves = tuple(quantile_curve(name, list(SHARES), rows) for name, rows in gains.items())
    reason = (
        f"half of eps along the gradient raises the margin more than each of {len(random)} random directions "
        f"at {100 * won:.0f} % of the images"
    )
    return Outcome(verdict, won, FAIL, reason, Plot("step / eps", "rise of the margin", curves))


CHECK = Check(
    "loss_surface",
    "Tramer et al. 2018 (arXiv 1705.07204), section 4.1; Mosbach et al. 2018 (arXiv 1810.12042)",
    judge,
)
