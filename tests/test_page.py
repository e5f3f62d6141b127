"""The leaderboards' page in a real browser: sorting, filtering, opening a row, by mouse and by keyboard."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from board_toys import BOARD, HOSTILE, make_boards, make_row
from browser import find_browser

from robench.board import Board, Entry, Neighbours
from robench.check_names import QUESTIONS
from robench.command_board import build_page
from robench.leaderboard import rank_rows
from robench.report.board import render_boards

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_page(make_boards(tmp_path_factory.mktemp("site")), [], None, None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: Path) -> Iterator[Page]:
    yield from open_page(browser, site)


@pytest.fixture
def mixed(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A board of two protocols, in each of which two rows tie."""
    names = {"standard-1": ("one", "two", "last"), "": ("few", "many")}
    rows = rank_rows(
        [
            make_row(name, f"0.{9 - place}", protocol=protocol, evidence=str(place), pgd="0.5")
            for protocol, group in names.items()
            for place, name in enumerate(group)
        ]
    )
    ties = {"two": Neighbours(False, 50, "3. last"), "few": Neighbours(False, 40, "2. many")}
    entries = tuple(Entry(row, None, "", ties.get(row["defense"])) for row in rows)
    site = tmp_path / "mixed.html"
    site.write_text(render_boards([Board("a-linf-1", "a", "linf", "1", entries)]))
    yield from open_page(browser, site)


def open_page(browser: Browser, site: Path, part: str = "", height: int = 720) -> Iterator[Page]:
    """The page, at a part of it; afterwards: no error on the console, no dialogue, no request but for the file."""
    page = browser.new_page(viewport={"width": 1280, "height": height})
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: None if _is_own(request.url, site) else troubles.append(request.url))
    page.goto(f"{site.as_uri()}{part}")
    yield page
    page.close()
    assert troubles == []


def _is_own(url: str, site: Path) -> bool:
    return url.partition("#")[0] == site.as_uri() or url.startswith("data:")


def defenses(page: Page) -> list[str]:
    return page.locator(
        f"section:has(#{BOARD.replace('.', chr(92) + '.')}) tr.entry:visible .name button"
    ).all_inner_texts()


def test_rows_come_in_order_of_rank(page: Page) -> None:
    assert defenses(page)[-2:] == ['=HYPERLINK("http://example.org")', "partial $x$"]
    assert page.locator("#count").inner_text() == "6 rows"
    assert page.locator("tr.masked-row").count() == 1


def test_sorting(page: Page) -> None:
    before = defenses(page)
    head = page.get_by_role("button", name="defense").first
    head.click()
    assert sorted(defenses(page)) == sorted(before)
    assert defenses(page) != before
    once = defenses(page)
    head.click()
    assert defenses(page) == once[::-1]
    robust = page.locator("th button", has_text="robust").first
    robust.click()
    values = (
        page.locator("section")
        .first.locator("tr.entry")
        .evaluate_all("rows => rows.map(r => r.cells[2].dataset.value)")
    )
    known = [float(value) for value in values if value]
    assert known == sorted(known, reverse=True)  # the best first
    assert values[-1] == ""  # what is not known comes last
    assert page.locator("th[aria-sort=descending]").first.inner_text().startswith("robust")
    robust.click()
    assert page.locator("th[aria-sort=ascending]").first.inner_text().startswith("robust")


def test_filtering(page: Page) -> None:
    page.get_by_label("kind").select_option("randomized")
    assert defenses(page) == [HOSTILE]
    assert page.get_by_role("button", name="Show all rows").is_visible()
    assert page.locator("#count").inner_text() == "1 row"
    page.get_by_label("kind").select_option("all")
    page.get_by_label("norm").select_option("l2")
    assert defenses(page) == []
    assert page.locator("section:visible").count() == 1
    page.get_by_label("norm").select_option("")
    page.get_by_label("data").select_option("fashion_mnist")
    page.get_by_label("audit").select_option("masked")
    assert len(defenses(page)) == 1


def test_filters_without_a_match_say_so_and_can_be_reset(page: Page) -> None:
    reset = page.get_by_role("button", name="Show all rows")
    assert reset.is_hidden()
    page.get_by_label("norm").select_option("l2")
    page.get_by_label("audit").select_option("masked")
    assert page.locator("section:visible").count() == 0
    assert page.get_by_role("status").inner_text() == "No row matches these filters."
    reset.press("Enter")
    assert page.get_by_role("status").inner_text() == "6 rows"
    assert page.locator("section:visible").count() == 2
    assert reset.is_hidden()
    assert page.evaluate("document.activeElement.dataset.filter") == "dataset"  # not lost with the button


