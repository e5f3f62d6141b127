"""JEM: density and refinement by hand, gradients against finite differences, randomness, scores, options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor, nn

from robench import Defense, UsageError, Victim
from robench.defenses.jem import JEM, make_net
from robench.defenses.jem.sgld import Sampler, sample
from robench.rng import seeded
from robench.testing import DefenseContract

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(gain: float = 2.5, dtype: torch.dtype = torch.float64, **options: Any) -> JEM:
    """An untrained model, steep enough for the refinement to matter."""
    with seeded("jem weights"):
        model = JEM(**{"width": 4, **options})
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(gain)
    model.to(dtype).freeze()
    return model


def draw_images(n: int, channels: int = 1, side: int = 28, dtype: torch.dtype = torch.float64) -> Tensor:
    with seeded("jem images"):
        return torch.rand(n, channels, side, side, dtype=dtype)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches the type checks of the tests off, so that a wrong value meets the code's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class TestRefinedContract(DefenseContract):
    """The contract of a model that refines, beside that of JEM-0, which the registry's contract tests run."""

    def build(self) -> Defense:
        model = JEM(width=4, refine_steps=2, n_chains=2)
        with torch.no_grad():
            for parameter in model.net.parameters():
                parameter.mul_(2.5)
        return model.freeze()


class Linear(nn.Module):
    """Logits W x + b, whose density's gradient is W^T softmax(W x + b)."""

    def __init__(self, channels: int = 1, side: int = 28) -> None:
        super().__init__()
        rng = np.random.Generator(np.random.PCG64(0))
        self.numbers = rng.normal(size=(10, channels * side * side)) / 10, rng.normal(size=10)
        self.weight, self.bias = (torch.from_numpy(part) for part in self.numbers)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def plant_linear(model: JEM) -> Linear:
    linear = Linear()
    model.net = linear  # type: ignore[assignment]
    return linear


# the net


