"""Defenses that would make an attack look weak, change what they are given or end the program; mistakes of callers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_toys import Linear, Noisy, Still, grid_images
from torch import Tensor

import robench
from robench import PluginError, ThreatModel, UsageError
from robench.audit.checks.contract import judge as judge_contract
from robench.audit.checks.contract import remember
from robench.audit.effort import USUAL
from robench.audit.evidence import Evidence
from robench.data import Dataset, digest_data
from robench.defense import Defense
from robench.evaluate import evaluate
from robench.judge import judge
from robench.losses import margin
from robench.registry import describe_error, load_attack, load_defense
from robench.rng import seeded
from robench.testing import LinearToy
from robench.types import Images, Logits
from robench.victim import Victim

LINF = ThreatModel("linf", 0.1)


def passes(victim: Victim) -> list[tuple[int, int]]:
    return list(zip(victim.ledger.forwards.tolist(), victim.ledger.backwards.tolist(), strict=True))


def right_images(defense: Defense, n: int) -> tuple[Tensor, Tensor]:
    """Images with the labels that the defense gives them."""
    x = grid_images(n)[0]
    return x, defense(x).argmax(1)


# answers that are not finite


class Hole(Linear):
    """NaN (or an infinity) where the two largest logits are near to each other: at every error that is near."""

    name = "hole"

    def __init__(self, value: float = torch.nan, gap: float = 1.0) -> None:
        super().__init__()
        self.value, self.gap = value, gap

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        top = logits.topk(2, dim=1).values
        return logits.masked_fill((top[:, 0] - top[:, 1] < self.gap)[:, None], self.value)


def outside_the_hole(defense: Hole) -> tuple[Tensor, Tensor]:
    x, y = right_images(Linear(), 40)
    keep = defense(x).isfinite().all(1)
    assert int(keep.sum()) > 8
    return x[keep], y[keep]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("attack", ["pgd", "apgd(steps=10)", "fmn(steps=10)", "square(queries=30)"])
def test_an_attack_that_meets_nan_has_failed_and_its_image_is_not_robust(attack: str, value: float) -> None:
    defense = Hole(value)
    result = evaluate(defense, attack, ThreatModel("linf", 0.2), outside_the_hole(defense), device="cpu")
    assert not result.complete
    assert result.robust_accuracy is None
    (reason,) = result.failures.values()
    assert 'PluginError: defense "hole": logits must be finite;' in reason
    assert "forward hold NaN or inf" in reason


QUERIES: dict[str, tuple[Callable[[Victim, Tensor, Tensor], object], str]] = {
    "labels": (lambda victim, x, _: victim.labels(x), "forward"),
    "logits": (lambda victim, x, _: victim.logits(x), "forward"),
    "gradient": (lambda victim, x, y: victim.gradient(x, y), "adaptive_forward"),
    "differentiable": (lambda victim, x, _: victim.differentiable(x.clone().requires_grad_()), "adaptive_forward"),
}


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_refuses_logits_that_are_not_finite(query: str) -> None:
    ask, forward = QUERIES[query]
    x, y = grid_images(3)
    x[1] = 0.5  # all logits are 0 there
    defense = Hole(gap=1e-6)
    with pytest.raises(PluginError, match=f'"hole": logits must be finite; 1 of 3 rows of {forward} hold NaN or inf'):
        ask(Victim(defense, "gradient", 3), x, y)


class Root(Linear):
    """A root without a derivative at `count` pixels of each image, whose value is right."""

    name = "root"

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Images) -> Logits:
        flat = x.flatten(1)
        zero = (flat - flat.detach())[:, : self.count].sqrt()
        return super().forward((flat + torch.nn.functional.pad(zero, (0, 18 - self.count))).view_as(x))


class NoisyRoot(Root):
    """The same in about half of all draws, in all pixels."""

    name = "noisy_root"
    randomized = True

    def forward(self, x: Images) -> Logits:
        bad = torch.rand(len(x), 1, 1, 1) < 0.5
        return Linear.forward(self, x + torch.where(bad, (x - x.detach()), 1.0).sqrt() - (~bad).float())


def foreign_gradient(victim: Victim, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(margin(victim.differentiable(leaf), y).sum(), leaf)[0]


TAKEN: dict[str, Callable[[Victim, Tensor, Tensor], Tensor]] = {
    "gradient": lambda victim, x, y: victim.gradient(x, y, "margin").grad,
    "differentiable": foreign_gradient,
}


@pytest.mark.parametrize("how", TAKEN)
def test_entries_of_the_gradient_that_are_not_finite_are_zero_and_the_rest_leads(how: str) -> None:
    x, y = right_images(Linear(), 6)
    found = TAKEN[how](Victim(Root(3), "gradient", 6), x, y)
    true = Victim(Linear(), "gradient", 6).gradient(x, y, "margin").grad
    assert not bool(found.flatten(1)[:, :3].any())
    torch.testing.assert_close(found.flatten(1)[:, 3:], true.flatten(1)[:, 3:])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_is_not_disarmed_by_a_few_pixels_without_a_derivative(norm: str) -> None:
    data = right_images(Linear(), 24)
    threat = ThreatModel(norm, 0.15 if norm == "linf" else 0.5)
    plain, holed = (evaluate(defense, "pgd", threat, data, device="cpu") for defense in (Linear(), Root()))
    assert holed.complete
    assert plain.robust_accuracy is not None
    assert holed.robust_accuracy is not None
    assert plain.robust_accuracy.value < 0.8
    assert abs(holed.robust_accuracy.value - plain.robust_accuracy.value) <= 0.1


@pytest.mark.parametrize("how", TAKEN)
def test_a_gradient_without_a_finite_entry_is_refused_and_the_way_out_named(how: str) -> None:
    x, y = grid_images(4)
    message = r'"root": no entry of the gradient is finite for 4 of 4 images.*adaptive_forward.*BPDA'
    with pytest.raises(PluginError, match=message):
        TAKEN[how](Victim(Root(18), "gradient", 4), x, y)
    result = evaluate(Root(18), "pgd,noise", LINF, (x, y), device="cpu")
    assert not result.complete
    assert result.per_attack["pgd"] is None


def test_draws_without_a_finite_gradient_leave_the_others() -> None:
    x, y = right_images(Linear(), 3)
    with seeded(1, "draws"):
        found = Victim(NoisyRoot(), "gradient", 3, eot=40).gradient(x, y, "margin").grad
    true = Victim(Linear(), "gradient", 3).gradient(x, y, "margin").grad
    assert bool(found.isfinite().all())
    assert torch.equal(found.sign(), true.sign())


# stand-ins


class Steps(Linear):
    """Rounds to a quarter; the stand-in does not."""

    name = "steps"

    def forward(self, x: Images) -> Logits:
        return super().forward((4 * x).round() / 4)

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        return Linear.forward(self, x)


class ExactSteps(Steps):
    """The same with the values of `forward` and the stand-in's gradient."""

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        return Linear.forward(self, (4 * x).round() / 4 + x - x.detach())


