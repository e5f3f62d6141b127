"""Short Run learns: its chain's weight gradients are autograd's, its recipe does what it says and takes no more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robench import UsageError, load_data
from robench.data import Dataset, digest_data, load_dataset
from robench.defenses.convnet import ConvNet
from robench.defenses.shortrun import ShortRun, auto_sigma
from robench.defenses.shortrun import model as model_module
from robench.defenses.shortrun import train as train_module
from robench.defenses.shortrun.figures import reconstruct
from robench.defenses.shortrun.train import ShortRunRecipe, make_recipe
from robench.precision import training_precision
from robench.rng import seeded
from robench.train import Recipe, Stage, TrainSettings, train
from robench.train.run import Run
from robench.weights import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> ShortRun:
    """An untrained model whose generator is steep enough for the image to matter to the code."""
    with seeded("learning weights"):
        model = ShortRun(**{"sigma": 0.4, "steps": 6, **options})
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.mul_(1.5)
    return model.to(dtype)


def draw_images(n: int, channels: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    with seeded("learning images"):
        return torch.rand(n, channels, 28, 28, dtype=dtype)


def gradients(model: ShortRun, x: Tensor, *, depth: int | None = None) -> list[Tensor]:
    """Of a fixed weighting of the code, in the images and all that stage 3 learns."""
    leaf = x.clone().requires_grad_()
    with seeded("learning noise"):
        codes = model.infer_differentiably(leaf, depth=depth)
    weights = torch.linspace(-1, 1, codes.numel(), dtype=x.dtype).view_as(codes)
    return list(torch.autograd.grad((codes * weights).sum(), [leaf, model.log_sigma, *model.generator.parameters()]))


# the gradient in the weights


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", ["repaired", "paper_literal"])
@pytest.mark.parametrize("depth", [None, 1])
def test_weight_gradients_are_those_of_autograd(
    channels: int, preset: str, depth: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make_model(channels=channels, preset=preset), draw_images(2, channels)
    by_hand = gradients(model, x, depth=depth)
    monkeypatch.setattr(model_module, "can_sweep", lambda _generator: False)
    by_autograd = gradients(model, x, depth=depth)
    names = ["x", "log_sigma", *dict(model.generator.named_parameters())]
    for name, came, expected in zip(names, by_hand, by_autograd, strict=True):
        assert expected.norm().item() > 1e-6, name
        torch.testing.assert_close(came, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_weight_gradient_equals_finite_differences() -> None:
    """Independent of autograd: central differences of the chain's end in one weight of each layer and in log_sigma."""
    model, x = make_model(), draw_images(2)
    found = gradients(model, x)[1:]
    parameters = [model.log_sigma, *model.generator.parameters()]

    def value() -> float:
        with seeded("learning noise"), torch.no_grad():
            codes = model.infer(x)
        return (codes * torch.linspace(-1, 1, codes.numel(), dtype=x.dtype).view_as(codes)).sum().item()

    for parameter, gradient in zip(parameters, found, strict=True):
        place = int(gradient.abs().argmax())
        where = tuple(int(index) for index in torch.unravel_index(torch.tensor(place), parameter.shape))
        step, before = 1e-5, parameter.data[where].item()
        ends = []
        for sign in (1, -1):
            parameter.data[where] = before + sign * step
            ends.append(value())
        parameter.data[where] = before
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient.reshape(-1)[place].item(), rel=1e-5)


def test_bfloat16_sweeps_barely_move_the_gradient() -> None:
    model, x = make_model(torch.float32, steps=20), draw_images(4, dtype=torch.float32)
    exact = gradients(model, x)
    model.sweep_dtype = torch.bfloat16
    rough = gradients(model, x)
    for came, expected in zip(rough, exact, strict=True):
        assert came.dtype == expected.dtype == torch.float32
        error = ((came - expected).norm() / expected.norm()).item()
        assert 0 < error < 0.05


