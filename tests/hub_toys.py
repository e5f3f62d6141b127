"""Made-up data in the hub's layout."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from robench.data_names import list_embedded_files


def read_fashion() -> pa.Table:
    """The embedded test split of Fashion-MNIST."""
    return pa.concat_tables(pq.read_table(path) for path in list_embedded_files("fashion_mnist", "test"))


def write_test_split(root: Path, name: str, table: pa.Table) -> Path:
    """Writes a dataset's test split into a data folder, and returns the folder."""
    (root / name).mkdir(parents=True)
    pq.write_table(table, root / name / "test-00000-of-00001.parquet")
    return root


def write_svhn(root: Path, **splits: int) -> Path:
    """Writes splits of so many images (the first ones of a common row) as the hub has SVHN; returns the data folder.

    Each class has its own grey.
    """
    folder = root / "svhn" / "cropped_digits"
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.PCG64(0))
    cells = []
    for number in range(max(splits.values())):
        pixels = rng.integers(0, 60, (32, 32, 3)) + 19 * (number % 10)
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, kind), "label": [number % 10 for number in range(len(cells))]})
    for name, count in splits.items():
        pq.write_table(table.slice(0, count), folder / f"{name}-00000-of-00001.parquet")
    return root
