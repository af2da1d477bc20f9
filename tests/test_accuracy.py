"""The pages of accuracy and of what operations borrow: their files are what the rules give."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy, borrows
from every_byte.units import MiB
from helpers import workloads

# Of each kind one, quick to make: a language model, BERT, a network, none that is known.
QUICK = ("gpt2-fp32-eager", "bert-base-fp32-mask", "tv-resnet18-fp32", "lstm")
EXTENSION = "accuracy"


@pytest.mark.parametrize("name", QUICK)
def test_the_stored_formulas_are_what_they_say_now(name: str) -> None:
    stored, task = accuracy.stored()["workloads"][name], accuracy.task(name)
    said = {peer: accuracy.asked(formula, task) for peer, formula in accuracy.FORMULAS.items()}
    told = {peer: stored[peer] for peer in accuracy.FORMULAS}
    assert said == told, "python -m benchmarks.accuracy brings the file up to date"


def test_the_formulas_say_what_their_sources_say() -> None:
    # DeepSpeed's documentation, memory.html: 2,851 M parameters, one GPU, ZeRO 2 without
    # offload, 2 + 18 B each. GPT-2 as Transformer Math's calculator counts it: by hand.
    gpt2 = accuracy.task("gpt2-fp32-eager")
    assert gpt2.parameters == 124_439_808
    assert accuracy.by_deepspeed(gpt2) == 20 * gpt2.parameters
    counted = 2 * 50257 * 768 + 768 * 512 + 8 * 768 * 12 + 2 * 768 + 12 * 12 * 768**2
    kept = 4 * 512 * 768 * 12 * (66 + 9 * 12 * 512 // 768)
    assert accuracy.by_transformer_math(gpt2) == counted * 20 + kept
    layer = 4 * 512 * 768 * (4 * (5 + 1 + 8 + 2) + 2) + 9 * 4 * 12 * 512**2
    scored = 2 * 4 * 4 * 512 * 50257
    assert accuracy.by_vram_estimator(gpt2) == 16 * gpt2.parameters + 12 * layer + scored
    assert accuracy.asked(accuracy.by_accelerate, accuracy.task("lstm")) == "models of the hub only"


def test_every_workload_was_asked_of_every_peer(extension: Any) -> None:
    stored = accuracy.stored()
    assert stored["workloads"].keys() == workloads.WORKLOADS.keys()
    for name, said in stored["workloads"].items():
        assert accuracy.FORMULAS.keys() <= said.keys(), name
    rows = extension.runs()
    assert {row.name for row in rows} == workloads.WORKLOADS.keys()
    assert set(extension.SYSTEMS) == {"replay", accuracy.TRACKER, *accuracy.FORMULAS}
    assert len(extension.series()) == 190


def test_a_difference_counts_as_it_was_printed(extension: Any) -> None:
    row = extension.Row("one", 1.5 * MiB, {"replay": 3 << 19, "estimator": 1 << 20, "x": "no"})
    assert row.off("replay") == 0
    assert row.off("estimator") == pytest.approx(-1 / 3)
    assert row.off("x") is None and row.off("nobody") is None
    # 20,480.125 MiB less one byte is the same number in float32.
    printed = extension.Row("one", 20480.125 * MiB, {"replay": 21_474_967_551}, digits=True)
    assert printed.off("replay") == 0
    assert printed._replace(digits=False).off("replay") != 0
    told = extension.score([row, row._replace(said={"replay": 2 << 20})], "replay")
    assert (told.answered, told.exact) == (2, 1)
    assert told.worst == pytest.approx(1 / 3) and told.median == pytest.approx(1 / 6)


def test_percent_has_two_digits(extension: Any) -> None:
    shares = (0, 0.5, -0.071, 0.00012345, -1e-7, 6.2)
    assert [extension.percent(n) for n in shares] == [
        "0",
        "+50",
        "-7.1",
        "+0.012",
        "-1e-05",
        "+620",
    ]


@pytest.fixture(scope="module")
def borrowed() -> list[dict[str, Any]]:
    return [json.loads(json.dumps(asdict(one))) for one in borrows.all_borrowed()]


def test_what_operations_borrow_is_what_the_rules_give(borrowed: list[dict[str, Any]]) -> None:
    stored = json.loads(Path(borrows.STORED).read_text("utf-8"))
    assert borrowed == stored, "python -m benchmarks.borrows brings the file up to date"


def test_what_was_measured_is_replayed_alike(borrowed: list[dict[str, Any]]) -> None:
    # No rule yet: the page shows both figures.
    without = {"x.topk(50)", "x.index_put_((i,), y, accumulate=True)"}
    compared = 0
    for row in borrowed:
        for pair in filter(None, (row["forward"], row["backward"])):
            replayed, measured = pair
            if measured is None or row["code"] in without:
                continue
            compared += 1
            off = abs(replayed - measured)
            assert off <= 1024 * row["estimated"], row["code"]
    assert compared >= 35


def test_borrowed_is_what_is_given_back() -> None:
    assert borrows.beside([100, 50, -50]) == 50
    assert borrows.beside([100, 50, -100]) == 100
    assert borrows.beside([8, 8]) == 0
    assert borrows.beside([]) == 0
