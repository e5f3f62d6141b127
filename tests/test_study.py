"""Studies: what their file says, what is done, what is survived."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_toys import Prototypes

from robench.cli import main
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.leaderboard import board_name, read_rows
from robench.plan import Unit
from robench.report.study import duration, study_csv
from robench.runners.work import Planned
from robench.study import Study, StudyRun, make_study, read_study
from robench.study_progress import StudyProgress
from robench.study_run import RunState
from robench.threat import ThreatModel

HERE = Path(__file__).parent
TOY = f"{HERE / 'engine_toys.py'}:Prototypes"
OFFENDERS = {
    "Hangs": ("failed", "hung: no pass through the defense was finished in 12 s"),
    "HangsWhenLoaded": ("failed", "hung: no pass through the defense was finished in 12 s"),
    "Glutton": ("incomplete", "can't allocate memory"),
    "Exits": ("failed", "a plugin called exit(3)"),
    "ExitsHard": ("failed", "its worker process ended with exit status 3 (2 times)"),
    "Chatty": ("finished", ""),
    "Drifts": ("failed", "its weights or buffers changed during the run"),
    "Seeds": ("failed", 'defense "seeds" seeded torch\'s global generator'),
    "SeedsLate": ("incomplete", "seeded torch's global generator"),
    "RaisesLate": ("failed", "unit 2: ValueError at study_toys.py"),
}


def write(path: Path, **content: Any) -> Path:
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items() if not isinstance(value, dict)]
    for key, table in content.items():
        if isinstance(table, dict):
            lines += [f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def call(words: list[str], capture: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    before, sys.argv = sys.argv, ["robench", *words]
    capture.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    return int(stop.value.code or 0), *capture.readouterr()


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# what the file says


def test_a_study_is_the_product_of_its_lists() -> None:
    study = make_study(
        {
            "defenses": ["convnet", "jem(refine_steps=1)"],
            "datasets": ["mnist", "fashion_mnist"],
            "threats": ["linf", "l2 1.5,0.5"],
            "seeds": [0, 1],
            "attacks": "fgsm",
            "exclude": [{"defense": "jem*", "dataset": "mnist"}, {"norm": "l2", "eps": 0.5, "seed": 1}],
        }
    )
    names = [run.name for run in study.runs]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2 - 4 - 3
    assert names[0] == "convnet-mnist-linf-0.3-seed0"
    assert study.runs[0].eps == (0.3,)
    assert study.runs[2].eps == (0.5, 1.5)
    assert not any(run.defense.startswith("jem") and run.dataset == "mnist" for run in study.runs)


def test_an_audit_goes_with_each_defense_dataset_and_bound() -> None:
    study = make_study(
        {"defenses": "convnet", "threats": ["linf 0.1,8/255"], "seeds": [0, 1], "protocol": "quick", "audit": True}
    )
    assert list(study.audits()) == [
        "audit-convnet-fashion_mnist-linf-0.0313725",
        "audit-convnet-fashion_mnist-linf-0.1",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defence": "convnet"}, 'the study has no key "defence"; there are: name, defenses'),
        ({"defenses": []}, "defenses must name at least one"),
        ({"defenses": [1]}, "defenses must be a list of str"),
        ({"attacks": "pgd"}, "either a protocol or attacks"),
        ({"protocol": "hard"}, 'no protocol "hard"'),
        ({"threats": "l7"}, "l7"),
        ({"threats": "linf much"}, "much"),
        ({"datasets": "imagenet"}, "no customary eps"),
        ({"seeds": [0, 0]}, "two runs would share the folder"),
        ({"seeds": [True]}, "seeds must be a list of int"),
        ({"n": "8"}, "n must be of kind int"),
        ({"exclude": [{"defence": "x"}]}, 'exclude no. 1 has no key "defence"'),
        ({"exclude": [{"dataset": "mnist"}]}, "exclude no. 1 applies to no run"),
        ({"exclude": [{}]}, "exclude no. 1 applies to no run"),
        ({"exclude": [{"norm": "linf"}]}, "no run is left"),
        ({"settings": {"n": 3}}, 'settings has no key "n"'),
        ({"settings": {"eot": 0}}, "eot must be at least 1"),
        ({"settings": {"eot": "ten"}}, "settings: eot must be of kind int; got 'ten'"),
        ({"settings": {"unit_size": 32.0}}, "settings: unit_size must be of kind int"),
        ({"settings": {"cascade": "yes"}}, "settings: cascade must be of kind bool"),
        ({"audit": True, "threats": "l0 5"}, "the audit takes linf, l2 and bounds above 0"),
        ({"audit": True, "threats": "linf 0,0.1"}, "the audit takes linf, l2 and bounds above 0"),
        ({"limits": {"threads": 0}}, "threads must be a number above 0"),
        ({"limits": {"stall_s": float("nan")}}, "stall_s must be a number above 0"),
        ({"limits": {"task_s": 1}}, 'limits has no key "task_s"'),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        make_study({"defenses": "convnet", "protocol": "quick", **change})


@pytest.mark.parametrize("text", ["defenses = [", "\udcff", "a" * 100 + "=" * 100, "x = {" * 5000])
def test_a_file_that_is_no_study_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"study\.toml"):
        read_study(path)


def test_a_study_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.toml cannot be read: No such file"):
        read_study(tmp_path / "gone.toml")


def test_a_study_is_named_after_its_file(tmp_path: Path) -> None:
    study: Study = read_study(write(tmp_path / "first.toml", defenses="convnet", protocol="quick"))
    assert (study.name, study.attacks) == ("first", ("quick-1",))


# what is done


def test_options_that_the_file_has_to_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    path = str(write(tmp_path / "first.toml", defenses=TOY, attacks="fgsm"))
    for words, message in (
        ([path, "--eps", "0.1"], "--eps cannot stand beside a study's file"),
        ([path, "--attack", "pgd"], "--attack cannot stand beside"),
        ([path, "--runner", "slurm"], 'runner must be one of local, ray; got "slurm"'),
        ([path, "--workers", "0"], "workers must be at least 1"),
        (["--defense", "convnet", "--dry-run"], "go with a study"),
        ([path, "--ray", "here", "--out", f"{tmp_path}/out"], "HOST:PORT"),
        ([path, "--ray", "127.0.0.1:1", "--out", f"{tmp_path}/out"], "no Ray cluster answers at 127.0.0.1:1"),
    ):
        status, _, err = call(["run", *words], capsys)
        assert status == 2, words
        assert message in err


@pytest.mark.slow
def test_a_study_ends_in_runs_that_a_leaderboard_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "first.toml", defenses=[TOY], threats=["linf 0.02,0.05"], attacks=["fgsm"], n=12,
        settings={"unit_size": 4},
    )  # fmt: skip
    words = ["run", str(path), "--out", str(tmp_path / "out")]
    status, out, _ = call([*words, "--dry-run", "--json"], capsys)
    planned = json.loads(out)["runs"]
    assert status == 0
    assert not (tmp_path / "out").exists()
    assert [(run["units"], run["missing"], run["status"]) for run in planned] == [(3, 3, "planned")]

    status, out, err = call([*words, "--workers", "2"], capsys)
    assert status == 0
    assert "1 of 1 runs, 3 of 3 units" in err
    alone = evaluate(
        Prototypes(), "fgsm", [ThreatModel("linf", 0.02), ThreatModel("linf", 0.05)], "fashion_mnist", n=12, unit_size=4
    )
    robust = [alone.robust_at(eps) for eps in (0.02, 0.05)]
    assert [row["robust_acc"] for row in rows_of(tmp_path / "out")] == [f"{one.value:.4f}" for one in robust if one]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("units/*")}
    status, out, _ = call([*words, "--json"], capsys)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("units/*")} == before
    assert json.loads(out)["runs"][0]["status"] == "finished"

    boards = tmp_path / "boards"
    assert call(["leaderboard", "add", str(tmp_path / "out"), "--leaderboards", str(boards)], capsys)[0] == 0
    assert [len(read_rows(board)) for board in sorted(boards.glob("*.csv"))] == [1, 1]


def test_audits_do_not_go_behind_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("upath")
    path = write(tmp_path / "first.toml", defenses=[TOY], attacks="fgsm", audit=True)
    status, _, err = call(["run", str(path), "--out", "memory://robench/study"], capsys)
    assert status == 2
    assert "audits are written to a folder, not to memory://robench/study" in err


@pytest.mark.slow
def test_a_study_audits_each_defense_and_takes_up_what_was_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "first.toml", defenses=[TOY], threats="linf 0.05", attacks="fgsm", n=8, audit=True)
    words = ["run", str(path), "--out", str(tmp_path / "out"), "--json"]
    status, out, _ = call(words, capsys)
    assert status == 0, out
    ((name, verdict),) = json.loads(out)["audits"].items()
    assert verdict in ("pass", "suspect", "masked")
    before = (tmp_path / "out" / name / "audit.json").stat().st_mtime_ns
    status, again, _ = call(words, capsys)
    assert json.loads(again)["audits"] == {name: verdict}
    assert (tmp_path / "out" / name / "audit.json").stat().st_mtime_ns == before
    assert rows_of(tmp_path / "out")[0]["audit"] == verdict
    boards = tmp_path / "boards"
    assert call(["leaderboard", "add", str(tmp_path / "out"), "--leaderboards", str(boards)], capsys)[0] == 0
    (board,) = boards.glob("*.csv")
    assert read_rows(board)[0]["audit_verdict"] == verdict


@pytest.mark.slow
def test_a_study_with_a_run_that_cannot_be_done_begins_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "first.toml", defenses=[TOY, "convnet(width=17)"], attacks="fgsm", n=4)
    status, out, err = call(["run", str(path), "--out", str(tmp_path / "out")], capsys)
    assert (status, out) == (2, "")
    assert 'no weights "fashion_mnist-width17" of defense "convnet"' in err
    assert "leave the run out with [[exclude]]" in err
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.slow
def test_a_study_survives_whatever_a_plugin_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    defenses = [TOY, *(f"{HERE / 'study_toys.py'}:{name}" for name in OFFENDERS)]
    path = write(
        tmp_path / "wild.toml", defenses=defenses, threats="linf 0.05", attacks="fgsm", n=12,
        settings={"unit_size": 4}, limits={"stall_s": 12, "memory_gb": 2},  # a slow start on a busy machine is no stall
    )  # fmt: skip
    status, out, _ = call(["run", str(path), "--out", str(tmp_path / "out"), "--json", "--workers", "2"], capfd)
    assert status == 1
    assert len(json.loads(out)["runs"]) == len(defenses)  # nothing that a plugin printed is in between
    rows = {row["defense"].rpartition(":")[2]: row for row in rows_of(tmp_path / "out")}
    assert rows["Prototypes"]["status"] == "finished", rows["Prototypes"]
    assert rows["Prototypes"]["robust_acc"] == rows["Chatty"]["robust_acc"] != ""
    for name, (state, reason) in OFFENDERS.items():
        assert rows[name]["status"] == state, rows[name]
        assert reason in rows[name]["reason"], rows[name]
        assert (rows[name]["robust_acc"] != "") == (state == "finished")


# what is shown


def state(name: str, units: int, seconds: float, left: int, problem: str = "") -> RunState:
    run = StudyRun(name, "convnet", "mnist", "linf", (0.1,), 0)
    every = tuple(Unit(number, number, number + 1) for number in range(units))
    return RunState(run, Planned(every, every, (), 10, seconds), set(range(left)), problem)


def test_the_study_of_the_leaderboards_has_their_threat_models_and_no_others() -> None:
    root = Path(__file__).parents[1]
    study = read_study(root / "examples" / "leaderboards.toml")
    boards = {board_name(run.dataset, run.norm, eps) for run in study.runs for eps in run.eps}
    assert boards == {path.name for path in (root / "leaderboards").glob("*.csv")}
    assert (study.attacks, study.n, study.audit) == (("standard-1",), 1000, True)
    published = {row["defense"] for board in boards for row in read_rows(root / "leaderboards" / board)}
    assert {run.defense for run in study.runs} == published - {"shortrun"}


def test_the_time_left_goes_by_what_units_took_and_else_by_corrected_guesses() -> None:
    """Run a: guessed 1 s a unit, took 2 s. Run b: guessed 10 s a unit, not begun; so 20 s each. Run c was given up."""
    progress = StudyProgress("study", workers=2, enabled=False)
    states = [state("a", 4, 4.0, 2), state("b", 3, 30.0, 3), state("c", 5, 500.0, 5, "broken")]
    assert progress.left(states) == (2 * 1 + 3 * 10) / 2
    progress.finished("a", 2.0)
    progress.finished("a", 2.0)
    assert progress.left(states) == (2 * 2 + 3 * 20) / 2


def test_progress_names_what_failed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with StudyProgress("study", workers=1) as progress:
        for _ in range(2):
            progress.show([state("a", 2, 1.0, 0), state("c", 5, 1.0, 5, "its worker hung")], {})
    err = capsys.readouterr().err
    assert err.count("study: c failed: its worker hung") == 1
    assert "1 of 2 runs" in err
    assert "1 failed" in err


def test_a_cell_of_a_plugin_is_no_formula() -> None:
    found = study_csv([state("=cmd", 1, 1.0, 1, "=HYPERLINK(1)\n+2")], {})
    (row,) = csv.DictReader(io.StringIO(found))
    assert (row["run"], row["reason"], row["status"]) == ("'=cmd", "'=HYPERLINK(1) +2", "failed")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (2e5, "2.3 days")]
)
def test_a_duration_is_told_in_the_unit_that_a_reader_wants(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_example_is_a_study() -> None:
    study = read_study(HERE.parent / "examples" / "study.toml")
    assert [run.name for run in study.runs] == [
        "convnet-fashion_mnist-linf-0.05_0.1-seed0",
        "convnet_width_16-fashion_mnist-linf-0.05_0.1-seed0",
        "convnet_width_16-fashion_mnist-l2-1.5-seed0",
        "jem-fashion_mnist-linf-0.05_0.1-seed0",
        "jem-fashion_mnist-l2-1.5-seed0",
    ]
