"""Does it fit: cards and their memory, how many of one are needed, and what would help.

All by the formulas of `every_byte.estimate`, in bytes. A capacity is what programs can
have (`every_byte.data.Card.usable`); `workspace` and `context` are the card's, too. What
fits does so for certain: with `every_byte.estimate.Memory.needed`.
"""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from every_byte.data import CONTEXT
from every_byte.estimate.architecture import Dimensions
from every_byte.estimate.checks import check_whole
from every_byte.estimate.setup import WORKSPACE, Setup, memory

MOST_GPUS = 1024  # the largest number in the ZeRO paper's table 1


def gpus_needed(
    sizes: Dimensions,
    setup: Setup,
    capacity: int,
    *,
    workspace: int = WORKSPACE,
    context: int = CONTEXT,
) -> int | None:
    """How many GPUs of `capacity` bytes hold it: 1, or the fewest under ZeRO 3.

    None if more than `MOST_GPUS` do not: each of them holds its own activations,
    logits, KV cache and CUDA context whole.

    Raises:
        ValueError: `capacity` is no whole number, or negative.
    """
    check_whole("capacity", capacity)

    def fits(gpus: int) -> bool:
        sharded = replace(setup, gpus=gpus, sharding="ZeRO 3")
        return memory(sizes, sharded, workspace, context).needed <= capacity

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
    "optimizer on the host": {"offload": "optimizer"},
}
# Fields of a `Setup` that are halved, and the number of GPUs, which is doubled.
HALVES = {"half the batch": "batch", "half the length": "length"}
MORE_GPUS = "twice the GPUs, ZeRO 3"


MOST_CHANGES = 3  # that `shortest` tries together
# What is tried first, and of equally short combinations comes first: what leaves the work as
# it is, then what computes in fewer bits or remembers less, then what is another or a smaller
# task or asks for more GPUs.
ORDER = (
    "fused attention",
    "fused optimizer step",
    "device_map instead of .to()",
    "checkpointing",
    "all in BF16",
    "8-bit Adam",
    "KV cache in FP8",
    "LoRA of rank 16",
    "QLoRA: LoRA of rank 16 on NF4",
    "weights in INT8",
    "weights in NF4, double quantised",
    "Adafactor",
    "SGD without momentum",
    "optimizer on the host",
    *HALVES,
    MORE_GPUS,
)


@dataclass(frozen=True, slots=True)
class Lever:
    """A change to a setup, and the bytes of the peak that it saves on one GPU."""

    name: str
    setup: Setup
    saved: int


@dataclass(frozen=True, slots=True)
class Combination:
    """Changes that together make a model fit, and what it then needs, in bytes."""

    names: tuple[str, ...]
    setup: Setup
    needed: int


def changes(setup: Setup) -> dict[str, dict[str, Any]]:
    """What can be changed of a setup: the change in words, and its fields."""
    found = dict(LEVERS)
    for name, what in HALVES.items():
        found[name] = {what: -(-getattr(setup, what) // 2)}
    found[MORE_GPUS] = {"gpus": 2 * setup.gpus, "sharding": "ZeRO 3"}
    return {name: change for name, change in found.items() if _applies(setup, change)}


def _applies(setup: Setup, change: dict[str, Any]) -> bool:
    training = setup.task == "training"
    if "rank" in change and (not training or setup.rank):
        return False  # LoRA is a way to train, and there already
    if "offload" in change and (not training or setup.offload):
        return False
    if "attention" in change and setup.attention != "eager":
        return False  # it is fused already
    # Weights that are trained are not quantised.
    return not (training and "quantised" in change and not change.get("rank", setup.rank))


def _changed(
    sizes: Dimensions, setup: Setup, change: dict[str, Any], *card: int
) -> tuple[Setup, int] | None:
    """The setup with a change, and what it needs; None if this model cannot do it."""
    try:
        changed = replace(setup, **change)
        return changed, memory(sizes, changed, *card).needed
    except ValueError:
        return None


def levers(
    sizes: Dimensions, setup: Setup, *, workspace: int = WORKSPACE, context: int = CONTEXT
) -> list[Lever]:
    """Each single change that saves memory, the one that saves most first.

    A smaller batch or length is a smaller task, and all change what is computed:
    which of them can be afforded is not for a formula to say.
    """
    card = workspace, context
    now, found = memory(sizes, setup, *card).needed, []
    for name, change in changes(setup).items():
        if (changed := _changed(sizes, setup, change, *card)) and changed[1] < now:
            found.append(Lever(name, changed[0], now - changed[1]))
    return sorted(found, key=lambda lever: -lever.saved)


def shortest(
    sizes: Dimensions,
    setup: Setup,
    capacity: int,
    *,
    workspace: int = WORKSPACE,
    context: int = CONTEXT,
) -> list[Combination]:
    """The shortest combinations of changes that make it fit in `capacity` bytes.

    All of the same length, those of `ORDER`'s first changes first; a change that
    saves nothing beside the others is not in one. Empty if it fits as it is, or if
    no `MOST_CHANGES` of them are enough.

    Raises:
        ValueError: `capacity` is no whole number, or negative.
    """
    check_whole("capacity", capacity)
    card = workspace, context
    if memory(sizes, setup, *card).needed <= capacity:
        return []
    possible = changes(setup)
    names = [name for name in ORDER if name in possible]
    for length in range(1, MOST_CHANGES + 1):
        found = []
        for chosen in combinations(names, length):
            together: dict[str, Any] = {}
            for name in chosen:
                together |= possible[name]
            if len(together) < sum(len(possible[name]) for name in chosen):
                continue  # two of them set the same field
            changed = _changed(sizes, setup, together, *card)
            if changed and changed[1] <= capacity:
                found.append(Combination(chosen, *changed))
        if found:
            return found
    return []


MOST_SEQUENCES = 2**20


def most_sequences(
    sizes: Dimensions,
    setup: Setup,
    capacity: int,
    *,
    workspace: int = WORKSPACE,
    context: int = CONTEXT,
) -> int:
    """The largest batch that fits on a GPU of `capacity` bytes, up to `MOST_SEQUENCES`.

    Of serving, how many users at `length` tokens each; 0 if not even one fits.

    Raises:
        ValueError: `capacity` is no whole number, or negative.
    """
    check_whole("capacity", capacity)

    def fits(batch: int) -> bool:
        return memory(sizes, replace(setup, batch=batch), workspace, context).needed <= capacity

    if not fits(1):
        return 0
    enough, many = 1, 2
    while many < MOST_SEQUENCES and fits(many):
        enough, many = many, 2 * many
    if many >= MOST_SEQUENCES and fits(MOST_SEQUENCES):
        return MOST_SEQUENCES
    while many - enough > 1:
        middle = (enough + many) // 2
        enough, many = (middle, many) if fits(middle) else (enough, middle)
    return enough
