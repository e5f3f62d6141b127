"""Auto-PGD: the schedule, what it keeps, when images leave, where it aims, and how far it comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_toys import Linear, TwoClasses, grid_images
from torch import Tensor

from robench.attacks.apgd import APGD, _checkpoints, _State
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.losses import Loss, best_wrong_classes, get_loss, margin
from robench.queries import Gradient
from robench.rng import seeded
from robench.testing import ConvToy, LinearToy, NoisyLinearToy
from robench.testing.attacks import attack_once, conv_case, count_errors, linear_case, scale_bound
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

NORMS = ("linf", "l2")
TIGHT = {"linf": ThreatModel("linf", 0.01), "l2": ThreatModel("l2", 0.05)}
"""Bounds within which most of ConvToy's images stay right."""


class Watcher(Victim):
    """A victim that remembers what each gradient query asked for, and every image that was queried."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.seen: list[tuple[Tensor, Tensor]] = []

    def gradient(self, x: Images, y: Labels, loss: str | Loss = "ce", target: Labels | None = None) -> Gradient:
        self.asked.append((self._rows, x.clone(), target))
        return super().gradient(x, y, loss, target)

    def _draw(self, x: Images, *, in_all: bool = False) -> Tensor:
        self.seen.append((self._rows, x.clone()))
        return super()._draw(x, in_all=in_all)


def watch(attack: APGD, defense: Any, x: Tensor, y: Tensor, threat: ThreatModel, **more: Any) -> tuple[Watcher, Tensor]:
    victim = Watcher(defense, "gradient", len(x), **more)
    with seeded("apgd"):
        return victim, attack(victim, x.clone(), y.clone(), threat)


def right_images() -> tuple[ConvToy, Tensor, Tensor]:
    """Those of the contract's images that ConvToy answers as labelled."""
    defense, x, y = conv_case(16)
    assert isinstance(defense, ConvToy)
    return defense, x[:-1], y[:-1]


# the schedule (section 3.1 of the paper)


def test_checkpoints_are_those_of_the_paper() -> None:
    """p_0 = 0, p_1 = 0.22, each interval 0.03 shorter than the one before and at least 0.06."""
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert min(_checkpoints(1)) == 1


def state_of(loss: list[float], best: list[float], **more: Any) -> _State:
    n = len(loss)
    state = _State.begin(torch.full((n, 1, 1, 1), 0.5), 0.2)
    state.best, state.best_loss, state.loss = torch.full_like(state.x, 0.7), torch.tensor(best), torch.tensor(loss)
    state.best_grad = torch.ones_like(state.x)
    state.was_halved = torch.zeros(n, dtype=torch.bool)
    for name, value in more.items():
        setattr(state, name, torch.tensor(value))
    return state


def test_step_is_halved_where_the_loss_rose_in_three_quarters_of_the_steps_at_most() -> None:
    state = state_of([0.0] * 3, [1.0] * 3, rises=[14.0, 15.0, 16.0], checked_loss=[0.0] * 3)
    state.adapt(20)
    assert torch.allclose(state.step, torch.tensor([0.1, 0.1, 0.2]))
    assert state.was_halved.tolist() == [True, True, False]
    assert state.rises.tolist() == [0.0] * 3
    assert state.checked_loss.tolist() == [1.0] * 3


def test_step_is_halved_where_the_best_loss_stands_and_the_step_did_too() -> None:
    state = state_of(
        [0.0] * 3, [1.0] * 3, rises=[20.0] * 3, checked_loss=[1.0, 0.9, 1.0], was_halved=[False, False, True]
    )
    state.adapt(20)
    assert torch.allclose(state.step, torch.tensor([0.1, 0.2, 0.2]))


def test_a_halved_climb_goes_on_from_its_best_point() -> None:
    state = state_of([0.0] * 2, [1.0] * 2, rises=[0.0, 20.0], checked_loss=[0.0] * 2)
    state.adapt(20)
    for images, moved in ((state.x, 0.7), (state.previous, 0.7), (state.grad, 1.0)):
        assert float(images[0]) == pytest.approx(moved)
    assert [float(state.x[1]), float(state.grad[1])] == [0.5, 0.0]


