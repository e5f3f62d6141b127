"""PGD beyond its plain form (which test_reference.py compares): l1 steps, momentum, targets, restarts, starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from engine_toys import Linear, TwoClasses, grid_images
from torch import Tensor

from robench.attack import Attack
from robench.attacks.apgd import APGD
from robench.attacks.pgd import PGD, _Offer, _sparse_sign
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.losses import Loss, best_wrong_classes, get_loss, margin, targeted_margin
from robench.queries import Gradient
from robench.rng import seeded
from robench.testing import ConvToy, LinearToy, NoisyLinearToy
from robench.testing.attacks import attack_once, conv_case, count_errors, linear_case, scale_bound
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim


class Watcher(Victim):
    """A victim that remembers what each gradient query asked for."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def gradient(self, x: Images, y: Labels, loss: str | Loss = "ce", target: Labels | None = None) -> Gradient:
        self.asked.append((self._rows, x.clone(), target))
        return super().gradient(x, y, loss, target)


def watch(attack: PGD, defense: Any, x: Tensor, y: Tensor, threat: ThreatModel, **more: Any) -> tuple[Watcher, Tensor]:
    victim = Watcher(defense, "gradient", len(x), **more)
    with seeded("pgd"):
        return victim, attack(victim, x.clone(), y.clone(), threat)


def right_images() -> tuple[ConvToy, Tensor, Tensor]:
    """Those of the contract's images that ConvToy answers as labelled."""
    defense, x, y = conv_case(16)
    assert isinstance(defense, ConvToy)
    return defense, x[:-1], y[:-1]


# l1


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_a_step_in_l1_changes_a_share_of_the_values_and_has_length_1(fraction: float) -> None:
    with seeded("l1"):
        direction, x = torch.randn(5, 3, 6, 6), torch.rand(5, 3, 6, 6)
    step = _sparse_sign(direction, x, fraction)
    assert step.abs().flatten(1).sum(1).tolist() == pytest.approx([1.0] * 5)
    count = max(round(fraction * 108), 1)
    for row in range(5):
        changed = step[row].flatten().nonzero()[:, 0]
        assert sorted(changed.tolist()) == sorted(direction[row].flatten().abs().topk(count).indices.tolist())
        assert torch.equal(step[row].sign(), torch.where(step[row] != 0, direction[row].sign(), 0))


def test_a_step_in_l1_spends_nothing_where_the_box_leaves_no_room() -> None:
    direction = torch.tensor([5.0, -4.0, 3.0, -2.0, 0.0, 1.0]).view(1, 1, 2, 3)
    x = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.5]).view(1, 1, 2, 3)
    assert _sparse_sign(direction, x, 0.34).flatten().tolist() == [0, 0, 0.5, -0.5, 0, 0]
    assert _sparse_sign(-direction, x, 0.34).flatten().tolist() == [-0.5, 0.5, 0, 0, 0, 0], "the other way there is"
    assert not bool(_sparse_sign(torch.zeros_like(x), x, 0.5).any())


@pytest.mark.parametrize(
    "options", [{}, {"loss": "margin"}, {"momentum": 0.75}, {"steps": 40, "l1_fraction": 0.3}], ids=str
)
@pytest.mark.parametrize("norm", PGD.norms)
def test_known_distances(norm: str, options: dict[str, Any]) -> None:
    defense, x, y = linear_case(norm)
    for factor, expected in ((1.25, len(x)), (0.99, 0)):
        x_adv = attack_once(PGD(**options), defense, x, y, scale_bound(norm, factor))
        assert count_errors(defense, x_adv, y) == expected, factor


def test_l1_needs_few_values() -> None:
    """What is changed is sparse, where the whole sign would spend the bound on every value."""
    defense, x, y = right_images()
    x_adv = attack_once(PGD(steps=10), defense, x, y, ThreatModel("l1", 1.0))
    changed = ((x_adv - x).abs() > 1e-6).flatten(1).sum(1)
    assert int(changed.max()) < 108
    assert float((x_adv - x).abs().flatten(1).sum(1).max()) <= 1.0 + 1e-4


# momentum


def write_out_momentum(defense: ConvToy, x: Tensor, y: Tensor, threat: ThreatModel, options: PGD) -> Tensor:
    """Equation 6 of Dong et al., step by step."""
    x_adv, gathered = x, torch.zeros_like(x)
    for _ in range(options.steps):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(get_loss("ce")(defense(leaf), y).sum(), leaf)
        gathered = options.momentum * gathered + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        x_adv = threat.project(x, x_adv + (options.step_size or 0) * threat.steepest(gathered))
    return x_adv


