"""Losses that attacks maximise: each maps logits and labels to one value per example; larger is nearer to an error.

`ce` is cross-entropy. `margin` is max over wrong classes minus the right one: above 0 exactly where the example is
misclassified (Carlini and Wagner 2017, eq. 6 with kappa unbounded). `dlr` is the margin divided by the spread of the
top logits, so that rescaling the logits changes nothing (Croce and Hein 2020, eq. 6); it needs three classes or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from robench.errors import UsageError
from robench.types import Labels, Logits, PerExample

Loss = Callable[[Logits, Labels], PerExample]


def cross_entropy(logits: Logits, y: Labels) -> PerExample:
    """Cross-entropy of each example."""
    return functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> PerExample:
    """Best wrong logit minus the right one; positive exactly where the answer is wrong."""
    right = logits.gather(1, y[:, None])[:, 0]
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return wrong - right


def dlr(logits: Logits, y: Labels) -> PerExample:
    """Difference-of-logits ratio, invariant to shift and scale of the logits.

    Raises:
        UsageError: fewer than three classes, for which the ratio is not defined.
    """
    if logits.shape[1] < 3:
        raise UsageError(f"loss dlr needs at least 3 classes; the defense has {logits.shape[1]}. Use loss=margin")
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


LOSSES: Final[dict[str, Loss]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def get_loss(name: str) -> Loss:
    """Returns the loss of that name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in LOSSES:
        raise UsageError(f'loss must be one of {", ".join(LOSSES)}; got "{name}"')
    return LOSSES[name]
