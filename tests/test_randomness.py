"""What an attack may do with the randomness of a defense: fresh, the same draws each time, none; the judge draws on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine_toys import Calm, Linear, Noisy, NoisyInput, OneNoise, grid_images
from torch import Tensor
from torch.nn import functional

from robench.attack import Attack, Randomness
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.registry import load_attack
from robench.rng import seeded
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Labels, Logits
from robench.victim import Victim

LINF = ThreatModel("linf", 0.05)
QUERIES: dict[str, Callable[[Victim, Tensor, Tensor], Tensor]] = {
    "logits": lambda victim, x, _: victim.logits(x),
    "labels": lambda victim, x, _: victim.labels(x),
    "gradient": lambda victim, x, y: victim.gradient(x, y).grad,
    "differentiable": lambda victim, x, _: victim.differentiable(x.clone().requires_grad_()).detach(),
}


def ask_twice(randomness: Randomness, query: str, *, seed: int = 1, eot: int = 3) -> tuple[Tensor, Tensor]:
    x, y = grid_images(8)
    victim = Victim(NoisyInput(gain=0.5), "gradient", 8, eot=eot, randomness=randomness)
    with seeded(seed):
        return QUERIES[query](victim, x, y), QUERIES[query](victim, x, y)


@pytest.mark.parametrize("query", QUERIES)
def test_fixed_draws_are_the_same_in_each_query_and_others_in_another_unit(query: str) -> None:
    first, second = ask_twice("fixed", query)
    assert torch.equal(first, second)
    assert not torch.equal(first, ask_twice("fixed", query, seed=2)[0])
    assert not torch.equal(*ask_twice("fresh", query))


@pytest.mark.parametrize("query", ["logits", "gradient", "differentiable"])
def test_each_draw_is_a_pass_of_its_own_where_the_images_of_a_pass_share_one(query: str) -> None:
    """Folded into one batch, all draws of EOT were the same one."""
    x, y = grid_images(4)
    defense = OneNoise()
    leaf = x.clone().requires_grad_()
    with seeded(6):
        expected = torch.stack([defense(leaf) for _ in range(3)])  # eot b k
    assert float(expected.detach().std(0).min()) > 0
    victim = Victim(defense, "gradient", 4, eot=3)
    victim.logits(x)  # finds out, on randomness of its own
    defense.passes.clear()
    with seeded(6):
        found = QUERIES[query](victim, x, y)
    assert defense.passes == [4, 4, 4]
    if query == "gradient":
        losses = [functional.cross_entropy(logits, y, reduction="sum") for logits in expected]
        (mean,) = torch.autograd.grad(torch.stack(losses).mean(), leaf)
        assert torch.allclose(found, mean, atol=1e-5)
    else:
        assert torch.allclose(found, expected.mean(0), atol=1e-5)


def test_fixed_draws_differ_from_one_another() -> None:
    """EOT over common random numbers is still a mean over several draws."""
    x, _ = grid_images(1)
    with seeded(3):
        one = Victim(Noisy(), "scores", 1, eot=1, randomness="fixed").logits(x)
        many = Victim(Noisy(), "scores", 1, eot=400, randomness="fixed").logits(x)
    true = Linear()(x)
    assert float((many - true).abs().max()) < 0.4 < float((one - true).abs().max())


def test_fixed_draws_leave_the_attack_s_own_stream_where_it_is() -> None:
    x, y = grid_images(4)
    with seeded(4):
        before = torch.get_rng_state()
        Victim(Noisy(), "gradient", 4, eot=2, randomness="fixed").gradient(x, y)
        assert torch.equal(torch.get_rng_state(), before)
        drawn = torch.rand(3)
    with seeded(4):
        assert torch.equal(drawn, torch.rand(3))


def test_off_asks_once_without_noise_and_still_counts_as_randomized() -> None:
    x, y = grid_images(4)
    defense = Calm()
    victim = Victim(defense, "gradient", 4, eot=5, randomness="off")
    assert torch.equal(victim.logits(x), Linear()(x))
    assert torch.equal(victim.gradient(x, y).logits, Linear()(x))
    assert torch.equal(victim.labels(x), y)
    assert (victim.eot, victim.randomized) == (1, True)
    assert victim.ledger.forwards.tolist() == [3] * 4
    with seeded(0):
        assert not torch.equal(defense(x), Linear()(x)), "the noise is back after each query"


def test_off_is_refused_before_any_work_where_it_is_not_offered() -> None:
    defense = Noisy()
    defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    with pytest.raises(UsageError, match=r'"noisy" does not offer to switch its randomness off; use .*"fixed"'):
        evaluate(defense, "fgsm,pgd(randomness='off')", LINF, grid_images(3))


def test_a_deterministic_defense_has_nothing_to_switch() -> None:
    data = grid_images(6)
    results = [
        evaluate(Linear(), load_attack("pgd", steps=2, randomness=randomness), LINF, data, seed=3)
        for randomness in ("fresh", "fixed", "off")
    ]
    images = [result.images(result.spec.attacks[0].key) for result in results]
    seeds_differ = [not np.array_equal(images[0], other) for other in images[1:]]
    assert seeds_differ == [True, True], "the name is part of the seed, as for every option"
    plain = [evaluate(Linear(), load_attack("fgsm", randomness=one), LINF, data) for one in ("fresh", "fixed", "off")]
    assert len({result.images(result.spec.attacks[0].key).tobytes() for result in plain}) == 1


@pytest.mark.parametrize("wrong", ["none", "Fixed", ""])
def test_unknown_randomness_is_refused(wrong: Any) -> None:
    message = f'fgsm: randomness must be one of fresh, fixed, off; got "{wrong}"'
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), f"fgsm(randomness={wrong!r})", LINF, grid_images(2))


def test_it_is_recorded_and_each_choice_is_an_attack_of_its_own() -> None:
    keys = ["fgsm", "fgsm(randomness='fixed')", "fgsm(randomness='off')"]
    result = evaluate(Calm(), ",".join(keys), LINF, grid_images(4), eot=2, judge_repeats=2)
    assert list(result.per_attack) == [entry.spec for entry in result.spec.attacks] == keys
    assert set(keys) <= set(result.row())
    replayed = [load_attack(entry.spec).randomness for entry in result.spec.attacks]
    assert replayed == ["fresh", "fixed", "off"]


@dataclass(frozen=True)
class Freezes(Attack):
    """Takes the class that is best under the draws it sees, and darkens the image if it is not the right one."""

    name = "freezes"
    norms = NORMS
    access = "decisions"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        wrong = victim.labels(x) != y
        assert self.randomness == "fresh" or torch.equal(victim.labels(x) != y, wrong)
        return torch.where(wrong.view(-1, 1, 1, 1), threat.project(x, x - threat.eps), x)


@pytest.mark.parametrize("randomness", ["fixed", "off"])
def test_the_judge_draws_afresh_whatever_the_attack_sees(randomness: Randomness) -> None:
    """A defense that guesses: what an attack saw under frozen draws has no part in the figure."""
    x, y = grid_images(100)
    result = evaluate(Calm(gain=0.0), Freezes(randomness=randomness), LINF, (x, y), eot=1, judge_repeats=9)
    rows = result.table[result.table["attack"] == Freezes(randomness=randomness).spec()]
    assert result.robust_accuracy is not None
    assert abs(result.robust_accuracy.value - 1 / 3) < 0.06  # 900 draws: four standard errors
    right = rows["accuracy"].to_numpy() * 9
    assert len(set(right.round())) > 4, "answers of one image differ"


def test_frozen_gradients_climb_the_loss_of_their_own_draws() -> None:
    """With the same draws in each query pgd climbs one function: the best iterate is better than the first."""
    x, y = grid_images(6)
    attack = load_attack("pgd(steps=8, random_start=False, loss='margin', randomness='fixed')")
    defense = NoisyInput(gain=0.2)
    with seeded(5):
        victim = Victim(defense, "gradient", 6, eot=4, randomness="fixed")
        before = victim.gradient(x, y, "margin").loss
        after = victim.gradient(attack(victim, x, y, LINF), y, "margin").loss
    assert bool((after > before).all())


def draw_from_all() -> tuple[float, float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), float(np.random.randn()), random.random()  # noqa: NPY002


def test_seeds_hold_for_numpy_and_python_and_all_are_restored() -> None:
    np.random.randn()  # noqa: NPY002 - numpy keeps the second of a pair of normal draws, which must come back too
    before = str(np.random.get_state()), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    with seeded(1, "one"):
        first = draw_from_all()
        with seeded(1, "two"):
            other = draw_from_all()
        later = draw_from_all()
    with seeded(1, "one"):
        assert draw_from_all() == first
        assert draw_from_all() == later
    assert len({*first, *other, *later}) == 12
    assert (str(np.random.get_state()), random.getstate()) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


class FromNumpy(Linear):
    """Noise of numpy's, from its global generator or from one that nobody seeds."""

    name = "from_numpy"
    randomized = True

    def __init__(self, *, own: bool = False) -> None:
        super().__init__()
        self._draw = np.random.default_rng().standard_normal if own else np.random.standard_normal

    def forward(self, x: Images) -> Logits:
        return super().forward(x + 0.1 * torch.from_numpy(self._draw(tuple(x.shape))).float())


def test_a_run_repeats_with_numpy_s_draws_and_says_so_where_it_does_not(caplog: pytest.LogCaptureFixture) -> None:
    def run(defense: Linear) -> tuple[bytes, str]:
        result = evaluate(defense, "pgd(steps=2)", LINF, grid_images(6), eot=2, judge_repeats=9)
        return result.images("pgd(steps=2)").tobytes(), str(result.table["votes"].tolist())

    assert run(FromNumpy()) == run(FromNumpy())
    assert caplog.messages == []
    offender = FromNumpy(own=True)
    assert run(offender) != run(offender)
    (told,) = caplog.messages
    assert '"from_numpy" draws from more than the global generators of torch, numpy and Python' in told
