"""The fast minimum-norm attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robench.attack import Attack
from robench.errors import UsageError
from robench.losses import margin
from robench.queries import Gradient
from robench.threat import ThreatModel
from robench.types import Images, Labels, Mask, PerExample
from robench.victim import Victim

CONFIRMATIONS: Final = 3
"""More means over fresh draws of a randomized defense that must agree before an error counts in linf, l2 and l1."""
SURE: Final = 2.0
"""In l0 its mean margin is so many standard deviations of the draws above 0,"""
SURE_DRAWS: Final = 10
"""and so many more draws are all wrong, or a few more than that."""
STEP: Final = ThreatModel("l2", 1.0)
"""Steps follow the gradient divided by its l2 norm, whatever the norm of the attack (algorithm 1)."""
STEP_SIZE: Final[dict[str, float]] = {"linf": 3.0, "l2": 1.0, "l1": 3.0, "l0": 1.0}
"""First length of a step, in l2, for each norm."""
STEP_DECAY: Final[dict[str, float]] = {"linf": 0.01, "l2": 0.01, "l1": 0.01, "l0": 0.1}
"""The last step over the first."""
GAMMA_LAST: Final = 0.001
"""The last relative change of the radius."""


@dataclass(frozen=True)
class FMN(Attack):
    """Ascends the margin in a ball whose radius falls while the image is misclassified and grows while it is not.

    Pintor et al. 2021, Fast Minimum-Norm attack (arXiv 2102.12827), algorithm 1. Norms: linf, l2, l1, l0. No guarantee:
    an upper bound of the distance to the nearest error; the nearest one met is returned where it lies within eps, the
    original elsewhere. The search does not depend on eps, and draws nothing.
    Cost per image: `steps` forward and backward passes and `2 + refine` forwards (l0: `2 + 2 * refine`), times EOT; on
    a randomized defense no refinement, but up to three forwards (l0: one, or ten draws) for each error that is nearer
    than those before. An image that is wrong from the start costs one forward.

    Departures. (1) Until the first error the radius grows by gamma at least: where the box cuts the ball, the paper's
    linear estimate falls short of the boundary at every step and never reaches it. After it the radius stays below the
    distance of the nearest error. (2) In l0 that estimate counts the pixels that use the margin up, each taken to the
    end of the box; pixels are kept by the l2 norm over their channels. (3) The last iterate is looked at. The nearest
    error is projected on smaller balls, found by bisection between 0 and its distance, which pulls in errors that were
    met late; in l0 its least changed pixels are then taken back one by one. (4) On a randomized defense the margin is
    the mean over the EOT draws, and an error counts only where three more means over fresh draws agree. In l0, where it
    is not moved out to the bound at the end, an error has to last: twice the standard deviation of the draws is taken
    off the margin, and ten more draws must all be wrong (docs/decisions/0015-pointwise-holds-its-draws.md).

    Args:
        steps: gradient steps.
        step_size: first length of a step, in l2; along a cosine it falls to a hundredth (l0: a tenth). None takes 3
            (linf, l1) or 1 (l2, l0).
        gamma: first relative change of the radius; it falls to 0.001 along a cosine.
        refine: forwards of the final bisection; in l0 also the pixels that are tried last.
    """

    name = "fmn"
    norms = ("linf", "l2", "l1", "l0")
    access = "gradient"
    goal = "minimal"

    steps: int = 100
    step_size: float | None = None
    gamma: float = 0.05
    refine: int = 8

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.steps < 1:
            raise UsageError(f"fmn: steps must be at least 1; got {self.steps}. The default is 100")
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise UsageError(f"fmn: step_size must be positive and finite; got {self.step_size}. The paper takes 1")
        if not GAMMA_LAST <= self.gamma < 1:
            raise UsageError(f"fmn: gamma must be in [{GAMMA_LAST}, 1); got {self.gamma}. The paper takes 0.05")
        if self.refine < 0:
            raise UsageError(f"fmn: refine must be 0 or more; got {self.refine}. 0 leaves the final bisection out")

    def passes(self) -> int:
        """Forward and backward for each step, forwards for the start, the last iterate and the bisection."""
        return 2 * self.steps + 2 + self.refine

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        if threat.eps == 0:
            return x.clone()
        x_adv = x.clone()
        rows = torch.arange(len(x), device=x.device)
        if not victim.randomized:
            rows = (margin(victim.logits(x), y) <= 0).nonzero()[:, 0]
        if len(rows):
            x_adv[rows] = self._search(victim.subset(rows), x[rows], y[rows], threat)
        return torch.where(_column(threat.contains(x, x_adv)), x_adv, x)

    def _search(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The nearest error met, whatever eps; the original where there was none."""
        sure = victim.randomized and threat.norm == "l0"
        nearest = _Nearest(x, y, threat, sure=sure)
        project, unit = _PROJECTIONS[threat.norm], 1.0 if threat.norm == "l0" else 0.0
        first_step = self.step_size or STEP_SIZE[threat.norm]
        last_step = STEP_DECAY[threat.norm] * first_step
        x_adv, radius = x, torch.zeros(len(x), device=x.device, dtype=x.dtype)
        for step in range(self.steps):
            found = victim.gradient(x_adv, y, "margin")
            margins = _sure_margin(found, victim.eot) if sure else margin(found.logits, y)
            wrong = nearest.update(victim, x_adv, margins)
            needed = threat.distance(x, x_adv) + _REMAINING[threat.norm](x_adv, found.grad, -margins)
            gamma = _anneal(self.gamma, GAMMA_LAST, step / self.steps)
            radius = _next_radius(radius, gamma, unit, needed=needed, wrong=wrong, nearest=nearest.distance)
            step_size = _anneal(first_step, last_step, step / self.steps)
            x_adv = (x + project(x_adv + step_size * STEP.steepest(found.grad) - x, radius)).clamp(0, 1)
        nearest.ask(victim, x_adv)
        if not victim.randomized:
            self._shrink(victim, nearest, threat)
            if threat.norm == "l0":
                self._restore_pixels(victim, nearest)
        return nearest.x_adv

    def _shrink(self, victim: Victim, nearest: _Nearest, threat: ThreatModel) -> None:
        """Bisects for the smallest ball that still holds an error when the nearest one is projected on it."""
        delta = nearest.x_adv - nearest.x
        upper = threat.distance(nearest.x, nearest.x_adv)
        lower = torch.zeros_like(upper)
        for _ in range(self.refine):
            radius = (lower + upper) / 2
            x_adv = (nearest.x + _PROJECTIONS[threat.norm](delta, radius)).clamp(0, 1)
            wrong = nearest.ask(victim, x_adv)
            lower, upper = torch.where(wrong, lower, radius), torch.where(wrong, radius, upper)

    def _restore_pixels(self, victim: Victim, nearest: _Nearest) -> None:
        """Takes the least changed pixels back, one after the other, where the error survives that."""
        size = (nearest.x_adv - nearest.x).norm(dim=1).flatten(1)  # b c h w -> b hw
        order = size.masked_fill(size == 0, torch.inf).argsort(dim=1, stable=True)
        for rank in range(min(self.refine, order.shape[1])):
            restored = torch.zeros_like(size, dtype=torch.bool).scatter_(1, order[:, rank : rank + 1], True)
            x_adv = torch.where(restored.view(-1, 1, *nearest.x.shape[2:]), nearest.x, nearest.x_adv)
            nearest.ask(victim, x_adv)


