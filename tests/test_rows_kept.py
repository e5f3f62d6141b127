"""Rows of other runs are kept: what replaces what on a leaderboard, and the commands that are printed after a run."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from board_toys import make_row
from engine_toys import Prototypes

from robench.board import is_audit_of_run, load_boards, repeat_audit_command, repeat_command
from robench.bundle import bundle_folder, read_bundle
from robench.cli import main
from robench.data_names import list_embedded_files
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.leaderboard import add_row, identity, read_rows
from robench.plan import AttackEntry, RunSpec
from robench.publish import EVIDENCE, all_rows, publish
from robench.registry import load_defense
from robench.store import RunStore
from robench.threat import ThreatModel
from robench.weights import _locate

PLUGIN = '''
import torch
from robench.attack import Attack
from robench.defense import Defense
from dataclasses import dataclass

class Sigma(Defense):
    """Compares the brightness of ten strips, with a liking for class 0; sigma is no weight."""
    name = "sigma"
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self, sigma=0.5):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        strips = torch.nn.functional.adaptive_avg_pool2d(x, (10, 1)).flatten(1)
        return (strips + torch.nn.functional.one_hot(torch.tensor(0), 10)) / self.sigma

class Opaque(Sigma):
    """Gives no gradient."""

    def forward(self, x):
        return super().forward(x.detach())

class Other(Sigma):
    """The same name and weights from other code."""

@dataclass(frozen=True)
class Fails(Attack):
    name = "fails"
    norms = ("linf",)

    def __call__(self, victim, x, y, threat):
        raise ValueError("the planted failure\\nand a second line")
'''
LINF = ThreatModel("linf", 0.1)
BOARD = "fashion_mnist-linf-0.1"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A working directory with plug.py, and the program as users have it: without type checks."""
    (tmp_path / "plug.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield tmp_path
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; gives its exit status, standard output, and the lines on standard error but for progress."""

    def run(*arguments: object) -> tuple[object, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["robench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, [line for line in err.splitlines() if line.startswith("robench: ")]

    return run


def attack(call: Any, out: str, *, sigma: float = 1.0, n: int = 8, attacks: str = "fgsm", **options: object) -> Path:
    """Runs a small attack on the plugin into the folder `out`."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    given = ["--attack", attacks] if attacks != "quick" else ["--protocol", attacks]
    defense = [] if "defense" in options else ["--defense", f"plug.py:Sigma(sigma={sigma})"]
    status, _, err = call("run", *defense, *given, "--n", n, "--device", "cpu", "--out", out, *words)
    assert status == 0, err
    return Path(out)


def rows() -> list[dict[str, str]]:
    return [row for _, row in all_rows(Path("leaderboards"))]


def everything() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("leaderboards").rglob("*") if path.is_file()}


# identity


def test_options_of_a_file_s_plugin_stand_in_the_row_and_both_are_kept(call: Any) -> None:
    for sigma in (0.5, 2.0):
        attack(call, f"s{sigma}", sigma=sigma)
        assert call("leaderboard", "add", f"s{sigma}")[::2] == (0, [])
    assert sorted(row["defense"] for row in rows()) == ["sigma(sigma=0.5)", "sigma(sigma=2.0)"]
    assert len(list(Path("leaderboards", EVIDENCE).iterdir())) == 2


def test_free_lists_of_other_attacks_are_kept_and_published_protocols_do_not_ask(call: Any) -> None:
    attack(call, "a")
    attack(call, "b", attacks="fgsm,pgd(steps=2)")
    assert call("leaderboard", "add", "a", "b")[::2] == (0, [])
    assert len(rows()) == 2
    free, other = make_row(), make_row(apgd="0.5")
    assert identity(free) != identity(other)
    assert identity(free | {"protocol": "quick-1"}) == identity(other | {"protocol": "quick-1"})
    assert identity(free) != identity(free | {"robust_acc": ""})  # which attack failed is not known from its column


