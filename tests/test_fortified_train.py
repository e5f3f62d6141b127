"""Fortified Networks: training, its watch for overfitting, the black-box protocol, the paper's cells, the weights."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench import Defense, load_data, load_defense, wrap
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.defenses.fortified import Fortified, Training, blackbox, fortify, paper
from robench.defenses.fortified.blackbox import (
    Protocol,
    augment,
    hand_over,
    make_substitute,
    train_substitute,
)
from robench.defenses.fortified.train import FortifiedRecipe
from robench.errors import UsageError
from robench.paper import Context
from robench.registry import parse_spec
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.train.run import TrainSettings
from robench.weights import read_card, shipped_weights, weights_folder

pytestmark = pytest.mark.usefixtures("one_thread")

CARD_FIELDS = {"recipe", "train_digest", "seed", "device", "wall_time_s", "test", "known_breakage", "training_attack"}


@pytest.fixture(scope="module")
def images() -> Dataset:
    """256 images of the embedded split, standing in for a training split."""
    return load_dataset("fashion_mnist", n=256, seed=5)


def make(**options: Any) -> Fortified:
    with seeded("fortified training"):
        return Fortified(**options)


# training


def test_training_attack_stays_within_its_bound_and_raises_the_loss() -> None:
    defense = make(train_eps=0.2)
    recipe = FortifiedRecipe(defense)
    x, y = load_data("fashion_mnist", n=32)
    with seeded("attack"):
        x_adv = recipe.perturb(x, y, 0.2)
    assert bool(ThreatModel("linf", 0.2).contains(x, x_adv).all())
    with defense.without_randomness():
        losses = [nn.functional.cross_entropy(defense(rows), y).item() for rows in (x, x_adv)]
    assert losses[1] > losses[0]
    assert not x_adv.requires_grad
    assert all(parameter.grad is None for parameter in defense.parameters())


def test_one_step_attack_climbs_away_from_the_nets_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear net with logits (w . x, 0): its own answer is 0 where w . x > 0, whatever the label says."""
    defense = make(train_attack="fgsm", layers=())
    weight = torch.linspace(-0.01, 0.015, 784).view(1, 28, 28)
    monkeypatch.setattr(
        defense, "adaptive_forward", lambda x: torch.stack([(weight * x).flatten(1).sum(1), 0 * x[:, 0, 0, 0]], 1)
    )
    x = torch.full((1, 1, 28, 28), 0.5)  # w . x > 0: the answer is 0
    for label in (0, 1):
        came = FortifiedRecipe(defense).perturb(x, torch.tensor([label]), 0.1)
        torch.testing.assert_close(came, x - 0.1 * weight.sign())


@pytest.mark.parametrize(("train_steps", "length"), [(2, 0.75), (3, 0.5), (7, 0.25)])
def test_training_attack_takes_the_steps_that_are_asked_for(
    train_steps: int, length: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of the sum of all pixels, from a grey image: each step adds its length, up to the bound."""
    defense = make(train_steps=train_steps, layers=())
    asked: list[Tensor] = []

    def answer(x: Tensor) -> Tensor:
        asked.append(x)
        total = x.flatten(1).sum(1)
        return torch.stack([-total, total], 1)

    monkeypatch.setattr(defense, "adaptive_forward", answer)
    recipe = FortifiedRecipe(defense)
    with seeded("steps"):
        came = recipe.perturb(torch.full((1, 1, 28, 28), 0.5), torch.zeros(1, dtype=torch.int64), 0.1)
    assert len(asked) == train_steps
    for before, after in itertools.pairwise([*asked, came]):
        torch.testing.assert_close(after, (before + length * 0.1).clamp(max=0.6), rtol=0, atol=1e-6)
    assert recipe.facts()["training_attack"] == f"{train_steps} steps of {length:g} eps from a random start, linf 0.1"
    recipe.add_step()
    assert recipe.inner.steps == train_steps + 1


def test_training_attack_needs_a_step() -> None:
    with pytest.raises(UsageError, match=r"^fortified: train_steps must be at least 1; got 0$"):
        make(train_steps=0)


def make_small() -> nn.Module:
    """A user's network of four blocks, with batch normalisation."""
    with seeded("small"):
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                layer1=nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
                layer2=nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.ReLU()),
                layer4=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
                head=nn.Linear(32, 10),
            )
        )


