"""Attention, dropout and softmax, as every CUDA card from 8.0 on does them.

On PyTorch's ``meta`` device they take another path than on CUDA: attention is
computed with its whole matrix, dropout in four steps. Here they take CUDA's, as
PyTorch 2.14 has it on cards of compute capability 8.0, 8.6, 8.9 and 12.x:
`COMPOSITES` choose the kernel, `KERNELS` allocate what it does.

What PyTorch's attention kernels allocate is in `every_byte.virtual.kernels.fused_attention`;
cuDNN's attention, which Hopper's cards and Blackwell's of 10.x prefer, in
`every_byte.virtual.kernels.cudnn_attention`. Not covered: nested tensors.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten

# Of the matrix products in memory-efficient attention, on cards from 8.0 on:
# 128 bits (minimum_gemm_alignment in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
_ALIGNMENT = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}


# Which kernel, and what is done around it


def attention_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> SDPBackend:
    """The kernel that CUDA would take for `torch.nn.functional.scaled_dot_product_attention`.

    The first that is enabled (``torch.nn.attention.sdpa_kernel``) and can: flash
    attention for FP16 and BF16 without a mask, memory-efficient attention also for
    FP32 and with a mask, else the whole matrix. The conditions are those of
    ``can_use_flash_attention`` and ``can_use_mem_efficient_attention`` in
    ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``.

    Raises:
        RuntimeError: no enabled kernel can.
        NotImplementedError: only cuDNN's is enabled, which is not replayed.
    """
    tensors = (query, key, value)
    dense = all(t.dim() == 4 and t.numel() and t.dtype is query.dtype for t in tensors)
    if dense:
        heads, shared, of_values = (t.size(1) for t in tensors)
        grouped = shared == of_values and (
            heads == shared or (heads % shared == 0 if enable_gqa else shared == 1)
        )
        dense = grouped and query.size(0) == key.size(0) == value.size(0)
    unit = dense and all(t.stride(-1) == 1 for t in tensors)

    def flash() -> bool:
        size = query.size(-1)
        return (
            torch.backends.cuda.flash_sdp_enabled()
            and attn_mask is None
            and query.dtype in (torch.float16, torch.bfloat16)
            and (unit or (dense and size == 1))
            and size == key.size(-1) == value.size(-1) <= 256
            and not (is_causal and query.size(-2) != key.size(-2))
        )

    def efficient() -> bool:
        multiple = _ALIGNMENT.get(query.dtype, 0)
        return (
            torch.backends.cuda.mem_efficient_sdp_enabled()
            and unit
            and multiple > 0
            and query.size(-1) == key.size(-1)
            and not any(n % multiple for t in tensors for n in (t.size(-1), t.storage_offset()))
            and (attn_mask is None or attn_mask.stride(-1) == 1)
        )

    can = {
        SDPBackend.FLASH_ATTENTION: flash,
        SDPBackend.EFFICIENT_ATTENTION: efficient,
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    for backend in map(SDPBackend, torch._C._get_sdp_priority_order()):
        if backend in can and can[backend]():
            return backend
    if torch.backends.cuda.cudnn_sdp_enabled() and not any(
        (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        )
    ):
        raise NotImplementedError("cuDNN's attention is not replayed: enable another kernel")
    raise RuntimeError("No available kernel. Aborting execution.")  # PyTorch's own words


def _scaled_dot_product_attention(
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
    # scaled_dot_product_attention in aten/src/ATen/native/transformers/attention.cpp.
    kernel = attention_kernel(query, key, value, attn_mask, is_causal, enable_gqa)
    if kernel == SDPBackend.MATH:
        return aten.scaled_dot_product_attention.default.decompose(
            *(query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if kernel == SDPBackend.FLASH_ATTENTION:
        size = query.size(-1)
        padded = [_padded(t, 8) for t in (query, key, value)]
        result = aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, False, scale=scale or 1 / math.sqrt(size)
        )[0]
        return result if result.size(-1) == size else result[..., :size]
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            outside = torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device)
            attn_mask = torch.where(attn_mask, 0.0, outside)
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):
            last = attn_mask.size(-1)
            attn_mask = torch.nn.functional.pad(attn_mask, (0, 8 - last % 8))[..., :last]
        attn_mask = attn_mask.expand(*query.shape[:3], key.size(2))
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        *(query, key, value, attn_mask, trained, dropout_p, is_causal), scale=scale
    )[0]


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    over = tensor.size(-1) % multiple
    return torch.nn.functional.pad(tensor, (0, multiple - over)) if over else tensor


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    # dropout in aten/src/ATen/native/Dropout.cpp. PyTorch's decomposition in Python
    # copies what it does not drop, up to 2.8 at least.
    if not 0 <= p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not train or not input.numel():
        return input
    if p == 1:
        return input * input.new_zeros(())
    return aten.native_dropout(input, p, train)[0]


def _softmax(name: str) -> Callable[..., Tensor]:
    # From FP16 to FP32 without a copy: softmax and log_softmax in
    # aten/src/ATen/native/SoftMax.cpp.
    composite, kernel = getattr(aten, name).int, getattr(aten, f"_{name}")

    def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if input.dtype is torch.float16 and dtype is torch.float32:
            return kernel(input, dim, True)
        return composite.decompose(input, dim, dtype)

    return softmax


COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: _scaled_dot_product_attention,
    aten.dropout.default: _dropout,
    aten.softmax.int: _softmax("softmax"),
    aten.log_softmax.int: _softmax("log_softmax"),
}
"""Operations made of others, which depend on the device: as they are made on CUDA."""


# What a kernel allocates, its temporaries included


def _native_dropout(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    # aten/src/ATen/native/cuda/Dropout.cu: one byte for each number, and the result.
    mask = torch.empty_like(input, dtype=torch.bool)
    return torch.empty_like(input), mask


KERNELS: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: _native_dropout,
    **COMPOSITES,  # in inference mode they arrive whole
}
"""Operations on ``meta`` tensors, and what allocates as CUDA's kernel does."""