def test_add_tells_the_evidence_what_is_incomplete_and_what_comes_next(call: Any) -> None:
    words = ("run", "--defense", "plug.py:Sigma", "--n", 10, "--device", "cpu", "--attack")
    assert call(*words, "fgsm", "--out", "whole")[0] == 0
    assert call(*words, "fgsm,plug.py:Fails", "--out", "partial")[0] == 1
    lines = call("leaderboard", "add", "whole", "partial", "--leaderboards", "boards")[1].splitlines()
    (path,) = Path("boards").glob("*.csv")
    whole, partial = (row["evidence"] for row in read_rows(path))
    assert lines == [
        f"{path}: sigma, free list, evidence {whole}",
        f"{path}: sigma, free list, evidence {partial}; incomplete: a number is missing, so it gets no rank",
        "next: robench leaderboard build --leaderboards boards",
    ]
    told = json.loads(call("leaderboard", "add", "whole", "--leaderboards", "boards", "--json")[1])
    assert told["rows"] == [{"leaderboard": str(path), "row": "sigma, free list", "evidence": whole}]


def test_a_row_that_nobody_can_check_is_told(call: Any) -> None:
    evaluate(Prototypes(), "fgsm", LINF, "fashion_mnist", n=8, device="cpu", out="run")
    status, _, err = call("leaderboard", "add", "run")
    assert status == 0
    assert "run names no defense, so that nobody can check its row" in err[0]
    assert "use --defense file.py:NAME" in err[0]
    evaluate(load_defense("plug.py:Sigma"), "fgsm", LINF, "fashion_mnist", n=8, device="cpu", out="named")
    assert call("leaderboard", "add", "named")[::2] == (0, [])


# what replaces what


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": "7"}, "fewer images"),
        ({"seed": "9"}, "another seed"),
        ({"eot": "1", "n": "9"}, "fewer draws"),
        ({"judge_repeats": "1"}, "fewer draws"),
        ({"robust_low": "", "n": "9"}, "misses a number"),
        ({"audit_verdict": "not run", "n": "9"}, "without an audit"),
    ],
)
def test_a_row_with_less_evidence_replaces_none_unless_asked(
    change: dict[str, str], reason: str, tmp_path: Path
) -> None:
    old = make_row(audit_verdict="masked", protocol="quick-1", evidence="0" * 16)
    path = tmp_path / "board.csv"
    add_row(old, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"n=8 seed=8.*{reason}.*--replace"):
        add_row(old | change, path)
    assert path.read_bytes() == before
    assert len(add_row(old | change, path, replace=True)) == 1
    assert [row["n"] for row in read_rows(path)] == [change.get("n", "8")]