@pytest.mark.parametrize("momentum", [0.5, 1.0])
@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 0.05, 0.02), ("l2", 0.4, 0.2)])
def test_momentum_is_that_of_the_paper(norm: str, eps: float, step: float, momentum: float) -> None:
    defense, x, y = right_images()
    attack = PGD(steps=8, step_size=step, momentum=momentum, random_start=False, keep="last", stop_early=False)
    threat = ThreatModel(norm, eps)
    found = attack_once(attack, defense, x, y, threat)
    torch.testing.assert_close(found, write_out_momentum(defense, x, y, threat, attack), atol=1e-5, rtol=0)
    plain = PGD(steps=8, step_size=step, random_start=False, keep="last", stop_early=False)
    assert not torch.allclose(found, attack_once(plain, defense, x, y, threat), atol=1e-3)


@pytest.mark.reference
def test_momentum_in_linf_is_torchattacks_mifgsm() -> None:
    defense, x, y = right_images()
    ours = PGD(steps=10, step_size=0.01, momentum=0.9, random_start=False, keep="last", stop_early=False)
    found = attack_once(ours, defense, x, y, ThreatModel("linf", 0.05))
    theirs = torchattacks.MIFGSM(defense, eps=0.05, alpha=0.01, steps=10, decay=0.9)(x, y)
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=0)


# targets, restarts, starts


def test_each_target_is_one_of_the_best_wrong_classes_in_turn() -> None:
    defense, x, y = linear_case("linf", 8)
    attack = PGD(steps=3, restarts=2, targets=2, loss="margin")
    victim, _ = watch(attack, defense, x, y, scale_bound("linf", 0.9))
    expected = best_wrong_classes(defense(x), y, 2)
    targets = [target for _, _, target in victim.asked]
    assert len(targets) == 2 * 2 * 3
    for number, target in enumerate(targets):
        assert target is not None
        assert torch.equal(target, expected[number // 6])
    assert victim.ledger.forwards.tolist() == [1 + 4 * 4] * 8
    assert victim.ledger.backwards.tolist() == [12] * 8


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_a_target_overtakes_the_right_class(loss: str) -> None:
    """The second best wrong class, where the attack is not stopped by another error on the way."""
    defense, x, y = linear_case("linf", 8)
    attack = PGD(steps=20, targets=2, loss=loss, keep="last", random_start=False)
    x_adv = attack_once(attack, defense, x, y, scale_bound("linf", 3.0))
    second = best_wrong_classes(defense(x), y, 2)[1]
    assert bool((targeted_margin(defense(x), y, second) < 0).all())
    assert bool((targeted_margin(defense(x_adv), y, second) > 0).all())


def test_a_restart_is_for_the_images_that_are_still_right() -> None:
    defense = LinearToy()
    near, far = defense.examples(4, "linf", 0.02), defense.examples(4, "linf", 0.08)
    x, y = torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]])
    victim, x_adv = watch(PGD(steps=5, restarts=3), defense, x, y, ThreatModel("linf", 0.04))
    assert (margin(defense(x_adv), y) > 0).tolist() == [True] * 4 + [False] * 4
    assert victim.ledger.backwards[4:].tolist() == [15] * 4
    assert victim.ledger.forwards[4:].tolist() == [18] * 4
    assert int(victim.ledger.backwards[:4].max()) <= 5
    assert not torch.equal(victim.asked[-5][1], victim.asked[5][1][-4:]), "each start is another"


def test_a_restart_without_random_start_draws_from_the_second_on() -> None:
    defense, x, y = linear_case("linf", 4)
    victim, _ = watch(PGD(steps=1, restarts=3, random_start=False), defense, x, y, scale_bound("linf", 0.9))
    starts = [images for _, images, _ in victim.asked]
    assert torch.equal(starts[0], x)
    assert not torch.equal(starts[1], x)
    assert not torch.equal(starts[1], starts[2])


def test_a_random_start_is_where_the_attack_ended_within_a_smaller_bound() -> None:
    defense, x, y = linear_case("linf", 4)
    threat, start = scale_bound("linf", 0.9), (x + 0.001).clamp(0, 1)
    for random_start, expected in ((True, start), (False, x)):
        victim, _ = watch(PGD(steps=2, restarts=2, random_start=random_start), defense, x, y, threat, start=start)
        assert torch.equal(victim.asked[0][1], expected)
        assert not torch.equal(victim.asked[2][1], start)


