"""The main path on toys: what an evaluation promises, records and refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import engine_toys
import numpy as np
import pytest
import torch
from engine_toys import Bad, Blindfold, Broken, Linear, Noisy, Nudge, Prototypes, Still, TwoPaths, Wander, grid_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robench.attack import Attack
from robench.data import load_dataset
from robench.defense import Defense
from robench.errors import DataError, PluginError, UsageError
from robench.evaluate import evaluate
from robench.judge import judge
from robench.losses import margin
from robench.registry import load_attack
from robench.result import Estimate, Evaluation
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.unit import CLEAN, WORST
from robench.verify import verify_run

LINF = ThreatModel("linf", 0.1)
POOL: tuple[Attack | str, ...] = ("fgsm", "pgd(steps=3)", "pgd(steps=2, loss='margin')", Still(), Nudge(), Nudge(up=False))


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def some_wrong(n: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Images of `Linear` of which every fifth has another label."""
    x, y = grid_images(n, salt)
    y[::5] = (y[::5] + 1) % 3
    return x, y


# what holds of every evaluation of a deterministic defense


@given(
    salt=st.integers(0, 1000),
    n=st.integers(1, 12),
    unit_size=st.integers(4, 12),
    eps=st.floats(0.0, 0.6),
    chosen=st.lists(st.sampled_from(POOL), min_size=1, max_size=4, unique_by=str),
)
@settings(max_examples=12)
def test_worst_case_is_below_every_attack_and_each_below_clean(
    salt: int, n: int, unit_size: int, eps: float, chosen: list[Attack | str]
) -> None:
    x, y = some_wrong(n, salt)
    result = evaluate(Linear(), chosen, ThreatModel("linf", eps), (x, y), unit_size=unit_size)
    assert result.clean_accuracy.value == pytest.approx(float((Linear()(x).argmax(1) == y).float().mean()))
    attacked = [value(estimate) for estimate in result.per_attack.values()]
    assert value(result.robust_accuracy) <= min(attacked) <= max(attacked) <= result.clean_accuracy.value
    fewer = evaluate(Linear(), chosen[:-1] or "fgsm", ThreatModel("linf", eps), (x, y), unit_size=unit_size)
    if chosen[:-1]:  # one more attack never raises the worst case, and leaves the others as they were
        assert value(result.robust_accuracy) <= value(fewer.robust_accuracy)
        assert fewer.per_attack == {key: result.per_attack[key] for key in fewer.per_attack}


@given(salt=st.integers(0, 1000), seed=st.integers(0, 5))
@settings(max_examples=5)
def test_curve_of_a_linear_defense_falls_with_eps(salt: int, seed: int) -> None:
    """On a linear classifier the margin's gradient is exact within a decision, so the larger ball loses no error."""
    bounds = [ThreatModel("linf", eps) for eps in (0.3, 0.02, 0.1)]
    x, y = some_wrong(12, salt)
    result = evaluate(Linear(), "pgd(steps=5, restarts=2, loss='margin')", bounds, (x, y), seed=seed)
    assert [point["eps"] for point in result.curve] == [0.0, 0.02, 0.1, 0.3]
    values = [point["value"] for point in result.curve]
    assert values[0] == round(result.clean_accuracy.value, 6)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert value(result.robust_accuracy) == value(result.robust_at(0.3))


@pytest.mark.parametrize("unit_size", [1, 3, 100])
def test_units_do_not_matter_to_a_deterministic_attack(unit_size: int) -> None:
    data = some_wrong(10)
    whole = evaluate(Linear(), "fgsm", LINF, data)
    cut = evaluate(Linear(), "fgsm", LINF, data, unit_size=unit_size)
    assert np.array_equal(whole.images("fgsm"), cut.images("fgsm"))
    assert whole.robust_accuracy == cut.robust_accuracy


