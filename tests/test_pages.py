"""Every page in a real browser: offline, on a phone, in the dark, for a screen reader."""

import functools
import gzip
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect

from helpers.plots import COLORS
from tools.serve import Handler

CHAPTER = "notebooks/04_mlp_adam_vs_sgd.html"

# For axe: code is thousands of elements, a figure as many, a table's rows are alike. Whole,
# they would take it minutes. Code's colours have a test of their own, a figure its name.
FLATTEN = """() => {
    for (const code of document.querySelectorAll(".highlight pre"))
        code.replaceChildren(code.textContent);
    for (const figure of document.querySelectorAll("svg.cell-figure")) figure.replaceChildren();
    for (const row of document.querySelectorAll("tbody tr:nth-child(n + 4)")) row.remove();
}"""

CODE_COLORS = """() => {
    const seen = new Set();
    for (const token of document.querySelectorAll(".highlight pre span")) {
        if (!token.textContent.trim()) continue;
        let behind = token;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)")
            behind = behind.parentElement;
        seen.add(getComputedStyle(token).color + "|" + getComputedStyle(behind).backgroundColor);
    }
    return [...seen].map((pair) => pair.split("|"));
}"""

WIDE_CODE = """() => [...document.querySelectorAll(".bd-article .highlight pre")]
    .filter((code) => code.scrollWidth > code.clientWidth + 1).map((code) => code.textContent)"""

CUT_OFF = """() => [...document.querySelectorAll(".prev-next-area *")]
    .filter((part) => part.getBoundingClientRect().right > innerWidth)
    .map((part) => part.textContent.trim())"""

# Of figures, in pixels: the book's 10 points are 9 on a phone.
SMALL_TEXT = """() => [...document.querySelectorAll("svg.cell-figure")].flatMap((figure) => {
    const scale = figure.getBoundingClientRect().width / figure.viewBox.baseVal.width;
    return [...figure.querySelectorAll("text")]
        .filter((text) => parseFloat(getComputedStyle(text).fontSize) * scale < 8.5)
        .map((text) => text.textContent);
})"""

WIDE_TABLES = """() => [...document.querySelectorAll(".pst-scrollable-table-container")]
    .filter((place) => !place.closest("details:not([open])"))
    .filter((place) => place.scrollWidth > place.clientWidth + 1)
    .map((place) => place.textContent.trim().slice(0, 60))"""

# Once the page has been laid out anew, and edges.js has looked at what scrolls then. Nothing may
# move: stillness is asked for.
SETTLED = """async () => {
    for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
    if (document.getAnimations().length) throw new Error("what moves was to stand still");
    return document.documentElement.scrollWidth;
}"""


class Watched:
    """A tab, and what went wrong in it."""

    def __init__(self, browser: Browser, theme: str, width: int) -> None:
        self.tab = browser.new_page(
            color_scheme=theme,  # type: ignore[arg-type]
            viewport={"width": width, "height": 900},
            reduced_motion="reduce",
        )
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("requestfailed", self._failed)
        self.tab.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # as when the tab goes on to another page
            self.errors.append(request.url)

    def resize(self, width: int) -> None:
        """Make the window `width` pixels wide: nothing may reach beyond it."""
        self.tab.set_viewport_size({"width": width, "height": 900})
        assert self.tab.evaluate(SETTLED) <= width

    def check(self, home: str) -> None:
        """Nothing failed, nothing was asked of anyone else, every image is there."""
        assert self.errors == []
        assert [u for u in self.requests if not u.startswith((home, "data:"))] == []
        missing = """() => Promise.all([...document.images].map(
            (image) => image.decode().then(() => "", () => image.src)))"""
        assert [source for source in self.tab.evaluate(missing) if source] == []


def violations(tab: Page) -> list[str]:
    """What axe-core finds that is serious or critical, with the first element of each."""
    tab.evaluate(FLATTEN)
    options = {"resultTypes": ["violations"], "preload": False}
    found: list[dict[str, Any]] = Axe().run(tab, options=options).response["violations"]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


def luminance(rgb: tuple[float, ...]) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def from_css(color: str) -> tuple[float, ...]:
    if color.startswith("#"):
        return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(float(n) / 255 for n in re.findall(r"[\d.]+", color)[:3])


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Iterator[dict[str, Watched]]:
    """One tab of either theme for all pages: opening one takes as long as a page."""
    opened = {theme: Watched(browser, theme, 390) for theme in ("light", "dark")}
    yield opened
    for watched in opened.values():
        watched.tab.close()


