"""A minimal-norm attack that keeps every rule, and some that each break one. See test_offenders.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from offending_attacks import Honest

from robench.threat import ThreatModel
from robench.types import Images, Labels, Mask
from robench.victim import Victim


@dataclass(frozen=True)
class HonestMinimal(Honest):
    """Keeps every rule: the nearest error along the gradient of the margin, found by bisection."""

    name = "honest_minimal"
    goal = "minimal"

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        _, grad, logits, _ = victim.gradient(x, y, "margin")
        path = threat.steepest(grad)
        low = torch.zeros(len(x), 1, 1, 1)
        high = torch.ones_like(low) * 4
        for _ in range(20):
            middle = (low + high) / 2
            wrong = (victim.labels((x + middle * path).clamp(0, 1)) != y).view(-1, 1, 1, 1)
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        x_adv = (x + high * path).clamp(0, 1)
        return self.choose(x, x_adv, logits.argmax(1) == y, threat)

    def choose(self, x: Images, x_adv: Images, right: Mask, threat: ThreatModel) -> Images:
        """What lies within the bound, of images that are right."""
        found = right & threat.contains(x, x_adv)
        return torch.where(found.view(-1, 1, 1, 1), x_adv, x)


@dataclass(frozen=True)
class Overshoots(HonestMinimal):
    """Goes a tenth farther than to the nearest error."""

    name = "overshoots"

    def choose(self, x: Images, x_adv: Images, right: Mask, threat: ThreatModel) -> Images:
        return super().choose(x, (x + 1.1 * (x_adv - x)).clamp(0, 1), right, threat)


@dataclass(frozen=True)
class StopsAtTheBound(HonestMinimal):
    """Searches the first hundredth only."""

    name = "stops_at_the_bound"

    def choose(self, x: Images, x_adv: Images, right: Mask, threat: ThreatModel) -> Images:
        return super().choose(x, x_adv, right, ThreatModel(threat.norm, threat.eps / 100))


@dataclass(frozen=True)
class ReturnsItsLastTry(HonestMinimal):
    """Returns where it stopped, also where that is no error."""

    name = "returns_its_last_try"

    def choose(self, x: Images, x_adv: Images, right: Mask, threat: ThreatModel) -> Images:
        return torch.where(right.view(-1, 1, 1, 1), threat.project(x, x_adv), x)


@dataclass(frozen=True)
class MovesWhatIsWrong(HonestMinimal):
    """Moves images that are wrong from the start."""

    name = "moves_what_is_wrong"

    def choose(self, x: Images, x_adv: Images, right: Mask, threat: ThreatModel) -> Images:
        return super().choose(x, torch.where(right.view(-1, 1, 1, 1), x_adv, 0.999 * x), right | ~right, threat)
