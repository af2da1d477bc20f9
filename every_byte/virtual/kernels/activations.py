"""Gradients of activations that PyTorch composes of others where a device has no kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _mish_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    # One kernel on CUDA, whose result is its iterator's (mish_backward in
    # aten/src/ATen/native/Activation.cpp); else math_mish_backward, of eight results.
    if torch.is_grad_enabled() and (grad_output.requires_grad or input.requires_grad):
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        composed: Tensor = aten.mish_backward.default._op_dk(key, grad_output, input)
        return composed
    return grad_output * input


COMPOSITES: dict[Any, Callable[..., Any]] = {aten.mish_backward.default: _mish_backward}
KERNELS = COMPOSITES  # in inference mode they arrive whole
