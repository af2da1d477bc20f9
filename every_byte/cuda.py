"""A real card's memory: what ``torch.cuda`` says of the first CUDA device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from every_byte.allocator import SegmentInfo
from every_byte.units import binary


class CudaMemory:
    """The memory of the first CUDA device, measured; see `every_byte.memory.DeviceMemory`."""

    is_replayed = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)

    def __str__(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        return (
            f"{properties.name}, {binary(properties.total_memory)}, "
            f"compute capability {properties.major}.{properties.minor}: figures are measured"
        )

    def memory_allocated(self) -> int:
        """As ``torch.cuda.memory_allocated``."""
        return torch.cuda.memory_allocated(self.device)

    def memory_reserved(self) -> int:
        """As ``torch.cuda.memory_reserved``."""
        return torch.cuda.memory_reserved(self.device)

    def memory_requested(self) -> int:
        """Bytes asked for and not yet freed, before rounding."""
        return torch.cuda.memory_stats(self.device).get("requested_bytes.all.current", 0)

    def max_memory_allocated(self) -> int:
        """As ``torch.cuda.max_memory_allocated``."""
        return torch.cuda.max_memory_allocated(self.device)

    def max_memory_reserved(self) -> int:
        """As ``torch.cuda.max_memory_reserved``."""
        return torch.cuda.max_memory_reserved(self.device)

    def reset_peak_memory_stats(self) -> None:
        """As ``torch.cuda.reset_peak_memory_stats``."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        """As ``torch.cuda.empty_cache``."""
        torch.cuda.empty_cache()

    def mem_get_info(self) -> tuple[int, int]:
        """As ``torch.cuda.mem_get_info``."""
        return torch.cuda.mem_get_info(self.device)

    def memory_snapshot(self) -> list[SegmentInfo]:
        """As ``torch.cuda.memory_snapshot``, of this device, by address."""
        segments = torch.cuda.memory_snapshot()
        return sorted(
            (s for s in segments if s["device"] == self.device.index), key=lambda s: s["address"]
        )

    def snapshot(self) -> dict[str, Any]:
        """As ``torch.cuda.memory._snapshot``."""
        return torch.cuda.memory._snapshot()

    def record_memory_history(
        self, enabled: Literal["all"] | None = "all", max_entries: int = sys.maxsize
    ) -> None:
        """As ``torch.cuda.memory._record_memory_history``, with Python's frames."""
        torch.cuda.memory._record_memory_history(enabled, stacks="python", max_entries=max_entries)

    def clear_cublas_workspaces(self) -> None:
        """As ``torch._C._cuda_clearCublasWorkspaces``."""
        torch._C._cuda_clearCublasWorkspaces()

    def malloc(self, nbytes: int) -> int | None:
        """Nothing: the card has taken it already."""
        return None

    def free(self, handle: int) -> None:
        """Nothing: the card gives it back itself."""

    def kernel(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """None: the card has its own."""
        return None

    def computed(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Nothing: what an operation takes beside its results, the card takes itself."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Wake the card: some of ``torch.cuda``'s memory functions refuse to work before."""
        torch.cuda.init()
        yield

    def in_thread(self) -> AbstractContextManager[None]:
        """Nothing: the card is the same for each."""
        return nullcontext()
