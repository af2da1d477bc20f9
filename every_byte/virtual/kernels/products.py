"""What matrix products borrow beside cuBLAS's workspace: copies of operands it cannot read.

cuBLAS reads a matrix along its rows or its columns; others are copied before
(``prepare_matrix_for_cublas`` and ``prepare_batch_matrix_for_cublas`` in
``aten/src/ATen/native/cuda/Blas.cpp``).
"""

from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.rules import Rules

aten = torch.ops.aten

# Where an operation's matrices stand among its arguments.
_MATRICES = {
    **{aten.mm: (0, 1), aten.addmm: (1, 2), aten._addmm_activation: (1, 2)},
    **{aten.bmm: (0, 1), aten.baddbmm: (1, 2)},
}


def _readable(matrix: Tensor) -> bool:
    (rows, columns), (down, along) = matrix.shape[-2:], matrix.stride()[-2:]
    if (down == 1 and along >= max(1, rows)) or (along == 1 and down >= max(1, columns)):
        return True
    # Of a batch also what is contiguous but for the strides of single rows and columns.
    return matrix.dim() == 3 and matrix.is_contiguous() and down != 0 and along != 0


def product_temporaries(operation: Any, args: tuple[Any, ...], rules: Rules) -> list[int] | None:
    """Bytes of the copies of a product's operands; None if it is no product."""
    places = _MATRICES.get(operation.overloadpacket)
    if places is None or "dtype" in str(operation):
        return None
    matrices = [args[place] for place in places]
    return [m.numel() * m.element_size() for m in matrices if m.numel() and not _readable(m)]


def by_cublaslt(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether cuBLASLt carries out a product, with a workspace: one with a bias for each column.

    ``isInputCompliesAddmmCudaLt`` in ``aten/src/ATen/native/cuda/Blas.cpp``; and of FP8, by
    ``scaled_gemm`` in ``aten/src/ATen/cuda/CUDABlas.cpp``, whose ``int8_gemm`` takes none.
    """
    if operation.overloadpacket is aten._scaled_mm:
        return True
    if operation.overloadpacket not in (aten.addmm, aten._addmm_activation):
        return False
    bias, _, second = args[:3]
    return (
        bias.dim() == 1
        and bias.is_contiguous()
        and bias.size(0) == second.size(1)
        and bias.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and min(second.shape) > 1
    )
