"""Products of groups of rows with a matrix each, as mixtures of experts take them.

CUDA has two ways (``_grouped_mm_cuda`` in ``aten/src/ATen/native/cuda/GroupedBlas.cpp``
of PyTorch 2.14): one kernel for BF16 on compute capability 9.0 and 10.x, else one
product of cuBLAS's for each group. PyTorch's ``meta`` kernel knows the former alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules

aten = torch.ops.aten


def _grouped_mm(
    rules: Rules | None,
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As ``create_grouped_gemm_output_tensor`` in ``aten/src/ATen/native/GroupedMMUtils.h``.

    Raises:
        RuntimeError: the matrices do not fit, in CUDA's words.
    """
    if left.size(-1) != right.size(-2):
        raise RuntimeError("contraction dimension of mat_a and mat_b must match")
    if bias is not None:
        raise RuntimeError("Bias not supported yet")
    if out_dtype not in (None, left.dtype) or left.dtype != right.dtype:
        raise RuntimeError("Grouped gemm output dtype must match `mat_a` dtype")
    groups = left.size(0) if offs is None else offs.size(0)
    shape = [left.size(-2), right.size(-1)]
    if left.dim() == right.dim():
        shape.insert(0, groups)
    elif groups != (left if left.dim() == 3 else right).size(0):
        raise RuntimeError("matrix batch sizes have to match")
    row = -(-shape[-1] * left.element_size() // 16) * 16 // left.element_size()
    strides = [row, 1] if len(shape) == 2 else [shape[1] * row, row, 1]
    out = torch.empty_strided(shape, strides, dtype=left.dtype, device=left.device)
    is_one_kernel = rules is not None and rules.compute_capability[0] in (9, 10)
    if not (is_one_kernel and left.dtype is torch.bfloat16):
        # One of cuBLAS's products stands for all: each writes to a part of the result.
        first, second, to = (x if x.dim() == 2 else x[0] for x in (left, right, out))
        torch.mm(first[: to.size(0)], second[:, : to.size(1)], out=to[: first.size(0)])
    return out


WITH_RULES: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}
