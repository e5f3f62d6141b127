"""The main path: from a defense, attacks, a threat model and data to an Evaluation. Read this file first.

spec -> units -> for each unit: clean pass, attacks, judge -> store -> Evaluation
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import robench
from robench.advice import advise_without_gradient, explain_pixels, explain_shape
from robench.attack import Attack
from robench.batches import is_out_of_memory
from robench.data import Dataset, digest_data, load_dataset
from robench.defense import Defense, weights_digest
from robench.errors import PluginError, RobenchError, UsageError
from robench.estimate import tell_guess
from robench.files import Place, as_place
from robench.lineup import Attacks, check_attacks, check_defense, find_departure, named_protocol, plan_attacks
from robench.memory import give_back_memory
from robench.origin import find_origin
from robench.plan import RunSpec, Unit, plan_units
from robench.precision import has_bfloat16
from robench.probe import check_answers
from robench.progress import Progress
from robench.registry import describe_error
from robench.result import Evaluation
from robench.runners import Limits, Task, run_here, run_in_processes, threads_for
from robench.settings import DEFAULT_N, RANDOMIZED_EOT, RANDOMIZED_REPEATS, Settings, make_settings
from robench.source import digest_source, find_edits
from robench.store import RunStore
from robench.threat import ThreatModel, as_threats
from robench.types import Images, Labels
from robench.unit import run_unit
from robench.unit_table import CLEAN
from robench.unit_work import RECALLED, UnitWork

LOG = logging.getLogger("robench")
Data = str | tuple[Any, Any] | Dataset
"""A dataset's name, a Dataset, or images `b c h w` and labels: tensors, arrays, or a list of labels."""


def evaluate(
    defense: Defense,
    attacks: Attacks,
    threat: ThreatModel | Sequence[ThreatModel],
    data: Data,
    **settings: Any,
) -> Evaluation:
    """Measures clean and worst-case accuracy of a defense, with intervals.

    Args:
        defense: see `load_defense` and `wrap`.
        attacks: an attack, a name (`pgd(steps=100)`, `fgsm,pgd`), a list of either, or a protocol's name.
        threat: norm and bound; several of one norm give the whole curve.
        data: a dataset's name, or images in [0, 1] and labels, as tensors or arrays.
        **settings: the fields of `Settings`.

    Returns:
        The Evaluation. An attack that raised or broke a bound is recorded as failed, with a warning, and the others go
        on; the robust accuracy is then None.

    Raises:
        UsageError: something the caller can fix: a name, a range, data that does not fit the defense.
        PluginError: the defense broke the contract (NaN, wrong shape).
        DataError: a damaged file.
    """
    chosen = make_settings(settings)
    work = prepare(defense, attacks, threat, data, chosen)
    if chosen.workers > 1:
        check_loadable(work.spec, chosen)
    source = digest_source(defense, work.spec.defense)
    store = _store_for(work.spec, chosen, source)
    defense.to(work.spec.device)
    try:
        with store.locked() if store is not None else contextlib.nullcontext():
            tables, seconds = _run(work, store, chosen)
    finally:
        defense.to("cpu")
        if store is not None:
            store.flush_times()
    if store is not None:
        result = Evaluation.load(store.folder)
        result.save()
    else:
        created = RunStore.today()
        result = Evaluation(work.spec, tables, folder=None, created=created, seconds=seconds, failures=work.failures)
        result.source = source
    _warn_of_guesses(defense, result)
    for key, reason in result.reasons.items():
        LOG.warning("%s: attack %s failed, so the robust accuracy is not known: %s", defense.name, key, reason)
    if advice := advise_without_gradient(result.reasons.values(), work.spec.norm):
        defense.tell_once(advice, "%s: %s", defense.name, advice)
    return result


