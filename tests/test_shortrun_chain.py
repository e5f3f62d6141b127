"""The chain differentiated by hand: against autograd, its draws, what it keeps in memory, what it costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import Victim
from robench.defenses.shortrun import ShortRun
from robench.defenses.shortrun import chain as chains
from robench.defenses.shortrun.chain import ACTIVATIONS, Activation, Deconvolution, Jet, Sweeps, can_sweep, mish
from robench.rng import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

PRESETS = [("repaired", 1), ("repaired", 3), ("paper_literal", 1), ("paper_literal", 3)]
STEPS = 5


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> ShortRun:
    """An untrained model, its generator steep enough for curvature to matter."""
    with seeded("chain weights"):
        model = ShortRun(**{"sigma": 0.4, "steps": STEPS, **options})
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.mul_(1.5)
    return model.to(dtype).freeze()


def draw_images(n: int, channels: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    with seeded("chain images"):
        return torch.rand(n, channels, 28, 28, dtype=dtype)


def by_autograd(model: ShortRun) -> ShortRun:
    """The same model with weights to be learned, which autograd differentiates."""
    model.log_sigma.requires_grad_()
    return model


def code_and_gradient(model: ShortRun, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The codes, and the gradient of a fixed weighting of all their entries with respect to the images."""
    leaf = x.clone().requires_grad_()
    with seeded("chain noise"):
        z = model.infer_differentiably(leaf, **options)
    weights = torch.linspace(-1.0, 1.5, z.numel(), dtype=z.dtype).view_as(z)
    (grad,) = torch.autograd.grad((z * weights).sum(), leaf)
    return z.detach(), grad


@pytest.mark.parametrize(("preset", "channels"), PRESETS)
def test_the_pull_by_torch_s_own_kernels_is_the_same(preset: str, channels: int) -> None:
    """A GPU takes them; here they are asked for by name."""
    model, x = make_model(preset=preset, channels=channels), draw_images(3, channels)
    sweeps, z = Sweeps(model.generator), torch.linspace(-2, 2, 3 * 200, dtype=torch.float64).view(3, 200)
    expected, _ = sweeps.pull(z, x, record=False)
    torch.testing.assert_close(sweeps.pull_plainly(z, x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more"), [(4, 2, 1, 0), (4, 2, 1, 1), (6, 3, 2, 1), (2, 1, 0, 0)]
)
def test_the_ways_of_a_gpu_through_few_channels_are_the_same(
    kernel: int, stride: int, padding: int, more: int, layout: torch.memory_format
) -> None:
    layer = nn.ConvTranspose2d(8, 3, kernel, stride, padding, more, bias=False).double()
    h = draw_images(2, 8)[:, :, :5, :7].contiguous(memory_format=layout)
    image = layer(h).detach()
    linear = Deconvolution(layer)
    torch.testing.assert_close(linear.pull_patches(image), linear.pull(image))
    columns = (h.flatten(2).mT @ linear.weight.flatten(1)).unflatten(1, h.shape[2:])
    torch.testing.assert_close(linear.add_halves(columns, tuple(image.shape[2:])), image)


def test_under_autocast_the_chain_is_in_bfloat16_and_the_classifier_is_not() -> None:
    model, x = make_model(torch.float32, n_chains=2), draw_images(4, dtype=torch.float32)
    leaf, answers, gradients = x.clone().requires_grad_(), [], []
    for fast in (False, True):
        with seeded("draws"), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            answers.append(model(x))
            logits = model.adaptive_forward(leaf)
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), leaf)[0])
    assert answers[1].dtype == logits.dtype == torch.float32
    assert 0 < (answers[0] - answers[1]).abs().max() < 0.05 * answers[0].abs().max()
    exact, rough = (gradient.flatten(1) for gradient in gradients)
    assert torch.cosine_similarity(exact, rough).min() > 0.99


def without_bend(activation: Activation) -> Activation:
    def straight(a: Tensor, bend: bool) -> Jet:
        return activation(a, bend)._replace(bend=torch.zeros_like(a) if bend else None)

    return straight