@pytest.mark.parametrize("has", [True, False], ids=["has_bfloat16", "emulates_it"])
def test_only_training_sweeps_in_bfloat16_and_only_where_the_device_has_it(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "mixes_precision", lambda _device: has)
    model, x = make_model(torch.float32), draw_images(2, dtype=torch.float32)
    seen: list[torch.dtype | None] = []
    infer = model.infer

    def note(rows: Tensor) -> Tensor:
        seen.append(model.sweep_dtype)
        return infer(rows)

    monkeypatch.setattr(model, "infer", note)
    recipe = make_recipe(model, None)
    recipe.reconstruction_loss(x, torch.tensor([0, 1]))
    recipe.label_loss(x, torch.tensor([0, 1]))
    recipe.measure(x, torch.tensor([0, 1]))
    assert seen == [torch.bfloat16 if has else None] * 2 + [None] * 10


# the recipe


def test_stages_1_and_2_take_the_code_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """|x - g(z)|^2 / (2 sigma^2), and -log softmax of the classifier on z from the code that the seed gives."""
    monkeypatch.setattr(train_module, "mixes_precision", lambda _device: False)
    model, x, y = make_model(torch.float32), draw_images(3, dtype=torch.float32), torch.tensor([1, 2, 3])
    recipe = make_recipe(model, None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with seeded("stage 1"), training_precision("float32"):
        first = recipe.reconstruction_loss(x, y)
    with seeded("stage 1"):
        second = recipe.label_loss(x, y)
    with seeded("stage 1"), torch.no_grad():
        codes = model.infer(x)
        misfit = sum(
            float((model.generate(code[None])[0] - (2 * one - 1)).square().sum())
            for code, one in zip(codes, x, strict=True)
        )
        shares = model.classifier(codes).exp()
        shares = shares / shares.sum(1, keepdim=True)
    assert first.item() == pytest.approx(misfit / 3 / (2 * 0.4**2), rel=1e-4)
    assert second.item() == pytest.approx(-float(shares[range(3), y].log().mean()), rel=1e-4)
    first.backward()
    assert all(parameter.grad is None for parameter in model.classifier.parameters())
    assert all(parameter.grad is not None for parameter in model.generator.parameters())
    model.zero_grad(set_to_none=True)
    second.backward()
    assert all(parameter.grad is not None for parameter in model.classifier.parameters())
    assert all(parameter.grad is None for parameter in model.generator.parameters()), "the chain is not differentiated"


def test_stage_3_adds_the_misfit_of_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """L_dis + w |x - g(z)|^2 / (2 sigma^2 D), by hand from the code that the seed gives."""
    monkeypatch.setattr(train_module, "mixes_precision", lambda _device: True)
    model, x, y = make_model(torch.float32), draw_images(3, dtype=torch.float32), torch.tensor([1, 2, 3])
    with seeded("stage 3"):
        plain = make_recipe(model, "thesis(reconstruction=0)").unrolled_loss(x, y).item()
    with seeded("stage 3"):
        held = make_recipe(model, "thesis(reconstruction=4)").unrolled_loss(x, y).item()
    model.sweep_dtype = torch.bfloat16
    with seeded("stage 3"), torch.no_grad():
        codes = model.infer(x)
        expected = torch.nn.functional.cross_entropy(model.classifier(codes), y).item()
        misfit = (model.generate(codes) - (2 * x - 1)).square().sum().item() / 3
    assert plain == pytest.approx(expected, rel=1e-3)
    assert held - plain == pytest.approx(4 * misfit / (2 * 0.4**2 * 784), rel=0.01)


def test_truncated_part_differentiates_the_last_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.float32)
    seen: list[int | None] = []
    infer = model.infer_differentiably

    def note(x: Tensor, *, depth: int | None = None) -> Tensor:
        seen.append(depth)
        return infer(x, depth=depth)

    monkeypatch.setattr(model, "infer_differentiably", note)
    x, y = draw_images(2, dtype=torch.float32), torch.tensor([1, 2])
    for spec in ("thesis(depth=2)", "thesis(depth=0)"):
        for stage in make_recipe(model, spec).stages()[2:]:
            stage.loss(x, y)
    assert seen == [2, None, None]


