"""Planted offenders: each rule of the two contracts catches one that breaks it, and lets the honest pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import offending_attacks as attacks
import offending_defenses as defenses
import offending_minimal as minimal
import pytest
import torch
from torch import Tensor, nn

from robench.attack import Attack
from robench.defense import Defense, wrap
from robench.errors import PluginError
from robench.testing import AttackContract, DefenseContract, LinearToy, NoisyLinearToy


def rules(contract: type) -> set[str]:
    """The names of a contract's tests."""
    return {name for name, _ in inspect.getmembers(contract, inspect.isfunction) if name.startswith("test_")}


def call_rule(contract: object, rule: str, **more: Any) -> None:
    """Calls one test of a contract as pytest would."""
    test: Callable[..., None] = getattr(contract, rule)
    test(**{name: value for name, value in more.items() if name in inspect.signature(test).parameters})


# attacks

ATTACKS: list[tuple[str, Attack, str]] = [
    ("traits_and_fact_sheet", attacks.Nameless(), "name is empty"),
    ("traits_and_fact_sheet", attacks.Undecorated(), "must carry @dataclass"),
    ("traits_and_fact_sheet", attacks.Undocumented(), "no docstring"),
    ("traits_and_fact_sheet", attacks.changed(Tensor.clone, norms=("linf", "l3")), "norms must be some of"),
    ("spec_replays", attacks.Forgetful(scale=0.5), "replays"),
    ("shape_dtype_and_device", attacks.changed(lambda x: x[:, :, 1:]), "shape must be"),
    ("shape_dtype_and_device", attacks.changed(Tensor.double), "dtype must be"),
    ("shape_dtype_and_device", attacks.changed(lambda x: x.clone().requires_grad_()), "carries a graph"),
    ("stays_within_bounds", attacks.LeavesBall(), "within eps"),
    ("stays_within_bounds", attacks.LeavesBox(), r"\[0, 1\]"),
    ("stays_within_bounds", attacks.changed(lambda x: torch.where(x > 0.9, torch.nan, x)), "finite"),
    ("leaves_inputs_and_model_alone", attacks.InPlace(), "changes x"),
    ("leaves_inputs_and_model_alone", attacks.InPlaceLabels(), "changes y"),
    ("leaves_inputs_and_model_alone", attacks.meddler(attacks.scale_weights), "changes the model"),
    ("leaves_inputs_and_model_alone", attacks.meddler(lambda model: model.train()), "changes the model"),
    ("leaves_inputs_and_model_alone", attacks.meddler(lambda model: model.requires_grad_(True)), "changes the model"),
    ("seeds_nothing", attacks.Seeder(), "calls torch.manual_seed"),
    ("same_seed_same_bits", attacks.Remembers(), "two runs under one seed differ"),
    ("draws_as_declared", attacks.PythonDraws(), "two seeds give different bits"),
    ("draws_as_declared", attacks.SaysItDraws(), "two seeds give the same bits"),
    ("draws_as_declared", attacks.Seeder(), "two seeds give the same bits"),
    ("draws_as_declared", attacks.HidesItsDraws(), "two seeds give different bits"),
    ("draws_as_declared", attacks.WastesDraws(), "draws random numbers"),
    ("batch_mates_do_not_matter", attacks.SharesSteps(), "alone and in a batch"),
    ("batch_of_one", attacks.NeedsABatch(), "single image"),
    ("batch_of_one", attacks.changed(lambda x: x.squeeze(0)), "shape must be"),
    ("zero_bound_returns_the_originals", attacks.AtLeastALittle(), "must return x"),
    ("access_is_as_declared", attacks.SecretGradient(), 'needs "gradient"'),
    ("access_is_as_declared", attacks.SecretScores(), 'needs "scores"'),
    ("access_is_as_declared", attacks.BackDoor(), "past the victim"),
    ("access_is_as_declared", attacks.Overdeclared(), "uses 'scores'"),
    ("query_budget_is_kept", attacks.IgnoresTheEnd(), "past the victim"),
    ("query_budget_is_kept", attacks.EndsOutside(), "within eps"),
    ("known_distance", attacks.Idle(), "0 of 12 turned"),
    ("known_distance", attacks.LeavesBall(), "not possible"),
    ("minimal_norm_finds_the_nearest_error", minimal.Overshoots(), "1.05 times known"),
    ("minimal_norm_finds_the_nearest_error", minimal.StopsAtTheBound(), "no error found"),
    ("minimal_norm_returns_an_error_or_the_original", minimal.ReturnsItsLastTry(), "still right"),
    ("minimal_norm_returns_an_error_or_the_original", minimal.MovesWhatIsWrong(), "must be returned as it is"),
    ("success_does_not_fall_with_the_bound", attacks.GivesUp(), "growing bounds"),
]


@pytest.mark.parametrize(
    ("rule", "attack", "message"),
    [pytest.param(*row, id=f"{row[0]}-{type(row[1]).__name__}-{i}") for i, row in enumerate(ATTACKS)],
)
def test_contract_catches_attack(rule: str, attack: Attack, message: str) -> None:
    contract = AttackContract()
    contract.attack = attack
    with pytest.raises((AssertionError, PluginError), match=message):
        call_rule(contract, f"test_{rule}", device="cpu", budget=1)