def relative(came: Tensor, expected: Tensor) -> float:
    return ((came - expected).norm() / expected.norm()).item()


# activations and sweeps


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_activation_has_the_derivatives_of_torchs(kind: type[nn.Module]) -> None:
    a = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    value = kind()(a)
    (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), a)
    came = ACTIVATIONS[kind](a.detach().clone(), True)
    for mine, torchs in zip(came, (value, slope, bend), strict=True):
        torch.testing.assert_close(mine, torchs.detach(), rtol=1e-9, atol=1e-12)
    first = ACTIVATIONS[kind](a.detach().clone(), False)
    assert torch.equal(first.value, came.value)
    assert torch.equal(first.slope, came.slope)
    assert first.bend is None


def test_mish_neither_overflows_nor_loses_its_tail() -> None:
    """exp(89) is infinite in float32; far below zero mish(a) is a exp(a), not a rounding error of it."""
    far = mish(torch.tensor([-1e4, -200.0, 200.0, 1e4]), True)
    assert torch.equal(far.value, torch.tensor([0.0, 0.0, 200.0, 1e4]))
    assert torch.equal(far.slope, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(far.bend if far.bend is not None else far.value, torch.zeros(4))
    tail = torch.linspace(-80, -15, 50)
    torch.testing.assert_close(mish(tail.clone(), False).value, tail * tail.exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("preset", "channels"), PRESETS)
def test_sweeps_are_the_derivatives_of_the_misfit(preset: str, channels: int) -> None:
    model = make_model(channels=channels, preset=preset)
    sweeps, target = Sweeps(model.generator), 2 * draw_images(3, channels) - 1
    with seeded("chain codes"):
        z, a = torch.randn(3, 200, dtype=torch.float64), torch.randn(3, 200, dtype=torch.float64)
    kept = z.clone(), a.clone(), target.clone()
    leaf = z.clone().requires_grad_()
    misfit = (model.generate(leaf) - target).square().sum() / 2
    (slope,) = torch.autograd.grad(misfit, leaf, create_graph=True)
    (bent,) = torch.autograd.grad(slope, leaf, a)
    _, moved = torch.autograd.functional.jvp(model.generate, z, a)

    pull, records = sweeps.pull(z, target, record=True)
    image, tangents = sweeps.push(a, records)
    assert relative(pull, slope.detach()) < 1e-12
    assert relative(image, moved) < 1e-12
    assert relative(sweeps.pull_tangent(image, records, tangents), bent) < 1e-12
    assert all(torch.equal(now, before) for now, before in zip((z, a, target), kept, strict=True))
    without, none = sweeps.pull(z, target, record=False)
    assert torch.equal(without, pull)
    assert none == []


@pytest.mark.parametrize("channels", [1, 2, chains.FEW_CHANNELS, chains.FEW_CHANNELS + 1])
@pytest.mark.parametrize("geometry", [(4, 2, 1, 1), (3, 1, 0, 0), ((4, 3), (2, 1), (1, 0), (1, 0))], ids=str)
def test_deconvolution_is_torchs(channels: int, geometry: tuple[Any, ...]) -> None:
    kernel, stride, padding, extra = geometry
    with seeded("deconvolution"):
        layer = nn.ConvTranspose2d(6, channels, kernel, stride, padding, extra).double()
        h = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
        out = layer(h)
        c = torch.randn_like(out)
    mine = chains.Deconvolution(layer)
    torch.testing.assert_close(mine(h.detach()), out.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mine.pull(c), torch.autograd.grad(out, h, c)[0], rtol=1e-12, atol=1e-13)


# the chain


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize(("preset", "channels"), PRESETS)
def test_gradient_is_autograds(preset: str, channels: int, depth: int | None, recompute: bool) -> None:
    x = draw_images(3, channels)
    options: dict[str, Any] = {"channels": channels, "preset": preset}
    z, grad = code_and_gradient(make_model(recompute=recompute, **options), x, depth=depth)
    z_autograd, expected = code_and_gradient(by_autograd(make_model(**options)), x, depth=depth)
    assert expected.flatten(1).norm(dim=1).min().item() > 1e-4
    assert relative(z, z_autograd) < 1e-12
    assert relative(grad, expected) < 1e-10


@pytest.mark.parametrize("preset", ["repaired", "paper_literal"])
def test_gradient_is_autograds_in_float32_over_the_whole_chain(preset: str) -> None:
    x = draw_images(3, dtype=torch.float32)
    _, grad = code_and_gradient(make_model(torch.float32, preset=preset, steps=20), x)
    _, expected = code_and_gradient(by_autograd(make_model(torch.float32, preset=preset, steps=20)), x)
    assert grad.dtype == torch.float32
    assert relative(grad, expected) < 1e-5


@pytest.mark.parametrize("depth", [None, 1])
def test_recomputed_gradient_is_the_kept_one_in_bfloat16(depth: int | None) -> None:
    """As under `--precision bfloat16`; the way back runs outside autocast."""
    x, found = draw_images(3, dtype=torch.float32), {}
    for recompute in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, found[recompute] = code_and_gradient(make_model(torch.float32, recompute=recompute), x, depth=depth)
    _, exact = code_and_gradient(make_model(torch.float32), x, depth=depth)
    assert relative(found[True], found[False]) < 1e-6
    for grad in found.values():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), exact.flatten(), dim=0) > 0.999


