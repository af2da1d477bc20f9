"""The estimator's page, driven in a browser as a person would, and its formulas."""

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from every_byte import estimate
from every_byte.data import Card, cards, catalogue, unknown_card
from every_byte.data.others import RULES, all_cards, kind_of
from every_byte.estimate import Dimensions, Memory, Setup, fit, serving
from every_byte.estimate.presets import PRESETS
from every_byte.kinds import FIELDS
from every_byte.units import GiB, grouped
from tools.repository import ROOT

SCRIPTS = [ROOT / "book" / "_static" / name for name in ("estimate.js", "fit.js", "estimator.js")]
SIZES = [field.name for field in dataclasses.fields(Dimensions)]
OPTIONS = [field.name for field in dataclasses.fields(Setup)]
TRAINED = [name for name, traits in estimate.TRAITS.items() if "inference only" not in traits]
NUMBERS = ["batch", "length", "rank", "gpus"]
EXPECTED = re.compile(r"^[^:]+: .* does not work here\. Expected .+\.$")
NONSENSE = re.compile("NaN|undefined|Infinity|null|object")


class Watched(NamedTuple):
    """A tab, and what it asked for and complained of."""

    page: Page
    requests: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def watched(browser: Browser) -> Iterator[Watched]:
    """One tab for all tests: opening one takes three times as long as loading the page."""
    requests: list[str] = []
    errors: list[str] = []
    tab = browser.new_page()
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield Watched(tab, requests, errors)
    tab.close()


@pytest.fixture
def tab(html: Path, watched: Watched) -> Iterator[Page]:
    """The page, from a file, anew. In the end: no error, no request off the machine, no NaN."""
    tab, requests, errors = watched
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(media="screen", reduced_motion="no-preference")
    tab.goto("about:blank")
    requests.clear()
    errors.clear()
    tab.goto((html / "book" / "estimator.html").as_uri())
    yield tab
    results = tab.locator("#e-headline, #e-table, #e-formula, #e-levers, #e-cards, #e-serving")
    assert not NONSENSE.search(" ".join(results.all_inner_texts()))
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert errors == []
    tab.evaluate("localStorage.clear(); sessionStorage.clear()")  # the theme's


def state(tab: Page) -> dict[str, Any]:
    """What the controls say, by name."""
    values: dict[str, Any] = tab.evaluate(
        """() => Object.fromEntries([...document.getElementById("e-form").elements]
            .filter((c) => c.name)
            .map((c) => [c.name, c.type === "checkbox" ? c.checked : c.value]))"""
    )
    return values


def asked(values: dict[str, Any]) -> tuple[Dimensions, Setup]:
    """The same for Python."""
    sizes = {n: values[n] for n in SIZES}
    sizes |= {n: int(v or 0) for n, v in sizes.items() if n != "model_type"}
    sizes["tie_word_embeddings"] = bool(sizes["tie_word_embeddings"])
    options = {n: values[n] if values[n] != "" else None for n in OPTIONS}
    options |= {n: int(values[n]) for n in NUMBERS}
    return Dimensions(**sizes), Setup(**options)


def shown(tab: Page) -> list[int]:
    """The table's bytes, the sum at the end."""
    read = "cells => cells.map((cell) => cell.value)"
    return [int(n) for n in tab.locator("#e-table data").evaluate_all(read)]


def kinds_of(memory: Memory) -> list[int]:
    """The bytes of each kind, in the order of the fields."""
    return [getattr(memory, f.name) for f in dataclasses.fields(memory) if f.name in FIELDS]


def of(card: Card) -> dict[str, int]:
    """What a card's workspace and context take, by the arguments' names."""
    return {"workspace": card.cublas_workspace, "context": card.context}


def check(tab: Page) -> Memory:
    """Whether all that the page shows is what Python says of what is chosen."""
    values = state(tab)
    sizes, setup = asked(values)
    name = f"a card of {values['gib']} GiB" if values["gib"] else values["card"]
    card = unknown_card(int(values["gib"]) * GiB) if values["gib"] else all_cards()[values["card"]]
    memory = estimate.memory(sizes, setup, **of(card))
    assert shown(tab) == [*kinds_of(memory), memory.total]
    names = tab.locator("#e-moments th").all_inner_texts()
    sizes_at = tab.locator("#e-moments data").evaluate_all("all => all.map((one) => one.value)")
    assert list(zip(names, map(int, sizes_at), strict=True)) == [
        (name + " (the peak)" * (name == memory.peak_at), nbytes) for name, nbytes in memory.moments
    ]
    capacity, headline = card.usable, tab.inner_text("#e-headline")
    verdict = memory.verdict(capacity)
    size = memory.needed if verdict == "fits" else memory.least
    assert headline.startswith(f"It {verdict} on {name}: ")
    assert f"{size / 1e9:,.2f} GB" in headline or size < 10**9
    assert values["task"] in headline
    levers = fit.levers(sizes, setup, **of(card))
    pulled = tab.locator("#e-levers button").all_text_contents()
    assert pulled == [lever.name for lever in levers]
    ways = fit.shortest(sizes, setup, capacity, **of(card))[:6]
    offered = tab.locator("#e-ways button").all_inner_texts()
    assert offered == [" + ".join(way.names) for way in ways]
    if memory.needed <= capacity:
        most = fit.most_sequences(sizes, setup, capacity, **of(card))
        assert f"that fits: {grouped(most)}." in tab.inner_text("#e-ways-note")
    rule = "" if values["gib"] else RULES.get(kind_of(name), "")
    assert tab.inner_text("#e-rule").endswith(rule)
    assert bool(tab.inner_text("#e-rule")) == bool(rule)
    rows = tab.locator("#e-cards tr").all_inner_texts()
    for row, (name, card) in zip(rows, all_cards().items(), strict=True):
        kind = kind_of(name)
        said = estimate.memory(sizes, setup, **of(card)).verdict(card.usable)
        needed = fit.gpus_needed(sizes, setup, card.usable, **of(card))
        count = f"over {fit.MOST_GPUS:,}" if needed is None else grouped(needed)
        count = "–" if kind not in ("", "AMD") else count
        shown_name = name + " (estimated)" * bool(kind)
        assert row.split("\t")[:1] + row.split("\t")[2:] == [shown_name, said, count]
    return memory


