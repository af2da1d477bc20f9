"""PyTorch's CUDA caching allocator, in plain Python and without a GPU.

`CachingAllocator` takes the requests that a program makes and tells, to the
byte, what ``torch.cuda.memory_allocated()`` and its siblings would say. It
follows ``c10/cuda/CUDACachingAllocator.cpp`` and ``c10/core/AllocatorConfig.h``
for the native backend:

* a request is rounded up to 512 B and served from the smallest free block of
  its stream's pool that is large enough (then the lowest address);
* where none is, a whole *segment* is reserved: one cudaMalloc;
* a block much larger than the request is split, the rest stays free;
* a freed block merges with its free neighbours, its segment stays reserved.

What `every_byte.allocator.config` lists can be set as in ``PYTORCH_ALLOC_CONF``:
expandable segments grow by pages of 2 or 20 MiB, large blocks can be kept whole,
and long unused ones given back.

Not modelled: ``Tensor.record_stream``, private pools of CUDA graphs. Where cudaMalloc
places a segment is the driver's affair, see `every_byte.allocator.placement`; a card's
free memory is never in pieces for the driver.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from sortedcontainers import SortedList

from every_byte.allocator.config import (
    AllocatorConfig,
    kLargeBuffer,
    kMinBlockSize,
    kMinLargeAlloc,
    kRoundLarge,
    kSmallBuffer,
    kSmallSize,
)
from every_byte.allocator.history import Frame, MemoryHistory
from every_byte.allocator.placement import Placement, Upwards
from every_byte.units import binary

_NO_BOUND = 2**50  # addresses of an expandable segment on a card without bounds


class BlockInfo(TypedDict):
    """A block as ``torch.cuda.memory_snapshot()`` describes it (sizes in bytes)."""

    address: int
    size: int
    requested_size: int
    state: str  # "active_allocated" or "inactive"
    frames: list[Frame]  # where it was allocated, if the history is recorded


class SegmentInfo(TypedDict):
    """A segment as ``torch.cuda.memory_snapshot()`` describes it (sizes in bytes)."""

    device: int
    address: int
    total_size: int
    allocated_size: int
    active_size: int
    requested_size: int
    stream: int
    segment_type: str  # "small" or "large"
    segment_pool_id: tuple[int, int]
    is_expandable: bool
    frames: list[Frame]
    blocks: list[BlockInfo]


class OutOfMemoryError(RuntimeError):
    """No room for a request, even after all free segments were given back.

    The message is that of PyTorch 2.14. All attributes are bytes.

    Attributes:
        tried: size of the segment that could not be reserved.
        capacity: of the card.
        allocated, reserved: as `CachingAllocator` tells them.
        context: what the process holds on the card beside PyTorch's memory.
        allowed: part of the card that the process may use; None for all of it.
    """

    def __init__(
        self,
        tried: int,
        capacity: int,
        allocated: int,
        reserved: int,
        context: int = 0,
        allowed: int | None = None,
    ) -> None:
        self.tried, self.capacity = tried, capacity
        self.allocated, self.reserved = allocated, reserved
        self.context, self.allowed = context, allowed
        super().__init__(
            f"CUDA out of memory. Tried to allocate {binary(tried)}. "
            f"GPU 0 has a total capacity of {binary(capacity)} "
            f"of which {binary(capacity - context - reserved)} is free. "
            f"Including non-PyTorch memory, this process has {binary(context + reserved)} "
            "memory in use. "
            + (f"{binary(allowed)} allowed; " if allowed is not None else "")
            + f"Of the allocated memory {binary(allocated)} is allocated by PyTorch, "
            f"and {binary(reserved - allocated)} is reserved by PyTorch but unallocated. "
            "If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  "
            "See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/"
            "cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
        )


@dataclass(eq=False, slots=True)
class _Block:
    """A piece of a segment; `prev` and `next` are its neighbours in the segment."""

    address: int
    size: int
    pool: "_Pool"
    base: int | None = None  # where its segment begins, if that is expandable
    mapped: bool = True  # has memory behind its addresses; always, unless expandable
    requested: int = 0
    allocated: bool = False
    prev: "_Block | None" = None
    next: "_Block | None" = None
    searches: int = 0  # of large or small ones, when it became free: its age counts from there
    frames: list[Frame] = field(default_factory=list)
    segment_frames: list[Frame] = field(default_factory=list)  # of the first in a segment


@dataclass(eq=False, slots=True)
class _Pool:
    """A stream's free blocks for small requests, or those for large ones.

    In `free` each stands behind its size and its address, by which they are sorted.
    """

    small: bool
    stream: int = 0
    free: "SortedList[tuple[int, int, _Block]]" = field(default_factory=SortedList)
    unmapped: "SortedList[_Block]" = field(default_factory=lambda: SortedList(key=_by_address))

    @property
    def page(self) -> int:
        """Bytes by which an expandable segment grows."""
        return kSmallBuffer if self.small else kLargeBuffer


@dataclass(slots=True)
class _Stat:
    """One line of ``torch.cuda.memory_stats()``: a current value and its peak, in bytes."""

    current: int = 0
    peak: int = 0

    def add(self, amount: int) -> None:
        self.current += amount
        if self.current > self.peak:
            self.peak = self.current


@dataclass(slots=True)
class Counts:
    """How often something happened, under the names of ``torch.cuda.memory_stats()``."""

    num_alloc_retries: int = 0
    num_ooms: int = 0
    num_sync_all_streams: int = 0
    num_device_alloc: int = 0
    num_device_free: int = 0


def _sorted(block: _Block) -> tuple[int, int, _Block]:
    return block.size, block.address, block


def _by_address(block: _Block) -> int:
    return block.address


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
    `empty_cache` and `memory_snapshot`, which visit every segment.

    Args:
        capacity: bytes of the card; no bound if None.
        alloc_conf: settings as in ``PYTORCH_ALLOC_CONF``, which itself is not read;
            PyTorch's defaults if empty.
        context: bytes of the card that the process holds beside PyTorch's memory,
            as a CUDA context does.
        placement: where the driver places segments; above all earlier ones if None.

    Raises:
        TypeError, ValueError: `capacity` or `context` is no whole number of bytes,
            or negative; the context exceeds the card; `alloc_conf` is wrong, not
            replayed, or needs a capacity.
    """

    def __init__(
        self,
        capacity: int | None = None,
        alloc_conf: str = "",
        context: int = 0,
        placement: Placement | None = None,
    ) -> None:
        self.capacity = None if capacity is None else _checked(capacity, "capacity")
        self.context = _checked(context, "context")
        if self.capacity is not None and self.context > self.capacity:
            raise ValueError(
                f"context is {context} bytes: expected no more than the card's {capacity}"
            )
        self.config = AllocatorConfig.parse(alloc_conf)
        self.allowed: int | None = None  # by a memory fraction
        if self.config.per_process_memory_fraction < 1:
            if self.capacity is None:
                raise ValueError(
                    "per_process_memory_fraction is set, but capacity is None: a part of what? "
                    "Give the card a capacity in bytes"
                )
            self.allowed = int(self.config.per_process_memory_fraction * self.capacity)
        self._chooses_by_size = not (  # and by nothing else, as without any setting
            self.config.expandable_segments
            or self.config.max_split_size < sys.maxsize
            or self._collects_garbage
        )
        self.history: MemoryHistory | None = None
        self._pools: dict[tuple[bool, int], _Pool] = {}  # for small requests or not, by stream
        self._searches = {True: 0, False: 0}  # for small blocks, for large ones
        self._segments: dict[int, _Block] = {}  # address: first block
        self._live: dict[int, _Block | None] = {}  # handle: block; None for no bytes
        self._next_handle = 1
        self.placement = placement or Upwards()
        self._ranges = Upwards()  # of addresses for expandable segments
        self._allocated, self._reserved, self._requested = _Stat(), _Stat(), _Stat()
        self.counts = Counts()

    # The names of torch.cuda

    def malloc(self, nbytes: int, stream: int = 0) -> int:
        """Allocate `nbytes` bytes and return a handle for `free`, never given twice.

        No bytes take no block, as for an empty tensor. A block serves the stream
        that it was first reserved for, and no other.

        Raises:
            TypeError, ValueError: `nbytes` or `stream` is no whole number, or negative.
            OutOfMemoryError: it does not fit within `capacity`; nothing changed
                but that free segments were given back, as PyTorch does.
        """
        if type(nbytes) is not int or nbytes < 0:
            nbytes = _checked(nbytes, "nbytes")
        if type(stream) is not int:
            raise TypeError(f"stream is {stream!r}: expected a whole number from 0 up (int)")
        if stream < 0:
            raise ValueError(f"stream is {stream}: expected a whole number from 0 up")
        block = self._allocate(nbytes, stream) if nbytes else None
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._live[handle] = block
        return handle

    def free(self, handle: int) -> None:
        """Free what `malloc` returned `handle` for; its segment stays reserved.

        Raises:
            ValueError: the handle is unknown, or was freed before.
        """
        if type(handle) is not int or handle not in self._live:
            given = isinstance(handle, int) and 0 < handle < self._next_handle
            why = "was freed before" if given else "was never returned by malloc"
            raise ValueError(f"handle {handle!r} {why}: free each handle of malloc once")
        block = self._live.pop(handle)
        if block is None:
            return
        self._allocated.add(-block.size)
        self._requested.add(-block.requested)
        if self.history is not None:
            for action in ("free_requested", "free_completed"):
                self.history.record(action, block.address, block.requested, block.pool.stream)
        if block.frames:
            block.frames = []
        block.allocated, block.requested = False, 0
        before, after = block.prev, block.next
        if (before and not before.allocated) or (after and not after.allocated):
            self._merge_neighbours(block)
        self._cache(block)

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

    def max_memory_requested(self) -> int:
        """The largest `memory_requested` since the start or the last reset, in bytes."""
        return self._requested.peak

    def reset_accumulated_memory_stats(self) -> None:
        """Let `counts` start again, as ``torch.cuda.reset_accumulated_memory_stats``."""
        self.counts = Counts()

    def reset_peak_memory_stats(self) -> None:
        """Let the peaks start again from the current values."""
        for stat in (self._allocated, self._reserved, self._requested):
            stat.peak = stat.current

    def mem_get_info(self) -> tuple[int, int]:
        """Bytes of the card that are free, and all of them, as ``torch.cuda.mem_get_info``.

        Free is what the driver can still give: not what the allocator holds unused.

        Raises:
            RuntimeError: the card has no capacity.
        """
        if self.capacity is None:
            raise RuntimeError("mem_get_info() of a card without bounds: give it a capacity")
        return self.capacity - self.context - self._reserved.current, self.capacity

    def empty_cache(self) -> None:
        """Give back every segment, and every page of an expandable one, that is free as a whole."""
        self.counts.num_sync_all_streams += 1  # release_cached_blocks begins so
        # Large ones first; among them, and among the small, in the streams' order.
        for _, pool in sorted(self._pools.items()):
            pages = []
            for _, _, block in list(pool.free):
                if block.base is not None:
                    pages.append(block)
                elif block.prev is None and block.next is None:
                    self._release(block)
            for block in pages:
                self._unmap(block)

    def record_memory_history(
        self, enabled: Literal["all"] | None = "all", max_entries: int = sys.maxsize
    ) -> None:
        """Begin to note each thing done, the last `max_entries` of them; with None, forget them.

        Raises:
            ValueError: `enabled` is neither "all" nor None; `max_entries` is not positive.
        """
        if enabled not in ("all", None):
            raise ValueError(f"enabled is {enabled!r}: expected 'all' or None")
        self.history = None if enabled is None else MemoryHistory(max_entries)

    def memory_snapshot(self) -> list[SegmentInfo]:
        """Segments by address, each with its blocks in order.

        The keys are those of ``torch.cuda.memory_snapshot()``. Of an expandable
        segment each run of pages with memory behind them counts as one.
        """
        return [info for _, first in sorted(self._segments.items()) for info in _describe(first)]

    def snapshot(self) -> dict[str, Any]:
        """Segments, settings and what was noted, as ``torch.cuda.memory._snapshot()``."""
        config, history = self.config, self.history
        return {
            "segments": self.memory_snapshot(),
            "device_traces": [list(history.entries) if history is not None else []],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": config.text,
                "max_split_size": -1
                if config.max_split_size == sys.maxsize
                else config.max_split_size,
                "garbage_collection_threshold": config.garbage_collection_threshold,
                "expandable_segments": config.expandable_segments,
            },
            "external_annotations": [],
        }

    # Serving a request

    def _allocate(self, nbytes: int, stream: int) -> _Block:
        size = nbytes + -nbytes % kMinBlockSize
        key = size <= kSmallSize, stream
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool(*key)
        block = self._find(size, pool) or self._reserve(size, pool)
        # A remainder too small to be of use stays with the block.
        rest = block.size - size
        if rest >= kMinBlockSize:
            if pool.small or self.config.expandable_segments:
                self._split(block, size)
            elif rest > kSmallSize and size < self.config.max_split_size:
                self._split(block, size)
        block.allocated, block.requested = True, nbytes
        self._allocated.add(block.size)
        self._requested.add(nbytes)
        if self.history is not None:
            block.frames = self.history.record("alloc", block.address, nbytes, stream)
        return block

    def _find(self, size: int, pool: _Pool) -> _Block | None:
        """Take the free block that serves a request best, if there is one."""
        free = pool.free
        if self._chooses_by_size:
            at = free.bisect_left((size,))
            return free.pop(at)[2] if at < len(free) else None
        if self._collects_garbage:
            self._searches[pool.small] += 1  # what the age of free blocks is counted in
        at = free.bisect_left((size,))
        if at == len(free):
            return None
        found, _, block = free[at]
        # What stands before unmapped pages can grow, and counts as large as it can become.
        if block.base is not None:
            while at + 1 < len(free) and _grown(free[at + 1][2]) < _grown(block):
                at += 1
                found, _, block = free[at]
        largest = self.config.max_split_size
        if size < largest <= found:
            return None  # kept whole for a large request
        if size >= largest and found >= size + self.config.max_non_split_rounding_size:
            return None  # would waste too much of it
        del free[at]
        return block

    def _reserve(self, size: int, pool: _Pool) -> _Block:
        """Take memory from the card for a request, if need be after giving back some."""
        if self._collects_garbage:
            self._collect_garbage()
        block = self._new_block(size, pool)
        if block is None and self._release_unsplittable(size, pool):
            block = self._new_block(size, pool)
        if block is None:
            self.empty_cache()
            self.counts.num_alloc_retries += 1
            block = self._new_block(size, pool)
        if block is None:
            self.counts.num_ooms += 1
            free, capacity = self.mem_get_info()
            if self.history is not None:
                self.history.record("oom", free, size)
            raise OutOfMemoryError(
                _segment_size(size),
                capacity,
                self._allocated.current,
                self._reserved.current,
                self.context,
                self.allowed,
            )
        return block

    def _new_block(self, size: int, pool: _Pool) -> _Block | None:
        """A free block, in no pool, of memory newly reserved; None if there is no room."""
        total = _segment_size(size)
        if self.allowed is not None and self._reserved.current + total > self.allowed:
            return None
        if self.config.expandable_segments:
            return self._expand(size, pool)
        if not self._fits(total):
            return None
        block = self._new_segment(total, pool)
        self._take(total, "segment_alloc", block.address, block.address, pool)
        return block

    def _new_segment(self, size: int, pool: _Pool) -> _Block:
        """Addresses of their own, and the block that holds all of them."""
        block = _Block(self._place(size), size, pool)
        self._segments[block.address] = block
        return block

    def _place(self, size: int) -> int:
        """Where a new segment begins."""
        expandable = self.config.expandable_segments
        return (self._ranges if expandable else self.placement).place(size)

    def _fits(self, size: int) -> bool:
        return self.capacity is None or size <= self.mem_get_info()[0]

    def _take(self, size: int, action: str, address: int, segment: int, pool: _Pool) -> None:
        """Account for memory taken from the card, or given back if `size` is negative."""
        self._reserved.add(size)
        if size > 0:
            self.counts.num_device_alloc += 1
        else:
            self.counts.num_device_free += 1
        if self.history is not None:
            frames = self.history.record(action, address, abs(size), pool.stream)
            if size > 0:
                self._segments[segment].segment_frames = frames

    # Giving memory back

    def _release(self, block: _Block) -> None:
        """Give back a segment that is one free block: one cudaFree."""
        block.pool.free.remove(_sorted(block))
        del self._segments[block.address]
        self.placement.give_back(block.address, block.size)
        self._take(-block.size, "segment_free", block.address, block.address, block.pool)

    def _release_unsplittable(self, size: int, pool: _Pool) -> bool:
        """Give back blocks of at least `max_split_size`, as many as a request needs."""
        largest = self.config.max_split_size
        if largest == sys.maxsize:
            return False
        wanted = max(size, largest)
        at = pool.free.bisect_left((wanted,))
        if at < len(pool.free):
            self._release(pool.free[at][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= largest:
            released += pool.free[-1][0]
            self._release(pool.free[-1][2])
        return released >= wanted

    @property
    def _collects_garbage(self) -> bool:
        return self.allowed is not None and self.config.garbage_collection_threshold > 0

    def _collect_garbage(self) -> None:
        """Give back large segments that have been free for longer than others."""
        assert self.allowed is not None
        threshold = int(self.config.garbage_collection_threshold * self.allowed)
        wanted = self._reserved.current - threshold
        large = (pool.free for (small, _), pool in sorted(self._pools.items()) if not small)
        whole = [b for free in large for _, _, b in free if b.prev is None and b.next is None]
        whole = [b for b in whole if b.base is None]
        ages = {id(b): self._searches[False] - b.searches for b in whole}
        while wanted > 0 and whole:
            average = sum(ages[id(b)] for b in whole) / len(whole)
            old = [b for b in whole if ages[id(b)] >= average]
            whole = [b for b in whole if ages[id(b)] < average]
            for block in old:
                wanted -= block.size
                self._release(block)

    # Expandable segments

    def _expand(self, size: int, pool: _Pool) -> _Block | None:
        """A free block of at least `size`, of pages newly mapped and what is free before them."""
        block = self._room(size, pool)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None, "an expandable segment without room"
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following  # which has merged with the block before it
        pool.free.remove(_sorted(block))
        return block

    def _room(self, size: int, pool: _Pool) -> _Block:
        """The lowest block at which `size` free addresses begin, mapped or not."""
        for unmapped in pool.unmapped:
            first = unmapped
            if unmapped.prev is not None and not unmapped.prev.allocated:
                first = unmapped.prev
            room, block = 0, first
            while room < size and block is not None and not block.allocated:
                room += block.size
                block = block.next
            if room >= size:
                return first
        # Addresses for 1 1/8 of the card: more than it can fill.
        capacity = _NO_BOUND if self.capacity is None else self.capacity
        space = max(capacity + capacity // 8, size)
        segment = self._new_segment(_round_up(space, pool.page), pool)
        segment.base, segment.mapped = segment.address, False
        pool.unmapped.add(segment)
        return segment

    def _map(self, block: _Block, size: int) -> bool:
        """Put memory behind the first `size` bytes of an unmapped block, in whole pages."""
        size = _round_up(size, block.pool.page)
        if not self._fits(size):
            return False
        block.pool.unmapped.remove(block)
        if size < block.size:
            self._cut(block, size)
            assert block.next is not None
            block.pool.unmapped.add(block.next)
        block.mapped = True
        address = block.address
        self._merge_neighbours(block)
        self._cache(block)
        assert block.base is not None
        self._take(size, "segment_map", address, block.base, block.pool)
        return True

    def _unmap(self, block: _Block) -> None:
        """Give back the whole pages of a free block of an expandable segment."""
        base, page, pool = block.base, block.pool.page, block.pool
        assert base is not None
        begin = base + _round_up(block.address - base, page)
        end = base + (block.address + block.size - base) // page * page
        if begin >= end:
            return
        pool.free.remove(_sorted(block))
        if begin > block.address:
            before, size = block, begin - block.address
            self._cut(before, size)
            self._cache(before)
            assert before.next is not None
            block = before.next
        if end < block.address + block.size:
            self._cut(block, end - begin)
            assert block.next is not None
            self._cache(block.next)
        block.mapped = False
        self._merge_neighbours(block)
        pool.unmapped.add(block)
        self._take(begin - end, "segment_unmap", begin, base, pool)
        if block.prev is None and block.next is None:  # nothing is left of the segment
            pool.unmapped.remove(block)
            del self._segments[base]

    # Cutting and joining blocks

    def _cache(self, block: _Block) -> None:
        """Put a free block into its pool."""
        block.searches = self._searches[block.pool.small]
        block.pool.free.add(_sorted(block))

    def _split(self, block: _Block, size: int) -> None:
        """Cut `block` to `size` bytes and put the rest, as a block, into the pool."""
        self._cut(block, size)
        assert block.next is not None
        self._cache(block.next)

    def _cut(self, block: _Block, size: int) -> None:
        """Cut `block` to `size` bytes; the rest becomes the next block, in no pool."""
        rest = _Block(block.address + size, block.size - size, block.pool, block.base)
        rest.mapped = block.mapped
        rest.prev, rest.next = block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.next, block.size = rest, size

    def _merge_neighbours(self, block: _Block) -> None:
        """Let a free block that is in no pool swallow the neighbours of its kind."""
        for neighbour in (block.prev, block.next):
            if neighbour is None or neighbour.allocated or neighbour.mapped is not block.mapped:
                continue
            if block.mapped:
                block.pool.free.remove(_sorted(neighbour))
            else:
                block.pool.unmapped.remove(neighbour)
            if neighbour is block.prev:
                block.address, block.prev = neighbour.address, neighbour.prev
                block.segment_frames = neighbour.segment_frames
                if block.prev is None:
                    self._segments[block.address] = block
                else:
                    block.prev.next = block
            else:
                block.next = neighbour.next
                if block.next is not None:
                    block.next.prev = block
            block.size += neighbour.size


def _segment_size(size: int) -> int:
    """Bytes of a segment that is reserved for a request of `size`: one cudaMalloc."""
    if size <= kSmallSize:
        return kSmallBuffer
    if size < kMinLargeAlloc:
        return kLargeBuffer
    return _round_up(size, kRoundLarge)


def _grown(block: _Block) -> int:
    """Bytes that a free block of an expandable segment can grow to."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)


def _describe(first: _Block) -> Iterator[SegmentInfo]:
    """The segment that begins with a block; of an expandable one, each run of mapped pages."""
    block: _Block | None = first
    while block is not None:
        if not block.mapped:
            block = block.next
            continue
        blocks: list[BlockInfo] = []
        begin = block
        while block is not None and block.mapped:
            state = "active_allocated" if block.allocated else "inactive"
            blocks.append(
                BlockInfo(
                    address=block.address,
                    size=block.size,
                    requested_size=block.requested,
                    state=state,
                    frames=block.frames,
                )
            )
            block = block.next
        allocated = sum(b["size"] for b in blocks if b["state"] == "active_allocated")
        yield SegmentInfo(
            device=0,
            address=begin.address,
            total_size=sum(b["size"] for b in blocks),
            allocated_size=allocated,
            active_size=allocated,  # nothing freed waits for another stream to let go of it
            requested_size=sum(b["requested_size"] for b in blocks),
            stream=begin.pool.stream,
            segment_type="small" if begin.pool.small else "large",
            segment_pool_id=(0, 0),
            is_expandable=begin.base is not None,
            frames=begin.segment_frames,
            blocks=blocks,
        )