def test_same_seed_same_table_and_another_seed_another() -> None:
    data = grid_images(8)

    def images(seed: int) -> Any:
        return evaluate(Noisy(), "pgd(steps=2)", LINF, data, seed=seed, eot=2, judge_repeats=3).images("pgd(steps=2)")

    assert np.array_equal(images(1), images(1))
    assert not np.array_equal(images(1), images(2))


def test_evaluation_leaves_generator_weights_and_images_alone() -> None:
    x, y = grid_images(6)
    defense = Noisy()
    before = [part.clone() for part in (x, y, defense.weight, torch.get_rng_state())]
    evaluate(defense, "fgsm,pgd(steps=2)", LINF, (x, y), eot=2, judge_repeats=2)
    assert all(torch.equal(one, two) for one, two in zip(before, (x, y, defense.weight, torch.get_rng_state()), strict=True))


# what is attacked and what is judged


def test_images_that_are_wrong_already_are_skipped_and_judged() -> None:
    x, y = some_wrong(10)
    result = evaluate(Linear(), "fgsm", LINF, (x, y))
    rows = result.table[result.table["attack"] == "fgsm"]
    skipped = rows["index"] % 5 == 0
    assert rows["status"].tolist() == np.where(skipped, "skipped", "ok").tolist()
    assert rows[skipped]["forwards"].tolist() == rows[skipped]["backwards"].tolist() == [0, 0]
    assert rows[~skipped]["backwards"].tolist() == [1] * 8
    assert rows[skipped]["accuracy"].tolist() == [0.0, 0.0]
    assert np.array_equal(result.images("fgsm")[::5], x[::5].numpy())


def test_nothing_is_attacked_where_all_is_wrong() -> None:
    x, y = grid_images(4)
    result = evaluate(Linear(), [Bad()], LINF, (x, (y + 1) % 3))  # an attack that fails if called
    assert result.complete
    assert (result.clean_accuracy.value, value(result.robust_accuracy)) == (0.0, 0.0)


def test_randomized_images_are_attacked_if_any_clean_answer_is_right() -> None:
    x, y = grid_images(30)
    result = evaluate(Noisy(sigma=4.0), "fgsm", LINF, (x, (y + 1) % 3), eot=1, judge_repeats=3)
    clean = result.table[result.table["attack"] == CLEAN]["accuracy"].to_numpy()
    status = result.table[result.table["attack"] == "fgsm"]["status"].to_numpy()
    assert 0 < (clean > 0).sum() < 30
    assert (status == np.where(clean > 0, "ok", "skipped")).all()


def test_images_of_the_worst_case_are_those_of_the_chosen_attack() -> None:
    x, y = some_wrong(12)
    up, down = Nudge(), Nudge(up=False)
    result = evaluate(Linear(), [up, down], ThreatModel("linf", 0.3), (x, y), unit_size=5)
    chosen = result.table[result.table["attack"] == WORST]["chosen"].tolist()
    assert set(chosen) == {up.spec(), down.spec()}
    both = {key: result.images(key) for key in (up.spec(), down.spec())}
    assert np.array_equal(result.images(WORST), np.stack([both[key][row] for row, key in enumerate(chosen)]))
    wrong = {key: result.answers(key) for key in both}
    for row, key in enumerate(chosen):
        right = {name: int(answers.right[row]) for name, answers in wrong.items() if answers is not None}
        assert right[key] == min(right.values())
    votes = judge(Linear(), torch.from_numpy(result.images(WORST)), 1)
    assert votes.gather(1, y[:, None]).double().mean().item() == value(result.robust_accuracy)
    with pytest.raises(DataError, match='no adversarial images of "clean"'):
        result.images(CLEAN)


# randomness


def table_votes(result: Evaluation, attack: str) -> list[list[int]]:
    return [list(votes) for votes in result.table[result.table["attack"] == attack]["votes"]]


