"""What attacks that see labels only share: a count of their queries, a start, and a bisection to the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from robench.threat import ThreatModel
from robench.types import Images, Labels, Mask
from robench.victim import Victim

TRIES: Final = 50
"""Noise images tried for a start."""
BISECTIONS: Final = 10
"""Queries to come from the start to the boundary, up to a thousandth of the way."""
STAND_BACK: Final = (1.001,)
RANDOMIZED_STAND_BACK: Final = (1.001, 1.02, 1.05, 1.1, 1.2, 1.4)
"""How much further away from the original than it was found an image may be returned; see `Started.finish`."""
MIN_QUERIES: Final = 10
"""Queries with which an attack can ask about the original and finish, at least."""


@dataclass
class Oracle:
    """Says which images are wrong, and counts down the queries that each image has left.

    Attributes:
        victim: the victim of the images under attack.
        y: their labels.
        left: queries left of the image that was asked about most; who asks sees to it that they suffice.
    """

    victim: Victim
    y: Labels
    left: int

    def is_wrong(self, x_adv: Images) -> Mask:
        """Whether each row is wrong; several candidates for each image come candidate-major."""
        candidates = len(x_adv) // len(self.y)
        self.left -= candidates
        return self.victim.labels(x_adv) != self.y.repeat(candidates)

    def is_wrong_once(self, x_adv: Images) -> Mask:
        """As `is_wrong`, in a single draw of a randomized defense: `victim.eot` candidates are one query."""
        candidates = len(x_adv) // len(self.y)
        self.left -= candidates // self.victim.eot
        return self.victim.labels_once(x_adv) != self.y.repeat(candidates)

    def is_wrong_among(self, rows: Tensor, x_adv: Images) -> Mask:
        """Asks about some of the images: row i of x_adv belongs to image `rows[i]`."""
        self.left -= 1
        return self.victim.subset(rows).labels(x_adv) != self.y[rows]

    def narrow(self, rows: Tensor) -> Oracle:
        """The oracle of some of the images."""
        return Oracle(self.victim.subset(rows), self.y[rows], self.left)


@dataclass
class HeldOracle:
    """Says which images are wrong, on a randomized defense in the same draws every time.

    A candidate is wrong where it is in all draws that have its original right: with many draws it is wrong in those to
    come, too, and with few it is near the error of one. The draws are those of a batch: a narrower one meets others.

    Attributes:
        victim: the victim of the images under attack, with the draws held.
        x: the originals.
        y: their labels.
        left: queries left of the image that was asked about most.
        original_right: the draws that have the original right, `draws b`.
    """

    victim: Victim
    x: Images
    y: Labels
    left: int
    original_right: Bool[Tensor, "draws b"]

    @classmethod
    def begin(cls, victim: Victim, x: Images, y: Labels, left: int, draws: int) -> Self:
        """Takes `draws` draws of a randomized defense and asks about the originals, if there is a query left for it."""
        victim = victim.with_draws(draws)
        right = torch.ones(1, len(y), dtype=torch.bool, device=y.device)
        if victim.randomized and len(y):
            victim.hold_draws()
            right = victim.unwatched().labels_per_draw(x) == y if left > 0 else ~right
            left -= 1
        return cls(victim, x, y, left, right)

    @property
    def exempt(self) -> Mask:
        """The images that are not to be searched: no draw has their original right, or no query was left to ask."""
        return ~self.original_right.any(0)

    def is_wrong(self, x_adv: Images) -> Mask:
        """Whether each image is wrong; one candidate for each, as several would not meet the same draws."""
        self.left -= 1
        wrong = self.victim.labels_per_draw(x_adv) != self.y
        return (wrong | ~self.original_right).all(0) & ~self.exempt

    def release(self, rows: Tensor, done: Mask) -> tuple[Tensor, Self]:
        """Lets images leave: the `rows` that stay, and their oracle.

        Of a randomized defense none leaves before half can, as the others then meet other draws; so the originals are
        asked about once more.

        Args:
            rows: where the oracle's images come from.
            done: which of them need no answer any more; answers do them no harm.
        """
        leaving = int(done.sum())
        if leaving == 0 or (self.victim.randomized and 2 * leaving < len(rows)):
            return rows, self
        keep = ~done
        part = self.begin(self.victim.subset(keep), self.x[keep], self.y[keep], self.left, self.victim.eot)
        return rows[keep], part


@dataclass
class Started:
    """The images of a batch that a search by decisions can begin with.

    Attributes:
        rows: which they are: right, and a start was found.
        x: their originals.
        x_adv: wrong images: their starts, or on the line from the original to the start, near the boundary.
        oracle: their oracle; the queries of `finish` are not among those it has left.
    """

    rows: Tensor
    x: Images
    x_adv: Images
    oracle: Oracle

    def finish(self, x: Images, x_adv: Tensor, threat: ThreatModel) -> Images:
        """The batch x with what was found for the images of `rows`, where that lies within the bound.

        An image at the boundary may be right again for whoever asks in a batch of another size, as sums are rounded
        otherwise there; so it is moved away from the original by a thousandth of its distance. Of a randomized defense
        a few draws may have been wrong by luck; there it is moved by up to two fifths, to where it is wrong and stays
        wrong on all that is further away.

        Args:
            x: the batch's originals.
            x_adv: what was found, one for each of `rows`, each wrong when it was asked about.
            threat: the bound.
        """
        shares = torch.tensor(_stand_back(self.oracle.victim), device=x.device).view(-1, 1, 1, 1, 1)
        away = (self.x + shares * (x_adv - self.x)).clamp(0, 1)  # m n c h w
        wrong = self.oracle.is_wrong(away.flatten(0, 1)).view(len(away), -1)
        stays = wrong.flip(0).long().cumprod(0).flip(0)  # m n: 1 where wrong here and in all that follow
        steady = away[stays.argmax(0), torch.arange(len(x_adv), device=x.device)]
        found = torch.where(threat.contains(self.x, x_adv).view(-1, 1, 1, 1), x_adv, self.x)
        take = stays.any(0) & threat.contains(self.x, steady)
        return x.index_copy(0, self.rows, torch.where(take.view(-1, 1, 1, 1), steady, found))


def _stand_back(victim: Victim) -> tuple[float, ...]:
    return RANDOMIZED_STAND_BACK if victim.randomized else STAND_BACK


def start_search(victim: Victim, x: Images, y: Labels, queries: int) -> Started:
    """Finds a start for each image that is right, moved towards the original by bisection.

    So starts the boundary attack (Brendel et al. 2018, arXiv 1712.04248, section 2.1); here an image for which no noise
    is wrong drops out and does not stop the others.

    Args:
        victim: the victim.
        x: originals.
        y: their labels.
        queries: the most queries of the whole search, at least MIN_QUERIES; this takes at most 1 + TRIES + BISECTIONS.
    """
    started = find_starts(victim, x, y, queries)
    if len(started.rows):
        started.x_adv = bisect(started.oracle, started.x, started.x_adv, "l2", BISECTIONS)
    return started


def find_starts(
    victim: Victim, x: Images, y: Labels, queries: int, *, first: Images | None = None, tries: int = TRIES
) -> Started:
    """Finds a start for each image that is right: noise that is wrong, as it is.

    Args:
        victim: the victim.
        x: originals.
        y: their labels.
        queries: the most queries of the whole search, those of `finish` among them; this takes at most 1 + tries.
        first: what is tried before noise, one for each image.
        tries: images tried for a start.
    """
    oracle = Oracle(victim, y, queries - len(_stand_back(victim)))
    right = ~oracle.is_wrong(x)
    starts, missing = x.clone(), right.clone()
    for number in range(min(tries, oracle.left)):
        rows = missing.nonzero()[:, 0]
        if len(rows) == 0:
            break
        noise = first[rows] if first is not None and number == 0 else draw_noise(x[rows], number)
        wrong = oracle.is_wrong_among(rows, noise)
        starts[rows[wrong]] = noise[wrong]
        missing[rows[wrong]] = False
    rows = (right & ~missing).nonzero()[:, 0]
    return Started(rows, x[rows], starts[rows], oracle.narrow(rows))


def draw_noise(x: Images, number: int) -> Images:
    """Uniform noise in the box: of single pixels first, then of squares of side 2, 4, ..., and over again.

    Many nets give noise of single pixels one and the same class, whatever the draw.
    """
    height, width = x.shape[2:]
    grain = 2 ** (number % max(height, width).bit_length())
    coarse = torch.rand(*x.shape[:2], -(-height // grain), -(-width // grain), device=x.device, dtype=x.dtype)
    return functional.interpolate(coarse, scale_factor=grain, mode="nearest")[:, :, :height, :width]


def bisect(oracle: Oracle | HeldOracle, x: Images, x_adv: Images, norm: str, steps: int) -> Images:
    """Moves wrong images towards their originals, up to the boundary, in at most `steps` queries.

    In l2 along the line, in linf by clipping to a ball around the original: the projections of HopSkipJump (Chen et
    al. 2020, arXiv 1904.02144, section 3.2). What is returned was found wrong, or is x_adv itself.
    """
    delta = x_adv - x
    radius = delta.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    low, high = torch.zeros_like(radius), torch.ones_like(radius)
    for _ in range(min(steps, oracle.left)):
        middle = (low + high) / 2
        moved = middle * delta if norm == "l2" else delta.clamp(-middle * radius, middle * radius)
        moved = (x + moved).clamp(0, 1)
        wrong = oracle.is_wrong(moved).view(-1, 1, 1, 1)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        x_adv = torch.where(wrong, moved, x_adv)
    return x_adv
