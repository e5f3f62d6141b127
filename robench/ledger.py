"""Queries per example, and the best images that an attack asked about before its budget cut it off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from robench.attack import Goal
from robench.errors import BudgetExhausted, PluginError
from robench.losses import margin
from robench.threat import ThreatModel
from robench.types import Images, Labels, Logits, PerExample


@dataclass
class Watched:
    """The best images within the bound that an attack asked about so far.

    For the goal `budget` those with the largest margin. For `minimal` the nearest errors, and the largest margin only
    while there is no error: what is within the largest of several bounds has to serve for the smaller ones too.

    Attributes:
        originals: the images under attack.
        labels: their labels.
        threat: the bound.
        goal: of the attack.
        best: of each example the best images, at first the originals.
        margin: their margins; -inf where nothing was asked yet.
        distance: their distances from the originals.
    """

    originals: Images
    labels: Labels
    threat: ThreatModel
    goal: Goal
    best: Images
    margin: PerExample
    distance: PerExample

    @classmethod
    def begin(cls, x: Images, y: Labels, threat: ThreatModel, goal: Goal) -> Watched:
        """Nothing was asked yet."""
        unknown = torch.full((len(x),), -torch.inf, device=x.device)
        return cls(x, y, threat, goal, x.clone(), unknown, torch.zeros_like(unknown))

    def see(self, rows: Tensor, images: Images, logits: Logits) -> None:
        """Keeps what is better: images of the examples `rows`, which are all different, with the logits on them."""
        margins, originals = margin(logits, self.labels[rows]), self.originals[rows]
        distances = self.threat.distance(originals, images)
        best_margins, best_distances = self.margin[rows], self.distance[rows]
        if self.goal == "minimal":
            margins = torch.where(distances > 0, margins, margins.clamp_max(0))  # the original itself is no find
            nearer = (margins > 0) & (distances < best_distances)
            better = torch.where(best_margins > 0, nearer, margins > best_margins)
        else:
            better = margins > best_margins
        better &= self.threat.contains(originals, images)
        chosen = rows[better.cpu()]
        self.best[chosen], self.margin[chosen], self.distance[chosen] = (
            images[better],
            margins[better],
            distances[better],
        )

    def weakest(self, rows: Tensor, draws: Float[Tensor, "draws b k"]) -> Logits:
        """Of each image of a query about the examples `rows` the logits of the draw that is least wrong."""
        y = self.labels[rows].repeat(draws.shape[1] // len(rows))
        margins = torch.stack([margin(logits, y) for logits in draws])
        return draws[margins.argmin(0), torch.arange(len(y), device=draws.device)]


@dataclass
class Ledger:
    """Queries per example, and the best images seen where a budget may cut the attack off.

    Attributes:
        forwards: forward passes of each example.
        backwards: backward passes of each example.
        budget: the most forwards plus backwards of one example; None: no limit.
        watched: the best images so far; None where no budget may cut the attack off.
        on_passes: called with the number of passes that were made, after each batch of them.
    """

    forwards: Tensor
    backwards: Tensor
    budget: int | None = None
    watched: Watched | None = None
    on_passes: Callable[[int], None] | None = field(default=None, repr=False)

    @property
    def best(self) -> Images | None:
        """The best images so far within the bound, as far as they are watched."""
        return None if self.watched is None else self.watched.best

    def forget(self, rows: Tensor) -> None:
        """Forgets how good the best images of the examples `rows` were, where that is what counts."""
        if self.watched is not None and self.watched.goal == "budget":
            self.watched.margin[rows] = -torch.inf

    def charge(self, rows: Tensor, count: int, *, forwards: int, backwards: int) -> None:
        """Counts a query about the examples `rows`.

        Args:
            rows: the examples, all different.
            count: images in the query: one or several candidates of each example.
            forwards: forward passes of each image.
            backwards: backward passes of each image.

        Raises:
            PluginError: the images are not as many for each example.
            BudgetExhausted: one of them would exceed the budget; nothing is counted.
        """
        candidates, rest = divmod(count, max(len(rows), 1))
        if rest or not candidates or not len(rows):
            raise PluginError(
                f"a query must have one row for each of the victim's {len(rows)} examples, or a multiple of that; "
                f"got {count}. Use victim.subset for some of them"
            )
        forwards, backwards = candidates * forwards, candidates * backwards
        if self.budget is not None:
            spent = (self.forwards + self.backwards)[rows].max()
            if int(spent) + forwards + backwards > self.budget:
                raise BudgetExhausted(f"query budget of {self.budget} passes per image is used up")
        self.forwards[rows] += forwards
        self.backwards[rows] += backwards

    def tell(self, passes: int) -> None:
        """Tells whoever hears of progress that so many passes were made."""
        if self.on_passes is not None:
            self.on_passes(passes)
