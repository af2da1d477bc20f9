"""A recurrent layer's weights in one block, as cuDNN wants them.

``_cudnn_rnn_flatten_weight`` in ``aten/src/ATen/native/cudnn/RNN.cpp`` of PyTorch 2.14: a new
block of all the numbers, of which each weight becomes a part.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _flattened(weights: list[Tensor], *_: Any) -> Tensor:
    block = weights[0].new_empty(sum(weight.numel() for weight in weights))
    begin = 0
    for weight in weights:
        part = block.narrow(0, begin, weight.numel()).view(weight.shape)
        weight.set_(part.untyped_storage(), begin, part.shape, part.stride())
        begin += weight.numel()
    return block


KERNELS: dict[Any, Callable[..., Any]] = {aten._cudnn_rnn_flatten_weight.default: _flattened}
