"""Several bounds in one run: what they share, what that saves, and that the curve stays what single runs would show."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
import torch
from engine_toys import (
    Bad,
    FailsBeyond,
    Linear,
    Noisy,
    Nudge,
    Onward,
    Partial,
    TwoClasses,
    Upward,
    grid_images,
    some_wrong,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import robench.unit
from robench.attack import Attack
from robench.defense import Defense
from robench.errors import DataError
from robench.estimate import Estimate
from robench.evaluate import evaluate
from robench.judge import judge
from robench.result import Evaluation
from robench.testing import LinearToy
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Labels
from robench.unit_table import CLEAN, WORST
from robench.victim import Victim

EPS = (0.01, 0.02, 0.04)


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def sweep(attacks: Any, eps: Any = EPS, n: int = 24, defense: Defense | None = None, **settings: Any) -> Evaluation:
    bounds = [ThreatModel("linf", one) for one in eps]
    return evaluate(defense or Linear(), attacks, bounds, some_wrong(n), unit_size=7, **settings)


def rows_of(result: Evaluation, attack: str, eps: float) -> pd.DataFrame:
    table = result.table
    return table[(table["attack"] == attack) & (table["eps"] == eps)].reset_index(drop=True)


def passes(result: Evaluation, attack: str, eps: float) -> list[tuple[int, int]]:
    rows = rows_of(result, attack, eps)
    return list(zip(rows["forwards"], rows["backwards"], strict=True))


# the curve of a deterministic defense


@given(
    salt=st.integers(0, 1000),
    cascade=st.booleans(),
    chosen=st.lists(
        st.sampled_from([Nudge(), Nudge(up=False), Upward(), Partial(0.7), "fgsm", "pgd(steps=2)", "apgd(steps=3)"]),
        min_size=1,
        max_size=3,
        unique_by=str,
    ),
)
@settings(max_examples=10)
def test_no_image_is_right_again_at_a_larger_bound(salt: int, cascade: bool, chosen: list[Attack | str]) -> None:
    data, bounds = some_wrong(9, salt), [ThreatModel("linf", eps) for eps in (0.05, 0.15, 0.3, 0.5)]
    result = evaluate(Linear(), chosen, bounds, data, unit_size=5, cascade=cascade)
    for key in (*result.per_attack, WORST):
        right = np.stack([rows_of(result, key, bound.eps)["accuracy"] for bound in bounds])
        assert (np.diff(right, axis=0) <= 0).all(), key
    values = [point["value"] for point in result.curve]
    assert values == sorted(values, reverse=True)


def test_an_error_found_at_a_smaller_bound_is_kept_and_costs_nothing_more() -> None:
    key = "pgd(steps=3)"
    result = sweep(key)
    kept = 0
    for before, now in itertools.pairwise(EPS):
        old, new = rows_of(result, key, before), rows_of(result, key, now)
        spared = (new["status"] == "spared").to_numpy()
        wrong = (old["accuracy"] == 0) & (old["status"] != "skipped")
        assert spared.tolist() == wrong.tolist()
        assert np.array_equal(result.images(key, before)[spared], result.images(key, now)[spared])
        for column in ("forwards", "backwards", "distance", "accuracy"):
            assert new[spared][column].tolist() == old[spared][column].tolist()
        attacked = new["status"] == "ok"
        assert (new[attacked]["backwards"] > old[attacked]["backwards"]).all(), "queries of smaller bounds are included"
        kept += spared.sum()
    assert kept > 5


def test_a_sweep_is_as_strong_as_single_runs_and_costs_less() -> None:
    """An exact attack: two classes are linear in the difference of their logits."""
    x, _ = grid_images(30)
    y = TwoClasses()(x).argmax(1)
    attack = "pgd(steps=5, loss='margin')"
    bounds = [ThreatModel("linf", eps) for eps in (0.005, 0.01, 0.02, 0.04)]
    result = evaluate(TwoClasses(), attack, bounds, (x, y))
    single = [evaluate(TwoClasses(), attack, bound, (x, y)) for bound in bounds]
    figures = [value(result.robust_at(bound.eps)) for bound in bounds]
    assert figures == [value(one.robust_accuracy) for one in single]
    assert len(set(figures)) > 2
    for kind in ("forwards", "backwards"):
        assert result.queries()[kind] < 0.9 * sum(one.queries()[kind] for one in single)


@pytest.mark.parametrize("attack", ["fgsm", Nudge(), Partial(0.5)], ids=str)
def test_no_bound_is_worse_off_than_in_a_run_of_its_own(attack: Attack | str) -> None:
    bounds = (0.005, 0.02, 0.15, 0.2, 0.3)  # brightening turns fewer images at 0.2 than at 0.15
    result = sweep(attack, bounds)
    single = [value(sweep(attack, [eps]).robust_accuracy) for eps in bounds]
    figures = [value(result.robust_at(eps)) for eps in bounds]
    assert figures == np.minimum.accumulate(single).tolist()


def test_worst_case_keeps_the_image_and_the_attack_of_a_smaller_bound() -> None:
    _, y = some_wrong(24)
    for cascade in (True, False):
        result = sweep([Partial(0.8), "fgsm"], cascade=cascade)
        for before, now in itertools.pairwise(EPS):
            clean = rows_of(result, CLEAN, 0.0)["accuracy"] == 1
            wrong = ((rows_of(result, WORST, before)["accuracy"] == 0) & clean).to_numpy()
            assert wrong.any()
            for eps in (before, now):
                votes = judge(Linear(), torch.from_numpy(result.images(WORST, eps)), 1)
                right = votes.gather(1, y[:, None])[:, 0].tolist()
                assert right == rows_of(result, WORST, eps)["accuracy"].tolist()
            assert np.array_equal(result.images(WORST, before)[wrong], result.images(WORST, now)[wrong])
            old, new = (rows_of(result, WORST, eps)["chosen"][wrong].tolist() for eps in (before, now))
            assert old == new


# going on


def test_an_attack_goes_on_from_where_it_ended() -> None:
    x, y = grid_images(6)
    bounds = [ThreatModel("linf", eps) for eps in (0.0, 0.03, 0.05, 0.2)]
    for defense in (Linear(gain=1e-3), Noisy(gain=0.0)):  # the first is never wrong, but where all pixels are alike
        result = evaluate(defense, [Onward()], bounds, (x, y), judge_repeats=30)
        expected = [0.0, 0.02, 0.04, 0.06]
        for bound, moved in zip(bounds, expected, strict=True):
            assert np.allclose(result.images("onward", bound.eps) - x.numpy(), moved, atol=1e-6)
        single = evaluate(defense, [Onward()], bounds[-1], (x, y), judge_repeats=30)
        assert np.allclose(single.images("onward") - x.numpy(), 0.02, atol=1e-6)


@pytest.fixture
def trusts_few_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes one wrong answer for an error, so that luck has a large part in what counts as settled."""
    monkeypatch.setattr(robench.unit, "RANDOMIZED_REPEATS", 1)


