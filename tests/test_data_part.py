"""Rows that were drawn from a part of a split can be checked by those who have the whole of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from board_toys import EPS, TOY
from hub_toys import read_fashion, write_test_split

from robench import ThreatModel
from robench.data import load_dataset
from robench.data_names import find_data_root, find_part, list_folder_files
from robench.data_part import BYTES, digest_each, load_of_digest
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.leaderboard import read_rows
from robench.registry import load_defense
from robench.verify import verify, verify_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Data folders of an MNIST made of Fashion-MNIST: a part, the whole in another order, and one image too few."""
    table = read_fashion().slice(0, 300)
    order = np.random.default_rng(0).permutation(300)
    part = write_test_split(tmp_path / "part", "mnist", table.slice(0, 100))
    whole = write_test_split(tmp_path / "whole", "mnist", table.take(order))
    fewer = write_test_split(tmp_path / "fewer", "mnist", table.take(order[order != 7]))
    told = tmp_path / "part.sha256"
    told.write_bytes(b"".join(digest_each(load_dataset("mnist", "test", data_dir=part).x)))
    monkeypatch.setattr("robench.data_part.find_part", lambda name, split: told)
    return part, whole, fewer


def test_a_part_is_found_in_the_whole_split(folders: tuple[Path, Path, Path]) -> None:
    part, whole, fewer = folders
    wanted = load_dataset("mnist", "test", 40, 3, part)
    found = load_of_digest(wanted.digest, "mnist", 40, 3, whole)
    assert found.digest == wanted.digest
    assert found.index.tolist() == wanted.index.tolist()  # as the table of a run has them
    assert found.split_size == 300
    assert load_of_digest(wanted.digest, "mnist", 40, 3, part).digest == wanted.digest
    for where in (whole, fewer):
        other = load_dataset("mnist", "test", 40, 3, where)
        assert load_of_digest("0" * 64, "mnist", 40, 3, where).digest == other.digest, "what is asked for is there"
    assert load_of_digest(wanted.digest, "mnist", 40, 3, fewer).digest != wanted.digest


def test_a_run_on_a_part_is_judged_on_the_whole_split(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    part, whole, fewer = folders
    data = load_dataset("mnist", "test", 40, 0, data_dir=part)
    evaluate(load_defense(TOY), "fgsm", ThreatModel("linf", EPS), data, out=tmp_path / "run", defense_spec=TOY)
    assert verify_run(tmp_path / "run", data_dir=whole).holds
    with pytest.raises(UsageError, match=r'cannot be checked: "mnist" here holds other images'):
        verify_run(tmp_path / "run", data_dir=fewer)


def test_no_part_is_told_of_what_is_shipped_or_not_known() -> None:
    assert find_part("fashion_mnist", "test") is None
    assert find_part("../cifar10", "test") is None
    assert find_part("cifar10", "train") is None


@pytest.mark.data
def test_the_published_rows_on_cifar10_are_of_the_part_that_is_told(tmp_path: Path) -> None:
    """Among other images, in another order: the row of the convnet holds there."""
    path = find_part("cifar10", "test")
    assert path is not None
    stored = path.read_bytes()
    own = digest_each(load_dataset("cifar10", "test").x)
    assert [stored[start : start + BYTES] for start in range(0, len(stored), BYTES)] == own
    root = find_data_root(None)
    assert root is not None
    tables = [pq.read_table(list_folder_files(root, "cifar10", split)[0]) for split in ("test", "train")]
    table = pa.concat_tables([tables[0], tables[1].slice(0, 1000)])
    whole = write_test_split(tmp_path, "cifar10", table.take(np.random.default_rng(0).permutation(len(table))))
    rows = read_rows(ROOT / "leaderboards" / "cifar10-linf-8_255.csv")
    (digest,) = (row["evidence"] for row in rows if row["defense"] == "convnet")
    report = verify(ROOT / "leaderboards" / "evidence" / digest, data_dir=whole, images=8, device="cpu")
    assert report.holds, report.failures
