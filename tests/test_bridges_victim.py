"""The bridges: foreign attacks see no more than they declare, are counted and stopped, seeded, and part of a run."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import foolbox
import numpy as np
import pytest
import torch
from bridge_toys import make_defense, make_images, run_bridge, spy_on
from torch import Tensor, nn

from robench import ThreatModel, Victim, evaluate
from robench.bridges.foreign import ForeignAttack, ShownModel, Traits, make_class, show
from robench.cli import main
from robench.defense import Defense
from robench.errors import BudgetExhausted
from robench.registry import load_attack
from robench.rng import foreign_generators, seeded
from robench.testing.attacks import attack_once, count_errors, linear_case, scale_bound
from robench.testing.toys import NoisyLinearToy, NullDefense
from robench.types import Images, Labels


@pytest.fixture(scope="module")
def defense() -> Defense:
    return make_defense()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return make_images()


# what foreign code sees, and what it costs


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("foolbox:BoundaryAttack(steps=20)", "l2", 0.3),
        ("foolbox:LinearSearchBlendedUniformNoiseAttack(directions=20)", "l2", 0.3),
        ("foolbox:SaltAndPepperNoiseAttack(steps=20)", "l2", 0.3),
        ("foolbox:LinfRepeatedAdditiveUniformNoiseAttack(repeats=5)", "linf", 0.1),
    ],
)
def test_decision_attacks_see_labels_only(name: str, norm: str, eps: float) -> None:
    toy, x, y = linear_case(norm)
    victim, _ = spy_on(name, toy, x, y, ThreatModel(norm, eps))
    assert victim.used == {"decisions"}
    assert int(victim.ledger.backwards.sum()) == 0


@pytest.mark.parametrize("name", ["torchattacks:Square(n_queries=20)", "torchattacks:SPSA"])
def test_score_attacks_see_no_gradient(name: str, defense: Defense, images: tuple[Tensor, Tensor]) -> None:
    victim, _ = spy_on(name, defense, *images, ThreatModel("linf", 0.01))
    assert victim.used == {"scores"}
    assert int(victim.ledger.backwards.sum()) == 0


def test_the_model_shown_holds_nothing_of_the_defense(defense: Defense, images: tuple[Tensor, Tensor]) -> None:
    x, _ = images
    for access in ("decisions", "scores", "gradient"):
        shown = show(Victim(defense, access, len(x)), access, x)
        assert sum(parameter.numel() for parameter in shown.parameters()) == 0
        assert list(shown.children()) == []
        assert not shown.training
    labels = show(Victim(defense, "decisions", len(x)), "decisions", x)(x.requires_grad_())
    x.requires_grad_(False)
    assert torch.equal(labels, nn.functional.one_hot(defense(x).argmax(1), 10).float())
    assert not labels.requires_grad


@pytest.mark.parametrize("eot", [1, 3])
def test_queries_are_counted(eot: int) -> None:
    toy = NoisyLinearToy()
    x, y = toy.examples(4)
    victim = Victim(toy, "gradient", len(x), eot=eot)
    with seeded("count"):
        load_attack("foolbox:LinfPGD(steps=7)")(victim, x, y, ThreatModel("linf", 0.02))
    assert victim.ledger.forwards.tolist() == [7 * eot] * 4
    assert victim.ledger.backwards.tolist() == [7 * eot] * 4


def test_a_budget_stops_the_attack() -> None:
    toy, x, y = linear_case("linf")
    attack = load_attack("foolbox:LinfPGD(steps=50)")
    victim = Victim(toy, "gradient", len(x), budget=9)
    with seeded("budget"), pytest.raises(BudgetExhausted):
        attack(victim, x, y, ThreatModel("linf", 0.02))
    assert (victim.ledger.forwards + victim.ledger.backwards).tolist() == [9] * len(x)
    found = evaluate(toy, "foolbox:LinfPGD(steps=50)", scale_bound("linf", 2.0), (x, y), query_budget=9)
    assert not found.failures
    queries = found.table[found.table["attack"] == "foolbox:LinfPGD(steps=50)"]
    assert queries[["forwards", "backwards"]].sum(axis=1).max() == 9


def test_a_budget_is_for_each_image_where_they_go_one_by_one(defense: Defense, images: tuple[Tensor, Tensor]) -> None:
    attack = load_attack("torchattacks:Square(n_queries=50)")
    victim = Victim(defense, "scores", len(images[0]), budget=6)
    with seeded("budget"), pytest.raises(BudgetExhausted):
        attack(victim, *images, ThreatModel("linf", 0.001))
    assert victim.ledger.forwards.tolist() == [6] * len(images[0])


class Halves:
    """A foreign attack that, after a query of all, asks about the first half; breaks the first image's rows."""

    def run(self, model: Any, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        del y
        model(x)
        model(x[: (len(x) + 1) // 2])
        return (x + epsilon).clamp(0, 1)


class Raw(ForeignAttack):
    """A bridge without a package."""

    bridge = "raw"

    def _run(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Tensor:
        return self.foreign().run(show(victim, self.access, x), x, y, threat.eps)


def bridge_raw(foreign: type, traits: Traits) -> Any:
    return make_class(Raw, foreign.__name__, foreign, traits, ())()


def test_rows_without_an_owner_send_images_one_by_one() -> None:
    toy, x, y = linear_case("linf", 4)
    attack = bridge_raw(Halves, Traits(("linf",), "decisions", "budget"))
    victim = Victim(toy, "decisions", len(x))
    found = attack(victim, x, y, ThreatModel("linf", 0.05))
    torch.testing.assert_close(found, x + 0.05)
    assert victim.ledger.forwards.tolist() == [1 + 2] * 4, "the query that was lost, then two for each"
    alone = bridge_raw(Halves, Traits(("linf",), "decisions", "budget", one_by_one=True))
    victim = Victim(toy, "decisions", len(x))
    alone(victim, x, y, ThreatModel("linf", 0.05))
    assert victim.ledger.forwards.tolist() == [2] * 4


def test_several_rows_for_each_example_are_shared_out() -> None:
    toy, x, _ = linear_case("linf", 4)
    victim = Victim(toy, "decisions", len(x))
    shown = show(victim, "decisions", x)
    assert shown(x.repeat(3, 1, 1, 1)).shape == (12, 4)
    assert victim.ledger.forwards.tolist() == [3] * 4


class Runaway:
    """A foreign attack that leaves the ball and the box, and says NaN of the last image."""

    def run(self, model: Any, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        del model, y, epsilon
        moved = x + 5
        moved[-1] = torch.nan
        return moved


def test_what_runs_away_is_brought_back_or_dropped() -> None:
    toy, x, y = linear_case("linf", 4)
    threat = ThreatModel("linf", 0.05)
    budget = bridge_raw(Runaway, Traits(("linf",), "decisions", "budget"))
    found = budget(Victim(toy, "decisions", 4), x, y, threat)
    assert threat.contains(x, found).tolist() == [True] * 3 + [False], "NaN is left for the engine to refuse"
    minimal = bridge_raw(Runaway, Traits(("linf",), "decisions", "minimal"))
    assert torch.equal(minimal(Victim(toy, "decisions", 4), x, y, threat), x)


def test_minimal_attack_leaves_wrong_images_alone() -> None:
    toy, x, y = linear_case("l2")
    wrong = y.clone()
    wrong[::2] = (y[::2] + 1) % 4
    victim, found = spy_on("foolbox:L2DeepFoolAttack", toy, x, wrong, scale_bound("l2", 1.25))
    assert torch.equal(found[::2], x[::2])
    assert victim.ledger.forwards[::2].tolist() == [1] * 6, "asked once, and then left alone"
    assert count_errors(toy, found, wrong) == len(x)


# randomness


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("torchattacks:Pixle(restarts=2, x_dimensions=(1, 2), y_dimensions=(1, 2))", "l0", 9),  # draws from numpy's
        ("torchattacks:Square(n_queries=10)", "linf", 0.2),  # seeds torch's
        ("foolbox:LinfPGD(steps=3)", "linf", 0.03),
    ],
)
def test_bits_follow_the_seed(name: str, norm: str, eps: float) -> None:
    toy, x, y = linear_case(norm, 4)
    attack, threat = load_attack(name), ThreatModel(norm, eps)
    before = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - only read
    first, again, other = (attack_once(attack, toy, x, y, threat, seed=seed) for seed in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert str(np.random.get_state()) == str(before[0])  # noqa: NPY002 - only read
    assert torch.equal(torch.get_rng_state(), before[1])


def draw() -> tuple[float, float]:
    with foreign_generators():
        return float(np.random.rand()), random.random()  # noqa: NPY002 - what foreign code does


def test_foreign_generators_follow_the_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There an attack draws from the GPU's generator, and the CPU's stays where it is."""
    states = [torch.tensor([1], dtype=torch.uint8)]
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: states)
    first, again = draw(), draw()
    states[0] = torch.tensor([2], dtype=torch.uint8)
    assert first == again != draw()


def test_foreign_generators_follow_torch_and_are_restored() -> None:
    before = str(np.random.get_state()), random.getstate()  # noqa: NPY002 - only read
    with seeded("one"):
        state = torch.get_rng_state()
        first, again = draw(), draw()
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        later = draw()
    with seeded("two"):
        other = draw()
    assert first == again
    assert len({first, later, other}) == 3
    assert (str(np.random.get_state()), random.getstate()) == before  # noqa: NPY002 - only read


def test_output_of_foreign_code_goes_to_standard_error(
    defense: Defense, images: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    run_bridge("torchattacks:APGD(steps=2, verbose=True)", defense, images, ThreatModel("linf", 0.01))
    out, err = capsys.readouterr()
    assert out == ""
    assert "robust" in err or "accuracy" in err


def test_fixed_randomness_is_the_victims() -> None:
    """With the draws fixed each query of the same images meets the same noise, so foolbox's descent repeats itself."""
    toy = NoisyLinearToy(sigma=5.0)
    x, _ = toy.examples(4)
    with seeded("fixed"):
        shown = show(Victim(toy, "scores", 4, eot=2, randomness="fixed"), "scores", x)
        assert torch.equal(shown(x), shown(x))
        shown = show(Victim(toy, "scores", 4, eot=2), "scores", x)
        assert not torch.equal(shown(x), shown(x))


# in a run


def test_a_failing_attack_does_not_stop_the_others() -> None:
    toy, x, y = linear_case("l2")
    bad, good = "foolbox:L2DeepFoolAttack(candidates=1)", "foolbox:L2PGD(rel_stepsize=0.4, steps=5)"
    found = evaluate(toy, [bad, good], scale_bound("l2", 1.25), (x, y))
    assert "ValueError" in found.failures[bad]
    assert list(found.failures) == [bad]
    assert not found.complete
    left = found.per_attack[good]
    assert left is not None
    assert left.value == 0


def test_no_attack_scores_by_luck_on_the_null_defense() -> None:
    null = NullDefense(q=0.2)
    x = torch.full((64, 1, 4, 4), 0.5)
    found = evaluate(null, "foolbox:LinfPGD(steps=3)", ThreatModel("linf", 0.1), (x, torch.zeros(64).long()))
    estimate = found.robust_accuracy
    assert estimate is not None
    assert estimate.low <= 0.8 <= estimate.high


def test_minimal_attack_searches_once_for_several_bounds() -> None:
    toy, x, y = linear_case("l2")
    bounds = [scale_bound("l2", factor) for factor in (0.9, 1.25)]
    found = evaluate(toy, "foolbox:L2DeepFoolAttack", bounds, (x, y))
    rows = found.table[found.table["attack"] == "foolbox:L2DeepFoolAttack"]
    assert len(set(rows["forwards"])) == 1


@dataclass
class Shell:
    """Runs the command line in this process."""

    capture: pytest.CaptureFixture[str]

    def json(self, *arguments: str) -> dict[str, Any]:
        with mock.patch("sys.argv", ["robench", *arguments, "--json"]), contextlib.suppress(SystemExit):
            main()
        answer = self.capture.readouterr()
        assert answer.out, answer.err
        content: dict[str, Any] = json.loads(answer.out)
        return content


def test_run_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = Shell(capsys)
    defense = f"{Path(__file__).with_name('cli_toys.py')}:GreySquares"
    attacks = "foolbox:LinfPGD(steps=5, rel_stepsize=0.3),torchattacks:PGD(steps=5, alpha=0.03)"
    content = shell.json("run", "--defense", defense, "--attack", attacks, "--n", "16", "--eps", "0.1", "--out", "run")
    assert list(content["per_attack"]) == [
        "foolbox:LinfPGD(rel_stepsize=0.3, steps=5)",
        "torchattacks:PGD(alpha=0.03, steps=5)",
    ]
    assert content["complete"]
    assert content["robust_accuracy"]["value"] < content["clean_accuracy"]["value"]
    assert shell.json("verify", "run")["holds"]
    for unit in (tmp_path / "run" / "units").iterdir():
        unit.unlink()
    assert shell.json("run", "--resume", "run")["per_attack"] == content["per_attack"]


def test_shown_model_is_a_module_in_eval_mode() -> None:
    """What foolbox and torchattacks ask of a model, without a defense behind it."""
    model = ShownModel(lambda x: x.flatten(1)[:, :3], torch.rand(2, 1, 4, 4))
    assert next(model.parameters()).device.type == "cpu"
    assert foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")(torch.rand(4, 1, 4, 4)).shape == (4, 3)
