"""Fortified Networks: autoencoder and losses by hand, `fortify` on any module, the net, its gradient, its options."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import ThreatModel, UsageError, evaluate, wrap
from robench.defenses.convnet import make_convnet
from robench.defenses.fortified import (
    Fortified,
    OwnFortified,
    Trace,
    Training,
    fortify,
    make_cnn,
    reconstruction_losses,
)
from robench.defenses.fortified.dae import ConvDAE, DenseDAE
from robench.defenses.fortified.train import total_loss
from robench.draws import has_shared_layers
from robench.rng import seeded
from robench.weights import weights_stem

pytestmark = pytest.mark.usefixtures("one_thread")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def draw(*shape: int) -> Tensor:
    with seeded("fortified", *shape):
        return torch.rand(*shape)


def make(**options: Any) -> Fortified:
    with seeded("fortified weights"):
        return Fortified(**options).freeze()


# the autoencoder


@pytest.mark.parametrize(("activation", "expected"), [("leaky_relu", [-0.02, -0.42]), ("relu", [0.1, 0.0])])
def test_dense_autoencoder_by_hand(activation: str, expected: list[float]) -> None:
    """W h + b = (-1, 1.5, 0); code (-0.2, 1.5, 0), ReLU: (0, 1.5, 0); W^T code + c = (-0.1, -2.1) or (0.1, -1.7)."""
    dae = DenseDAE(2, 3, noise=0.0, activation=activation)  # type: ignore[arg-type]  # parametrised
    with torch.no_grad():
        dae.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0], [1.0, 0.0]]))
        dae.bias_hidden.copy_(torch.tensor([0.0, 0.5, -1.0]))
        dae.bias_visible.copy_(torch.tensor([0.1, -0.2]))
        came = dae(torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(came, torch.tensor([expected]))


def test_convolutional_autoencoder_by_hand() -> None:
    """A kernel that looks one pixel to the right, and its transpose, which puts the value back where it was."""
    dae = ConvDAE(1, 1, noise=0.0)
    with torch.no_grad():
        dae.weight.zero_()
        dae.weight[0, 0, 2, 3] = 2.0
        image = torch.arange(1.0, 7.0).view(1, 1, 1, 6)
        code = dae.encode(image)
        came = dae(image)
    torch.testing.assert_close(code.flatten(), torch.tensor([4.0, 6.0, 8.0, 10.0, 12.0, 0.0]))
    torch.testing.assert_close(came.flatten(), torch.tensor([0.0, 8.0, 12.0, 16.0, 20.0, 24.0]))


@pytest.mark.parametrize("dae", [DenseDAE(7, 5), ConvDAE(3, 4)], ids=["dense", "conv"])
def test_decoder_is_the_transposed_encoder(dae: DenseDAE | ConvDAE) -> None:
    """<W h, z> = <h, W^T z>, and there is one weight tensor besides two biases."""
    assert [name for name, _ in dae.named_parameters()] == ["weight", "bias_hidden", "bias_visible"]
    h = draw(2, 7) if isinstance(dae, DenseDAE) else draw(2, 3, 9, 9)
    with torch.no_grad():
        code = dae.encode(h)
        z = draw(*code.shape)
        torch.testing.assert_close((code * z).sum(), (h * dae.decode(z)).sum())
        assert dae(h).shape == h.shape


def test_noise_has_its_standard_deviation_and_can_be_scaled() -> None:
    """Of an identity map (W = I, positive input) the output's spread is that of the noise."""
    dae = DenseDAE(1, 1, noise=0.1)
    h = torch.full((20_000, 1), 5.0)
    with torch.no_grad(), seeded("noise"):
        dae.weight.fill_(1.0)
        assert (dae(h) - h).std().item() == pytest.approx(0.1, rel=0.03)
        assert (dae(h, 0.5) - h).std().item() == pytest.approx(0.05, rel=0.03)
        state = torch.get_rng_state()
        assert torch.equal(dae(h, 0.0), h)
        assert torch.equal(torch.get_rng_state(), state)


def test_weights_start_within_the_released_codes_bound() -> None:
    with seeded("dae"):
        dae = DenseDAE(128, 256)
        conv = ConvDAE(8, 4)
    bound = 1 / math.sqrt(128 + 256)
    assert 0.99 * bound < dae.weight.abs().max().item() <= bound
    assert conv.weight.abs().max().item() <= 1 / math.sqrt(25 * 8 + 25 * 4)
    assert not dae.bias_hidden.any()
    assert not dae.bias_visible.any()