@pytest.mark.usefixtures("trusts_few_answers")
@pytest.mark.parametrize("cascade", [True, False])
def test_nothing_of_a_randomized_defense_is_taken_for_settled_at_another_bound(cascade: bool) -> None:
    """One set of draws says too little: each bound is attacked and judged anew."""
    x, y = grid_images(40)
    bounds = [ThreatModel("linf", eps) for eps in (0.1, 0.2)]
    result = evaluate(Noisy(gain=0.3), "pgd(steps=2)", bounds, (x, y), cascade=cascade, eot=1, judge_repeats=2)
    assert set(result.table["status"]) == {"ok", "skipped"}
    old, new = (rows_of(result, "pgd(steps=2)", bound.eps) for bound in bounds)
    attacked = old["status"] == "ok"
    assert (old[attacked]["accuracy"] == 0).any()
    assert new[attacked]["backwards"].tolist() == [4] * attacked.sum()
    assert (new[attacked]["accuracy"] > old[attacked]["accuracy"]).any()


def test_a_query_budget_is_each_bound_s_own() -> None:
    """No bound goes on from a smaller one, or costs more than the budget; an error found there keeps its queries."""
    toy = LinearToy()
    bounds, data = (0.02, 0.05, 0.1, 0.25, 0.4), toy.examples(24, "l2")
    key = "pgd(steps=100)"
    result = evaluate(toy, key, [ThreatModel("l2", eps) for eps in bounds], data, query_budget=40)
    for eps in bounds[:3]:  # nothing breaks: as in a run of its own, to the bit
        alone = evaluate(toy, key, ThreatModel("l2", eps), data, query_budget=40)
        assert result.images(key, eps).tobytes() == alone.images(key).tobytes()
        assert rows_of(result, key, eps).equals(rows_of(alone, key, eps))
    spent = [sum(one) for eps in bounds for one in passes(result, key, eps)]
    assert max(spent) == 40
    found, kept = rows_of(result, key, 0.25), rows_of(result, key, 0.4)
    wrong = (found["accuracy"] == 0).tolist()
    assert 0 < sum(wrong) < 24
    assert (kept["status"] == "spared").tolist() == wrong
    assert kept[wrong]["backwards"].tolist() == found[wrong]["backwards"].tolist()