def read_snippets() -> list[str]:
    page = (Path(__file__).parent.parent / "docs" / "defenses.md").read_text(encoding="utf-8")
    section = page.partition("## Fortify a network of your own")[2].partition("\n## ")[0]
    return [text.partition("```")[0] for text in section.split("```python")[1:]]


def test_snippets_of_the_docs_train_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images of two classes, bright and dark; the second snippet on 64 such, at a hundredth of the iterations."""
    y = torch.arange(64) % 2
    with seeded("bright and dark"):
        x = 0.25 + 0.5 * y[:, None, None, None] + 0.1 * torch.rand(64, 3, 32, 32)
    data = Dataset("bright", "train", x, y, torch.arange(64), ("dark", "bright"), "digest")
    losses: list[float] = []

    def load() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(25):
            yield x[:8], y[:8]
            losses.append(space["loss"].item())

    space: dict[str, Any] = {"my_net": make_small(), "loader": load()}
    first, second = read_snippets()
    with seeded("docs"):
        exec(first, space)
    assert losses[-1] < losses[0] - 1
    defense = space["defense"]
    assert not any(parameter.requires_grad or defense.training for parameter in defense.parameters())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robench.data.load_dataset", lambda *_: data)
    monkeypatch.setattr("robench.train.run.TrainSettings", partial(TrainSettings, holdout=8, scale=0.01))
    exec(second, space)
    assert [stage["name"] for stage in space["card"]["stages"]] == ["clean", "half", "adversarial"]
    assert space["card"]["training_attack"].startswith("2 steps of 0.75 eps")
    assert (tmp_path / "runs" / "mine" / "weights.pt").exists()


@pytest.mark.parametrize("train_attack", ["pgd", "fgsm"])
def test_running_statistics_are_those_of_what_is_learned_from(train_attack: Any) -> None:
    """One loss passes the images and the adversarial ones; the passes of the attack leave batch normalisation alone."""
    net = fortify(make_small(), ["layer4"], input_shape=(3, 32, 32), training=Training(train_attack=train_attack))
    defense = wrap(net, num_classes=10, input_shape=(3, 32, 32), name="mine")
    defense.train()
    norm = net.module.get_submodule("layer1.1")
    with seeded("statistics"):
        defense.recipe().adversarial_loss(torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64))  # type: ignore[attr-defined]
    assert int(norm.get_buffer("num_batches_tracked")) == 2
    assert all(part.training for part in defense.modules())


def test_check_fails_where_one_step_and_twenty_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, x, y = FortifiedRecipe(make()), torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64)
    stage = recipe.stages()[-1]
    assert stage.check_every > 0
    for pgd, fine in ((0.37, True), (0.35, False)):
        figures = {"accuracy": 0.95, "fgsm": 0.9, "pgd20": pgd}
        monkeypatch.setattr(recipe, "measure", lambda _x, _y, figures=figures: figures)
        assert recipe.check(stage, x, y) == (figures, fine)
        recipe.name = "fgsm"
        assert recipe.check(stage, x, y) == (figures, True)
        recipe.name = "pgd"


def test_each_roll_back_adds_a_step_even_to_the_same_check() -> None:
    recipe = FortifiedRecipe(make())
    stage, kept, before = recipe.stages()[-1], recipe.state(), recipe.inner.steps
    for failures in (1, 2):  # the run rolls back as often as the check failed in a row, from what was good before
        recipe.load_state(kept)
        recipe.overfitted = True
        for _ in range(failures):
            recipe.roll_back(stage)
        assert recipe.inner.steps == before + failures
    resumed = FortifiedRecipe(make())
    resumed.load_state(recipe.state())
    assert resumed.inner.steps == before + 2
    assert f"{before + 2} steps" in str(resumed.facts()["training_attack"])


def test_measure_counts_right_answers() -> None:
    """A net that answers 3 whatever it sees."""
    defense = make(layers=())
    with torch.no_grad():
        for parameter in defense.parameters():
            parameter.zero_()
        dict(defense.named_parameters())["net.module.head.bias"][3] = 1.0
    y = torch.tensor([3, 3, 3, 1])
    figures = FortifiedRecipe(defense.freeze()).measure(torch.rand(4, 1, 28, 28), y)
    assert figures == {"accuracy": 0.75, "fgsm": 0.75, "pgd20": 0.75}


def test_augmented_images_are_shifted_and_mirrored() -> None:
    """Row and column are written into the pixels, so each output says where its pixels come from."""
    side = torch.arange(32.0)
    image = torch.stack([side[:, None].expand(32, 32), side.expand(32, 32), torch.zeros(32, 32)])
    x = image.expand(200, 3, 32, 32)
    with seeded("augment"):
        came = FortifiedRecipe(make(channels=3, side=32, augment=True)).vary(x)
    shifts, mirrored = set(), 0
    for found in came:
        rows, columns = found[0, :, 0], found[1, 0]
        assert torch.equal(found[0], rows[:, None].expand(32, 32))
        is_mirrored = bool(columns[0] > columns[-1])
        columns = columns.flip(0) if is_mirrored else columns
        down, right = int(rows[16]) - 16, int(columns[16]) - 16
        assert torch.equal(rows, (side + down).clamp(0, 31))
        assert torch.equal(columns, (side + right).clamp(0, 31))
        shifts.add((down, right))
        mirrored += is_mirrored
    assert {abs(part) for shift in shifts for part in shift} == {0, 1, 2, 3}
    assert 60 < mirrored < 140
    assert FortifiedRecipe(make()).vary(x) is x


# the black box


SHAPE = (1, 4, 4)


class Threshold(nn.Module):
    """Two classes: whether the left half is brighter than the right one; `sharpness` changes logits, not decisions."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise AssertionError("a gradient is asked for")
        self.asked.append(x)
        gap = x[..., :2].sum((1, 2, 3)) - x[..., 2:].sum((1, 2, 3))
        return self.sharpness * torch.stack([gap, -gap], 1)


