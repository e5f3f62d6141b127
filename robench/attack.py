"""The attack: a frozen dataclass of hyperparameters that turns images into adversarial ones through a Victim."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Literal, get_args

from robench.errors import PluginError, UsageError
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Labels

if TYPE_CHECKING:
    from robench.defense import Defense
    from robench.victim import Victim

Access = Literal["none", "decisions", "scores", "gradient"]
Goal = Literal["budget", "minimal"]
Randomness = Literal["fresh", "fixed", "off"]
ACCESS_LEVELS: Final[tuple[str, ...]] = ("none", "decisions", "scores", "gradient")
"""What an attack may ask of the victim; each level includes those before it."""


@dataclass(frozen=True)
class Attack:
    """Base of all attacks. Subclasses are frozen dataclasses, so that a run can record and replay them.

    Attributes:
        name: the registry name.
        norms: the norms it supports.
        access: the most it asks of the victim: `none`, `decisions`, `scores` or `gradient`.
        goal: `budget` (any error within eps) or `minimal` (the nearest error).
        draws: True if it draws random numbers of its own.
        randomness: what the attack does with the randomness of a defense, an option of every attack: `fresh` draws in
            each query; `fixed`: the same draws in each query of a batch (common random numbers); `off`: none at all,
            for a defense that offers `without_randomness`. The judge always draws afresh.
    """

    name: ClassVar[str] = ""
    norms: ClassVar[tuple[str, ...]] = ()
    access: ClassVar[Access] = "gradient"
    goal: ClassVar[Goal] = "budget"
    draws: ClassVar[bool] = False

    randomness: Randomness = field(default="fresh", kw_only=True)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Returns adversarial images, one for each of x, within the threat model.

        Args:
            victim: all that the attack gets of the defense.
            x: originals in [0, 1].
            y: their labels.
            threat: norm and bound; of a minimal-norm attack, which searches once for all bounds, the largest of a run,
                and on a randomized defense the whole box.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__")

    def check_fit(self, defense: Defense, dataset: str) -> None:
        """Checks before any work what depends on the defense: its classes, its shape, what else the attack needs.

        Args:
            defense: what will be attacked.
            dataset: the dataset's name; empty for images handed over as tensors.

        Raises:
            UsageError: the attack cannot serve this defense.
        """

    def passes(self) -> int:
        """Expected forward plus backward passes per image, before EOT; only the time left is guessed from it."""
        return 1

    def passes_in(self, norm: str) -> int:
        """As `passes`; an attack whose cost depends on the norm overrides this one."""
        del norm
        return self.passes()

    def passes_with_eot(self, norm: str, eot: int) -> int:
        """As `passes_in`, times `eot` draws; an attack whose queries have fewer overrides it."""
        return eot * self.passes_in(norm)

    def spec(self) -> str:
        """The name with all options that are not at their default: `pgd(steps=100)`. It replays the attack."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def check_traits(self) -> None:
        """Checks the declared traits.

        Raises:
            PluginError: names the trait that is missing or unknown.
            UsageError: there is no such randomness.
        """
        if self.randomness not in get_args(Randomness):
            raise UsageError(
                f'{self.name}: randomness must be one of {", ".join(get_args(Randomness))}; got "{self.randomness}"'
            )
        problems = []
        if not self.name:
            problems.append("name is empty")
        if not self.norms or not set(self.norms) <= set(NORMS):
            problems.append(f"norms must be some of {', '.join(NORMS)}")
        if self.access not in ACCESS_LEVELS:
            problems.append(f"access must be one of {', '.join(ACCESS_LEVELS)}")
        if self.goal not in ("budget", "minimal"):
            problems.append("goal must be budget or minimal")
        if problems:
            raise PluginError(f'attack "{self.name or type(self).__name__}": {"; ".join(problems)}')

    def check_threat(self, threat: ThreatModel) -> None:
        """Checks before any work that the attack can serve the threat model.

        Raises:
            UsageError: it does not support the norm.
        """
        if threat.norm not in self.norms:
            raise UsageError(
                f'attack "{self.name}" supports {", ".join(self.norms)}; the threat model is {threat.norm}. '
                f"Choose another with 'robench list attacks --norm {threat.norm}'"
            )
