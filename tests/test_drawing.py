"""Plots of a page: the same picture in fewer bytes, and no two of them in each other's way."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from robench.report.drawing import INK, Drawings, page_style

HOSTILE = '<script>alert("1")</script> & $x$'


def draw(label: str = "curve") -> Figure:
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 0.123456789, 1], [1, 0.5, 0], marker="o", label=label)
    axes.fill_between([0, 1], [0, 0], [1, 1], alpha=0.2)
    axes.set(xlabel="eps", ylabel="accuracy (%)")
    axes.legend()
    return figure


@pytest.fixture
def drawn() -> tuple[Drawings, list[str]]:
    drawings = Drawings()
    with page_style():
        return drawings, [drawings.svg(draw()), drawings.svg(draw(HOSTILE))]


def test_what_is_repeated_is_written_once(drawn: tuple[Drawings, list[str]]) -> None:
    drawings, texts = drawn
    plain = io.BytesIO()
    with page_style():
        draw().savefig(plain, format="svg")
    assert len(texts[0]) < 0.5 * len(plain.getvalue())
    assert "style=" not in "".join(texts)
    rules = dict(re.findall(r"^\.(d\d+) \{(.*)\}$", drawings.css(), re.MULTILINE))
    assert len(set(rules.values())) == len(rules) == len(drawings.css().splitlines())
    assert set(re.findall(r'class="(\w+)"', "".join(texts))) == set(rules)


def test_every_style_of_matplotlib_is_kept(drawn: tuple[Drawings, list[str]]) -> None:
    """Each element keeps its style, found through its class, and each drawn point its place to a hundredth."""
    drawings, texts = drawn
    plain = io.BytesIO()
    with page_style():
        draw().savefig(plain, format="svg", transparent=True)
    rules = dict(re.findall(r"^\.(d\d+) \{(.*)\}$", drawings.css(), re.MULTILINE))
    paths = [one for one in ElementTree.fromstring(plain.getvalue()).iter() if one.tag.endswith("path")]
    kept = [one for one in ElementTree.fromstring(texts[0]).iter() if one.tag == "path"]
    assert len(paths) == len(kept) > 5
    for before, after in zip(paths, kept, strict=True):
        assert rules[after.get("class", "")] == before.get("style", "").replace(INK, "currentColor")
        numbers = [[float(x) for x in re.findall(r"-?[\d.]+", one.get("d", ""))] for one in (before, after)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.006)


def test_references_hold_and_ids_are_unique_on_the_page(drawn: tuple[Drawings, list[str]]) -> None:
    text = "".join(drawn[1])
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids) > 0
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used == set(ids)


def test_text_stays_text_and_harmless(drawn: tuple[Drawings, list[str]]) -> None:
    texts = [node.text for node in ElementTree.fromstring(drawn[1][1]).iter() if node.tag == "text"]
    assert HOSTILE in texts
    assert "accuracy (%)" in texts
    assert "<script>" not in drawn[1][1]
    assert INK not in "".join(drawn[1]) + drawn[0].css()
    assert "currentColor" in drawn[0].css()


def test_letters_that_the_font_of_matplotlib_lacks_are_drawn_without_a_warning() -> None:
    """The page's reader has them; of a picture in pixels the warning is true."""
    with page_style():
        text = Drawings().svg(draw("名前"))
    assert "名前" in text
    with pytest.warns(UserWarning, match="Glyph .* missing from font"):
        draw("名").savefig(io.BytesIO(), format="png")
