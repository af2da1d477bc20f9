"""LSTM, GRU and plain RNNs as cuDNN does them: one operation with a reserve, not one per step.

The order of allocations is that of ``_cudnn_rnn`` and its gradient in
``aten/src/ATen/native/cudnn/RNN.cpp`` of PyTorch 2.11. The reserve and the workspace are
cuDNN's own; what is here follows from what they have to keep. An LSTM's reserve agrees with
an H200's (cuDNN 9) and, as a GRU's, with what pytorch#2895 has of a P100; workspaces with one
LSTM measured on the H200. Not measured: a plain RNN, both directions, dropout, projections.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.kernels.borrowing import borrow

aten = torch.ops.aten

ESTIMATE = (
    "cuDNN's workspace and reserve of recurrent layers: an LSTM's equal on an H200, a GRU's "
    "and a plain RNN's workspace not measured"
)
OPERATIONS = (aten._cudnn_rnn, aten._cudnn_rnn_backward)

_RELU, _TANH, _LSTM, _GRU = range(4)  # cudnnRNNMode_t
# Numbers kept of a step for each of the hidden size: an LSTM's four gates and its cell, a
# GRU's three gates and what they are made of; of a plain RNN, taken to be at most two.
_KEPT = {_RELU: 2, _TANH: 2, _LSTM: 5, _GRU: 6}
_RESERVE_END, _WORKSPACE_END = 256, 512


def _spaces(
    mode: int, rows: int, batch: int, hidden: int, layers: int, directions: int, size: int
) -> tuple[int, int]:
    """Bytes of the reserve and of the workspace.

    Args:
        mode: of cuDNN.
        rows: steps of all sequences.
        batch: number of sequences.
        hidden: size of the hidden state.
        layers: how many.
        directions: 1 or 2.
        size: bytes of a number.
    """
    kept = _KEPT[mode] * layers
    width = hidden * directions * size
    between = layers - 1  # outputs of the layers that are not the last
    return (
        (kept + between) * rows * width + _RESERVE_END,
        (rows + 2 * batch) * kept * width + _WORKSPACE_END,
    )


def _sizes(
    input: Tensor,
    hx: Tensor,
    mode: int,
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
) -> tuple[int, int]:
    rows = input.numel() // max(input.size(-1), 1)
    directions = 2 if bidirectional else 1
    batch = hx.size(1)
    return _spaces(mode, rows, batch, hidden_size, num_layers, directions, input.element_size())


def _cudnn_rnn(
    input: Tensor,
    weight: list[Tensor],
    weight_stride0: int,
    weight_buf: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Sequence[int],
    dropout_state: Tensor | None,
) -> tuple[Tensor, ...]:
    swapped = batch_first and not len(batch_sizes)
    steps = input.transpose(0, 1) if swapped else input
    copy = steps.contiguous()
    width = (proj_size or hidden_size) * (2 if bidirectional else 1)
    output = input.new_empty(*steps.shape[:-1], width)
    hy = torch.empty_like(hx)
    cy = hx.new_empty(0) if cx is None else torch.empty_like(cx)
    if weight_buf is None:
        flat = input.new_empty(sum(w.numel() for w in weight))
    else:
        flat = weight_buf.view(-1)
    kept, borrowed = _sizes(input, hx, mode, hidden_size, num_layers, bidirectional)
    workspace = input.new_empty(borrowed, dtype=torch.uint8)
    reserve = input.new_empty(kept if train else 0, dtype=torch.uint8)
    del workspace, copy
    return output.transpose(0, 1) if swapped else output, hy, cy, reserve, flat


def _cudnn_rnn_backward(
    input: Tensor,
    weight: list[Tensor],
    weight_stride0: int,
    weight_buf: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    output: Tensor,
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    mode: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Sequence[int],
    dropout_state: Tensor | None,
    reserve: Tensor,
    output_mask: list[bool],
) -> tuple[Any, ...]:
    grad_output = torch.empty_like(output) if grad_output is None else grad_output
    held = [torch.empty_like(hx) if grad_hy is None else grad_hy]
    if cx is not None:
        held.append(torch.empty_like(cx) if grad_cy is None else grad_cy)
    swapped = batch_first and not len(batch_sizes)
    steps, grads = (t.transpose(0, 1) if swapped else t for t in (input, grad_output))
    copies = [steps.contiguous(), grads.contiguous()]
    of_input = torch.empty_like(steps, memory_format=torch.contiguous_format)
    of_hidden = torch.empty_like(hx)
    of_cell = None if cx is None else torch.empty_like(cx)
    _, borrowed = _sizes(input, hx, mode, hidden_size, num_layers, bidirectional)
    borrow(input, borrowed)
    copies.clear()
    of_weights: list[Tensor] = []
    if output_mask[3]:
        copies.append(steps.contiguous())
        flat = input.new_empty(sum(w.numel() for w in weight))
        borrow(input, borrowed)
        copies.clear()
        at = 0
        for one in weight:
            of_weights.append(flat[at : at + one.numel()].view(one.shape))
            at += one.numel()
    held.clear()
    return (
        of_input.transpose(0, 1) if swapped else of_input,
        of_hidden,
        of_cell if of_cell is not None else hx.new_empty(0),
        of_weights,
    )


def _by_cudnn(
    mode: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    hidden: Sequence[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    # _cudnn_impl in native/cudnn/RNN.cpp.
    hx, cx = hidden[0], hidden[1] if mode == _LSTM else None
    size = hx.size(2) if mode != _LSTM or cx is None else cx.size(2)
    projected = hx.size(2) if size != hx.size(2) else 0
    weights = params
    if torch.is_autocast_enabled("cuda") and input.dtype is torch.float32:
        # _cudnn_rnn_cast_reflatten in native/cudnn/RNN.cpp: the weights once more, cast.
        dtype = torch.get_autocast_dtype("cuda")
        params, input, hx = [w.to(dtype) for w in params], input.to(dtype), hx.to(dtype)
        cx = None if cx is None else cx.to(dtype)
    storages = {w.untyped_storage()._cdata for w in params}
    # Of cast weights each is its own block, which together are as large as the one of CUDA.
    one = len(storages) == 1 or params[0].dtype is not weights[0].dtype
    flat = params[0].detach() if one else None
    results = aten._cudnn_rnn(
        *(input, params, (4 if has_biases else 2) + (1 if projected else 0), flat, hx, cx),
        *(mode, size, projected, num_layers, batch_first, dropout, train, bidirectional),
        *([] if batch_sizes is None else batch_sizes.tolist(), None),
    )
    made: tuple[Tensor, ...] = tuple(results[: 3 if mode == _LSTM else 2])
    return made


def _acceptable(input: Tensor) -> bool:
    # cudnn_is_acceptable in native/Cudnn.cpp.
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return torch.backends.cudnn.enabled and input.dtype in floats and input.numel() > 0


def _layers(operation: Any, mode: int) -> Callable[..., Any]:
    packed = operation is operation.overloadpacket.data

    def layers(input: Tensor, *args: Any) -> Any:
        if not _acceptable(input):
            key = torch._C.DispatchKey.CompositeImplicitAutograd
            return operation._op_dk(key, input, *args)
        if packed:
            batch_sizes, hidden, *rest = args
            rest.append(False)
        else:
            batch_sizes, (hidden, *rest) = None, args
        hidden = [hidden] if isinstance(hidden, Tensor) else hidden
        return _by_cudnn(mode, input, batch_sizes, hidden, *rest)

    return layers


COMPOSITES: dict[Any, Callable[..., Any]] = {
    operation: _layers(operation, mode)
    for packet, mode in (
        *((aten.lstm, _LSTM), (aten.gru, _GRU)),
        *((aten.rnn_tanh, _TANH), (aten.rnn_relu, _RELU)),
    )
    for operation in (packet.input, packet.data)
}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._cudnn_rnn.default: _cudnn_rnn,
    aten._cudnn_rnn_backward.default: _cudnn_rnn_backward,
    **COMPOSITES,  # in inference mode they arrive whole
}
