"""Planted offenders in a run: what the engine records as failed, what it refuses, what cannot harm it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import offending_attacks as attacks
import pytest
import torch
from torch import Tensor, nn

import robench
from robench.attack import Attack
from robench.defense import Defense
from robench.errors import PluginError, RobenchError, UsageError
from robench.testing import LinearToy
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Logits

LINF = ThreatModel("linf", 0.05)


def evaluate_toy(attacks: list[Attack | str], defense: Defense | None = None, **settings: Any) -> robench.Evaluation:
    toy = LinearToy()
    return robench.evaluate(defense or toy, attacks, LINF, toy.examples(12), device="cpu", **settings)


OFFENDERS: dict[str, tuple[Attack, str]] = {
    "leaves the ball": (attacks.LeavesBall(), "within eps"),
    "leaves the box": (attacks.changed(lambda x: x + 2), "lie in [0, 1]"),
    "not a number": (attacks.changed(lambda x: x * torch.nan), "must be finite"),
    "another shape": (attacks.changed(lambda x: x[:, :, 1:]), "adversarial images must be (12, 1, 4, 4)"),
    "another dtype": (attacks.changed(Tensor.double), "torch.float32; got"),
    "undeclared access": (attacks.SecretGradient(), 'needs "gradient"'),
    "raises": (attacks.Raises(), "planted"),
}


@pytest.mark.parametrize(("offender", "reason"), OFFENDERS.values(), ids=OFFENDERS)
def test_engine_records_a_failed_attack_and_goes_on(offender: Attack, reason: str, tmp_path: Path) -> None:
    result = evaluate_toy([offender, attacks.Honest(), "fgsm"], out=tmp_path / "run")
    assert not result.complete
    assert result.per_attack[offender.spec()] is None
    assert result.per_attack["honest"] == result.per_attack["fgsm"]
    assert result.row()["honest"] == "0.0000"
    assert (result.row()[offender.spec()], result.row()["robust_acc"], result.row()["robust_low"]) == ("", "", "")
    (failure,) = (tmp_path / "run" / "failures").iterdir()
    assert reason in failure.read_text()
    statuses = result.table.groupby("attack")["status"].unique()
    assert statuses[offender.spec()].tolist() == ["failed"]
    assert statuses["fgsm"].tolist() == ["ok"]


def test_engine_knows_no_robust_accuracy_where_every_attack_failed() -> None:
    result = evaluate_toy([attacks.LeavesBall(), attacks.Raises()])
    assert not result.complete
    assert result.robust_accuracy is None
    assert result.row()["robust_acc"] == result.row()["majority_acc"] == ""
    assert result.clean_accuracy.value == 1.0


def test_engine_is_not_touched_by_what_an_attack_does_to_its_images() -> None:
    plain = evaluate_toy([attacks.Honest(), "pgd"])
    meddled = evaluate_toy([attacks.InPlace(), attacks.InPlaceLabels(), "pgd"])
    assert meddled.clean_accuracy == plain.clean_accuracy
    assert meddled.per_attack["pgd"] == plain.per_attack["pgd"]
    assert (meddled.images("pgd") == plain.images("pgd")).all()


def test_engine_seeds_each_attack_whatever_the_one_before_it_seeded() -> None:
    after, alone = evaluate_toy([attacks.Seeder(), "pgd"]), evaluate_toy(["pgd"])
    assert (after.images("pgd") == alone.images("pgd")).all()


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_engine_keeps_the_query_budget(budget: int) -> None:
    result = evaluate_toy(["pgd", attacks.Honest(), attacks.EndsOutside()], query_budget=budget)
    assert result.per_attack["ends_outside"] is None
    spent = result.table.groupby("attack")[["forwards", "backwards"]].max().sum(axis=1)
    assert spent.max() <= budget
    assert result.per_attack["pgd"] is not None


class LinearOffender(LinearToy):
    """The base of the engine's defense offenders."""


class NanForward(LinearOffender):
    """NaN for every image."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x) * torch.nan


class RowsMissing(LinearOffender):
    """One answer for the whole batch."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x)[:1]


class ClassMissing(LinearOffender):
    """Three logits where four are declared."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x)[:, :3]


class NotATensor(LinearOffender):
    """A tuple."""

    def forward(self, x: Images) -> Logits:
        return (super().forward(x),)  # type: ignore[return-value]  # planted


class SecretDice(LinearOffender):
    """Random, but declared deterministic."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x) + torch.randn(len(x), 4)


