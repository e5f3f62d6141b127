"""A run that is killed at any point, or interrupted, and resumed has the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_toys
import pytest
import torch

from robench.cli import main
from robench.result import Evaluation
from robench.store import RunStore

LAUNCH = (  # a job of a shell that is not interactive starts with SIGINT ignored
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from robench.cli import main; main()"
)
UNITS = 20
OPTIONS = [
    *("--defense", f"{engine_toys.__file__}:Slow", "--attack", "fgsm,pgd(steps=2)", "--dataset", "fashion_mnist"),
    *("--n", str(2 * UNITS), "--unit-size", "2", "--eps", "0.02,0.04", "--eot", "2", "--judge-repeats", "2"),
    *("--seed", "3", "--device", "cpu"),
]
PAUSE = 0.01
TIMES = "timings.json"
PATIENCE = 300.0


def start(*words: str, pause: float = 0.0) -> subprocess.Popen[str]:
    """Starts the command line in a process of its own; `pause` slows each pass and each write down."""
    environment = os.environ | {"ROBENCH_TOY_PAUSE": str(pause), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Waits until the process has come so far."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None, f"ended too early: {finish(process)}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.002)


def count_units(folder: Path) -> int:
    return len(list((folder / "units").glob("[0-9]*.parquet")))


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name, but for the times and what a killed write left behind; the day stands for itself."""
    day = json.loads((folder / "run.json").read_text())["created"].encode()  # midnight may come between two runs
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(day, b"<day>")
        for path in folder.rglob("*")
        if path.is_file() and path.name != TIMES and not re.fullmatch(r"\..+\.tmp", path.name)
    }


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs the command line in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["robench", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    status, out, err = finish(start("run", *OPTIONS, "--out", str(folder), "--json"))
    assert status == 0, err
    assert json.loads(out)["run"] == str(folder)
    return folder


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "copy"))


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    """Seven kills: the first as soon as the folder is there, the others anywhere in a unit or its writing."""
    folder = tmp_path / "run"
    words, delays = ("run", *OPTIONS, "--out", str(folder)), []
    for kill in range(7):
        before = count_units(folder) if kill else 0
        process = start(*words, pause=PAUSE)
        if kill:
            wait_for(process, lambda before=before: count_units(folder) > before)  # type: ignore[misc]
            delays.append(random.uniform(0, 60 * PAUSE))
            time.sleep(delays[-1])
        else:
            wait_for(process, (folder / "run.json").is_file)
        process.kill()
        status, _, err = finish(process)
        assert status == -signal.SIGKILL, f"ended before it was killed, after {delays}: {err}"
        words = ("run", "--resume", str(folder))
    assert 6 <= count_units(folder) < UNITS, delays
    assert not (folder / "result.json").exists()
    status, out, err = finish(start(*words, "--json"))
    assert status == 0, err
    found, expected = contents(folder), contents(reference)
    assert sorted(found) == sorted(expected), delays
    assert [name for name in expected if found[name] != expected[name]] == [], delays
    assert json.loads(out)["robust_accuracy"] == Evaluation.load(reference).to_json()["robust_accuracy"]
    names = [sorted(path.name for path in one.iterdir() if path.name[0] != ".") for one in (folder, reference)]
    assert names[0] == names[1]  # the times are there too


@pytest.mark.slow
def test_interrupted_run_says_how_to_resume(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("run", *OPTIONS, "--out", str(folder), pause=PAUSE)
    wait_for(process, lambda: count_units(folder) > 0)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert said == f"robench: interrupted; finish it with: robench run --resume {folder}"
    left = [path.name for path in (folder / "units").iterdir() if not path.name[0].isdigit()]
    assert left == []  # an interrupt, unlike a kill, cleans up
    assert 0 < count_units(folder) < UNITS
    command = shlex.split(said.partition("finish it with: robench ")[2])
    status, _, err = finish(start(*command))
    assert status == 0, err
    assert contents(folder) == contents(reference)


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def everything() -> dict[str, tuple[bytes, int]]:
        return {
            str(path): (path.read_bytes(), path.stat().st_mtime_ns if path.parent.name == "units" else 0)
            for path in copy.rglob("*")
            if path.is_file()
        }

    before = everything()
    assert call(monkeypatch, "run", "--resume", str(copy), "--json") == 0
    assert everything() == before
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    stored = json.loads((copy / "result.json").read_text())
    assert {key: shown[key] for key in stored} == stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--defense", "convnet"),
        ("--attack", "fgsm"),
        ("--protocol", "quick-1"),
        ("--dataset", "mnist"),
        ("--norm", "l2"),
        ("--eps", "0.02"),
        ("--n", "41"),
        ("--seed", "4"),
        ("--eot", "3"),
        ("--judge-repeats", "3"),
        ("--unit-size", "4"),
        ("--precision", "bfloat16"),
        ("--cascade", ""),
    ],
)
def test_resume_with_another_spec_is_refused_in_one_line(
    option: str, value: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    assert call(monkeypatch, "run", "--resume", str(copy), option, *([value] if value else [])) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"robench: {copy} holds a run of another spec: ")
    assert shown.err.count("\n") == 1
    assert contents(copy) == before


