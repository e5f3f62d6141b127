"""Several processes on one run: the same bytes as one, also where a worker is killed; and what cannot be shared."""

from __future__ import annotations

import os
import signal
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_toys import Prototypes

from robench import ThreatModel, UsageError
from robench.errors import PluginError
from robench.evaluate import evaluate, prepare
from robench.plan import Unit, plan_units
from robench.registry import load_defense
from robench.result import Evaluation
from robench.runners import Limits, Task, run_in_processes
from robench.runners.cluster import run_on_ray
from robench.runners.work import PlanRequest, UnitRequest
from robench.settings import Settings
from robench.store import RunStore
from robench.study import make_study
from robench.study_run import StudySettings, run_study
from robench.types import Images, Logits
from robench.unit import run_unit

HERE = Path(__file__)
TOY = f"{HERE.with_name('engine_toys.py')}:Prototypes"


def run(folder: Path, defense: str = TOY, **settings: Any) -> Evaluation:
    return evaluate(
        load_defense(defense),
        "fgsm,pgd(steps=2)",
        ThreatModel("linf", 0.05),
        "fashion_mnist",
        n=20,
        unit_size=4,
        out=folder,
        defense_spec=defense,
        **settings,
    )


def contents(folder: Path) -> dict[str, bytes]:
    skipped = ("timings.json", ".lock")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skipped]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Mortal(Prototypes):
    """Kills its process at the first attack, once: a file beside the test says that it was done."""

    name = "mortal"

    def forward(self, x: Images) -> Logits:
        mark = os.environ.get("ROBENCH_TEST_MORTAL", "")
        if mark and torch.is_grad_enabled() and not Path(mark).exists():
            Path(mark).write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Doomed(Mortal):
    """Kills its process at every attack."""

    name = "doomed"

    def forward(self, x: Images) -> Logits:
        mark = os.environ.get("ROBENCH_TEST_MORTAL", "")
        if mark:
            Path(mark).unlink(missing_ok=True)
        return super().forward(x)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_cluster_gives_the_bytes_of_one_process(tmp_path: Path) -> None:
    """A study by one worker, by two, and by Ray."""
    pytest.importorskip("ray")
    study = make_study(
        {"defenses": [TOY, f"{HERE.with_name('engine_toys.py')}:Blindfold"], "threats": "linf 0.05", "n": 12}
        | {"attacks": ["fgsm", "pgd(steps=2)"], "settings": {"unit_size": 4}}
    )
    for name, how in {"one": {"workers": 1}, "two": {"workers": 2}, "ray": {"workers": 2, "runner": "ray"}}.items():
        result = run_study(study, StudySettings(tmp_path / name, progress=False, **how))  # type: ignore[arg-type]
        assert result.failures == []
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "ray")


@pytest.mark.slow
def test_a_worker_that_dies_loses_nothing_but_its_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal = f"{HERE}:Mortal"
    run(tmp_path / "one", mortal)
    monkeypatch.setenv("ROBENCH_TEST_MORTAL", str(tmp_path / "mark"))
    run(tmp_path / "two", mortal, workers=2)
    assert (tmp_path / "mark").exists()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_unit_that_kills_its_workers_again_and_again_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBENCH_TEST_MORTAL", str(tmp_path / "mark"))
    with pytest.raises(PluginError, match=r"unit \d: its worker process ended with signal SIGKILL \(5 times\)"):
        run(tmp_path / "run", f"{HERE}:Doomed", workers=2)


def plan(folder: Path, defense: str) -> Task:
    toys = HERE.with_name("study_toys.py")
    request = PlanRequest(str(folder), f"{toys}:{defense}", "fashion_mnist", ("fgsm",), "linf", (0.1,), {"n": 4})
    return Task("plan", request, defense)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["local", "ray"])
