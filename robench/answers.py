"""What a defense's answers must be before an attack sees them: logits of the right shape, gradients that lead."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from robench.defense import Defense
from robench.errors import PluginError

AnyLogits = Float[Tensor, "*draws b k"]
"""Of one draw, or of several with these as the first axis."""


def check_logits(defense: Defense, logits: object, forward: str, *rows: int) -> AnyLogits:
    """The logits that a defense answered, in float32 if they were of less.

    Args:
        defense: whose answer it is.
        logits: the answer.
        forward: the method that gave it, for the message.
        rows: the shape before the classes: images, or draws and images.

    Raises:
        PluginError: they are of another shape, or not all finite.
    """
    expected, who = (*rows, defense.num_classes), f'defense "{defense.name}"'
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PluginError(f"{who}: logits must be {expected}; got {came} from {forward}")
    if not bool(logits.isfinite().all()):
        wrong, of = int((~logits.isfinite().all(-1)).sum()), math.prod(rows)
        raise PluginError(f"{who}: logits must be finite; {wrong} of {of} rows of {forward} hold NaN or inf")
    return logits if logits.is_floating_point() and logits.dtype != torch.bfloat16 else logits.float()


def mend_gradients(defense: Defense, grads: Tensor) -> Tensor:
    """The gradients of the draws (eot b c h w) with 0 where they are not finite.

    Raises:
        PluginError: nothing of an image's gradient is finite.
    """
    if bool(grads.sum().isfinite()):  # a mask of all entries takes five times as long
        return grads
    finite = grads.isfinite()
    lost = int((~finite.transpose(0, 1).flatten(1).any(1)).sum())
    if lost:
        raise PluginError(
            f'defense "{defense.name}": no entry of the gradient is finite for {lost} of {grads.shape[1]} '
            "images. Implement adaptive_forward with a stand-in for the step without a derivative (BPDA)"
        )
    return grads.where(finite, 0)
