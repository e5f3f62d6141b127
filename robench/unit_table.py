"""The per-example table of one work unit: its columns, and how they are filled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor

from robench.errors import DataError
from robench.types import Labels

if TYPE_CHECKING:
    import pyarrow as pa

CLEAN: Final = "clean"
WORST: Final = "worst"
NOTES: Final = "notes"
X_ADV: Final = "x_adv"
STATUSES: Final = ("ok", "skipped", "spared", "failed")
"""Of an attack on an image: done; not done, as the clean image is wrong or an earlier attack broke it; failed."""
KINDS: Final = {
    "eps": "double",
    "attack": "string",
    "index": "int64",
    "label": "int64",
    "status": "string",
    "chosen": "string",
    "votes": "list<item: int32>",
    "distance": "double",
    "forwards": "int64",
    "backwards": "int64",
    X_ADV: "binary",
}
"""The columns, and the Arrow type of each."""


class UnitTable:
    """Collects the columns of a unit's table, a block of rows (one for each image) at a time."""

    def __init__(self, index: Tensor, y: Labels) -> None:
        """Starts an empty table for images at the positions `index` with labels y."""
        self.index, self.y = index.numpy(), y.cpu().numpy()
        self.columns: dict[str, list[Any]] = {name: [] for name in KINDS}

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

        types = {"list<item: int32>": pa.list_(pa.int32())}
        kinds = {name: types.get(kind) or pa.type_for_alias(kind) for name, kind in KINDS.items()}
        table = pa.table({name: pa.array(self.columns[name], kind) for name, kind in kinds.items()})
        return table.replace_schema_metadata({NOTES: json.dumps(list(notes))}) if notes else table


def check_columns(table: pa.Table) -> None:
    """Checks that a table has the columns of a unit's, of their types, and only images missing.

    Raises:
        DataError: it has not.
    """
    found = {field.name: str(field.type).replace("element:", "item:") for field in table.schema}
    if found != KINDS:
        wrong = next(name for name in [*KINDS, *found] if found.get(name) != KINDS.get(name))
        raise DataError(f'column "{wrong}" is {found.get(wrong, "missing")}, not {KINDS.get(wrong, "expected")}')
    empty = [name for name in KINDS if name != X_ADV and table.column(name).null_count]
    if empty:
        raise DataError(f'column "{empty[0]}" has empty cells')


def notes_of(table: pa.Table) -> list[str]:
    """The notes on how a unit's table came about; none where they cannot be read."""
    try:
        notes = json.loads((table.schema.metadata or {}).get(NOTES.encode(), b"[]"))
    except ValueError:
        return []
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _numbers(values: Tensor | None, n: int, kind: type) -> Any:
    return np.zeros(n, dtype=kind) if values is None else values.cpu().numpy().astype(kind)
