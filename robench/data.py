"""Datasets: embedded, from a folder of Parquet files, from one Parquet file, from the Hugging Face hub, from a plugin.

All of them come out as float32 images in [0, 1] and int64 labels, and all files are read by the `datasets` library,
which is imported when the first file is read. Reading local files leaves nothing behind: no cache, no lock, nothing in
the home folder. Files from the hub stay in the hub's own cache (`HF_HOME`).
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from robench.data_hub import fetch_from_hub, read_quietly
from robench.data_names import (
    HUB_PREFIX,
    KNOWN,
    DatasetInfo,
    check_complete,
    find_data_root,
    list_datasets,
    list_embedded_files,
    list_folder_files,
    list_plugins,
)
from robench.errors import DataError, PluginError, RobenchError, UsageError
from robench.types import Images, Labels

__all__ = ["Dataset", "DatasetInfo", "digest_data", "draw_stratified", "list_datasets", "load_data", "load_dataset"]

_IMAGE_COLUMNS = ("image", "img")  # uoft-cs/cifar10 says img
_CONVERT_TO = {"1": "L", "L": "L", "LA": "L"} | dict.fromkeys(("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"), "RGB")
_DECODED_AT_ONCE: Final = 512
_MOST_CLASSES = 100_000  # where there are no class names
_DAMAGED_IMAGE = (OSError, EOFError, SyntaxError, ValueError)  # what Pillow raises for bytes that are no whole image


@dataclass(frozen=True, eq=False)
class Dataset:
    """A split, or a draw from one, in memory on the CPU.

    Attributes:
        name: as it was asked for.
        split: as it was asked for.
        x: images in [0, 1], float32.
        y: class numbers, int64.
        index: position of each example in the whole split, ascending, int64.
        class_names: one name a class; the numbers as text where the source has no names.
        digest: `digest_data(x, y)`.
        split_size: number of examples in the whole split; 0 where it is not told.
    """

    name: str
    split: str
    x: Images
    y: Labels
    index: Labels
    class_names: tuple[str, ...]
    digest: str
    split_size: int = 0


@dataclass(frozen=True)
class _Split:
    """A whole split before its images are decoded: `take` decodes those at the given positions."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    take: Callable[[np.ndarray], Images]


def load_data(
    name: str, split: str = "test", n: int | None = None, seed: int = 0, data_dir: str | Path | None = None
) -> tuple[Images, Labels]:
    """Return images in [0, 1] and labels: `load_dataset` without the bookkeeping; same arguments, same errors."""
    dataset = load_dataset(name, split, n, seed, data_dir)
    return dataset.x, dataset.y


def load_dataset(
    name: str,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    *,
    at_most: bool = False,
) -> Dataset:
    """Return a dataset's split, or a class-stratified draw from it.

    Grayscale images have one channel, RGB images three; palette, RGBA, CMYK and YCbCr images are converted to RGB
    (alpha is dropped). Only the drawn images are decoded, so only they are checked.

    Args:
        name: `fashion_mnist`, whose test split is always the embedded one; `mnist`, `cifar10`, `svhn`, and the training
            split of `fashion_mnist`, from the folder, else the hub; a plugin's entry point in group `robench.datasets`;
            `hf:org/name` or `hf:org/name/configuration`; or the path of a Parquet file with columns `image` (or `img`)
            and `label`.
        split: name of the split, or several joined: `train+extra` (SVHN). A Parquet file is one split: for a path this
            is only a label.
        n: number of examples, see `draw_stratified`; None takes all.
        seed: of the draw; with n=None it has no effect.
        data_dir: folder of `<name>/<split>-*.parquet` for the named datasets; default: what `ROBENCH_DATA` names. Given
            here, the split must be in it; named by `ROBENCH_DATA`, what is missing is asked from the hub.
        at_most: take all where the split has fewer than n.

    Raises:
        UsageError: unknown name or split, n or seed out of range, no such file or folder, or the hub cannot be reached.
        DataError: a file is damaged, incomplete, empty, or does not have the columns, labels or images it should have.
        PluginError: a plugin raised, or what it returned is not (images, labels).
    """
    names = split.split("+")
    if not all(re.fullmatch(r"\w[\w.-]*", one) for one in names) or len(set(names)) < len(names):
        raise UsageError(f'split takes a name such as test or train; it is "{split}". Choose how many with n.')
    source = _join([_open(name, one, data_dir) for one in names])
    labels, size = torch.from_numpy(source.labels), len(source.labels)
    index = torch.arange(size) if n is None else draw_stratified(labels, min(n, size) if at_most else n, seed)
    x = source.take(index.numpy())
    if name in KNOWN and tuple(x.shape[1:]) != KNOWN[name].image_shape:
        raise DataError(
            f"{name} {split}: expected images of {KNOWN[name].image_shape} (channels, height, width); they are"
            f" {tuple(x.shape[1:])}. Put the files of {KNOWN[name].hub_repo} there, or pass a file's path instead."
        )
    y = labels[index]
    return Dataset(name, split, x, y, index, source.class_names, digest_data(x, y), size)