# the losses


def make_traces() -> tuple[Trace, Trace]:
    """Two layers; squared errors of clean images 0.5 and 1, of adversarial ones against the clean layer 7.5 and 4."""
    hidden = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1, 1, 1)]
    output = torch.zeros(2, 10)
    clean = Trace(output, hidden, [torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.ones(2, 1, 1, 1)])
    other = [torch.full((2, 2), 100.0), torch.full((2, 1, 1, 1), 100.0)]  # must not matter: the target is clean
    return clean, Trace(output, other, [torch.zeros(2, 2), torch.full((2, 1, 1, 1), -2.0)])


def test_losses_of_reconstruction_by_hand() -> None:
    clean, adversarial = make_traces()
    rec, adv = reconstruction_losses(clean, adversarial)
    assert (rec.item(), adv.item()) == (1.5, 11.5)
    assert reconstruction_losses(clean, None).adv.item() == 0
    assert reconstruction_losses(Trace(torch.zeros(2, 10)), Trace(torch.zeros(2, 10))).rec.item() == 0


def test_error_of_an_example_is_a_sum_over_features_and_layers() -> None:
    clean, _ = make_traces()
    assert clean.error().tolist() == [2.0, 2.0]


def test_whole_loss_by_hand() -> None:
    clean, adversarial = make_traces()
    y = torch.tensor([0, 1])
    loss = total_loss(make(lambda_rec=2.0, lambda_adv=0.5), clean, adversarial, y)
    assert loss.item() == pytest.approx(2 * math.log(10) + 2 * 1.5 + 0.5 * 11.5)
    assert total_loss(make(lambda_rec=0, lambda_adv=0), clean, adversarial, y).item() == pytest.approx(2 * math.log(10))


@pytest.mark.parametrize("stop", [False, True])
def test_stop_gradient_trains_the_autoencoders_alone(stop: bool) -> None:
    """As the released ECMLP_block, where what is compared starts from stop_gradient(h): no gradient below the layer."""
    with seeded("stop"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
        fortified = fortify(net, ["1"], input_shape=(1, 2, 2), hidden=5, noise=0.0)
    clean, adversarial = fortified.trace(draw(6, 1, 2, 2)), fortified.trace(draw(6, 1, 2, 2) + 1)
    losses = reconstruction_losses(clean, adversarial, stop_gradient=stop)
    assert losses.rec.item() == pytest.approx((clean.decoded[0] - clean.hidden[0]).square().mean().item())
    assert losses.adv.item() == pytest.approx((adversarial.decoded[0] - clean.hidden[0]).square().mean().item())
    for loss in losses:
        fortified.zero_grad()
        loss.backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in fortified.daes.parameters())
        assert (net[1].weight.grad is None) == stop


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_stop_gradient_in_half_precision(kind: str) -> None:
    fortified, x = fortify(make_own(), ["body"], input_shape=(3, 8, 8)), draw(2, 3, 8, 8)
    if kind == "bfloat16":
        fortified, x = fortified.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        trace = fortified.trace(x)
    assert trace.hidden[0].dtype == torch.bfloat16
    loss = reconstruction_losses(trace, None, stop_gradient=True).rec
    assert loss.dtype == torch.float32
    loss.backward()


def test_half_precision_is_compared_in_float32() -> None:
    hidden = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    trace = Trace(torch.zeros(1, 10), [hidden], [hidden + 0.0078125])
    assert reconstruction_losses(trace, None).rec.dtype == torch.float32
    assert reconstruction_losses(trace, None).rec.item() == pytest.approx(0.0078125**2)


# fortify