# minimal-norm attacks


def test_a_minimal_norm_attack_searches_once_for_all_bounds() -> None:
    bounds = (0.1, 0.25, 0.6)
    result, single = sweep([Upward()], bounds), sweep([Upward()], bounds[-1:])
    x, _ = some_wrong(24)
    for eps in bounds:
        assert passes(result, "upward", eps) == passes(single, "upward", bounds[-1])
        assert value(result.robust_at(eps)) == value(sweep([Upward()], [eps]).robust_accuracy)
        inside = (rows_of(result, "upward", bounds[-1])["distance"] <= eps + 1e-5).to_numpy()
        expected = np.where(inside[:, None, None, None], result.images("upward"), x.numpy())
        assert np.array_equal(result.images("upward", eps), expected)
    assert len({value(result.robust_at(eps)) for eps in bounds}) == 3
    assert result.images("upward").tobytes() == single.images("upward").tobytes()


@pytest.mark.parametrize(("attack", "budget"), [("cw", 1000), ("boundary", 1000), ("hopskipjump", 3000)])
def test_a_minimal_norm_attack_cut_off_by_a_budget_keeps_the_nearest_errors(attack: str, budget: int) -> None:
    """All images lie at 0.11 from their nearest error; a far one of larger margin would leave them right at 0.13."""
    toy = LinearToy()
    bounds = [ThreatModel("l2", eps) for eps in (0.13, 0.3, 1.0)]
    whole, cut = (evaluate(toy, attack, bounds, toy.examples(4), query_budget=most) for most in (None, budget))
    assert sum(cut.queries().values()) < sum(whole.queries().values()), "the budget cuts it off"
    assert [point["value"] for point in cut.curve] == [1.0, 0.0, 0.0, 0.0]
    assert cut.distances(attack).max() < 0.13


def test_distances_are_those_of_the_errors() -> None:
    result = sweep([Upward(), "fgsm"], (0.1, 0.6))
    rows, skipped = rows_of(result, "upward", 0.6), rows_of(result, CLEAN, 0.0)["accuracy"] == 0
    far = result.distances("upward")
    assert np.isinf(far).tolist() == (rows["accuracy"] == 1).tolist()
    assert far[skipped].tolist() == [0.0] * skipped.sum()
    found = np.isfinite(far) & ~skipped
    assert np.allclose(far[found], rows["distance"][found])
    near = result.distances("upward", 0.1)
    assert np.array_equal(near, np.where(far <= 0.1, far, np.inf))
    median = float(np.median(far))
    assert result.median_distances() == {"upward": round(median, 6) if np.isfinite(median) else None}
    assert result.to_json()["median_distance"] == result.median_distances()
    with pytest.raises(DataError, match='no distances of "pgd" in this run'):
        result.distances("pgd")


