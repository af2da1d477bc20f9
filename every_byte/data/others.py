"""GPUs that the estimator counts by rules: AMD's, Apple's, and memory that is shared.

Nothing of them was measured here. Each rule is a bound by its source, so that "fits" is not
said too early; the estimator writes "estimated" on all of them.
"""

from dataclasses import dataclass, replace
from functools import cache

from every_byte.data import CONTEXT, Card, cards, kept_by_driver, read
from every_byte.units import GiB, KiB, MiB

RULES = {
    "AMD": "ROCm has PyTorch's own allocator. Its workspace is that of PyTorch's source, its "
    "context is taken to be as large as the one that CUDA has on an H200.",
    "Apple": "Metal recommends at most two thirds of a Mac's memory up to 32 GB, three quarters "
    "beyond; newer versions of macOS allow a little more. PyTorch's allocator for it has other "
    "rules, and what CUDA has as a context is set aside.",
    "unified": "Its memory is shared with the processor: for the system a fifth is set aside, "
    "16 GiB at most.",
}
"""What is said of a card by its kind.

AMD: `WORKSPACES`. Apple: ``recommendedMaxWorkingSetSize`` as logs of llama.cpp tell it,
10,922.67 MiB of 16 GiB (its CI's), 21,845.34 of 32 (ggml-org/llama.cpp#2011), 73,728 of 96
(#3213); a Mac with 32 GB and a newer macOS tells 25,559. Unified: the rule of
unslothai/unsloth#7960 for memory that the system needs as well.
"""

WORKSPACES = 128 * MiB, 32 * MiB
"""Bytes of rocBLAS's workspace: on gfx94x and gfx95x, and on others
(``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``)."""

LT_WORKSPACE = 76 * MiB
"""Bytes of hipBLASLt's (``aten/src/ATen/cuda/CUDABlas.cpp``, ``_parseChosenWorkspaceSize``)."""

SHOWN = 92, 100
"""The part of shared memory that programs are told in all, where no log tells it: less than
on the Jetsons of which one does, 92.5 to 96 %."""


SHARED = ("GB10",)  # of the CUDA cards those that share their memory


@dataclass(frozen=True, slots=True)
class OtherCard(Card):
    """A card that follows one of `RULES`.

    Attributes:
        kind: of which rule.
    """

    kind: str = "AMD"

    @property
    def context(self) -> int:
        """Bytes of what the driver holds for a process, as on CUDA; hipBLASLt's workspace too."""
        return CONTEXT + LT_WORKSPACE * (self.kind == "AMD")

    @property
    def cublas_workspace(self) -> int:
        """Bytes of each thread's workspace for products of matrices."""
        if self.kind == "AMD":
            return WORKSPACES[not self.compute_capability.startswith(("gfx94", "gfx95"))]
        return 8320 * KiB


def shared_with_system(shown: int) -> int:
    """Bytes for a GPU of memory that it shares: less a fifth for the system, 16 GiB at most."""
    return shown - min(shown // 5, 16 * GiB)


def recommended_by_metal(memory: int) -> int:
    """Bytes that Metal recommends for a GPU, of a Mac's memory."""
    return memory * 2 // 3 if memory <= 32 * GiB else memory * 3 // 4


@cache
def other_cards() -> dict[str, OtherCard]:
    """Name: card of ``every_byte/data/other_cards.toml``."""
    found = {}
    for name, given in read("other_cards.toml").items():
        memory, kind = given["sold"] * GiB, given["kind"]
        told = given.get("shown", 0) * MiB
        if kind == "unified":
            told = shared_with_system(told or memory * SHOWN[0] // SHOWN[1])
        elif kind == "Apple":
            told = recommended_by_metal(memory)
        elif told:
            told -= kept_by_driver(told)
        found[name] = OtherCard(
            given["sold"],
            memory,
            given.get("architecture", ""),
            given.get("units", 0),
            available=told,
            kind=kind,
        )
    return found


@cache
def all_cards() -> dict[str, Card]:
    """The CUDA cards by memory, then all others; shared memory counted as such."""
    known: dict[str, Card] = {**cards(), **other_cards()}
    for name in SHARED:
        known[name] = replace(known[name], available=shared_with_system(known[name].memory))
    return known


def kind_of(name: str) -> str:
    """Which of `RULES` a card is counted by; empty for the others."""
    if name in SHARED:
        return "unified"
    known = other_cards().get(name)
    return known.kind if known else ""
