"""Cards, how many of them, and the levers."""

import tomllib
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from every_byte.data import CONTEXT, Card, cards, named, read
from every_byte.data.others import RULES, all_cards, kind_of, other_cards
from every_byte.estimate import CHOICES, Setup, dimensions, fit, known_models, memory
from every_byte.estimate.presets import PRESETS
from every_byte.estimate.weights import STORED
from every_byte.units import GiB

MODELS = st.sampled_from(["gpt2", "Qwen2-0.5B", "Llama-3.1-8B"])
# Weights in some formats are run, and not trained, not even beside LoRA.
TASKS = [
    (task, name)
    for task in CHOICES["task"]
    for name in CHOICES["quantised"]
    if task == "inference" or name is None or STORED[name].trained
]
SETUPS = st.builds(
    lambda task, **chosen: Setup(task=task[0], quantised=task[1], **chosen),
    task=st.sampled_from(TASKS),
    dtype=st.sampled_from(["fp32", "bf16"]),
    rank=st.integers(1, 64),
    optimizer=st.sampled_from(CHOICES["optimizer"]),
    batch=st.integers(0, 16),
    length=st.integers(0, 1024),
    attention=st.sampled_from(["eager", "efficient", "sdpa"]),
    checkpointing=st.booleans(),
    gpus=st.integers(1, 16),
    sharding=st.sampled_from(CHOICES["sharding"]),
)


def test_the_cards() -> None:
    known = cards()
    assert len(known) >= 20
    # Sold sizes of the makers' data sheets.
    sold = {"RTX 4090": 24, "RTX 4050 Laptop": 6, "T4": 16, "H100": 80, "H200": 141}
    assert {name: known[name].sold for name in sold} == sold
    assert known["RTX 4090"].memory == 24 * GiB
    assert known["T4"].memory == 15 * GiB  # one sixteenth is for error correction
    assert [c.memory for c in known.values()] == sorted(c.memory for c in known.values())
    for name, card in known.items():  # never more than is sold, never much less
        assert 0.93 <= card.memory / (card.sold * GiB) <= 1, name


# What messages of "CUDA out of memory" show as the capacity, in GiB; see kept_by_driver.
SHOWN = {"T4": 14.56, "RTX 3060": 11.75, "RTX 4090": 23.52, "RTX 5090": 31.36}
SHOWN |= {"A100 40 GB": 39.5, "A100 80 GB": 79.14, "H200": 139.8}


@pytest.mark.parametrize("name", SHOWN)
def test_a_card_has_at_least_what_it_is_counted_with(name: str) -> None:
    card = cards()[name]
    assert 0.96 * card.memory < card.usable <= (SHOWN[name] + 0.005) * GiB


def test_each_figure_of_each_card_has_its_source() -> None:
    project = Path(__file__).parent.parent
    for name, card in read("cards.toml").items():
        sources = card.pop("sources")
        assert sources.keys() == card.keys(), name
        for source in chain.from_iterable(
            [of] if isinstance(of, str) else of for of in sources.values()
        ):
            assert source.startswith("https://") or (project / source).is_file(), source
        assert (card["memory"] == card["sold"] * GiB) or sources["memory"] != sources["sold"], name


