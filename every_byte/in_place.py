"""What PyTorch does in place, unless a ``TorchDispatchMode`` looks at it, or a tensor is ``meta``.

Where a tensor is read twice, autograd adds up two gradients, and writes the sum over the first
one if nobody else holds that: ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp
(PyTorch 2.8 to 2.14). Some formulas of torch/csrc/autograd/FunctionsManual.cpp write over what
they have just made. Both ask ``isTensorSubclassLike`` first (aten/src/ATen/
TensorSubclassLikeUtils.h), which is true under any dispatch mode and of every ``meta`` tensor;
then they make a new tensor. A program that nobody watches takes less memory so than one that is
watched. `overwriting` gives the watched one the same operation back.

``linear`` asks as well, where it adds its bias to a product of its own, which it does for an input
that is not contiguous (aten/src/ATen/native/Linear.cpp, PyTorch 2.8 to 2.14): see `adds_bias`.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch._prims_common import is_non_overlapping_and_dense_or_false as _is_dense
except ImportError:  # PyTorch 2.8
    from torch._prims_common import (  # type: ignore[attr-defined,no-redef]
        is_non_overlapping_and_dense as _is_dense,
    )

_aten = torch.ops.aten
_ADD = _aten.add.Tensor
_PRODUCTS = frozenset((_aten.mm.default, _aten.mv.default, _aten.bmm.default))


def _nodes(names: str) -> frozenset[str]:
    return frozenset(f"{name[:-1]}Backward{name[-1]}" for name in names.split())


# A functional operation: what some nodes of autograd do in its place where nobody watches.
# Found by running PyTorch's own samples of every operator with and without a mode (2.14).
_SELECTED = "Topk0 Max0 Min0 Sort0 Sort1 Kthvalue0 Median1 Nanmedian1 Mode0"
_LARGER = "Maximum0 Minimum0 Fmax0 Fmin0 Clamp0 ClampMin1 ClampMax1 Atan20"
_OF_NODES: dict[Any, tuple[Any, frozenset[str]]] = {
    _aten.scatter.src: (_aten.scatter_.src, _nodes(_SELECTED)),
    _aten.scatter_add.default: (_aten.scatter_add_.default, _nodes("Gather0 Cummax0 Cummin0")),
    _aten.index_add.default: (_aten.index_add_.default, _nodes("IndexSelect0")),
    _aten.index_put.default: (_aten._index_put_impl_.default, _nodes("Index0")),
    _aten.index_fill.int_Tensor: (_aten.index_fill_.int_Tensor, _nodes("Trace0")),
    _aten.put.default: (_aten.put_.default, _nodes("Take0")),
    _aten.masked_scatter.default: (_aten.masked_scatter_.default, _nodes("MaskedSelect0")),
    _aten.masked_fill.Scalar: (_aten.masked_fill_.Scalar, _nodes(_LARGER)),
    _aten.sub.Tensor: (_aten.sub_.Tensor, _nodes("BinaryCrossEntropyWithLogits0")),
    _aten.mul.Tensor: (_aten.mul_.Tensor, _nodes("BinaryCrossEntropyWithLogits0")),
}

Holders = tuple[int, int, int]


def node() -> tuple[int, str] | None:
    """The node of autograd that this thread evaluates; None outside of a backward pass."""
    current = torch._C._current_autograd_node()
    return None if current is None else (current._sequence_nr(), current.name())


def _holders(tensor: torch.Tensor) -> Holders:
    """How many hold a tensor: in C++, in Python, and its storage."""
    return (
        tensor._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(tensor),
        torch._C._storage_Use_Count(tensor.untyped_storage()._cdata),
    )


class _Probe(TorchDispatchMode):
    """Looks at a gradient that nobody but autograd holds, while it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Holders] = []

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
        if func is _ADD and node() is not None:
            self.seen.append(_looked_at(args))
        return func(*args, **kwargs or {})


def _looked_at(args: tuple[Any, ...]) -> Holders:
    return _holders(args[0])


@cache
def _alone() -> Holders | None:
    """What `_holders` tells of a tensor that nobody else holds; None if PyTorch cannot tell."""
    probe = _Probe()
    try:
        with torch.enable_grad(), probe:
            x = torch.ones(2, device="cpu", requires_grad=True)
            y = x * 2
            (y.sin() + y.cos()).backward(torch.ones_like(x))
    except AttributeError:
        return None
    return min(probe.seen, default=None)


def may_overwrite(func: Any) -> bool:
    """Whether an operation is one that `overwriting` may know another for."""
    return func is _ADD or func in _OF_NODES


def is_product(func: Any) -> bool:
    """Whether an operation is one that ``linear`` may add its bias to."""
    return func in _PRODUCTS


def adds_bias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], product: object) -> bool:
    """Whether an operation is ``linear``'s addition of a bias, which it does in place.

    In a program's own ``x @ w + b`` that program holds the product, and it is not.

    Args:
        func, args, kwargs: as a dispatch mode got them, which lies on top of all others.
        product: of the last one in this thread, by its storage.
    """
    if func is not _ADD or kwargs or len(args) != 2 or not isinstance(args[1], torch.Tensor):
        return False
    return (  # without a name for args[0], which would hold it once more
        args[1].dim() == 1
        and args[0].dim() != 2  # then the bias is a part of the product
        and args[0].shape[-1:] == args[1].shape
        and args[0].untyped_storage()._cdata == product
        and _looked_at(args) == _alone()
    )


def prepare() -> None:
    """Ask beforehand what `overwriting` compares with, while nobody watches."""
    _alone()


def overwriting(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made_by: object
) -> tuple[Any, tuple[Any, ...]]:
    """The operation that PyTorch would have called in this one's place, and its arguments.

    Args:
        func, args, kwargs: as a dispatch mode got them, which lies on top of all others.
        made_by: the `node` that made the storage of the first argument; None if it is not known.
    """
    if torch.is_grad_enabled() or kwargs or made_by is None or (now := node()) is None:
        return func, args
    if func is not _ADD:
        other, nodes = _OF_NODES[func]
        if made_by != now or now[1] not in nodes:
            return func, args
        # index_backward does not have indices checked again.
        return other, (*args, True) if func is _aten.index_put.default else args
    # What the node itself has made is a part of its formula: no gradient that waited for another.
    if made_by == now or not _are_gradients(args) or _looked_at(args) != _alone():
        return func, args
    return _aten.add_.Tensor, args


def _are_gradients(args: tuple[Any, ...]) -> bool:
    """Whether an addition's arguments can be two gradients of one tensor."""
    one, other = args[:2]
    return (
        len(args) == 2
        and isinstance(other, torch.Tensor)
        and one.layout is other.layout is torch.strided
        and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        and not one._is_zerotensor()
        and _is_dense(one)
    )