@pytest.mark.parametrize(("channels", "side", "count"), [(1, 28, 711_946), (3, 32, 730_442)])
def test_net_has_the_layers_that_it_says(channels: int, side: int, count: int) -> None:
    net = make_net(channels, 10, 32, side)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    x, seen = torch.zeros(2, channels, side, side), []
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            seen.append(tuple(x.shape[1:]))
    assert seen == [(32 * times, side // times, side // times) for times in (1, 2, 4, 8)]
    assert x.shape == (2, 10)
    assert not any("Norm" in type(layer).__name__ for layer in net)


# one step


def test_density_and_its_gradient_of_a_linear_net() -> None:
    """The density is LSE f(x) and its gradient W^T softmax(f(x)), here with numpy."""
    model, x = make_model(), 2 * draw_images(3) - 1
    weight, bias = plant_linear(model).numbers
    logits = x.flatten(1).numpy() @ weight.T + bias
    np.testing.assert_allclose(model.log_density(x).numpy(), logsumexp(logits, axis=1), rtol=1e-12)
    expected = softmax(logits, axis=1) @ weight
    np.testing.assert_allclose(model.slope(x).flatten(1).numpy(), expected, rtol=1e-10, atol=1e-14)


def test_refined_answer_of_a_linear_net() -> None:
    """JEM-1 with one chain: noise on the image, one step uphill, noise again, logits."""
    model, x = make_model(refine_steps=1, n_chains=1, refine_step_size=0.7, refine_noise=0.05), draw_images(2)
    weight, bias = plant_linear(model).numbers
    with seeded("answer"):
        first, second = (torch.randn(2, 1, 28, 28, dtype=torch.float64).flatten(1).numpy() for _ in range(2))
    with seeded("answer"), torch.no_grad():
        came = model(x)
    start = 2 * x.flatten(1).numpy() - 1 + 0.03 * first
    refined = start + 0.7 * softmax(start @ weight.T + bias, axis=1) @ weight + 0.05 * second
    np.testing.assert_allclose(came.numpy(), refined @ weight.T + bias, rtol=1e-10)


def test_refinement_raises_the_density_and_is_of_as_many_steps_as_named() -> None:
    x = draw_images(4)
    heights = []
    for steps in (0, 1, 10):
        model = make_model(refine_steps=steps, refine_step_size=0.05)
        seen: list[Tensor] = []
        density = model.log_density
        model.log_density = lambda at, seen=seen, density=density: seen.append(at) or density(at)  # type: ignore[method-assign, misc]
        with model.without_randomness():
            model(x)
            assert len(seen) == steps
            heights.append(density(sample(density, 2 * x - 1, Sampler(steps, 0.05, 0.0))).mean().item())
    assert heights[0] < heights[1] < heights[2]


def test_refinement_of_an_image_is_its_own_affair() -> None:
    """In a batch with others, and alone: the gradient of the batch's sum is each image's own."""
    model, x = make_model(refine_steps=5), draw_images(4)
    with model.without_randomness():
        together = model(x)
        alone = torch.cat([model(row[None]) for row in x])
        changed = model(torch.cat([x[:1], 1 - x[1:]]))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(changed[0], together[0], rtol=1e-10, atol=1e-12)
    assert (changed[1:] - together[1:]).abs().min().item() > 0


def test_chains_are_copies_of_one_image_and_their_logits_are_averaged() -> None:
    model, x = make_model(refine_steps=2, n_chains=3), draw_images(2)
    seen: list[Tensor] = []
    classify = model.classify
    model.classify = lambda x: seen.append(classify(x)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    with seeded("chains"):
        came = model(x)
    logits = seen[-1].unflatten(0, (3, 2))
    torch.testing.assert_close(came, logits.mean(0))
    assert (logits[0] - logits[1]).abs().min().item() > 0


# randomness


@pytest.mark.parametrize(
    ("options", "randomized"),
    [
        ({}, False),
        ({"refine_steps": 1}, True),
        ({"refine_steps": 1, "refine_noise": 0.0}, True),
        ({"refine_steps": 1, "input_noise": 0.0}, True),
        ({"refine_steps": 2, "input_noise": 0.0, "refine_noise": 0.0}, False),
        ({"input_noise": 0.03}, True),
    ],
    ids=str,
)
def test_randomized_if_and_only_if_two_calls_differ(options: dict[str, Any], randomized: bool) -> None:
    model, x = make_model(**options), draw_images(2)
    assert model.randomized is randomized
    with seeded("calls"), torch.no_grad():
        assert torch.equal(model(x), model(x)) is not randomized
        with model.without_randomness():
            torch.testing.assert_close(model(x), model.adaptive_forward(x))
            assert torch.equal(model(x), model(x))
        assert torch.equal(model(x), model(x)) is not randomized


def test_forward_needs_no_gradients_and_leaves_none() -> None:
    model, x = make_model(refine_steps=3), draw_images(2)
    model.requires_grad_(True)
    with torch.no_grad():
        logits = model(x)
        assert not torch.is_grad_enabled()
    assert not logits.requires_grad
    model.adaptive_forward(x.clone().requires_grad_())
    model.detection_score(x, "grad_norm")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad


# gradients


def weigh(logits: Tensor) -> Tensor:
    """A fixed weighting of all logits, so that no row or class is left out."""
    return (logits * torch.linspace(-1.3, 1.7, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def gradient(model: JEM, x: Tensor, mode: str | None = None) -> Tensor:
    leaf = x.clone().requires_grad_()
    with seeded("gradient noise"):
        value = weigh(model.adaptive_forward(leaf, mode))
    (grad,) = torch.autograd.grad(value, leaf)
    return grad


@pytest.mark.parametrize(("steps", "chains"), [(0, 1), (1, 2), (4, 1)])
def test_full_gradient_equals_finite_differences_of_forward(steps: int, chains: int) -> None:
    """Central differences of what the judge calls, with the noise frozen: all steps are differentiated."""
    model, x = make_model(refine_steps=steps, n_chains=chains, attack_chains=chains), draw_images(2)
    grad = gradient(model, x)

    def value(at: Tensor) -> float:
        with seeded("gradient noise"):
            return weigh(model(at)).item()

    with seeded("directions"):
        directions = [grad.sign() * torch.rand_like(x) + 0.1 * torch.randn_like(x) for _ in range(2)]
    single = torch.zeros_like(x)
    single[1].view(-1)[grad[1].abs().flatten().argmax()] = 1
    for direction in [*directions, single]:
        step = 1e-4 / direction.norm().item()
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-5)


def test_bpda_gradient_is_that_at_the_refined_image() -> None:
    """The identity on the way back: the logits' gradient where the chains end, times 2 for the scale [-1, 1]."""
    model, x = make_model(refine_steps=3, attack_chains=2), draw_images(2)
    with seeded("gradient noise"):
        chains = (2 * x - 1).repeat(2, 1, 1, 1)
        chains = sample(model.log_density, chains + 0.03 * torch.randn_like(chains), Sampler(3))
    leaf = chains.requires_grad_()
    (pull,) = torch.autograd.grad(weigh(model.classify(leaf).unflatten(0, (2, 2)).mean(0)), leaf)
    expected = 2 * pull.unflatten(0, (2, 2)).sum(0)
    torch.testing.assert_close(gradient(model, x, "bpda"), expected, rtol=1e-9, atol=1e-13)
    full = gradient(model, x, "full")
    assert (expected - full).norm().item() > 0.05 * full.norm().item()


def test_modes_agree_in_the_logits_but_for_detached() -> None:
    model, x = make_model(refine_steps=3, input_noise=0.0), draw_images(2)
    assert model.gradient_modes == ("full", "bpda", "detached")
    found = {}
    for mode in model.gradient_modes:
        with seeded("modes"):
            found[mode] = model.adaptive_forward(x.requires_grad_(), mode).detach()
    torch.testing.assert_close(found["full"], found["bpda"])
    plain = make_model(refine_steps=0)
    torch.testing.assert_close(found["detached"], plain(x.detach()))
    assert (found["detached"] - found["full"]).abs().max().item() > 1e-3
    torch.testing.assert_close(gradient(model, x.detach(), "detached"), gradient(plain, x.detach()))


def test_plain_model_has_one_mode() -> None:
    model = make_model()
    assert model.gradient_modes == ("full",)
    with pytest.raises(UsageError, match=r'gradient modes full; got "bpda"'):
        model.adaptive_forward(draw_images(1), "bpda")


def test_an_attacker_gets_a_gradient_in_each_mode() -> None:
    model, x = make_model(refine_steps=2, dtype=torch.float32), draw_images(3, dtype=torch.float32)
    for mode in model.gradient_modes:
        victim = Victim(model, "gradient", 3, eot=2, mode=mode)
        with seeded("victim"):
            grad = victim.gradient(x, torch.tensor([0, 1, 2])).grad
        assert bool((grad.flatten(1).norm(dim=1) > 0).all())


# scores and pictures


def test_detection_scores_are_their_definitions() -> None:
    model, x = make_model(refine_steps=2), draw_images(3)
    weight, bias = plant_linear(model).numbers
    logits = (2 * x.flatten(1).numpy() - 1) @ weight.T + bias
    expected = {
        "log_px": -logsumexp(logits, axis=1),
        "max_py": -softmax(logits, axis=1).max(1),
        "grad_norm": np.linalg.norm(softmax(logits, axis=1) @ weight, axis=1),
    }
    assert set(model.detection_scores) == set(expected)
    for kind, value in expected.items():
        with torch.no_grad():
            np.testing.assert_allclose(model.detection_score(x, kind).numpy(), value, rtol=1e-9)
    assert torch.equal(model.detection_score(x), model.detection_score(x, model.detection_scores[0]))
    with pytest.raises(UsageError, match=r'^jem has the detection scores .*grad_norm; got "entropy"$'):
        model.detection_score(x, "entropy")


def test_pictures_are_images_and_figures_are_numbers() -> None:
    model, x = make_model(channels=3, side=32, dtype=torch.float32), draw_images(12, 3, 32, torch.float32)
    with torch.no_grad(), seeded("pictures"):
        for own, value in zip(model.gaussians, (0.3, 0.0, 0.2), strict=True):
            own.fill_(value)
        pictures = model.pictures(x)
        figures = model.diagnostics(x, torch.arange(12) % 10)
    assert list(pictures) == ["original", "refined", "start", "sample"]
    for rows in pictures.values():
        assert rows.shape == x.shape
        assert bool((rows >= 0).all() and (rows <= 1).all())
    assert torch.equal(pictures["original"], x)
    assert pictures["start"].mean().item() == pytest.approx(0.65, abs=0.01)
    assert figures["log_px_images"] == pytest.approx(model.log_density(2 * x - 1).mean().item(), abs=1e-4)
    assert all(math.isfinite(value) for value in figures.values())


# options


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 0},
        {"side": 30},
        {"width": 0},
        {"refine_steps": -1},
        {"refine_step_size": 0.0},
        {"refine_step_size": math.nan},
        {"refine_noise": -0.1},
        {"input_noise": -0.1},
        {"input_noise": math.nan},
        {"n_chains": 0},
        {"attack_chains": 0},
        {"augment": "flip"},
    ],
    ids=str,
)
def test_option_out_of_range_is_one_line(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"^jem: .*{name}.*$"):
        JEM(**options)


def test_wrong_recipe_and_data_are_one_line() -> None:
    with pytest.raises(UsageError, match=r'^jem has the recipes informative, uniform, classifier; got "madry"$'):
        JEM().recipe("madry")
    with pytest.raises(UsageError, match=r'got "unifrom"; did you mean "uniform"\?$'):
        JEM().recipe("unifrom")
    with pytest.raises(UsageError, match=r'^jem: the recipe "uniform" takes no options; got "uniform\(steps=2\)"$'):
        JEM().recipe("uniform(steps=2)")
    with pytest.raises(UsageError, match=r"^jem takes 28x28 or 32x32 images of 10 classes; .*64, 64.*$"):
        JEM.options_for((3, 64, 64), 10)
    assert JEM.options_for((3, 32, 32), 10) == {"channels": 3, "side": 32}
    assert [JEM.weights_variant(options) for options in ({}, {"width": 24}, {"width": 8})] == ["", "", "width8"]
