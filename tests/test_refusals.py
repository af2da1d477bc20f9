"""A value that is none is refused in one line, which names it and what was expected."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from every_byte import CachingAllocator, VirtualGPU, estimate
from every_byte.estimate import fit
from helpers.models import build, config

GPT2 = estimate.dimensions("gpt2")
SETUP = estimate.Setup()
NAN = math.nan
NAMES: Any = "gpt2"  # where a model's sizes are expected


def breakdown(model: Any) -> object:
    with VirtualGPU() as gpu:
        return gpu.breakdown(model)


REFUSED: dict[str, Callable[[], object]] = {
    **{
        f"rank is {rank}": lambda rank=rank: estimate.layer_activations(GPT2, 1, 8, rank=rank)
        for rank in (-1, NAN)
    },
    "autocast is -1": lambda: estimate.activations(GPT2, 1, 8, autocast=-1),  # type: ignore
    **{
        f"checkpointing is {n!r}": lambda n=n: estimate.activations(GPT2, 1, 8, checkpointing=n)
        for n in (1.5, NAN, -1)
    },
    **{f"nbytes is {n}": lambda n=n: estimate.block(n) for n in (-1, 1.5, NAN, True)},
    "nbytes is -2": lambda: estimate.shard(-2, 2),
    "nbytes is 2.5": lambda: estimate.shard(2.5, 2),  # type: ignore[arg-type]
    "gpus is True": lambda: estimate.shard(1, True),
    **{
        f"capacity is {n}": lambda n=n: fit.gpus_needed(GPT2, SETUP, n) for n in (NAN, -1, math.inf)
    },
    **{f"stream is {n!r}": lambda n=n: CachingAllocator().malloc(1, n) for n in ("x", -1, NAN)},
    **{f"dtype is {what!r}": lambda what=what: estimate.Setup(gradients=what) for what in ("", [])},
    "dropout is 'no'": lambda: estimate.Setup(dropout="no"),  # type: ignore[arg-type]
    "master_weights is 'x'": lambda: estimate.Setup(master_weights="x"),  # type: ignore[arg-type]
    "checkpointing is 'x'": lambda: estimate.training(GPT2, checkpointing="x"),  # type: ignore
    "sizes is 'gpt2'": lambda: estimate.parameters(NAMES),
    "model_type is None": lambda: estimate.dimensions([]),
    "sizes is 'gpt2': expected a model's Dim": lambda: estimate.memory(NAMES, SETUP),
    "setup is None": lambda: estimate.memory(GPT2, None),  # type: ignore[arg-type]
    "setup is 1": lambda: fit.levers(GPT2, 1),  # type: ignore[arg-type]
    "sizes is 'gpt2': expected": lambda: estimate.logits(NAMES, 1, 1),
    "sizes is 'gpt2': ": lambda: estimate.kv_cache(NAMES, 1, 1),
    "sizes is": lambda: estimate.layer_activations(NAMES, 1, 1),
    "handle []": lambda: CachingAllocator().free([]),  # type: ignore[arg-type]
    "alloc_conf is None": lambda: CachingAllocator(alloc_conf=None),  # type: ignore[arg-type]
    "alloc_conf is None: expected": lambda: VirtualGPU(alloc_conf=None),  # type: ignore[arg-type]
    **{
        f"max_entries is {n}": lambda n=n: CachingAllocator().record_memory_history("all", n)
        for n in (0, 1.5, 2**63)
    },
    "torch is 2.11": lambda: VirtualGPU("H200", torch=2.11),  # type: ignore[arg-type]
    "model is 'x'": lambda: breakdown("x"),
    "model is None": lambda: build(None, "meta"),  # type: ignore[arg-type]
    "device is 'nowhere'": lambda: build("gpt2", "nowhere"),
    "model is {}": lambda: config({}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_value_that_is_none(said: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        REFUSED[said]()
    message = str(refused.value)
    assert message.startswith(said), message
    assert "\n" not in message
