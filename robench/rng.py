"""Randomness: one seed per unit and purpose. The only file that seeds a generator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(*parts: str | int) -> int:
    """Derives a 63-bit seed from a run's seed, a unit and a purpose; the same parts always give the same seed."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(*parts: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seeds torch's global generators from `parts` inside the block and restores their state after it."""
    device = torch.device(device)
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        reseed(*parts)
        yield


def reseed(*parts: str | int) -> None:
    """Seeds torch's global generators from `parts`; call it inside `seeded`, which restores them."""
    torch.manual_seed(seed_for(*parts))
