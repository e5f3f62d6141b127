"""The per-example table of one work unit: its columns, and how they are filled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor

from robench.types import Labels

if TYPE_CHECKING:
    import pyarrow as pa

CLEAN: Final = "clean"
WORST: Final = "worst"
NOTES: Final = "notes"
X_ADV: Final = "x_adv"
COLUMNS: Final = (
    "eps",
    "attack",
    "index",
    "label",
    "status",
    "chosen",
    "votes",
    "distance",
    "forwards",
    "backwards",
    X_ADV,
)


class UnitTable:
    """Collects the columns of a unit's table, a block of rows (one for each image) at a time."""

    def __init__(self, index: Tensor, y: Labels) -> None:
        """Starts an empty table for images at the positions `index` with labels y."""
        self.index, self.y = index.numpy(), y.cpu().numpy()
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, eps: float, attack: str, status: list[str], votes: Tensor, **more: Any) -> None:
        """Adds one row for each image; what `more` leaves out of the columns is empty or 0."""
        n = len(self.y)
        x_adv = more.get("x_adv")
        values: dict[str, Any] = {
            "eps": [eps] * n,
            "attack": [attack] * n,
            "index": self.index,
            "label": self.y,
            "status": status,
            "chosen": more.get("chosen", [""] * n),
            "votes": votes.tolist(),
            "distance": _numbers(more.get("distance"), n, np.float64),
            "forwards": _numbers(more.get("forwards"), n, np.int64),
            "backwards": _numbers(more.get("backwards"), n, np.int64),
            "x_adv": [None] * n if x_adv is None else [row.numpy().astype("<f4").tobytes() for row in x_adv.cpu()],
        }
        for name, value in values.items():
            self.columns[name].extend(value)

    def build(self, notes: Sequence[str] = ()) -> pa.Table:
        """The table as Arrow; notes on how it came about stand in its metadata."""
        import pyarrow as pa

        types = {
            "eps": pa.float64(),
            "attack": pa.string(),
            "index": pa.int64(),
            "label": pa.int64(),
            "status": pa.string(),
            "chosen": pa.string(),
            "votes": pa.list_(pa.int32()),
            "distance": pa.float64(),
            "forwards": pa.int64(),
            "backwards": pa.int64(),
            "x_adv": pa.binary(),
        }
        table = pa.table({name: pa.array(self.columns[name], types[name]) for name in COLUMNS})
        return table.replace_schema_metadata({NOTES: json.dumps(list(notes))}) if notes else table


def notes_of(table: pa.Table) -> list[str]:
    """The notes on how a unit's table came about."""
    return [str(note) for note in json.loads((table.schema.metadata or {}).get(NOTES.encode(), b"[]"))]


def _numbers(values: Tensor | None, n: int, kind: type) -> Any:
    return np.zeros(n, dtype=kind) if values is None else values.cpu().numpy().astype(kind)
