"""Datasets: the embedded one, the draw, the digest, names and plugins."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robench import data_names
from robench.data import digest_data, draw_stratified, list_datasets, load_data, load_dataset
from robench.errors import DataError, PluginError, UsageError

EMBEDDED = Path(data_names.__file__).parent / "assets" / "fashion_mnist"


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's data folder, hub or home unless it says so."""
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))


# the embedded split


def test_embedded_split_has_its_digest_shape_and_order() -> None:
    digests = json.loads((EMBEDDED / "digest.json").read_text())
    dataset = load_dataset("fashion_mnist")
    assert dataset.x.shape == (10_000, 1, 28, 28)
    assert dataset.x.dtype == torch.float32
    assert dataset.y.dtype == dataset.index.dtype == torch.int64
    assert (float(dataset.x.min()), float(dataset.x.max())) == (0.0, 1.0)
    assert dataset.digest == digest_data(dataset.x, dataset.y) == digests["digest"]
    assert dataset.y.bincount().tolist() == [1000] * 10
    assert dataset.y[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]  # the published order
    assert dataset.index.tolist() == list(range(10_000))
    assert dataset.class_names[9] == "Ankle boot"
    assert len(dataset.class_names) == 10


def test_embedded_files_are_small_and_documented_with_their_digests() -> None:
    readme = (EMBEDDED / "README.md").read_text()
    digests = json.loads((EMBEDDED / "digest.json").read_text())
    files = sorted(EMBEDDED.glob("*.parquet"))
    assert [path.name for path in files] == sorted(digests["files"])
    for path in files:
        assert path.stat().st_size < 4_000_000
        assert digests["files"][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert digests["files"][path.name] in readme
    assert digests["digest"] in readme
    assert "Copyright (c) 2017 Zalando SE" in (EMBEDDED / "LICENSE").read_text()


def test_embedded_file_that_was_changed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    (folder / "digest.json").write_text((EMBEDDED / "digest.json").read_text())
    monkeypatch.setattr(data_names, "_ASSETS", tmp_path)
    with pytest.raises(DataError, match=r"do not have their digests\. Install robench again"):
        load_data("fashion_mnist")


def test_load_data_is_the_pair_of_load_dataset() -> None:
    dataset = load_dataset("fashion_mnist", n=20, seed=3)
    x, y = load_data("fashion_mnist", n=20, seed=3)
    assert torch.equal(x, dataset.x)
    assert torch.equal(y, dataset.y)
    assert dataset.digest == digest_data(x, y)


def test_draw_is_the_rows_at_its_index() -> None:
    whole = load_dataset("fashion_mnist")
    drawn = load_dataset("fashion_mnist", n=37, seed=1)
    assert torch.equal(drawn.x, whole.x[drawn.index])
    assert torch.equal(drawn.y, whole.y[drawn.index])
    assert drawn.class_names == whole.class_names


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    """Nothing in the home folder, the temporary folder or on the terminal, and Python's generator where it was."""
    script = (  # in a process of its own also because beartype, which checks the tests, draws from that generator
        "import random; state = random.getstate(); from robench.data import load_data;"
        "print(len(load_data('fashion_mnist', n=12)[1]), state == random.getstate())"
    )
    home, temp = tmp_path / "home", tmp_path / "temp"
    home.mkdir(mode=0o500)
    temp.mkdir()
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(temp)}
    done = subprocess.run(  # a new process: the library fixes its cache folder when it is imported
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("12 True\n", "")
    assert [*home.iterdir(), *temp.iterdir()] == []


@pytest.mark.data
def test_embedded_split_equals_the_folder_s(data_folder: Path) -> None:
    files = sorted((data_folder / "fashion_mnist").glob("test-*.parquet"))
    tables = pa.concat_tables([pq.read_table(path) for path in files])
    embedded = pa.concat_tables([pq.read_table(path) for path in sorted(EMBEDDED.glob("*.parquet"))])
    assert embedded.equals(tables)
    assert embedded.schema.metadata[b"huggingface"] == tables.schema.metadata[b"huggingface"]


# the draw


@given(
    y=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor),
    seed=st.integers(0, 2**70),
    data=st.data(),
)
def test_draw_is_stratified_nested_and_sorted(y: torch.Tensor, seed: int, data: st.DataObject) -> None:
    large = data.draw(st.integers(1, len(y)))
    small = data.draw(st.integers(1, large))
    index = draw_stratified(y, large, seed)
    assert len(set(index.tolist())) == large
    assert index.tolist() == sorted(index.tolist())
    assert set(draw_stratified(y, small, seed).tolist()) <= set(index.tolist())
    drawn, present = y[index].bincount(minlength=5), y.bincount(minlength=5)
    unfinished = drawn[drawn < present]  # classes that could have given more
    if len(unfinished):
        assert int(drawn.max()) - int(unfinished.min()) <= 1