# One set of formulas


def random_sizes(rng: random.Random) -> dict[str, Any]:
    """Dimensions, some of them large beyond a double's whole numbers, some impossible."""
    heads, keys = rng.randint(1, 16), rng.randint(1, 8)
    experts = rng.choice((0, 0, 0, rng.randint(1, 8)))
    sizes = {
        "model_type": rng.choice([*estimate.TRAITS, *TRAINED, *TRAINED]),
        "vocab_size": rng.randint(1, 300_000),
        "hidden_size": rng.randint(1, 300) * heads * keys,
        "num_hidden_layers": rng.choice((0, rng.randint(1, 60))),
        "num_attention_heads": heads * keys,
        "tie_word_embeddings": rng.random() < 0.5,
        "max_position_embeddings": rng.randint(0, 200_000),
        "intermediate_size": rng.choice((0, rng.randint(1, 60_000))),
        "num_key_value_heads": rng.choice((0, keys)),
        "head_dim": rng.choice((0, rng.randint(1, 300))),
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(0, experts),
    }
    layers = sizes["num_hidden_layers"]
    sizes |= {
        "sliding_window": rng.choice((0, rng.randint(1, 5000))),
        "sliding_layers": rng.randint(0, layers),
        "kv_lora_rank": rng.randint(1, 600),
        "q_lora_rank": rng.choice((0, rng.randint(1, 1600))),
        **{name: rng.randint(1, 200) for name in SIZES if name.startswith(("qk_", "v_head"))},
        "moe_intermediate_size": rng.choice((0, rng.randint(1, 3000))),
        "n_shared_experts": rng.choice((0, rng.randint(1, 3))),
        "first_k_dense_replace": rng.randint(0, min(3, layers)),
        "encoder_layers": rng.choice((0, rng.randint(1, 30), rng.randint(1, 30))),
        "patch_size": rng.choice((0, rng.randint(1, 32), rng.randint(1, 32))),
    }
    if rng.random() < 0.05:
        sizes["vocab_size"] = rng.randint(10**9, 10**15)
    if rng.random() < 0.05:
        sizes[rng.choice(SIZES[1:5] + SIZES[6:])] = rng.randint(-1, 3)
        sizes["tie_word_embeddings"] = bool(sizes["tie_word_embeddings"])
    return sizes


def random_setup(rng: random.Random) -> dict[str, Any]:
    computed = ("fp64", "fp32", "fp16", "bf16")
    return {
        **{name: rng.choice(known) for name, known in estimate.CHOICES.items()},
        "dtype": rng.choice(computed),
        # Most of them such that LoRA is trained beside them.
        "quantised": rng.choice((None, None, None, "nf4", "awq", rng.choice(estimate.QUANTISED))),
        "gradients": rng.choice((None, *computed)),
        "states": rng.choice((None, *computed)),
        "master_weights": rng.random() < 0.3,
        "rank": rng.choice((0, rng.randint(1, 256))),
        "batch": rng.randint(0, 300),
        "length": rng.choice((rng.randint(0, 5000), rng.randint(0, 10**6))),
        **{name: rng.random() < 0.3 for name in ("checkpointing", "lora_dropout")},
        **{name: rng.random() < 0.3 for name in ("accumulation", "all_logits")},
        "dropout": rng.random() < 0.05,
        "cache_dtype": rng.choice((None, *estimate.BYTES)),
        "gpus": rng.choice((1, rng.randint(0, 2000))),
    }


