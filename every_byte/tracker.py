"""What each byte on a device is for: every storage, from its birth to its death.

A `Tracker` sees PyTorch's operations through a ``TorchDispatchMode``. It knows a
storage when an operation first returns it, and its end from a finalizer. The
same accounting serves a real GPU and a virtual one: what they differ in stands
behind `every_byte.memory.DeviceMemory`.
"""

import _thread
import gc
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any
from unittest import mock

import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

from every_byte import in_place
from every_byte.allocator import OutOfMemoryError
from every_byte.kinds import KINDS as KINDS
from every_byte.memory import DeviceMemory


class Breakdown(dict[str, int]):
    """Bytes by kind, in the order of `KINDS`; `total` is ``memory_allocated()``."""

    @property
    def total(self) -> int:
        """The sum of all kinds, in bytes."""
        return sum(self.values())


@dataclass(eq=False, slots=True)
class _Storage:
    """A storage on the device: its bytes, the kind it was born as, the allocator's handle.

    And the node of autograd that made it, within backward.
    """

    nbytes: int
    kind: str
    handle: int | None
    made_by: tuple[int, str] | None = None


@dataclass(slots=True)
class Timeline:
    """Allocated bytes after each operation that changed them, by kind.

    Attributes:
        steps: one `Breakdown` for each such operation, in order; the first is
            the state before.
        marks: name of a phase: index in `steps` at which it begins.
        where: what `where` of `Tracker.record` said at each step; empty without.
        highest: what memory was at the last `look`; empty without, or past the limit.
        highest_at: index in `steps` before which that was.
        highest_where: what `where` said then; None without.
        is_cut: whether there was more than the limit of `Tracker.record`.
    """

    steps: list[Breakdown] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    where: list[Any] = field(default_factory=list)
    highest: Breakdown = field(default_factory=Breakdown)
    highest_at: int = 0
    highest_where: Any = None
    is_cut: bool = False
    _mark: Callable[[str], None] | None = None
    _look: Callable[[int], None] | None = None
    _see: Callable[[], None] | None = None

    def mark(self, name: str) -> None:
        """Say that the phase `name` begins here.

        Raises:
            RuntimeError: the recording has ended.
        """
        if self._mark is None:
            raise RuntimeError(f"mark({name!r}) after the recording: call it inside of record()")
        self._mark(name)

    def look(self, handle: int) -> None:
        """Keep what memory is now, within an operation too: the last look is `highest`.

        Args:
            handle: the allocator's, of the block that it has just handed out.
        """
        if self._look is not None:
            self._look(handle)

    def see(self) -> None:
        """Look now, too, what model and optimizers hold."""
        if self._see is not None:
            self._see()

    @property
    def peak(self) -> int:
        """Index in `steps` of the largest total, the first of equals."""
        return max(range(len(self.steps)), key=lambda i: (self.steps[i].total, -i))


