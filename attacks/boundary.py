"""The boundary attack: a random walk along the boundary that sees labels only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch.nn import functional

from robench.attack import Attack
from robench.decisions import MIN_QUERIES, Oracle, Started, start_search
from robench.errors import UsageError
from robench.threat import ThreatModel
from robench.types import Images, Labels, Mask, PerExample
from robench.victim import Victim

LOOK_EVERY: Final = 4
"""Steps between two looks, which ask about the sphere too and, on a randomized defense, about the incumbent."""
LOOK_QUERIES: Final = 3
"""The most queries of a step that looks."""
SPHERE_WRONG: Final = 0.3
"""The share of wrong answers at equal distance that both step sizes aim at."""
NEARER_WRONG: Final = 0.2
"""The share of wrong answers among candidates drawn nearer that the steps towards the original aim at."""
RATE: Final = 0.3
"""How far an answer moves the logarithm of a step size, for each unit that it differs from the share aimed at."""
LARGEST_TURN: Final = 1.0
LARGEST_DRAW: Final = 0.5
SMALLEST: Final = 1e-5
"""Limits of the step sizes, as shares of the distance."""
RETREAT: Final = 0.02
LARGEST_RETREAT: Final = 0.5
"""How far an incumbent that is right is moved outward, as a share of its distance; it doubles with each in a row."""
CONVERGED: Final = 1e-4
"""The walk ends where the next steps gain less than this share of the distance, for every image."""


@dataclass(frozen=True)
class Boundary(Attack):
    """Walks along the boundary: a random step at equal distance and one towards the original, kept where it is wrong.

    Brendel et al. 2018 (arXiv 1712.04248), algorithm 1. Norm: l2. Needs labels only, so neither a hidden gradient nor
    hidden scores protect a defense. No guarantee: an upper bound of robust accuracy; in 1,000 queries `hopskipjump`
    comes nearer. Cost per image: at most `queries` forward passes, times EOT: the label of a randomized defense is the
    most frequent of the EOT draws.

    Departures: starts also from coarse noise, at the boundary (see `robench.decisions`); an image without a start stays
    the original. The first steps are ten times foolbox's, and the step sizes of each image adapt on a log scale after
    each of its answers, so that they settle within a few hundred queries. Every fourth step asks about the candidate at
    equal distance as well, and takes it where that alone is wrong. On a randomized defense it also asks about the
    incumbent again: one taken by luck is right and has none but right candidates near, so that the walk would end
    there. Where it is right the image moves outward, by a share that doubles with each such answer in a row (figures in
    docs/decisions/0012-boundary-walks-on-in-noise.md). On others it ends before the queries do once the steps are tiny.
    Returned a little further away than found (see `robench.decisions.Started.finish`).

    Args:
        queries: the most forward passes per image, before EOT.
        spherical_step: length of the first random steps, as a share of the distance.
        source_step: length of the first steps towards the original, as a share of the distance.
    """

    name = "boundary"
    norms = ("l2",)
    access = "decisions"
    goal = "minimal"
    draws = True

    queries: int = 5000
    spherical_step: float = 0.1
    source_step: float = 0.1

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.queries < MIN_QUERIES:
            raise UsageError(f"boundary: queries must be at least {MIN_QUERIES}; got {self.queries}")
        if not (self.spherical_step > 0 and 0 < self.source_step < 1):
            raise UsageError(
                "boundary: spherical_step must be positive and source_step above 0 and below 1; "
                f"got {self.spherical_step} and {self.source_step}"
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
        return started.finish(x, self._walk(started), threat)

    def _walk(self, started: Started) -> Images:
        """Algorithm 1 with the queries that are left."""
        oracle = started.oracle
        walk = Walk.begin(started.x, started.x_adv, self.spherical_step, self.source_step)
        step = 0
        while oracle.left and (oracle.victim.randomized or not walk.has_converged()):
            step += 1
            walk.step(oracle, looks=step % LOOK_EVERY == 0 and oracle.left >= LOOK_QUERIES)
        return walk.x_adv


@dataclass
class Walk:
    """Where the walk of each image is, and the sizes of its next step as shares of the distance.

    Attributes:
        x: the originals.
        x_adv: the incumbents, each wrong when it was asked about.
        around: length of the random step at equal distance.
        inward: of the step towards the original.
        outward: of the step away from it where the incumbent is found right.
    """

    x: Images
    x_adv: Images
    around: PerExample
    inward: PerExample
    outward: PerExample

    @classmethod
    def begin(cls, x: Images, x_adv: Images, around: float, inward: float) -> Self:
        """A walk from x_adv with the same first steps for all images."""
        sizes = (x.new_full((len(x),), size) for size in (around, inward, RETREAT))
        return cls(x, x_adv, *sizes)

    def has_converged(self) -> bool:
        """Whether no image has steps worth a query; a turn gains about its square."""
        return bool((torch.maximum(self.inward, self.around**2) < CONVERGED).all())

    def step(self, oracle: Oracle, *, looks: bool) -> None:
        """One step of each image.

        Args:
            oracle: the oracle of the images; has a query left, LOOK_QUERIES where the step looks.
            looks: whether the sphere is asked about too and, on a randomized defense, the incumbent.
        """
        sphere = turn(self.x, self.x_adv, self.around)
        nearer = draw_nearer(self.x, self.x_adv, sphere, self.inward)
        asked = [nearer, *([sphere] if looks else ()), *([self.x_adv] if looks and oracle.victim.randomized else ())]
        wrong = oracle.is_wrong(torch.cat(asked)).view(len(asked), -1)
        found = self._retreat(~wrong.any(0)) if len(asked) == LOOK_QUERIES else self.x_adv
        if looks:
            found = torch.where(wrong[1].view(-1, 1, 1, 1), sphere, found)
            self.around = adapt(self.around, wrong[1], SPHERE_WRONG, LARGEST_TURN)
            self.inward = adapt(self.inward, wrong[1], SPHERE_WRONG, LARGEST_DRAW)
        self.x_adv = torch.where(wrong[0].view(-1, 1, 1, 1), nearer, found)
        self.inward = adapt(self.inward, wrong[0], NEARER_WRONG, LARGEST_DRAW)

    def _retreat(self, lost: Mask) -> Images:
        """The incumbents, those that are lost moved outward."""
        away = (self.x + (1 + self.outward).view(-1, 1, 1, 1) * (self.x_adv - self.x)).clamp(0, 1)
        self.outward = torch.where(lost, 2 * self.outward, RETREAT).clamp(max=LARGEST_RETREAT)
        return torch.where(lost.view(-1, 1, 1, 1), away, self.x_adv)


def turn(x: Images, x_adv: Images, around: PerExample) -> Images:
    """Moves x_adv by a share of its distance in a direction drawn for each image, and back to equal distance from x.

    Where the box cuts it off it is nearer.
    """
    delta = (x_adv - x).flatten(1)
    distance, along = delta.norm(dim=1, keepdim=True), functional.normalize(delta)
    noise = torch.randn_like(delta)
    aside = functional.normalize(noise - (noise * along).sum(1, keepdim=True) * along)
    turned = distance * functional.normalize(along + around[:, None] * aside)
    return (x + turned.view_as(x)).clamp(0, 1)


def draw_nearer(x: Images, x_adv: Images, sphere: Images, inward: PerExample) -> Images:
    """Moves `sphere` towards x until it is nearer than x_adv by a share of the distance."""
    distance, reached = ((images - x).flatten(1).norm(dim=1) for images in (x_adv, sphere))
    share = ((1 - inward) * distance / reached.clamp_min(torch.finfo(x.dtype).tiny)).clamp(max=1)
    return (x + share.view(-1, 1, 1, 1) * (sphere - x)).clamp(0, 1)


def adapt(size: PerExample, wrong: Mask, aim: float, largest: float) -> PerExample:
    """A larger step where the answer was wrong and a smaller one elsewhere; equal on average at a share `aim` of wrong.

    The paper's adaptation (section 2.4), for each image and after each answer.
    """
    return (size * (RATE * (wrong.to(size.dtype) - aim)).exp()).clamp(SMALLEST, largest)