@pytest.mark.slow
def test_resume_with_the_same_options_is_accepted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = min((copy / "units").iterdir())
    content = unit.read_bytes()
    unit.unlink()
    assert call(monkeypatch, "run", "--resume", str(copy), "--json", *OPTIONS) == 0
    assert unit.read_bytes() == content


@pytest.mark.parametrize("defense", ["Prototypes", "Blindfold"])
def test_resume_goes_on_as_cascade_and_in_the_precision_of_the_run(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on a small run: both are read from the folder, and bytes are the same."""
    folder = tmp_path / "run"
    words = ["--defense", f"{engine_toys.__file__}:{defense}", "--attack", "fgsm,pgd(steps=2),square(queries=4)"]
    words += ["--n", "12", "--unit-size", "4", "--eps", "0.02,0.05", "--eot", "2", "--judge-repeats", "2"]
    words += ["--device", "cpu", "--cascade", "--precision", "bfloat16"]
    assert call(monkeypatch, "run", *words, "--out", str(folder)) == 0
    spec = Evaluation.load(folder).spec
    assert (spec.cascade, spec.precision) == (True, "bfloat16")
    before = contents(folder)
    for unit in sorted((folder / "units").iterdir())[1:]:
        unit.unlink()
    (folder / "result.json").unlink()
    assert call(monkeypatch, "run", "--resume", str(folder), "--cascade", "--precision", "bfloat16") == 0
    assert contents(folder) == before
    for other, message in (
        (["--no-cascade"], "cascade is True, not False"),
        (["--precision", "float32"], "precision is 'bfloat16', not 'float32'"),
    ):
        capsys.readouterr()
        assert call(monkeypatch, "run", "--resume", str(folder), *other) == 2
        assert message in capsys.readouterr().err
    for other in (["--access", "scores"], ["--goal", "minimal"]):
        capsys.readouterr()
        assert call(monkeypatch, "run", "--resume", str(folder), *other) == 2
        assert 'attack "fgsm"' in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("cascade", "protocol"), [([], "quick-1"), (["--cascade"], "")], ids=["as it is", "cascade switched"]
)
def test_resume_of_a_protocol_stays_what_it_was(
    cascade: list[str],
    protocol: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    words = ["--defense", f"{engine_toys.__file__}:Prototypes", "--protocol", "quick", *cascade, "--n", "8"]
    assert call(monkeypatch, "run", *words, "--unit-size", "4", "--device", "cpu", "--out", str(folder)) == 0
    before = contents(folder)
    min((folder / "units").iterdir()).unlink()
    capsys.readouterr()
    assert call(monkeypatch, "run", "--resume", str(folder), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["protocol"], shown["cascade"]) == (protocol, bool(cascade))
    assert contents(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_begun_on_a_gpu_is_not_told_to_go_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--device cpu` would be refused next, as another spec."""
    words = ["--defense", f"{engine_toys.__file__}:Prototypes", "--attack", "fgsm", "--n", "4", "--device", "cpu"]
    assert call(monkeypatch, "run", *words, "--out", str(tmp_path / "cpu")) == 0
    RunStore.create(tmp_path / "gpu", replace(Evaluation.load(tmp_path / "cpu").spec, device="cuda"))
    capsys.readouterr()
    assert call(monkeypatch, "run", "--resume", str(tmp_path / "gpu")) == 2
    shown = capsys.readouterr().err
    assert "begun on a GPU" in shown
    assert "--device cpu" not in shown
    assert shown.count("\n") == 1


def test_resume_of_what_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "--resume", str(tmp_path / "none")) == 2
    assert (
        capsys.readouterr().err
        == f"robench: {tmp_path}/none is not a run folder: it has no run.json; there is no such folder\n"
    )