def random_pair(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes and a set-up, most of which go together."""
    sizes, setup = random_sizes(rng), random_setup(rng)
    traits = estimate.TRAITS[sizes["model_type"]]
    if "inference only" in traits and rng.random() < 0.8:
        setup["task"] = "inference"
    if "images" in traits and rng.random() < 0.8:
        setup["length"] = sizes["max_position_embeddings"]
    if traits & {"images", "encoder"} and rng.random() < 0.8:
        setup["all_logits"] = False
    return sizes, setup


def in_python(sizes: dict[str, Any], setup: dict[str, Any]) -> list[str] | str:
    try:
        memory = estimate.memory(Dimensions(**sizes), Setup(**setup))
    except ValueError as error:
        return str(error)
    numbers = [*kinds_of(memory), *(nbytes for _, nbytes in memory.moments), memory.needed]
    return [*map(str, numbers), memory.peak_at]


IN_THE_BROWSER = """(inputs) => {
    const data = JSON.parse(document.getElementById("estimator-data").textContent);
    const F = everyByteFormulas(data);
    return inputs.map(([sizes, setup, capacity, card]) => {
        try {
            const dims = F.dimensions(sizes), held = F.memory(dims, setup);
            if (!capacity) return [...Object.keys(data.kinds).map((kind) => held[kind]),
                ...held.moments.map(([, nbytes]) => nbytes), held.needed, held.peakAt].map(String);
            const fit = everyByteFit(data, F);
            const levers = fit.levers(dims, setup, card)
                .map(({name, saved}) => [name, String(saved)]);
            const ways = fit.shortest(dims, setup, capacity, card)
                .map(({names, needed}) => [names, String(needed)]);
            return [levers, fit.gpusNeeded(dims, setup, capacity, card), ways,
                fit.mostSequences(dims, setup, capacity, card)];
        } catch (error) {
            if (!(error instanceof Refusal)) throw error;
            return error.message;
        }
    });
}"""


def for_javascript(values: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers as text, which BigInt reads at any size."""
    return {k: str(v) if type(v) is int else v for k, v in values.items()}


def test_the_port_is_equal_to_the_byte(tab: Page) -> None:
    rng = random.Random(20_260_101)
    inputs = [random_pair(rng) for _ in range(8_000)]
    expected = [in_python(*given) for given in inputs]
    sent = [[for_javascript(sizes), for_javascript(setup)] for sizes, setup in inputs]
    found = tab.evaluate(IN_THE_BROWSER, sent)
    for given, mine, other in zip(inputs, expected, found, strict=True):
        assert mine == other, given
    sums = [e for e in expected if isinstance(e, list)]
    assert len(sums) >= 5_000
    assert len(expected) - len(sums) >= 100  # refusals, in the same words
    assert any(int(nbytes) > 2**53 for row in sums for nbytes in row[:-1])


def test_levers_and_numbers_of_gpus_are_equal(tab: Page) -> None:
    rng = random.Random(7)
    inputs = []
    while len(inputs) < 30:
        sizes, setup = random_pair(rng)
        if isinstance(in_python(sizes, setup), list):
            inputs.append((sizes, setup, rng.choice(list(all_cards().values()))))
    found = tab.evaluate(
        IN_THE_BROWSER,
        [
            [for_javascript(a), for_javascript(b), c.usable, list(of(c).values())]
            for a, b, c in inputs
        ],
    )
    for (given, options, card), other in zip(inputs, found, strict=True):
        sizes, setup, capacity = Dimensions(**given), Setup(**options), card.usable
        levers = [[lever.name, str(lever.saved)] for lever in fit.levers(sizes, setup, **of(card))]
        ways = fit.shortest(sizes, setup, capacity, **of(card))
        ways = [[list(w.names), str(w.needed)] for w in ways]
        most = fit.most_sequences(sizes, setup, capacity, **of(card))
        gpus = fit.gpus_needed(sizes, setup, capacity, **of(card))
        assert other == [levers, gpus, ways, most], (given, options)


SERVED = """(inputs) => {
    const data = JSON.parse(document.getElementById("estimator-data").textContent);
    const F = everyByteFormulas(data), fit = everyByteFit(data, F);
    return inputs.map(([sizes, asked, card]) => {
        try {
            return Object.values(fit.serve(F.dimensions(sizes), asked, card)).map(String);
        } catch (error) {
            if (!(error instanceof Refusal)) throw error;
            return error.message;
        }
    });
}"""


def test_serving_is_equal_to_the_byte(tab: Page) -> None:
    rng = random.Random(16)
    inputs, expected = [], []
    for _ in range(1_000):
        sizes, card = random_sizes(rng), rng.choice(list(cards().values()))
        asked = {
            "dtype": rng.choice(("fp32", "fp16", "bf16", "bf16")),
            "quantised": rng.choice((None, *estimate.QUANTISED)),
            "cache_dtype": rng.choice((None, *estimate.BYTES)),
            "length": rng.choice((rng.randint(0, 10), rng.randint(1, 100_000))),
            "gpus": rng.choice((1, 1, 2, 4, 8, rng.randint(0, 16))),
            "utilization": rng.choice((92, rng.randint(0, 110))),
        }
        limits = [card.usable, card.cublas_workspace, *serving.default_limits(card)]
        inputs.append([for_javascript(sizes), for_javascript(asked), limits])
        try:
            served = estimate.serve(Dimensions(**sizes), estimate.Serving(**asked), card)
            expected.append([str(n) for n in dataclasses.astuple(served)])
        except ValueError as error:
            expected.append(str(error))
    found = tab.evaluate(SERVED, inputs)
    for given, mine, other in zip(inputs, expected, found, strict=True):
        assert mine == other, given
    assert 200 < sum(isinstance(one, list) for one in expected) < 900


def test_how_many_users_vllm_serves(tab: Page) -> None:
    assert tab.locator("#e-serving").is_hidden()
    tab.click("[data-preset=serving]")
    served = estimate.serve(
        estimate.dimensions("Llama-3.1-8B"), estimate.Serving(), cards()["RTX 4090"]
    )
    said = tab.inner_text("#e-users")
    assert f"serves {served.users} users of 4,096 tokens at a time" in said
    values = tab.locator("#e-served data").evaluate_all("all => all.map((one) => +one.value)")
    assert values == [
        *(served.weights, served.activations, served.non_torch, served.graphs),
        *(served.kv_cache, served.allowed),
    ]
    change(tab, "gpus", "3")
    assert "Expected a divisor of the 32 attention heads" in tab.inner_text("#e-users")


def test_the_scripts_are_small_and_plain() -> None:
    assert sum(script.stat().st_size for script in SCRIPTS) < 80_000
    for script in SCRIPTS:
        text = script.read_text("utf-8")
        assert not re.search(r"\b(import|export|fetch|XMLHttpRequest|eval)\b", text)


# The page

OF_SMALL = "vocab_size=32128&hidden_size=512&num_hidden_layers=6&num_attention_heads=8"
T5 = f"model=own&model_type=t5&{OF_SMALL}&encoder_layers=6&tie_word_embeddings=1"
VIT = f"model=own&model_type=vit&{OF_SMALL}&patch_size=16&max_position_embeddings=197&length=197"
CONTROLS = [  # each with a value that is not where it starts, and what else is to be chosen
    ("model", "Mixtral-8x7B-v0.1", ""),
    ("model_type", "qwen3", ""),
    ("vocab_size", "1000", ""),
    ("hidden_size", "8192", ""),
    ("num_hidden_layers", "3", ""),
    ("num_attention_heads", "16", ""),
    ("num_key_value_heads", "4", ""),
    ("head_dim", "64", ""),
    ("intermediate_size", "512", ""),
    ("max_position_embeddings", "77", "model=gpt2&length=64"),
    ("num_local_experts", "8", ""),
    ("num_experts_per_tok", "1", "model=Mixtral-8x7B-v0.1"),
    ("sliding_window", "100", "model=gemma-2-9b&task=inference"),
    ("sliding_layers", "3", "model=gemma-2-9b&task=inference&length=8000"),
    ("kv_lora_rank", "64", "model=DeepSeek-V2-Lite&task=inference"),
    ("q_lora_rank", "64", "model=DeepSeek-V2-Lite&task=inference"),
    ("qk_nope_head_dim", "64", "model=DeepSeek-V2-Lite&task=inference"),
    ("qk_rope_head_dim", "32", "model=DeepSeek-V2-Lite&task=inference"),
    ("v_head_dim", "64", "model=DeepSeek-V2-Lite&task=inference"),
    ("moe_intermediate_size", "64", "model=DeepSeek-V2-Lite&task=inference"),
    ("n_shared_experts", "1", "model=DeepSeek-V2-Lite&task=inference"),
    ("first_k_dense_replace", "2", "model=DeepSeek-V2-Lite&task=inference"),
    ("encoder_layers", "3", f"task=inference&{T5}"),
    ("patch_size", "32", f"task=inference&{VIT}"),
    ("tie_word_embeddings", True, ""),
    ("task", "inference", ""),
    ("batch", "3", ""),
    ("length", "777", ""),
    ("optimizer", "adam 8-bit", ""),
    ("rank", "8", ""),
    ("attention", "eager", ""),
    ("checkpointing", True, ""),
    ("implementation", "foreach", ""),
    ("adapters", "bf16", "rank=8"),
    ("dropout", True, "model=gpt2&length=512"),
    ("lora_dropout", True, "rank=8"),
    ("accumulation", True, "sharding=ZeRO+2&length=9000"),
    ("all_logits", True, "task=inference"),
    ("dtype", "fp32", ""),
    ("quantised", "nf4 double", "rank=4"),
    ("gradients", "fp32", ""),
    ("states", "fp32", ""),
    ("amp", "fp16", "dtype=fp32"),
    ("master_weights", True, ""),
    ("cache_dtype", "fp8", "task=inference"),
    ("card", "T4", ""),
    ("card", "MI300X", ""),
    ("card", "Mac, 64 GB", ""),
    ("gib", "100", ""),
    ("utilization", "80", "task=inference"),
    ("gpus", "5", "sharding=ZeRO+3"),
    ("sharding", "ZeRO 2", "gpus=4"),
    ("sharding", "FSDP", "gpus=4"),
    ("offload", "optimizer", ""),
    ("offload", "all", ""),
    ("load", "device_map", "model=gpt2-large&dtype=fp32&length=1024"),
]


def open_state(tab: Page, text: str) -> None:
    """Go to an address as from a link: the page is loaded anew."""
    tab.goto("about:blank")
    tab.goto(ADDRESS[0] + (f"#{text}" if text else ""))


def follow(tab: Page, text: str) -> None:
    """Go to an address of the page that is open: a third of the time that loading it takes."""
    tab.evaluate(
        """(text) => new Promise((told) => {
            if (location.hash === (text && "#" + text)) return told();
            addEventListener("popstate", () => setTimeout(told), { once: true });
            location.hash = text;
        })""",
        text,
    )


ADDRESS: list[str] = []


@pytest.fixture(autouse=True)
def _address(html: Path) -> None:
    ADDRESS[:] = [(html / "book" / "estimator.html").as_uri()]


def change(tab: Page, name: str, value: str | bool) -> None:
    control = tab.locator(f"#e-{name}")
    if name in SIZES and not control.is_visible():
        tab.click("#e-sizes > summary")
    if isinstance(value, bool):
        control.set_checked(value)
    elif control.evaluate("c => c.tagName") == "SELECT":
        control.select_option(value)
    else:
        control.fill(value)


def test_every_control_is_tested(tab: Page) -> None:
    assert sorted(state(tab)) == sorted({name for name, _, _ in CONTROLS})
    check(tab)


@pytest.mark.parametrize(("name", "value", "before"), CONTROLS)
def test_a_control(tab: Page, name: str, value: str | bool, before: str) -> None:
    follow(tab, before)
    first = check(tab)
    start = state(tab)
    assert start[name] != value
    change(tab, name, value)
    assert name in tab.url
    assert state(tab)[name] == value
    second = check(tab)
    # All but the choice of the card, and what this model has no use for, change the sum.
    if name not in ("card", "gib", "num_local_experts", "utilization"):
        assert second != first
        assert bool(change_of_all(tab)) == (second.total != first.total)
    # The address brings it all back.
    values, address = state(tab), tab.url.partition("#")[2]
    follow(tab, "")
    assert state(tab)[name] != value
    follow(tab, address)
    assert state(tab) == values
    assert check(tab) == second


def change_of_all(tab: Page) -> str:
    return tab.locator("#e-table tr.total td:nth-child(4)").inner_text()


def test_a_number_may_have_its_thousands_set_apart(tab: Page) -> None:
    change(tab, "length", "12345")
    plain = shown(tab)
    for text in ("12,345", "12 345", " 12_345 "):
        change(tab, "length", text)
        assert shown(tab) == plain


def test_changes_are_told_from_before_the_typing(tab: Page) -> None:
    first = shown(tab)[-1]
    tab.click("#e-length")
    tab.keyboard.press("End")
    tab.keyboard.type("00")
    second = shown(tab)[-1]
    assert change_of_all(tab) == f"+{(second - first) / 1e9:,.2f} GB"
    change(tab, "optimizer", "sgd")
    change(tab, "optimizer", "momentum")
    assert change_of_all(tab) == f"+{shown(tab)[2] / 1e9:,.2f} GB"


def test_tasks(tab: Page) -> None:
    """Each button sets the state and says what to look at; what it says is true."""
    after: dict[tuple[int, str], Memory] = {}
    for item in range(tab.locator(".tasks li").count()):
        buttons = tab.locator(".tasks li").nth(item).locator("button")
        for i in range(buttons.count()):
            button = buttons.nth(i)
            button.click()
            assert tab.inner_text("#e-look") == button.get_attribute("data-look")
            after[item + 1, button.inner_text()] = check(tab)
    train, infer = after[1, "Training"], after[1, "Inference"]
    assert infer.gradients == infer.optimizer_states == infer.activations == 0
    assert infer.parameters == train.parameters
    assert infer.kv_cache > train.kv_cache == 0
    whole, half, mixed = (after[2, n] for n in ("All FP32", "All FP16", "FP16 by autocast"))
    for kind in ("parameters", "gradients", "optimizer_states", "logits"):
        assert getattr(whole, kind) == 2 * getattr(half, kind)
    assert 0.5 < half.activations / whole.activations < 0.501
    assert mixed.optimizer_states == whole.optimizer_states
    assert mixed.cast_weights > whole.cast_weights == 0
    assert mixed.activations < whole.activations
    assert mixed.logits == whole.logits
    adam, momentum, sgd = (after[3, n] for n in ("Adam", "SGD, momentum", "SGD"))
    assert adam.optimizer_states == 2 * momentum.optimizer_states == 2 * adam.parameters
    assert sgd.optimizer_states == 0
    base = after[4, "As it is"]
    assert base.parameters == train.parameters
    layers, width = after[4, "Twice the layers"], after[4, "Twice the width"]
    assert layers.logits == base.logits
    assert 1.8 < layers.parameters / base.parameters < 2
    assert 3.5 < width.parameters / base.parameters < 4
    assert width.activations / base.activations < 2
    words = after[4, "Twice the words"]
    assert words.logits == 2 * base.logits
    assert words.activations == base.activations
    batch, length = after[4, "Twice the batch"], after[4, "Twice the length"]
    assert (batch.activations, batch.logits) == (2 * base.activations, 2 * base.logits)
    assert batch.parameters == length.parameters == base.parameters
    assert length.logits == 2 * base.logits
    assert length.activations > 2 * base.activations


def test_it_starts_with_a_question(tab: Page) -> None:
    """Llama-3.1-8B, QLoRA, 24 GiB: it fits, one click from the start."""
    start, pressed = state(tab), "[data-preset][aria-pressed=true]"
    assert asked(start)[1] == PRESETS["full"][1]
    assert (start["model"], start["card"]) == ("Llama-3.1-8B", "RTX 4090")
    assert "does not fit on RTX 4090" in tab.inner_text("#e-headline")
    for name, (label, setup) in PRESETS.items():
        tab.click(f"[data-preset={name}]")
        assert asked(state(tab))[1] == setup
        assert tab.locator(pressed).all_inner_texts() == [label]
        check(tab)
        if name == "qlora":
            assert "It fits on RTX 4090" in tab.inner_text("#e-headline")


def test_the_answer_is_on_a_phones_first_screen(tab: Page) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    open_state(tab, "")
    for selector in ("#e-model", "#e-card", "#e-headline", "#e-bar"):
        box = tab.locator(selector).bounding_box()
        assert box and box["y"] + box["height"] <= 844, selector


def test_bytes_on_demand(tab: Page) -> None:
    first = tab.locator("#e-table data").first
    assert first.inner_text() == "16.06 GB"
    tab.click("#e-bytes")
    assert first.inner_text() == "16,060,522,496"


CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


T5_CONFIG = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 3}
BART_CONFIG = {"d_model": 64, "encoder_ffn_dim": 96, "encoder_attention_heads": 4}
BART_CONFIG |= {"encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 100}
VIT_CONFIG = {"intermediate_size": 96, "image_size": 224, "patch_size": 16}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 32, "tie_word_embeddings": True},
        {"model_type": "llama", "intermediate_size": 96},
        {"model_type": "llama", "intermediate_size": 96, "mlp_bias": True},
        {"model_type": "<img src=x onerror=alert(1)>"},
        {"hidden_act": "relu"},
        {"mlp_only_layers": [1]},
        {"hidden_size": 1.5},
        {"num_key_value_heads": 3},
        {"model_type": "t5"} | T5_CONFIG,
        {"model_type": "mt5", "tie_word_embeddings": False} | T5_CONFIG,
        {"model_type": "t5", "feed_forward_proj": "gated-silu"} | T5_CONFIG,
        {"model_type": "bart"} | BART_CONFIG,
        {"model_type": "bart", "decoder_attention_heads": 8} | BART_CONFIG,
        {"model_type": "vit"} | VIT_CONFIG,
        {"model_type": "vit", "id2label": {"0": "a", "1": "b", "2": "c"}} | VIT_CONFIG,
        {"model_type": "vit", "num_channels": 4} | VIT_CONFIG,
        {"model_type": "vit"} | VIT_CONFIG | {"patch_size": 0},
    ],
)
def test_a_config_is_read_as_python_reads_it(tab: Page, change: dict[str, Any]) -> None:
    config, error = CONFIG | change, tab.locator("#e-config-error")
    start = state(tab)
    tab.fill("#e-config", json.dumps(config))
    try:
        sizes = estimate.from_config(config)
    except ValueError as refused:
        assert error.inner_text().split(":")[0] == str(refused).split(":")[0]
        assert state(tab) == start
        assert tab.locator("#estimator img").count() == 0
    else:
        assert error.is_hidden()
        assert state(tab)["model"] == "own"
        assert asked(state(tab))[0] == sizes
        check(tab)


