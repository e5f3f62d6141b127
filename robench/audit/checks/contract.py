"""Does the defense answer as the contract says: finite logits, no softmax, each image on its own, no memory?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robench.audit.checks.base import Check, Outcome
from robench.audit.evidence import Evidence
from robench.batches import pass_once
from robench.draws import has_shared_layers
from robench.errors import PluginError
from robench.registry import plugin_errors
from robench.rng import seeded
from robench.types import Images

TOLERANCE = 1e-3
"""Relative to the largest logit: what the order of float32 sums may change with the batch, or on a GPU of itself."""
FEW = 32
FIRST = "first answers"


def _ask(evidence: Evidence, x: Images, forward: Callable[[Images], Tensor] | None = None) -> Tensor:
    """One answer, on a copy of the images, by `forward` of the defense or by the one given; always of the same seed.

    Raises:
        PluginError: the defense raised, called exit() or changed the images in place.
    """
    defense, what = evidence.defense, f'defense "{evidence.defense.name}": forward'
    with torch.no_grad(), seeded(evidence.seed, "audit", "contract", device=evidence.device), plugin_errors(what):
        logits: Tensor = pass_once(defense, forward or defense, x.clone())
    return logits


def remember(evidence: Evidence) -> None:
    """Asks for some images before any run, so that what the runs change in the defense shows.

    Raises:
        PluginError: the defense raised, called exit() or changed the images in place.
    """
    evidence.shared[FIRST] = _ask(evidence, evidence.x[:FEW])


def judge(evidence: Evidence) -> Outcome:
    """Asks for some images together, alone, and compares with the answers before all runs."""
    if evidence.broken:
        return Outcome("fail", None, None, evidence.broken)
    try:
        return _judge_answers(evidence)
    except PluginError as error:  # on one image alone, say
        return Outcome("fail", None, None, str(error))


def _judge_answers(evidence: Evidence) -> Outcome:
    x = evidence.x[:FEW]
    logits = _ask(evidence, x)
    if not bool(logits.isfinite().all()):
        return Outcome("fail", None, None, "some logits are not finite")
    sums = logits.sum(1)
    if bool((logits >= -1e-5).all() and (logits <= 1 + 1e-5).all() and ((sums - 1).abs() < 1e-4).all()):
        reason = "the logits are probabilities, on which a loss saturates; answer with logits, or their logarithm"
        return Outcome("suspect", None, None, reason)
    scale = float(logits.abs().max()) or 1.0
    if evidence.defense.randomized:
        gap = float((_ask(evidence, x) - logits).abs().max()) / scale
        if gap > TOLERANCE:
            reason = "one seed gives two answers: randomness beyond the generators of torch, numpy and Python"
            return Outcome("fail", gap, TOLERANCE, reason)
        if has_shared_layers(evidence.defense):
            copies = _ask(evidence, x.repeat(2, 1, 1, 1)).unflatten(0, (2, -1))
            draws = _ask(evidence, x, lambda x: evidence.defense.forward_draws(x, 2))
            gap = float((draws - copies).abs().max()) / scale if draws.shape == copies.shape else math.inf
            if not gap <= TOLERANCE:
                reason = "forward_draws, which the attacks ask, answers otherwise than forward under the same seed"
                return Outcome("fail", gap, TOLERANCE, reason)
        return Outcome("pass", gap, TOLERANCE, "logits are finite, no probabilities, and repeat under one seed")
    alone = torch.cat([_ask(evidence, x[i : i + 1]) for i in range(min(8, len(x)))])
    gap = float((logits[: len(alone)] - alone).abs().max()) / scale
    if gap > TOLERANCE:
        reason = f"an image alone and in a batch differ by {gap:.2g} of the largest logit: the answer is not its own"
        return Outcome("fail", gap, TOLERANCE, reason)
    drift = float((evidence.shared[FIRST] - logits).abs().max()) / scale
    if drift > TOLERANCE:
        return Outcome("fail", drift, TOLERANCE, "the same images get another answer later: the defense has a memory")
    return Outcome("pass", gap, TOLERANCE, "logits are finite, no probabilities, and each image has its own answer")


CHECK = Check(
    "contract",
    "Croce et al. 2020 (AutoAttack), checks.py; robench's contract",
    judge,
)
