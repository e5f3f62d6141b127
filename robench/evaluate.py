"""The main path: from a defense, attacks, a threat model and data to an Evaluation. Read this file first.

spec -> units -> for each unit: clean pass, attacks, judge -> store -> Evaluation
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import robench
from robench.attack import Attack
from robench.data import Dataset, digest_data, load_dataset
from robench.defense import Defense, weights_digest
from robench.errors import PluginError, UsageError
from robench.judge import answer
from robench.plan import AttackEntry, RunSpec, Unit, plan_units
from robench.progress import Progress
from robench.protocol import find_protocol
from robench.registry import load_attack, split_specs
from robench.result import Evaluation
from robench.rng import seeded
from robench.runners import run_here
from robench.store import RunStore
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.unit import CLEAN, WORST, UnitWork, run_unit

Data = str | tuple[torch.Tensor, torch.Tensor] | Dataset
Attacks = Attack | str | Sequence[Attack | str]

DEFAULT_N = 256
RANDOMIZED_EOT, RANDOMIZED_REPEATS, STANDARD_REPEATS = 10, 20, 100


@dataclass(frozen=True)
class Settings:
    """How an evaluation is run; every field may be given to `evaluate` by name.

    Attributes:
        n: images, a class-stratified draw by `seed` (of a pair of tensors the first n); None: 256, or all of a pair.
        seed: seeds the draw of images and all randomness of the run.
        unit_size: images of one work unit.
        eot: draws averaged in one gradient query; None: 10 for a randomized defense, else 1.
        judge_repeats: fresh answers behind each verdict; None: 20 for a randomized defense (100 in a `standard`
            protocol), else 1.
        device: `cpu`, `cuda`, or `auto`: cuda where there is one.
        out: run folder; None keeps the result in memory.
        resume: continue the run in `out`.
        runner: where units run; see robench.runners.
        progress: show progress on standard error.
        query_budget: the most forward plus backward passes per image of one attack; None: no limit.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        defense_spec: how `load_defense` finds the defense again; set by the command line.
        defense_options: options given besides those in `defense_spec`.
    """

    n: int | None = None
    seed: int = 0
    unit_size: int = 128
    eot: int | None = None
    judge_repeats: int | None = None
    device: str = "auto"
    out: str | Path | None = None
    resume: bool = False
    runner: str = "local"
    progress: bool = False
    query_budget: int | None = None
    data_dir: str | Path | None = None
    defense_spec: str = ""
    defense_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: a setting is out of range.
        """
        for name in ("n", "unit_size", "eot", "judge_repeats", "query_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}")
        if self.runner != "local":
            raise UsageError(f'runner must be local; got "{self.runner}"')

    def resolve_device(self) -> str:
        """The kind of device meant by `device`.

        Raises:
            UsageError: unknown, or not there.
        """
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f'device must be auto, cpu or cuda; got "{self.device}"')
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no CUDA device; use --device cpu")
        return self.device


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
        data: a dataset's name, or images in [0, 1] and labels.
        **settings: the fields of `Settings`.

    Returns:
        The Evaluation. An attack that raised or broke a bound is recorded as failed and the others go on.

    Raises:
        UsageError: something the caller can fix: a name, a range, data that does not fit the defense.
        PluginError: the defense broke the contract (NaN, wrong shape).
        DataError: a damaged file.
    """
    chosen = make_settings(settings)
    defense.check_traits()
    threats = sorted([threat] if isinstance(threat, ThreatModel) else threat, key=lambda model: model.eps)
    dataset = _load(data, chosen)
    check_images(dataset.x, dataset.y, defense)
    entries, built, protocol = plan_attacks(attacks, defense)
    for model in threats:
        for attack in built.values():
            attack.check_threat(model)
    spec = make_spec(defense, threats, dataset, entries, protocol, settings=chosen)
    check_answers(defense, dataset.x, spec)
    store = _open_store(spec, chosen)
    work = UnitWork(spec, defense.to(spec.device), built, dataset.x, dataset.y, dataset.index)
    try:
        tables, seconds = _run(work, store, show=chosen.progress)
        if weights_digest(defense) != spec.weights_digest:
            raise PluginError(
                f'defense "{defense.name}": its weights or buffers changed during the run; nothing counts'
            )
    finally:
        defense.to("cpu")
    if store is not None:
        result = Evaluation.load(store.folder)
        result.save()
        return result
    import pyarrow as pa

    created = RunStore.today()
    table = pa.concat_tables(tables)
    return Evaluation(spec, table, folder=None, created=created, seconds=seconds, failures=work.failures)


def _run(work: UnitWork, store: RunStore | None, *, show: bool) -> tuple[list[Any], float]:
    """Runs the units that are missing; returns their tables (empty where they were stored) and the time."""
    units = plan_units(work.spec)
    done = store.finished() if store is not None else {}
    if store is not None:
        for unit in units:
            if unit.index in done:
                store.read(unit)  # a damaged file is found before any work
    missing = [unit for unit in units if unit.index not in done]
    tables: list[Any] = []
    started = time.monotonic()

    def work_on(unit: Unit) -> None:
        start = time.monotonic()
        table = run_unit(work, unit)
        if store is None:
            tables.append(table)
        else:
            for key, trace in work.failures.items():
                store.note_failure(unit, key, trace)
            work.failures.clear()
            store.write(unit, table)
            store.note_time(unit, time.monotonic() - start)
        finished.append(unit)
        for kind, passes in expected_passes(work, finished).items():
            progress.finish(kind, passes)

    finished: list[Unit] = []
    totals, weights = expected_passes(work, missing), {"judge": work.defense.forward_cost}
    with Progress(work.spec.defense_name, totals, weights=weights, enabled=show and bool(missing)) as progress:
        work.on_query = progress.advance
        run_here(missing, work_on)
    return tables, time.monotonic() - started


def expected_passes(work: UnitWork, units: Sequence[Unit]) -> dict[str, int]:
    """Passes that units are expected to take, by kind; only the time left is guessed from it."""
    spec = work.spec
    images = sum(unit.stop - unit.start for unit in units)
    judged = 1 + len(spec.eps) * (len(spec.attacks) + int(spec.randomized and len(spec.attacks) > 1))
    attacked = len(spec.eps) * sum(work.attacks[entry.key].passes() * spec.eot for entry in spec.attacks)
    return {"judge": images * judged * spec.judge_repeats, "attack": images * attacked}


def make_settings(settings: dict[str, Any]) -> Settings:
    """Builds Settings from keyword arguments.

    Raises:
        UsageError: an unknown name or a value out of range.
    """
    known = {item.name for item in fields(Settings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f'evaluate has no setting "{unknown[0]}"; there are: {", ".join(sorted(known))}')
    return Settings(**settings)


def make_spec(
    defense: Defense,
    threats: Sequence[ThreatModel],
    dataset: Dataset,
    entries: Sequence[AttackEntry],
    protocol: str,
    *,
    settings: Settings,
) -> RunSpec:
    """Collects all that determines a run's numbers.

    Raises:
        UsageError: no bound, or bounds of several norms.
    """
    norms = {model.norm for model in threats}
    if len(norms) != 1:
        raise UsageError(f"a run has one norm and at least one eps; got {len(threats)} of {sorted(norms)}")
    repeats = STANDARD_REPEATS if protocol.startswith("standard") else RANDOMIZED_REPEATS
    return RunSpec(
        defense=settings.defense_spec,
        defense_options=settings.defense_options,
        defense_name=defense.name,
        weights_digest=weights_digest(defense),
        randomized=defense.randomized,
        dataset=dataset.name,
        data_digest=dataset.digest,
        image_shape=tuple(dataset.x.shape[1:]),
        n=len(dataset.x),
        seed=settings.seed,
        norm=threats[0].norm,
        eps=tuple(sorted({model.eps for model in threats})),
        attacks=tuple(entries),
        protocol=protocol,
        unit_size=settings.unit_size,
        eot=(settings.eot or RANDOMIZED_EOT) if defense.randomized else 1,
        judge_repeats=(settings.judge_repeats or repeats) if defense.randomized else 1,
        query_budget=settings.query_budget,
        device=settings.resolve_device(),
        robench_version=robench.__version__,
        torch_version=torch.__version__.split("+")[0],
    )


def plan_attacks(attacks: Attacks, defense: Defense) -> tuple[list[AttackEntry], dict[str, Attack], str]:
    """Turns names into attacks: the entries in order, the built attacks by key, and the protocol's versioned name.

    `NAME@MODE` runs an attack along one gradient mode of the defense. A protocol runs every attack that reads
    gradients along all of them.

    Raises:
        UsageError: an unknown name, option or mode, no attack at all, or two different ones of one name.
    """
    given: list[Attack | str] = [attacks] if isinstance(attacks, Attack | str) else list(attacks)
    protocol = find_protocol(given[0]) if len(given) == 1 and isinstance(given[0], str) else None
    if protocol is not None:
        given = list(protocol[1])
    named = [part for one in given for part in (split_specs(one) if isinstance(one, str) else [one])]
    entries: dict[str, AttackEntry] = {}
    built: dict[str, Attack] = {}
    for one in named:
        attack, written = _build(one)
        wants_all = protocol is not None and attack.access == "gradient"
        for mode in defense.gradient_modes if wants_all else [written]:
            entry = _entry(attack, one if isinstance(one, str) else None, defense.check_mode(mode), defense)
            if entry.key in (CLEAN, WORST) or built.get(entry.key, attack) != attack:
                raise UsageError(f'two things of this run would be named "{entry.key}"; give the attack another name')
            entries[entry.key], built[entry.key] = entry, attack
    if not entries:
        raise UsageError("no attack given; name at least one, for example pgd")
    return list(entries.values()), built, protocol[0] if protocol else ""


def _build(one: Attack | str) -> tuple[Attack, str | None]:
    if isinstance(one, Attack):
        one.check_traits()
        return one, None
    name, at, mode = one.rpartition("@")
    return (load_attack(name), mode) if at else (load_attack(one), None)


def _entry(attack: Attack, text: str | None, mode: str, defense: Defense) -> AttackEntry:
    spec = attack.spec()
    if text is not None and ":" in text:  # a class from a file or module replays by its path
        path = text.rpartition("@")[0] or text
        spec = path.partition("(")[0] + spec.removeprefix(attack.name)
    is_first = attack.access != "gradient" or mode == defense.gradient_modes[0]
    key = attack.spec() if is_first else f"{attack.spec()}@{mode}"
    return AttackEntry(key, spec, None if is_first else mode)


def _load(data: Data, settings: Settings) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str):
        folder = Path(settings.data_dir) if settings.data_dir is not None else None
        return load_dataset(data, "test", settings.n or DEFAULT_N, settings.seed, folder)
    x, y = data
    if len(x) != len(y) or x.ndim != 4:
        raise UsageError(f"data must be images b c h w and as many labels; got {tuple(x.shape)} and {tuple(y.shape)}")
    if settings.n is not None and settings.n > len(x):
        raise UsageError(f"n must be at most the {len(x)} images given; got {settings.n}")
    count = settings.n or len(x)
    x, y = x[:count].float().cpu(), y[:count].long().cpu()
    classes = tuple(str(number) for number in range(int(y.max()) + 1)) if len(y) else ()
    return Dataset("", "", x, y, torch.arange(count), classes, digest_data(x, y))


def check_images(x: Images, y: Labels, defense: Defense) -> None:
    """Checks that images and labels fit the defense.

    Raises:
        UsageError: no images, pixels outside [0, 1], another image shape, or labels beyond the classes.
    """
    if not len(x):
        raise UsageError("data must hold at least one image; got none")
    if not bool((x >= 0).all() and (x <= 1).all()):
        raise UsageError(
            f"images must lie in [0, 1]; got values from {x.min().item():g} to {x.max().item():g}. Divide by 255?"
        )
    if tuple(x.shape[1:]) != tuple(defense.input_shape):
        raise UsageError(
            f'defense "{defense.name}" takes images of shape {tuple(defense.input_shape)}; '
            f"the data has {tuple(x.shape[1:])}. Choose another --dataset or weights"
        )
    if not bool((y >= 0).all() and (y < defense.num_classes).all()):
        raise UsageError(
            f'labels must be 0 to {defense.num_classes - 1} for defense "{defense.name}"; got {int(y.max())}'
        )


def check_answers(defense: Defense, x: Images, spec: RunSpec) -> None:
    """Asks the defense for two answers, so that one that breaks the contract is refused before any work.

    Raises:
        PluginError: training mode, logits of the wrong shape, not finite, or random although declared deterministic.
    """
    if defense.training:
        raise PluginError(f'defense "{defense.name}" is in training mode; call its freeze() (or eval()) first')
    few = x[: min(4, len(x))].to(spec.device)
    defense.to(spec.device)
    with torch.no_grad(), seeded(spec.seed, "check", device=spec.device):
        answer(defense, few)
        if not defense.randomized and not torch.equal(defense(few), defense(few)):
            raise PluginError(
                f'defense "{defense.name}" is declared deterministic, but two calls on the same images differ. '
                "Set randomized = True, or robench's number would be wrong"
            )


def _open_store(spec: RunSpec, settings: Settings) -> RunStore | None:
    if settings.out is None:
        if settings.resume:
            raise UsageError("resume needs the run's folder; give it as out")
        return None
    folder = Path(settings.out)
    if not settings.resume:
        return RunStore.create(folder, spec)
    store = RunStore.open(folder)
    differing = store.spec.differences(spec)
    if differing:
        raise UsageError(f"{folder} holds a run of another spec: {'; '.join(differing[:3])}. Choose another --out")
    return store