def test_a_context_is_the_measured_one_or_never_below() -> None:
    known = cards()
    assert known["H200"].context == known["T4"].context == CONTEXT
    told = tomllib.loads((Path(__file__).parent.parent / "book/records/context.toml").read_text())
    for measured in told["measured"]:
        card = named(measured["card"])
        assert card is not None
        steps = {step["after"]: step["outside"] for step in measured["step"]}
        assert known[card].context == steps["first convolution (cuDNN)"]
    assert known["B200"].context == -(-CONTEXT * 148 // 132)


def test_there_are_forty_cards_and_more_and_the_others_follow_a_rule() -> None:
    known = all_cards()
    assert len(known) >= 40
    assert {kind_of(name) for name in known} == {"", *RULES}
    for name, card in other_cards().items():
        assert kind_of(name) == card.kind
        assert card.usable < card.memory <= card.sold * GiB, name
    assert kind_of("GB10") == "unified"
    assert known["GB10"].usable == cards()["GB10"].memory - 16 * GiB


# What logs tell that programs can have, in bytes; sources in every_byte/data/others.py.
TOLD = {
    "MI355X": 287.98 * GiB,
    "RX 7900 XTX": 23.98 * GiB,
    "RX 6800 XT": 15.98 * GiB,
    "Mac, 16 GB": 11_453.25e6,
    "Mac, 32 GB": 21_845.34 * 2**20,
    "Mac, 96 GB": 73_728 * 2**20,
    "Jetson AGX Orin": 51.6 * GiB,  # free, of 61.4
}


@pytest.mark.parametrize("name", TOLD)
def test_no_other_card_is_counted_with_more_than_it_has(name: str) -> None:
    assert 0.94 * TOLD[name] < all_cards()[name].usable <= TOLD[name] + 10_000


def test_workspaces_of_rocm() -> None:
    known: dict[str, Card] = all_cards()
    assert known["MI300X"].cublas_workspace == known["MI355X"].cublas_workspace == 128 << 20
    assert known["MI210"].cublas_workspace == known["RX 7900 XTX"].cublas_workspace == 32 << 20
    assert known["MI210"].context == CONTEXT + (76 << 20)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(MODELS, SETUPS, st.integers(1, 200))
def test_the_number_of_gpus_is_the_smallest(model: str, setup: Setup, gib: int) -> None:
    sizes, capacity = dimensions(model), gib * GiB
    needed = fit.gpus_needed(sizes, setup, capacity)

    def total(gpus: int) -> int:
        return memory(sizes, replace(setup, gpus=gpus, sharding="ZeRO 3")).needed

    if needed is None:
        assert total(fit.MOST_GPUS) > capacity
    else:
        assert total(needed) <= capacity
        assert needed == 1 or total(needed - 1) > capacity


@pytest.mark.parametrize("gpus", [1, 2, 3, 7, 64, 1023, 1024])
def test_cards_of_just_the_right_size(gpus: int) -> None:
    sizes, setup = dimensions("Llama-3.1-8B"), Setup(dtype="bf16", length=512)
    held = memory(sizes, replace(setup, gpus=gpus, sharding="ZeRO 3")).needed
    assert fit.gpus_needed(sizes, setup, held) == gpus
    assert fit.gpus_needed(sizes, setup, held - 1) == (gpus + 1 if gpus < fit.MOST_GPUS else None)


@pytest.mark.parametrize("capacity", [float("nan"), -1, float("inf"), 1.5])
def test_a_card_that_there_is_not(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity is {capacity}: expected a whole number from 0"):
        fit.gpus_needed(dimensions("gpt2"), Setup(), capacity)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(MODELS, SETUPS)
def test_levers_save_what_they_say_in_order(model: str, setup: Setup) -> None:
    sizes = dimensions(model)
    found = fit.levers(sizes, setup)
    saved = [lever.saved for lever in found]
    assert saved == sorted(saved, reverse=True)
    assert all(amount > 0 for amount in saved)
    now = memory(sizes, setup).needed
    for lever in found:
        assert memory(sizes, lever.setup).needed == now - lever.saved
        assert lever.setup.task == setup.task


def test_levers_of_a_full_training() -> None:
    setup = Setup(optimizer="adam", dtype="fp32", batch=2, length=1024)
    sizes = dimensions("gpt2-large")
    found = {lever.name: lever for lever in fit.levers(sizes, setup)}
    # Adam's two states, each in blocks as large as those of the parameters after .to(): with
    # segments of their own that is 3,172,251,648 B (the article's 3.17 GB), the most it can be.
    margins = memory(sizes, setup).margin - memory(sizes, replace(setup, optimizer="sgd")).margin
    states = known_models()["gpt2-large"]["published"] * 8
    # What shared segments keep beyond is in the margin and in the moment.
    assert 2 * 3_172_251_648 == found["SGD without momentum"].saved - 2 * margins > states
    # Weights that are all trained cannot be quantised; with LoRA they can.
    assert "weights in INT8" not in found
    assert "QLoRA: LoRA of rank 16 on NF4" in found
    assert found["half the batch"].setup.batch == 1
    assert found[fit.MORE_GPUS].setup.gpus == 2


@pytest.mark.parametrize("task", ["inference", "training"])
def test_what_is_done_already_is_no_lever(task: str) -> None:
    """Nor is LoRA where nothing is trained, though it would quantise the weights."""
    setup = Setup(task=task, dtype="fp16", rank=8, batch=2, length=512, attention="flash")
    names = {lever.name for lever in fit.levers(dimensions("gpt2-large"), setup)}
    assert "weights in NF4, double quantised" in names
    assert not names & {"LoRA of rank 16", "QLoRA: LoRA of rank 16 on NF4", "fused attention"}


@pytest.mark.parametrize("name", fit.LEVERS)
def test_every_lever_has_its_use(name: str) -> None:
    """There is a setup for each of them, or it would be idle."""
    large = {"dtype": "fp32", "batch": 2, "length": 512}
    setups = (
        Setup(**large),  # type: ignore[arg-type]
        Setup(task="inference", **large),  # type: ignore[arg-type]
        Setup(length=16),
    )
    sizes = dimensions("gpt2-large")
    assert any(name == lever.name for setup in setups for lever in fit.levers(sizes, setup))


def test_the_order_has_every_change() -> None:
    assert sorted(fit.ORDER) == sorted([*fit.LEVERS, *fit.HALVES, fit.MORE_GPUS])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(MODELS, SETUPS, st.integers(1, 60))
def test_no_shorter_combination_fits(model: str, setup: Setup, gib: int) -> None:
    """Each one fits; and of those a change shorter, none does: not even of all that there are."""
    sizes, capacity = dimensions(model), gib * GiB
    ways = fit.shortest(sizes, setup, capacity)
    if memory(sizes, setup).needed <= capacity:
        assert ways == []
        return
    for way in ways:
        assert memory(sizes, way.setup).needed == way.needed <= capacity
        assert len(way.names) == len(ways[0].names) == len(set(way.names))
    single = [lever for lever in fit.levers(sizes, setup)]
    fitting = {x.name for x in single if memory(sizes, x.setup).needed <= capacity}
    if fitting:
        assert {way.names for way in ways} == {(name,) for name in fitting}
    else:
        assert all(len(way.names) > 1 for way in ways)
    for way in ways[:3]:  # without any one of its changes it is too large
        changes = fit.changes(setup)
        for left in way.names:
            rest = {k: v for n in way.names if n != left for k, v in changes[n].items()}
            try:
                assert memory(sizes, replace(setup, **rest)).needed > capacity
            except ValueError:
                pass  # this model cannot do it


def test_the_way_to_24_gib() -> None:
    sizes, setup = dimensions("Llama-3.1-8B"), PRESETS["full"][1]
    ways = [way.names for way in fit.shortest(sizes, setup, 24 * GiB)]
    assert ("checkpointing", "LoRA of rank 16") in ways
    assert memory(sizes, PRESETS["qlora"][1]).needed < 24 * GiB


def test_three_changes_are_tried_together() -> None:
    sizes, setup = dimensions("Llama-3.1-8B"), Setup(batch=8, length=2048)
    ways = [way.names for way in fit.shortest(sizes, setup, 40 * GiB)]
    assert ("checkpointing", "QLoRA: LoRA of rank 16 on NF4", "half the batch") in ways


@settings(deadline=None, derandomize=True, max_examples=30)
@given(MODELS, SETUPS, st.integers(1, 60))
def test_the_largest_batch(model: str, setup: Setup, gib: int) -> None:
    sizes, capacity = dimensions(model), gib * GiB
    most = fit.most_sequences(sizes, setup, capacity)

    def needed(batch: int) -> int:
        return memory(sizes, replace(setup, batch=batch)).needed

    assert most == 0 or needed(most) <= capacity
    assert most == fit.MOST_SEQUENCES or needed(most + 1) > capacity
