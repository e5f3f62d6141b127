"""What a query of a victim returns where that is more than one tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robench.types import Images, Logits, PerExample


class Gradient(NamedTuple):
    """What one gradient query returns.

    Attributes:
        loss: the loss of each example, averaged over the EOT samples.
        grad: its gradient with respect to the images.
        logits: the logits, averaged over the EOT samples.
        noise: standard error of the loss, from the scatter of the EOT samples; 0 where there is one sample.
    """

    loss: PerExample
    grad: Images
    logits: Logits
    noise: PerExample


class Value(NamedTuple):
    """What one query for the loss alone returns; as `Gradient`."""

    loss: PerExample
    logits: Logits
    noise: PerExample


def standard_error(draws: Tensor) -> PerExample:
    """That of the mean over the draws (eot b); 0 where one draw says nothing of it."""
    return draws.std(0) / len(draws) ** 0.5 if len(draws) > 1 else torch.zeros_like(draws[0])
