"""Every recipe of every defense in a few steps: each stage lowers its own loss, a killed run ends in the same bits."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from shortened import Shortened
from torch import Tensor

from robench import Defense
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.defenses.convnet.model import ConvNet
from robench.defenses.convnet_at import ConvNetAT
from robench.defenses.fortified import Fortified
from robench.defenses.jem import JEM
from robench.defenses.jem import train as jem_train
from robench.defenses.shortrun import ShortRun
from robench.rng import seeded
from robench.train import Recipe, TrainSettings, loop, run, train

pytestmark = pytest.mark.usefixtures("one_thread")

HOLDOUT: Final = 64


@dataclass(frozen=True)
class Case:
    """A recipe to try.

    Attributes:
        cls: the defense.
        recipe: its name, with options.
        options: of the defense, for a small net.
        stages: the names of the stages.
        iterations: of each stage.
        batch_size: images in a batch.
        stays: the weights that it leaves as they are.
        learns: whether its answers come to depend on the image.
    """

    cls: type[Defense]
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ("clean", "ramp_1", "ramp_2", "adversarial")
    iterations: int = 14
    batch_size: int = 16
    stays: tuple[str, ...] = ()
    learns: bool = True

    def __str__(self) -> str:
        options = {
            name: value for name, value in self.options.items() if name not in ("width", "train_eps", "hidden", "steps")
        }
        return f"{self.cls.name} {self.recipe} {options or ''}".strip()


FORTIFIED: Final = ("clean", "half", "adversarial")
SHORTRUN: Final = ("generative", "discriminative", "bptt_truncated", "bptt")
CASES: Final = [
    Case(ConvNet, "clean", {"width": 8}, ("clean",), 200),
    *(Case(ConvNetAT, name, {"width": 8, "train_eps": 0.1}) for name in ("madry", "fast", "pgd2", "trades")),
    Case(ConvNetAT, "madry", {"width": 8, "train_norm": "l2", "train_eps": 1.0}),
    Case(Fortified, "pgd", {"hidden": 32}, FORTIFIED, 10),
    Case(Fortified, "pgd", {"layers": ()}, FORTIFIED, 10),
    Case(Fortified, "fgsm", {"hidden": 32, "train_attack": "fgsm"}, FORTIFIED, 10),
    *(Case(JEM, name, {"width": 4}, ("warmup", "joint")) for name in ("informative", "uniform", "classifier")),
    Case(ShortRun, "thesis", {"steps": 5}, SHORTRUN, 8, 8),
    Case(ShortRun, "thesis(labelled=60, unlabelled=150)", {"steps": 5}, SHORTRUN, 8, 8),
    Case(
        ShortRun,
        "thesis(depth=0)",
        {"steps": 5, "preset": "paper_literal"},
        (*SHORTRUN[:2], "bptt"),
        8,
        8,
        stays=("log_sigma",),
        learns=False,  # with the printed sigma the code carries no information about the image
    ),
]


@pytest.fixture(autouse=True)
def small_buffer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jem_train, "BUFFER", 100)
        patch.setattr(jem_train, "CHECKED_CHAINS", 50)
        yield


@pytest.fixture(scope="module")
def images() -> Dataset:
    """256 images of the embedded split, standing in for a training split."""
    data = load_dataset("fashion_mnist", n=256, seed=5)
    return dataclasses.replace(data, y=is_a_shoe(data.y))


def is_a_shoe(y: Tensor) -> Tensor:
    """1 for sandals, sneakers and boots, 0 for all else: soon learned."""
    return torch.isin(y, torch.tensor([5, 7, 9])).long()


def contrast(defense: Defense, data: Dataset) -> float:
    """By how much the logit of an image's label is above what the other images have there.

    It is 0 on average where an answer has nothing to do with its image, and the biases of the logits do not change it.
    """
    defense.eval()
    with torch.no_grad(), seeded("contrast"):
        logits = defense(data.x)
    columns = logits[:, data.y]  # image i, label of image j
    return float(columns.diagonal().mean() - columns.mean())


def shorten(case: Case, watch: Dataset | None = None) -> Shortened:
    with seeded("training test"):
        defense = case.cls(**case.options)
    recipe = defense.recipe(case.recipe)
    return Shortened(
        defense,
        recipe,
        dict.fromkeys(case.stages, case.iterations),
        batch_size=case.batch_size,
        check_every=case.iterations // 2 + 1,
        watch=(watch.x[:64], watch.y[:64]) if watch else None,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_stage_lowers_its_own_loss_and_a_run_taken_up_in_the_last_ends_in_the_same_bits(
    case: Case, images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss on the same images just before a stage and after it; what a kill in the last stage leaves is resumed.

    Biases of the logits alone lower the loss of labels of which one is frequent; so answers must depend on the image.
    """
    settings = TrainSettings(holdout=HOLDOUT)
    whole, left = shorten(case, images), case.iterations // 4
    last = len(case.stages) * case.iterations - left

    def copy_checkpoint(number: int) -> None:
        if number == last:
            monkeypatch.setattr(run, "CHECKPOINT_SECONDS", -1.0)  # save after this iteration
        if number == last + 1:
            monkeypatch.undo()
            (tmp_path / "killed").mkdir()
            shutil.copy(tmp_path / "whole" / "checkpoint.pt", tmp_path / "killed")

    whole.on_call = copy_checkpoint
    at_first = contrast(whole.defense, images)
    weights = {name: weight.detach().clone() for name, weight in whole.defense.named_parameters()}
    train(whole.defense, whole, images, tmp_path / "whole", settings)
    assert tuple(whole.after) == tuple(stage.name for stage in whole.inner.stages()) == case.stages
    falls = {name: whole.before[name] - whole.after[name] for name in case.stages}
    assert min(falls.values()) > 0, falls
    stayed = [name for name, weight in whole.defense.named_parameters() if torch.equal(weight, weights[name])]
    assert stayed == list(case.stays), "and so do all weights"
    learned = contrast(whole.defense, images)
    assert (learned > max(0.005, 20 * abs(at_first))) == case.learns, f"{at_first} at first, {learned} now"
    again = shorten(case)
    train(again.defense, again, images, tmp_path / "killed", settings, resume=True)
    assert again.calls == left
    assert weights_digest(again.defense) == weights_digest(whole.defense)


def test_what_is_shortened_is_else_the_recipe_itself() -> None:
    own = {name for name, value in vars(Recipe).items() if callable(value)}
    assert own <= vars(Shortened).keys()


def test_biases_alone_lower_the_loss_and_do_not_count(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(ConvNetAT, "pgd2", {"width": 8, "train_eps": 0.1})
    short = shorten(case, images)
    at_first, update = contrast(short.defense, images), loop._update
    weights = {name: weight.detach().clone() for name, weight in short.defense.named_parameters()}
    last = list(weights)[-1]
    assert last.endswith("bias")

    def update_biases(*arguments: Any) -> float:
        loss = update(*arguments)
        for name, weight in short.defense.named_parameters():
            if name != last:
                weight.data.copy_(weights[name])
        return loss

    monkeypatch.setattr(loop, "_update", update_biases)
    train(short.defense, short, images, tmp_path, TrainSettings(holdout=HOLDOUT))
    assert all(short.after[name] < short.before[name] for name in case.stages)
    assert contrast(short.defense, images) == pytest.approx(at_first, abs=1e-6)
