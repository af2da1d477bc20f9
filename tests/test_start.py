"""The start page's picture: still without a script, live with one, and the estimator's own."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from every_byte.units import GB
from tools.repository import ROOT


@pytest.fixture(scope="module")
def hero() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        yield importlib.import_module("hero")


@pytest.fixture(scope="module")
def tab(html: Path, browser: Browser) -> Iterator[Page]:
    """The page, from a file. In the end: no error, no request off the machine."""
    said: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("request", lambda request: said.append(request.url))
    tab.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((html / "book" / "index.html").as_uri())
    yield tab
    assert [text for text in said if not text.startswith(("file:", "data:"))] == []
    tab.close()


SHOWN = """() => {
    const all = (at) => [...document.querySelectorAll(`#hero ${at}`)];
    const text = (at) => all(at)[0].textContent;
    const percent = (at, side) => all(at)[0].style[side].replace("%", "");
    return {
        said: text(".verdict"), spoken: all(".plot")[0].getAttribute("aria-label"),
        paths: all("path").map((path) => path.getAttribute("d")),
        card: [percent(".card-line", "top"), text(".card-line"), percent(".over", "height")],
        peak: [percent(".peak", "left"), percent(".peak", "top"), text(".peak")],
        now: percent(".now", "left"), at: text(".at"),
        legend: all(".legend data").map((one) => [one.value, one.textContent]),
    };
}"""


def drawn(view: dict[str, Any]) -> dict[str, Any]:
    """The same from Python's view; percents as a browser writes them."""

    def percent(text: object) -> str:
        return f"{float(str(text)):g}"

    legend = [[str(n), size] for n, size in zip(view["now"], view["sizes"], strict=True)]
    return {
        "said": view["verdict"] + view["end"],
        "spoken": view["spoken"],
        "paths": view["paths"],
        "card": [percent(view["card_top"]), view["card_label"], percent(view["card_top"])],
        "peak": [percent(view["peak_left"]), percent(view["peak_top"]), view["peak_label"]],
        "now": percent(view["now_left"]),
        "at": view["at"],
        "legend": [*reversed(legend), [str(view["total"]), view["total_label"]]],
    }


def choose(tab: Page, hero: ModuleType, choice: Any) -> None:
    for name in ("model", "card", "optimizer", "precision"):
        tab.select_option(f"#hero-{name}", getattr(choice, name))
    tab.fill("#hero-batch", str(hero.BATCHES.index(choice.batch)))
    tab.fill("#hero-length", str(hero.LENGTHS.index(choice.length)))


def test_each_field_moves_the_picture_and_it_is_the_estimators(tab: Page, hero: ModuleType) -> None:
    start = hero.Choice()
    for change in (
        {"model": "Qwen3-0.6B"},
        {"card": "H200"},
        {"model": "Llama-3.2-1B", "card": "RTX 4080"},  # may fit
        {"optimizer": "sgd"},
        {"optimizer": "adafactor"},
        {"precision": "FP32"},
        {"precision": "AMP, BF16"},
        {"batch": 128},
        {"length": 131072, "model": "Llama-3.2-1B", "card": "T4"},
    ):
        choice = dataclasses.replace(start, **change)
        choose(tab, hero, start)
        assert tab.evaluate(SHOWN) == drawn(hero.view(start))
        choose(tab, hero, choice)
        found = tab.evaluate(SHOWN)
        assert found == drawn(hero.view(choice)), change
        assert found["legend"][-1][0] == str(choice.memory.least)
        assert found["paths"] != hero.view(start)["paths"]


