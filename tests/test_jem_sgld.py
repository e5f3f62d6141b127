"""JEM's sampling: one step by hand, the Gaussians that chains start from, the replay buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robench.defenses.jem.sgld import ReplayBuffer, Sampler, climb, draw_gaussians, fit_gaussians
from robench.rng import seeded


@pytest.mark.parametrize("clamp", [False, True])
def test_one_step_is_ascent_with_noise(clamp: bool) -> None:
    """For log p = -k |x - c|^2 / 2, the curvature k each image's own, the gradient is -k (x - c)."""
    with seeded("step"):
        x, centre = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.randn(1, 28, 28, dtype=torch.float64)
    curvature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def log_density(at: Tensor) -> Tensor:
        return -curvature * (at - centre).square().flatten(1).sum(1) / 2

    with seeded("noise"):
        noise = torch.randn_like(x)
    with torch.no_grad(), seeded("noise"):
        came = climb(log_density, x, Sampler(steps=1, step_size=0.3, noise=0.2, clamp=clamp))
    expected = x - 0.3 * curvature[:, None, None, None] * (x - centre) + 0.2 * noise
    torch.testing.assert_close(came, expected.clamp(-1, 1) if clamp else expected)
    assert not came.requires_grad
    if clamp:
        assert not torch.equal(expected.clamp(-1, 1), expected)


def test_gaussians_keep_mean_variance_and_the_largest_directions() -> None:
    """Class 1 varies along two directions only: the covariance is theirs, and nothing is left to the pixels."""
    with seeded("gaussians"):
        first = 0.1 * torch.randn(50, 1, 28, 28, dtype=torch.float64) + 0.2
        axes = 0.05 * torch.randn(2, 784, dtype=torch.float64)
        second = (torch.randn(60, 2, dtype=torch.float64) @ axes - 0.3).view(60, 1, 28, 28)
    x, y = torch.cat([first, second]), torch.tensor([0] * 50 + [1] * 60)
    fitted = fit_gaussians(x, y, num_classes=3, rank=4)
    for label, rows in enumerate([first, second, x]):  # a class without images gets the Gaussian of all
        torch.testing.assert_close(fitted.mean[label], rows.mean(0))
        variance = fitted.factors[label].square().sum(0) + fitted.spread[label].square()
        torch.testing.assert_close(variance, rows.var(0))
    directions = fitted.factors[1].flatten(1)
    torch.testing.assert_close(directions.T @ directions, torch.cov(second.flatten(1).T), rtol=1e-8, atol=1e-12)
    assert fitted.spread[1].max().item() < 1e-6
    assert fitted.spread[0].min().item() > 0.01


def test_draws_have_the_moments_of_the_gaussians() -> None:
    with seeded("gaussians"):
        x = 0.1 * torch.randn(40, 1, 28, 28) + 0.3
        fitted = fit_gaussians(x, torch.zeros(40, dtype=torch.int64), num_classes=2, rank=3)
        drawn = draw_gaussians(fitted, torch.zeros(2000, dtype=torch.int64))
    assert (drawn.mean(0) - x.mean(0)).abs().max().item() < 0.02
    assert (drawn.var(0) / x.var(0)).mean().item() == pytest.approx(1, abs=0.02)
    wide = fitted._replace(spread=fitted.spread + 5)
    with seeded("clamped"):
        clamped = draw_gaussians(wide, torch.tensor([1]))
    assert (clamped.min().item(), clamped.max().item()) == (-1, 1)


def test_buffer_goes_on_with_its_chains_and_starts_some_anew() -> None:
    buffer = ReplayBuffer(torch.arange(50.0)[:, None, None, None].expand(50, 1, 28, 28))
    fresh = torch.full((20, 1, 28, 28), -1.0)
    with seeded("buffer"):
        places, chains = buffer.draw(20, fresh, restart=0.0)
        assert torch.equal(chains[:, 0, 0, 0], places.float())
        assert len(places.unique()) == 20
        assert torch.equal(buffer.draw(20, fresh, restart=1.0)[1], fresh)
        anew = sum(int((buffer.draw(20, fresh, restart=0.3)[1] == -1).all((1, 2, 3)).sum()) for _ in range(100))
        assert 500 < anew < 700
        buffer.put(places, chains + 100)
        _, after = buffer.draw(50, fresh.repeat(3, 1, 1, 1)[:50], restart=0.0)
    seen = after[:, 0, 0, 0].sort().values
    untouched = torch.tensor([float(place) for place in range(50) if place not in places.tolist()])
    assert torch.equal(seen, torch.cat([untouched, places.float().sort().values + 100]))