def test_options_of_the_recipe_are_in_its_stages_and_facts() -> None:
    recipe = make_recipe(ShortRun(), "thesis(labelled=100, unlabelled=400, batch=16, reconstruction=2)")
    assert {stage.name: stage.images for stage in recipe.stages()} == {
        "generative": 400,
        "discriminative": 100,
        "bptt_truncated": 100,
        "bptt": 100,
    }
    assert {stage.batch_size for stage in recipe.stages()} == {16}
    assert recipe.name == "thesis(labelled=100, unlabelled=400, batch=16, reconstruction=2)"
    facts = recipe.facts()
    assert (facts["labelled"], facts["unlabelled"], facts["reconstruction_weight"]) == (100, 400, 2)
    assert make_recipe(ShortRun(), None).facts()["labelled"] == "all"
    assert make_recipe(ShortRun(), "repaired").name == make_recipe(ShortRun(), None).name == "thesis"
    assert make_recipe(ShortRun(), "repaired(labelled=9)").facts()["labelled"] == 9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("thesis(labels=10)", "takes reconstruction, labelled, unlabelled, depth, batch"),
        ("thesis(labelled=1.5)", "labelled takes a whole number; got 1.5"),
        ("thesis(labelled=-1)", "at least 0"),
        ("thesis(batch=0)", "batch at least 1"),
        ("thesis(reconstruction=none)", "reconstruction takes a number"),
        ("printed", 'one recipe, "thesis"; got "printed"'),
    ],
)
def test_wrong_recipe_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^shortrun.*{message}[^\n]*$"):
        make_recipe(ShortRun(), spec)


def test_the_convnet_can_be_given_the_same_labelled_images(tmp_path: Path) -> None:
    """The thesis compares both on the same 10,000 labels."""
    data = load_dataset("fashion_mnist", n=300)
    seen = []
    for defense, recipe in ((ShortRun(), "thesis(labelled=100)"), (ConvNet(width=8), "clean(labelled=100)")):
        stage = replace(defense.recipe(recipe).stages()[-1], batch_size=25)
        run = Run(defense, defense.recipe(recipe), data, tmp_path, TrainSettings(holdout=50, seed=3), "")
        seen.append({float(x.sum()) for number in range(4) for x in run.batch(stage, number)[0]})
    assert len(seen[0]) == 100
    assert seen[0] == seen[1]
    with pytest.raises(UsageError, match=r"^convnet: labelled must be at least 0; got -1$"):
        ConvNet(width=8).recipe("clean(labelled=-1)")


def test_sigma_stays_above_a_floor_that_rises_with_each_roll_back() -> None:
    x, y = load_data("fashion_mnist", n=60)
    model = ShortRun(steps=1)
    recipe = make_recipe(model, None)
    recipe.prepare(x)
    start, stage = auto_sigma([2 * x - 1]), recipe.stages()[-1]
    with torch.no_grad():
        model.log_sigma.fill_(math.log(0.1))
    recipe.unrolled_loss(x[:4], y[:4])
    assert model.log_sigma.exp().item() == pytest.approx(0.8 * start, rel=1e-5)
    recipe.roll_back(stage)
    kept = recipe.state()
    recipe.unrolled_loss(x[:4], y[:4])
    assert model.log_sigma.exp().item() == pytest.approx(0.88 * start, rel=1e-5)
    recipe.roll_back(stage)
    recipe.load_state(kept)
    assert recipe.floor == pytest.approx(0.88 * start, rel=1e-5)
    assert stage.check_every > 0
    assert recipe.facts()["sigma_floor"] == pytest.approx(0.88 * start, abs=1e-4)


