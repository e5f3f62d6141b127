"""How much the runs of an audit may cost: the usual effort, the reduced one, and who may use that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from robench.registry import is_shipped
from robench.settings import RANDOMIZED_EOT


@dataclass(frozen=True)
class Effort:
    """How much the runs may cost.

    Attributes:
        steps: gradient steps of the reference attack.
        queries: of the score attack.
        noise: random points in the ball for each image.
        directions: random directions and points of the local checks.
        judge_repeats: fresh answers behind each verdict on a randomized defense.
        local_draws: draws behind a loss of the local checks, which compare losses under the same draws.
        step_points: points on the way of a single step.
        constructed: images at which `binarisation` constructs an adversarial example; 0 leaves that check out.
        eot: draws in a gradient of a randomized defense; whoever audits chooses it, no defense reduces it.
    """

    steps: int
    queries: int
    noise: int
    directions: int
    judge_repeats: int
    local_draws: int
    step_points: int
    constructed: int
    eot: int = RANDOMIZED_EOT

    @property
    def reduced(self) -> dict[str, int]:
        """What is less than usual."""
        usual = asdict(USUAL)
        return {name: value for name, value in self.to_json().items() if value < usual[name]}

    def to_json(self) -> dict[str, int]:
        """As JSON types, without `eot`, which is a fact of its own."""
        return {name: value for name, value in asdict(self).items() if name != "eot"}

    def __str__(self) -> str:
        usual = asdict(USUAL)
        less = [f"{value} {WORDS[name]} (usual: {usual[name]})" for name, value in self.reduced.items()]
        return f"reduced effort, as the defense asks for: {', '.join(less)}" if less else "the usual effort"


WORDS: Final = {
    "steps": "steps of PGD",
    "queries": "queries of square",
    "noise": "random points",
    "directions": "random directions",
    "judge_repeats": "answers of a randomized defense",
    "local_draws": "draws behind a loss",
    "step_points": "points of a single step",
    "constructed": "constructed examples",
}
USUAL: Final = Effort(20, 300, 100, 20, 20, 10, 8, 24)
REDUCED: Final = Effort(8, 30, 5, 5, 6, 3, 4, 0)
"""For a defense that names a cheaper first look of its own: a pass of it costs a hundred times that of a small net."""


def read_effort(audit: Mapping[str, Any]) -> Effort | None:
    """The effort behind an audit's findings, as `Audit.to_json` tells it; None in those of before it was told.

    Raises:
        TypeError: it is told in another form.
    """
    if "effort" not in audit:
        return None
    effort = Effort(**audit["effort"])
    if not all(isinstance(value, int) for value in asdict(effort).values()):
        raise TypeError("an effort is told in whole numbers")
    return effort


def may_have_effort(defense: str, effort: Effort | None) -> bool:
    """Whether a row may rest on an audit of that effort: the usual one, or any of a defense that robench ships.

    Args:
        defense: how the command line finds it; "" if it was handed over by a caller.
        effort: of the audit; None where it is not told.
    """
    return is_shipped(defense) or (effort is not None and not effort.reduced)
