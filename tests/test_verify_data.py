"""What `verify` says where the images at hand are not those of the run: another part of a split, another digest."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from board_toys import EPS, TOY, forge
from hub_toys import read_fashion, write_test_split

from robench import ThreatModel, data_names
from robench.cli import main
from robench.data import load_dataset
from robench.defense import Defense
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.judge import judge_in_units
from robench.publish import EVIDENCE, all_rows, publish, verify_boards
from robench.registry import load_defense
from robench.result import Evaluation
from robench.unit_table import CLEAN, WORST
from robench.verify import verify, verify_evidence, verify_run
from robench.verify_data import is_shipped_split, tell_other_images

OTHERS = 'cannot be checked: "mnist" here holds other images than those of the run'


def write_mnist(root: Path, start: int, count: int) -> Path:
    """A data folder whose MNIST is a part of Fashion-MNIST."""
    return write_test_split(root, "mnist", read_fashion().slice(start, count))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data of the runs, and another part of the same split."""
    folder = tmp_path_factory.mktemp("parts")
    return write_mnist(folder / "mine", 0, 100), write_mnist(folder / "other", 100, 150)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, parts: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    threat, data = ThreatModel("linf", EPS), load_dataset("mnist", "test", 64, data_dir=parts[0])
    evaluate(load_defense(TOY), "fgsm", threat, data, out=folder, defense_spec=TOY)
    return folder


@pytest.fixture
def boards(finished: Path, parts: tuple[Path, Path], tmp_path: Path) -> Path:
    publish([finished], tmp_path / "boards", parts[0])
    return tmp_path / "boards"


def bundle_of(boards: Path) -> Path:
    (found,) = (boards / EVIDENCE).iterdir()
    return found


def change_digest(manifest: Any, examples: Any, images: Any) -> None:
    manifest["spec"]["data_digest"] = "0" * 64


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_run_on_another_part_of_the_split_cannot_be_checked(finished: Path, parts: tuple[Path, Path]) -> None:
    mine, other = parts
    assert verify_run(finished, device="cpu", data_dir=mine).holds
    with pytest.raises(UsageError, match=rf"{OTHERS} \(150 in its test split\)$"):
        verify_run(finished, device="cpu", data_dir=other)


