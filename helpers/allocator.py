"""PyTorch's CUDA caching allocator, in plain Python and without a GPU.

`CachingAllocator` takes the requests that a program makes and tells, to the
byte, what ``torch.cuda.memory_allocated()`` and its siblings would say. It
follows ``c10/cuda/CUDACachingAllocator.cpp`` and ``c10/core/AllocatorConfig.h``
for one stream, default settings and the native backend:

* a request is rounded up to 512 B and served from the smallest free block of
  its pool that is large enough (then the lowest address);
* where none is, a whole *segment* is reserved: one cudaMalloc;
* a block much larger than the request is split, the rest stays free;
* a freed block merges with its free neighbours, its segment stays reserved.

Not modelled: several streams, ``expandable_segments``, ``max_split_size_mb``,
private pools of CUDA graphs. Where cudaMalloc places a segment is the driver's
affair: here each new one lies above all earlier ones.
"""

from dataclasses import dataclass
from typing import TypedDict

from sortedcontainers import SortedList

from helpers.units import MiB, binary

# Names and values of c10/core/AllocatorConfig.h.
kMinBlockSize = 512  # every block is a multiple of this
kSmallSize = 1 * MiB  # the largest request that the small pool serves
kSmallBuffer = 2 * MiB  # a segment of the small pool
kLargeBuffer = 20 * MiB  # a segment of the large pool, for requests under ...
kMinLargeAlloc = 10 * MiB  # ... this; larger ones get a segment of their own,
kRoundLarge = 2 * MiB  # rounded up to this


class BlockInfo(TypedDict):
    """A block as ``torch.cuda.memory_snapshot()`` describes it (sizes in bytes)."""

    address: int
    size: int
    requested_size: int
    state: str  # "active_allocated" or "inactive"


class SegmentInfo(TypedDict):
    """A segment as ``torch.cuda.memory_snapshot()`` describes it (sizes in bytes)."""

    address: int
    total_size: int
    allocated_size: int
    segment_type: str  # "small" or "large"
    blocks: list[BlockInfo]


class OutOfMemoryError(RuntimeError):
    """No room for a request, even after all free segments were given back.

    The message is PyTorch's. All attributes are bytes.
    """

    def __init__(self, tried: int, capacity: int, allocated: int, reserved: int) -> None:
        self.tried, self.capacity = tried, capacity
        self.allocated, self.reserved = allocated, reserved
        super().__init__(
            f"CUDA out of memory. Tried to allocate {binary(tried)}. "
            f"GPU 0 has a total capacity of {binary(capacity)} "
            f"of which {binary(capacity - reserved)} is free. "
            f"Of the allocated memory {binary(allocated)} is allocated by PyTorch, "
            f"and {binary(reserved - allocated)} is reserved by PyTorch but unallocated. "
            "If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
        )


@dataclass(eq=False, slots=True)
class _Block:
    """A piece of a segment; `prev` and `next` are its neighbours in the segment."""

    address: int
    size: int
    pool: "SortedList[_Block]"
    requested: int = 0
    allocated: bool = False
    prev: "_Block | None" = None
    next: "_Block | None" = None


@dataclass(slots=True)
class _Stat:
    """One line of ``torch.cuda.memory_stats()``: a current value and its peak, in bytes."""

    current: int = 0
    peak: int = 0

    def add(self, amount: int) -> None:
        self.current += amount
        self.peak = max(self.peak, self.current)


def _by_size(block: _Block) -> tuple[int, int]:
    return block.size, block.address


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def _checked(nbytes: object, what: str) -> int:
    if isinstance(nbytes, bool) or not isinstance(nbytes, int):
        raise TypeError(f"{what} is {nbytes!r}: expected a whole number of bytes (int)")
    if nbytes < 0:
        raise ValueError(f"{what} is {nbytes} bytes: expected zero or more")
    return nbytes


