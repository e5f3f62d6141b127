"""The square attack: random search with square-shaped changes."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robench.attack import Attack
from robench.errors import BudgetExhausted, UsageError
from robench.losses import get_loss, margin
from robench.threat import ThreatModel
from robench.types import Images, Labels, Logits, Mask, PerExample
from robench.victim import Victim

LOSSES: Final = ("margin", "ce")
HALVINGS: Final = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)
"""The queries, out of 10,000, from which on the share of changed pixels is halved (section 3.2)."""
HELD: Final = 50
"""Queries on the same draws of a randomized defense; the first asks about the best image."""
SHARE: Final = 0.3
"""Of the EOT draws, how many a query has, but at least one."""


@dataclass(frozen=True)
class Square(Attack):
    """Random search: changes a random square of the image and keeps the change if the loss grows.

    Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1 to 3: the squares shrink by a fixed schedule; in linf
    each colour of a square moves to +eps or -eps, in l2 a square gets a bump of the norm that another square gives up.
    It needs no gradient, so a defense that only hides its gradient does not stop it. Norms: linf, l2. No guarantee: an
    upper bound of robust accuracy. Cost per image: at most `restarts * queries` forward passes, on a randomized defense
    times 0.3 EOT; an image of a deterministic one costs nothing more once it is misclassified.

    Departures: the schedule is the paper's, rescaled to `queries` (the authors' code halves once more, at 500 of
    10,000, and AutoAttack does not rescale). In linf a square that would change nothing takes the other signs. In l2
    the side is at least 3, as in the paper, but on images of less than 6 pixels at least half of theirs. Each image has
    squares of its own. On a randomized defense no image leaves, and the loss is that of the mean logits of some of the
    EOT draws, held for `HELD` queries, of which the first asks about the best image again: else the draws would say
    more of themselves than of a square (docs/decisions/0013-square-holds-its-draws.md). The first search starts where
    the same attack ended within a smaller bound, if any, stretched to eps.

    Args:
        queries: images tried in one restart, the start included.
        p_init: share of the pixels in the first squares.
        loss: `margin` (the paper's, untargeted) or `ce`.
        restarts: independent searches on the images that are still right.
    """

    name = "square"
    norms = ("linf", "l2")
    access = "scores"
    goal = "budget"
    draws = True

    queries: int = 5000
    p_init: float = 0.8
    loss: str = "margin"
    restarts: int = 1

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.queries < 1 or self.restarts < 1:
            raise UsageError(f"square: queries and restarts must be at least 1; got {self.queries}, {self.restarts}")
        if not 0 < self.p_init <= 1:
            raise UsageError(f"square: p_init must be above 0 and at most 1; got {self.p_init}")
        if self.loss not in LOSSES:
            raise UsageError(f'square: loss must be one of {", ".join(LOSSES)}; got "{self.loss}"')

    def passes(self) -> int:
        """One forward for each image tried."""
        return self.restarts * self.queries

    def draws_of(self, eot: int) -> int:
        """Of the EOT draws those of a query, three of ten: the images found are as good as with all, see the class."""
        return max(1, round(SHARE * eot))

    def passes_with_eot(self, norm: str, eot: int) -> int:
        """As `passes_in`, times the draws of a query."""
        return self.draws_of(eot) * self.passes_in(norm)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        best = _Best(x)
        for restart in range(self.restarts):
            rows = best.rows_of_interest(victim)
            if len(rows) == 0:
                break
            part, originals = victim.subset(rows), x[rows]
            if restart == 0 and part.start is not None:
                start = originals + threat.eps * threat.steepest(part.start - originals)
            else:
                start = originals + (_stripes if threat.norm == "linf" else _tiles)(originals, threat.eps)
            try:
                found = self._search(part, originals, y[rows], threat, start=threat.project(originals, start))
                if victim.randomized and self.restarts > 1:  # searches compare on draws that none of them chose by
                    part.hold_draws()
                    found.loss, found.broken = self._rate(part.logits(found.x), y[rows])
            except BudgetExhausted:
                if not (victim.randomized and restart):
                    raise
                break  # what was seen on other draws does not compare with what ended before
            best.update(rows, found.x, found.loss, found.broken)
        return best.x

    def _search(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel, *, start: Images) -> _Best:
        """One restart."""
        move = _move_square if threat.norm == "linf" else _move_bump
        victim = victim.with_draws(self.draws_of(victim.eot))
        best, asked, rows = _Best(start), victim, torch.arange(len(x), device=x.device)
        for query in range(self.queries):
            renewed = query % HELD == 0 if victim.randomized else query == 0
            if renewed:
                victim.hold_draws()
                best.forget()
                x_adv = best.x
            else:
                x_adv = move(x[rows], best.x[rows], threat, self._side(query, x))
            logits = asked.logits(x_adv)
            best.update(rows, x_adv, *self._rate(logits, y[rows]))
            if not victim.randomized and bool(best.broken[rows].any()):
                rows = rows[~best.broken[rows]]
                if len(rows) == 0:
                    break
                asked = victim.subset(rows)
        return best

    def _rate(self, logits: Logits, y: Labels) -> tuple[PerExample, Mask]:
        return get_loss(self.loss)(logits, y), margin(logits, y) > 0

    def _side(self, query: int, x: Images) -> int:
        """The side of the squares of a query: that of `p_init` of the pixels, halved by the schedule."""
        share = self.p_init / 2 ** bisect_right(HALVINGS, 10_000 * query / self.queries)
        return max(1, round(math.sqrt(share * x.shape[2] * x.shape[3])))


class _Best:
    """The best image of each example so far: misclassified before not, then the larger loss."""

    def __init__(self, x: Images) -> None:
        self.x = x.clone()
        self.forget()

    def forget(self) -> None:
        """Keeps the images alone, not how good they were."""
        self.loss = torch.full_like(self.x[:, 0, 0, 0], -torch.inf)
        self.broken = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)

    def rows_of_interest(self, victim: Victim) -> Tensor:
        """All examples of a randomized defense, else those that are not misclassified."""
        return (~self.broken | victim.randomized).nonzero()[:, 0]

    def update(self, rows: Tensor, x_adv: Images, loss: PerExample, broken: Mask) -> None:
        """Keeps what is better."""
        better = (broken & ~self.broken[rows]) | ((broken == self.broken[rows]) & (loss > self.loss[rows]))
        self.x[rows] = torch.where(better.view(-1, 1, 1, 1), x_adv, self.x[rows])
        self.loss[rows] = torch.where(better, loss, self.loss[rows])
        self.broken[rows] = torch.where(better, broken, self.broken[rows])


def _signs(x: Images, *shape: int) -> Tensor:
    """+1 or -1 with equal chances, for each image a tensor of that shape."""
    return 2 * torch.randint(2, (len(x), *shape), device=x.device).to(x.dtype) - 1


def _offsets(x: Images, side: int) -> tuple[Tensor, Tensor]:
    """A random square for each image: rows (b h) and columns (b w) of the pixels, counted from its corner."""
    height, width = x.shape[2:]
    top = torch.randint(height - side + 1, (len(x), 1), device=x.device)
    left = torch.randint(width - side + 1, (len(x), 1), device=x.device)
    return torch.arange(height, device=x.device) - top, torch.arange(width, device=x.device) - left


def _window(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """1.0 inside the square that the offsets are counted from, 0.0 outside: b 1 h w."""
    inside_rows, inside_columns = (((offset >= 0) & (offset < side)).float() for offset in (rows, columns))
    return (inside_rows[:, :, None] * inside_columns[:, None, :])[:, None]


# linf


def _stripes(x: Images, eps: float) -> Tensor:
    """The first change in linf: vertical stripes one pixel wide, each colour of each +eps or -eps."""
    return eps * _signs(x, x.shape[1], 1, x.shape[3])


def _move_square(x: Images, x_adv: Images, threat: ThreatModel, side: int) -> Images:
    """Algorithm 2: moves each colour of a random square to +eps or -eps."""
    side = min(side, *x.shape[2:])
    change = 2 * threat.eps * _signs(x, x.shape[1], 1, 1) * _window(*_offsets(x, side), side)
    moved, opposite = threat.project(x, x_adv + change), threat.project(x, x_adv - change)
    unchanged = (moved == x_adv).flatten(1).all(1)
    return torch.where(unchanged.view(-1, 1, 1, 1), opposite, moved)


# l2


def _tiles(x: Images, eps: float) -> Images:
    """The first change in l2: a grid of about five by five bumps, each colour of random sign, together of norm eps."""
    height, width = x.shape[2:]
    side = _bump_side(min(height, width) // 5, x)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    tile = (slice(None), slice(None), (rows // side)[:, None], columns // side)
    count = (math.ceil(height / side), math.ceil(width / side))
    bumps = _bumps(x, side)[_turns(x, *count)[tile], (rows % side)[:, None], columns % side]
    grid = _signs(x, x.shape[1], *count)[tile] * bumps
    return eps * grid / grid.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _move_bump(x: Images, x_adv: Images, threat: ThreatModel, side: int) -> Images:
    """Algorithm 3: adds a bump to a random square, of the norm that another gives up and that the box leaves unused."""
    side = _bump_side(side, x)
    rows, columns = _offsets(x, side)
    target = _window(rows, columns, side)
    both = torch.maximum(target, _window(*_offsets(x, side), side))
    bump = _bumps(x, side)[
        _turns(x, 1, 1), rows.clamp(0, side - 1)[:, None, :, None], columns.clamp(0, side - 1)[:, None, None, :]
    ]  # b 1 h w
    delta = x_adv - x
    unused = (threat.eps**2 - threat.distance(x, x_adv) ** 2).clamp_min(0).view(-1, 1, 1, 1)
    available = (_norms(delta * both) ** 2 + unused / x.shape[1]).sqrt()  # b c 1 1
    shape = _unit(_signs(x, x.shape[1], 1, 1) * _unit(bump * target) + _unit(delta * target))
    return threat.project(x, x + delta * (1 - both) + available * shape)


def _bump_side(side: int, x: Images) -> int:
    """A side of at least 3 pixels, or of half an image that is smaller than 6, and at most the image's."""
    shorter = min(x.shape[2:])
    return min(max(side, min(3, shorter // 2), 1), shorter)


def _turns(x: Images, *shape: int) -> Tensor:
    """0 or 1 with equal chances: which of the two `_bumps`, for each image b 1 and that shape."""
    return torch.randint(2, (len(x), 1, *shape), device=x.device)


def _bumps(x: Images, side: int) -> Tensor:
    """The bump of equation 2 and its transpose, on the device of x: 2 side side."""
    bump = torch.cat([_pyramid(side, side // 2), -_pyramid(side, side - side // 2)], dim=1)
    return torch.stack([bump, bump.T]).to(x)


def _pyramid(height: int, width: int) -> Tensor:
    """The rectangle of section 3.4: its d-th ring from the middle holds the sum of 1 / j^2 from d + 1 to the rim."""
    squares = 1.0 / torch.arange(1.0, height // 2 + 2) ** 2
    sums = squares.flip(0).cumsum(0).flip(0)
    rows, columns = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    return sums[torch.maximum(rows[:, None], columns)]


def _norms(delta: Images) -> Tensor:
    """The l2 norm of each colour of each image: b c 1 1."""
    return delta.flatten(2).norm(dim=2)[:, :, None, None]


def _unit(delta: Images) -> Images:
    """Each colour divided by its norm; all zero where it is."""
    return delta / _norms(delta).clamp_min(1e-12)