def make_threshold(sharpness: float = 1.0) -> tuple[Defense, Threshold]:
    module = Threshold(sharpness)
    return wrap(module, num_classes=2, input_shape=SHAPE), module


def draw_images(n: int, name: str = "images") -> Tensor:
    with seeded("black box", name):
        return torch.rand(n, *SHAPE)


def test_augmentation_by_hand() -> None:
    """Of a linear substitute p_y rises along row y of its weights less the other row."""
    linear = nn.Linear(16, 2)
    net = nn.Sequential(nn.Flatten(), linear)
    x, y = draw_images(5), torch.tensor([0, 1, 1, 0, 1])
    along = (linear.weight[y] - linear.weight[1 - y]).sign()
    expected = (x + 0.3 * along.view(5, *SHAPE)).clamp(0, 1)
    torch.testing.assert_close(augment(net, x, y, 0.3), expected.detach())


def test_the_set_doubles_and_each_image_is_asked_about_once() -> None:
    _, module = make_threshold()
    seeds = draw_images(10)
    with seeded("substitute"):
        _, x, y = train_substitute(lambda rows: module(rows).argmax(1), seeds, 2, Protocol(rounds=4))
    assert [len(rows) for rows in module.asked] == [10, 10, 20, 40]
    assert torch.equal(x, torch.cat(module.asked))
    assert torch.equal(x[:10], seeds)
    assert torch.equal(y, (x[..., :2].sum((1, 2, 3)) < x[..., 2:].sum((1, 2, 3))).long())
    steps = (x[10:20] - seeds).abs()
    assert bool(((steps - 0.1).abs() < 1e-6).any())
    assert steps.max().item() <= 0.1 + 1e-6