def draw_stratified(y: Labels, n: int, seed: int) -> Int[Tensor, " n"]:
    """Return the positions, ascending, of a class-stratified draw of n examples without replacement.

    Class counts differ by at most 1, except that a class with too few examples gives all it has. It depends on y, n and
    seed alone (raw output of numpy's PCG64, which numpy keeps stable; no global generator is read or advanced), and it
    is nested: with the same y and seed, a smaller draw is part of every larger one, so that results extend.

    Args:
        y: class of each example of the whole split.
        n: size of the draw, 1 to len(y).
        seed: 0 or larger.

    Raises:
        UsageError: n or seed out of range.
    """
    if not 1 <= n <= len(y):
        raise UsageError(f"n takes 1 to {len(y)}, the number of examples in the split; it is {n}. Choose another n.")
    if seed < 0:
        raise UsageError(f"seed takes 0 or a larger number; it is {seed}. Choose another seed.")
    labels = y.cpu().numpy()
    keys = np.random.PCG64(seed).random_raw(len(labels))
    by_class = np.lexsort((keys, labels))
    ordered = labels[by_class]
    rank = np.empty(len(labels), dtype=np.int64)  # place of each example within its class
    rank[by_class] = np.arange(len(labels)) - np.searchsorted(ordered, ordered, side="left")
    rounds = np.lexsort((keys, rank))  # each round takes one example of every class that has any left
    return torch.from_numpy(np.sort(rounds[:n]))


def digest_data(x: Tensor, y: Tensor) -> str:
    """Return the sha256 of images and labels: of shape, dtype and bytes, little-endian, in C order.

    Works for a user's own pair too. x is taken as float32 and y as int64, so the pair's device, strides and integer
    width do not change the digest.

    Args:
        x: images in [0, 1], b c h w.
        y: class numbers, b.

    Raises:
        UsageError: x is not b c h w, y is not b, or the numbers of examples differ.
    """
    if x.ndim != 4 or y.ndim != 1 or len(x) != len(y):
        raise UsageError(
            f"data takes images b c h w and as many labels b; shapes are {tuple(x.shape)} and {tuple(y.shape)}."
            " Reshape them."
        )
    digest = hashlib.sha256()
    for array, dtype in (
        (x.detach().to("cpu", torch.float32).numpy(), "<f4"),
        (y.detach().to("cpu", torch.int64).numpy(), "<i8"),
    ):
        digest.update(f"{dtype}{list(array.shape)}\n".encode("ascii"))
        digest.update(np.ascontiguousarray(array, dtype=dtype).data)
    return digest.hexdigest()


