"""Losses: signs, invariances and the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robench.errors import UsageError
from robench.losses import (
    LOSSES,
    TARGETED,
    aim,
    best_wrong_classes,
    check_classes,
    cross_entropy,
    dlr,
    get_loss,
    margin,
    targeted_cross_entropy,
    targeted_dlr,
    targeted_margin,
)


@st.composite
def answers(draw: st.DrawFn, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(scale=draw(st.sampled_from([0.1, 3.0, 30.0])), size=(5, classes))
    return torch.from_numpy(logits).float(), torch.from_numpy(generator.integers(0, classes, 5))


@given(pair=answers())
def test_margin_and_dlr_are_positive_exactly_where_the_answer_is_wrong(pair: tuple[Tensor, Tensor]) -> None:
    logits, y = pair
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)


@given(pair=answers())
def test_losses_are_their_formulas(pair: tuple[Tensor, Tensor]) -> None:
    logits, y = pair
    for row, label, ce, gap, ratio in zip(
        logits.double().numpy(), y.tolist(), cross_entropy(logits, y), margin(logits, y), dlr(logits, y), strict=True
    ):
        ordered = np.sort(row)[::-1]
        expected = np.delete(row, label).max() - row[label]
        assert float(gap) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(ratio) == pytest.approx(expected / (ordered[0] - ordered[2]), rel=1e-3, abs=1e-4)
        assert float(ce) == pytest.approx(np.logaddexp.reduce(row) - row[label], rel=1e-4, abs=1e-5)


@given(pair=answers(), scale=st.sampled_from([0.25, 4.0, 1024.0]), shift=st.floats(-8, 8))
def test_dlr_ignores_shift_and_scale(pair: tuple[Tensor, Tensor], scale: float, shift: float) -> None:
    logits, y = pair
    torch.testing.assert_close(dlr(scale * logits + shift, y), dlr(logits, y), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_larger_loss_is_nearer_to_an_error(name: str) -> None:
    logits = torch.tensor([[3.0, 0.5, 0.0, -1.0], [1.0, 0.5, 0.0, -1.0], [0.0, 0.5, 0.0, -1.0]])
    values = get_loss(name)(logits, torch.zeros(3, dtype=torch.int64))
    assert bool((values.diff() > 0).all())


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(UsageError, match=r"at least 3 classes; the defense has 2\. Use loss=margin"):
        dlr(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


def test_unknown_loss_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match='loss must be one of ce, margin, dlr; got "kl"'):
        get_loss("kl")


# towards a target


@given(pair=answers(6), number=st.integers(0, 4))
def test_targeted_losses_are_their_formulas(pair: tuple[Tensor, Tensor], number: int) -> None:
    logits, y = pair
    target = best_wrong_classes(logits, y, 5)[number]
    found = [loss(logits, y, target) for loss in (targeted_cross_entropy, targeted_margin, targeted_dlr)]
    for row, label, goal, ce, gap, ratio in zip(
        logits.double().numpy(), y.tolist(), target.tolist(), *found, strict=True
    ):
        ordered = np.sort(row)[::-1]
        expected = row[goal] - row[label]
        assert float(ce) == pytest.approx(row[goal] - np.logaddexp.reduce(row), rel=1e-4, abs=1e-5)
        assert float(gap) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        spread = ordered[0] - (ordered[2] + ordered[3]) / 2
        assert float(ratio) == pytest.approx(expected / spread, rel=1e-3, abs=1e-4)


@given(pair=answers())
def test_towards_the_best_wrong_class_the_margin_is_the_margin(pair: tuple[Tensor, Tensor]) -> None:
    logits, y = pair
    assert torch.equal(targeted_margin(logits, y, best_wrong_classes(logits, y, 1)[0]), margin(logits, y))


@given(pair=answers(), count=st.integers(1, 9))
def test_best_wrong_classes_are_all_but_the_right_one_in_order(pair: tuple[Tensor, Tensor], count: int) -> None:
    logits, y = pair
    found = best_wrong_classes(logits, y, count)
    assert found.shape == (min(count, 3), 5)
    for row, label, classes in zip(logits.tolist(), y.tolist(), found.T.tolist(), strict=True):
        others = sorted((other for other in range(4) if other != label), key=lambda other: -row[other])
        assert classes == others[: len(classes)]


@pytest.mark.parametrize("name", LOSSES)
def test_aim_takes_the_targeted_form_where_there_is_a_target(name: str) -> None:
    logits = torch.tensor([[3.0, 0.5, 0.1, -1.0], [0.2, 2.0, 0.0, 1.0]])
    y, target = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert torch.equal(aim(name, None)(logits, y, target), get_loss(name)(logits, y))
    assert torch.equal(aim(name, target)(logits, y, target), TARGETED[name](logits, y, target))
    assert torch.equal(aim(margin, None)(logits, y, target), margin(logits, y))
    with pytest.raises(UsageError, match="a targeted query takes a loss by name"):
        aim(margin, target)
    with pytest.raises(UsageError, match='got "kl"'):
        aim("kl", target)


@pytest.mark.parametrize(
    ("loss", "targeted", "needed"),
    [("ce", False, 2), ("margin", True, 2), ("dlr", False, 3), ("dlr", True, 4)],
)
def test_classes_that_a_loss_needs(loss: str, targeted: bool, needed: int) -> None:
    check_classes("toy", loss, needed, targeted=targeted)
    kind = f"targeted {loss}" if targeted else loss
    message = f"toy: loss {kind} needs at least {needed} classes; the defense has {needed - 1}. Use loss=margin"
    with pytest.raises(UsageError, match=message):
        check_classes("toy", loss, needed - 1, targeted=targeted)


def test_targeted_dlr_needs_four_classes() -> None:
    zeros = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"targeted dlr needs at least 4 classes; the defense has 3\. Use loss=margin"):
        targeted_dlr(torch.zeros(1, 3), zeros, zeros + 1)
