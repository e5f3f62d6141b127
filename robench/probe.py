"""A defense is asked for some answers before any work: does it keep to the contract?"""

from __future__ import annotations

from typing import Final

import torch

from robench.defense import Defense
from robench.draws import IMAGES, SAME, note_draws
from robench.errors import PluginError
from robench.hidden import refuse_hidden_networks
from robench.judge import checked_logits
from robench.registry import plugin_errors
from robench.rng import seeded
from robench.types import Images, Logits
from robench.unit_work import UnitWork

CALLS: Final = 10
"""Answers on the same images, to tell a randomized defense from a deterministic one."""
BATCH_TOLERANCE: Final = 1e-3
"""Relative to the largest logit: what the other images of a batch may change."""


def check_answers(work: UnitWork) -> None:
    """Asks the defense for some answers, so that one that breaks the contract is refused before any work.

    One that is declared randomized and yet always answers the same gets a warning, as one that no seed repeats.

    Raises:
        PluginError: training mode, a network that is no sub-module, an error of its own or a call of exit(), logits of
            the wrong shape, not finite, or of a deterministic defense random or dependent on the other images of the
            batch, or images, weights or buffers changed in place.
    """
    defense, spec = work.defense, work.spec
    if defense.training:
        raise PluginError(f'defense "{defense.name}" is in training mode; call its freeze() (or eval()) first')
    few = work.x[:4].to(spec.device)
    defense.to(spec.device)
    refuse_hidden_networks(defense, few[:1], spec.seed)
    errors = plugin_errors(f'defense "{defense.name}": forward')
    with torch.no_grad(), seeded(spec.seed, "check", device=spec.device), errors:
        logits = checked_logits(defense, few)
        if defense.randomized:
            _check_seeded(work, few, logits)
            _check_varies(defense, few, logits)
            _note_draws(defense, work.x[:IMAGES].to(spec.device))
        else:
            _check_repeats(defense, few, logits)
    work.check_unchanged()


def _check_seeded(work: UnitWork, few: Images, logits: Logits) -> None:
    """Warns, once, of a randomized defense that draws from what the engine does not seed.

    Args:
        work: the run.
        few: images.
        logits: the first answer on them since the seed of `check_answers`.
    """
    defense, spec = work.defense, work.spec
    with seeded(spec.seed, "check", device=spec.device):
        again = checked_logits(defense, few)
    if float((again - logits).abs().max()) > SAME * float(logits.abs().max()):
        defense.tell_once(
            "unseeded",
            '"%s" draws from more than the global generators of torch, numpy and Python, which robench seeds: its runs '
            "need not repeat, and its answers to the judge and to verify need not be fresh; the audit's check contract "
            "fails. Draw from torch's",
            defense.name,
        )


def _check_varies(defense: Defense, few: Images, logits: Logits) -> None:
    """Warns, once, of a randomized defense whose answers are all the same; asks until one differs."""
    if "constant" in defense.told:
        return
    if all(torch.equal(defense(few.clone()), logits) for _ in range(CALLS - 1)):
        defense.tell_once(
            "constant",
            '"%s" is declared randomized, but %d calls agree; nn.Dropout is off in eval mode: '
            "use functional.dropout(..., training=True)",
            defense.name,
            CALLS,
        )


def _note_draws(defense: Defense, few: Images) -> None:
    """Finds out whether the images of a pass share a draw; if so tells, once, what the engine does about it.

    With one draw for all, EOT had left 59 % under PGD of a random resize that draws of their own leave 39 % of.
    """
    if note_draws(defense, few):
        defense.tell_once(
            "shared",
            '"%s" draws once for all images of a pass, so robench asks each draw on its own, in more and smaller '
            "passes: one for each draw of EOT, and in the judge one for each image",
            defense.name,
        )


def _check_repeats(defense: Defense, few: Images, logits: Logits) -> None:
    """Refuses a deterministic defense whose answer changes, or is not the image's own.

    The batch's last image is asked again among copies of itself: in a batch of another size, rounding alone may turn
    the answer of a net that quantizes.

    Raises:
        PluginError: it does.
    """
    _check_same(defense, few, logits)
    alike = few[-1:].repeat(len(few), 1, 1, 1)
    among = defense(alike.clone())
    gap = float((among[-1] - logits[-1]).abs().max() / logits.abs().max())
    if gap > BATCH_TOLERANCE:
        _check_same(defense, alike, among)  # chance may have spared the first calls
        raise PluginError(
            f'defense "{defense.name}": an image gets another answer in a batch with other images, by {gap:.2g} of the '
            "largest logit. BatchNorm with track_running_stats=False? Give it running statistics"
        )


def _check_same(defense: Defense, x: Images, logits: Logits) -> None:
    """Refuses a deterministic defense of which one of `CALLS` answers on the same images is another.

    Raises:
        PluginError: it is.
    """
    if not all(torch.equal(defense(x.clone()), logits) for _ in range(CALLS - 1)):
        raise PluginError(
            f'defense "{defense.name}" is declared deterministic, but two of {CALLS} calls on the same images differ. '
            "Set randomized = True, or robench's number would be wrong"
        )
