"""What a published row must have: each requirement refuses a row that lacks it, and lets the whole one pass."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_toys import EPS, HOSTILE, forge, make_row, write_audit

from robench import ThreatModel, submission, verify
from robench.audit import CHECKS, audit
from robench.audit.effort import REDUCED, USUAL, may_have_effort
from robench.bundle import bundle_folder, read_bundle
from robench.cli import main
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.leaderboard import add_row, rank_rows, read_rows, rows_csv
from robench.publish import publish
from robench.registry import load_defense
from robench.submission import Redo, check_form, check_submission, digest_of
from robench.unit_table import CLEAN, WORST
from robench.verify import Report

TOY = "engine_toys:Prototypes"
"""Named so that others can load it, other than by a path on this machine."""


def submit(
    folder: Path, n: int = 64, attacks: str = "quick-1", audited: int = 32, eps: float = EPS
) -> tuple[Path, str]:
    """A leaderboard with one row; its folder and the evidence's digest."""
    threat = ThreatModel("linf", eps)
    evaluate(load_defense(TOY), attacks, threat, "fashion_mnist", n=n, out=folder / "run", defense_spec=TOY)
    if audited:
        write_audit(folder / "audit", audited, eps)
    publish([folder / "run", *([folder / "audit"] if audited else [])], folder / "boards")
    ((digest,),) = [[one.name for one in (folder / "boards" / "evidence").iterdir()]]
    return folder / "boards", digest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return submit(tmp_path_factory.mktemp("whole"))


def refused(report: Report) -> list[str]:
    return [failure.partition(" (")[0] for failure in report.failures]


def test_a_whole_row_is_taken(whole: tuple[Path, str]) -> None:
    boards, digest = whole
    report = check_submission(boards, digest, device="cpu", trust=True)
    assert report.holds, report.failures
    assert len(report.lines) == 21 + 14


def test_code_of_others_is_not_run_unasked(whole: tuple[Path, str]) -> None:
    with pytest.raises(UsageError, match="--trust"):
        check_submission(*whole, device="cpu")


@pytest.mark.parametrize(
    ("n", "attacks", "audited", "reason"),
    [
        (20, "quick-1", 32, "there are enough images"),
        (64, "quick-1", 31, "the audit had enough images"),
        (64, "fgsm", 32, "the protocol is a published one"),
        (64, "quick-1", 0, "there is an audit"),
    ],
)
def test_what_is_missing_is_named(n: int, attacks: str, audited: int, reason: str, tmp_path: Path) -> None:
    report = check_submission(*submit(tmp_path, n, attacks, audited), device="cpu", trust=True)
    assert reason in refused(report)


def submit_with(folder: Path, change: dict[str, Any]) -> tuple[Path, str]:
    """As `submit`, with an audit that says otherwise; a key whose value is None is left out."""
    threat = ThreatModel("linf", EPS)
    evaluate(load_defense(TOY), "quick-1", threat, "fashion_mnist", n=64, out=folder / "run", defense_spec=TOY)
    write_audit(folder / "audit", 32)
    path = folder / "audit" / "audit.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    publish([folder / "run", folder / "audit"], folder / "boards")
    (evidence,) = (folder / "boards" / "evidence").iterdir()
    return folder / "boards", evidence.name


def test_an_effort_that_the_defense_chose_is_refused(tmp_path: Path) -> None:
    """Of a defense that robench does not ship; nor may an audit leave its effort out."""
    defense = load_defense(TOY)
    defense.first_look = {"n": 32}
    reduced = audit(defense, ThreatModel("linf", EPS), "fashion_mnist", checks=["zero_gradients"]).to_json()
    assert reduced["n"] == 32
    claim = "the audit is of an effort it may have"
    for number, effort in enumerate((reduced["effort"], None)):
        boards, digest = submit_with(tmp_path / str(number), {"effort": effort})
        assert refused(check_form(boards, digest)[0]) == [claim]
    bundle = read_bundle(boards / "evidence" / digest)
    whys = {TOY: "DOES NOT HOLD: {} (not told: audit again)", "jem": "holds: {} (not told; robench ships the defense)"}
    for name, told in whys.items():
        report = Report(bundle.folder)
        submission._check_audit(report, replace(bundle, spec=replace(bundle.spec, defense=name)))
        assert told.format(claim) in report.lines


