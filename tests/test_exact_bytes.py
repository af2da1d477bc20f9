"""Tables of the book: three digits first, the exact bytes folded under them; and wide ones."""

import re
from pathlib import Path

from playwright.sync_api import Browser

CHAPTER = Path("notebooks", "04_mlp_adam_vs_sgd.html")


def test_a_table_says_the_pattern_and_keeps_its_bytes(html: Path) -> None:
    text = (html / CHAPTER).read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ")
    shown, *folds = re.split(r'<details class="exact-bytes">', text)
    assert len(folds) >= 3
    before = shown[shown.rindex("<table") :]
    after = folds[0][: folds[0].index("</details>")]
    assert ">426 MB<" in before and "425,512,448" not in before and "(B)" not in before
    assert ">425,512,448<" in after and "(B)" in after
    assert before.count("<tr") == after.count("<tr")


def test_a_number_is_not_said_in_two_units(html: Path) -> None:
    """The article's table: this GPU's MB beside its own, and bytes only where unfolded."""
    text = (html / CHAPTER).read_text("utf-8")
    heads = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<thead>.*?</thead>", text, re.S)]
    shown, folded = (head.split("\n") for head in heads if "article, measured" in head)
    assert [cell for cell in shown if "this GPU" in cell] == ["this GPU (MB)"]
    assert [cell for cell in folded if "this GPU" in cell] == ["this GPU (MB)", "this GPU (B)"]


def test_what_scrolls_sideways_shows_it(html: Path, browser: Browser) -> None:
    """Also a table that was folded when the page was loaded; and the keyboard reaches it."""
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((html / "notebooks" / "17_conversion_and_hardware.html").as_uri())
    fold = tab.locator("details", has_text="AMD, Intel and Apple")
    fold.locator("summary").click()
    wide = fold.locator(".pst-scrollable-table-container")
    tab.wait_for_function(
        "place => place.matches('.more-right[tabindex]')", arg=wide.element_handle()
    )
    assert wide.evaluate("place => getComputedStyle(place).maskImage") != "none"
    wide.evaluate("place => { place.scrollLeft = place.scrollWidth; }")
    tab.wait_for_function(
        "place => place.matches('.more-left:not(.more-right)')", arg=wide.element_handle()
    )
    tab.close()


def test_a_number_stays_with_its_unit(html: Path) -> None:
    text = (html / "notebooks" / "14_fine_tune_8b.html").read_text("utf-8")
    cells = re.findall(r"<td[^>]*>(?:<p>)?([^<]*%)(?:</p>)?</td>", text)
    assert [cell for cell in cells if "\N{NO-BREAK SPACE}" in cell]
    assert not [cell for cell in cells if re.fullmatch(r"[-+]?[\d.]+ %", cell)]


def test_a_table_that_is_too_wide_gives_its_sentences_room(html: Path, browser: Browser) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((html / "notebooks/16_logits.html").as_uri())
    widths = """() => [...document.querySelectorAll("td")]
        .filter((cell) => cell.offsetParent && cell.textContent.includes("two heads and JSD, t"))
        .map((cell) => cell.offsetWidth)"""
    tab.wait_for_function(f"({widths})()[0] >= 144")  # 9rem, once the table was measured
    assert min(tab.evaluate(widths)) >= 144
    tab.close()
