"""Datasets from the hub: what is asked of it, and what is said when it is away."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import robench.data_hub
from robench.data import load_data, load_dataset
from robench.errors import UsageError


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's data folder, hub or home unless it says so."""
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10"])
def test_switched_off_hub_says_how_to_get_the_data(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load_data(name)
    assert str(caught.value) == (
        f'dataset "{name}", split test: the Hugging Face hub is switched off by HF_HUB_OFFLINE, and its cache has no'
        f" copy. Put its files at <folder>/{name}/test-*.parquet and pass --data-dir <folder>,"
        " or set ROBENCH_DATA=<folder>."
    )
    assert time.monotonic() - start < 20


def test_training_split_of_the_embedded_dataset_is_not_embedded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"split train: nothing matches .*/fashion_mnist/train-\*\.parquet, the Hugging"
    ):
        load_data("fashion_mnist", "train")


def test_address_on_an_unreachable_hub_is_one_quick_line(tmp_path: Path) -> None:
    script = (
        "from robench.data import load_data\nfrom robench.errors import UsageError\n"
        "try:\n    load_data('hf:org/name')\nexcept UsageError as error:\n    print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    start = time.monotonic()
    done = subprocess.run(  # a new process: the libraries read the address when they are imported
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert time.monotonic() - start < 60  # most of it imports; the library's own retries would take 23 s more
    assert done.stderr == ""
    assert done.stdout == (
        'dataset "hf:org/name", split test: the Hugging Face hub cannot be reached, and its cache has no copy.'
        " Get a Parquet file with columns image and label in another way, and pass its path as the dataset.\n"
    )


def test_hub_that_answers_is_asked_for_repository_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, format="PNG")
    images = [{"bytes": buffer.getvalue(), "path": None}] * 4
    asked: list[Any] = []

    def answer(repo: str, config: str | None, *, split: str, keep_in_memory: bool) -> Any:
        asked.append((repo, config, split, keep_in_memory, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"img": images, "label": [0, 1, 2, 3]})

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(robench.data_hub, "_hub_answers", lambda repo: True)
    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_data("svhn", "train")[0].shape == (4, 3, 32, 32)
    assert load_dataset("hf:org/name", "val").y.tolist() == [0, 1, 2, 3]
    assert len(load_data("hf:org/name/config", n=2)[1]) == 2
    monkeypatch.setattr(robench.data_hub, "_hub_answers", lambda repo: False)  # a copy in the cache serves
    assert len(load_data("hf:org/name")[1]) == 4
    assert asked == [
        ("ufldl-stanford/svhn", "cropped_digits", "train", True, False),
        ("org/name", None, "val", True, False),
        ("org/name", "config", "test", True, False),
        ("org/name", None, "test", True, True),
    ]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_refusal_of_the_hub_is_passed_on_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def answer(*_: Any, **__: Any) -> Any:
        raise ValueError("Unknown split \"val\". Should be one of ['train'].\nmore")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(robench.data_hub, "_hub_answers", lambda repo: True)
    monkeypatch.setattr(datasets, "load_dataset", answer)
    with pytest.raises(
        UsageError, match=r"org/name cannot be had from the Hugging Face hub \(Unknown .*\['train'\]\.\)\."
    ):
        load_data("hf:org/name", "val")


def test_folder_with_the_repository_s_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"org/name hides the hub's repository\. Work in another folder"):
        load_data("hf:org/name")


def test_settings_of_the_library_are_put_back() -> None:
    import datasets

    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    load_data("fashion_mnist", n=1)
    assert before == (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled())