def test_curvature_matters_here() -> None:
    """Without f'' the gradient is that of Gauss and Newton: the comparisons above would catch its loss."""
    model, x = make_model(), draw_images(2)
    _, grad = code_and_gradient(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "ACTIVATIONS", {kind: without_bend(f) for kind, f in ACTIVATIONS.items()})
        _, gauss_newton = code_and_gradient(model, x)
    assert relative(gauss_newton, grad) > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_equals_finite_differences_of_the_step_by_step_chain(recompute: bool) -> None:
    """Central differences of a chain that shares no code with the hand-written sweeps: `step` by autograd."""
    model, x = make_model(recompute=recompute), draw_images(2)
    weights = torch.linspace(-1.0, 1.5, 400, dtype=torch.float64).view(2, 200)

    def value(at: Tensor) -> float:
        with seeded("chain noise"):
            z = model.start(at)
            for _ in range(STEPS):
                z = model.step(z.detach(), at).detach()
        return (z * weights).sum().item()

    _, grad = code_and_gradient(model, x)
    with seeded("direction"):
        direction = grad.sign() * torch.rand_like(x) + 0.1 * torch.randn_like(x)
    step = 1e-3 / direction.norm().item()
    slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-6)


def test_draws_are_those_of_the_step_by_step_chain() -> None:
    """Every path takes the same numbers from torch's generator, so that a seed means the same chain in all of them."""
    x, after = draw_images(3), []
    for model in (make_model(), make_model(recompute=True), by_autograd(make_model())):
        for infer in (model.infer, model.infer_differentiably):
            with seeded("chain noise"):
                infer(x.clone().requires_grad_())
                after.append(torch.rand(1).item())
    assert len(set(after)) == 1


def test_victims_gradient_is_autograds() -> None:
    """Through EOT, chains per image and the classifier, as an attack asks for it."""
    x, y = draw_images(4), torch.arange(4)
    found = []
    for model in (make_model(attack_chains=2), by_autograd(make_model(attack_chains=2))):
        with seeded("chain noise"):
            found.append(Victim(model, "gradient", len(x), eot=3).gradient(x, y))
    for came, expected in zip(*found, strict=True):
        assert relative(came, expected) < 1e-10


# weights to be learned, other generators


def test_weights_to_be_learned_get_their_gradients() -> None:
    model, x = make_model(), draw_images(2)
    parameters = [*model.generator.parameters(), model.log_sigma]
    for parameter in parameters:
        parameter.requires_grad_()
    model.infer_differentiably(x).square().sum().backward()
    for parameter in parameters:
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


