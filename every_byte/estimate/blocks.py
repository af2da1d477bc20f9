"""What the allocator makes of a request, as far as a formula tells."""

from collections import Counter

from every_byte.allocator.config import (
    kLargeBuffer,
    kMinBlockSize,
    kMinLargeAlloc,
    kRoundLarge,
    kSmallSize,
)
from every_byte.estimate.checks import check_whole


def block(nbytes: int, own_segment: bool = False) -> int:
    """Bytes of the allocator's block for a request.

    A multiple of 512 B. A request from 10 MiB up that no free block serves gets a
    segment of its own, a multiple of 2 MiB, and keeps what is left of it up to
    1 MiB (`every_byte.allocator`). Where smaller requests leave such a rest is not
    told by a formula: replay them.

    Args:
        nbytes: the request.
        own_segment: whether no free block serves it.

    Raises:
        ValueError: `nbytes` is no whole number, or negative.
    """
    check_whole("nbytes", nbytes)
    size = nbytes + -nbytes % kMinBlockSize
    rest = -size % kRoundLarge
    return size + rest if own_segment and size >= kMinLargeAlloc and rest <= kSmallSize else size


def shared_segments(tensors: Counter[int]) -> int:
    """Bytes that blocks of 1 to 10 MiB keep beyond their size, where they share 20 MiB.

    A block that leaves 1 MiB or less of its segment keeps it (`every_byte.allocator`):
    half a MiB in 20, taken over many. Which blocks do is for a replay to tell.
    """
    shared = sum(n * count for n, count in tensors.items() if kSmallSize < n < kMinLargeAlloc)
    return shared * kSmallSize // (2 * kLargeBuffer)
