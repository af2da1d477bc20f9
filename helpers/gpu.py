"""One interface, two GPUs: the real one, and a virtual one that needs no hardware.

`open_gpu` gives a `CudaGPU` where CUDA is available, else a `VirtualGPU`. Both
answer with ``torch.cuda``'s names, in bytes, and with `helpers.accounting` both
can say what each byte is for.

The virtual one computes on PyTorch's ``meta`` device: every operation goes
through PyTorch's dispatcher with its shapes and dtypes, but without storage.
Each storage's birth and death is replayed on `helpers.allocator`.
"""

import os
import pickle
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from unittest import mock

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from helpers import cuda_kernels
from helpers.accounting import KINDS, Breakdown, Timeline, Tracker, in_backward
from helpers.allocator import CachingAllocator, SegmentInfo
from helpers.autocast import cuda_autocast
from helpers.units import KiB, binary
from helpers.without_dynamo import without_dynamo

# The default of every NVIDIA chip but Hopper and newer, fixed for all of them:
# 2 buffers of 4096 KiB and 8 of 16 KiB.
CUBLAS_WORKSPACE = ":4096:2:16:8"


def cublas_workspace_size(config: str) -> int:
    """Bytes that PyTorch allocates for a ``CUBLAS_WORKSPACE_CONFIG`` such as ``:4096:2:16:8``.

    Pairs of size in KiB and count (``parseChosenWorkspaceSize`` in PyTorch's
    ``aten/src/ATen/cuda/CublasHandlePool.cpp``).

    Raises:
        ValueError: `config` has no such pair.
    """
    pairs = re.findall(r":(\d+):(\d+)", config)
    if not pairs:
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG is {config!r}: expected pairs of KiB and count "
            f"such as {CUBLAS_WORKSPACE!r}"
        )
    return sum(int(size) * KiB * int(count) for size, count in pairs)


