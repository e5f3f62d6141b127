"""Every attack of the registry keeps the contract: a new file in attacks/ is tested by being there."""

import pytest

from robench.registry import load_attack, names
from robench.testing import AttackContract

VARIANTS = ("fgsm(loss='margin')", "pgd(steps=4, restarts=2)", "pgd(steps=4, keep='last')", "pgd(steps=6, loss='dlr')")
"""Options that run other code than the defaults."""


class TestAttack(AttackContract):
    @pytest.fixture(autouse=True, params=[*names("attack"), *VARIANTS])
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.attack = load_attack(request.param)


def test_the_registry_has_attacks() -> None:
    assert {"fgsm", "pgd"} <= set(names("attack"))
