"""The model of PyTorch's caching allocator: its rules by example, its books by property."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.allocator import BlockInfo, CachingAllocator, OutOfMemoryError
from helpers.units import GiB, KiB, MiB


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (0, 0, 0),  # an empty tensor takes no block
        (1, 512, 2 * MiB),
        (512, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (1 * MiB, 1 * MiB, 2 * MiB),  # the largest of the small pool
        (1 * MiB + 1, 1 * MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),  # a segment of its own
        (10 * MiB + 1, 10 * MiB + 512, 12 * MiB),  # more than 1 MiB remains: split off
        (25 * MiB, 26 * MiB, 26 * MiB),  # gpt2-large's matrices: the last MiB is not split off
    ],
)
def test_one_request(requested: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(requested)
    assert allocator.memory_allocated() == allocated
    assert allocator.memory_reserved() == reserved
    assert allocator.memory_requested() == requested


def blocks(allocator: CachingAllocator, state: str) -> list[BlockInfo]:
    found = [block for segment in allocator.snapshot() for block in segment["blocks"]]
    return [block for block in found if block["state"] == state]


def test_best_fit_takes_the_smallest_that_is_large_enough() -> None:
    allocator = CachingAllocator()
    big, _, small, _ = (allocator.malloc(n * MiB) for n in (40, 12, 30, 12))
    allocator.free(big)
    allocator.free(small)
    allocator.malloc(30 * MiB)
    free = [
        b["size"] for s in allocator.snapshot() for b in s["blocks"] if b["state"] == "inactive"
    ]
    assert free == [40 * MiB]


def test_equal_blocks_are_taken_by_address() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(12 * MiB), allocator.malloc(12 * MiB)
    lower = allocator.snapshot()[0]["address"]
    for handle in (second, first):
        allocator.free(handle)
    allocator.malloc(12 * MiB)
    active = [
        b for s in allocator.snapshot() for b in s["blocks"] if b["state"] == "active_allocated"
    ]
    assert [b["address"] for b in active] == [lower]


def test_a_whole_block_is_handed_out_where_a_mebibyte_or_less_would_remain() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MiB))
    allocator.malloc(11 * MiB)
    assert allocator.memory_allocated() == 12 * MiB


def test_free_blocks_merge_with_both_neighbours() -> None:
    allocator = CachingAllocator()
    handles = [allocator.malloc(512 * KiB) for _ in range(4)]  # one segment of the small pool
    for index in (0, 2, 1, 3):
        allocator.free(handles[index])
    (segment,) = allocator.snapshot()
    assert [(b["size"], b["state"]) for b in segment["blocks"]] == [(2 * MiB, "inactive")]
    assert (allocator.memory_allocated(), allocator.memory_reserved()) == (0, 2 * MiB)
    allocator.empty_cache()
    assert allocator.memory_reserved() == 0


def test_empty_cache_keeps_a_segment_that_is_in_use() -> None:
    allocator = CachingAllocator()
    kept, dropped = allocator.malloc(1), allocator.malloc(30 * MiB)
    allocator.free(dropped)
    allocator.empty_cache()
    assert allocator.memory_reserved() == 2 * MiB
    allocator.free(kept)


def test_the_pools_are_apart() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(19 * MiB))
    allocator.malloc(512)
    assert [s["segment_type"] for s in allocator.snapshot()] == ["large", "small"]


def test_peaks_and_their_reset() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MiB))
    allocator.malloc(512)
    assert allocator.max_memory_allocated() == 30 * MiB
    assert allocator.max_memory_reserved() == 32 * MiB
    allocator.empty_cache()
    allocator.reset_peak_memory_stats()
    assert allocator.max_memory_allocated() == 512
    assert allocator.max_memory_reserved() == 2 * MiB


def test_past_its_capacity_it_first_gives_back_free_segments() -> None:
    allocator = CachingAllocator(capacity=64 * MiB)
    allocator.free(allocator.malloc(40 * MiB))
    allocator.malloc(50 * MiB)
    assert allocator.memory_reserved() == 50 * MiB


def test_out_of_memory_tells_what_pytorch_tells() -> None:
    allocator = CachingAllocator(capacity=6 * GiB)
    allocator.malloc(5 * GiB)
    first, _ = allocator.malloc(1 * MiB), allocator.malloc(1 * MiB)
    allocator.free(first)
    before = allocator.snapshot()
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.malloc(GiB + 1)
    assert (
        "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 6.00 GiB "
        "of which 1022.00 MiB is free. Of the allocated memory 5.00 GiB is allocated by PyTorch, "
        "and 1024.00 KiB is reserved by PyTorch but unallocated."
    ) in str(caught.value)
    assert caught.value.tried == GiB + 2 * MiB
    assert allocator.snapshot() == before  # a segment in use is not given back
    allocator.malloc(100 * MiB)  # and what fits is served on


def test_a_full_card_can_be_filled_to_the_last_byte() -> None:
    allocator = CachingAllocator(capacity=20 * MiB)
    allocator.free(allocator.malloc(20 * MiB))
    allocator.malloc(10 * MiB)
    allocator.malloc(10 * MiB)
    assert allocator.memory_allocated() == 20 * MiB


def test_a_card_can_be_filled_with_what_was_given_back() -> None:
    allocator = CachingAllocator(capacity=20 * MiB)
    allocator.free(allocator.malloc(10 * MiB))
    allocator.malloc(20 * MiB)
    assert allocator.memory_allocated() == 20 * MiB


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (-1, ValueError, "nbytes is -1 bytes: expected zero or more"),
        (1.5, TypeError, "nbytes is 1.5: expected a whole number of bytes"),
        ("4", TypeError, "nbytes is '4': expected a whole number of bytes"),
        (True, TypeError, "nbytes is True: expected a whole number of bytes"),
    ],
)
def test_a_wrong_size_changes_nothing(wrong: object, error: type[Exception], message: str) -> None:
    allocator = CachingAllocator()
    with pytest.raises(error, match=message):
        allocator.malloc(wrong)  # type: ignore[arg-type]
    assert (allocator.memory_allocated(), allocator.memory_reserved()) == (0, 0)
    assert allocator.snapshot() == []


def test_a_wrong_capacity() -> None:
    with pytest.raises(ValueError, match="capacity is -5 bytes"):
        CachingAllocator(capacity=-5)


def test_a_wrong_handle_changes_nothing() -> None:
    allocator = CachingAllocator()
    freed, kept = allocator.malloc(512), allocator.malloc(512)
    allocator.free(freed)
    before = allocator.snapshot()
    with pytest.raises(ValueError, match=f"handle {freed} was freed before"):
        allocator.free(freed)
    with pytest.raises(ValueError, match="handle 999 was never returned by malloc"):
        allocator.free(999)
    assert allocator.snapshot() == before
    assert allocator.memory_allocated() == 512
    allocator.free(kept)


# A trace: positive numbers ask for so many bytes, others free a live handle or empty the cache.
SIZES = st.one_of(
    st.integers(0, 4 * KiB),
    st.integers(0, 2 * MiB),
    st.integers(9 * MiB, 11 * MiB),
    st.integers(0, 60 * MiB),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), SIZES),
        st.tuples(st.just("free"), st.integers(0, 10**6)),
        st.tuples(st.just("empty_cache"), st.just(0)),
    ),
    max_size=120,
)


def replay(allocator: CachingAllocator, steps: list[tuple[str, int]], check: bool) -> list[int]:
    """Run a trace; the handles that live on."""
    live: list[int] = []
    for step, number in steps:
        if step == "malloc":
            try:
                live.append(allocator.malloc(number))
            except OutOfMemoryError:
                pass
        elif step == "free" and live:
            allocator.free(live.pop(number % len(live)))
        elif step == "empty_cache":
            allocator.empty_cache()
        if check:
            books_are_balanced(allocator)
    return live


def books_are_balanced(allocator: CachingAllocator) -> None:
    snapshot = allocator.snapshot()
    end = 0
    allocated = 0
    for segment in snapshot:
        assert segment["address"] >= end, "segments overlap"
        place = segment["address"]
        previous = "active_allocated"
        for block in segment["blocks"]:
            assert block["address"] == place, "blocks leave a gap or overlap"
            assert block["size"] > 0 and block["size"] % 512 == 0
            assert block["requested_size"] <= block["size"]
            assert "active_allocated" in (previous, block["state"]), "free neighbours not merged"
            place += block["size"]
            previous = block["state"]
            allocated += block["size"] if previous == "active_allocated" else 0
        end = segment["address"] + segment["total_size"]
        assert place == end, "blocks do not fill their segment"
    reserved = sum(segment["total_size"] for segment in snapshot)
    assert allocator.memory_allocated() == allocated <= reserved == allocator.memory_reserved()
    assert allocator.memory_requested() <= allocated
    assert allocator.max_memory_allocated() >= allocated
    assert allocator.max_memory_reserved() >= reserved


@settings(deadline=None, derandomize=True)
@given(STEPS)
def test_segments_partition_into_blocks_and_all_comes_back(steps: list[tuple[str, int]]) -> None:
    allocator = CachingAllocator()
    for handle in replay(allocator, steps, check=True):
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.memory_allocated(), allocator.memory_reserved()) == (0, 0)
    assert allocator.snapshot() == []


@settings(deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 100 * MiB))
def test_a_capacity_is_kept(steps: list[tuple[str, int]], capacity: int) -> None:
    allocator = CachingAllocator(capacity)
    live = replay(allocator, steps, check=True)
    assert allocator.max_memory_reserved() <= capacity
    for handle in live:
        allocator.free(handle)
    books_are_balanced(allocator)


@settings(deadline=None, derandomize=True)
@given(STEPS)
def test_the_same_trace_gives_the_same_bytes(steps: list[tuple[str, int]]) -> None:
    one, other = CachingAllocator(), CachingAllocator()
    replay(one, steps, check=False)
    replay(other, steps, check=False)
    assert one.snapshot() == other.snapshot()
    assert one.max_memory_allocated() == other.max_memory_allocated()
