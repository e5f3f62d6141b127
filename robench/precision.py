"""What the device at hand computes by itself, and what it only emulates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import torch

T = TypeVar("T")

OPERATIONS: Final = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
"""The products of torch.backends; `cudnn` is for GPUs, `mkldnn` for CPUs."""

GROUPS: Final = ("cudnn", "mkldnn")
"""Those with a setting for all of their products."""

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


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block float32 means float32: no product takes fewer bits, as TF32 does in convolutions by default.

    What was set before is restored, whether by the old names (`allow_tf32`, `set_float32_matmul_precision`) or by
    torch 2.9's `fp32_precision`, which take precedence. The old ones are set too, since torch refuses to read one that
    contradicts the new; one that cannot be read for that reason is not restored, and changes no product. The settings
    for several products at once are changed too: `torch.backends.cudnn.flags` in a defense's forward puts them back on
    its way out, over those of single products.
    """
    settings = _settings()
    before = [setting.fp32_precision for setting in settings]
    matmul = _read(torch.get_float32_matmul_precision)
    cudnn = _read(lambda: torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside the block cuDNN takes kernels that sum in one order, so that a seed gives the same bytes on the same GPU.

    Without it Short Run's answers under one seed were not equal on an H200. Sums by torch's own kernels that have no
    such order (`index_add_`, say) stay as they are.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def engine_numerics() -> Iterator[None]:
    """How engine, judge and audit compute: `full_float32` and `repeatable`."""
    with full_float32(), repeatable():
        yield


def _settings() -> list[Any]:
    """What has a precision of its own in torch 2.9 and later, the wider first, as it sets the narrower; none before."""
    if not hasattr(torch.backends.cudnn, "conv"):
        return []
    return [torch.backends, *(operator.attrgetter(name)(torch.backends) for name in (*GROUPS, *OPERATIONS))]


def _read(setting: Callable[[], T]) -> T | None:
    """A setting under its old name; None where the new names contradict it."""
    try:
        return setting()
    except RuntimeError:
        return None