def test_what_is_no_config(tab: Page) -> None:
    for text in ("{", "[]", "null"):
        tab.fill("#e-config", text)
        assert "as config.json holds" in tab.inner_text("#e-config-error")


def test_the_way_back(tab: Page) -> None:
    """A task is a step in the browser's history; typing is not."""
    start = state(tab)
    tab.get_by_role("button", name="SGD", exact=True).click()
    chosen = state(tab)
    assert chosen["optimizer"] == "sgd"
    change(tab, "length", "99")
    tab.go_back()
    assert state(tab) == start
    check(tab)
    tab.go_forward()
    assert state(tab) == {**chosen, "length": "99"}
    tab.click("#e-reset")
    assert state(tab) == start
    assert "#" not in tab.url


def test_headings_keep_their_addresses(tab: Page) -> None:
    change(tab, "batch", "4")
    tab.evaluate("location.hash = 'what-is-not-in-it'")
    assert state(tab)["batch"] == "4"


@pytest.mark.parametrize("name", [*NUMBERS, "hidden_size"])
def test_nonsense_gets_a_message_at_its_field(tab: Page, name: str) -> None:
    right, good = shown(tab), state(tab)[name]
    field, error = tab.locator(f"#e-{name}"), tab.locator(f"#e-{name}-error")
    assert error.get_attribute("id") == field.get_attribute("aria-describedby")
    for text in ("", "abc", "-1", "1.5", "1e9", "NaN", "٣", "9" * 20):
        if name == "hidden_size" and text == "":
            text = "0"  # empty, a dimension follows from the others
        change(tab, name, text)
        assert field.get_attribute("aria-invalid") == "true"
        assert error.is_visible()
        assert EXPECTED.match(error.inner_text())
        assert error.inner_text().startswith(tab.inner_text(f"label[for=e-{name}]") + ": ")
        assert "Fix the marked field" in tab.inner_text("#e-headline")
        assert shown(tab) == right  # of what was chosen before
        change(tab, name, good)
        assert field.get_attribute("aria-invalid") is None
        assert error.is_hidden()
        assert shown(tab) == right
    check(tab)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (
            "quantised=nf4",
            "rank",
            "LoRA rank, 0 for none: 0 does not work here. Expected 1 or more, for quantised",
        ),
        (
            "model=own&model_type=llama&vocab_size=10&hidden_size=10&num_attention_heads=3",
            "num_attention_heads",
            "num_attention_heads: 3 does not work here. Expected a divisor of hidden_size 10.",
        ),
        (
            "batch=many",
            "batch",
            "Batch, on each GPU: “many” does not work here. Expected a whole number, such as 1024.",
        ),
        (
            "model=gpt2&length=5000",
            "length",
            "Length, in tokens: 5000 does not work here. Expected at most the 1024 positions",
        ),
    ],
)
def test_an_impossible_address(tab: Page, text: str, field: str, message: str) -> None:
    open_state(tab, text)
    error = tab.locator(f"#e-{field}-error")
    assert error.is_visible()
    assert error.inner_text().startswith(message)


