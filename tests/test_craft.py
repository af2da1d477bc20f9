"""The craft of the chapters, as far as it can be measured: what stops a reader."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from playwright.sync_api import Browser

from tools.notebooks import sources
from tools.repository import ROOT

CHAPTERS = {path.stem: path for path in sources(ROOT / "notebooks")}
PAGES = {path.stem: path for path in sorted((ROOT / "book").glob("*.md"))}
WITHOUT_FIGURE = "12_audit"  # a table of verdicts
WORDS = 90  # of a paragraph
LINES = 15  # of a visible cell
SCREENS = 2  # by the end of which the first figure begins
FOLDED = {"hide-input", "hide-cell"}

# The first figure; in Troubleshooting it is the one that a pasted message is drawn as.
TOP = "document.querySelector('svg.cell-figure, #x-bar')?.getBoundingClientRect().top ?? 1e9"


def cells(chapter: Path) -> list[NotebookNode]:
    return list(nbformat.read(chapter.with_suffix(".ipynb"), as_version=4).cells)


def paragraphs(text: str) -> Iterator[str]:
    """Those of Markdown, each item of a list by itself; no tables, code or formulas."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        if not block.lstrip().startswith(("|", "$$")):
            yield from re.split(r"^\s*(?:[-*]|\d+\.) ", block, flags=re.MULTILINE)


def long_paragraphs(chapter: Path) -> list[str]:
    text = [cell.source for cell in cells(chapter) if cell.cell_type == "markdown"]
    return [p for cell in text for p in paragraphs(cell) if len(p.split()) > WORDS]


def long_cells(chapter: Path) -> list[str]:
    return [
        cell.source
        for cell in cells(chapter)
        if cell.cell_type == "code"
        and not FOLDED & set(cell.metadata.get("tags", ()))
        and len(cell.source.strip().splitlines()) > LINES
    ]


def unreferred_figures(chapter: Path) -> list[str]:
    """Figures without a caption, or that the text does not refer to by their number."""
    text = "\n".join(cell.source for cell in cells(chapter) if cell.cell_type == "markdown")
    found = []
    for cell in cells(chapter):
        if any("image/svg+xml" in output.get("data", {}) for output in cell.get("outputs", ())):
            figure = cell.metadata["mystnb"].get("figure", {})
            name = figure.get("name")
            if not figure.get("caption") or f"{{numref}}`{name}`" not in text:
                found.append(cell.source)
    return found


@pytest.mark.parametrize("rule", [long_paragraphs, long_cells, unreferred_figures])
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_keeps_it(name: str, rule: Callable[[Path], list[str]]) -> None:
    assert rule(CHAPTERS[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_paragraphs_are_short(name: str) -> None:
    text = PAGES[name].read_text("utf-8")
    assert [p for p in paragraphs(text) if len(p.split()) > WORDS] == []


def test_the_rules_find_what_they_are_for(tmp_path: Path) -> None:
    item = "- " + " ".join(["word"] * WORDS)
    code = nbformat.v4.new_code_cell("\n".join(["1"] * (LINES + 1)))
    folded = nbformat.v4.new_code_cell(code.source, metadata={"tags": ["hide-input"]})
    drawn = nbformat.v4.new_code_cell(
        "figure",
        metadata={"mystnb": {"figure": {"name": "one", "caption": "A figure"}}},
        outputs=[nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>"})],
    )
    said = [nbformat.v4.new_markdown_cell(text) for text in (f"{item}\n{item}", f"{item} more")]
    path = tmp_path / "01_a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[*said, code, folded, drawn]), path)
    assert [len(p.split()) for p in long_paragraphs(path)] == [WORDS + 1]
    assert long_cells(path) == [code.source]
    assert unreferred_figures(path) == ["figure"]
    said[0].source += "\n\nSee {numref}`one`."
    nbformat.write(nbformat.v4.new_notebook(cells=[*said, drawn]), path)
    assert unreferred_figures(path) == []


@pytest.fixture(scope="module")
def first_figures(html: Path, browser: Browser) -> dict[tuple[str, int], float]:
    """Where the first figure of each chapter begins, in screens, on a desk and on a phone."""
    found = {}
    tab = browser.new_page()
    for name in CHAPTERS:
        tab.goto((html / "notebooks" / f"{name}.html").as_uri())
        for width, height in ((390, 844), (1280, 800)):
            tab.set_viewport_size({"width": width, "height": height})
            found[name, width] = tab.evaluate(TOP) / height
    tab.close()
    return found


@pytest.mark.parametrize("name", sorted({*CHAPTERS} - {WITHOUT_FIGURE}))
def test_a_chapters_first_figure_comes_early(
    name: str, first_figures: dict[tuple[str, int], float]
) -> None:
    desk, phone = first_figures[name, 1280], first_figures[name, 390]
    assert max(desk, phone) < SCREENS, (desk, phone)
