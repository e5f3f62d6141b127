"""Freed memory stays with the process where robench owns it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from robench.memory import CHOSEN_BY

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")

FAULTS = """
import resource, sys
from robench.memory import give_back_memory, keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import torch
for _ in range(21):
    if _ == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, above what glibc keeps of its own accord
give_back_memory()
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, held)
"""


def faults(mode: str, **environment: str) -> tuple[int, int]:
    """Page faults of twenty blocks of 64 MiB, and the bytes held after `give_back_memory`."""
    plain = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], env=plain | environment, capture_output=True, text=True, check=True
    )
    count, held = done.stdout.split()
    return int(count), int(held)


def test_freed_memory_is_used_again_and_can_be_given_back() -> None:
    (before, held_before), (after, held_after) = faults("leave"), faults("keep")
    assert before > 2 * after, "twenty blocks are fetched page by page, or once"
    assert held_after < held_before + 2**25, "half a block"


def test_what_the_environment_chooses_stands() -> None:
    chosen, _ = faults("keep", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert chosen > 2 * faults("keep")[0]
