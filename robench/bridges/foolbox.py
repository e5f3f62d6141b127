"""The bridge to foolbox: `foolbox:LinfPGD(steps=20)`."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from robench.attack import Access
from robench.bridges.foreign import ForeignAttack, ShownModel, Traits, check_name, import_package, make_class, show
from robench.errors import UsageError
from robench.threat import NORMS, ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

NORM_OF: Final[dict[float, str]] = {0: "l0", 1: "l1", 2: "l2", math.inf: "linf"}
DECISIONS: Final = (
    "additive_noise",
    "binarization",
    "blended_noise",
    "blur",
    "boundary_attack",
    "contrast",
    "contrast_min",
    "hop_skip_jump",
    "inversion",
    "pointwise",
    "saltandpepper",
)
"""Foolbox's modules of attacks that ask for decisions only; all others take gradients."""
HIDDEN: Final = ("distance", "constraint", "init_attack", "tensorboard")
"""Options that are no numbers or words, and those that the threat model settles."""
REFUSED: Final = {
    "BinarizationRefinementAttack": "it refines the result of another attack",
    "DatasetAttack": "it must be fed other images first",
    "GenAttack": "it needs a target class",
    "SpatialAttack": "rotations and shifts are bounded in no norm",
}


@dataclass(frozen=True)
class FoolboxAttack(ForeignAttack):
    """Base of the attacks of foolbox (Rauber et al. 2017, arXiv 1707.04131); see ForeignAttack."""

    bridge = "foolbox"

    def _run(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Tensor:
        options = self._options()
        if "constraint" in inspect.signature(self.foreign.__init__).parameters:
            options["constraint"] = threat.norm
        attack, model = self.foreign(**options), adopt(show(victim, self.access, x))
        if self.goal == "minimal":
            return attack.run(model, x, y)
        return attack.run(model, x, y, epsilon=threat.eps)


def adopt(model: ShownModel) -> Any:
    """The model as foolbox wants it."""
    return import_package("foolbox").PyTorchModel(model, bounds=(0, 1), device=model.anchor.device)


@functools.cache
def find_attack(name: str) -> type[FoolboxAttack]:
    """The class of `foolbox:name`.

    Raises:
        UsageError: foolbox is not installed, has no such attack, has one that cannot be bridged, or one
            that needs numba, which is not installed.
    """
    attacks = import_package("foolbox").attacks
    known = {key for key, value in vars(attacks).items() if inspect.isclass(value) and not inspect.isabstract(value)}
    check_name("foolbox", name, known - set(REFUSED), REFUSED)
    foreign = getattr(attacks, name)
    if issubclass(foreign, attacks.brendel_bethge.BrendelBethgeAttack) and importlib.util.find_spec("numba") is None:
        raise UsageError(f'attack "foolbox:{name}" needs numba: pip install numba')
    found: type[FoolboxAttack] = make_class(FoolboxAttack, name, foreign, _traits(foreign), HIDDEN)
    return found


def _traits(foreign: Any) -> Traits:
    base = import_package("foolbox").attacks.base
    access: Access = "decisions" if foreign.__module__.rpartition(".")[2] in DECISIONS else "gradient"
    return Traits(
        _norms(foreign, base), access, "minimal" if issubclass(foreign, base.MinimizationAttack) else "budget"
    )


def _norms(foreign: Any, base: Any) -> tuple[str, ...]:
    """The norm of an attack's distance; all norms where the distance is an option."""
    if "constraint" in inspect.signature(foreign.__init__).parameters:
        return ("linf", "l2")
    if issubclass(foreign, base.FlexibleDistanceMinimizationAttack):
        return NORMS
    distance = foreign().distance if isinstance(foreign.distance, property) else foreign.distance
    return (NORM_OF[distance.p],)
