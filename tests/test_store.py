"""The run folder: atomic writes, damage, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from engine_toys import Bad, Linear, Noisy, grid_images

from robench.errors import DataError, UsageError
from robench.evaluate import evaluate
from robench.files import write_atomic
from robench.plan import SCHEMA, RunSpec, plan_units
from robench.registry import load_defense
from robench.result import Evaluation
from robench.source import digest_source
from robench.store import RunStore
from robench.threat import ThreatModel
from robench.verify import verify_run

LINF = ThreatModel("linf", 0.1)


def run(folder: Path, **given: Any) -> Evaluation:
    settings = {"unit_size": 3, "eot": 1, "judge_repeats": 2, "out": folder}
    return evaluate(Noisy(), "fgsm,pgd(steps=2)", LINF, grid_images(8), **{**settings, **given})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three units; only to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# atomic writes


def raise_error(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "tempfile.mkstemp", "os.fdopen"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(call, raise_error(number))
    with pytest.raises(UsageError, match=f"cannot write {path}: {os.strerror(number)}.*choose another folder"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"result.json": b"old"}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, b"old")

    def interrupt(_: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert contents(tmp_path) == {"result.json": b"old"}


def test_a_written_file_is_whole_and_readable_by_others(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"first")
    write_atomic(tmp_path / "file", b"second")
    assert contents(tmp_path) == {"file": b"second"}
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_keeps_the_finished_units_and_resume_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json and two units fit; the third unit does not."""
    folder, sync, calls = tmp_path / "run", os.fsync, [0]

    def fill_up(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr("os.fsync", fill_up)
    with pytest.raises(UsageError, match="No space left on device"):
        run(folder)
    monkeypatch.undo()
    assert sorted(RunStore.open(folder).finished()) == [0, 1]
    with pytest.raises(DataError, match=rf"unit 2 is missing\. Finish it with 'robench run --resume {folder}'"):
        Evaluation.load(folder)
    run(folder, resume=True)
    mine, theirs = contents(folder), contents(finished)
    assert mine.keys() == theirs.keys()
    assert all(mine[name] == theirs[name] for name in mine if name != "timings.json")


def test_a_folder_that_cannot_be_made_is_the_user_s_to_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*Not a directory|cannot write .*File exists"):
        run(tmp_path / "file" / "run")


# damage


def test_one_flipped_byte_in_a_unit_is_found(folder: Path) -> None:
    """At 50 places anywhere in the files; on load and on resume alike."""
    store, chance = RunStore.open(folder), random.Random(0)
    units = plan_units(store.spec)
    for attempt in range(50):
        unit = chance.choice(units)
        path = store.finished()[unit.index]
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        intact = path.read_bytes()
        path.write_bytes(content)
        message = rf"{path} is damaged.*'robench run --resume {folder}' moves it aside"
        with pytest.raises(DataError, match=message):
            store.read(unit)
        if attempt < 3:
            with pytest.raises(DataError, match=message):
                Evaluation.load(folder)
            run(folder, resume=True)
            assert (folder / "damaged" / path.name).read_bytes() == content
        path.write_bytes(intact)
    assert Evaluation.load(folder).complete


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_cut_off_unit_is_named_moved_aside_and_done_again(
    size: int, finished: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = RunStore.open(folder).finished()[1]
    path.write_bytes(path.read_bytes()[:size])
    run(folder, resume=True)
    assert [str(path) in record.message for record in caplog.records] == [True]
    mine, theirs = contents(folder), contents(finished)
    assert all(mine[name] == theirs[name] for name in theirs if name != "timings.json")
    assert mine.keys() - theirs.keys() == {f"damaged/{path.name}"}


def test_two_processes_do_not_work_on_one_run(folder: Path) -> None:
    """The lock of a process that was killed is gone with it."""
    code = f"""
from pathlib import Path
from robench.store import RunStore
with RunStore.open(Path({str(folder)!r})).locked():
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match=f"another process works on {folder}"):
            run(folder, resume=True)
        other.kill()
    run(folder, resume=True)


def test_a_unit_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "other", seed=1)
    alien = RunStore.open(tmp_path / "other").finished()[2]
    RunStore.open(folder).finished()[2].unlink()
    shutil.copy(alien, folder / "units")
    with pytest.raises(DataError, match=rf"{alien.name} belongs to another run\."):
        Evaluation.load(folder)


def test_a_unit_in_the_place_of_another_is_refused(folder: Path) -> None:
    units = RunStore.open(folder).finished()
    units[2].unlink()
    shutil.copy(units[1], units[1].with_name(units[1].name.replace("00001-", "00002-")))
    with pytest.raises(DataError, match="belongs to another run"):
        Evaluation.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "\udcff"])
def test_a_damaged_run_file_is_named(text: str, folder: Path) -> None:
    (folder / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"run\.json cannot be read"):
        Evaluation.load(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path} is not a run folder: it has no run.json"):
        Evaluation.load(tmp_path)


def test_lost_times_are_unknown_and_nothing_else(folder: Path) -> None:
    before = Evaluation.load(folder)
    assert before.seconds is not None
    for damage in (b"{", b"[1]", b"\xff"):
        (folder / "timings.json").write_bytes(damage)
        after = Evaluation.load(folder)
        assert after.seconds is None
        assert after.to_json() == before.to_json()


# schema


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "run.json").read_text())
    del content["digest"]  # as in a folder written before there was one
    change(content)
    (folder / "run.json").write_text(json.dumps(content))


def test_a_newer_schema_is_refused(folder: Path) -> None:
    edit(folder, lambda content: content.update(schema=SCHEMA + 1))
    with pytest.raises(DataError, match=f"has schema {SCHEMA + 1}; this version of robench reads {SCHEMA}. Update"):
        Evaluation.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(temperature=1), "temperature"),
        (lambda spec: spec["attacks"][0].update(power=9), "power"),
        (lambda spec: spec.pop("seed"), "seed"),
        (lambda spec: spec.update(eps=["much"]), "much"),
        (lambda spec: spec.update(eps=None), "NoneType"),
        (lambda spec: spec.update(n="8"), "n is '8'"),
        (lambda spec: spec.update(randomized="yes"), "randomized is 'yes'"),
        (lambda spec: spec.update(seed=True), "seed is True"),
        (lambda spec: spec.update(norm=2), "norm is 2"),
        (lambda spec: spec.update(norm="l3"), "norm is 'l3'"),
        (lambda spec: spec.update(n=0), "n is 0"),
        (lambda spec: spec.update(unit_size=-3), "unit_size is -3"),
        (lambda spec: spec.update(seed=-1), "seed is -1"),
        (lambda spec: spec.update(query_budget="8"), "(?s:.*)query_budget"),
        (lambda spec: spec.update(image_shape="abc"), "(?s:.*)image_shape"),
        (lambda spec: spec.update(eps=[]), r"eps is \(\)"),
        (lambda spec: spec.update(eps=[float("nan")]), "eps is"),
        (lambda spec: spec.update(precision="int3"), "precision is 'int3'"),
        (lambda spec: spec.update(device="<b>"), "device is '<b>'"),
        (lambda spec: spec.update(defense_options={"weights": {}}), "defense_options is"),
        (lambda spec: spec["attacks"][0].update(key=5), "attacks|AttackEntry"),
        (lambda spec: spec["attacks"][0].update(goal="best"), "attacks is"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    edit(folder, lambda content: change(content["spec"]))
    with pytest.raises(DataError, match=f"spec does not fit the schema: .*{message}"):
        Evaluation.load(folder)


def test_spec_survives_json(folder: Path) -> None:
    spec = RunStore.open(folder).spec
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.digest() == spec.digest()
    assert spec.differences(again) == []


def test_units_cut_the_run_without_gap_or_overlap(folder: Path) -> None:
    units = plan_units(RunStore.open(folder).spec)
    assert [(unit.index, unit.start, unit.stop) for unit in units] == [(0, 0, 3), (1, 3, 6), (2, 6, 8)]


# resume and rewrite


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"seed": 1}, "seed: 0 here, 1 there"),
        ({"judge_repeats": 3}, "judge_repeats: 2 here, 3 there"),
        ({"unit_size": 4}, "unit_size: 3 here, 4 there"),
        ({"query_budget": 2}, "query_budget: None here, 2 there"),
    ],
)
def test_resume_of_another_spec_is_refused(given: dict[str, Any], difference: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=f"holds a run of another spec: {difference}"):
        run(folder, resume=True, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gain": 1.0}, "weights_digest"),
        ({"sigma": 1.0}, "begun with other code of the defense: its options changed since"),  # it is no weight
    ],
)
def test_resume_of_an_object_with_other_weights_or_options_is_refused(
    given: dict[str, float], message: str, folder: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(
            Noisy(**given), "fgsm,pgd(steps=2)", LINF, grid_images(8), unit_size=3, judge_repeats=2, eot=1,
            out=folder, resume=True,
        )  # fmt: skip


def test_resume_by_edited_code_is_refused_and_verify_tells_of_the_edit(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("from engine_toys import Prototypes\n\n\nclass Mine(Prototypes):\n    name = 'mine'\n")
    known = set(sys.modules)

    def run(**given: Any) -> Evaluation:
        for name in [name for name in sys.modules if name not in known and name.startswith("robench_file_")]:
            del sys.modules[name]  # as in a process of its own
        defense = load_defense(f"{code}:Mine")
        return evaluate(defense, "fgsm", LINF, "fashion_mnist", n=4, unit_size=2, out=tmp_path / "run", **given)

    assert run().source.keys() == {"mine.py", "engine_toys.py"}
    assert verify_run(tmp_path / "run").notes == []
    RunStore.open(tmp_path / "run").finished()[1].unlink()
    run(resume=True)
    code.write_text(code.read_text() + "\n# more\n")
    with pytest.raises(
        UsageError, match=r"begun with other code of the defense: mine.py changed since.* another --out"
    ):
        run(resume=True)
    report = verify_run(tmp_path / "run")
    assert report.holds, report.failures
    assert report.notes == ["the code of the defense: mine.py changed since the run; the answers below tell"]


def test_code_of_robench_is_told_by_its_version() -> None:
    assert digest_source(load_defense("convnet"), "convnet") == {}


def test_a_folder_with_a_run_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(UsageError, match=f"{folder} holds a run already. Finish it with 'robench run --resume"):
        run(folder)


def test_result_and_row_are_rewritten_equal(folder: Path) -> None:
    before = contents(folder)
    assert {"result.json", "row.csv", "run.json", "timings.json"} < set(before)
    (folder / "result.json").unlink()
    (folder / "row.csv").write_text("damaged")
    Evaluation.load(folder).save()
    assert contents(folder) == before
    run(folder, resume=True)
    assert contents(folder) == before


def test_tracebacks_of_failed_attacks_are_kept_by_unit(tmp_path: Path) -> None:
    evaluate(Linear(), [Bad(), "fgsm"], LINF, grid_images(4), unit_size=2, out=tmp_path / "run")
    failures = sorted((tmp_path / "run" / "failures").iterdir())
    assert [path.name for path in failures] == ["00000-bad.txt", "00001-bad.txt"]
    assert all(path.read_text().endswith("RuntimeError: planted\n") for path in failures)
