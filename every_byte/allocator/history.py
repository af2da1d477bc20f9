"""What an allocator did, event by event, as ``torch.cuda.memory._snapshot()`` tells it.

PyTorch's names and fields, so that its tools read what is recorded here:
``python -m torch.cuda._memory_viz`` and https://pytorch.org/memory_viz.
"""

import os
import sys
import time
import weakref
from collections import deque
from types import FrameType
from typing import NotRequired, TypedDict

# Frames between a program and its allocation that are not of the program.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_SKIPPED = (_PACKAGE, weakref.__file__)


class Frame(TypedDict):
    """A line of a program that was being carried out, innermost first."""

    filename: str
    line: int
    name: str


class TraceEntry(TypedDict):
    """One thing that an allocator did (sizes in bytes).

    Actions: alloc, free_requested, free_completed; segment_alloc, segment_free of
    a segment; segment_map, segment_unmap of an expandable segment's pages; oom.
    """

    action: str
    addr: NotRequired[int]  # not for oom
    device_free: NotRequired[int]  # for oom only
    size: int
    stream: int
    time_us: int
    frames: list[Frame]


class MemoryHistory:
    """The last `max_entries` things that an allocator did.

    Raises:
        TypeError: `max_entries` is no whole number.
        ValueError: it is below 1, or above ``sys.maxsize``.
    """

    def __init__(self, max_entries: int = sys.maxsize) -> None:
        if type(max_entries) is not int:
            raise TypeError(f"max_entries is {max_entries!r}: expected a whole number (int)")
        if not 1 <= max_entries <= sys.maxsize:
            raise ValueError(f"max_entries is {max_entries}: expected 1 to {sys.maxsize}")
        self.entries: deque[TraceEntry] = deque(maxlen=max_entries)

    def record(self, action: str, address: int, size: int, stream: int = 0) -> list[Frame]:
        """Note what is being done now; returns the frames that lead there."""
        frames = _frames()
        now = time.time_ns() // 1000
        entry = TraceEntry(action=action, size=size, stream=stream, time_us=now, frames=frames)
        entry["device_free" if action == "oom" else "addr"] = address
        self.entries.append(entry)
        return frames


def _frames() -> list[Frame]:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    found = []
    while frame is not None:
        code = frame.f_code
        found.append(Frame(filename=code.co_filename, line=frame.f_lineno, name=code.co_name))
        frame = frame.f_back
    return found