def test_errors_of_a_stand_in_are_confirmed_by_forward_and_counted() -> None:
    x = grid_images(30)[0]
    plain, rounded = Linear()(x), Steps()(x)
    y = rounded.argmax(1)
    y[:5] = (y[:5] + 1) % 3  # errors that stand
    doubted = margin(plain, y) > 0
    assert int((doubted & (margin(rounded, y) <= 0)).sum()) > 0
    victim = Victim(Steps(), "gradient", 30)
    found = victim.gradient(x, y, "margin")
    torch.testing.assert_close(found.logits[doubted], rounded[doubted])
    torch.testing.assert_close(found.loss[doubted], margin(rounded, y)[doubted])
    torch.testing.assert_close(found.logits[~doubted], plain[~doubted])
    assert not bool((margin(found.logits, y)[5:] > 0).any())
    assert passes(victim) == [(1 + int(flag), 1) for flag in doubted.tolist()]


def test_candidates_are_confirmed_for_each_example() -> None:
    x, y = grid_images(4)
    victim = Victim(Steps(), "gradient", 4)
    many, labels = torch.cat([x, 1 - x, x.flip(3)]), y.repeat(3)
    wrong = margin(Linear()(many), labels) > 0
    found = victim.gradient(many, labels, "margin")
    torch.testing.assert_close(found.logits[wrong], Steps()(many)[wrong])
    assert victim.ledger.forwards.tolist() == (3 + wrong.view(3, 4).sum(0)).tolist()


