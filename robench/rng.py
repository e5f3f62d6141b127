"""Randomness: one seed per unit and purpose. The only file that seeds a generator."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from robench.errors import PluginError


def seed_for(*parts: str | int) -> int:
    """Derives a 63-bit seed from a run's seed, a unit and a purpose; the same parts always give the same seed."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(*parts: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seeds the global generators of torch, numpy and Python from `parts` inside the block; restores them after it."""
    device = torch.device(device)
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _others_kept():
        reseed(*parts)
        yield


@contextmanager
def _others_kept() -> Iterator[None]:
    """Restores numpy's and Python's global generators after the block."""
    before_numpy, before_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(before_numpy)
        random.setstate(before_python)


def check_unseeded(*parts: str | int, who: str) -> None:
    """Checks that torch's global generator is still the one that `seeded` set from `parts`.

    Raises:
        PluginError: a plugin seeded it, so that its draws, and those after it, would be the same each time.
    """
    if torch.initial_seed() != seed_for(*parts):
        raise PluginError(f"{who} seeded torch's global generator; a plugin draws from it and never seeds it")


def reseed(*parts: str | int) -> None:
    """Seeds the global generators from `parts`; call it inside `seeded`, which restores them."""
    seed = seed_for(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed >> 31)
    random.seed(seed)


@contextmanager
def foreign_generators() -> Iterator[None]:
    """Sets numpy's and Python's global generators by the state of torch's inside the block; restores theirs after it.

    For attacks of other packages, which draw from all three: what they draw depends on what torch's was seeded with
    and how far it has moved, and torch's own does not move.
    """
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    state = hashlib.sha256(b"".join(part.numpy().tobytes() for part in states)).hexdigest()
    with _others_kept():
        np.random.set_state(np.random.RandomState(seed_for("numpy", state) >> 31).get_state())
        random.setstate(random.Random(seed_for("python", state)).getstate())
        yield
