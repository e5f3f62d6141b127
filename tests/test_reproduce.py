"""`robench reproduce`: a paper's cells beside ours, from runs that are done once; what cannot be measured says why."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import engine_toys
import matplotlib.image
import pytest
from hub_toys import write_svhn

from robench import UsageError, reproduce
from robench.cli import main
from robench.data_names import KNOWN
from robench.defense import weights_digest
from robench.errors import DataError, Interrupted
from robench.evaluate import evaluate
from robench.paper import Cell, Context, Figure, Outcome, leave_out
from robench.registry import load_defense
from robench.report.markdown import escape
from robench.report.paper_curves import _panels
from robench.report.reproduced import (
    COLUMNS,
    as_csv,
    as_page,
    as_tables,
    finish_outcomes,
    from_csv,
    print_outcomes,
)
from robench.reproduce import ReproduceRequest, _choose, load_tables
from robench.threat import ThreatModel
from robench.train.named import train_named

TOY = f"{engine_toys.__file__}:Prototypes"
REPRODUCED = Path(__file__).parent.parent / "docs" / "reproduced"
EPS = 0.05


def ten(context: Context) -> Figure:
    """A figure that is no accuracy."""
    assert context.folder.is_dir()
    return Figure(10.0, 9.0, 11.0, context.n)


def cell(column: str, published: float | None = None, **more: Any) -> Cell:
    told = {"published_on": "other_data", "dataset": "fashion_mnist", "defense": TOY, **more}
    return Cell("table 1", "Prototypes", column, published, **told)


CELLS = [
    cell("clean", 50.0),
    cell("FGSM", 40.0, attack="fgsm", eps=EPS),
    cell("PGD", attack="pgd(steps=5)", eps=EPS),
    Cell("figure 2", "ratio", "hidden", 9.5, "other_data", "fashion_mnist", measure=ten, note="measured otherwise"),
]


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "load_tables", lambda name: CELLS)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", "reproduce", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def request(folder: Path, **more: Any) -> ReproduceRequest:
    return ReproduceRequest("toy", folder, **{"n": 40, "protocol": "quick", **more})


def watch_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of each run that `reproduce` makes from here on."""
    seen: list[dict[str, Any]] = []

    def note(*args: Any, **settings: Any) -> Any:
        seen.append(settings)
        return evaluate(*args, **settings)

    monkeypatch.setattr(reproduce, "evaluate", note)
    return seen


def test_figures_are_those_of_evaluate(tmp_path: Path) -> None:
    clean, fgsm, pgd, ratio = reproduce.reproduce_all(request(tmp_path))
    defense = load_defense(TOY)
    expected = evaluate(defense, "fgsm,pgd(steps=5)", ThreatModel("linf", EPS), "fashion_mnist", n=40)
    by_protocol = evaluate(defense, "quick", ThreatModel("linf", EPS), "fashion_mnist", n=40)
    assert clean.ours is not None
    assert clean.ours.value == pytest.approx(100 * expected.clean_accuracy.value)
    assert clean.difference == pytest.approx(clean.ours.value - 50)
    assert clean.worst is None
    for outcome, key in ((fgsm, "fgsm"), (pgd, "pgd(steps=5)")):
        estimate = expected.per_attack[key]
        assert estimate is not None
        assert outcome.ours is not None
        assert outcome.ours.n == 40
        assert [outcome.ours.low, outcome.ours.value, outcome.ours.high] == pytest.approx(
            [100 * estimate.low, 100 * estimate.value, 100 * estimate.high]
        )
        worst = by_protocol.robust_accuracy
        assert worst is not None
        assert outcome.worst is not None
        assert outcome.worst.value == pytest.approx(100 * worst.value)
    assert pgd.difference is None
    assert ratio.difference == pytest.approx(0.5)


def test_each_run_is_done_once_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = watch_runs(monkeypatch)
    first = reproduce.reproduce_all(request(tmp_path))
    assert sum(not run["resume"] for run in runs) == 4  # clean; either attack; the protocol
    runs.clear()
    assert reproduce.reproduce_all(request(tmp_path)) == first
    assert all(run["resume"] for run in runs)
    runs.clear()
    reproduce.reproduce_all(request(tmp_path, seed=1))
    assert sum(not run["resume"] for run in runs) == 4


