"""One interface, two GPUs: the real one, and a virtual one that needs no hardware.

`open_gpu` gives a `CudaGPU` where CUDA is available, else a `VirtualGPU`. Both
answer with ``torch.cuda``'s names, in bytes, and with `every_byte.tracker` both
can say what each byte is for.

The virtual one computes on PyTorch's ``meta`` device: every operation goes
through PyTorch's dispatcher with its shapes and dtypes, but without storage.
Each storage's birth and death is replayed on `every_byte.allocator`.
"""

import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from importlib.machinery import ExtensionFileLoader, SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, Literal, Self
from unittest import mock
from zipimport import zipimporter

import torch
from typing_extensions import TypeVar

from every_byte.allocator import SegmentInfo
from every_byte.cuda import CudaMemory
from every_byte.data import cards, named
from every_byte.files import written
from every_byte.memory import DeviceMemory
from every_byte.tracker import Breakdown, Timeline, Tracker, uncounted
from every_byte.virtual.memory import CUBLAS_WORKSPACE, VirtualMemory
from every_byte.virtual.rules import Rules

_Memory = TypeVar("_Memory", bound=DeviceMemory, default=DeviceMemory, covariant=True)


class GPU(Generic[_Memory]):
    """A card's memory under ``torch.cuda``'s names, and what its bytes are for.

    While open (``with gpu:``, or `open` until `close`) it accounts for the tensors
    on its device. The one opened last is the one in use.

    Attributes:
        memory: asked or replayed; see `every_byte.memory.DeviceMemory`.
    """

    _open: ClassVar[list["GPU[Any]"]] = []

    def __init__(self, memory: _Memory, watched: bool = True) -> None:
        self.memory = memory
        self._device = memory.device
        self._tracker = Tracker(memory, watched)
        self._stack = ExitStack()
        self._was_open = False
        self._opened_in: int | None = None  # a thread

    def __str__(self) -> str:
        return str(self.memory)

    @property
    def device(self) -> torch.device:
        """For PyTorch, such as ``torch.empty(..., device=gpu.device)``.

        Raises:
            RuntimeError: it is replayed and not open: nobody would count what is made there.
        """
        self.check_open()
        return self._device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device = device

    def check_open(self) -> None:
        """Refuse to make tensors that nobody would count.

        Raises:
            RuntimeError: it is replayed and not open.
        """
        if self.memory.is_replayed and self not in GPU._open:
            raise RuntimeError(
                f"{self.memory} is not open: what is made on its device now would be counted by "
                "nobody; begin with open(), or `with gpu:`"
            )

    def open(self) -> Self:
        """Begin to account for the device's memory. Returns itself.

        It sees the thread that it is opened in and those that are started from then on. Modules
        that are imported meanwhile for the first time make their constants on the host, within
        ``with gpu.device:``, too.

        Raises:
            RuntimeError: it is open already.
        """
        if self in GPU._open:
            raise RuntimeError(f"{self} is open already: close() it first")
        with ExitStack() as stack:
            if getattr(self.memory, "default_workspace", None) is None:  # a named card has its own
                stack.enter_context(_fixed_workspaces())
            stack.enter_context(_importing_on_the_host())
            stack.enter_context(self.memory.in_use())
            GPU._open.append(self)
            stack.callback(GPU._open.remove, self)
            stack.enter_context(self._tracker.running())
            self._stack = stack.pop_all()
        self._was_open, self._opened_in = True, threading.get_ident()
        return self

    def close(self) -> None:
        """Stop looking. Tensors that live on stay accounted for. Harmless if closed.

        Asked afterwards, a virtual GPU warns of tensors on its device that nobody counts, such
        as those made there since.

        Raises:
            RuntimeError: a GPU opened later is still open; or this one was opened in
                another thread.
        """
        if self in GPU._open:
            if GPU._open[-1] is not self:
                raise RuntimeError(f"{GPU._open[-1]} was opened later: close it first")
            if self._opened_in != threading.get_ident():
                raise RuntimeError(f"{self} was opened in another thread: close it there")
            self._stack.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _accounted(self) -> _Memory:
        """The memory, if what it tells can be true.

        Raises:
            RuntimeError: it is replayed, and the GPU was never open.

        Warns:
            UserWarning: it is open no more, and tensors on its device are counted by nobody.
        """
        if not self.memory.is_replayed or self in GPU._open:
            return self.memory
        if not self._was_open:
            raise RuntimeError(
                f"{self.memory} was never open and saw no tensor made: begin with open(), or "
                "`with gpu:`"
            )
        if unseen := uncounted(self.memory.device):
            warnings.warn(
                f"{self.memory} is closed, and its figures leave out {unseen:,} bytes of "
                f"tensors on {self.memory.device} that nobody counts: those that are to be on it "
                "have to be made while it is open",
                stacklevel=3,
            )
        return self.memory

    # What each byte is for

    def breakdown(
        self,
        model: torch.nn.Module | None = None,
        *optimizers: torch.optim.Optimizer | None,
    ) -> Breakdown:
        """What the allocated bytes are for; see `every_byte.tracker.Tracker.breakdown`."""
        self._accounted()
        return self._tracker.breakdown(model, *optimizers)

    def pass_unseen(self) -> None:
        """Let tensors of the device that nobody saw made be on no GPU, and refuse none."""
        self._tracker.passes_unseen = True

    def accounts_for(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's bytes are among those that are counted."""
        return self._tracker.accounts_for(tensor)

    def handle_of(self, tensor: torch.Tensor) -> int | None:
        """The allocator's handle of a tensor's block; None if it is not counted."""
        return self._tracker.handle_of(tensor)

    def record(
        self,
        model: torch.nn.Module | None = None,
        *optimizers: torch.optim.Optimizer | None,
        where: Callable[[], Any] | None = None,
        limit: int | None = None,
    ) -> AbstractContextManager[Timeline]:
        """What each operation does to memory; see `every_byte.tracker.Tracker.record`.

        Raises:
            RuntimeError: the GPU is not open, or another recording is under way.
        """
        if self not in GPU._open:
            raise RuntimeError(f"{self} cannot record: open() it first")
        return self._tracker.record(model, *optimizers, where=where, limit=limit)

    def label(self, kind: str) -> AbstractContextManager[None]:
        """Let what is allocated meanwhile be of a kind, where `breakdown` cannot tell it.

        Raises:
            ValueError: `kind` is none of `every_byte.tracker.KINDS`.
        """
        return self._tracker.label(kind)

    # The names of torch.cuda

    def memory_allocated(self) -> int:
        """Bytes in blocks handed out, as ``torch.cuda.memory_allocated``."""
        return self._accounted().memory_allocated()

    def memory_reserved(self) -> int:
        """Bytes in segments held, as ``torch.cuda.memory_reserved``."""
        return self._accounted().memory_reserved()

    def max_memory_allocated(self) -> int:
        """Peak of `memory_allocated`, as ``torch.cuda.max_memory_allocated``."""
        return self._accounted().max_memory_allocated()

    def max_memory_reserved(self) -> int:
        """Peak of `memory_reserved`, as ``torch.cuda.max_memory_reserved``."""
        return self._accounted().max_memory_reserved()

    def reset_peak_memory_stats(self) -> None:
        """Let the peaks start again, as ``torch.cuda.reset_peak_memory_stats``."""
        self.memory.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        """Give back wholly free segments, as ``torch.cuda.empty_cache``."""
        self.memory.empty_cache()

    def memory_snapshot(self) -> list[SegmentInfo]:
        """Segments and their blocks, as ``torch.cuda.memory_snapshot``."""
        return self._accounted().memory_snapshot()

    def mem_get_info(self) -> tuple[int, int]:
        """Bytes free on the card, and all it has, as ``torch.cuda.mem_get_info``."""
        return self._accounted().mem_get_info()

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
        self.memory.record_memory_history(enabled, max_entries)

    def snapshot(self) -> dict[str, Any]:
        """Segments, blocks and what was noted, as ``torch.cuda.memory._snapshot``."""
        return self._accounted().snapshot()

    def dump_snapshot(
        self, filename: str | Path = "dump_snapshot.pickle", *, force: bool = False
    ) -> None:
        """Write `snapshot` to a file, as ``torch.cuda.memory._dump_snapshot``.

        ``python -m torch.cuda._memory_viz`` and https://pytorch.org/memory_viz read it. The
        file is written beside its place and moved there; no folder is made.

        Args:
            filename: where; an older snapshot there is replaced.
            force: whether a file of another kind is replaced, too.

        Raises:
            OSError: the file cannot be written, or one of another kind is there.
        """
        content = pickle.dumps(self.snapshot(), protocol=4)  # the newest that the page reads
        with written(filename, "a memory snapshot", is_snapshot, force) as file:
            file.write(content)

    def clear_cublas_workspaces(self) -> None:
        """Free cuBLAS's workspaces, as ``torch._C._cuda_clearCublasWorkspaces``.

        The next matrix product of each thread allocates its own again.
        """
        self.memory.clear_cublas_workspaces()


def is_snapshot(head: bytes) -> bool:
    """Whether a file that begins so is a memory snapshot: a pickle of a dict with one's keys."""
    return head[:1] == b"\x80" and (b"segments" in head[:64] or b"device_traces" in head[:64])


@contextmanager
def _fixed_workspaces() -> Iterator[None]:
    """Set ``CUBLAS_WORKSPACE_CONFIG``, unless it is set, and take away no other's value."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    is_ours = name not in os.environ
    if is_ours:
        os.environ[name] = CUBLAS_WORKSPACE
    try:
        yield
    finally:
        if is_ours and os.environ.get(name) == CUBLAS_WORKSPACE:
            del os.environ[name]


@contextmanager
def _importing_on_the_host() -> Iterator[None]:
    """Execute modules as if no device context were open: their constants outlive it.

    By the loaders of Python's own that find files; built-in modules make no tensors.
    """

    def on_the_host(execute: Callable[..., None]) -> Callable[..., None]:
        @wraps(execute)
        def exec_module(loader: Any, module: ModuleType) -> None:
            if torch.get_default_device().type == "cpu":
                return execute(loader, module)
            with torch.device("cpu"):
                return execute(loader, module)

        return exec_module

    with ExitStack() as stack:
        for loader in (SourceFileLoader, SourcelessFileLoader, ExtensionFileLoader, zipimporter):
            execute = on_the_host(loader.exec_module)
            stack.enter_context(mock.patch.object(loader, "exec_module", execute))
        yield


class CudaGPU(GPU[CudaMemory]):
    """The first CUDA device, measured.

    Open it before anything is allocated: it accounts for the tensors it has
    seen made, and calls the rest of the allocated bytes workspaces.

    Raises:
        RuntimeError: PyTorch sees no CUDA device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch.cuda.is_available() is False: CudaGPU needs an NVIDIA GPU and a CUDA "
                "build of PyTorch; VirtualGPU() needs neither"
            )
        super().__init__(CudaMemory())