@pytest.mark.parametrize(
    "generator",
    [
        nn.Sequential(nn.ConvTranspose2d(200, 1, 28), nn.Softsign()),
        nn.Sequential(nn.Mish(), nn.ConvTranspose2d(200, 1, 28)),
        nn.Sequential(nn.ConvTranspose2d(200, 4, 28), nn.ConvTranspose2d(4, 1, 1, groups=1, dilation=2)),
        nn.Sequential(nn.ConvTranspose2d(200, 2, 28), nn.ConvTranspose2d(2, 2, 1, groups=2), nn.Conv2d(2, 1, 1)),
    ],
    ids=["activation", "first layer", "dilation", "groups"],
)
def test_a_generator_of_other_layers_is_left_to_autograd(generator: nn.Sequential) -> None:
    model, x = make_model(), draw_images(2)
    assert can_sweep(model.generator)
    assert not can_sweep(generator)
    model.generator = generator.double().requires_grad_(False)
    z, grad = code_and_gradient(model, x)
    with seeded("chain noise"):
        torch.testing.assert_close(model.infer(x), z, rtol=1e-12, atol=1e-14)
    assert bool(grad.flatten(1).any(1).all())


def test_a_second_gradient_is_refused_rather_than_wrong() -> None:
    leaf = draw_images(1).requires_grad_()
    loss = make_model().infer_differentiably(leaf).square().sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_kept_graph_gives_the_same_gradient_again(recompute: bool) -> None:
    leaf = draw_images(2).requires_grad_()
    z = make_model(recompute=recompute).infer_differentiably(leaf).sum()
    (first,) = torch.autograd.grad(z, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(z, leaf)
    assert torch.equal(first, again)


# memory and cost


def kept_floats(rows: int, *, track: bool = True, **options: Any) -> int:
    """Numbers that the graph of a chain keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(part: Tensor) -> Tensor:
        kept[part.data_ptr()] = part.numel()
        return part

    x = draw_images(rows).requires_grad_(track)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        z = make_model(**options).infer_differentiably(x)
    assert z.requires_grad == track
    return sum(kept.values())


def test_memory_grows_linearly_in_chains_and_steps() -> None:
    activations = 128 * 3 * 3 + 128 * 7 * 7 + 64 * 14 * 14 + 28 * 28
    for rows, steps in ((1, 2), (3, 2), (2, 6)):
        assert kept_floats(rows, steps=steps) == rows * (2 * steps * activations + 28 * 28)


def test_recomputing_keeps_one_code_a_step() -> None:
    for rows, steps in ((1, 2), (3, 2), (2, 6)):
        assert kept_floats(rows, steps=steps, recompute=True) == rows * (200 * steps + 28 * 28)


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    assert kept_floats(2, track=False) == 0
    with torch.no_grad():
        assert not make_model().infer_differentiably(draw_images(1).requires_grad_()).requires_grad


@pytest.mark.parametrize(("recompute", "extra"), [(False, 0), (True, 4 * STEPS)])
def test_a_step_costs_two_passes_and_its_way_back_two_more(
    monkeypatch: pytest.MonkeyPatch, recompute: bool, extra: int
) -> None:
    """Four layers a pass; the first step's way back stops at the image, for nothing comes before its code."""
    passed: Counter[str] = Counter()
    for kind in (chains.Deconvolution, chains.FromPoint):
        for name in ("push", "pull"):
            monkeypatch.setattr(kind, name, count(getattr(kind, name), name, passed))
    code_and_gradient(make_model(recompute=recompute), draw_images(1))
    assert passed == {"push": 4 * 2 * STEPS + extra, "pull": 4 * (2 * STEPS - 1) + extra}
    passed.clear()
    code_and_gradient(make_model(recompute=recompute), draw_images(1), depth=1)
    assert passed == {"push": 4 * (STEPS + 1) + extra // STEPS, "pull": 4 * STEPS + extra // STEPS}


def count(method: Any, name: str, passed: Counter[str]) -> Any:
    """The method, counted."""

    def counted(self: Any, h: Tensor) -> Tensor:
        passed[name] += 1
        return method(self, h)

    return counted
