"""Transfer: the target is not asked, the surrogate is the right one, and what does not fit is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from surrogate_toys import Counted, Untrained

from robench.attack import Attack
from robench.attacks import transfer
from robench.attacks.pgd import PGD
from robench.attacks.transfer import Transfer
from robench.defense import Defense, wrap
from robench.draws import COPIES
from robench.errors import UsageError
from robench.losses import margin
from robench.registry import load_defense
from robench.rng import seeded
from robench.testing import LinearToy
from robench.testing.attacks import count_errors, linear_case, scale_bound
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

LINEAR = "robench.testing:LinearToy"


@pytest.fixture(autouse=True)
def nothing_loaded_before() -> Iterator[None]:
    transfer._load_surrogate.cache_clear()
    yield
    transfer._load_surrogate.cache_clear()


def run(attack: Attack, x: Images, y: Labels, threat: ThreatModel, dataset: str = "") -> tuple[Images, Victim]:
    victim = Victim(LinearToy(), attack.access, len(x), dataset=dataset)
    with seeded("transfer test"):
        return attack(victim, x, y, threat), victim


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_known_distance_and_no_query(norm: str) -> None:
    defense, x, y = linear_case(norm)
    for factor, expected in ((1.25, len(x)), (0.99, 0)):
        x_adv, victim = run(Transfer(source=LINEAR), x, y, scale_bound(norm, factor))
        assert count_errors(defense, x_adv, y) == expected
        assert int(victim.ledger.forwards.sum() + victim.ledger.backwards.sum()) == 0


def test_default_in_l0_finds_the_nearest_errors() -> None:
    defense, x, y = linear_case("l0")
    x_adv, _ = run(Transfer(source=LINEAR), x, y, scale_bound("l0", 1.25))
    assert count_errors(defense, x_adv, y) == len(x)


def test_the_default_climbs_on_after_the_first_error() -> None:
    defense, x, y = linear_case("linf")
    threat = scale_bound("linf", 2)
    climbed, _ = run(Transfer(source=LINEAR), x, y, threat)
    stopped, _ = run(Transfer(source=LINEAR, attack=PGD(steps=20).spec()), x, y, threat)
    margins = [margin(defense(x_adv), y) for x_adv in (climbed, stopped)]
    assert bool((margins[1] > 0).all()), "both fool the surrogate, which the comparison needs"
    assert bool((margins[0] > margins[1] + 1e-3).all())


def test_images_that_do_not_fool_the_surrogate_are_handed_over() -> None:
    defense, x, y = linear_case("linf")
    threat = scale_bound("linf", 0.9)
    x_adv, _ = run(Transfer(source=LINEAR), x, y, threat)
    assert bool((threat.distance(x, x_adv) > 0.99 * threat.eps).all())
    assert bool((margin(defense(x_adv), y) > margin(defense(x), y)).all())


def test_a_randomized_surrogate_is_averaged_over_its_own_draws() -> None:
    _, x, y = linear_case("linf")
    Counted.seen = 0
    run(Transfer(source="surrogate_toys:Counted", attack="fgsm", eot=7), x, y, ThreatModel("linf", 0.1))
    assert Counted.seen == 7 * len(x) + COPIES  # which tell that each image has a draw of its own


def test_the_surrogate_has_the_weights_of_the_dataset_and_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str | None]] = []

    def load(name: str, dataset: str | None = None, **options: Any) -> Defense:
        loaded.append((name, dataset))
        return load_defense(name, dataset, **options)

    monkeypatch.setattr(transfer, "load_defense", load)
    attack = Transfer(source=LINEAR, attack="fgsm")
    _, x, y = linear_case("linf")
    attack.check_fit(LinearToy(), "mnist")
    for dataset in ("mnist", "mnist", "", ""):
        run(attack, x, y, ThreatModel("linf", 0.1), dataset)
    assert loaded == [(LINEAR, "mnist"), (LINEAR, None)]


def test_a_unit_that_loads_the_surrogate_gives_the_same_bits_as_one_that_does_not() -> None:
    with seeded("images"):
        x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    attack = Transfer(source="surrogate_toys:Untrained")
    first, second = (run(attack, x, y, ThreatModel("linf", 0.1))[0] for _ in range(2))
    transfer._load_surrogate.cache_clear()
    with seeded("another state of the generator"):
        attack.check_fit(Untrained(), "")
    third, _ = run(attack, x, y, ThreatModel("linf", 0.1))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def plain(shape: tuple[int, int, int], classes: int) -> Defense:
    return wrap(torch.nn.Identity(), num_classes=classes, input_shape=shape, name="target")


@pytest.mark.parametrize(
    ("source", "target", "dataset", "message"),
    [
        ("conwnet", plain((1, 28, 28), 10), "fashion_mnist", 'there is no defense "conwnet"; did you mean "convnet'),
        ("convnet", plain((3, 32, 32), 10), "svhn", 'no weights "svhn" of defense "convnet"'),
        ("convnet", plain((3, 28, 28), 10), "fashion_mnist", r"input_shape \(1, 28, 28\); the defense \"target\" has"),
        ("convnet", plain((1, 28, 28), 3), "", 'num_classes 10; the defense "target" has 3. Choose another source'),
    ],
    ids=["unknown", "no weights", "other shape", "other classes"],
)
def test_a_surrogate_that_does_not_fit_is_refused(source: str, target: Defense, dataset: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        Transfer(source=source).check_fit(target, dataset)
    assert "\n" not in str(refusal.value)
    assert "surrogate" in str(refusal.value)


def test_the_inner_attack_is_asked_whether_it_fits() -> None:
    two_classes = "surrogate_toys:TwoClasses"
    with pytest.raises(UsageError, match="dlr needs at least"):
        Transfer(source=two_classes, attack="pgd(loss='dlr')").check_fit(plain((1, 2, 2), 2), "")
    Transfer(source=two_classes).check_fit(plain((1, 2, 2), 2), "")


def test_norms_are_those_of_the_inner_attack() -> None:
    with pytest.raises(UsageError, match='attack "fgsm" supports linf, l2; the threat model is l1'):
        Transfer(attack="fgsm").check_threat(ThreatModel("l1", 1))
    for norm in Transfer.norms:
        Transfer().check_threat(ThreatModel(norm, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eot": 0}, "transfer: eot must be at least 1; got 0"),
        ({"attack": "pdg"}, 'there is no attack "pdg"; did you mean "pgd"'),
        ({"attack": "pgd(steps=0)"}, "steps and restarts must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Transfer(**options)
