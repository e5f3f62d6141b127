"""What an evaluation gives: figures, files that read back the same, and a claim that can be checked again."""

from __future__ import annotations

import json
from pathlib import Path

import engine_toys
import numpy as np
import pytest
from engine_toys import (
    Bad,
    Blindfold,
    GrainyCorner,
    Linear,
    Noisy,
    OneCorner,
    Prototypes,
    Thresholds,
    grid_images,
    some_wrong,
)

from robench.defense import Defense
from robench.errors import DataError, UsageError
from robench.evaluate import evaluate
from robench.registry import load_attack
from robench.result import Evaluation
from robench.runners.work import _prepare as prepare_worker
from robench.threat import ThreatModel
from robench.unit_table import WORST
from robench.verify import verify_run

LINF = ThreatModel("linf", 0.1)


@pytest.mark.parametrize(
    ("defense", "threats"),
    [
        (Linear(), [ThreatModel("linf", 0.1), ThreatModel("linf", 0.2)]),
        (Noisy(), [LINF]),
        (Linear(), [ThreatModel("l2", 1)]),  # an int is a float: the digest in the unit files takes it as text
    ],
    ids=["curve", "randomized", "whole eps"],
)
def test_save_and_load_give_the_same_evaluation(defense: Defense, threats: list[ThreatModel], tmp_path: Path) -> None:
    result = evaluate(defense, "fgsm,pgd(steps=2)", threats, some_wrong(7), unit_size=3, eot=2, judge_repeats=4)
    assert result.folder is None
    folder = result.save(tmp_path / "run")
    again = Evaluation.load(folder)
    assert again.spec == result.spec
    assert again.table.equals(result.table)
    assert again.to_json() == result.to_json()
    for threat in threats:
        assert np.array_equal(again.images(WORST, threat.eps), result.images(WORST, threat.eps))
    stored = evaluate(
        defense,
        "fgsm,pgd(steps=2)",
        threats,
        some_wrong(7),
        unit_size=3,
        eot=2,
        judge_repeats=4,
        out=tmp_path / "other",
    )
    assert stored.table.equals(result.table)
    names = [sorted(path.name for path in (one / "units").iterdir()) for one in (folder, tmp_path / "other")]
    assert names[0] == names[1]  # and so their digests
    with pytest.raises(UsageError, match="holds a run already"):
        result.save(tmp_path / "other")


def test_printed_it_tells_its_figures_and_what_failed() -> None:
    result = evaluate(Linear(), "fgsm", LINF, grid_images(4))
    told = f"linear on images of the caller, 4 images, {LINF}; clean {result.clean_accuracy}; "
    assert str(result) == f"{told}robust {result.robust_accuracy}"
    assert repr(result) == f"<Evaluation: {result}>"
    failed = evaluate(Linear(), ["fgsm", Bad()], LINF, grid_images(4))
    assert str(failed) == f"{told}robust not known; failed: bad"


