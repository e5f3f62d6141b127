"""The Short Run classifier: the papers' tables, one step by hand, gradients against finite differences, the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench import UsageError, Victim, load_data, load_defense
from robench.defense import weights_digest
from robench.defenses.convnet.model import make_convnet
from robench.defenses.shortrun import ShortRun, auto_sigma, make_classifier, make_generator
from robench.defenses.shortrun.figures import chain_icc
from robench.defenses.shortrun.model import log_shares
from robench.rng import seeded
from robench.weights import read_card, shipped_weights, weights_folder

CHAIN_STEPS = 20
CARD_FIELDS = {"recipe", "train_digest", "seed", "device", "wall_time_s", "test", "known_breakage", "weights_digest"}


def make_model(gain: float = 1.5, dtype: torch.dtype = torch.float64, **options: Any) -> ShortRun:
    """An untrained model whose generator is steep enough for the image to matter to the code."""
    with seeded("shortrun weights"):
        model = ShortRun(**{"sigma": 0.4, **options})
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.mul_(gain)
    model.to(dtype).freeze()
    return model


def draw_images(n: int, channels: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    with seeded("shortrun images"):
        return torch.rand(n, channels, 28, 28, dtype=dtype)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny batches are quicker on one thread, above all on a busy machine; the shipped weights take all there are."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches the type checks of the tests off, so that a wrong value meets the code's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes_after(net: nn.Sequential, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[int, ...]]:
    """The shape after each layer of the given kinds, without the batch axis."""
    found = []
    for layer in net:
        x = layer(x)
        if isinstance(layer, kinds):
            found.append(tuple(x.shape[1:]))
    return found


# the tables of the thesis


@pytest.mark.parametrize("preset", ["repaired", "paper_literal"])
def test_generator_is_table_a1(preset: str) -> None:
    generator = make_generator(3, preset)
    assert count(generator) == 627_011
    shapes = shapes_after(generator, torch.zeros(2, 200, 1, 1), (nn.ConvTranspose2d,))
    assert shapes == [(128, 3, 3), (128, 7, 7), (64, 14, 14), (3, 28, 28)]


@pytest.mark.parametrize("preset", ["repaired", "paper_literal"])
def test_small_classifier_is_table_a2(preset: str) -> None:
    classifier = make_classifier(10, preset)
    assert count(classifier) == 40_230
    assert shapes_after(classifier, torch.zeros(2, 200), (nn.Linear,)) == [(140,), (80,), (10,)]


def test_convnet_is_table_a3() -> None:
    net = make_convnet(3)
    assert count(net) == 891_438
    shapes = shapes_after(net, torch.zeros(2, 3, 28, 28), (nn.Conv2d, nn.MaxPool2d, nn.Flatten, nn.Linear))
    assert shapes == [
        (64, 25, 25),
        (128, 22, 22),
        (128, 11, 11),
        (128, 8, 8),
        (200, 6, 6),
        (200, 3, 3),
        (1800,),
        (140,),
        (80,),
        (10,),
    ]


def test_model_is_generator_classifier_and_sigma() -> None:
    model = ShortRun(channels=3)
    assert count(model) == 627_011 + 40_230 + 1
    assert model.input_shape == (3, 28, 28)
    assert math.isclose(model.log_sigma.exp().item(), 1.216, rel_tol=1e-6)
    assert math.isclose(ShortRun(preset="paper_literal").log_sigma.exp().item(), 6.4, rel_tol=1e-6)


def test_heads_have_the_range_that_the_fact_sheet_says() -> None:
    """Tanh spans the data's range; Mish then sigmoid as printed cannot go below sigmoid(-0.3088) = 0.4234."""
    before = torch.linspace(-40, 40, 80_001)
    repaired, literal = (make_generator(1, preset)[7:](before) for preset in ("repaired", "paper_literal"))
    assert (repaired.min().item(), repaired.max().item()) == (-1.0, 1.0)
    assert literal.min().item() == pytest.approx(0.42340, abs=1e-5)
    assert literal.max().item() == 1.0


def test_printed_classifier_clamps_its_logits() -> None:
    with seeded("classifier"):
        codes = 10 * torch.randn(500, 200)
        literal, repaired = (make_classifier(10, preset)(codes) for preset in ("paper_literal", "repaired"))
    assert literal.min().item() > -0.309
    assert repaired.min().item() < -0.309


# the chain


