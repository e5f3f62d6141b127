"""The bridge to torchattacks: `torchattacks:PGD(steps=20)`."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from robench.bridges.foreign import ForeignAttack, Traits, check_name, import_package, make_class, show
from robench.defense import Defense
from robench.errors import UsageError
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

LINF: Final = (
    *("BIM", "DIFGSM", "EOTPGD", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM", "PGD", "PGDRS", "PIFGSM", "PIFGSMPP"),
    *("RFGSM", "SINIFGSM", "TIFGSM", "TPGD", "UPGD", "VMIFGSM", "VNIFGSM"),
)
TRAITS: Final[dict[str, Traits]] = {
    **dict.fromkeys(LINF, Traits(("linf",), "gradient", "budget")),
    **dict.fromkeys(("PGDL2", "PGDRSL2"), Traits(("l2",), "gradient", "budget")),
    **dict.fromkeys(("APGD", "APGDT"), Traits(("linf", "l2"), "gradient", "budget")),
    "AutoAttack": Traits(("linf", "l2"), "gradient", "budget", one_by_one=True),
    "FAB": Traits(("linf", "l2", "l1"), "gradient", "minimal", one_by_one=True),
    "CW": Traits(("l2",), "gradient", "minimal"),
    "DeepFool": Traits(("l2",), "gradient", "minimal", one_by_one=True),
    "EADEN": Traits(("l2",), "gradient", "minimal"),
    "EADL1": Traits(("l1",), "gradient", "minimal"),
    "JSMA": Traits(("l0",), "gradient", "minimal", one_by_one=True),
    "SparseFool": Traits(("l0",), "gradient", "minimal", one_by_one=True),
    "SPSA": Traits(("linf",), "scores", "budget"),
    "Square": Traits(("linf", "l2"), "scores", "budget", one_by_one=True),
    "OnePixel": Traits(("l0",), "scores", "budget", one_by_one=True),
    "Pixle": Traits(("l0",), "scores", "minimal", one_by_one=True),
}
"""Torchattacks states neither norm nor access nor goal of its attacks in a way that code can read."""
FILLED: Final = ("eps", "max_epsilon", "pixels", "norm", "n_classes", "seed")
"""Options that the threat model, the defense and the run's seed settle."""
REFUSED: Final = {
    "GN": "its noise is bounded in no norm; 'noise' draws from the ball",
    "LGV": "it trains models of its own",
    "MultiAttack": "give its attacks to the run one by one",
    "VANILA": "it does nothing",
}
COLOUR: Final = ("PIFGSM", "PIFGSMPP", "TIFGSM")
"""Attacks that smooth three channels, not more and not fewer."""
JSMA_CLASSES: Final = 10
"""JSMA aims at the next of ten classes."""


@dataclass(frozen=True)
class TorchattacksAttack(ForeignAttack):
    """Base of the attacks of torchattacks (Kim 2020, arXiv 2010.01950); see ForeignAttack."""

    bridge = "torchattacks"

    def check_fit(self, defense: Defense, dataset: str) -> None:
        """Checks that the images have the channels and the defense the classes that the attack takes for granted.

        Raises:
            UsageError: they have not.
        """
        del dataset
        kind, channels = self.foreign.__name__, defense.input_shape[0]
        if kind in COLOUR and channels != 3:
            raise UsageError(f"{self.name} needs images of 3 channels; the defense takes {channels}. Choose another")
        if kind == "JSMA" and defense.num_classes < JSMA_CLASSES:
            raise UsageError(
                f"{self.name} needs at least {JSMA_CLASSES} classes; the defense has {defense.num_classes}. "
                "Choose another"
            )

    def _run(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Tensor:
        known = inspect.signature(self.foreign.__init__).parameters
        fill: dict[str, Any] = {
            "eps": threat.eps,
            "max_epsilon": threat.eps,
            "pixels": int(threat.eps),
            "norm": threat.norm.capitalize(),
            "n_classes": victim.num_classes,
        }
        if "seed" in known:  # which it then seeds torch with
            fill["seed"] = int(torch.randint(2**31, ()))
        filled = {name: value for name, value in fill.items() if name in known}
        attack = self.foreign(show(victim, self.access, x), **self._options(), **filled)
        if "seed" not in known:
            return attack(x, y)
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # it seeds torch with what it was given
            return attack(x, y)


@functools.cache
def find_attack(name: str) -> type[TorchattacksAttack]:
    """The class of `torchattacks:name`.

    Raises:
        UsageError: torchattacks is not installed, has no such attack, or has one that cannot be bridged.
    """
    package = import_package("torchattacks")
    known = {key for key in TRAITS if hasattr(package, key)}
    unknown = dict.fromkeys(set(package.__all__) - set(TRAITS), "its norm and access are not known to robench")
    check_name("torchattacks", name, known, {**unknown, **REFUSED})
    hidden = ("model", *FILLED)
    found: type[TorchattacksAttack] = make_class(TorchattacksAttack, name, getattr(package, name), TRAITS[name], hidden)
    return found
