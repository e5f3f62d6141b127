"""The judge: bounds, votes and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_toys import Broken, Linear, Noisy, OneNoise, grid_images
from torch import Tensor

from robench import progress
from robench.errors import PluginError
from robench.judge import answer, check_bounds, judge, judge_in_units
from robench.rng import seeded
from robench.threat import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, ThreatModel


def at_distance(norm: str, distance: float) -> tuple[Tensor, Tensor]:
    """A pair of which one pixel differs, exactly: the original is 0."""
    x = torch.zeros(1, 1, 2, 2)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] = distance
    return x, x_adv


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [0.1, 8 / 255, 0.5])
def test_one_float_beyond_the_bound_is_within_and_a_thousandth_is_not(norm: str, eps: float) -> None:
    threat = ThreatModel(norm, eps)
    next_float = float(np.nextafter(np.float32(eps), np.float32(2)))
    assert check_bounds(*at_distance(norm, next_float), threat).within.tolist() == [True]
    assert check_bounds(*at_distance(norm, 1.001 * eps), threat).within.tolist() == [False]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_tolerance_is_the_one_that_is_stated(norm: str) -> None:
    threat, slack = ThreatModel(norm, 0.25), 0.25 * RELATIVE_TOLERANCE + ABSOLUTE_TOLERANCE
    assert slack == pytest.approx(3.5e-6)
    assert check_bounds(*at_distance(norm, 0.25 + 0.9 * slack), threat).within.tolist() == [True]
    assert check_bounds(*at_distance(norm, 0.25 + 1.1 * slack), threat).within.tolist() == [False]


def test_l0_has_no_tolerance() -> None:
    x, x_adv = at_distance("l0", 1e-30)
    assert check_bounds(x, x_adv, ThreatModel("l0", 1)).broken_rule() is None
    assert check_bounds(x, x_adv, ThreatModel("l0", 0)).within.tolist() == [False]


@pytest.mark.parametrize(("value", "inside"), [(0.0, True), (1.0, True), (-1e-45, False), (1 + 2**-23, False)])
def test_box_is_exact(value: float, inside: bool) -> None:
    x, x_adv = torch.full((1, 1, 1, 1), round(value)), torch.full((1, 1, 1, 1), value)
    bounds = check_bounds(x.float(), x_adv, ThreatModel("linf", 0.5))
    assert bounds.in_box.tolist() == [inside]
    assert bounds.within.tolist() == [inside]
    assert (bounds.broken_rule() is None) is inside


@pytest.mark.parametrize(
    ("value", "rule"), [(math.nan, "must be finite"), (math.inf, "must be finite"), (1.5, "must lie in [0, 1]")]
)
def test_broken_rule_says_which_and_how_many(value: float, rule: str) -> None:
    x = torch.full((3, 1, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[1:, 0, 0, 0] = value
    line = check_bounds(x, x_adv, ThreatModel("linf", 1.0)).broken_rule()
    assert line is not None
    assert f"{rule}; 2 of 3 do not" in line


def test_distance_is_measured() -> None:
    bounds = check_bounds(*at_distance("l2", 0.375), ThreatModel("l2", 0.1))
    assert bounds.distance.tolist() == [0.375]
    assert bounds.broken_rule() == "adversarial images must lie within eps; 1 of 1 do not (largest distance 0.375)"


@pytest.mark.parametrize(
    "found",
    [torch.zeros(2, 1, 2, 2), torch.zeros(1, 1, 4, 1), torch.zeros(1, 4), torch.zeros(1, 1, 2, 2).double()],
    ids=["rows", "sides", "flat", "dtype"],
)
def test_another_shape_or_dtype_is_refused(found: Tensor) -> None:
    with pytest.raises(PluginError, match=r"must be \(1, 1, 2, 2\) torch.float32; got"):
        check_bounds(torch.zeros(1, 1, 2, 2), found, ThreatModel("linf", 0.1))


def test_votes_of_a_deterministic_defense_are_unanimous() -> None:
    x, y = grid_images(7)
    heard: list[int] = []
    votes = judge(Linear(), x, 3, on_rows=heard.append)
    assert votes.dtype == torch.int64
    assert votes.tolist() == (3 * torch.nn.functional.one_hot(y, 3)).tolist()
    assert heard == [7, 7, 7]


def test_votes_of_a_randomized_defense_are_independent_answers() -> None:
    defense = Noisy(gain=0.0, sigma=1.0)  # all noise: three classes of equal chance
    with seeded(0, "judge"):
        votes = judge(defense, grid_images(20)[0], 90)
    assert votes.sum(1).tolist() == [90] * 20
    deviation = (votes.double() - 30).square().sum() / 30  # chi-square of 40 degrees of freedom: mean 40, sd 9
    assert 15 < float(deviation) < 85


def test_images_that_would_share_a_draw_are_judged_one_by_one() -> None:
    """Together they are right or wrong together, and an interval that counts images is too narrow."""
    defense = OneNoise()
    x = grid_images(1)[0].repeat(6, 1, 1, 1)
    defense.draws_per_pass = True
    with seeded(0, "judge"):
        votes = judge(defense, x, 8)
    assert defense.passes == [1] * 48
    assert len({tuple(row) for row in votes.tolist()}) > 1


def test_judge_depends_on_the_seed_alone() -> None:
    x, _ = grid_images(20)

    def votes(seed: int) -> Tensor:
        with seeded(seed, "judge"):
            return judge(Noisy(), x, 20)

    assert torch.equal(votes(0), votes(0))
    assert not torch.equal(votes(0), votes(1))


def test_judging_in_units_is_as_each_unit_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """As a run judges them; and what is short says nothing."""
    x, _ = grid_images(20)
    with seeded(0, "judge"):
        expected = torch.cat([judge(Noisy(), rows, 5) for rows in x.split(8)])
    with seeded(0, "judge"):
        assert torch.equal(judge_in_units(Noisy(), x, 5, 8), expected)
    assert capsys.readouterr().err == ""


def test_judging_that_takes_long_shows_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    judge_in_units(Linear(), grid_images(20)[0], 2, 8)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("linear: judged again: ") for line in lines)
    assert "s left" in lines[0]
    assert lines[-1].endswith("done")


def test_batches_keep_the_order() -> None:
    x, y = grid_images(7)
    defense = Linear()
    defense.batch_rows = 3
    assert judge(defense, x, 1).argmax(1).tolist() == y.tolist()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r'defense "broken": logits must be finite; 2 of 2 rows hold NaN or inf'),
        ("inf", "logits must be finite"),
        ("shape", r"logits must be a tensor of shape \(2, 3\); got \(2, 2\)"),
    ],
)
def test_answers_that_break_the_contract_are_refused(how: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        answer(Broken(how), grid_images(2)[0])
