"""A worker process: takes tasks from a pipe, one at a time, until the pipe is closed. Imports torch late."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from robench.errors import PluginError
from robench.memory import keep_memory
from robench.runners.task import Limits, Outcome, perform

READY, PASSES, DONE = "ready", "passes", "done"
REPORT_S: Final = 0.5
"""Seconds between two reports of passes."""
PR_SET_PDEATHSIG: Final = 1


def serve(pipe: Connection[Any, Any], limits: Limits, number: int) -> None:
    """The life of a worker.

    Args:
        pipe: to the process that gives the tasks.
        limits: what the worker may use.
        number: of the worker; with GPUs, which are its own.
    """
    _die_with_parent()
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and ends the workers
    os.dup2(2, 1)  # what plugins print must not be taken for the command's answer
    if limits.gpus:
        _take_gpus(number, max(round(limits.gpus), 1))
    import torch

    torch.set_num_threads(limits.threads)
    if limits.memory_gb and not limits.gpus:  # a CUDA driver reserves far more than it uses
        limit_memory(limits.memory_gb)
    report = _Reporter(pipe)
    pipe.send((READY,))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = pipe.recv()
            try:
                outcome = perform(task, report)
            except SystemExit as stop:  # nobody but the task's code raises it here
                outcome = Outcome(task, error=PluginError(f"a plugin called exit({stop.code})"))
            report.flush()
            sys.stdout.flush()
            pipe.send((DONE, outcome))


def limit_memory(gigabytes: float) -> None:
    """Lets allocations beyond a limit fail in this process, so that a plugin that takes ever more hears of it."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))


class _Reporter:
    """Tells the parent of passes, a few times a second."""

    def __init__(self, pipe: Connection[Any, Any]) -> None:
        self.pipe, self.passes, self.sent = pipe, dict[str, int](), time.monotonic()

    def __call__(self, passes: int, kind: str) -> None:
        self.passes[kind] = self.passes.get(kind, 0) + passes
        if time.monotonic() - self.sent >= REPORT_S:
            self.flush()

    def flush(self) -> None:
        for kind, passes in self.passes.items():
            self.pipe.send((PASSES, passes, kind))
        self.passes.clear()
        self.sent = time.monotonic()


def _take_gpus(number: int, count: int) -> None:
    """Leaves worker `number` its GPUs alone; with more workers than GPUs they share."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    here = (
        named.split(",")
        if named
        else sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    )
    if len(here) > 1:  # else there is nothing to choose, or the device files do not tell
        chosen = [here[(count * number + place) % len(here)] for place in range(min(count, len(here)))]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def _die_with_parent() -> None:
    """Asks the kernel to end this process when its parent dies, also by SIGKILL; does nothing where it cannot."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
