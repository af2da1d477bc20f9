"""Softmax, norms and losses: what one card's kernels allocate beside their results."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules

aten = torch.ops.aten


def temporaries(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """Bytes that an operation takes after its results, in order; None if it is not of these."""
    packet = operation.overloadpacket
    if packet is aten._softmax_backward_data:
        # grad * output: softmax_backward_cuda_out in native/cuda/SoftMax.cu.
        grad, output = args[:2]
        return [math.prod(grad.shape) * torch.result_type(grad, output).itemsize]
    if packet is aten._foreach_norm:
        return None
    return None


def _rms_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    # rms_norm_symint in native/layer_norm.cpp: one kernel on CUDA since 2.9
    # (pytorch#153666), for a weight of the input's type.
    fused = rules.version >= (2, 9) and (weight is None or weight.dtype == input.dtype)
    if fused:
        return aten._fused_rms_norm(input, normalized_shape, weight, eps)[0]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return aten.rms_norm.default._op_dk(key, input, normalized_shape, weight, eps)


def _fused_rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    # _fused_rms_norm_cuda in native/cuda/layer_norm_kernel.cu: one FP32 number for a row.
    rows = [*input.shape[: input.dim() - len(normalized_shape)], *(1 for _ in normalized_shape)]
    exact = torch.float64 if input.dtype is torch.float64 else torch.float32
    result = torch.empty_like(input, memory_format=torch.contiguous_format)
    return result, input.new_empty(rows, dtype=exact)


def _fused_rms_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    # _fused_rms_norm_backward_cuda: the gradients, and no more.
    grad = torch.empty_like(input, memory_format=torch.contiguous_format)
    of_weight = weight is not None and output_mask[1]
    return (
        grad if output_mask[0] else None,
        torch.empty_like(weight) if of_weight and weight is not None else None,
    )


COMPOSITES: dict[Any, Callable[..., Any]] = {aten.rms_norm.default: _rms_norm}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._fused_rms_norm.default: _fused_rms_norm,
    aten._fused_rms_norm_backward.default: _fused_rms_norm_backward,
}
