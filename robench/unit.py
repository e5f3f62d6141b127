"""One work unit: clean pass, then every attack at every bound on a slice of images, each result judged."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robench.batches import own_batches, usual_rows
from robench.drafts import KEEP_AFTER_S, Purpose
from robench.errors import BudgetExhausted, PluginError
from robench.judge import check_bounds, judge
from robench.plan import AttackEntry, Unit
from robench.precision import engine_numerics
from robench.rng import check_unseeded, seeded
from robench.settings import RANDOMIZED_REPEATS
from robench.source import UNKNOWN, digest_class_code
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.unit_table import CLEAN, WORST, UnitTable
from robench.unit_work import RECALLED, UnitWork
from robench.victim import Victim

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Found:
    """What an attack found at a bound, one entry for each image of the unit.

    Attributes:
        x_adv: its images, `b c h w`; the originals where it was not run.
        attacked: where it was wanted; elsewhere x_adv shows the known error, or an original that is wrong as it is.
        forwards: queries of each image so far, those at smaller bounds included; under a budget those of one bound.
        backwards: the same of backward passes.
        right: right answers of the judge on x_adv; before it has judged those on the clean images.
    """

    x_adv: Images
    attacked: Tensor
    forwards: Tensor
    backwards: Tensor
    right: Tensor


@dataclass
class Worst:
    """The worst case of each image so far: the image with the fewest right answers, and whose it is.

    Attributes:
        x_adv: the images, `b c h w`.
        votes: the judge's answers on them, `b k`.
        right: right answers among them; before any attack those on the clean image.
        key: the attack that found each; empty before any attack.
    """

    x_adv: Images
    votes: Tensor
    right: Tensor
    key: list[str]

    def update(self, key: str, found: Found, votes: Tensor) -> None:
        """Takes an attack's images where they have fewer right answers, or where they are the first."""
        better = (found.right < self.right) | torch.tensor([not name for name in self.key])
        self.x_adv = torch.where(better.to(found.x_adv.device).view(-1, 1, 1, 1), found.x_adv, self.x_adv)
        self.votes = torch.where(better[:, None], votes, self.votes)
        self.right = torch.where(better, found.right, self.right)
        self.key = [key if take else old for take, old in zip(better.tolist(), self.key, strict=True)]


