"""BPDA: computes one step, differentiates another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import robench
from robench import ThreatModel, Victim
from robench.testing import LinearToy
from robench.types import Images, Logits

Step = Callable[[Tensor], Tensor]


def quantise(x: Tensor) -> Tensor:
    return (50 * x).round() / 50


def pull(step: Step, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The step's result at x, and the gradient of its product with `weight`."""
    leaf = x.clone().requires_grad_()
    result = step(leaf)
    return result.detach(), torch.autograd.grad((result * weight).sum(), leaf)[0]


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(0.03, 0.98, 24).view(2, 3, 2, 2)


@pytest.fixture
def weight() -> Tensor:
    return torch.linspace(-1, 2, 24).view(2, 3, 2, 2)


def test_without_a_backward_step_the_gradient_is_the_identity_s(x: Tensor, weight: Tensor) -> None:
    result, grad = pull(robench.bpda(quantise), x, weight)
    assert torch.equal(result, quantise(x))
    assert not torch.equal(result, x)
    assert torch.equal(grad, weight)
    assert not bool(pull(quantise, x, weight)[1].any()), "which the step itself does not give"


def test_gradient_is_the_analytic_one_of_the_backward_step(x: Tensor, weight: Tensor) -> None:
    result, grad = pull(robench.bpda(quantise, lambda z: z**3 + torch.sin(z)), x, weight)
    assert torch.equal(result, quantise(x))
    torch.testing.assert_close(grad, weight * (3 * x**2 + torch.cos(x)))


def test_backward_step_may_mix_pixels_and_change_the_shape(x: Tensor) -> None:
    """A step to another shape, with the gradient of a matrix product."""
    matrix = torch.linspace(-1, 1, 12 * 5).view(12, 5)
    weight = torch.linspace(0.5, 1.5, 10).view(2, 5)
    step = robench.bpda(lambda z: (z.flatten(1) @ matrix).sign(), lambda z: z.flatten(1) @ matrix)
    result, grad = pull(step, x, weight)
    assert torch.equal(result, (x.flatten(1) @ matrix).sign())
    torch.testing.assert_close(grad, (weight @ matrix.T).view_as(x))


def test_chain_rule_goes_through(x: Tensor, weight: Tensor) -> None:
    """What comes before and after keeps its own gradient, and two steps in a row each take their stand-in's."""
    step = robench.bpda(quantise, lambda z: 2 * z)
    _, grad = pull(lambda z: (step(step(z**2))).exp(), x, weight)
    torch.testing.assert_close(grad, weight * quantise(quantise(x**2)).exp() * 4 * 2 * x)


def test_a_differentiable_step_as_its_own_stand_in_changes_nothing(x: Tensor) -> None:
    step = robench.bpda(torch.sin, torch.sin)
    assert torch.autograd.gradcheck(step, x.double().requires_grad_())


def test_forward_is_asked_for_no_gradient(x: Tensor, weight: Tensor) -> None:
    seen: list[bool] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.requires_grad or torch.is_grad_enabled())
        return quantise(z)

    pull(robench.bpda(watched), x, weight)
    assert seen == [False]
    with torch.no_grad():
        assert torch.equal(robench.bpda(watched)(x), quantise(x))


def test_result_shares_no_memory_with_the_argument(x: Tensor) -> None:
    before = x.clone()
    result = robench.bpda(lambda z: z)(x)
    result += 1
    assert torch.equal(x, before)


def test_backward_step_may_keep_a_graph_of_its_own_weights(x: Tensor, weight: Tensor) -> None:
    """Its derivative with respect to x alone is taken; nothing gathers on the weights."""
    scale = torch.tensor(3.0, requires_grad=True)
    _, grad = pull(robench.bpda(quantise, lambda z: scale * z), x, weight)
    torch.testing.assert_close(grad, 3 * weight)
    assert scale.grad is None


def test_results_of_other_shapes_are_refused(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"results of the shape of x, \(2, 3, 2, 2\); got \(2, 12\).*as backward"):
        robench.bpda(lambda z: z.flatten(1))(leaf)
    result = robench.bpda(quantise, lambda z: z.flatten(1))(leaf)
    with pytest.raises(ValueError, match=r"forward gives \(2, 3, 2, 2\), but backward gives \(2, 12\)"):
        result.sum().backward()


class Quantised(LinearToy):
    """The linear toy behind a quantisation."""

    name = "quantised"
    gradient_modes = ("bpda", "true")

    def __init__(self) -> None:
        super().__init__()
        self.round = robench.bpda(quantise)

    def forward(self, x: Images) -> Logits:
        return super().forward(quantise(x))

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        return LinearToy.forward(self, (quantise if self.check_mode(mode) == "true" else self.round)(x))


def test_a_quantised_defense_falls_to_bpda_and_stands_without() -> None:
    defense = Quantised()
    x, y = LinearToy().examples(24)
    right = defense(x).argmax(1) == y
    victim = Victim(defense, "gradient", 24)
    torch.testing.assert_close(
        victim.gradient(x, y, "margin").grad, Victim(LinearToy(), "gradient", 24).gradient(x, y, "margin").grad
    )
    assert not bool(Victim(defense, "gradient", 24, mode="true").gradient(x, y, "margin").grad.any())
    result = robench.evaluate(defense, "fgsm,fgsm@true", ThreatModel("linf", 0.1), (x, y))
    found, without = (estimate.value for estimate in result.per_attack.values() if estimate)
    assert (found, without) == (0.0, right.double().mean().item())
    assert without > 0.8
