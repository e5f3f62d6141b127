"""Does a randomized defense draw for each image, or once for all images of a pass? Asked where it does not say."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from robench.defense import Defense
from robench.errors import PluginError
from robench.rng import seeded
from robench.types import Images, Logits

CALLS: Final = 10
"""Passes in which copies of an image have one answer, before they are said to share a draw or none."""
COPIES: Final = 4
"""Of one image in a pass, to see whether each gets a draw of its own."""
IMAGES: Final = 8
"""Asked about where the copies of the first have one answer: of most images a vote, say, does not change."""
SAME: Final = 1e-5
"""Relative to the largest logit: by how much equal answers may differ, as rounding goes by places in a batch."""


def shares_draws(defense: Defense, x: Images) -> bool:
    """Whether the images of a pass share a draw, as declared or as noted; asks about x where neither is known."""
    if not defense.randomized or defense.batch_rows == 1:
        return False
    if defense.draws_per_pass is not None:
        return defense.draws_per_pass
    return note_draws(defense, x) if defense.shares_draws is None else defense.shares_draws


def has_shared_layers(defense: Defense) -> bool:
    """Whether several draws of an image are one call of `forward_draws`, which runs once what comes before the draws.

    Not where a subclass, the object or a hook changes `forward` or `adaptive_forward`, of which that would not know.
    """
    cls = type(defense)
    if not defense.randomized or cls.adaptive_forward is not Defense.adaptive_forward:
        return False
    changed = vars(defense).keys() & {"forward", "adaptive_forward"}
    newest = next(base for base in cls.__mro__ if vars(base).keys() & {"forward", "forward_draws"})
    own = newest is not Defense and "forward_draws" in vars(newest)
    return own and not (changed or defense._forward_hooks or defense._forward_pre_hooks)


def note_draws(defense: Defense, x: Images) -> bool:
    """Asks a defense whether the images of a pass share a draw, and notes it there.

    The same images give the same answer in each process, and the caller's randomness is left where it is. A draw for
    the pass on top of one for each image is not found: that is for `draws_per_pass` to declare.

    Args:
        defense: on the device of x.
        x: the first images of a run; the first `IMAGES` are asked about.

    Raises:
        PluginError: it declares that each image has a draw of its own, and they share one.
    """
    defense.shares_draws = _is_shared(defense, x)
    if defense.shares_draws and defense.draws_per_pass is False:
        raise PluginError(
            f'defense "{defense.name}" declares draws_per_pass = False, but copies of an image in one pass have one '
            "answer and in the next pass another. Leave it out, or draw for each image"
        )
    return defense.shares_draws


def _is_shared(defense: Defense, x: Images) -> bool:
    """Whether the copies of an image have one answer in each pass, and not the same one in all."""
    if not defense.randomized or defense.batch_rows == 1 or defense.draws_per_pass:
        return defense.randomized and defense.batch_rows != 1
    copies = min(COPIES, defense.batch_rows or COPIES)
    few = x[: max(1, min(IMAGES, (defense.batch_rows or COPIES * IMAGES) // copies))].detach()
    with torch.no_grad(), seeded("draws", device=x.device):
        if _one_answer(defense, few[:1], copies) is None:
            return False  # most have ended here, after one pass
        passes = [_one_answer(defense, few, copies) for _ in range(CALLS)]
    answers = [one for one in passes if one is not None]
    if len(answers) < CALLS:
        return False
    return any(not _agree(one, answers[0]) for one in answers)


def _one_answer(defense: Defense, few: Images, copies: int) -> Logits | None:
    """The logits of each image in a pass with copies of it; None where they differ from copy to copy."""
    logits = defense(few.repeat(copies, 1, 1, 1)).float().unflatten(0, (copies, -1))  # copies b k
    return logits[0] if _agree(logits, logits[:1]) else None


def _agree(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().max()) <= SAME * float(first.abs().max())
