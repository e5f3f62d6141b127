"""Leaderboards as they are shown: tables, neighbours that cannot be told apart, figures of others, the page."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from board_toys import BOARD, FORMULA, HOSTILE, TOY, make_boards, make_row
from markdown_it import MarkdownIt
from markupsafe import escape

from robench import ThreatModel
from robench.board import Board, Entry, load_boards, read_references
from robench.check_names import QUESTIONS
from robench.command_board import print_tables
from robench.errors import DataError, UsageError
from robench.estimate import Answers
from robench.evaluate import evaluate
from robench.leaderboard import add_row, rank_rows, read_rows, rows_csv
from robench.publish import publish
from robench.registry import load_defense, resolve
from robench.report.board import render_boards
from robench.report.board_charts import PLOTS
from robench.report.markdown import markdown_table
from robench.report.tables import HEADINGS, as_csv, as_json, as_latex, as_markdown, table_cells
from robench.unit_table import WORST
from robench.weights import find_card


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boards(tmp_path_factory.mktemp("boards"))


@pytest.fixture(scope="module")
def page(boards: Path) -> str:
    return render_boards(load_boards(boards))


def the_board(boards: Path) -> Board:
    (board,) = load_boards(boards, [BOARD])
    return board


# reading


def test_boards_are_read_with_their_threat_models(boards: Path) -> None:
    found = load_boards(boards)
    assert [(one.dataset, one.norm, one.eps) for one in found] == [
        ("fashion_mnist", "linf", "0.03"),
        ("mnist", "l2", "1.5"),
    ]
    with pytest.raises(UsageError, match=r"there is no folder nowhere. 'robench leaderboard add RUN' makes one"):
        load_boards(Path("nowhere"))
    with pytest.raises(UsageError, match="no leaderboard nothing"):
        load_boards(boards, ["nothing"])
    (boards / "notes.csv").write_text("")
    with pytest.raises(DataError, match=r"notes\.csv"):
        load_boards(boards)
    (boards / "notes.csv").unlink()
    with pytest.raises(UsageError, match="there are: none"):
        load_boards(boards / "evidence")


def test_a_row_says_what_its_evidence_lacks(boards: Path, tmp_path: Path) -> None:
    entries = the_board(boards).entries
    assert {entry.row["defense"]: bool(entry.problem) for entry in entries}["prototypes"] is False
    assert sum("no evidence" in entry.problem for entry in entries) == 4
    other = make_boards(tmp_path)
    (path,) = other.glob("fashion*.csv")
    (folder,) = (other / "evidence").iterdir()
    rows = read_rows(path)
    changed = {"n": "1000", "autoattack": "0.9120"}  # a cell of the evidence, and one of which it knows nothing
    path.write_text(rows_csv([{**row, **changed} if row["defense"] == "prototypes" else row for row in rows]))
    (entry,) = (one for one in the_board(other).entries if one.row["defense"] == "prototypes")
    assert entry.problem == "The row does not agree with its evidence in: n, autoattack"
    (folder / "examples.parquet").write_bytes(b"")
    (entry,) = (one for one in the_board(other).entries if one.row["defense"] == "prototypes")
    assert "examples.parquet was changed" in entry.problem


def test_neighbours_are_told_apart_by_the_paired_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same defense under another name's weights would tie; one whose attack is far stronger is distinct."""
    weak, strong = "noise(tries=1)", "pgd(steps=5)"
    for name, attack, protocol_n in (("weak", weak, 60), ("same", weak, 50), ("strong", strong, 60)):
        evaluate(
            load_defense(TOY),
            attack,
            ThreatModel("linf", 0.08),
            "fashion_mnist",
            n=protocol_n,
            out=tmp_path / name,
            defense_spec=TOY,
        )
        publish([tmp_path / name], tmp_path / name / "boards")
    entries = [load_boards(tmp_path / name / "boards")[0].entries[0] for name in ("weak", "same", "strong")]
    from robench.board import _compare

    tie, apart = _compare(entries[0], entries[1]), _compare(entries[0], entries[2])
    assert tie is not None
    assert apart is not None
    assert (tie.distinct, apart.distinct) == (False, True)
    assert tie.name == f"1. {entries[1].row['defense']}"
    assert 0 < tie.images <= 50
    assert apart.images == 60
    assert _compare(entries[0], None) is None
    assert entries[1].bundle is not None
    figures = entries[1].bundle.figures
    found = figures.answers(WORST)
    assert found is not None
    monkeypatch.setattr(figures, "answers", lambda attack, eps: Answers(found.votes, (found.labels + 1) % 10))
    assert _compare(entries[0], entries[1]) is None, "positions of another split are no shared images"
    assert _compare(entries[0], Entry(make_row(), None, "")) is None


