"""PyTorch's CUDA caching allocator, modelled to the byte, and its recorded traces replayed.

Needs neither PyTorch nor a GPU.
"""

from every_byte.allocator.config import AllocatorConfig
from every_byte.allocator.history import Frame, MemoryHistory, TraceEntry
from every_byte.allocator.model import BlockInfo, CachingAllocator, OutOfMemoryError, SegmentInfo
from every_byte.allocator.placement import Downwards, Placement, Recorded, Upwards
from every_byte.allocator.replay import Replay, replay_trace

__all__ = [
    "AllocatorConfig",
    "BlockInfo",
    "CachingAllocator",
    "Downwards",
    "Frame",
    "MemoryHistory",
    "OutOfMemoryError",
    "Placement",
    "Recorded",
    "Replay",
    "SegmentInfo",
    "TraceEntry",
    "Upwards",
    "replay_trace",
]
