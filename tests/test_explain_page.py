"""The field for a message on the page of first aid, and the port of `every_byte.explain`."""

import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from every_byte.explain import CURES, NAMES, explain
from tools.repository import ROOT

SCRIPT = ROOT / "book" / "_static" / "explain.js"
MESSAGES = [
    told["text"].strip()
    for told in tomllib.loads((ROOT / "tests/data/oom_messages.toml").read_text("utf-8"))["message"]
]
PIECES = [
    *("CUDA out of memory. ", "HIP out of memory", "MPS backend out of memory (", "0 bytes"),
    *("Tried to allocate ", "9.99 GiB", "0.0005 KiB", "2.5 bytes", "1.125 GiB", "1e999 GiB"),
    *("RESOURCE_EXHAUSTED: Out of memory", " free", "GPU 7 ", "Of the allocated memory "),
    *(" is allocated by PyTorch", " allowed", "-1 MiB", "Process 3 has ", " memory in use"),
    *("has a total capacity of ", "of which ", " is free", "9" * 400, " GiB", "\0", "<b>", "\n"),
    *("CUDA error: out of memory", " cached)", "é", "🙂", "ſ", "\u212a", "Used 3.50G of 2.00G hbm"),
    *("Ran out of memory in memory space hbm", "Attempting to reserve 1G", "There are 2.00G free"),
    *("; 1.00 MiB free", " reserved in total by PyTorch", "100.00 MiB already allocated"),
]


@pytest.fixture
def tab(html: Path, browser: Browser) -> Iterator[Page]:
    """The page, from a file. In the end: no error, no request off the machine."""
    requests: list[str] = []
    errors: list[str] = []
    tab = browser.new_page(viewport={"width": 390, "height": 900})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((html / "notebooks" / "11_troubleshooting.html").as_uri())
    yield tab
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert errors == []
    tab.close()


def damaged(rng: random.Random, text: str) -> str:
    """A message with other figures, folded, quoted, cut off, or with pieces of others in it."""
    text = re.sub(r"\d(?=[\d.]* [KMG]iB)", lambda _: str(rng.randint(0, 9)), text)
    for _ in range(rng.randint(0, 6)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice((*PIECES, " ", "│\n│", "")) + text[at + rng.randint(0, 2) :]
    return text


def test_the_port_says_the_same(tab: Page) -> None:
    rng = random.Random(20_261_127)
    texts = [
        *MESSAGES,
        *("\n".join(rng.choices(MESSAGES, k=4)) for _ in range(100)),
        *(damaged(rng, rng.choice(MESSAGES)) for _ in range(1500)),
        *("".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(500)),
        "🙂" * 1_100_000 + MESSAGES[3],  # a log is read from its end
    ]
    expected = [json.loads(json.dumps(asdict(explain(text)))) for text in texts]
    found = tab.evaluate(
        """(texts) => {
            const data = JSON.parse(document.getElementById("explain-data").textContent);
            const {explain} = everyByteExplain(data);
            return texts.map((text) => explain(text));
        }""",
        texts,
    )
    for text, mine, other in zip(texts, expected, found, strict=True):
        assert mine == other, text
    verdicts = Counter(said["verdict"] for said in expected)
    assert len(verdicts) == 6 and min(verdicts.values()) > 3


def test_a_pasted_message_is_answered_and_the_first_is_an_example(tab: Page) -> None:
    expect(tab.locator("#x-verdict")).to_have_text("Verdict: too big")
    text = next(m for m in MESSAGES if explain(m).verdict == "in pieces")
    tab.locator("#x-message").focus()
    tab.keyboard.insert_text(text)  # over the example, which is selected
    assert tab.input_value("#x-message") == text
    found = explain(text)
    assert tab.inner_text("#x-verdict") == "Verdict: in pieces"
    assert tab.inner_text("#x-because").rstrip(".").lower() == found.because.lower()
    said = tab.locator("#x-result ol li").all_text_contents()
    assert said == [f"{cure.do} {cure.why} Proof" for cure in found.cures]
    shown = tab.locator("#x-parts data").evaluate_all("all => all.map((one) => Number(one.value))")
    assert found.message is not None
    parts = [getattr(found.message, name) for name in NAMES]
    assert shown == [nbytes for nbytes in parts if nbytes is not None]
    assert "request 1.70 GiB" in (tab.locator("#x-bar").get_attribute("aria-label") or "")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_is_pasted_never_becomes_markup(tab: Page) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script></textarea><b>"
    for text in (hostile, f"{MESSAGES[0]} {hostile}", f"Process 3 has {hostile} memory in use"):
        tab.fill("#x-message", text)
        assert tab.locator("#explain :is(img, b, #x-result script)").count() == 0
        assert "alert" not in tab.inner_text("#x-result")
    tab.fill("#x-message", hostile)
    assert tab.inner_text("#x-verdict") == "Not recognised"
    assert "No out-of-memory message" in tab.inner_text("#x-because")
    assert tab.locator("#x-result li").count() == 0
    tab.fill("#x-message", "")
    expect(tab.locator("#x-result")).to_be_hidden()


def test_every_cure_leads_to_its_proof(html: Path) -> None:
    for cure in CURES.values():
        page = (html / "notebooks" / f"{cure.chapter}.html").read_text("utf-8")
        assert not cure.section or f'id="{cure.section}"' in page, cure


def test_the_script_is_small_and_plain() -> None:
    text = SCRIPT.read_text("utf-8")
    assert len(text) < 20_000
    forbidden = (
        r"\b(import|export|fetch|XMLHttpRequest|eval|innerHTML|outerHTML|insertAdjacentHTML)\b"
    )
    assert not re.search(forbidden, text)
