"""HopSkipJump: a walk to the nearest error that sees labels only and estimates the gradient at the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from robench.attack import Attack
from robench.decisions import MIN_QUERIES, Oracle, bisect, start_search
from robench.errors import UsageError
from robench.threat import ThreatModel
from robench.types import Images, Labels, PerExample
from robench.victim import Victim

HALVINGS: Final = 12
"""The most halvings of a step; an image for which no step is wrong stays where it is."""
PROBE: Final = 0.1
RANDOMIZED_PROBE: Final = 0.3
"""Length of the noise around an image at the boundary, as a share of its l2 distance from the original."""
RANDOMIZED_BISECTIONS: Final = 8
"""Halvings of the way back to the boundary where the defense draws: its boundary is no sharper."""
QUERY_ROWS: Final = 1024
"""Noisy images in one query, about; bounds memory."""


@dataclass(frozen=True)
class HopSkipJump(Attack):
    """Estimates the gradient at the boundary from labels of noisy images, steps along it, and bisects back.

    Chen et al. 2020 (arXiv 1904.02144), algorithm 2. Norms: l2, linf. Needs labels only, so neither a hidden gradient
    nor hidden scores protect a defense. No guarantee: an upper bound of robust accuracy. Cost per image: at most
    `queries` forward passes, times EOT: the label of a randomized defense is the most frequent of the EOT draws; but in
    an estimate each draw answers for a noisy image of its own.

    Departures: starts also from coarse noise (see `robench.decisions`); an image without a start stays the original.
    The nearest image on the way is returned, a little further away than found. The noise is drawn from the sphere in
    linf as in l2, and as long as a tenth of the l2 distance to the original, three tenths where the defense draws; the
    paper's is the distance divided by the image's size. So short a step moves an answer by less than a randomized
    defense's own noise does, and of such answers no direction can be read (PopSkipJump, Simon-Gabriel et al. 2021,
    arXiv 2106.07445, asks more often instead; figures in docs/decisions/0010-probes-longer-than-the-noise.md). The
    noise that counts is what clipping to the box leaves of it, as in the authors' code. A step is halved at most 12
    times, and no answer has to repeat, so that a randomized defense can neither stop nor hold up the attack; foolbox's
    demands both. The last estimate may take half its directions. Of a randomized defense ten noisy images with an
    answer each tell more of the direction than one with a vote of ten (docs/decisions/0014-decisions-of-one-draw.md),
    and the bisection back takes 8 queries.

    Args:
        queries: the most forward passes per image, before EOT.
        directions: queries of the first estimate of the gradient; the k-th takes sqrt(k) times as many.
    """

    name = "hopskipjump"
    norms = ("l2", "linf")
    access = "decisions"
    goal = "minimal"
    draws = True

    queries: int = 5000
    directions: int = 100

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.queries < MIN_QUERIES or self.directions < 2:
            raise UsageError(
                f"hopskipjump: queries must be at least {MIN_QUERIES} and directions at least 2; "
                f"got {self.queries} and {self.directions}"
            )

    def passes(self) -> int:
        """One forward for each query."""
        return self.queries

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        if threat.eps == 0:
            return x.clone()
        started = start_search(victim, x, y, self.queries)
        if len(started.rows) == 0:
            return x.clone()
        return started.finish(x, self._walk(started.oracle, started.x, started.x_adv, threat), threat)

    def _walk(self, oracle: Oracle, x: Images, x_adv: Images, threat: ThreatModel) -> Images:
        """Algorithm 2 from wrong images x_adv on; returns the nearest on the way."""
        if oracle.victim.randomized:
            share, bisections = RANDOMIZED_PROBE, RANDOMIZED_BISECTIONS
        else:  # to theta = d^-3/2 or d^-2
            share, bisections = PROBE, math.ceil((1.5 if threat.norm == "l2" else 2) * math.log2(x[0].numel()))
        distance = threat.distance(x, x_adv)
        nearest, reached, step = x_adv, distance, 1
        while (count := oracle.left - HALVINGS - bisections) >= self.directions / 2:
            count = min(count, round(self.directions * math.sqrt(step)))
            radius = share * (x_adv - x).flatten(1).norm(dim=1)
            grad = estimate_gradient(oracle, x_adv, radius, count)
            x_adv = leap(oracle, x_adv, threat.steepest(grad), distance / math.sqrt(step))
            x_adv = bisect(oracle, x, x_adv, threat.norm, bisections)
            distance = threat.distance(x, x_adv)
            nearest = torch.where((distance < reached).view(-1, 1, 1, 1), x_adv, nearest)
            reached, step = torch.minimum(distance, reached), step + 1
        return nearest


def estimate_gradient(oracle: Oracle, x_adv: Images, radius: PerExample, count: int) -> Images:
    """The direction in which images at the boundary become wrong, not scaled (equation 16).

    Args:
        oracle: the oracle of the images.
        x_adv: images at the boundary.
        radius: the l2 norm of the noise, for each image.
        count: queries. Of a randomized defense each has as many noisy images as it has EOT draws, one draw for each.
    """
    signed, moved = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
    balance = torch.zeros_like(radius)
    eot = oracle.victim.eot
    probes, size = count * eot, max(QUERY_ROWS // len(x_adv), 1) * eot
    for first in range(0, probes, size):
        noise = torch.randn(min(size, probes - first), *x_adv.shape, device=x_adv.device)  # m b c h w
        lengths = noise.flatten(2).norm(dim=2)
        asked = (x_adv + (radius / lengths)[:, :, None, None, None] * noise).clamp(0, 1)
        signs = oracle.is_wrong_once(asked.flatten(0, 1)).view(len(asked), -1).to(x_adv.dtype) * 2 - 1  # m b
        change = asked - x_adv
        signed += (signs[:, :, None, None, None] * change).sum(0)
        moved += change.sum(0)
        balance += signs.sum(0)
    mean = (balance / probes).view(-1, 1, 1, 1)
    return torch.where(mean.abs() < 1, signed - mean * moved, signed)


def leap(oracle: Oracle, x_adv: Images, ahead: Images, length: PerExample) -> Images:
    """Moves each image by `length` along `ahead`, or by the first of its halves at which it is wrong."""
    result, length = x_adv.clone(), length.clone()
    rows = torch.arange(len(x_adv), device=x_adv.device)
    for _ in range(HALVINGS):
        asked = (x_adv[rows] + length[rows].view(-1, 1, 1, 1) * ahead[rows]).clamp(0, 1)
        wrong = oracle.is_wrong_among(rows, asked)
        result[rows[wrong]] = asked[wrong]
        rows = rows[~wrong]
        if len(rows) == 0:
            break
        length[rows] /= 2
    return result
