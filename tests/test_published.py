"""The leaderboards of this repository: what `leaderboard check` asks of each row, and its images judged again.

A row of a defense that is not one of robench's is looked at alike, but its code runs only where ROBENCH_TRUST is 1: CI
of a pull request runs nobody's code before someone has read it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from page_rows import find_unlike
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from robench.board import Board, load_boards
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
from robench.settings import RANDOMIZED_REPEATS
from robench.stats import answers_differ
from robench.submission import check_form
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST
from robench.verify import verify_evidence

FOLDER = Path(__file__).parents[1] / "leaderboards"
ROWS = list(all_rows(FOLDER))
NAMES = [f"{path.stem}-{row['defense']}-{row['protocol']}" for path, row in ROWS]


@pytest.fixture(scope="module")
def loaded() -> list[Board]:
    return load_boards(FOLDER)


@pytest.fixture(scope="module")
def page(published_page: Path) -> str:
    return published_page.read_text(encoding="utf-8")


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


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_turns_no_line_ends_of_what_digests_name(tmp_path: Path) -> None:
    """As it does on Windows by default. A cell of a CSV may hold a line end of its own."""
    root, repository = FOLDER.parent, tmp_path / "repository"
    bundle = FOLDER / EVIDENCE / ROWS[0][1]["evidence"]
    files = [*boards(FOLDER), *bundle.iterdir(), *root.glob("tests/golden/*"), root / "defenses" / "__init__.py"]
    contents = {path.relative_to(root): path.read_bytes() for path in [*files, root / ".gitattributes"]}
    contents[Path("leaderboards", "own.csv")] = b'a,"b\r\nc"\n'
    for path, content in contents.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_bytes(content)
    windows = ("git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@example.org")
    for words in (["init"], ["add", "."], ["commit", "-m", "all"], ["clone", ".", tmp_path / "clone"]):
        subprocess.run([*windows, *words], cwd=repository, check=True, capture_output=True)
    assert [path for path, content in contents.items() if (tmp_path / "clone" / path).read_bytes() != content] == []


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
    """Of a defense whose answers take seconds only every sixteenth image is judged again, on few fresh answers."""
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
                votes = judge(defense, x[::16], min(spec.judge_repeats, RANDOMIZED_REPEATS)).numpy()
            fresh = Answers(votes, stored.labels[::16])
            assert not answers_differ(stored.right[::16], fresh.right, stored.repeats, fresh.repeats)
        return
    report = verify_evidence(bundle.folder, row=row, board=path.name, device="cpu", trust=True)
    assert report.holds, report.failures


def test_the_readme_shows_the_rows_of_today() -> None:
    """Its picture of the page, by the digest that `make picture` leaves in it, and its table."""
    board = FOLDER / "fashion_mnist-linf-0.1.csv"
    picture = Image.open(FOLDER.parent / "docs" / "pictures" / "leaderboards.png")
    assert isinstance(picture, PngImageFile)
    assert picture.text["rows"] == hashlib.sha256(board.read_bytes()).hexdigest()
    (loaded,) = load_boards(FOLDER, [board.stem])
    assert as_markdown(loaded) in (FOLDER.parent / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_the_files_say(page: str, loaded: list[Board]) -> None:
    assert len(page.encode()) < 2_000_000
    assert find_unlike(page, loaded) == []


@pytest.mark.parametrize("name", ["robust_acc", "robust_low", "robust_high", "clean_acc", "clean_low", "clean_high"])
def test_an_edited_figure_of_the_page_is_found(name: str, page: str, loaded: list[Board]) -> None:
    """In the middle of the page, with its neighbours and its plots as they were."""
    board = loaded[len(loaded) // 2]
    row = board.entries[1].row
    kind, _ = name.split("_")
    figures = [f"{100 * float(row[f'{kind}_{end}']):.1f}" for end in ("acc", "low", "high")]
    edited = [
        f"{100 * float(row[key]) + 3 * (key == name):.1f}" for key in (f"{kind}_{e}" for e in ("acc", "low", "high"))
    ]
    before, after = (f">{value} <small>[{low}, {high}]</small></td>" for value, low, high in (figures, edited))
    start = page.index(f'<h2 id="{board.name}">')
    assert before in page[start:]
    forged = page[:start] + page[start:].replace(before, after, 1)
    assert find_unlike(forged, loaded) == [f"{board.name}: {row['evidence']}"]


def test_rows_that_are_missing_or_changed_places_are_found_on_the_page(page: str, loaded: list[Board]) -> None:
    board = loaded[0]
    fewer, turned = (
        dataclasses.replace(board, entries=board.entries[step]) for step in (slice(1, None), slice(None, None, -1))
    )
    assert f"{board.name}: {len(board.entries)} rows" in find_unlike(page, [fewer, *loaded[1:]])
    assert len(find_unlike(page, [turned, *loaded[1:]])) >= 2
    assert find_unlike(page, loaded[1:]) == [f"the boards are {', '.join(one.name for one in loaded)}"]
