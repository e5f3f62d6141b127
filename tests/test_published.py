"""The leaderboards of this repository: what `leaderboard check` asks of each row, and its images judged again.

A row of a defense that is not one of robench's is looked at alike, but its code runs only where ROBENCH_TRUST is 1: CI
of a pull request runs nobody's code before someone has read it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from robench.board import load_boards
from robench.bundle import bundle_folder, read_bundle
from robench.data import load_dataset
from robench.defense import Defense, weights_digest
from robench.estimate import Answers
from robench.judge import check_bounds, judge
from robench.leaderboard import Row, rank_rows, read_rows, rows_csv
from robench.plan import RunSpec
from robench.publish import EVIDENCE, all_rows, boards
from robench.registry import builtin_names, load_defense, parse_spec
from robench.report.tables import as_markdown
from robench.rng import seeded
from robench.stats import answers_differ
from robench.submission import check_form
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST
from robench.verify import verify_evidence

FOLDER = Path(__file__).parents[1] / "leaderboards"
ROWS = list(all_rows(FOLDER))
NAMES = [f"{path.stem}-{row['defense']}-{row['protocol']}" for path, row in ROWS]


def load_trusted(spec: RunSpec) -> Defense:
    """A row's defense; the test is skipped where that is code that nobody has vouched for."""
    if parse_spec(spec.defense)[0] not in builtin_names("defense") and os.environ.get("ROBENCH_TRUST") != "1":
        pytest.skip(f"{spec.defense} is not one of robench's defenses; ROBENCH_TRUST=1 runs its code")
    return load_defense(spec.defense, spec.dataset, **spec.defense_options)


def marks(row: Row, path: Path) -> list[pytest.MarkDecorator]:
    """Judging again takes a while for randomized defenses; data other than Fashion-MNIST may not be at hand."""
    slow = [pytest.mark.slow] if row["randomized"] == "yes" or int(row["n"]) > 150 else []
    return slow if path.stem.startswith("fashion_mnist") else [*slow, pytest.mark.data]


def test_each_file_is_as_the_command_writes_it() -> None:
    assert ROWS
    for path in boards(FOLDER):
        assert rows_csv(rank_rows(read_rows(path))).encode() == path.read_bytes()


def test_every_row_agrees_with_its_evidence_and_every_bundle_has_a_row() -> None:
    for board in load_boards(FOLDER):
        for entry in board.entries:
            assert entry.problem == ""
            assert entry.row["audit_verdict"] in ("pass", "suspect", "masked")
    digests = {row["evidence"] for _, row in ROWS}
    assert {folder.name for folder in (FOLDER / EVIDENCE).iterdir()} == digests


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=NAMES)
def test_the_row_may_be_published(row: Row) -> None:
    report, found = check_form(FOLDER, row["evidence"])
    assert report.failures == []
    assert found is not None
    bundle, told = found
    assert told == row
    assert weights_digest(load_trusted(bundle.spec)) == bundle.spec.weights_digest


@pytest.mark.parametrize(
    ("path", "row"),
    [pytest.param(path, row, id=name, marks=marks(row, path)) for (path, row), name in zip(ROWS, NAMES, strict=True)],
)
def test_the_row_holds(path: Path, row: Row) -> None:
    """Of a defense whose answers take seconds only every sixteenth image is judged again, on as many fresh answers."""
    bundle = read_bundle(bundle_folder(FOLDER / EVIDENCE, row["evidence"]))
    spec = bundle.spec
    defense = load_trusted(spec)
    if defense.first_look:
        data = load_dataset(spec.dataset, "test", spec.n, spec.seed)
        result = bundle.result(data.x)
        assert bundle.row() == {**row, "rank": ""}
        for name, x in ((CLEAN, data.x), (WORST, torch.from_numpy(result.images(WORST)))):
            assert check_bounds(data.x, x, ThreatModel(spec.norm, spec.eps[-1])).broken_rule() is None
            stored = result.answers(name)
            assert stored is not None
            with seeded("published", name):
                votes = judge(defense, x[::16], spec.judge_repeats).numpy()
            fresh = Answers(votes, stored.labels[::16])
            assert not answers_differ(stored.right[::16], fresh.right, stored.repeats, fresh.repeats)
        return
    report = verify_evidence(bundle_folder(FOLDER / EVIDENCE, row["evidence"]), row=row, device="cpu", trust=True)
    assert report.holds, report.failures


def test_the_readme_shows_the_rows_of_today() -> None:
    """Its picture of the page, by the digest that `make picture` leaves in it, and its table."""
    board = FOLDER / "fashion_mnist-linf-0.1.csv"
    picture = Image.open(FOLDER.parent / "docs" / "pictures" / "leaderboards.png")
    assert isinstance(picture, PngImageFile)
    assert picture.text["rows"] == hashlib.sha256(board.read_bytes()).hexdigest()
    (loaded,) = load_boards(FOLDER, [board.stem])
    assert as_markdown(loaded) in (FOLDER.parent / "README.md").read_text(encoding="utf-8")


def test_the_page_is_made_from_these_files() -> None:
    """The page in the repository names every row."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 2_000_000
    for _, row in ROWS:
        assert row["evidence"] in page
