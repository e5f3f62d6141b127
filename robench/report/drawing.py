"""Plots as SVG inside a page: text stays text, the page's colour is theirs, and what they repeat is written once."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from robench.errors import UsageError
from robench.text import replace_forbidden

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#010203"
"""What is drawn in it takes the colour of the page's text."""
LINK: Final = "{http://www.w3.org/1999/xlink}href"
NAMESPACE: Final = "{http://www.w3.org/2000/svg}"
NUMBER: Final = re.compile(r"-?\d+\.\d+")
ROW: Final = re.compile(r"row-(\d+)")
NO_TURN: Final = re.compile(r"^rotate\(-?0 [^)]*\)$")


def find_figure(command: str) -> type[Figure]:
    """The class of matplotlib's figures, for a command that draws pictures.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(f"{command} needs matplotlib: pip install 'robench[plot]'") from None
    return Figure


def row_id(number: int) -> str:
    """The id (`set_gid`) of what is drawn of a table's row; on the page it has the attribute `data-row`."""
    return f"row-{number}"


@contextmanager
def page_style() -> Iterator[None]:
    """Within it matplotlib draws for a page; two pages of the same figures are the same bytes.

    A letter that its font lacks is drawn by the reader's browser, so that its warning of an empty box is wrong here.
    """
    import matplotlib as mpl

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "robench",
        "text.parse_math": False,
        "font.size": 9,
    }
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


class Drawings:
    """The plots of one page. matplotlib writes the same style into every tick; here it becomes a class of the page.

    Use:
        drawings = Drawings()
        text = drawings.svg(figure)  # for the page's body
        drawings.css()  # for its head, after the last plot
    """

    def __init__(self) -> None:
        """Starts without any plot."""
        self._classes: dict[str, str] = {}
        self._count = 0

    def svg(self, figure: Figure) -> str:
        """A figure as an `svg` element, hidden from screen readers: the page's tables say the same."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        root = ElementTree.fromstring(replace_forbidden(buffer.getvalue().decode()))
        for metadata in root.findall(f"{NAMESPACE}metadata"):
            root.remove(metadata)
        for name in ("width", "height"):
            root.attrib.pop(name, None)
        root.set("aria-hidden", "true")
        self._name(root)
        for element in root.iter():
            self._shorten(element)
        _unwrap(root)
        return ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor")

    def css(self) -> str:
        """The style sheet of all plots so far."""
        rules = (f".{name} {{{style}}}" for style, name in self._classes.items())
        return "\n".join(rules).replace(INK, "currentColor")

    def _name(self, root: ElementTree.Element) -> None:
        """Ids that something refers to get a name of their own on the page; the others go, but for rows' numbers."""
        used = {link.lstrip("#") for element in root.iter() if (link := element.get(LINK))}
        used |= {name for element in root.iter() for name in re.findall(r"url\(#(\w+)\)", element.get("clip-path", ""))}
        self._count += 1
        names = {old: f"g{self._count}-{number}" for number, old in enumerate(sorted(used))}
        for element in root.iter():
            old = element.attrib.pop("id", None)
            row = ROW.fullmatch(old or "")
            if row:
                element.set("data-row", row[1])
            if old in names:
                element.set("id", names[old])
            link = element.attrib.pop(LINK, None)
            if link is not None:
                element.set("href", f"#{names[link.lstrip('#')]}")
            if "clip-path" in element.attrib:
                clip = element.get("clip-path", "")
                element.set("clip-path", re.sub(r"#(\w+)", lambda found: f"#{names[found[1]]}", clip))

    def _shorten(self, element: ElementTree.Element) -> None:
        element.tag = element.tag.removeprefix(NAMESPACE)
        style = element.attrib.pop("style", None)
        if style:
            element.set("class", self._classes.setdefault(style, f"d{len(self._classes)}"))
        if NO_TURN.match(element.get("transform", "")):
            del element.attrib["transform"]
        for name in ("d", "x", "y", "transform", "points"):
            if name in element.attrib:
                element.set(name, " ".join(NUMBER.sub(_round, element.get(name, "")).split()))
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None


def _round(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _unwrap(element: ElementTree.Element) -> None:
    """Takes away groups that say nothing: matplotlib makes one around each tick, line and text."""
    children: list[ElementTree.Element] = []
    for child in element:
        _unwrap(child)
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = children