@pytest.mark.parametrize("change", [{"n": "9", "seed": "1"}, {"date": "2030-01-01"}, {"audit_verdict": "pass"}, {}])
def test_a_row_with_as_much_evidence_replaces(change: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    add_row(make_row(), path)
    assert len(add_row(make_row() | change, path)) == 1
    assert len(read_rows(path)) == 1


def test_a_smaller_run_is_refused_before_anything_is_written_and_a_larger_one_is_told(call: Any) -> None:
    for n in (8, 16):
        attack(call, f"n{n}", n=n, attacks="quick")
    attack(call, "new", sigma=3.0)
    call("leaderboard", "add", "n16")
    before = everything()
    status, out, lines = call("leaderboard", "add", "new", "n8")
    assert (status, out, len(lines)) == (2, "", 1)
    for part in ("n8 (sigma(sigma=1.0), quick-1, n=8 seed=0)", rows()[0]["evidence"], "n=16 seed=0", "--replace"):
        assert part in lines[0]
    assert everything() == before
    (line,) = call("leaderboard", "add", "n8", "--replace")[2]
    assert "replaces n=16 seed=0 by n=8 seed=0" in line
    (line,) = call("leaderboard", "add", "n16")[2]
    assert "replaces n=8 seed=0 by n=16 seed=0" in line
    assert everything() == before
    assert call("leaderboard", "add", "n16")[::2] == (0, [])
    assert everything() == before


def test_removed_rows_leave_everything_else_as_it_was(call: Any) -> None:
    for sigma in (0.5, 2.0, 3.0):
        attack(call, f"s{sigma}", sigma=sigma)
    call("leaderboard", "add", "s0.5")
    (kept,) = rows()
    before = everything()
    call("leaderboard", "add", "s2.0", "s3.0")
    first, second = (row["evidence"] for row in rows() if row["evidence"] != kept["evidence"])
    full = everything()
    for wrong in ("0" * 16, "sigma"):
        status, out, lines = call("leaderboard", "remove", first, wrong)
        assert (status, out, len(lines)) == (2, "", 1)
        assert wrong in lines[0]
        assert everything() == full
    folder = Path("leaderboards", EVIDENCE, second)
    assert call("leaderboard", "remove", first, folder)[:2] == (0, f"leaderboards/{BOARD}.csv\n")
    assert everything() == before
    call("leaderboard", "remove", kept["evidence"])
    assert everything() == {}


def test_runs_that_would_be_one_row_are_refused_together(call: Any, tmp_path: Path) -> None:
    attack(call, "first")
    attack(call, "second", seed=1)
    for words in ([], ["--replace"]):  # which of the two is meant is not for the program to choose
        status, _, lines = call("leaderboard", "add", "first", "second", *words)
        assert status == 2
        assert "first (n=8 seed=0) and second (n=8 seed=1) would be one row" in lines[0]
    assert not Path("leaderboards").exists()
    shutil.copytree("first", "again")
    assert len(publish([Path("first"), Path("again")], tmp_path / "boards")) == 1
    status, _, lines = call("leaderboard", "add", "second", "--leaderboards", "boards")
    assert status == 2
    assert "another seed" in lines[0]


def test_a_namesake_from_other_code_or_with_fewer_queries_is_refused(call: Any) -> None:
    attack(call, "first")
    call("leaderboard", "add", "first")
    attack(call, "second", defense="plug.py:Other(sigma=1.0)")
    attack(call, "third", query_budget=1)
    for folder, reason in (("second", 'of "plug.py:Other(sigma=1.0)"'), ("third", "a query budget of 1")):
        status, _, (line,) = call("leaderboard", "add", folder)
        assert status == 2
        assert reason in line
        assert "--replace" in line


# printed commands


def test_the_commands_after_a_run_work_as_they_stand(call: Any, tmp_path: Path) -> None:
    from robench.data_names import KNOWN

    data = tmp_path / "my data" / "mnist"
    data.mkdir(parents=True)
    write_grey(data / "test-00000-of-00001.parquet", 20)
    assert "mnist" in KNOWN
    words = ["--defense", "plug.py:Sigma", "--dataset", "mnist", "--data-dir", data.parent, "--device", "cpu"]
    status, out, _ = call(
        "run", *words, "--attack", "fgsm", "--n", 8, "--eps", "8/255,0.1,0.123456789", "--out", "a run"
    )
    assert status == 0
    lines = out.splitlines()
    (full,) = (shlex.split(line) for line in lines if line.startswith("  robench run"))
    assert full[full.index("--eps") + 1] == "8/255,0.1,0.123456789"
    assert full[full.index("--n") + 1] == "20"
    assert full[-2:] == ["--data-dir", str(data.parent)]
    assert any(line.strip().strip("│ ").startswith("8/255") for line in lines)
    (hint,) = (line for line in lines if line.startswith("next:"))
    add, _, verify = hint.removeprefix("next: ").partition("   (or: ")
    assert call(*shlex.split(add)[1:])[0] == 0
    assert call(*shlex.split(verify.removesuffix(")"))[1:], "--trust")[0] == 0
    assert call("leaderboard", "verify", "--trust", "--data-dir", data.parent)[0] == 0


def write_grey(path: Path, n: int) -> None:
    """The first rows of the embedded test split."""
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(list_embedded_files("fashion_mnist", "test")[0]).slice(0, n), path)