class _Nearest:
    """The nearest error of each image so far; `sure`: it is wrong in further single draws, else in further means."""

    def __init__(self, x: Images, y: Labels, threat: ThreatModel, *, sure: bool) -> None:
        self.x, self.y, self.threat, self.sure = x, y, threat, sure
        self.x_adv = x.clone()
        self.distance = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)

    def ask(self, victim: Victim, x_adv: Images) -> Mask:
        """Asks for the margins of x_adv; then as `update`."""
        return self.update(victim, x_adv, margin(victim.logits(x_adv), self.y))

    def update(self, victim: Victim, x_adv: Images, margins: PerExample) -> Mask:
        """Keeps the errors that are nearer; returns where x_adv is an error."""
        wrong = margins > 0
        distance = self.threat.distance(self.x, x_adv)
        nearer = wrong & (distance < self.distance)
        if victim.randomized:
            nearer = self._ask_again(victim, x_adv, nearer)
        self.x_adv = torch.where(_column(nearer), x_adv, self.x_adv)
        self.distance = torch.where(nearer, distance, self.distance)
        return wrong

    def _ask_again(self, victim: Victim, x_adv: Images, nearer: Mask) -> Mask:
        """Where x_adv is an error in every one of the further means, or draws."""
        agreed = nearer.clone()
        for _ in range(math.ceil(SURE_DRAWS / victim.eot) if self.sure else CONFIRMATIONS):
            asked = agreed.nonzero()[:, 0]
            if len(asked) == 0:
                break
            part = victim.subset(asked)
            if self.sure:
                agreed[asked] = (part.labels_per_draw(x_adv[asked]) != self.y[asked]).all(0)
            else:
                agreed[asked] = margin(part.logits(x_adv[asked]), self.y[asked]) > 0
        return agreed


