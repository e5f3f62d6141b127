"""Contract tests and toy models with known answers, for authors of defenses and attacks. Needs pytest.

from robench.testing import AttackContract
class TestMine(AttackContract):
    attack = Mine(steps=5)

from robench.testing import DefenseContract
class TestMine(DefenseContract):
    def build(self) -> Defense:
        return load_defense("mine")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("robench.testing needs pytest: pip install pytest", name=error.name) from error

if TYPE_CHECKING:
    from robench.testing.attacks import AttackContract as AttackContract
    from robench.testing.defenses import DefenseContract as DefenseContract
    from robench.testing.toys import ConvToy as ConvToy
    from robench.testing.toys import LinearToy as LinearToy
    from robench.testing.toys import NoisyLinearToy as NoisyLinearToy
    from robench.testing.toys import NullDefense as NullDefense

_HOMES = {
    "AttackContract": "attacks",
    "ConvToy": "toys",
    "DefenseContract": "defenses",
    "LinearToy": "toys",
    "NoisyLinearToy": "toys",
    "NullDefense": "toys",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - the names of _HOMES are strings

pytest.register_assert_rewrite("robench.testing.attacks", "robench.testing.defenses")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module robench.testing has no attribute {name!r}")
    return getattr(importlib.import_module(f"robench.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