def _warn_of_guesses(defense: Defense, result: Evaluation) -> None:
    """Warns, once for each data, of a clean accuracy that guessing would reach; the runs of an audit are many."""
    told = tell_guess(result.answers(CLEAN))
    if told:
        defense.tell_once(f"guess {result.spec.data_digest}", "%s: %s", defense.name, told)


def prepare(
    defense: Defense, attacks: Attacks, threat: ThreatModel | Sequence[ThreatModel], data: Data, settings: Settings
) -> UnitWork:
    """Collects what the units of a run work with, and checks all that can be checked before any work.

    Raises:
        RobenchError: see `evaluate`.
    """
    check_defense(defense)
    threats = sorted(as_threats(threat), key=lambda model: model.eps)
    dataset = load_images(data, settings)
    check_images(dataset.x, dataset.y, defense)
    spec, built = make_spec(defense, threats, dataset, attacks, settings=settings)
    check_attacks(built, defense, threats, dataset.name, settings)
    if spec.precision == "bfloat16" and not has_bfloat16(spec.device):
        LOG.warning("this device only emulates bfloat16, which is many times slower. Choose --precision float32")
    work = UnitWork(spec, defense, built, dataset.x, dataset.y, dataset.index)
    with contextlib.redirect_stdout(sys.stderr):
        check_answers(work)
    return work


def _run(work: UnitWork, store: RunStore | None, settings: Settings) -> tuple[list[Any], float]:
    """Runs the units that are missing; returns their tables (empty where they were stored) and the time."""
    units = plan_units(work.spec)
    for reason in store.tidy(units) if store is not None else ():
        LOG.warning(reason)
    work.drafts = store.drafts if store is not None else None
    done = store.finished() if store is not None else {}
    missing = [unit for unit in units if unit.index not in done]
    tables: list[Any] = []
    started = time.monotonic()

    def work_on(unit: Unit) -> None:
        start = time.monotonic()
        try:
            table = run_unit(work, unit)
        except SystemExit as stop:
            raise PluginError(f"unit {unit.index}: a plugin called exit({stop.code})") from stop
        except Exception as error:
            if isinstance(error, RobenchError) or is_out_of_memory(error):
                raise
            raise PluginError(f"unit {unit.index}: {describe_error(error)}") from error
        work.check_unchanged()
        if store is None:
            tables.append(table)
        else:
            store.write(unit, table, work.failures)
            work.failures.clear()
            give_back_memory()
            store.note_time(unit, time.monotonic() - start + work.recalled_s)

    shown = settings.progress and bool(missing)
    totals, weights = expected_passes(work, missing), {"judge": work.defense.forward_cost}
    with Progress(work.spec.defense_name, totals, weights=weights, enabled=shown) as progress:
        work.on_passes = functools.partial(_hear, progress)
        if settings.workers > 1 and store is not None:
            for unit, taken in _run_by_workers(store, missing, settings, work.on_passes):
                store.note_time(unit, taken)
        else:
            run_here(missing, work_on)
    return tables, time.monotonic() - started


def _hear(progress: Progress, passes: int, kind: str) -> None:
    """Takes what units tell; see `UnitWork.on_passes`."""
    if kind == "begun":
        progress.begin(passes, "attack")
    elif kind == "spared":
        progress.spare(passes, "attack")
    elif kind.startswith(RECALLED):
        progress.recall(passes, kind.removeprefix(RECALLED))
    else:
        progress.advance(passes, kind)


def _run_by_workers(
    store: RunStore, units: Sequence[Unit], settings: Settings, hear: Callable[[int, str], None]
) -> Iterator[tuple[Unit, float]]:
    """Has worker processes do units; yields each as it is stored, with its seconds.

    Raises:
        RobenchError: a unit cannot be done; those before it are stored.
    """
    from robench.runners.work import UnitRequest

    data_dir = "" if settings.data_dir is None else str(settings.data_dir)
    queue = deque(Task("unit", UnitRequest(str(store.folder), unit, data_dir)) for unit in units)
    limits = Limits(threads=threads_for(settings.workers), gpus=1 if store.spec.device == "cuda" else 0)
    with contextlib.closing(
        run_in_processes(queue, lambda _: True, hear, workers=settings.workers, limits=limits)
    ) as outcomes:
        for outcome in outcomes:
            unit: Unit = outcome.task.request.unit
            if outcome.error is not None:
                raise type(outcome.error)(f"unit {unit.index}: {outcome.error}")
            yield unit, outcome.value


