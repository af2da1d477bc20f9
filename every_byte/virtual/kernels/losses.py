"""Losses that CUDA writes element by element, and then adds up.

The elements are as large as the input. Some losses keep such a block for their one number:
``mse_loss`` and ``smooth_l1_loss``, whose result is made as large as the input and then resized
(aten/src/ATen/native/Loss.cpp), and ``binary_cross_entropy``, which resizes its elements
(aten/src/ATen/native/cuda/Loss.cu). All but the last are as an H100 took them (PyTorch 2.11).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.kernels.reductions import reduction_temporaries
from every_byte.virtual.rules import Rules

aten = torch.ops.aten

_NONE = 0  # of at::Reduction


def _elements(*of: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in of))
    dtype = of[0].dtype
    for other in of[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return of[0].new_empty(shape, dtype=dtype)


def _add_up(rules: Rules, elements: Tensor) -> None:
    """Take what a sum over everything borrows, and give it back."""
    sizes = reduction_temporaries(aten.mean.default, (elements,), {}, rules) or []
    _held = [elements.new_empty(size, dtype=torch.uint8) for size in sizes]


def _reduced(rules: Rules, elements: Tensor, reduction: int) -> Tensor:
    """``apply_loss_reduction`` in native/Loss.cpp."""
    if reduction == _NONE:
        return elements
    result = elements.new_empty(())
    _add_up(rules, elements)
    return result


def _as_a_number(block: Tensor) -> Tensor:
    """One number in a block that stays as large as it was."""
    return block.as_strided((), ()) if block.numel() else block.new_empty(())


def _into_its_elements(
    rules: Rules, self: Tensor, target: Tensor, reduction: int = 1, *_: Any, **__: Any
) -> Tensor:
    output = _elements(self, target)
    if reduction == _NONE:
        return output
    elements = _elements(self, target)
    _add_up(rules, elements)
    return _as_a_number(output)


def _huber(
    rules: Rules, self: Tensor, target: Tensor, reduction: int = 1, *_: Any, **__: Any
) -> Tensor:
    return _reduced(rules, _elements(self, target), reduction)


def _with_logits(
    rules: Rules,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """``binary_cross_entropy_with_logits`` in native/Loss.cpp: two tensors of its own."""
    _log_sigmoid = _elements(self)
    if pos_weight is not None:
        less = _elements(pos_weight)
        log_weight = _elements(less, target)
        del less, log_weight
    return _reduced(rules, _elements(target), reduction)


def _binary_cross_entropy(
    rules: Rules, self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    elements = _elements(self)
    if _reduced(rules, elements, reduction) is elements:
        return elements
    return _as_a_number(elements)


def _multi_margin(
    rules: Rules,
    self: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """``multi_margin_loss_cuda`` in native/cuda/MultiMarginLoss.cu: a number of each row."""
    if reduction == _NONE:
        return self.new_empty(target.shape)
    result = self.new_empty(())
    if self.dim() == 2:
        _add_up(rules, self.new_empty(self.size(0)))
    return result


def _as_its_input(rules: Rules, grad: Tensor, self: Tensor, *_: Any, **__: Any) -> Tensor:
    """The gradient of a loss with margins of classes, for which PyTorch has no meta kernel."""
    return self.new_empty(self.shape)


WITH_RULES: dict[Any, Callable[..., Any]] = {
    aten.mse_loss.default: _into_its_elements,
    aten.smooth_l1_loss.default: _into_its_elements,
    aten.huber_loss.default: _huber,
    aten.binary_cross_entropy_with_logits.default: _with_logits,
    aten.binary_cross_entropy.default: _binary_cross_entropy,
    aten.multi_margin_loss.default: _multi_margin,
    aten.multi_margin_loss_backward.default: _as_its_input,
    aten.multilabel_margin_loss_backward.default: _as_its_input,
}
