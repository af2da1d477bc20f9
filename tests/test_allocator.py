"""The model of PyTorch's caching allocator: its rules by example, its books by property."""

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from every_byte.allocator import BlockInfo, CachingAllocator, OutOfMemoryError
from every_byte.allocator.config import AllocatorConfig
from every_byte.units import GiB, KiB, MiB


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
    handle = allocator.malloc(requested)
    assert allocator.memory_allocated() == allocated
    assert allocator.memory_reserved() == reserved
    assert allocator.memory_requested() == requested
    allocator.free(handle)
    assert (allocator.memory_allocated(), allocator.memory_requested()) == (0, 0)


@pytest.mark.parametrize("stream", ["x", -1, math.nan, 1.0, True, None])
def test_a_stream_that_is_none_is_refused(stream: Any) -> None:
    allocator = CachingAllocator()
    with pytest.raises((TypeError, ValueError), match=r"stream is .*: expected a whole number"):
        allocator.malloc(1, stream)
    assert allocator.memory_reserved() == 0


def blocks(allocator: CachingAllocator, state: str) -> list[BlockInfo]:
    found = [block for segment in allocator.memory_snapshot() for block in segment["blocks"]]
    return [block for block in found if block["state"] == state]


def test_best_fit_takes_the_smallest_that_is_large_enough() -> None:
    allocator = CachingAllocator()
    big, _, small, _ = (allocator.malloc(n * MiB) for n in (40, 12, 30, 12))
    allocator.free(big)
    allocator.free(small)
    allocator.malloc(30 * MiB)
    free = [
        b["size"]
        for s in allocator.memory_snapshot()
        for b in s["blocks"]
        if b["state"] == "inactive"
    ]
    assert free == [40 * MiB]


def test_equal_blocks_are_taken_by_address() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(12 * MiB), allocator.malloc(12 * MiB)
    lower = allocator.memory_snapshot()[0]["address"]
    for handle in (second, first):
        allocator.free(handle)
    allocator.malloc(12 * MiB)
    active = [
        b
        for s in allocator.memory_snapshot()
        for b in s["blocks"]
        if b["state"] == "active_allocated"
    ]
    assert [b["address"] for b in active] == [lower]


def test_a_whole_block_is_handed_out_where_a_mebibyte_or_less_would_remain() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MiB))
    allocator.malloc(11 * MiB)
    assert allocator.memory_allocated() == 12 * MiB


@pytest.mark.parametrize("alloc_conf", ["", "expandable_segments:True"])
def test_a_freed_block_serves_its_own_stream_alone(alloc_conf: str) -> None:
    allocator = CachingAllocator(alloc_conf=alloc_conf)
    allocator.record_memory_history()
    for stream in (0, 7, 0, 7):
        allocator.free(allocator.malloc(40 * MiB, stream))
    assert allocator.memory_reserved() == 2 * 40 * MiB
    assert [segment["stream"] for segment in allocator.memory_snapshot()] == [0, 7]
    (entries,) = allocator.snapshot()["device_traces"]
    assert [e["stream"] for e in entries if e["action"] == "alloc"] == [0, 7, 0, 7]
    allocator.malloc(1)  # of another pool
    allocator.empty_cache()
    assert allocator.memory_reserved() == 2 * MiB


def test_free_blocks_merge_with_both_neighbours() -> None:
    allocator = CachingAllocator()
    handles = [allocator.malloc(512 * KiB) for _ in range(4)]  # one segment of the small pool
    for index in (0, 2, 1, 3):
        allocator.free(handles[index])
    (segment,) = allocator.memory_snapshot()
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
    assert [s["segment_type"] for s in allocator.memory_snapshot()] == ["large", "small"]


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
    before = allocator.memory_snapshot()
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.malloc(GiB + 1)
    assert (
        "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 6.00 GiB "
        "of which 1022.00 MiB is free. Including non-PyTorch memory, this process has 5.00 GiB "
        "memory in use. Of the allocated memory 5.00 GiB is allocated by PyTorch, "
        "and 1024.00 KiB is reserved by PyTorch but unallocated."
    ) in str(caught.value)
    assert caught.value.tried == GiB + 2 * MiB
    assert allocator.memory_snapshot() == before  # a segment in use is not given back
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
    assert allocator.memory_snapshot() == []


