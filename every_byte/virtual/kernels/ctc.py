"""The CTC loss: PyTorch has no ``meta`` kernel for its backward, nor where lengths are tensors.

``ctc_loss_tensor`` and ``ctc_loss_backward_tensor`` in ``aten/src/ATen/native/LossCTC.cpp`` of
PyTorch 2.14 read the lengths on the host; ``ctc_loss_gpu_template`` and its backward, in
``.../native/cuda/LossCTC.cu``, put them, and where each target begins, on the card.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _on_the_card(log_probs: Tensor) -> list[Tensor]:
    """The lengths of both, and the targets' beginnings: 8 B for each of the batch."""
    batch = log_probs.size(1) if log_probs.dim() == 3 else 1
    return [log_probs.new_empty(batch, dtype=torch.int64) for _ in range(3)]


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    inputs, outputs = (
        torch.empty(each.shape, dtype=torch.int64, device="cpu").copy_(each).tolist()
        for each in (input_lengths, target_lengths)
    )
    return _of_lists(log_probs, targets, inputs, outputs, blank, zero_infinity)


def _of_lists(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: list[int],
    target_lengths: list[int],
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    _kept = _on_the_card(log_probs)
    length, batch, _ = log_probs.shape
    states = 2 * max(target_lengths) + 1
    return log_probs.new_empty(batch), log_probs.new_empty(batch, length, states)


def _ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    neg_log_likelihood: Tensor,
    log_alpha: Tensor,
    blank: int,
    zero_infinity: bool = False,
) -> Tensor:
    _kept = _on_the_card(log_probs)
    _log_beta = torch.empty_like(log_alpha)
    return torch.empty_like(log_probs)


KERNELS: dict[Any, Callable[..., Any]] = {
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
    aten._ctc_loss.default: _of_lists,
    aten._ctc_loss_backward.default: _ctc_loss_backward,
}