def test_the_full_protocol_is_not_proposed_where_it_was_run(call: Any, tmp_path: Path) -> None:
    write_grey(tmp_path / "few.parquet", 10)
    words = ["--dataset", tmp_path / "few.parquet", "--eps", 0.1, "--device", "cpu"]
    for n, proposed in ((8, True), (10, False)):
        status, out, _ = call("run", "--defense", "plug.py:Sigma", "--protocol", "standard", "--n", n, *words)
        assert status == 0
        assert ("This is a first look: few images. The full protocol" in out) is proposed, "all of its steps were run"
        assert ("--n 10" in out) is proposed


def test_where_no_gradient_passed_the_protocol_without_gradients_is_proposed(call: Any) -> None:
    status, out, _ = call("run", "--defense", "plug.py:Opaque", "--attack", "fgsm", "--n", 40, "--device", "cpu")
    assert status == 1
    assert "--protocol blackbox" in out
    assert "next: mend what failed" in out
    assert "leaderboard add" not in out


def test_the_command_of_a_row_makes_the_same_run_again(call: Any) -> None:
    settings = ["--unit-size", 4, "--query-budget", 30, "--cascade", "--precision", "bfloat16", "--seed", 3]
    words = ["--defense", "plug.py:Sigma(sigma=2.0)", "--attack", "plug.py:Fails,pgd(steps=2)", "--n", 10]
    assert call("run", *words, *settings, "--device", "cpu", "--out", "first")[0] == 1
    call("leaderboard", "add", "first")
    ((entry,),) = (board.entries for board in load_boards(Path("leaderboards")))
    assert call(*shlex.split(entry.reproduce)[1:], "--device", "cpu", "--out", "second")[0] == 1
    assert RunStore.open(Path("second")).spec == RunStore.open(Path("first")).spec


def the_audit(folder: str) -> dict[str, Any]:
    (path,) = Path(folder).glob("**/audit*.json")
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}


def test_the_commands_of_a_row_make_its_audit_again(call: Any) -> None:
    words = ["--defense", "plug.py:Sigma(sigma=2.0)", "--attack", "fgsm", "--n", 6, "--seed", 3, "--eps", "0.1"]
    assert call("run", *words, "--device", "cpu", "--audit", "--out", "first")[0] == 0
    call("leaderboard", "add", "first")
    ((entry,),) = (board.entries for board in load_boards(Path("leaderboards")))
    assert (entry.reproduce[-8:], entry.audit_again) == (" --audit", "")
    assert call(*shlex.split(entry.reproduce)[1:], "--device", "cpu", "--out", "second")[0] == 0
    assert RunStore.open(Path("second")).spec == RunStore.open(Path("first")).spec
    assert the_audit("second") == the_audit("first")

    assert entry.bundle is not None
    smaller = the_audit("first") | {"n": 5}
    entry = dataclasses.replace(entry, bundle=dataclasses.replace(entry.bundle, audit=smaller))
    assert "--audit" not in entry.reproduce
    few = ["--checks", "zero_gradients", "--device", "cpu", "--out", "again"]
    assert call(*shlex.split(entry.audit_again)[1:], *few)[0] == 0
    for key in ("n", "seed", "spec", "dataset", "norm", "eps", "weights_digest"):
        assert the_audit("again")[key] == smaller[key]


