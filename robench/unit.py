"""One work unit: clean pass, then every attack at every bound on a slice of images, each result judged."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from robench.attack import Attack
from robench.defense import Defense
from robench.errors import BudgetExhausted, PluginError
from robench.judge import check_bounds, judge
from robench.plan import RunSpec, Unit
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

if TYPE_CHECKING:
    import pyarrow as pa

CLEAN: Final = "clean"
WORST: Final = "worst"
COLUMNS: Final = (
    "eps",
    "attack",
    "index",
    "label",
    "status",
    "chosen",
    "votes",
    "distance",
    "forwards",
    "backwards",
    "x_adv",
)


@dataclass
class UnitWork:
    """What a unit works with: the run's spec, the defense, the attacks by key, the images, and who hears of progress.

    Attributes:
        spec: the run's spec.
        defense: on the run's device.
        attacks: built attacks, by key of the spec's entries.
        x: all images of the run.
        y: their labels.
        index: position of each image in its split.
        on_query: called after each query with the number of passes and who asked: `judge` or `attack`.
        failures: tracebacks of attacks that failed in this unit, by key; filled by `run_unit`.
    """

    spec: RunSpec
    defense: Defense
    attacks: dict[str, Attack]
    x: Images
    y: Labels
    index: Tensor
    on_query: Callable[[int, str], None] | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def counter(self, kind: str) -> Callable[[int], None] | None:
        """`on_query` for one kind of query."""
        on_query = self.on_query
        return None if on_query is None else lambda passes: on_query(passes, kind)


class _Rows:
    """Collects the columns of the unit's table."""

    def __init__(self, index: Tensor, y: Labels) -> None:
        self.index, self.y = index.numpy(), y.cpu().numpy()
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, eps: float, attack: str, status: list[str], votes: Tensor, **more: Any) -> None:
        n = len(self.y)
        x_adv = more.get("x_adv")
        values: dict[str, Any] = {
            "eps": [eps] * n,
            "attack": [attack] * n,
            "index": self.index,
            "label": self.y,
            "status": status,
            "chosen": more.get("chosen", [""] * n),
            "votes": votes.tolist(),
            "distance": more.get("distance", np.zeros(n)),
            "forwards": more.get("forwards", np.zeros(n, dtype=np.int64)),
            "backwards": more.get("backwards", np.zeros(n, dtype=np.int64)),
            "x_adv": [None] * n if x_adv is None else [row.numpy().astype("<f4").tobytes() for row in x_adv.cpu()],
        }
        for name, value in values.items():
            self.columns[name].extend(value)

    def table(self) -> pa.Table:
        import pyarrow as pa

        types = {
            "eps": pa.float64(),
            "attack": pa.string(),
            "index": pa.int64(),
            "label": pa.int64(),
            "status": pa.string(),
            "chosen": pa.string(),
            "votes": pa.list_(pa.int32()),
            "distance": pa.float64(),
            "forwards": pa.int64(),
            "backwards": pa.int64(),
            "x_adv": pa.binary(),
        }
        return pa.table({name: pa.array(self.columns[name], types[name]) for name in COLUMNS})


def run_unit(work: UnitWork, unit: Unit) -> pa.Table:
    """Computes a unit's table; the same spec and unit give the same bytes on the same kind of device.

    Columns: `eps`, `attack` (an entry's key, `clean`, or `worst`), `index`, `label`, `status` (`ok`; `skipped`: wrong
    already without an attack; `failed`: the attack raised or broke a bound), `chosen` (of `worst`: the attack whose
    image it is), `votes` (answers per class over the judge's repeats), `distance`, `forwards`, `backwards`, `x_adv`
    (float32 bytes, c h w).

    Raises:
        PluginError: the defense broke the contract.
    """
    device = work.spec.device
    x, y = work.x[unit.start : unit.stop].to(device), work.y[unit.start : unit.stop].to(device)
    rows = _Rows(work.index[unit.start : unit.stop], y)
    with seeded(work.spec.seed, unit.index, CLEAN, device=device):
        clean = judge(work.defense, x, work.spec.judge_repeats, on_query=work.counter("judge"))
    rows.add(0.0, CLEAN, ["ok"] * len(x), clean)
    right = clean.gather(1, y.cpu()[:, None])[:, 0] > 0
    for eps in work.spec.eps:
        _run_bound(work, unit, ThreatModel(work.spec.norm, eps), x=x, y=y, right=right, rows=rows)
    return rows.table()


