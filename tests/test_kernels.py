"""Every operation that an H200 measured by itself, by a few of its signatures.

Those with rules of their own have more of them in test_measured.py, and ``make proof`` has all.
"""

import json
from collections import defaultdict
from collections.abc import Iterator

import pytest

from benchmarks.proof import CARD, DATA, SHOWN, TORCH, equal
from every_byte.gpu import VirtualGPU
from helpers import signatures

FEW = 4
LIBRARIES = ("conv", "linalg_", "_fft")  # of which nothing says beforehand what they choose


def measured() -> dict[str, list[signatures.Measured]]:
    others = set(json.loads(SHOWN.read_text("utf-8"))["others"])
    found = defaultdict(list)
    for one in signatures.measured(DATA / "kernels.json.xz"):
        by_library = any(name in one.operation for name in LIBRARIES)
        if one.group.startswith("single") and not by_library and one.signature not in others:
            found[one.operation].append(one)
    return {name: every[:: max(1, len(every) // FEW)] for name, every in found.items()}


MEASURED = measured()


@pytest.fixture(scope="module")
def card() -> Iterator[VirtualGPU]:
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        yield gpu


@pytest.mark.parametrize("operation", MEASURED)
def test_an_operation_takes_what_it_took_on_the_card(card: VirtualGPU, operation: str) -> None:
    for one in MEASURED[operation]:
        events = signatures.replayed(card, one.signature)
        assert equal(one, events), (one.signature, events, one.variants)


def test_there_are_many_operations() -> None:
    assert len(MEASURED) > 40
