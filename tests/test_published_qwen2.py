"""The figures that an article printed for Qwen2-0.5B-Instruct, to their last digit.

RTX 4050 Laptop GPU, torch 2.1.1, transformers 4.41.0, ``device_map="cuda:0"``:
``torch.cuda.memory_allocated() / 1024**3``.
"""

import math

import pytest

from every_byte.allocator import CachingAllocator
from every_byte.estimate import dimensions, shapes
from every_byte.units import GiB

FP16, FP32 = 2, 4
PARAMETERS = [math.prod(shape) for _, shape in shapes(dimensions("Qwen2-0.5B"))]


def load(card: CachingAllocator, width: int, emptying: bool = True) -> list[int]:
    """One load: the parameters, then each layer's rotary buffers, as transformers 4.41 had them.

    After each parameter accelerate 0.30 emptied the cache (``set_module_tensor_to_device``).
    """
    made = []
    for count in PARAMETERS:
        made.append(card.malloc(count * width))
        if emptying:
            card.empty_cache()
    for _ in range(24):  # inverse frequencies in FP32, then cosines and sines
        made.append(card.malloc(32 * 4))
        made += [card.malloc(32_768 * 64 * width) for _ in range(2)]
    return made


def loaded(*widths: int, emptying: bool = True) -> float:
    """GiB allocated after loads into one variable: the old model goes when the new one is there."""
    card = CachingAllocator()
    model: list[int] = []
    for width in widths:
        old, model = model, load(card, width, emptying)
        for handle in old:
            card.free(handle)
    return card.memory_allocated() / GiB


@pytest.mark.parametrize("emptying", [True, False])
def test_fp16_on_an_empty_card(emptying: bool) -> None:
    assert sum(PARAMETERS) == 494_032_768
    assert loaded(FP16, emptying=emptying) == 1.115407943725586


def test_fp32_after_fp16_and_after_itself() -> None:
    assert loaded(FP16, FP32, FP32) == 2.2383761405944824


@pytest.mark.parametrize(
    ("earlier", "emptying"),
    [((), True), ((FP16,), True), ((FP32,), True), ((FP16, FP32), False)],
)
def test_other_histories_miss_it(earlier: tuple[int, ...], emptying: bool) -> None:
    assert loaded(*earlier, FP32, emptying=emptying) != 2.2383761405944824