@pytest.mark.parametrize(
    ("change", "of_run"),
    [({}, True), ({"n": 64}, False), ({"seed": 1}, False), ({"eot": 5}, False), ({"device": "cuda"}, True)],
)
def test_an_audit_with_other_settings_than_a_run_takes_has_a_command_of_its_own(
    change: dict[str, Any], of_run: bool, call: Any
) -> None:
    spec: RunSpec = dataclasses.replace(RunStore.open(attack(call, "run")).spec, n=1000, randomized=True, eot=10)
    spec = dataclasses.replace(spec, defense_options={"weights": "my nets/w.safetensors"})
    audit = {"n": 128, "seed": 0, "eot": 10, "eps": 8 / 255} | change
    assert is_audit_of_run(audit, spec) is of_run
    assert repeat_audit_command(audit, spec) == (
        "robench audit --defense 'plug.py:Sigma(sigma=1.0)' --dataset fashion_mnist --norm linf "
        "--weights 'my nets/w.safetensors' --eps 8/255 "
        f"--n {audit['n']} --seed {audit['seed']} --eot {audit['eot']}"
    )
    assert is_audit_of_run(audit, dataclasses.replace(spec, randomized=False)) is (of_run or "eot" in change)


def test_the_command_leaves_out_what_is_the_default_and_names_gradient_modes(call: Any) -> None:
    spec: RunSpec = RunStore.open(attack(call, "run", attacks="quick")).spec
    plain = "robench run --defense 'plug.py:Sigma(sigma=1.0)' --dataset fashion_mnist --norm linf --eps 0.1 "
    assert repeat_command(spec) == f"{plain}--protocol quick-1 --n 8 --seed 0"
    assert repeat_command(dataclasses.replace(spec, cascade=True)).endswith("--seed 0 --cascade")
    standard = dataclasses.replace(spec, protocol="standard-1", cascade=False)
    assert repeat_command(standard).endswith("--seed 0 --no-cascade")
    entries = (AttackEntry("mine@last", "my.py:Mine", "last"), AttackEntry("pgd", "pgd"))
    free = dataclasses.replace(spec, protocol="", attacks=entries)
    assert "--attack my.py:Mine@last,pgd --n" in repeat_command(free)


# failures, tables, weights


def test_the_reason_of_a_failed_attack_is_told(call: Any) -> None:
    words = ["--defense", "plug.py:Sigma", "--attack", "fgsm,plug.py:Fails", "--n", 10, "--device", "cpu"]
    status, out, _ = call("run", *words, "--out", "first")
    assert status == 1
    (told,) = [line for line in out.splitlines() if line.startswith("failed  ")]
    reason = told.removeprefix("failed  fails: ")
    assert re.fullmatch(r"ValueError at plug.py:\d+: the planted failure", reason)
    status, out, _ = call("run", *words, "--out", "second", "--json")
    content = json.loads(out)
    assert content["failures"] == {"fails": reason}
    assert (status, content["complete"], content["robust_accuracy"]) == (1, False, None)
    assert content["majority"]["robust"] is None
    assert content["best_of"]["robust"] == {}
    assert [point["value"] is None for point in content["curve"]] == [False, True]
    assert json.loads(call("run", "--resume", attack(call, "third"), "--json")[1])["failures"] == {}


def test_tables_go_into_a_file_where_one_is_named(call: Any) -> None:
    call("leaderboard", "add", attack(call, "run"))
    printed = call("leaderboard", "build", "--format", "md")[1]
    assert call("leaderboard", "build", "--format", "md", "--out", "new/x.md")[:2] == (0, "new/x.md\n")
    assert Path("new/x.md").read_text() == printed
    ((path, row),) = all_rows(Path("leaderboards"))
    assert path.stem == BOARD
    assert read_bundle(bundle_folder(Path("leaderboards", EVIDENCE), row["evidence"])).row() == {**row, "rank": ""}


def test_training_is_advised_only_where_it_takes_the_data() -> None:
    from robench.defenses.convnet.model import ConvNet

    with pytest.raises(UsageError, match=r"train them: robench train --defense .* --dataset svhn$"):
        _locate(ConvNet, "svhn", None, {"width": 3})
    with pytest.raises(UsageError, match="Pass --weights FILE") as error:
        _locate(ConvNet, "d/good.parquet", None, {})
    assert "robench train" not in str(error.value)
