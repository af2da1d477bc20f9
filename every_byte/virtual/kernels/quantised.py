"""bitsandbytes' products, for their allocations: weights of 4 and 8 bits on CUDA.

As ``bitsandbytes/backends/cuda/ops.py`` and ``.../default/ops.py`` of 0.50.2 have them.
Its other operations allocate nothing but their results.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules


def _is_fused(
    rules: Rules, dtype: torch.dtype, rows: int, shape: list[int], blocksize: int
) -> bool:
    """Whether a kernel of bitsandbytes' own reads the 4 bits: it decides by the card.

    Raises:
        NotImplementedError: the installed version decides otherwise than 0.50 does.
    """
    columns, inner = shape
    try:
        cuda: Any = import_module("bitsandbytes.backends.cuda.ops")
        largest = cuda._gemm_4bit_custom_max_m
        decide = cuda._gemm_4bit_use_custom_cuda.__wrapped__
        asked = cuda._gpu_dispatch_props  # the card's properties
    except (AttributeError, ImportError) as error:
        raise NotImplementedError(
            f"products of bitsandbytes' 4 bits need bitsandbytes 0.50: {error}"
        ) from None
    if rows > largest or inner % blocksize:
        return False
    properties = rules.multiprocessors, *rules.compute_capability
    with mock.patch.object(cuda, asked.__name__, lambda _: properties):
        fused: bool = decide(0, dtype, rows, columns, inner)
    return fused


def _gemm_4bit(
    rules: Rules,
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    if _is_fused(rules, A.dtype, A.numel() // A.size(-1), shapeB, blocksize):
        rows = A.contiguous()
        return rows.new_empty(*A.shape[:-1], shapeB[0])
    scales = []
    if absmax_8bit is not None and absmax_offset is not None:  # in FP32, then with their mean
        scales.append(torch.empty_like(absmax_8bit, dtype=torch.float32))
        scales.append(scales[0] + absmax_offset)
    weight = A.new_empty(shapeB)
    result = torch.nn.functional.linear(A, weight, bias)
    del scales, weight
    return result


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    numbers = A.contiguous().numel()
    scales = A.new_empty(-(-numbers // blocksize), dtype=torch.float32)
    rows = (numbers + 1) // (2 * quant_storage.itemsize)
    return A.new_empty(rows, 1, dtype=quant_storage), scales


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    scales = A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)
    return torch.empty_like(A.contiguous(), dtype=torch.uint8), scales


def _int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = A.new_empty(A.numel() // A.size(-1), dtype=torch.float32)
    result = A.new_empty(A.shape, dtype=torch.int8)
    columns = None
    if threshold > 0:
        outliers = A.abs() >= threshold
        if outliers.any().item():  # of what is unknown: assumed not
            columns = outliers.any(dim=0).nonzero().view(-1)
        else:
            columns = A.new_empty(0, dtype=torch.int64)
    if A.numel() // A.size(-1) > 1 and columns is not None:
        result[:, columns] = 0
    return result, scales, columns


def _int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(A, dtype=torch.float16)  # the kernel knows no other
    return out.to(dtype or torch.float16)


def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    product = A.new_empty(*A.shape[:-1], B.size(0), dtype=torch.int32)
    return _int8_mm_dequant(product, row_stats, col_stats, dtype, bias)


def _int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    weight, columns = None, A.new_empty(0)
    if outlier_cols is not None and outlier_cols.numel():
        columns = A[:, outlier_cols].contiguous()
        part = CB[:, outlier_cols].contiguous()
        weight = (part * SCB.view(-1, 1) * 7.874015718698502e-3).to(A.dtype).t()
    output = _int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    return (output if weight is None else output.addmm(columns, weight)), columns


WITH_RULES: dict[str, Callable[..., Any]] = {"bitsandbytes.gemm_4bit.default": _gemm_4bit}
KERNELS: dict[str, Callable[..., Any]] = {
    "bitsandbytes.quantize_4bit.default": _quantize_4bit,
    "bitsandbytes.quantize_blockwise.default": _quantize_blockwise,
    "bitsandbytes.int8_vectorwise_quant.default": _int8_vectorwise_quant,
    "bitsandbytes.int8_mm_dequant.default": _int8_mm_dequant,
    "bitsandbytes.int8_scaled_mm.default": _int8_scaled_mm,
    "bitsandbytes.int8_mixed_scaled_mm.default": _int8_mixed_scaled_mm,
}
"""By name: bitsandbytes defines its operations when it is imported."""
