"""What a run is made of: its spec, and the work units that it is cut into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from robench.errors import DataError

SCHEMA = 2
"""Version of the run folder's files; a newer one is refused."""


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
        precision: of the attacks' gradient queries, `float32` or `bfloat16`; the judge is always float32.
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
            DataError: a field is missing, unknown or of the wrong kind.
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
            return cls(**{**content, "attacks": entries, "eps": eps, "image_shape": shape})
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"the run's spec does not fit the schema: {error}") from None

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


def plan_units(spec: RunSpec) -> list[Unit]:
    """Cuts a run into units of `unit_size` images."""

    def slices() -> Iterator[Unit]:
        for index, start in enumerate(range(0, spec.n, spec.unit_size)):
            yield Unit(index, start, min(start + spec.unit_size, spec.n))

    return list(slices())
