"""The page on the virtual GPU: its diagrams are computed, and the allocator's can be stepped."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from playwright.sync_api import Browser, Page, expect

from every_byte import estimate
from every_byte.units import MiB

ADDRESS = Path("book", "virtual_gpu.html")
EXTENSION = "diagrams"


def test_the_ten_requests_show_each_rule(extension: ModuleType) -> None:
    """What the page says above them, in the order in which they come."""
    states = extension.states()
    said = [state.text for state in states]
    assert "Rounded up to 1 KiB" in said[0] and "2 MiB, in the small pool" in said[0]
    assert "A free block of 2,047 KiB serves it" in said[1] and "1,447 KiB, is split" in said[1]
    assert "20 MiB, in the large pool" in said[2]
    assert "A free block of 17 MiB serves it" in said[3]
    assert "of its own is reserved: 12 MiB" in said[4] and "too little to split off" in said[4]
    assert all("The segment stays reserved" in said[i] for i in (5, 6, 8))
    assert said[7].startswith("24 MiB are free, but in pieces.")
    assert "merges with its free neighbours to 20 MiB" in said[8]
    assert said[9].startswith("2 segments are free as a whole") and "32 MiB in all" in said[9]
    assert [state.reserved // MiB for state in states] == [2, 2, 22, 22, 34, 34, 34, 48, 48, 16]
    for state in states:
        blocks = [block for segment in state.segments for block in segment.blocks]
        assert sum(block.size for block in blocks) == state.reserved
        assert sum(block.size for block in blocks if block.letter) == state.allocated


def test_ranks_hold_what_the_estimator_says(extension: ModuleType) -> None:
    parameters = sum(estimate.parameters(estimate.dimensions(extension.MODEL)).values())
    held = [[part.nbytes for part in parts] for parts in extension.ranks().values()]
    p, g, s = 2 * parameters, 2 * parameters, 4 * parameters + held[0][2] % parameters
    assert held[0] == [p, g, s]
    quarter = [-(-n // 4) for n in (p, g, s)]
    assert held[1] == [p, g, quarter[2]]
    assert held[2] == [p, *quarter[1:]]
    assert held[3] == quarter


@pytest.fixture
def tab(html: Path, browser: Browser) -> Iterator[Page]:
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((html / ADDRESS).as_uri())
    yield tab
    tab.close()


def test_one_request_at_a_time(tab: Page, extension: ModuleType) -> None:
    """By button and by key, to both ends and not beyond."""
    titles = [state.title for state in extension.states()]
    shown = tab.locator("#requests li:visible .title")
    back, on = tab.locator("#requests button").all()
    for number, title in enumerate(titles, 1):
        assert shown.all_inner_texts() == [title]
        expect(tab.locator("#requests output")).to_have_text(f"Request {number} of 10")
        assert back.is_disabled() == (number == 1)
        assert on.is_disabled() == (number == 10)
        if number < 10:
            on.click()
    expect(back).to_be_focused()  # the other one can go no further
    tab.keyboard.press("ArrowRight")
    assert shown.all_inner_texts() == titles[-1:]
    tab.keyboard.press("ArrowLeft")
    assert shown.all_inner_texts() == titles[-2:-1]
    tab.keyboard.press("Home")
    assert shown.all_inner_texts() == titles[:1]


def test_blocks_are_as_wide_as_they_are_large(tab: Page, extension: ModuleType) -> None:
    tab.locator("#requests button").last.focus()
    tab.keyboard.press("End")
    (segment,) = [s for s in extension.states()[-1].segments if not s.small]
    widths = """all => all.map((one) => one.getBoundingClientRect().width)"""
    found = tab.locator("#requests li:visible .line:last-of-type .block").evaluate_all(widths)
    line = sum(found)
    expected = [block.size / segment.size for block in segment.blocks]
    assert [width / line for width in found] == pytest.approx(expected, abs=0.01)


def test_all_requests_without_a_script_and_on_paper(
    html: Path, tab: Page, browser: Browser
) -> None:
    tab.emulate_media(media="print")
    assert tab.locator("#requests li:visible").count() == 10
    context = browser.new_context(java_script_enabled=False)
    still = context.new_page()
    still.goto((html / ADDRESS).as_uri())
    assert still.locator("#requests li:visible").count() == 10
    assert still.locator("#requests .controls").is_hidden()
    context.close()