def test_median_distance_is_unknown_where_half_the_images_have_no_error() -> None:
    assert sweep([Upward()], [0.02]).median_distances() == {"upward": None}


@pytest.mark.usefixtures("trusts_few_answers")
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_minimal_norm_attack_of_a_randomized_cascade_sees_every_image_that_it_answers_for(repeats: int) -> None:
    """An image that an earlier attack settled at the smaller bound by luck may be open again at the larger one."""
    x, y = grid_images(60)
    bounds = [ThreatModel("linf", eps) for eps in (0.1, 0.2)]
    defense = Noisy(gain=0.5)
    result = evaluate(defense, [Nudge(), Upward()], bounds, (x, y), cascade=True, eot=1, judge_repeats=repeats)
    for bound in bounds:
        rows = rows_of(result, "upward", bound.eps)
        assert (rows[rows["status"] == "ok"]["forwards"] == 40).all()
    assert (rows_of(result, "upward", 0.1)["status"] == "spared").any()


@dataclasses.dataclass(frozen=True)
class Beyond(Attack):
    """Minimal-norm: brightens the first half of a batch by 0.03 and the second by 0.3, whatever is wrong there."""

    name = "beyond"
    norms = NORMS
    access = "none"
    goal = "minimal"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        far = torch.where(torch.arange(len(x)) < len(x) // 2, 0.03, 0.3)
        found = (x + far.view(-1, 1, 1, 1)).clamp(0, 1)
        return torch.where(threat.contains(x, found).view(-1, 1, 1, 1), found, x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_what_a_search_found_is_moved_to_each_bound_where_chance_answers(norm: str) -> None:
    """Back, as some draws may be wrong there, and out, as more are: at the nearest error half of them are wrong."""
    x, y = grid_images(8)
    bounds = {"linf": (0.1, 0.2), "l2": (0.3, 0.8), "l1": (1, 2), "l0": (2, 5)}[norm]
    threats = [ThreatModel(norm, eps) for eps in bounds]
    search = Beyond()(None, x, y, threats[1].whole_box(x))  # type: ignore[arg-type]  # it asks nothing
    assert not threats[1].contains(x, search).all()
    for defense in (Noisy(), Linear()):
        result = evaluate(defense, [Beyond()], threats, (x, y), judge_repeats=20, eot=1)
        right = (result.table["status"] != "skipped").to_numpy()[-len(x) :][:, None, None, None]
        for threat in threats:
            inside = threat.contains(x, search).view(-1, 1, 1, 1)
            there = threat.stretch(x, search) if defense.randomized else torch.where(inside, search, x)
            found = result.images("beyond", threat.eps)
            assert np.array_equal(found, np.where(right, there, x))
            assert threat.contains(x, torch.from_numpy(found)).all()
        assert result.median_distances() == ({} if defense.randomized else {"beyond": ANY})


# failures


def test_a_failure_at_one_bound_leaves_the_others() -> None:
    result = sweep([FailsBeyond(0.03), "fgsm"])
    key = FailsBeyond(0.03).spec()
    assert result.attacks_at(0.02)[key] is not None
    assert result.attacks_at(0.04)[key] is None
    assert not result.complete
    assert value(result.attacks_at(0.04)["fgsm"]) == value(sweep("fgsm").attacks_at(0.04)["fgsm"])
    assert [point["value"] is None for point in result.curve] == [False, False, False, True]
    assert [result.failed_at(eps) for eps in EPS] == [[], [], [key]]
    assert result.robust_accuracy is result.to_json()["robust_accuracy"] is None
    assert result.to_json()["curve"] == result.curve
    assert {result.row(eps)["robust_acc"] for eps in EPS} == {""}


def test_a_bound_at_which_every_attack_failed_has_no_point_on_the_curve() -> None:
    result = sweep([FailsBeyond(0.03)])
    assert [point["value"] is None for point in result.curve] == [False, False, False, True]
    assert sweep([Bad()]).curve[1]["value"] is None
