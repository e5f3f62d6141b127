"""Where a defense came from: noted by `load_defense`, so that a run from Python names it as `robench run` does.

The note holds for the defense as it was loaded. A defense that was changed since, or a copy that was, claims no name:
its weights and the public attributes of its modules are compared with those noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from robench.errors import UsageError

if TYPE_CHECKING:
    from robench.defense import Defense

UNTOLD: Final = ("training", "origin", "batch_rows", "told", "shares_draws", "passing")
"""Attributes that say nothing of how a defense answers."""


@dataclass(frozen=True)
class Origin:
    """How a defense was loaded.

    Attributes:
        spec: its name with its options, as `load_defense` takes it.
        options: `weights`, where a file was named besides; else empty.
        dataset: whose weights were read; None: the defense's default.
        state: of the defense then; see `_state`.
    """

    spec: str
    options: Mapping[str, str]
    dataset: str | None
    state: tuple[str, ...]


def note_origin(defense: Defense, name: str, dataset: str | None, options: Mapping[str, Any]) -> None:
    """Notes on a defense how it was loaded, unless its options cannot be written in its name."""
    from robench.registry import parse_spec, spec_of

    named = {key: str(Path(value).resolve()) for key, value in options.items() if key == "weights" and value}
    inside = {key: value for key, value in options.items() if key != "weights"}
    plugin, written = parse_spec(name)
    spec = spec_of(plugin, {**written, **inside}) if inside else name
    try:
        told = parse_spec(spec)[1]
    except UsageError:
        return
    if told == {**written, **inside}:
        defense.origin = Origin(spec, named, dataset, _state(defense))


def find_origin(defense: Defense, dataset: str) -> Origin | None:
    """How to load a defense again for a run on a dataset of that name; None where nobody can.

    That is where it was not loaded by name, was changed since, or where its name stands for other weights on this data.
    """
    from robench.registry import parse_spec
    from robench.weights import DEFAULT_DATASET

    origin = defense.origin
    if origin is None or not dataset or origin.state != _state(defense):
        return None
    told = origin.dataset
    if told is None:
        by_data = defense.needs_weights and "weights" not in {**origin.options, **parse_spec(origin.spec)[1]}
        told = DEFAULT_DATASET if by_data else dataset
    return origin if told == dataset else None


def _state(defense: Defense) -> tuple[str, ...]:
    """What a defense answers by: the digest of its weights, and kind and public attributes of each of its modules."""
    from robench.defense import weights_digest

    lines = [weights_digest(defense)]
    for name, module in defense.named_modules():
        told = [f"{key}={_tell(value)}" for key, value in vars(module).items() if _is_told(key)]
        lines.append(f"{name}: {type(module).__qualname__} {sorted(told)}")
    return tuple(lines)


def _is_told(attribute: str) -> bool:
    return not attribute.startswith("_") and attribute not in UNTOLD


def _tell(value: Any) -> str:
    """A value in full, also a tensor or an array."""
    return repr(value.tolist() if hasattr(value, "tolist") else value)