# figures of others


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defense,robust_acc\n", "must have the columns"),
        ("defense,clean_acc,robust_acc,attack,source,date,note\na,99,88,AA,paper,2020,\n", "shares between 0 and 1"),
        ("defense,clean_acc,robust_acc,attack,source,date,note\na,0.99,0.88,AA,,2020,\n", "needs a source"),
        ("defense,clean_acc,robust_acc,attack,source,date,note\na,0.99,many,AA,paper,2020,\n", "cannot be read"),
        ("defense,clean_acc,robust_acc,attack,source,date,note\na,0.99\n", "cannot be read|needs a source"),
    ],
)
def test_a_wrong_reference_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_references(tmp_path / "a.csv")


def test_shipped_references_can_be_read_also_as_a_spreadsheet_saves_them(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "leaderboards" / "reference"
    for path in folder.glob("*.csv"):
        assert read_references(path)
        saved = tmp_path / path.name
        saved.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
        assert read_references(saved) == read_references(path)


# tables


def test_markdown_has_a_row_for_each_and_escapes(boards: Path) -> None:
    lines = as_markdown(the_board(boards)).splitlines()
    assert len(lines) == 2 + 5
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in lines)
    assert any(r"\<script\>" in line for line in lines)
    assert lines[2].startswith("| 1")


def test_latex_escapes(boards: Path) -> None:
    text = as_latex(the_board(boards))
    assert r"partial \$x\$" in text
    assert r"\_hidden" in text
    assert r"\&amp;" in text
    assert text.count(r"\\") == 6


def test_markdown_shows_every_cell_as_it_is() -> None:
    signs = "![x](http://example.org/x.png) [y](http://example.org) ~~z~~ &lt; `a` <b> $c$ | \\ *d* _e_"
    table = markdown_table(["one"], [[signs]])
    html = MarkdownIt("gfm-like", {"linkify": False}).render(table)
    assert not re.search(r"<(img|a|s|code|em|b)\b", html)
    (cell,) = re.findall(r"<td>(.*)</td>", html)
    assert unescape(cell) == signs