def test_steps_are_those_of_the_released_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """run_blackbox.py: lmbda_coef = 2 * int(int(rho / 3) != 0) - 1 for rho = 0, ..., 4, times lmbda = 0.1."""
    steps = []

    def note(substitute: nn.Module, x: Tensor, y: Tensor, step: float) -> Tensor:
        steps.append(step)
        return augment(substitute, x, y, step)

    monkeypatch.setattr(blackbox, "augment", note)
    train_substitute(lambda rows: torch.zeros(len(rows), dtype=torch.int64), draw_images(2), 2, Protocol(epochs=1))
    assert steps == [0.1 * (2 * int(int(rho / 3) != 0) - 1) for rho in range(5)]
    assert steps == [-0.1, -0.1, -0.1, 0.1, 0.1]


def test_substitute_learns_the_decisions_and_its_images_carry_over() -> None:
    defense, module = make_threshold()
    x = draw_images(300, "held out")
    y = defense(x).argmax(1)
    module.asked.clear()
    with seeded("substitute"):
        x_adv = hand_over(defense, draw_images(150), x, y, 0.2, Protocol(rounds=4))
    assert sum(len(rows) for rows in module.asked) == 150 * 2**3
    assert bool(ThreatModel("linf", 0.2).contains(x, x_adv).all())
    assert (defense(x_adv).argmax(1) == y).double().mean().item() < 0.3


def test_only_decisions_are_used() -> None:
    """Logits a thousand times as large or a tenth, with the same decisions give the same images, bit for bit."""
    x, found = draw_images(20, "held out"), []
    for sharpness in (1.0, 1000.0, 0.1):
        defense, _ = make_threshold(sharpness)
        with seeded("substitute"):
            found.append(
                hand_over(defense, draw_images(50), x, torch.zeros(20, dtype=torch.int64), 0.2, Protocol(rounds=3))
            )
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_substitute_is_that_of_the_released_code() -> None:
    assert (Protocol().seeds, Protocol().rounds, Protocol().epochs, Protocol().step) == (150, 6, 10, 0.1)
    net = make_substitute((1, 28, 28), 10)
    assert [tuple(part.weight.shape) for part in net if isinstance(part, nn.Linear)] == [
        (512, 784),
        (512, 512),
        (10, 512),
    ]


# the paper's cells


def test_cells_are_the_papers_figures() -> None:
    published = {(cell.table, cell.row, cell.column): cell.published for cell in paper.TABLES}
    assert len(published) == len(paper.TABLES)
    assert published["table 2.1", "fortified", "FGSM 0.3"] == 97.97
    assert published["table 2.1", "fortified", "FGSM 0.1"] == 98.34
    assert published["table 2.1", "A3T (Erraqabi et al.)", "FGSM 0.1"] == 96.10
    assert published["table 2.2", "adversarial training", "PGD 0.1"] == 96.98
    assert published["table 2.3", "fortified", "FGSM 0.3"] == 80.47
    assert published["table 2.4", "adversarial training", "FGSM 0.03"] == 79.34
    assert published["table 2.5", "fortified", "FGSM 0.3"] == 91.31
    assert published["table 2.5", "adversarial training, LReLU", "PGD 0.1"] == 77.90
    assert published["table 2.6", "fortified", "black-box FGSM 0.3"] == 97.82
    assert published["table 2.6", "fortified", "clean"] == 98.93
    assert {cell.table for cell in paper.TABLES} == {
        *(f"table 2.{number}" for number in range(1, 7)),
        "figure 2.4",
        "figure 2.5",
    }


def test_each_cell_names_a_defense_that_can_be_built() -> None:
    for cell in paper.TABLES:
        if cell.defense:
            name, options = parse_spec(cell.defense)
            assert name == "fortified"
            make(**options)


