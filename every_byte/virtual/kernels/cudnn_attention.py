"""cuDNN's attention, which Hopper's cards and Blackwell's of 10.x prefer.

Its workspace is cuDNN's own affair: no source says how large it is. What is here
follows from what it has to keep, and agrees with every one of the 78 signatures measured
on an H200 (PyTorch 2.11, cuDNN 9).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from every_byte.virtual.kernels import attention
from every_byte.virtual.kernels.borrowing import borrow
from every_byte.virtual.rules import Rules

aten = torch.ops.aten

_SPLIT = 128  # keys
_ALIGNMENT = 256  # of a part of the workspace


def can_use_cudnn(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether cuDNN's attention can: ``can_use_cudnn_attention`` in ``.../cuda/sdp_utils.cpp``."""
    tensors = (query, key, value)
    return (
        torch.backends.cuda.cudnn_sdp_enabled()
        and all(t.dim() == 4 and t.numel() for t in tensors)
        and query.dtype in (torch.float16, torch.bfloat16)
        and key.dtype is value.dtype is query.dtype
        and all(t.stride(-1) == 1 for t in tensors)
        and query.size(-1) == key.size(-1)
        and all(t.size(-1) % 8 == 0 and t.size(-1) <= 128 for t in tensors)
        and not (attn_mask is not None and attn_mask.requires_grad)
    )


def _scaled_dot_product_attention(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    tensors = (query, key, value)
    heads = enable_gqa or query.size(1) == key.size(1) == value.size(1)
    asked = [SDPBackend(b) for b in torch._C._get_sdp_priority_order()]
    first = rules.prefers_cudnn_attention and asked[0] == SDPBackend.FLASH_ATTENTION
    alone = not any(
        (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        )
    )
    cudnn = first or alone or asked[0] == SDPBackend.CUDNN_ATTENTION
    if cudnn and heads and can_use_cudnn(*tensors, attn_mask, is_causal):
        if attn_mask is not None:
            if attn_mask.dtype is torch.bool:
                outside = torch.scalar_tensor(-65504.0, dtype=query.dtype, device=query.device)
                attn_mask = torch.where(attn_mask, 0.0, outside)
            attn_mask = attn_mask.expand(*query.shape[:3], key.size(2))
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return aten._scaled_dot_product_cudnn_attention(
            *tensors, attn_mask, trained, dropout_p, is_causal, False, scale=scale
        )[0]
    shared = query.dim() == 4 and query.size(1) != key.size(1)
    if shared and SDPBackend.EFFICIENT_ATTENTION == attention.attention_kernel(
        *tensors, attn_mask, is_causal, enable_gqa
    ):
        # It wants as many heads of each (check_batch_size_and_num_heads_dense in
        # can_use_mem_efficient_attention): the whole matrix is left.
        whole: Tensor = aten.scaled_dot_product_attention.default._op_dk(
            torch._C.DispatchKey.CompositeImplicitAutograd,
            *(*tensors, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return whole
    return attention.COMPOSITES[aten.scaled_dot_product_attention.default](
        *tensors, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _like(query: Tensor, size: int) -> Tensor:
    """A tensor of another head size, laid out as the queries (``alloc_with_matching_layout``)."""
    if size == query.size(-1):
        return torch.empty_like(query)
    order = sorted(range(4), key=lambda d: (query.stride(d), -d), reverse=True)
    shape = (*query.shape[:3], size)
    dense = query.new_empty([shape[d] for d in order])
    return dense.permute([order.index(d) for d in range(4)])


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    # _cudnn_attention_forward in .../cuda/attention.cu, run_cudnn_SDP_fprop in cudnn/MHA.cpp.
    batch, heads, length, _ = query.shape
    states = [query.new_empty((), dtype=torch.uint64) for _ in range(2)]
    result = _like(query, value.size(-1))
    rows = (batch, heads, length, 1) if compute_log_sumexp else (0,)
    logsumexp = query.new_empty(rows, dtype=torch.float32)
    borrow(query, _workspace_size(query, key))
    nothing = query.new_empty(0)
    return result, logsumexp, None, None, length, key.size(2), *states, nothing


def _workspace_size(query: Tensor, key: Tensor) -> int:
    """Bytes of the workspace in forward: for a single query, keys are split between blocks.

    Each of them leaves its result, its largest score and its sum in FP32, each aligned. A
    block takes 128 keys and what is left: of 513 to 528 keys, 1,024, 2,049 to 2,080, and
    4,097 to 4,104 the workspace was measured.
    """
    batch, heads, length, size = query.shape
    if length > 1:
        return 256
    numbers = 4 * batch * heads * max(1, key.size(2) // _SPLIT)
    parts = (numbers * size, numbers, numbers)
    return sum(-(-part // _ALIGNMENT) * _ALIGNMENT for part in parts) + 128


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    batch, heads, length, size = query.shape
    grads = [torch.empty_like(t) for t in (query, key, value)]
    # The queries' gradient in FP32, a number for each row; with shared heads, those of
    # keys and values for all heads.
    nbytes = 4 * batch * heads * length * (size + 1) + 256
    if key.size(1) != heads:
        nbytes += 2 * query.element_size() * batch * heads * key.size(2) * size
    borrow(query, nbytes)
    return tuple(grads)


COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: _scaled_dot_product_attention
}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_cudnn_attention.default: _forward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _backward,
}
