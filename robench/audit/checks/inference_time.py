"""Does the defense optimise while it answers?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from robench.audit.checks.base import Check, Outcome
from robench.audit.evidence import Evidence
from robench.defense import Defense
from robench.rng import seeded

FEW = 2


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Counts the calls of autograd's entries inside the block, in this thread's torch, and undoes it after it."""
    calls: list[str] = []
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def note_grad(*args: Any, **options: Any) -> Any:
        calls.append("grad")
        return grad(*args, **options)

    def note_backward(*args: Any, **options: Any) -> Any:
        calls.append("backward")
        return backward(*args, **options)

    torch.autograd.grad, torch.autograd.backward = note_grad, note_backward
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward = grad, backward


def judge(evidence: Evidence) -> Outcome:
    """Suspect where `forward` takes gradients and the defense does not say along which path it is differentiated."""
    with (
        _counted() as calls,
        torch.no_grad(),
        seeded(evidence.seed, "audit", "inference", device=evidence.device),
    ):
        evidence.defense(evidence.x[:FEW])
    count = float(len(calls))
    if not calls:
        return Outcome("pass", count, None, "an answer takes no gradient of its own")
    if type(evidence.defense).adaptive_forward is not Defense.adaptive_forward:
        modes = ", ".join(evidence.defense.gradient_modes)
        return Outcome("pass", count, None, f"an answer takes {count:.0f} gradients; the defense offers {modes}")
    reason = f"an answer takes {count:.0f} gradients of its own and the defense says nothing of how to differentiate it"
    return Outcome("suspect", count, None, reason)


CHECK = Check(
    "inference_time",
    "Croce et al. 2022 (arXiv 2202.13711); AutoAttack, checks.py",
    judge,
)
