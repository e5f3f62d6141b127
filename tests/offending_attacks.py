"""Attacks that keep every rule, and attacks each of which breaks one. See test_offenders.py."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robench.attack import Access, Attack
from robench.defense import Defense
from robench.errors import BudgetExhausted
from robench.rng import reseed
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim


@dataclass(frozen=True)
class Honest(Attack):
    """Keeps every rule: one step against the gradient of the margin, in the norms where that is enough."""

    name = "honest"
    norms = ("linf", "l2")
    access: ClassVar[Access] = "gradient"

    scale: float = 1.0

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        _, grad = victim.loss_grad(x, y, "margin")
        return threat.project(x, x + self.scale * threat.eps * threat.steepest(grad))


@dataclass(frozen=True)
class HonestDraws(Honest):
    """Keeps every rule, and draws: from a random start."""

    name = "honest_draws"
    draws = True

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        start = threat.project(x, x + 0.3 * (threat.random_start(x) - x))
        _, grad = victim.loss_grad(start, y, "margin")
        noisy = grad + 0.1 * grad.abs().mean() * torch.randn_like(grad)
        return threat.project(x, x + 0.99 * threat.eps * threat.steepest(noisy) + 0.01 * (start - x))


@dataclass(frozen=True)
class Nameless(Honest):
    """No name."""

    name = ""


class Undecorated(Honest):
    """Forgets @dataclass, so that its own option is none."""

    name = "undecorated"
    steps: int = 5


@dataclass(frozen=True)
class Undocumented(Honest):
    name = "undocumented"


@dataclass(frozen=True)
class Forgetful(Honest):
    """Does not write its options into the spec."""

    name = "forgetful"

    def spec(self) -> str:
        return self.name


@dataclass(frozen=True)
class Changed(Honest):
    """Applies `change` to the honest result."""

    name = "changed"
    change: ClassVar[Callable[[Images], Tensor]]

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        return type(self).change(super().__call__(victim, x, y, threat))


def changed(change: Callable[[Images], Tensor], **traits: object) -> Attack:
    """An attack that returns the honest result after a change."""
    members = {"__doc__": "Changes its result.", "change": staticmethod(change), **traits}
    cls: type[Attack] = dataclass(frozen=True)(type("Offender", (Changed,), members))
    return cls()


@dataclass(frozen=True)
class LeavesBall(Honest):
    """Goes twice as far as it may."""

    name = "leaves_ball"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        _, grad = victim.loss_grad(x, y, "margin")
        return (x + 2 * threat.eps * threat.steepest(grad)).clamp(0, 1)


@dataclass(frozen=True)
class LeavesBox(Honest):
    """Keeps to the ball and not to the box."""

    name = "leaves_box"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        _, grad = victim.loss_grad(x, y, "margin")
        return x + threat.eps * threat.steepest(grad)


@dataclass(frozen=True)
class InPlace(Honest):
    """Writes into x."""

    name = "in_place"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = super().__call__(victim, x, y, threat)
        return x.copy_(found)


@dataclass(frozen=True)
class InPlaceLabels(Honest):
    """Writes into y."""

    name = "in_place_labels"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = super().__call__(victim, x, y, threat)
        y.zero_()
        return found


@dataclass(frozen=True)
class Meddler(Honest):
    """Reaches past the victim and does something to the model."""

    name = "meddler"
    meddle: ClassVar[Callable[[Defense], object]]

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        type(self).meddle(victim._defense)
        return super().__call__(victim, x, y, threat)


def meddler(meddle: Callable[[Defense], object]) -> Attack:
    """An attack that first does something to the model."""
    members = {"__doc__": "Meddles.", "meddle": staticmethod(meddle)}
    cls: type[Attack] = dataclass(frozen=True)(type("Offender", (Meddler,), members))
    return cls()


def scale_weights(defense: Defense) -> None:
    with torch.no_grad():
        for value in defense.state_dict().values():
            value.mul_(0.5)


@dataclass(frozen=True)
class Seeder(HonestDraws):
    """Seeds torch's global generator."""

    name = "seeder"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        reseed(0)
        return super().__call__(victim, x, y, threat)


