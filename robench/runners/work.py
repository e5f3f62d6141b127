"""What workers do: plan a run, do one of its units, audit it. Each takes its request and who hears of passes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from robench.data import Dataset, load_dataset
from robench.defense import Defense, weights_digest
from robench.draws import IMAGES, note_draws
from robench.errors import PluginError
from robench.estimate import Estimate
from robench.evaluate import expected_passes, open_store, prepare
from robench.files import as_place
from robench.judge import judge
from robench.memory import give_back_memory
from robench.plan import Unit, plan_units
from robench.registry import load_attack, load_defense
from robench.result import Evaluation
from robench.rng import seeded
from robench.runners.task import Hear
from robench.settings import make_settings
from robench.source import digest_source, find_edits
from robench.store import SPEC_FILE, RunStore
from robench.threat import ThreatModel
from robench.unit import run_unit
from robench.unit_table import WORST
from robench.unit_work import UnitWork
from robench.victim import Victim


@dataclass(frozen=True)
class UnitRequest:
    """A unit of a run.

    Attributes:
        folder: the run folder, which holds the spec; may be a URL.
        unit: which.
        data_dir: folder with datasets; empty: `ROBENCH_DATA`.
        shared: hold the run's lock together with other workers; False where whoever asks holds it.
    """

    folder: str
    unit: Unit
    data_dir: str = ""
    shared: bool = False


@dataclass(frozen=True)
class PlanRequest:
    """A run to be planned.

    Attributes:
        folder: the run folder.
        defense: its name.
        dataset: the dataset's name.
        attacks: names of attacks, or one protocol's.
        norm: of the threat models.
        eps: the bounds.
        settings: fields of `Settings`.
        dry: leave the run folder as it is.
    """

    folder: str
    defense: str
    dataset: str
    attacks: tuple[str, ...]
    norm: str
    eps: tuple[float, ...]
    settings: Mapping[str, Any] = field(hash=False, default_factory=dict)
    dry: bool = False


@dataclass(frozen=True)
class Planned:
    """A planned run.

    Attributes:
        units: all its units.
        missing: those that are not stored.
        notes: what was found damaged.
        queries: forward and backward passes of all its units, at most.
        seconds: time of all its units, at most, by a short calibration.
    """

    units: tuple[Unit, ...]
    missing: tuple[Unit, ...]
    notes: tuple[str, ...]
    queries: int
    seconds: float


@dataclass(frozen=True)
class AuditWork:
    """A defense to be audited.

    Attributes:
        folder: of the audit.
        defense: its name.
        dataset: the dataset's name.
        norm: of the threat model.
        eps: its bound.
        settings: `n`, `seed`, `eot`, `device`, `data_dir`, as `robench.audit` takes them.
    """

    folder: str
    defense: str
    dataset: str
    norm: str
    eps: float
    settings: Mapping[str, Any] = field(hash=False, default_factory=dict)


def do_unit(request: UnitRequest, hear: Hear | None) -> float:
    """Does a unit and stores it; returns its seconds, those before an interrupt included.

    Raises:
        RobenchError: see `run_unit` and `RunStore.write`.
    """
    started = time.monotonic()
    work, store = _prepare(request.folder, request.data_dir)
    with store.locked(shared=True) if request.shared else contextlib.nullcontext():
        work.on_passes = hear
        table = run_unit(work, request.unit)
        try:
            work.check_unchanged()
        except PluginError:
            _prepare.cache_clear()
            raise
        store.write(request.unit, table, work.failures)
    work.failures.clear()
    give_back_memory()
    return time.monotonic() - started + work.recalled_s


def plan_run(request: PlanRequest, hear: Hear | None = None) -> Planned:
    """Checks that a run can be done, makes its folder or takes up the one that is there, and guesses its time.

    Raises:
        RobenchError: see `robench.evaluate`.
    """
    started = make_settings({**request.settings, "defense_spec": request.defense})
    data = _dataset(request.dataset, started.n, started.seed, str(started.data_dir or ""))
    defense = _heard(load_defense(request.defense, request.dataset), hear)
    threats = [ThreatModel(request.norm, eps) for eps in request.eps]
    work = prepare(defense, list(request.attacks), threats, data, started)
    folder = as_place(request.folder)
    exists, source = (folder / SPEC_FILE).exists(), digest_source(defense, work.spec.defense)
    store = None if request.dry and not exists else open_store(work.spec, folder, source, resume=exists)
    units, notes = plan_units(work.spec), list[str]()
    if store is not None and not request.dry:
        with store.locked(shared=True):
            notes = store.tidy(units)
    done = store.finished() if store is not None else {}
    missing = tuple(unit for unit in units if unit.index not in done)
    passes = expected_passes(work, units)
    per_judge, per_attack = _seconds_per_pass(work) if missing else (0.0, 0.0)
    seconds = passes["judge"] * per_judge + passes["attack"] * per_attack
    return Planned(tuple(units), missing, tuple(notes), sum(passes.values()), seconds)


def do_audit(request: AuditWork, hear: Hear | None) -> str:
    """Audits a defense and writes the report; returns the verdict.

    Raises:
        RobenchError: see `robench.audit`.
    """
    from robench.audit import audit

    folder = Path(request.folder)
    defense = _heard(load_defense(request.defense, request.dataset), hear)
    threat = ThreatModel(request.norm, request.eps)
    found = audit(defense, threat, request.dataset, out=folder, defense_spec=request.defense, **dict(request.settings))
    return found.verdict


@dataclass(frozen=True)
class Figures:
    """What a study's table says of a finished run.

    Attributes:
        complete: False where an attack failed.
        reason: which, and why.
        n: images.
        clean: clean accuracy.
        robust: robust accuracy by bound; None where it is not known.
        worst_attack: by bound.
        content: the run's result.json.
    """

    complete: bool
    reason: str
    n: int
    clean: Estimate
    robust: Mapping[float, Estimate | None]
    worst_attack: Mapping[float, str]
    content: Mapping[str, Any]


def close_run(folder: str, hear: Hear | None = None) -> Figures:
    """Reads the units of a run, writes its result and row, and returns its figures.

    Raises:
        RobenchError: a unit is missing or damaged, or the folder cannot be written.
    """
    del hear
    result = Evaluation.load(folder)
    result.save()
    robust = {eps: result.robust_at(eps) if result.complete else None for eps in result.spec.eps}
    worst = {eps: result.worst_attack(eps) for eps in result.spec.eps}
    return Figures(
        result.complete, _what_failed(result), result.spec.n, result.clean_accuracy, robust, worst, result.to_json()
    )


def _what_failed(result: Evaluation) -> str:
    if result.complete:
        return ""
    failed = sorted(set(result.table[result.table["status"] == "failed"]["attack"]) - {WORST})
    reasons = list(result.reasons.values())
    return f"failed: {', '.join(failed)}" + (f" ({reasons[0]})" if reasons else "")


def _heard(defense: Defense, hear: Hear | None) -> Defense:
    """Lets whoever waits hear of each pass through any part of a defense."""
    if hear is not None:
        for module in defense.modules():
            module.register_forward_hook(lambda *_: hear(0, "judge"))
    return defense


FUNCTIONS: Final[dict[str, Callable[[Any, Hear | None], Any]]] = {
    "unit": do_unit,
    "plan": plan_run,
    "close": close_run,
    "audit": do_audit,
}


@functools.lru_cache(maxsize=4)
def _dataset(name: str, n: int | None, seed: int, data_dir: str) -> Dataset:
    from robench.settings import DEFAULT_N

    return load_dataset(name, "test", n or DEFAULT_N, seed, Path(data_dir) if data_dir else None)


@functools.lru_cache(maxsize=2)
def _prepare(folder: str, data_dir: str) -> tuple[UnitWork, RunStore]:
    """Loads what a run works with.

    Raises:
        PluginError: what is loaded is not what the run was planned with.
    """
    store = RunStore.open(as_place(folder))
    spec = store.spec
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    data = _dataset(spec.dataset, spec.n, spec.seed, data_dir)
    if (weights_digest(defense), data.digest) != (spec.weights_digest, spec.data_digest):
        raise PluginError(f'a worker loads other weights or images by "{spec.defense}" and "{spec.dataset}"')
    changed = find_edits(store.source, digest_source(defense, spec.defense))
    if changed:
        raise PluginError(f'a worker loads other code by "{spec.defense}": {", ".join(changed)} changed since')
    attacks = {entry.key: load_attack(entry.spec) for entry in spec.attacks}
    note_draws(defense.to(spec.device), data.x[:IMAGES].to(spec.device))
    return UnitWork(spec, defense, attacks, data.x, data.y, data.index, drafts=store.drafts), store


def _seconds_per_pass(work: UnitWork) -> tuple[float, float]:
    """Measured time of one image's pass: of the judge, and of half a gradient query (one pass of two)."""
    defense, device = work.defense.to(work.spec.device), work.spec.device
    x, y = work.x[:32].to(device), work.y[:32].to(device)
    with seeded(work.spec.seed, "calibrate", device=device):
        few = _time(lambda: judge(defense, x[:2], 1)) / len(x[:2])
        if few < 0.05:
            few = _time(lambda: judge(defense, x, 1)) / len(x)
        rows = x if few < 0.05 else x[:2]
        victim = Victim(defense, "gradient", len(rows))
        try:
            gradient = _time(lambda: victim.gradient(rows, y[: len(rows)])) / len(rows)
        except Exception:  # noqa: BLE001 - a guess must not fail; the attacks will tell what is wrong
            gradient = 2 * few
    defense.to("cpu")
    return few, gradient / 2


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
