"""Losses: signs, invariances and the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robench.errors import UsageError
from robench.losses import LOSSES, cross_entropy, dlr, get_loss, margin


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