def _sure_margin(found: Gradient, eot: int) -> PerExample:
    """The mean margin of the draws, less `SURE` times their standard deviation."""
    return found.loss - SURE * math.sqrt(eot) * found.noise


def _next_radius(
    radius: PerExample, gamma: float, unit: float, *, needed: PerExample, wrong: Mask, nearest: PerExample
) -> PerExample:
    """Algorithm 1, the update of epsilon: the radius of the next ball, which changes by `unit` at least."""
    smaller = torch.minimum(radius * (1 - gamma), radius - unit)
    larger = torch.maximum(radius * (1 + gamma), radius + unit)
    larger = torch.where(nearest.isinf(), larger.maximum(needed), larger)
    return torch.where(wrong, smaller, larger).minimum(nearest - unit).clamp_min(unit)


def _anneal(first: float, last: float, progress: float) -> float:
    """A cosine from first to last."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _project_linf(delta: Images, radius: PerExample) -> Images:
    return delta.clamp(-_column(radius), _column(radius))


def _project_l2(delta: Images, radius: PerExample) -> Images:
    return delta * _column((radius / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1))


def _project_l1(delta: Images, radius: PerExample) -> Images:
    """Euclidean projection on the l1 ball (Duchi et al. 2008, fig. 1)."""
    magnitude = delta.abs().flatten(1)
    ordered = magnitude.sort(dim=1, descending=True).values
    rank = torch.arange(1, ordered.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    thresholds = (ordered.cumsum(1) - radius[:, None]) / rank
    kept = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1)
    shrink = _column(thresholds.gather(1, kept - 1)[:, 0].clamp_min(0))
    return delta.sign() * (delta.abs() - shrink).clamp_min(0)


def _project_l0(delta: Images, radius: PerExample) -> Images:
    """Keeps the pixels of the largest l2 norm over their channels."""
    order = delta.norm(dim=1).flatten(1).argsort(dim=1, descending=True, stable=True)  # b c h w -> b hw
    first = torch.arange(order.shape[1], device=delta.device) < radius.floor()[:, None]
    keep = torch.zeros_like(first).scatter_(1, order, first)
    return delta * keep.view(-1, 1, *delta.shape[2:])


def _count_pixels(x_adv: Images, grad: Images, missing: PerExample) -> PerExample:
    """How many pixels, each taken to the end of the box, make up for the missing margin of a linear classifier."""
    room = torch.where(grad > 0, 1 - x_adv, x_adv)
    worth = (room * grad.abs()).sum(1).flatten(1).sort(dim=1, descending=True).values.cumsum(1)
    return (worth < missing[:, None]).sum(1).to(x_adv.dtype) + 1


def _divide_by_norm(order: float) -> Callable[[Images, Images, PerExample], PerExample]:
    """The distance to the boundary of a linear classifier: the missing margin over the gradient's dual norm."""
    return lambda x_adv, grad, missing: missing / grad.flatten(1).norm(p=order, dim=1).clamp_min(1e-12)


_PROJECTIONS: Final[dict[str, Callable[[Images, PerExample], Images]]] = {
    "linf": _project_linf,
    "l2": _project_l2,
    "l1": _project_l1,
    "l0": _project_l0,
}
_REMAINING: Final[dict[str, Callable[[Images, Images, PerExample], PerExample]]] = {
    "linf": _divide_by_norm(1),
    "l2": _divide_by_norm(2),
    "l1": _divide_by_norm(math.inf),
    "l0": _count_pixels,
}