def test_check_is_wrong_where_the_chain_blows_up_and_not_where_labels_are_learnt_by_heart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held-out images that are misread are no sign of a chain that blew up; images trained on that are misread are."""
    model = make_model(torch.float32, steps=1).freeze()
    x, y = load_data("fashion_mnist", n=40)
    monkeypatch.setattr(model, "infer", lambda rows: rows.flatten(1)[:, :200])
    monkeypatch.setattr(model, "infer_differentiably", lambda rows, depth: rows.flatten(1)[:, :200])
    shift = 0

    class Reader(torch.nn.Module):
        """Answers with the label, moved on by `shift`."""

        def forward(self, _codes: Tensor) -> Tensor:
            return 9.0 * torch.nn.functional.one_hot((y + shift) % 10, 10).float()

    model.classifier = Reader()  # type: ignore[assignment]
    recipe = make_recipe(model, "thesis(reconstruction=0)")
    stage = Stage("bptt", 1, recipe.unrolled_loss, [], 1.0)
    right = math.log(1 + 9 * math.exp(-9))
    for _ in range(3):
        recipe.unrolled_loss(x, y)
    figures, fine = recipe.check(stage, x, y)
    assert figures["cross_entropy"] == figures["trained_cross_entropy"] == pytest.approx(right, rel=1e-3)
    assert fine
    shift = 1
    figures, fine = recipe.check(stage, x, y)
    assert figures["cross_entropy"] == pytest.approx(9 + right, rel=1e-3)
    assert figures["trained_cross_entropy"] == pytest.approx(right, rel=1e-3)
    assert fine
    recipe.unrolled_loss(x, y)
    figures, fine = recipe.check(stage, x, y)
    assert figures["trained_cross_entropy"] == pytest.approx(0.9 + right, rel=1e-3)
    assert not fine
    assert recipe.state()["best"] == pytest.approx(right, rel=1e-3)
    other = make_recipe(model, "thesis")
    other.load_state(recipe.state())
    assert other.state() == recipe.state()


class Watched(Recipe):
    """The recipe, cut to a few small batches, that notes which images each stage sees."""

    name = "watched"

    def __init__(self, inner: ShortRunRecipe, iterations: int) -> None:
        self.inner, self.iterations = inner, iterations
        self.seen: dict[str, list[tuple[float, int]]] = {}

    def stages(self) -> list[Stage]:
        found = []
        for stage in self.inner.stages():

            def loss(x: Tensor, y: Tensor, name: str = stage.name, stage: Stage = stage) -> Tensor:
                marks = zip(x[:, 0, 0, 0].tolist(), y.tolist(), strict=True)
                self.seen.setdefault(name, []).extend(marks)
                return stage.loss(x, y)

            found.append(replace(stage, iterations=self.iterations, loss=loss, batch_size=10, check_every=0))
        return found

    def prepare(self, x: Tensor) -> None:
        self.fitted = set(x[:, 0, 0, 0].tolist())
        self.inner.prepare(x)

    def begin(self) -> None:
        self.inner.begin()

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {"images": float(len(x) + len(y))}


def test_each_stage_sees_its_own_images_alone_and_only_the_labelled_ones_are_drawn_by_class(tmp_path: Path) -> None:
    """Each image carries its number in its corner; 40 of 120 are labelled, 60 are for stage 1 and the fit of sigma."""
    x, y = load_data("fashion_mnist", n=120)
    x = x.clone()
    x[:, 0, 0, 0] = torch.arange(120) / 120
    data = Dataset("numbered", "train", x, y, torch.arange(120), tuple("0123456789"), digest_data(x, y))

    def watch(labels: Tensor, seed: int) -> Watched:
        model = make_model(torch.float32, steps=1, sigma="auto")
        recipe = Watched(make_recipe(model, "thesis(labelled=40, unlabelled=60)"), iterations=8)
        labelled = replace(data, y=labels, digest=digest_data(x, labels))
        train(model, recipe, labelled, tmp_path / f"{seed}{labels[0]}", TrainSettings(holdout=20, seed=seed))
        return recipe

    recipe = watch(y, 0)
    marks = {name: set(seen) for name, seen in recipe.seen.items()}
    assert len(marks["generative"]) == 60
    assert len(marks["discriminative"]) == 40
    assert marks["discriminative"] == marks["bptt_truncated"] == marks["bptt"]
    counts = torch.bincount(torch.tensor([label for _, label in marks["bptt"]]), minlength=10)
    assert counts.tolist() == [4] * 10
    unlabelled = {number for number, _ in marks["generative"]}
    assert recipe.fitted == unlabelled
    rows = torch.tensor([any(abs(own - number) < 1e-6 for number in unlabelled) for own in x[:, 0, 0, 0].tolist()])
    start = auto_sigma([2 * x[rows] - 1], recipe.inner.defense.step_size)
    assert recipe.inner.sigma_start == pytest.approx(start, rel=1e-4)
    assert start != pytest.approx(auto_sigma([2 * x - 1], recipe.inner.defense.step_size), rel=1e-3)
    others = watch((y + 1) * (torch.arange(120) % 2) % 10, 0)
    assert {number for number, _ in others.seen["generative"]} == unlabelled  # whatever the labels
    assert {number for number, _ in watch(y, 1).seen["generative"]} != unlabelled


def start_from_weights(folder: Path, *, sigma: float, option: float | str = "auto") -> Watched:
    """One iteration of the last stage on 60 images, from the same weights but for their sigma."""
    x, y = load_data("fashion_mnist", n=60)
    x = x.clone()
    x[:, 0, 0, 0] = torch.arange(60) / 60
    data = Dataset("few", "train", x, y, torch.arange(60), tuple("0123456789"), digest_data(x, y))
    model = make_model(torch.float32, steps=1, sigma="auto")
    with torch.no_grad():
        model.log_sigma.fill_(math.log(sigma))
    save_weights(model, folder / "given.safetensors", {"defense": "shortrun"})
    recipe = Watched(make_recipe(make_model(torch.float32, steps=1, sigma=option), "thesis(labelled=20)"), iterations=1)
    settings = TrainSettings(holdout=10, init=folder / "given.safetensors", first_stage="bptt")
    train(recipe.inner.defense, recipe, data, folder / "run", settings)
    return recipe


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_training_goes_on_with_the_sigma_of_the_weights(tmp_path: Path, sigma: float) -> None:
    """It is below or above the floor that the images alone would give, and is moved by no more than a step."""
    recipe = start_from_weights(tmp_path, sigma=sigma)
    assert recipe.inner.defense.log_sigma.exp().item() == pytest.approx(sigma, rel=0.01)
    assert recipe.inner.facts()["sigma_start"] == pytest.approx(sigma, rel=1e-3)
    assert recipe.inner.floor <= 1.001 * sigma
    assert len(recipe.fitted) == 20  # those of the first stage that is run


def test_a_sigma_that_the_weights_do_not_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^shortrun: the weights of --init have sigma 0\.9, not 3\. Leave sigma out$"):
        start_from_weights(tmp_path, sigma=0.9, option=3.0)


def test_more_labels_than_images_is_one_line_before_the_first_stage(tmp_path: Path) -> None:
    x, y = load_data("fashion_mnist", n=40)
    data = Dataset("few", "train", x, y, torch.arange(40), tuple("0123456789"), digest_data(x, y))
    model = make_model(torch.float32, steps=1)
    recipe = Watched(make_recipe(model, "thesis(labelled=40)"), iterations=1)
    with pytest.raises(UsageError, match=r"^stage discriminative takes 40 training images; there are 30$"):
        train(model, recipe, data, tmp_path, TrainSettings(holdout=10))
    assert not any(recipe.seen.values())


class BeforeStage3(ShortRunRecipe):
    """The first two stages alone."""

    def stages(self) -> list[Stage]:
        return super().stages()[:2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_code_carries_information_before_stage_3(tmp_path: Path) -> None:
    """A third of stages 1 and 2, on the embedded images: chains agree, and stage 2 is over three times chance."""
    x, y = load_data("fashion_mnist", n=3000)
    data = Dataset("embedded", "train", x, y, torch.arange(3000), tuple("0123456789"), digest_data(x, y))
    with seeded("short training"):
        model = ShortRun()
    card = train(model, BeforeStage3(model), data, tmp_path, TrainSettings(holdout=200, scale=1 / 3))
    held = card["held_out"]
    assert held["generative"]["chain_icc"] > 0.005
    assert held["generative"]["reconstruction_r2"] > 0.2
    assert held["discriminative"]["accuracy_10_chains"] > 0.3


# sigma


def test_sigma_is_fitted_where_it_is_auto() -> None:
    x, _ = load_data("fashion_mnist", n=60)
    fitted = auto_sigma([2 * x - 1])
    for options, expected in [
        ({}, fitted),
        ({"sigma": "auto"}, fitted),
        ({"sigma": 0.9}, 0.9),
        ({"preset": "paper_literal"}, 6.4),
        ({"preset": "paper_literal", "sigma": "auto"}, fitted),
    ]:
        model = ShortRun(**options)  # type: ignore[arg-type]
        model.recipe().prepare(x)
        assert model.log_sigma.exp().item() == pytest.approx(expected, rel=1e-6), options


def test_sigma_of_another_word_is_one_line() -> None:
    from robench.defenses.shortrun.model import _check_options

    with pytest.raises(UsageError, match=r'^shortrun: sigma must be a number or "auto"; got "fit"$'):
        _check_options("repaired", "vote", 1, sigma="fit", step_size=0.1)


# figures


def test_reconstruction_descends_to_the_image_that_a_code_makes() -> None:
    """The image is g(z) of a known code, so gradient descent without prior and noise can reach it."""
    model = make_model(torch.float32, sigma=0.1).freeze()
    with seeded("known codes"):
        x = (model.generate(torch.randn(3, 200)) + 1) / 2
    misfits = []
    for steps in (0, 20, 200):
        with seeded("reconstruction"):
            images = model.generate(reconstruct(model, x, steps))
        misfits.append((images - (2 * x - 1)).square().sum().item())
    assert misfits[2] < 0.5 * misfits[1] < 0.5 * misfits[0], misfits


def test_one_step_of_reconstruction_is_gradient_descent() -> None:
    """From z_0, one step of half the chain's data term along the gradient that autograd finds."""
    model, x = make_model().freeze(), draw_images(2)
    with seeded("one descent"):
        z = torch.randn(2, 200, dtype=torch.float64).requires_grad_()
    misfit = (model.generate(z) - (2 * x - 1)).square().sum()
    (gradient,) = torch.autograd.grad(misfit, z)
    with seeded("one descent"):
        came = reconstruct(model, x, 1)
    factor = model.step_size / (4 * model.log_sigma.exp().item() ** 2)
    torch.testing.assert_close(came, z.detach() - factor * gradient, rtol=1e-9, atol=1e-12)