class _Recording:
    """What `Tracker.record` writes down while operations run."""

    def __init__(
        self, alive: list[_Storage], where: Callable[[], Any] | None, limit: int | None
    ) -> None:
        self.alive = alive  # at the beginning
        self.events: list[tuple[_Storage, int]] = []  # +1: born, -1: died
        self.samples: list[tuple[int, int, int]] = []  # events so far, allocated, requested
        self.places: list[Any] = []  # what `where` said, for each sample
        self.roles: dict[_Storage, str] = {}
        self.where, self.limit = where, limit
        self.looked: tuple[int, int, int] | None = None  # a sample; see Timeline.look
        self.looked_at = 0  # samples before it
        self.looked_where: Any = None
        self.newest: int | _Storage | None = None  # then: a handle, or the storage that has it

    @property
    def is_full(self) -> bool:
        """Whether no more is written down."""
        return self.limit is not None and len(self.events) >= self.limit

    def look(self, handle: int, allocated: int, requested: int) -> None:
        """See `Timeline.look`."""
        self.looked = None if self.is_full else (len(self.events), allocated, requested)
        self.looked_at, self.newest = len(self.samples), handle
        self.looked_where = self.where() if self.where is not None and self.looked else None

    def highest(self) -> Breakdown:
        """The bytes by kind at the last look."""
        if self.looked is None:
            return Breakdown()
        events, allocated, requested = self.looked
        changes = [(storage, 1) for storage in self.alive] + self.events[:events]
        if isinstance(self.newest, _Storage):
            changes.append((self.newest, 1))
        counts: Counter[str] = Counter()
        for storage, sign in changes:
            counts[self.roles.get(storage, storage.kind)] += sign * storage.nbytes
        return _account(counts, allocated, requested)

    def steps(self) -> Iterator[Breakdown]:
        """The bytes by kind at each sample."""
        counts: Counter[str] = Counter()
        changes = [(storage, 1) for storage in self.alive]
        seen = 0
        for events, allocated, requested in self.samples:
            changes += self.events[seen:events]
            seen = events
            for storage, sign in changes:
                counts[self.roles.get(storage, storage.kind)] += sign * storage.nbytes
            changes.clear()
            yield _account(counts, allocated, requested)


