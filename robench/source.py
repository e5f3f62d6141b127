"""The code of a defense by digest, which a run keeps: taken up again by other code, it would mix two defenses.

Of a defense from a file or a package the digests are of the files of its classes, of an object from Python of the
source of its classes and of their options. Code of torch, Python and robench has a version and is left out, and so is
what such code imports: the digest shows an edit, it does not prove that there was none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from robench.origin import UNTOLD

if TYPE_CHECKING:
    from torch import nn

    from robench.defense import Defense

VERSIONED: Final = {"robench", "torch", *sys.stdlib_module_names} - {"__main__"}
"""Packages whose code a run's versions tell of."""
OPTIONS: Final = "its options"
UNKNOWN: Final = ""
"""Stands for a digest where the source is not at hand, as that of a class typed into a shell."""


def digest_source(defense: Defense, name: str) -> dict[str, str]:
    """Digests of a defense's code, by file or class.

    Args:
        defense: the defense.
        name: by which `load_defense` finds it; empty for an object from Python.
    """
    classes = sorted(
        {cls for module in defense.modules() for cls in type(module).__mro__ if _is_tracked(cls)},
        key=lambda cls: (cls.__module__, cls.__qualname__),
    )
    if name:
        return _fold((Path(path).name, _digest_file(cls.__module__, path)) for cls, path in _files(classes).items())
    told = _fold((f"class {cls.__qualname__}", _digest_class(cls)) for cls in classes)
    options = [f"{path}: {found}" for path, module in defense.named_modules() if (found := _options(module))]
    return {**told, **({OPTIONS: _digest("\n".join(options).encode())} if options else {})}


def digest_class_code(cls: type) -> str:
    """The digest of the code of a class and those above it; `UNKNOWN` where a part of it is not at hand."""
    digests = [_digest_class(each) for each in cls.__mro__ if _is_tracked(each)]
    return UNKNOWN if UNKNOWN in digests else _digest(" ".join(digests).encode())


@functools.cache
def digest_own_code() -> str:
    """The digest of robench's code, its plugins and the cards of their weights, which an edit in a checkout changes."""
    found = hashlib.sha256()
    for package in ("robench", "robench.defenses", "robench.attacks"):
        spec = importlib.util.find_spec(package)
        for root in sorted(spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(path for path in Path(root).rglob("*") if path.suffix in (".py", ".json")):
                found.update(path.read_bytes())
    return found.hexdigest()


def find_edits(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names of what differs between two such digests; none where a run was stored without."""
    if not before:
        return []
    both = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return [key for key, (old, new) in both.items() if old != new and UNKNOWN not in (old, new)]


def _is_tracked(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in VERSIONED


def _files(classes: Iterable[type]) -> dict[type, str]:
    """The file of each module of classes, by one of them."""
    found: dict[str, type] = {}
    for cls in classes:
        try:
            found.setdefault(inspect.getfile(cls), cls)
        except (OSError, TypeError):  # made by a program
            continue
    return {cls: path for path, cls in found.items()}


def _digest_file(module: str, path: str) -> str:
    """The digest of a file as it was imported, where the registry has noted it; else as it is now."""
    noted: str | None = getattr(sys.modules.get(module), "robench_source", None)
    try:
        return noted or _digest(Path(path).read_bytes())
    except OSError:
        return UNKNOWN


def _digest_class(cls: type) -> str:
    try:
        return _digest(inspect.getsource(cls).encode())
    except (OSError, TypeError):
        return UNKNOWN


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fold(digests: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Digests by name; several of one name are digested together."""
    found: dict[str, list[str]] = {}
    for name, digest in digests:
        found.setdefault(name, []).append(digest)
    return {
        name: each[0] if len(each) == 1 else UNKNOWN if UNKNOWN in each else _digest(" ".join(sorted(each)).encode())
        for name, each in found.items()
    }


def _options(module: nn.Module) -> str:
    """The values that a module keeps under the names of its constructor's parameters, as far as they are plain."""
    values = vars(module)
    parameters = inspect.signature(type(module).__init__).parameters
    told = {name: values[name] for name in parameters if name in values and name not in UNTOLD}
    return ", ".join(f"{name}={value!r}" for name, value in told.items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) or (
        isinstance(value, tuple) and all(_is_plain(one) for one in value)
    )