def test_gpt2_gets_the_length_that_it_has_learned(tab: Page) -> None:
    """As on the command line; the page says so."""
    change(tab, "model", "gpt2")
    assert state(tab)["length"] == "1024"
    assert "The length is 1,024 tokens now" in tab.inner_text("#e-note")
    check(tab)
    open_state(tab, "model=gpt2")
    assert state(tab)["length"] == "1024"
    tab.click("[data-preset=inference]")
    assert state(tab)["length"] == "1024"
    check(tab)
    change(tab, "model", "Llama-3.1-8B")
    assert tab.inner_text("#e-note") == ""


def test_models_are_searched_by_typing(tab: Page) -> None:
    """A part of a name leaves the result; a name in any case is found; another is refused."""
    field, error, first = tab.locator("#e-model"), tab.locator("#e-model-error"), shown(tab)
    listed = tab.locator("#e-models option").evaluate_all("all => all.map((one) => one.value)")
    assert listed == [*catalogue(), "own"]
    field.focus()
    assert tab.evaluate("getSelection().toString() || document.activeElement.selectionEnd > 0")
    field.press_sequentially("qwen3-8")
    assert (shown(tab), error.is_hidden()) == (first, True)
    field.press_sequentially("b")
    assert state(tab)["model"] == "Qwen3-8B"
    check(tab)
    field.fill("GPT-5 <b>")
    field.press("Tab")
    assert "“GPT-5 <b>” does not work here. Expected a model of the list" in error.inner_text()
    field.fill("gpt2")
    check(tab)