class Own(nn.Module):
    """A user's network: a block that is never run, batch normalisation, a block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Linear(6, 7)
        self.unused = nn.Linear(2, 2)
        self.memory = nn.LSTM(7, 7, batch_first=True)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.stem(x).mean((2, 3)))
        return self.head(self.memory(h[:, None])[0][:, 0])


def make_own() -> Own:
    with seeded("own"):
        return Own()


def test_fortify_replaces_a_layer_by_its_reconstruction() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    fortified = fortify(net, ["1"], input_shape=(1, 2, 2), hidden=5, noise=0.0)
    x = draw(6, 1, 2, 2)
    trace = fortified.trace(x)
    hidden = net[1](x.flatten(1))
    torch.testing.assert_close(trace.hidden[0], hidden)
    torch.testing.assert_close(trace.decoded[0], fortified.daes[0](hidden))
    torch.testing.assert_close(trace.output, net[2](fortified.daes[0](hidden)))
    assert torch.equal(fortified(x), trace.output)
    assert not torch.allclose(net(x), trace.output)  # the module itself is as it was: no hook stays


@pytest.mark.parametrize("channels", [0, -3])
def test_fortify_takes_a_positive_number_of_channels(channels: int) -> None:
    with pytest.raises(UsageError, match=rf"^fortify: conv_hidden must be at least 1; got {channels}$"):
        fortify(make_own(), ["stem"], input_shape=(3, 8, 8), conv_hidden=channels)


def test_fortify_on_any_module() -> None:
    own = make_own()
    before = copy.deepcopy(own.state_dict())
    own.stem.eval()
    fortified = fortify(own, ["stem", "body"], input_shape=(3, 8, 8), hidden=9, conv_hidden=5)
    assert [type(dae).__name__ for dae in fortified.daes] == ["ConvDAE", "DenseDAE"]
    shapes = [tuple(value.shape) for name, value in fortified.named_parameters() if name.startswith("daes.")]
    assert shapes == [(5, 6, 5, 5), (5,), (6,), (9, 7), (9,), (7,)]
    assert count(fortified) == count(own) + (25 * 5 * 6 + 5 + 6) + (9 * 7 + 9 + 7)
    assert own.training
    assert not own.stem.training  # modes and statistics are as they were
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    defense = wrap(copy.deepcopy(fortified), num_classes=4, input_shape=(3, 8, 8), randomized=True)
    assert defense(draw(2, 3, 8, 8)).shape == (2, 4)


class InPlace(nn.Module):
    """A residual block that adds and cuts in place, as torchvision's ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.cut = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.cut(self.first(x)))
        h += x
        return self.cut(h).mean((2, 3))


def test_what_works_in_place_downstream_leaves_the_trace_alone() -> None:
    with seeded("in place"):
        fortified = fortify(InPlace(), ["first", "second"], input_shape=(2, 5, 5), noise=0.0)
    trace = fortified.trace(draw(3, 2, 5, 5))
    for dae, hidden, decoded in zip(fortified.daes, trace.hidden, trace.decoded, strict=True):
        torch.testing.assert_close(decoded, dae(hidden))
    reconstruction_losses(trace, None).rec.backward()


def test_fortify_without_layers_changes_nothing() -> None:
    own = make_own().eval()
    x = draw(3, 3, 8, 8)
    assert torch.equal(fortify(own, [], input_shape=(3, 8, 8))(x), own(x))


def test_fortify_on_convnet() -> None:
    net = make_convnet(1)
    fortified = fortify(net, ["4", "12"], input_shape=(1, 28, 28), hidden=64)
    trace = fortified.trace(draw(2, 1, 28, 28))
    assert [tuple(h.shape[1:]) for h in trace.hidden] == [(128, 11, 11), (140,)]
    assert trace.output.shape == (2, 10)


def test_a_layer_that_is_used_twice_is_fortified_twice() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared)
    trace = fortify(net, ["1"], input_shape=(1, 2, 2)).trace(draw(2, 1, 2, 2))
    assert len(trace.hidden) == len(trace.decoded) == 2


class Bottleneck(nn.Module):
    """One ReLU for two shapes, as in the blocks of torchvision's deeper ResNets, and a pooled layer of c x 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.relu = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 12, 1), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.relu(self.wide(self.relu(self.narrow(x))))).flatten(1))


def test_a_layer_whose_calls_differ_in_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r'^fortify: layer "relu" is called 2 times .*: \(3, 5, 5\), \(12, 5, 5\); .*'):
        fortify(Bottleneck(), ["relu"], input_shape=(2, 5, 5))


def test_a_pooled_layer_gets_a_dense_autoencoder() -> None:
    with seeded("pooled"):
        fortified = fortify(Bottleneck(), ["pool"], input_shape=(2, 5, 5), hidden=7, noise=0.0)
    (dae,) = fortified.daes
    assert count(dae) == 7 * 12 + 7 + 12
    trace = fortified.trace(draw(3, 2, 5, 5))
    expected = DenseDAE.forward(dae, trace.hidden[0].flatten(1))  # type: ignore[arg-type]  # a PooledDAE
    assert torch.equal(trace.decoded[0], expected.view(3, 12, 1, 1))


class Answers(nn.Module):
    """A network that returns a dict, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.own = make_own()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.own(x)}


