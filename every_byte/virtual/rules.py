"""What a card and a version of PyTorch decide: the numbers that follow from them."""

from dataclasses import dataclass

import torch

from every_byte.data import Card
from every_byte.units import KiB, MiB

# Threads that a multiprocessor can hold ("Maximum number of resident threads per SM" in
# the CUDA C++ Programming Guide, table of technical specifications per compute capability).
_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}

CUBLASLT_WORKSPACE = 1 * MiB  # _parseChosenWorkspaceSize in aten/src/ATen/cuda/CUDABlas.cpp


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one card under one version of PyTorch.

    Attributes:
        compute_capability: of the card, such as (9, 0).
        multiprocessors: how many it has.
        version: of PyTorch, such as (2, 11).
    """

    compute_capability: tuple[int, int]
    multiprocessors: int
    version: tuple[int, int]

    @classmethod
    def of(cls, card: Card, torch_version: str | None = None) -> "Rules":
        """A card's rules under a version such as ``"2.11"``; the installed one if None.

        Raises:
            TypeError: it is no text.
            ValueError: the text is no version that is covered.
        """
        if not isinstance(torch_version, str | None):
            raise TypeError(f"torch is {torch_version!r}: expected text (str) such as '2.11'")
        text = torch_version or torch.__version__
        try:
            major, minor = (int(part) for part in text.split(".")[:2])
        except ValueError:
            major = minor = 0
        if not (2, 1) <= (major, minor) < (3, 0):
            raise ValueError(f"torch is {text!r}: expected a version from '2.1' on, below '3'")
        return cls(card.capability, card.multiprocessors, (major, minor))

    @property
    def older(self) -> str:
        """What is not the version's own, in words; empty from 2.4 on.

        Workspaces of 2.1 are those of 2.4 (``CublasHandlePool.cpp``, ``CUDABlas.cpp``), and so is
        the allocator's rounding; attention had other kernels, and `rms_norm` none.
        """
        return "" if self.version >= (2, 4) else "; attention and norms as in torch 2.4"

    @property
    def threads(self) -> int:
        """Threads that a multiprocessor can hold."""
        return _THREADS.get(self.compute_capability, 2048)

    @property
    def cublas_workspace(self) -> int:
        """Bytes of each thread's cuBLAS workspace where ``CUBLAS_WORKSPACE_CONFIG`` is not set.

        ``parseChosenWorkspaceSize`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp``: more for
        Hopper; for Blackwell since the version that says so, which is taken to be 2.11.
        """
        major = self.compute_capability[0]
        if major == 9 or (major in (10, 11, 12) and self.version >= (2, 11)):
            return 32 * MiB
        return (2 * 4096 + 8 * 16) * KiB

    @property
    def cublaslt_workspace(self) -> str:
        """What cuBLASLt does for its workspace: "temporary", "own", or "shared".

        For each call its own until 2.8; then one that is kept (pytorch#156495); since 2.12
        cuBLAS's (pytorch#168175, merged in January 2026; 2.11 was measured without it).
        """
        if self.version < (2, 9):
            return "temporary"
        return "own" if self.version < (2, 12) else "shared"

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether cuDNN's attention comes first: on 9.0 and 10.x.

        ``check_prefer_cudnn_attention`` in ``.../transformers/cuda/sdp_utils.cpp``; since 2.5.
        """
        return self.compute_capability[0] in (9, 10) and self.version >= (2, 5)
