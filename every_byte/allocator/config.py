"""Settings of PyTorch's CUDA caching allocator: what ``PYTORCH_ALLOC_CONF`` can say.

Names and values are those of ``c10/core/AllocatorConfig.h`` and
``c10/cuda/CUDAAllocatorConfig.h``. `AllocatorConfig.parse` reads the same text as
PyTorch; what the replayed allocator does not cover it refuses, never skips.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from every_byte.units import MiB

kMinBlockSize = 512  # every block is a multiple of this
kSmallSize = 1 * MiB  # the largest request that the small pool serves
kSmallBuffer = 2 * MiB  # a segment of the small pool
kLargeBuffer = 20 * MiB  # a segment of the large pool, for requests under ...
kMinLargeAlloc = 10 * MiB  # ... this; larger ones get a segment of their own,
kRoundLarge = 2 * MiB  # rounded up to this

# What PyTorch 2.14 knows besides: none of it is replayed.
_NOT_COVERED = frozenset(
    {
        *("expandable_segments_handle_type", "graph_capture_record_stream_reuse"),
        *("large_segment_size_mb", "pinned_free_catch_all", "pinned_max_cached_size_mb"),
        *("pinned_max_round_threshold_mb", "pinned_num_register_threads"),
        *("pinned_reserve_segment_size_mb", "pinned_use_background_threads"),
        *("pinned_use_cuda_host_register", "release_lock_on_cudamalloc"),
        *("roundup_power2_divisions", "throw_on_cudamalloc_oom"),
    }
)


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("True or False")
    return text == "True"


def _mebibytes(text: str) -> int:
    if not text.isdecimal() or int(text) * MiB < kLargeBuffer:
        raise ValueError(f"a whole number of MiB, {kLargeBuffer // MiB} or more")
    return min(int(text) * MiB, sys.maxsize)


def _fraction(text: str, with_bounds: bool) -> float:
    """A number between 0 and 1, with or without these two."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not (0 < number < 1 or (with_bounds and number in (0, 1))):
        raise ValueError(f"a number in {'[0, 1]' if with_bounds else '(0, 1)'}")
    return number


def _native(text: str) -> None:
    if text != "native":
        raise ValueError("native, the only backend that is replayed")


_READERS: dict[str, Callable[[str], Any]] = {
    "expandable_segments": _boolean,
    "max_split_size_mb": _mebibytes,
    "max_non_split_rounding_mb": _mebibytes,
    "garbage_collection_threshold": lambda text: _fraction(text, with_bounds=False),
    "per_process_memory_fraction": lambda text: _fraction(text, with_bounds=True),
    "backend": _native,
}
_FIELDS = {
    "max_split_size_mb": "max_split_size",
    "max_non_split_rounding_mb": "max_non_split_rounding_size",
}


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """The settings that are replayed, at their defaults.

    Attributes:
        expandable_segments: one segment for each pool, which grows page by page,
            instead of one for each cudaMalloc.
        max_split_size: bytes; a block this large or larger is not split for a
            smaller request, and given back first when memory runs out.
        max_non_split_rounding_size: bytes by which such a block may exceed a
            request that it serves.
        garbage_collection_threshold: part of the memory allowed from which on
            blocks long unused are given back before more is taken; 0 for never.
            PyTorch heeds it only where a memory fraction is set.
        per_process_memory_fraction: part of the card that may be reserved.
        text: what `parse` was given.
    """

    expandable_segments: bool = False
    max_split_size: int = sys.maxsize
    max_non_split_rounding_size: int = kLargeBuffer
    garbage_collection_threshold: float = 0.0
    per_process_memory_fraction: float = 1.0
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The settings of a text such as ``"expandable_segments:True,max_split_size_mb:128"``.

        Raises:
            TypeError: `text` is no text.
            ValueError: a setting is unknown, not replayed, or has a wrong value.
        """
        if not isinstance(text, str):
            raise TypeError(f"alloc_conf is {text!r}: expected text (str)")
        found: dict[str, Any] = {}
        pairs = "".join(text.split())
        for pair in pairs.removesuffix(",").split(",") if pairs else []:
            key, _, value = pair.partition(":")
            if key not in _READERS:
                why = "is not replayed" if key in _NOT_COVERED else "is not a setting of PyTorch's"
                raise ValueError(
                    f"PYTORCH_ALLOC_CONF is {text!r}: {key!r} {why}; expected "
                    f"name:value pairs of {', '.join(_READERS)}"
                )
            try:
                found[_FIELDS.get(key, key)] = _READERS[key](value)
            except ValueError as error:
                raise ValueError(
                    f"PYTORCH_ALLOC_CONF is {text!r}: {key} is {value!r}, expected {error}"
                ) from None
        found.pop("backend", None)
        if found.get("expandable_segments") and "max_split_size" in found:
            raise ValueError(
                f"PYTORCH_ALLOC_CONF is {text!r}: expandable_segments:True and "
                "max_split_size_mb together are not replayed; set one of them"
            )
        return cls(**found, text=text)
