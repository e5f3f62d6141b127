"""The runner of several processes: each loads the defense, attacks and images once, and stores its units itself."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from robench.errors import PluginError, UsageError
from robench.plan import RunSpec, Unit

if TYPE_CHECKING:
    from robench.unit import UnitWork

DEATHS: Final = 3
"""Losses of a worker in a row, without a unit finished in between, after which the run stops."""


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    Attributes:
        folder: the run folder, which holds the spec.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        threads: of torch, in each worker.
    """

    folder: Path
    data_dir: Path | None
    threads: int


def run_in_processes(units: Sequence[Unit], job: Job, workers: int, on_done: Callable[[Unit, float], None]) -> None:
    """Does the units in worker processes; a unit whose worker died is done again.

    Args:
        units: what is to be done.
        job: for the workers.
        workers: how many processes.
        on_done: called here with each unit that was stored, and its seconds.

    Raises:
        PluginError: the defense broke the contract, or workers die again and again.
        KeyboardInterrupt: the workers are gone; finished units are stored.
    """
    left, deaths = list(units), 0
    while left:
        pool = ProcessPoolExecutor(min(workers, len(left)), multiprocessing.get_context("spawn"), _ignore_interrupts)
        try:
            futures = {pool.submit(_do, job, unit): unit for unit in left}
            for future in as_completed(futures):
                seconds = future.result()
                left.remove(futures[future])
                deaths = 0
                on_done(futures[future], seconds)
        except BrokenProcessPool:
            deaths += 1
            if deaths == DEATHS:
                raise PluginError(
                    f"a worker process died {DEATHS} times without finishing a unit (out of memory, or exit() in a "
                    f"plugin?); {len(left)} of {len(units)} units are left"
                ) from None
        finally:
            _stop(pool)


def check_loadable(spec: RunSpec, out: object) -> None:
    """Checks that workers can load by name what the run works with.

    Raises:
        UsageError: they cannot.
    """
    if out is None or not spec.defense or not spec.dataset:
        raise UsageError("several workers need a run folder (out), and a defense and a dataset that are loaded by name")


def threads_for(workers: int) -> int:
    """Threads of each worker, so that all together use every core once."""
    return max(len(os.sched_getaffinity(0)) // workers, 1)


def _stop(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:  # after an interrupt they would finish their units first
        process.terminate()
    for process in processes:
        process.join()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and ends the workers


def _do(job: Job, unit: Unit) -> float:
    """In a worker: runs a unit and stores it; returns its seconds."""
    from robench.defense import weights_digest
    from robench.store import RunStore
    from robench.unit import run_unit

    started = time.monotonic()
    work, store = _prepare(job), RunStore.open(job.folder)
    table = run_unit(work, unit)
    if weights_digest(work.defense) != work.spec.weights_digest:
        raise PluginError(f'defense "{work.defense.name}": its weights or buffers changed during the run')
    store.write(unit, table, work.failures)
    work.failures.clear()
    return time.monotonic() - started


@functools.cache
def _prepare(job: Job) -> UnitWork:
    """Loads what the run works with, once in each worker.

    Raises:
        UsageError: what is loaded is not what the run was planned with.
    """
    import torch

    from robench.data import load_dataset
    from robench.defense import weights_digest
    from robench.registry import load_attack, load_defense
    from robench.store import RunStore
    from robench.unit import UnitWork

    torch.set_num_threads(job.threads)
    spec = RunStore.open(job.folder).spec
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    data = load_dataset(spec.dataset, "test", spec.n, spec.seed, job.data_dir)
    if (weights_digest(defense), data.digest) != (spec.weights_digest, spec.data_digest):
        raise UsageError(f'a worker loads other weights or images by "{spec.defense}" and "{spec.dataset}"')
    attacks = {entry.key: load_attack(entry.spec) for entry in spec.attacks}
    return UnitWork(spec, defense.to(spec.device), attacks, data.x, data.y, data.index)
