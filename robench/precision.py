"""What the device at hand computes by itself, and what it only emulates."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch

_MIXED: Final = ContextVar("mixed", default=True)


@functools.cache
def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16; one that emulates it is many times slower than in float32.

    Args:
        device: `cpu` or `cuda`.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return False
    return any(name.endswith("bf16") and bool(has) for name, has in torch.cpu.get_capabilities().items())


def mixes_precision(device: str) -> bool:
    """Whether training takes bfloat16 where it may: the device has it and `training_precision` does not forbid it."""
    return _MIXED.get() and has_bfloat16(device)


@contextmanager
def training_precision(precision: str) -> Iterator[None]:
    """Inside the block training stays in float32 if `precision` says so; `auto` leaves it to the device."""
    token = _MIXED.set(precision != "float32")
    try:
        yield
    finally:
        _MIXED.reset(token)
