"""The main path on toys: what an evaluation promises, records and refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_toys import Bad, Linear, Noisy, Nudge, Still, TwoClasses, TwoPaths, Wander, grid_images, some_wrong
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.attack import Attack
from robench.defense import Defense
from robench.errors import DataError, UsageError
from robench.estimate import Estimate
from robench.evaluate import evaluate
from robench.judge import judge
from robench.losses import margin
from robench.protocol import Protocol
from robench.result import Evaluation
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST

LINF = ThreatModel("linf", 0.1)
POOL: tuple[Attack | str, ...] = (
    "fgsm",
    "pgd(steps=3)",
    "pgd(steps=2, loss='margin')",
    Still(),
    Nudge(),
    Nudge(up=False),
)


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


# what holds of every evaluation of a deterministic defense


@given(
    salt=st.integers(0, 1000),
    n=st.integers(1, 12),
    unit_size=st.integers(4, 12),
    eps=st.floats(0.0, 0.6),
    chosen=st.lists(st.sampled_from(POOL), min_size=1, max_size=4, unique_by=str),
)
@settings(max_examples=25)
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
@settings(max_examples=10)
def test_curve_of_two_linear_classes_falls_with_eps(salt: int, seed: int) -> None:
    """Here pgd is exact: the sign of the gradient is the same everywhere, and five steps reach the ball's corner."""
    bounds = [ThreatModel("linf", eps) for eps in (0.3, 0.02, 0.1)]
    x, _ = grid_images(12, salt)
    y = TwoClasses()(x).argmax(1)
    y[::5] = 1 - y[::5]
    result = evaluate(TwoClasses(), "pgd(steps=5, loss='margin')", bounds, (x, y), seed=seed)
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
    assert all(
        torch.equal(one, two) for one, two in zip(before, (x, y, defense.weight, torch.get_rng_state()), strict=True)
    )


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
    result = evaluate(Noisy(sigma=2.0), "fgsm", LINF, (x, (y + 1) % 3), eot=1, judge_repeats=20)
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
        for row, (votes, key) in enumerate(
            zip(worst, result.table[result.table["attack"] == WORST]["chosen"], strict=True)
        )
    ]
    assert sum(copied) < 30  # some agree by chance
    accuracy = {key: rows["accuracy"].to_numpy() for key, rows in result.table.groupby("attack")}
    lower = np.minimum(accuracy["still"], accuracy["nudge"])
    assert lower.mean() < 0.27  # what picking the worse of two would report
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


def test_the_newest_version_of_a_protocol_says_how_often_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    protocols = [
        Protocol("standard-8", {"linf": ("pgd",)}, judge_repeats=7),
        Protocol("standard-12", {"linf": ("fgsm",)}, judge_repeats=100),
    ]
    monkeypatch.setattr("robench.protocol.PROTOCOLS", {protocol.name: protocol for protocol in protocols})
    result = evaluate(Noisy(), "standard", LINF, grid_images(2))
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
        ("raises", "RuntimeError at engine_toys.py:"),
        ("far", "must lie within eps; 4 of 4 do not"),
        ("nan", "must be finite"),
        ("box", r"must lie in [0, 1]"),
        ("shape", "adversarial images must be (4, 2, 3, 3) torch.float32; got (4, 1, 3, 3)"),
        ("dtype", "got (4, 2, 3, 3) torch.float64"),
    ],
)
def test_a_failed_attack_is_recorded_and_the_others_go_on(
    how: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Bad(how=how)
    result = evaluate(Linear(), [bad, "fgsm"], LINF, grid_images(4), out=tmp_path / "run")
    key = bad.spec()
    assert result.per_attack[key] is None
    assert value(result.per_attack["fgsm"]) < 1
    assert not result.complete
    assert result.robust_accuracy is result.robust_at(LINF.eps) is result.majority is None
    assert result.curve[1]["value"] is None
    assert result.best_of == {}
    (told,) = caplog.messages
    assert told == f"linear: attack {key} failed, so the robust accuracy is not known: {result.reasons[key]}"
    assert reason in told
    assert set(result.table[result.table["attack"] == key]["status"]) == {"failed"}
    kept = next((tmp_path / "run" / "failures").iterdir()).read_text()  # the traceback, which has places of its own
    assert reason.partition(" at ")[0] in kept
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