def scales(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a model's quantised parameters are read with.

    Of bitsandbytes: ``SCB`` of LLM.int8(), kept with the weight until the first
    forward and with the layer's state from then on; the ``QuantState`` of 4 bits,
    and that of its scales where they are quantised as well
    (``bitsandbytes/nn/modules.py``, ``bitsandbytes/functional.py``).
    """
    found: list[object] = [getattr(getattr(m, "state", None), "SCB", None) for m in model.modules()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        found.append(getattr(parameter, "SCB", None))
        found += (getattr(state, name, None) for name in ("absmax", "code", "offset"))
        found += (getattr(nested, name, None) for name in ("absmax", "code"))
    unique = {id(tensor): tensor for tensor in found if isinstance(tensor, torch.Tensor)}
    return list(unique.values())


@cache
def _is_composite(func: Any) -> bool:
    """Whether PyTorch's C++ composes an operation of others, on every device."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _composed(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Carry out a composite operation as PyTorch's C++ composes it.

    ``OpOverload.decompose`` prefers what compilers use, which allocates otherwise.
    """
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _is_missing(func: Any, error: BaseException) -> bool:
    """Whether PyTorch has no kernel of an own operation for ``meta``, which it says at length."""
    return (
        isinstance(error, NotImplementedError)
        and func.namespace == "aten"
        and any(words in str(error) for words in ("with Meta tensors", "from the 'Meta' backend"))
    )


def _arrives_whole(args: tuple[Any, ...]) -> bool:
    """Whether autograd, which takes composite operations apart, is passed by.

    It is in inference mode, and for the tensors that were made in it.
    """
    return torch.is_inference_mode_enabled() or any(t.is_inference() for t in _tensors(args))


def is_wrapper(kind: type) -> bool:
    """Whether tensors of a type carry out operations themselves, on tensors that they hold."""
    if is_traceable_wrapper_subclass_type(kind):
        return True
    plain = torch.Tensor.__torch_dispatch__
    return getattr(kind, "__torch_dispatch__", plain) is not plain and not issubclass(
        kind, FakeTensor
    )


def are_fake(types: Iterable[type]) -> bool:
    """Whether an operation is of tensors that have a shape and no memory on any device.

    Those of ``FunctionalTensorMode`` hold such a tensor. C++ asks one for its device by an
    operation, ``prim::device``, where an exception ends the process
    (``ConcretePyInterpreterVTable::device`` in torch/csrc/PyInterpreter.cpp of PyTorch 2.14).
    """
    return any(issubclass(kind, _FAKE) for kind in types)


_FAKE = FakeTensor, FunctionalTensor


def _parts(tensor: object) -> list[object]:
    """The tensors that hold a tensor's bytes: of a ``DTensor``, this GPU's part of it.

    Of what ``torch.func`` wraps, what is within.
    """
    while isinstance(tensor, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


class _ThreadState(threading.local):
    """What each thread of a program has for itself.

    Attributes:
        untracked: for each `untracked` that is open, the trackers that it pauses.
        entered: the trackers that see its operations themselves.
    """

    def __init__(self) -> None:
        self.untracked: tuple[set[Tracker], ...] = ()
        self.entered: list[Tracker] = []


def in_backward() -> bool:
    """Whether autograd is at work on a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def _in_autocast() -> bool:
    """Whether an autocast context is open: PyTorch tells how many are, but only while counting."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting() > 0


_running: list["Tracker"] = []  # the last of them is in use
_here = _ThreadState()


@contextmanager
def untracked() -> Iterator[None]:
    """Let what is made meanwhile be on no GPU: models of which only the shapes are wanted.

    It holds for this thread, and for those that are started inside, as long as it lasts.
    A GPU that is opened inside sees what is made from then on.
    """
    paused = set(_running)
    _here.untracked += (paused,)
    try:
        yield
    finally:
        paused.clear()  # for the threads that were started inside, too
        _here.untracked = tuple(each for each in _here.untracked if each is not paused)


def is_tracked() -> bool:
    """Whether a tracker looks at this thread's operations at present."""
    return bool(_running) and _running[-1].in_use


def is_accounted(tensor: torch.Tensor) -> bool:
    """Whether the tracker in use looks at this thread, and counts a tensor's storage."""
    return is_tracked() and _running[-1].accounts_for(tensor)


_trackers: "weakref.WeakSet[Tracker]" = weakref.WeakSet()  # all that there are


def uncounted(device: torch.device) -> int:
    """Bytes of a device's tensors that no tracker counts, as far as Python knows them."""
    if _uncounted(device):
        gc.collect()
    return sum(_uncounted(device).values())


def _uncounted(device: torch.device) -> dict[int, int]:
    kinds, new = set[type](), {torch.Tensor}
    while new:
        kinds |= new
        new = {kind for known in new for kind in known.__subclasses__()} - kinds
    kinds = {kind for kind in kinds if not is_wrapper(kind) and not issubclass(kind, _FAKE)}
    found: dict[int, int] = {}
    with torch._C.DisableTorchFunction():
        for tensor in [each for each in gc.get_objects() if type(each) in kinds]:
            if (
                not _functorch.is_functorch_wrapped_tensor(tensor)
                and tensor.device == device
                and tensor.layout is torch.strided
                and not any(tracker.accounts_for(tensor) for tracker in _trackers)
            ):
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return {storage: nbytes for storage, nbytes in found.items() if nbytes}


class _Follow(TorchDispatchMode):
    """Leads the operations of a thread that a program starts to the tracker in use."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as Tracker's

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not _running or _running[-1] in _here.entered:
            return func(*args, **kwargs or {})
        return _running[-1].__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _following_threads() -> Iterator[None]:
    """Let the threads that are started meanwhile be seen: PyTorch's modes are each thread's own.

    Those of a `ThreadPoolExecutor` are started by ``threading.Thread.start``, too.
    """
    start, start_new = threading.Thread.start, _thread.start_new_thread

    def followed(run: Callable[..., Any]) -> Callable[..., Any]:
        untracked_here, memories = _here.untracked, [t.memory for t in _running]

        def run_followed(*args: Any, **kwargs: Any) -> None:
            _here.untracked = untracked_here
            with ExitStack() as stack:
                for memory in memories:
                    stack.enter_context(memory.in_thread())
                stack.enter_context(_Follow())
                run(*args, **kwargs)

        return run_followed

    def started(thread: threading.Thread) -> None:
        run = followed(thread.run)

        def run_followed() -> None:
            del thread.run  # which holds itself
            run()

        thread.run = run_followed  # type: ignore[method-assign]
        start(thread)

    def started_new(function: Callable[..., Any], *args: Any) -> int:
        return start_new(followed(function), *args)

    with (
        mock.patch.object(threading.Thread, "start", started),
        mock.patch.object(_thread, "start_new_thread", started_new),
    ):
        yield


class _Now(threading.local):
    """What a thread is at.

    Attributes:
        in_optimizer: an optimizer's step.
        in_kernel: a kernel; then no step of a timeline, though each allocation counts.
        label: the kind of what is allocated, where it is said.
        product: the storage of the last matrix product's result.
    """

    in_optimizer = False
    in_kernel = False
    label: str | None = None
    product: int | None = None


# Their indices may come from the host as Python lists, as in ``x[:, [0, 2]]``: C++ copies them
# to the device without the dispatcher (torch/csrc/autograd/python_variable_indexing.cpp).
_INDEXING = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)

_ONLY_SHAPES = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *"empty_like full_like ones_like zeros_like rand_like randn_like randint_like".split(),
        *"new_empty new_empty_strided new_full new_ones new_zeros".split(),
        *("detach_", "lift_fresh"),  # by torch.tensor before anyone can know its result
    )
)
"""Operations that take shape, dtype and device of what they are given, and no more."""


_ON_ONE_DEVICE = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *"mm bmm addmm baddbmm mv addmv dot convolution embedding cat gather index_select".split(),
        *("native_layer_norm", "native_batch_norm", "nll_loss_forward", "_softmax"),
    )
)


def _takes_one_device(func: Any) -> bool:
    """Whether CUDA refuses a tensor of the host beside its own, but for a scalar.

    On ``meta`` not every operation looks, and then the result may be on either. Pointwise
    operations: ``compute_types`` in aten/src/ATen/TensorIterator.cpp of PyTorch 2.14.
    """
    return torch.Tag.pointwise in func.tags or func.overloadpacket in _ON_ONE_DEVICE


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Tracker(TorchDispatchMode):
    """Accounts for the storages in a card's memory, and sorts them by kind.

    While `running` it sees the operations of the thread that it runs in, and of those that
    this program starts meanwhile; of several, only the one that was started last does.

    Args:
        memory: to account for.
        watched: whether operations may be those of a program that a mode looks at; if not,
            they are made what they are where nobody does (`every_byte.in_place`).
    """

    supports_higher_order_operators = True  # such as flex_attention, to be refused by name

    def __init__(self, memory: DeviceMemory, watched: bool = True) -> None:
        super().__init__()
        self.memory, self.watched = memory, watched
        self.passes_unseen = False  # whether tensors that nobody saw made are on no GPU
        self._now = _Now()
        self._storages: dict[int, _Storage] = {}  # address of the StorageImpl: what it is
        self._recording: _Recording | None = None
        self._process = os.getpid()
        _trackers.add(self)

    @property
    def in_use(self) -> bool:
        """Whether this tracker looks at this thread's operations at present."""
        return _running[-1:] == [self] and not any(self in paused for paused in _here.untracked)

    @property
    def in_optimizer(self) -> bool:
        """Whether an optimizer's step runs in this thread."""
        return self._now.in_optimizer

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look at operations, optimizers' steps and resized storages, while the context lasts."""

        def stepping(now: bool, *_: object) -> None:
            self._now.in_optimizer = now

        with ExitStack() as stack:
            begins = register_optimizer_step_pre_hook(partial(stepping, True))
            stack.callback(begins.remove)
            ends = register_optimizer_step_post_hook(partial(stepping, False))
            stack.callback(ends.remove)
            in_place.prepare()
            if not _running:
                stack.enter_context(_following_threads())
            for among in (_running, _here.entered):
                among.append(self)
                stack.callback(among.remove, self)
            for paused in _here.untracked:
                paused.discard(self)  # opened inside, again
            self._process = os.getpid()
            stack.enter_context(self._seeing_storages())
            stack.enter_context(self._seeing_data())
            stack.enter_context(self)
            yield

    @contextmanager
    def label(self, kind: str) -> Iterator[None]:
        """Let what is allocated meanwhile be of a kind, where `breakdown` cannot tell it.

        Raises:
            ValueError: `kind` is none of `KINDS`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
        before, self._now.label = self._now.label, kind
        try:
            yield
        finally:
            self._now.label = before

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
        """Carry out an operation, then account for what it returns."""
        kwargs = kwargs or {}
        if not self.in_use or (types and are_fake(types)):
            return func(*args, **kwargs)
        if not hasattr(func, "_schema") and self.memory.is_replayed:
            raise NotImplementedError(
                f"{func} is not replayed: its memory is that of a program that a compiler makes; "
                "take plain operations, such as scaled_dot_product_attention"
            )
        if any(map(is_wrapper, types)):
            return NotImplemented  # such as DTensor: seen is what it does with its parts
        if self.memory.is_replayed:
            if self.passes_unseen and self._are_unseen(func, args):
                return func(*args, **kwargs)
            self._check_known(func, args, kwargs)
        if not self.watched and in_place.may_overwrite(func):
            if in_backward():
                func, args = self._as_unwatched(func, args, kwargs)
            if in_place.adds_bias(func, args, kwargs, self._now.product):
                into = self.__torch_dispatch__(torch.ops.aten.add_.Tensor, types, args)
                return torch.ops.aten.alias.default(into)  # autograd expects a tensor of its own
        if (kernel := self.memory.kernel(func, args, kwargs)) is not None:
            self._sample()
            within, self._now.in_kernel = self._now.in_kernel, not func._can_decompose()
            try:
                with self:
                    return kernel(*args, **kwargs)
            finally:
                self._now.in_kernel = within
                self._sample()
        if _is_composite(func) and _arrives_whole(args):
            # with the tensors that it makes on the way out of sight
            with self:
                return _composed(func, *args, **kwargs)
        self._sample()  # what died since the last operation
        result = None
        try:
            result = func(*args, **kwargs)
            self._see(func, args, result)
            self.memory.computed(func, args, kwargs, result)
            if in_place.is_product(func):
                self._now.product = result.untyped_storage()._cdata
        except OutOfMemoryError as error:
            message = str(error)
        except BaseException as error:
            self._now.in_optimizer = False  # the hook at the step's end will not be called
            if self.memory.is_replayed and _is_missing(func, error):
                raise NotImplementedError(
                    f"{func} is not replayed: PyTorch does not tell the shape of its result "
                    "without computing it; take another operation, or compute it on the host"
                ) from None
            raise
        else:
            self._sample()
            return result
        # Raised out here, where no frame of a traceback holds the results any more.
        result, self._now.in_optimizer = None, False
        raise torch.OutOfMemoryError(message)

    def breakdown(
        self,
        model: torch.nn.Module | None = None,
        *optimizers: torch.optim.Optimizer | None,
    ) -> Breakdown:
        """What the allocated bytes are for: one row for each of `KINDS`.

        The rows add up to `memory_allocated` exactly. Parameters, gradients and
        buffers are recognised as the model's, states as the optimizer's: without
        them these bytes count as what they were born as, a batch or activations.

        Args:
            model: whose parameters, their ``.grad``, and buffers.
            optimizers: whose states.

        Raises:
            TypeError: `model` is no module, or one of `optimizers` no optimizer.
            RuntimeError: a tensor of theirs is on the device, and nobody saw it made.
        """
        with torch._C.DisableTorchFunction():  # every tensor tells its own device
            roles = self._roles(model, optimizers)
        counts: Counter[str] = Counter()
        for storage in list(self._storages.values()):  # they may die meanwhile
            counts[roles.get(storage, storage.kind)] += storage.nbytes
        return _account(counts, self.memory.memory_allocated(), self.memory.memory_requested())

    @contextmanager
    def record(
        self,
        model: torch.nn.Module | None = None,
        *optimizers: torch.optim.Optimizer | None,
        where: Callable[[], Any] | None = None,
        limit: int | None = None,
    ) -> Iterator[Timeline]:
        """Record what each operation does to memory, while the context lasts.

        The timeline is filled when the context ends, by an error too. Kinds are those of
        `breakdown`, for `model` and `optimizers` as they are at the beginning, at
        each optimizer step, and at the end.

        Args:
            model, optimizers: see above.
            where: asked at each step of the timeline, for `Timeline.where`.
            limit: births and deaths to write down at most; no bound if None.

        Raises:
            RuntimeError: another recording is under way.
        """
        if self._recording is not None:
            raise RuntimeError(f"{self.memory} cannot record: another recording is under way")
        recording = _Recording(list(self._storages.values()), where, limit)
        self._recording = recording
        timeline = Timeline()

        def look_at(handle: int) -> None:
            memory = self.memory
            recording.look(handle, memory.memory_allocated(), memory.memory_requested())

        def mark(name: str) -> None:
            self._sample()
            timeline.marks[name] = len(recording.samples) - 1

        def look(stepping: object = None, *_: object) -> None:
            looked_at = tuple(o for o in optimizers if stepping in (None, o))
            with torch._C.DisableTorchFunction():
                recording.roles |= self._roles(model, looked_at)

        look()
        self._sample()
        timeline._mark, timeline._look, timeline._see = mark, look_at, look
        at_step = register_optimizer_step_pre_hook(look)
        try:
            yield timeline
        finally:
            at_step.remove()
            look()
            self._sample()
            timeline._mark = timeline._look = timeline._see = self._recording = None
            timeline.steps += recording.steps()
            timeline.where, timeline.is_cut = recording.places, recording.is_full
            timeline.highest, timeline.highest_at = recording.highest(), recording.looked_at
            timeline.highest_where = recording.looked_where

    def _roles(
        self,
        model: torch.nn.Module | None,
        optimizers: tuple[torch.optim.Optimizer | None, ...],
    ) -> dict[_Storage, str]:
        """The storages that model and optimizers hold, and as what."""
        roles: dict[_Storage, str] = {}
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is {model!r}: expected a torch.nn.Module")
        for optimizer in optimizers:
            if optimizer is not None and not hasattr(optimizer, "state"):
                raise TypeError(f"optimizer is {optimizer!r}: expected a torch.optim.Optimizer")

        def note(kind: str, *tensors: object) -> None:
            for tensor in tree_leaves([_parts(tensor) for tensor in tensors]):
                if isinstance(tensor, torch.Tensor) and tensor.device == self.memory.device:
                    storage = self._storages.get(tensor.untyped_storage()._cdata)
                    if storage is None and not self.memory.is_replayed:
                        storage = self._know(tensor.untyped_storage(), kind)
                    if storage is not None:
                        roles[storage] = kind
                    elif not self.passes_unseen and self.memory.is_replayed:
                        self._check_tensor(f"breakdown() of {kind}", tensor)

        for optimizer in filter(None, optimizers):
            note("optimizer states", *tree_leaves(list(optimizer.state.values())))
        if model is not None:
            parameters = list(model.parameters())
            note("scales", *scales(model))
            note("buffers", *model.buffers())
            note("gradients", *(p.grad for p in parameters))
            note("parameters", *parameters)
        return roles

    def _as_unwatched(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """The operation that PyTorch calls where no mode looks, and its arguments."""
        if not isinstance(args[0], torch.Tensor):
            return func, args
        known = self._storages.get(args[0].untyped_storage()._cdata)
        made_by = None if known is None else known.made_by
        return in_place.overwriting(func, args, kwargs, made_by)

    def _are_unseen(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation's tensors on the device are none that is accounted for."""
        if func.overloadpacket in _ONLY_SHAPES:
            return False
        there = [t for t in _tensors(args) if t.device == self.memory.device]
        return bool(there) and not any(map(self.accounts_for, there))

    def accounts_for(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage was seen made, and is counted."""
        return tensor.untyped_storage()._cdata in self._storages

    def handle_of(self, tensor: torch.Tensor) -> int | None:
        """The allocator's handle of a tensor's block; None if it was not seen made."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return None if known is None else known.handle

    def _check_known(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse to compute with what was never seen made on the device, or with two devices.

        Raises:
            RuntimeError: an argument is such a tensor, or lies on the host where CUDA takes none.
            NotImplementedError: an index was a list of truth values.
        """
        if func.overloadpacket in _ONLY_SHAPES:
            return
        if func.overloadpacket in _INDEXING:
            for tensor in _tensors(args[1]):  # a Python list becomes one out of sight
                if tensor.device == self.memory.device and not self.accounts_for(tensor):
                    if tensor.dtype in (torch.bool, torch.uint8):
                        raise NotImplementedError(
                            "a Python list of truth values as an index: how many are true is not "
                            "known on a virtual GPU; write torch.tensor([...], device=...)"
                        )
                    self._know(tensor.untyped_storage(), self._now.label or "batch")
        on_host = on_device = False
        for tensor in _tensors(args):
            if tensor.device == self.memory.device:
                on_device = True
                self._check_tensor(func, tensor)
            elif tensor.dim():
                on_host = True
        if on_host and on_device and _takes_one_device(func):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (when {func} was called)"
            )
        for tensor in _tensors(kwargs.values()) if kwargs else ():
            if tensor.device == self.memory.device:
                self._check_tensor(func, tensor)

    def _check_tensor(self, what: object, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages and storage.nbytes():
            raise RuntimeError(
                f"{what} got a tensor of shape {tuple(tensor.shape)} on {self.memory.device} whose "
                f"{storage.nbytes():,} bytes no one accounts for: make it while the GPU in use is "
                "open, not in untracked(), and not in a thread that ran before"
            )

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Account for the storages that an operation made."""
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, _FAKE):
                continue
            if tensor.device != self.memory.device:
                continue
            if tensor.layout is not torch.strided:
                raise NotImplementedError(
                    f"{func} makes a tensor of layout {tensor.layout}: "
                    "only dense tensors are accounted for; make it dense, as by sparse=False"
                )
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            known = self._storages.get(key)
            if known is None:
                self._know(storage, self._birth(func, args))
            elif known.nbytes != nbytes:  # resized in place
                self._resized(key, nbytes)

    def _resized(self, key: int, nbytes: int) -> None:
        """Account for a storage that has another size now: PyTorch takes the new block first."""
        known = self._storages[key]
        handle = self.memory.malloc(nbytes)
        self._storages[key] = new = _Storage(nbytes, known.kind, handle)
        self._log(new, +1)
        self._log(known, -1)
        self._free(known)

    @contextmanager
    def _seeing_storages(self) -> Iterator[None]:
        """See what storages do by themselves, too, which is no operation.

        That is ``UntypedStorage(nbytes, device=...)``, and ``resize_``: FSDP's way to free.
        """
        init, resize = torch.UntypedStorage.__init__, torch.UntypedStorage.resize_

        def init_(storage: torch.UntypedStorage, *args: Any, **kwargs: Any) -> None:
            init(storage, *args, **kwargs)
            if self.in_use and storage.device == self.memory.device:
                self._sample()
                try:
                    self._know(storage, self._now.label or "activations")
                except OutOfMemoryError as error:
                    raise torch.OutOfMemoryError(str(error)) from None
                self._sample()

        def resize_(storage: torch.UntypedStorage, nbytes: int) -> Any:
            if not self.in_use or storage._cdata not in self._storages:
                return resize(storage, nbytes)
            self._sample()
            try:
                self._resized(storage._cdata, nbytes)
            except OutOfMemoryError as error:
                raise torch.OutOfMemoryError(str(error)) from None
            resized = resize(storage, nbytes)
            self._sample()
            return resized

        with (
            mock.patch.object(torch.UntypedStorage, "__init__", init_),
            mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        ):
            yield

    @contextmanager
    def _seeing_data(self) -> Iterator[None]:
        """See tensors made of Python's numbers, too: on ``meta`` that is no operation."""

        def seen(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            @wraps(make)
            def made(*args: Any, **kwargs: Any) -> torch.Tensor:
                tensor = make(*args, **kwargs)
                if not self.in_use or tensor.device != self.memory.device:
                    return tensor
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._sample()
                    try:
                        self._know(storage, self._now.label or "batch")  # copied from the host
                    except OutOfMemoryError as error:
                        raise torch.OutOfMemoryError(str(error)) from None
                    self._sample()
                return tensor

            return made

        _device_constructors()  # knows them, and is kept, as they are now
        with ExitStack() as stack:
            for owner, name in (
                *((torch, name) for name in ("tensor", "as_tensor", "asarray")),
                (torch.Tensor, "new_tensor"),
            ):
                make = seen(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, make))
            yield

    def _know(self, storage: torch.UntypedStorage, kind: str) -> _Storage:
        """Account for a storage from now until its death.

        Raises:
            RuntimeError: this is a process that was forked meanwhile, in CUDA's words.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with "
                "multiprocessing, you must use the 'spawn' start method"
            )
        nbytes = storage.nbytes()
        known = _Storage(nbytes, kind, self.memory.malloc(nbytes), in_place.node())
        self._storages[storage._cdata] = known
        weakref.finalize(storage, self._died, storage._cdata).atexit = False
        self._log(known, +1)
        return known

    def _birth(self, func: Any, args: tuple[Any, ...]) -> str:
        """The kind of a storage that an operation makes."""
        if self._now.label:
            return self._now.label
        if in_backward() or self.in_optimizer:
            return "temporaries"
        if func.overloadpacket is torch.ops.aten.lift_fresh:
            return "batch"  # a list of numbers, which PyTorch 2.15 shows where 2.14 does not
        if func.overloadpacket is torch.ops.aten._to_copy:
            if args[0].device.type == "cpu":
                return "batch"
            if args[0].requires_grad and args[0].is_leaf and _in_autocast():
                return "cast weights"
        return "activations"

    def _died(self, key: int) -> None:
        if torch._C._storage_Use_Count(key) > 1:
            # The garbage collector of Python clears weak references to a storage in a cycle,
            # such as torch.save leaves behind, though PyTorch keeps it for its tensor (2.8).
            alive = torch.UntypedStorage._new_with_weak_ptr(key)
            weakref.finalize(alive, self._died, key).atexit = False
            return
        storage = self._storages.pop(key)
        self._log(storage, -1)
        self._free(storage)

    def _log(self, storage: _Storage, sign: int) -> None:
        recording = self._recording
        if recording is None:
            return
        if sign > 0 and storage.handle is not None and recording.newest == storage.handle:
            recording.newest = storage
        if not recording.is_full:
            recording.events.append((storage, sign))

    def _sample(self) -> None:
        """Between two operations: note what memory is now, if it changed."""
        recording = self._recording
        if recording is None or self._now.in_kernel or recording.is_full:
            return
        now = (
            len(recording.events),
            self.memory.memory_allocated(),
            self.memory.memory_requested(),
        )
        if recording.samples[-1:] != [now]:
            recording.samples.append(now)
            if recording.where is not None:
                recording.places.append(recording.where())

    def _free(self, storage: _Storage) -> None:
        if storage.handle is not None:
            self.memory.free(storage.handle)


def _account(counts: Counter[str], allocated: int, requested: int) -> Breakdown:
    """Complete the bytes of tensors by kind with what no tensor holds."""
    rows = Breakdown((kind, counts[kind]) for kind in KINDS)
    rows["workspaces"] = requested - sum(counts.values())
    rows["rounding"] = allocated - requested
    return rows