@pytest.mark.parametrize("name", ["Prototypes", "Blindfold"])
def test_a_cell_is_found_again_whatever_is_asked_for_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figure is that of a joint run, for a randomized defense too."""
    toy = f"{engine_toys.__file__}:{name}"
    attacks = ("pgd(steps=3)", "fgsm", "pgd(steps=5)")
    cells = [dataclasses.replace(CELLS[1], row=attack, attack=attack, defense=toy) for attack in attacks]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    first, second = (reproduce.reproduce_all(request(tmp_path, protocol="", rows=attacks[:n])) for n in (1, 2))
    assert second[:1] == first
    folders = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/units/*")}
    assert len(folders) == 2
    everything = reproduce.reproduce_all(request(tmp_path, protocol=""))
    assert everything[:2] == second
    assert len(list(tmp_path.glob("*/units/*"))) == 3
    assert {path: path.stat().st_mtime_ns for path in folders} == folders
    joint = evaluate(load_defense(toy), ",".join(attacks), ThreatModel("linf", EPS), "fashion_mnist", n=40)
    for attack, outcome in zip(attacks, everything, strict=True):
        estimate = joint.per_attack[attack]
        assert estimate is not None
        assert outcome.ours is not None
        assert outcome.ours.value == 100 * estimate.value


def test_a_minimal_norm_attack_searches_once_for_the_bounds_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of cells that were not asked for too; other data, norms and attacks have runs of their own."""
    attack, bounds = "hopskipjump(queries=100)", (0.1, 0.02, 0.05)
    cells = [cell(f"linf {eps}", attack=attack, eps=eps) for eps in bounds]
    cells += [cell("l2", attack=attack, eps=0.5, norm="l2"), cell("PGD", attack="pgd(steps=3)", eps=0.3)]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    (alone,) = reproduce.reproduce_all(request(tmp_path, protocol="", columns=("linf 0.05",)))
    assert len(list(tmp_path.glob("*/units/*"))) == 1
    outcomes = reproduce.reproduce_all(request(tmp_path, protocol=""))
    assert outcomes[2] == alone
    assert len(list(tmp_path.glob("*/units/*"))) == 3
    sweep = [ThreatModel("linf", eps) for eps in sorted(bounds)]
    joint = evaluate(load_defense(TOY), attack, sweep, "fashion_mnist", n=40)
    for outcome in outcomes[:3]:
        estimate = joint.attacks_at(outcome.cell.eps)[attack]
        assert estimate is not None
        assert outcome.ours is not None
        assert outcome.ours.value == 100 * estimate.value
    assert len({outcome.ours.value for outcome in outcomes[:3] if outcome.ours}) > 1


def test_a_faster_precision_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = watch_runs(monkeypatch)
    for precision in ("float32", "bfloat16"):
        asked = request(tmp_path, protocol="", columns=("FGSM",), precision=precision)
        assert reproduce.reproduce_all(asked)[0].ours is not None
        assert ("--precision bfloat16" in as_page([], asked)) == (precision == "bfloat16")
    assert [run["precision"] for run in runs] == ["float32", "bfloat16"]
    assert len(list(tmp_path.glob("*/units/*"))) == 2


def test_smaller_units_are_a_run_of_its_own_and_workers_share_them(tmp_path: Path) -> None:
    whole, alone, shared = (
        reproduce.reproduce_all(request(tmp_path / folder, protocol="", columns=("PGD",), **more))[0].ours
        for folder, more in (("a", {}), ("a", {"unit_size": 20}), ("b", {"unit_size": 20, "workers": 2}))
    )
    assert alone == shared
    assert whole is not None
    assert whole.n == 40
    assert sorted(len(list(run.glob("units/*"))) for run in (tmp_path / "a").iterdir()) == [1, 2]
    for size, told in ((128, False), (20, True)):
        assert ("--unit-size 20" in as_page([], request(tmp_path, unit_size=size))) == told


class Counted:
    """A measurement that counts its calls and writes a file into its folder."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def __call__(self, context: Context) -> Figure:
        self.folders.append(context.folder)
        (context.folder / "kept.txt").write_text(str(context.seed))
        return Figure(1 / 3, 0.1, 0.7, context.n)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Two cells of one measurement, in tables of their own."""
    measure = Counted()
    cells = [dataclasses.replace(CELLS[3], column=column, measure=measure, reads="convnet") for column in "ab"]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    return measure