class Linear(nn.Module):
    """A generator with a known Jacobian: x = J z + bias."""

    def __init__(self, jacobian: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.jacobian, self.bias = jacobian, bias

    def forward(self, z: Tensor) -> Tensor:
        return (z[:, :, 0, 0] @ self.jacobian.T + self.bias).unflatten(1, (1, 28, 28))


def test_one_step_is_equation_3_9() -> None:
    """The step is z - s (z + J^T (J z + b - (2 x - 1)) / sigma^2) + sqrt(2 s) noise, here with numpy."""
    model = make_model(sigma=0.7, step_size=0.02)
    rng = np.random.Generator(np.random.PCG64(0))
    jacobian, bias = rng.normal(size=(784, 200)), rng.normal(size=784)
    model.generator = Linear(torch.from_numpy(jacobian), torch.from_numpy(bias))  # type: ignore[assignment]
    x, z = draw_images(3), torch.from_numpy(rng.normal(size=(3, 200)))
    with seeded("one step"):
        noise = torch.randn(3, 200, dtype=torch.float64).numpy()
    with seeded("one step"):
        came = model.step(z.clone(), x).detach().numpy()
    sigma = model.log_sigma.exp().item()
    assert sigma == pytest.approx(0.7, rel=1e-6)
    misfit = z.numpy() @ jacobian.T + bias - (2 * x.flatten(1).numpy() - 1)
    expected = z.numpy() - 0.02 * (z.numpy() + misfit @ jacobian / sigma**2) + math.sqrt(0.04) * noise
    np.testing.assert_allclose(came, expected, rtol=1e-12, atol=1e-12)


def test_chain_starts_from_the_prior_and_takes_its_steps() -> None:
    model = make_model(steps=3)
    x = draw_images(2)
    with seeded("chain"):
        z = torch.randn(2, 200, dtype=torch.float64)
        for _ in range(3):
            z = model.step(z.detach(), x).detach()
    with seeded("chain"):
        torch.testing.assert_close(model.infer(x), z, rtol=1e-12, atol=1e-14)


def test_draws_differ_and_one_seed_gives_one_answer() -> None:
    model, x = make_model(n_chains=2), draw_images(2)
    with seeded("first"):
        first, second = model(x), model(x)
    with seeded("first"):
        again = model(x)
    assert torch.equal(first, again)
    assert bool((first != second).any(1).all())
    with seeded("same image"):
        codes = model.infer(x[:1].repeat(2, 1, 1, 1))
    assert not torch.equal(codes[0], codes[1])


def test_without_randomness_the_answer_is_one_and_after_it_draws_again() -> None:
    model, x = make_model(steps=3, n_chains=2), draw_images(2)
    with model.without_randomness():
        first, second = model(x), model.adaptive_forward(x)
        torch.testing.assert_close(first, second)  # as many chains as one likes are one chain
        assert torch.equal(model.start(x), torch.zeros(2, 200, dtype=x.dtype))
    with seeded("draws"):
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("preset", ["repaired", "paper_literal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_keeps_dtype_and_no_graph(preset: str, dtype: torch.dtype) -> None:
    model = make_model(channels=3, preset=preset, n_chains=2, dtype=dtype)
    logits = model(draw_images(2, 3, dtype).requires_grad_())
    assert logits.shape == (2, 10)
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    assert not logits.requires_grad
    assert logits.grad_fn is None


# aggregation


def plant_codes(model: ShortRun, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Chain c of an image gets the image's first 200 values times c + 1 as its code."""

    def infer(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :200] * (torch.arange(len(x)) // images + 1)[:, None]

    monkeypatch.setattr(model, "infer", infer)


@pytest.mark.parametrize("aggregate", ["mean_logits", "mean_z", "vote"])
def test_aggregation_over_chains(monkeypatch: pytest.MonkeyPatch, aggregate: str) -> None:
    model, x = make_model(n_chains=3, aggregate=aggregate), 20 * draw_images(4) - 10
    plant_codes(model, monkeypatch, len(x))
    for image, row in zip(x, model(x), strict=True):
        codes = [image.flatten()[:200] * (chain + 1) for chain in range(3)]
        logits = torch.stack([model.classifier(code) for code in codes])
        expected = {
            "mean_logits": logits.mean(0),
            "mean_z": model.classifier(sum(codes, torch.zeros(200)) / 3),
            "vote": ((torch.bincount(logits.argmax(1), minlength=10).double() + 0.01) / 3.1).log(),
        }[aggregate]
        torch.testing.assert_close(row, expected.double())


@pytest.mark.parametrize("chains", [1, 2, 5, 100])
def test_votes_answer_as_their_counts_do_and_their_softmax_is_the_shares(chains: int) -> None:
    """Ties too go to the class that the counts give them to."""
    with seeded("votes", chains):
        answers = torch.randint(4, (chains, 500))
    votes = nn.functional.one_hot(answers, 4).sum(0)
    tied = (votes == votes.amax(1, keepdim=True)).sum(1) > 1
    assert bool(tied.any()) == (chains > 1)
    logits = log_shares(answers, 4).float()
    assert torch.equal(logits.argmax(1), votes.argmax(1))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1), votes / chains, atol=0.04 / chains, rtol=0)


# gradients


def weigh(logits: Tensor) -> Tensor:
    """A fixed weighting of all logits, so that no row or class is left out."""
    return (logits * torch.linspace(-1.3, 1.7, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def gradient(model: ShortRun, x: Tensor, mode: str) -> Tensor:
    leaf = x.clone().requires_grad_()
    with seeded("gradient noise"):
        value = weigh(model.adaptive_forward(leaf, mode))
    (grad,) = torch.autograd.grad(value, leaf)
    return grad


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("aggregate", ["mean_logits", "mean_z"])
def test_full_gradient_equals_finite_differences_of_forward(chains: int, aggregate: str) -> None:
    """Central differences of what the judge calls, with the noise frozen: the unrolled chain is that very function."""
    model, x = make_model(attack_chains=chains, n_chains=chains, aggregate=aggregate), draw_images(2)
    assert model.steps == CHAIN_STEPS
    grad = gradient(model, x, "full")
    assert grad.flatten(1).norm(dim=1).min().item() > 1e-4

    def value(at: Tensor) -> float:
        with seeded("gradient noise"):
            return weigh(model(at)).item()

    directions = []
    for image in range(2):  # single pixels: the steepest and one in the middle of the ranking
        order = grad[image].abs().flatten().argsort(descending=True)
        for pixel in (order[0], order[392]):
            direction = torch.zeros_like(x)
            direction[image].view(-1)[pixel] = 1
            directions.append(direction)
    with seeded("directions"):
        directions += [grad.sign() * torch.rand_like(x) + 0.1 * torch.randn_like(x) for _ in range(2)]
    for direction in directions:
        step = 1e-3 / direction.norm().item()
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("chains", [1, 3])
def test_last_step_gradient_is_its_definition(chains: int) -> None:
    """With z before the last step held: dz/dx = (2 s / sigma^2) J^T, so grad = (2 s / sigma^2) J v, v the pull on z."""
    model, x = make_model(attack_chains=chains), draw_images(2)
    repeated = x.repeat(chains, 1, 1, 1)
    with seeded("gradient noise"):
        before = model.start(repeated)
        for _ in range(CHAIN_STEPS - 1):
            before = model.step(before.detach(), repeated).detach()
        after = model.step(before.clone(), repeated).detach().requires_grad_()
    logits = model.classifier(after).unflatten(0, (chains, 2)).mean(0)
    (pull,) = torch.autograd.grad(weigh(logits), after)
    _, moved = torch.autograd.functional.jvp(model.generate, before, pull)
    factor = 2 * model.step_size / model.log_sigma.exp().item() ** 2
    expected = factor * moved.unflatten(0, (chains, 2)).sum(0)
    came = gradient(model, x, "last_step")
    torch.testing.assert_close(came, expected, rtol=1e-9, atol=1e-15)
    full = gradient(model, x, "full")
    assert (came - full).norm().item() > 0.1 * full.norm().item()


def test_gradient_modes() -> None:
    model, x = make_model(), draw_images(1)
    assert model.gradient_modes == ("full", "last_step")
    with seeded("modes"):
        default = model.adaptive_forward(x)
    for mode in model.gradient_modes:
        with seeded("modes"):
            torch.testing.assert_close(model.adaptive_forward(x, mode), default, rtol=1e-12, atol=1e-14)
    with pytest.raises(UsageError, match=r'gradient modes full, last_step; got "bpda"'):
        model.adaptive_forward(x, "bpda")


def test_vote_is_attacked_through_the_mean_of_the_logits() -> None:
    x = draw_images(2)
    vote = gradient(make_model(aggregate="vote", attack_chains=2), x, "full")
    assert torch.equal(vote, gradient(make_model(aggregate="mean_logits", attack_chains=2), x, "full"))


def test_chunks_of_a_victim_equal_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise every row's answer is its own, so cutting the batch to fit the memory must change nothing."""
    model, x = make_model(attack_chains=2, n_chains=2, steps=4), draw_images(5)
    monkeypatch.setattr(model, "start", lambda rows: rows.flatten(1)[:, :200])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    passed = []
    forward = type(model).adaptive_forward

    def count_rows(rows: Tensor, mode: str | None = None) -> Tensor:
        passed.append(len(rows))
        return forward(model, rows, mode)

    monkeypatch.setattr(model, "adaptive_forward", count_rows)
    y = torch.arange(5)
    found = []
    for rows in (64, 4):
        monkeypatch.setattr(model, "batch_rows", rows)
        victim = Victim(model, "gradient", len(x), eot=3)
        loss, grad, logits, _ = victim.gradient(x, y)
        found.append((loss, grad, logits, victim.logits(x)))
    assert passed == [15, 4, 4, 4, 3]
    for whole, cut in zip(*found, strict=True):
        assert bool(whole.any())
        torch.testing.assert_close(whole, cut, rtol=1e-10, atol=1e-14)


# constants and options


def test_auto_sigma_equals_numpy() -> None:
    x, _ = load_data("fashion_mnist", n=60)
    flat = 2 * x.flatten(1).double().numpy() - 1
    top = np.linalg.eigvalsh(np.cov(flat, rowvar=False))[-1]
    assert auto_sigma((2 * x - 1).split(25)) == pytest.approx(math.sqrt(0.015 * top / 0.8), rel=1e-6)
    assert auto_sigma([2 * x - 1], step_size=0.06, stability=0.2) == pytest.approx(
        math.sqrt(0.06 * top / 0.2), rel=1e-6
    )


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 0.5), (0.999, 0.999)])
def test_chain_icc_is_the_share_of_the_variance_that_the_image_explains(share: float, expected: float) -> None:
    with seeded("icc"):
        of_image, of_chain = torch.randn(1, 2000, 20), torch.randn(10, 2000, 20)
    assert chain_icc(share**0.5 * of_image + (1 - share) ** 0.5 * of_chain) == pytest.approx(expected, abs=0.01)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "printed"},
        {"aggregate": "mean"},
        {"n_chains": 0},
        {"attack_chains": 0},
        {"steps": 0},
        {"sigma": 0.0},
        {"sigma": -1.0},
        {"sigma": math.nan},
        {"step_size": 0.0},
        {"step_size": math.nan},
        {"channels": 0},
    ],
    ids=str,
)
def test_option_out_of_range_is_one_line(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"^shortrun: .*{name}.*$"):
        ShortRun(**options)