CALLS = itertools.count(1)


@dataclass(frozen=True)
class Remembers(Honest):
    """Depends on what ran before it."""

    name = "remembers"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = super().__call__(victim, x, y, threat)
        return x + (found - x) / (1 + next(CALLS) / 1000)


@dataclass(frozen=True)
class PythonDraws(Honest):
    """Draws from Python's generator, and declares that it draws nothing."""

    name = "python_draws"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = super().__call__(victim, x, y, threat)
        return x + (found - x) * (0.9 + 0.1 * random.random())


@dataclass(frozen=True)
class SaysItDraws(Honest):
    """Declares draws and has none."""

    name = "says_it_draws"
    draws = True


@dataclass(frozen=True)
class HidesItsDraws(HonestDraws):
    """Draws, undeclared."""

    name = "hides_its_draws"
    draws = False


@dataclass(frozen=True)
class WastesDraws(Honest):
    """Draws numbers that change nothing: undeclared all the same."""

    name = "wastes_draws"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        torch.rand(1)
        return super().__call__(victim, x, y, threat)


@dataclass(frozen=True)
class SharesSteps(Honest):
    """Takes one direction for the whole batch."""

    name = "shares_steps"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        _, grad = victim.loss_grad(x, y, "margin")
        return threat.project(x, x + threat.eps * threat.steepest(grad.mean(0, keepdim=True).expand_as(grad)))


@dataclass(frozen=True)
class NeedsABatch(Honest):
    """Divides by the deviation over the batch, which one image does not have."""

    name = "needs_a_batch"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = super().__call__(victim, x, y, threat)
        return x + (found - x) * (x.std(0) / x.std(0)).nan_to_num() if len(x) > 1 else x / (len(x) - 1)


@dataclass(frozen=True)
class AtLeastALittle(Honest):
    """Moves by an amount too small to break the bound, also where it may not move."""

    name = "at_least_a_little"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        return (super().__call__(victim, x, y, threat) + 5e-7).clamp(0, 1)


@dataclass(frozen=True)
class SecretGradient(Honest):
    """Declares scores and asks for gradients."""

    name = "secret_gradient"
    access = "scores"


@dataclass(frozen=True)
class SecretScores(Honest):
    """Declares decisions and asks for logits."""

    name = "secret_scores"
    access = "decisions"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        victim.labels(x)
        victim.logits(x)
        return x


@dataclass(frozen=True)
class BackDoor(Honest):
    """Declares scores and differentiates the model behind the victim's back."""

    name = "back_door"
    access = "scores"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        victim.logits(x)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(victim._defense(leaf).gather(1, y[:, None]).sum(), leaf)
        return threat.project(x, x - threat.eps * threat.steepest(grad))


@dataclass(frozen=True)
class Overdeclared(Honest):
    """Declares gradients and needs scores only."""

    name = "overdeclared"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        victim.logits(x)
        return x


@dataclass(frozen=True)
class IgnoresTheEnd(Honest):
    """Swallows the end of its budget and goes on past the victim."""

    name = "ignores_the_end"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        with contextlib.suppress(BudgetExhausted):
            return super().__call__(victim, x, y, threat)
        victim._defense(x)
        return x


@dataclass(frozen=True)
class EndsOutside(Honest):
    """Searches outside the bound, and returns from there when its budget ends."""

    name = "ends_outside"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        far = 1 - x
        try:
            for _ in range(100):
                victim.logits(far)
        except BudgetExhausted:
            return far
        return x


@dataclass(frozen=True)
class Idle(Honest):
    """Returns x."""

    name = "idle"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        victim.loss_grad(x, y)
        return x


@dataclass(frozen=True)
class GivesUp(Honest):
    """Does nothing at larger bounds."""

    name = "gives_up"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = super().__call__(victim, x, y, threat)
        return found if threat.eps < {"linf": 0.06, "l2": 0.16}[threat.norm] else x


@dataclass(frozen=True)
class Raises(Honest):
    """Crashes."""

    name = "raises"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        raise ZeroDivisionError("planted")