def test_an_unknown_word_in_the_address(tab: Page) -> None:
    open_state(tab, "optimizer=magic&colour=blue&batch=2")
    assert "optimizer=magic, colour=blue" in tab.inner_text("#e-note")
    assert state(tab)["batch"] == "2"
    check(tab)


def test_levers_are_pulled(tab: Page) -> None:
    """Pulling the first one again and again makes Llama-3.1-8B fit on the card."""
    tab.click("#e-single")
    for _ in range(8):
        sizes, setup = asked(state(tab))
        first = fit.levers(sizes, setup, **of(cards()["RTX 4090"]))[0]
        tab.locator("#e-levers button").first.click()
        assert asked(state(tab))[1] == first.setup
        check(tab)
        if "It fits on" in tab.inner_text("#e-headline"):
            break
    else:
        raise AssertionError(tab.inner_text("#e-headline"))
    assert "to spare" in tab.inner_text("#e-ways-note")


def test_every_kind_has_its_formula(tab: Page) -> None:
    for text in ("", "task=inference&cache_dtype=int4", "rank=4&quantised=nf4&amp=fp16&dtype=fp32"):
        open_state(tab, text)
        names = tab.locator("#e-table button")
        for i in range(names.count()):
            names.nth(i).hover()
            formula = tab.inner_text("#e-formula")
            assert formula.startswith(names.nth(i).inner_text() + ": ")
            assert len(formula) > 30
            assert not NONSENSE.search(formula)


