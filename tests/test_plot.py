"""`robench plot`: the picture is written, holds a curve for each run, and what does not belong together is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import engine_toys
import numpy as np
import pytest
from engine_toys import Bad, Linear, Prototypes, grid_images
from PIL import Image

from robench.cli import main
from robench.errors import DataError, UsageError
from robench.evaluate import evaluate
from robench.report.curve import plot_runs
from robench.result import Evaluation
from robench.threat import ThreatModel

TOYS = engine_toys.__file__


def make_run(folder: Path, attacks: Any = "fgsm", norm: str = "linf", dataset: str = "toys", name: str = "") -> Path:
    """A run at three bounds whose data go by a name."""
    bounds = [ThreatModel(norm, eps) for eps in (0.01, 0.02, 0.03)]
    result = evaluate(Linear(), attacks, bounds, grid_images(12), defense_spec=name)
    spec = dataclasses.replace(result.spec, dataset=dataset)
    return result.under(spec, "2026-01-02").save(folder)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def colours(picture: Path) -> int:
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))


def test_picture_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(
        Prototypes(),
        "fgsm",
        [ThreatModel("linf", eps) for eps in (0.02, 0.05)],
        "fashion_mnist",
        n=10,
        out=tmp_path / "run",
        defense_spec=f"{TOYS}:Prototypes",
    )
    capsys.readouterr()
    out = tmp_path / "pictures" / "curve.png"
    assert call(monkeypatch, "plot", tmp_path / "run", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(out) as image:
        assert min(image.size) > 300
    assert colours(out) > 20, "an empty picture has few colours"


def test_each_run_has_a_curve_of_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "fgsm,pgd(steps=2)"),
        make_run(tmp_path / "c", name="mine"),
    ]
    out = tmp_path / "curve.svg"
    assert call(monkeypatch, "plot", *runs, "--out", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"plot": str(out), "curves": ["linear, fgsm", "linear, fgsm, pgd(steps=2)", "mine, fgsm"]}
    assert plot_runs(runs[::2], tmp_path / "two.svg") == ["linear", "mine"], "names alone where they tell runs apart"
    text = out.read_text()
    assert text.startswith("<?xml")
    assert text.count('id="PolyCollection_') + text.count('id="FillBetweenPolyCollection_') == 3, "a band for each"


def test_a_point_that_is_not_known_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from matplotlib.figure import Figure

    from robench.report.curve import draw_curve

    folder = make_run(tmp_path / "run", [engine_toys.FailsBeyond(0.015), "fgsm"])
    axes = Figure().add_subplot()
    draw_curve(axes, Evaluation.load(folder), "toy", 0)
    (line,) = axes.get_lines()
    eps, percent = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    curve = Evaluation.load(folder).curve
    assert eps.tolist() == [0.0, 0.01]
    assert percent.tolist() == [100 * point["value"] for point in curve[:2]]
    assert curve[2]["value"] is None
    caplog.clear()
    plot_runs([folder], tmp_path / "curve.png")
    assert caplog.messages == [
        f"{folder}: no point at eps {eps}, where fails_beyond(limit=0.015) failed" for eps in (0.02, 0.03)
    ]
    assert plot_runs([make_run(tmp_path / "failed", [Bad()])], tmp_path / "failed.png") == ["linear"]


# what is refused: one line, and no picture


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert call(monkeypatch, "plot", *words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("robench: ")
    return line


@pytest.mark.parametrize("name", ["curve", "curve.jpg", "curve.png.txt", "png"])
def test_another_ending_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(monkeypatch, capsys, make_run(tmp_path / "run"), "--out", tmp_path / name)
    assert line == f'robench: the picture must end in .png, .svg, .pdf; got "{name}"'
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"norm": "l2"}, "curves of one picture need one norm; these runs have l2, linf"),
        ({"dataset": "others"}, "curves of one picture need one dataset; these runs have others, toys"),
    ],
    ids=["norms", "datasets"],
)
def test_runs_that_do_not_belong_together_are_refused(
    other: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", **other)
    assert message in refused(monkeypatch, capsys, *runs, "--out", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_missing_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(monkeypatch, capsys, run, "--out", tmp_path / "curve.png")
    assert line == "robench: robench plot needs matplotlib: pip install 'robench[plot]'"


def test_what_is_no_run_or_not_finished_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a run folder" in refused(monkeypatch, capsys, tmp_path / "none", "--out", tmp_path / "curve.png")
    run = make_run(tmp_path / "run")
    assert refused(monkeypatch, capsys, tmp_path).endswith(f"it has no run.json; those in it are {run}")
    assert refused(monkeypatch, capsys, run / "run.json").endswith(f"it is a file. Name its folder: {run}")
    next((run / "units").iterdir()).unlink()
    with pytest.raises(DataError, match="unit"):
        plot_runs([run], tmp_path / "curve.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "curve.png").mkdir()
    for out in (tmp_path / "file" / "curve.png", tmp_path / "curve.png"):
        with pytest.raises(UsageError, match=f"cannot write {out}: "):
            plot_runs([run], out)