def passing(**verdicts: str) -> list[dict[str, Any]]:
    """Findings that pass, but for some."""
    names = [*CHECKS, *(name for name in verdicts if name not in CHECKS)]
    return [{"check": name, "reason": "", "paper": "", "verdict": verdicts.get(name, "pass")} for name in names]


IDLE = dict.fromkeys(CHECKS, "not run")


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"seed": 17}, ["the audit is of seed 0"]),  # its 32 images may have been shopped for, as those of the run
        ({"findings": passing(binarisation="not run")}, []),
        ({"findings": passing(retries="not run")}, []),  # asks after the draws of a randomized defense
        ({"findings": passing(square="not run")}, ["the audit ran every check that it can"]),
        ({"findings": passing(**IDLE)[:-1] + passing()[-1:]}, ["the audit ran every check that it can"]),
        ({"findings": [*passing(), passing()[0]]}, ["the audit made every check once"]),
        ({"findings": passing(other="pass")}, ["the audit made every check once"]),
        ({"findings": [{**one, "reason": "\x1b[2J"} for one in passing()]}, ["no text holds a control character"]),
    ],
)
def test_an_audit_that_tells_less_than_it_must_is_refused(
    change: dict[str, Any], reasons: list[str], tmp_path: Path
) -> None:
    report, _ = check_form(*submit_with(tmp_path, {**change, "verdict": "pass", "failed": []}))
    assert refused(report) == reasons


@pytest.mark.parametrize("eot", [1, "10"])
def test_an_audit_of_a_randomized_defense_with_too_few_draws_is_refused(
    eot: object, whole: tuple[Path, str], tmp_path: Path
) -> None:
    def draw(manifest: Any, examples: Any, images: Any) -> None:
        manifest["spec"]["randomized"] = True

    boards, digest = whole
    folder = forge(shutil.copytree(boards / "evidence" / digest, tmp_path / "evidence" / digest), draw)
    bundle = read_bundle(folder)
    report = Report(folder)
    submission._check_audit(report, replace(bundle, audit={**(bundle.audit or {}), "eot": eot}))
    assert "the audit had enough draws" in refused(report)


def test_a_borrowed_or_hidden_name_and_hidden_options_are_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    boards, digest = whole
    for number, (change, reason) in enumerate(
        [
            ({"defense_name": "convnet_at"}, "the defense has a name of its own"),
            ({"defense_options": {"gain": 0.2}}, "the defense's options stand in its name"),
            ({"defense_name": "toy\a"}, "no text holds a control character"),
            ({"defense_name": "toy \u202eta_tenvnoc"}, "no text holds a control character"),  # shown as convnet_at
        ]
    ):
        copy = shutil.copytree(boards / "evidence" / digest, tmp_path / str(number) / "evidence" / digest)
        forged = forge(copy, lambda manifest, examples, images, change=change: manifest["spec"].update(change))
        assert reason in refused(check_form(tmp_path / str(number), forged.name)[0])


def test_two_rows_of_one_defense_are_refused(tmp_path: Path) -> None:
    """Of which the luckier one would lead; `add` lets one replace the other."""
    boards, digest = submit(tmp_path)
    (path,) = boards.glob("*.csv")
    (row,) = read_rows(path)
    path.write_text(rows_csv(rank_rows([row, {**row, "n": "128", "evidence": "0" * 16}])))
    assert refused(check_form(boards, digest)[0]) == ["no other row is of this defense, protocol and weights"]


def test_a_row_that_stands_on_another_board_too_is_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    """As under a larger bound, where its figure would lead."""
    boards, digest = Path(shutil.copytree(whole[0], tmp_path / "boards")), whole[1]
    (path,) = boards.glob("*.csv")
    shutil.copy(path, path.with_name("fashion_mnist-linf-0.3.csv"))
    report, found = check_form(boards, digest)
    assert report.failures == ["the row's rank and evidence are its own (2 rows have this evidence)"]
    assert found is None