def test_every_moment_is_told_as_a_sum(tab: Page) -> None:
    for text in ("", "task=inference", "gpus=8&sharding=FSDP&offload=optimizer&checkpointing=1"):
        open_state(tab, text)
        names = tab.locator("#e-moments button")
        for i in range(names.count()):
            names.nth(i).hover()
            told = tab.inner_text("#e-moment")
            assert told.startswith(names.nth(i).inner_text().removesuffix(" (the peak)") + ": ")
            assert not NONSENSE.search(told)
            terms = re.findall(r"(− )?([\d,]+\.\d\d) (GB|MB) \(", told)
            scale = {"GB": 1e9, "MB": 1e6}
            parts = [
                (-1 if minus else 1) * float(n.replace(",", "")) * scale[unit]
                for minus, n, unit in terms
            ]
            whole = int(re.findall(r"That is ([\d,]+) B", told)[0].replace(",", ""))
            assert abs(sum(parts) - whole) <= 0.006e9 * len(parts)


def test_the_bar_is_to_scale_and_told_in_words(tab: Page) -> None:
    memory = check(tab)
    bar = tab.locator("#e-bar")
    label = bar.get_attribute("aria-label") or ""
    whole = tab.evaluate("document.getElementById('e-bar').clientWidth")
    parts = {
        "held": memory.held,
        "peak": memory.peak - memory.held,
        "margin": memory.margin,
        "context": memory.context,
    }
    for kind, nbytes in parts.items():
        part = bar.locator(f"[data-part={kind}]")
        if not nbytes:
            assert part.count() == 0
            continue
        assert f"{nbytes / 1e9:,.2f} GB" in label or nbytes < 1e9
        width = part.evaluate("e => parseFloat(e.style.width)")
        assert width == pytest.approx(100 * nbytes / memory.needed, abs=0.01)
    limit = bar.locator(".limit").evaluate("e => parseFloat(e.style.left)")
    assert limit == pytest.approx(100 * cards()["RTX 4090"].usable / memory.needed, abs=0.01)
    assert whole > 300
    assert bar.get_attribute("role") == "img"


