"""Where GPU memory goes, to the byte: on a real GPU, and on a virtual one without any.

`open_gpu` gives the machine's GPU, or a virtual one that replays PyTorch's
caching allocator; `estimate` has the closed formulas. Importing this package
imports PyTorch only once a name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from every_byte import estimate
    from every_byte.allocator import CachingAllocator, OutOfMemoryError, replay_trace
    from every_byte.gpu import GPU, CudaGPU, VirtualGPU, open_gpu
    from every_byte.ranks import one_of
    from every_byte.script import as_cuda
    from every_byte.tracker import KINDS, Breakdown, Timeline, untracked

__all__ = [
    "GPU",
    "KINDS",
    "Breakdown",
    "CachingAllocator",
    "CudaGPU",
    "OutOfMemoryError",
    "Timeline",
    "VirtualGPU",
    "as_cuda",
    "estimate",
    "one_of",
    "open_gpu",
    "replay_trace",
    "untracked",
]

# Where each name stands: a module is imported when it is first asked for.
_HOMES = {
    "every_byte.allocator": ("CachingAllocator", "OutOfMemoryError", "replay_trace"),
    "every_byte.gpu": ("GPU", "CudaGPU", "VirtualGPU", "open_gpu"),
    "every_byte.tracker": ("KINDS", "Breakdown", "Timeline", "untracked"),
    "every_byte.ranks": ("one_of",),
    "every_byte.script": ("as_cuda",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:  # a module
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