class RarelyDice(LinearOffender):
    """Random in some of its calls, as chance has it, but declared deterministic."""

    spared = 5

    def forward(self, x: Images) -> Logits:
        self.spared -= 1
        return super().forward(x) + (torch.rand(()) if self.spared < 0 else 0.0)


class LuckyDice(RarelyDice):
    """Random only once the usual calls are over and the image is asked among its copies."""

    spared = 10


class BatchNormed(LinearOffender):
    """Normalises by the batch, as BatchNorm without running statistics does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False, track_running_stats=False)
        self.freeze()

    def forward(self, x: Images) -> Logits:
        return super().forward(self.norm(x.flatten(1)).view_as(x))


class Unnamed(LinearOffender):
    """No name."""

    name = ""


def layer() -> nn.Module:
    """Passes a fifth of the values on in training mode, and all in eval mode."""
    return nn.Sequential(nn.Identity(), nn.BatchNorm2d(1), nn.Dropout(0.8))


class ListedNet(LinearOffender):
    """Half of it is in a plain list, which `freeze` passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {"first": [layer()]}

    def forward(self, x: Images) -> Logits:
        return super().forward(self.parts["first"][0](x))


class EnclosedNet(ListedNet):
    """The same in a closure, and declared randomized."""

    randomized = True

    def __init__(self) -> None:
        super().__init__()
        net = layer()
        self.parts = {"first": [partial(lambda x: net(-x))]}  # type: ignore[list-item]


class AttackersNet(ListedNet):
    """The same in the stand-in alone."""

    def forward(self, x: Images) -> Logits:
        return LinearToy.forward(self, x)

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        del mode
        return ListedNet.forward(self, x)