def test_an_error_that_the_budget_cannot_confirm_stands() -> None:
    x, y = grid_images(4)
    victim = Victim(Steps(), "gradient", 4, budget=2)
    found = victim.gradient(x, (y + 1) % 3)
    torch.testing.assert_close(found.logits, Linear()(x))
    assert passes(victim) == [(1, 1)] * 4


def test_a_defense_without_a_stand_in_and_a_randomized_one_are_not_asked_twice() -> None:
    x, y = grid_images(4)
    for defense in (Linear(), Noisy()):
        victim = Victim(defense, "gradient", 4, eot=2)
        victim.gradient(x, (y + 1) % 3)
        draws = 2 if defense.randomized else 1
        assert passes(victim) == [(draws, draws)] * 4


@pytest.mark.parametrize("attack", ["pgd", "apgd(steps=10)", "fmn(steps=20)"])
def test_an_attack_goes_on_where_only_the_stand_in_errs(attack: str) -> None:
    """Not cw, whose objective is level where the stand-in errs by more than `confidence`, whatever `forward` says."""
    data = right_images(Steps(), 40)
    threat = ThreatModel("l2", 0.5)
    found, exact = (evaluate(defense, attack, threat, data, device="cpu") for defense in (Steps(), ExactSteps()))
    assert found.robust_accuracy is not None
    assert exact.robust_accuracy is not None
    assert exact.robust_accuracy.value < 0.9
    assert found.robust_accuracy.value <= exact.robust_accuracy.value + 0.1


# input changed in place


class InPlace(Linear):
    """Works on its input: by torch, through a view, or by a way that torch does not count."""

    name = "in_place"

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Images) -> Logits:
        changed = {"plain": x, "view": x[:, 0], "data": x.data}[self.how] if x.requires_grad or self.how else x
        changed.mul_(4).round_().div_(4)
        return super().forward(x)


class InPlaceStandIn(Linear):
    """Only its stand-in works on its input, with or without a graph."""

    name = "in_place_stand_in"

    def __init__(self, *, graph: bool) -> None:
        super().__init__()
        self.graph = graph

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        with torch.set_grad_enabled(self.graph):
            x.mul_(0.5)
        return self(x)


CHANGES = r"changes its input in place; work on a copy"


@pytest.mark.parametrize("how", ["plain", "view"])
def test_a_forward_that_changes_its_input_is_refused_everywhere(how: str) -> None:
    x, y = grid_images(6)
    before, defense = x.clone(), InPlace(how)
    message = f'defense "in_place": forward {CHANGES}'
    with pytest.raises(PluginError, match=message):
        evaluate(defense, Still(), LINF, (x, y), device="cpu")
    with pytest.raises(PluginError, match=message):
        judge(defense, x, 1)
    for query in ("labels", "logits"):
        with pytest.raises(PluginError, match=message):
            QUERIES[query][0](Victim(defense, "gradient", 6), x, y)
    for query in ("gradient", "differentiable"):
        with pytest.raises(PluginError, match=f'"in_place": adaptive_forward {CHANGES}'):
            QUERIES[query][0](Victim(defense, "gradient", 6), x, y)
    assert torch.equal(x, before)


@pytest.mark.parametrize("graph", [True, False])
def test_a_stand_in_that_changes_its_input_makes_the_attack_fail(graph: bool) -> None:
    x, y = grid_images(4)
    result = evaluate(InPlaceStandIn(graph=graph), "pgd", LINF, (x, y), device="cpu")
    assert not result.complete
    assert f"adaptive_forward {CHANGES}" in result.failures["pgd"]


