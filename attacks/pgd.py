"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robench.attack import Attack
from robench.errors import UsageError
from robench.losses import get_loss, margin
from robench.threat import ThreatModel
from robench.types import Images, Labels, PerExample
from robench.victim import Victim


@dataclass(frozen=True)
class PGD(Attack):
    """Steps along the steepest ascent of the loss, projected on the ball and the box; keeps the best iterate.

    Madry et al. 2018 (arXiv 1706.06083), section 2.1. Norms: linf, l2. No guarantee: an upper bound of robust accuracy.
    Cost per image: `restarts * steps` forward and backward passes and `restarts` more forwards, times EOT.

    Departures: the best iterate is returned, not the last (best: misclassified before not, then the larger loss; both
    on the mean of the EOT draws), and an image of a deterministic defense that is misclassified is left alone. With
    `random_start=False, keep="last", stop_early=False` it is the plain algorithm, bit-equal to foolbox's and
    torchattacks' in linf.

    Args:
        steps: gradient steps of one restart.
        step_size: length of a step in the unit of eps; None takes 2.5 * eps / steps.
        restarts: independent starts.
        random_start: start from a uniform draw of the ball; otherwise from the image (and then restart 2 draws).
        loss: `ce`, `margin` or `dlr`.
        keep: `best` or `last` iterate.
        stop_early: leave images of a deterministic defense alone once they are misclassified (with `keep="best"`).
    """

    name = "pgd"
    norms = ("linf", "l2")
    access = "gradient"
    goal = "budget"
    draws = True

    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    keep: Literal["best", "last"] = "best"
    stop_early: bool = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.steps < 1 or self.restarts < 1:
            raise UsageError(f"pgd: steps and restarts must be at least 1; got {self.steps} and {self.restarts}")
        if self.step_size is not None and not self.step_size > 0:
            raise UsageError(f"pgd: step_size must be positive; got {self.step_size}")
        if self.keep not in ("best", "last"):
            raise UsageError(f'pgd: keep must be best or last; got "{self.keep}"')
        get_loss(self.loss)

    def passes(self) -> int:
        """Forward and backward for each step, one forward more for the last iterate."""
        return self.restarts * (2 * self.steps + 1)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        best = _Best(x, keep_last=self.keep == "last")
        stop = self.stop_early and self.keep == "best" and not victim.randomized
        for restart in range(self.restarts):
            rows = (~best.broken).nonzero()[:, 0] if stop else torch.arange(len(x), device=x.device)
            if len(rows) == 0:
                break
            random = self.random_start or restart > 0
            self._climb(victim, x, y, threat, best=best, rows=rows, random=random, stop=stop)
        return best.x

    def _climb(  # noqa: PLR0913 - one restart on the rows still of interest
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        threat: ThreatModel,
        *,
        best: _Best,
        rows: Tensor,
        random: bool,
        stop: bool,
    ) -> None:
        step_size = self.step_size or 2.5 * threat.eps / self.steps
        x_adv = threat.random_start(x[rows]) if random else x[rows]
        for _ in range(self.steps):
            loss, grad, logits = victim.subset(rows).gradient(x_adv, y[rows], self.loss)
            broken = best.update(rows, x_adv, loss, margin(logits, y[rows]) > 0)
            if stop and bool(broken.any()):
                rows, x_adv, grad = rows[~broken], x_adv[~broken], grad[~broken]
                if len(rows) == 0:
                    return
            x_adv = threat.project(x[rows], x_adv + step_size * threat.steepest(grad))
        if self.keep == "last":
            best.x[rows] = x_adv
            return
        logits = victim.subset(rows).logits(x_adv)
        best.update(rows, x_adv, get_loss(self.loss)(logits, y[rows]), margin(logits, y[rows]) > 0)


class _Best:
    """The best iterate of each image so far: misclassified before not, then the larger loss."""

    def __init__(self, x: Images, *, keep_last: bool) -> None:
        self.x = x.clone()
        self.keep_last = keep_last
        self.loss = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(self, rows: Tensor, x_adv: Images, loss: PerExample, broken: Tensor) -> Tensor:
        """Keeps what is better; returns `broken`."""
        if self.keep_last:
            return broken
        better = (broken & ~self.broken[rows]) | ((broken == self.broken[rows]) & (loss > self.loss[rows]))
        self.x[rows] = torch.where(better.view(-1, 1, 1, 1), x_adv, self.x[rows])
        self.loss[rows] = torch.where(better, loss, self.loss[rows])
        self.broken[rows] |= broken
        return broken