def test_a_defense_whose_images_share_draws_unseen_is_refused(tmp_path: Path) -> None:
    """Its interval takes the images' answers as independent, as they are where they were judged one by one."""
    threat = ThreatModel("linf", EPS)
    for toy, held in (("GrainyMood", False), ("Moody", True), ("Blindfold", True)):
        name, folder = f"engine_toys:{toy}", tmp_path / toy
        options: dict[str, Any] = {"n": 100, "out": folder / "run", "defense_spec": name}
        evaluate(load_defense(name), "quick-1", threat, "fashion_mnist", **options)
        write_audit(folder / "audit", 32, defense=load_defense(name))
        publish([folder / "run", folder / "audit"], folder / "boards")
        (evidence,) = (folder / "boards" / "evidence").iterdir()
        report = check_submission(folder / "boards", evidence.name, device="cpu", trust=True)
        assert refused(report) == ["answers are drawn for each image"] * (not held)


def test_what_robench_ships_may_ask_for_less() -> None:
    assert may_have_effort("shortrun(steps=10)", REDUCED)
    assert may_have_effort("jem", None)
    assert may_have_effort(TOY, USUAL)
    assert not may_have_effort(TOY, REDUCED)
    assert not may_have_effort("", REDUCED)
    assert not may_have_effort(TOY, replace(USUAL, queries=1))


def test_a_row_written_by_hand_is_named(whole: tuple[Path, str], tmp_path: Path) -> None:
    boards, digest = submit(tmp_path)
    (path,) = boards.glob("*.csv")
    content = path.read_text()
    path.write_text(content.replace("quick-1", "thorough-1"))
    assert "row is that of the evidence" in refused(check_submission(boards, digest, device="cpu", trust=True))
    path.write_text(content.replace("\n1,", "\n2,"))
    assert refused(check_submission(boards, digest, device="cpu", trust=True)) == [
        f"{path.name} is as 'robench leaderboard add' writes it",
        "the row's rank and evidence are its own",
    ]
    path.write_text(content.splitlines()[0] + "\n")
    assert refused(check_submission(boards, digest, device="cpu", trust=True)) == [
        f"{path.name} has one row with this evidence"
    ]


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    boards, digest = submit(tmp_path)
    (bundle_folder(boards / "evidence", digest) / "audit.json").write_text("{}")
    assert refused(check_submission(boards, digest, device="cpu")) == ["the evidence can be read"]


