"""A virtual card's memory: PyTorch's caching allocator, replayed, and cuBLAS's workspaces."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from every_byte.allocator import CachingAllocator, Downwards
from every_byte.tracker import in_backward, untracked
from every_byte.units import KiB, binary
from every_byte.virtual import kernels
from every_byte.virtual.autocast import cuda_autocast
from every_byte.virtual.rules import CUBLASLT_WORKSPACE, Rules
from every_byte.virtual.without_dynamo import without_dynamo

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


class VirtualMemory(CachingAllocator):
    """The memory of a card of PyTorch's ``meta`` device; see `every_byte.memory.DeviceMemory`.

    Args:
        name: what the card calls itself.
        capacity, alloc_conf, context: see `every_byte.allocator.CachingAllocator`.
        rules: of the card that it plays; without, only what all cards have in common.
        note: what its figures are, for people.
    """

    is_replayed = True

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
        name: str,
        capacity: int | None = None,
        alloc_conf: str = "",
        context: int = 0,
        rules: Rules | None = None,
        note: str = "no CUDA device in use, figures are replayed",
    ) -> None:
        placement = None if rules is None else Downwards()
        super().__init__(capacity, alloc_conf, context, placement)
        self.name, self.rules, self._note = name, rules, note
        self.default_workspace: int | None = None if rules is None else rules.cublas_workspace
        self.device = torch.device("meta")
        self.stream = 0  # that tensors are made on
        self._streams = count(1)  # numbers for those that a program makes
        self._workspaces: dict[str, int] = {}  # whose: handle

    def __str__(self) -> str:
        size = "" if self.capacity is None else f", {binary(self.capacity)}"
        return f"{self.name}{size}: {self._note}"

    def new_stream(self) -> int:
        """A number for a stream that a program makes."""
        return next(self._streams)

    @override
    def malloc(self, nbytes: int, stream: int | None = None) -> int:
        return super().malloc(nbytes, self.stream if stream is None else stream)

    def kernel(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """What allocates in an operation's place as CUDA's kernel does."""
        kernel = kernels.kernel_of(operation, self.rules)
        if kernel is None:
            return None
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return kernel if any(t.is_meta for t in tensors) else None  # the host has its own

    def computed(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Take what an operation borrows, and cuBLAS's workspace at a thread's first product."""
        if not any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(result)):
            return
        held = []
        if self.rules is not None:
            with untracked():
                sizes = kernels.temporaries(operation, args, kwargs, self.rules)
            held = [self.malloc(size) for size in sizes]
        if operation.overloadpacket in self._matrix_products:
            held += self._take_workspace(operation, args)
        while held:
            self.free(held.pop())

    def _take_workspace(self, operation: Any, args: tuple[Any, ...]) -> list[int]:
        """The workspace of a product, if it is the first of its kind; what goes back after it."""
        # On CUDA, backward runs in a thread of its own, and each thread's cuBLAS
        # handle takes a workspace at its first product, after the result's block.
        thread = "backward" if in_backward() else "main"
        if thread not in self._workspaces:
            config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
            size = self.default_workspace
            if config is not None or size is None:
                size = cublas_workspace_size(config or CUBLAS_WORKSPACE)
            self._workspaces[thread] = self.malloc(size)
        if self.rules is not None and kernels.by_cublaslt(operation, args):
            if self.rules.cublaslt_workspace == "temporary":
                return [self.malloc(CUBLASLT_WORKSPACE)]
            # One for the process, not for each thread, as measured with 2.11.
            if self.rules.cublaslt_workspace == "own" and "lt" not in self._workspaces:
                self._workspaces["lt"] = self.malloc(CUBLASLT_WORKSPACE)
        return []

    def clear_cublas_workspaces(self) -> None:
        """Free cuBLAS's workspaces; the next product of each thread takes its own again."""
        while self._workspaces:
            self.free(self._workspaces.popitem()[1])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let PyTorch treat the ``meta`` device as it treats CUDA."""
        with ExitStack() as stack:
            # PyTorch's optimizers choose their algorithm by the kind of device: let
            # them choose for this one as they do for CUDA.
            for kind in ("foreach", "fused"):
                name = f"_get_{kind}_kernels_supported_devices"
                devices = [*getattr(_foreach_utils, name)(), "meta"]
                for module in (_foreach_utils, sys.modules[torch.optim.Optimizer.__module__]):
                    answer = mock.patch.object(module, name, devices.copy)
                    stack.enter_context(answer)
            stack.enter_context(_swapping_parameters())
            stack.enter_context(cuda_autocast())
            stack.enter_context(without_dynamo())
            stack.enter_context(kernels.registered(self.rules))
            yield


@contextmanager
def _swapping_parameters() -> Iterator[None]:
    """Let ``.to()`` keep a module's Parameters, and what is tied, as it does on CUDA.

    Within a device PyTorch does so by ``param.data = ``; on the way from the host to
    ``meta`` only if told to swap them.
    """
    future = torch.__future__
    apply = torch.nn.Module._apply
    swaps = future.get_swap_module_params_on_conversion()

    def applied(module: Any, fn: Any, recurse: bool = True) -> Any:
        before = future.get_swap_module_params_on_conversion()
        comes = any(p is not None and not p.is_meta for p in module._parameters.values())
        with untracked():
            comes = comes and fn(torch.empty(0)).is_meta
        future.set_swap_module_params_on_conversion(swaps or comes)
        try:
            return apply(module, fn, recurse)
        finally:
            future.set_swap_module_params_on_conversion(before)

    with mock.patch.object(torch.nn.Module, "_apply", applied):
        yield
