"""Datasets from local files: one Parquet file, and a folder in the hub's layout."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from robench import data_names
from robench.data import load_data, load_dataset
from robench.errors import DataError, UsageError

EMBEDDED = Path(data_names.__file__).parent / "assets" / "fashion_mnist"


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's data folder, hub or home unless it says so."""
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))


def to_png(pixels: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: list[Any],
    class_names: list[str] | None = None,
    image: str = "image",
) -> str:
    """Write a file as the hub does; without class names it has no `datasets` metadata at all."""
    cells = pa.array(
        [{"bytes": one, "path": None} for one in images],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    table = pa.table({image: cells, "label": pa.array(labels)})
    if class_names is not None:
        features = {image: {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(path)


def make_pngs(n: int, size: int = 28, channels: int = 1) -> tuple[np.ndarray, list[bytes]]:
    shape = (n, size, size) if channels == 1 else (n, size, size, channels)
    pixels = np.random.Generator(np.random.PCG64(n)).integers(0, 256, shape, dtype=np.uint8)
    return pixels, [to_png(one) for one in pixels]


# one Parquet file


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("class_names", [None, ["cat", "dog", "emu"]])
@pytest.mark.parametrize("image", ["image", "img"])
def test_local_file_is_read_pixel_by_pixel(
    tmp_path: Path, channels: int, class_names: list[str] | None, image: str
) -> None:
    pixels, pngs = make_pngs(5, size=9, channels=channels)
    path = write_parquet(tmp_path / "a [1] *.parquet", pngs, [0, 1, 2, 1, 0], class_names, image)
    dataset = load_dataset(path)
    expected = torch.from_numpy(pixels).reshape(5, 9, 9, channels).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(dataset.x, expected)
    assert dataset.y.tolist() == [0, 1, 2, 1, 0]
    assert dataset.class_names == tuple(class_names or "012")


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_image_modes(tmp_path: Path, mode: str, channels: int) -> None:
    black = np.zeros((6, 4, 3), np.uint8)
    path = write_parquet(tmp_path / "a.parquet", [to_png(black, mode)], [0])
    x, _ = load_data(path)
    assert x.shape == (1, channels, 6, 4)
    assert float(x.abs().max()) == 0


PNGS = make_pngs(3, size=6)[1]
WRONG_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "image column missing": (
        lambda path: write_parquet(path, PNGS, [0, 1, 2], image="picture"),
        r"expected columns image and label; it has picture, label\. Rename",
    ),
    "label column missing": (
        lambda path: pq.write_table(pa.table({"image": PNGS}), path),
        r"expected columns image and label; it has image\. Rename",
    ),
    "zero rows": (lambda path: write_parquet(path, [], []), r"zero rows"),
    "not parquet": (lambda path: path.write_bytes(b"\x89PNG not parquet at all"), r"it cannot be read \(.+\)\. Fetch"),
    "empty file": (lambda path: path.write_bytes(b""), r"it cannot be read \(.+\)\. Fetch"),
    "label above the names": (
        lambda path: write_parquet(path, PNGS, [0, 1, 2], ["a", "b"]),
        r"expected labels from 0 to 1; they go from 0 to 2 with 2 class names\.",
    ),
    "label below zero": (
        lambda path: write_parquet(path, PNGS, [0, -1, 2]),
        r"expected labels from 0 .*; they go from -1 to 2",
    ),
    "absurd label": (lambda path: write_parquet(path, PNGS, [0, 1, 10**12]), r"they go from 0 to 1000000000000"),
    "text labels": (lambda path: write_parquet(path, PNGS, ["a", "b", "c"]), r"expected integer labels; .*string"),
    "float labels": (lambda path: write_parquet(path, PNGS, [0.0, 1.0, 2.0]), r"expected integer labels; .*float64"),
    "missing label": (lambda path: write_parquet(path, PNGS, [0, None, 2]), r"expected integer labels; there are None"),
    "mixed sizes": (
        lambda path: write_parquet(path, [*PNGS[:2], make_pngs(1, size=7)[1][0]], [0, 1, 2]),
        r"images of one size; image 0 is \(1, 6, 6\) and image 2 is \(1, 7, 7\)",
    ),
    "mixed channels": (
        lambda path: write_parquet(path, [*PNGS[:2], make_pngs(1, size=6, channels=3)[1][0]], [0, 1, 2]),
        r"images of one size; image 0 is \(1, 6, 6\) and image 2 is \(3, 6, 6\)",
    ),
    "truncated image": (
        lambda path: write_parquet(path, [PNGS[0], PNGS[1][:50], PNGS[2]], [0, 1, 2]),
        r"image 1: expected a whole PNG",
    ),
    "no image": (
        lambda path: write_parquet(path, [PNGS[0], b"hello", PNGS[2]], [0, 1, 2]),
        r"image 1: expected a whole PNG",
    ),
    "no bytes": (
        lambda path: write_parquet(path, [PNGS[0], PNGS[1], None], [0, 1, 2]),
        r"image 2: expected the bytes of an image; there are none",
    ),
    "16 bits": (
        lambda path: write_parquet(path, [to_png(np.zeros((6, 6), np.uint16))], [0]),
        r"image 0: expected 8 bits a channel; its mode is I;16. Scale its values to 0 to 255",
    ),
    "numbers for images": (
        lambda path: pq.write_table(pa.table({"image": [0.5, 0.25], "label": [0, 1]}), path),
        r"expected images as PNG bytes in column image; it holds .*float64",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    write, message = WRONG_FILES[case]
    path = tmp_path / "wrong.parquet"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        load_data(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_truncated_or_corrupted_parquet_is_refused(tmp_path: Path) -> None:
    content = (EMBEDDED / "test-00000-of-00002.parquet").read_bytes()
    path = tmp_path / "cut.parquet"
    path.write_bytes(content[:100_000])
    with pytest.raises(DataError, match=r"it cannot be read \(.+\)\. Fetch or write it again"):
        load_data(str(path), n=10)
    path.write_bytes(content[:200] + bytes(5000) + content[5200:])  # the first page and its header are lost
    with pytest.raises(DataError, match=r"it cannot be read \(.+\)\. Fetch or write it again"):
        load_data(str(path))


def test_image_given_as_a_path_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNGS[0])
    cells = pa.array(
        [{"bytes": None, "path": str(tmp_path / "secret.png")}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": cells, "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"Store the bytes, not a path"):
        load_data(str(tmp_path / "a.parquet"))


def test_path_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.parquet is not there\. Correct the path"):
        load_data(str(tmp_path / "no.parquet"))
    with pytest.raises(UsageError, match=r"is a folder \(named datasets take --data-dir\)"):
        load_data(str(tmp_path))


# a folder in the hub's layout


@pytest.mark.parametrize("inner", ["", "plain_text"])
@pytest.mark.parametrize("by_environment", [True, False])
def test_folder_with_several_shards_keeps_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inner: str, by_environment: bool
) -> None:
    pixels, pngs = make_pngs(12, size=32, channels=3)
    names = [f"class {number}" for number in range(10)]
    for shard in range(3):
        path = tmp_path / "cifar10" / inner / f"train-{shard:05d}-of-00003.parquet"
        write_parquet(path, pngs[4 * shard : 4 * shard + 4], [shard] * 4, names, image="img")
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path if by_environment else tmp_path / "elsewhere"))
    dataset = load_dataset("cifar10", "train", data_dir=None if by_environment else tmp_path)
    assert torch.equal(dataset.x, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    assert dataset.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.class_names == tuple(names)


@pytest.mark.parametrize(
    "files",
    [
        ["test-00000-of-00002.parquet"],
        ["test-00001-of-00002.parquet"],
        ["test-00000-of-00001.parquet", "test-00000-of-00002.parquet", "test-00001-of-00002.parquet"],
        ["test-00000-of-00001.parquet", "test-more.parquet"],
    ],
)
def test_incomplete_or_mixed_shards_are_refused(tmp_path: Path, files: list[str]) -> None:
    for file in files:
        write_parquet(tmp_path / "mnist" / file, make_pngs(2)[1], [0, 1])
    with pytest.raises(DataError, match=r"files numbered 00000 to .*; there are test-.*\. Fetch the missing ones"):
        load_data("mnist", data_dir=tmp_path)


def test_files_without_numbers_are_a_layout_too(tmp_path: Path) -> None:
    for file, label in (("test-b.parquet", 2), ("test-a.parquet", 1)):
        write_parquet(tmp_path / "mnist" / file, make_pngs(2)[1], [label] * 2)
    assert load_data("mnist", data_dir=tmp_path)[1].tolist() == [1, 1, 2, 2]


def test_known_dataset_with_other_images_or_classes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist" / "test-00000-of-00001.parquet"
    write_parquet(path, make_pngs(3, size=32, channels=3)[1], [0, 1, 2])
    with pytest.raises(DataError, match=r"expected images of \(1, 28, 28\) .*; they are \(3, 32, 32\)\. Put"):
        load_data("mnist", data_dir=tmp_path)
    write_parquet(path, make_pngs(3)[1], [0, 1, 10])
    with pytest.raises(DataError, match=r"expected labels from 0 to 9; they go from 0 to 10"):
        load_data("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("by_environment", [True, False])
def test_data_folder_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_environment: bool
) -> None:
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path / "none"))
    data_dir = None if by_environment else tmp_path / "none"
    origin = "ROBENCH_DATA" if by_environment else "--data-dir"
    with pytest.raises(UsageError, match=rf"{origin} takes a folder .*none is not a folder\. Correct"):
        load_data("mnist", data_dir=data_dir)


def test_explicit_folder_without_the_split_does_not_ask_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"split train: nothing matches .*/mnist/train-\*\.parquet\. Put its files at"):
        load_data("mnist", "train", data_dir=tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "shape", "examples"),
    [
        ("mnist", "test", (1, 28, 28), 10_000),
        ("mnist", "train", (1, 28, 28), 60_000),
        ("fashion_mnist", "train", (1, 28, 28), 60_000),
        ("cifar10", "test", (3, 32, 32), None),
        ("cifar10", "train", (3, 32, 32), None),
    ],
)
def test_real_folders(
    data_folder: Path, name: str, split: str, shape: tuple[int, int, int], examples: int | None
) -> None:
    dataset = load_dataset(name, split, n=50, seed=0, data_dir=data_folder)
    assert dataset.x.shape == (50, *shape)
    assert dataset.y.bincount().tolist() == [5] * 10
    assert len(dataset.class_names) == 10
    assert float(dataset.x.amin()) == 0
    assert 0.9 < float(dataset.x.amax()) <= 1
    files = sorted((data_folder / name).glob(f"{split}-*.parquet"))
    total = sum(pq.read_metadata(path).num_rows for path in files)
    assert examples in {None, total}
    assert int(dataset.index[-1]) < total