def expected_passes(work: UnitWork, units: Sequence[Unit]) -> dict[str, int]:
    """Passes that units are expected to take, by kind; only the time left is guessed from it."""
    spec = work.spec
    images = sum(unit.stop - unit.start for unit in units)
    judged = 1 + len(spec.eps) * (len(spec.attacks) + int(spec.randomized and len(spec.attacks) > 1))
    return {"judge": images * judged * spec.judge_repeats, "attack": work.expected_in_all(images)}


def make_spec(
    defense: Defense, threats: Sequence[ThreatModel], dataset: Dataset, attacks: Attacks, *, settings: Settings
) -> tuple[RunSpec, dict[str, Attack]]:
    """Collects all that determines a run's numbers; returns it with the built attacks by key.

    Raises:
        UsageError: no bound, bounds of several norms, or what `plan_attacks` raises.
    """
    norms = {model.norm for model in threats}
    if len(norms) != 1:
        raise UsageError(f"a run has one norm and at least one eps; got {len(threats)} of {sorted(norms)}")
    (norm,) = norms
    protocol = named_protocol(attacks)
    entries, built = plan_attacks(attacks, defense, norm, dataset.name)
    repeats = protocol.judge_repeats if protocol else RANDOMIZED_REPEATS
    origin = None if settings.defense_spec else find_origin(defense, dataset.name)
    spec = RunSpec(
        defense=settings.defense_spec if origin is None else origin.spec,
        defense_options=settings.defense_options if origin is None else dict(origin.options),
        defense_name=defense.name,
        weights_digest=weights_digest(defense),
        randomized=defense.randomized,
        dataset=dataset.name,
        data_digest=dataset.digest,
        image_shape=tuple(dataset.x.shape[1:]),
        n=len(dataset.x),
        seed=settings.seed,
        norm=norm,
        eps=tuple(sorted({model.eps for model in threats})),
        attacks=tuple(entries),
        protocol="",  # see below
        cascade=bool(protocol and protocol.cascade) if settings.cascade is None else settings.cascade,
        unit_size=settings.unit_size,
        eot=(settings.eot or RANDOMIZED_EOT) if defense.randomized else 1,
        judge_repeats=(settings.judge_repeats or repeats) if defense.randomized else 1,
        query_budget=settings.query_budget,
        precision=settings.precision,
        device=settings.resolve_device(),
        robench_version=robench.__version__,
        torch_version=torch.__version__.split("+")[0],
    )
    if protocol is None:
        return spec, built
    departure = find_departure(spec, protocol)
    if departure:
        LOG.warning("this is no run of %s, and its row will not bear that name: %s", protocol.name, departure)
        return spec, built
    return replace(spec, protocol=protocol.name), built


def load_images(data: Data, settings: Settings) -> Dataset:
    """The images and labels of a run; n and seed of the settings draw those of a named dataset.

    Raises:
        UsageError: unknown data, not images and labels, fewer than n of them, or a Dataset of another n.
        DataError: a damaged file.
    """
    if isinstance(data, Dataset):
        if settings.n not in (None, len(data.x)):
            raise UsageError(
                f"the Dataset given holds {len(data.x)} images, and n is {settings.n}; leave n out, or load so many: "
                f"robench.data.load_dataset(name, n={settings.n})"
            )
        return data
    if isinstance(data, str):
        folder = Path(settings.data_dir) if settings.data_dir is not None else None
        return load_dataset(data, "test", settings.n or DEFAULT_N, settings.seed, folder)
    x, y = _as_pair(data)
    if settings.n is not None and settings.n > len(x):
        raise UsageError(f"n must be at most the {len(x)} images given; got {settings.n}")
    count = settings.n or len(x)
    x, y = x[:count].float().cpu(), y[:count].long().cpu()
    classes = tuple(str(number) for number in range(int(y.max()) + 1)) if len(y) else ()
    return Dataset("", "", x, y, torch.arange(count), classes, digest_data(x, y))


