"""Every defense of the registry keeps the contract: a new folder in defenses/ is tested by being there."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest

from robench.defense import Defense
from robench.registry import load_defense, names, resolve
from robench.testing import DefenseContract
from robench.weights import shipped_weights

CHEAP: dict[str, dict[str, Any]] = {"shortrun": {"n_chains": 1, "steps": 3}}
"""Options that keep a slow defense's tests short; the code that they run is the same."""


def build_cheaply(name: str) -> Defense:
    """The defense with its shipped weights, or untrained where none are shipped: the contract holds for both."""
    options = CHEAP.get(name, {})
    cls = cast("type[Defense]", resolve("defense", name))
    if cls.needs_weights and "fashion_mnist" not in shipped_weights(cls):
        return cls(**options).freeze()
    return load_defense(name, **options)


class TestDefense(DefenseContract):
    @pytest.fixture(autouse=True, params=names("defense"))
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param

    def build(self) -> Defense:
        return build_cheaply(self.name)


def test_the_registry_has_defenses() -> None:
    assert {"convnet", "shortrun"} <= set(names("defense"))


IMPORT_ALL = """
import random, socket, sys
import numpy as np, torch
def state():
    return (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
def refuse(*args, **kwargs):
    raise AssertionError("an import opens a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import robench.evaluate, robench.registry as registry
before = state()
for kind in ("defense", "attack"):
    for name in registry.names(kind):
        registry.resolve(kind, name)
        assert state() == before, f"importing {kind} {name} changes global state"
assert not torch.cuda.is_initialized(), "an import starts CUDA"
print("clean")
"""


def test_importing_a_plugin_needs_no_network_and_changes_no_global_state() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("clean", 0), done.stderr
