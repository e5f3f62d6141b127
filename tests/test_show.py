"""`robench show`: pictures, calibration, the defense's own figures, and detection scores against another dataset."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toys import Prototypes
from PIL import Image
from torch import nn

from robench import UsageError, show
from robench.cli import main
from robench.data import load_dataset
from robench.show import ShowRequest, show_defense
from robench.types import Images, Labels, Logits, PerExample

HERE = Path(__file__)


class Shown(Prototypes):
    """Shows its images upside down, counts them, and calls dark ones suspicious."""

    name = "shown"
    detection_scores = ("dark", "nothing")

    def pictures(self, x: Images) -> Mapping[str, Images]:
        return {"original": x, "upside_down": x.flip(2), "one": x[:1]}

    def diagnostics(self, x: Images, y: Labels) -> Mapping[str, float]:
        return {"images": float(len(x)), "classes": float(len(y.unique()))}

    def detection_score(self, x: Images, kind: str | None = None) -> PerExample:
        if self.check_score(kind) == "nothing":
            return torch.zeros(len(x))
        return -x.mean((1, 2, 3))


SHOWN = f"{HERE}:Shown"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", "show", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_everything_is_drawn_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--defense", SHOWN, "--n", 30, "--against", "fashion_mnist", "--out", tmp_path, "--json")
    assert call(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["diagnostics"] == {"images": 30.0, "classes": 10.0}
    assert found["auroc"]["dark"]["value"] == 0.5  # the same images on both sides
    assert found["auroc"]["nothing"]["value"] == 0.5
    assert sum(row["images"] for row in found["reliability"]) == 30
    right = sum(row["images"] * row["accuracy"] for row in found["reliability"]) / 30
    assert found["accuracy"]["value"] == pytest.approx(right, abs=1e-6)
    for name in ("pictures.png", "reliability.png", "scores.png"):
        with Image.open(tmp_path / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, name


def test_interpolations_are_told_from_images_and_the_output_says_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--defense", SHOWN, "--n", 30, "--against", "interpolation", "--out", tmp_path)
    assert call(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["against"], found["outliers_made"]) == ("interpolation", "means of two images")
    assert 0 < found["auroc"]["dark"]["value"] < 1
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "images of interpolation" in out
    assert "means of two images" in out


class Coloured(Shown):
    """Takes framed images in colour: those of the dataset that a test puts in the place of its own."""

    name = "coloured"
    input_shape = (3, 32, 32)

    def forward(self, x: Images) -> Logits:
        return super().forward(x[:, :1, 2:30, 2:30])


def test_grey_images_are_brought_into_the_shape_of_those_in_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = load_dataset("fashion_mnist", "test", 20)
    coloured = dataclasses.replace(grey, x=nn.functional.pad(grey.x, (2,) * 4).expand(-1, 3, -1, -1))
    monkeypatch.setattr(show, "load_dataset", lambda *_: coloured)
    words = ("--defense", f"{HERE}:Coloured", "--n", 20, "--against", "fashion_mnist", "--out", tmp_path, "--json")
    assert call(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outliers_made"] == "a black frame of 2x2 pixels and grey in 3 equal channels"
    assert found["auroc"]["dark"]["value"] == 0.5  # the same images on both sides


def test_a_defense_with_nothing_of_its_own_shows_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.png").write_bytes(b"of an earlier call")
    assert call(monkeypatch, "--defense", "convnet", "--n", 20, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "expected calibration error" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures.png", "reliability.png"]
    assert "scores.png" not in out


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    exhibits = [
        show_defense(ShowRequest("shortrun(n_chains=1, steps=2)", "fashion_mnist", tmp_path, n=20, seed=seed))
        for seed in (3, 3, 4)
    ]
    first, again, other = [exhibit.to_json()["calibration_error"] for exhibit in exhibits]
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--defense", "convnet", "--against", "fashion_mnist"), "has no detection score"),
        (("--defense", "convnot"), "convnet"),
        (("--defense", SHOWN, "--n", "0"), "n takes"),
        (("--defense", SHOWN, "--out", "/proc/none"), "Choose another --out"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *options) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert message in err[0]


def test_matplotlib_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'robench\[plot\]'"):
        show_defense(ShowRequest("no such defense", "fashion_mnist", tmp_path, n=10))  # told before any work
