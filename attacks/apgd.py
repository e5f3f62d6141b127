"""Auto-PGD: projected gradient ascent with momentum whose step size adapts itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robench.attack import Attack
from robench.defense import Defense
from robench.errors import UsageError
from robench.losses import best_wrong_classes, check_classes, get_loss, margin
from robench.threat import ThreatModel
from robench.types import Images, Labels, Mask, PerExample
from robench.victim import Victim

MOMENTUM = 0.75
RISES = 0.75


@dataclass(frozen=True)
class APGD(Attack):
    """Ascent with momentum; the step is halved, and the climb goes on from its best point, when progress stalls.

    Croce and Hein 2020 (arXiv 2003.01690), Algorithm 1, with the losses of section 4. Norms: linf, l2. No guarantee: an
    upper bound of robust accuracy. Cost per image: `steps` forward and backward passes and one forward more for each
    restart or target, times EOT; with targets one forward more to rank the classes.

    Departures: images of a deterministic defense leave as soon as they are misclassified; the momentum is forgotten
    where the climb goes back to its best point; the last iterate costs a forward pass alone; the start is uniform in
    the ball, or where the same attack ended within a smaller bound. On a randomized defense loss, schedule and choice
    of the best point all rest on means over the EOT draws (the authors' code takes the last single draw).

    Args:
        steps: gradient steps of one climb.
        restarts: climbs from random starts (for each target, if there are any).
        loss: `ce`, `dlr` or `margin`.
        targets: 0: away from the right class; k: towards each of the k best wrong classes in turn.
    """

    name = "apgd"
    norms = ("linf", "l2")
    access = "gradient"
    goal = "budget"
    draws = True

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    targets: int = 0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise UsageError(
                "apgd: steps and restarts must be at least 1 and targets at least 0; "
                f"got {self.steps}, {self.restarts} and {self.targets}"
            )
        get_loss(self.loss)

    def check_fit(self, defense: Defense, dataset: str) -> None:
        """Checks that the defense has the classes that the loss needs.

        Raises:
            UsageError: too few of them.
        """
        check_classes(self.name, self.loss, defense.num_classes, targeted=self.targets > 0)

    def passes(self) -> int:
        """Forward and backward for each step, a forward for the last iterate of each climb."""
        return self.restarts * max(self.targets, 1) * (2 * self.steps + 1)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        found, best = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        goals: list[Labels | None] = [None]
        if self.targets:
            goals = list(best_wrong_classes(victim.logits(x), y, self.targets))
        for number, (goal, _) in enumerate(itertools.product(goals, range(self.restarts))):
            rows = torch.arange(len(x), device=x.device)
            if not victim.randomized:
                rows = rows[best <= 0]
            if len(rows) == 0:
                break
            part = victim if len(rows) == len(x) else victim.subset(rows)
            start = part.start if number == 0 and part.start is not None else threat.random_start(x[rows])
            target = None if goal is None else goal[rows]
            x_adv, margins = self._climb(part, _Task(x[rows], y[rows], target, threat), start)
            better = margins > best[rows]
            found[rows[better]], best[rows[better]] = x_adv[better], margins[better]
        return found

    def _climb(self, victim: Victim, task: _Task, start: Images) -> tuple[Images, PerExample]:
        """One climb: the best iterate of each image, and its margin."""
        found, margins = start.clone(), torch.full((len(start),), -torch.inf, device=start.device)
        state = _State.begin(start, 2 * task.threat.eps)
        checkpoints, since = _checkpoints(self.steps), 0
        for step in range(self.steps + 1):
            part = task.select(state.rows)
            sub = victim if len(state.rows) == len(start) else victim.subset(state.rows)
            if step < self.steps:
                loss, state.grad, logits, _ = sub.gradient(state.x, part.y, self.loss, part.target)
            else:
                loss, logits, _ = sub.loss(state.x, part.y, self.loss, part.target)
            margins_now = margin(logits, part.y)
            if not victim.randomized:
                loss = loss.masked_fill(margins_now > 0, torch.inf)  # an error is what is sought
            state.observe(loss, margins_now)
            found[state.rows], margins[state.rows] = state.best, state.best_margin
            if not victim.randomized and bool((broken := state.best_margin > 0).any()):
                state.keep(~broken)
                part = task.select(state.rows)
            if step == self.steps or len(state.rows) == 0:
                break
            since += 1
            if step in checkpoints:
                state.adapt(since)
                since = 0
            state.move(part, momentum=MOMENTUM if step else 1.0)
        return found, margins


@dataclass(frozen=True)
class _Task:
    """What is climbed: the originals, their labels, the classes to reach (if any) and the bound."""

    x: Images
    y: Labels
    target: Labels | None
    threat: ThreatModel

    def select(self, rows: Tensor) -> _Task:
        """The task for some of the images."""
        if len(rows) == len(self.x):
            return self
        return _Task(self.x[rows], self.y[rows], None if self.target is None else self.target[rows], self.threat)


@dataclass
class _State:
    """Where the climb of each image stands.

    Attributes:
        rows: which image of the batch each entry is.
        x: the iterate.
        previous: the one before it.
        grad: the gradient at x.
        loss: the loss at x.
        best: the iterate with the largest loss.
        best_grad: its gradient.
        best_loss: its loss.
        best_margin: its margin.
        step: the step size.
        rises: how often the loss rose since the last checkpoint.
        checked_loss: the best loss at the last checkpoint.
        was_halved: whether the step was halved there.
    """

    rows: Tensor
    x: Images
    previous: Images
    grad: Images
    loss: PerExample
    best: Images
    best_grad: Images
    best_loss: PerExample
    best_margin: PerExample
    step: PerExample
    rises: Tensor
    checked_loss: PerExample
    was_halved: Mask

    @classmethod
    def begin(cls, start: Images, step: float) -> _State:
        """The state before the first gradient."""
        n, device = len(start), start.device
        low = torch.full((n,), -torch.inf, device=device)
        return cls(
            rows=torch.arange(n, device=device),
            x=start,
            previous=start,
            grad=torch.zeros_like(start),
            loss=low,
            best=start,
            best_grad=torch.zeros_like(start),
            best_loss=low,
            best_margin=low,
            step=torch.full((n,), step, device=device),
            rises=torch.zeros(n, device=device),
            checked_loss=low,
            was_halved=torch.ones(n, dtype=torch.bool, device=device),
        )

    def keep(self, mask: Mask) -> None:
        """Drops all images but those in the mask."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name)[mask])

    def observe(self, loss: PerExample, margins: PerExample) -> None:
        """Takes note of the loss and margin at x."""
        self.rises = self.rises + (loss > self.loss)
        self.loss = loss
        better = loss > self.best_loss
        image = better.view(-1, 1, 1, 1)
        self.best = torch.where(image, self.x, self.best)
        self.best_grad = torch.where(image, self.grad, self.best_grad)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_margin = torch.where(better, margins, self.best_margin)

    def adapt(self, interval: int) -> None:
        """Halves the step and goes back to the best point where the loss rose too seldom or the best one stands."""
        stalls = ~self.was_halved & (self.best_loss <= self.checked_loss)
        halve = (self.rises <= RISES * interval) | stalls
        image = halve.view(-1, 1, 1, 1)
        self.step = torch.where(halve, self.step / 2, self.step)
        self.x = torch.where(image, self.best, self.x)
        self.previous = torch.where(image, self.best, self.previous)
        self.grad = torch.where(image, self.best_grad, self.grad)
        self.was_halved, self.checked_loss, self.rises = halve, self.best_loss, torch.zeros_like(self.rises)

    def move(self, task: _Task, momentum: float) -> None:
        """One step with momentum (eq. 1)."""
        x, threat = task.x, task.threat
        ahead = threat.project(x, self.x + self.step.view(-1, 1, 1, 1) * threat.steepest(self.grad))
        blend = self.x + momentum * (ahead - self.x) + (1 - momentum) * (self.x - self.previous)
        self.previous, self.x = self.x, threat.project(x, blend)


def _checkpoints(steps: int) -> set[int]:
    """The iterations that reconsider the step size (section 3.1): after 22 % of the steps, then ever sooner."""
    found, position, interval = set(), 0.0, 0.22
    while position + interval <= 1:
        position += interval
        found.add(max(round(position * steps), 1))
        interval = max(interval - 0.03, 0.06)
    return found