def test_a_figure_of_a_function_is_measured_once(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another n, seed or other weights make it another one; each is kept in a folder of its own."""
    first = reproduce.reproduce_all(request(tmp_path))
    assert len(set(counted.folders)) == 2
    assert {folder.parent for folder in counted.folders} == {tmp_path}
    assert reproduce.reproduce_all(request(tmp_path)) == first
    assert len(counted.folders) == 2
    reproduce.reproduce_all(request(tmp_path, n=41))
    reproduce.reproduce_all(request(tmp_path, seed=1))
    assert len(set(counted.folders)) == 6
    monkeypatch.setattr(reproduce, "weights_digest", lambda defense: "other")
    reproduce.reproduce_all(request(tmp_path))
    assert len(set(counted.folders)) == 8
    content = json.loads((counted.folders[0] / "figure.json").read_bytes())
    assert content["weights_digest"] == weights_digest(load_defense("convnet", "fashion_mnist"))
    assert (content["n"], content["seed"], content["figure"]["value"]) == (40, 0, 1 / 3)


def test_a_damaged_figure_is_measured_again(
    tmp_path: Path, counted: Counted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reproduce.reproduce_all(request(tmp_path))
    file = counted.folders[0] / "figure.json"
    whole = json.loads(file.read_bytes())
    for content in (b"", b"[1]", b"{}", json.dumps({**whole, "figure": {**whole["figure"], "low": "0"}}).encode()):
        counted.folders.clear()
        caplog.clear()
        file.write_bytes(content)
        assert reproduce.reproduce_all(request(tmp_path)) == first
        assert counted.folders == [file.parent]
        assert "is damaged" in caplog.text
        assert json.loads(file.read_bytes()) == whole
    counted.folders.clear()
    monkeypatch.setattr("robench.__version__", "0.0.0")
    assert reproduce.reproduce_all(request(tmp_path)) == first
    assert len(counted.folders) == 2


def test_what_is_left_out_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(context: Context) -> Figure:
        raise UsageError("no data")

    cells = [dataclasses.replace(CELLS[3], measure=measure) for measure in (leave_out, fail)]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    assert [outcome.problem for outcome in reproduce.reproduce_all(request(tmp_path))] == ["", "no data"]
    assert list(tmp_path.iterdir()) == []


def test_command_prints_tables_and_writes_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "toy", "--n", 20, "--protocol", "none", "--out", tmp_path / "runs") == 0
    out = capsys.readouterr().out
    for text in ("table 1", "figure 2", "FGSM", "10.0 [9.0, 11.0]", "+0.50", "not comparable", "measured otherwise"):
        assert text in out
    with (tmp_path / "runs" / "tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["column"] for row in rows] == ["clean", "FGSM", "PGD", "hidden"]
    assert rows[3]["ours"] == "10.0"
    assert rows[1]["worst"] == rows[1]["protocol"] == ""


def test_what_is_done_is_written_at_once_and_the_next_cell_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the third cell: two are in the tables, and the line above says which one it was."""
    folder = tmp_path / "runs"

    def interrupt(context: Context) -> Figure:
        raise KeyboardInterrupt

    cells = [*CELLS[:2], dataclasses.replace(CELLS[3], measure=interrupt)]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    assert call(monkeypatch, "toy", "--n", 20, "--protocol", "none", "--out", folder) == 130
    with (folder / "tables.csv").open(newline="") as file:
        assert [row["column"] for row in csv.DictReader(file)] == ["clean", "FGSM"]
    assert "FGSM" in (folder / "tables.md").read_text(encoding="utf-8")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("cell ")][2] == (
        f"cell 3 of 3: {cells[2].table}, {cells[2].row}, {cells[2].column}"
    )
    assert "the same command goes on" in lines[-1]


def test_the_protocol_may_have_fewer_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("toy", "--row", "Proto", "--n", 20, "--protocol", "quick", "--protocol-n", 10, "--out", tmp_path / "runs")
    assert call(monkeypatch, *words) == 0
    assert "n = 20, under the protocol = 10" in capsys.readouterr().out
    with (tmp_path / "runs" / "tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["n"], row["protocol"], row["worst_n"]) for row in rows] == [
        ("20", "", ""),
        ("20", "quick", "10"),
        ("20", "quick", "10"),
    ]
    defense = load_defense(TOY)
    worst = evaluate(defense, "quick", ThreatModel("linf", EPS), "fashion_mnist", n=10).robust_accuracy
    assert worst is not None
    assert float(rows[2]["worst"]) == pytest.approx(100 * worst.value)


def test_the_page_in_markdown_shows_every_cell_and_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del capsys
    hostile = Cell("table | 3", "<b>row</b>", "a", 1.0, "fashion_mnist", "fashion_mnist", measure=ten)
    monkeypatch.setattr(reproduce, "load_tables", lambda name: [*CELLS, hostile])
    assert call(monkeypatch, "toy", "--n", 20, "--protocol", "none", "--out", tmp_path / "runs") == 0
    page = (tmp_path / "runs" / "tables.md").read_text()
    assert "`robench reproduce toy --n 20 --protocol none --seed 0`" in page
    assert "| ratio | hidden | 9.5 | 10.0 [9.0, 11.0] | +0.50 |" in page
    assert "## table \\| 3" in page
    assert "\\<b\\>row" in page
    assert page.count("\n## ") == 3
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 3 * 2 + 5
    assert (
        page.count("- the paper's data are other\\_data, ours fashion\\_mnist: not comparable\n") == 2
    )  # once a table