@pytest.mark.parametrize("layers", [["own.body"], []], ids=["one", "none"])
def test_a_module_may_return_a_dict(layers: list[str]) -> None:
    trace = fortify(Answers(), layers, input_shape=(3, 8, 8)).trace(draw(2, 3, 8, 8))
    assert trace.output["logits"].shape == (2, 4)
    assert (reconstruction_losses(trace, trace).adv.item() > 0) == bool(layers)


def test_input_shape_is_that_of_a_defense_or_asked_for() -> None:
    defense = wrap(make_own(), num_classes=4, input_shape=(3, 8, 8))
    assert fortify(defense, ["module.body"])(draw(2, 3, 8, 8)).shape == (2, 4)
    with pytest.raises(UsageError, match=r"^fortify: needs the shape of one image.*input_shape=\(3, 32, 32\)\)$"):
        fortify(make_own(), ["body"])


def test_an_input_shape_that_does_not_fit_is_one_line() -> None:
    own = make_own()
    with pytest.raises(UsageError, match=r"^fortify: the module does not take images of input_shape \(1, 8, 8\): .*"):
        fortify(own, ["body"], input_shape=(1, 8, 8))
    assert own.training
    assert not own.body._forward_hooks


def test_layers_given_as_text_are_refused() -> None:
    with pytest.raises(UsageError, match=r'^fortify: layers takes a list .*"body"\. Write layers=\["body"\]$'):
        fortify(make_own(), "body", input_shape=(3, 8, 8))


