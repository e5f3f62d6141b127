"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from robench.attack import Attack
from robench.defense import Defense
from robench.losses import check_classes, get_loss
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim


@dataclass(frozen=True)
class FGSM(Attack):
    """One step of length eps along the steepest ascent of the loss.

    Goodfellow et al. 2015 (arXiv 1412.6572), section 4; in l2 the step follows the normalised gradient. Norms: linf,
    l2. No guarantee; far weaker than `pgd`: a defense that only withstands this one is not robust.
    Cost per image: one forward and one backward pass, times EOT.

    Args:
        loss: `ce`, `margin` or `dlr`.
    """

    name = "fgsm"
    norms = ("linf", "l2")
    access = "gradient"
    goal = "budget"

    loss: str = "ce"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: there is no such loss.
        """
        get_loss(self.loss)

    def check_fit(self, defense: Defense, dataset: str) -> None:
        """Checks that the defense has the classes that the loss needs.

        Raises:
            UsageError: too few of them.
        """
        check_classes(self.name, self.loss, defense.num_classes, targeted=False)

    def passes(self) -> int:
        """One forward, one backward."""
        return 2

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        _, grad = victim.loss_grad(x, y, self.loss)
        return threat.project(x, x + threat.eps * threat.steepest(grad))