def test_by_keyboard_alone(tab: Page) -> None:
    def reach(selector: str) -> None:
        for _ in range(200):
            tab.keyboard.press("Tab")
            if tab.evaluate("s => document.activeElement.matches(s)", selector):
                focus = "getComputedStyle(document.activeElement).outlineStyle"
                assert tab.evaluate(focus) != "none"
                return
        raise AssertionError(f"{selector} is not reached with the Tab key")

    reach("[data-preset=lora]")
    tab.keyboard.press("Enter")
    assert state(tab)["rank"] == "16"
    reach("#e-ways button")
    before = shown(tab)[-1]
    tab.keyboard.press("Enter")
    assert shown(tab)[-1] < before
    assert "It fits on" in tab.inner_text("#e-headline")
    reach("#e-task")
    tab.keyboard.press("ArrowDown")
    assert state(tab)["task"] == "inference"
    reach("#e-batch")
    tab.keyboard.type("7")
    assert state(tab)["batch"] == "7"
    check(tab)
    reach("#e-table button")
    assert tab.inner_text("#e-formula").startswith("parameters: 8,030,261,248 parameters")
    reach(".tasks button")
    tab.keyboard.press("Enter")
    assert state(tab)["model"] == "gpt2-large"


def test_changes_are_announced_once_typing_pauses(tab: Page) -> None:
    status = expect(tab.locator("#e-status"))  # which asks again and again, without eval
    status.not_to_have_text("")
    # Both are read at once: on a busy machine the pause is over before the second question.
    headline, announced = tab.evaluate(
        """() => {
            const batch = document.getElementById("e-batch");
            batch.value = "3";
            batch.dispatchEvent(new Event("input", {bubbles: true}));
            return ["e-headline", "e-status"].map((id) => document.getElementById(id).innerText);
        }"""
    )
    assert announced != headline
    status.to_have_text(headline)


STATES = [
    "",
    "task=inference&model=gpt2",
    "model=own&model_type=llama&vocab_size=10&hidden_size=0",
    "batch=many",
]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_no_serious_violation_of_accessibility(
    html: Path, browser: Browser, theme: str, width: int
) -> None:
    tab = browser.new_page(
        color_scheme=theme,  # type: ignore[arg-type]
        viewport={"width": width, "height": 900},
        reduced_motion="reduce",
    )
    # Of what axe-core looks at, the theme changes colours alone.
    options = {"runOnly": ["color-contrast"]} if theme == "dark" else None
    for text in STATES:
        open_state(tab, text)
        results = Axe().run(tab, options=options).response["violations"]
        bad = [v for v in results if v["impact"] in ("serious", "critical")]
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in bad] == []
    tab.close()


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_nothing_is_wider_than_the_screen(tab: Page, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    for text in (*STATES, urlencode({"model": "Llama-3.1-405B", "batch": 10**6})):
        open_state(tab, text)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_motion_and_paper(tab: Page) -> None:
    style = "getComputedStyle(document.querySelector('#e-bar [data-part]')).transitionDuration"
    assert tab.evaluate(style) != "0s"
    tab.emulate_media(reduced_motion="reduce")
    assert tab.evaluate(style) == "0s"
    tab.emulate_media(media="print")
    assert tab.locator(".tasks").is_hidden()
    assert tab.locator("#e-table").is_visible()
    assert tab.pdf()[:4] == b"%PDF"


def test_without_a_script_the_page_says_so(html: Path, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((html / "book" / "estimator.html").as_uri())
    assert "needs its script" in tab.inner_text("#estimator noscript")
    context.close()
