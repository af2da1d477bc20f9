"""What PyTorch's own attention kernels allocate: flash and memory-efficient attention.

What each returns, what autograd keeps of it, in which layout, and what is borrowed. Some of
that depends on the card and the version: without `Rules` it is what all cards have in common.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules

aten = torch.ops.aten


def _flash_forward(
    rules: Rules | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    # mha_fwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp: the
    # result in the layout (batch, length, heads, size), FP32 logarithms of each row's
    # sum, and two tensors of random state, with and without dropout.
    if return_debug_mask:
        raise NotImplementedError("flash attention's debug mask is not replayed")
    batch, heads, length, size = query.shape
    result = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    held: list[Tensor | None] = []
    splits = 1 if dropout_p or rules is None else _splits(query, key, rules)
    if splits > 1:
        held += [
            query.new_empty(splits, batch, heads, length, dtype=torch.float32),
            query.new_empty(splits, batch, heads, length, _rounded(size, 32), dtype=torch.float32),
        ]
    state = query.new_empty(2, dtype=torch.uint64)
    unused = query.new_empty((), dtype=torch.uint64)
    if dropout_p and rules is not None:
        held.append(query.new_empty(2, dtype=torch.uint64))  # where the generator stands
    for number in range(len(held)):
        held[number] = None
    nothing = query.new_empty(0)
    return result, logsumexp, None, None, query.size(2), key.size(2), state, unused, nothing


def _splits(query: Tensor, key: Tensor, rules: Rules) -> int:
    """Into how many parts keys are split where heads are too few for the card.

    ``set_params_splitkv`` and ``num_splits_heuristic`` in flash_api.cpp: the fewest
    that keep the multiprocessors busy for 85 % of what is possible.
    """
    batch, heads, length, size = query.shape
    blocks = batch * heads * _up(length, 64)
    places = 2 * rules.multiprocessors
    keys = _up(key.size(2), 256 if size <= 64 else 128 if size <= 128 else 64)
    if blocks >= 0.8 * places:
        return 1
    efficiency = {}
    for splits in range(1, min(128, places, keys) + 1):
        if splits == 1 or _up(keys, splits) != _up(keys, splits - 1):
            waves = blocks * splits / places
            efficiency[splits] = waves / math.ceil(waves)
    best = max(efficiency.values())
    return next(n for n, reached in efficiency.items() if reached >= 0.85 * best)


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    # _flash_attention_backward in .../cuda/attention_backward.cu, and mha_bwd in flash_api.cpp.
    copies = [t.transpose(1, 2).contiguous() for t in (grad_out, out)]
    grads = [torch.empty_like(t.transpose(1, 2)) for t in (query, key, value)]
    batch, heads, length, size = query.shape
    rows, columns = _rounded(length, 128), _rounded(size, 32 if size <= 128 else 64)
    temporaries = [
        query.new_empty(batch, heads, rows, dtype=torch.float32),
        query.new_empty(batch, rows, heads, columns, dtype=torch.float32),
        *_for_all_heads(query, key, value),
    ]
    del copies, temporaries
    return tuple(grad.transpose(1, 2) for grad in grads)


def _for_all_heads(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Gradients of keys and values for each query head, before they are summed by group."""
    batch, heads, length, _ = key.shape
    if heads == query.size(1):
        return []
    return [t.new_empty(batch, length, query.size(1), t.size(-1)) for t in (key, value)]


def _efficient_forward(
    rules: Rules | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    # _efficient_attention_forward in .../cuda/attention.cu. The random state is on the host;
    # of 2.11 it was measured so without dropout, too, where it else is two zeros on the device.
    batch, heads, length, _ = query.shape
    where = query.device if rules is None and not dropout_p else "cpu"
    states = [torch.zeros((), dtype=torch.int64, device=where) for _ in range(2)]
    result = query.new_empty(batch, length, heads, value.size(-1)).transpose(1, 2)
    rows = _rounded(length, 32) if compute_log_sumexp else 0
    return result, query.new_empty(batch, heads, rows, dtype=torch.float32), *states


def _efficient_backward(
    rules: Rules | None,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    # _efficient_attention_backward in .../cuda/attention_backward.cu; what is borrowed is
    # given back in this order, the gradient's copy last.
    copy = grad_out.transpose(1, 2).contiguous()
    grads = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value)]
    held: list[Tensor] = [] if rules is not None else _for_all_heads(query, key, value)
    bias = None
    if attn_bias is not None and grad_input_mask[3]:
        last = attn_bias.size(-1)
        bias = attn_bias.new_empty(*attn_bias.shape[:-1], _rounded(last, 16))[..., :last]
    batch, heads, length, size = query.shape
    half = query.element_size() == 2
    summed = []
    if rules is not None and not half:  # with half precision the kernel itself computes it
        summed.append(torch.empty_like(out, dtype=torch.float32))
        summed.append(query.new_empty(batch, length, heads, dtype=torch.float32))
    held.append(query.new_empty(query.shape[:3], dtype=torch.float32))
    while summed:
        summed.pop()
    if rules is not None:
        # The workspace of .../cuda/mem_eff_attention/kernel_backward.h: sums of the gradient
        # for queries, tile by tile, each with 16 B of locks.
        rows, columns = _tile(half, size)
        tiles = batch * heads * _up(length, rows) * _up(size, columns)
        held.append(query.new_empty(tiles * (16 + 4 * rows * columns), dtype=torch.uint8))
    while held:
        del held[0]
    del copy
    return *grads, bias


def _tile(half: bool, size: int) -> tuple[int, int]:
    """Queries and keys of a block on cards from 8.0 on (``generate_kernels.py`` there)."""
    if size <= 64:
        return 64, 64
    return 128, 128 if half else 64


def _up(number: int, by: int) -> int:
    return -(-number // by)


def _rounded(number: int, multiple: int) -> int:
    return _up(number, multiple) * multiple


WITH_RULES: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash_forward,
    aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    **{operation: partial(kernel, None) for operation, kernel in WITH_RULES.items()},
}
