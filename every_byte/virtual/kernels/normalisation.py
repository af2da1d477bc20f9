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
    if packet is aten._safe_softmax:
        # Where a row is all -inf: a truth for each number and each row, and a zero
        # (_safe_softmax in native/transformers/attention.cpp).
        scores, dim = args[:2]
        return [scores.numel(), scores.numel() // scores.size(dim), scores.element_size()]
    if packet in _TARGETS and not (target := args[_TARGETS[packet]]).is_contiguous():
        return [target.nbytes]
    return None


# Where the losses have their targets, which they read contiguous: native/cuda/NLLLoss.cu.
_TARGETS = {aten.nll_loss_forward: 1, aten.nll_loss_backward: 2}


def _rms_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    # rms_norm_symint in native/layer_norm.cpp: one kernel on CUDA since 2.9
    # (pytorch#153666), for a weight of the input's type.
    if rules.version >= (2, 9) and (weight is None or weight.dtype == input.dtype):
        return _fused_rms_norm(rules, input, normalized_shape, weight, eps)[0]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    composed: Tensor = aten.rms_norm.default._op_dk(key, input, normalized_shape, weight, eps)
    return composed


class _FusedRMSNorm(torch.autograd.Function):
    """``_fused_rms_norm`` and its gradient, which have no kernels of their own on ``meta``."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, normalized_shape: list[int], weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # _fused_rms_norm_cuda in native/cuda/layer_norm_kernel.cu: one FP32 number for a row.
        rows = input.shape[: input.dim() - len(normalized_shape)]
        result = torch.empty_like(input, memory_format=torch.contiguous_format)
        rstd = input.new_empty((*rows, *(1 for _ in normalized_shape)), dtype=_exact(input))
        ctx.save_for_backward(input, rstd, weight)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return result, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, _, weight = ctx.saved_tensors
        of_weight = weight is not None and ctx.needs_input_grad[2]
        # The kernel reads a contiguous gradient: published peaks of nn.RMSNorm, whose upper
        # gradient is expanded, have its copy (book/records/liger.toml).
        copy = grads[0].contiguous()
        found = (
            torch.empty_like(input, memory_format=torch.contiguous_format),
            None,
            torch.empty_like(weight) if of_weight else None,
        )
        del copy
        return found


def _fused_rms_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    return _FusedRMSNorm.apply(input, list(normalized_shape), weight)


def _native_layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # layer_norm_cuda in native/cuda/layer_norm_kernel.cu: it reads what is contiguous.
    copy = input.contiguous()
    result = torch.empty_like(copy)
    rows = input.shape[: input.dim() - len(normalized_shape)]
    mean, rstd = (
        input.new_empty((*rows, *(1 for _ in normalized_shape)), dtype=_exact(input))
        for _ in range(2)
    )
    del copy
    return result, mean, rstd


def _native_layer_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    # layer_norm_backward_cuda and LayerNormBackwardKernelImpl there.
    copies = [input.contiguous()]
    made = torch.empty_like(copies[0]) if output_mask[0] else None
    grads = [
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if asked and like is not None
        else None
        for like, asked in zip((weight, bias), output_mask[1:], strict=True)
    ]
    copies.append(grad_out.contiguous())
    while copies:
        copies.pop()
    return made, *grads


def _native_group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # native_group_norm in native/group_norm.cpp, GroupNormKernelImplInternal in
    # native/cuda/group_norm_kernel.cu: with weights a factor and a summand for each channel.
    copy = input.contiguous()
    result = torch.empty_like(copy)
    of_groups = input.dtype if weight is None else weight.dtype
    mean, rstd = (input.new_empty(rows, groups, dtype=of_groups) for _ in range(2))
    if pixels != 1 and not (weight is None and bias is None):
        factors = [input.new_empty(rows, channels, dtype=_exact(input)) for _ in range(2)]
        del factors
    del copy
    return result, mean, rstd


def _native_group_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    rows: int,
    channels: int,
    pixels: int,
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    # native_group_norm_backward in native/group_norm.cpp, and of the kernel in
    # group_norm_kernel.cu: sums for each channel (ds, db), factors for each group (c2, c3)
    # and for each channel (c1). Where there is one pixel it has c2 and c3 alone.
    copies = [grad_out.contiguous(), input.contiguous()]
    made = torch.empty_like(copies[1]) if output_mask[0] else None
    like = input if weight is None else weight
    grads = [like.new_empty(channels) if asked else None for asked in output_mask[1:]]
    exact = _exact(input)
    held = []
    if pixels != 1:
        held += [input.new_empty(rows, channels, dtype=exact) for _ in range(2)]
    if output_mask[0]:
        held += [input.new_empty(rows, groups, dtype=exact) for _ in range(2)]
        if pixels != 1 and weight is not None:
            held.append(input.new_empty(rows, channels, dtype=exact))
    del held, copies
    return made, *grads


def _exact(tensor: Tensor) -> torch.dtype:
    """In which type sums are kept: FP32 for half precision."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.rms_norm.default: _rms_norm,
    **({aten._fused_rms_norm.default: _fused_rms_norm} if hasattr(aten, "_fused_rms_norm") else {}),
}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _native_layer_norm,
    aten.native_layer_norm_backward.default: _native_layer_norm_backward,
    aten.native_group_norm.default: _native_group_norm,
    aten.native_group_norm_backward.default: _native_group_norm_backward,
}
