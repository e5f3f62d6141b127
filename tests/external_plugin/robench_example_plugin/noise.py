"""The best of several random draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robench import Attack, ThreatModel, UsageError, Victim
from robench.losses import margin
from robench.types import Images, Labels


@dataclass(frozen=True)
class ExampleNoise(Attack):
    """The best of `draws_tried` uniform draws from the ball, by the margin: a baseline that a real attack must beat.

    Norms: linf, l2. No guarantee; weak by design: on the linear toy 200 draws need 4 times the known distance.
    Cost per image: `draws_tried` forward passes, times EOT.

    Args:
        draws_tried: draws.
    """

    name = "example_noise"
    norms = ("linf", "l2")
    access = "scores"
    draws = True

    draws_tried: int = 10

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: no draw.
        """
        if self.draws_tried < 1:
            raise UsageError(f"example_noise: draws_tried must be at least 1; got {self.draws_tried}")

    def passes(self) -> int:
        """One forward for each draw."""
        return self.draws_tried

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        best, highest = x, torch.full((len(x),), -torch.inf, device=x.device)
        for _ in range(self.draws_tried):
            x_adv = threat.random_start(x)
            reached = margin(victim.logits(x_adv), y)
            best = torch.where((reached > highest).view(-1, 1, 1, 1), x_adv, best)
            highest = torch.maximum(highest, reached)
        return best
