"""Checks during a stage: figures are kept, what goes wrong is rolled back, a recipe's own state survives a resume."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench import DataError, Defense, UsageError, load_defense
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.defenses.convnet import ConvNet
from robench.defenses.convnet_at import ConvNetAT
from robench.defenses.convnet_at.train import AdversarialRecipe
from robench.defenses.fortified import Fortified
from robench.defenses.fortified.train import FortifiedRecipe
from robench.defenses.jem import JEM
from robench.precision import training_precision
from robench.progress import Progress
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.train import Recipe, Stage, TrainSettings, loop, run, train
from robench.train.adversarial import Inner, perturb
from robench.types import Images, Labels, Logits

SETTINGS = TrainSettings(holdout=32)


@pytest.fixture(scope="module")
def images() -> Dataset:
    """Images of the embedded split, standing in for a training split."""
    return load_dataset("fashion_mnist", n=128, seed=5)


class Mean(Defense):
    """One weight for each class and nothing else."""

    name = "mean"
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))

    def forward(self, x: Images) -> Logits:
        return x.mean((1, 2, 3))[:, None] * self.weight


class Watched(Recipe):
    """Moves the weights by its pace, and keeps a buffer; from some iteration on it runs away until it is slowed down.

    The check sees that the weights have run away.
    """

    name = "watched"

    def __init__(
        self, defense: Mean, *, bad_at: int = 999, pace: float = 1.0, nan: bool = False, check_every: int = 3
    ) -> None:
        self.check_every = check_every
        self.defense, self.bad_at, self.pace, self.nan = defense, bad_at, pace, nan
        self.calls = self.ticks = 0
        self.buffer = torch.zeros(3)
        self.stop_at = 999

    def stages(self) -> list[Stage]:
        """One stage of 12 iterations, checked each third."""
        return [
            Stage(
                "walk",
                12,
                self.loss,
                list(self.defense.parameters()),
                0.1,
                flat=1.0,
                batch_size=8,
                optimizer=self.sgd,
                check_every=self.check_every,
                roll_backs=2,
            )
        ]

    @staticmethod
    def sgd(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Momentum, so that the optimizer has a state of its own."""
        return torch.optim.SGD(parameters, lr=rate, momentum=0.5)

    def loss(self, x: Images, y: Labels) -> Tensor:
        """Falls by the sum of the weights."""
        del y
        self.calls, self.ticks = self.calls + 1, self.ticks + 1
        if self.ticks == self.stop_at:
            raise KeyboardInterrupt
        self.buffer = self.buffer + x.mean() + torch.rand(3)
        runs_away = self.calls > self.bad_at and self.pace >= 1
        if runs_away and self.nan:
            return self.defense.weight.sum() * math.nan
        return -self.defense.weight.sum() * (1e4 if runs_away else self.pace * (1 + self.buffer.sum().item() / 100))

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """The largest weight."""
        del x, y
        return {"largest": self.defense.weight.abs().max().item()}

    def check(self, stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        """Weights beyond 100 have run away."""
        del stage
        assert not self.defense.training
        figures = self.measure(x, y)
        return figures, figures["largest"] < 100

    def roll_back(self, stage: Stage) -> None:
        """Halves the pace."""
        del stage
        self.pace /= 2

    def state(self) -> dict[str, Any]:
        """The pace and the buffer."""
        return {"pace": self.pace, "buffer": self.buffer, "calls": self.calls}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes them up."""
        self.pace, self.buffer, self.calls = state["pace"], state["buffer"], state["calls"]


def test_checks_are_kept_in_the_card(images: Dataset, tmp_path: Path) -> None:
    defense = Mean()
    card = train(defense, Watched(defense), images, tmp_path, SETTINGS)
    assert [row["iteration"] for row in card["checks"]] == [3, 6, 9, 12]
    assert [row["fine"] for row in card["checks"]] == [True] * 4
    largest = [row["largest"] for row in card["checks"]]
    assert largest == sorted(largest)
    assert largest[-1] == pytest.approx(defense.weight.abs().max().item())


def test_a_loss_that_was_not_a_number_is_told_once(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average goes on from before, as the weights do."""
    told: list[str] = []

    class Heard(Progress):
        def advance(self, steps: int = 1, kind: str = "", note: str = "") -> None:
            told.append(note)
            super().advance(steps, kind, note)

    monkeypatch.setattr(loop, "Progress", Heard)
    defense = Mean()
    recipe = Watched(defense, bad_at=6, nan=True)
    train(defense, recipe, images, tmp_path, SETTINGS)
    assert recipe.pace < 1, "it was rolled back"
    assert len(told) == 12
    assert not [note for note in told if "loss nan" in note]


@pytest.mark.parametrize(
    ("scale", "every", "seen"),
    [(1.0, 5, [5, 10, 12]), (0.5, 4, [2, 4, 6]), (2.0, 5, [10, 20, 24]), (0.1, 3, [1])],
)
def test_checks_scale_with_the_stage_and_see_its_end(
    scale: float, every: int, seen: list[int], images: Dataset, tmp_path: Path
) -> None:
    defense = Mean()
    recipe = Watched(defense, check_every=every)
    card = train(defense, recipe, images, tmp_path, TrainSettings(holdout=32, scale=scale))
    assert [row["iteration"] for row in card["checks"]] == seen


def test_a_stage_that_fails_at_its_end_gives_the_last_good_weights(images: Dataset, tmp_path: Path) -> None:
    """Checked at 5, 10 and the end, which finds that it ran away; kept and measured are the weights of iteration 10."""
    defense = Mean()
    recipe = Watched(defense, bad_at=11, check_every=5)
    card = train(defense, recipe, images, tmp_path, SETTINGS)
    assert [row["fine"] for row in card["checks"]] == [True, True, False]
    assert card["held_out"]["walk"]["largest"] == card["checks"][1]["largest"] == defense.weight.abs().max().item()


@pytest.mark.parametrize("nan", [False, True], ids=["check", "nan loss"])
def test_what_went_wrong_is_rolled_back(images: Dataset, tmp_path: Path, nan: bool) -> None:
    """After the second check the weights run away; they return to that check, at half the pace, and stay small."""
    defense = Mean()
    recipe = Watched(defense, bad_at=6, nan=nan)
    card = train(defense, recipe, images, tmp_path, SETTINGS)
    assert recipe.pace == 0.5
    assert defense.weight.abs().max().item() < 100
    fine = [row["fine"] for row in card["checks"]]
    assert fine == ([True] * 4 if nan else [True, True, False, True])


def test_roll_back_restores_weights_optimizer_and_recipe(images: Dataset, tmp_path: Path) -> None:
    """With the pace at 0 after the roll-back, the weights only coast on the momentum they had at the last check."""
    defense = Mean()
    recipe = Watched(defense, bad_at=6)
    recipe.roll_back = lambda stage: setattr(recipe, "pace", 0.0)  # type: ignore[method-assign]
    train(defense, recipe, images, tmp_path, SETTINGS)
    reference = Mean()
    undisturbed = Watched(reference)
    seen: list[tuple[Tensor, Tensor]] = []
    check = undisturbed.check

    def note(stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        seen.append((reference.weight.detach().clone(), undisturbed.buffer.clone()))
        return check(stage, x, y)

    undisturbed.check = note  # type: ignore[method-assign]
    train(reference, undisturbed, images, tmp_path / "reference", SETTINGS)
    before, at_check = seen[0][0], seen[1][0]
    assert at_check.mean() > before.mean()
    coasted = defense.weight.detach() - at_check
    last_step = (at_check - before).max().item()
    assert 0 < coasted.max().item() < last_step  # half of the last step, then a quarter, ...


def test_too_many_roll_backs_stop(images: Dataset, tmp_path: Path) -> None:
    defense = Mean()
    recipe = Watched(defense, bad_at=0, pace=64.0)
    with pytest.raises(DataError, match=r'diverged in stage "walk".*after 2 roll-backs'):
        train(defense, recipe, images, tmp_path, SETTINGS)


def test_a_second_failure_changes_the_recipe_twice(images: Dataset, tmp_path: Path) -> None:
    """One halving of the pace from 2 does not cure, so the next roll-back, from the same check, halves it twice."""
    defense = Mean()
    recipe = Watched(defense, bad_at=3, pace=2.0)
    card = train(defense, recipe, images, tmp_path, SETTINGS)
    assert recipe.pace == 0.5
    assert [row["fine"] for row in card["checks"]] == [True, False, False, True]


@pytest.mark.parametrize("every", [3, 5])
@pytest.mark.parametrize("stop_at", [2, 5, 8, 11, 12])
def test_resume_is_bit_equal(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, every: int
) -> None:
    """Cut off before, after and between checks and the roll-back: the buffer and the way back are in the checkpoint."""
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", -1.0)
    whole = Mean()
    expected = train(whole, Watched(whole, bad_at=6, check_every=every), images, tmp_path / "whole", SETTINGS)
    defense = Mean()
    recipe = Watched(defense, bad_at=6, check_every=every)
    recipe.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        train(defense, recipe, images, tmp_path / "cut", SETTINGS)
    again = Mean()
    recipe = Watched(again, bad_at=6, check_every=every)
    card = train(again, recipe, images, tmp_path / "cut", SETTINGS, resume=True)
    assert weights_digest(again) == weights_digest(whole)
    assert card["checks"] == expected["checks"]


class Seen(Watched):
    """The same without checks; its looks draw random numbers."""

    def __init__(self, defense: Mean, looks: bool = True) -> None:
        super().__init__(defense, check_every=0)
        self.looks = looks

    def look(self, stage: Stage, x: Images, y: Labels) -> dict[str, float]:
        """A draw, and the largest weight."""
        assert not self.defense.training
        assert len(x) == len(y) == 32
        return {"drawn": torch.rand(1).item(), **self.measure(x, y)} if self.looks else super().look(stage, x, y)


def test_a_stage_without_checks_is_looked_at_and_trained_as_if_not(images: Dataset, tmp_path: Path) -> None:
    digests, cards = [], []
    for looks in (True, False):
        defense = Mean()
        cards.append(train(defense, Seen(defense, looks), images, tmp_path / str(looks), SETTINGS))
        digests.append(weights_digest(defense))
    assert digests[0] == digests[1]
    assert [row["iteration"] for row in cards[0]["checks"]] == [3, 6, 9]
    assert not any("fine" in row for row in cards[0]["checks"])
    assert "checks" not in cards[1]


@pytest.mark.parametrize(
    "make", [ConvNet(width=8).recipe, ConvNetAT(width=8).recipe, Fortified(hidden=8).recipe, JEM(width=4).recipe]
)
def test_a_look_leaves_the_recipe_as_it_was(make: Callable[[], Recipe], images: Dataset) -> None:
    recipe = make()
    before = str(recipe.state())
    figures = recipe.look(recipe.stages()[0], images.x[:20], images.y[:20])
    assert 0 <= figures["accuracy"] <= 1
    assert str(recipe.state()) == before


def test_tensorboard_writes_losses_and_figures(images: Dataset, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    defense = Mean()
    train(defense, Watched(defense), images, tmp_path, TrainSettings(holdout=32, tensorboard=True))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/walk")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("largest/walk")] == [3, 6, 9, 12, 12]


def test_tensorboard_missing_is_one_line(images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    defense = Mean()
    with pytest.raises(UsageError, match=r"pip install 'robench\[tensorboard\]'"):
        train(defense, Watched(defense), images, tmp_path, TrainSettings(holdout=32, tensorboard=True))


def test_inner_steps_raise_the_loss_within_the_bound() -> None:
    x = torch.full((4, 1, 5, 5), 0.5)
    weight = torch.linspace(-1, 1, 25).view(1, 1, 5, 5)
    for norm, eps in (("linf", 0.1), ("l2", 0.7)):
        threat = ThreatModel(norm, eps)
        with seeded("inner"):
            found = perturb(lambda images: (images * weight).sum(), x, threat, Inner(4, 0.5))
        assert bool(threat.contains(x, found).all())
        gain = ((found - x) * weight).flatten(1).sum(1)
        best = eps * (weight.abs().sum() if norm == "linf" else weight.norm())
        assert bool((gain > 0.9 * best).all()), norm


def test_trades_starts_near_and_not_on_the_image() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    with seeded("near"):
        start = perturb(lambda images: images.sum(), x, ThreatModel("linf", 0.1), Inner(0, 0.3, start="near"))
    distance = (start - x).abs().amax((1, 2, 3))
    assert bool((distance > 0).all())
    assert bool((distance < 0.01).all())


def test_trades_loss_is_cross_entropy_plus_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a perturbation of our own the loss is CE(x) + 6 KL(p(x) || p(x')), here of a two-number softmax by hand."""
    defense = ConvNetAT(width=8)
    recipe = defense.recipe("trades")
    assert isinstance(recipe, AdversarialRecipe)
    clean, moved = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    monkeypatch.setattr(recipe, "_logits", lambda x: moved if float(x.sum()) > 0 else clean)
    monkeypatch.setattr("robench.defenses.convnet_at.train.perturb", lambda loss, x, threat, inner: x + 1)
    loss = recipe.adversarial_loss(torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    p = math.exp(1) / (1 + math.exp(1))
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert loss.item() == pytest.approx(-math.log(p) + 6 * divergence, rel=1e-5)


def test_trades_searches_in_float32_where_passes_are_mixed(monkeypatch: pytest.MonkeyPatch, images: Dataset) -> None:
    """Its images are those of float32; with bfloat16 inside the search, the first step's signs agree by chance."""
    monkeypatch.setattr("robench.precision.has_bfloat16", lambda device: True)
    defense = load_defense("convnet_at", "fashion_mnist")
    assert isinstance(defense, ConvNetAT)
    recipe = defense.recipe("trades")
    assert isinstance(recipe, AdversarialRecipe)
    x, y = images.x[:8], images.y[:8]

    def search(precision: str) -> Images:
        found = []

        def note(*given: Any) -> Images:
            found.append(perturb(*given))
            return found[-1]

        with seeded("trades"), training_precision(precision), monkeypatch.context() as patch:
            patch.setattr("robench.defenses.convnet_at.train.perturb", note)
            recipe.adversarial_loss(x, y)
        return found[0] - x

    wanted = search("float32")
    assert (search("auto").sign() == wanted.sign()).float().mean().item() > 0.99
    monkeypatch.setattr("robench.defenses.convnet_at.train.training_precision", lambda precision: nullcontext())
    assert (search("auto").sign() == wanted.sign()).float().mean().item() < 0.9


@pytest.mark.parametrize("options", [{}, {"train_norm": "l2", "train_eps": 1.5}], ids=["linf", "l2"])
@pytest.mark.parametrize("name", ["madry", "fast", "pgd2", "trades"])
def test_images_of_the_recipe_stay_in_the_threat_model(name: str, options: dict[str, Any], images: Dataset) -> None:
    defense = ConvNetAT(width=8, **options)
    recipe = defense.recipe(name)
    assert isinstance(recipe, AdversarialRecipe)
    found = []
    loss = recipe.clean_loss

    def note(x: Images, y: Labels) -> Tensor:
        found.append(x.detach())
        return loss(x, y)

    recipe.clean_loss = note  # type: ignore[method-assign]
    x, y = images.x[:8], images.y[:8]
    if name != "trades":
        with seeded("recipe"):
            recipe.adversarial_loss(x, y, share=0.5)
        assert bool(ThreatModel(defense.train_norm, defense.train_eps / 2).contains(x, found[-1]).all())
        assert not torch.equal(found[-1], x)
    value = recipe.adversarial_loss(x, y)
    value.backward()
    assert all(parameter.grad is not None for parameter in defense.parameters())


@pytest.mark.parametrize(
    ("fgsm", "pgd", "fine"),
    [
        ([0.75, 0.7, 0.95], [0.7, 0.6, 0.1], [True, True, False]),  # a dip is fine, a fall is not
        ([0.95, 0.95], [0.01, 0.01], [False, False]),  # it had fallen before anybody looked
        ([0.75, 0.8, 0.85, 0.9], [0.7, 0.55, 0.44, 0.37], [True, True, False, False]),  # little by little
        ([0.7, 0.5], [0.65, 0.41], [True, True]),  # both fall a little: worse, not overfitted
        ([0.71, 0.76], [0.39, 0.5], [True, True]),  # a young net at a large bound
    ],
    ids=["at once", "from the start", "slowly", "both", "young"],
)
def test_overfitting_to_one_step_is_seen(
    fgsm: list[float], pgd: list[float], fine: list[bool], monkeypatch: pytest.MonkeyPatch, images: Dataset
) -> None:
    recipe = ConvNetAT(width=8).recipe("fast")
    assert isinstance(recipe, AdversarialRecipe)
    stage = recipe.stages()[-1]
    figures = iter([{"accuracy": 0.9, "fgsm": f, "pgd20": p} for f, p in zip(fgsm, pgd, strict=True)])
    monkeypatch.setattr(recipe, "measure", lambda x, y: next(figures))
    assert [recipe.check(stage, images.x, images.y)[1] for _ in fine] == fine
    assert recipe.inner.steps == 1
    recipe.overfitted = True
    recipe.roll_back(stage)
    assert (recipe.inner.steps, recipe.rate_share) == (2, 1.0)
    other = ConvNetAT(width=8).recipe("fast")
    other.load_state(recipe.state())
    assert other.state() == recipe.state()


@pytest.mark.parametrize(
    "figures",
    [
        {"accuracy": 0.1, "fgsm": 0.1, "pgd20": 0.1},
        {"accuracy": 0.9, "fgsm": 0.12, "pgd20": 0.05},
        {"accuracy": 0.6, "fgsm": 0.6, "pgd20": 0.6},
        {"accuracy": math.nan, "fgsm": math.nan, "pgd20": math.nan},
    ],
    ids=["all", "both attacks", "accuracy", "nan"],
)
@pytest.mark.parametrize("make", [lambda: ConvNetAT(width=8).recipe("fast"), lambda: Fortified(hidden=8).recipe()])
def test_a_collapse_is_not_fine_and_slows_training(
    make: Callable[[], AdversarialRecipe | FortifiedRecipe], figures: dict[str, float], images: Dataset
) -> None:
    """A net that loses what it had goes back at half the rate; more inner steps would not help it."""
    recipe = make()
    stage, steps = recipe.stages()[-1], recipe.inner.steps
    recipe.measure = lambda x, y: {"accuracy": 0.9, "fgsm": 0.75, "pgd20": 0.7}  # type: ignore[method-assign]
    assert recipe.check(stage, images.x, images.y)[1]
    kept = recipe.state()
    recipe.measure = lambda x, y: figures  # type: ignore[method-assign]
    for failures in (1, 2):
        assert not recipe.check(stage, images.x, images.y)[1]
        assert recipe.state() == kept  # what failed is no measure for the next
        recipe.load_state(kept)
        for _ in range(failures):
            recipe.roll_back(stage)
        assert (recipe.inner.steps, recipe.rate_share) == (steps, 0.5**failures)
        recipe.load_state(kept)
    recipe.roll_back(stage)
    resumed = make()
    resumed.load_state(recipe.state())
    assert resumed.state() == recipe.state()
    assert resumed.facts()["rate_share"] == 0.5


def test_fgsm_of_fortified_may_lose_its_robustness_and_not_its_accuracy(
    images: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Fortified(hidden=8, train_attack="fgsm").recipe()
    stage = recipe.stages()[-1]
    for accuracy, pgd, fine in ((0.9, 0.7, True), (0.9, 0.0, True), (0.6, 0.0, False)):
        figures = {"accuracy": accuracy, "fgsm": accuracy, "pgd20": pgd}
        monkeypatch.setattr(recipe, "measure", lambda _x, _y, figures=figures: figures)
        assert recipe.check(stage, images.x, images.y)[1] == fine


def test_the_rate_share_multiplies_the_rate(images: Dataset, tmp_path: Path) -> None:
    moved = []
    for share in (1.0, 0.5):
        defense = Mean()
        recipe = Watched(defense)
        recipe.rate_share = share
        train(defense, recipe, images, tmp_path / str(share), SETTINGS)
        moved.append(defense.weight.detach().mean().item())
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-5)
