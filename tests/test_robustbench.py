"""The bridge to RobustBench's zoo: with a package in its place that wants what the real one wants."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from board_toys import make_boards

from robench import UsageError
from robench.board import Board, load_boards
from robench.bridges import robustbench
from robench.cli import main
from robench.leaderboard import read_rows
from robench.registry import load_attack, load_defense, resolve
from robench.report.tables import as_robustbench, write_robustbench

PACKAGE = """
import pkg_resources
from autoattack import AutoAttack
from autoattack.state import EvaluationState
"""
UTILS = """
from torch import nn

def load_model(name, model_dir, dataset, threat_model):
    if name == "Offline":
        raise OSError("no route to host\\nmore")
    model = {"Tiny": nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))}[name]
    print(f"Downloading {model_dir}/{name}.pt")
    model.came_from = (model_dir, dataset, threat_model)
    return model.train()
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "robustbench"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    (package / "utils.py").write_text(UTILS)
    _install("robustbench", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield package
    _forget()


def _install(name: str, place: Path) -> None:
    """Makes a distribution of the package robustbench in a folder, as pip does."""
    files = sorted((place / "robustbench").glob("*.py"))
    digests = [base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for path in files]
    lines = [
        f"robustbench/{path.name},sha256={digest.rstrip('=')},1\n" for path, digest in zip(files, digests, strict=True)
    ]
    folder = place / f"{name}-3.5.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.5.1\n")
    (folder / "RECORD").write_text("".join(lines) + f"{folder.name}/RECORD,,\n")


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("robustbench", "autoattack")]:
        del sys.modules[name]


