"""CUDA's streams and events, as a program asks for them, on a replayed memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class _Stream:
    """A stream, or an event, of a device that does one thing after the other: nobody waits."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        # As FSDP names it to its own operator (PyTorch 2.15, _fsdp_collectives.py).
        self.stream_id, self.device_index = number, 0
        self.device_type = 1  # c10::DeviceType::CUDA

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def streams_of(memory: Any) -> SimpleNamespace:
    """What FSDP asks of ``torch.cuda``, for a replayed memory: tensors are made on its streams.

    Args:
        memory: with `stream` and `new_stream` as `every_byte.virtual.memory.VirtualMemory`.
    """

    @contextmanager
    def stream(chosen: _Stream) -> Iterator[None]:
        before, memory.stream = memory.stream, chosen.number
        try:
            yield
        finally:
            memory.stream = before

    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        current_stream=lambda device=None: _Stream(memory.stream),
        stream=stream,
        Stream=lambda *_, **__: _Stream(memory.new_stream()),
        Event=lambda *_, **__: _Stream(),
    )