def test_a_remark_names_the_cells_it_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {("one", "a"): "odd", ("two", "a"): "", ("two", "b"): "odd", ("three", "a"): "odd", ("three", "b"): "odd"}
    cells = [
        Cell("table 1", row, column, None, "", "fashion_mnist", measure=ten, note=note)
        for (row, column), note in notes.items()
    ]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    assert call(monkeypatch, "toy", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("odd") == 1
    assert "one; two (b); three: odd" in out
    assert "not comparable" not in out


def test_what_the_protocol_leaves_under_many_attacks_is_shown_once_for_each_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def attacked(defense: str, attacks: Sequence[str], worst: Figure | None) -> list[Outcome]:
        cells = [dataclasses.replace(CELLS[1], defense=defense, row=f"{defense}, {one}", attack=one) for one in attacks]
        return [Outcome(cell, Figure(50, 40, 60, 10), worst) for cell in cells]

    often = [
        *attacked("first", ("fgsm", "pgd", "square"), Figure(25, 9, 53, 16)),
        *attacked("second", ("fgsm", "pgd", "square"), Figure(50, 30, 70, 97)),
        *attacked("third", ("fgsm", "pgd", "square"), None),
    ]
    page = as_tables(often, "standard")
    assert page.count("25.0 [9.0, 53.0] of 16") == page.count("50.0 [30.0, 70.0] of 97") == 1
    assert "What `standard` leaves, and of how many images:\n\n|  | first | second |\n" in page
    assert "\n| FGSM | 25.0 [9.0, 53.0] of 16 | 50.0 [30.0, 70.0] of 97 |\n" in page
    print_outcomes(often, "standard")
    assert "What standard leaves, and of how many images" in capsys.readouterr().out
    assert "leaves" not in as_tables([*often[:2], *often[3:5]], "standard")  # two attacks: as far to read
    assert "leaves" not in as_tables([dataclasses.replace(one, worst=None) for one in often], "")


def test_other_data_are_told_once_where_the_cells_name_them() -> None:
    named = [dataclasses.replace(CELLS[1], column=f"{data}, linf 0.1", dataset=data) for data in ("mnist", "cifar10")]
    unnamed = dataclasses.replace(CELLS[1], column="fashion_mnist", dataset="mnist")
    remark = "the paper's data are other\\_data, ours mnist: not comparable"
    assert f"- {remark}\n" in as_tables([Outcome(cell, None) for cell in named], "")
    listed = as_tables([Outcome(cell, None) for cell in (*named, unnamed)], "")
    assert f"- {remark}\n" not in listed
    assert f"Prototypes (mnist, linf 0.1, fashion\\_mnist): {remark}\n" in listed


CURVES = [
    dataclasses.replace(CELLS[1], row=f"row of {attack}", column=f"{norm} {eps}", attack=attack, eps=eps, norm=norm)
    for norm, bounds in (("linf", (0.3, 0.1, 0.2)), ("l2", (1.0, 2.0)))
    for eps in bounds
    for attack in ("fgsm", "pgd")
]


def test_three_bounds_are_drawn_as_a_curve(tmp_path: Path) -> None:
    figures = [Figure(90 - 10 * number, 1, 99, 10) for number in range(len(CURVES))]
    outcomes = [Outcome(cell, figure, Figure(5, 1, 9, 10)) for cell, figure in zip(CURVES, figures, strict=True)]
    panels = _panels(outcomes, "standard")
    assert list(panels) == [("fashion_mnist", "linf")], "two bounds are no curve"
    curves = panels["fashion_mnist", "linf"]
    assert [label for _, _, label in curves] == ["row of fgsm", f"{TOY}, standard", "row of pgd"]
    assert [(eps, figure.value) for eps, figure in curves[TOY, "pgd", "row of pgd"]] == [
        (0.3, 80),
        (0.1, 60),
        (0.2, 40),
    ]
    assert len(curves[TOY, "", f"{TOY}, standard"]) == 3
    asked = request(tmp_path)
    files = finish_outcomes(outcomes, asked)
    assert files == ["tables.csv", "tables.md", "curves-table-1.png"]
    assert matplotlib.image.imread(tmp_path / files[2]).shape[1] >= 600
    assert "](curves-table-1.png)\n" in (tmp_path / "tables.md").read_text()
    missing = [*outcomes[:-6], Outcome(CURVES[4], None), *outcomes[-5:]]
    assert (TOY, "fgsm", "row of fgsm") not in _panels(missing, "standard")["fashion_mnist", "linf"]


def test_tables_of_a_call_with_other_words_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = [Outcome(cell, Figure(50, 40, 60, 10)) for cell in CURVES]
    first = request(tmp_path)
    finish_outcomes(outcomes[:2], first)
    before = [(tmp_path / name).read_bytes() for name in ("tables.csv", "tables.md")]
    finish_outcomes(outcomes[:1], first)
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["tables.md"]
    finish_outcomes(outcomes[:2], first)
    for number, row in enumerate(("a", "b"), start=1):
        finish_outcomes(outcomes[:1], dataclasses.replace(first, rows=(row,)))
        assert f"tables-{number}.md" in caplog.text
    assert [(tmp_path / name).read_bytes() for name in ("tables-1.csv", "tables-1.md")] == before
    assert "--row b" in (tmp_path / "tables.md").read_text()
    assert "--row a" in (tmp_path / "tables-2.md").read_text()


def test_without_matplotlib_tables_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcomes = [Outcome(cell, Figure(50, 40, 60, 10)) for cell in CURVES]
    assert finish_outcomes(outcomes, request(tmp_path)) == ["tables.csv", "tables.md"]
    assert "pip install 'robench[plot]'" in caplog.text
    assert "![" not in (tmp_path / "tables.md").read_text()
    caplog.clear()
    finish_outcomes(outcomes[:2], request(tmp_path))
    assert not caplog.text, "there is nothing to draw"


def test_files_to_publish_do_not_say_where_the_data_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    absent = Cell("table 1", "JEM-0", "clean", 96.7, "svhn", "svhn", "jem")
    monkeypatch.setattr(reproduce, "load_tables", lambda name: [absent])
    assert call(monkeypatch, "toy", "--data-dir", data, "--out", tmp_path / "runs") == 1
    assert str(data) in capsys.readouterr().out
    for name in ("tables.csv", "tables.md"):
        text = (tmp_path / "runs" / name).read_text()
        assert "svhn/test-" in text
        assert str(tmp_path) not in text


def test_only_other_data_are_not_comparable_and_what_else_the_paper_says_is_printed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        Cell("table 1", on, "ratio", 1.0, on, "fashion_mnist", measure=ten, published_with="a wide net, a curve")
        for on in ("fashion_mnist", "mnist")
    ]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    assert call(monkeypatch, "toy", "--out", tmp_path) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if "the paper" in line] == [
        "mnist: the paper's data are mnist, ours fashion_mnist: not comparable"
    ]
    assert "a wide net, a curve" in lines
    with (tmp_path / "tables.csv").open(newline="") as file:
        told = [(row["published_on"], row["published_with"], row["measured_on"]) for row in csv.DictReader(file)]
    assert told == [(on, "a wide net, a curve", "fashion_mnist") for on in ("fashion_mnist", "mnist")]


