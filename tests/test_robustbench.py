"""The bridge to RobustBench's zoo: with a package in its place that wants what the real one wants."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from board_toys import make_boards

from robench import UsageError
from robench.board import load_boards
from robench.bridges import robustbench
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
    model.came_from = (model_dir, dataset, threat_model)
    return model.train()
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "robustbench"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    (package / "utils.py").write_text(UTILS)
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield package
    _forget()


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
    (board,) = load_boards(make_boards(tmp_path), [BOARD])
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


def test_a_file_for_each_row_as_robustbench_reads_them(tmp_path: Path) -> None:
    """Its list takes each accuracy that is there for a number, and asks for `venue`."""
    boards = make_boards(tmp_path)
    (board,) = load_boards(boards, [BOARD])
    (entry,) = [entry for entry in board.entries if not entry.problem]
    twice = replace(board, entries=(entry, replace(entry, row={**entry.row, "protocol": "quick-1"}), entry))
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