def test_a_rise_counts_against_the_iterate_before() -> None:
    state = _State.begin(torch.zeros(1, 1, 1, 1), 0.2)
    for loss in (1.0, 3.0, 2.0, 2.5, 2.5):
        state.x = torch.full_like(state.x, loss)
        state.observe(torch.tensor([loss]), torch.tensor([-loss]))
    assert float(state.rises) == 3  # the first of all, 1 to 3, 2 to 2.5
    assert [float(state.best), float(state.best_loss), float(state.best_margin)] == [3.0, 3.0, -3.0]


@pytest.mark.parametrize("norm", NORMS)
def test_iterates_are_those_of_equation_1(norm: str) -> None:
    """Written out for one image up to the first checkpoint: steps of 2 eps, momentum 0.75 from the second on."""
    defense, x, y = right_images()
    x, y, threat = x[3:4], y[3:4], TIGHT[norm]
    victim, _ = watch(APGD(steps=20), defense, x, y, threat)
    asked = [images for _, images, _ in victim.asked]
    assert len(asked) == 20, "choose an image that stays right"

    def ahead_of(images: Tensor) -> Tensor:
        leaf = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(get_loss("ce")(defense(leaf), y).sum(), leaf)
        return threat.project(x, images + 2 * threat.eps * threat.steepest(grad))

    torch.testing.assert_close(asked[1], ahead_of(asked[0]))
    for before, now, after in zip(asked[:3], asked[1:4], asked[2:5], strict=True):  # the first checkpoint is at 4
        blend = now + 0.75 * (ahead_of(now) - now) + 0.25 * (now - before)
        torch.testing.assert_close(after, threat.project(x, blend))


# what it returns


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_best_iterate_is_returned(norm: str, loss: str) -> None:
    """No image that was queried has a larger loss, the last iterate included."""
    defense, x, y = right_images()
    victim, x_adv = watch(APGD(steps=15, loss=loss), defense, x, y, TIGHT[norm])
    best = torch.full((len(x),), -torch.inf)
    for rows, images in [(rows, images) for rows, images, _ in victim.asked] + victim.seen:
        best[rows] = torch.maximum(best[rows], get_loss(loss)(defense(images), y[rows]))
    wrong = margin(defense(x_adv), y) > 0
    assert int(wrong.sum()) < len(x) / 2
    reached = get_loss(loss)(defense(x_adv), y)
    torch.testing.assert_close(reached[~wrong], best[~wrong])


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_restarts_reach_a_larger_loss(norm: str) -> None:
    defense, x, y = right_images()
    mean = []
    for attack in (APGD(steps=1), APGD(steps=5), APGD(steps=40), APGD(steps=40, restarts=3)):
        mean.append(margin(defense(watch(attack, defense, x, y, TIGHT[norm])[1]), y).mean().item())
    assert mean == sorted(mean)
    assert mean[0] < mean[2]


@pytest.mark.parametrize(
    "attack", [APGD(), APGD(loss="dlr"), APGD(loss="dlr", targets=3), APGD(loss="margin", targets=1)]
)
@pytest.mark.parametrize("norm", NORMS)
def test_known_distances(norm: str, attack: APGD) -> None:
    defense, x, y = linear_case(norm)
    for factor, expected in ((1.25, len(x)), (1.02, len(x)), (0.99, 0)):
        x_adv = attack_once(attack, defense, x, y, scale_bound(norm, factor))
        assert count_errors(defense, x_adv, y) == expected, factor


# when images leave


def test_an_image_costs_nothing_more_once_it_is_wrong() -> None:
    defense, x, y = linear_case("linf")
    near = LinearToy().examples(6, "linf", 0.02)
    far = LinearToy().examples(6, "linf", 0.08)
    x, y = torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]])
    victim, x_adv = watch(APGD(steps=30, restarts=2), defense, x, y, ThreatModel("linf", 0.04))
    wrong = margin(defense(x_adv), y) > 0
    assert wrong.tolist() == [True] * 6 + [False] * 6
    forwards, backwards = victim.ledger.forwards, victim.ledger.backwards
    assert forwards[6:].tolist() == [2 * 31] * 6
    assert backwards[6:].tolist() == [2 * 30] * 6
    assert int(forwards[:6].max()) < 10
    for row in range(6):  # from the first query of an error on there is no other
        images = [images[rows == row] for rows, images, _ in victim.asked if bool((rows == row).any())]
        found = [bool(margin(defense(one), y[row : row + 1]) > 0) for one in images]
        assert found == [False] * (len(found) - 1) + [True]


