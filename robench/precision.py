"""What the device at hand computes by itself, and what it only emulates."""

from __future__ import annotations

import functools

import torch


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