def test_a_task_that_hangs_is_given_up(way: str, tmp_path: Path) -> None:
    if way == "ray":
        pytest.importorskip("ray")
    runner = run_in_processes if way == "local" else run_on_ray
    queue = deque([plan(tmp_path / "a", "HangsWhenLoaded"), plan(tmp_path / "b", "Chatty")])
    outcomes = {
        outcome.task.run: outcome
        for outcome in runner(queue, lambda _: True, workers=1, limits=Limits(stall_s=8, task_s=0.1))
    }
    assert outcomes["Chatty"].error is None
    expected = {
        "local": "hung: no pass through the defense was finished in 8 s",
        "ray": "Ray lost its worker (WorkerCrashedError): it died, or hung (2 times)",
    }
    assert str(outcomes["HangsWhenLoaded"].error) == expected[way]


@pytest.mark.slow
def test_a_unit_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """And a plugin's own kind of error reaches a process that does not know it."""
    hung = run_in_processes(deque([plan(tmp_path / "a", "Hangs")]), lambda _: True, limits=Limits(stall_s=6))
    assert [str(outcome.error)[:5] for outcome in hung] == ["hung:"]  # in the calibration; the folder is there
    queue = deque([Task("unit", UnitRequest(str(tmp_path / "a"), Unit(0, 0, 4))), plan(tmp_path / "b", "RaisesItsOwn")])
    limits = Limits(task_s=6, stall_s=100)
    late, own = run_in_processes(queue, lambda _: True, workers=1, limits=limits)
    assert str(late.error) == "not done after 6 s"
    assert type(own.error) is PluginError
    assert str(own.error) == "OwnError"


def test_tasks_that_are_not_wanted_are_dropped() -> None:
    queue = deque([Task("plan", None, "a"), Task("plan", None, "b")])
    assert list(run_in_processes(queue, lambda _: False)) == []
    assert not queue


@pytest.mark.slow
def test_a_worker_that_is_killed_on_a_cluster_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    mortal = f"{HERE}:Mortal"
    study = make_study(
        {"defenses": [mortal], "threats": "linf 0.05", "n": 12, "attacks": ["fgsm"], "settings": {"unit_size": 4}}
    )
    run_study(study, StudySettings(tmp_path / "one", workers=1, progress=False))
    monkeypatch.setenv("ROBENCH_TEST_MORTAL", str(tmp_path / "mark"))
    result = run_study(study, StudySettings(tmp_path / "ray", workers=1, runner="ray", progress=False))
    assert result.failures == []
    assert (tmp_path / "mark").exists()
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


@pytest.mark.parametrize("missing", ["out", "defense", "dataset"])
def test_what_cannot_be_loaded_by_name_is_refused(missing: str, tmp_path: Path) -> None:
    settings = {"out": tmp_path, "defense_spec": TOY, "workers": 2, "n": 4}
    data: Any = "fashion_mnist"
    if missing == "dataset":
        data = (torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64))
    else:
        del settings["defense_spec" if missing == "defense" else "out"]
    with pytest.raises(UsageError, match="several workers need a run folder"):
        evaluate(Prototypes(), "fgsm", ThreatModel("linf", 0.05), data, **settings)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers must be at least 1"):
        run(tmp_path / "run", workers=0)


class Leaves(Prototypes):
    """Calls exit() when it is attacked."""

    name = "leaves"

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        raise SystemExit(1)


def test_an_exit_is_no_failed_attack(tmp_path: Path) -> None:
    """A cluster that takes a worker away raises SystemExit in it; taken for a failure, it would be stored as one."""
    work = prepare(Leaves(), "fgsm", ThreatModel("linf", 0.05), "fashion_mnist", Settings(n=4))
    with pytest.raises(SystemExit):
        run_unit(work, plan_units(work.spec)[0])
    with pytest.raises(PluginError, match=r"unit 0: a plugin called exit\(1\)"):
        evaluate(Leaves(), "fgsm", ThreatModel("linf", 0.05), "fashion_mnist", n=4, out=tmp_path / "run")
    assert RunStore.open(tmp_path / "run").finished() == {}
