"""The plugin under the contract tests of robench: `python -m pytest contract.py` where the plugin is installed."""

from typing import ClassVar

from robench_example_plugin.noise import ExampleNoise

from robench import Defense, load_defense
from robench.testing import AttackContract, DefenseContract


class TestExampleBlur(DefenseContract):
    def build(self) -> Defense:
        return load_defense("example_blur")


class TestExampleNoise(AttackContract):
    attack = ExampleNoise(draws_tried=200)
    succeeds_at: ClassVar[float] = 3.0
