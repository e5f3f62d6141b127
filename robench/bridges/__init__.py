"""Bridges: any attack of foolbox or torchattacks behind the same Victim, query budget and judge.

`foolbox:LinfPGD(steps=20)` and `torchattacks:PGD(steps=20)` are names like any other. The class that a name stands for
is made on demand: a frozen dataclass whose options are those of the foreign constructor.
"""

from __future__ import annotations

import importlib
from typing import Final

from robench.bridges.foreign import ForeignAttack
from robench.errors import UsageError

BRIDGES: Final = ("foolbox", "torchattacks")


def find_attack(package: str, name: str) -> type[ForeignAttack]:
    """The class of `package:name`; asked twice, it is the same class.

    Raises:
        UsageError: the package is not installed, has no such attack, or has one that cannot be bridged.
    """
    if package not in BRIDGES:
        raise UsageError(f'there is no bridge "{package}:"; there are: {", ".join(BRIDGES)}')
    found: type[ForeignAttack] = importlib.import_module(f"robench.bridges.{package}").find_attack(name)
    return found
