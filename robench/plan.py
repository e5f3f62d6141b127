"""What a run is made of: its spec, and the work units that it is cut into."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, get_args

from robench.attack import Goal
from robench.errors import DataError
from robench.threat import NORMS

SCHEMA = 2
"""Version of the run folder's files; a newer one is refused."""
PRECISIONS: Final = ("float32", "bfloat16")
DEVICES: Final = ("cpu", "cuda")


@dataclass(frozen=True)
class AttackEntry:
    """One attack of a run, along one gradient mode.

    Attributes:
        key: the name in tables: the attack's spec, with `@mode` where the mode is not the defense's first.
        spec: replays the attack through `load_attack`.
        mode: gradient mode; None takes the defense's first.
        goal: the attack's goal, `budget` or `minimal`.
    """

    key: str
    spec: str
    mode: str | None = None
    goal: str = "budget"

    @property
    def is_sound(self) -> bool:
        """Whether the fields are of the kinds that an attack's are."""
        texts = self.key, self.spec, self.goal, self.mode or ""
        return all(isinstance(text, str) for text in texts) and bool(self.key) and self.goal in get_args(Goal)


@dataclass(frozen=True)
class RunSpec:
    """All that determines the numbers of a run. Two runs with equal specs on one kind of device give the same bytes.

    Attributes:
        defense: replays the defense through `load_defense`, where it has a name.
        defense_options: options given besides those written in the name.
        defense_name: the name in tables.
        weights_digest: see `robench.defense.weights_digest`.
        randomized: whether the defense is.
        dataset: the dataset's name; empty for images handed over as tensors.
        data_digest: digest of the images and labels of the run.
        image_shape: (channels, height, width).
        n: images.
        seed: the run's seed.
        norm: the threat model's norm.
        eps: the bounds, ascending.
        attacks: what is run at each bound.
        protocol: the protocol's versioned name; empty for a free list of attacks.
        cascade: whether an attack sees only the images that are still right after those before it.
        unit_size: images of one work unit.
        eot: draws averaged in one gradient query.
        judge_repeats: fresh draws behind each verdict.
        query_budget: the most forward plus backward passes per image of one attack at one bound; None: no limit.
        precision: of the attacks' queries (see `Victim`), `float32` or `bfloat16`; the judge is always float32.
        device: kind of device, `cpu` or `cuda`.
        robench_version: version of this package.
        torch_version: version of torch.
    """

    defense: str
    defense_options: dict[str, Any]
    defense_name: str
    weights_digest: str
    randomized: bool
    dataset: str
    data_digest: str
    image_shape: tuple[int, ...]
    n: int
    seed: int
    norm: str
    eps: tuple[float, ...]
    attacks: tuple[AttackEntry, ...]
    protocol: str
    cascade: bool
    unit_size: int
    eot: int
    judge_repeats: int
    query_budget: int | None
    precision: str
    device: str
    robench_version: str
    torch_version: str

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunSpec:
        """The inverse of `to_json`.

        Raises:
            DataError: a field is missing, unknown, of the wrong kind or out of range.
        """
        kinds: dict[Any, type] = {"str": str, "int": int, "bool": bool, "dict[str, Any]": dict}
        try:
            wrong = [
                one.name for one in fields(cls) if one.type in kinds and type(content[one.name]) is not kinds[one.type]
            ]
            if wrong:
                raise TypeError(f"{wrong[0]} is {content[wrong[0]]!r}")
            entries = tuple(AttackEntry(**entry) for entry in content["attacks"])
            eps, shape = tuple(float(value) for value in content["eps"]), tuple(content["image_shape"])
            spec = cls(**{**content, "attacks": entries, "eps": eps, "image_shape": shape})
            if odd := spec.find_odd():
                raise ValueError(f"{odd} is {getattr(spec, odd)!r}")
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"the run's spec does not fit the schema: {error}") from None
        return spec

    def find_odd(self) -> str:
        """The first field whose value no run can have; empty if there is none."""
        counts = ("n", "unit_size", "eot", "judge_repeats")
        odd = {
            **{name: getattr(self, name) < 1 for name in counts},
            "seed": self.seed < 0,
            "query_budget": type(self.query_budget) not in (int, type(None)),
            "image_shape": len(self.image_shape) != 3 or not all(_is_count(side) for side in self.image_shape),
            "norm": self.norm not in NORMS,
            "eps": not self.eps or not all(math.isfinite(value) and value >= 0 for value in self.eps),
            "attacks": not all(entry.is_sound for entry in self.attacks),
            "precision": self.precision not in PRECISIONS,
            "device": self.device not in DEVICES,
            "defense_options": not isinstance(self.defense_options.get("weights"), str | None),
        }
        return next((name for name, is_odd in odd.items() if is_odd), "")

    def digest(self) -> str:
        """SHA-256 of the spec."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: RunSpec) -> list[str]:
        """The fields that differ, each as `name: mine, theirs`."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{key}: {mine[key]!r} here, {theirs[key]!r} there" for key in mine if mine[key] != theirs[key]]


@dataclass(frozen=True)
class Unit:
    """A fixed slice of the run's images: what is seeded, saved, resumed and distributed.

    Attributes:
        index: number of the unit.
        start: first image of the slice.
        stop: one past the last.
    """

    index: int
    start: int
    stop: int


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def plan_units(spec: RunSpec) -> list[Unit]:
    """Cuts a run into units of `unit_size` images."""

    def slices() -> Iterator[Unit]:
        for index, start in enumerate(range(0, spec.n, spec.unit_size)):
            yield Unit(index, start, min(start + spec.unit_size, spec.n))

    return list(slices())