def _as_pair(data: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as tensors without a graph.

    Raises:
        UsageError: they are not two, or of other shapes, or the labels are no whole numbers.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2):
        came = f"{len(data)} things" if isinstance(data, tuple | list) else type(data).__name__
        raise UsageError(
            f"data must be a dataset's name or a pair of images and labels; got {came}. "
            "Gather a torch Dataset or DataLoader in two tensors first"
        )
    try:
        x, y = (torch.as_tensor(part.copy() if isinstance(part, np.ndarray) else part).detach() for part in data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"data must be images and labels as tensors or arrays of numbers: {error}") from error
    if x.ndim != 4 or y.ndim != 1 or len(x) != len(y):
        raise UsageError(
            f"data must be images b c h w and as many labels, one number each; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    if not bool((y == y.long()).all()):  # NaN too
        raise UsageError("labels must be whole numbers, the number of each image's class; got some that are not")
    return x, y


def check_images(x: Images, y: Labels, defense: Defense) -> None:
    """Checks that images and labels fit the defense.

    Raises:
        UsageError: no images, pixels outside [0, 1] or not finite, another image shape, or labels beyond the classes.
    """
    if not len(x):
        raise UsageError("data must hold at least one image; got none")
    if problem := explain_pixels(x):
        raise UsageError(problem)
    if tuple(x.shape[1:]) != tuple(defense.input_shape):
        raise UsageError(explain_shape(tuple(x.shape[1:]), tuple(defense.input_shape), defense.name))
    if not bool((y >= 0).all() and (y < defense.num_classes).all()):
        raise UsageError(
            f'labels must be 0 to {defense.num_classes - 1} for defense "{defense.name}"; '
            f"got {int(y.min())} to {int(y.max())}"
        )


def check_loadable(spec: RunSpec, settings: Settings) -> None:
    """Checks that workers can load by name what the run works with.

    Raises:
        UsageError: they cannot.
    """
    if settings.out is None or not spec.defense or not spec.dataset:
        raise UsageError(
            "several workers need a run folder (out), and a defense and a dataset that are loaded by name "
            "(robench.load_defense, and unchanged since)"
        )


def _store_for(spec: RunSpec, settings: Settings, source: Mapping[str, str]) -> RunStore | None:
    if settings.out is not None:
        return open_store(spec, as_place(settings.out), source, resume=settings.resume)
    if settings.resume:
        raise UsageError("resume needs the run's folder; give it as out")
    return None


def open_store(spec: RunSpec, folder: Place, source: Mapping[str, str], *, resume: bool) -> RunStore:
    """Starts a run folder, or opens the one that is there; `source` is what `digest_source` says of the defense.

    Raises:
        UsageError: there is one and none is expected, none where one is, or one of another spec or other code.
    """
    if not resume:
        return RunStore.create(folder, spec, source=source)
    store = RunStore.open(folder)
    differing = store.spec.differences(spec)
    if differing:
        raise UsageError(f"{folder} holds a run of another spec: {'; '.join(differing[:3])}. Choose another --out")
    changed = find_edits(store.source, source)
    if changed:
        raise UsageError(
            f"{folder} holds a run that was begun with other code of the defense: {', '.join(changed[:3])} changed "
            "since, and its units would be of two defenses. Choose another --out, or undo the change"
        )
    return store
