"""What resizing and padding of images borrow: contiguous copies, where a kernel reads no other.

``aten/src/ATen/native/cuda/UpSampleNearest2d.cu``, ``UpSampleBilinear2d.cu`` and
``ReflectionPad.cu`` of PyTorch 2.11.
"""

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_FEW = 4  # channels: with fewer the kernels for channels_last are not taken
_RESIZED = (aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)
_RESIZED_BACK = (
    aten.upsample_nearest2d_backward.default,
    aten._upsample_nearest_exact2d_backward.default,
    aten.upsample_bilinear2d_backward.default,
)


def image_temporaries(operation: Any, args: tuple[Any, ...]) -> list[int] | None:
    """Bytes of the copies of an image's result and of itself; None if it is no such operation."""
    if operation is aten.reflection_pad2d.default:
        return _copied(args[0])
    if operation in _RESIZED:
        image: Tensor = args[0]
        size = [*image.shape[:2], *args[1]]
    elif operation in _RESIZED_BACK:
        image, size = args[0], args[2]
    else:
        return None
    if not image.is_contiguous(memory_format=torch.channels_last) or image.is_contiguous():
        return _copied(image)
    if image.size(1) >= _FEW:
        return []
    return [math.prod(size) * image.element_size(), *_copied(image)]


def _copied(image: Tensor) -> list[int]:
    return [] if image.is_contiguous() else [image.numel() * image.element_size()]