def test_a_wrong_capacity() -> None:
    with pytest.raises(ValueError, match="capacity is -5 bytes"):
        CachingAllocator(capacity=-5)


def test_a_wrong_handle_changes_nothing() -> None:
    allocator = CachingAllocator()
    freed, kept = allocator.malloc(512), allocator.malloc(512)
    allocator.free(freed)
    before = allocator.memory_snapshot()
    with pytest.raises(ValueError, match=f"handle {freed} was freed before"):
        allocator.free(freed)
    with pytest.raises(ValueError, match="handle 999 was never returned by malloc"):
        allocator.free(999)
    assert allocator.memory_snapshot() == before
    assert allocator.memory_allocated() == 512
    allocator.free(kept)


def test_a_context_leaves_less_for_pytorch() -> None:
    allocator = CachingAllocator(capacity=100 * MiB, context=30 * MiB)
    allocator.malloc(40 * MiB)
    assert allocator.mem_get_info() == (30 * MiB, 100 * MiB)
    with pytest.raises(OutOfMemoryError, match=r"of which 30\.00 MiB is free.* has 70\.00 MiB mem"):
        allocator.malloc(31 * MiB)
    with pytest.raises(ValueError, match="context is 8 bytes: expected no more than the card's 7"):
        CachingAllocator(capacity=7, context=8)
    with pytest.raises(RuntimeError, match="give it a capacity"):
        CachingAllocator().mem_get_info()


# PYTORCH_ALLOC_CONF


def test_a_pool_grows_by_pages_and_merges() -> None:
    allocator = CachingAllocator(alloc_conf="expandable_segments:True")
    first, second = allocator.malloc(30 * MiB), allocator.malloc(25 * MiB)
    # Pages of 20 MiB: two for the first, whose last 10 MiB and one more page hold the second.
    assert (allocator.memory_allocated(), allocator.memory_reserved()) == (55 * MiB, 60 * MiB)
    small = allocator.malloc(1)
    assert allocator.memory_reserved() == 62 * MiB  # the small pool's pages are of 2 MiB
    large = [s for s in allocator.memory_snapshot() if s["segment_type"] == "large"]
    assert [s["is_expandable"] for s in large] == [True]
    assert [b["size"] // MiB for b in large[0]["blocks"]] == [30, 25, 5]
    for handle in (first, second, small):
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.memory_reserved(), allocator.memory_snapshot()) == (0, [])


