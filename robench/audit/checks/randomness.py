"""Does the randomness hide the gradient, and do the draws of an attack suffice?"""

from __future__ import annotations

import numpy as np
import torch

from robench.audit.checks.base import Check, Outcome, compare_runs, not_run, quantile_curve
from robench.audit.evidence import Evidence
from robench.audit.finding import Plot
from robench.audit.statistics import HINT, compare
from robench.errors import PluginError
from robench.unit_table import CLEAN

TOLERANCE = 0.10
COSINE = 0.9
SUSPECT_COSINE = 0.3
TRIES = 5
RETRY_SUSPECT = 0.05
PAPERS = "Athalye et al. 2018 (arXiv 1802.00420), section 4.2; Carlini et al. 2019 (arXiv 1902.06705)"


def judge_draws(evidence: Evidence) -> Outcome:
    """Fails where averaging over draws breaks far more than one draw: the accuracy rests on noise in the gradient."""
    reason = f"the accuracy under PGD with one draw less that with {evidence.effort.eot}: {{gap}}"
    return compare_runs(evidence, "pgd, one draw", "pgd", TOLERANCE, reason)


def judge_fixed(evidence: Evidence) -> Outcome:
    """Fails where an attack that meets one and the same draw, a weaker one, breaks far more under fresh ones."""
    reason = "the accuracy under PGD with fresh draws less that with fixed ones, both judged under fresh ones: {gap}"
    return compare_runs(evidence, "pgd", "pgd, fixed draws", TOLERANCE, reason)


def judge_retries(evidence: Evidence) -> Outcome:
    """The accuracy that is left where one wrong answer of five decides, on clean images and after PGD.

    An attacker who may ask again needs no gradient. Fails where that costs the clean accuracy 10 points, so that even
    without an attack the answers are not the images' own; suspect from 5 points on clean images or after PGD.
    """
    gaps = {}
    for name, run, key in (("clean", "nothing", CLEAN), ("PGD's", "pgd", "")):
        answers = evidence.answers(run, key)
        if answers is None:
            return not_run("an attack failed")
        gaps[name] = compare(answers.right / answers.repeats, answers.all_right(min(TRIES, answers.repeats)))
    clean, attacked = gaps["clean"], gaps["PGD's"]
    verdict = clean.verdict(TOLERANCE)
    if verdict == "pass" and attacked.mean >= RETRY_SUSPECT and attacked.p <= HINT:
        verdict = "suspect"
    reason = f"five tries instead of one cost {clean} on clean images, {attacked} on PGD's"
    return Outcome(verdict, clean.mean, TOLERANCE, reason)


def judge_cosine(evidence: Evidence) -> Outcome:
    """The cosine of two independent gradients of n draws each against n; suspect where it stays low at the attack's n.

    A proposal without a published threshold: the draws needed are the least n with a median cosine of 0.9. Noise in the
    gradient is no sign of masking by itself, so this check never fails a defense.
    """
    x, y = evidence.x[: 4 * evidence.effort.directions], evidence.y[: 4 * evidence.effort.directions]
    counts = [1, 2, 4, 8, evidence.effort.eot, 2 * evidence.effort.eot]
    counts = sorted({count for count in counts if count <= 2 * evidence.effort.eot})
    rows = []
    for count in counts:
        try:
            first, second = (
                evidence.gradient(x, y, draws=count, purpose=f"cosine {count} {side}").grad.flatten(1)
                for side in (0, 1)
            )
        except (PluginError, RuntimeError):
            return not_run("the defense gives no gradient")
        rows.append(torch.cosine_similarity(first, second, dim=1).nan_to_num(0.0).double().cpu().numpy())
    medians = {count: float(np.median(row)) for count, row in zip(counts, rows, strict=True)}
    enough = [count for count, value in medians.items() if value >= COSINE]
    needed = f"{enough[0]} draws are enough for 0.9" if enough else f"{counts[-1]} draws are too few for 0.9"
    value = medians[evidence.effort.eot]
    plot = Plot("draws", "cosine", (quantile_curve("cosine", [float(c) for c in counts], rows),), log_x=True)
    reason = f"two gradients of {evidence.effort.eot} draws have a median cosine of {value:.2f}; {needed}"
    return Outcome("suspect" if value < SUSPECT_COSINE else "pass", value, None, reason, plot)


CHECKS = (
    Check(
        "draws",
        PAPERS,
        judge_draws,
        runs=("pgd, one draw", "pgd"),
        only="randomized",
    ),
    Check(
        "fixed_draws",
        PAPERS,
        judge_fixed,
        runs=("pgd, fixed draws", "pgd"),
        only="randomized",
    ),
    Check(
        "retries",
        "Lucas et al. 2023 (arXiv 2302.13464); five tries and the thresholds are robench's own",
        judge_retries,
        runs=("nothing", "pgd"),
        only="randomized",
    ),
    Check(
        "gradient_noise",
        "a proposal of robench; compare Athalye et al. 2018 (arXiv 1802.00420), section 4.2",
        judge_cosine,
        only="randomized",
    ),
)