def test_a_change_that_torch_does_not_count_reaches_a_copy_alone() -> None:
    """The number is then right: that of a net that rounds."""
    x, y = right_images(Linear(), 12)
    before, defense = x.clone(), InPlace("data")
    evidence = Evidence(defense, LINF, as_dataset(x, y), 0, "cpu", USUAL)
    remember(evidence)
    assert judge(defense, x, 1).argmax(1).tolist() == defense(x.clone()).argmax(1).tolist()
    victim = Victim(defense, "gradient", 12)
    for ask, _ in QUERIES.values():
        ask(victim, x, y)
    assert torch.equal(x, before)
    result = evaluate(defense, Still(), LINF, (x, y), device="cpu")
    assert torch.equal(x, before)
    assert result.robust_accuracy == result.clean_accuracy


def as_dataset(x: Tensor, y: Tensor) -> Dataset:
    return Dataset("", "", x, y, torch.arange(len(x)), ("0", "1", "2"), digest_data(x, y))


# errors of a plugin, and exit()


PLUGIN = """
    from dataclasses import dataclass

    import torch
    from engine_toys import Linear, Still


    class Own(Exception):
        pass


    class Raising(Linear):
        name = "raising"
        seen = 0

        def __init__(self, how="own", after=0):
            super().__init__()
            self.how, self.after = how, after
            if how == "init":
                undefined
            if how == "init exit":
                raise SystemExit(0)
            if how == "init option":
                float("much")

        def forward(self, x):
            self.seen += 1
            if self.seen > self.after:
                self.fall(x)
            return super().forward(x)

        def fall(self, x):
            if self.how == "own":
                raise Own("planted,\\nin two lines")
            if self.how == "name":
                undefined
            if self.how == "torch":
                torch.nn.functional.linear(x, torch.ones(7, 5))
            if self.how == "module":
                torch.nn.Unflatten(1, (5, 7))(x)
            if self.how == "exit":
                raise SystemExit(0)
            if self.how == "memory":
                raise MemoryError


    class Bare(Linear):
        name = "bare"

        def __init__(self):
            super().__init__()
            float("much")


    @dataclass(frozen=True)
    class Quits(Still):
        name = "quits"

        def __post_init__(self):
            raise SystemExit(0)
"""
RAISED = {
    "own": r"raised Own at plug\.py:\d+: planted, in two lines",
    "name": r"raised NameError at plug\.py:\d+: name 'undefined' is not defined",
    "torch": r"raised RuntimeError at plug\.py:\d+: ",
    "module": r"raised RuntimeError at plug\.py:\d+: ",
    "exit": r"called exit\(0\)",
}


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "plug.py"
    path.write_text(textwrap.dedent(PLUGIN))
    return str(path)


@pytest.mark.parametrize("how", RAISED)
def test_whatever_a_forward_raises_is_one_line(how: str, plugin: str) -> None:
    defense = load_defense(f"{plugin}:Raising", how=how)
    with pytest.raises(PluginError, match=rf'^defense "raising": forward {RAISED[how]}') as caught:
        evaluate(defense, "fgsm", LINF, grid_images(4), device="cpu")
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", RAISED)
def test_what_it_raises_later_is_one_line_too(how: str, plugin: str) -> None:
    defense = load_defense(f"{plugin}:Raising", how=how, after=14)  # twelve at the start, two in unit 0
    message = RAISED[how].replace("raised ", "") if how != "exit" else r"a plugin called exit\(0\)"
    with pytest.raises(PluginError, match=f"^unit 1: {message}") as caught:
        evaluate(defense, Still(), LINF, grid_images(8), device="cpu", unit_size=4, judge_repeats=1)
    assert caught.value.__cause__ is not None