def test_wrong_data_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"^shortrun takes square images of side 28 or more.*32, 24.*$"):
        ShortRun.options_for((3, 32, 24), 10)
    assert ShortRun.options_for((3, 28, 28), 10) == {"channels": 3}


# the shipped weights


SHIPPED = shipped_weights(ShortRun)
CONVNET = ("convnet", "fashion_mnist")


@pytest.mark.parametrize("dataset", SHIPPED)
def test_shipped_code_carries_information_before_stage_3(dataset: str) -> None:
    """The card's held-out figures: chains agree above chance, and stage 2 is over three times chance."""
    card = read_card(weights_folder(ShortRun) / f"{dataset}.safetensors")
    assert set(card) >= CARD_FIELDS
    held = {**card["held_out"]}
    last, before = held[card["stages"][-1]["name"]], card.get("init")
    while before is not None:  # training that went on from weights of its own
        held, before = before["held_out"] | held, before.get("init")
    assert held["images"] >= 250
    assert held["generative"]["chain_icc"] > 0.01
    assert held["generative"]["reconstruction_r2"] > 0.3
    assert held["discriminative"]["accuracy_10_chains"] > 0.3
    assert last["accuracy_10_chains"] > held["discriminative"]["accuracy_10_chains"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset"), [*(("shortrun", dataset) for dataset in SHIPPED), CONVNET])
def test_shipped_weights_are_those_of_their_card(name: str, dataset: str) -> None:
    """Accuracy of 500 fresh test images within the binomial noise of both samples (3.5 standard errors)."""
    model = load_defense(name, dataset)
    card = read_card(weights_folder(type(model)) / f"{dataset}.safetensors")
    assert set(card) >= CARD_FIELDS
    assert card["weights_digest"] == weights_digest(model)
    assert card["defense"] == name
    assert len(card["train_digest"]) == 64
    assert card["wall_time_s"] > 0
    assert len(card["known_breakage"]) > 0
    x, y = shipped_images(dataset, 500)
    with torch.no_grad(), seeded("shipped weights"):
        accuracy = torch.cat([model(rows).argmax(1) for rows in x.split(64)]).eq(y).double().mean().item()
    claimed, images = card["test"]["clean_accuracy"], card["test"]["images"]
    error = math.sqrt(claimed * (1 - claimed) * (1 / len(x) + 1 / images))
    assert abs(accuracy - claimed) < 3.5 * error
    assert accuracy > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("dataset", SHIPPED)
def test_shipped_code_knows_the_image(dataset: str) -> None:
    """Two chains of one image agree beyond chance: without that the classifier would have nothing to go by."""
    model = load_defense("shortrun", dataset)
    assert isinstance(model, ShortRun)
    x, _ = shipped_images(dataset, 100)
    with seeded("icc of shipped weights"):
        assert chain_icc(torch.stack([model.infer(x) for _ in range(4)])) > 0.02


def shipped_images(dataset: str, n: int) -> tuple[Tensor, Tensor]:
    """Test images; skips where they are not at hand (only those of Fashion-MNIST are embedded)."""
    try:
        return load_data(dataset, n=n, seed=1)
    except UsageError as error:
        pytest.skip(f"no data: {error}")
