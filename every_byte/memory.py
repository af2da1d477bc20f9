"""The seam between a GPU and its accounting: what a card's memory has to offer.

`every_byte.gpu.GPU` shows it under ``torch.cuda``'s names, and
`every_byte.tracker.Tracker` says what each of its bytes is for. Two memories
have it: `every_byte.cuda.CudaMemory` asks the card, `every_byte.virtual.VirtualMemory`
replays it. All sizes are bytes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch

from every_byte.allocator import SegmentInfo


class DeviceMemory(Protocol):
    """A card's memory, as PyTorch's caching allocator holds it."""

    device: torch.device
    """Whose tensors lie in it."""

    is_replayed: bool
    """Whether `malloc` and `free` decide what is allocated. A real card may also hold
    what was never seen made."""

    # The names of torch.cuda

    def memory_allocated(self) -> int:
        """Bytes in blocks handed out."""

    def memory_reserved(self) -> int:
        """Bytes in segments held."""

    def memory_requested(self) -> int:
        """Bytes asked for, before rounding (``requested_bytes`` of ``memory_stats()``)."""

    def max_memory_allocated(self) -> int:
        """Peak of `memory_allocated` since the start or the last reset."""

    def max_memory_reserved(self) -> int:
        """Peak of `memory_reserved` since the start or the last reset."""

    def reset_peak_memory_stats(self) -> None:
        """Let the peaks start again from the current values."""

    def empty_cache(self) -> None:
        """Give back wholly free segments."""

    def mem_get_info(self) -> tuple[int, int]:
        """Bytes free on the card, and all it has."""

    def memory_snapshot(self) -> list[SegmentInfo]:
        """Segments by address, each with its blocks, as ``torch.cuda.memory_snapshot``."""

    def snapshot(self) -> dict[str, Any]:
        """Segments and what was recorded, as ``torch.cuda.memory._snapshot``."""

    def record_memory_history(self, enabled: Literal["all"] | None, max_entries: int) -> None:
        """Begin or end to note what the allocator does."""

    def clear_cublas_workspaces(self) -> None:
        """Free cuBLAS's workspaces."""

    # What the accounting asks for

    def malloc(self, nbytes: int) -> int | None:
        """Take a new storage's bytes; a handle for `free`. None where the card did it itself."""

    def free(self, handle: int) -> None:
        """Give back what `malloc` took."""

    def kernel(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """A function to run in an operation's place, allocation by allocation; None for most."""

    def computed(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Take what an operation takes beside its results, after these were taken."""

    def in_use(self) -> AbstractContextManager[object]:
        """What has to hold while a program runs on this memory."""

    def in_thread(self) -> AbstractContextManager[object]:
        """What has to hold in each thread that the program starts meanwhile, besides."""