def test_worst_case_is_reported_on_fresh_draws() -> None:
    """Chosen on one set of draws and reported on another: two attacks that change nothing do not look like a gain."""
    x, y = grid_images(60)
    attacks = [Still(), Nudge()]
    result = evaluate(Noisy(gain=0.0), attacks, ThreatModel("linf", 0.0), (x, y), judge_repeats=6)
    worst = table_votes(result, WORST)
    copied = [
        votes == table_votes(result, key)[row]
        for row, (votes, key) in enumerate(zip(worst, result.table[result.table["attack"] == WORST]["chosen"], strict=True))
    ]
    assert sum(copied) < 30  # some agree by chance
    lower = np.minimum(*(result.answers(attack.spec()).right for attack in attacks))  # type: ignore[union-attr]
    assert lower.mean() / 6 < 0.27  # what picking the worse of two would report
    assert abs(value(result.robust_accuracy) - 1 / 3) < 0.08  # what is true: 360 draws, four standard errors are 0.1


def test_worst_case_of_one_attack_or_of_no_randomness_needs_no_second_judge() -> None:
    data = grid_images(10)
    alone = evaluate(Noisy(), "fgsm", LINF, data, eot=1, judge_repeats=5)
    assert table_votes(alone, WORST) == table_votes(alone, "fgsm")
    both = evaluate(Linear(), "fgsm,pgd(steps=2)", LINF, data)
    assert all(sum(votes) == 1 for votes in table_votes(both, WORST))


def test_attack_and_judge_draw_apart() -> None:
    """The votes on an attack's images are those of the judge's own seed, not of the attack's."""
    x, y = grid_images(12)
    result = evaluate(Noisy(), [Still()], LINF, (x, y), judge_repeats=4, seed=9)

    def votes(*parts: str | int) -> list[list[int]]:
        with seeded(9, 0, *parts):
            return judge(Noisy(), x, 4).tolist()

    assert table_votes(result, CLEAN) == votes(CLEAN)
    assert table_votes(result, "still") == votes("still", "0.1", "judge")
    assert table_votes(result, CLEAN) != table_votes(result, "still")


@pytest.mark.parametrize(
    ("defense", "attacks", "given", "expected"),
    [
        (Linear(), "fgsm", {}, (1, 1)),
        (Linear(), "fgsm", {"eot": 7, "judge_repeats": 9}, (1, 1)),
        (Noisy(), "fgsm", {}, (10, 20)),
        (Noisy(), "quick", {}, (10, 20)),
        (Noisy(), "fgsm", {"eot": 2, "judge_repeats": 3}, (2, 3)),
    ],
)
def test_draws_by_default(defense: Defense, attacks: str, given: dict[str, int], expected: tuple[int, int]) -> None:
    spec = evaluate(defense, attacks, LINF, grid_images(2), **given).spec
    assert (spec.eot, spec.judge_repeats) == expected


def test_standard_protocol_judges_a_hundred_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robench.protocol.PROTOCOLS", {"standard-8": ("pgd",), "standard-12": ("fgsm",)})
    result = evaluate(Noisy(), "standard", LINF, grid_images(2), eot=1)
    assert (result.spec.protocol, result.spec.judge_repeats) == ("standard-12", 100)
    assert [sum(votes) for votes in result.table["votes"]] == [100] * 6


def test_figures_of_a_randomized_defense() -> None:
    x, y = grid_images(20)
    result = evaluate(Noisy(), "fgsm", LINF, (x, y), eot=1, judge_repeats=10)
    votes = np.array(table_votes(result, "fgsm"))
    right = votes[np.arange(20), y.numpy()]
    assert value(result.robust_accuracy) == pytest.approx(right.mean() / 10)
    assert list(result.best_of) == list(result.clean_best_of) == [2, 5, 10]
    assert result.best_of[10].value == pytest.approx((right == 10).mean())
    assert result.best_of[2].value <= value(result.robust_accuracy)
    others = votes.copy()
    others[np.arange(20), y.numpy()] = -1
    assert value(result.majority) == pytest.approx((right > others.max(1)).mean())
    assert value(result.clean_majority) >= value(result.majority)


