"""The toys' answers are what they claim: contract tests are no better than their oracle."""

from __future__ import annotations

import pytest
import torch

from robench.errors import UsageError
from robench.losses import margin
from robench.rng import seeded
from robench.testing import ConvToy, LinearToy, NoisyLinearToy, NullDefense
from robench.testing.toys import REACH
from robench.threat import NORMS, ThreatModel


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_examples_lie_at_their_distance(norm: str, channels: int) -> None:
    toy = LinearToy(channels)
    for reach in (None, REACH[norm] / 2):
        x, y = toy.examples(24, norm, reach)
        assert torch.allclose(toy.distance(x, y, norm), torch.tensor(reach or REACH[norm]), rtol=1e-4)
        assert bool((toy(x).argmax(1) == y).all())
        assert len(x.flatten(1).unique(dim=0)) == 24
        assert bool((x > 0.1).all() and (x < 0.9).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_distance_is_the_boundary(norm: str) -> None:
    """The point of the ball that lowers the margin most turns the answer just outside the distance, not inside."""
    toy = LinearToy()
    x, y = toy.examples(24, norm)
    wrong = toy(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    steps = (toy.weight[wrong] - toy.weight[y]).view_as(x)
    direction = steps.sign() / 8 if norm == "l1" else ThreatModel(norm, 1).steepest(steps)  # 8 pixels, all alike
    for factor, turned in ((0.999, False), (1.001, True)):
        x_adv = x + factor * REACH[norm] * direction
        assert torch.allclose(ThreatModel(norm, 1).distance(x, x_adv), torch.tensor(factor * REACH[norm]), rtol=1e-4)
        assert bool(((margin(toy(x_adv), y) > 0) == turned).all())


def test_distance_in_pixels_is_that_of_a_search_over_all_pairs() -> None:
    toy = LinearToy()
    x, y = toy.examples(6, "l0")
    for image, label in zip(x, y, strict=True):
        flips = [
            image.flatten().index_copy(0, torch.tensor(pair), torch.tensor(values, dtype=torch.float32)).view(1, 4, 4)
            for pair in ((i, j) for i in range(16) for j in range(i + 1))
            for values in ((0, 0), (0, 1), (1, 0), (1, 1))
            if pair[0] != pair[1] or values[0] == values[1]
        ]
        answers = toy(torch.stack(flips)).argmax(1) != label
        changed = torch.tensor([int((flip != image).sum()) for flip in flips])
        assert bool(answers[changed == 2].any())
        assert not bool(answers[changed == 1].any())


def test_distance_of_an_error_is_zero() -> None:
    toy = LinearToy()
    x, y = toy.examples(8)
    for norm in NORMS:
        assert toy.distance(x, (y + 1) % 4, norm).tolist() == [0.0] * 8
    with pytest.raises(UsageError, match="norm must be one of"):
        toy.distance(x, y, "l3")


@pytest.mark.parametrize("sigma", [0.5, 2.0, 5.0])
def test_probability_right_is_that_of_many_draws(sigma: float) -> None:
    toy = NoisyLinearToy(sigma=sigma)
    x, y = toy.examples(4, "linf", 0.02)
    expected = toy.probability_right(x, y)
    draws = 20_000
    with seeded("toys"):
        right = (toy(x.repeat(draws, 1, 1, 1)).argmax(1) == y.repeat(draws)).view(draws, -1).float().mean(0)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert bool(((right - expected).abs() <= 4 * deviation + 1e-6).all())


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0])
def test_null_defense_errs_with_probability_q_whatever_the_image(q: float) -> None:
    toy = NullDefense(q)
    for x in (torch.zeros(20_000, 1, 4, 4), torch.ones(20_000, 1, 4, 4)):
        with seeded("toys"):
            answers = toy(x).argmax(1)
        wrong = (answers != 0).float().mean().item()
        assert wrong == pytest.approx(q, abs=4 * (q * (1 - q) / 20_000) ** 0.5)
        assert set(answers.unique().tolist()) == {0.0: {0}, 0.1: {0, 1, 2, 3}, 1.0: {1, 2, 3}}[q]
    with pytest.raises(UsageError, match="q must be a probability"):
        NullDefense(1.5)


def test_building_toys_leaves_the_generator_alone_and_gives_the_same_weights() -> None:
    before = torch.get_rng_state()
    first, second = ConvToy(), ConvToy()
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two)
