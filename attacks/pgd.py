"""Projected gradient descent."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robench.attack import Attack
from robench.defense import Defense
from robench.errors import UsageError
from robench.losses import best_wrong_classes, check_classes, get_loss, margin
from robench.queries import Gradient, Value
from robench.threat import ThreatModel
from robench.types import Images, Labels, Mask, PerExample
from robench.victim import Victim


@dataclass(frozen=True)
class PGD(Attack):
    """Steps along the steepest ascent of the loss, projected on the ball and the box; keeps the best iterate.

    Madry et al. 2018 (arXiv 1706.06083), section 2.1; `momentum` as Dong et al. 2018 (arXiv 1710.06081), eq. 6. Norms:
    linf, l2, l1. In l1 a step goes along the signs of the largest `l1_fraction` of the gradient's entries that the box
    leaves room for (Tramer and Boneh 2019, arXiv 1904.13000, appendix B: the steepest step alone changes one value).
    No guarantee: an upper bound of robust accuracy. Cost per image: `restarts * steps` forward and backward passes and
    `restarts` more forwards, times EOT; with targets once for each of them and one forward more to rank the classes.

    Departures: the best iterate is returned, not the last (best: misclassified before not, then the larger loss; both
    on the mean of the EOT draws), and an image of a deterministic defense that is misclassified is left alone. Where
    the loss is a mean over fresh draws, the largest of many is a lucky one: a restart then offers the last iterate
    whose loss is the largest or within two standard errors of it. A random start is where the same attack ended within
    a smaller bound, if there is one. With `random_start=False, keep="last", stop_early=False` it is the plain
    algorithm, bit-equal to foolbox's and torchattacks' in linf.

    Args:
        steps: gradient steps of one restart.
        step_size: length of a step in the unit of eps; None takes 2.5 * eps / steps.
        restarts: independent starts (for each target, if there are any).
        random_start: start from a uniform draw of the ball; otherwise from the image (and then restart 2 draws).
        loss: `ce`, `margin` or `dlr`.
        targets: 0: away from the right class; k: towards each of the k best wrong classes in turn.
        momentum: share of the gradients before in the direction; 0: none.
        l1_fraction: share of the values that one step in l1 changes.
        keep: `best` or `last` iterate.
        stop_early: leave images of a deterministic defense alone once they are misclassified (with `keep="best"`).
    """

    name = "pgd"
    norms = ("linf", "l2", "l1")
    access = "gradient"
    goal = "budget"
    draws = True

    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    targets: int = 0
    momentum: float = 0.0
    l1_fraction: float = 0.05
    keep: Literal["best", "last"] = "best"
    stop_early: bool = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise UsageError(
                "pgd: steps and restarts must be at least 1 and targets at least 0; "
                f"got {self.steps}, {self.restarts} and {self.targets}"
            )
        if self.step_size is not None and not self.step_size > 0:
            raise UsageError(f"pgd: step_size must be positive; got {self.step_size}")
        if not (self.momentum >= 0 and 0 < self.l1_fraction <= 1):
            raise UsageError(
                "pgd: momentum must be at least 0 and l1_fraction above 0 and at most 1; "
                f"got {self.momentum} and {self.l1_fraction}"
            )
        if self.keep not in ("best", "last"):
            raise UsageError(f'pgd: keep must be best or last; got "{self.keep}"')
        get_loss(self.loss)

    def check_fit(self, defense: Defense, dataset: str) -> None:
        """Checks that the defense has the classes that the loss needs.

        Raises:
            UsageError: too few of them.
        """
        check_classes(self.name, self.loss, defense.num_classes, targeted=self.targets > 0)

    def passes(self) -> int:
        """Forward and backward for each step, one forward more for the last iterate."""
        return self.restarts * max(self.targets, 1) * (2 * self.steps + 1)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        best = _Best(x, keep_last=self.keep == "last")
        stop = self.stop_early and self.keep == "best" and not victim.randomized
        is_noisy = victim.eot > 1 and self.randomness == "fresh" and self.keep == "best"
        goals: list[Labels | None] = [None]
        if self.targets:
            goals = list(best_wrong_classes(victim.logits(x), y, self.targets))
        for number, (goal, restart) in enumerate(itertools.product(goals, range(self.restarts))):
            rows = (~best.broken).nonzero()[:, 0] if stop else torch.arange(len(x), device=x.device)
            if len(rows) == 0:
                break
            x_adv = x[rows]
            if self.random_start or restart > 0:
                going_on = number == 0 and victim.start is not None
                x_adv = victim.start[rows] if going_on and victim.start is not None else threat.random_start(x_adv)
            offer = _Offer(x_adv) if is_noisy else None
            at = _Climb(x, y, goal, threat, rows, x_adv, torch.zeros_like(x_adv), offer)
            self._climb(victim, at, best, stop=stop)
        return best.x

    def _climb(self, victim: Victim, at: _Climb, best: _Best, *, stop: bool) -> None:
        """One restart, on the images still of interest."""
        part = victim.subset(at.rows)
        for _ in range(self.steps):
            answer = part.gradient(at.x_adv, at.labels, self.loss, at.target)
            at.direction = self.momentum * at.direction + _scale_l1(answer.grad) if self.momentum else answer.grad
            broken = at.note(answer, best)
            if stop and bool(broken.any()):
                at.drop(broken)
                if len(at.rows) == 0:
                    return
                part = victim.subset(at.rows)
            at.x_adv = self._step(at)
        if self.keep == "last":
            best.x[at.rows] = at.x_adv
            return
        at.note(part.loss(at.x_adv, at.labels, self.loss, at.target), best)
        if at.offer is not None:
            best.update(at.rows, at.offer.x, at.offer.loss, at.offer.broken)

    def _step(self, at: _Climb) -> Images:
        threat = at.threat
        step_size = self.step_size or 2.5 * threat.eps / self.steps
        if threat.norm == "l1":
            ahead = _sparse_sign(at.direction, at.x_adv, self.l1_fraction)
        else:
            ahead = threat.steepest(at.direction)
        return threat.project(at.x[at.rows], at.x_adv + step_size * ahead)


@dataclass
class _Climb:
    """One restart: all originals and labels, and of the images still of interest their iterates and directions."""

    x: Images
    y: Labels
    goal: Labels | None
    threat: ThreatModel
    rows: Tensor
    x_adv: Tensor  # fewer rows than x
    direction: Tensor
    offer: _Offer | None = None  # where losses are noisy

    @property
    def labels(self) -> Labels:
        return self.y[self.rows]

    @property
    def target(self) -> Labels | None:
        return None if self.goal is None else self.goal[self.rows]

    def note(self, answer: Gradient | Value, best: _Best) -> Mask:
        """Keeps the iterates that are better than those before; returns which are misclassified."""
        broken = margin(answer.logits, self.labels) > 0
        if self.offer is None:
            best.update(self.rows, self.x_adv, answer.loss, broken)
        else:
            self.offer.update(self.x_adv, answer.loss, answer.noise, broken)
        return broken

    def drop(self, broken: Mask) -> None:
        self.rows, self.x_adv, self.direction = self.rows[~broken], self.x_adv[~broken], self.direction[~broken]


def _scale_l1(grad: Images) -> Images:
    return grad / grad.abs().flatten(1).sum(1).clamp_min(1e-12).view(-1, 1, 1, 1)


def _sparse_sign(direction: Images, x_adv: Images, fraction: float) -> Images:
    """Signs of the largest entries that the box leaves room for, scaled to length 1 in l1."""
    blocked = ((x_adv >= 1) & (direction > 0)) | ((x_adv <= 0) & (direction < 0))
    free = direction.masked_fill(blocked, 0).flatten(1)
    count = max(round(fraction * free.shape[1]), 1)
    values, places = free.abs().topk(count, dim=1)
    signs = free.gather(1, places).sign() * (values > 0)
    step = torch.zeros_like(free).scatter_(1, places, signs)
    return (step / step.abs().sum(1, keepdim=True).clamp_min(1)).view_as(direction)


class _Best:
    """The best iterate of each image so far: misclassified before not, then the larger loss."""

    def __init__(self, x: Images, *, keep_last: bool) -> None:
        self.x = x.clone()
        self.keep_last = keep_last
        self.loss = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(self, rows: Tensor, x_adv: Images, loss: PerExample, broken: Mask) -> None:
        """Keeps what is better."""
        if self.keep_last:
            return
        better = (broken & ~self.broken[rows]) | ((broken == self.broken[rows]) & (loss > self.loss[rows]))
        self.x[rows] = torch.where(better.view(-1, 1, 1, 1), x_adv, self.x[rows])
        self.loss[rows] = torch.where(better, loss, self.loss[rows])
        self.broken[rows] |= broken


class _Offer:
    """The iterate that a restart offers where losses are noisy: the last of those whose loss may be the largest.

    Attributes:
        x: the iterates.
        loss: their losses.
        broken: whether they are misclassified.
    """

    def __init__(self, x: Images) -> None:
        self.x = x
        self.loss = self._top = torch.full((len(x),), -torch.inf, device=x.device)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._noise = torch.zeros(len(x), device=x.device)

    def update(self, x_adv: Images, loss: PerExample, noise: PerExample, broken: Mask) -> None:
        """Takes the iterates whose loss is not below the largest one by more than noise."""
        takes = loss >= self._top - 2 * torch.hypot(noise, self._noise)
        self.x = torch.where(takes.view(-1, 1, 1, 1), x_adv, self.x)
        self.loss, self.broken = torch.where(takes, loss, self.loss), torch.where(takes, broken, self.broken)
        rises = loss > self._top
        self._top, self._noise = torch.where(rises, loss, self._top), torch.where(rises, noise, self._noise)
