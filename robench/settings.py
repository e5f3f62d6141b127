"""How an evaluation is run: the settings that `evaluate` takes by name, and their defaults."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch

from robench.attack import ACCESS_LEVELS, Goal
from robench.errors import UsageError
from robench.files import Place
from robench.plan import PRECISIONS

DEFAULT_N = 256
RANDOMIZED_EOT, RANDOMIZED_REPEATS = 10, 20


@dataclass(frozen=True)
class Settings:
    """How an evaluation is run; every field may be given to `evaluate` by name.

    Attributes:
        n: images, a class-stratified draw by `seed` (of a pair of tensors the first n); None: 256, or all of a pair.
        seed: seeds the draw of images and all randomness of the run; 0 or larger.
        unit_size: images of one work unit.
        eot: draws averaged in one gradient query; None: 10 for a randomized defense, else 1.
        judge_repeats: fresh answers behind each verdict; None: 20 for a randomized defense (100 in a `standard`
            protocol), else 1.
        device: `cpu`, `cuda`, or `auto`: cuda where there is one.
        out: run folder, or its URL; None keeps the result in memory.
        resume: continue the run in `out`.
        runner: where units run; see robench.runners.
        workers: processes that share the units (and the cores); needs `out`, and names that workers can load.
        progress: show progress on standard error.
        query_budget: the most forward plus backward passes per image of one attack at one bound; None: no limit. Under
            a budget no bound goes on from a smaller one, and where the next query would take one image over it, the
            attack ends for all images of its unit, each at the best that was asked about.
        access: the most that the attacks may ask of the defense (`gradient`, `scores`, `decisions`, `none`), where the
            threat model limits it; one that needs more is refused before any work.
        goal: `budget` or `minimal`, where only attacks of that goal are wanted.
        cascade: each attack sees only the images still right after those before it; None: as the protocol says, and
            no cascade for a free list, so that each attack's figure is its own.
        precision: of the attacks' gradient queries, and of all that they ask of a randomized defense: `float32` or
            `bfloat16` (faster; the judge stays float32).
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        defense_spec: how `load_defense` finds the defense again; empty: as it was loaded, if it was loaded by name.
        defense_options: options given besides those in `defense_spec`.
    """

    n: int | None = None
    seed: int = 0
    unit_size: int = 128
    eot: int | None = None
    judge_repeats: int | None = None
    device: str = "auto"
    out: str | Place | None = None
    resume: bool = False
    runner: str = "local"
    workers: int = 1
    progress: bool = False
    query_budget: int | None = None
    access: str | None = None
    goal: str | None = None
    cascade: bool | None = None
    precision: str = "float32"
    data_dir: str | Path | None = None
    defense_spec: str = ""
    defense_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks kinds and ranges.

        Raises:
            UsageError: a setting is of the wrong kind or out of range.
        """
        for name in ("n", "seed", "unit_size", "workers", "eot", "judge_repeats", "query_budget"):
            value = getattr(self, name)
            if value is not None or name == "seed":
                value = _as_whole(name, value)
                object.__setattr__(self, name, value)
            least = 0 if name == "seed" else 1
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}; got {value}")
        _check_choice("runner", self.runner, ("local",))
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("access", self.access, (None, *ACCESS_LEVELS))
        _check_choice("goal", self.goal, (None, *get_args(Goal)))

    def resolve_device(self) -> str:
        """The kind of device meant by `device`.

        Raises:
            UsageError: unknown, or not there.
        """
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f'device must be auto, cpu or cuda; got "{self.device}"')
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no CUDA device; use --device cpu")
        return self.device


def _as_whole(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)  # numpy's whole numbers too
    raise UsageError(f"{name} must be a whole number; got {value!r}")


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        offered = ", ".join(str(choice) for choice in choices if choice is not None)
        raise UsageError(f'{name} must be one of {offered}; got "{value}"')


def make_settings(settings: dict[str, Any]) -> Settings:
    """Builds Settings from keyword arguments.

    Raises:
        UsageError: an unknown name or a value out of range.
    """
    known = {item.name for item in fields(Settings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f'evaluate has no setting "{unknown[0]}"; there are: {", ".join(sorted(known))}')
    return Settings(**settings)