def test_ratio_of_means_and_its_interval() -> None:
    """Against the interval of a thousand resamples."""
    with seeded("ratio"):
        below = torch.rand(200) + 0.5
        above = 1.2 * below + 0.3 * torch.rand(200)
        rows = torch.randint(200, (1000, 200))
    came = paper.ratio_of_means(above, below)
    ratios = (above[rows].mean(1) / below[rows].mean(1)).numpy()
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert came.value == pytest.approx((above.sum() / below.sum()).item(), rel=1e-6)
    assert came.low == pytest.approx(low, abs=0.01)
    assert came.high == pytest.approx(high, abs=0.01)
    assert came.n == 200


@pytest.mark.data
@pytest.mark.slow
def test_error_ratio_sees_images_that_are_far_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an autoencoder that has learned digits; where nothing is changed the noise alone tells the errors apart."""
    context = Context(64, 0, "cpu", None, tmp_path)
    monkeypatch.setattr(paper, "MLP_ITERATIONS", 10)
    monkeypatch.setattr(paper, "MLP_EPS", 0.0)
    assert paper.error_ratio(context, "pixels", 16).value == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(paper, "MLP_ITERATIONS", 150)
    monkeypatch.setattr(paper, "MLP_EPS", 0.3)
    assert paper.error_ratio(context, "pixels", 256).low > 1.2


def test_black_box_takes_what_the_split_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 images 150 are the attacker's, however many are asked for: of MNIST's 10,000 the paper's 9,850 remain."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    defense = wrap(net, num_classes=10, input_shape=(1, 28, 28))

    def load(name: str, split: str, n: int, *_: object, at_most: bool = False) -> Dataset:
        assert (name, split) == ("mnist", "test")
        return load_dataset("fashion_mnist", n=min(n, 200) if at_most else n)

    monkeypatch.setattr(paper, "load_defense", lambda *_: defense)
    monkeypatch.setattr(paper, "load_dataset", load)
    monkeypatch.setattr(paper, "hand_over", lambda defense, seeds, x, y, eps: x)
    for n, left in ((40, 40), (50, 50), (10_000, 50)):
        assert paper.blackbox_accuracy(Context(n, 0, "cpu", None, tmp_path), "fortified", 0.3).n == left


@pytest.mark.data
@pytest.mark.slow
def test_black_box_leaves_more_than_nothing_and_less_than_all(tmp_path: Path) -> None:
    if "mnist" not in shipped_weights(Fortified):
        pytest.fail("there are no weights for mnist")
    figure = paper.blackbox_accuracy(Context(100, 0, "cpu", None, tmp_path), "fortified", 0.3)
    assert figure.n == 100
    assert 50 < figure.value < 100
    assert figure.low < figure.value < figure.high


# the shipped weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "stem",
    [
        pytest.param(stem, marks=() if stem.startswith("fashion_mnist") else pytest.mark.data)
        for stem in shipped_weights(Fortified)
    ],
)
def test_shipped_weights_are_those_of_their_card(stem: str) -> None:
    """Accuracy of 500 test images within the binomial noise of both samples (3.5 standard errors)."""
    dataset = stem.partition("-")[0]
    path = weights_folder(Fortified) / f"{stem}.safetensors"
    assert path.stat().st_size < 4_000_000
    card = read_card(path)
    assert set(card) >= CARD_FIELDS
    model = Fortified.load(dataset, path).freeze()
    assert card["weights_digest"] == weights_digest(model)
    assert len(card["known_breakage"]) > 0
    x, y = load_data(dataset, n=500, seed=1)
    with torch.no_grad(), seeded("shipped weights"):
        accuracy = (model(x).argmax(1) == y).double().mean().item()
    claimed, images = card["test"]["clean_accuracy"], card["test"]["images"]
    error = math.sqrt(claimed * (1 - claimed) * (1 / len(x) + 1 / images))
    assert abs(accuracy - claimed) < 3.5 * error


@pytest.mark.slow
def test_variant_is_found_by_its_options() -> None:
    full, plain = load_defense("fortified"), load_defense("fortified(layers=[])")
    assert full.randomized
    assert not plain.randomized
    assert weights_digest(full) != weights_digest(plain)
    assert not load_defense("fortified(noise=0.0)").randomized
