"""Which images of a training split are trained on and which are held out, also where training goes on from weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from robench.data import Dataset
from robench.rng import seeded
from robench.weights import read_card

T = TypeVar("T")
FEWEST: Final = 50
"""Fewer unseen images than these say nothing of a net; a smaller `holdout` that is asked for is taken all the same."""


@dataclass(frozen=True)
class Split:
    """The rows of a training split in two parts.

    Attributes:
        held: rows that are held out, at most as many as were asked for.
        kept: the others, to train on.
        seed: whose order they are of: the run's own, or that of the first training of the weights it starts from.
        seen_before: training that the weights had before may have seen what is held out here.
    """

    held: Tensor
    kept: Tensor
    seed: int
    seen_before: bool = False


def split_images(data: Dataset, seed: int, holdout: int, init: Path | None) -> Split:
    """Holds out the first `holdout` images of a random order.

    Where training starts from weights, these are images that none of the trainings before has seen either, as far as
    the weights' card and those of the weights behind them tell.

    Raises:
        DataError: the card is damaged.
    """
    first, unseen, seen_before = seed, _order(seed, len(data.x)), False
    if init is not None:
        try:
            first, unseen = _unseen(read_card(init), data, data.name, "") or (first, unseen)
            seen_before = len(unseen) < min(holdout, FEWEST)
        except LookupError:
            seen_before = True
    if seen_before:
        first, unseen = seed, _order(seed, len(data.x))
    held, order = unseen[:holdout], _order(first, len(data.x))
    return Split(held, order[~torch.isin(order, held)], first, seen_before)


def _unseen(card: dict[str, Any], data: Dataset, name: str, digest: str) -> tuple[int, Tensor] | None:
    """The rows that no training which led to a card's weights has seen, in the order of the first one's seed.

    Args:
        card: a card, or what a card says of the weights that its training started from.
        data: the training split.
        name: the dataset, where the card does not tell.
        digest: its digest, where the card does not tell.

    Returns:
        That seed and the rows; None where all training was on other datasets.

    Raises:
        LookupError: the card does not tell.
    """
    name, digest = card.get("dataset", name), card.get("train_digest", digest)
    before = _unseen(_entry(card, "init", dict), data, name, digest) if "init" in card else None
    if name != data.name:
        return before
    held_out = _entry(card, "held_out", dict)
    if digest != data.digest or held_out.get("seen_before"):
        raise LookupError
    images = _entry(held_out, "images", int)
    seed = _entry(card, "split_seed" if "split_seed" in card else "seed", int)
    if before is None:
        return seed, _order(seed, len(data.x))[:images]
    first, unseen = before
    if "split_seed" in card:  # older cards are of training that took its own seed's order whatever was before
        return first, unseen[:images]
    return first, unseen[torch.isin(unseen, _order(seed, len(data.x))[:images])]


def _entry(card: dict[str, Any], name: str, kind: type[T]) -> T:
    found = card.get(name)
    if not isinstance(found, kind):
        raise LookupError(name)
    return found


def _order(seed: int, count: int) -> Tensor:
    with seeded("split", seed):
        return torch.randperm(count)