class VirtualGPU(GPU[VirtualMemory]):
    """A GPU of PyTorch's ``meta`` device and a model of its caching allocator.

    Args:
        card: the card to be, such as ``"RTX 4090"``; see `every_byte.data.cards`.
        capacity: bytes that programs can have of it; the card's `every_byte.data.Card.usable`
            if None, no bound without a card either.
            Past it, operations raise ``torch.OutOfMemoryError`` as on CUDA.
        name: what it calls itself; the card's name if None.
        alloc_conf: settings as in ``PYTORCH_ALLOC_CONF``, which itself is not read;
            see `every_byte.allocator.config`.
        context: bytes that the process holds beside PyTorch's, as a CUDA context does.
        values: what happens where a program reads a value that depends on weights or
            activations: "refuse" is an error, "assume" goes on with what is assumed;
            see `every_byte.virtual.values`.
        torch: the version of PyTorch whose rules the card follows, such as ``"2.11"``;
            the installed one if None. Its operators are the installed version's all the same.
        watched: whether to replay what PyTorch does under a ``TorchDispatchMode``, as under
            `CudaGPU` on a card: there it adds up gradients in new tensors. False is for a
            program that nobody watches, such as a script under `every_byte.as_cuda`: there
            PyTorch writes over the first of them; see `every_byte.in_place`.

    With a card, kernels borrow what they borrow on that card, cuBLAS has the card's own
    workspace unless ``CUBLAS_WORKSPACE_CONFIG`` is set, and segments lie where the driver
    puts them. Without one it is any card: only what all have in common is replayed.

    Raises:
        TypeError, ValueError: an argument is wrong; see `every_byte.allocator`.
    """

    def __init__(
        self,
        card: str | None = None,
        capacity: int | None = None,
        *,
        name: str | None = None,
        alloc_conf: str = "",
        context: int = 0,
        torch: str | None = None,
        values: Literal["assume", "refuse"] = "refuse",
        watched: bool = True,
    ) -> None:
        for what, value in (("card", card), ("name", name), ("alloc_conf", alloc_conf)):
            if not isinstance(value, str) and (value is not None or what == "alloc_conf"):
                raise TypeError(f"{what} is {value!r}: expected text (str)")
        if card is None:
            if torch is not None:
                raise ValueError(
                    f"torch is {torch!r}, but there is no card whose rules it could change: "
                    'name one, such as VirtualGPU("RTX 4090", torch="2.11")'
                )
            memory = VirtualMemory(
                name or "Virtual GPU", capacity, alloc_conf, context, values=values
            )
        else:
            here = named(card)
            if here is None:
                raise ValueError(f"card is {card!r}: expected one of {', '.join(cards())}")
            known = cards()[here]
            capacity = known.usable if capacity is None else capacity
            rules = Rules.of(known, torch)
            note = (
                f"no CUDA device in use, figures are replayed by rules measured with "
                f"{known.measured}"
                if known.measured
                else "no CUDA device in use, figures are by PyTorch's source, not measured"
            )
            note += rules.older
            memory = VirtualMemory(name or here, capacity, alloc_conf, context, rules, note, values)
        super().__init__(memory, watched)

    @property
    def capacity(self) -> int | None:
        """Bytes that it has; None without bounds."""
        return self.memory.capacity

    @property
    def estimates(self) -> tuple[str, ...]:
        """What its figures contain so far that is estimated, each with its error, in words.

        Empty where everything follows from PyTorch's rules.
        """
        return tuple(self.memory.estimates)


def open_gpu() -> GPU:
    """The GPU that this machine has, opened: a `CudaGPU`, or else a `VirtualGPU`.

    Call it before the first matrix product: it fixes cuBLAS's workspaces at
    8,519,680 B each, the same on every chip, unless ``CUBLAS_WORKSPACE_CONFIG``
    is set. Called again, it returns the GPU in use.
    """
    if GPU._open:
        return GPU._open[-1]
    return (CudaGPU() if torch.cuda.is_available() else VirtualGPU()).open()
