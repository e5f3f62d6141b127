"""Random noise, the best of many draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robench.attack import Attack
from robench.errors import UsageError
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim


@dataclass(frozen=True)
class Noise(Attack):
    """Draws images uniformly from the ball until one is misclassified: the floor under every attack.

    A defense that loses to noise is not robust at all, and an attack that does not beat it has failed (Athalye et al.
    2018, arXiv 1802.00420, section 3: random search that finds what gradients miss is a sign of masking). Norms: linf,
    l2, l1 (uniform in the ball, then clipped to the box), l0 (random pixels, each replaced by a random colour). No
    guarantee; weak by design: on the linear toy, of 16 pixels, 100 draws need 3 times the known
    distance, and the factor grows with the number of pixels.
    Cost per image: at most `tries` forward passes, times EOT; an image of a deterministic defense costs nothing more
    once it is misclassified.

    It asks for decisions only, so it cannot tell a near miss from a far one. On a randomized defense, whose decision is
    the majority of the EOT draws, a wrong answer may be luck: the same image is then asked again as long as the answer
    stays wrong, and the image with the longest run of wrong answers is kept. An image never misclassified keeps the
    last draw.

    Args:
        tries: answers asked for each image.
    """

    name = "noise"
    norms = ("linf", "l2", "l1", "l0")
    access = "decisions"
    goal = "budget"
    draws = True

    tries: int = 100

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: no try.
        """
        if self.tries < 1:
            raise UsageError(f"noise: tries must be at least 1; got {self.tries}")

    def passes(self) -> int:
        """One forward for each try."""
        return self.tries

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        search = self._confirm if victim.randomized else self._find
        return search(victim, x, y, threat)

    def _find(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The first draw that is misclassified, of a deterministic defense."""
        x_adv, rows = x.clone(), torch.arange(len(x), device=x.device)
        asked = victim
        for _ in range(self.tries):
            x_adv[rows] = threat.random_start(x[rows])
            wrong = asked.labels(x_adv[rows]) != y[rows]
            if bool(wrong.any()):
                rows = rows[~wrong]
                if len(rows) == 0:
                    break
                asked = victim.subset(rows)
        return x_adv

    def _confirm(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The draw with the longest run of wrong answers, of a randomized defense."""
        drawn = best = x
        run = longest = torch.zeros_like(y)
        for _ in range(self.tries):
            drawn = torch.where((run > 0).view(-1, 1, 1, 1), drawn, threat.random_start(x))
            run = torch.where(victim.labels(drawn) != y, run + 1, 0)
            better = (run > longest) | (longest == 0)
            best = torch.where(better.view(-1, 1, 1, 1), drawn, best)
            longest = torch.maximum(run, longest)
        return best