def test_large_evidence_is_refused(whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LARGEST", 1000)
    assert "the evidence is small" in refused(check_submission(*whole, device="cpu", trust=True))


def publish_forged(boards: Path, digest: str, change: Any) -> str:
    """Puts a forged bundle and its row in the place of the only ones; returns its digest."""
    (path,) = boards.glob("*.csv")
    path.unlink()
    forged = read_bundle(forge(bundle_folder(boards / "evidence", digest), change))
    add_row({**forged.row(), "rank": ""}, path)
    return forged.digest


@pytest.mark.parametrize("is_whole", [False, True])
def test_images_of_a_seed_of_one_s_own_are_refused_unless_they_are_all(is_whole: bool, tmp_path: Path) -> None:
    """Evidence that calls its draw the whole split has other images than its seed and count give."""

    def shop(manifest: Any, examples: Any, images: Any) -> None:
        manifest["spec"]["seed"] = 17
        if is_whole:
            places = {index: place for place, index in enumerate(images["index"])}
            for table in (examples, images):
                table["index"] = [places[index] for index in table["index"]]

    boards, digest = submit(tmp_path)
    digest = publish_forged(boards, digest, shop)
    claim = "the images are the draw of seed 0, or the whole split"
    assert refused(check_form(boards, digest)[0]) == [claim] * (not is_whole)
    if is_whole:
        assert "images are those of the run" in refused(check_submission(boards, digest, device="cpu", trust=True))


def test_a_row_of_other_images_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where robench does not ship the split, another one may be meant: the check cannot be made, and does not hold."""

    def claim_images(manifest: Any, examples: Any, images: Any) -> None:
        manifest["spec"]["data_digest"] = "0" * 64

    boards, digest = submit(tmp_path)
    digest = publish_forged(boards, digest, claim_images)
    assert check_form(boards, digest)[0].holds
    report = check_submission(boards, digest, device="cpu", trust=True)
    assert refused(report) == ["images are those of the run"]
    monkeypatch.setattr(verify, "is_shipped_split", lambda _: False)
    with pytest.raises(UsageError, match=r"cannot be checked: .*the run's digest of them was changed"):
        check_submission(boards, digest, device="cpu", trust=True)
    assert call(monkeypatch, "check", digest, "--leaderboards", boards, "--device", "cpu", "--trust") == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"defense_options": {"weights": "/home/me/w.safetensors"}}, "/home/me/w.safetensors"),
        ({"defense_options": {"weights": "nets/../../w.safetensors"}}, "nets/../../w.safetensors"),
        ({"defense_options": {"weights": r"C:\nets\w.safetensors"}}, r"C:\nets\w.safetensors"),
        ({"defense": f"{TOY}(weights='~/w.safetensors')"}, "~/w.safetensors"),
        ({"defense": "/home/me/toy.py:Prototypes"}, "/home/me/toy.py:Prototypes"),
        ({"dataset": "/home/me/toy.parquet"}, "/home/me/toy.parquet"),
        ({"defense_options": {"weights": "nets/w.safetensors"}}, ""),
        ({"defense": "plugins/toy.py:Prototypes(weights='nets/w.safetensors')"}, ""),
        ({"dataset": "hf:org/toy"}, ""),
    ],
)
def test_what_lies_on_one_machine_alone_is_named(
    change: dict[str, Any], named: str, whole: tuple[Path, str], tmp_path: Path
) -> None:
    boards, digest = whole
    copy = shutil.copytree(boards / "evidence" / digest, tmp_path / "evidence" / digest)
    forged = forge(copy, lambda manifest, examples, images: manifest["spec"].update(change))
    report, _ = check_form(tmp_path, forged.name)
    claim = "defense, weights and data lie in the repository, if in files"
    lines = [line for line in report.failures if claim in line]
    assert len(lines) == bool(named)
    assert all(f"(not so: {named}; weights are shipped as weights/" in line for line in lines)


def leave_alone(count: int) -> Any:
    """So many of the images that an attack broke are the originals, with the answers of these under every attack."""

    def change(manifest: Any, examples: Any, images: Any) -> None:
        rows = list(enumerate(zip(examples["attack"], examples["index"], strict=True)))
        clean = {index: examples["votes"][row] for row, (attack, index) in rows if attack == CLEAN}
        worst = {index: examples["votes"][row] for row, (attack, index) in rows if attack == WORST}
        left = [index for index in clean if clean[index] != worst[index]][:count]
        for row, (_, index) in rows:
            if index in left:
                examples["votes"][row] = clean[index]
        for place, index in enumerate(images["index"]):
            if index in left:
                images["pixels"][place], images["encoding"][place] = bytes(28 * 28), "steps"
        manifest["encodings"] = dict(Counter(images["encoding"]))

    return change


def test_images_that_nobody_attacked_are_found_by_attacking_them(tmp_path: Path) -> None:
    boards, digest = submit(tmp_path, eps=0.1)
    honest = check_submission(boards, digest, device="cpu", trust=True, redo=Redo(48, seed=1))
    assert honest.holds, honest.failures
    assert "attacked again" in honest.lines[-1]
    forged = publish_forged(boards, digest, leave_alone(64))
    by_judging = check_submission(boards, forged, device="cpu", trust=True)
    assert by_judging.holds, by_judging.failures
    attacked = check_submission(boards, forged, device="cpu", trust=True, redo=Redo(48, seed=1))
    assert refused(attacked) == ["attacked again, the row claims no more"]


def test_ten_of_64_images_that_nobody_attacked_are_found(tmp_path: Path) -> None:
    """By their count; the interval of a mean of 64 numbers would be too wide, since 10 / 64 - 3.2 * 0.046 < 0.02."""
    boards, digest = submit(tmp_path, eps=0.1)
    forged = publish_forged(boards, digest, leave_alone(10))
    report = check_submission(boards, forged, device="cpu", trust=True, redo=Redo(64, seed=1))
    (failure,) = report.failures
    assert failure.endswith(
        "10 more are broken, of which chance explains 6; 16 points too much show in nine of ten checks)"
    )


@pytest.mark.parametrize(("gap", "held"), [(0.0, True), (0.1, True), (0.22, False)])
def test_a_randomized_row_is_compared_by_its_mean(gap: float, held: bool) -> None:
    """With a scatter of 0.2 over 16 images half an interval is 3.73 * 0.2 * (16 / 15)**0.5 / 4 = 0.193."""
    scatter = np.tile([0.2, -0.2], 8)
    found = submission._compare(0.5 + gap + scatter, np.full(16, 0.5), randomized=True)
    assert found == (held, "more than 21 points too much would show")


@pytest.mark.parametrize("attack", [-1, 1])
def test_one_image_says_nothing(attack: int) -> None:
    with pytest.raises(UsageError, match=f"attack must be 0, or at least 2 images; got {attack}"):
        Redo(attack)


@pytest.mark.parametrize(("toy", "hidden"), [("Prototypes", []), ("Stairs", ["zero_gradients"])])
def test_a_verdict_that_an_audit_did_not_give_is_found_by_auditing(
    toy: str, hidden: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"engine_toys:{toy}"
    threat, run = ThreatModel("linf", EPS), tmp_path / "run"
    evaluate(load_defense(spec), "quick-1", threat, "fashion_mnist", n=64, out=run, defense_spec=spec)
    write_audit(tmp_path / "audit", 32, defense=load_defense(spec))
    publish([run, tmp_path / "audit"], tmp_path / "boards")
    ((digest,),) = [[one.name for one in (tmp_path / "boards" / "evidence").iterdir()]]
    few = {name: CHECKS[name] for name in ("zero_gradients", "noise")}
    monkeypatch.setattr(importlib.import_module("robench.audit"), "CHECKS", few)
    report = check_submission(tmp_path / "boards", digest, device="cpu", trust=True, redo=Redo(audit=True, seed=1))
    assert refused(report) == ["audited again, no other check fails"] * bool(hidden)
    now = "masked, seed 1; zero_gradients" if hidden else "pass, seed 1"
    assert f"audited again, no other check fails (pass, now {now}" in report.lines[-1]


@pytest.mark.parametrize("text", ["", "../..", "leaderboards", HOSTILE])
def test_no_digest(text: str) -> None:
    with pytest.raises(UsageError, match="no digest"):
        digest_of(text)


@pytest.mark.parametrize("cell", ["", "../../../../etc", "0" * 16, "0" * 15 + "/"])
def test_an_evidence_cell_does_not_leave_the_folder(cell: str, tmp_path: Path) -> None:
    add_row(make_row(evidence=cell), tmp_path / "mnist-linf-0.3.csv")
    with pytest.raises(UsageError, match="there is no evidence"):
        bundle_folder(tmp_path / "evidence", cell)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", "leaderboard", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_commands(
    whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    boards, digest = whole
    place = ("--leaderboards", boards)
    assert call(monkeypatch, "check", boards / "evidence" / digest, *place, "--trust", "--json") == 0
    assert json.loads(capsys.readouterr().out)["holds"]
    assert call(monkeypatch, "verify", *place, "--sample", 1, "--trust") == 0
    assert capsys.readouterr().out.rstrip().endswith(": holds")
    assert call(monkeypatch, "verify", *place, "--json") == 1
    assert json.loads(capsys.readouterr().out)["rows"][0]["verdict"] == "cannot be checked"
    assert call(monkeypatch, "build", *place, "--format", "md") == 0
    assert "| 1 | prototypes |" in capsys.readouterr().out
    assert call(monkeypatch, "build", *place, "--format", "pdf") == 2
    assert "--format must be html, csv, md, latex, json, robustbench" in capsys.readouterr().err
    assert call(monkeypatch, "build", *place, "--out", tmp_path / "page.html") == 0
    assert "robench leaderboards" in (tmp_path / "page.html").read_text()
    assert call(monkeypatch, "verify", "--leaderboards", tmp_path) == 2
    assert "there is no leaderboard row" in capsys.readouterr().err
