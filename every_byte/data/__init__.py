"""What is known of models and cards: data files, each figure with its source."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        sold: the "GB" that it is sold with.
        memory: bytes that it has.
        compute_capability: such as ``"9.0"``.
        multiprocessors: how many it has.
        measured: with what its kernels' allocations were measured; empty if they were not.
    """

    sold: int
    memory: int
    compute_capability: str
    multiprocessors: int
    measured: str = ""

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


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__name__).joinpath(name).read_text("utf-8"))


@cache
def cards() -> dict[str, Card]:
    """Name: card of the data file (``every_byte/data/cards.toml``), by memory."""
    return {name: Card(**card) for name, card in _read("cards.toml").items()}


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Name: what the data file says of a model (``every_byte/data/models.toml``)."""
    return _read("models.toml")


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Name: sizes of all models of the estimator: `known_models`, and more of today's.

    Of ``every_byte/data/catalogue.toml``, where models of the same sizes stand together.
    """
    models = dict(known_models())
    for sizes in _read("catalogue.toml")["sizes"]:
        for address in sizes["names"]:
            name = address.rpartition("/")[2]
            models[name] = {k: v for k, v in sizes.items() if k not in ("names", "counted")}
            models[name]["source"] = f"https://huggingface.co/{address}"
    return models
