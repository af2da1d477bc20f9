"""One interface, two GPUs: the real one, and a virtual one that needs no hardware.

`open_gpu` gives a `CudaGPU` where CUDA is available, else a `VirtualGPU`. Both
answer with ``torch.cuda``'s names, in bytes, and both watch the tensors on
their device through a ``TorchDispatchMode``, so that `breakdown` and `record`
can say what each byte is for.

The virtual one computes on PyTorch's ``meta`` device: every operation goes
through PyTorch's dispatcher with its shapes and dtypes, but without storage.
Each storage's birth and death is replayed on `helpers.allocator`.
"""

import os
import re
import sys
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self
from unittest import mock

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from helpers.allocator import CachingAllocator, OutOfMemoryError, SegmentInfo
from helpers.units import KiB, binary
from helpers.without_dynamo import without_dynamo

KINDS = (
    "parameters",
    "gradients",
    "optimizer states",
    "buffers",
    "batch",
    "activations",
    "temporaries",
    "workspaces",
    "rounding",
)
"""What a byte can be for. Batch: copied from the host. Activations: made outside
of backward and of the optimizer. Temporaries: made inside of either, and neither
gradients of parameters nor optimizer states. Workspaces: cuBLAS's. Rounding: the
allocator's, from the bytes asked for to the block handed out."""

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


class Breakdown(dict[str, int]):
    """Bytes by kind, in the order of `KINDS`; `total` is ``memory_allocated()``."""

    @property
    def total(self) -> int:
        """The sum of all kinds, in bytes."""
        return sum(self.values())


@dataclass(eq=False, slots=True)
class _Storage:
    """A storage on the device: its bytes, the kind it was born as, the allocator's handle."""

    nbytes: int
    kind: str
    handle: int | None


@dataclass(slots=True)
class Timeline:
    """Allocated bytes after each operation that changed them, by kind.

    Attributes:
        steps: one `Breakdown` for each such operation, in order; the first is
            the state before.
        marks: name of a phase: index in `steps` at which it begins.
    """

    steps: list[Breakdown] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    _mark: Callable[[str], None] | None = None

    def mark(self, name: str) -> None:
        """Say that the phase `name` begins here.

        Raises:
            RuntimeError: the recording has ended.
        """
        if self._mark is None:
            raise RuntimeError(f"mark({name!r}) after the recording: call it inside of record()")
        self._mark(name)

    @property
    def peak(self) -> int:
        """Index in `steps` of the largest total, the first of equals."""
        return max(range(len(self.steps)), key=lambda i: (self.steps[i].total, -i))


class _Recording:
    """What `GPU.record` writes down while operations run."""

    def __init__(self) -> None:
        self.events: list[tuple[_Storage, int]] = []  # and +1 for born, -1 for died
        self.samples: list[tuple[int, int, int]] = []  # events so far, allocated, requested
        self.marks: dict[str, int] = {}
        self.roles: dict[_Storage, str] = {}