@pytest.mark.parametrize("name", ["shortrun", "fortified", "jem"])
def test_the_papers_data_are_under_robenchs_names(name: str) -> None:
    """CIFAR-100 is the one dataset that robench does not have."""
    assert {cell.published_on for cell in load_tables(name)} <= {"", "cifar100", *KNOWN}


def test_a_figure_shows_the_digits_of_its_interval() -> None:
    assert str(Figure(0.0, 0.0, 10.718, 32)) == "0.0 [0.0, 10.7]"
    assert str(Figure(0.12345, 0.1, 0.2, 32)) == "0.123 [0.100, 0.200]"


def test_json_and_the_choice_of_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "toy", "--table", "figure", "--json", "--out", tmp_path) == 0
    (found,) = json.loads(capsys.readouterr().out)["cells"]
    assert (found["table"], found["published"], found["ours"]["value"]) == ("figure 2", 9.5, 10.0)


def test_a_cell_that_cannot_be_measured_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Cell("table 1", "Absent", "clean", 50.0, "svhn", "fashion_mnist", defense="no_such_defense")
    monkeypatch.setattr(reproduce, "load_tables", lambda name: [missing, CELLS[0]])
    assert call(monkeypatch, "toy", "--n", 20, "--out", tmp_path) == 1
    out = capsys.readouterr().out
    assert "not measured" in out
    assert "no_such_defense" in out
    assert "Prototypes" in out


def test_a_figure_stays_where_the_protocol_cannot_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quick protocol has no attacks in l1: the paper's own figure is kept, and what is missing is said."""
    one = cell("PGD", 40.0, attack="pgd(steps=5)", norm="l1", eps=2.0)
    monkeypatch.setattr(reproduce, "load_tables", lambda name: [one])
    (outcome,) = reproduce.reproduce_all(request(tmp_path))
    (alone,) = reproduce.reproduce_all(request(tmp_path, protocol=""))
    assert alone.ours is not None
    assert (outcome.ours, outcome.worst) == (alone.ours, None)
    assert call(monkeypatch, "toy", "--n", 40, "--protocol", "quick", "--out", tmp_path) == 1
    out = capsys.readouterr().out
    assert "under quick: protocol quick-1 has attacks in linf, l2; the norm is l1" in out
    assert str(outcome.ours) in out
    with (tmp_path / "tables.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["ours"], row["worst"]) == (str(alone.ours.value), "")
    assert "under quick" in row["problem"]


def test_rows_with_commas_in_their_names_are_chosen_by_the_command_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del capsys
    rows = ("JEM-0, pgd", "JEM-0, fgsm", "JEM-1, pgd", "JEM-1, fgsm")
    cells = [Cell("table 1", row, "c", None, "", "fashion_mnist", measure=ten) for row in rows]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    assert call(monkeypatch, "toy", "--row", rows[0], "--row", rows[3], "--out", tmp_path) == 0
    page = (tmp_path / "tables.md").read_text()
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| JEM")] == [
        "| JEM-0, pgd",
        "| JEM-1, fgsm",
    ]
    (command,) = [line.strip("`") for line in page.splitlines() if line.startswith("`robench")]
    assert shlex.split(command)[3:7] == ["--row", rows[0], "--row", rows[3]]


def test_a_single_cell_is_chosen_by_row_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ("mnist, linf 0.1", "mnist, linf 0.2", "mnist, l2 1")
    cells = [Cell("t", row, c, None, "", "mnist", measure=ten) for row in ("JEM-0", "JEM-1") for c in columns]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    assert call(monkeypatch, "toy", "--row", "JEM-1", "--column", "linf 0.2", "--out", tmp_path) == 0
    with (tmp_path / "tables.csv").open(encoding="utf-8", newline="") as file:
        assert [(line["row"], line["column"]) for line in csv.DictReader(file)] == [("JEM-1", "mnist, linf 0.2")]
    assert "--row JEM-1 --column 'linf 0.2'" in (tmp_path / "tables.md").read_text()


