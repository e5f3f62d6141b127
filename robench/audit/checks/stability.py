"""Are the answers near an image those at the image?"""

from __future__ import annotations

import numpy as np
import torch

from robench.audit.checks.base import Check, Outcome, graded
from robench.audit.evidence import Evidence
from robench.losses import margin
from robench.rng import seeded

WIDTH = 8 / 255
SUSPECT, FAIL = 0.2, 0.6


def judge(evidence: Evidence) -> Outcome:
    """The mean change of the margin in a box of width 8/255 around each image, relative to the margin's own size.

    Of a randomized defense under the same draws at both points. The published indicator takes cross-entropy, whose
    relative change is unbounded where it is nearly 0; the margin's is not.
    """
    x, y = evidence.x, evidence.y
    start = evidence.losses(x, y, margin, purpose="stability")
    changes = []
    for number in range(evidence.effort.directions):
        with seeded(evidence.seed, "audit", "box", number, device=evidence.device):
            near = (x + WIDTH * (torch.rand_like(x) - 0.5)).clamp(0, 1)
        changes.append(np.abs(evidence.losses(near, y, margin, purpose="stability") - start))
    relative = np.mean(changes, axis=0) / np.maximum(np.abs(start), 1e-12)
    value = float(np.minimum(relative, 1).mean())
    reason = f"random points within 4/255 change the margin by {100 * value:.0f} % of its size on average"
    return Outcome(graded(value, SUSPECT, FAIL), value, FAIL, reason)


CHECK = Check(
    "stability",
    "Pintor et al. 2022 (arXiv 2106.09947), indicator 2",
    judge,
)