@pytest.mark.parametrize("n", [1, 9, 10, 128, 256, 1003, 9999, 10_000])
def test_class_counts_differ_by_at_most_one(n: int) -> None:
    y = torch.arange(10).repeat(1000)
    counts = y[draw_stratified(y, n, seed=0)].bincount(minlength=10)
    assert int(counts.sum()) == n
    assert int(counts.max() - counts.min()) <= 1


def test_draw_never_changes_between_versions() -> None:
    y = torch.arange(3).repeat(10)
    assert draw_stratified(y, 7, seed=0).tolist() == [1, 2, 3, 11, 13, 20, 21]
    assert draw_stratified(y, 7, seed=1).tolist() != [1, 2, 3, 11, 13, 20, 21]


def draw_from_global_generators() -> tuple[float, float]:
    return float(torch.rand(())), float(np.random.rand())  # noqa: NPY002 - the global one is meant


def test_draw_neither_reads_nor_advances_a_global_generator() -> None:
    states = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    undisturbed = draw_from_global_generators()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    first = load_dataset("fashion_mnist", n=30, seed=5)
    assert draw_from_global_generators() == undisturbed
    assert load_dataset("fashion_mnist", n=30, seed=5).digest == first.digest
    assert load_dataset("fashion_mnist", n=30, seed=6).digest != first.digest


@pytest.mark.parametrize("n", [0, -1, 10_001])
def test_n_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=rf"n takes 1 to 10000, .*; it is {n}\. Choose"):
        load_data("fashion_mnist", n=n)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"seed takes 0 or a larger number; it is -1\."):
        load_data("fashion_mnist", n=5, seed=-1)


# the digest


def test_digest_depends_on_values_shape_and_labels_only() -> None:
    x, y = torch.rand(4, 3, 5, 6), torch.tensor([0, 1, 2, 0])
    digest = digest_data(x, y)
    assert digest == digest_data(x.clone().requires_grad_(), y.to(torch.int32))
    assert digest == digest_data(x.to(memory_format=torch.channels_last), y)
    others = [digest_data(x.flip(0), y), digest_data(x.reshape(4, 3, 6, 5), y), digest_data(x, y.flip(0) + 1)]
    assert len({digest, *others}) == 4


def test_digest_is_what_its_docstring_says() -> None:
    x, y = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1), torch.tensor([0, 1, 0])
    content = (
        b"<f4[3, 1, 1, 1]\n"
        + np.array([0, 0.5, 1], "<f4").tobytes()
        + b"<i8[3]\n"
        + np.array([0, 1, 0], "<i8").tobytes()
    )
    assert digest_data(x, y) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("x_shape", "y_shape"), [((2, 3, 4), (2,)), ((2, 1, 4, 4), (3,)), ((2, 1, 4, 4), (2, 1))])
def test_digest_refuses_other_shapes(x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="images b c h w and as many labels b"):
        digest_data(torch.zeros(x_shape), torch.zeros(y_shape, dtype=torch.int64))


# names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("minst", r"Did you mean mnist\?"),
        ("Fashion-MNIST", r"Did you mean fashion_mnist\?"),
        ("cifar", r"Did you mean cifar10\?"),
        ("ylecun/mnist", r"Did you mean hf:ylecun/mnist\?"),
        ("zzzzzzz", r"See 'robench list datasets'\."),
    ],
)
def test_unknown_name_says_what_there_is(name: str, meant: str) -> None:
    with pytest.raises(
        UsageError, match=f'"{name}" is not known; there are cifar10, fashion_mnist, mnist, svhn, .*{meant}'
    ):
        load_data(name)


@pytest.mark.parametrize("split", ["val", "Test", "validation"])
def test_unknown_split_of_a_known_dataset(split: str) -> None:
    with pytest.raises(UsageError, match=f'has the splits train and test; split is "{split}"'):
        load_data("fashion_mnist", split)


@pytest.mark.parametrize("split", ["test[:10]", "../test", "", "*"])
def test_split_is_a_plain_name(split: str) -> None:
    with pytest.raises(UsageError, match=r"split takes a name such as test or train; it is"):
        load_data("mnist", split)


