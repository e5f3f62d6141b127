"""Do attacks without gradients break what those with gradients do not?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.evidence import Evidence
from robench.audit.statistics import compare

TOLERANCE = 0.03
WHITE_BOX = ("fgsm", "pgd", "pgd, margin loss")
NAMES = {"square": "the score attack square", "noise": "random noise", "transfer": "transfer from another defense"}


def white_box(evidence: Evidence) -> npt.NDArray[np.float64] | None:
    """The share of right answers of each image under the gradient attacks; None where all failed.

    Of a deterministic defense the lowest at each image. Of a randomized one those under the attack of lowest accuracy:
    the lowest of several noisy shares would be lower by chance than the one share of the other side.
    """
    found = [right for name in WHITE_BOX if (right := evidence.right(name)) is not None]
    if not found:
        return None
    return min(found, key=np.mean) if evidence.defense.randomized else np.min(found, axis=0)


def _judge(evidence: Evidence, name: str) -> Outcome:
    if reason := evidence.applies(name):
        return not_run(reason)
    black = evidence.right(name)
    if black is None:
        return not_run("the attack failed")
    white = white_box(evidence)
    if white is None:
        cost = compare(evidence.clean, black)
        return not_run(f"no attack with gradients could be run to compare with; {NAMES[name]} costs {cost}")
    if evidence.defense.randomized:  # the lower of two draws would be lower by chance
        said = "the accuracy under the strongest of FGSM and PGD (two losses) less that under"
        gap = compare(white, black)
    else:
        gap, said = compare(white, np.minimum(white, black)), "images that FGSM and PGD (two losses) leave to"
    return Outcome(gap.verdict(TOLERANCE), gap.mean, TOLERANCE, f"{said} {NAMES[name]}: {gap}{gap.power(TOLERANCE)}")


def _make(name: str) -> Check:
    return Check(
        name,
        "Athalye et al. 2018 (arXiv 1802.00420), section 3.1; Carlini et al. 2019 (arXiv 1902.06705)",
        lambda evidence: _judge(evidence, name),
        runs=(*WHITE_BOX, name),
    )


CHECKS = tuple(_make(name) for name in NAMES)