@dataclass
class _Scene:
    """A unit at work: its images, which of them are not wrong as they are, and what was found at smaller bounds."""

    work: UnitWork
    unit: Unit
    x: Images
    y: Labels
    table: UnitTable
    found: dict[str, Found] = field(default_factory=dict)
    worst: Worst | None = None

    def __post_init__(self) -> None:
        self.drafts = self.work.drafts(self.unit) if self.work.drafts is not None else None
        self.clean = self.judge(self.x, self.work.spec.seed, self.unit.index, CLEAN)
        self.right = ~self.is_wrong(self.count_right(self.clean))

    def count_right(self, votes: Tensor) -> Tensor:
        return votes.gather(1, self.y.cpu()[:, None])[:, 0]

    def purpose(self, key: str, eps: float) -> Purpose:
        return self.work.spec.seed, self.unit.index, key, repr(eps)

    def judge(self, x: Images, *purpose: str | int) -> Tensor:
        """The judge's answers on images, `b k`, on randomness of their own."""
        work = self.work

        def ask() -> dict[str, Tensor]:
            with seeded(*purpose, device=x.device):
                votes = judge(work.defense, x, work.spec.judge_repeats, on_rows=functools.partial(work.tell, "judge"))
                check_unseeded(*purpose, who=f'defense "{work.defense.name}"')
            return {"votes": votes}

        return self.once("judge", purpose, (x,), ask)["votes"]

    def once(
        self, kind: str, purpose: Purpose, inputs: tuple[Tensor, ...], find: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `find` returns, or, on the CPU, what it returned before this unit was interrupted.

        Args:
            kind: whose passes it takes: `judge` or `attack`.
            purpose: what it is for; of each unit one at most.
            inputs: what, beside run, unit and purpose, its result depends on.
            find: the work.
        """
        work, defense = self.work, self.work.defense
        if self.drafts is None:
            return find()
        draft = self.drafts.recall((kind, *purpose), inputs)
        if draft is not None:
            rows = int(draft["batch_rows"])
            if 0 < rows < (defense.batch_rows or usual_rows(self.x.device)):  # memory ran out in what is not done again
                defense.batch_rows = rows
            work.tell(RECALLED + kind, int(draft["passes"]))
            work.recalled_s += float(draft["seconds"])
            return draft
        began, before = time.monotonic(), work.passes[kind]
        found = find()
        seconds = time.monotonic() - began
        if seconds >= KEEP_AFTER_S and not work.find_change():
            notes = {"batch_rows": defense.batch_rows or 0, "passes": work.passes[kind] - before, "seconds": seconds}
            told = {key: torch.tensor(value) for key, value in notes.items()}
            self.drafts.keep((kind, *purpose), inputs, found | told)
        return found

    def is_wrong(self, right: Tensor) -> Tensor:
        """Where no answer at all was right, so that no attack can add to it; nowhere if luck may be behind that."""
        few = self.work.defense.randomized and self.work.spec.judge_repeats < RANDOMIZED_REPEATS
        return torch.zeros_like(right, dtype=torch.bool) if few else right == 0

    def is_settled(self, right: Tensor) -> Tensor:
        """Where an attack has established an error."""
        return self.right & self.is_wrong(right)


@engine_numerics()
def run_unit(work: UnitWork, unit: Unit) -> pa.Table:
    """Computes a unit's table; the same spec and unit give the same bytes on the same kind of device.

    Columns: `eps`, `attack` (an entry's key, `clean`, or `worst`), `index`, `label`, `status` (`ok`; `skipped`: wrong
    already without an attack; `spared`: wrong already at a smaller bound or, in a cascade, under an earlier attack,
    whose image stands here; `failed`: the attack raised or broke a bound; a randomized defense of which fewer than
    `RANDOMIZED_REPEATS` answers are asked has neither of the middle two), `chosen` (of `worst`: the attack that found
    the image), `votes` (answers per class over the judge's repeats), `distance`, `forwards`, `backwards` (queries
    behind this row, those at smaller bounds included; under a query budget, which is each bound's own, those of the
    attack that found the image), `x_adv` (float32 bytes, c h w).

    Raises:
        PluginError: the defense broke the contract.
    """
    device = work.spec.device
    work.recalled_s = 0.0
    x, y = work.x[unit.start : unit.stop].to(device), work.y[unit.start : unit.stop].to(device)
    table = UnitTable(work.index[unit.start : unit.stop], y)
    with own_batches(work.defense, device) as notes, contextlib.redirect_stdout(sys.stderr):  # what plugins print
        scene = _Scene(work, unit, x, y, table)
        table.add(0.0, CLEAN, ["ok"] * len(x), scene.clean)
        work.tell("begun", work.expected_in_all(len(x)))
        for eps in work.spec.eps:
            _run_bound(scene, ThreatModel(work.spec.norm, eps))
    return table.build(notes)


def _run_bound(scene: _Scene, threat: ThreatModel) -> None:
    """Runs every attack at one bound, and adds their rows and those of the worst case."""
    work, x = scene.work, scene.x
    worst = _carry_over(scene)
    succeeded = 0
    alive = len(x)
    for number, entry in enumerate(work.spec.attacks):
        gone = alive - _open(scene, worst) if work.spec.cascade else 0
        work.tell("spared", sum(work.expected(later, gone, threat.eps) for later in work.spec.attacks[number:]))
        alive -= gone
        until = work.passes["attack"] + work.expected(entry, alive, threat.eps)
        try:
            found = _search(scene, entry, threat, worst)
        except Exception:  # noqa: BLE001 - an attack may fail in any way; the run goes on without it and says so
            work.failures[entry.key] = traceback.format_exc()
            scene.table.add(threat.eps, entry.key, ["failed"] * len(x), torch.zeros_like(scene.clean))
            continue
        finally:
            work.tell("spared", until - work.passes["attack"])
        votes = scene.judge(found.x_adv, *scene.purpose(entry.key, threat.eps), "judge")
        found.right = scene.count_right(votes)
        scene.found[entry.key] = found
        worst.update(entry.key, found, votes)
        succeeded += 1
        status = [
            "skipped" if not right else "ok" if attacked else "spared"
            for right, attacked in zip(scene.right.tolist(), found.attacked.tolist(), strict=True)
        ]
        scene.table.add(
            threat.eps,
            entry.key,
            status,
            votes,
            x_adv=found.x_adv,
            distance=threat.distance(x, found.x_adv),
            forwards=found.forwards,
            backwards=found.backwards,
        )
    _add_worst(scene, threat, worst, succeeded=succeeded)
    scene.worst = worst


def _open(scene: _Scene, worst: Worst) -> int:
    """Images of the unit that a cascade's next attack is run on: right without an attack, and no error established."""
    return int((scene.right & ~scene.is_settled(worst.right)).sum())


def _carry_over(scene: _Scene) -> Worst:
    """The worst case before any attack of a bound: of a deterministic defense its errors within a smaller bound."""
    n, before = len(scene.x), scene.worst
    fresh = Worst(scene.x, scene.clean, scene.count_right(scene.clean), [""] * n)
    if before is None or scene.work.defense.randomized:
        return fresh
    settled = scene.is_settled(before.right)
    mask = settled.to(scene.x.device).view(-1, 1, 1, 1)
    return Worst(
        torch.where(mask, before.x_adv, scene.x),
        torch.where(settled[:, None], before.votes, scene.clean),
        torch.where(settled, before.right, fresh.right),
        [key if flag else "" for key, flag in zip(before.key, settled.tolist(), strict=True)],
    )


def _search(scene: _Scene, entry: AttackEntry, threat: ThreatModel, worst: Worst) -> Found:
    """Runs one attack at one bound on the images it is wanted for; the others show the error that is known of them."""
    before = scene.found.get(entry.key)
    is_minimal = scene.work.attacks[entry.key].goal == "minimal"
    known: Worst | Found | None = None
    if scene.work.spec.cascade:
        known = worst
    elif not (is_minimal or scene.work.defense.randomized):
        known = before
    settled = scene.is_settled(known.right) if known is not None else torch.zeros_like(scene.right)
    wanted = scene.right & ~settled
    found = _nearest(scene, entry, threat, wanted) if is_minimal else _attack(scene, entry, threat, wanted, before)
    if known is not None:
        found.x_adv = torch.where(settled.to(scene.x.device).view(-1, 1, 1, 1), known.x_adv, found.x_adv)
    return found


def _nearest(scene: _Scene, entry: AttackEntry, threat: ThreatModel, wanted: Tensor) -> Found:
    """What a minimal-norm attack's one search, within the largest bound, found within this one.

    Of a randomized defense it is within no bound, and each image is then moved along its line to this one: the nearest
    error is where about half of the answers are wrong, so that nearer some still are and further away more.
    """
    name, randomized = f"search of {entry.key}", scene.work.defense.randomized
    if name not in scene.found:
        widest = ThreatModel(threat.norm, scene.work.spec.eps[-1])
        if randomized and widest.eps > 0:
            widest = widest.whole_box(scene.x)
        # chance may settle a randomized image at one bound and open it again at the next, which has no other search
        may_reopen = randomized and len(scene.work.spec.eps) > 1
        scene.found[name] = _attack(scene, entry, widest, scene.right if may_reopen else wanted, None)
    search = scene.found[name]
    if randomized:
        return replace(search, x_adv=threat.stretch(scene.x, search.x_adv), attacked=wanted)
    inside = threat.contains(scene.x, search.x_adv).view(-1, 1, 1, 1)
    return replace(search, x_adv=torch.where(inside, search.x_adv, scene.x), attacked=wanted)


def _attack(scene: _Scene, entry: AttackEntry, threat: ThreatModel, wanted: Tensor, before: Found | None) -> Found:
    """Runs one attack on the images it is wanted for, and checks what it returns."""
    spec, device = scene.work.spec, scene.x.device
    mask, count = wanted.to(device), int(wanted.sum())
    queries = torch.stack((before.forwards, before.backwards)) if before else torch.zeros(2, len(wanted)).long()
    if spec.query_budget is not None:  # it is each bound's own, so that what smaller bounds cost may not help
        queries[:, wanted] = 0
    found = Found(scene.x, wanted, queries[0].clone(), queries[1].clone(), scene.count_right(scene.clean))
    if count == 0:
        return found
    attack = scene.work.attacks[entry.key]
    start = before.x_adv[mask] if before and spec.query_budget is None else None
    victim = Victim(
        scene.work.defense,
        attack.access,
        count,
        eot=spec.eot,
        mode=entry.mode,
        budget=spec.query_budget,
        randomness=attack.randomness,
        precision=spec.precision,
        dataset=spec.dataset,
        start=start,
        on_passes=functools.partial(scene.work.tell, "attack"),
    )
    originals, labels = scene.x[mask], scene.y[mask]
    if spec.query_budget is not None:
        victim.watch(originals, labels, threat, attack.goal)
    purpose = (*scene.purpose(entry.key, threat.eps), "attack")

    def search() -> dict[str, Tensor]:
        with seeded(*purpose, device=device):
            try:
                x_adv = attack(victim, originals.clone(), labels.clone(), threat)
            except BudgetExhausted:
                x_adv = victim.ledger.best if victim.ledger.best is not None else originals
            check_unseeded(*purpose, who=f'attack "{entry.key}" or the defense')
        broken = check_bounds(originals, x_adv, threat).broken_rule()
        if broken:
            raise PluginError(f'attack "{entry.key}": {broken}; the threat model is {threat}')
        ledger = victim.ledger
        return {"x_adv": x_adv.detach(), "forwards": ledger.forwards, "backwards": ledger.backwards}

    code = digest_class_code(type(attack)) if scene.drafts is not None else UNKNOWN
    inputs = (mask,) if start is None else (mask, start)
    ended = search() if code == UNKNOWN else scene.once("attack", (*purpose, code), inputs, search)
    found.x_adv = scene.x.clone()
    found.x_adv[mask] = ended["x_adv"].to(device)
    found.forwards[wanted] += ended["forwards"]
    found.backwards[wanted] += ended["backwards"]
    return found


def _add_worst(scene: _Scene, threat: ThreatModel, worst: Worst, *, succeeded: int) -> None:
    """Adds each image's worst case: chosen on the votes so far, reported on fresh draws where chance had a part."""
    if not succeeded:  # every attack failed
        scene.table.add(threat.eps, WORST, ["failed"] * len(scene.x), torch.zeros_like(scene.clean))
        return
    votes = worst.votes
    if len(scene.work.spec.attacks) > 1 and scene.work.defense.randomized:
        votes = scene.judge(worst.x_adv, *scene.purpose(WORST, threat.eps))
    scene.table.add(threat.eps, WORST, ["ok"] * len(scene.x), votes, chosen=worst.key)
