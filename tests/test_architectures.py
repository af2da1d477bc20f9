"""The table of architectures: a sample of it again, and what the book shows of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import architectures

ROOT = Path(__file__).parent.parent
EXTENSION = "architectures"
STORED = json.loads(architectures.RESULTS.read_text("utf-8"))
CASES = {(case.group, case.name): case for case in architectures.cases()}
SAMPLE = (
    ("transformers, text", "gpt2"),
    ("transformers, vision", "vit"),
    ("recurrent", "GRU"),
    ("libraries", "torch: DataParallel"),
)


@pytest.mark.parametrize("place", SAMPLE, ids=": ".join)
def test_a_case_comes_to_what_is_stored(place: tuple[str, str]) -> None:
    stored = next(case for case in STORED["cases"] if (case["group"], case["name"]) == place)
    torch.manual_seed(0)
    assert stored == architectures.result(CASES[place])


def test_every_case_is_stored_and_nearly_all_run() -> None:
    rows = STORED["cases"]
    assert {(row["group"], row["name"]) for row in rows} == CASES.keys()
    results = [row["result"] for row in rows]
    assert set(results) <= {"runs", "refused"}, "a wrong figure is a fault of the engine"
    assert results.count("runs") >= 0.95 * len(results)


def test_bytes_that_no_tensor_holds_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the cases: a storage that is counted twice must not pass."""
    from every_byte.virtual.memory import VirtualMemory

    malloc = VirtualMemory.malloc
    monkeypatch.setattr(
        VirtualMemory, "malloc", lambda memory, n, stream=None: malloc(memory, n + 512, stream)
    )
    row = architectures.result(CASES["libraries", "torch: checkpoint"])
    assert row["result"] == "wrong" and "B are allocated, the tensors take" in row["why"]


def test_the_page_shows_every_case_once(extension: Any) -> None:
    cases = STORED["cases"]
    text = "\n".join([extension.not_running(cases), *extension.every(cases)])
    for case in cases:
        assert text.count(f"`{case['name']}`") >= 1
    shares = extension.counted(cases)
    assert sum(sum(of.values()) for of in shares.values()) == len(cases)
    two = [{**cases[0], "result": "runs"}, {**cases[0], "result": "wrong", "why": "it is"}]
    assert extension.told(two) == "1 of 2 cases run (50 %); 1 give a wrong figure."
    assert "it is" in extension.not_running(two)
    assert extension.not_running(two[:1]) == "Every case runs."
    assert "<svg" in extension.figure(two)
