"""Sorting, scanning and indexing: what CUDA's kernels and cub's algorithms borrow.

cub's storage depends on how many numbers a block takes at once, which its
authors tuned for each card; here are their choices for compute capability 9.0
(CUDA 13), of which some were read off measured storages. On other cards it is the
order of magnitude.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.kernels.borrowing import borrow
from every_byte.virtual.kernels.reductions import reduction_temporaries
from every_byte.virtual.rules import Rules

aten = torch.ops.aten

_ALIGNMENT = 256  # of each part of cub's storage
_SORT_TILE = {(8, 8): 4608, (4, 8): 5376}  # bytes of a key and of its value: keys in a block
_SCAN_TILE = {4: 1920, 8: 896}  # bytes of a number: numbers in a block
_SELECT_TILE = 2048  # not pinned down by what was measured: 1,024 or more
_ONE_BLOCK = 2304  # keys that a single block sorts, without storage
_SMALL_SORT = 4096  # numbers that PyTorch sorts without cub
_WITHOUT_SORTING = 3072  # indices: embedding_dense_backward_cuda in native/cuda/Embedding.cu
_ROWS = 10  # NROWS_PER_THREAD in native/cuda/EmbeddingBackwardKernel.cu


def _aligned(*parts: int) -> int:
    """Bytes of a storage of several parts, as ``cub::AliasTemporaries`` lays them out."""
    return sum(-(-part // _ALIGNMENT) * _ALIGNMENT for part in parts) + _ALIGNMENT - 1


def sort_storage(number: int, key: int, value: int, bits: int | None = None) -> int:
    """Bytes that ``cub::DeviceRadixSort`` of pairs takes for `number` keys.

    Copies of keys and values, unless one pass does; for each byte of a key 256 counts of
    8 B; for each block 256 counts of 4 B.

    Args:
        number: of keys.
        key, value: bytes of each.
        bits: of a key that are looked at; all if None.
    """
    if number <= _ONE_BLOCK:
        return 1
    blocks = -(-number // _SORT_TILE.get((key, value), 4608))
    passes = key if bits is None else -(-bits // 8)
    copies = (key * number, value * number) if passes > 1 else ()
    return _aligned(*copies, passes * 256 * 8, blocks * 256 * 4) + _ALIGNMENT


def scan_storage(number: int, width: int = 8, tile: int | None = None) -> int:
    """Bytes that ``cub::DeviceScan`` takes: a state for each block, and for 32 before.

    Args:
        number: of numbers.
        width: bytes of a number.
        tile: numbers in a block, if it is no scan.
    """
    blocks = -(-number // (tile or _SCAN_TILE.get(width, 896)))
    return _aligned((32 + blocks) * 2 * max(width, 4)) + _ALIGNMENT


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    # embedding_symint in native/Embedding.cpp selects by one row of indices.
    if weight.dim() != 2:
        raise RuntimeError("'weight' must be 2-D")
    copy = indices.reshape(-1)
    result = weight.new_empty(*indices.shape, weight.size(1))
    del copy
    return result


def _embedding_dense_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    number, width = indices.numel(), grad_output.size(-1)
    indices = indices.contiguous()

    def result() -> Tensor:
        return grad_output.new_empty(num_weights, width)

    def numbers(many: int) -> Tensor:
        return indices.new_empty(many)

    def storage(nbytes: int) -> None:
        borrow(indices, nbytes)

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
    storage(scan_storage(number, tile=_SELECT_TILE))
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


def temporaries(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Rules
) -> list[int] | None:
    """Bytes that an operation takes after its results, in order; None if it is not of these.

    A negative number gives back what was taken last.
    """
    packet = operation.overloadpacket
    if packet in (aten.sort, aten.argsort) and isinstance(args[0], Tensor):
        # Keys and indices in native/cuda/Sort.cpp; rows of many are sorted by segments,
        # whose storage is not replayed.
        tensor = args[0]
        held = [8 * tensor.numel()]
        if tensor.dim() == 1 and tensor.numel() > _SMALL_SORT:
            held.append(sort_storage(tensor.numel(), tensor.element_size(), 8))
        return held
    if packet is aten.topk:
        return _of_the_largest(rules, *args, **kwargs)
    if packet in (aten.cumsum, aten.cumprod, aten.logcumsumexp):
        # cumsum_cuda_kernel in native/cuda/ScanKernels.cpp: a whole tensor by cub, rows not.
        tensor, dim = args[0], args[1]
        wanted = kwargs.get("dtype") or (
            tensor.dtype if tensor.is_floating_point() else torch.int64
        )
        held = [] if wanted is tensor.dtype else [tensor.numel() * wanted.itemsize]
        if tensor.dim() and tensor.numel() == tensor.size(dim):
            held.append(scan_storage(tensor.numel(), wanted.itemsize))
        return held
    if packet is aten.roll and len(args) > 2 and len(args[2]) > 1:
        return [args[0].nbytes]  # between two dimensions: roll_cuda in native/cuda/TensorShape.cu
    if packet is aten.randperm and isinstance(args[0], int):
        return _of_a_permutation(args[0])
    if packet in (aten.index_put_, aten.index_put, aten._index_put_impl_) and args[3:4] == (True,):
        return _accumulated(rules, args[0], args[1], args[2], checked=args[4:5] != (True,))
    if packet is aten.histc and all(limit == 0 for limit in args[2:4]):
        # The smallest and the largest number: _histc_cuda_template in native/cuda/SummaryOps.cu.
        return [*_limit(args[0], rules), -args[0].element_size()] * 2
    if operation in (aten.pow.Scalar,):
        return [8]  # the number on the left, as FP64 or a whole number
    return None


def _limit(tensor: Tensor, rules: Rules) -> list[int]:
    """The smallest or the largest number of a tensor, taken and given back; many are staged."""
    staged = reduction_temporaries(aten.max.default, (tensor,), {}, rules) or []
    return [tensor.element_size(), *staged, *(-nbytes for nbytes in reversed(staged))]


def _accumulated(
    rules: Rules, tensor: Tensor, indices: list[Tensor | None], values: Tensor, checked: bool
) -> list[int]:
    # index_put_with_sort_kernel in native/cuda/Indexing.cu, for one index of whole numbers in
    # the first dimension: its limits (staged, if very many), unless it was checked in forward;
    # the indices as they lie in memory; then those and their places are sorted, by as many bits
    # as they need.
    first = indices[0]
    if len(indices) != 1 or first is None or first.dtype is not torch.int64:
        return []
    number = first.numel()
    each = 8 * number
    row = math.prod(tensor.shape[1:])
    limit = [*_limit(first, rules), 1, -1, -8] if checked else []
    copy = [] if values.is_contiguous() else [values.numel() * values.element_size()]
    bits = max(1, ((tensor.numel() - 1) // row).bit_length())
    sorting = [each, each, each, sort_storage(number, 8, 8, bits)]
    return [*limit, *limit, each, each, -each, *copy, *sorting]


def _logsumexp(tensor: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    # logsumexp_out_impl in native/ReduceOps.cpp: of the largest numbers those that are
    # infinite are masked; then as much as the whole tensor, for the powers.
    if not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.to(torch.get_default_dtype())
    largest = tensor.amax(dim, True)
    sizes = largest.abs()
    infinite = sizes == math.inf
    del infinite
    del sizes
    powers = tensor - largest
    result = powers.sum(dim, keepdim)
    del powers
    return result


# Rows at most, and numbers in a row at least, for several blocks to look for a row's largest.
_BY_SEVERAL_BLOCKS = (
    *((20, 20_000), (40, 10_000), (80, 8_000), (199, 5_000), (799, 3_000), (4_000, 800)),
    *((math.inf, 400),),
)
_SEARCH_BLOCK = 256  # threads
_SEARCH_REGISTERS = 65_536, 40  # of a multiprocessor, and of each thread


def _of_the_largest(
    rules: Rules,
    tensor: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> list[int]:
    # native/cuda/TensorTopK.cu, PyTorch 2.4 to 2.14: a copy of what is not contiguous, then one
    # block for each row, which borrows nothing, or several (should_use_multiblock). Those count
    # digits of 8 bits, block by block; each has as many numbers as let the card hold all.
    # More than 4,096 results of a row are sorted like any tensor (native/cuda/TensorTopK.cpp).
    if not k or not tensor.numel():
        return []
    length = tensor.size(dim) if tensor.dim() else 1
    rows, size = tensor.numel() // length, tensor.element_size()
    held = [] if tensor.is_contiguous() else [tensor.numel() * size]
    least = next(least for most, least in _BY_SEVERAL_BLOCKS if rows <= most)
    if length >= least:
        registers, of_each = _SEARCH_REGISTERS
        at_once = rules.multiprocessors * (registers // (of_each * _SEARCH_BLOCK))
        of_thread = -(-length * rows // (at_once * _SEARCH_BLOCK))
        of_block = min(max(of_thread, 4), 64) * _SEARCH_BLOCK
        blocks = rows * -(-length // of_block)
        digits = 8 if size == 8 else 4
        scan = scan_storage(blocks)
        held += [size * rows, 8 * rows, 2 * digits * rows, blocks * 256 * 2, rows * 256 * 4]
        held += [4 * blocks, 4 * blocks, scan, -scan, scan, -scan]
    if sorted and k > _SMALL_SORT:
        held += [-nbytes for nbytes in reversed(_still_held(held))]
        found = rows * k
        held += [8 * found, size * found, 8 * found]
    return held


def _still_held(sizes: list[int]) -> list[int]:
    """What is taken and not yet given back, in order."""
    held: list[int] = []
    for nbytes in sizes:
        if nbytes > 0:
            held.append(nbytes)
        else:
            held.pop()
    return held


def _of_a_permutation(number: int) -> list[int]:
    # randperm_out_cuda in native/cuda/Randperm.cu: keys of so many bits that few are equal;
    # the generator's state of 8 B before.
    if number < 2:
        return []
    collisions = math.log(0.9) * 12
    bits = min(64, math.ceil(math.log2(number - (6 * number**2 + 1) / collisions)))
    key = 4 if bits <= 32 else 8
    keys = key * number
    return [8, -8, 8 * number, keys, keys, sort_storage(number, key, 8, bits)]


def _foreach_norm(
    tensors: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    # foreach_tensor_norm_cuda in native/cuda/ForeachReduceOp.cu: a partial sum for each
    # 65,536 numbers, as many for each tensor as the largest has.
    first = tensors[0]
    chunks = max(-(-t.numel() // 65536) for t in tensors)
    exact = max(dtype or first.dtype, torch.float32, key=lambda d: d.itemsize)
    partial = first.new_empty(len(tensors) * chunks, dtype=exact)
    made = [t.new_empty((), dtype=dtype or t.dtype) for t in tensors]
    del partial
    return made


def _median(tensor: Tensor) -> Tensor:
    # median_impl in native/cuda/Sorting.cpp: all numbers are sorted; is the last one no number?
    numbers = tensor.reshape(-1).sort()[0]
    missing = numbers[-1:].isnan()
    result = numbers[(numbers.numel() - 1) // 2].clone()
    del missing, numbers
    return result


KERNELS: dict[Any, Callable[..., Any]] = {
    aten.median.default: _median,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_dense_backward,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten.logsumexp.default: _logsumexp,
}