def test_what_is_not_measured_on_purpose_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = Cell(
        "table 1", "FID", "all", 66.8, "svhn", "fashion_mnist", measure=lambda context: None, note="grey images"
    )
    monkeypatch.setattr(reproduce, "load_tables", lambda name: [left_out])
    assert call(monkeypatch, "toy", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "not measured" in out
    assert "grey images" in out


def test_wrong_names_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "toy", "--table", "9.9", "--out", tmp_path) == 2
    assert "there are: table 1, figure 2" in capsys.readouterr().err
    monkeypatch.setattr(reproduce, "load_tables", load_tables)
    assert call(monkeypatch, "convnet", "--out", tmp_path) == 2
    assert 'defense "convnet" brings no tables' in capsys.readouterr().err
    assert call(monkeypatch, "convnit", "--out", tmp_path) == 2
    assert "convnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"measure": ten}, "either a defense or a function"),
        ({"defense": ""}, "either a defense or a function"),
        ({"attack": "pgd"}, "needs an eps"),
        ({"reads": "convnet"}, "a function without a defense"),
        ({"published_on": "Fashion-MNIST"}, 'a dataset\'s name, such as fashion_mnist; got "Fashion-MNIST"'),
        ({"published_on": "mnist (a curve)"}, "goes into published_with"),
    ],
)
def test_a_cell_is_measured_in_one_way_on_a_dataset_with_a_name(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cell("wrong", **more)


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((), ["JEM-0", "JEM-1, pgd", "JEM-10, pgd"]),
        (("JEM-1",), ["JEM-1, pgd"]),
        (("pgd", "JEM-0"), ["JEM-0", "JEM-1, pgd", "JEM-10, pgd"]),
        (("-10, p",), ["JEM-10, pgd"]),
        (("JEM-1, pgd",), ["JEM-1, pgd"]),
        (("JEM-1, pgd", "JEM-0"), ["JEM-0", "JEM-1, pgd"]),
        (("JEM-0,JEM-10",), ["JEM-0", "JEM-10, pgd"]),
        (("JEM-10, JEM-0,",), ["JEM-0", "JEM-10, pgd"]),
    ],
)
def test_whole_words_choose_rows_before_parts_of_words_and_commas_split_last(
    texts: tuple[str, ...], found: list[str]
) -> None:
    cells = [Cell("t", row, "c", None, "", "mnist", measure=ten) for row in ("JEM-0", "JEM-1, pgd", "JEM-10, pgd")]
    assert [cell.row for cell in _choose(cells, texts, "row")] == found


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--table", "9.9", 'no table has "9.9" in its name'),
        ("--row", "9.9", 'no row has "9.9" in its name'),
        ("--row", "Prototypes,9.9", 'no row has "9.9" in its name'),
        ("--row", ",", 'no row has "," in its name'),
        ("--column", "9.9", 'no column has "9.9" in its name'),
        ("--protocol", "standrd", 'there is no protocol "standrd"'),
        ("--n", 0, "n must be at least 1; got 0"),
        ("--protocol-n", 0, "protocol-n must be at least 1; got 0"),
        ("--device", "tpu", 'device must be auto, cpu or cuda; got "tpu"'),
        ("--seed", -1, "seed must be at least 0; got -1"),
        ("--unit-size", 0, "unit_size must be at least 1; got 0"),
        ("--workers", 0, "workers must be at least 1; got 0"),
        ("--precision", "bfloat", 'precision must be one of float32, bfloat16; got "bfloat"'),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: object,
    message: str,
) -> None:
    assert call(monkeypatch, "toy", option, value, "--out", tmp_path / "runs") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "runs").exists()


def trained(n: int, **more: Any) -> Cell:
    how = {"dataset": "svhn", "defense": "convnet", "recipe": f"clean(labelled={n})", "split": "train+extra"}
    return cell(f"{n} labelled", **{**how, **more})


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with SVHN; the cells want training on it, one of them under an attack, one measured by a function."""

    def digest(context: Context) -> Figure:
        assert context.weights is not None
        return Figure(len(context.weights.read_bytes()), 0, 0, 1)

    cells = [
        trained(20),
        trained(20, attack="fgsm", eps=EPS),
        trained(40),
        trained(40, measure=digest),
        cell("clean", 50.0),
    ]
    monkeypatch.setattr(reproduce, "load_tables", lambda name: cells)
    return write_svhn(tmp_path / "data", train=540, extra=30, test=2000)


def test_a_cell_with_a_recipe_waits_for_train(trainings: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Nothing is trained unasked, which is no failure, and the page says what would be."""
    folder = tmp_path / "out"
    words = ("toy", "--dataset", "svhn", "--n", 20, "--protocol", "none", "--out", folder, "--data-dir", trainings)
    assert call(monkeypatch, *words) == 0
    capsys.readouterr()
    page = (folder / "tables.md").read_text()
    assert page.count("not measured |") == 4
    assert "not measured without a training of its own, clean(labelled=40): --train" in page.replace("\\", "")
    assert [path.name for path in folder.iterdir()] != []
    assert not (folder / "trained").exists()