def test_a_copy_keeps_the_day_of_the_run(tmp_path: Path) -> None:
    result = evaluate(Linear(), "fgsm", LINF, grid_images(3), out=tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(json.dumps({**content, "created": "2001-02-03"}))
    result = Evaluation.load(tmp_path / "run")
    assert Evaluation.load(result.save(tmp_path / "copy")).row()["date"] == result.row()["date"] == "2001-02-03"
    assert (tmp_path / "copy" / "run.json").read_text().count("2001-02-03") == 1


def test_save_needs_a_folder() -> None:
    with pytest.raises(DataError, match="no run folder; give one"):
        evaluate(Linear(), "fgsm", LINF, grid_images(2)).save()


def test_json_has_every_key_of_the_contract() -> None:
    content = evaluate(Noisy(), "fgsm,pgd(steps=2)", LINF, grid_images(5), seed=4, eot=2, judge_repeats=5).to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    for part in (content["clean_accuracy"], content["robust_accuracy"], *content["per_attack"].values()):
        assert list(part) == ["value", "low", "high"]
        assert 0 <= part["low"] <= part["value"] <= part["high"] <= 1
    assert list(content["per_attack"]) == ["fgsm", "pgd(steps=2)"]
    assert {key: content[key] for key in ("n", "seed", "eot", "judge_repeats", "complete", "defense", "dataset")} == {
        "n": 5, "seed": 4, "eot": 2, "judge_repeats": 5, "complete": True, "defense": "noisy", "dataset": ""
    }  # fmt: skip
    assert content["threat"] == {"norm": "linf", "eps": 0.1}
    assert set(content["best_of"]["robust"]) == {"2", "5"}
    assert content["row"]["robust_acc"] == f"{content['robust_accuracy']['value']:.4f}"
    assert [point["eps"] for point in content["curve"]] == [0.0, 0.1]


def test_queries_are_those_of_all_attacks_up_to_a_bound() -> None:
    bounds = [ThreatModel("linf", 0.0), ThreatModel("linf", 0.01)]
    result = evaluate(Linear(), "fgsm,pgd(steps=3, stop_early=False)", bounds, some_wrong(10))
    once = {"forwards": (1 + 4) * 8 / 10, "backwards": (1 + 3) * 8 / 10}  # 2 of 10 are skipped
    assert result.queries(0.0) == once
    assert result.queries() == {kind: 2 * passes for kind, passes in once.items()}  # what stands behind the figure


def test_verify_confirms_a_run_and_finds_a_changed_one(tmp_path: Path) -> None:
    toys = engine_toys.__file__
    for defense, name in ((Prototypes(), "Prototypes"), (Blindfold(), "Blindfold")):
        evaluate(
            defense,
            "fgsm,pgd(steps=2)",
            ThreatModel("linf", 0.05),
            "fashion_mnist",
            n=20,
            out=tmp_path / name,
            defense_spec=f"{toys}:{name}",
            eot=2,
        )
        report = verify_run(tmp_path / name)
        assert report.holds, report.failures
        assert len(report.lines) == 9 + 2 * defense.randomized
    path = tmp_path / "Prototypes" / "run.json"
    path.write_text(path.read_text().replace("Prototypes", "Blindfold"))
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        verify_run(tmp_path / "Prototypes")


def test_verify_says_where_there_are_no_weights_to_compare(tmp_path: Path) -> None:
    spec = f"{engine_toys.__file__}:Thresholds"
    evaluate(Thresholds().eval(), "noise", LINF, "fashion_mnist", n=4, out=tmp_path / "run", defense_spec=spec)
    report = verify_run(tmp_path / "run")
    assert report.holds, report.failures
    assert not [line for line in report.lines if "weights" in line]
    assert str(report).count("not checked: the weights: the defense has none that robench can see") == 1


def test_verify_knows_that_the_images_of_a_pass_may_share_draws(tmp_path: Path) -> None:
    toys, threat = engine_toys.__file__, ThreatModel("linf", 0.05)
    reports = []
    for seed in range(12):
        options = {"seed": seed, "out": tmp_path / str(seed), "defense_spec": f"{toys}:GrainyCorner"}
        evaluate(GrainyCorner(), "noise(tries=1)", threat, "fashion_mnist", n=100, eot=1, judge_repeats=20, **options)
        reports.append(verify_run(tmp_path / str(seed)))
    assert all(report.holds for report in reports), [report.failures for report in reports if not report.holds]
    told = [line for report in reports for line in report.lines if "share draws" in line]
    assert len(told) > 12, "of 24 judgements"
    assert "times the noise" in told[0]


def test_what_is_judged_one_by_one_shares_no_draws(tmp_path: Path) -> None:
    """A run, a worker and `verify` each find out by themselves that the images of a pass would share one."""
    toys, threat, folder = engine_toys.__file__, ThreatModel("linf", 0.05), tmp_path / "run"
    options = {"n": 40, "out": folder, "defense_spec": f"{toys}:OneCorner", "eot": 1, "judge_repeats": 20}
    evaluate(OneCorner(), "noise(tries=1)", threat, "fashion_mnist", **options)
    work, _ = prepare_worker(str(folder), "")
    assert work.defense.shares_draws
    report = verify_run(folder)
    assert report.holds, report.failures
    assert not [line for line in report.lines if "share draws" in line]


def test_verify_of_a_run_whose_attacks_failed_does_not_hold(tmp_path: Path) -> None:
    toys = engine_toys.__file__
    options = {"n": 10, "out": tmp_path / "run", "defense_spec": f"{toys}:Prototypes"}
    evaluate(Prototypes(), [Bad()], ThreatModel("linf", 0.05), "fashion_mnist", **options)
    report = verify_run(tmp_path / "run")
    assert report.failures == ["robust accuracy at eps 0.05 (an attack failed, so there is no claim)"]


def test_verify_of_a_run_of_which_one_attack_failed_claims_no_robust_accuracy(tmp_path: Path) -> None:
    """What the other one left is judged again, and is no worst case."""
    options = {"n": 10, "out": tmp_path / "run", "defense_spec": f"{engine_toys.__file__}:Prototypes"}
    result = evaluate(Prototypes(), [Bad(), load_attack("fgsm")], ThreatModel("linf", 0.05), "fashion_mnist", **options)
    assert result.robust_accuracy is None
    report = verify_run(tmp_path / "run")
    assert report.holds, report.failures
    assert not [line for line in report.lines if "robust accuracy at eps" in line]
    assert [line for line in report.lines if "left at eps 0.05, no robust accuracy (stored" in line]