# attacks, modes, failures


def test_protocol_tries_every_gradient_mode_and_keeps_the_worst() -> None:
    x, y = grid_images(12)
    result = evaluate(TwoPaths(), "quick-1", ThreatModel("linf", 0.3), (x, y))
    assert list(result.per_attack) == ["fgsm", "fgsm@full", "pgd", "pgd@full"]
    assert [entry.mode for entry in result.spec.attacks] == [None, "full"] * 2
    assert [entry.spec for entry in result.spec.attacks] == ["fgsm", "fgsm", "pgd", "pgd"]
    assert value(result.per_attack["pgd@full"]) < value(result.per_attack["fgsm"])
    assert value(result.robust_accuracy) == value(result.per_attack["pgd@full"])
    assert result.worst_attack() in ("fgsm@full", "pgd@full")


def test_a_mode_may_be_named() -> None:
    data = grid_images(4)
    assert list(evaluate(TwoPaths(), "fgsm", LINF, data).per_attack) == ["fgsm"]
    assert list(evaluate(TwoPaths(), "fgsm@full,fgsm@flat", LINF, data).per_attack) == ["fgsm@full", "fgsm"]
    with pytest.raises(UsageError, match='offers the gradient modes flat, full; got "bpda"'):
        evaluate(TwoPaths(), "fgsm@bpda", LINF, data)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "RuntimeError: planted"),
        ("far", "must lie within eps; 4 of 4 do not"),
        ("nan", "must be finite"),
        ("box", r"must lie in [0, 1]"),
        ("shape", "adversarial images must be (4, 2, 3, 3) torch.float32; got (4, 1, 3, 3)"),
        ("dtype", "got (4, 2, 3, 3) torch.float64"),
    ],
)
def test_a_failed_attack_is_recorded_and_the_others_go_on(how: str, reason: str, tmp_path: Path) -> None:
    bad = Bad(how=how)
    result = evaluate(Linear(), [bad, "fgsm"], LINF, grid_images(4), out=tmp_path / "run")
    key = bad.spec()
    assert result.per_attack[key] is None
    assert value(result.per_attack["fgsm"]) == value(result.robust_accuracy)
    assert not result.complete
    assert set(result.table[result.table["attack"] == key]["status"]) == {"failed"}
    assert reason in next((tmp_path / "run" / "failures").iterdir()).read_text()
    row = result.row()
    assert row["robust_acc"] == row["robust_low"] == row[key] == ""  # never as robust
    assert result.to_json()["per_attack"][key] is None


def test_no_worst_case_where_every_attack_failed_somewhere(tmp_path: Path) -> None:
    """In the first unit alone: the rest of the images do not stand for all of them."""
    x, y = grid_images(6)
    bad = Bad(how="some", first=float(x[0, 0, 0, 0]))
    result = evaluate(Linear(), [bad], LINF, (x, y), unit_size=2, out=tmp_path / "run")
    statuses = result.table[result.table["attack"] == WORST]["status"].tolist()
    assert statuses == ["failed"] * 2 + ["ok"] * 4
    assert result.robust_accuracy is result.majority is None
    assert result.best_of == {}
    assert result.to_json()["curve"][1]["value"] is None
    again = Evaluation.load(result.save(tmp_path / "copy"))
    assert again.table.equals(result.table)


def test_a_budget_stops_an_attack_and_keeps_its_best_images_within_the_bound() -> None:
    x, y = grid_images(30)
    eps = 0.16
    result = evaluate(Linear(), [Wander()], ThreatModel("linf", eps), (x, y), query_budget=9)
    rows = result.table[result.table["attack"] == "wander"]
    assert rows["forwards"].tolist() == [9] * 30
    assert set(rows["status"]) == {"ok"}  # it strayed, which is no fault of its images
    assert result.spec.query_budget == 9
    asked = torch.stack([(x + 0.25 * step * eps).clamp(0, 1) for step in range(5)])  # those within the bound, of nine
    best = torch.stack([margin(Linear()(images), y) for images in asked]).argmax(0)
    assert 0 < int((best == 4).sum()) < 30
    assert np.array_equal(result.images("wander"), asked[best, torch.arange(30)].numpy())


