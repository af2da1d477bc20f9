"""Where a loaded model's bytes go on a GPU: the load paths of PyTorch and transformers, replayed.

A model that was loaded on the host computes there; its tensors get twins on the
virtual GPU, in the order and with the temporaries that the same call has on CUDA.
Sources: ``Module._apply`` of PyTorch's ``torch/nn/modules/module.py``;
``caching_allocator_warmup`` of transformers' ``modeling_utils.py``,
``core_model_loading.py`` and ``integrations/bitsandbytes.py``; bitsandbytes'
``nn/modules.py``, ``functional.py`` and ``backends/cuda/ops.py``.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.pytorch_utils import Conv1D

from every_byte.gpu import VirtualGPU
from every_byte.units import GiB

# It tells of a faster kernel for the CPU that could be installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
Int8Params: Any = ()
Params4bit: Any = ()
with suppress(ImportError):  # not installed: nothing is quantised
    from bitsandbytes.nn.modules import Int8Params, Params4bit

Twins = list[torch.Tensor]


def replay_to(model: torch.nn.Module, gpu: VirtualGPU) -> Twins:
    """Replay ``model.to(device)``: each module's children first, then its parameters, its buffers.

    A tied tensor comes once. The twins hold their bytes for as long as they live.
    """
    return [_twin(tensor, gpu, kind) for kind, tensor in _as_applied(model, set())]


def _as_applied(module: torch.nn.Module, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    for child in module.children():
        yield from _as_applied(child, seen)
    own: dict[str, Mapping[str, torch.Tensor | None]]
    own = {"parameters": module._parameters, "buffers": module._buffers}
    for kind, tensors in own.items():
        for tensor in tensors.values():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield kind, tensor


def replay_device_map(model: torch.nn.Module, gpu: VirtualGPU, dtype: torch.dtype) -> Twins:
    """Replay ``from_pretrained(..., dtype=dtype, device_map=device)``.

    First one block as large as all parameters is reserved and given back. Then the
    parameters come in the order of their names; a weight that bitsandbytes
    quantises comes whole and is quantised on the card. Buffers that no checkpoint
    holds come last. On CUDA several threads read tensors at once; here they come one
    after the other. The twins hold their bytes for as long as they live.

    Args:
        model: loaded on the host by the same call.
        gpu: where its twins are made.
        dtype: in which the tensors were asked for, before any were quantised.
    """
    stored: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict(keep_vars=True)
    buffers = dict(model.named_buffers())
    stored |= {name: buffer for name, buffer in buffers.items() if name in kept}
    _warm_up(sum(map(_expected, stored.values())), gpu)
    twins: Twins = []
    for name in sorted(stored, key=natural):
        tensor = stored[name]
        if isinstance(tensor, Int8Params):
            twins += _int8(tensor, gpu, dtype)
        elif isinstance(tensor, Params4bit):
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            twins += _four_bits(tensor, gpu, issubclass(owner.source_cls, Conv1D))
        else:
            twins.append(_twin(tensor, gpu, "buffers" if name in buffers else "parameters"))
    return twins + [_twin(b, gpu, "buffers") for name, b in buffers.items() if name not in stored]


def natural(name: str) -> list[str | int]:
    """The key that transformers sorts a checkpoint's names by: digits count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _twin(tensor: torch.Tensor, gpu: VirtualGPU, kind: str) -> torch.Tensor:
    with gpu.label(kind):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=gpu.device)


def _expected(tensor: torch.Tensor) -> float:
    """The bytes that transformers expects a tensor to take: of a quantised one, its numbers'."""
    if isinstance(tensor, Params4bit):
        return tensor.quant_state.shape.numel() * 0.5
    return tensor.numel() * tensor.element_size()


def _warm_up(nbytes: float, gpu: VirtualGPU) -> None:
    # With what the card already holds in reserve, less is asked for, or nothing.
    unused = gpu.memory_reserved() - gpu.memory_allocated()
    if nbytes - unused > unused:
        nbytes -= unused
    elif nbytes - unused > 1.5 * GiB:
        free = None if gpu.capacity is None else gpu.capacity - gpu.memory_reserved()
        nbytes = 0 if free is not None and unused + 1 > free else unused + 1
    else:
        nbytes = 0
    if gpu.capacity is not None:
        nbytes = min(nbytes, gpu.capacity - 1.2 * GiB)
    torch.empty(int(nbytes // 2), dtype=torch.float16, device=gpu.device)


def _int8(weight: Any, gpu: VirtualGPU, dtype: torch.dtype) -> Twins:
    # The weight goes to the card, back to the host to be transposed, and there again.
    came = torch.empty(weight.shape, dtype=dtype, device=gpu.device)
    again = torch.empty(weight.shape, dtype=torch.float16, device=gpu.device)
    twins = [_twin(weight.SCB, gpu, "scales"), _twin(weight.data, gpu, "parameters")]
    del again, came  # in this order
    return twins


# bitsandbytes makes its table of 256 levels once in a process, and keeps it.
_levels: WeakKeyDictionary[VirtualGPU, torch.Tensor] = WeakKeyDictionary()


def _four_bits(weight: Any, gpu: VirtualGPU, transposed: bool) -> Twins:
    state, nested = weight.quant_state, weight.quant_state.state2
    came = torch.empty(state.shape, dtype=state.dtype, device=gpu.device)
    turned = torch.empty_like(came) if transposed else None
    twins: Twins = []
    if nested is None:
        twins.append(_twin(state.absmax, gpu, "scales"))
    else:  # FP32 scales for a moment, then 8-bit ones with scales of their own
        whole = torch.empty(state.absmax.shape, device=gpu.device)
    twins += [_twin(weight.data, gpu, "parameters"), _twin(state.code, gpu, "scales")]
    if nested is not None:
        twins.append(_twin(state.offset, gpu, "scales"))
        shifted = torch.empty_like(whole)
        if gpu not in _levels:
            _levels[gpu] = nested.code.to(gpu.device)
        twins += [_twin(t, gpu, "scales") for t in (nested.absmax, state.absmax, nested.code)]
        del shifted, whole
    del turned, came
    return twins
