"""The contract of an attack as tests. Subclass `AttackContract`, set `attack`, run pytest."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Final
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench.attack import ACCESS_LEVELS, Access, Attack
from robench.defense import Defense, weights_digest
from robench.errors import BudgetExhausted
from robench.judge import check_bounds, judge
from robench.registry import load_attack, names, parse_spec
from robench.rng import seeded
from robench.testing.toys import REACH, ConvToy, LinearToy, NoisyLinearToy
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

CONV_EPS: Final[dict[str, float]] = {"linf": 0.1, "l2": 0.8, "l1": 4.0, "l0": 4.0}
"""Bounds on ConvToy at which good attacks turn some of the images and not all."""


class SpyVictim(Victim):
    """A victim that also remembers the kinds of access that were used, and counts what the model itself computed."""

    def __init__(self, defense: Defense, access: Access, examples: int, *, budget: int | None = None) -> None:
        """As Victim, without EOT."""
        super().__init__(defense, access, examples, budget=budget)
        self.used: set[str] = set()
        self.computed = {"forwards": 0, "with gradient": 0}
        self.closing = defense.register_forward_hook(self._count)

    def _open(self, needed: Access, query: str) -> None:
        super()._open(needed, query)
        self.used.add(needed)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        del module, inputs
        self.computed["forwards"] += len(output)
        self.computed["with gradient"] += len(output) * output.requires_grad


def attack_once(
    attack: Attack, defense: Defense, x: Images, y: Labels, threat: ThreatModel, *, seed: str = "run"
) -> Images:
    """Runs an attack as the engine does: on a fresh victim, on copies, under a seed."""
    victim = Victim(defense, attack.access, len(x))
    with seeded("contract", seed, device=x.device):
        return attack(victim, x.clone(), y.clone(), threat)


def conv_case(n: int = 8) -> tuple[Defense, Images, Labels]:
    """ConvToy with random images, one black and one white, all with the label that it answers but for the last."""
    defense = ConvToy()
    with seeded("contract", "images"):
        x = torch.rand(n, *defense.input_shape)
    x[0], x[min(1, n - 1)] = 0.0, 1.0
    y = defense(x).argmax(1)
    y[-1] = (y[-1] + 1) % defense.num_classes
    return defense, x, y


def linear_case(norm: str, n: int = 12) -> tuple[LinearToy, Images, Labels]:
    """LinearToy with images at the distance REACH[norm] from the nearest error."""
    defense = LinearToy()
    return (defense, *defense.examples(n, norm))


def scale_bound(norm: str, factor: float) -> ThreatModel:
    """The threat model at a multiple of the known distance of `linear_case`; in l0 rounded away from that distance."""
    eps = REACH[norm] * factor
    whole = math.ceil(eps - 1e-9) if factor >= 1 else math.floor(eps)
    return ThreatModel(norm, whole if norm == "l0" else eps)


def count_errors(defense: Defense, x_adv: Images, y: Labels) -> int:
    """How many images the judge finds misclassified."""
    return int((judge(defense, x_adv, 1).argmax(1) != y.cpu()).sum())


def describe_model(defense: Defense) -> list[object]:
    """All that an attack must leave as it is: weights, buffers, modes, gradients and their switches."""
    modes = [module.training for module in defense.modules()]
    switches = [(parameter.requires_grad, parameter.grad is None) for parameter in defense.parameters()]
    return [weights_digest(defense), modes, switches]


def numpy_state() -> str:
    """The state of numpy's global generator, which nothing may use."""
    return str(np.random.get_state())  # noqa: NPY002 - only read


@contextlib.contextmanager
def no_seeding(who: str) -> Iterator[None]:
    """Fails when torch, Python or numpy is seeded inside, or numpy's global generator used.

    That Python's generator is used goes unseen here: its state says nothing where beartype draws. The engine seeds it.

    Raises:
        AssertionError: names `who`.
    """
    before = numpy_state()
    with contextlib.ExitStack() as stack:
        for name in ("torch.manual_seed", "torch.random.manual_seed", "torch.seed", "random.seed", "numpy.random.seed"):
            stack.enter_context(mock.patch(name, side_effect=AssertionError(f"{who} calls {name}; the engine seeds")))
        yield
    assert numpy_state() == before, f"{who} uses numpy's global generator; draw from torch's"