# what data may be, and settings


def test_data_as_a_name_a_dataset_and_a_pair() -> None:
    dataset = load_dataset("fashion_mnist", n=16, seed=3)
    threat = ThreatModel("linf", 0.02)
    named = evaluate(Prototypes(), "fgsm", threat, "fashion_mnist", n=16, seed=3)
    given = evaluate(Prototypes(), "fgsm", threat, dataset, seed=3)
    assert named.spec == given.spec
    assert named.table.equals(given.table)
    pair = evaluate(Prototypes(), "fgsm", threat, (dataset.x, dataset.y), seed=3)
    assert pair.spec.data_digest == named.spec.data_digest
    assert (pair.spec.dataset, named.spec.dataset) == ("", "fashion_mnist")
    assert pair.robust_accuracy == named.robust_accuracy
    assert named.table["index"].tolist() == 3 * dataset.index.tolist()


def test_a_pair_may_be_cut() -> None:
    x, y = grid_images(9)
    assert evaluate(Linear(), "fgsm", LINF, (x, y)).spec.n == 9
    assert evaluate(Linear(), "fgsm", LINF, (x, y), n=4).spec == evaluate(Linear(), "fgsm", LINF, (x[:4], y[:4])).spec


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"unit_size": 0}, "unit_size must be at least 1"),
        ({"eot": -1}, "eot must be at least 1"),
        ({"judge_repeats": 0}, "judge_repeats must be at least 1"),
        ({"query_budget": 0}, "query_budget must be at least 1"),
        ({"device": "tpu"}, 'device must be auto, cpu or cuda; got "tpu"'),
        ({"runner": "cloud"}, 'runner must be .*got "cloud"'),
        ({"epsilon": 1}, 'no setting "epsilon"; there are: data_dir'),
        ({"resume": True}, "give it as out"),
        ({"n": 6}, "at most the 5 images given; got 6"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), "fgsm", LINF, grid_images(5), **given)


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ([], "no attack given"),
        ("", "no attack given|expected a name"),
        ("pdg", 'no attack "pdg"; did you mean "pgd"'),
        ("pgd(step=1)", 'no option "step"; did you mean "steps"'),
        ("pgd(steps=0)", "steps and restarts must be at least 1"),
    ],
)
def test_attacks_that_do_not_exist_are_refused(attacks: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), attacks, LINF, grid_images(2))


def test_two_attacks_of_one_name_are_refused() -> None:
    toys = Path(engine_toys.__file__)
    with pytest.raises(UsageError, match='two things of this run would be named "nudge"'):
        evaluate(Linear(), [Nudge(), f"{toys}:Nudge"], LINF, grid_images(2))
    assert list(evaluate(Linear(), "fgsm,fgsm()", LINF, grid_images(2)).per_attack) == ["fgsm"]  # the same twice is one


def test_an_attack_from_a_file_is_replayed_by_its_path() -> None:
    name = f"{engine_toys.__file__}:Nudge"
    (entry,) = evaluate(Linear(), f"{name}(up=False)", LINF, grid_images(2)).spec.attacks
    assert (entry.key, entry.spec) == ("nudge(up=False)", f"{name}(up=False)")
    assert load_attack(entry.spec).spec() == entry.key


def test_norm_that_an_attack_does_not_support_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match=r'attack "pgd" supports linf, l2; the threat model is l0\. Choose another'):
        evaluate(Broken(), [Still(), "pgd"], ThreatModel("l0", 3), grid_images(2))


