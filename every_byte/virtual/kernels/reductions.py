"""What a reduction borrows: partial results of several blocks for each output, and semaphores.

The rules are those of ``setReduceConfig`` and ``ReduceConfig`` in
``aten/src/ATen/native/cuda/Reduce.cuh`` of PyTorch 2.11, and of ``TensorIterator``,
which sorts and joins dimensions before. Not covered: iterators that are split
since they need more than 32 bits of index.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules

aten = torch.ops.aten

_MAX_THREADS = 512  # of a block: max_reduce_threads
_WARP = 32
_MIN_VALUES, _MAX_VALUES = 16, 256  # that a thread reduces


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction, as `TensorIterator` hands it to the kernel: sorted, joined dimensions.

    Attributes:
        shape: dimensions, those reduced first, each group from the fastest on.
        strides: of the input, in elements.
        reduced: how many of them are reduced.
        outputs, inputs: numbers that come out, and that go into each.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    reduced: int
    outputs: int
    inputs: int

    @classmethod
    def of(cls, tensor: Tensor, dims: Sequence[int]) -> "Reduction":
        """The reduction of a tensor over dimensions; over all of them if there are none."""
        every = range(tensor.dim())
        over = {d % tensor.dim() for d in dims} if dims else set(every)
        sizes, strides = tensor.shape, tensor.stride()

        def group(chosen: list[int]) -> list[tuple[int, int]]:
            # A dimension of one number has no stride that matters. Equal strides: by size.
            found = sorted(
                ((strides[d], sizes[d]) for d in chosen if sizes[d] != 1),
                key=lambda pair: (pair[0], pair[1]),
            )
            joined: list[tuple[int, int]] = []
            for stride, size in found:
                if joined and joined[-1][0] * joined[-1][1] == stride:
                    joined[-1] = joined[-1][0], joined[-1][1] * size
                else:
                    joined.append((stride, size))
            return joined

        inner = group([d for d in every if d in over])
        outer = group([d for d in every if d not in over])
        both = inner + outer
        inputs = math.prod(sizes[d] for d in over)
        return cls(
            tuple(size for _, size in both),
            tuple(stride for stride, _ in both),
            len(inner),
            tensor.numel() // inputs if inputs else 0,
            inputs,
        )


def borrowed(
    reduction: Reduction, accumulated: int, rules: Rules, values: int = 4
) -> tuple[int, int]:
    """Bytes of partial results and of semaphores; (0, 0) where one block does for an output.

    Args:
        reduction: see there.
        accumulated: bytes of a partial result.
        rules: of the card.
        values: that a thread reads at once (``vt0``).
    """
    outputs, inputs, ndim = reduction.outputs, reduction.inputs, len(reduction.shape)
    if not outputs or not inputs:
        return 0, 0
    strides, reduced = reduction.strides, reduction.reduced
    fastest = reduced == ndim or (reduced > 0 and strides[0] < strides[reduced])
    width, height = (inputs, outputs) if fastest else (outputs, inputs)
    of_outputs = 1
    stride = 1 if not ndim else strides[0] if fastest else strides[reduced]
    if stride == 1:
        if fastest and width > 128 and ndim == 1:
            width //= values
        elif not fastest:
            others = [s for n, s in enumerate(strides) if n != reduced]
            of_outputs = math.gcd(4, reduction.shape[reduced], *others)
            width //= of_outputs
    most = _MAX_THREADS // of_outputs
    wide, high = (_power_of_two(n) if n < most else most for n in (width, height))
    block_width = min(wide, _WARP)
    block_height = min(high, most // block_width)
    block_width = min(wide, most // block_height)
    step_input, step_output = (block_width, 1) if fastest else (1, block_width)
    per_thread = _up(inputs, step_input)
    across_warps = per_thread >= min(block_height * _MIN_VALUES, _MAX_VALUES)
    if not across_warps:
        return 0, 0
    step_input *= block_height
    per_thread = _up(inputs, step_input)
    grid = _up(outputs // of_outputs, step_output)
    target = rules.multiprocessors * (rules.threads // (block_width * block_height))
    if per_thread < _MAX_VALUES or grid > target:
        return 0, 0
    blocks = max(min(_up(target, grid), _up(per_thread, _MIN_VALUES)), _up(per_thread, _MAX_VALUES))
    if blocks <= 1:
        return 0, 0
    staged = accumulated * outputs * blocks * (1 if fastest else block_width * of_outputs)
    return staged, 4 * grid


def _up(number: int, by: int) -> int:
    return -(-number // by)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above a number; 1 for 0."""
    return 1 << max(number.bit_length() - 1, 0)


def _accumulated(tensor: Tensor) -> int:
    """Bytes in which sums of a tensor's numbers are kept: FP32 for half precision."""
    return max(tensor.element_size(), 4) if tensor.is_floating_point() else 8


# Operation: bytes of a partial result for an input, and how many values a thread reads.
_SUMS = ("sum", "mean", "linalg_vector_norm", "norm", "prod", "nansum")
_EXTREMES = ("amax", "amin", "max", "min")
_TRUTHS = ("all", "any")
_MOMENTS = ("std", "var", "std_mean", "var_mean")
_PLACES = ("argmax", "argmin")
_LAYOUT: dict[Any, str] = {}
for _names in (_SUMS, _EXTREMES, _TRUTHS, _MOMENTS, _PLACES):
    _LAYOUT |= {getattr(aten, name): _names[0] for name in _names}


def reduction_temporaries(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Rules
) -> list[int] | None:
    """What a reduction borrows beside its results, in order: bytes; None if it is none."""
    kind = _LAYOUT.get(operation.overloadpacket)
    if kind is None or not args or not isinstance(args[0], Tensor) or not args[0].dim():
        return None if kind is None else []
    schema = operation._schema.arguments
    given = {a.name: v for a, v in zip(schema, args, strict=False)} | kwargs
    if "other" in given or any(a.name == "other" for a in schema):
        return None  # max of two tensors
    if kind == "amax" and operation.overloadpacket in (aten.max, aten.min) and "dim" in given:
        return []  # with indices: a kernel of its own
    tensor = args[0]
    dims = given.get("dim")
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    found = []
    if kind == "sum" and not tensor.is_floating_point() and not tensor.is_complex():
        if (wanted := given.get("dtype") or torch.int64) is not tensor.dtype:
            tensor = tensor.to(wanted)
            found.append(tensor.nbytes)
    reduction = Reduction.of(tensor, dims)
    if kind == "std":
        sizes = borrowed(reduction, 16 if tensor.element_size() < 8 else 32, rules, values=2)
    elif kind == "argmax":
        sizes = borrowed(reduction, 16, rules)
    elif kind in ("all", "amax"):
        sizes = borrowed(reduction, tensor.element_size(), rules)
    else:
        sizes = borrowed(reduction, _accumulated(tensor), rules)
    return [*found, *(size for size in sizes if size)]