def test_generative_rows_are_marked_and_found(browser: Browser, published_page: Path, tmp_path: Path) -> None:
    """On the page of this repository, whose rows are of robench's own defenses."""
    for page in open_page(browser, published_page):
        keep_picture(page, "leaderboards-published", tmp_path)
        page.get_by_label("kind").select_option("generative")
        named = {name.split()[0]: name for name in page.locator("tr.entry:visible .name").all_inner_texts()}
        assert named.keys() == {"jem", "shortrun"}
        assert all("generative" in name for name in named.values())


def listed(page: Page) -> list[str]:
    """What a reader sees from above: the protocols' headings and the rows' names."""
    cells = page.locator(".board > tbody > tr:visible:not(.panel) > :is(th, .name)").all_inner_texts()
    return [cell.split()[0] for cell in cells]


def test_each_protocol_is_sorted_by_itself_and_ranks_come_back(mixed: Page) -> None:
    by_rank = ["standard-1", "one", "two", "last", "free", "few", "many"]
    assert listed(mixed) == by_rank
    for names in (["last", "one", "two", "few", "many"], ["two", "one", "last", "many", "few"]):
        mixed.get_by_role("button", name="defense").click()
        assert listed(mixed) == ["standard-1", *names[:3], "free", *names[3:]]
    mixed.get_by_role("button", name="images").click()
    assert listed(mixed) == by_rank  # all equal, which the order before does not decide
    mixed.get_by_role("button", name="defense").click()
    mixed.get_by_role("button", name="rank").click()
    assert listed(mixed) == by_rank


def test_a_tie_names_the_row_after_it(mixed: Page) -> None:
    for name, tie in (("two", "3. last (paired test on 50 images)"), ("few", "2. many (paired test on 40 images)")):
        row = mixed.locator("tr.entry", has=mixed.get_by_role("button", name=name, exact=True))
        assert row.locator("abbr").get_attribute("title") == f"not distinguishable from {tie}"
        assert row.locator("td").first.inner_text().split(maxsplit=1)[1] == f"not distinguishable from {tie}"
    assert mixed.locator("abbr").count() == 2
    mixed.get_by_role("button", name="last", exact=True).click()
    facts = mixed.locator(".panel:visible dl").inner_text()
    assert "not distinguishable from 2. two (paired test on 50 images)" in facts  # told of the lower row, too


def test_a_protocol_is_filtered_in_the_table_and_in_the_charts(mixed: Page) -> None:
    def legend() -> list[str]:
        return mixed.locator("figure svg text:visible", has_text=", ").all_text_contents()

    names = [
        "1. one, standard-1",
        "2. two, standard-1",
        "3. last, standard-1",
        "1. few, free list",
        "2. many, free list",
    ]
    drawn = mixed.locator("[data-row]:visible").count()
    assert sorted(legend()) == sorted(2 * names)
    mixed.get_by_label("protocol").select_option("free list")
    assert listed(mixed) == ["free", "few", "many"]
    assert sorted(legend()) == sorted(2 * names[3:])
    assert mixed.locator("[data-row]:visible").count() == drawn * 2 / 5
    mixed.get_by_label("protocol").select_option("")
    assert mixed.locator("[data-row]:visible").count() == drawn


def test_one_protocol_needs_no_filter(page: Page) -> None:
    assert page.get_by_label("protocol").count() == 0


def panel_of(page: Page, digest: str | None) -> Locator:
    """A row's panel by its id, which may start with a digit."""
    return page.locator(f'[id="{digest}"]')


def test_a_row_has_a_link_that_opens_it(browser: Browser, site: Path) -> None:
    """On a screen on which the row would be out of sight; by the address, and while filters hide the row."""
    (evidence,) = (site.parent / "evidence").iterdir()
    for page in open_page(browser, site, f"#{evidence.name}", height=300):
        panel = panel_of(page, evidence.name)
        link = panel.get_by_role("link", name="Link to this row")
        assert page.evaluate("scrollY") > 0
        assert_in_sight(page, link)
        button = page.get_by_role("button", name="prototypes")
        assert_in_sight(page, button)
        assert button.get_attribute("aria-expanded") == "true"
        page.evaluate("location.hash = '#nothing'; scrollTo(0, 0)")
        page.get_by_label("norm").select_option("l2")
        assert panel.is_hidden()
        page.evaluate(f"location.hash = '#{evidence.name}'")
        link.wait_for()
        assert_in_sight(page, link)
        assert page.locator("#count").inner_text() == "6 rows"
        page.evaluate("location.hash = ''")
        link.click()
        assert page.url == f"{site.as_uri()}#{evidence.name}"
        assert page.locator(".panel:visible").count() == 1