def test_hooks_are_gone_after_an_error() -> None:
    own = make_own()
    fortified = fortify(own, ["body"], input_shape=(3, 8, 8))
    with pytest.raises(RuntimeError):
        fortified(draw(2, 2, 8, 8))
    assert not own.body._forward_hooks


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["bod"], r'no layer "bod" \(did you mean "body"\?\); there are: stem, stem\.0, .*head$'),
        (["body", "body"], r"^fortify: each layer is named once; got body, body$"),
        (["unused"], r'^fortify: layer "unused" is not run'),
        (["memory"], r'^fortify: layer "memory" must put out a tensor of 2 to 4 axes'),
    ],
)
def test_wrong_layers_are_one_line(layers: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fortify(make_own(), layers, input_shape=(3, 8, 8))


def wrap_own(**options: Any) -> OwnFortified:
    with seeded("wrapped"):
        net = fortify(make_own(), options.pop("layers", ["stem", "body"]), input_shape=(3, 8, 8), **options)
    defense = wrap(net, num_classes=4, input_shape=(3, 8, 8), name="mine")
    assert isinstance(defense, OwnFortified)
    return defense


def test_wrap_keeps_what_the_autoencoders_bring() -> None:
    defense, x = wrap_own(), draw(6, 3, 8, 8)
    assert (defense.name, defense.randomized, defense.detection_scores) == ("mine", True, ("reconstruction",))
    assert not torch.equal(defense(x), defense(x))
    with defense.without_randomness():
        assert torch.equal(defense(x), defense(x))
        assert torch.equal(defense.detection_score(x), defense.net.trace(x).error())
    assert set(defense.diagnostics(x, torch.arange(6) % 4)) == {"reconstruction_r2_stem", "reconstruction_r2_body"}
    assert not any(parameter.requires_grad or defense.training for parameter in defense.parameters())
    with pytest.raises(UsageError, match=r'here "pgd"; got "fgsm".*by fortify\(\.\.\., training=Training'):
        defense.recipe("fgsm")


def test_wrap_of_what_draws_nothing() -> None:
    assert not wrap_own(noise=0.0).randomized
    plain = wrap_own(layers=[])
    assert (plain.randomized, plain.detection_scores) == (False, ())
    with pytest.raises(UsageError, match=r'^defense "mine" has no detection score$'):
        plain.detection_score(draw(2, 3, 8, 8))
    assert wrap(fortify(make_own(), [], input_shape=(3, 8, 8)), num_classes=4, input_shape=(3, 8, 8), randomized=True)


def test_an_attack_may_switch_the_noise_of_a_wrapped_network_off() -> None:
    result = evaluate(
        wrap_own(), "pgd(steps=2, randomness=off)", ThreatModel("linf", 0.1), (draw(6, 3, 8, 8), torch.arange(6) % 4)
    )
    assert result.spec.randomized


def test_training_of_a_wrapped_network_is_that_of_its_options() -> None:
    defense = wrap_own(training=Training(train_eps=0.2, train_attack="fgsm"))
    assert defense.recipe().facts()["training_attack"] == (
        "one step of linf 0.2 from the image, against the net's own answer"
    )
    with pytest.raises(UsageError, match=r"train_eps above 0 and at most 1; got 2\.0, 2\.0 and 8\.0$"):
        Training(train_eps=8.0)


# the defense


@pytest.mark.parametrize(("channels", "side", "parameters"), [(1, 28, 710_218), (3, 32, 898_634)])
def test_net_is_that_of_the_released_code(channels: int, side: int, parameters: int) -> None:
    net = make_cnn(channels, side=side)
    assert count(net) == parameters
    shapes, x = [], torch.zeros(2, channels, side, side)
    for block in net.children():
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    second = (side // 2 - 6) // 2 + 1
    assert shapes == [(64, side // 2, side // 2), (128, second, second), (128,), (10,)]


def test_parameters_of_the_autoencoders() -> None:
    assert count(make()) == 710_218 + 256 * 128 + 256 + 128
    assert count(make(layers=())) == 710_218
    assert count(make(layers=["conv1", "conv2"])) == 710_218 + 25 * 64**2 + 2 * 64 + 25 * 128**2 + 2 * 128


@pytest.mark.parametrize(
    ("options", "randomized"),
    [({}, True), ({"noise": 0.0}, False), ({"layers": ()}, False), ({"layers": ["conv1"]}, True)],
)
def test_randomized_if_and_only_if_noise_is_drawn(options: dict[str, Any], randomized: bool) -> None:
    defense, x = make(**options), draw(2, 1, 28, 28)
    assert defense.randomized == randomized
    assert torch.equal(defense(x), defense(x)) != randomized
    with defense.without_randomness():
        assert torch.equal(defense(x), defense(x))
    assert torch.equal(defense(x), defense(x)) != randomized


@pytest.mark.parametrize("layers", [("code",), ("conv1", "conv2", "code"), ()])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
def test_gradient_equals_finite_differences_with_frozen_noise(layers: tuple[str, ...], activation: str) -> None:
    defense = make(layers=layers, activation=activation).double()
    x = 0.2 + 0.6 * draw(2, 1, 28, 28).double()
    weights = torch.linspace(-1, 1, 20, dtype=torch.float64).view(2, 10)

    def value(at: Tensor) -> Tensor:
        with seeded("frozen noise"):
            return (defense.adaptive_forward(at) * weights).sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    assert bool((grad.flatten(1).norm(dim=1) > 0).all())
    with seeded("directions"):
        directions = [torch.randn_like(x), grad / grad.abs().max()]
    for direction in directions:
        slope = (value(x + 1e-6 * direction) - value(x - 1e-6 * direction)).item() / 2e-6
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-4)


def test_detection_score_is_the_error_of_reconstruction() -> None:
    defense, x = make(noise=0.0), draw(4, 1, 28, 28)
    hidden = defense.net.module[:3](x)  # type: ignore[index]  # a Sequential
    expected = (defense.net.daes[0](hidden) - hidden).square().sum(1)
    torch.testing.assert_close(defense.detection_score(x), expected)
    torch.testing.assert_close(defense.detection_score(x, "reconstruction"), expected)
    variance = (hidden - hidden.mean(0)).square().sum()
    figures = defense.diagnostics(x, torch.zeros(4, dtype=torch.int64))
    assert figures == {"reconstruction_r2_code": pytest.approx(1 - (expected.sum() / variance).item())}
    with pytest.raises(UsageError, match=r'detection scores reconstruction; got "density"'):
        defense.detection_score(x, "density")
    with pytest.raises(UsageError, match=r"has no detection score"):
        make(layers=()).detection_score(x)


def test_diagnostics_name_the_layer_whatever_the_order() -> None:
    x, y = draw(6, 3, 8, 8), torch.arange(6) % 4
    defense = wrap_own(layers=["body", "stem"], noise=0.0)
    trace = defense.net.trace(x)
    assert trace.layers == ["stem", "body"]
    figures = defense.diagnostics(x, y)
    for layer, h, d in zip(trace.layers, trace.hidden, trace.decoded, strict=True):
        left = (d - h).square().sum() / (h - h.mean(0)).square().sum()
        assert figures[f"reconstruction_r2_{layer}"] == pytest.approx(1 - left.item())
    turned, straight = make(layers=["code", "conv1"]), make(layers=["conv1", "code"])
    assert {name: value.shape for name, value in turned.state_dict().items()} == {
        name: value.shape for name, value in straight.state_dict().items()
    }


@pytest.mark.parametrize(
    ("options", "stem"),
    [
        ({}, "mnist"),
        ({"noise": 0.0, "train_eps": 0.3}, "mnist"),
        ({"layers": []}, "mnist-plain"),
        ({"layers": [], "lambda_rec": 0}, "mnist-plain"),
        ({"lambda_rec": 0, "lambda_adv": 0}, "mnist-dae"),
        ({"lambda_adv": 0}, "mnist-rec"),
        ({"lambda_rec": 0.2, "lambda_adv": 0.02}, "mnist-rec0.2_adv0.02"),
        ({"train_attack": "fgsm"}, "mnist-fgsm"),
        ({"layers": [], "train_attack": "fgsm"}, "mnist-plain-fgsm"),
        ({"layers": ["conv1", "code"], "hidden": 64}, "mnist-conv1_code-hidden64"),
        ({"layers": ["code", "conv1"]}, "mnist-conv1_code"),
        ({"activation": "relu", "stop_gradient": True}, "mnist-stop-relu"),
    ],
)
def test_weights_are_told_apart(options: dict[str, Any], stem: str) -> None:
    assert weights_stem(Fortified, "mnist", options) == stem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["conv3"]}, r"^fortified: layers must be a list out of conv1, conv2, code"),
        ({"hidden": 0}, r"^fortified: hidden must be at least 1; got 0$"),
        ({"noise": -0.1}, r"^fortified: noise must be finite and at least 0; got -0\.1$"),
        ({"noise": math.nan}, r"^fortified: noise .* got nan$"),
        ({"lambda_rec": -1.0}, r"^fortified: lambda_rec and lambda_adv must be at least 0"),
        ({"lambda_adv": math.nan}, r"^fortified: lambda_rec and lambda_adv must be at least 0"),
        ({"train_eps": 0.0}, r"^fortified: .* train_eps above 0"),
        ({"side": 8}, r"^fortified: side must be at least 12; got 8$"),
    ],
    ids=str,
)
def test_option_out_of_range_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Fortified(**options)


