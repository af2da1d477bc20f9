"""What PyTorch's ``meta`` kernels answer, remembered: layer after layer asks the same.

Most ``meta`` kernels are Python: they work out shape, strides and dtype of a result, and
take ten times as long as all the accounting. What they answer depends on nothing but shapes,
strides and dtypes of what they are given, its other arguments, and the default dtype. So the
second time the answer is only made anew, as PyTorch's own ``FakeTensorMode`` does it
(``_cached_dispatch_impl`` in torch/_subclasses/fake_tensor.py of PyTorch 2.14).

Only for operations of PyTorch's own on dense tensors that are all on ``meta``, whose results
have memory of their own, no more than they need, or are what is written to.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
LARGEST = 20_000
"""Answers that are kept, in about 20 MB."""

_Fresh: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype]


class _NotComparableError(Exception):
    """An argument is none that a remembered call can be told by."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an operation gives back.

    Attributes:
        makes: what to make anew; None for no result at all.
        container: list or tuple of what is made; None for one tensor.
        first: it is the first argument, which was written to.
    """

    makes: tuple[_Fresh | None, ...] = ()
    container: type | None = None
    first: bool = False


_NEW = _Answer()
answers: dict[Any, _Answer | None] = {}
"""What was answered, by what was asked; None: it cannot be made anew."""


@cache
def may_be_remembered(func: Any) -> bool:
    """Whether what an operation answers follows from shapes and numbers, and is no view."""
    schema = func._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    aliased = [a for a in schema.arguments if a.alias_info is not None]
    return (
        func.namespace == "aten"
        and len(written) == len(aliased)  # no view of what it is given
        and (not written or (written == [schema.arguments[0]] and schema.name[-1] == "_"))
        and not {torch.Tag.inplace_view, torch.Tag.dynamic_output_shape} & set(func.tags)
        and not {torch.Tag.data_dependent_output} & set(func.tags)
        and schema.name not in ("aten::set_", "aten::resize_", "aten::resize_as_", "aten::copy_")
    )


def _told(value: Any, exact: bool) -> Any:
    """What a call is told by, of one argument; `exact` where a number's value may matter."""
    kind = type(value)
    if kind in _PLAIN:
        if not value.is_meta or value.layout is not torch.strided or value.is_complex():
            raise _NotComparableError
        return value.dtype, value.size(), value.stride()
    if kind is list or kind is tuple:
        return kind, *[_told(each, exact) for each in value]
    if kind is float and not exact:
        return kind
    if kind in (int, float, bool, str, torch.dtype, torch.device) or value is None:
        return kind, value
    if kind in (torch.memory_format, torch.layout):
        return value
    raise _NotComparableError


def _fresh(tensor: Any, given: set[int]) -> _Fresh:
    """How to make a result anew.

    Raises:
        _NotComparableError: it has not its own memory, or more of it than it needs.
    """
    if type(tensor) is not Tensor or not tensor.is_meta or tensor.layout is not torch.strided:
        raise _NotComparableError
    size, stride, storage = tensor.size(), tensor.stride(), tensor.untyped_storage()
    needed = sum((n - 1) * by for n, by in zip(size, stride, strict=True)) + 1
    if not tensor.numel():
        needed = 0
    if storage._cdata in given or storage.nbytes() != needed * tensor.element_size():
        raise _NotComparableError
    given.add(storage._cdata)
    return size, stride, tensor.dtype


def _answer(args: tuple[Any, ...], key: Any, result: Any, exact: bool) -> _Answer | None:
    """How a result can be made anew; None if it cannot."""
    if result is None:
        return _Answer()
    if result is args[0]:
        return _Answer(first=True) if _told(args[0], exact) == key[3] else None
    results = result if type(result) in (list, tuple) else (result,)
    given: set[int] = set()
    stack = list(args)
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            given.add(value.untyped_storage()._cdata)
        elif type(value) in (list, tuple):
            stack += value
    makes = tuple(None if each is None else _fresh(each, given) for each in results)
    return _Answer(makes, None if results is not result else type(result))


def _product(self: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
    return (first @ second).to(dtype)


def _into(self: Tensor, first: Tensor, second: Tensor, *_: Any, out: Tensor, **__: Any) -> Tensor:
    return out.resize_((first @ second).shape)


# Products whose ``meta`` kernel is their decomposition, which takes the dtype for a factor:
# addmm's in PyTorch 2.11, baddbmm's still in 2.14. CUDA makes the result alone
# (_addmm_dtype_cuda and _baddbmm_dtype_cuda in aten/src/ATen/native/cuda/Blas.cpp).
_OF_DTYPE = {
    getattr(packet, overload): made
    for packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
    for overload, made in (("dtype", _product), ("dtype_out", _into))
    if overload in packet.overloads()
}


def on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on ``meta``, or make its result as it was made before."""
    if (made := _OF_DTYPE.get(func)) is not None:
        return made(*args, **kwargs)
    if not args or not may_be_remembered(func):
        return func(*args, **kwargs)
    exact = torch.Tag.pointwise not in func.tags
    try:
        key = (
            func,
            torch.get_default_dtype(),
            tuple([(name, _told(value, exact)) for name, value in kwargs.items()]),
            *[_told(value, exact) for value in args],
        )
        known = answers.get(key, _NEW)
    except (_NotComparableError, TypeError):  # such as a symbolic size
        return func(*args, **kwargs)
    if known is _NEW:
        result = func(*args, **kwargs)
        if len(answers) >= LARGEST:
            answers.clear()
        try:
            answers[key] = _answer(args, key, result, exact)
        except _NotComparableError:
            answers[key] = None
        return result
    if known is None:
        return func(*args, **kwargs)
    return _made(known, args)


def _made(answer: _Answer, args: tuple[Any, ...]) -> Any:
    if answer.first:
        return args[0]
    results = [
        None if of is None else torch.empty_strided(of[0], of[1], dtype=of[2], device="meta")
        for of in answer.makes
    ]
    if answer.container is not None:
        return answer.container(results)
    return results[0] if results else None
