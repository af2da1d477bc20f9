"""Sorting, scanning and indexing: what CUDA's kernels and cub's algorithms borrow.

cub's storage depends on how many numbers a block takes at once, which its
authors tuned for each card; here are their choices for compute capability 9.0
(CUDA 13), of which some were read off measured storages. On other cards it is the
order of magnitude.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_ALIGNMENT = 256  # of each part of cub's storage
_SORT_TILE = {(8, 8): 4096, (4, 8): 5376}  # bytes of a key and of its value: keys in a block
_SCAN_TILE, _SELECT_TILE = 896, 2048  # whole numbers of 8 B in a block
_WITHOUT_SORTING = 3072  # indices: embedding_dense_backward_cuda in native/cuda/Embedding.cu
_ROWS = 10  # NROWS_PER_THREAD in native/cuda/EmbeddingBackwardKernel.cu


def _aligned(*parts: int) -> int:
    """Bytes of a storage of several parts, as ``cub::AliasTemporaries`` lays them out."""
    return sum(-(-part // _ALIGNMENT) * _ALIGNMENT for part in parts) + _ALIGNMENT - 1


def sort_storage(number: int, key: int, value: int) -> int:
    """Bytes that ``cub::DeviceRadixSort`` of pairs takes for `number` keys.

    Copies of keys and values; for each byte of a key 256 counts of 8 B; for each block
    256 counts of 4 B.
    """
    blocks = -(-number // _SORT_TILE.get((key, value), 4096))
    return _aligned(key * number, value * number, key * 256 * 8, blocks * 256 * 4) + _ALIGNMENT


def scan_storage(number: int, tile: int = _SCAN_TILE, state: int = 16) -> int:
    """Bytes that ``cub::DeviceScan`` takes: a state for each block, and for 32 before."""
    return _aligned((32 + -(-number // tile)) * state) + _ALIGNMENT


def _embedding_dense_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    number, width = indices.numel(), grad_output.size(-1)

    def result() -> Tensor:
        return grad_output.new_empty(num_weights, width)

    def numbers(many: int) -> Tensor:
        return indices.new_empty(many)

    def storage(nbytes: int) -> None:
        indices.new_empty(nbytes, dtype=torch.uint8)  # and gone again

    if number <= _WITHOUT_SORTING and not scale_grad_by_freq:
        return result()
    itself = indices.element_size()
    held = [numbers(number), numbers(number)]  # sorted, and where each was
    places = numbers(number)
    storage(sort_storage(number, itself, itself))
    del places
    made = result()
    held += [numbers(number), indices.new_empty((), dtype=torch.int64)]  # segments; how many
    keys = numbers(number)
    storage(scan_storage(number, _SELECT_TILE))
    del keys
    segments = min(number, num_weights)
    held += [numbers(segments), numbers(segments)]
    storage(scan_storage(segments))
    partial = segments + number // _ROWS
    held += [indices.new_empty((), dtype=torch.int64), numbers(partial)]
    exact = torch.float64 if grad_output.dtype is torch.float64 else torch.float32
    held.append(grad_output.new_empty(partial, width, dtype=exact))
    while held:
        held.pop()
    return made


def temporaries(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """Bytes that an operation takes after its results, in order; None if it is not of these."""
    return None


KERNELS: dict[Any, Callable[..., Any]] = {
    aten.embedding_dense_backward.default: _embedding_dense_backward,
}
