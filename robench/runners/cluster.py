"""The runner on a Ray cluster: each task of a study is a Ray task. Needs the extra `robench[ray]`."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, Final

from robench.errors import UsageError
from robench.runners.task import TRIES_BY_EXIT, TRIES_BY_SIGNAL, Hear, Limits, Losses, Outcome, Task, perform
from robench.runners.worker import limit_memory

AHEAD: Final = 2
"""Tasks handed to Ray for each that can run, so that no worker waits for the next one."""
REARM_S: Final = 1.0


def run_on_ray(
    queue: deque[Task],
    wanted: Callable[[Task], bool],
    hear: Hear | None = None,
    *,
    address: str | None = None,
    workers: int | None = None,
    limits: Limits | None = None,
) -> Generator[Outcome]:
    """Does tasks on a Ray cluster; see `Runner`. What a task prints goes to Ray's logs.

    A task whose worker, node or memory was lost is done again. A task that hangs ends its worker.

    Args:
        queue: the tasks.
        wanted: False for a task that is to be dropped.
        hear: unused; workers on other machines report whole tasks only.
        address: of a cluster, as `ray.init` takes it; None starts one on this machine, for as long as this lasts.
        workers: tasks at once; None: as many as the cluster has room for.
        limits: what each task may use; its threads and GPUs are asked of Ray.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached.
    """
    del hear
    limits = limits or Limits()
    ray = _connect(address, workers, limits)
    try:
        is_capped = address is not None and workers is not None  # nothing else keeps a cluster to so many
        room = (workers or _room(ray, limits)) * (1 if is_capped else AHEAD)
        yield from _run(ray, queue, wanted, room, limits)
    finally:
        ray.shutdown()


def _run(ray: Any, queue: deque[Task], wanted: Callable[[Task], bool], room: int, limits: Limits) -> Generator[Outcome]:
    # a process that has used one GPU does not move to another that it is given later: with GPUs, one task each
    remote = ray.remote(
        num_cpus=limits.threads,
        num_gpus=limits.gpus,
        max_retries=0,
        max_calls=1 if limits.gpus else 0,
        scheduling_strategy="SPREAD",
    )(_perform)
    running: dict[Any, tuple[Task, float]] = {}
    losses = Losses()
    patience = limits.stall_s if limits.task_s is None else min(limits.stall_s, limits.task_s)
    while True:
        while queue and len(running) < room:
            task = queue.popleft()
            if wanted(task):
                running[remote.remote(task, limits, sys.path)] = task, time.monotonic()
        if not running:
            return
        for done in ray.wait(list(running), timeout=1.0)[0]:
            task, handed_out = running.pop(done)
            may_have_hung = time.monotonic() - handed_out >= patience
            outcome = _fetch(ray, done, task, losses, TRIES_BY_EXIT if may_have_hung else TRIES_BY_SIGNAL)
            if isinstance(outcome, Outcome):
                yield outcome
            else:
                queue.appendleft(outcome)


def _connect(address: str | None, workers: int | None, limits: Limits) -> Any:
    """Ray, connected.

    Raises:
        UsageError: it is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("the runner ray needs a package: pip install 'robench[ray]'") from None
    if address is not None:
        _reach(address)
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is not None:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(address="local", num_cpus=None if workers is None else workers * limits.threads, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address or 'this machine'}: {' '.join(str(error).split())}") from None
    return ray


def _reach(address: str) -> None:
    """Knocks at a cluster's address, since Ray itself tries for many minutes.

    Raises:
        UsageError: nobody answers, or it is no address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f'a Ray address is auto, HOST:PORT or ray://HOST:PORT; got "{address}"')
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"no Ray cluster answers at {address}: {error}") from None


def _room(ray: Any, limits: Limits) -> int:
    """Tasks that the cluster can run at once."""
    found = ray.cluster_resources()
    rooms = [found.get("CPU", 1.0) / limits.threads]
    if limits.gpus:
        rooms.append(found.get("GPU", 0.0) / limits.gpus)
    if min(rooms) < 1:
        raise UsageError(
            f"the Ray cluster has no room for a task of {limits.threads} threads and {limits.gpus:g} GPUs; "
            f"it has {found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"
        )
    return int(min(rooms))


def _fetch(ray: Any, done: Any, task: Task, losses: Losses, tries: int) -> Outcome | Task:
    """What became of a task; the task itself where it is to be done again."""
    try:
        outcome: Outcome = ray.get(done)
    except ray.exceptions.RayError as error:  # the worker, its node or its memory was lost
        reason = f"Ray lost its worker ({type(error).__name__}): it died, or hung"
        return losses.give_up(task, reason, tries) or task
    return outcome


def _perform(task: Task, limits: Limits, path: list[str]) -> Outcome:
    """In a Ray worker: does a task, and ends the process if it hangs. Plugins are looked for where the driver does."""
    sys.path.extend(entry for entry in path if entry not in sys.path)
    import torch

    torch.set_num_threads(limits.threads)
    if limits.memory_gb and not limits.gpus:
        limit_memory(limits.memory_gb)
    watch = _Watchdog(limits if task.kind == "unit" else replace(limits, task_s=None))
    try:
        return perform(task, watch)
    finally:
        watch.end()


class _Watchdog:
    """Ends the process when no pass is finished for too long, or the task takes too long; needs no Python thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.started = time.monotonic()
        self.armed = -REARM_S
        self(0, "")

    def __call__(self, passes: int, kind: str) -> None:
        del passes, kind
        now = time.monotonic()
        if now - self.armed < REARM_S:
            return
        left = float("inf") if self.limits.task_s is None else self.limits.task_s - (now - self.started)
        faulthandler.dump_traceback_later(max(min(self.limits.stall_s, left), 0.1), exit=True)
        self.armed = now

    def end(self) -> None:
        faulthandler.cancel_dump_traceback_later()
