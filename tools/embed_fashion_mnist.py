"""Makes robench/assets/fashion_mnist from the test split as one Parquet file.

    python tools/embed_fashion_mnist.py fashion_mnist/test-00000-of-00001.parquet

Two files of half the rows each, in the hub's layout and columns, and digest.json. The PNG bytes are the source's.
"""

import argparse
import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq

from robench.data import load_dataset

TARGET = Path(__file__).resolve().parent.parent / "robench" / "assets" / "fashion_mnist"
SHARDS = 2
LIMIT_BYTES = 4_000_000


def embed(source: Path, target: Path) -> None:
    """Write the shards and their digests; the pixel digest is computed from the source, not from the shards."""
    table = pq.read_table(source)
    rows = -(-table.num_rows // SHARDS)
    files = {}
    for number in range(SHARDS):
        path = target / f"test-{number:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(table.slice(number * rows, rows), path)  # keeps the schema's metadata, and in it the features
        if path.stat().st_size >= LIMIT_BYTES:
            raise SystemExit(f"{path} has {path.stat().st_size} bytes; the limit is {LIMIT_BYTES}. Raise SHARDS.")
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    whole = load_dataset(str(source))
    digests = {"examples": len(whole.y), "digest": whole.digest, "files": files}
    (target / "digest.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="the test split as one Parquet file")
    embed(parser.parse_args().source, TARGET)