def test_a_model_of_the_zoo_is_a_defense(zoo: Path) -> None:
    defense = load_defense("robustbench:Tiny(threat='L2', model_dir='here')", "cifar10")
    assert (defense.name, defense.num_classes, defense.input_shape) == ("robustbench:Tiny", 10, (3, 32, 32))
    assert not defense.training
    assert vars(defense.model)["came_from"] == ("here", "cifar10", "L2")
    assert defense(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert resolve("defense", "robustbench:Tiny") is type(defense)
    assert "autoattack" not in sys.modules  # what stood in for it is gone


def test_what_the_zoo_prints_goes_to_standard_error(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_defense("robustbench:Tiny", "cifar10")
    assert capsys.readouterr() == ("", "Downloading models/Tiny.pt\n")


@pytest.mark.parametrize(
    ("spec", "dataset", "message"),
    [
        ("robustbench:Tny", "cifar10", 'no model "Tny" for cifar10 in Linf'),
        ("robustbench:Offline", "cifar10", "no route to host. Put its file at models/cifar10/Linf/Offline.pt"),
        ("robustbench:Tiny", "mnist", "needs dataset cifar10"),
        ("robustbench:Tiny(threat='linf')", "cifar10", "threat Linf, L2; got cifar10 and linf"),
        ("robustbench:Tiny(weights='w.pt')", "cifar10", "its weights are the zoo's"),
    ],
)
def test_wrong_input(spec: str, dataset: str, message: str, zoo: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_defense(spec, dataset)


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(UsageError, match=r"needs the package robustbench .*pip install 'robench\[robustbench\]'"):
        load_defense("robustbench:Carmon2019Unlabeled", "cifar10")


def test_a_package_that_cannot_be_imported_is_named(zoo: Path) -> None:
    (zoo / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(UsageError, match="torchvision::nms does not exist"):
        load_defense("robustbench:Tiny", "cifar10")


def test_the_copy_that_torchattacks_brings_is_not_taken_for_it(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "robustbench-3.5.1.dist-info").rename(tmp_path / "torchattacks-3.5.1.dist-info")
    metadata = tmp_path / "torchattacks-3.5.1.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: torchattacks\nVersion: 3.5.1\n")
    with pytest.raises(UsageError) as caught:
        load_defense("robustbench:Tiny", "cifar10")
    assert str(caught.value) == (
        f'defense "robustbench:Tiny" needs the package robustbench (the one in {zoo.resolve()} is a copy that '
        "torchattacks brings along): pip install 'robench[robustbench]'"
    )
    assert "robustbench" not in sys.modules


def test_a_package_of_no_distribution_is_not_taken_for_it(zoo: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "robustbench-3.5.1.dist-info")
    with pytest.raises(UsageError, match=r"belongs to no installed robustbench\): pip install 'robench"):
        load_defense("robustbench:Tiny", "cifar10")


def test_torchattacks_in_the_same_folder(zoo: Path, tmp_path: Path) -> None:
    """The last of the two to be installed has written the files; to take torchattacks away takes them too."""
    own = (zoo / "utils.py").read_text()
    (zoo / "utils.py").write_text("raise ImportError('an old copy')")
    _install("torchattacks", tmp_path)
    again = r"pip install --force-reinstall --no-deps robustbench"
    with pytest.raises(UsageError, match=rf"torchattacks has overwritten its files\): {again}"):
        load_defense("robustbench:Tiny", "cifar10")
    (zoo / "utils.py").write_text(own)
    assert load_defense("robustbench:Tiny", "cifar10").num_classes == 10
    _forget()
    (zoo / "utils.py").unlink()
    with pytest.raises(UsageError, match=rf"utils.py is missing\): {again}"):
        load_defense("robustbench:Tiny", "cifar10")
    (zoo / "__init__.py").unlink()  # a folder that is still a package, unless another copy is found
    with pytest.raises(UsageError, match=again):
        load_defense("robustbench:Tiny", "cifar10")


def test_a_copy_of_torchattacks_that_is_found_first(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / "first"
    shutil.copytree(zoo, first / "robustbench")
    _install("torchattacks", first)
    monkeypatch.syspath_prepend(str(first))
    with pytest.raises(UsageError, match=r"torchattacks brings a copy that is found first, in .*first/robustbench\)"):
        load_defense("robustbench:Tiny", "cifar10")


def test_a_checkout_and_a_package_changed_by_hand_are_let_be(zoo: Path, tmp_path: Path) -> None:
    (zoo / "__init__.py").write_text("")
    assert load_defense("robustbench:Tiny", "cifar10").num_classes == 10
    _forget()
    (tmp_path / "robustbench-3.5.1.dist-info" / "RECORD").write_text("")  # as an editable install has it
    assert load_defense("robustbench:Tiny", "cifar10").num_classes == 10


def test_it_has_no_attacks() -> None:
    with pytest.raises(UsageError, match="is to defenses"):
        load_attack("robustbench:AutoAttack")


def test_stand_ins_leave_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with robustbench._stand_ins():
        assert "autoattack" in sys.modules
        before = sys.modules["json"]
    assert sys.modules["json"] is before


BOARD = "fashion_mnist-linf-0.03"


def test_export_takes_rows_that_their_evidence_backs(tmp_path: Path) -> None:
    board = _of_standard(load_boards(make_boards(tmp_path), [BOARD])[0])
    (info,) = json.loads(as_robustbench(board))  # the hostile, masked and partial rows have no evidence
    (row,) = [entry.row for entry in board.entries if not entry.problem]
    assert (info["name"], info["dataset"], info["eps"], info["unreliable"]) == (
        "prototypes",
        "fashion_mnist",
        "0.03",
        row["audit_verdict"] == "masked",
    )
    assert float(info["external"]) == pytest.approx(100 * float(row["robust_acc"]), abs=0.005)
    assert f"{100 * float(row['robust_low']):.2f} to {100 * float(row['robust_high']):.2f}" in info["footnote"]
    assert not info.keys() & {"reported", "autoattack_acc"}
    assert (info["additional_data"], info["number_forward_passes"]) == (None, None)  # a row knows neither


def test_export_takes_rows_of_full_protocols(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = _of_standard(load_boards(make_boards(tmp_path), [BOARD])[0])
    (entry,) = [entry for entry in board.entries if not entry.problem]
    names = "standard-1", "thorough-1", "quick-1", ""
    many = {**entry.row, "n": "1000"}  # of fewer images another line is told
    rows = tuple(replace(entry, row={**many, "protocol": name}) for name in names)
    infos = json.loads(as_robustbench(replace(board, entries=rows)))
    assert [info["footnote"].partition(",")[0] for info in infos] == ["robench standard-1", "robench thorough-1"]
    told = f"{BOARD}: 2 rows are left out of what RobustBench gets: not of standard-1 or thorough-1"
    assert caplog.messages == [told]
    assert [json.loads(as_robustbench(replace(board, entries=rows[2:]))), len(caplog.messages)] == [[], 2]
    as_robustbench(replace(board, entries=rows[:2]))
    assert len(caplog.messages) == 2


def test_export_names_rows_of_few_images_or_without_a_passed_audit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only those that are written; a footnote is all that the format has for it."""
    board = _of_standard(load_boards(make_boards(tmp_path), [BOARD])[0])
    (entry,) = [entry for entry in board.entries if not entry.problem]
    cells = [
        {"defense": "whole", "n": "1000", "audit_verdict": "pass"},
        {"defense": "few", "n": "999", "audit_verdict": "pass"},
        {"defense": "doubted", "n": "1000", "audit_verdict": "suspect"},
        {"defense": "quick", "n": "64", "audit_verdict": "pass", "protocol": "quick-1"},
        {"defense": "partial", "n": "64", "audit_verdict": "pass", "robust_acc": ""},
    ]
    rows = tuple(replace(entry, row={**entry.row, **one}) for one in cells)
    as_robustbench(replace(board, entries=(*rows, replace(rows[1], problem="not backed"))))
    left_out, named = caplog.messages
    assert "1 row is left out" in left_out
    assert named == (
        f"{BOARD}: of fewer than 1,000 images, or with an audit that is not pass; RobustBench has a footnote alone for "
        "it: few, standard-1 (999 images, audit: pass); doubted, standard-1 (1000 images, audit: suspect)"
    )
    as_robustbench(replace(board, entries=rows[:1]))
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("words", [[], ["--out", "model_info"]])
def test_export_of_the_published_board_names_them_in_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(__file__).parents[1] / "leaderboards"
    board = "fashion_mnist-linf-0.1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robench", "leaderboard", "export", board, "--leaderboards", str(folder), *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    (line,) = [line for line in caplog.messages if "footnote" in line]
    weak = {
        row["defense"]
        for row in read_rows(folder / f"{board}.csv")
        if row["protocol"] == "standard-1" and (int(row["n"]) < 1000 or row["audit_verdict"] != "pass")
    }
    assert weak
    assert {part.strip().partition(",")[0] for part in line.partition("for it: ")[2].split(";")} == weak


def _of_standard(board: Board) -> Board:
    """A leaderboard as if all its rows were of the protocol."""
    entries = [replace(entry, row={**entry.row, "protocol": "standard-1"}) for entry in board.entries]
    return replace(board, entries=tuple(entries))


def test_a_file_for_each_row_as_robustbench_reads_them(tmp_path: Path) -> None:
    """Its list takes each accuracy that is there for a number, and asks for `venue`."""
    boards = make_boards(tmp_path)
    board = _of_standard(load_boards(boards, [BOARD])[0])
    (entry,) = [entry for entry in board.entries if not entry.problem]
    twice = replace(board, entries=(entry, replace(entry, row={**entry.row, "protocol": "thorough-1"}), entry))
    written = write_robustbench(twice, tmp_path / "model_info")
    assert len(written) == 3
    assert {path.parent for path in written} == {tmp_path / "model_info" / "fashion_mnist" / "Linf"}
    for path in written:
        info = json.loads(path.read_text())
        assert info["venue"] == ""
        shares = [float(info[key]) / 100 for key in ("external", "autoattack_acc", "clean_acc") if key in info]
        assert len(shares) == 2
        assert all(0 <= share <= 1 for share in shares)
    with pytest.raises(UsageError, match=r"RobustBench has leaderboards in linf, l2; .* is of l1"):
        as_robustbench(replace(board, norm="l1"))
