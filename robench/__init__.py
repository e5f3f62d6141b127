"""robench: adversarial robustness of image classifiers, as numbers that can be re-checked.

Public names are imported when first used, so that `import robench` and the command line stay quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robench.attack import Attack as Attack
    from robench.audit import Audit as Audit
    from robench.audit import audit as audit
    from robench.bpda import bpda as bpda
    from robench.data import load_data as load_data
    from robench.defense import Defense as Defense
    from robench.defense import wrap as wrap
    from robench.errors import DataError as DataError
    from robench.errors import PluginError as PluginError
    from robench.errors import RobenchError as RobenchError
    from robench.errors import UsageError as UsageError
    from robench.evaluate import evaluate as evaluate
    from robench.registry import load_attack as load_attack
    from robench.registry import load_defense as load_defense
    from robench.result import Evaluation as Evaluation
    from robench.settings import Settings as Settings
    from robench.threat import ThreatModel as ThreatModel
    from robench.victim import Victim as Victim

__version__ = "0.1.0"

_HOMES = {
    "Attack": "attack",
    "Audit": "audit",
    "DataError": "errors",
    "Defense": "defense",
    "Evaluation": "result",
    "PluginError": "errors",
    "RobenchError": "errors",
    "Settings": "settings",
    "ThreatModel": "threat",
    "UsageError": "errors",
    "Victim": "victim",
    "audit": "audit",
    "bpda": "bpda",
    "evaluate": "evaluate",
    "load_attack": "registry",
    "load_data": "data",
    "load_defense": "registry",
    "wrap": "defense",
}

__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604 - the names of _HOMES are strings


class _Package(ModuleType):
    """This package's own type: keeps `robench.evaluate` the function, also after the submodule was imported.

    The import system binds each submodule as an attribute of its package, here over the public function of that name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module robench has no attribute {name!r}")
    value = getattr(importlib.import_module(f"robench.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
