"""The bridges: names and options of foreign attacks, and that they give what they give alone."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from unittest import mock

import foolbox
import pytest
import torch
import torchattacks
from bridge_toys import make_defense, make_images, make_net, run_bridge, spy_on
from torch import Tensor, nn

from robench import ThreatModel, UsageError, Victim, load_defense
from robench.bridges import find_attack
from robench.bridges.foolbox import REFUSED
from robench.bridges.foreign import ForeignAttack
from robench.bridges.torchattacks import TRAITS
from robench.defense import Defense
from robench.evaluate import evaluate
from robench.registry import load_attack, parse_spec
from robench.rng import seeded
from robench.testing import AttackContract
from robench.testing.attacks import conv_case

CONTRACT = (
    "foolbox:LinfPGD(steps=20, rel_stepsize=0.1)",
    "foolbox:L2PGD(steps=20, rel_stepsize=0.1)",
    "torchattacks:PGDL2(alpha=0.02)",
    "torchattacks:RFGSM(alpha=0.01)",
)


class TestBridged(AttackContract):
    """A bridged attack keeps the contract like any other."""

    @pytest.fixture(autouse=True, params=CONTRACT)
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.attack = load_attack(request.param)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return make_net()


@pytest.fixture(scope="module")
def defense() -> Defense:
    return make_defense()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return make_images()


# names, options, traits


@pytest.mark.parametrize(
    "spec",
    [
        "foolbox:LinfPGD(steps=20)",
        "foolbox:L2DeepFoolAttack",
        "foolbox:LinfPGD(randomness='fixed', steps=3)",
        "torchattacks:PGD(alpha=0.01, steps=20)",
        "torchattacks:Pixle(x_dimensions=(1, 2))",
    ],
)
def test_spec_replays(spec: str) -> None:
    attack = load_attack(spec)
    assert load_attack(attack.spec()) == attack
    assert sorted(attack.spec()) == sorted(spec), "all that was written, in the order of the fields"
    assert pickle.loads(pickle.dumps(attack)) == attack
    assert dataclasses.replace(attack) == attack
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.randomness = "off"  # type: ignore[misc]


def test_options_reach_the_foreign_class() -> None:
    attack = load_attack("foolbox:LinfPGD(steps=7, randomness='fixed')", random_start=False)
    assert isinstance(attack, ForeignAttack)
    assert attack.passes() == 14
    assert attack.randomness == "fixed"
    assert attack != load_attack("foolbox:LinfPGD(steps=7)")
    built = attack.foreign(**attack._options())
    assert (built.steps, built.random_start) == (7, False)


@pytest.mark.parametrize(
    ("name", "norms", "access", "goal"),
    [
        ("foolbox:LinfPGD", ("linf",), "gradient", "budget"),
        ("foolbox:L1FastGradientAttack", ("l1",), "gradient", "budget"),
        ("foolbox:L2DeepFoolAttack", ("l2",), "gradient", "minimal"),
        ("foolbox:L0FMNAttack", ("l0",), "gradient", "minimal"),
        ("foolbox:EADAttack", ("l1",), "gradient", "minimal"),
        ("foolbox:BoundaryAttack", ("l2",), "decisions", "minimal"),
        ("foolbox:HopSkipJumpAttack", ("linf", "l2"), "decisions", "minimal"),
        ("foolbox:PointwiseAttack", ("linf", "l2", "l1", "l0"), "decisions", "minimal"),
        ("foolbox:LinfAdditiveUniformNoiseAttack", ("linf",), "decisions", "budget"),
        ("torchattacks:Jitter", ("linf",), "gradient", "budget"),
        ("torchattacks:PGDL2", ("l2",), "gradient", "budget"),
        ("torchattacks:APGD", ("linf", "l2"), "gradient", "budget"),
        ("torchattacks:CW", ("l2",), "gradient", "minimal"),
        ("torchattacks:EADL1", ("l1",), "gradient", "minimal"),
        ("torchattacks:Square", ("linf", "l2"), "scores", "budget"),
        ("torchattacks:Pixle", ("l0",), "scores", "minimal"),
    ],
)
def test_traits(name: str, norms: tuple[str, ...], access: str, goal: str) -> None:
    attack = load_attack(name)
    assert (set(attack.norms), attack.access, attack.goal) == (set(norms), access, goal)
    wrong = next((norm for norm in ("l0", "l2", "linf") if norm not in norms), None)
    if wrong is not None:
        with pytest.raises(UsageError, match="supports"):
            attack.check_threat(ThreatModel(wrong, 1))


def test_every_attack_of_the_packages_is_bridged_or_refused() -> None:
    for name in torchattacks.__all__:
        if name in TRAITS:
            load_attack(f"torchattacks:{name}").check_traits()
        else:
            with pytest.raises(UsageError, match="cannot be run"):
                load_attack(f"torchattacks:{name}")
    names = [name for name in vars(foolbox.attacks) if name.endswith(("Attack", "PGD", "FGSM")) and name != "Attack"]
    assert len(names) > 50
    for name in names:
        if name in REFUSED:
            with pytest.raises(UsageError, match="cannot be run"):
                load_attack(f"foolbox:{name}")
        elif "BrendelBethge" not in name and name != "VirtualAdversarialAttack":
            load_attack(f"foolbox:{name}").check_traits()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foolbox:LinfPDG", 'did you mean "LinfPGD"'),
        ("foolbox:linfpgd", 'did you mean "LinfPGD"'),
        ("foolbox:Nonesuch", "There are: "),
        ("foolbox:base", "There are: "),
        ("foolbox:LinfPGD(stepps=3)", 'no option "stepps"; did you mean "steps"'),
        ("foolbox:HopSkipJumpAttack(constraint='l2')", 'no option "constraint"'),
        ("foolbox:VirtualAdversarialAttack", "an option is missing"),
        ("foolbox:SpatialAttack", "bounded in no norm"),
        ("torchattacks:pgd", 'did you mean "PGD"'),
        ("torchattacks:PGD(eps=0.1)", 'no option "eps"'),
        ("torchattacks:VANILA", "does nothing"),
        ("robustbench:Standard", "is to defenses"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match="(?s)" + message.replace("(", r"\(")) as refused:
        load_attack(spec)
    assert "\n" not in str(refused.value)


def test_no_bridge_to_defenses() -> None:
    with pytest.raises(UsageError, match="is to attacks"):
        load_defense("foolbox:LinfPGD")
    with pytest.raises(UsageError, match="foolbox, torchattacks"):
        find_attack("advertorch", "PGD")


@pytest.mark.parametrize(
    ("spec", "command"),
    [
        ("foolbox:L1AdamPGD", "pip install foolbox"),
        ("torchattacks:DIFGSM", "pip install --no-deps torchattacks"),
    ],
)
def test_missing_package(spec: str, command: str) -> None:
    package, _, name = spec.partition(":")
    sys.modules[f"robench.bridges.{package}"].find_attack.cache_clear()
    with mock.patch.dict(sys.modules, {package: None}), pytest.raises(UsageError, match=command):
        load_attack(spec)
    assert load_attack(spec).name == f"{package}:{name}"


def test_numba_is_asked_for() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(UsageError, match="needs numba"):
        load_attack("foolbox:L0BrendelBethgeAttack")


# the same as the package alone


def run_foolbox(spec: str, net: nn.Module, images: tuple[Tensor, Tensor], eps: float) -> Tensor:
    name, options = parse_spec(spec)
    attack = getattr(foolbox.attacks, name)(**options)
    with seeded("compare"):
        raw, _, _ = attack(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), *images, epsilons=eps)
    return raw


@pytest.mark.reference
@pytest.mark.parametrize(
    ("spec", "norm", "eps"),
    [
        ("LinfPGD(steps=5)", "linf", 0.05),
        ("LinfPGD(steps=5, random_start=False)", "linf", 0.05),
        ("L2PGD(steps=5)", "l2", 0.8),
        ("L1PGD(steps=5)", "l1", 8.0),
        ("MIFGSM(steps=5)", "linf", 0.05),
        ("L2RepeatedAdditiveGaussianNoiseAttack(repeats=5)", "l2", 3.0),
    ],
)
def test_budget_attack_equals_foolbox(
    net: nn.Module, defense: Defense, images: tuple[Tensor, Tensor], spec: str, norm: str, eps: float
) -> None:
    alone = run_foolbox(spec, net, images, eps)
    threat = ThreatModel(norm, eps)
    bridged = run_bridge(f"foolbox:{spec}", defense, images, threat)
    assert torch.equal(torch.where(threat.contains(images[0], alone).view(-1, 1, 1, 1), alone, bridged), bridged)
    torch.testing.assert_close(bridged, alone, rtol=0, atol=1e-6)
    assert float(threat.distance(images[0], bridged).max()) > 0.1 * eps, "two attacks that do nothing are equal too"


@pytest.mark.reference
@pytest.mark.parametrize(
    ("spec", "norm"), [("LinfDeepFoolAttack(steps=20)", "linf"), ("L2FMNAttack(steps=20)", "l2"), ("DDNAttack", "l2")]
)
def test_minimal_attack_equals_foolbox(
    net: nn.Module, defense: Defense, images: tuple[Tensor, Tensor], spec: str, norm: str
) -> None:
    alone = run_foolbox(spec, net, images, 1.0)
    distances = ThreatModel(norm, 1).distance(images[0], alone)
    threat = ThreatModel(norm, float(distances.median()))
    bridged = run_bridge(f"foolbox:{spec}", defense, images, threat)
    within = threat.contains(images[0], alone) & (net(alone).argmax(1) != images[1])
    assert 0 < int(within.sum()) < len(within)
    torch.testing.assert_close(bridged[within], alone[within], rtol=0, atol=1e-6)
    assert torch.equal(bridged[~within], images[0][~within])


@pytest.mark.reference
@pytest.mark.parametrize(
    ("spec", "norm", "eps", "bound"),
    [
        ("PGD(alpha=0.01, steps=5)", "linf", 0.05, "eps"),
        ("FGSM", "linf", 0.05, "eps"),
        ("PGDL2(steps=5)", "l2", 0.8, "eps"),
        ("Jitter(alpha=0.01)", "linf", 0.05, "eps"),
        ("CW(c=10, steps=30)", "l2", 5.0, None),
    ],
)
def test_equals_torchattacks(
    net: nn.Module, defense: Defense, images: tuple[Tensor, Tensor], spec: str, norm: str, eps: float, bound: str | None
) -> None:
    name, options = parse_spec(spec)
    bounds = {} if bound is None else {bound: eps}
    with seeded("compare"):
        alone = getattr(torchattacks, name)(net, **options, **bounds)(*images)
    threat = ThreatModel(norm, eps)
    bridged = run_bridge(f"torchattacks:{spec}", defense, images, threat)
    assert bool(threat.contains(images[0], alone).all())
    torch.testing.assert_close(bridged, alone, rtol=0, atol=1e-6)
    assert float(threat.distance(images[0], bridged).max()) > 0.05 * eps


def test_norm_and_classes_follow_the_run(defense: Defense, images: tuple[Tensor, Tensor]) -> None:
    """Options that torchattacks would be told twice: its norm, its bound, its number of classes."""
    for threat in (ThreatModel("linf", 0.03), ThreatModel("l2", 0.5)):
        found = run_bridge("torchattacks:APGDT(steps=3)", defense, images, threat)
        reached = threat.distance(images[0], found)
        assert 0.8 * threat.eps < float(reached.max()) <= threat.eps * 1.00001
    toy, x, y = conv_case()  # five classes, where torchattacks supposes ten
    victim, _ = spy_on("torchattacks:APGDT(steps=3)", toy, x, y, ThreatModel("linf", 0.001))
    assert int(victim.ledger.backwards.max()) == 4 * 4, "three steps and the start, for each of four targets"


def test_what_the_images_and_classes_must_be(defense: Defense) -> None:
    colour, _, _ = conv_case()  # three channels, five classes; the other has one and ten
    jsma, pifgsm = load_attack("torchattacks:JSMA"), load_attack("torchattacks:PIFGSM")
    with pytest.raises(UsageError, match="at least 10 classes"):
        jsma.check_fit(colour, "")
    with pytest.raises(UsageError, match="3 channels"):
        pifgsm.check_fit(defense, "")
    jsma.check_fit(defense, "")
    pifgsm.check_fit(colour, "")
    with seeded("colour"):
        x = torch.rand(4, 3, 6, 6)
        threat, victim = ThreatModel("linf", 0.05), Victim(colour, "gradient", 4)
        found = pifgsm(victim, x, colour(x).argmax(1), threat)
    assert float(threat.distance(x, found).min()) > 0.9 * threat.eps, "its bound has another name"


def test_an_attack_that_seeds_torch_itself_counts_as_done() -> None:
    """Through the engine, which refuses plugins that seed torch's generator."""
    x, y = make_images()
    result = evaluate(make_defense(), "torchattacks:APGD(steps=2)", ThreatModel("linf", 0.03), (x, y), judge_repeats=1)
    assert result.failures == {}
    assert result.complete