def test_each_rule_of_the_attack_contract_has_an_offender() -> None:
    assert {f"test_{rule}" for rule, _, _ in ATTACKS} == rules(AttackContract)


class TestHonest(AttackContract):
    attack = attacks.Honest(scale=1.0)


class TestHonestDraws(AttackContract):
    attack = attacks.HonestDraws()


class TestHonestMinimal(AttackContract):
    attack = minimal.HonestMinimal()


class TestForgottenOptions(AttackContract):
    """An option that is not at its default, on an attack that no registry knows."""

    attack = attacks.Honest(scale=0.999)


# defenses


class ToyTest(DefenseContract):
    """The contract on what a function builds."""

    def __init__(self, make: Callable[[], Defense]) -> None:
        self.make = make

    def build(self) -> Defense:
        return self.make()


DEFENSES: list[tuple[str, Callable[[], Defense], str]] = [
    ("fact_sheet", defenses.Namefree, "name is empty"),
    ("fact_sheet", defenses.Listed, "input_shape must be"),
    ("fact_sheet", defenses.BareToy, "no docstring"),
    ("fact_sheet", defenses.Doubled, "gradient_modes must differ"),
    ("comes_frozen_in_eval_mode_on_the_cpu", lambda: defenses.Toy().train(), "in train mode"),
    ("comes_frozen_in_eval_mode_on_the_cpu", defenses.StillLearning, "in train mode: .'norm'"),
    ("comes_frozen_in_eval_mode_on_the_cpu", lambda: defenses.Toy().requires_grad_(True), "require a gradient"),
    ("comes_frozen_in_eval_mode_on_the_cpu", lambda: defenses.Toy().to("meta"), "on the CPU"),
    ("logits", defenses.NanOnBlack, r"rows \[0\]"),
    ("logits", defenses.OneTooFew, r"must be \(5, 5\); got \(5, 4\)"),
    ("logits", defenses.Squeezed, r"must be \(1, 5\); got \(5,\)"),
    ("logits", defenses.Doubles, "must be float32"),
    ("detection_score", defenses.WrongScore, "detection_score must be"),
    ("pictures", defenses.WrongPictures, "must be in"),
    ("randomized_as_declared", defenses.HiddenDice, "randomized = False, but"),
    ("randomized_as_declared", defenses.NoDice, "randomized = True, but"),
    ("randomized_as_declared", defenses.FixedDice, "randomized = True, but"),
    ("batch_mates_do_not_matter", defenses.Centred, "alone and in a batch"),
    ("batch_mates_do_not_matter", defenses.BatchNormed, "alone and in a batch"),
    ("batch_mates_do_not_matter", defenses.StillLearning, "alone and in a batch"),
    ("randomness_is_torchs", defenses.FixedDice, "calls torch.manual_seed"),
    ("randomness_is_torchs", defenses.ReseedsDice, "calls torch.manual_seed"),
    ("randomness_is_torchs", defenses.OwnDice, "from one state"),
    ("forward_changes_nothing", defenses.Counts, "a buffer"),
    ("forward_changes_nothing", defenses.StillLearning, "a buffer"),
    ("forward_changes_nothing", defenses.Overwrites, "changes x in place"),
    ("gradient_matches_finite_differences", defenses.WrongSign, "the derivative is"),
    ("adaptive_forward_is_forward_or_declared", defenses.StandIn, "differs from forward"),
    ("every_gradient_mode_gives_a_gradient", defenses.Detached, "gives no gradient"),
    ("every_gradient_mode_gives_a_gradient", defenses.Rounded, "mode full: the gradient is zero"),
    ("every_gradient_mode_gives_a_gradient", defenses.InfiniteSlope, "no entry of the gradient is finite"),
    ("every_gradient_mode_gives_a_gradient", defenses.SecondModeFails, "mode none: the gradient is zero"),
    ("unknown_gradient_mode_is_refused", defenses.AnyMode, "must refuse a mode"),
    ("weights_round_trip", defenses.LooseWeights, "other logits"),
]


@pytest.mark.parametrize(
    ("rule", "make", "message"),
    [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(DEFENSES)],
)
def test_contract_catches_defense(rule: str, make: Callable[[], Defense], message: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, PluginError), match=message):
        call_rule(ToyTest(make), f"test_{rule}", tmp_path=tmp_path)


def test_each_rule_of_the_defense_contract_has_an_offender() -> None:
    assert {f"test_{rule}" for rule, _, _ in DEFENSES} == rules(DefenseContract)


class TestToys(DefenseContract):
    """The control: what the toys do is allowed, so the offenders are caught for what they were planted for."""

    makers: ClassVar[dict[str, Callable[[], Defense]]] = {
        "toy": defenses.Toy,
        "linear": LinearToy,
        "noisy": lambda: NoisyLinearToy(channels=3),
        "wrapped": lambda: wrap(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), num_classes=3, input_shape=(1, 3, 3)),
    }

    @pytest.fixture(autouse=True, params=sorted(makers))
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.make = self.makers[request.param]

    def build(self) -> Defense:
        return self.make()
