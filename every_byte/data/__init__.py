"""What is known of models and cards: data files, each figure with its source."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

CONTEXT = 726_466_560
"""The CUDA context, in bytes: measured on an H200 with PyTorch 2.11 (CUDA 13.0), after
products, attention and cuDNN, with CUDA's modules loaded as they are needed (the default).
Published for an A100 with PyTorch 2.1: 0.47 GiB, and 0.92 GiB with all modules loaded
(Bekman, Machine Learning Engineering, https://github.com/stas00/ml-engineering)."""

KEPT_BY_DRIVER = 32, 9 * 2**30 // 10  # a 32nd of the memory, and so many bytes at most

CONTEXT_MULTIPROCESSORS = 132  # of the card that it was measured on


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        sold: the "GB" that it is sold with.
        memory: bytes that it has, as nvidia-smi shows them.
        compute_capability: such as ``"9.0"``.
        multiprocessors: how many it has.
        measured: with what its kernels' allocations were measured; empty if they were not.
        available: bytes that ``torch.cuda.mem_get_info()`` tells of it, where that was
            measured; see `usable`.
        measured_context: bytes of the CUDA context, where it was measured; see `context`.
    """

    sold: int
    memory: int
    compute_capability: str
    multiprocessors: int
    measured: str = ""
    available: int = 0
    measured_context: int = 0

    @property
    def usable(self) -> int:
        """Bytes that programs can have: its memory less what the driver keeps for itself.

        Measured where `available` is, else what is left after a bound on it: see
        `kept_by_driver`.
        """
        return self.available or self.memory - kept_by_driver(self.memory)

    @property
    def context(self) -> int:
        """Bytes of the CUDA context: measured on the H100 and H200, estimated on other cards.

        It grows with the card's multiprocessors, for CUDA sets memory aside for all
        threads that they can run: in proportion on cards with more than the H200 has.
        On those with fewer the H200's, which is a bound.
        """
        if self.measured_context:
            return self.measured_context
        more = max(self.multiprocessors, CONTEXT_MULTIPROCESSORS)
        return -(-CONTEXT * more // CONTEXT_MULTIPROCESSORS)

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability as two numbers."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def cublas_workspace(self) -> int:
        """Bytes of each thread's cuBLAS workspace by default, in PyTorch from 2.11 on.

        32 MiB for Hopper and Blackwell, else 2 x 4096 + 8 x 16 KiB
        (``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``).
        """
        return (32 << 20) if self.capability[0] in (9, 10, 11, 12) else (8320 << 10)


def kept_by_driver(memory: int) -> int:
    """The most that the driver keeps of a card's bytes: a 32nd, and 0.9 GiB at most.

    A bound over what messages of "CUDA out of memory" show as capacity, in GiB:
    T4 14.56 of 15 (https://github.com/Zheng-Chong/CatVTON/issues/133), RTX 3060 11.75
    of 12 (https://github.com/Kunhao-Liu/StyleGaussian/issues/12), RTX 4090 23.52 of 24
    (https://github.com/Soul-AILab/SoulX-FlashTalk/issues/5), RTX 5090 31.36 of 32
    (https://github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20), A100 39.5 of 40
    (https://github.com/TianheWu/CoSeR/issues/10) and 79.14 of 80
    (https://github.com/lianqi1008/Control-GIC/issues/6). On the H200 it is 0.6 GiB.
    """
    part, most = KEPT_BY_DRIVER
    return min(memory // part, most)


def read(name: str) -> dict[str, Any]:
    """A data file of this package, as TOML holds it."""
    return tomllib.loads(resources.files(__name__).joinpath(name).read_text("utf-8"))


@cache
def cards() -> dict[str, Card]:
    """Name: card of the data file (``every_byte/data/cards.toml``), by memory."""
    return {
        name: Card(**{figure: of for figure, of in card.items() if figure != "sources"})
        for name, card in read("cards.toml").items()
    }


_ALSO_NAMED = {"RTX 4050": "RTX 4050 Laptop", "H100 80GB HBM3": "H100"}
"""Other names of cards: there is no other RTX 4050; the driver's name of the H100 (SXM)."""


def named(name: str) -> str | None:
    """The name in `cards` of a card as people, or ``torch.cuda.get_device_name()``, call it.

    None if it is not there.
    """
    plain = name.removeprefix("NVIDIA ")
    found = _ALSO_NAMED.get(plain, plain)
    return found if found in cards() else None


def context_of(name: str) -> int:
    """Bytes of the CUDA context on a card, by its name: see `Card.context`; else `CONTEXT`."""
    known = named(name)
    return CONTEXT if known is None else cards()[known].context


def unknown_card(memory: int) -> Card:
    """A card of so many bytes of which nothing else is known: with what is most elsewhere."""
    return Card(memory >> 30, memory, "9.0", CONTEXT_MULTIPROCESSORS)


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Name: what the data file says of a model (``every_byte/data/models.toml``)."""
    return read("models.toml")


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Name: sizes of all models of the estimator: `known_models`, and more of today's.

    Of ``every_byte/data/catalogue.toml``, where models of the same sizes stand together.
    """
    models = dict(known_models())
    for sizes in read("catalogue.toml")["sizes"]:
        for address in sizes["names"]:
            name = address.rpartition("/")[2]
            models[name] = {k: v for k, v in sizes.items() if k not in ("names", "counted")}
            models[name]["source"] = f"https://huggingface.co/{address}"
    return models