# The theme lets the keyboard reach what scrolls when it loads, so the narrowest comes first.
@pytest.mark.parametrize(("theme", "widths"), [("light", [390, 360, 1280]), ("dark", [360, 390])])
def test_a_page(
    html: Path, server: str, tabs: dict[str, Watched], page: str, theme: str, widths: list[int]
) -> None:
    """Whole and quiet, nowhere wider than the screen, legible and usable by all."""
    home = server if page == "404.html" else html.as_uri()  # its links are those of a server
    watched = tabs[theme]
    watched.requests.clear()
    watched.errors.clear()
    tab = watched.tab
    tab.set_viewport_size({"width": widths[0], "height": 900})
    tab.goto(f"{home}/{page}")
    for width in widths:
        watched.resize(width)
        if width < 576:  # a phone
            assert tab.evaluate(WIDE_CODE) == tab.evaluate(CUT_OFF) == []
            assert len(wide := tab.evaluate(WIDE_TABLES)) <= 1, wide
        if width == 390:
            assert tab.evaluate(SMALL_TEXT) == []
    watched.check(home)
    for color, behind in tab.evaluate(CODE_COLORS):
        assert contrast(from_css(color), from_css(behind)) >= 4.5, (color, behind)
    assert violations(tab) == []
    watched.resize(1280)


def test_a_wide_table_stands_in_a_stack_on_a_phone(html: Path, browser: Browser) -> None:
    """Each cell then says its column, to the eye and to a screen reader; a matrix fades instead."""
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((html / "notebooks" / "12_audit.html").as_uri())
    table = tab.locator("table.stacked").first
    row = table.get_by_role("row").nth(1)
    cells = row.get_by_role("cell")
    said = cells.evaluate_all("cells => cells.map((cell) => [cell.dataset.head, cell.innerText])")
    assert ["number", "FP32"] in said and ["verdict", "confirmed"] in said
    assert all(text.strip() for _, text in said)  # what is empty takes no room
    tab.set_viewport_size({"width": 1280, "height": 800})
    expect(tab.locator("table.stacked")).to_have_count(0)
    tab.goto((html / "notebooks" / "17_conversion_and_hardware.html").as_uri())
    tab.set_viewport_size({"width": 390, "height": 844})
    matrix = tab.locator(".pst-scrollable-table-container.more-right", has_text="generation")
    expect(matrix).to_be_visible()
    tab.goto((html / "book" / "estimator.html").as_uri())
    expect(tab.locator(".scroll.more-right", has_text="iframe")).to_be_visible()
    tables = tab.locator(".scroll:visible", has=tab.locator("table"))
    expect(tables).to_have_count(3)  # drawn anew with each choice, they fit as they are
    wide = tables.evaluate_all("all => all.filter((one) => one.scrollWidth > one.clientWidth)")
    assert not wide
    tab.close()


@pytest.fixture(scope="module")
def server(html: Path) -> Iterator[str]:
    """The book's address, as `make serve` gives it."""

    class Quiet(Handler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(html))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_a_first_visit_is_light(html: Path, server: str, browser: Browser) -> None:
    """All that the start page loads, as a server with compression sends it: under 400 kB."""
    watched = Watched(browser, "light", 1280)
    watched.tab.goto(f"{server}/book/index.html", wait_until="networkidle")
    paths = {unquote(urlsplit(url).path).lstrip("/") for url in watched.requests}
    assert "book/index.html" in paths
    assert sum(len(gzip.compress((html / path).read_bytes())) for path in paths) < 400_000
    # Icons come from the font of those in use: not from the theme's whole one, nor its script.
    assert [path for path in paths if "fontawesome" in path] == []
    watched.tab.close()


@pytest.mark.parametrize("origin", ["a file", "a server"])
def test_search(html: Path, server: str, browser: Browser, origin: str) -> None:
    """By keyboard: open it, ask, go to what it found, see it marked."""
    home = html.as_uri() if origin == "a file" else server
    watched = Watched(browser, "light", 1280)
    tab = watched.tab
    tab.goto(f"{home}/book/glossary.html")
    tab.keyboard.press("Control+k")
    tab.keyboard.type("xyzzy")
    tab.keyboard.press("Enter")
    expect(tab.locator("#search-results p").first).to_contain_text("did not match any documents")
    tab.goto(f"{home}/book/glossary.html")
    tab.keyboard.press("Control+k")
    tab.keyboard.type("snapshot")
    tab.keyboard.press("Enter")
    expect(tab.locator("#search-results p").first).to_contain_text("matching the search query")
    if origin == "a server":  # a line of each page, too
        expect(tab.locator("#search-results p.context").first).to_contain_text(re.compile("\\w+"))
    watched.check(home)
    tab.locator("#search-results a[href*=troubleshooting]").first.click()
    expect(tab.locator("article .highlighted:visible").first).to_be_visible()
    watched.check(home)
    tab.close()


def test_a_page_that_is_not_there(server: str, browser: Browser) -> None:
    """At any depth it looks like the book, and leads back to it."""
    watched = Watched(browser, "light", 1280)
    tab = watched.tab
    response = tab.goto(f"{server}/notebooks/of/old/99_gone.html")
    assert response is not None and response.status == 404
    expect(tab.get_by_role("heading", level=1)).to_contain_text("404")
    assert all("404" in error for error in watched.errors)  # of the page itself
    watched.errors.clear()
    watched.check(server)
    tab.get_by_role("link", name="start page").click()
    assert tab.url == f"{server}/book/index.html"
    tab.close()


def test_a_chapters_tools(html: Path, browser: Browser) -> None:
    """Code to copy, the notebook to download, solutions folded, the theme to choose."""
    watched = Watched(browser, "light", 1280)
    tab = watched.tab
    tab.goto(f"{html.as_uri()}/{CHAPTER}")
    assert tab.locator("div.highlight button.copybtn").count() > 5
    notebook = tab.locator("a.btn-download-source-button").get_attribute("href")
    assert notebook is not None and (html / CHAPTER).parent.joinpath(notebook).is_file()
    folded = tab.locator("details.hide").last
    assert folded.get_attribute("open") is None
    folded.locator("summary").click()
    assert folded.get_attribute("open") is not None
    for mode in ("light", "dark"):  # at first it is the system's, which is light
        expect(tab.locator("html")).to_have_attribute("data-theme", mode)
        tab.locator(".theme-switch-button").first.click()
    tab.reload()
    expect(tab.locator("html")).to_have_attribute("data-mode", "light")
    assert tab.locator("a.right-next").count() == tab.locator("a.left-prev").count() == 1
    watched.check(html.as_uri())
    tab.close()


def test_the_policy_lets_the_themes_buttons_work_and_nothing_else(
    html: Path, browser: Browser
) -> None:
    tab = browser.new_page()
    tab.add_init_script("window.print = () => { window.said = 'printed'; }")
    tab.goto(f"{html.as_uri()}/{CHAPTER}")
    tab.evaluate("document.querySelector('[data-action=print]').click()")
    assert tab.evaluate("window.said") == "printed"
    assert tab.locator("[data-action=fullscreen]").count() == 1
    smuggled = """() => {
        const place = document.querySelector("article");
        place.innerHTML = '<button onclick="window.hit = 1">a</button>';
        place.firstChild.click();
        const script = document.createElement("script");
        script.textContent = "window.hit = 2";
        place.append(script);
    }"""
    tab.evaluate(smuggled)
    assert tab.evaluate("window.hit") is None
    tab.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_are_legible_in_both_themes(html: Path, browser: Browser, theme: str) -> None:
    tab = browser.new_page(color_scheme=theme)  # type: ignore[arg-type]
    tab.goto((html / CHAPTER).as_uri())
    style = functools.partial(
        tab.evaluate, "([at, name]) => getComputedStyle(document.querySelector(at))[name]"
    )
    page = from_css(style(["body", "backgroundColor"]))
    assert (luminance(page) < 0.1) == (theme == "dark")
    assert contrast(from_css(style(["svg.cell-figure text", "fill"])), page) >= 4.5
    for kind, color in COLORS.items():
        assert contrast(from_css(color), page) >= 3, kind
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # on paper it is light
    assert luminance(from_css(style(["body", "backgroundColor"]))) > 0.9
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert from_css(style(["body", "backgroundColor"])) == page
    tab.close()