def test_options_for_a_dataset() -> None:
    assert Fortified.options_for((3, 32, 32), 10) == {"channels": 3, "side": 32, "num_classes": 10}
    with pytest.raises(UsageError, match=r"^fortified takes square images of side 12 or more; .*28, 32"):
        Fortified.options_for((1, 28, 32), 10)


def test_recipe_follows_the_training_attack() -> None:
    assert make().recipe().name == "pgd"
    assert make(train_attack="fgsm").recipe("fgsm").name == "fgsm"
    with pytest.raises(UsageError, match=r'^fortified: the recipe follows .*"pgd"; got "fgsm".*train_attack=fgsm'):
        make().recipe("fgsm")


# draws that share layers


@pytest.mark.parametrize(
    ("layers", "rows"), [(["code"], [3, 3, 3, 12]), (["conv1"], [3, 12, 12, 12]), (["conv2", "code"], [3, 3, 12, 12])]
)
def test_draws_share_the_layers_before_the_first_autoencoder(layers: list[str], rows: list[int]) -> None:
    defense, x = make(layers=layers), draw(3, 1, 28, 28)
    seen: list[int] = []
    for layer in defense.net.module.children():
        layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(len(inputs[0])))
    with seeded("draws"):
        came = defense.forward_draws(x, 4)
    assert seen == rows
    with seeded("draws"):
        torch.testing.assert_close(came, defense(x.repeat(4, 1, 1, 1)).unflatten(0, (4, 3)))
    assert has_shared_layers(defense)


def test_draws_share_no_layers_of_a_net_without_noise_or_of_ones_own() -> None:
    """A way around a fortified layer would bring fewer rows than the layer itself."""
    for defense in (make(layers=[]), make(noise=0.0), wrap_own()):
        assert not has_shared_layers(defense)
