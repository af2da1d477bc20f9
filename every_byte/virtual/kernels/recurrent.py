"""LSTM, GRU and plain RNNs as cuDNN does them: one operation with a reserve, not one per step.

The order of allocations is that of ``_cudnn_rnn`` and its gradient in
``aten/src/ATen/native/cudnn/RNN.cpp`` of PyTorch 2.11. The reserve and the workspace are
cuDNN's own; what is here follows from what they have to keep. Reserves agree with an H100's and
an H200's (cuDNN 9) and, an LSTM's and a GRU's, with what pytorch#2895 has of a P100. Workspaces
are an H200's of one LSTM of 1,024 numbers, and of smaller ones a bound: see `_NARROW`. Not
measured: dropout, projections.

Cells are PyTorch's own kernels: ``_thnn_fused_lstm_cell`` in aten/src/ATen/native/cuda/RNN.cu.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from every_byte.virtual.kernels.borrowing import borrow

aten = torch.ops.aten

ESTIMATE = (
    "cuDNN's workspace of recurrent layers: equal for an LSTM of 1,024 numbers on an H200, else "
    "a bound that one layer of 512 of each kind gave on an H100"
)
OPERATIONS = (aten._cudnn_rnn, aten._cudnn_rnn_backward)

_RELU, _TANH, _LSTM, _GRU = range(4)  # cudnnRNNMode_t
# Numbers kept of a step for each of the hidden size: an LSTM's four gates and its cell, a
# GRU's three gates and what they are made of; a plain RNN's output.
_KEPT = {_RELU: 1, _TANH: 1, _LSTM: 5, _GRU: 6}
_RESERVE_END, _WORKSPACE_END = 256, 512
# Below 1,024 numbers cuDNN takes other kernels, with more workspace. As much, for each number
# kept in a step of a layer, an H100 had (batch 16, 64 steps, 256 numbers in, 512 hidden, 2 layers,
# FP32): 7.15, 10.5 and 9, and 12.32 of an LSTM in both directions. Rounded up, it is a bound.
_NARROW = {_RELU: 7.25, _TANH: 7.25, _LSTM: 10.5, _GRU: 9.0}
_NARROW_BELOW, _BOTH_DIRECTIONS = 1024, 1.18


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
    workspace = (rows + 2 * batch) * kept * width + _WORKSPACE_END
    if hidden < _NARROW_BELOW:
        wider = _NARROW[mode] * (1 if directions == 1 else _BOTH_DIRECTIONS)
        workspace = max(workspace, math.ceil(wider * layers * rows * width))
    return (kept + between) * rows * width + _RESERVE_END, workspace


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


# Cells


def _lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``LSTMCell`` in native/RNN.cpp, of tensors on CUDA."""
    gates = input @ w_ih.t(), hx[0] @ w_hh.t()
    hy, cy, _ = aten._thnn_fused_lstm_cell(*gates, hx[1], b_ih, b_hh)
    return hy, cy


def _gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """``GRUCell`` in native/RNN.cpp, of tensors on CUDA."""
    gates = input @ w_ih.t(), hx @ w_hh.t()
    hy: Tensor = aten._thnn_fused_gru_cell(*gates, hx, b_ih, b_hh)[0]
    return hy


def _fused_lstm(
    input_gates: Tensor, hidden_gates: Tensor, cx: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    workspace = _empty(input_gates)
    return _empty(cx), _empty(cx), workspace


def _fused_lstm_backward(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    cx: Tensor,
    cy: Tensor,
    workspace: Tensor,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad_hy is None and grad_cy is None:
        return None, None, None
    of_gates, of_cell = _empty(workspace), _empty(cx)
    return of_gates, of_cell, of_gates.sum(0) if has_bias else None


def _fused_gru(
    input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor]:
    workspace = hx.new_empty(hx.size(0), 5 * hx.size(1))
    return _empty(hx), workspace


def _fused_gru_backward(
    grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    wide = workspace.size(0), 3 * workspace.size(1) // 5
    of_input, of_hidden = workspace.new_empty(wide), workspace.new_empty(wide)
    of_hx = _empty(grad_hy)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (None, None)
    return of_input, of_hidden, of_hx, *biases


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


COMPOSITES: dict[Any, Callable[..., Any]] = {
    operation: _layers(operation, mode)
    for packet, mode in (
        *((aten.lstm, _LSTM), (aten.gru, _GRU)),
        *((aten.rnn_tanh, _TANH), (aten.rnn_relu, _RELU)),
    )
    for operation in (packet.input, packet.data)
} | {aten.lstm_cell.default: _lstm_cell, aten.gru_cell.default: _gru_cell}
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._cudnn_rnn.default: _cudnn_rnn,
    aten._cudnn_rnn_backward.default: _cudnn_rnn_backward,
    aten._thnn_fused_lstm_cell.default: _fused_lstm,
    aten._thnn_fused_lstm_cell_backward_impl.default: _fused_lstm_backward,
    aten._thnn_fused_gru_cell.default: _fused_gru,
    aten._thnn_fused_gru_cell_backward.default: _fused_gru_backward,
    **COMPOSITES,  # in inference mode they arrive whole
}
