"""Losses that attacks maximise: each maps logits and labels to one value per example; larger is nearer to an error.

`ce` is cross-entropy. `margin` is max over wrong classes minus the right one: above 0 exactly where the example is
misclassified (Carlini and Wagner 2017, eq. 6 with kappa unbounded). `dlr` is the margin divided by the spread of the
top logits, so that rescaling the logits changes nothing (Croce and Hein 2020, eq. 6); it needs three classes or more.

The targeted forms take the class to reach as well: minus the cross-entropy of the target, target minus right logit, and
that difference over the spread of the top logits (eq. 7 there; four classes or more).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from robench.errors import UsageError
from robench.types import Labels, Logits, PerExample

Loss = Callable[[Logits, Labels], PerExample]
TargetedLoss = Callable[[Logits, Labels, Labels], PerExample]


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


def targeted_cross_entropy(logits: Logits, y: Labels, target: Labels) -> PerExample:
    """Minus the cross-entropy of the target; y has no part in it."""
    del y
    return -cross_entropy(logits, target)


def targeted_margin(logits: Logits, y: Labels, target: Labels) -> PerExample:
    """Logit of the target minus the right one."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> PerExample:
    """Difference-of-logits ratio towards a target.

    Raises:
        UsageError: fewer than four classes, for which the ratio is not defined.
    """
    if logits.shape[1] < 4:
        raise UsageError(f"targeted dlr needs at least 4 classes; the defense has {logits.shape[1]}. Use loss=margin")
    ordered = logits.sort(dim=1, descending=True).values
    spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(logits, y, target) / (spread + 1e-12)


LOSSES: Final[dict[str, Loss]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED: Final[dict[str, TargetedLoss]] = {
    "ce": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}


def aim(loss: str | Loss, target: Labels | None) -> TargetedLoss:
    """The loss as a function of logits, labels and targets: the targeted form where there is a target.

    Raises:
        UsageError: there is none of that name, or a function of one's own is to be targeted.
    """
    if target is None:
        plain = get_loss(loss) if isinstance(loss, str) else loss
        return lambda logits, y, _: plain(logits, y)
    if not isinstance(loss, str):
        raise UsageError("a targeted query takes a loss by name")
    get_loss(loss)
    return TARGETED[loss]


def best_wrong_classes(logits: Logits, y: Labels, count: int) -> Tensor:
    """The wrong classes with the largest logits, best first: `count b`."""
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.topk(min(count, logits.shape[1] - 1), dim=1).indices.T


def check_classes(name: str, loss: str, num_classes: int, *, targeted: bool) -> None:
    """Checks that a defense has the classes that a loss needs.

    Raises:
        UsageError: too few of them.
    """
    needed = {"dlr": 4 if targeted else 3}.get(loss, 2)
    if num_classes < needed:
        kind = f"targeted {loss}" if targeted else loss
        raise UsageError(
            f"{name}: loss {kind} needs at least {needed} classes; the defense has {num_classes}. Use loss=margin"
        )


def get_loss(name: str) -> Loss:
    """Returns the loss of that name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in LOSSES:
        raise UsageError(f'loss must be one of {", ".join(LOSSES)}; got "{name}"')
    return LOSSES[name]