def test_threats_are_of_one_norm() -> None:
    with pytest.raises(UsageError, match="one norm and at least one eps"):
        evaluate(Linear(), "fgsm", [LINF, ThreatModel("l2", 1)], grid_images(2))
    with pytest.raises(UsageError, match="one norm and at least one eps"):
        evaluate(Linear(), "fgsm", [], grid_images(2))
    bounds = [ThreatModel("linf", eps) for eps in (0.2, 0.1, 0.2)]
    assert evaluate(Linear(), "fgsm", bounds, grid_images(2)).spec.eps == (0.1, 0.2)


def refused_data() -> dict[str, tuple[Any, str]]:
    x, y = grid_images(3)
    return {
        "none": ((x[:0], y[:0]), "at least one image"),
        "bytes": ((255 * x, y), r"must lie in \[0, 1\].*Divide by 255"),
        "nan": ((x.where(x > 0.3, math.nan), y), r"must lie in \[0, 1\]"),
        "shape": ((x[:, :1], y), r'takes images of shape \(2, 3, 3\); the data has \(1, 3, 3\)'),
        "labels": ((x, y + 2), 'labels must be 0 to 2 for defense "linear"'),
        "negative": ((x, y - 3), "labels must be 0 to 2"),
        "count": ((x, y[:2]), "as many labels"),
        "name": ("fashion_mist", "Did you mean fashion_mnist"),
    }


@pytest.mark.parametrize("case", refused_data())
def test_data_that_does_not_fit_is_refused(case: str) -> None:
    data, message = refused_data()[case]
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), "fgsm", LINF, data)


@pytest.mark.parametrize("how", ["nan", "inf", "shape"])
def test_a_defense_that_breaks_the_contract_is_refused(how: str) -> None:
    with pytest.raises(PluginError, match='defense "broken": logits must be'):
        evaluate(Broken(how), "fgsm", LINF, grid_images(2))


def test_a_defense_that_draws_in_secret_is_refused() -> None:
    defense = Noisy()
    defense.randomized = False
    with pytest.raises(PluginError, match=r"declared deterministic, but two calls .* Set randomized = True"):
        evaluate(defense, "fgsm", LINF, grid_images(2))


# files and figures


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
        defense, "fgsm,pgd(steps=2)", threats, some_wrong(7), unit_size=3, eot=2, judge_repeats=4, out=tmp_path / "other"
    )
    assert stored.table.equals(result.table)
    names = [sorted(path.name for path in (one / "units").iterdir()) for one in (folder, tmp_path / "other")]
    assert names[0] == names[1]  # and so their digests
    with pytest.raises(UsageError, match="holds a run already"):
        result.save(tmp_path / "other")


def test_a_copy_keeps_the_day_of_the_run(tmp_path: Path) -> None:
    result = evaluate(Linear(), "fgsm", LINF, grid_images(3), out=tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "created": "2001-02-03"}))
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


def test_queries_are_those_of_all_attacks_at_one_bound() -> None:
    bounds = [ThreatModel("linf", 0.0), ThreatModel("linf", 0.01)]
    result = evaluate(Linear(), "fgsm,pgd(steps=3, stop_early=False)", bounds, some_wrong(10))
    assert result.queries() == {"forwards": (1 + 4) * 8 / 10, "backwards": (1 + 3) * 8 / 10}  # 2 of 10 are skipped


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
        assert len(report.lines) == 5
    path = tmp_path / "Prototypes" / "run.json"
    path.write_text(path.read_text().replace("Prototypes", "Blindfold"))
    with pytest.raises(DataError, match="belongs to another run"):
        verify_run(tmp_path / "Prototypes")


def test_verify_of_a_run_whose_attacks_failed_does_not_hold(tmp_path: Path) -> None:
    toys = engine_toys.__file__
    options = {"n": 10, "out": tmp_path / "run", "defense_spec": f"{toys}:Prototypes"}
    evaluate(Prototypes(), [Bad()], ThreatModel("linf", 0.05), "fashion_mnist", **options)
    report = verify_run(tmp_path / "run")
    assert report.failures == ["robust accuracy at eps 0.05 (an attack failed, so there is no claim)"]