class _Watch(TorchDispatchMode):
    """Shows each operation's results to the GPU."""

    def __init__(self, gpu: "GPU") -> None:
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import all of torch._dynamo: 150 MB, 1 s

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if GPU._open[-1] is not self.gpu:  # a GPU opened later has taken over
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            # Only there do composite operations arrive whole, with the tensors
            # that they make on the way out of sight.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.gpu._sample()  # what died since the last operation
        result = None
        try:
            result = func(*args, **kwargs)
            self.gpu._see(func, args, result)
        except OutOfMemoryError as error:
            del result  # or the traceback would keep it alive
            self.gpu._in_optimizer = False
            raise torch.OutOfMemoryError(str(error)) from None
        except BaseException:
            self.gpu._in_optimizer = False  # its hook at the end will not be called
            raise
        self.gpu._sample()
        return result


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class GPU(ABC):
    """What `CudaGPU` and `VirtualGPU` share: opening, watching, accounting.

    While open (``with gpu:``, or `open` until `close`) it sees the tensors on
    its device. The one opened last is the one in use.
    """

    device: torch.device

    _open: ClassVar[list["GPU"]] = []

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}  # address of the StorageImpl: what it is
        self._watch = _Watch(self)
        self._stack = ExitStack()
        self._recording: _Recording | None = None
        self._in_optimizer = False

    # Opening and closing

    def open(self) -> Self:
        """Begin to watch the device. Returns itself.

        Raises:
            RuntimeError: it is open already.
        """
        if self in GPU._open:
            raise RuntimeError(f"{self} is open already: close() it first")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        with ExitStack() as stack:
            self._enter(stack)
            for register, inside in (
                (register_optimizer_step_pre_hook, True),
                (register_optimizer_step_post_hook, False),
            ):
                stack.callback(register(self._optimizer_hook(inside)).remove)
            GPU._open.append(self)
            stack.callback(GPU._open.remove, self)
            stack.enter_context(self._watch)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Stop watching. Tensors that live on stay accounted for. Harmless if closed.

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

    def _enter(self, stack: ExitStack) -> None:
        """What else has to be in force while this GPU is open."""

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
    def clear_cublas_workspaces(self) -> None:
        """Free cuBLAS's workspaces, as ``torch._C._cuda_clearCublasWorkspaces``.

        The next matrix product of each thread allocates its own again.
        """

    @abstractmethod
    def _memory_requested(self) -> int:
        """Bytes asked for, before rounding (``requested_bytes`` of ``torch.cuda.memory_stats``)."""

    # Accounting

    def breakdown(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Breakdown:
        """What the allocated bytes are for: one row for each of `KINDS`.

        The rows add up to `memory_allocated` exactly. Parameters, gradients and
        buffers are recognised as the model's, states as the optimizer's: without
        them these bytes count as what they were born as, a batch or activations.

        Args:
            model: whose parameters, their ``.grad``, and buffers.
            optimizer: whose states.
        """
        roles = self._roles(model, optimizer)
        counts: Counter[str] = Counter()
        for storage in self._storages.values():
            counts[roles.get(storage, storage.kind)] += storage.nbytes
        return _account(counts, self.memory_allocated(), self._memory_requested())

    @contextmanager
    def record(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Iterator[Timeline]:
        """Record what each operation does to memory, while the context lasts.

        The timeline is filled when the context ends. Kinds are those of
        `breakdown`, for `model` and `optimizer` as they are at the beginning, at
        each optimizer step, and at the end.

        Raises:
            RuntimeError: another recording is under way, or the GPU is not open.
        """
        if self._recording is not None or self not in GPU._open:
            why = "another recording is under way" if self._recording else "it is not open"
            raise RuntimeError(f"{self} cannot record: {why}")
        timeline = Timeline()
        recording = self._recording = _Recording()
        before = Counter[str]()
        recording.roles |= self._roles(model, optimizer)
        alive = list(self._storages.values())
        recording.samples.append((0, self.memory_allocated(), self._memory_requested()))

        def mark(name: str) -> None:
            self._sample()
            recording.marks[name] = len(recording.samples) - 1

        def look(*_: object) -> None:
            recording.roles |= self._roles(model, optimizer)

        timeline._mark = mark
        at_step = register_optimizer_step_pre_hook(look)
        try:
            yield timeline
        finally:
            at_step.remove()
            self._sample()
            look()
            timeline._mark, self._recording = None, None

        def kind(storage: _Storage) -> str:
            return recording.roles.get(storage, storage.kind)

        for storage in alive:
            before[kind(storage)] += storage.nbytes
        seen = 0
        for events, allocated, requested in recording.samples:
            for storage, sign in recording.events[seen:events]:
                before[kind(storage)] += sign * storage.nbytes
            seen = events
            timeline.steps.append(_account(before, allocated, requested))
        timeline.marks |= recording.marks

    def _roles(
        self, model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None
    ) -> dict[_Storage, str]:
        """The storages that model and optimizer hold, and as what."""
        roles: dict[_Storage, str] = {}

        def note(kind: str, *tensors: object) -> None:
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                    storage = self._storages.get(tensor.untyped_storage()._cdata)
                    if storage is not None:
                        roles[storage] = kind

        if optimizer is not None:
            note("optimizer states", *tree_leaves(list(optimizer.state.values())))
        if model is not None:
            note("buffers", *model.buffers())
            note("gradients", *(p.grad for p in model.parameters()))
            note("parameters", *model.parameters())
        return roles

    def _optimizer_hook(self, inside: bool) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._in_optimizer = inside

        return hook

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Account for the storages that an operation made."""
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.device != self.device:
                continue
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            known = self._storages.get(key)
            if known is None:
                known = _Storage(nbytes, self._birth(func, args), self._malloc(nbytes))
                self._storages[key] = known
                weakref.finalize(storage, self._died, key).atexit = False
                self._log(known, +1)
            elif known.nbytes != nbytes:  # resized in place: PyTorch takes the new block first
                handle = self._malloc(nbytes)
                self._log(known, -1)
                self._free(known)
                self._storages[key] = new = _Storage(nbytes, known.kind, handle)
                self._log(new, +1)

    def _birth(self, func: Any, args: tuple[Any, ...]) -> str:
        """The kind of a storage that an operation makes."""
        if _in_backward() or self._in_optimizer:
            return "temporaries"
        copied = func.overloadpacket is torch.ops.aten._to_copy
        return "batch" if copied and args[0].device.type == "cpu" else "activations"

    def _died(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._log(storage, -1)
        self._free(storage)

    def _log(self, storage: _Storage, sign: int) -> None:
        if self._recording is not None:
            self._recording.events.append((storage, sign))

    def _sample(self) -> None:
        """Between two operations: note what memory is now, if it changed."""
        if self._recording is None:
            return
        now = (len(self._recording.events), self.memory_allocated(), self._memory_requested())
        if now != self._recording.samples[-1]:
            self._recording.samples.append(now)

    def _malloc(self, nbytes: int) -> int | None:
        """Take `nbytes` from the replayed allocator, where there is one."""
        return None

    def _free(self, storage: _Storage) -> None:
        """Give a dead storage's bytes back to the replayed allocator, where there is one."""


def _account(counts: Counter[str], allocated: int, requested: int) -> Breakdown:
    """Complete the bytes of tensors by kind with what no tensor holds."""
    rows = Breakdown((kind, counts[kind]) for kind in KINDS)
    rows["workspaces"] = requested - sum(counts.values())
    rows["rounding"] = allocated - requested
    return rows


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

    Raises:
        TypeError, ValueError: `capacity` is no whole number of bytes, or negative.
    """

    # The operations that cuBLAS carries out on CUDA.
    _matrix_products = frozenset(
        getattr(torch.ops.aten, name)
        for name in (
            *("mm", "addmm", "addmm_", "_addmm_activation", "bmm", "baddbmm", "baddbmm_"),
            *("addbmm", "addbmm_", "mv", "addmv", "addmv_", "dot", "vdot"),
        )
    )

    def __init__(self, capacity: int | None = None, name: str = "Virtual GPU") -> None:
        super().__init__()
        self.device = torch.device("meta")
        self.name = name
        self._allocator = CachingAllocator(capacity)
        self._workspaces: dict[bool, int] = {}  # of the autograd thread or not: handle

    def __str__(self) -> str:
        capacity = self._allocator.capacity
        size = "" if capacity is None else f", {binary(capacity)}"
        return f"{self.name}{size}: no CUDA device in use, figures are replayed"

    @override
    def _enter(self, stack: ExitStack) -> None:
        self._workspace_size = cublas_workspace_size(os.environ["CUBLAS_WORKSPACE_CONFIG"])
        # PyTorch's optimizers choose their algorithm by the kind of device: let
        # them choose for this one as they do for CUDA.
        devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), "meta"]
        for module in (_foreach_utils, sys.modules[torch.optim.Optimizer.__module__]):
            name = "_get_foreach_kernels_supported_devices"
            stack.enter_context(mock.patch.object(module, name, lambda: list(devices)))
        stack.enter_context(without_dynamo())

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
    def clear_cublas_workspaces(self) -> None:
        while self._workspaces:
            self._allocator.free(self._workspaces.popitem()[1])

    @override
    def _memory_requested(self) -> int:
        return self._allocator.memory_requested()

    @override
    def _malloc(self, nbytes: int) -> int:
        return self._allocator.malloc(nbytes)

    @override
    def _free(self, storage: _Storage) -> None:
        assert storage.handle is not None
        self._allocator.free(storage.handle)

    @override
    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        super()._see(func, args, result)
        # On CUDA, backward runs in a thread of its own, and each thread's cuBLAS
        # handle takes a workspace at its first product, after the result's block.
        if func.overloadpacket in self._matrix_products and _in_backward() not in self._workspaces:
            if any(
                isinstance(t, torch.Tensor) and t.device == self.device for t in tree_leaves(result)
            ):
                self._workspaces[_in_backward()] = self._malloc(self._workspace_size)


def open_gpu() -> GPU:
    """The GPU that this machine has, opened: a `CudaGPU`, or else a `VirtualGPU`.

    Call it before the first matrix product: it fixes cuBLAS's workspaces at
    8,519,680 B each, the same on every chip, unless ``CUBLAS_WORKSPACE_CONFIG``
    is set. Called again, it returns the GPU in use.
    """
    if GPU._open:
        return GPU._open[-1]
    return (CudaGPU() if torch.cuda.is_available() else VirtualGPU()).open()
