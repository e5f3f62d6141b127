"""`robench show`: pictures, calibration, the defense's own figures, and detection scores against another dataset."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toys import Prototypes
from PIL import Image

from robench import UsageError
from robench.cli import main
from robench.show import ShowRequest, show_defense
from robench.types import Images, Labels, PerExample

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
