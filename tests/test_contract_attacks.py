"""Every attack of the registry keeps the contract: a new file in attacks/ is tested by being there."""

from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from robench.registry import load_attack, names
from robench.testing import AttackContract

SURROGATE = f"{Path(__file__).with_name('surrogates.py')}:Chameleon"
VARIANTS = (
    "apgd(steps=20, loss='dlr', targets=3)",
    "apgd(steps=20, restarts=2, loss='margin')",
    "fgsm(loss='margin')",
    "pgd(steps=4, restarts=2)",
    "pgd(steps=4, keep='last')",
    "pgd(steps=25, restarts=2, loss='dlr')",
    "pgd(steps=6, loss='margin', targets=3)",
    "pgd(steps=8, momentum=0.9)",
)
"""Options that run other code than the defaults."""

QUICK = {
    "apgd": "apgd(steps=20)",
    "boundary": "boundary(queries=100)",
    "cw": "cw(steps=10, binary_search_steps=2)",
    "fmn": "fmn(steps=10)",
    "hopskipjump": "hopskipjump(queries=200)",
    "noise": "noise(tries=20)",
    "square": "square(queries=50)",
    "transfer": f"transfer(source='{SURROGATE}', attack='pgd(steps=5)')",
}
"""Options for the rules that ask for no strength, where the defaults are slow."""
STRONG = {
    "boundary": "boundary(queries=1000)",
    "cw": "cw(steps=50, binary_search_steps=5)",
    "pointwise": "pointwise(restarts=3)",
    "square": "square(queries=1000)",
    "transfer": f"transfer(source='{SURROGATE}', attack='fmn(steps=30)')",
}
"""Options instead of the defaults for the rules that do ask for it."""
ASKS_FOR_STRENGTH = {
    "test_known_distance",
    "test_minimal_norm_finds_the_nearest_error",
    "test_success_does_not_fall_with_the_bound",
}
WEAK = {"noise": 3.0, "pointwise": 2.5}
"""The multiples of the known distance at which attacks that are weak by design succeed; see their docstrings."""
WITHIN = {"pointwise": 3.0}
"""Likewise for the nearest errors of minimal-norm attacks; what `pointwise` reaches in each norm: test_pointwise.py."""


class TestAttack(AttackContract):
    @pytest.fixture(autouse=True, params=[*names("attack"), *VARIANTS])
    def choose(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        options = STRONG if request.node.originalname in ASKS_FOR_STRENGTH else QUICK
        self.attack = load_attack(options.get(request.param, request.param))
        monkeypatch.setattr(self, "succeeds_at", WEAK.get(request.param, self.succeeds_at))
        monkeypatch.setattr(self, "within", WITHIN.get(request.param, self.within))
        # Types are checked under the other rules; here that would double the time of a thousand queries.
        jaxtyping.config.update("jaxtyping_disable", options is STRONG)
        yield
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_lists_name_attacks_and_rules_that_there_are() -> None:
    assert {"fgsm", "pgd", *QUICK, *STRONG, *WEAK, *WITHIN} <= set(names("attack"))
    assert all(hasattr(AttackContract, rule) for rule in ASKS_FOR_STRENGTH)