class CachingAllocator:
    """Replays allocations as PyTorch's CUDA caching allocator would carry them out.

    Every call takes time logarithmic in the number of blocks, apart from
    `empty_cache` and `snapshot`, which visit every segment.

    Args:
        capacity: bytes of the card that PyTorch can reserve; no bound if None.

    Raises:
        TypeError, ValueError: `capacity` is no whole number of bytes, or negative.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = None if capacity is None else _checked(capacity, "capacity")
        self._small: SortedList[_Block] = SortedList(key=_by_size)  # the free blocks
        self._large: SortedList[_Block] = SortedList(key=_by_size)
        self._segments: dict[int, _Block] = {}  # address: first block
        self._live: dict[int, _Block | None] = {}  # handle: block; None for no bytes
        self._next_handle = 1
        self._next_address = kRoundLarge
        self._allocated, self._reserved, self._requested = _Stat(), _Stat(), _Stat()

    def malloc(self, nbytes: int) -> int:
        """Allocate `nbytes` bytes and return a handle for `free`, never given twice.

        No bytes take no block, as for an empty tensor.

        Raises:
            TypeError, ValueError: `nbytes` is no whole number, or negative.
            OutOfMemoryError: it does not fit within `capacity`; nothing changed
                but that free segments were given back, as PyTorch does.
        """
        block = self._allocate(nbytes) if _checked(nbytes, "nbytes") else None
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._live[handle] = block
        return handle

    def free(self, handle: int) -> None:
        """Free what `malloc` returned `handle` for; its segment stays reserved.

        Raises:
            ValueError: the handle is unknown, or was freed before.
        """
        if handle not in self._live:
            given = isinstance(handle, int) and 0 < handle < self._next_handle
            why = "was freed before" if given else "was never returned by malloc"
            raise ValueError(f"handle {handle!r} {why}: free each handle of malloc once")
        block = self._live.pop(handle)
        if block is None:
            return
        self._allocated.add(-block.size)
        self._requested.add(-block.requested)
        block.allocated, block.requested = False, 0
        for neighbour in (block.prev, block.next):
            if neighbour is not None and not neighbour.allocated:
                block.pool.remove(neighbour)
                self._merge(block, neighbour)
        block.pool.add(block)

    def memory_allocated(self) -> int:
        """Bytes of all blocks handed out, rounding included."""
        return self._allocated.current

    def memory_reserved(self) -> int:
        """Bytes of all segments held: what the allocator took with cudaMalloc."""
        return self._reserved.current

    def memory_requested(self) -> int:
        """Bytes asked for and not yet freed, before rounding.

        PyTorch: ``torch.cuda.memory_stats()["requested_bytes.all.current"]``.
        """
        return self._requested.current

    def max_memory_allocated(self) -> int:
        """The largest `memory_allocated` since the start or the last reset, in bytes."""
        return self._allocated.peak

    def max_memory_reserved(self) -> int:
        """The largest `memory_reserved` since the start or the last reset, in bytes."""
        return self._reserved.peak

    def reset_peak_memory_stats(self) -> None:
        """Let the peaks start again from the current values."""
        for stat in (self._allocated, self._reserved, self._requested):
            stat.peak = stat.current

    def empty_cache(self) -> None:
        """Give back every segment that is free as a whole."""
        for address, block in list(self._segments.items()):
            if not block.allocated and block.next is None:
                block.pool.remove(block)
                del self._segments[address]
                self._reserved.add(-block.size)

    def snapshot(self) -> list[SegmentInfo]:
        """Segments by address, each with its blocks in order.

        The keys are those of ``torch.cuda.memory_snapshot()``.
        """
        return [self._describe(first) for _, first in sorted(self._segments.items())]

    def _allocate(self, nbytes: int) -> _Block:
        size = _round_up(nbytes, kMinBlockSize)
        pool = self._small if size <= kSmallSize else self._large
        at = pool.bisect_key_left((size, 0))
        block = pool.pop(at) if at < len(pool) else self._new_segment(size, pool)
        # A remainder too small to be of use stays with the block.
        worth_splitting = kMinBlockSize if pool is self._small else kSmallSize + 1
        if block.size - size >= worth_splitting:
            self._split(block, size)
        block.allocated, block.requested = True, nbytes
        self._allocated.add(block.size)
        self._requested.add(nbytes)
        return block

    def _new_segment(self, size: int, pool: "SortedList[_Block]") -> _Block:
        """Reserve a segment for a request of `size` bytes: one cudaMalloc."""
        if size <= kSmallSize:
            total = kSmallBuffer
        elif size < kMinLargeAlloc:
            total = kLargeBuffer
        else:
            total = _round_up(size, kRoundLarge)
        if self.capacity is not None and self._reserved.current + total > self.capacity:
            self.empty_cache()
            if self._reserved.current + total > self.capacity:
                raise OutOfMemoryError(
                    total, self.capacity, self._allocated.current, self._reserved.current
                )
        block = _Block(self._next_address, total, pool)
        self._next_address += _round_up(total, kRoundLarge)
        self._segments[block.address] = block
        self._reserved.add(total)
        return block

    def _split(self, block: _Block, size: int) -> None:
        """Cut `block` to `size` bytes and put the rest, as a block, into the pool."""
        rest = _Block(block.address + size, block.size - size, block.pool)
        rest.prev, rest.next = block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.next, block.size = rest, size
        block.pool.add(rest)

    def _merge(self, block: _Block, neighbour: _Block) -> None:
        """Let `block` swallow a free neighbour that has left the pool."""
        if neighbour is block.prev:
            block.address, block.prev = neighbour.address, neighbour.prev
            if block.prev is None:
                self._segments[block.address] = block
            else:
                block.prev.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.prev = block
        block.size += neighbour.size

    def _describe(self, first: _Block) -> SegmentInfo:
        blocks: list[BlockInfo] = []
        block: _Block | None = first
        while block is not None:
            state = "active_allocated" if block.allocated else "inactive"
            blocks.append(
                BlockInfo(
                    address=block.address,
                    size=block.size,
                    requested_size=block.requested,
                    state=state,
                )
            )
            block = block.next
        return SegmentInfo(
            address=first.address,
            total_size=sum(b["size"] for b in blocks),
            allocated_size=sum(b["size"] for b in blocks if b["state"] == "active_allocated"),
            segment_type="small" if first.pool is self._small else "large",
            blocks=blocks,
        )