class AttackContract:
    """What every attack must do; each test is one rule.

        class TestMine(AttackContract):
            attack = Mine(steps=5)

    Attributes:
        attack: the attack under test, an instance.
        succeeds_at: the multiple of the known distance at which the attack must turn every image of the linear toy;
            raise it for an attack that is weak by design, and say so in its docstring.
        within: the multiple of the known distance within which a minimal-norm attack must find every error of the
            linear toy (in l0 rounded up to whole pixels); None: 1.05 with access to gradients, 1.25 without.
    """

    attack: Attack
    succeeds_at: ClassVar[float] = 1.25
    within: ClassVar[float | None] = None

    def _threats(self, bounds: dict[str, float]) -> list[ThreatModel]:
        return [ThreatModel(norm, bounds[norm]) for norm in self.attack.norms]

    def test_traits_and_fact_sheet(self) -> None:
        """The traits are valid, the class is a frozen dataclass of its own, and its docstring was written."""
        cls = type(self.attack)
        self.attack.check_traits()
        assert self.attack.name.isascii(), "the name must be ASCII: it is typed on a command line"
        parameters = vars(cls).get("__dataclass_params__")
        assert parameters is not None, f"{cls.__name__} must carry @dataclass(frozen=True) itself"
        assert parameters.frozen, f"{cls.__name__} must be a frozen dataclass, so that a run can replay it"
        text = vars(cls).get("__doc__") or ""
        assert text, f"{cls.__name__} has no docstring: norms, cost, guarantee or none, paper"
        assert not text.startswith(f"{cls.__name__}("), f"{cls.__name__} has no docstring: this one dataclass wrote"
        assert self.attack.passes() >= 0, "passes() must say how many passes per image are expected"

    def test_spec_replays(self) -> None:
        """`spec()` has all options that are not at their default, and gives the same attack again."""
        name, options = parse_spec(self.attack.spec())
        assert name == self.attack.name, "spec() must begin with the attack's name"
        again = load_attack(self.attack.spec()) if name in names("attack") else type(self.attack)(**options)
        assert again == self.attack, f"spec() replays {again}, not {self.attack}"
        assert dataclasses.replace(again) == self.attack, "the options must survive dataclasses.replace"

    @pytest.mark.parametrize(
        "device",
        [
            "cpu",
            pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
        ],
    )
    def test_shape_dtype_and_device(self, device: str) -> None:
        """The result has the shape, dtype and device of x, and carries no graph."""
        defense, x, y = conv_case()
        defense, x, y = defense.to(device), x.to(device), y.to(device)
        for threat in self._threats(CONV_EPS):
            x_adv = attack_once(self.attack, defense, x, y, threat)
            assert x_adv.shape == x.shape, f"{threat}: shape must be {tuple(x.shape)}; got {tuple(x_adv.shape)}"
            assert x_adv.dtype == x.dtype, f"{threat}: dtype must be {x.dtype}; got {x_adv.dtype}"
            assert x_adv.device == x.device, f"{threat}: device must be {x.device}; got {x_adv.device}"
            assert not x_adv.requires_grad, f"{threat}: the result carries a graph; detach it"

    def test_stays_within_bounds(self) -> None:
        """Every image is finite, in the box and within eps, on a net and on a randomized defense."""
        noisy = NoisyLinearToy(channels=3)
        for defense, x, y in (conv_case(), (noisy, *noisy.examples(8))):
            for threat in self._threats(CONV_EPS):
                x_adv = attack_once(self.attack, defense, x, y, threat)
                rule = check_bounds(x, x_adv, threat).broken_rule()
                assert rule is None, f"{threat} on {defense.name}: {rule}"

    def test_leaves_inputs_and_model_alone(self) -> None:
        """x, y, weights, buffers, train or eval mode and the weights' gradients are as before."""
        defense, x, y = conv_case()
        before = describe_model(defense)
        for threat in self._threats(CONV_EPS):
            given_x, given_y = x.clone(), y.clone()
            with seeded("contract", "run"):
                self.attack(Victim(defense, self.attack.access, len(x)), given_x, given_y, threat)
            assert torch.equal(given_x, x), f"{threat}: the attack changes x in place"
            assert torch.equal(given_y, y), f"{threat}: the attack changes y in place"
            assert describe_model(defense) == before, f"{threat}: the attack changes the model or its mode"

    def test_seeds_nothing(self) -> None:
        """The engine seeds torch's global generator; the attack seeds nothing and leaves numpy's alone."""
        defense, x, y = conv_case()
        self.attack.check_fit(defense, "")  # as the engine does before any work; what is loaded there may be seeded
        for threat in self._threats(CONV_EPS):
            victim = Victim(defense, self.attack.access, len(x))
            with seeded("contract", "run"), no_seeding("the attack"):
                self.attack(victim, x.clone(), y.clone(), threat)

    def test_same_seed_same_bits(self) -> None:
        """Under the same seed the result is the same bit for bit."""
        defense, x, y = conv_case()
        for threat in self._threats(CONV_EPS):
            first, second = (attack_once(self.attack, defense, x, y, threat) for _ in range(2))
            assert torch.equal(first, second), f"{threat}: two runs under one seed differ"

    def test_draws_as_declared(self) -> None:
        """The bits depend on the seed, and the generator moves, if and only if the attack declares that it draws.

        At bounds that are wider for an attack that is weak by design: where it turns no image, all seeds give x.
        """
        defense, x, y = conv_case()
        wide = {
            norm: math.ceil(eps * self.succeeds_at / 1.25) if norm == "l0" else eps * self.succeeds_at / 1.25
            for norm, eps in CONV_EPS.items()
        }
        for threat in self._threats(wide):
            found, states = [], []
            for seed in ("run", "another run"):
                with seeded("contract", seed):
                    before = torch.get_rng_state()
                    found.append(self.attack(Victim(defense, self.attack.access, len(x)), x.clone(), y.clone(), threat))
                    states.append(not torch.equal(torch.get_rng_state(), before))
            same = torch.equal(found[0], found[1])
            if self.attack.draws:
                assert not same, f"{threat}: draws = True, but two seeds give the same bits"
            else:
                assert same, f"{threat}: draws = False, but two seeds give different bits"
                assert not any(states), f"{threat}: draws = False, but the attack draws random numbers"

    def test_batch_mates_do_not_matter(self) -> None:
        """On the linear toy an image alone gives what it gives in a batch, if the attack draws nothing.

        To 1e-5; of a minimal-norm attack, whose bisections turn rounding into steps, to 1 % of the known distance.
        """
        if self.attack.draws:
            pytest.skip("the attack draws: what an image gets depends on its place in the batch")
        for norm in self.attack.norms:
            threat = scale_bound(norm, 1.1)
            defense, x, y = linear_case(norm, 6)
            together = attack_once(self.attack, defense, x, y, threat)
            alone = [attack_once(self.attack, defense, x[i : i + 1], y[i : i + 1], threat) for i in range(len(x))]
            gap = (together - torch.cat(alone)).abs().max().item()
            allowed = 0.01 * REACH[norm] if self.attack.goal == "minimal" else 1e-5
            assert gap <= allowed, f"{threat}: an image alone and in a batch differ by {gap:.2g}"

    def test_batch_of_one(self) -> None:
        """A single image works and stays within the bounds."""
        defense, x, y = conv_case()
        for threat in self._threats(CONV_EPS):
            x_adv = attack_once(self.attack, defense, x[2:3], y[2:3], threat)
            assert x_adv.shape == x[2:3].shape, f"{threat}: shape must be {(1, *x.shape[1:])}; got {tuple(x_adv.shape)}"
            rule = check_bounds(x[2:3], x_adv, threat).broken_rule()
            assert rule is None, f"{threat} on a single image: {rule}"

    def test_zero_bound_returns_the_originals(self) -> None:
        """At eps = 0 the result is x, bit for bit."""
        defense, x, y = conv_case()
        for threat in self._threats(dict.fromkeys(CONV_EPS, 0.0)):
            x_adv = attack_once(self.attack, defense, x, y, threat)
            assert torch.equal(x_adv, x), f"{threat}: must return x; moved by {(x_adv - x).abs().max().item():.2g}"

    def test_access_is_as_declared(self) -> None:
        """The most that is asked of the victim is what `access` says, and nothing goes past the victim."""
        for norm in self.attack.norms:
            defense, x, y = linear_case(norm)
            victim = SpyVictim(defense, self.attack.access, len(x))
            with seeded("contract", "run"):
                self.attack(victim, x.clone(), y.clone(), scale_bound(norm, 0.9))
            used = max(victim.used, key=ACCESS_LEVELS.index, default="none")
            assert used == self.attack.access, f"{norm}: declares access {self.attack.access!r}, uses {used!r}"
            counted = {
                "forwards": int(victim.ledger.forwards.sum()),
                "with gradient": int(victim.ledger.backwards.sum()),
            }
            assert victim.computed == counted, f"{norm}: queries went past the victim"
            if self.attack.access != "gradient":
                assert counted["with gradient"] == 0, f"{norm}: backward passes without access to gradients"

    @pytest.mark.parametrize("budget", [1, 4, 9])
    def test_query_budget_is_kept(self, budget: int) -> None:
        """Cut off by a budget, the attack costs no more, and the best images so far are within the bounds."""
        defense, x, y = conv_case()
        for threat in self._threats(CONV_EPS):
            victim = SpyVictim(defense, self.attack.access, len(x), budget=budget)
            victim.watch(x, y, threat, self.attack.goal)
            found = None
            with seeded("contract", "run"), contextlib.suppress(BudgetExhausted):
                found = self.attack(victim, x.clone(), y.clone(), threat)
            ledger = victim.ledger
            spent = int((ledger.forwards + ledger.backwards).max())
            assert spent <= budget, f"{threat}: {spent} passes for an image; the budget is {budget}"
            assert victim.computed["forwards"] == int(ledger.forwards.sum()), f"{threat}: queries went past the victim"
            best = found if found is not None else ledger.best
            assert best is not None, f"{threat}: no images at all"
            rule = check_bounds(x, best, threat).broken_rule()
            assert rule is None, f"{threat} under a budget of {budget}: {rule}"

    def test_known_distance(self) -> None:
        """On the linear toy every image is turned at `succeeds_at` times its known distance, and none at 0.99 times."""
        for norm in self.attack.norms:
            defense, x, y = linear_case(norm)
            threat = scale_bound(norm, self.succeeds_at)
            turned = count_errors(defense, attack_once(self.attack, defense, x, y, threat), y)
            assert turned == len(x), f"{threat}: {turned} of {len(x)} turned at {self.succeeds_at} times the distance"
            threat = scale_bound(norm, 0.99)
            turned = count_errors(defense, attack_once(self.attack, defense, x, y, threat), y)
            assert turned == 0, f"{threat}: {turned} turned within 0.99 times the distance, which is not possible"

    def test_minimal_norm_finds_the_nearest_error(self) -> None:
        """Within a wide bound every distance on the linear toy is at most `within` times the known one."""
        if self.attack.goal != "minimal":
            pytest.skip("the attack seeks any error within eps")
        within = self.within or (1.05 if self.attack.access == "gradient" else 1.25)
        for norm in self.attack.norms:
            for part in (0.5, 1.0):
                defense = LinearToy()
                x, y = defense.examples(12, norm, part * REACH[norm])
                x_adv = attack_once(self.attack, defense, x, y, scale_bound(norm, 2.0 if norm == "l0" else 3.0))
                missed = len(x) - count_errors(defense, x_adv, y)
                assert missed == 0, f"{norm}: no error found for {missed} of {len(x)} within 3 times the distance"
                limit = scale_bound(norm, part * within).eps
                found = ThreatModel(norm, 0.0).distance(x, x_adv).max().item()
                assert found <= limit * (1 + 1e-4), f"{norm}: {found:.4g} is beyond {limit:.4g}, {within} times known"

    def test_minimal_norm_returns_an_error_or_the_original(self) -> None:
        """What is returned is an error within the bound, or x bit for bit; x also where it is wrong from the start."""
        if self.attack.goal != "minimal":
            pytest.skip("the attack seeks any error within eps")
        defense, x, y = conv_case()
        for threat in self._threats(CONV_EPS):
            x_adv = attack_once(self.attack, defense, x, y, threat)
            unchanged = (x_adv == x).flatten(1).all(1)
            wrong = defense(x_adv).argmax(1) != y
            assert bool((unchanged | wrong).all()), f"{threat}: an image is changed and still right; return x"
            assert bool(unchanged[-1]), f"{threat}: an image that is wrong from the start must be returned as it is"

    def test_success_does_not_fall_with_the_bound(self) -> None:
        """On the linear toy a larger bound never turns fewer images."""
        for norm in self.attack.norms:
            defense, x, y = linear_case(norm)
            turned = []
            for step in (0.5, 0.99, 1.0, 1.4, 1.8):
                threat = scale_bound(norm, step * (self.succeeds_at / 1.25 if step >= 1 else 1))
                turned.append(count_errors(defense, attack_once(self.attack, defense, x, y, threat), y))
            assert turned == sorted(turned), f"{norm}: errors at growing bounds are {turned}"