@pytest.mark.parametrize(
    ("offender", "message"),
    [
        (NanForward, "logits must be finite"),
        (RowsMissing, r"shape \(4, 4\); got \(1, 4\)"),
        (ClassMissing, r"shape \(4, 4\); got \(4, 3\)"),
        (NotATensor, "must be a tensor.*got tuple"),
        (SecretDice, "declared deterministic"),
        (RarelyDice, "declared deterministic, but two of 10 calls on the same images differ"),
        (LuckyDice, "declared deterministic, but two of 10 calls on the same images differ"),
        (BatchNormed, "another answer in a batch with other images, by .* track_running_stats=False"),
        (Unnamed, "name is empty"),
        (ListedNet, r"forward calls a network .*, Sequential \(self.parts\['first'\]\[0\]\).* nn.ModuleList"),
        (EnclosedNet, r"forward calls .*, Sequential \(net in the closure of self.parts\['first'\]\[0\]\)"),
        (
            AttackersNet,
            r"adaptive_forward \(full\) calls .* training mode, off the device and out of the weights digest",
        ),
    ],
)
def test_engine_refuses_a_defense_before_any_work(offender: type[LinearOffender], message: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=message):
        evaluate_toy(["pgd"], offender(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_audit_refuses_a_hidden_network_whatever_it_checks() -> None:
    toy = ListedNet()
    with pytest.raises(PluginError, match="forward calls a network that is none of its sub-modules"):
        robench.audit(toy, LINF, toy.examples(12), checks="zero_gradients", device="cpu")


class Restacked(LinearOffender):
    """Keeps a list of its own layers, and makes a container around them and layers without weights at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(1, 1, 1)
        self.layers = [self.scale]
        self.freeze()

    def forward(self, x: Images) -> Logits:
        return super().forward(nn.Sequential(*self.layers, nn.Hardtanh(-9, 9))(x))


def test_engine_lets_a_defense_call_its_own_layers_in_whatever_it_makes() -> None:
    assert evaluate_toy([attacks.Honest()], Restacked()).complete


class DroppedOut(LinearOffender):
    """Declared randomized, with a dropout that is off in eval mode."""

    randomized = True

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.freeze()

    def forward(self, x: Images) -> Logits:
        return super().forward(self.dropout(x))


class Rarely(LinearOffender):
    """Answers otherwise for a quarter of the images."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        return super().forward(x) * torch.where(torch.rand(len(x), 1) < 0.75, 1.0, 0.5)


class Together(LinearOffender):
    """Answers otherwise in a quarter of its calls, for all images alike."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        return super().forward(x) * (1.0 if torch.rand(()) < 0.75 else 0.5)


def test_engine_warns_once_of_dice_that_always_fall_alike(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"eot": 1, "judge_repeats": 2}
    evaluate_toy([attacks.Honest()], Rarely(), **settings)
    assert caplog.messages == []
    offender = DroppedOut()
    for _ in range(2):
        evaluate_toy([attacks.Honest()], offender, **settings)
    (told,) = caplog.messages
    assert "declared randomized, but 10 calls agree; nn.Dropout is off in eval mode" in told


def test_engine_finds_draws_that_a_pass_shares_and_says_once_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"eot": 2, "judge_repeats": 2, "unit_size": 4}
    offender, honest = Together(), Rarely()
    for _ in range(2):
        evaluate_toy([attacks.Honest()], offender, **settings)
        evaluate_toy([attacks.Honest()], honest, **settings)
    (told,) = caplog.messages
    assert "draws once for all images of a pass, so robench asks each draw on its own" in told
    assert (offender.shares_draws, honest.shares_draws) == (True, False)


def test_what_a_defense_declares_of_its_draws_is_taken_unless_it_is_seen_to_be_wrong() -> None:
    settings = {"eot": 2, "judge_repeats": 2}
    honest, offender = Rarely(), Together()
    honest.draws_per_pass = True
    evaluate_toy([attacks.Honest()], honest, **settings)
    assert honest.shares_draws
    offender.draws_per_pass = False
    with pytest.raises(PluginError, match=r"declares draws_per_pass = False, but .* Leave it out, or draw for each"):
        evaluate_toy([attacks.Honest()], offender, **settings)


def test_copies_that_must_go_one_by_one_share_nothing() -> None:
    offender = Together()
    offender.batch_rows = 1
    evaluate_toy([attacks.Honest()], offender, eot=2, judge_repeats=2)
    assert offender.shares_draws is False


def test_engine_stops_when_the_defense_breaks_during_the_run(tmp_path: Path) -> None:
    class NanElsewhere(LinearOffender):
        """NaN on every image but those that it knows."""

        known = LinearToy().examples(12)[0]

        def forward(self, x: Images) -> Logits:
            unknown = (x[:, None] != self.known).flatten(2).any(2).all(1)
            return super().forward(x).masked_fill(unknown[:, None], torch.nan)

    with pytest.raises(PluginError, match="logits must be finite"):
        evaluate_toy([attacks.Honest()], NanElsewhere(), out=tmp_path / "run")
    assert not list((tmp_path / "run" / "units").iterdir())


class TrainsWhenAsked(LinearOffender):
    """Puts its BatchNorm in training mode at each call, from a call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm2d(1, affine=False), calls
        self.freeze()

    def forward(self, x: Images) -> Logits:
        self.calls -= 1
        if self.calls < 0:
            self.norm.train()(x)
        return super().forward(x)


@pytest.mark.parametrize(("calls", "stored"), [(0, False), (17, True)], ids=["at once", "during the run"])
def test_engine_stores_no_unit_in_which_the_defense_changed(calls: int, stored: bool, tmp_path: Path) -> None:
    folder, message = tmp_path / "run", r'changed during the run \(first "norm.num_batches_tracked"\).*Call eval\(\)'
    with pytest.raises(PluginError, match=message):
        evaluate_toy([attacks.Honest(), "pgd(steps=20)"], TrainsWhenAsked(calls), out=folder, unit_size=3)
    assert folder.exists() is stored
    with pytest.raises(RobenchError):
        robench.Evaluation.load(folder)
    with pytest.raises(PluginError, match=message):
        evaluate_toy([attacks.Honest(), "pgd(steps=20)"], TrainsWhenAsked(calls), unit_size=3)


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"linf", "l2"}))
def test_engine_refuses_an_attack_that_does_not_serve_the_norm(norm: str) -> None:
    toy = LinearToy()
    threat = ThreatModel(norm, 1)
    with pytest.raises(UsageError, match=f"supports linf, l2; the threat model is {norm}"):
        robench.evaluate(toy, attacks.Honest(), threat, toy.examples(4))


class LooseCount(LinearOffender):
    """Counts its calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.state = [torch.zeros(1)]

    def forward(self, x: Images) -> Logits:
        self.state[0] = self.state[0] + 1
        return super().forward(x)


class Remembers(LinearOffender):
    """Leaves its last images behind, and changes no answer."""

    last: Images | None = None

    def forward(self, x: Images) -> Logits:
        self.last = x
        return super().forward(x)


def test_engine_watches_tensors_outside_the_state_dict_but_not_what_a_pass_leaves_behind() -> None:
    with pytest.raises(PluginError, match=r'changed during the run \(first "state\[0\]"\).*None before the run'):
        evaluate_toy([attacks.Honest()], LooseCount())
    defense = Remembers()
    first, second = (evaluate_toy([attacks.Honest()], defense) for _ in range(2))
    assert defense.last is not None
    assert first.spec == second.spec
