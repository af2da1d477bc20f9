"""Models built from their configuration alone, and what the allocator makes of them."""

import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import pytest
import torch

matplotlib.use("agg")

from matplotlib import pyplot as plt

from every_byte.allocator import CachingAllocator
from every_byte.estimate import dimensions, known_models, parameters
from every_byte.gpu import VirtualGPU
from every_byte.units import MiB
from helpers.models import build, config
from helpers.plots import segments


@pytest.mark.parametrize("name", known_models())
def test_a_model_has_as_many_parameters_as_published_and_as_the_formula_says(name: str) -> None:
    model = build(name, "meta")
    counted = sum(p.numel() for p in model.parameters())
    assert counted == known_models()[name]["published"]
    assert counted == sum(parameters(dimensions(name)).values())
    assert model.dtype == getattr(torch, known_models()[name]["dtype"])
    assert all(p.is_meta for p in model.parameters())


def tiny(name: str = "gpt2", **changes: Any):  # type: ignore[no-untyped-def]
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    return config(name, **(sizes | changes))


@pytest.mark.parametrize("name", ["gpt2", "Qwen2-0.5B", "Qwen3-0.6B", "Mixtral-8x7B-v0.1"])
def test_any_vocabulary_will_do_and_nothing_is_said(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it writes to the stderr of its import
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16}
        # PyTorch 2.8 multiplies matrices of experts in one operation on CUDA only.
        settings = tiny(name, **sizes, experts_implementation="eager")
        model = build(settings, "cpu", torch.float32)
        with torch.no_grad():
            logits = model(torch.tensor([[0, 96]])).logits
    logger.removeHandler(caplog.handler)
    assert logits.shape == (1, 2, 97)
    assert logits.std() > 0  # random weights, not uninitialised or zero
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])


def test_a_configuration_is_left_as_it_was() -> None:
    settings = tiny()
    before = settings.to_dict()
    assert build(settings, "meta", torch.float16).dtype == torch.float16
    assert settings.to_dict() == before
    assert config("gpt2").vocab_size == 50257  # nor is the data file's


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (lambda: config("gpt3"), "model is 'gpt3': expected one of gpt2, gpt2-medium, "),
        (lambda: build("gpt3", "meta"), "model is 'gpt3': expected one of gpt2, "),
        (lambda: build("gpt2", "meta", torch.int8), "dtype is torch.int8: expected a floating-"),
    ],
)
def test_errors_are_one_clear_line(attempt: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(expected)) as error:
        attempt()
    assert "\n" not in str(error.value)


# gpt2-large in FP32: 774,030,080 parameters of 4 B. Its 72 MLP matrices of 25 MiB lie
# in segments of 26 MiB, its embedding of 257,315,840 B in one of 246 MiB; in each,
# at most 1 MiB is over and goes with the block.
PARAMETERS = 774_030_080 * 4
LOADED = PARAMETERS + 72 * MiB + (246 * MiB - 257_315_840)


def made_there(gpu: VirtualGPU) -> torch.nn.Module:
    return build("gpt2-large", gpu.device, torch.float32)


def moved_there(gpu: VirtualGPU) -> torch.nn.Module:
    gpu.close()
    model = build("gpt2-large", "meta", torch.float32).to_empty(device="cpu")  # never touched
    model.tie_weights()
    gpu.open()
    # As on CUDA, a parameter stays the same object, and a tied one is moved once.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(gpu.device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def made_after_one_large_block(gpu: VirtualGPU) -> torch.nn.Module:
    torch.empty(PARAMETERS, dtype=torch.uint8, device=gpu.device)  # made, and free again
    return made_there(gpu)


@pytest.mark.parametrize(
    ("load", "expected"),
    [(made_there, LOADED), (moved_there, LOADED), (made_after_one_large_block, PARAMETERS)],
)
def test_what_gpt2_large_takes_on_the_gpu(
    load: Callable[[VirtualGPU], torch.nn.Module], expected: int
) -> None:
    assert LOADED == 3_172_251_648
    with VirtualGPU() as gpu:
        model = load(gpu)
        assert gpu.memory_allocated() == expected
        rows = gpu.breakdown(model)
        assert rows["parameters"] == PARAMETERS
        assert rows["rounding"] == expected - PARAMETERS


# The figure of segments and blocks


@pytest.fixture
def allocator() -> Iterator[CachingAllocator]:
    """A segment of each kind: 26 MiB with 1 MiB not split off, 20 MiB with a hole, a small one."""
    held = CachingAllocator()
    held.malloc(25 * MiB)
    hole, _ = held.malloc(6 * MiB), held.malloc(2 * MiB)
    held.free(hole)
    held.malloc(40)
    yield held
    plt.close("all")


def test_segments_are_drawn_block_beside_block(allocator: CachingAllocator) -> None:
    (axes,) = segments(allocator.memory_snapshot()).axes
    bars: dict[float, list[tuple[float, float]]] = {}
    for bar in axes.patches:
        bars.setdefault(round(bar.get_y()), []).append((bar.get_x(), bar.get_width()))
    assert list(bars.values()) == [
        [(0, 40 / MiB), (40 / MiB, 472 / MiB), (512 / MiB, 2 - 512 / MiB)],
        [(0, 6), (6, 2), (8, 12)],
        [(0, 25), (25, 1)],
    ]
    assert [text.get_text() for text in axes.texts] == [
        "small pool, 2 MiB: 40 B asked for, 472 B added, 2 MiB free",
        "large pool, 20 MiB: 2 MiB asked for, 18 MiB free",
        "large pool, 26 MiB: 25 MiB asked for, 1 MiB added",
    ]


def test_the_figure_does_not_depend_on_where_the_driver_puts_segments(
    allocator: CachingAllocator,
) -> None:
    def drawn(snapshot):  # type: ignore[no-untyped-def]
        (axes,) = segments(snapshot).axes
        return [text.get_text() for text in axes.texts], [bar.get_bbox() for bar in axes.patches]

    snapshot = allocator.memory_snapshot()
    assert str(drawn(snapshot)) == str(drawn(snapshot[::-1]))


def test_segments_that_hold_the_same_share_a_bar() -> None:
    held = CachingAllocator()
    for size in (25 * MiB, 25 * MiB, 24 * MiB, 25 * MiB):
        held.malloc(size)
    (axes,) = segments(held.memory_snapshot()).axes
    plt.close("all")
    assert [text.get_text() for text in axes.texts] == [
        "large pool, 24 MiB: 24 MiB asked for",
        "3 × large pool, 26 MiB: 25 MiB asked for, 1 MiB added",
    ]


def test_an_empty_card_has_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="the snapshot holds no segment"):
        segments(CachingAllocator().memory_snapshot())


def test_nothing_is_imported_while_a_device_is_set() -> None:
    """What is imported then leaves its constants on the card, for as long as the process runs."""
    code = """
import sys
import torch
from helpers.models import build

class Watches:
    def find_spec(self, name, path=None, target=None):
        if torch.get_default_device().type != "cpu":
            print(name)

sys.meta_path.insert(0, Watches())
for name in ("gpt2", "Qwen2-0.5B"):
    build(name, "meta")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