def assert_in_sight(page: Page, part: Locator) -> None:
    box, size = part.bounding_box(), page.viewport_size
    assert box is not None
    assert size is not None
    assert 0 <= box["y"] < box["y"] + box["height"] <= size["height"]


def test_a_row_without_evidence_has_no_link(mixed: Page) -> None:
    mixed.get_by_role("button", name="one").click()
    assert mixed.locator(".panel:visible").count() == 1
    assert mixed.get_by_role("link").count() == 0


def test_a_row_opens_and_closes(page: Page) -> None:
    button = page.get_by_role("button", name="prototypes")
    panel = panel_of(page, button.get_attribute("aria-controls"))
    assert panel.is_hidden()
    button.click()
    assert panel.is_visible()
    assert button.get_attribute("aria-expanded") == "true"
    assert re.search(r"robench verify \S+/evidence/\w+ --trust", panel.inner_text())
    assert page.url.endswith(f"#{button.get_attribute('aria-controls')}")
    asked = f"finite_differences {QUESTIONS['finite_differences']}"
    assert asked not in " ".join(panel.inner_text().split())  # what passed is folded
    panel.get_by_text("checks passed").click()
    assert asked in " ".join(panel.inner_text().split())
    widths = panel.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths == [3 * 30] * 2
    button.click()
    assert panel.is_hidden()


def test_the_keyboard_suffices(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.filter") == "dataset"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "prototypes":
            break
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="prototypes").get_attribute("aria-expanded") == "true"


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_phone_and_night(width: int, scheme: str, page: Page, tmp_path: Path) -> None:
    """No sideways scrolling of the page itself, readable contrast; the screenshot is kept where CI asks for it."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.get_by_role("button", name="prototypes").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
    assert abs(_brightness(ink) - _brightness(paper)) > 150
    chart = page.locator("figure svg text").first.evaluate("node => getComputedStyle(node).fill")
    assert abs(_brightness(chart) - _brightness(paper)) > 150
    keep_picture(page, f"leaderboards-{width}-{scheme}", tmp_path)


def keep_picture(page: Page, name: str, otherwise: Path) -> None:
    """Where CI asks for pictures, else in a folder that goes."""
    folder = Path(os.environ.get("ROBENCH_ARTIFACTS", otherwise))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def test_a_phone_shows_what_a_row_says_without_scrolling_sideways(page: Page) -> None:
    """Rank, name, figures and audit of every row, an opened row as a whole, and charts whose letters are not shrunk."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="prototypes").click()
    for summary in page.locator("details summary:visible").all():
        summary.click()
    section = page.locator("section").first
    heads = section.locator("table.board > thead th:visible").all_inner_texts()
    assert [head.split()[0] for head in heads] == ["rank", "defense", "robust", "clean", "audit"]
    names = section.locator("tr.entry .name").all_inner_texts()
    assert sorted(name.split("\n")[-1] for name in names if "prototypes" in name) == ["24 images"]
    for part in ("table.board > * > tr:not(.panel) > *:visible", ".panel:visible *:visible:not(svg *)"):
        edges = section.locator(part).evaluate_all(
            "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])"
        )
        assert len(edges) > 20
        assert min(left for left, _ in edges) >= 0
        assert max(right for _, right in edges) <= 390
    facts = section.locator(".panel:visible dl").inner_text()
    assert "free list, on 24 images; found most errors: " in facts
    scales = section.locator("svg:visible").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().width / one.viewBox.baseVal.width)"
    )
    assert len(scales) >= 3
    assert 8 * min(scales) >= 9  # pixels of the smallest letters


@pytest.mark.parametrize("width", [320, 360, 375, 390, 641, 768, 900, 1009])
def test_no_table_and_no_chart_is_wider_than_a_phone_or_a_tablet(width: int, page: Page) -> None:
    """Else the verdict, or what a chart has at its right end, would be cut off; with a row closed and opened."""
    page.set_viewport_size({"width": width, "height": 700})
    for _ in range(2):
        parts = page.locator(".wide, figure:visible")
        excess = parts.evaluate_all("all => all.map(one => one.scrollWidth - one.clientWidth)")
        assert len(excess) >= 3 + 4
        assert set(excess) == {0}
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="prototypes").click()


def test_a_phone_shows_the_figures_of_others_with_their_source_and_note(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    cells = page.locator(".reference tbody td:visible")
    assert cells.all_inner_texts() == [HOSTILE, "40.0", "90.0", "PGD-20", "A paper, table 1", "2020", "not comparable"]
    edges = cells.evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    assert max(edges) <= 390


def _brightness(color: str) -> float:
    values = [float(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    return sum(values) / 3


def test_hostile_names_are_text(page: Page) -> None:
    assert page.get_by_role("button", name=HOSTILE).count() == 1
    assert page.locator("script").count() == 1