@pytest.mark.parametrize("precision", ["BF16", "FP32", "AMP, BF16"])
@pytest.mark.parametrize("length", [128, 131072])
@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Llama-3.1-70B"])
def test_a_moments_kinds_are_all_that_it_takes(
    hero: ModuleType, precision: str, length: int, model: str
) -> None:
    """Every moment of the estimator is in the picture, with all of its bytes, none below 0."""
    memory = hero.Choice(model=model, length=length, precision=precision).memory
    assert [name for name, *_ in hero.MOMENTS] == [name for name, _ in memory.moments]
    assert list(map(sum, hero.rows(memory))) == [n + memory.context for _, n in memory.moments]
    assert max(sum(row) for _, row in hero.points(memory)) == memory.least
    assert min(n for _, row in hero.points(memory) for n in row) >= 0
    for at in (1, 7):  # forward has all activations, the step all gradients
        row = dict(zip([kind for kind, *_ in hero.KINDS], hero.rows(memory)[at], strict=True))
        kind = ("activations", "gradients")[at == 7]
        assert row[kind] == getattr(memory, kind)


def test_by_keyboard_through_the_step(tab: Page, hero: ModuleType) -> None:
    choose(tab, hero, hero.Choice())
    tab.focus("#hero-moment")
    tab.keyboard.press("Home")
    rows = hero.rows(hero.Choice().memory)
    for row, (name, place, *_) in zip(rows, hero.MOMENTS, strict=True):
        found = tab.evaluate(SHOWN)
        assert (found["at"], found["now"]) == (name, str(place))
        assert [int(n) for n, _ in found["legend"]] == [*reversed(row), sum(row)]
        spoken = tab.get_attribute("#hero-moment", "aria-valuetext")
        assert spoken == f"{name}: {hero.short(sum(row))}"
        tab.keyboard.press("ArrowRight")


def test_the_estimator_goes_on_with_what_was_chosen(
    html: Path, browser: Browser, hero: ModuleType
) -> None:
    choice = hero.Choice(model="Qwen3-4B", card="L4", optimizer="lion", batch=4, length=512)
    tab = browser.new_page()
    tab.goto((html / "book" / "index.html").as_uri())
    choose(tab, hero, choice)
    tab.click("#hero .more")
    said = f"It does not fit on L4: at least {choice.memory.least / GB:,.2f} GB"
    expect(tab.locator("#e-headline")).to_contain_text(said)
    expect(tab.locator("#e-headline")).to_contain_text("Qwen3-4B")
    assert tab.input_value("#e-length") == "512"
    tab.close()


def test_still_without_a_script_and_on_paper(
    html: Path, browser: Browser, hero: ModuleType
) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((html / "book" / "index.html").as_uri())
    view = hero.view(hero.Choice())
    paths = tab.locator("#hero path")
    assert [paths.nth(i).get_attribute("d") for i in range(paths.count())] == view["paths"]
    assert tab.inner_text("#hero .verdict") == view["verdict"] + view["end"]
    assert tab.locator("#hero form, #hero .moment").evaluate_all(
        "all => all.every((one) => getComputedStyle(one).display === 'none')"
    )
    line = "one => getComputedStyle(one).borderTop"  # the theme's colours need its script
    assert tab.locator("#hero .card-line").evaluate(line) == "2px dashed rgb(34, 40, 50)"
    tab.emulate_media(media="print")
    assert tab.locator("#hero .plot").is_visible()
    context.close()


def test_the_readmes_picture_is_the_same(hero: ModuleType) -> None:
    """If it is not, the estimate has changed: ``python book/_ext/hero.py`` draws it anew."""
    view = hero.view(hero.Choice())
    assert hero.PICTURE.read_text("utf-8") == hero.standalone(hero.Choice())
    readme = (ROOT / "README.md").read_text("utf-8")
    peak, capacity = view["total_label"], hero.short(hero.cards()["RTX 4090"].usable)
    assert f"takes {peak} at its peak, and an RTX 4090 can give {capacity}]" in readme


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (27_149_999, "27.1 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (9_994_999_999, "9.99 GB"),
        (9_995_000_000, "10.0 GB"),
        (65_401_461_910, "65.4 GB"),
        (1_234_567_890_123, "1,235 GB"),
    ],
)
def test_three_digits(hero: ModuleType, nbytes: int, text: str) -> None:
    assert hero.short(nbytes) == text
