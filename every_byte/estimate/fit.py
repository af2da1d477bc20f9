"""Does it fit: cards and their memory, how many of one are needed, and what would help.

All by the formulas of `every_byte.estimate`, in bytes.
"""

from dataclasses import dataclass, replace
from typing import Any

from every_byte.estimate.architecture import Dimensions
from every_byte.estimate.checks import check_whole
from every_byte.estimate.setup import Setup, memory

MOST_GPUS = 1024  # the largest number in the ZeRO paper's table 1


def gpus_needed(sizes: Dimensions, setup: Setup, capacity: int) -> int | None:
    """How many GPUs of `capacity` bytes hold it: 1, or the fewest under ZeRO 3.

    None if more than `MOST_GPUS` do not: each of them holds its own activations,
    logits, KV cache and CUDA context whole.

    Raises:
        ValueError: `capacity` is no whole number, or negative.
    """
    check_whole("capacity", capacity)

    def fits(gpus: int) -> bool:
        sharded = replace(setup, gpus=gpus, sharding="ZeRO 3")
        return memory(sizes, sharded).needed <= capacity

    if fits(1):
        return 1
    few, enough = 1, MOST_GPUS
    if not fits(enough):
        return None
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if fits(middle) else (middle, enough)
    return enough


# What can be changed to save memory: the change in words, and in a `Setup`.
_HALF = {"dtype": "bf16", "gradients": None, "states": None, "amp": None, "master_weights": False}
LEVERS: dict[str, dict[str, Any]] = {
    "all in BF16": _HALF,
    "8-bit Adam": {"optimizer": "adam 8-bit"},
    "Adafactor": {"optimizer": "adafactor"},
    "SGD without momentum": {"optimizer": "sgd"},
    "fused optimizer step": {"implementation": "fused"},
    "LoRA of rank 16": {"rank": 16},
    "QLoRA: LoRA of rank 16 on NF4": {"rank": 16, "quantised": "nf4 double"},
    "checkpointing": {"checkpointing": True},
    "fused attention": {"attention": "sdpa"},
    "weights in INT8": {"quantised": "int8"},
    "weights in NF4, double quantised": {"quantised": "nf4 double"},
    "KV cache in FP8": {"cache_dtype": "fp8"},
    "device_map instead of .to()": {"load": "device_map"},
}
# Fields of a `Setup` that are halved, and the number of GPUs, which is doubled.
HALVES = {"half the batch": "batch", "half the length": "length"}
MORE_GPUS = "twice the GPUs, ZeRO 3"


@dataclass(frozen=True, slots=True)
class Lever:
    """A change to a setup, and the bytes of the peak that it saves on one GPU."""

    name: str
    setup: Setup
    saved: int


def levers(sizes: Dimensions, setup: Setup) -> list[Lever]:
    """Each single change that saves memory, the one that saves most first.

    A smaller batch or length is a smaller task, and all change what is computed:
    which of them can be afforded is not for a formula to say.
    """
    now = memory(sizes, setup).needed  # refuses what is no setup
    changes = dict(LEVERS)
    for name, what in HALVES.items():
        changes[name] = {what: -(-getattr(setup, what) // 2)}
    changes[MORE_GPUS] = {"gpus": 2 * setup.gpus, "sharding": "ZeRO 3"}
    found = []
    for name, change in changes.items():
        training = setup.task == "training"
        if training and "quantised" in change and not change.get("rank", setup.rank):
            continue  # weights that are trained are not quantised
        if "rank" in change and (not training or setup.rank):
            continue  # LoRA is a way to train, and there already
        if "attention" in change and setup.attention != "eager":
            continue  # it is fused already
        try:
            changed = replace(setup, **change)
            saved = now - memory(sizes, changed).needed
        except ValueError:
            continue  # this model cannot do it
        if saved > 0:
            found.append(Lever(name, changed, saved))
    return sorted(found, key=lambda lever: -lever.saved)