@pytest.mark.parametrize("name", ["hf:", "hf:mnist", "hf:a/b/c/d", "hf:a/../b c"])
def test_address_on_the_hub_has_a_form(name: str) -> None:
    with pytest.raises(UsageError, match=r"written hf:org/name or hf:org/name/configuration; it is"):
        load_data(name)


def test_list_says_where_data_would_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "test-00000-of-00001.parquet").touch()  # listing opens nothing
    listed = {info.name: (info.image_shape, info.num_classes, info.source) for info in list_datasets(tmp_path)}
    assert listed == {
        "cifar10": ((3, 32, 32), 10, "hub"),
        "fashion_mnist": ((1, 28, 28), 10, "embedded"),
        "mnist": ((1, 28, 28), 10, "folder"),
        "svhn": ((3, 32, 32), 10, "hub"),
    }
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path))
    assert {info.name for info in list_datasets() if info.source == "folder"} == {"mnist"}


def test_listing_imports_neither_torch_nor_datasets() -> None:
    script = (
        "import sys; from robench.data_names import list_datasets; names = [i.name for i in list_datasets()];"
        "print(len(names), {'torch', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "4 set()\n"


def test_importing_does_not_need_datasets() -> None:
    script = (
        "import sys; sys.modules['datasets'] = None; sys.modules['pyarrow'] = None; import robench.data; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "ok\n"


# plugins


def offer_plugin(monkeypatch: pytest.MonkeyPatch, function: Callable[[str], Any], name: str = "own") -> None:
    class Point:
        def load(self) -> Callable[[str], Any]:
            return function

    points = {name: Point()}
    monkeypatch.setattr("robench.data.list_plugins", lambda: points)
    monkeypatch.setattr("robench.data_names.list_plugins", lambda: points)


def test_plugin_is_drawn_from_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(20, 2, 3, 3), torch.arange(20) % 4
    offer_plugin(monkeypatch, lambda split: (x, y) if split == "test" else (x[:3], y[:3]))
    whole, drawn = load_dataset("own"), load_dataset("own", n=8, seed=2)
    assert torch.equal(whole.x, x)
    assert whole.class_names == ("0", "1", "2", "3")
    assert torch.equal(drawn.x, x[drawn.index])
    assert drawn.y.bincount().tolist() == [2] * 4
    assert len(load_dataset("own", "train").y) == 3
    assert ("own", "plugin") in [(info.name, info.source) for info in list_datasets()]


def test_plugins_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("own", "somewhere:load", "robench.datasets")
    groups = {"robench.datasets": (point,)}
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: groups.get(group, ()))
    assert data_names.list_plugins() == {"own": point}
    with pytest.raises(PluginError, match=r'plugin "own" .*; ModuleNotFoundError came'):
        load_data("own")


GOOD = torch.zeros(2, 1, 3, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (GOOD[0], r"should return \(images, labels\)|images should be float32"),
        ((GOOD[0].double(), GOOD[1]), r"images should be float32 b c h w; they are torch\.float64 \(2, 1, 3, 3\)"),
        ((GOOD[0][0], GOOD[1]), r"images should be float32 b c h w; they are torch\.float32 \(1, 3, 3\)"),
        ((GOOD[0].numpy(), GOOD[1]), r"images should be float32 b c h w; they are ndarray"),
        ((GOOD[0][:0], GOOD[1][:0]), r"images should be float32 b c h w"),
        ((GOOD[0], GOOD[1].int()), r"labels should be int64 from 0, one for each of 2 images; they are torch\.int32"),
        ((GOOD[0], GOOD[1] - 1), r"labels should be int64 from 0"),
        ((GOOD[0], GOOD[1] * 10**12), r"labels should be int64 from 0"),
        ((GOOD[0], GOOD[1][:1]), r"labels should be int64 from 0"),
        ((GOOD[0] + 1.5, GOOD[1]), r"images should be in \[0, 1\]"),
        ((GOOD[0] * float("nan"), GOOD[1]), r"images should be in \[0, 1\]"),
    ],
)
def test_plugin_that_breaks_the_contract_is_named(monkeypatch: pytest.MonkeyPatch, answer: Any, message: str) -> None:
    offer_plugin(monkeypatch, lambda split: answer)
    with pytest.raises(PluginError, match=rf'dataset plugin "own".*({message})'):
        load_data("own")


def test_plugin_s_own_usage_error_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(split: str) -> Any:
        raise UsageError(f"no split {split} here. Choose test.")

    offer_plugin(monkeypatch, refuse)
    with pytest.raises(UsageError, match=r"^no split train here\. Choose test\.$"):
        load_data("own", "train")
