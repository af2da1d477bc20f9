"""A virtual card's memory: PyTorch's caching allocator, replayed, and cuBLAS's workspaces."""

import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import count
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from every_byte.allocator import CachingAllocator, Downwards
from every_byte.tracker import in_backward, untracked
from every_byte.units import KiB, binary
from every_byte.virtual import kernels, patches
from every_byte.virtual.autocast import autocast_key, cuda_autocast
from every_byte.virtual.rules import CUBLASLT_WORKSPACE, Rules
from every_byte.virtual.values import Values, has_masks, index

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


class _Thread(threading.local):
    """What PyTorch holds for each thread: its stream in use, and its cuBLAS handle."""

    stream = 0
    cublas_handle: "_CublasHandle | None" = None


class _CublasHandle:
    """A cuBLAS handle, which a thread takes for as long as it lives."""

    def __init__(self, number: int) -> None:
        self.number = number


class VirtualMemory(CachingAllocator):
    """The memory of a card of PyTorch's ``meta`` device; see `every_byte.memory.DeviceMemory`.

    Args:
        name: what the card calls itself.
        capacity, alloc_conf, context: see `every_byte.allocator.CachingAllocator`.
        rules: of the card that it plays; without, only what all cards have in common.
        note: what its figures are, for people.
        values: what happens where a program reads an unknown value; see
            `every_byte.virtual.values.Values`.
    """

    is_replayed = True

    # The operations that cuBLAS carries out on CUDA.
    _matrix_products = frozenset(
        getattr(torch.ops.aten, name)
        for name in (
            *("mm", "addmm", "addmm_", "_addmm_activation", "bmm", "baddbmm", "baddbmm_"),
            *("addbmm", "addbmm_", "mv", "addmv", "addmv_", "dot", "vdot", "_scaled_mm"),
        )
    )

    def __init__(
        self,
        name: str,
        capacity: int | None = None,
        alloc_conf: str = "",
        context: int = 0,
        rules: Rules | None = None,
        note: str = "no CUDA device in use, figures are replayed",
        values: Literal["assume", "refuse"] = "refuse",
    ) -> None:
        self.values = Values(values)
        placement = None if rules is None else Downwards()
        super().__init__(capacity, alloc_conf, context, placement)
        self.name, self.rules, self._note = name, rules, note
        self.estimates: dict[str, None] = {}  # what the figures contain that is no rule, in order
        self.default_workspace: int | None = None if rules is None else rules.cublas_workspace
        self.device = torch.device("meta")
        self._streams = count(1)  # numbers for those that a program makes
        self._thread = _Thread()
        self._lock = threading.Lock()  # held while the allocator works
        self._to_free: deque[int] = deque()  # by finalizers: they run in any thread, at any time
        self._idle_cublas_handles: list[int] = []
        self._cublas_handles = count(1)
        # of (cuBLAS handle, stream): the block; handle 0 is the autograd thread's
        self._workspaces: dict[tuple[int, int], int] = {}
        self._cublaslt_workspaces: dict[tuple[int, int], int] = {}  # where it has its own

    def __str__(self) -> str:
        size = "" if self.capacity is None else f", {binary(self.capacity)}"
        return f"{self.name}{size}: {self._note}"

    def new_stream(self) -> int:
        """A number for a stream that a program makes."""
        return next(self._streams)

    @property
    def stream(self) -> int:
        """The stream that this thread makes tensors on; 0 is the default stream."""
        return self._thread.stream

    @stream.setter
    def stream(self, number: int) -> None:
        self._thread.stream = number

    @override
    def malloc(self, nbytes: int, stream: int | None = None) -> int:
        with self._lock:
            handle = super().malloc(nbytes, self.stream if stream is None else stream)
        self._free_waiting()
        return handle

    @override
    def free(self, handle: int) -> None:
        # Python may collect a tensor, and call this, in the middle of malloc: then it waits.
        self._to_free.append(handle)
        self._free_waiting()

    def _free_waiting(self) -> None:
        while self._to_free and self._lock.acquire(blocking=False):
            try:
                while self._to_free:
                    super().free(self._to_free.popleft())
            finally:
                self._lock.release()

    def kernel(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """What allocates in an operation's place as CUDA's kernel does.

        Raises:
            NotImplementedError: a parameter is copied that bitsandbytes quantises.
        """
        if operation is torch.ops.aten._to_copy.default:
            patches.refuse_quantised(args[0])
        if has_masks(operation, args):
            return index
        kernel = kernels.kernel_of(operation, self.rules)
        if kernel is None:
            return None
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        if not any(t.is_meta for t in tensors):
            return None  # the host has its own
        if estimate := kernels.estimate_in(operation):
            self.estimates[estimate] = None
        return self.values.beside(operation, kernel)

    def computed(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Take what an operation borrows, and cuBLAS's workspaces at the first products."""
        results = (result,) if isinstance(result, torch.Tensor) else tree_leaves(result)
        if not any(isinstance(t, torch.Tensor) and t.is_meta for t in results):
            return
        held = list[int]()
        if self.rules is not None:
            with untracked():
                sizes = kernels.temporaries(operation, args, kwargs, self.rules)
            for size in sizes:
                if size < 0:
                    self.free(held.pop())
                else:
                    held.append(self.malloc(size))
        if operation.overloadpacket in self._matrix_products:
            held += self._take_workspaces(operation, args)
        while held:
            self.free(held.pop())

    def _take_workspaces(self, operation: Any, args: tuple[Any, ...]) -> list[int]:
        """What a product takes for cuBLAS, after its result's block; what goes back after it."""
        key = self._cublas_handle(), self.stream
        if key not in self._workspaces:
            config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
            size = self.default_workspace
            if config is not None or size is None:
                size = cublas_workspace_size(config or CUBLAS_WORKSPACE)
            self._workspaces[key] = self.malloc(size)
        if self.rules is not None and kernels.by_cublaslt(operation, args):
            if self.rules.cublaslt_workspace == "temporary":
                return [self.malloc(CUBLASLT_WORKSPACE)]
            own = self.rules.cublaslt_workspace == "own"
            if own and key not in self._cublaslt_workspaces:
                self._cublaslt_workspaces[key] = self.malloc(CUBLASLT_WORKSPACE)
        return []

    def _cublas_handle(self) -> int:
        """This thread's: another's that has ended, or a new one.

        As ``getCurrentCUDABlasHandle`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp`` and
        ``DeviceThreadHandlePool`` in ``aten/src/ATen/cuda/detail/DeviceThreadHandles.h``.
        """
        if in_backward():  # on CUDA in a thread of its own, which serves all
            return 0
        if self._thread.cublas_handle is None:
            idle = self._idle_cublas_handles
            taken = _CublasHandle(idle.pop() if idle else next(self._cublas_handles))
            weakref.finalize(taken, idle.append, taken.number).atexit = False
            self._thread.cublas_handle = taken
        return self._thread.cublas_handle.number

    def clear_cublas_workspaces(self) -> None:
        """Free cuBLAS's workspaces; the next product of each thread takes its own again."""
        for workspaces in (self._workspaces, self._cublaslt_workspaces):
            while workspaces:
                self.free(workspaces.popitem()[1])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let PyTorch treat the ``meta`` device as it treats CUDA.

        Raises:
            RuntimeError: PyTorch lacks a name that this needs.
        """
        patches.check()
        # PyTorch's optimizers and meta kernels import it at their first use (1 s, 165 MB):
        # here, where no operation is looked at.
        import_module("torch._dynamo")
        with ExitStack() as stack:
            stack.enter_context(patches.optimizers_as_on_cuda())
            stack.enter_context(patches.modules_move_as_on_cuda(self.rules is not None))
            stack.enter_context(patches.recurrent_weights_are_flat())
            stack.enter_context(patches.paged_states_lie_on_the_host(self.estimates))
            stack.enter_context(patches.nothing_is_compiled())
            stack.enter_context(patches.only_dense_tensors())
            stack.enter_context(patches.no_fast_path(self.estimates))
            stack.enter_context(patches.fake_tensors_take_nothing())
            stack.enter_context(patches.four_bits_are_refused())
            stack.enter_context(cuda_autocast())
            stack.enter_context(self.values.running())
            stack.enter_context(self.in_thread())
            stack.enter_context(kernels.registered(self.rules))
            yield

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Let autocast's kernels be called, and values be kept."""
        with autocast_key(), self.values.seeing():
            yield