class GPU(ABC):
    """What `CudaGPU` and `VirtualGPU` share: opening, closing, accounting.

    While open (``with gpu:``, or `open` until `close`) it accounts for the tensors
    on its device. The one opened last is the one in use.
    """

    device: torch.device
    _replays = False
    _stream = 0  # that tensors are made on, where streams are replayed

    _open: ClassVar[list["GPU"]] = []

    def __init__(self) -> None:
        self._tracker = Tracker(self, in_use=lambda: GPU._open[-1:] == [self])
        self._stack = ExitStack()
        self._streams = count(1)  # numbers for those that are made

    def open(self) -> Self:
        """Begin to account for the device's memory. Returns itself.

        Raises:
            RuntimeError: it is open already.
        """
        if self in GPU._open:
            raise RuntimeError(f"{self} is open already: close() it first")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        with ExitStack() as stack:
            self._enter(stack)
            begins = register_optimizer_step_pre_hook(partial(self._optimizer_runs, True))
            stack.callback(begins.remove)
            ends = register_optimizer_step_post_hook(partial(self._optimizer_runs, False))
            stack.callback(ends.remove)
            GPU._open.append(self)
            stack.callback(GPU._open.remove, self)
            stack.enter_context(self._tracker.seeing_resizes())
            stack.enter_context(self._tracker)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Stop looking. Tensors that live on stay accounted for. Harmless if closed.

        Raises:
            RuntimeError: a GPU opened later is still open.
        """
        if self in GPU._open:
            if GPU._open[-1] is not self:
                raise RuntimeError(f"{GPU._open[-1]} was opened later: close it first")
            self._stack.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # What each byte is for

    def breakdown(
        self,
        model: torch.nn.Module | None = None,
        *optimizers: torch.optim.Optimizer | None,
    ) -> Breakdown:
        """What the allocated bytes are for; see `helpers.accounting.Tracker.breakdown`."""
        return self._tracker.breakdown(model, *optimizers)

    def record(
        self,
        model: torch.nn.Module | None = None,
        *optimizers: torch.optim.Optimizer | None,
    ) -> AbstractContextManager[Timeline]:
        """What each operation does to memory; see `helpers.accounting.Tracker.record`.

        Raises:
            RuntimeError: the GPU is not open, or another recording is under way.
        """
        if self not in GPU._open:
            raise RuntimeError(f"{self} cannot record: open() it first")
        return self._tracker.record(model, *optimizers)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Let what is made meanwhile be of a kind, where `breakdown` cannot tell it.

        Raises:
            ValueError: `kind` is none of `helpers.accounting.KINDS`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
        before, self._tracker.making = self._tracker.making, kind
        try:
            yield
        finally:
            self._tracker.making = before

    # The names of torch.cuda

    @abstractmethod
    def memory_allocated(self) -> int:
        """Bytes in blocks handed out, as ``torch.cuda.memory_allocated``."""

    @abstractmethod
    def memory_reserved(self) -> int:
        """Bytes in segments held, as ``torch.cuda.memory_reserved``."""

    @abstractmethod
    def max_memory_allocated(self) -> int:
        """Peak of `memory_allocated`, as ``torch.cuda.max_memory_allocated``."""

    @abstractmethod
    def max_memory_reserved(self) -> int:
        """Peak of `memory_reserved`, as ``torch.cuda.max_memory_reserved``."""

    @abstractmethod
    def reset_peak_memory_stats(self) -> None:
        """Let the peaks start again, as ``torch.cuda.reset_peak_memory_stats``."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give back wholly free segments, as ``torch.cuda.empty_cache``."""

    @abstractmethod
    def memory_snapshot(self) -> list[SegmentInfo]:
        """Segments and their blocks, as ``torch.cuda.memory_snapshot``."""

    @abstractmethod
    def mem_get_info(self) -> tuple[int, int]:
        """Bytes free on the card, and all it has, as ``torch.cuda.mem_get_info``."""

    @abstractmethod
    def record_memory_history(
        self, enabled: Literal["all"] | None = "all", max_entries: int = sys.maxsize
    ) -> None:
        """Begin to note what the allocator does, and where in the program.

        As ``torch.cuda.memory._record_memory_history``, with Python's frames.

        Args:
            enabled: None ends it, and forgets what was noted.
            max_entries: how many things to keep: the last ones.

        Raises:
            ValueError: `enabled` or `max_entries` is wrong.
        """

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """Segments, blocks and what was noted, as ``torch.cuda.memory._snapshot``."""

    def dump_snapshot(self, filename: str | Path = "dump_snapshot.pickle") -> None:
        """Write `snapshot` to a file, as ``torch.cuda.memory._dump_snapshot``.

        ``python -m torch.cuda._memory_viz`` and https://pytorch.org/memory_viz read it.

        Raises:
            OSError: the file cannot be written.
        """
        with open(filename, "wb") as file:
            pickle.dump(self.snapshot(), file, protocol=4)  # the newest that the page reads

    @abstractmethod
    def clear_cublas_workspaces(self) -> None:
        """Free cuBLAS's workspaces, as ``torch._C._cuda_clearCublasWorkspaces``.

        The next matrix product of each thread allocates its own again.
        """

    @abstractmethod
    def _memory_requested(self) -> int:
        """Bytes asked for, before rounding (``requested_bytes`` of ``torch.cuda.memory_stats``)."""

    # What the two kinds of GPU do in their own ways

    def _enter(self, stack: ExitStack) -> None:
        """Put into force what holds while this GPU is open."""

    def _malloc(self, nbytes: int) -> int | None:
        """Take a new storage's bytes from the replayed allocator, where there is one."""
        return None

    def _free(self, handle: int) -> None:
        """Give back to the replayed allocator what `_malloc` took."""

    def _kernel(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """What is to run in an operation's place, where its allocations are replayed."""
        return None

    def _computed(self, operation: Any, result: Any) -> None:
        """Take what an operation takes beside its results, where it is replayed."""

    def _optimizer_runs(self, now: bool, *_: object) -> None:
        self._tracker.in_optimizer = now


class CudaGPU(GPU):
    """The first CUDA device, measured.

    Open it before anything is allocated: it accounts for the tensors it has
    seen made, and calls the rest of the allocated bytes workspaces.

    Raises:
        RuntimeError: PyTorch sees no CUDA device.
    """

    def __init__(self) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch.cuda.is_available() is False: CudaGPU needs an NVIDIA GPU and a CUDA "
                "build of PyTorch; VirtualGPU() needs neither"
            )
        self.device = torch.device("cuda", 0)

    @override
    def _enter(self, stack: ExitStack) -> None:
        torch.cuda.init()  # some of torch.cuda's memory functions refuse to work before

    def __str__(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        return (
            f"{properties.name}, {binary(properties.total_memory)}, "
            f"compute capability {properties.major}.{properties.minor}: figures are measured"
        )

    @override
    def memory_allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @override
    def memory_reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    @override
    def max_memory_allocated(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    @override
    def max_memory_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    @override
    def reset_peak_memory_stats(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    @override
    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    @override
    def memory_snapshot(self) -> list[SegmentInfo]:
        segments = torch.cuda.memory_snapshot()
        return sorted(
            (s for s in segments if s["device"] == self.device.index), key=lambda s: s["address"]
        )

    @override
    def mem_get_info(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)

    @override
    def record_memory_history(
        self, enabled: Literal["all"] | None = "all", max_entries: int = sys.maxsize
    ) -> None:
        torch.cuda.memory._record_memory_history(enabled, stacks="python", max_entries=max_entries)

    @override
    def snapshot(self) -> dict[str, Any]:
        return torch.cuda.memory._snapshot()

    @override
    def clear_cublas_workspaces(self) -> None:
        torch._C._cuda_clearCublasWorkspaces()

    @override
    def _memory_requested(self) -> int:
        return torch.cuda.memory_stats(self.device).get("requested_bytes.all.current", 0)


class VirtualGPU(GPU):
    """A GPU of PyTorch's ``meta`` device and a model of its caching allocator.

    Args:
        capacity: bytes that it has; no bound if None. Past it, operations raise
            ``torch.OutOfMemoryError`` as on CUDA.
        name: what it calls itself.
        alloc_conf: settings as in ``PYTORCH_ALLOC_CONF``, which itself is not read;
            see `helpers.allocator_config`.
        context: bytes that the process holds beside PyTorch's, as a CUDA context does.

    Raises:
        TypeError, ValueError: an argument is wrong; see `helpers.allocator`.
    """

    _replays = True

    # The operations that cuBLAS carries out on CUDA.
    _matrix_products = frozenset(
        getattr(torch.ops.aten, name)
        for name in (
            *("mm", "addmm", "addmm_", "_addmm_activation", "bmm", "baddbmm", "baddbmm_"),
            *("addbmm", "addbmm_", "mv", "addmv", "addmv_", "dot", "vdot"),
        )
    )

    def __init__(
        self,
        capacity: int | None = None,
        name: str = "Virtual GPU",
        alloc_conf: str = "",
        context: int = 0,
    ) -> None:
        super().__init__()
        self.device = torch.device("meta")
        self.name = name
        self.capacity = capacity
        self._allocator = CachingAllocator(capacity, alloc_conf, context)
        self._workspaces: dict[bool, int] = {}  # of the autograd thread or not: handle

    def __str__(self) -> str:
        size = "" if self.capacity is None else f", {binary(self.capacity)}"
        return f"{self.name}{size}: no CUDA device in use, figures are replayed"

    @override
    def _enter(self, stack: ExitStack) -> None:
        self._workspace_size = cublas_workspace_size(os.environ["CUBLAS_WORKSPACE_CONFIG"])
        # PyTorch's optimizers choose their algorithm by the kind of device: let
        # them choose for this one as they do for CUDA.
        for kind in ("foreach", "fused"):
            name = f"_get_{kind}_kernels_supported_devices"
            devices = [*getattr(_foreach_utils, name)(), "meta"]
            for module in (_foreach_utils, sys.modules[torch.optim.Optimizer.__module__]):
                answer = mock.patch.object(module, name, devices.copy)
                stack.enter_context(answer)
        # ``.to()`` keeps a module's Parameters, and what is tied: on CUDA, and within this
        # device, by ``param.data = ``; on the way from the host only if told to swap them.
        apply = torch.nn.Module._apply
        swaps = torch.__future__.get_swap_module_params_on_conversion()

        def applied(module: Any, fn: Any, recurse: bool = True) -> Any:
            before = torch.__future__.get_swap_module_params_on_conversion()
            comes = any(p is not None and not p.is_meta for p in module._parameters.values())
            with unseen():
                comes = comes and fn(torch.empty(0)).is_meta
            torch.__future__.set_swap_module_params_on_conversion(swaps or comes)
            try:
                return apply(module, fn, recurse)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(before)

        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", applied))
        stack.enter_context(cuda_autocast())
        stack.enter_context(without_dynamo())
        stack.enter_context(cuda_kernels.in_force())

    @override
    def memory_allocated(self) -> int:
        return self._allocator.memory_allocated()

    @override
    def memory_reserved(self) -> int:
        return self._allocator.memory_reserved()

    @override
    def max_memory_allocated(self) -> int:
        return self._allocator.max_memory_allocated()

    @override
    def max_memory_reserved(self) -> int:
        return self._allocator.max_memory_reserved()

    @override
    def reset_peak_memory_stats(self) -> None:
        self._allocator.reset_peak_memory_stats()

    @override
    def empty_cache(self) -> None:
        self._allocator.empty_cache()

    @override
    def memory_snapshot(self) -> list[SegmentInfo]:
        return self._allocator.snapshot()

    @override
    def mem_get_info(self) -> tuple[int, int]:
        return self._allocator.mem_get_info()

    @override
    def record_memory_history(
        self, enabled: Literal["all"] | None = "all", max_entries: int = sys.maxsize
    ) -> None:
        self._allocator.record_memory_history(enabled, max_entries)

    @override
    def snapshot(self) -> dict[str, Any]:
        return self._allocator.memory_snapshot()

    @override
    def clear_cublas_workspaces(self) -> None:
        while self._workspaces:
            self._allocator.free(self._workspaces.popitem()[1])

    @override
    def _memory_requested(self) -> int:
        return self._allocator.memory_requested()

    @override
    def _malloc(self, nbytes: int) -> int:
        return self._allocator.malloc(nbytes, self._stream)

    @override
    def _free(self, handle: int) -> None:
        self._allocator.free(handle)

    @override
    def _kernel(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        kernel = cuda_kernels.KERNELS.get(operation)
        if kernel is None:
            return None
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return kernel if any(t.is_meta for t in tensors) else None  # the host has its own

    @override
    def _computed(self, operation: Any, result: Any) -> None:
        # On CUDA, backward runs in a thread of its own, and each thread's cuBLAS
        # handle takes a workspace at its first product, after the result's block.
        thread = in_backward()
        if operation.overloadpacket in self._matrix_products and thread not in self._workspaces:
            if any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(result)):
                self._workspaces[thread] = self._malloc(self._workspace_size)


@contextmanager
def unseen() -> Iterator[None]:
    """Let what is made meanwhile be on no GPU: models of which only the shapes are wanted."""
    cards = GPU._open[:]
    GPU._open.clear()
    try:
        yield
    finally:
        GPU._open[:] = cards


def open_gpu() -> GPU:
    """The GPU that this machine has, opened: a `CudaGPU`, or else a `VirtualGPU`.

    Call it before the first matrix product: it fixes cuBLAS's workspaces at
    8,519,680 B each, the same on every chip, unless ``CUBLAS_WORKSPACE_CONFIG``
    is set. Called again, it returns the GPU in use.
    """
    if GPU._open:
        return GPU._open[-1]
    return (CudaGPU() if torch.cuda.is_available() else VirtualGPU()).open()