def _join(parts: list[_Split]) -> _Split:
    """Splits one after another as one; positions are taken in ascending order."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part.labels) for part in parts])

    def take(index: np.ndarray) -> Images:
        which = np.searchsorted(ends, index, side="right")
        inside = [index[which == number] - ends[number] + len(part.labels) for number, part in enumerate(parts)]
        return torch.cat([part.take(rows) for part, rows in zip(parts, inside, strict=True) if len(rows)])

    return _Split(np.concatenate([part.labels for part in parts]), parts[0].class_names, take)


def _open(name: str, split: str, data_dir: str | Path | None) -> _Split:
    """Find a dataset by name, in the order that `load_dataset` documents."""
    if name in KNOWN:
        return _open_known(name, split, data_dir)
    if name.startswith(HUB_PREFIX):
        return _open_rows(_fetch_by_address(name, split), f"{name} {split}")
    plugins = list_plugins()
    if name in plugins:
        return _open_plugin(name, split, plugins[name].load)
    path = Path(name).expanduser()
    if path.is_file():
        return _open_rows(_read_parquet([path], str(path)), str(path))
    if path.suffix == ".parquet" or path.is_dir():
        came = "a folder (named datasets take --data-dir)" if path.is_dir() else "not there"
        raise UsageError(f"dataset takes a name or the path of a Parquet file; {path} is {came}. Correct the path.")
    known = [*sorted({*KNOWN, *plugins})]
    meant = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    meant = [HUB_PREFIX + name] if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else meant
    raise UsageError(
        f'dataset "{name}" is not known; there are {", ".join(known)}, hf:org/name and paths of Parquet files.'
        + (f" Did you mean {meant[0]}?" if meant else " See 'robench list datasets'.")
    )


def _open_known(name: str, split: str, data_dir: str | Path | None) -> _Split:
    splits = KNOWN[name].splits
    if split not in splits:
        raise UsageError(f'dataset "{name}" has the splits {" and ".join(splits)}; split is "{split}". Choose one.')
    where = f"{name} {split}"
    if files := list_embedded_files(name, split):
        _check_embedded(files)
        return _open_rows(_read_parquet(files, where), where, KNOWN[name].num_classes)
    root = find_data_root(data_dir)
    if root is not None and (files := list_folder_files(root, name, split)):
        check_complete(files)
        where = f"{where} ({files[0].parent})"
        return _open_rows(_read_parquet(files, where), where, KNOWN[name].num_classes)
    missing = "" if root is None else f" nothing matches {root / name / split}-*.parquet"
    place = f"<folder>/{name}/{split}-*.parquet"
    advice = f"Put its files at {place} and pass --data-dir <folder>, or set ROBENCH_DATA=<folder>."
    if data_dir is not None:
        raise UsageError(f'dataset "{name}", split {split}:{missing}. {advice}')
    known = KNOWN[name]
    what = f'dataset "{name}", split {split}:{missing and missing + ","}'
    rows = fetch_from_hub(known.hub_repo, known.hub_config, split, what, advice)
    return _open_rows(rows, where, known.num_classes)


def _check_embedded(files: list[Path]) -> None:
    """Check the shipped files against the digests that are shipped with them."""
    expected = json.loads((files[0].parent / "digest.json").read_text(encoding="utf-8"))["files"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if found != expected:
        raise DataError(f"{files[0].parent}: the embedded files do not have their digests. Install robench again.")


def _fetch_by_address(name: str, split: str) -> Any:
    """Fetch `hf:org/name` or `hf:org/name/configuration`."""
    if not (address := re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", name)):
        raise UsageError(f'a dataset on the hub is written hf:org/name or hf:org/name/configuration; it is "{name}".')
    advice = "Get a Parquet file with columns image and label in another way, and pass its path as the dataset."
    return fetch_from_hub(address[1], address[2], split, f'dataset "{name}", split {split}:', advice)


def _read_parquet(files: list[Path], where: str) -> Any:
    """Read local Parquet files, in this order, into one `datasets.Dataset` in memory."""

    def read(datasets: Any) -> Any:
        import pyarrow.parquet  # slow to import

        if not sum(pyarrow.parquet.read_metadata(path).num_rows for path in files):
            raise DataError(f"{where}: expected at least one row; the Parquet file has zero rows. Write it again.")
        with tempfile.TemporaryDirectory(prefix="robench-") as cache:
            names = [glob.escape(str(path.resolve())) for path in files]  # the library takes patterns
            return datasets.Dataset.from_parquet(names, keep_in_memory=True, cache_dir=cache)

    def refuse(reason: str) -> RobenchError:
        return DataError(
            f"{where}: expected Parquet with columns image and label; it cannot be read ({reason})."
            " Fetch or write it again."
        )

    return read_quietly(read, refuse)


def _open_rows(rows: Any, where: str, num_classes: int | None = None) -> _Split:
    """Check columns and labels of a `datasets.Dataset`; images are checked when they are decoded."""
    image_column = next((column for column in _IMAGE_COLUMNS if column in rows.column_names), None)
    if image_column is None or "label" not in rows.column_names:
        raise DataError(
            f"{where}: expected columns image and label; it has {', '.join(rows.column_names)}. Rename the columns."
        )
    names = tuple(getattr(rows.features["label"], "names", None) or ())
    values = rows["label"][:]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        came = "None" if None in values else rows.features["label"]
        raise DataError(f"{where}: expected integer labels; there are {came}. Number the classes from 0.")
    if not values:
        raise DataError(f"{where}: expected at least one row; there are none. Write the file again.")
    labels = np.array(values, dtype=np.int64)
    limit = num_classes or len(names) or _MOST_CLASSES
    if len(names) not in {0, limit} or not bool((labels >= 0).all() and (labels < limit).all()):
        raise DataError(
            f"{where}: expected labels from 0 to {limit - 1}; they go from {labels.min()} to {labels.max()}"
            f" with {len(names)} class names. Number the classes from 0 and leave out examples without a label."
        )
    class_names = names or tuple(str(label) for label in range(num_classes or int(labels.max()) + 1))
    return _Split(labels, class_names, lambda index: _decode(rows, image_column, index, where))


def _decode(rows: Any, column: str, index: np.ndarray, where: str) -> Images:
    """Decode the images at `index`; bytes only, so that a file cannot make us open another file or an address."""

    def read(datasets: Any) -> Images:
        bytes_only = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        image, decoded = datasets.Image(), torch.empty(0)
        for start in range(0, len(index), _DECODED_AT_ONCE):  # parts, so that the memory is little more than the result
            part = index[start : start + _DECODED_AT_ONCE].tolist()
            for offset, cell in enumerate(bytes_only[part][column]):
                pixels = _decode_one(image, cell, f"{where}: image {part[offset]}")
                if not len(decoded):
                    decoded = torch.empty(len(index), *pixels.shape)
                if pixels.shape != decoded.shape[1:]:
                    raise DataError(
                        f"{where}: expected images of one size; image {index[0]} is {tuple(decoded.shape[1:])} and "
                        f"image {part[offset]} is {pixels.shape} (channels, height, width). Resize them beforehand."
                    )
                decoded[start + offset] = torch.tensor(pixels)
        return decoded.div_(255)

    def refuse(reason: str) -> RobenchError:
        return DataError(
            f"{where}: expected images as PNG bytes in column {column}; it holds {rows.features[column]} ({reason})."
            " Write the images as struct(bytes, path), as on the hub."
        )

    return read_quietly(read, refuse)  # b c h w


def _decode_one(image: Any, cell: Any, where: str) -> np.ndarray:
    """Decode one image to uint8, c h w."""
    if cell is None or not cell["bytes"]:
        raise DataError(f"{where}: expected the bytes of an image; there are none. Store the bytes, not a path.")
    try:
        decoded = image.decode_example({"bytes": cell["bytes"], "path": None})
    except _DAMAGED_IMAGE as error:
        raise DataError(
            f"{where}: expected a whole PNG; it does not decode ({error}). Fetch the file again."
        ) from error
    if decoded.mode not in _CONVERT_TO:
        advice = "Convert it to L or RGB"
        if decoded.mode.startswith(("I", "F")):  # convert("L") would cut at 255
            advice = (
                "Scale its values to 0 to 255 and write it again: Image.fromarray((a / a_max * 255).astype('uint8'))"
            )
        raise DataError(f"{where}: expected 8 bits a channel; its mode is {decoded.mode}. {advice}.")
    pixels = np.asarray(decoded.convert(_CONVERT_TO[decoded.mode]))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _are_classes(y: Tensor) -> bool:
    return bool((y >= 0).all() and (y < _MOST_CLASSES).all())


def _open_plugin(name: str, split: str, load: Callable[[], Callable[[str], tuple[Tensor, Tensor]]]) -> _Split:
    try:
        x, y = load()(split)
    except RobenchError:
        raise
    except Exception as error:
        raise PluginError(
            f'dataset plugin "{name}" should return (images, labels) for a split; {type(error).__name__} came: {error}.'
            " Tell its author."
        ) from error
    if not (isinstance(x, Tensor) and x.dtype == torch.float32 and x.ndim == 4 and x.numel()):
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise PluginError(
            f'dataset plugin "{name}": images should be float32 b c h w; they are {came}. Tell its author.'
        )
    if not (isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == x.shape[:1] and _are_classes(y)):
        came = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise PluginError(
            f'dataset plugin "{name}": labels should be int64 from 0, one for each of {len(x)} images; they are {came}.'
            " Tell its author."
        )
    if not bool((x >= 0).all() and (x <= 1).all()):
        raise PluginError(f'dataset plugin "{name}": images should be in [0, 1]; some are not. Tell its author.')
    x, y = x.detach().cpu(), y.cpu()
    class_names = tuple(str(label) for label in range(int(y.max()) + 1))
    return _Split(y.numpy(), class_names, lambda index: x[torch.from_numpy(index)])