def test_models_are_trained_once_for_their_cells(
    trainings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tmp_path / "out", n=20, protocol="", dataset="svhn", train=True, scale=0.002, data_dir=trainings)
    clean, attacked, other, size = reproduce.reproduce_all(asked)
    assert [outcome.problem for outcome in (clean, attacked, other, size)] == [""] * 4
    weights = sorted((tmp_path / "out" / "trained").glob("*/svhn.safetensors"))
    assert len(weights) == 2
    cards = [json.loads(path.with_suffix(".json").read_text()) for path in weights]
    assert sorted(card["recipe"] for card in cards) == ["clean(labelled=20)", "clean(labelled=40)"]
    assert {(card["split"], card["scale"], card["seed"]) for card in cards} == {("train+extra", 0.002, 0)}
    chosen = next(path for path, card in zip(weights, cards, strict=True) if card["recipe"] == "clean(labelled=20)")
    expected = evaluate(
        load_defense("convnet", "svhn", weights=chosen),
        "fgsm",
        ThreatModel("linf", EPS),
        "svhn",
        n=20,
        data_dir=trainings,
    )
    assert clean.ours is not None
    test = json.loads(chosen.with_suffix(".json").read_text())["test"]
    assert clean.ours == Figure(100 * test["clean_accuracy"], 100 * test["clean_low"], 100 * test["clean_high"], 2000)
    assert attacked.ours is not None
    assert expected.robust_accuracy is not None
    assert attacked.ours.value == pytest.approx(100 * expected.robust_accuracy.value)
    assert size.ours is not None
    assert size.ours.value > 1e5

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("was trained again")

    monkeypatch.setattr(reproduce, "train_named", fail)
    again = reproduce.reproduce_all(dataclasses.replace(asked, train=False))
    assert [outcome.ours for outcome in again] == [outcome.ours for outcome in (clean, attacked, other, size)]
    assert "a training of its own: clean(labelled=20), scale 0.002" in as_page(again, asked)
    assert ',"clean(labelled=40), scale 0.002",' in as_csv(again, "")
    less = reproduce.reproduce_all(dataclasses.replace(asked, train=False, scale=0.001))
    assert [outcome.ours for outcome in less] == [None] * 4


