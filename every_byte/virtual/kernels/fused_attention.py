"""What PyTorch's own attention kernels borrow, where it depends on card or version.

Flash and memory-efficient attention; results and what autograd keeps are those of
`every_byte.virtual.kernels.attention`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules

aten = torch.ops.aten


def _flash_forward(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    # mha_fwd in .../cuda/flash_attn/flash_api.cpp.
    if return_debug_mask:
        raise NotImplementedError("flash attention's debug mask is not replayed")
    batch, heads, length, size = query.shape
    result = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    held: list[Tensor | None] = []
    splits = 1 if dropout_p else _splits(query, key, rules)
    if splits > 1:
        held += [
            query.new_empty(splits, batch, heads, length, dtype=torch.float32),
            query.new_empty(splits, batch, heads, length, _up(size, 32) * 32, dtype=torch.float32),
        ]
    state = query.new_empty(2, dtype=torch.uint64)
    unused = query.new_empty((), dtype=torch.uint64)
    if dropout_p:
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


def _up(number: int, by: int) -> int:
    return -(-number // by)


def _efficient_forward(
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
    # _efficient_attention_forward in .../cuda/attention.cu; the random state is on the
    # host with and without dropout, as measured with 2.11.
    batch, heads, length, _ = query.shape
    states = [torch.scalar_tensor(0, dtype=torch.int64, device="cpu") for _ in range(2)]
    result = query.new_empty(batch, length, heads, value.size(-1)).transpose(1, 2)
    rows = -(-length // 32) * 32 if compute_log_sumexp else 0
    return result, query.new_empty(batch, heads, rows, dtype=torch.float32), *states


def _efficient_backward(
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
    # _efficient_attention_backward in .../cuda/attention_backward.cu, and the workspace of
    # .../cuda/mem_eff_attention/kernel_backward.h: sums of the gradient for queries, tile
    # by tile, each with 16 B of locks.
    copy = grad_out.transpose(1, 2).contiguous()
    grads = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value)]
    bias = None
    if attn_bias is not None and grad_input_mask[3]:
        last = attn_bias.size(-1)
        padded = -(-last // 16) * 16
        bias = attn_bias.new_empty(*attn_bias.shape[:-1], padded)[..., :last]
    batch, heads, length, size = query.shape
    half = query.element_size() == 2
    delta: Tensor
    if half:  # the kernel computes it
        delta = query.new_empty(batch, heads, length, dtype=torch.float32)
    else:
        product = torch.empty_like(out, dtype=torch.float32)
        summed = query.new_empty(batch, length, heads, dtype=torch.float32)
        delta = query.new_empty(batch, heads, length, dtype=torch.float32)
        del summed, product
    rows, columns = _tile(half, size)
    tiles = batch * heads * -(-length // rows) * -(-size // columns)
    workspace = query.new_empty(tiles * (16 + 4 * rows * columns), dtype=torch.uint8)
    del copy, delta, workspace
    return *grads, bias


def _tile(half: bool, size: int) -> tuple[int, int]:
    """Queries and keys of a block on cards from 8.0 on (``generate_kernels.py`` there)."""
    if size <= 64:
        return 64, 64
    return (128, 128) if half else (64, 128)


WITH_RULES: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash_forward,
}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