def test_free_pages_are_unmapped_and_mapped_again_in_place() -> None:
    allocator = CachingAllocator(alloc_conf="expandable_segments:True")
    first, kept = allocator.malloc(50 * MiB), allocator.malloc(40 * MiB)
    last = allocator.malloc(10 * MiB)  # at 90 of 100 MiB
    base = allocator.memory_snapshot()[0]["address"]
    for handle in (first, last):
        allocator.free(handle)
    allocator.empty_cache()
    # Of 0 to 50 the first two pages are free; of 90 to 100 none is.
    (segment,) = allocator.memory_snapshot()
    assert (segment["address"] - base, segment["total_size"]) == (40 * MiB, 60 * MiB)
    assert [b["size"] // MiB for b in segment["blocks"]] == [10, 40, 10]
    again = allocator.malloc(45 * MiB)  # two pages before the free 10 MiB, at the lowest address
    (segment,) = allocator.memory_snapshot()
    assert (segment["address"], allocator.memory_reserved()) == (base, 100 * MiB)
    assert [b["size"] // MiB for b in segment["blocks"]] == [45, 5, 40, 10]
    for handle in (kept, again):
        allocator.free(handle)


def test_an_expandable_segment_splits_off_the_smallest_rest() -> None:
    allocator = CachingAllocator(alloc_conf="expandable_segments:True")
    allocator.malloc(20 * MiB - 512)  # 1 MiB or less would stay with the block by default
    assert allocator.memory_allocated() == 20 * MiB - 512


def test_what_can_grow_counts_as_large_as_it_can_become() -> None:
    allocator = CachingAllocator(alloc_conf="expandable_segments:True")
    first, _, _ = (allocator.malloc(n * MiB) for n in (40, 20, 30))  # 10 MiB are free at the end
    allocator.free(first)
    allocator.malloc(8 * MiB)  # into the 40: the 10 are followed by pages without end
    (segment,) = allocator.memory_snapshot()
    assert [b["size"] // MiB for b in segment["blocks"]] == [8, 32, 20, 30, 10]


def test_a_hole_of_unmapped_pages_divides_the_snapshot() -> None:
    allocator = CachingAllocator(alloc_conf="expandable_segments:True")
    _, hole, _ = (allocator.malloc(20 * MiB) for _ in range(3))
    allocator.free(hole)
    allocator.empty_cache()
    low, high = allocator.memory_snapshot()
    assert high["address"] - low["address"] == 40 * MiB
    assert allocator.memory_reserved() == 40 * MiB


def test_an_expandable_segment_ends_where_the_card_does() -> None:
    allocator = CachingAllocator(50 * MiB, "expandable_segments:True")
    kept = allocator.malloc(30 * MiB)
    with pytest.raises(
        OutOfMemoryError, match=r"Tried to allocate 26\.00 MiB.* 10\.00 MiB is free"
    ):
        allocator.malloc(25 * MiB)
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(80 * MiB)  # more than the addresses set apart
    assert (allocator.memory_allocated(), allocator.memory_reserved()) == (30 * MiB, 40 * MiB)
    allocator.malloc(10 * MiB)
    allocator.free(kept)


@pytest.mark.parametrize(("requested", "reserved"), [(98, 218), (100, 220), (110, 120), (120, 120)])
def test_large_blocks_are_kept_whole(requested: int, reserved: int) -> None:
    """A free block of 120 MiB serves what is less than 20 MiB smaller, not what is below 100."""
    allocator = CachingAllocator(alloc_conf="max_split_size_mb:100")
    allocator.free(allocator.malloc(120 * MiB))
    allocator.malloc(requested * MiB)
    assert allocator.memory_reserved() // MiB == reserved
    whole = 120 if reserved == 120 else requested
    assert allocator.memory_allocated() // MiB == whole


def test_large_blocks_are_given_back_first_and_only_as_many_as_needed() -> None:
    allocator = CachingAllocator(400 * MiB, "max_split_size_mb:100")
    handles = [allocator.malloc(n * MiB) for n in (100, 120, 150, 30)]
    for handle in handles:
        allocator.free(handle)
    allocator.malloc(90 * MiB)  # no free block below 100 MiB is large enough, the card is full
    sizes = sorted(s["total_size"] // MiB for s in allocator.memory_snapshot())
    assert sizes == [30, 90, 120, 150]


def test_garbage_is_collected_by_age_where_a_fraction_is_set() -> None:
    conf = "per_process_memory_fraction:0.5,garbage_collection_threshold:0.6"
    allocator = CachingAllocator(400 * MiB, conf)  # 200 allowed; collects from 120 on
    old = allocator.malloc(60 * MiB)
    allocator.free(old)
    kept = allocator.malloc(70 * MiB)  # the search makes the free block older
    young = allocator.malloc(59 * MiB)  # reserves nothing: the 60 are reused as a whole
    allocator.free(young)
    allocator.malloc(62 * MiB)  # 130 are reserved: the unused 60 go first
    assert sorted(s["total_size"] // MiB for s in allocator.memory_snapshot()) == [62, 70]
    with pytest.raises(OutOfMemoryError, match=r"in use\. 200\.00 MiB allowed; Of the allocated"):
        allocator.malloc(80 * MiB)
    allocator.free(kept)


def test_garbage_younger_than_average_is_kept_while_the_older_suffices() -> None:
    conf = "per_process_memory_fraction:0.5,garbage_collection_threshold:0.6"
    allocator = CachingAllocator(400 * MiB, conf)
    older, younger = allocator.malloc(60 * MiB), allocator.malloc(40 * MiB)
    allocator.free(older)
    allocator.malloc(70 * MiB)
    allocator.free(younger)
    allocator.malloc(76 * MiB)  # 50 MiB are to go: the older one's 60 are enough
    assert sorted(s["total_size"] // MiB for s in allocator.memory_snapshot()) == [40, 70, 76]


def test_without_a_fraction_the_threshold_has_no_effect() -> None:
    """As in PyTorch: garbage collection asks for set_fraction first."""
    allocator = CachingAllocator(200 * MiB, "garbage_collection_threshold:0.1")
    allocator.free(allocator.malloc(60 * MiB))
    allocator.malloc(70 * MiB)
    assert allocator.memory_reserved() == 130 * MiB


CONFIGS = {  # as PyTorch's own parser takes them, or not
    "": True,
    "expandable_segments:True": True,
    " max_split_size_mb : 128 , expandable_segments:False": True,
    "max_split_size_mb:20,": True,
    "max_split_size_mb:19": False,
    "max_split_size_mb:many": False,
    "max_non_split_rounding_mb:19": False,
    "expandable_segments:true": False,
    "expandable_segments": False,
    "garbage_collection_threshold:0": False,
    "garbage_collection_threshold:0.9": True,
    "garbage_collection_threshold:1": False,
    "garbage_collection_threshold:nan": False,
    "per_process_memory_fraction:1": True,
    "per_process_memory_fraction:1.5": False,
    "max_split_size_mb=128": False,
    "max_split_size:128": False,
    ",max_split_size_mb:128": False,
    "max_split_size_mb:128,,": False,
    ",": False,
    "max_split_size_mb:128 expandable_segments:True": False,
    "backend:native": True,
}


def test_pytorch_takes_and_refuses_these_settings() -> None:
    code = f"""
import torch
for text in {list(CONFIGS)}:
    try:
        torch._C._accelerator_setAllocatorSettings(text)
        print(True)
    except (ValueError, RuntimeError):
        print(False)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "no attribute '_accelerator_setAllocatorSettings'" in run.stderr:
        pytest.skip("this PyTorch reads the settings only where there is CUDA")  # 2.8
    assert run.stdout.split() == [str(taken) for taken in CONFIGS.values()]


def test_settings_are_read_as_pytorch_reads_them() -> None:
    for text, taken in CONFIGS.items():
        try:
            AllocatorConfig.parse(text)
        except ValueError as error:
            assert not taken and repr(text) in str(error), error
        else:
            assert taken, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roundup_power2_divisions:[64:8]", "'roundup_power2_divisions' is not replayed; expected"),
        ("max_split_size:1", "'max_split_size' is not a setting of PyTorch's; expected"),
        ("max_split_size_mb:7", "max_split_size_mb is '7', expected a whole number of MiB, 20 or"),
        ("max_split_size_mb:-30", "max_split_size_mb is '-30', expected a whole number of MiB"),
        ("expandable_segments:1", "expandable_segments is '1', expected True or False"),
        ("garbage_collection_threshold:2", r"is '2', expected a number in \(0, 1\)"),
        ("backend:cudaMallocAsync", "expected native, the only backend that is replayed"),
        ("expandable_segments:True,max_split_size_mb:20", "together are not replayed"),
        ("per_process_memory_fraction:0.5", "capacity is None: a part of what"),
    ],
)
def test_what_is_not_replayed_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachingAllocator(alloc_conf=text)


# Out of memory while gigabytes are free: Troubleshooting's program.


def fragment(
    alloc_conf: str = "", states_first: bool = False, empty_cache: bool = False
) -> CachingAllocator:
    """Activations come and go, states stay, then something large is wanted."""
    allocator = CachingAllocator(6 * GiB, alloc_conf)

    def states() -> None:
        for _ in range(4):
            allocator.malloc(400 * MiB)

    if states_first:
        states()
    for handle in [allocator.malloc(768 * MiB) for _ in range(4)]:
        allocator.free(handle)
    if empty_cache:
        allocator.empty_cache()
    if not states_first:
        states()
    allocator.malloc(3584 * MiB)
    return allocator


def test_out_of_memory_while_more_than_enough_is_free() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        fragment()
    error = caught.value
    assert error.capacity - error.allocated == 4544 * MiB > error.tried == 3584 * MiB


@pytest.mark.parametrize(
    "cure",
    [
        {"alloc_conf": "expandable_segments:True"},
        {"alloc_conf": "max_split_size_mb:256"},
        {"states_first": True},
        {"empty_cache": True},
    ],
)
def test_each_cure_makes_room(cure: dict[str, Any]) -> None:
    assert fragment(**cure).memory_allocated() == 5184 * MiB


# What was done, in order


def test_the_history_tells_each_thing_done() -> None:
    allocator = CachingAllocator(60 * MiB)
    allocator.record_memory_history()
    handle = allocator.malloc(1000)
    allocator.free(handle)
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(70 * MiB)
    (trace,) = allocator.snapshot()["device_traces"]
    assert [(e["action"], e["size"]) for e in trace] == [
        ("segment_alloc", 2 * MiB),
        ("alloc", 1000),  # as asked for: PyTorch records it before rounding
        ("free_requested", 1000),
        ("free_completed", 1000),
        ("segment_free", 2 * MiB),
        ("oom", 70 * MiB),
    ]
    assert trace[-1]["device_free"] == 60 * MiB and "addr" not in trace[-1]
    frame = trace[1]["frames"][0]  # the innermost that is not the allocator's own
    assert Path(frame["filename"]) == Path(__file__)
    assert frame["name"] == "test_the_history_tells_each_thing_done"
    allocator.record_memory_history(None)
    assert allocator.snapshot()["device_traces"] == [[]]


def test_the_history_keeps_the_last_entries() -> None:
    allocator = CachingAllocator()
    allocator.record_memory_history(max_entries=2)
    allocator.free(allocator.malloc(1))
    actions = [e["action"] for e in allocator.snapshot()["device_traces"][0]]
    assert actions == ["free_requested", "free_completed"]
    with pytest.raises(ValueError, match="max_entries is 0: expected 1 to"):
        allocator.record_memory_history(max_entries=0)
    with pytest.raises(ValueError, match="enabled is 'some': expected 'all' or None"):
        allocator.record_memory_history("some")  # type: ignore[arg-type]


def test_a_snapshot_says_its_settings() -> None:
    plain = CachingAllocator().snapshot()
    assert plain == {
        "segments": [],
        "device_traces": [[]],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": "",
            "max_split_size": -1,
            "garbage_collection_threshold": 0.0,
            "expandable_segments": False,
        },
        "external_annotations": [],
    }
    card = CachingAllocator()
    card.malloc(1)
    (segment,) = card.memory_snapshot()
    assert segment["device"] == 0 and segment["segment_pool_id"] == (0, 0)
    conf = "max_split_size_mb:32,garbage_collection_threshold:0.5"
    told = CachingAllocator(alloc_conf=conf).snapshot()["allocator_settings"]
    assert told["PYTORCH_CUDA_ALLOC_CONF"] == conf
    assert told["max_split_size"] == 32 * MiB and told["garbage_collection_threshold"] == 0.5


def test_each_entry_of_the_history_has_its_fields() -> None:
    allocator = CachingAllocator(60 * MiB)
    allocator.record_memory_history()
    begin = time.time_ns() // 1000
    allocator.free(allocator.malloc(1000, stream=3))
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(70 * MiB)
    (trace,) = allocator.snapshot()["device_traces"]
    taken, *_, oom = trace
    times = [entry["time_us"] for entry in trace]
    assert times == sorted(times) and begin <= times[0] <= begin + 60_000_000
    assert {*oom} == {"action", "device_free", "size", "stream", "time_us", "frames"}
    assert {*taken} == {"action", "addr", "size", "stream", "time_us", "frames"}
    assert [entry["stream"] for entry in trace] == [3] * 5 + [0]
    names = [frame["name"] for frame in taken["frames"]]
    place = names.index("test_each_entry_of_the_history_has_its_fields")
    frame = taken["frames"][place]
    assert Path(frame["filename"]) == Path(__file__)
    assert frame["line"] == sys._getframe().f_code.co_firstlineno + 4
    assert len(names) > place + 1  # and those who called it


def test_the_history_keeps_one_entry_and_as_many_as_there_can_be() -> None:
    for entries in (1, sys.maxsize):
        CachingAllocator().record_memory_history(max_entries=entries)
    for entries in (0, sys.maxsize + 1):
        with pytest.raises(ValueError, match=f"max_entries is {entries}: expected 1 to"):
            CachingAllocator().record_memory_history(max_entries=entries)


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
                live.append(allocator.malloc(number, stream=number % 2))
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
    snapshot = allocator.memory_snapshot()
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


KINDS_OF_SETTINGS = st.sampled_from(
    [
        *("", "expandable_segments:True", "max_split_size_mb:25"),
        "per_process_memory_fraction:0.9,garbage_collection_threshold:0.5",
    ]
)


@settings(deadline=None, derandomize=True)
@given(STEPS, KINDS_OF_SETTINGS)
def test_segments_partition_into_blocks_and_all_comes_back(
    steps: list[tuple[str, int]], alloc_conf: str
) -> None:
    allocator = CachingAllocator(GiB, alloc_conf)
    for handle in replay(allocator, steps, check=True):
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.memory_allocated(), allocator.memory_reserved()) == (0, 0)
    assert allocator.memory_snapshot() == []


@settings(deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 100 * MiB), KINDS_OF_SETTINGS)
def test_a_capacity_is_kept(steps: list[tuple[str, int]], capacity: int, alloc_conf: str) -> None:
    allocator = CachingAllocator(capacity, alloc_conf)
    live = replay(allocator, steps, check=True)
    assert allocator.max_memory_reserved() <= capacity
    for handle in live:
        allocator.free(handle)
    books_are_balanced(allocator)


@dataclass
class NaiveSegment:
    """A segment of the reference below: blocks in order, as size and bytes asked for, or None."""

    address: int
    stream: int
    small: bool
    blocks: list[tuple[int, int | None]]


class NaiveAllocator:
    """The rules of ``CUDACachingAllocator.cpp`` once more, by lists that are searched whole."""

    def __init__(self) -> None:
        self.segments: list[NaiveSegment] = []
        self.peak = 0

    def malloc(self, nbytes: int, stream: int, new_address: int | None) -> tuple[int, int]:
        """Where the block begins: its segment's address, and bytes from there.

        Where a new segment lies is the driver's affair: `new_address` tells.
        """
        size = math.ceil(nbytes / 512) * 512
        small = size <= MiB
        fits = [
            (free, segment.address + sum(s for s, _ in segment.blocks[:i]), i, segment)
            for segment in self.segments
            if (segment.stream, segment.small) == (stream, small)
            for i, (free, asked) in enumerate(segment.blocks)
            if asked is None and free >= size
        ]
        if fits:
            assert new_address is None, "a segment is taken, though a block would do"
            free, _, i, segment = min(fits, key=lambda fit: fit[:2])
        else:
            assert new_address is not None, "no segment is taken, though no block would do"
            large = 20 * MiB if size < 10 * MiB else math.ceil(size / (2 * MiB)) * 2 * MiB
            free, i = 2 * MiB if small else large, 0
            segment = NaiveSegment(new_address, stream, small, [(free, None)])
            self.segments.append(segment)
        splits = free - size >= 512 if small else free - size > MiB
        used = [(size, nbytes), (free - size, None)] if splits else [(free, nbytes)]
        segment.blocks[i : i + 1] = used
        self.peak = max(self.peak, self.allocated())
        return segment.address, sum(s for s, _ in segment.blocks[:i])

    def free(self, address: int, offset: int) -> None:
        (segment,) = (s for s in self.segments if s.address == address)
        merged: list[tuple[int, int | None]] = []
        at = 0
        for size, asked in segment.blocks:
            now = None if at == offset else asked
            if now is None and merged and merged[-1][1] is None:
                merged[-1] = merged[-1][0] + size, None
            else:
                merged.append((size, now))
            at += size
        segment.blocks = merged

    def empty_cache(self) -> None:
        self.segments = [s for s in self.segments if any(a is not None for _, a in s.blocks)]

    def allocated(self) -> int:
        return sum(size for s in self.segments for size, asked in s.blocks if asked is not None)


@settings(deadline=None, derandomize=True)
@given(STEPS)
def test_a_naive_allocator_agrees_block_by_block(steps: list[tuple[str, int]]) -> None:
    allocator, naive = CachingAllocator(), NaiveAllocator()
    live: list[tuple[int, tuple[int, int] | None]] = []
    for step, number in steps:
        if step == "malloc":
            before = {segment["address"] for segment in allocator.memory_snapshot()}
            handle = allocator.malloc(number, stream=number % 2)
            after = {segment["address"] for segment in allocator.memory_snapshot()}
            new = next(iter(after - before), None)
            live.append((handle, naive.malloc(number, number % 2, new) if number else None))
        elif step == "free" and live:
            handle, place = live.pop(number % len(live))
            allocator.free(handle)
            if place is not None:
                naive.free(*place)
        elif step == "empty_cache":
            allocator.empty_cache()
            naive.empty_cache()
        assert {
            s["address"]: (
                s["stream"],
                s["segment_type"] == "small",
                [
                    (b["size"], b["requested_size"] if b["state"] == "active_allocated" else None)
                    for b in s["blocks"]
                ],
            )
            for s in allocator.memory_snapshot()
        } == {s.address: (s.stream, s.small, s.blocks) for s in naive.segments}
    assert allocator.memory_allocated() == naive.allocated()
    assert allocator.max_memory_allocated() == naive.peak