def test_a_training_that_was_cut_off_goes_on(trainings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = []

    def cut_off(job: Any, *, resume: bool) -> Any:
        resumed.append(resume)
        if not resume:
            weights, _ = train_named(job)
            weights.with_suffix(".json").unlink()  # the card is the last that is written
            raise KeyboardInterrupt
        return train_named(job, resume=True)

    monkeypatch.setattr(reproduce, "train_named", cut_off)
    asked = request(tmp_path, n=20, protocol="", dataset="svhn", train=True, scale=0.002, data_dir=trainings)
    with pytest.raises(Interrupted, match="the same command goes on"):
        reproduce.reproduce_all(asked)
    monkeypatch.setattr(reproduce, "load_tables", lambda name: [trained(20)])
    (outcome,) = reproduce.reproduce_all(asked)
    assert outcome.ours is not None
    assert resumed == [False, True]


def test_the_page_names_the_options_of_training(tmp_path: Path) -> None:
    asked = request(tmp_path, dataset="svhn", train=True, scale=0.5)
    page = as_page([], asked)
    assert "`robench reproduce toy --n 40 --protocol quick --seed 0 --dataset svhn --scale 0.5 --train`" in page
    assert "--scale" not in as_page([], request(tmp_path))


def test_wrong_options_of_training_are_one_line(trainings: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scale must be positive"):
        request(tmp_path, scale=0)
    with pytest.raises(UsageError, match='nothing is measured on "mnist"; there are: svhn, fashion_mnist'):
        reproduce.reproduce_all(request(tmp_path, dataset="mnist"))
    with pytest.raises(UsageError, match="a recipe trains a defense"):
        Cell("t", "r", "c", None, "", "svhn", measure=ten, recipe="clean")
    elsewhere = request(tmp_path, dataset="svhn", train=True, data_dir=tmp_path / "none")
    outcomes = reproduce.reproduce_all(elsewhere)
    assert all("none" in outcome.problem for outcome in outcomes)
    assert "--train\n" not in as_page(outcomes, request(tmp_path))  # it was asked for


def test_a_training_that_fails_is_told_in_its_cells_and_the_others_go_on(
    trainings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(job: Any, *, resume: bool) -> Any:
        if "20" in job.recipe:
            raise DataError("training diverged")
        return train_named(job, resume=resume)

    monkeypatch.setattr(reproduce, "train_named", diverge)
    asked = request(tmp_path, n=20, protocol="", dataset="svhn", train=True, scale=0.002, data_dir=trainings)
    first, second, third, _ = reproduce.reproduce_all(asked)
    assert first.problem == second.problem == "training diverged"
    assert third.ours is not None


@pytest.mark.parametrize("path", sorted(REPRODUCED.glob("*.csv")), ids=lambda path: path.stem)
def test_what_was_published_is_of_the_cells_that_there_are(path: Path) -> None:
    """docs/reproduced: each line is a cell of the paper's tables, with its figure; the page shows the same rows."""
    known = {(cell.table, cell.row, cell.column): cell for cell in load_tables(path.stem.partition("-")[0])}
    text = path.read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines()))
    assert list(lines[0]) == list(COLUMNS)
    for line in lines:
        cell = known[line["table"], line["row"].removeprefix("'"), line["column"]]
        assert line["published"] == ("" if cell.published is None else f"{cell.published}")
        assert line["measured_on"] == cell.dataset
        assert line["recipe"].startswith(cell.recipe) or not line["ours"]
    outcomes, protocol = from_csv(text, list(known.values()))
    assert as_csv(outcomes, protocol) == text
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    pictures = dict(re.findall(r"\n## (.+)\n\n!\[.*\]\((.+)\)", page))
    assert all((path.parent / picture).is_file() for picture in pictures.values())
    names = {escape(cell.table): cell.table for cell in known.values()}
    shown = {names[name]: picture for name, picture in pictures.items()}
    assert page.endswith(as_tables(outcomes, protocol, shown)), "tools/merge_reproduced.py writes it anew"


DEFENSES_PAGE: Final = REPRODUCED.parent / "defenses.md"
NOT_KEPT: Final = {"83.9 [82.2, 85.4]"}
"""A figure on that page of a net that is not shipped, on the way to one that is."""


def find_intervals(text: str) -> list[str]:
    """Figures with an interval, as they stand in a text."""
    return [" ".join(one) for one in re.findall(r"([\d.]+)(?: %)?\s+(\[\d[\d.]*, [\d.]+\])", text)]


def read_lines(*paths: Path) -> list[dict[str, str]]:
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [line for text in texts for line in csv.DictReader(text.splitlines())]


def measured_again() -> set[str]:
    """The figures of docs/reproduced."""
    columns = (("ours", "low", "high"), ("worst", "worst_low", "worst_high"))
    lines = read_lines(*REPRODUCED.glob("*.csv"))
    figures = [[float(line[one]) for one in three] for line in lines for three in columns if line[three[0]]]
    return {str(Figure(value, low, high, 1)) for value, low, high in figures}


def test_summary_in_the_docs_tells_what_was_measured() -> None:
    """Each figure with an interval below "In short" in docs/defenses.md is one of docs/reproduced."""
    page = DEFENSES_PAGE.read_text(encoding="utf-8").partition("In short, ")[2]
    told = find_intervals(page)
    assert len(told) == len(re.findall(r"\[\d[\d.]*, [\d.]+\]", page)) > 5
    assert set(told) <= measured_again()


def test_what_the_docs_say_was_reached_is_on_record() -> None:
    """Each figure with an interval above that stands in a leaderboard, a card, a decision or docs/reproduced."""
    page = DEFENSES_PAGE.read_text(encoding="utf-8").partition("In short, ")[0]
    told, root = find_intervals(page), DEFENSES_PAGE.parent.parent
    cards = [*root.glob("defenses/*/weights/*.json")]
    texts = [path.read_text(encoding="utf-8") for path in (*cards, *root.glob("docs/decisions/*.md"))]
    rows = read_lines(*root.glob("leaderboards/*.csv"))
    shares = [[row[f"{kind}_{one}"] for one in ("acc", "low", "high")] for row in rows for kind in ("clean", "robust")]
    for text in texts[: len(cards)]:
        test = json.loads(text)["test"]
        shares.append([test[f"clean_{one}"] for one in ("accuracy", "low", "high")])
    known = measured_again() | {one for text in texts for one in find_intervals(text)}
    for three in shares:
        value, low, high = (100 * float(one) for one in three)
        known.add(str(Figure(value, low, high, 1)))
    assert len(told) > 50
    assert {one for one in told if one not in known} == NOT_KEPT


def test_clean_accuracy_in_the_docs_is_that_of_the_cards() -> None:
    """In the table of what was reached, to a digit, however its half is rounded."""
    lines = re.findall(
        r"^\| `(\w+)(\([^`]*\))?` (?:\(JEM-0\) )?\| (\w+)[^|]*\| ([\d.]+) \|", DEFENSES_PAGE.read_text(), re.M
    )
    stems = {"": "", "(width=16)": "-width16", "(layers=[])": "-plain"}
    folder, seen = DEFENSES_PAGE.parent.parent / "defenses", 0
    for name, options, dataset, clean in lines:
        path = folder / name / "weights" / f"{dataset}{stems.get(options, 'none')}.json"
        if path.exists():
            card = json.loads(path.read_text(encoding="utf-8"))
            assert float(clean) == pytest.approx(100 * card["test"]["clean_accuracy"], abs=0.0501), path.name
            seen += 1
    assert seen == len([*folder.glob("*/weights/*.json")]) - 1, "all but the ConvNet of width 16"