def test_a_lack_of_memory_is_no_fault_of_the_plugin(plugin: str) -> None:
    with pytest.raises(MemoryError):
        evaluate(load_defense(f"{plugin}:Raising", how="memory"), "fgsm", LINF, grid_images(1), device="cpu")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Raising(how='init')", PluginError, r'"raising": its constructor raised NameError at plug\.py:\d+'),
        ("Raising(how='init exit')", PluginError, r'"raising": its constructor called exit\(0\)'),
        ("Raising(how='init option')", UsageError, r'"raising": an option is of the wrong kind: could not convert'),
        ("Bare", PluginError, r'"bare": its constructor raised ValueError at plug\.py:\d+: could not convert'),
    ],
)
def test_a_constructor_that_raises_is_one_line(name: str, kind: type[Exception], message: str, plugin: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_defense(f"{plugin}:{name}")
    assert caught.value.__cause__ is not None


def test_exit_in_an_attack_s_constructor_or_in_a_module_is_one_line(plugin: str) -> None:
    with pytest.raises(PluginError, match=r'Quits": its constructor called exit\(0\)'):
        load_attack(f"{plugin}:Quits")
    Path(plugin).with_name("quits.py").write_text("raise SystemExit(0)\n")
    quits = f"{Path(plugin).with_name('quits.py')}:Any"
    with pytest.raises(PluginError, match=r"cannot be imported: it called exit\(0\)"):
        load_defense(quits)


def test_the_command_says_so_and_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "quits.py"
    path.write_text("raise SystemExit(0)\n")
    command = [sys.executable, "-m", "robench", "run", "--defense", f"{path}:Any", "--attack", "fgsm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "called exit(0)" in line


def test_audit_s_contract_check_names_what_was_raised(plugin: str) -> None:
    evidence = Evidence(
        load_defense(f"{plugin}:Raising", how="exit"), LINF, as_dataset(*grid_images(4)), 0, "cpu", USUAL
    )
    with pytest.raises(PluginError, match=r'"raising": forward called exit\(0\)'):
        remember(evidence)
    evidence = Evidence(load_defense(f"{plugin}:Raising", after=1), LINF, as_dataset(*grid_images(4)), 0, "cpu", USUAL)
    remember(evidence)
    outcome = judge_contract(evidence)
    assert outcome.verdict == "fail"
    assert "forward raised Own at plug.py" in outcome.reason


def test_where_only_torch_or_nobody_raised_that_is_said() -> None:
    assert describe_error(ValueError("a\n b")) == "ValueError: a b"
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert describe_error(caught.value).startswith("JSONDecodeError at test_hostile.py:")


# mistakes of callers


def test_arrays_and_lists_are_taken_as_tensors() -> None:
    x, y = grid_images(5)
    expected = evaluate(Linear(), "fgsm", LINF, (x, y), device="cpu")
    graph = x.clone().requires_grad_()
    for data in (
        (x.numpy(), y.numpy()),
        (x.double().numpy()[::-1][::-1], y.numpy().astype(np.int32)),
        (x, y.tolist()),
        (x, y.float()),
        (graph, y),
        (graph * 1.0, y),
    ):
        found = evaluate(Linear(), "fgsm", LINF, data, device="cpu")
        assert found.spec == expected.spec
        assert found.robust_accuracy == expected.robust_accuracy
    assert graph.grad is None
    assert ThreatModel("linf", 8 / 255) == ThreatModel("linf", np.float64(8 / 255))


REFUSED = {
    "data: dataset": ("evaluate(toy, 'fgsm', linf, pairs)", "pair of images and labels; got TensorDataset. Gather"),
    "data: loader": ("evaluate(toy, 'fgsm', linf, DataLoader(pairs))", "got DataLoader"),
    "data: triple": ("evaluate(toy, 'fgsm', linf, (x, y, y))", "got 3 things"),
    "data: text": ("evaluate(toy, 'fgsm', linf, (x, ['cat', 'dog']))", "as tensors or arrays of numbers"),
    "data: one-hot": ("evaluate(toy, 'fgsm', linf, (x, y[:, None]))", "one number each; got"),
    "data: halves": ("evaluate(toy, 'fgsm', linf, (x, y + 0.5))", "labels must be whole numbers"),
    "data: nan": ("evaluate(toy, 'fgsm', linf, (x, y * float('nan')))", "labels must be whole numbers"),
    "defense: name": ("evaluate('convnet', 'fgsm', linf, (x, y))", "robench.load_defense('convnet')"),
    "defense: module": ("evaluate(nn.Linear(2, 2), 'fgsm', linf, (x, y))", "the module Linear; robench.wrap(module"),
    "defense: class": ("evaluate(LinearToy, 'fgsm', linf, (x, y))", "the class LinearToy; make one: LinearToy()"),
    "defense: none": ("evaluate(None, 'fgsm', linf, (x, y))", "got None; see robench.load_defense"),
    "threat: number": (
        "evaluate(toy, 'fgsm', 0.1, (x, y))",
        'ThreatModel("linf", 8 / 255), or a list of them; got 0.1',
    ),
    "threat: tuple": ("evaluate(toy, 'fgsm', ('linf', 0.1), (x, y))", "got ('linf', 0.1)"),
    "threat: text": ("evaluate(toy, 'fgsm', 'linf', (x, y))", "got 'linf'"),
    "eps: text": ("ThreatModel('linf', 'much')", 'eps must be a number such as 0.1 or 8/255; got "much"'),
    "eps: list": ("ThreatModel('linf', [0.1])", "eps must be a number such as 8 / 255"),
    "attack: class": ("evaluate(toy, PGD, linf, (x, y))", "the class PGD; make one: PGD()"),
    "attack: class in list": ("evaluate(toy, ['fgsm', PGD], linf, (x, y))", "the class PGD; make one: PGD()"),
    "attack: none": ("evaluate(toy, None, linf, (x, y))", "a name such as pgd, or a list of them; got None"),
    "n: text": ("evaluate(toy, 'fgsm', linf, (x, y), n='8')", "n must be a whole number; got '8'"),
    "n: fraction": ("evaluate(toy, 'fgsm', linf, (x, y), n=8.5)", "n must be a whole number; got 8.5"),
    "n: truth": ("evaluate(toy, 'fgsm', linf, (x, y), n=True)", "n must be a whole number; got True"),
    "seed: fraction": ("evaluate(toy, 'fgsm', linf, (x, y), seed=1.5)", "seed must be a whole number; got 1.5"),
    "seed: none": ("evaluate(toy, 'fgsm', linf, (x, y), seed=None)", "seed must be a whole number; got None"),
}
SCRIPT = """
    import json, sys
    import numpy as np
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from robench import ThreatModel, UsageError, evaluate
    from robench.attacks.pgd import PGD
    from robench.testing import LinearToy

    assert ThreatModel("linf", "8/255") == ThreatModel("linf", 8 / 255)
    toy, linf = LinearToy(), ThreatModel("linf", 0.1)
    x, y = toy.examples(8)
    assert evaluate(toy, "fgsm", linf, (x, y), n=np.int64(5), seed=np.int32(3)).spec.n == 5
    pairs, found = TensorDataset(x, y), {}
    for case, call in json.load(sys.stdin).items():
        try:
            eval(call)
        except UsageError as error:
            found[case] = str(error)
        except Exception as error:
            found[case] = "not refused: " + repr(error)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(request: pytest.FixtureRequest) -> dict[str, str]:
    """What each call says; in a process of its own, for in this one beartype checks the arguments before robench."""
    calls = json.dumps({case: call for case, (call, _) in REFUSED.items()})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], input=calls, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_of_the_caller_is_one_line_that_helps(case: str, refusals: dict[str, str]) -> None:
    line = refusals.get(case, "nothing was raised")
    assert REFUSED[case][1] in line
    assert "\n" not in line
    assert not line.startswith("not refused")


def test_the_toy_of_the_calls_is_accepted_as_it_is() -> None:
    toy = LinearToy()
    given: Any = toy.examples(8)
    assert robench.evaluate(toy, "fgsm", LINF, given, device="cpu").complete
