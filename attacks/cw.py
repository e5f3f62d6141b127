"""The attack of Carlini and Wagner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robench.attack import Attack
from robench.errors import UsageError
from robench.losses import margin
from robench.threat import ThreatModel
from robench.types import Images, Labels, Logits, Mask, PerExample
from robench.victim import Victim

CONFIRMATIONS: Final = 3
"""More means over fresh draws of a randomized defense that must agree before an error counts."""
CHECKS: Final = 4
"""How often a descent asks whether it still progresses."""
PROGRESS: Final = 0.9999
"""An objective that fell by less than this factor since the last check has settled."""
INSIDE: Final = 0.99
"""How far the tanh variable starts from its infinite ends, where no step moves an image."""


@dataclass(frozen=True)
class CW(Attack):
    """Minimises the squared distance plus c times the margin that is left, for the smallest c that finds an error.

    Carlini and Wagner 2017 (arXiv 1608.04644), section V with objective f_6, and the l2 attack of section VI: Adam on w
    with x_adv = (1 + tanh w) / 2, so that the box needs no projection, and a binary search on c. Norm: l2. No
    guarantee: an upper bound of the distance to the nearest error; the nearest one met is returned where it lies within
    eps. The search does not depend on eps.
    Cost per image: at most `binary_search_steps * steps` forward and backward passes and one forward more, times EOT;
    on a randomized defense up to three forwards more for each error that is nearer than those before.

    Departures: untargeted, so f is the margin to the best wrong class. The defaults are shorter than the paper's 10,000
    steps and 20 searches, with a longer step and a larger first c to make up for it. A black or white pixel, for which
    w is infinite, starts from the w of a pixel 0.005 off, and the difference is added back: it needs a few steps to
    move, not hundreds, and the search starts at the image exactly. The descent of an image of a deterministic defense
    ends when its own objective settles (the authors' code ends a batch together), and costs nothing until the next c;
    an image that is wrong from the start costs one forward. On a randomized defense the margin is the mean over the EOT
    draws, no descent ends early, and an error counts only where three more means over fresh draws agree.

    Args:
        steps: Adam steps for one c.
        binary_search_steps: values of c tried.
        learning_rate: of Adam, in the unit of w.
        initial_c: the first c; it grows tenfold until an error is found and is bisected from then on.
        confidence: the margin, in logits, that an error must have (kappa).
        abort_early: end the descent of an image whose objective no longer falls.
    """

    name = "cw"
    norms = ("l2",)
    access = "gradient"
    goal = "minimal"

    steps: int = 100
    binary_search_steps: int = 6
    learning_rate: float = 0.05
    initial_c: float = 0.1
    confidence: float = 0.0
    abort_early: bool = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.steps < 1 or self.binary_search_steps < 1:
            raise UsageError(
                "cw: steps and binary_search_steps must be at least 1; "
                f"got {self.steps} and {self.binary_search_steps}. Give larger ones"
            )
        for option in ("learning_rate", "initial_c"):
            value = getattr(self, option)
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"cw: {option} must be positive and finite; got {value}. Give it as {option}=0.1")
        if not (self.confidence >= 0 and math.isfinite(self.confidence)):
            raise UsageError(f"cw: confidence must be 0 or more and finite; got {self.confidence}. Give confidence=0")

    def passes(self) -> int:
        """Forward and backward for each step of each c, and the forward that sorts out what is wrong already."""
        return 2 * self.steps * self.binary_search_steps + 1

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        if threat.eps == 0:
            return x.clone()
        x_adv = x.clone()
        rows = torch.arange(len(x), device=x.device)
        if not victim.randomized:
            rows = (margin(victim.logits(x), y) <= 0).nonzero()[:, 0]
        if len(rows):
            x_adv[rows] = self._search(victim.subset(rows), x[rows], y[rows])
        return torch.where(threat.contains(x, x_adv).view(-1, 1, 1, 1), x_adv, x)

    def _search(self, victim: Victim, x: Images, y: Labels) -> Images:
        """The nearest error over all c tried; the original where there was none."""
        nearest = _Nearest(x, y, self.confidence)
        lower = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        upper = torch.full_like(lower, torch.inf)
        c = torch.full_like(lower, self.initial_c)
        for _ in range(self.binary_search_steps):
            found = self._descend(victim, c, nearest)
            lower, upper = torch.where(found, lower, c), torch.where(found, c, upper)
            c = torch.where(upper.isinf(), 10 * c, (lower + upper) / 2)
        return nearest.x_adv

    def _descend(self, victim: Victim, c: PerExample, nearest: _Nearest) -> Mask:
        """Minimises the objective of each image at its c; returns where an error was met."""
        rows = torch.arange(len(c), device=c.device)
        found = torch.zeros_like(c, dtype=torch.bool)
        adam = _Adam(torch.atanh(INSIDE * (2 * nearest.x - 1)), self.learning_rate)
        offset = nearest.x - (1 + adam.w.tanh()) / 2
        lowest = checked = torch.full_like(c, torch.inf)
        interval = max(1, self.steps // CHECKS)
        for step in range(self.steps):
            inner = (1 + adam.w.tanh()) / 2
            x_adv = (inner + offset[rows]).clamp(0, 1)
            part = victim.subset(rows)
            capped, grad, logits, _ = part.gradient(x_adv, nearest.y[rows], self._capped_margin)
            found[rows] |= nearest.update(part, rows, x_adv, logits)
            delta = x_adv - nearest.x[rows]
            lowest = lowest.minimum(delta.square().flatten(1).sum(1) - c[rows] * capped)
            slope = 2 * delta - c[rows].view(-1, 1, 1, 1) * grad
            adam.step(slope * 2 * inner * (1 - inner))  # d x_adv / d w = (1 - tanh^2 w) / 2
            if not self.abort_early or victim.randomized or (step + 1) % interval:
                continue
            going = checked - lowest > (1 - PROGRESS) * lowest.abs()
            rows, lowest = rows[going], lowest[going]
            checked = lowest
            adam.keep(going)
            if len(rows) == 0:
                break
        return found

    def _capped_margin(self, logits: Logits, y: Labels) -> PerExample:
        """-f_6: the margin as far as the confidence asks for it."""
        return margin(logits, y).clamp_max(self.confidence)


class _Nearest:
    """The nearest error of each image so far."""

    def __init__(self, x: Images, y: Labels, confidence: float) -> None:
        self.x, self.y, self.confidence = x, y, confidence
        self.x_adv = x.clone()
        self.distance = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)

    def update(self, victim: Victim, rows: Tensor, x_adv: Images, logits: Logits) -> Mask:
        """Keeps the errors that are nearer; returns where x_adv is an error. The victim is that of the rows."""
        wrong = margin(logits, self.y[rows]) > self.confidence
        distance = (x_adv - self.x[rows]).flatten(1).norm(dim=1)
        nearer = wrong & (distance < self.distance[rows])
        if victim.randomized:
            agreed = self._ask_again(victim, rows, x_adv, nearer)
            wrong, nearer = wrong & (agreed | ~nearer), agreed
        self.x_adv[rows] = torch.where(nearer.view(-1, 1, 1, 1), x_adv, self.x_adv[rows])
        self.distance[rows] = torch.where(nearer, distance, self.distance[rows])
        return wrong

    def _ask_again(self, victim: Victim, rows: Tensor, x_adv: Images, nearer: Mask) -> Mask:
        """Where every one of the further means agrees that x_adv is an error, of those that are nearer."""
        agreed = nearer.clone()
        for _ in range(CONFIRMATIONS):
            asked = agreed.nonzero()[:, 0]
            if len(asked) == 0:
                break
            logits = victim.subset(asked).logits(x_adv[asked])
            agreed[asked] = margin(logits, self.y[rows[asked]]) > self.confidence
        return agreed


class _Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) on rows that may leave."""

    def __init__(self, w: Tensor, learning_rate: float) -> None:
        self.w, self.learning_rate = w, learning_rate
        self.mean, self.square = torch.zeros_like(w), torch.zeros_like(w)
        self.steps = 0

    def step(self, grad: Tensor) -> None:
        """One step down the gradient."""
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.999 * self.square + 0.001 * grad.square()
        mean = self.mean / (1 - 0.9**self.steps)
        square = self.square / (1 - 0.999**self.steps)
        self.w = self.w - self.learning_rate * mean / (square.sqrt() + 1e-8)

    def keep(self, rows: Mask) -> None:
        """Forgets all other rows."""
        self.w, self.mean, self.square = self.w[rows], self.mean[rows], self.square[rows]