def test_nor_can_a_row(
    boards: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = parts
    (found,) = verify_boards(boards, all_rows(boards), data_dir=mine, device="cpu", trust=True)
    assert found[2:] == ("holds", "")
    (found,) = verify_boards(boards, all_rows(boards), data_dir=mine, device="cpu", trust=True, images=5)
    assert found[2:] == ("holds", "5 of 64 images judged")
    with pytest.raises(UsageError, match="images must be at least 1"):
        list(verify_boards(boards, all_rows(boards), data_dir=mine, device="cpu", trust=True, images=0))
    (found,) = verify_boards(boards, all_rows(boards), data_dir=other, device="cpu", trust=True)
    assert found[2] == "cannot be checked"
    assert OTHERS in found[3]
    with pytest.raises(UsageError, match=OTHERS):
        verify(bundle_of(boards), device="cpu", data_dir=other, trust=True)
    words = ("--device", "cpu", "--data-dir", other, "--trust")
    assert call(monkeypatch, "verify", bundle_of(boards), *words, "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is None
    assert OTHERS in told["cannot be checked"]
    assert call(monkeypatch, "leaderboard", "verify", "--leaderboards", boards, *words) == 1
    assert f"cannot be checked ({bundle_of(boards)} {OTHERS}" in capsys.readouterr().out


def test_a_digest_that_was_changed_does_not_pass(
    boards: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every other digest mended. What remains the same is said: it is not another draw."""
    folder = forge(bundle_of(boards), change_digest)
    told = "positions and labels are the same, so the pixels differ or the run's digest of them was changed"
    with pytest.raises(UsageError, match=rf"{OTHERS} \(100 in its test split\); {told}$"):
        verify_evidence(folder, device="cpu", data_dir=parts[0], trust=True)
    words = ("--device", "cpu", "--data-dir", parts[0], "--trust")
    assert call(monkeypatch, "verify", folder, *words) == 2
    assert call(monkeypatch, "leaderboard", "check", folder.name, "--leaderboards", boards, *words) != 0
    assert call(monkeypatch, "leaderboard", "verify", "--leaderboards", boards, *words) == 1


def test_where_the_split_is_shipped_a_changed_digest_does_not_hold(tmp_path: Path) -> None:
    """Everybody has the same images, so that there is nothing missing; labels and table are not accused."""
    threat = ThreatModel("linf", EPS)
    evaluate(load_defense(TOY), "fgsm", threat, "fashion_mnist", n=16, out=tmp_path / "run", defense_spec=TOY)
    publish([tmp_path / "run"], tmp_path / "boards")
    report = verify_evidence(forge(bundle_of(tmp_path / "boards"), change_digest), device="cpu", trust=True)
    (failure,) = report.failures
    assert failure.startswith("images are those of the run (robench ships this split; its digest ")


def test_what_fails_without_the_images_does_not_hold(finished: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Other images hide neither a figure that was edited nor the weights of another net."""
    copy = shutil.copytree(finished, tmp_path / "run")
    path = copy / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n": 1000}))
    report = verify_run(copy, device="cpu", data_dir=parts[1])
    assert len(report.failures) == 1
    assert "result.json" in report.failures[0]
    assert 'not checked: images and answers: "mnist" here holds other images' in str(report)

    def claim_weights(manifest: Any, examples: Any, images: Any) -> None:
        manifest["spec"]["weights_digest"] = "0" * 64

    publish([finished], tmp_path / "boards", parts[0])
    folder = forge(bundle_of(tmp_path / "boards"), claim_weights)
    report = verify_evidence(folder, device="cpu", data_dir=parts[1], trust=True)
    assert len(report.failures) == 1
    assert "weights are those of the run" in report.failures[0]


def test_of_cifar10_it_is_said_what_the_published_rows_are_of(finished: Path, parts: tuple[Path, Path]) -> None:
    data = dataclasses.replace(load_dataset("mnist", "test", 64, data_dir=parts[1]), name="cifar10", split_size=10000)
    told = tell_other_images(Evaluation.load(finished), data)
    assert told == (
        '"cifar10" here holds other images than those of the run (10000 in its test split); '
        "robench's rows on cifar10 are of 5,000 of its 10,000 test images: docs/leaderboards.md"
    )
    assert [name for name in data_names.KNOWN if is_shipped_split(name)] == ["fashion_mnist"]
    assert not is_shipped_split("hf:org/name")


def test_a_part_of_the_images_is_judged_where_so_many_are_asked_for(
    finished: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[torch.Tensor] = []

    def watch(defense: Defense, x: torch.Tensor, *settings: Any, **more: Any) -> torch.Tensor:
        judged.append(x)
        return judge_in_units(defense, x, *settings, **more)

    monkeypatch.setattr("robench.verify.judge_in_units", watch)
    report = verify(finished, data_dir=parts[0], images=7)
    assert report.holds
    assert [len(x) for x in judged] == [7, 7]
    assert "the answers on the other 57 of 64 images" in report.notes
    assert any(line.startswith("holds: clean accuracy, of 7 images that the seed draws") for line in report.lines)
    other = verify(finished, data_dir=parts[0], images=7, seed=1)
    assert other.holds
    assert not torch.equal(judged[0], judged[2]), "another seed draws other images"
    assert [note for note in verify(finished, data_dir=parts[0], images=64).notes if "the other" in note] == []
    assert len(judged[-1]) == 64
    with pytest.raises(UsageError, match="images must be at least 1; got 0"):
        verify(finished, data_dir=parts[0], images=0)


def credit_one(manifest: Any, examples: Any, images: Any) -> None:
    """One image that the attack breaks counts as right, under the attack and at worst."""
    rows = list(zip(examples["attack"], examples["index"], examples["label"], examples["votes"], strict=True))
    (broken, *_) = (index for attack, index, label, votes in rows if attack == WORST and not votes[label])
    for row, (attack, index, label, _) in enumerate(rows):
        if index == broken and attack != CLEAN:
            examples["votes"][row] = [int(k == label) for k in range(10)]


def test_a_forged_answer_is_seen_where_its_image_is_drawn(boards: Path, parts: tuple[Path, Path]) -> None:
    """On a part it may lie outside, which the note says."""
    folder = forge(bundle_of(boards), credit_one)
    assert not verify_evidence(folder, data_dir=parts[0], trust=True).holds
    seen = [not verify_evidence(folder, data_dir=parts[0], trust=True, images=16, seed=seed).holds for seed in range(8)]
    assert set(seen) == {True, False}
