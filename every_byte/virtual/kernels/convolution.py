"""Convolutions and batch norms: results to the byte, cuDNN's workspaces by estimate.

What convolutions return and copy follows from ``aten/src/ATen/native/Convolution.cpp`` and
``cudnn/ConvShared.cpp`` of PyTorch 2.11. Which of its kernels cuDNN takes no source says.
But what they borrow is mostly copies: its tensor-core kernels read and write NHWC, so that
tensors in NCHW are copied before and after, and channels are padded to whole vectors of
16 bytes. `workspace` says when; where it is unclear it takes the larger.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from every_byte.tracker import untracked
from every_byte.units import KiB, MiB
from every_byte.virtual.kernels.borrowing import borrow
from every_byte.virtual.rules import Rules

aten = torch.ops.aten

ESTIMATE = (
    "cuDNN's workspaces of convolutions, mostly copies in NHWC: fitted to nine networks on an H200 "
    "and to what an H100 measured, where the peaks of 81 vision models in FP32 are off by -0.9 to "
    "+0.9 %"
)
OPERATIONS = (aten.convolution, aten.convolution_backward)

_DIRECT = 400  # bytes that a kernel for NCHW borrows, as measured; 16 to 147 one for NHWC
_COPIES = 147
_VECTOR = 16  # bytes that a tensor-core kernel loads at once: channels are padded to it
_SMALL_DEPTH = 128  # numbers that a weight multiplies per output: below, a kernel for NCHW
_FEW_CHANNELS = 32
_FEW_OUTPUTS = 64  # channels that a product in NHWC makes at once, by SegFormer's two classes
_FEW_OF_AN_IMAGE = 4  # its colours, or those of its latents
# A kernel that reads NHWC and writes NCHW is taken where these hold, as measured: numbers
# summed per output, outputs per channel, outputs, unless of so many channels.
_SHALLOW, _MANY_ROWS, _HUGE, _WIDE = 576, 12_544, 1 << 25, 128
_DEEP = 4096  # numbers that are summed, from which on the sum is split, as measured
_ROWS = 256  # of a partial sum, at least
_FAR = 8  # dilation: DeepLab's 12, 24 and 36 were measured, and 2 and 4 of its other filters
_BLOCK = 64 * KiB  # accumulators of a block, in FP32
# Up to so many bytes a weight's gradient in FP32 takes a kernel that copies nothing, as measured:
# one product of each image (9.8 MB were taken, 16.8 were not), or Winograd's (18.9, and 28.3 not).
_OF_EACH_IMAGE, _TRANSFORMED = 12 * MiB, 24 * MiB
_WINOGRAD = 4  # rows and columns of a tile
_TILE = 128  # rows and columns of a matrix product's block


def workspace(
    gradient_of: str,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    rules: Rules,
) -> int:
    """Bytes that cuDNN borrows for a convolution of `x` to `y`: estimated.

    Args:
        gradient_of: "" for the convolution itself, or "input", or "weight".
        x, y: what it reads and what it makes, of a transposed one the other way round.
        weight: its filters.
        stride, dilation: of the convolution, in each dimension.
        rules: of the card.
    """
    kernel, size = weight.shape[2:], weight.element_size()
    if x.dtype is torch.float64 or not torch.backends.cudnn.enabled or not x.numel():
        return 0
    depth = weight[0].numel()
    several = any(n > 1 for n in kernel)
    channels = (weight.size(1), weight.size(0))
    vector = _VECTOR // size
    unaligned = any(n % vector for n in channels)
    is_product = not several and all(n == 1 for n in stride)

    def padded(tensor: Tensor) -> int:
        many = tensor.size(1)
        return tensor.nbytes // many * (-(-many // vector) * vector)

    filters = math.prod(-(-n // vector) * vector for n in channels) * math.prod(kernel) * size
    partial = 0
    if gradient_of == "weight":
        partial = _partial_sums(y, weight, max(dilation) >= _FAR, rules)
    if _is_channels_last(x) or _is_channels_last(weight):
        if is_product:
            if gradient_of == "weight":
                return _product_parts(y, weight, rules) if size == 4 else partial
            if gradient_of == "" and unaligned and size == 4 and depth >= _SMALL_DEPTH:
                return y.nbytes // y.size(1) * _FEW_OUTPUTS + weight.nbytes
            return 0
        if gradient_of == "":
            if size == 4 and channels[0] <= _FEW_OF_AN_IMAGE and several:
                return x.nbytes + weight.nbytes + _VECTOR
        copied = sum(padded(t) for t in (x, y) if t.size(1) % vector)
        return (copied + filters if unaligned else 0) + partial
    if x.dtype is torch.bfloat16 and gradient_of == "":  # FP16: as published, pytorch#123533
        if is_product:
            return 0  # takes NCHW as it is
        if several and channels[0] < _FEW_OF_AN_IMAGE:
            return 0
    if size == 4:
        if gradient_of == "weight" and math.prod(y.shape[2:]) == 1:
            return 0  # of one pixel: a product of matrices, as measured of squeezed channels
        if is_product and not math.prod(x.shape[2:]) % 4:
            if gradient_of != "weight":
                return _DIRECT
            if min(channels) >= _FEW_CHANNELS and not unaligned:
                return x.size(0) * weight.nbytes + _DIRECT
        if gradient_of == "weight" and min(channels) >= _FEW_CHANNELS:
            of_each = x.size(0) * weight.nbytes
            if is_product and math.prod(x.shape[2:]) > 1 and of_each <= _OF_EACH_IMAGE:
                return of_each
            if _is_winograds(weight, stride, dilation) and y.numel() // y.size(1) >= _ROWS:
                transformed = _winograd(x, y, weight)
                if transformed <= _TRANSFORMED:
                    return transformed
        if unaligned and several and depth < _SMALL_DEPTH:
            return 0
        apart = all(s >= k for s, k in zip(stride, kernel, strict=True))
        if unaligned and several and apart and gradient_of == "":
            return 0  # patches, such as a vision transformer's
    if several and gradient_of != "weight" and not unaligned:
        partial = _last_wave(gradient_of, x, y, weight, rules)
    if size == 4 and gradient_of == "":
        huge = y.numel() >= _HUGE and y.size(1) < _WIDE
        if depth <= _SHALLOW and _MANY_ROWS <= y.numel() // y.size(1) and not huge:
            return x.nbytes + weight.nbytes + _COPIES  # a kernel that writes NCHW
        return x.nbytes + y.nbytes + (weight.nbytes if several else 0) + partial + _COPIES
    return padded(x) + padded(y) + (filters if several else 0) + partial + _COPIES


def _is_winograds(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    return weight.shape[2:] == (3, 3) and all(n == 1 for n in (*stride, *dilation))


def _winograd(x: Tensor, y: Tensor, weight: Tensor) -> int:
    """What Winograd's transform takes: 6 x 6 numbers for 4 x 4 of an image and 3 x 3 of a filter.

    cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED; F(4 x 4, 3 x 3) of Lavin and
    Gray, arXiv:1509.09308. Equal to the byte where it was measured, on the H100.
    """
    tiles = x.size(0) * math.prod(-(-n // _WINOGRAD) for n in y.shape[2:])
    numbers = tiles * (x.size(1) + y.size(1)) + weight.size(0) * weight.size(1)
    return (_WINOGRAD + 2) ** 2 * numbers * weight.element_size()


def _last_wave(of: str, x: Tensor, y: Tensor, weight: Tensor, rules: Rules) -> int:
    """Partial results where a long sum's last blocks are shared by two multiprocessors."""
    made = x if of == "input" else y
    summed = weight.numel() // made.size(1)
    if summed < _DEEP:
        return 0
    tiles = -(-(made.numel() // made.size(1)) // _TILE) * -(-made.size(1) // _TILE)
    if 2 * tiles < rules.multiprocessors:
        return 0
    return 2 * (tiles % rules.multiprocessors) * _BLOCK


def _partial_sums(y: Tensor, weight: Tensor, is_far: bool, rules: Rules) -> int:
    """Partial sums of a weight's gradient, in FP32: as many as fill the multiprocessors.

    They are of the blocks of the last wave, and of no fewer than `_ROWS` rows each. Of filters
    that are far apart (`is_far`) they are of all blocks, as DeepLab's were on the H100.
    """
    rows, columns = weight.size(0), weight[0].numel()
    tile = _TILE if rows > _TILE // 2 else _TILE // 2
    tiles = -(-rows // tile) * -(-columns // tile)
    summed = y.numel() // y.size(1)
    last = tiles % rules.multiprocessors or rules.multiprocessors
    splits = min(rules.multiprocessors // last, summed // _ROWS)
    if splits > 1:
        return splits * (4 * weight.numel() if is_far or last == tiles else last * _BLOCK)
    if summed < _DEEP or tiles > rules.multiprocessors:
        return 0
    return rules.multiprocessors // 2 * _BLOCK


def _product_parts(y: Tensor, weight: Tensor, rules: Rules) -> int:
    """Partial sums of a pointwise weight's gradient in NHWC: of two blocks for a multiprocessor.

    Or of one, where a part would have fewer rows than a tile. Equal where it was measured and
    split, on the H100, and SegFormer's peaks are so.
    """
    rows, columns = weight.size(0), weight[0].numel()
    height = _TILE if rows % _TILE == 0 else _TILE // 2
    width = 2 * _TILE if columns % (2 * _TILE) == 0 else _TILE
    tiles = -(-rows // height) * -(-columns // width)
    summed = y.numel() // y.size(1)
    if summed < 2 * _ROWS:
        return 0
    splits = 2 * rules.multiprocessors // tiles
    if splits * _TILE > summed:
        splits = min(rules.multiprocessors // tiles, summed // (_TILE // 2))
    return splits * weight.nbytes + 256 if splits > 1 else 0


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return False
    form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous(memory_format=form)


def _layout(*tensors: Tensor) -> torch.memory_format:
    # cudnn_conv_suggest_memory_format in native/ConvUtils.h: if the input or weights ask for it.
    if any(map(_is_channels_last, tensors)):
        return torch.channels_last if tensors[0].dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _is_depthwise(input: Tensor, weight: Tensor, transposed: bool, groups: int) -> bool:
    # ConvParams::is_depthwise in native/Convolution.cpp, of inputs in one or two dimensions.
    return (
        not transposed
        and groups == input.size(1) > 1
        and weight.size(0) % groups == 0
        and input.dim() <= 5
    )


def _convolution(
    rules: Rules,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    if input.dtype is not weight.dtype:
        raise RuntimeError(
            f"Input type ({input.dtype}) and weight type ({weight.dtype}) should be the same"
        )
    expected = weight.size(0) if transposed else weight.size(1) * groups
    if input.size(1) != expected:  # in the words of check_shape_forward in Convolution.cpp
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected "
            f"input{list(input.shape)} to have {expected} channels, but got {input.size(1)} "
            "channels instead"
        )
    with untracked():  # PyTorch's own rule for the shape, and its own refusals
        shape = aten.convolution.default(
            *(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        ).shape
    layout = _layout(input, weight)
    copy = input.contiguous(memory_format=layout)
    filters = weight.contiguous(memory_format=layout)
    result = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if not _is_depthwise(input, weight, transposed, groups):
        x, y = (result, copy) if transposed else (copy, result)
        stride = [stride[d % len(stride)] for d in range(input.dim() - 2)]
        of = "input" if transposed else ""
        borrow(result, workspace(of, x, y, filters, stride, dilation, rules))
    return result


def _convolution_backward(
    rules: Rules,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    layout = _layout(input, weight)
    depthwise = _is_depthwise(input, weight, transposed, groups)
    copy = input.contiguous(memory_format=layout) if output_mask[1] else input
    grad = grad_output.contiguous(memory_format=layout)
    filters = weight.contiguous(memory_format=layout)
    stride = [stride[d % len(stride)] for d in range(input.dim() - 2)]
    x, y = (grad, copy) if transposed else (copy, grad)
    made: dict[str, Tensor] = {}
    wanted = [("input", input, output_mask[0]), ("weight", weight, output_mask[1])]
    if depthwise and input.dtype is torch.float32:
        wanted.reverse()  # conv_depthwise2d_backward in native/cuda/DepthwiseConv2d.cu
    for of, like, asked in wanted:
        if not asked:
            continue
        made[of] = torch.empty(
            like.shape, dtype=like.dtype, device=like.device, memory_format=layout
        )
        if not depthwise:
            kind = "" if transposed and of == "input" else of
            borrow(input, workspace(kind, x, y, filters, stride, dilation, rules))
    del grad, filters, x, y
    bias = None
    if output_mask[2]:
        bias = grad_output.sum([0, *range(2, grad_output.dim())])
    del copy
    return made.get("input"), made.get("weight"), bias


# Batch norm


def _stages(input: Tensor) -> tuple[int, int]:
    """Blocks along rows, and along channels: `flexible_launch_configs`, Normalization.cuh."""
    channels = input.size(1)
    rows = input.numel() // channels

    def power(number: int) -> int:
        return 1 << max(number.bit_length() - 1, 0)

    width = min(power(channels), 32)
    height = min(power(-(-rows // 16)), 512 // width)
    if width * height != 512:
        width = min(power(channels), 512 // height)
    down = min(-(-rows // (height * 16)), 128)
    return (1 if down < 8 else down), -(-channels // width)


def _stage(input: Tensor, numbers: int) -> None:
    # batch_norm_stats_channels_last_cuda_template and batch_norm_backward_reduce_...
    # in native/cuda/Normalization.cuh.
    down, across = _stages(input)
    if down > 1:
        staged = input.new_empty(numbers * input.size(1) * down, dtype=torch.float32)
        borrow(input, 4 * across)
        del staged


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.float64 if input.dtype is torch.float64 else torch.float32
    result = torch.empty_like(input)
    channels = input.size(1) if training else 0
    mean, invstd = (input.new_empty(channels, dtype=exact) for _ in range(2))
    if training and _by_channels(input, weight):
        _stage(input, 4)
    return result, mean, invstd


def _by_channels(input: Tensor, weight: Tensor | None) -> bool:
    # batch_norm_choose_impl in native/cuda/Normalization.cu, where cuDNN is not taken:
    # _select_batch_norm_backend in native/Normalization.cpp has it for FP32 and FP16 with weights.
    return _is_channels_last(input) and (input.dtype is torch.bfloat16 or weight is None)


def _native_batch_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    exact = torch.float64 if input.dtype is torch.float64 else torch.float32
    channels = input.size(1)
    of_weight = exact if weight is None else weight.dtype
    if train and _by_channels(input, weight):
        sums = [input.new_empty(channels, dtype=exact) for _ in range(2)]
        grads = [input.new_empty(channels, dtype=of_weight) if m else None for m in output_mask[1:]]
        _stage(input, 2)
        result = torch.empty_like(input)
        del sums
        return result, *grads
    copy = grad_out
    if not grad_out.is_contiguous() and grad_out.stride() != input.stride():
        copy = grad_out.contiguous()
    made = torch.empty_like(input) if output_mask[0] else None
    grads = [input.new_empty(channels, dtype=of_weight) if m else None for m in output_mask[1:]]
    del copy
    return made, *grads


WITH_RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _native_batch_norm,
    aten.native_batch_norm_backward.default: _native_batch_norm_backward,
}