def test_no_image_of_a_randomized_defense_leaves() -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(6)
    victim, _ = watch(PGD(steps=3, restarts=2), defense, x, y, ThreatModel("linf", 0.2), eot=4)
    assert victim.ledger.forwards.tolist() == [2 * 4 * 4] * 6
    assert victim.ledger.backwards.tolist() == [2 * 3 * 4] * 6


@pytest.mark.parametrize("attack", [PGD(steps=1), APGD(steps=1)], ids=str)
def test_the_last_iterate_of_a_randomized_defense_is_compared_by_the_same_loss(attack: Attack) -> None:
    """The loss of the mean logits, which is smaller, would hand back the start on most images."""
    defense = NoisyLinearToy(sigma=5.0)
    x, y = defense.examples(64)
    threat = ThreatModel("linf", 0.05)
    victim = Victim(defense, "gradient", len(x), eot=10)
    with seeded("pgd"):
        x_adv = attack(victim, x, y, threat)
    with seeded("pgd"):
        start = threat.random_start(x)
    assert (x_adv == start).flatten(1).all(1).sum() < 16
    assert float(defense.probability_right(x_adv, y).mean()) < 0.37


def test_among_noisy_losses_the_last_iterate_but_for_noise_is_taken() -> None:
    """On a linear defense the last iterate is the best; the largest of eleven noisy losses is often earlier."""
    defense = NoisyLinearToy(sigma=5.0)
    x, y = defense.examples(64)
    best, last = (
        defense.probability_right(watch(attack, defense, x, y, ThreatModel("linf", 0.05), eot=10)[1], y).mean()
        for attack in (PGD(), PGD(keep="last"))
    )
    assert float(best) < float(last) + 0.002


def test_a_restart_offers_the_last_iterate_whose_loss_may_be_the_largest() -> None:
    x = torch.zeros(3, 1, 1, 1)
    offer = _Offer(x)
    losses = [[1.0, 1.0, 1.0], [5.0, 5.0, 1.5], [4.5, 2.0, 1.2], [3.7, 4.0, 0.0]]  # one row for each iterate
    for number, loss in enumerate(losses):
        noise = torch.full((3,), 0.4)  # two standard errors of a difference: 1.13
        offer.update(x + number, torch.tensor(loss), noise, torch.tensor(loss) > 4.2)
    assert offer.x.flatten().tolist() == [2.0, 3.0, 2.0]
    assert offer.loss.tolist() == pytest.approx([4.5, 4.0, 1.2])
    assert offer.broken.tolist() == [True, False, False]


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and restarts must be at least 1 and targets at least 0; got 0, 1 and 0"),
        ({"targets": -1}, "got 10, 1 and -1"),
        ({"step_size": 0.0}, "step_size must be positive; got 0.0"),
        ({"step_size": float("nan")}, "step_size must be positive; got nan"),
        ({"momentum": -0.1}, "momentum must be at least 0 and l1_fraction above 0 and at most 1; got -0.1 and 0.05"),
        ({"momentum": float("nan")}, "got nan and 0.05"),
        ({"l1_fraction": 0.0}, "got 0.0 and 0.0"),
        ({"l1_fraction": 1.01}, "got 0.0 and 1.01"),
        ({"loss": "kl"}, 'loss must be one of ce, margin, dlr; got "kl"'),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PGD(**options)


@pytest.mark.parametrize(
    ("defense", "attack", "message"),
    [
        (TwoClasses(), "pgd(loss='dlr')", "pgd: loss dlr needs at least 3 classes; the defense has 2. Use loss=margin"),
        (TwoClasses(), "fgsm(loss='dlr')", "fgsm: loss dlr needs at least 3 classes; the defense has 2"),
        (Linear(), "pgd(loss='dlr', targets=1)", "pgd: loss targeted dlr needs at least 4 classes; the defense has 3"),
    ],
)
def test_too_few_classes_are_refused_before_any_work(defense: Linear, attack: str, message: str) -> None:
    defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    x, _ = grid_images(3)
    with pytest.raises(UsageError, match=message):
        evaluate(defense, attack, ThreatModel("linf", 0.1), (x, torch.zeros(3, dtype=torch.int64)))


def test_expected_passes_are_those_of_an_image_that_stays_right() -> None:
    defense, x, y = linear_case("linf", 4)
    for attack in (PGD(steps=6), PGD(steps=3, restarts=2), PGD(steps=3, loss="margin", targets=3)):
        victim, _ = watch(attack, defense, x, y, scale_bound("linf", 0.9))
        spent = victim.ledger.forwards + victim.ledger.backwards
        assert spent.tolist() == [attack.passes() + (attack.targets > 0)] * 4
