"""The boundary attack: a random walk along the boundary that sees labels only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from robench.attack import Attack
from robench.bridges.foolbox import adopt
from robench.bridges.foreign import import_package, show_labels
from robench.decisions import MIN_QUERIES, Started, start_search
from robench.errors import UsageError
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

UPDATE_EVERY: Final = 2
"""Steps between two looks at the success rates; a look costs a query more."""
CONVERGED: Final = 1e-4
"""The walk ends where the steps towards the original are a smaller share of the distance than this, for every image."""


@dataclass(frozen=True)
class Boundary(Attack):
    """Walks along the boundary: a random step at equal distance and one towards the original, kept where it is wrong.

    Brendel et al. 2018 (arXiv 1712.04248), algorithm 1; the walk is foolbox's `BoundaryAttack`. Norm: l2. Needs labels
    only, so neither a hidden gradient nor hidden scores protect a defense. No guarantee: an upper bound of robust
    accuracy; `hopskipjump` comes nearer in as many queries. Cost per image: `queries` forward passes, times EOT: the
    label of a randomized defense is the most frequent of the EOT draws.

    Departures: starts also from coarse noise, at the boundary (see `robench.decisions`); an image without a start stays
    the original. The first steps are ten times foolbox's and the success rates are looked at every 2 steps, not 10, so
    that the step sizes adapt within a few hundred queries: in 3000 queries it comes about twice as near. All images
    share a random direction (foolbox's departure). That the starts are wrong is known and not asked again, so that no
    draw of a randomized defense can stop the walk. Ends before the queries do once the steps are tiny. Returned a
    little further away than found (see `robench.decisions.Started.finish`).

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
        """Foolbox's walk, with the queries that are left: one for each step and one more for each look."""
        oracle = started.oracle
        steps = oracle.left * UPDATE_EVERY // (UPDATE_EVERY + 1)
        known = [(oracle.y + 1) % oracle.victim.num_classes]  # foolbox first asks whether the starts are wrong

        def answer(images: Images) -> Labels:
            return known.pop() if known else oracle.victim.labels(images)

        walk = import_package("foolbox").attacks.BoundaryAttack(
            steps=steps,
            spherical_step=self.spherical_step,
            source_step=self.source_step,
            source_step_convergance=CONVERGED,
            update_stats_every_k=UPDATE_EVERY,
        )
        model = adopt(show_labels(answer, oracle.victim.num_classes, started.x))
        found: Images = walk.run(model, started.x, oracle.y, starting_points=started.x_adv)
        return found
