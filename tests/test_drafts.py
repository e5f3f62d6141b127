"""An interrupted unit goes on after its last finished search, to the same bytes as one that nobody interrupted."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from engine_toys import Blindfold, Linear, Prototypes
from safetensors.torch import load
from torch import Tensor

from robench import unit
from robench.defense import Defense
from robench.drafts import Drafts
from robench.errors import StorageError
from robench.evaluate import evaluate
from robench.files import as_place
from robench.progress import Progress
from robench.registry import load_attack
from robench.source import digest_class_code, digest_own_code
from robench.store import TIMINGS_FILE
from robench.threat import ThreatModel
from robench.types import Images, Logits

ATTACKS = "fgsm,pgd(steps=3,restarts=2),fmn(steps=3),square(queries=5)"
BOUNDS = [ThreatModel("linf", eps) for eps in (0.02, 0.05)]


@dataclass
class Counted:
    """Passes of the run under way, and after how many it is interrupted; outside the defense, which stays as it is."""

    passes: int = 0
    left: int | None = None
    short: int = 0


COUNTED = Counted()


class Interrupted(Prototypes):
    """Is interrupted, as by Ctrl-C, in the pass after `COUNTED.left`."""

    def forward(self, x: Images) -> Logits:
        COUNTED.passes += 1
        if COUNTED.left is not None and COUNTED.passes > COUNTED.left:
            raise KeyboardInterrupt
        return super().forward(x)


class InterruptedBlindfold(Interrupted, Blindfold):
    """The same of a randomized defense."""


def run(defense: Defense, folder: Path, *, left: int | None = None, **given: Any) -> int:
    """Begins a run or goes on with it; returns its passes."""
    COUNTED.passes, COUNTED.left = 0, left
    settings: dict[str, Any] = {
        "n": 6,
        "unit_size": 6,
        "eot": 2,
        "judge_repeats": 2,
        "device": "cpu",
        "out": folder,
        **given,
    }
    evaluate(defense, ATTACKS, BOUNDS, "fashion_mnist", **settings, resume=(folder / "run.json").exists())
    return COUNTED.passes


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != TIMINGS_FILE
    }


def drafts(folder: Path) -> list[Path]:
    return sorted((folder / "drafts").rglob("*.safetensors"))


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "KEEP_AFTER_S", 0.0)


@pytest.mark.parametrize("kind", [Interrupted, InterruptedBlindfold])
@pytest.mark.parametrize("given", [{}, {"cascade": True}, {"query_budget": 4}], ids=["free", "cascade", "budget"])
def test_a_unit_interrupted_anywhere_ends_with_the_same_bytes(
    kind: type[Interrupted], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(kind(), tmp_path / "whole", **given)
    assert not (tmp_path / "whole" / "drafts").exists(), "short work is not worth a file"
    monkeypatch.setattr(unit, "KEEP_AFTER_S", 0.0)
    saved = []
    for left in range(5, whole, whole // 4):
        folder = tmp_path / str(left)
        with pytest.raises(KeyboardInterrupt):
            run(kind(), folder, left=left, **given)
        kept = drafts(folder)
        rest = run(kind(), folder, **given)
        assert contents(folder) == contents(tmp_path / "whole"), left
        assert not (folder / "drafts").exists()
        saved.append(whole - rest)
        assert bool(kept) == (saved[-1] > 0)
    assert saved == sorted(saved)
    assert saved[-1] > whole / 2


def test_an_interrupt_at_each_search_still_comes_to_an_end(tmp_path: Path, keep_all: None) -> None:
    """Each attempt has passes for one more search alone; without drafts none would come further than the last."""
    run(Interrupted(), tmp_path / "whole")
    attempts = 0
    while not (tmp_path / "run" / "result.json").exists():
        attempts += 1
        assert attempts < 100
        with contextlib.suppress(KeyboardInterrupt):
            run(Interrupted(), tmp_path / "run", left=25)
    assert attempts > 2
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def interrupted(folder: Path) -> list[Path]:
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), folder, left=60)
    kept = drafts(folder)
    assert len(kept) > 3
    return kept


@pytest.mark.parametrize("damage", ["bit", "half", "empty", "text"])
def test_a_damaged_draft_is_not_taken_up(damage: str, tmp_path: Path, keep_all: None) -> None:
    run(Interrupted(), tmp_path / "whole")
    for path in interrupted(tmp_path / "run"):
        content = bytearray(path.read_bytes())
        content[-1] ^= damage == "bit"
        damaged = {"half": bytes(content[: len(content) // 2]), "empty": b"", "text": b"none"}
        path.write_bytes(damaged.get(damage, bytes(content)))
    (tmp_path / "run" / "drafts" / "00000" / "notes.txt").write_text("of somebody else")
    run(Interrupted(), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_drafts_of_another_course_of_events_are_not_taken_up(tmp_path: Path, keep_all: None) -> None:
    """A draft depends on run, unit, purpose and what it was computed from."""
    x = torch.rand(3, 1, 2, 2)
    for owner, purpose, inputs in ((b"b", ("judge", 1), x), (b"a", ("judge", 2), x), (b"a", ("judge", 1), x + 1e-6)):
        Drafts(tmp_path, b"a").keep(("judge", 1), (x,), {"votes": x})
        assert Drafts(tmp_path, owner).recall(purpose, (inputs,)) is None
    draft = Drafts(tmp_path, b"a").recall(("judge", 1), (x.clone(),))
    assert draft is not None
    assert torch.equal(draft["votes"], x)


class Drifting(Interrupted):
    """Changes a weight in its 15th pass."""

    drift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drift", torch.zeros(1))

    def forward(self, x: Images) -> Logits:
        if COUNTED.passes == 15:
            self.drift.add_(1.0)
        return super().forward(x)


def test_nothing_is_kept_of_a_defense_that_has_changed(tmp_path: Path, keep_all: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Drifting(), tmp_path / "run", left=60)
    kept = len(drafts(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), tmp_path / "other", left=60)
    assert kept < len(drafts(tmp_path / "other"))


@pytest.mark.parametrize("where", ["robench.drafts.write_atomic", "robench.drafts.save", "robench.drafts.load"])
@pytest.mark.parametrize("error", [StorageError("no space left"), OSError("stale handle"), MemoryError()])
def test_drafts_that_cannot_be_kept_or_read_cost_time_alone(
    where: str,
    error: Exception,
    tmp_path: Path,
    keep_all: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No attack counts as failed for it."""

    def refuse(*_: object) -> NoReturn:
        raise error

    run(Interrupted(), tmp_path / "whole")
    if where.endswith("load"):
        interrupted(tmp_path / "run")
    monkeypatch.setattr(where, refuse)
    run(Interrupted(), tmp_path / "run")
    assert type(error).__name__ in caplog.text
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_drafts_of_other_code_are_not_taken_up(tmp_path: Path, keep_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack, or robench itself, was edited between interrupt and resume: all that depends on it is done again."""
    whole = run(Interrupted(), tmp_path / "whole")
    for name in ("robench.drafts.digest_own_code", "robench.unit.digest_class_code"):
        interrupted(tmp_path / name)
        with monkeypatch.context() as edited:
            edited.setattr(name, lambda *_: "another")
            rest = run(Interrupted(), tmp_path / name)
        assert rest == whole if "own" in name else rest > whole - 20  # the judge's answers stand


def test_nothing_is_kept_of_an_attack_without_source(
    tmp_path: Path, keep_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robench.unit.digest_class_code", lambda _: "")
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), tmp_path / "run", left=60)
    assert all("x_adv" not in load(path.read_bytes()) for path in drafts(tmp_path / "run"))


def test_code_by_digest() -> None:
    typed: dict[str, Any] = {"__name__": "typed"}
    exec("class Typed: pass", typed)
    assert digest_class_code(typed["Typed"]) == ""
    assert digest_class_code(Interrupted) != digest_class_code(InterruptedBlindfold)
    assert digest_class_code(type(load_attack("pgd"))) == digest_class_code(type(load_attack("fgsm")))  # has a version
    assert len(digest_own_code()) == 64


def test_drafts_left_by_a_kill_after_the_unit_was_stored_go(tmp_path: Path, keep_all: None) -> None:
    run(Interrupted(), tmp_path / "whole")
    interrupted(tmp_path / "run")
    kept = shutil.copytree(tmp_path / "run" / "drafts", tmp_path / "kept")
    run(Interrupted(), tmp_path / "run")
    shutil.copytree(kept, tmp_path / "run" / "drafts")
    run(Interrupted(), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert not (tmp_path / "run" / "drafts").exists()


def test_the_time_before_the_interrupt_counts(tmp_path: Path, keep_all: None) -> None:
    kept = interrupted(tmp_path / "run")
    before = sum(float(load(path.read_bytes())["seconds"]) for path in kept)
    start = time.monotonic()
    run(Interrupted(), tmp_path / "run")
    told = json.loads((tmp_path / "run" / TIMINGS_FILE).read_text())["0"]
    assert before < told < before + time.monotonic() - start


def test_behind_a_url_only_the_units_own_drafts_go() -> None:
    folder = as_place("memory://drafts-test/drafts")
    for number in ("00000", "00001"):
        Drafts(folder / number, b"").keep(("judge",), (), {"votes": torch.zeros(1)})
    Drafts(folder / "00000", b"").clear()
    assert Drafts(folder / "00000", b"").names == []
    assert len(Drafts(folder / "00001", b"").names) == 1


class Narrow(Interrupted):
    """Has memory for two images alone where its gradient is asked for in the first passes, `COUNTED.short` of them."""

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        if COUNTED.passes < COUNTED.short and x.requires_grad and len(x) > 2:
            raise MemoryError
        return logits


def test_memory_that_ran_out_before_the_interrupt_is_remembered(
    tmp_path: Path, keep_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches stay small for the rest of the unit, and its table says so."""
    monkeypatch.setattr(COUNTED, "short", 20)
    run(Narrow(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Narrow(), tmp_path / "run", left=60)
    COUNTED.short = 0
    run(Narrow(), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    note = b"out of memory: batches of 1 images instead of"
    assert any(note in content for content in contents(tmp_path / "run").values())


def test_a_batch_made_smaller_since_stays_so(tmp_path: Path, keep_all: None) -> None:
    """Whoever lowers it after the process was killed for its memory must not be killed again."""
    interrupted(tmp_path / "run")
    defense = Interrupted()
    defense.batch_rows = 2
    run(defense, tmp_path / "run")
    assert defense.batch_rows == 2
    assert b"out of memory" not in b"".join(contents(tmp_path / "run").values())


def test_recalled_passes_say_nothing_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("robench.progress.time.monotonic", lambda: now[0])
    with Progress("unit", {"judge": 100, "attack": 100}, enabled=False) as progress:
        progress.recall(80, "attack")
        assert progress.left() is None
        now[0] = 10.0
        progress.advance(10, "attack")  # 1 s each
        progress.recall(90, "judge")
        assert progress.left() == pytest.approx(10 + 10)


def test_runs_without_a_folder_keep_nothing(tmp_path: Path, keep_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(Linear(), "fgsm", ThreatModel("linf", 0.1), (torch.rand(4, 2, 3, 3), torch.zeros(4)), device="cpu")
    assert list(tmp_path.iterdir()) == []