def test_tables_tell_what_evidence_does_not_back_and_what_was_not_compared(
    boards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = as_markdown(the_board(boards)).splitlines()[2:]
    assert sum("(not backed by evidence)" in line for line in lines) == 4
    assert not any("prototypes" in line and "not backed" in line for line in lines)
    assert lines[0].startswith("| 1? ")  # the next row has no images to compare
    print_tables(boards, [BOARD], "csv")
    assert sum("There is no evidence for this row." in record.getMessage() for record in caplog.records) == 4
    with pytest.raises(UsageError, match='--format must be csv, md, latex, json, robustbench; got "html"'):
        print_tables(boards, [BOARD], "html")  # a page is what build makes, not export
    path = tmp_path / "mnist-l2-1.5.csv"
    for name, low in (("first", "0.5000"), ("second", "0.4000")):
        add_row(make_row(name, low, protocol="quick-1"), path)
    add_row(make_row("alone", "0.1000", protocol="standard-1"), path)
    ranks = [cells[0] for cells in table_cells(load_boards(tmp_path)[0])]
    assert sorted(ranks) == ["1", "1?", "2"]


def test_csv_and_json_are_the_rows(boards: Path) -> None:
    board = the_board(boards)
    assert as_csv(board) == (boards / f"{BOARD}.csv").read_text()
    assert [row["defense"] for row in json.loads(as_json(board))] == [entry.row["defense"] for entry in board.entries]
    cells = [row[1] for row in csv.reader(io.StringIO(as_csv(board)))]
    assert f"'{FORMULA}" in cells  # no spreadsheet takes it for a formula


# the page


class Elements(HTMLParser):
    """Counts elements and keeps every attribute that could leave the page."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


def test_the_page_is_self_contained_and_small(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert elements.counts["script"] == 1
    assert all(link.startswith(("data:", "#")) for link in elements.links)
    assert len(page.encode()) < 2_000_000
    assert elements.counts["svg"] == 2 * 2 + PLOTS
    assert elements.counts["img"] == 2  # so many are broken of the row with evidence
    told = re.findall(r'<img src="[^"]*" alt="Original, worst case and difference: ([^"]*)">', page)
    assert told == re.findall("<figcaption>(.* → .*)</figcaption>", page)
    assert len(told) == 2


@pytest.mark.parametrize("cascade", [True, False])
def test_attacks_stand_in_the_order_of_the_run_and_a_cascade_says_so(cascade: bool, tmp_path: Path) -> None:
    evaluate(
        load_defense(TOY),
        "square(queries=9),fgsm",
        ThreatModel("linf", 0.08),
        "fashion_mnist",
        n=40,
        cascade=cascade,
        out=tmp_path / "run",
        defense_spec=TOY,
    )
    publish([tmp_path / "run"], tmp_path / "boards")
    (board,) = load_boards(tmp_path / "boards")
    (entry,) = board.entries
    assert entry.bundle is not None
    table = entry.bundle.figures.table
    right = {name: int((table[table["attack"] == name]["accuracy"] == 1).sum()) for name in table["attack"].unique()}
    assert 0 < right["square(queries=9)"] < right["clean"] < 40
    lines = re.findall(r"([^\s>]+) (\S+) % <small>\((\d+) attacked\)", render_boards([board]))
    left = right["square(queries=9)"] if cascade else right["clean"]
    assert lines == [
        ("square(queries=9)", f"{100 * right['square(queries=9)'] / 40:.1f}", str(right["clean"])),
        ("fgsm", f"{100 * right['fgsm'] / 40:.1f}", str(left)),
    ]
    heading = "left standing after each attack, in order" if cascade else "under each attack"
    assert f"<dt>{heading}</dt>" in render_boards([board])
    attack = entry.row["worst_attack"]
    assert entry.found_most == (f"{attack} (in turn)" if cascade else attack)


def test_the_attack_that_found_most_of_a_cascade_is_not_called_the_strongest() -> None:
    shown = {"standard-1": "apgd (in turn)", "quick-1": "apgd", "": "apgd"}
    for protocol, text in shown.items():
        board = Board("a", "a", "linf", "1", (Entry(make_row(protocol=protocol, worst_attack="apgd"), None, ""),))
        page = render_boards([board])
        assert f'<td class="optional">{text}</td>' in page
        assert f"found most errors: {text}</dd>" in page
        assert ("so that an early one had more to find" in page) == (protocol == "standard-1")
        assert dict(zip(HEADINGS, table_cells(board)[0], strict=True))["found most errors"] == text
    unknown = Entry(make_row(protocol="standard-1"), None, "")
    assert unknown.found_most == ""
    assert "found most errors:" not in render_boards([Board("a", "a", "linf", "1", (unknown,))])


def test_a_row_without_evidence_is_a_cascade_where_its_protocol_is_one() -> None:
    headings = {"standard-1": "left standing after", "quick-1": "under each attack<", "": "under each attack<"}
    for protocol, heading in headings.items():
        entry = Entry(make_row(protocol=protocol, randomized="no"), None, "")
        assert f"<dt>{heading}" in render_boards([Board("a", "a", "linf", "1", (entry,))])
    randomized = Entry(make_row(protocol="standard-1", randomized="yes"), None, "")
    assert "any right answer stays wrong</dt>" in render_boards([Board("a", "a", "linf", "1", (randomized,))])


def test_the_page_is_the_same_twice(boards: Path, page: str) -> None:
    assert render_boards(load_boards(boards)) == page


def test_a_page_without_the_data_says_so(
    boards: Path, page: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(*_: object) -> None:
        raise UsageError("no data")

    monkeypatch.setattr("robench.report.pictures.load_of_digest", absent)
    bare = render_boards(load_boards(boards))
    assert "<img" in page
    assert "<img" not in bare
    (record,) = caplog.records
    assert "no adversarial images of fashion_mnist" in record.getMessage()


def test_the_page_says_what_a_masked_row_is_below() -> None:
    rows = rank_rows(
        [
            make_row("masked", "0.9000", protocol="standard-1", audit_verdict="masked"),
            make_row("last", "0.1000", protocol="standard-1"),
            make_row("weaker protocol", "0.2000", protocol="quick-1"),
        ]
    )
    assert [row["defense"] for row in rows] == ["last", "masked", "weaker protocol"]
    page = render_boards([Board("a", "a", "linf", "1", tuple(Entry(row, None, "") for row in rows))])
    assert "masked is below all others of its protocol." in page


def test_everything_from_outside_is_escaped(page: str) -> None:
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3  # the row, a chart's legend, a reference
    assert "partial $x$" in page
    assert "&amp;amp;" in page


def audited(board: Board, **changes: Any) -> tuple[dict[str, Any], Board]:
    """The audit of the board's row with evidence, changed, and the board with that row alone."""
    (entry,) = (one for one in board.entries if one.bundle is not None)
    assert entry.bundle is not None
    assert entry.bundle.audit is not None
    audit = {**entry.bundle.audit, **changes}
    changed = dataclasses.replace(entry, bundle=dataclasses.replace(entry.bundle, audit=audit))
    return audit, dataclasses.replace(board, entries=(changed,))


def test_labels_with_characters_that_no_drawing_can_hold_are_drawn(boards: Path) -> None:
    """An audit is text from outside, too."""
    odd = "\0\x07\x1b[31m\uffff"
    curves = [{"label": f"curve{odd}", "x": [0, 1], "y": [0, 1], "low": [], "high": []}]
    plot = {"x_label": f"x{odd}", "y_label": f"y{odd}", "curves": curves}
    _, board = audited(the_board(boards), findings=[{"check": odd, "verdict": "fail", "reason": "", "plot": plot}])
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", render_boards([board]))
    shown = "\ufffd\ufffd\ufffd[31m\ufffd"
    assert {f"curve{shown}", f"x{shown}", f"y{shown}", f"{shown}: fail"} <= set(texts)


def test_a_name_cannot_turn_what_the_page_shows(boards: Path) -> None:
    """After a mark of direction, `ta_tenvnoc` is shown as `convnet_at`."""
    _, board = audited(the_board(boards), findings=[{"check": "\u202etsrif", "verdict": "fail", "reason": "\u2067x"}])
    page = render_boards([board])
    assert "\ufffdtsrif" in page
    assert not set("\u202e\u2067") & set(page)


def test_the_effort_of_an_audit_is_told_in_its_row(boards: Path) -> None:
    audit, board = audited(the_board(boards))
    assert "Made with the usual effort." in render_boards([board])
    _, reduced = audited(board, effort={**audit["effort"], "queries": 30})
    words = "Made with reduced effort, as the defense asks for: 30 queries of square (usual: 300)."
    assert words in render_boards([reduced])
    del audit["effort"]
    assert "Made with" not in render_boards([board])  # as in audits of before it was told


def test_checks_that_were_not_run_are_listed_with_their_reason(boards: Path) -> None:
    board = the_board(boards)
    findings = [dict(finding) for finding in audited(board)[0]["findings"]]
    for finding in findings[5:7]:
        finding |= {"verdict": "not run", "reason": f"no <b>{finding['check']}</b>"}
    audit, changed = audited(board, findings=findings)
    page = render_boards([changed])
    (listed,) = re.findall(r"<details><summary>2 of the checks were not run</summary>(.*?)</details>", page, re.DOTALL)
    assert re.findall(r"<td>(.*?)</td>", listed) == [
        cell
        for name in (one["check"] for one in findings[5:7])
        for cell in (f"{name} <small>{QUESTIONS[name]}</small>", f"no &lt;b&gt;{name}&lt;/b&gt;")
    ]
    made, verdict = len(findings) - 2, audit["verdict"]
    assert (
        f'title="{verdict}: {made} of {len(findings)} checks, on 24 images">{made}/{len(findings)}, <span>n 24</span>'
        in page
    )
    assert "not run</summary>" not in render_boards([board])


def test_the_page_has_the_commands_and_the_findings(
    boards: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = re.sub(r"</?span>", "", page)
    assert "robench run --defense" in commands
    assert " --audit</code>" in commands
    assert re.search(rf"robench verify {boards}/evidence/\w+ --trust", commands), "a toy is no code of robench's"
    shutil.copytree(boards, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    here = {entry.verify for board in load_boards(Path("mine")) for entry in board.entries if entry.bundle}
    assert all(re.fullmatch(r"robench verify mine/evidence/\w+ --trust", one) for one in here)
    assert page.count("Published elsewhere") == 1
    assert "There is no evidence for this row." in page
    assert HOSTILE not in page


def test_a_row_tells_other_counts_of_its_answers_and_what_its_card_knows() -> None:
    """Of the rows of this repository: intervals of the majority and of many tries, and the card of the weights."""
    (board,) = load_boards(Path(__file__).parents[1] / "leaderboards", ["mnist-linf-0.3"])
    page = " ".join(render_boards([board]).split())
    (entry,) = (one for one in board.entries if one.row["defense"] == "fortified")
    assert entry.bundle is not None
    tries = entry.bundle.figures.best_of[100]
    low, value, high = (f"{100 * round(share, 4):.1f}" for share in (tries.low, tries.value, tries.high))
    assert f"<dt>after 100 tries</dt><dd>{value} <small>[{low}, {high}]</small>, clean" in page
    assert page.count("<dt>by majority vote</dt>") == sum(one.row["randomized"] == "yes" for one in board.entries)
    card = find_card(resolve("defense", "fortified"), entry.row["weights_digest"])
    assert card["dataset"] == "mnist"
    assert str(escape(card["known_breakage"])) in page
    assert "trained on 59,500 images" in page
    assert find_card(resolve("defense", "fortified"), "0" * 16) == {}
    assert find_card(resolve("defense", "fortified"), "") == {}
