"""The names of datasets and where each would come from. Imports neither torch nor `datasets`: listing is fast."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from robench.errors import DataError, UsageError

ENTRY_POINT_GROUP = "robench.datasets"
HUB_PREFIX = "hf:"
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class KnownDataset:
    """What robench knows of a dataset before it reads it.

    Attributes:
        image_shape: (channels, height, width); a file with other images is refused.
        num_classes: number of classes.
        hub_repo: the repository on the Hugging Face hub.
        hub_config: its configuration; also the name of the folder that holds the files in a copy of the repository.
        splits: its splits.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    hub_repo: str
    hub_config: str
    splits: tuple[str, ...] = ("train", "test")


KNOWN = {
    "cifar10": KnownDataset((3, 32, 32), 10, "uoft-cs/cifar10", "plain_text"),
    "fashion_mnist": KnownDataset((1, 28, 28), 10, "zalando-datasets/fashion_mnist", "fashion_mnist"),
    "mnist": KnownDataset((1, 28, 28), 10, "ylecun/mnist", "mnist"),
    "svhn": KnownDataset((3, 32, 32), 10, "ufldl-stanford/svhn", "cropped_digits", ("train", "test", "extra")),
}


@dataclass(frozen=True)
class DatasetInfo:
    """One line of `robench list datasets`.

    Attributes:
        name: what `--dataset` takes.
        image_shape: (channels, height, width); None for a plugin, which is not imported to ask.
        num_classes: number of classes; None for a plugin.
        source: where the test split would come from: `embedded`, `folder`, `hub` or `plugin`.
    """

    name: str
    image_shape: tuple[int, int, int] | None
    num_classes: int | None
    source: str


def list_datasets(data_dir: str | Path | None = None) -> list[DatasetInfo]:
    """Return the datasets that have a name, sorted; opens no file and no connection.

    Args:
        data_dir: folder of `<name>/<split>-*.parquet`; default: what `ROBENCH_DATA` names.

    Raises:
        UsageError: the folder does not exist.
    """
    root = find_data_root(data_dir)
    infos = []
    for name, known in KNOWN.items():
        source = "hub"
        if list_embedded_files(name, "test"):
            source = "embedded"
        elif root is not None and list_folder_files(root, name, "test"):
            source = "folder"
        infos.append(DatasetInfo(name, known.image_shape, known.num_classes, source))
    infos += [DatasetInfo(name, None, None, "plugin") for name in list_plugins() if name not in KNOWN]
    return sorted(infos, key=lambda info: info.name)


def list_plugins() -> dict[str, metadata.EntryPoint]:
    """Return the entry points that installed distributions offer as datasets, by name; none is imported."""
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def find_data_root(data_dir: str | Path | None = None) -> Path | None:
    """Return the folder of datasets: `data_dir`, else what `ROBENCH_DATA` names, else None.

    Raises:
        UsageError: it is not a folder.
    """
    origin, folder = ("--data-dir", data_dir) if data_dir is not None else ("ROBENCH_DATA", None)
    folder = folder if folder is not None else os.environ.get("ROBENCH_DATA") or None
    if folder is None:
        return None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"{origin} takes a folder of <name>/{{train,test}}-*.parquet; {root} is not a folder. Correct the path."
        )
    return root


def find_part(name: str, split: str) -> Path | None:
    """The file that tells a part of a split by digests, see `robench.data_part`; None where there is none."""
    path = _ASSETS / name / f"{split}-part.sha256"
    return path if name in KNOWN and path.is_file() else None


def list_embedded_files(name: str, split: str) -> list[Path]:
    """Return the Parquet files of a split that is shipped with robench, in order; empty where there is none."""
    return sorted((_ASSETS / name).glob(f"{split}-*.parquet"))


def list_folder_files(root: Path, name: str, split: str) -> list[Path]:
    """Return the Parquet files of a split in order, from `root/name` or the hub's `root/name/<configuration>`."""
    folders = (root / name, root / name / KNOWN[name].hub_config)
    return next((files for folder in folders if (files := sorted(folder.glob(f"{split}-*.parquet")))), [])


def check_complete(files: list[Path]) -> None:
    """Check that files named `...-00000-of-00002...` are all there, once each.

    Raises:
        DataError: a file is missing, or files of two different layouts lie in one folder.
    """
    parts = [(int(found[1]), int(found[2])) for path in files if (found := re.search(r"-(\d+)-of-(\d+)", path.stem))]
    if not parts and files:
        return
    total = parts[0][1] if parts else 0
    if len(parts) != len(files) or sorted(parts) != [(number, total) for number in range(total)]:
        names = ", ".join(path.name for path in files)
        raise DataError(
            f"{files[0].parent}: expected {total} files numbered 00000 to {total - 1:05d} of {total:05d};"
            f" there are {names}. Fetch the missing ones, or remove those of another layout."
        )
