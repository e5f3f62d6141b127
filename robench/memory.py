"""What the C library does with freed memory, in the processes that robench starts itself. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
LARGEST: Final = 2**30
"""Bytes; larger blocks go back to the system at once."""
CHOSEN_BY: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> None:
    """Has glibc keep freed memory for the next pass rather than fetch it from the system page by page.

    Passes took 0.9 (`convnet_at`) and 0.8 (`jem`) of their processor time on a CPU, in 1.0 to 1.15 of the memory. For
    whole processes, so not for a library call; does nothing where the environment chooses, or without glibc.
    """
    if any(name in os.environ for name in CHOSEN_BY):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, LARGEST)


def give_back_memory() -> None:
    """Returns what the allocator holds without need to the system; between units, whose batches are of many sizes.

    Some milliseconds. Does nothing where the C library cannot.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
