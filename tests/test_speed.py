"""The page of speed: it shows what the benchmark wrote. Nothing is timed here."""

import json
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import speed

STORED = json.loads(speed.STORED.read_text("utf-8"))
EXTENSION = "speed"


def figures(found: Any) -> Iterator[dict[str, float]]:
    """All medians with their ranges."""
    if isinstance(found, dict):
        if "median" in found:
            yield found
        else:
            for each in found.values():
                yield from figures(each)


def test_every_figure_is_a_median_within_its_range() -> None:
    found = list(figures(STORED))
    assert len(found) > 20
    assert all(0 < f["low"] <= f["median"] <= f["high"] and f["rounds"] >= 1 for f in found)


def test_the_page_shows_every_figure(extension: Any) -> None:
    text = "\n".join(
        tell(STORED)
        for tell in (extension.beside, extension.steps, extension.growth, extension.conditions)
    )
    for of in (STORED["beside"], STORED["steps"]):
        assert all(name in text for name in of)
    for what, sizes in STORED["growth"].items():
        assert all(extension.SIZES[what].format(f"{int(size):,}") in text for size in sizes)
    assert extension.SIZES.keys() == STORED["growth"].keys()
    assert STORED["conditions"]["date"] in text


def test_growth_is_told_for_each_layer_and_for_the_whole_step(extension: Any) -> None:
    def of(seconds: float) -> dict[str, float]:
        return {"median": seconds, "low": seconds, "high": seconds, "rounds": 1}

    told = extension.growth(
        {"growth": {"layers": {"20": of(1), "160": of(10)}, "tokens": {"512": of(2), "4": of(3)}}}
    )
    assert "1.25 for each layer" in told and "| 1.50" in told
    assert extension.spread({"median": 2.0, "low": 1.0, "high": 250.0}) == "2.0 s (1.0 to 250)"


def test_what_is_measured_runs() -> None:
    assert speed.pairs(10, 10) > 0 and speed.python_loop() > 0

    def build(device: torch.device) -> Any:
        with device:
            layer, data = torch.nn.Linear(8, 8), torch.empty(2, 8)
        return lambda: layer(data).sum().backward()

    assert speed.replay(build) > 0 and speed.mem_tracker(build) > 0
