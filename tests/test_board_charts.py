"""The charts of the leaderboards' page: what is joined by lines, what belongs to which row."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from board_toys import BOARD, make_boards, make_row
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer

from robench.board import Board, Entry, load_boards
from robench.report.board import render_boards
from robench.report.board_charts import draw_curves, draw_scatter, points_of

PGD = {"clean": [90.0, 70.0, 95.0], "fgsm": [1.0, 0.0, 2.0], "pgd": [50.0, 40.0, 60.0], "pgd, double eps": [20, 10, 30]}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """One row, which has evidence, with the accuracies of an audit."""
    (board,) = load_boards(make_boards(tmp_path_factory.mktemp("boards")), [BOARD])
    (entry,) = (one for one in board.entries if one.bundle is not None)
    assert entry.bundle is not None
    assert entry.bundle.audit is not None
    bundle = dataclasses.replace(entry.bundle, audit={**entry.bundle.audit, "accuracies": PGD, "n": 77})
    return dataclasses.replace(board, entries=(dataclasses.replace(entry, bundle=bundle),))


def points(axes: Axes, style: str) -> list[list[float]]:
    """The positions along eps of the lines of a style that are no ends of error bars."""
    return [
        np.asarray(line.get_xdata(), dtype=float).tolist()
        for line in axes.lines
        if line.get_linestyle() == style and line.get_marker() != "_"
    ]


def test_a_line_joins_a_sweep_but_not_the_clean_accuracy_and_one_bound(board: Board) -> None:
    (axes,) = draw_curves(board, [board]).axes
    assert points(axes, "-") == []
    assert points(axes, "None") == [[0.0, 0.03]]
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    assert bars.has_yerr
    (axes,) = draw_curves(board, [board, dataclasses.replace(board, eps="0.06")]).axes
    assert points(axes, "-") == [[0.0, 0.03, 0.06]]
    (axes,) = draw_curves(board, [board, dataclasses.replace(board, eps="0.06", norm="l2")]).axes
    assert points(axes, "-") == []


def test_rows_of_different_free_lists_have_points_of_their_own() -> None:
    """One defense under pgd and under fgsm; on the other board its rows come the other way round."""

    def board(eps: str, **by_attack: str) -> Board:
        rows = [
            {key: cell for key, cell in make_row(robust_acc=accuracy).items() if key != "pgd"} | {attack: accuracy}
            for attack, accuracy in by_attack.items()
        ]
        return Board(eps, "mnist", "linf", eps, tuple(Entry(row, None, "") for row in rows))

    boards = [board("0.3", pgd="0.2", fgsm="0.6"), board("0.4", fgsm="0.5", pgd="0.1")]
    under_pgd, under_fgsm = (
        {point.eps: point.accuracy[0] for point in points_of(entry, boards[0], boards)} for entry in boards[0].entries
    )
    assert under_pgd == {0.0: 60.0, 0.3: 20.0, 0.4: 10.0}
    assert under_fgsm == {0.0: 60.0, 0.3: 60.0, 0.4: 50.0}


def test_pgd_of_the_audit_has_its_band_and_its_number_of_images(board: Board) -> None:
    figure = draw_curves(board, [board])
    (axes,) = figure.axes
    assert points(axes, "--") == [[0.0, 0.03, 0.06]]
    (band,) = (one for one in axes.collections if isinstance(one, PolyCollection))
    corners = {(float(x), float(y)) for x, y in np.asarray(band.get_paths()[0].vertices)}
    assert corners == {(0.0, 70.0), (0.0, 95.0), (0.03, 40.0), (0.03, 60.0), (0.06, 10.0), (0.06, 30.0)}
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == "2. prototypes (dashed: 77 images)"


def test_the_figures_of_the_curves_stand_in_the_row(board: Board) -> None:
    """They are there for those who cannot see the chart."""
    row = board.entries[0].row
    page = render_boards([board])
    cells = re.findall(r"<tr>" + 4 * r"<td[^>]*>(.*?)</td>" + "</tr>", page)
    assert [(eps, attacks, images) for eps, attacks, _, images in cells if "audit" in attacks or "case" in attacks] == [
        ("0.03", "worst case, free list", row["n"]),
        ("0", "none, in the audit", "77"),
        ("0.03", "PGD, in the audit", "77"),
        ("0.06", "PGD, in the audit", "77"),
    ]
    assert [accuracy for *_, accuracy, images in cells if images == "77"] == [
        "90.0 <small>[70.0, 95.0]</small>",
        "50.0 <small>[40.0, 60.0]</small>",
        "20.0 <small>[10.0, 30.0]</small>",
    ]


def test_an_audit_of_another_size_than_a_run_takes_is_made_again_by_itself(board: Board) -> None:
    page = re.sub(r"</?span>", "", render_boards([board]))
    assert "<dt>audit it again</dt><dd><code>robench audit --defense" in page
    assert "--n 77 --seed 0</code>" in page


def test_all_that_is_drawn_of_a_row_has_its_number(board: Board, tmp_path: Path) -> None:
    """Else a filter would leave some of it."""
    two = dataclasses.replace(board, entries=board.entries * 2)
    for figure in (draw_curves(two, [two]), draw_scatter(two)):
        (axes,) = figure.axes
        ids = [one.get_gid() for one in (*axes.lines, *axes.collections, *figure.legends[0].get_texts())]
        assert set(ids) == {"row-1", "row-2"}
        assert ids.count("row-1") == ids.count("row-2")
