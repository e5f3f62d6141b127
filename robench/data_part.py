"""The parts of known splits that robench's published rows were drawn from, for those who have the whole split.

A part is told by the digests of its images in their order, which are no images: `assets/<name>/<split>-part.sha256`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np

from robench.data import Dataset, digest_data, draw_stratified, load_dataset
from robench.data_names import find_part
from robench.types import Images

BYTES: Final = 8
"""Of an image's SHA-256 that are kept; that the drawn images are those of a run is told by the run's whole digest."""


def load_of_digest(digest: str, name: str, n: int, seed: int = 0, data_dir: str | Path | None = None) -> Dataset:
    """A draw from a test split, or from the part of it that is told by digests where that is the draw with the digest.

    Of a draw from the part, `index` counts within the part. Reading the whole split takes seconds.

    Args:
        digest: of the images and labels that are wanted, see `digest_data`. Where neither draw has it, that from the
            split comes back.
        name: as for `load_dataset`, like all that follow.
        n: number of examples.
        seed: of the draw.
        data_dir: folder with datasets.

    Raises:
        RobenchError: as `load_dataset`.
    """
    found = load_dataset(name, "test", n, seed, data_dir)
    path = find_part(name, "test")
    if found.digest == digest or path is None:
        return found
    whole = load_dataset(name, "test", data_dir=data_dir)
    places = {one: position for position, one in enumerate(digest_each(whole.x))}
    stored = path.read_bytes()
    part = [places.get(stored[start : start + BYTES]) for start in range(0, len(stored), BYTES)]
    known = [position for position in part if position is not None]
    if len(known) < len(part) or n > len(known):
        return found
    labels = whole.y[known]
    index = draw_stratified(labels, n, seed)
    x, y = whole.x[known][index], labels[index]
    drawn = Dataset(name, "test", x, y, index, whole.class_names, digest_data(x, y), whole.split_size)
    return drawn if drawn.digest == digest else found


def digest_each(x: Images) -> list[bytes]:
    """The beginning of the SHA-256 of each image's pixels, as bytes from 0 to 255."""
    pixels = np.rint(255 * x.numpy()).astype(np.uint8)
    return [hashlib.sha256(image.tobytes()).digest()[:BYTES] for image in pixels]
