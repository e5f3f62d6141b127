"""Compares a run's table with the data, says what is missing where the images at hand are others, and draws a part."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from robench.data_names import KNOWN, list_embedded_files
from robench.errors import UsageError
from robench.unit_table import CLEAN, STATUSES, WORST

if TYPE_CHECKING:
    from robench.data import Dataset
    from robench.defense import Defense
    from robench.result import Evaluation

PUBLISHED_ON: Final = {"cifar10": "5,000 of its 10,000 test images: docs/leaderboards.md"}
"""Datasets of which robench's own rows are drawn from a part of the test split, and from which."""


def is_shipped_split(dataset: str) -> bool:
    """Whether robench ships the test split, so that everybody has the same: then no other can be meant."""
    return dataset in KNOWN and bool(list_embedded_files(dataset, "test"))


def tell_other_images(result: Evaluation, data: Dataset) -> str:
    """What is missing to check a run whose images have another digest than those loaded here.

    The split may be another one, a part of it or another copy, or someone may have changed the digest: where positions
    and labels are the same here, it is not another draw.
    """
    clean = result.answers(CLEAN)
    told = f'"{data.name}" here holds other images than those of the run ({data.split_size} in its {data.split} split)'
    alike = result.indices.tolist() == data.index.tolist()
    if alike and clean is not None and clean.labels.tolist() == data.y.tolist():
        told += "; positions and labels are the same, so the pixels differ or the run's digest of them was changed"
    elif data.name in PUBLISHED_ON:
        told += f"; robench's rows on {data.name} are of {PUBLISHED_ON[data.name]}"
    return told


def find_gap(result: Evaluation, data: Dataset, defense: Defense) -> str:
    """What is wrong in the per-example table, which holds one row for each image clean, under each attack, at worst."""
    spec = result.spec
    keys = [entry.key for entry in spec.attacks]
    blocks = [(CLEAN, 0.0), *((key, eps) for eps in spec.eps for key in (*keys, WORST))]
    if len(result.table) != len(blocks) * spec.n:
        return f"{len(result.table)} rows, not {len(blocks) * spec.n}"
    for key, eps in blocks:
        rows = result.table[(result.table["attack"] == key) & (result.table["eps"] == eps)]
        if rows["index"].tolist() != data.index.tolist() or rows["label"].tolist() != data.y.tolist():
            return f"the images or labels of {key} are not those of the data"
        votes = np.stack(rows["votes"].tolist())
        judged = (rows["status"] != "failed").to_numpy()
        if votes.shape[1] != defense.num_classes or (votes < 0).any():
            return f"the answers of {key} are no counts over {defense.num_classes} classes"
        if (votes[judged].sum(1) != spec.judge_repeats).any():
            return f"not {spec.judge_repeats} answers for each image under {key}"
        numbers = rows[["forwards", "backwards", "distance"]].to_numpy(dtype=float)[judged]
        if not set(rows["status"]) <= set(STATUSES) or not (numbers >= 0).all():
            return f"the status, passes or distances of {key} are none"
    if defense.randomized:
        return ""  # the worst case was judged on draws of its own
    return next(filter(None, (_find_contradiction(result, keys, eps) for eps in spec.eps)), "")


def _find_contradiction(result: Evaluation, keys: Sequence[str], eps: float) -> str:
    """Where a deterministic defense's answers at worst contradict those under the attacks; empty if nowhere.

    They are those on the image of the chosen attack, so the same, and no attack has left fewer right ones.
    """
    table = result.table[result.table["eps"] == eps]
    blocks = {key: table[table["attack"] == key] for key in (*keys, WORST)}
    worst = blocks.pop(WORST)
    votes, chosen = np.stack(worst["votes"].tolist()), worst["chosen"].to_numpy()
    known = (worst["status"] != "failed").to_numpy()
    if not set(chosen[known]) <= set(keys):
        return f"a worst case at eps {eps:g} is of no attack of the run"
    for key, rows in blocks.items():
        judged = known & (rows["status"] != "failed").to_numpy()
        if (worst["accuracy"].to_numpy() > rows["accuracy"].to_numpy())[judged].any():
            return f"the worst case at eps {eps:g} is right where {key} is not"
        if (votes != np.stack(rows["votes"].tolist()))[judged & (chosen == key)].any():
            return f"the worst case at eps {eps:g} has other answers than {key}, of which it is said to be"
    return ""


def check_count(images: int | None) -> int | None:
    """How many images are to be judged again, as it was given.

    Raises:
        UsageError: fewer than one.
    """
    if images is not None and images < 1:
        raise UsageError(f"images must be at least 1; got {images}")
    return images


def draw_places(n: int, images: int | None, seed: int) -> list[int]:
    """The positions of the images that are judged again: all `n`, or as many as were asked for, drawn by the seed."""
    return list(range(n)) if images is None else sorted(random.Random(seed).sample(range(n), min(images, n)))
