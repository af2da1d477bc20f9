"""Values on a device without data: what comes from the host, or from other known values.

Tokens, masks, positions, counters and other whole numbers decide what a program
does; weights and activations hardly ever do. So a whole-number tensor of the
``meta`` device keeps its values on the host, and so does a small one of floating
point, as long as they follow from what is known. `Values` carries each such
operation out a second time, there. The host's copies belong to *storages*: views
of one storage share them, as they share the device's bytes.

What follows from unknown values is assumed where it is made: a whole number is 0,
a truth value False, but ``isfinite`` answers as for healthy numbers. What depends
on one of these is marked, and once a program reads a marked value
(``.item()``, ``if``, ``.cpu()``, a result whose size depends on it) that is an
`Assumption` with the program's lines, or an `UnknownValueError`. A floating-point
number that is unknown reads as NaN. Random numbers are drawn on the host, from a
generator of their own: one draw is as good as another.
"""

import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from mmap import mmap
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves, tree_map

from every_byte.tracker import are_fake
from every_byte.units import MiB
from every_byte.virtual.shapes import on_meta

aten = torch.ops.aten

WHOLE = frozenset(
    getattr(torch, name)
    for name in "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64".split()
)
"""The dtypes of tensors that keep their values."""

LARGEST = 32 * MiB
"""Bytes of a storage of whole numbers, up to which its values are kept."""

LARGEST_FLOAT = 4096
"""The same for a storage of floating-point numbers."""

LARGEST_CAST = 4 * MiB
"""The same for floating-point numbers that are whole numbers cast, or ones, as masks are."""

_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_HOST = torch.device("cpu")


class _Even(str):
    """What made an assumption: a choice among equals, taken to fall on each as often.

    So a mixture of experts routes its tokens, and no result is larger for it than an even
    choice makes it; the most that there could be is said beside it.
    """


class UnknownValueError(RuntimeError):
    """A program reads a value that the virtual GPU does not have."""


@dataclass(frozen=True)
class Assumption:
    """A value that a program read, though the virtual GPU does not know it.

    Attributes:
        operation: that read it, such as ``item``.
        line: of the program, ``file:number``, where it was read.
        answer: what was assumed.
        made_by: the operation that made the value, and its line; empty if not known.
    """

    operation: str
    line: str
    answer: str
    made_by: str

    def __str__(self) -> str:
        made = f" (a value made by {self.made_by})" if self.made_by else ""
        return f"{self.line}: {self.operation} answered {self.answer}{made}"


# The program's own lines


