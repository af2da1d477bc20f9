"""The built book: whole, offline, and legible."""

import functools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser

from helpers.plots import COLORS
from tools.book import build
from tools.notebooks import sources
from tools.repository import ROOT, address, web_address

PAGES = [
    "book/index.html",
    *(f"notebooks/{source.stem}.html" for source in sources(ROOT / "notebooks")),
    "book/estimator.html",
    "book/references.html",
]


class Links(HTMLParser):
    """Every address in a page, by element."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.doubles: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and value:
                self.found.append((tag, value))
            if name == "id" and value:
                (self.doubles if value in self.ids else self.ids).add(value)


def links(page: Path) -> Links:
    parser = Links()
    parser.feed(page.read_text("utf-8"))
    return parser


def test_every_page_of_the_contents_is_there(html: Path) -> None:
    assert (html / "index.html").is_file()
    for page in PAGES:
        assert (html / page).is_file(), page


def test_the_notebooks_can_be_downloaded(html: Path) -> None:
    for source in sources(ROOT / "notebooks"):
        stored = source.with_suffix(".ipynb")
        assert (html / "_sources" / "notebooks" / stored.name).read_bytes() == stored.read_bytes()


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_elsewhere(html: Path, page: str) -> None:
    for tag, target in links(html / page).found:
        if tag != "a":
            assert not urlsplit(target).netloc, f"<{tag}> loads {target}"


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_book_lead_somewhere(html: Path, page: str) -> None:
    for tag, target in links(html / page).found:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        there = (html / page).parent / unquote(parts.path)
        assert there.exists(), f"<{tag}> {target}"
        if parts.fragment and there.suffix == ".html":
            assert parts.fragment in links(there).ids, target


@pytest.mark.parametrize("page", PAGES)
def test_ids_are_unique(html: Path, page: str) -> None:
    assert links(html / page).doubles == set()


def test_figures_stand_in_the_page_with_a_name(html: Path) -> None:
    text = (html / "notebooks" / "04_mlp_adam_vs_sgd.html").read_text("utf-8")
    figures = re.findall(r'<svg class="cell-figure" role="img" aria-label="([^"]*)"', text)
    assert len(figures) == 3
    assert all(len(label) > 60 for label in figures)
    assert "833.58" in text


def test_formulas_are_mathml(html: Path) -> None:
    for page in PAGES:
        text = (html / page).read_text("utf-8")
        assert not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE)
        assert r"\(" not in text
    assert "<math" in (html / "book" / "index.html").read_text("utf-8")


def test_without_an_address_there_is_no_button(html: Path) -> None:
    for page in PAGES:
        text = (html / page).read_text("utf-8")
        assert "colab.research.google.com" not in text
        assert "executablebooks" not in text  # Jupyter Book's own address, its default
        assert "btn-source-repository-button" not in text


def test_with_an_address_the_buttons_lead_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPOSITORY", "https://github.com/someone/every-byte")
    page = build(tmp_path).parent / "notebooks" / "04_mlp_adam_vs_sgd.html"
    targets = [target for _, target in links(page).found]
    colab = "https://colab.research.google.com/github/someone/every-byte/blob/main/notebooks/"
    assert colab + "04_mlp_adam_vs_sgd.ipynb" in targets
    assert "https://github.com/someone/every-byte" in targets
    assert any(t.startswith("https://github.com/someone/every-byte/issues/new") for t in targets)


def test_a_warning_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".*", "_build", "tests", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)
    with (copy / "book" / "index.md").open("a") as page:
        page.write("\nSee [nowhere](nowhere.md).\n")
    monkeypatch.setattr("tools.book.ROOT", copy)
    monkeypatch.chdir(copy)
    with pytest.raises(RuntimeError, match=r"nowhere\.md"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("git@github.com:someone/every-byte.git\n", "https://github.com/someone/every-byte"),
        ("ssh://git@github.com/someone/every-byte", "https://github.com/someone/every-byte"),
        ("https://github.com/someone/every-byte.git", "https://github.com/someone/every-byte"),
        ("https://user:secret@gitlab.com/a/b/c/", "https://gitlab.com/a/b/c"),
        ("http://example.org/a", "https://example.org/a"),
        ("/home/someone/every-byte", None),
        ("../every-byte.git", None),
        ("file:///srv/every-byte", None),
        ("", None),
    ],
)
def test_web_address(remote: str, expected: str | None) -> None:
    assert web_address(remote) == expected


def test_the_address_comes_from_the_first_place_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REPOSITORY", raising=False)
    config = tmp_path / "_config.yml"
    config.write_text("title: Book\n")
    assert address(tmp_path) is None
    monkeypatch.setattr("tools.repository._origin", lambda root: "git@example.org:a/origin.git")
    assert address(tmp_path) == "https://example.org/a/origin"
    config.write_text("repository: {url: https://example.org/a/config}\n")
    assert address(tmp_path) == "https://example.org/a/config"
    monkeypatch.setenv("REPOSITORY", "https://example.org/a/chosen")
    assert address(tmp_path) == "https://example.org/a/chosen"
    monkeypatch.setenv("REPOSITORY", "somewhere")
    with pytest.raises(ValueError, match="REPOSITORY is 'somewhere': expected a web address"):
        address(tmp_path)


# In a browser

WIDTHS = (1280, 390, 360)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(html: Path, browser: Browser, page: str) -> None:
    """From a file: no request to anywhere, no error, nothing wider than the screen."""
    requests: list[str] = []
    errors: list[str] = []
    tab = browser.new_page()
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto((html / page).as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    # The theme says so on a first visit, and goes on with the system's choice.
    assert [e for e in errors if "Got invalid theme mode" not in e] == []
    tab.close()


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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_are_legible_in_both_themes(html: Path, browser: Browser, theme: str) -> None:
    tab = browser.new_page(color_scheme=theme)  # type: ignore[arg-type]
    tab.goto((html / "notebooks" / "04_mlp_adam_vs_sgd.html").as_uri())
    style = functools.partial(
        tab.evaluate, "([at, name]) => getComputedStyle(document.querySelector(at))[name]"
    )
    page = from_css(style(["body", "backgroundColor"]))
    assert (luminance(page) < 0.1) == (theme == "dark")
    assert contrast(from_css(style(["svg.cell-figure text", "fill"])), page) >= 4.5
    for kind, color in COLORS.items():
        assert contrast(from_css(color), page) >= 3, kind
    tab.close()