def _run_bound(
    work: UnitWork, unit: Unit, threat: ThreatModel, *, x: Images, y: Labels, right: Tensor, rows: _Rows
) -> None:
    candidates: dict[str, tuple[Images, Tensor]] = {}
    status = ["ok" if flag else "skipped" for flag in right.tolist()]
    for entry in work.spec.attacks:
        victim = Victim(
            work.defense,
            work.attacks[entry.key].access,
            int(right.sum()),
            eot=work.spec.eot,
            mode=entry.mode,
            budget=work.spec.query_budget,
            on_query=work.counter("attack"),
        )
        purpose = (work.spec.seed, unit.index, entry.key, repr(threat.eps))
        x_adv, distance = x, torch.zeros(len(x), dtype=torch.float64)
        try:
            if bool(right.any()):
                task = _Task(entry.key, threat, x, y, right, purpose)
                x_adv, distance = _attack(work, task, victim)
        except Exception:  # noqa: BLE001 - an attack may fail in any way; the run goes on without it and says so
            work.failures[entry.key] = traceback.format_exc()
            rows.add(threat.eps, entry.key, ["failed"] * len(x), torch.zeros(len(x), work.defense.num_classes).long())
            continue
        with seeded(*purpose, "judge", device=x.device):
            votes = judge(work.defense, x_adv, work.spec.judge_repeats, on_query=work.counter("judge"))
        candidates[entry.key] = (x_adv, votes)
        forwards, backwards = torch.zeros(2, len(x), dtype=torch.int64)
        forwards[right], backwards[right] = victim.ledger.forwards, victim.ledger.backwards
        rows.add(
            threat.eps,
            entry.key,
            status,
            votes,
            x_adv=x_adv,
            distance=distance.numpy(),
            forwards=forwards.numpy(),
            backwards=backwards.numpy(),
        )
    if candidates:
        _add_worst(work, unit, threat, y=y, candidates=candidates, rows=rows)
    else:  # every attack failed
        rows.add(threat.eps, WORST, ["failed"] * len(x), torch.zeros(len(x), work.defense.num_classes).long())


@dataclass(frozen=True)
class _Task:
    """One attack on one unit: what, at which bound, on which images (those that are `right`), under which seed."""

    key: str
    threat: ThreatModel
    x: Images
    y: Labels
    right: Tensor
    purpose: tuple[str | int, ...]


def _attack(work: UnitWork, task: _Task, victim: Victim) -> tuple[Images, Tensor]:
    """Runs one attack on the images that are right and checks what it returns."""
    mask = task.right.to(task.x.device)
    originals, labels = task.x[mask], task.y[mask]
    if work.spec.query_budget is not None:
        victim.watch(originals, labels, task.threat)
    with seeded(*task.purpose, "attack", device=task.x.device):
        try:
            found = work.attacks[task.key](victim, originals.clone(), labels.clone(), task.threat)
        except BudgetExhausted:
            found = victim.ledger.best if victim.ledger.best is not None else originals
    bounds = check_bounds(originals, found, task.threat)
    broken = bounds.broken_rule()
    if broken:
        raise PluginError(f'attack "{task.key}": {broken}; the threat model is {task.threat}')
    x_adv = task.x.clone()
    x_adv[mask] = found.detach()
    distance = torch.zeros(len(task.x), dtype=torch.float64)
    distance[task.right] = bounds.distance.double().cpu()
    return x_adv, distance


def _add_worst(
    work: UnitWork,
    unit: Unit,
    threat: ThreatModel,
    *,
    y: Labels,
    candidates: dict[str, tuple[Images, Tensor]],
    rows: _Rows,
) -> None:
    """Adds each image's worst case: chosen on the votes so far, reported on fresh draws where chance had a part."""
    keys = list(candidates)
    label = y.cpu()[:, None]
    right = torch.stack([votes.gather(1, label)[:, 0] for _, votes in candidates.values()])  # attacks b
    best = right.argmin(0)  # the first of equals
    images = torch.stack([x_adv for x_adv, _ in candidates.values()])  # attacks b c h w
    chosen = images[best.to(images.device), torch.arange(len(y), device=images.device)]
    if len(keys) > 1 and work.defense.randomized:
        with seeded(work.spec.seed, unit.index, WORST, repr(threat.eps), device=chosen.device):
            votes = judge(work.defense, chosen, work.spec.judge_repeats, on_query=work.counter("judge"))
    else:
        votes = torch.stack([votes for _, votes in candidates.values()])[best, torch.arange(len(y))]
    rows.add(threat.eps, WORST, ["ok"] * len(y), votes, chosen=[keys[i] for i in best.tolist()])
