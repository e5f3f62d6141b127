"""Images of another kind in the shape of a dataset's own, to be told from them by a detection score."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import nn

from robench.data import load_data
from robench.errors import UsageError
from robench.rng import seeded
from robench.types import Images

INTERPOLATION: Final = "interpolation"
"""The name under which means of two images are asked for, beside those of datasets."""


class Outliers(NamedTuple):
    """Images of another kind, and how they were made; empty: as they are in their dataset."""

    x: Images
    made: str


def make_outliers(name: str, own: Images, n: int, seed: int, data_dir: Path | None = None) -> Outliers:
    """Test images of another dataset, or what lies between two images of one's own.

    `interpolation`: means of two random images, as in the paper of JEM; each image is part of two of them. Smaller
    images get a black frame, and grey ones three equal channels where the others are in colour.

    Args:
        name: a dataset, or `interpolation`.
        own: the images that they are to be told from.
        n: how many of a dataset; there are as many interpolations as images.
        seed: seeds the draw.
        data_dir: see `load_data`.

    Raises:
        UsageError: no such dataset, or its images cannot be brought into the shape without loss.
        DataError: a damaged file.
    """
    if name == INTERPOLATION:
        with seeded(seed, INTERPOLATION):
            order = torch.randperm(len(own))
        return Outliers((own[order] + own[order.roll(1)]) / 2, "means of two images")
    x, _ = load_data(name, "test", n, seed, data_dir)
    (channels, *size), (wanted, *sides) = x.shape[1:], own.shape[1:]
    frames = [side - short for side, short in zip(sides, size, strict=True)]
    if channels not in (1, wanted) or any(frame < 0 or frame % 2 for frame in frames):
        raise UsageError(
            f'"{name}" has images of shape {tuple(x.shape[1:])}, which a black frame and equal channels do not bring '
            f"to {tuple(own.shape[1:])}. Choose another --against"
        )
    down, right = (frame // 2 for frame in frames)
    made = [f"a black frame of {down}x{right} pixels"] if down or right else []
    made += [f"grey in {wanted} equal channels"] if channels < wanted else []
    return Outliers(nn.functional.pad(x, (right, right, down, down)).expand(-1, wanted, -1, -1), " and ".join(made))