def test_no_image_of_a_randomized_defense_leaves() -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(6)
    victim, _ = watch(APGD(steps=7, restarts=2), defense, x, y, ThreatModel("linf", 0.2), eot=3)
    assert victim.ledger.forwards.tolist() == [2 * 8 * 3] * 6
    assert victim.ledger.backwards.tolist() == [2 * 7 * 3] * 6


def test_a_randomized_linear_defense_is_brought_to_the_optimum() -> None:
    """The best perturbation is known, the sign of the difference of two weights; most of its effect is there."""
    defense = NoisyLinearToy(sigma=2.0)
    x, y = defense.examples(12)
    threat = ThreatModel("linf", 0.02)
    nearest = best_wrong_classes(LinearToy.forward(defense, x), y, 1)[0]
    optimum = x + threat.eps * (defense.weight[nearest] - defense.weight[y]).sign().view_as(x)
    _, x_adv = watch(APGD(steps=20, loss="margin"), defense, x, y, threat, eot=10)
    clean, found, best = (defense.probability_right(images, y).mean() for images in (x, x_adv, optimum))
    assert float(best) < float(clean) - 0.15
    assert float(found) < float(best) + 0.03


# targets, starts


def test_each_target_is_one_of_the_best_wrong_classes_in_turn() -> None:
    defense, x, y = linear_case("linf", 8)
    victim, _ = watch(APGD(steps=4, targets=2, loss="margin"), defense, x, y, scale_bound("linf", 0.9))
    expected = best_wrong_classes(defense(x), y, 2)
    targets = [target for _, _, target in victim.asked]
    assert len(targets) == 8
    for number, target in enumerate(targets):
        assert target is not None
        assert torch.equal(target, expected[number // 4])
    assert victim.ledger.forwards.tolist() == [1 + 2 * 5] * 8


def test_there_are_no_more_targets_than_wrong_classes() -> None:
    defense, x, y = linear_case("linf", 4)
    victim, _ = watch(APGD(steps=2, targets=9, loss="margin"), defense, x, y, scale_bound("linf", 0.9))
    assert victim.ledger.forwards.tolist() == [1 + 3 * 3] * 4


def test_the_first_climb_starts_where_the_attack_ended_within_a_smaller_bound() -> None:
    defense, x, y = right_images()
    threat = TIGHT["linf"]
    start = (x + 0.5 * threat.eps).clamp(0, 1)
    victim, _ = watch(APGD(steps=2, restarts=2), defense, x, y, threat, start=start)
    assert torch.equal(victim.asked[0][1], start)
    rows, again, _ = victim.asked[2]
    assert not torch.equal(again, start[rows])
    assert bool(threat.contains(x[rows], again).all())


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and restarts must be at least 1 and targets at least 0; got 0, 1 and 0"),
        ({"restarts": 0}, "got 100, 0 and 0"),
        ({"targets": -1}, "got 100, 1 and -1"),
        ({"loss": "kl"}, 'loss must be one of ce, margin, dlr; got "kl"'),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        APGD(**options)


@pytest.mark.parametrize(
    ("defense", "attack", "message"),
    [
        (TwoClasses(), APGD(loss="dlr"), "apgd: loss dlr needs at least 3 classes; the defense has 2. Use loss=margin"),
        (Linear(), APGD(loss="dlr", targets=2), "apgd: loss targeted dlr needs at least 4 classes; the defense has 3"),
    ],
)
def test_too_few_classes_are_refused_before_any_work(defense: Linear, attack: APGD, message: str) -> None:
    asked = defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    x, _ = grid_images(3)
    with pytest.raises(UsageError, match=message):
        evaluate(defense, attack, ThreatModel("linf", 0.1), (x, torch.zeros(3, dtype=torch.int64)))
    asked.remove()
    for other in (APGD(steps=3), APGD(steps=3, loss="margin", targets=2)):
        assert evaluate(defense, other, ThreatModel("linf", 0.1), (x, defense(x).argmax(1))).complete


def test_expected_passes_are_those_of_an_image_that_stays_right() -> None:
    defense, x, y = linear_case("linf", 4)
    for attack in (APGD(steps=6), APGD(steps=3, restarts=2), APGD(steps=3, loss="margin", targets=3)):
        victim, _ = watch(attack, defense, x, y, scale_bound("linf", 0.9))
        spent = victim.ledger.forwards + victim.ledger.backwards
        assert spent.tolist() == [attack.passes() + (attack.targets > 0)] * 4