def test_pictures_are_rows_of_images() -> None:
    model, x = make_model(torch.float32).freeze(), draw_images(2, dtype=torch.float32)
    with seeded("pictures"):
        rows = model.pictures(x)
    assert list(rows) == ["original", "reconstruction", "chain", "sample"]
    assert torch.equal(rows["original"], x)
    for row in rows.values():
        assert row.shape == x.shape
        assert bool((row >= 0).all() and (row <= 1).all())


def test_diagnostics_of_one_image_have_no_figure_that_compares_images() -> None:
    x, y = load_data("fashion_mnist", n=1)
    figures = make_model(torch.float32, steps=1).freeze().diagnostics(x, y)
    assert not {"descent_r2", "reconstruction_r2", "chain_icc"} & set(figures)
    assert {"descent_mse_summed", "accuracy_1_chain", "sigma"} < set(figures)
    assert all(math.isfinite(value) for value in figures.values())


def test_diagnostics_are_those_of_a_known_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that always makes one grey: its R2 and MSE follow from the images alone; codes are noise, ICC 0."""
    model = make_model(torch.float32, steps=1).freeze()
    x, y = load_data("fashion_mnist", n=40)
    monkeypatch.setattr(model, "generate", lambda z: torch.zeros(len(z), 1, 28, 28))
    monkeypatch.setattr(model, "infer", lambda rows: torch.randn(len(rows), 200))
    with seeded("diagnostics"):
        figures = model.diagnostics(x, y)
    target = 2 * x - 1
    summed = target.square().flatten(1).sum(1).mean().item()
    spread = (target - target.mean(0)).square().flatten(1).sum(1).mean().item()
    assert figures["descent_mse_summed"] == pytest.approx(summed, abs=1e-3)
    assert figures["descent_mse_per_pixel"] == pytest.approx(summed / 784, abs=1e-5)
    assert figures["descent_r2"] == pytest.approx(1 - summed / spread, abs=1e-3)
    assert figures["reconstruction_r2"] == pytest.approx(1 - summed / spread, abs=1e-3)
    assert abs(figures["chain_icc"]) < 0.05
    names = {"accuracy_1_chain", *(f"accuracy_10_chains{end}" for end in ("", "_mean_z", "_vote"))}
    assert names < set(figures)
    assert all(math.isfinite(value) for value in figures.values())
