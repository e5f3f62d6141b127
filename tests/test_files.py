"""Files behind a path or a URL: writes, locks, and whole runs in a store that is no file system."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_toys import Noisy, grid_images

from robench import ThreatModel
from robench.errors import DataError, UsageError
from robench.evaluate import evaluate
from robench.files import STALE_S, as_place, locked, move, write_atomic
from robench.plan import plan_units
from robench.result import Evaluation
from robench.store import RunStore

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("upath")
URL = "memory://robench/run"


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


def run(out: str | Path, **given: Any) -> Evaluation:
    settings = {"unit_size": 3, "eot": 1, "judge_repeats": 2, "out": out}
    return evaluate(Noisy(), "fgsm,pgd(steps=2)", ThreatModel("linf", 0.1), grid_images(8), **{**settings, **given})


def test_a_path_stays_a_path_and_text_with_a_scheme_is_a_url(tmp_path: Path) -> None:
    assert as_place(tmp_path) is tmp_path
    assert as_place("runs/first") == Path("runs/first")
    assert not isinstance(as_place(URL), Path)
    with pytest.raises(UsageError, match="nosuch://x"):
        as_place("nosuch://x")


def test_a_file_system_whose_package_is_missing_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "paramiko", None)  # of sftp
    with pytest.raises(UsageError, match=r"s3://runs/first needs .*pip install s3fs$"):
        as_place("s3://runs/first")
    with pytest.raises(UsageError, match=r"sftp://host/first needs .*paramiko"):
        as_place("sftp://host/first")


def test_a_run_behind_a_url_is_that_of_a_folder(tmp_path: Path) -> None:
    run(URL)
    run(tmp_path / "run")
    there = as_place(URL)
    for name in ("result.json", "row.csv"):
        assert (there / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    mine, theirs = RunStore.open(there).finished(), RunStore.open(tmp_path / "run").finished()
    assert {unit: path.name for unit, path in mine.items()} == {unit: path.name for unit, path in theirs.items()}
    assert Evaluation.load(URL).images("worst").tobytes() == Evaluation.load(tmp_path / "run").images("worst").tobytes()
    assert not (there / ".lock").exists()


def test_damage_behind_a_url_is_moved_aside_and_done_again() -> None:
    first = run(URL)
    there = as_place(URL)
    path = RunStore.open(there).finished()[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged"):
        Evaluation.load(URL)
    again = run(URL, resume=True)
    assert again.to_json() == first.to_json()
    assert (there / "damaged" / path.name).exists()


def test_a_file_is_moved_and_written_behind_a_url() -> None:
    there = as_place("memory://robench")
    write_atomic(there / "a", b"first")
    write_atomic(there / "a", b"second")
    move(there / "a", there / "b")
    assert (there / "b").read_bytes() == b"second"
    assert not (there / "a").exists()


def test_a_lock_behind_a_url_keeps_others_out_and_goes_with_its_holder() -> None:
    path = as_place("memory://robench/.lock")
    with locked(path), pytest.raises(UsageError, match="another process works on memory://robench"), locked(path):
        pass
    assert not path.exists()
    with locked(path), pytest.raises(UsageError, match="lapses after 120 s"), locked(path, shared=True):
        pass
    with locked(path, shared=True), locked(path, shared=True):
        pass


@pytest.mark.parametrize("left", ["owned", "damaged", "of another kind"])
def test_a_lock_that_nobody_renewed_is_taken_over(left: str) -> None:
    path = as_place("memory://robench/.lock")
    content = {"owner": "dead", "renewed": time.time() - STALE_S - 1}
    path.write_bytes({"owned": json.dumps(content), "damaged": "{", "of another kind": "[]"}[left].encode())
    with locked(path):
        assert json.loads(path.read_bytes())["owner"] != "dead"


def test_a_lock_on_a_file_system_may_be_shared(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    refused = pytest.raises(UsageError, match="another process")
    with locked(path, shared=True), locked(path, shared=True), refused, locked(path):
        pass
    with locked(path), pytest.raises(UsageError, match="another process"), locked(path, shared=True):
        pass


def test_a_hundred_thousand_units_are_listed_in_two_seconds(tmp_path: Path) -> None:
    """Also units beyond five digits; each unit is read by the file that was listed."""
    finished = run(tmp_path / "run")
    store = RunStore.open(tmp_path / "run")
    folder = tmp_path / "run" / "units"
    for number in range(10, 100_010):
        (folder / f"{number:05d}-{'0' * 64}.parquet").touch()
    started = time.process_time()  # of this process: other work on the machine does not count
    found = store.finished()
    assert time.process_time() - started < 2
    assert len(found) == 100_003
    assert max(found) == 100_009
    assert [unit.index for unit in plan_units(finished.spec)] == [0, 1, 2]


def test_times_are_written_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run")
    store, unit = RunStore.open(tmp_path / "run"), plan_units(RunStore.open(tmp_path / "run").spec)[0]
    store.note_time(unit, 7.0)
    assert store.timings()["0"] != 7.0
    store.flush_times()
    assert store.timings()["0"] == 7.0
    monkeypatch.setattr("robench.store.TIMINGS_EVERY_S", 0.0)
    store.note_time(unit, 8.0)
    assert store.timings()["0"] == 8.0