@cache
def is_library(filename: str) -> bool:
    """Whether a file is Python's, an installed package's, or this package's."""
    if filename.startswith("<"):
        return not filename.startswith(("<ipython", "<stdin", "<string"))
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))]
    folders += [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    full = os.path.abspath(filename)
    return any(full.startswith(folder + os.sep) for folder in folders)


def program_place() -> tuple[str, int] | None:
    """File and line of the innermost frame that belongs to no library; None if none does."""
    frame = sys._getframe(1)
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def program_line() -> str:
    """``file:number`` of the innermost frame that belongs to no library; "?" if none does."""
    place = program_place()
    return "?" if place is None else f"{os.path.basename(place[0])}:{place[1]}"


def _is_within(function: str) -> bool:
    """Whether a library's function of this name is being carried out."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and is_library(frame.f_code.co_filename):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


# Where the host's copies are


@dataclass(eq=False, slots=True)
class _Copy:
    """A storage's bytes on the host; `origin` says what made it an assumption, if it is one."""

    bytes: torch.UntypedStorage
    origin: str | None


def _copy_of(tensor: Tensor) -> _Copy | None:
    storage = tensor.untyped_storage()
    copy: _Copy | None = getattr(storage, "_every_byte_copy", None)
    if copy is not None and copy.bytes.nbytes() < storage.nbytes():  # resized since
        return None
    return copy


def _on_host(tensor: Tensor, copy: _Copy) -> Tensor:
    """The host's tensor with the same place in its storage as a meta tensor has."""
    host = torch.empty(0, dtype=tensor.dtype, device=_HOST)
    return host.set_(copy.bytes, tensor.storage_offset(), tensor.size(), tensor.stride())


def _value(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_meta:
        copy = _copy_of(x)
        assert copy is not None
        return _on_host(x, copy)
    return x


def _unwritten(tensor: Tensor) -> Tensor:
    """Memory of a tensor's shape on the host, that takes no pages until it is touched."""
    with _out_of_sight():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_HOST)


def _is_small(tensor: Tensor, is_cast: bool = False) -> bool:
    """Whether the values of a meta tensor's storage are kept, where they are known."""
    if tensor.layout is not torch.strided:
        return False
    if tensor.dtype in WHOLE:
        return tensor.untyped_storage().nbytes() <= LARGEST
    largest = LARGEST_CAST if is_cast else LARGEST_FLOAT
    return tensor.dtype in _FLOATS and tensor.untyped_storage().nbytes() <= largest


def _is_cast(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation only gives whole numbers another dtype, or makes ones."""
    return func is aten.ones.default or (func is aten._to_copy.default and args[0].dtype in WHOLE)


def _blank(tensor: Tensor, origin: str | None = None) -> _Copy:
    """Zeros for a tensor's whole storage; large ones take no pages until they are touched."""
    copy = _Copy(_zeros(tensor.untyped_storage().nbytes()), origin)
    tensor.untyped_storage()._every_byte_copy = copy  # type: ignore[attr-defined]
    return copy


def _zeros(size: int) -> torch.UntypedStorage:
    if size >= MiB:
        return torch.frombuffer(mmap(-1, size), dtype=torch.uint8).untyped_storage()
    return torch.zeros(size, dtype=torch.uint8, device=_HOST).untyped_storage()


def _clear(tensor: Tensor, copy: _Copy) -> None:
    """Let a tensor be zeros; pages of a large one, if it is the whole storage, are given back."""
    size = copy.bytes.nbytes()
    if size >= MiB and tensor.is_contiguous() and tensor.nbytes == size:
        copy.bytes = _zeros(size)
    else:
        _on_host(tensor, copy).zero_()


def _forget(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if getattr(storage, "_every_byte_copy", None) is not None:
        storage._every_byte_copy = None  # type: ignore[attr-defined]


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors among arguments, in lists of them too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


# What is to be known of an operation


@dataclass(frozen=True, slots=True)
class _Operation:
    is_view: bool
    is_empty: bool  # makes memory that nothing is written to
    overwrites: bool  # its first argument, whatever was in it
    is_random: bool
    takes_a_shape: bool  # of its first argument, and not its numbers
    mutates: tuple[int | str, ...]  # places or names of arguments that it writes to


_EMPTY = frozenset(
    (
        *("empty", "empty_strided", "empty_like", "empty_permuted", "new_empty"),
        *("new_empty_strided", "empty_quantized"),
    )
)
_TAKES_A_SHAPE = frozenset(
    (
        *("full_like", "zeros_like", "ones_like", "rand_like", "randn_like", "randint_like"),
        *("new_full", "new_zeros", "new_ones"),
    )
)
_OVERWRITES = frozenset(
    (
        *("fill_", "zero_", "copy_", "uniform_", "normal_", "random_", "bernoulli_"),
        *("exponential_", "log_normal_", "cauchy_", "geometric_"),
    )
)


@cache
def _about(func: Any) -> _Operation:
    schema = func._schema
    name = schema.name.partition("::")[2]
    written = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    aliases = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    return _Operation(
        is_view=(aliases and not written) or name in ("set_", "_unsafe_view", "detach_"),
        is_empty=name in _EMPTY,
        overwrites=name in _OVERWRITES,
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        takes_a_shape=name in _TAKES_A_SHAPE,
        mutates=written,
    )


def _healthy(func: Any, args: tuple[Any, ...]) -> bool | None:
    """What a comparison answers for numbers that are neither infinite nor NaN, where that says it.

    ``isfinite`` arrives as ``x == x`` and ``abs(x) != inf``
    (aten/src/ATen/native/TensorCompare.cpp of PyTorch 2.14).
    """
    name = func._schema.name
    if name in ("aten::isnan", "aten::isinf", "aten::isposinf", "aten::isneginf"):
        return False
    if name not in ("aten::eq", "aten::ne", "aten::lt", "aten::gt") or len(args) < 2:
        return None
    left, right = args[:2]
    if left is right and isinstance(left, Tensor):
        return name == "aten::eq"
    if isinstance(right, float) and math.isinf(right):
        return {
            "aten::eq": False,
            "aten::ne": True,
            "aten::lt": right > 0,
            "aten::gt": right < 0,
        }[name]
    return None


def _are_corners(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a later part of a tensor is asked to be no less than an earlier one of it.

    So programs check that boxes have their second corner behind their first.
    """
    if func._schema.name != "aten::ge" or not all(isinstance(t, Tensor) for t in args[:2]):
        return False
    late, early = args[:2]
    return (
        late.shape == early.shape
        and late.untyped_storage()._cdata == early.untyped_storage()._cdata
        and late.storage_offset() > early.storage_offset()
    )


def _goes_on(func: Any) -> bool:
    """Whether it is asked if a beam search of transformers may find better beams: until its end.

    It would end as soon as an answer is False (``_check_early_stop_heuristic`` in
    ``transformers/generation/utils.py`` of 5.23).
    """
    return func._schema.name == "aten::gt" and _is_within("_check_early_stop_heuristic")


def _keeps_beams() -> bool:
    """Whether a beam search of transformers chooses the beams that it answers with.

    Among finished ones of before, of which there are none, and what runs on until the end, which
    stands behind them (``_update_finished_beams`` in ``transformers/generation/utils.py`` of
    5.23).
    """
    return _is_within("_update_finished_beams")


def _seeks_timestamps() -> bool:
    """Whether Whisper looks for timestamps among the tokens of a segment, by ``torch.where``.

    From one it takes the place to go on at (``_retrieve_segment`` in
    ``transformers/models/whisper/generation_whisper.py`` of 5.17). Tokens that are assumed are
    0, and no timestamps: it goes on behind the segment, as where it finds none.
    """
    return _is_within("_retrieve_segment")


def _is_traced() -> bool:
    """Whether ``make_fx`` writes down each operation of this thread: then none is ours."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


_active: list["Values"] = []


class _Seeing(TorchDispatchMode):
    """Shows a thread's operations to a `Values`."""

    def __init__(self, values: "Values") -> None:
        super().__init__()
        self._values = values

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
        return self._values.dispatch(func, types, args, kwargs or {})


class Values:
    """Keeps the values of ``meta`` tensors where they are known, and answers for the others.

    Args:
        unknown: "assume": a program that reads an unknown value goes on with what is
            assumed, and `assumptions` lists it. "refuse": it gets an `UnknownValueError`.

    Raises:
        ValueError: `unknown` is neither.

    Attributes:
        assumptions: each one that was read, and how often.
    """

    def __init__(self, unknown: Literal["assume", "refuse"] = "refuse") -> None:
        if unknown not in ("assume", "refuse"):
            raise ValueError(f"values is {unknown!r}: expected 'assume' or 'refuse'")
        self.unknown = unknown
        self.assumptions: dict[Assumption, int] = {}
        self._draws: Tensor | None = None  # the state of the generator for random numbers

    @contextmanager
    def running(self) -> Iterator[None]:
        """Answer while the context lasts; of several, only the last one does."""
        _active.append(self)
        try:
            with keeping_data():
                yield
        finally:
            _active.remove(self)

    def seeing(self) -> AbstractContextManager[object]:
        """See this thread's operations while the context lasts."""
        return _Seeing(self)

    def dispatch(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation on ``meta``, and on the host where its values are known."""
        if _active[-1:] != [self] or _is_traced() or (types and are_fake(types)):
            return func(*args, **kwargs)
        if types and any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # seen is what it does with its parts
        about = _about(func)
        if about.is_view:
            return func(*args, **kwargs)
        answer = _ANSWERS.get(func._schema.name)
        if answer is not None:
            answered = answer(self, func, args, kwargs)
            if answered is not NotImplemented:
                return answered
        result = on_meta(func, args, kwargs)
        self._note(func, about, args, kwargs, result)
        return result

    def beside(self, func: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """A function that stands in for an operation on ``meta``, with its values kept as well."""

        def run(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if _active[-1:] == [self]:
                with _out_of_sight():
                    given = {id(t.untyped_storage()) for t in _tensors((*args, *kwargs.values()))}
                    made = [t for t in _tensors(tree_leaves(result)) if t.is_meta]
                    for tensor in made:
                        if id(tensor.untyped_storage()) not in given:
                            _forget(tensor)  # an empty tensor of the kernel's
                    self._note(func, _about(func), args, kwargs, result)
            return result

        return run

    @staticmethod
    def known(tensor: Tensor) -> Tensor | None:
        """A copy of a meta tensor's values; None if they are not known, or assumed."""
        copy = _copy_of(tensor)
        if copy is None or copy.origin is not None:
            return None
        with _out_of_sight():
            return _on_host(tensor, copy).clone()

    @staticmethod
    def may_be_written(tensors: list[Tensor], by: str) -> None:
        """Let what is known of tensors be an assumption, or for floating point not be known."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                copy = _copy_of(tensor)
                if copy is not None and tensor.dtype in WHOLE:
                    copy.origin = f"{by} at {program_line()}"
                else:
                    _forget(tensor)

    # After an operation

    def _note(
        self, func: Any, about: _Operation, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Keep what is known of an operation's results."""
        if about.mutates:
            self._note_in_place(func, about, args, kwargs)
            return
        if isinstance(result, Tensor):
            if not result.is_meta or not _is_small(result, _is_cast(func, args)):
                return
            made = [result]
        else:
            made = [t for t in _tensors(tree_leaves(result)) if t.is_meta and _is_small(t)]
        made = [t for t in made if getattr(t.untyped_storage(), "_every_byte_copy", None) is None]
        if not made:
            return
        if about.is_empty:
            for tensor in made:
                if tensor.dtype in WHOLE:
                    _blank(tensor)
            return
        if about.takes_a_shape and args[0].is_meta:
            args = (_unwritten(args[0]), *args[1:])
        known, origin = _known((*args, *kwargs.values()))
        if known:
            try:
                on_host = self._carry_out(func, about, args, kwargs)
            except Exception:  # the host's kernel may not have this dtype or layout
                origin = self._origin(func)
            else:
                self._keep(func, result, on_host, origin, args, kwargs)
                return
        healthy = _healthy(func, args)
        for tensor in made:
            if tensor.dtype in WHOLE:
                copy = _blank(tensor, None if healthy is not None else self._origin(func))
                if healthy or (healthy is None and (_are_corners(func, args) or _goes_on(func))):
                    _on_host(tensor, copy).fill_(True)

    def _note_in_place(
        self, func: Any, about: _Operation, args: Any, kwargs: dict[str, Any]
    ) -> None:
        written = [
            tensor
            for place in about.mutates
            for tensor in _tensors([kwargs.get(place) if isinstance(place, str) else args[place]])
            if tensor.is_meta
        ]
        if not written:
            return
        if func._schema.name == "aten::_amp_foreach_non_finite_check_and_unscale_":
            written = list(_tensors(args[:1]))  # found_inf stays as it is: healthy
        given = (*args[1:], *kwargs.values()) if about.overwrites else (*args, *kwargs.values())
        known, origin = _known(given)
        if known and about.overwrites and _copy_of(args[0]) is None:
            whole = args[0].numel() * args[0].element_size() == args[0].untyped_storage().nbytes()
            if _is_small(args[0]) and (whole or args[0].dtype in WHOLE):
                _blank(args[0])
            else:
                return  # a part of what is not known
        if func is aten.zero_.default and (copy := _copy_of(args[0])) is not None:
            _clear(args[0], copy)
        elif known:
            try:
                self._carry_out(func, about, args, kwargs)
            except Exception:
                known, origin = False, self._origin(func)
        for tensor in written:
            copy = _copy_of(tensor)
            if copy is None:
                if tensor.dtype in WHOLE and _is_small(tensor):
                    _blank(tensor, origin or self._origin(func))
            elif known:
                everything = tensor.numel() * tensor.element_size() == copy.bytes.nbytes()
                if origin or (about.overwrites and everything):
                    copy.origin = origin
            elif tensor.dtype in WHOLE:
                _clear(tensor, copy)
                copy.origin = self._origin(func)
            else:
                _forget(tensor)

    def _carry_out(self, func: Any, about: _Operation, args: Any, kwargs: dict[str, Any]) -> Any:
        given = tree_map(_value, kwargs)
        if given.get("device") is not None:
            given["device"] = _HOST
        if about.is_random:
            with self._drawing():
                return func(*tree_map(_value, args), **given)
        return func(*tree_map(_value, args), **given)

    def _keep(
        self,
        func: Any,
        result: Any,
        on_host: Any,
        origin: str | None,
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        shared = {id(t.untyped_storage()) for t in _tensors((*args, *kwargs.values()))}
        for tensor, host in zip(tree_leaves(result), tree_leaves(on_host), strict=False):
            if not (isinstance(tensor, Tensor) and isinstance(host, Tensor) and tensor.is_meta):
                continue
            if _copy_of(tensor) is not None or not _is_small(tensor, _is_cast(func, args)):
                continue
            if id(host.untyped_storage()) in shared or (
                host.stride() != tensor.stride()
                or host.storage_offset() != tensor.storage_offset()
                or host.untyped_storage().nbytes() < tensor.untyped_storage().nbytes()
            ):
                copy = _blank(tensor, origin)
                _on_host(tensor, copy).copy_(host)
            else:
                copy = _Copy(host.untyped_storage(), origin)
                tensor.untyped_storage()._every_byte_copy = copy  # type: ignore[attr-defined]

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Draw random numbers without a trace in the program's own generator."""
        before = torch.get_rng_state()
        if self._draws is None:
            self._draws = torch.Generator(_HOST).manual_seed(0).get_state()
        torch.set_rng_state(self._draws)
        try:
            yield
        finally:
            self._draws = torch.get_rng_state()
            torch.set_rng_state(before)

    @staticmethod
    def _origin(func: Any) -> str:
        return f"{func._schema.name.partition('::')[2]} at {program_line()}"

    def _read(self, operation: str, origin: str, answer: str) -> None:
        """An unknown value is read: note it, or refuse it.

        Raises:
            UnknownValueError: it is refused.
        """
        line = program_line()
        if self.unknown == "refuse":
            made = f" of {origin}" if origin else ""
            raise UnknownValueError(
                f"{operation} at {line} reads a value{made} that a virtual GPU does not have: "
                "leave it out, or go on with an assumption by values='assume'"
            )
        assumption = Assumption(operation, line, answer, origin)
        self.assumptions[assumption] = self.assumptions.get(assumption, 0) + 1


def _known(given: tuple[Any, ...]) -> tuple[bool, str | None]:
    """Whether the values of all tensors are known, and on which assumption, if on one.

    Of several, an even choice is the last to be named: it alone says how large a result is.
    """
    origin: str | None = None
    for tensor in _tensors(given):
        if tensor.is_meta:
            copy = _copy_of(tensor)
            if copy is None:
                return False, None
            if copy.origin is not None and (origin is None or isinstance(origin, _Even)):
                origin = copy.origin
    return True, origin


@contextmanager
def _out_of_sight() -> Iterator[None]:
    """Let nobody see the operations on the host."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


# Operations that read values: each answers, or leaves it to the host's kernel


def _item(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not tensor.is_meta:
        return NotImplemented
    copy = _copy_of(tensor)
    if copy is not None and copy.origin is None:
        return func(_on_host(tensor, copy))
    answer = func(_on_host(tensor, copy)) if copy else math.nan
    values._read("item()", copy.origin if copy and copy.origin else "", str(answer))
    return answer


def _equal(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    if not any(t.is_meta for t in args[:2]):
        return NotImplemented
    if args[0] is args[1]:
        return True
    if args[0].shape != args[1].shape:
        return False
    known, origin = _known(args)
    answer = func(*map(_value, args)) if known else False
    if not known or origin:
        values._read("equal()", origin or "", str(answer))
    return answer


def _allclose(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    """Of unknown numbers it is True: programs that check so go on."""
    if not any(t.is_meta for t in args[:2]):
        return NotImplemented
    known, origin = _known(args[:2])
    answer = func(*map(_value, args), **kwargs) if known else True
    if not known or origin:
        values._read("allclose()", origin or "", str(answer))
    return answer


def _host_copy(values: Values, tensor: Tensor, operation: str) -> Tensor:
    """A meta tensor's values, on the host, with the same strides."""
    copy = _copy_of(tensor)
    if copy is not None:
        if copy.origin is not None:
            values._read(operation, copy.origin, "what was assumed")
        return _on_host(tensor, copy)
    # One number is shown, as a loss; many are computed with, as by SciPy, which refuses NaN.
    fill = math.nan if tensor.dtype.is_floating_point and not tensor.dim() else 0
    values._read(operation, "", str(fill))
    return torch.full((), fill, dtype=tensor.dtype, device=_HOST).expand(tensor.shape)


def _to_copy(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    target = kwargs.get("device")
    if target is None or not args[0].is_meta or torch.device(target).type != "cpu":
        return NotImplemented
    host = _host_copy(values, args[0], "a copy to the host")
    given = {name: kwargs.get(name) for name in ("dtype", "memory_format")}
    if _copy_of(args[0]) is not None:
        return func(host, device=_HOST, **given)
    like = torch.empty_like(args[0], **{k: v for k, v in given.items() if v is not None})
    dtype, size, stride = like.dtype, like.size(), like.stride()
    if host.numel() and host[(0,) * host.dim()] == 0:  # of all of them, without their memory
        result = torch.zeros(like.untyped_storage().nbytes(), dtype=torch.uint8, device=_HOST)
        return torch.empty(0, dtype=dtype, device=_HOST).set_(
            result.untyped_storage(), 0, size, stride
        )
    return torch.empty_strided(size, stride, dtype=dtype, device=_HOST).copy_(host)


def _copy_(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    if args[0].is_meta or not args[1].is_meta:
        return NotImplemented
    return func(args[0], _host_copy(values, args[1], "a copy to the host"), *args[2:], **kwargs)


# Operations whose result's size depends on values


def _made(values: Values, tensor: Tensor, host: Any, origin: str | None) -> Any:
    """Results on ``meta`` like those on the host, with their values."""

    def make(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        meta = torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device=tensor.device)
        if _is_small(meta):
            _on_host(meta, _blank(meta, origin)).copy_(one)
        return meta

    return tree_map(make, host)


_LARGEST = "the largest result that there can be"
_ZEROS = "a result as if the unknown numbers were 0; it can be larger"


def _of_at_most(even: Any, largest: Any) -> str:
    """What is said of a result that depends on an even choice, with the worst case."""
    counts = [tree_leaves(result)[0].size(0) for result in (even, largest)]
    return f"what an even choice gives, {counts[0]} rows; at worst it is {max(counts)}"


def _sized(
    what: str, assumed: Callable[..., Any], assumption: str = _LARGEST
) -> Callable[..., Any]:
    """Answer with the host's result where all is known, else with an `assumed` one."""

    def answer(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
        if not any(t.is_meta for t in _tensors(args)):
            return NotImplemented
        known, origin = _known((*args, *kwargs.values()))
        if known and not origin:
            host = func(*tree_map(_value, args), **tree_map(_value, kwargs))
            return _made(values, args[0], host, None)
        if isinstance(origin, _Even):
            host = func(*tree_map(_value, args), **tree_map(_value, kwargs))
            values._read(what, origin, _of_at_most(host, assumed(func, *args, **kwargs)))
            return _made(values, args[0], host, origin)
        made_by = origin or values._origin(func)
        if known and what == "nonzero()" and _seeks_timestamps():
            values._read(what, made_by, "what it is of the tokens that were assumed")
            return _made(values, args[0], func(*tree_map(_value, args)), made_by)
        if known and assumed is _all_different and bool((_value(args[0]) != 0).any()):
            # chosen from known values, such as the classes of a detector's boxes
            values._read(what, made_by, "what it is of the largest choice that there can be")
            host = func(*tree_map(_value, args), **tree_map(_value, kwargs))
            return _made(values, args[0], host, made_by)
        values._read(what, origin or "", assumption)
        return _made(values, args[0], assumed(func, *args, **kwargs), made_by)

    return answer


def _all_of_it(func: Any, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.ones(tensor.shape, dtype=torch.bool, device=_HOST).nonzero()


def _all_different(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    count = tensor.size(args[0]) if "dim" in func._schema.name else tensor.numel()
    numbers = torch.arange(count, device=_HOST)
    if "dim" in func._schema.name:
        shape = [count if d == args[0] % tensor.dim() else 1 for d in range(tensor.dim())]
        numbers = numbers.view(shape).expand(tensor.shape).contiguous()
        args = (args[0], *args[1:])
    return func(numbers.to(tensor.dtype), *args, **kwargs)


def _with_zeros(func: Any, *args: Any, **kwargs: Any) -> Any:
    def zeros(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_meta:
            copy = _copy_of(x)
            if copy is not None:
                return _on_host(x, copy)
            return torch.zeros(x.shape, dtype=x.dtype, device=_HOST)
        return x

    return func(*map(zeros, args), **{name: zeros(x) for name, x in kwargs.items()})


def _repeat_interleave(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("output_size") is not None:
        return NotImplemented
    return _repeated(values, func, args, kwargs)


_repeated = _sized("repeat_interleave()", _with_zeros, _ZEROS)


def _masked_select(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, mask = args[:2]
    if not (tensor.is_meta or mask.is_meta):
        return NotImplemented
    known, origin = _known((mask,))
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    if known and (not origin or isinstance(origin, _Even)):
        count = int(_value(mask).expand(shape).sum())
        if origin:
            at_most = f"{count} elements; at worst it is {math.prod(shape)}"
            values._read("masked_select()", origin, f"what an even choice gives, {at_most}")
    else:
        values._read("masked_select()", origin or "", _LARGEST)
        count = math.prod(shape)
    result = torch.empty(count, dtype=tensor.dtype, device="meta")
    if known and not origin and _is_small(result) and _known((tensor,))[0]:
        copy = _blank(result, _known((tensor,))[1])
        _on_host(result, copy).copy_(func(_value(tensor), _value(mask)))
    elif tensor.dtype in WHOLE and _is_small(result):
        _blank(result, origin or values._origin(func))
    return result


def _isin(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    # An assumed token is none in particular: a text does not end by it.
    if not (isinstance(args[0], Tensor) and args[0].is_meta):
        return NotImplemented
    _, origin = _known(args[:1])
    if origin is None:
        return NotImplemented
    result = func(*args, **kwargs)
    _blank(result, origin)
    return result


def _nms(func: Any, boxes: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.arange(boxes.size(0), device=_HOST)


def _chosen(values: Values, func: Any, args: Any, kwargs: Any) -> Any:
    """The places that ``topk`` chooses by unknown numbers: for each row the next ones.

    They are different within a row, as they must be, and each is chosen as often. Only beams
    are kept as `_keeps_beams` says.
    """
    if not args[0].is_meta or _known(args)[0]:
        return NotImplemented
    result = func(*args, **kwargs)
    places = result[1]
    if not _is_small(places) or not places.numel():
        return result
    dimension = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    with _out_of_sight():
        count = args[0].size(dimension) if args[0].dim() else 1
        each = torch.arange(places.numel(), device=_HOST) % count
        width = places.size(dimension) if places.dim() else 1
        if _keeps_beams():
            each = each % width + width  # behind the finished beams of before
        moved = list(places.shape)
        if moved:
            moved.append(moved.pop(dimension))
            each = each.view(moved).movedim(-1, dimension)
        assert width <= count
        _on_host(places, _blank(places, _Even(values._origin(func)))).copy_(each)
    return result


_ANSWERS: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _item,
    "aten::item": _item,
    "aten::equal": _equal,
    "aten::allclose": _allclose,
    "aten::_to_copy": _to_copy,
    "aten::copy_": _copy_,
    "aten::nonzero": _sized("nonzero()", _all_of_it),
    "aten::_unique": _sized("unique()", _all_different),
    "aten::_unique2": _sized("unique()", _all_different),
    "aten::unique_dim": _sized("unique()", _all_different),
    "aten::unique_consecutive": _sized("unique_consecutive()", _all_different),
    "aten::bincount": _sized("bincount()", _with_zeros, _ZEROS),
    "aten::repeat_interleave": _repeat_interleave,
    "aten::masked_select": _masked_select,
    "aten::isin": _isin,
    "aten::topk": _chosen,
    "torchvision::nms": _sized("nms()", _nms),
}


def _numbers(data: Any) -> Any:
    """Nested lists in which tensors of the ``meta`` device gave way to their values."""
    if isinstance(data, (list, tuple)):
        if any(isinstance(each, (list, tuple, Tensor)) for each in data):
            return [_numbers(each) for each in data]
    elif isinstance(data, Tensor):
        with torch._C.DisableTorchFunction():
            if data.is_meta:
                return data.tolist() if data.dim() else data.item()
    return data


def as_indices(tensor: Tensor, place: Any) -> Any:
    """The place of ``tensor[place]``, with tensors for lists of whole numbers or truth values.

    C++ makes tensors of them without values (``sequenceToVariable`` in
    torch/csrc/autograd/python_variable_indexing.cpp of PyTorch 2.14). A list that has lists in
    it is a tuple of them (``treatSequenceAsTuple`` there).
    """
    if isinstance(place, list) and not any(isinstance(each, list) for each in place):
        return _as_index(tensor, place)
    if isinstance(place, (list, tuple)) and any(isinstance(each, list) for each in place):
        with_tensors = [
            _as_index(tensor, each) if isinstance(each, list) else each for each in place
        ]
        return with_tensors if isinstance(place, list) else tuple(with_tensors)
    return place


def _as_index(tensor: Tensor, numbers: list[Any]) -> Any:
    with torch._C.DisableTorchFunction():
        is_meta = tensor.is_meta
    kinds = {type(each) for each in tree_leaves(numbers)}
    if not is_meta or not kinds <= {bool, int}:
        return numbers
    return tensor.new_tensor(numbers, dtype=torch.bool if kinds == {bool} else torch.int64)


@contextmanager
def keeping_data() -> Iterator[None]:
    """Let ``torch.tensor`` and its like keep the values that a program gives them.

    On ``meta`` they drop these before any operation is seen (``internal_new_from_data`` in
    torch/csrc/utils/tensor_new.cpp of PyTorch 2.14).
    """

    def keeping(make: Callable[..., Tensor], place: int) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            data = args[place] if len(args) > place else kwargs.get("data")
            if isinstance(data, (list, tuple)):
                data = _numbers(data)  # C++ would ask a meta tensor in a list for its value
                if len(args) > place:
                    args = (*args[:place], data, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, "data": data}
            result = make(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                if not result.is_meta or isinstance(data, Tensor) or not _is_small(result):
                    return result
                with _out_of_sight():
                    host = torch.tensor(data, dtype=result.dtype, device=_HOST)
                    _on_host(result, _blank(result)).copy_(host)
            return result

        return made

    _device_constructors()  # knows them, and is kept, as they are now
    with ExitStack() as stack:
        for owner, name, place in (
            (torch, "tensor", 0),
            (torch, "as_tensor", 0),
            (Tensor, "new_tensor", 1),
        ):
            kept = keeping(getattr(owner, name), place)
            stack.enter_context(mock.patch.object(owner, name, kept))
        yield


def index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Indexing with masks as CUDA does it: by the places of what is true.

    ``expandTensors`` in aten/src/ATen/native/IndexingUtils.h of PyTorch 2.14.
    """
    places: list[Tensor | None] = []
    for each in indices:
        if each is not None and each.dtype in (torch.bool, torch.uint8):
            found = aten.nonzero(each)
            places += [found.select(1, dimension) for dimension in range(each.dim())]
        else:
            places.append(each)
    return aten.index(tensor, places)


def has_masks(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation is indexing with a mask, for `index` to carry out."""
    return func is aten.index.Tensor and any(
        t is not None and t.is_meta and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )
