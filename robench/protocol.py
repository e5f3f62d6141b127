"""Named, versioned lists of attacks, and the bounds that the field uses for each dataset."""

from __future__ import annotations

from typing import Final

from robench.errors import UsageError

PROTOCOLS: Final[dict[str, tuple[str, ...]]] = {
    "quick-1": ("fgsm", "pgd"),
    "standard-0": (
        "fgsm",
        "pgd(steps=100, restarts=5)",
        "pgd(steps=100, restarts=5, loss='margin')",
        "pgd(steps=100, restarts=5, loss='dlr')",
    ),
}
"""Every attack that reads gradients runs along all gradient modes of the defense. `standard-0` is provisional: the
strongest list of this version, to be replaced by `standard-1`, which will have APGD, FMN and Square."""

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


def find_protocol(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The versioned name and the attacks of a protocol; `standard` means its newest version. None if there is none."""
    if name in PROTOCOLS:
        return name, PROTOCOLS[name]
    versions = [key for key in PROTOCOLS if key.rpartition("-")[0] == name]
    if not versions:
        return None
    newest = max(versions, key=lambda key: int(key.rpartition("-")[2]))
    return newest, PROTOCOLS[newest]


def get_protocol(name: str) -> tuple[str, tuple[str, ...]]:
    """As `find_protocol`.

    Raises:
        UsageError: there is none of that name.
    """
    found = find_protocol(name)
    if found is None:
        raise UsageError(f'there is no protocol "{name}"; there are: {", ".join(PROTOCOLS)}')
    return found


def default_eps(dataset: str, norm: str) -> str:
    """The bound that the field uses for a dataset.

    Raises:
        UsageError: there is no customary one; give --eps.
    """
    if (dataset, norm) not in DEFAULT_EPS:
        raise UsageError(f'no customary eps for dataset "{dataset}" in {norm}; give one with --eps')
    return DEFAULT_EPS[dataset, norm]
