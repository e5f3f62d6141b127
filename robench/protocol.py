"""Named, versioned lists of attacks, and the bounds that the field uses for each dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from robench.errors import UsageError


@dataclass(frozen=True)
class Protocol:
    """A named, versioned list of attacks.

    Attributes:
        name: with its version, as in the CSV: `standard-1`. Any change to the lists makes a new version.
        attacks: what is run in each norm, cheap ones first. Those that read gradients run along all gradient modes.
        cascade: whether an attack sees only the images that are still right after those before it.
        judge_repeats: fresh answers behind each verdict on a randomized defense.
        sources: built-in defenses from which adversarial images are transferred, as far as they have weights for the
            dataset and are not the defense itself.
        full: whether its figure may stand on a board of others; not of a first look, nor without gradients.
    """

    name: str
    attacks: Mapping[str, tuple[str, ...]]
    cascade: bool = True
    judge_repeats: int = 20
    sources: tuple[str, ...] = ()
    full: bool = True

    def attacks_for(self, norm: str) -> tuple[str, ...]:
        """The attacks in a norm.

        Raises:
            UsageError: the protocol has none there.
        """
        if norm not in self.attacks:
            raise UsageError(f"protocol {self.name} has attacks in {', '.join(self.attacks)}; the norm is {norm}")
        return self.attacks[norm]


_SMOOTH: Final = ("apgd", "apgd(loss='dlr', targets=9)", "fmn", "square(queries=2000)")
_SMOOTH_LONG: Final = (
    "apgd(restarts=3)",
    "apgd(loss='dlr', targets=9)",
    "fmn(steps=500)",
    "square",
    "pgd(steps=200, restarts=5, loss='margin')",
    "hopskipjump",
)
_STANDARD: Final = {
    "linf": _SMOOTH,
    "l2": _SMOOTH,
    "l1": ("pgd(steps=100, restarts=3)", "fmn(steps=200)"),
    "l0": ("fmn(steps=200)", "pointwise"),
}
_THOROUGH: Final = {
    "linf": _SMOOTH_LONG,
    "l2": (*_SMOOTH_LONG, "cw", "boundary"),
    "l1": ("pgd(steps=200, restarts=10)", "fmn(steps=1000)"),
    "l0": ("fmn(steps=1000)", "pointwise(restarts=10)"),
}
_BLACKBOX: Final = {
    "linf": ("noise", "square", "hopskipjump"),
    "l2": ("noise", "square", "hopskipjump"),
    "l0": ("noise", "pointwise"),
}
PROTOCOLS: Final[dict[str, Protocol]] = {
    protocol.name: protocol
    for protocol in (
        Protocol("quick-1", dict.fromkeys(("linf", "l2"), ("fgsm", "pgd")), cascade=False, full=False),
        Protocol("blackbox-1", _BLACKBOX, judge_repeats=100, sources=("convnet", "convnet_at"), full=False),
        Protocol("standard-1", _STANDARD, judge_repeats=100),
        Protocol("thorough-1", _THOROUGH, judge_repeats=100, sources=("convnet", "convnet_at", "shortrun")),
    )
}

DEFAULT_EPS: Final[dict[tuple[str, str], str]] = {
    ("mnist", "linf"): "0.3",
    ("fashion_mnist", "linf"): "0.1",
    ("cifar10", "linf"): "8/255",
    ("svhn", "linf"): "8/255",
    ("mnist", "l2"): "2",
    ("fashion_mnist", "l2"): "1.5",
    ("cifar10", "l2"): "0.5",
    ("svhn", "l2"): "0.5",
}


def find_protocol(name: str) -> Protocol | None:
    """The protocol of that name; `standard` means its newest version. None if there is none."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    versions = [key for key in PROTOCOLS if key.rpartition("-")[0] == name]
    return PROTOCOLS[max(versions, key=lambda key: int(key.rpartition("-")[2]))] if versions else None


def get_protocol(name: str) -> Protocol:
    """As `find_protocol`.

    Raises:
        UsageError: there is none of that name.
    """
    found = find_protocol(name)
    if found is None:
        raise UsageError(_unknown(name))
    return found


def _unknown(name: str) -> str:
    from robench.registry import find_near, names

    is_attack = name.partition("(")[0] in names("attack")
    hint = f"it is an attack: --attack {name}" if is_attack else find_near(name, PROTOCOLS).strip()
    return f'there is no protocol "{name}"; there are: {", ".join(PROTOCOLS)}' + (f"; {hint}" if hint else "")


def default_eps(dataset: str, norm: str) -> str:
    """The bound that the field uses for a dataset.

    Raises:
        UsageError: there is no customary one; give --eps.
    """
    if (dataset, norm) not in DEFAULT_EPS:
        raise UsageError(f'no customary eps for dataset "{dataset}" in {norm}; give one with --eps')
    return DEFAULT_EPS[dataset, norm]
