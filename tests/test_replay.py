"""Replaying traces: derived by hand from the allocator's rules, or written by the virtual GPU.

None is of a real card: records of real cards bring their own (see test_record).
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from every_byte.allocator import CachingAllocator
from every_byte.allocator.replay import Replay, replay_trace
from every_byte.gpu import VirtualGPU
from every_byte.units import MiB
from helpers.mlp import SimpleMLP

EXPANDABLE = "expandable_segments:True"
Trace = list[dict[str, Any]]


def trace(*events: tuple[str, int, int]) -> Trace:
    return [{"action": a, "addr": at, "size": size, "stream": 0} for a, at, size in events]


def freed(at: int, size: int) -> tuple[tuple[str, int, int], ...]:
    return ("free_requested", at, size), ("free_completed", at, size)


# A driver that places each segment below the last one. 1,000 B and 512 B share a small
# segment. 25 MiB get 26 MiB, and the last MiB stays with the block. 12 MiB in those 26
# leave 14 behind, of which 13 are taken.
HIGH, MID, LOW = 0x7F0000000000, 0x7E0000000000, 0x7D0000000000
BY_HAND = trace(
    ("segment_alloc", HIGH, 2 * MiB),
    ("alloc", HIGH, 1000),
    ("alloc", HIGH + 1024, 512),
    ("segment_alloc", MID, 26 * MiB),
    ("alloc", MID, 25 * MiB),
    *freed(MID, 25 * MiB),
    ("alloc", MID, 12 * MiB),
    ("alloc", MID + 12 * MiB, 13 * MiB),
    *freed(HIGH, 1000),
    ("segment_alloc", LOW, 26 * MiB),
    ("alloc", LOW, 26 * MiB),
    *freed(MID, 12 * MiB),
    *freed(MID + 12 * MiB, 13 * MiB),
    *freed(LOW, 26 * MiB),
    ("alloc", LOW, 26 * MiB),  # of two free blocks of 26 MiB the lower, not the older
    ("segment_free", MID, 26 * MiB),
)
AT_THE_END = [
    {
        "blocks": [
            {"address": HIGH, "size": 1024, "state": "inactive"},
            {"address": HIGH + 1024, "size": 512, "state": "active_allocated"},
            {"address": HIGH + 1536, "size": 2 * MiB - 1536, "state": "inactive"},
        ]
    },
    {"blocks": [{"address": LOW, "size": 26 * MiB, "state": "active_allocated"}]},
]


def test_a_trace_derived_by_hand() -> None:
    assert replay_trace(BY_HAND, AT_THE_END) == Replay(len(BY_HAND), None, 0, 0)


def changed(at: int, **to: object) -> Trace:
    return [event | to if i == at else event for i, event in enumerate(BY_HAND)]


@pytest.mark.parametrize(
    ("recorded", "number", "how"),
    [
        (changed(2, addr=HIGH + 2048), 2, f"replayed at {HIGH + 1024:#x}"),
        (changed(3, size=28 * MiB), 4, "for it, the replay takes segment_alloc of 27,262,976 B"),
        (BY_HAND[:3] + BY_HAND[4:], 3, "not nothing"),
        (changed(19, addr=MID), 19, f"replayed at {LOW:#x}"),
        (BY_HAND[:-1] + trace(("segment_free", LOW, 26 * MiB)), 20, "the replay keeps it"),
        (changed(2, stream=7), 2, "for it, the replay takes segment_alloc of 2,097,152 B"),
        (trace(*freed(HIGH, 512)), 1, "did the trace begin on an empty card?"),
        ([*BY_HAND[:-1], *trace(("segment_free", HIGH, 2 * MiB))], 20, "the replay keeps it"),
    ],
)
def test_the_first_mismatch_is_told(recorded: Trace, number: int, how: str) -> None:
    replay = replay_trace(recorded)
    assert replay.mismatch is not None
    assert replay.mismatch.startswith(f"event {number}, ")
    assert how in replay.mismatch


def test_the_difference_at_the_end_is_told() -> None:
    blocks = [dict(block) for block in AT_THE_END[0]["blocks"]]
    blocks[1]["size"], blocks[2]["size"] = 1024, 2 * MiB - 2048
    replay = replay_trace(BY_HAND, [{"blocks": blocks}, AT_THE_END[1]])
    assert replay.allocated == -512
    assert replay.mismatch == "the end: the blocks do not lie as they were recorded"
    more = replay_trace(trace(("segment_alloc", HIGH, 4 * MiB), ("alloc", HIGH, 512)))
    assert more.reserved == -2 * MiB


def test_after_a_mismatch_the_replay_goes_on() -> None:
    """As if the card had taken 4 MiB for the first request, and the rest as it was."""
    replay = replay_trace(changed(0, size=4 * MiB), AT_THE_END)
    assert replay.mismatch is not None and replay.mismatch.startswith("event 1, ")
    assert (replay.allocated, replay.reserved) == (0, -2 * MiB)


def test_memory_that_ran_out_gave_back_what_was_free() -> None:
    ran_out = trace(
        ("segment_alloc", HIGH, 30 * MiB),
        ("alloc", HIGH, 30 * MiB),
        *freed(HIGH, 30 * MiB),
        ("segment_free", HIGH, 30 * MiB),
        ("segment_alloc", HIGH, 40 * MiB),
        ("alloc", HIGH, 40 * MiB),
    )
    ran_out.append({"action": "oom", "size": 10**9, "device_free": 0, "stream": 0})
    ran_out += trace(("snapshot", 0, 0))
    assert replay_trace(ran_out) == Replay(8 + 1, None, None, 0)


def test_what_the_replay_gives_back_and_the_trace_does_not() -> None:
    two = trace(
        ("segment_alloc", HIGH, 30 * MiB),
        ("alloc", HIGH, 30 * MiB),
        ("segment_alloc", MID, 40 * MiB),
        ("alloc", MID, 40 * MiB),
        *freed(HIGH, 30 * MiB),
        *freed(MID, 40 * MiB),
        ("segment_free", HIGH, 30 * MiB),
    )
    told = "gives back segment_free of 41,943,040 B at 0x7e0000000000 as well"
    for rest, where in (([], "the end: "), (trace(("snapshot", 0, 0)), "event 9, ")):
        mismatch = replay_trace(two + rest).mismatch
        assert mismatch is not None and told in mismatch and mismatch.startswith(where)


def test_an_event_without_its_fields_is_told() -> None:
    with pytest.raises(ValueError, match="event 1 of the trace has no 'size'"):
        replay_trace([*trace(("snapshot", 0, 0)), {"action": "alloc", "addr": 1}])
    with pytest.raises(ValueError, match="the trace has a request of no bytes"):
        replay_trace(trace(("alloc", HIGH, 0)))
    with pytest.raises(ValueError, match="PYTORCH_ALLOC_CONF is 'nonsense'"):
        replay_trace([], alloc_conf="nonsense")


@pytest.mark.parametrize("alloc_conf", ["", EXPANDABLE])
def test_a_training_step_as_the_virtual_gpu_writes_it(alloc_conf: str) -> None:
    with VirtualGPU(alloc_conf=alloc_conf) as gpu:
        gpu.record_memory_history()
        with gpu.device:
            model, data = SimpleMLP(), torch.empty(128, 1, 28, 28)
        optimizer = optim.Adam(model.parameters())
        nn.functional.cross_entropy(model(data), torch.zeros(128).long().to("meta")).backward()
        optimizer.step()
        gpu.empty_cache()
        told = gpu.snapshot()
        (events,) = told["device_traces"]
        replay = replay_trace(events, told["segments"], alloc_conf)
        assert replay == Replay(len(events), None, 0, 0)
        assert len(events) > 150
        other = "" if alloc_conf else EXPANDABLE
        assert replay_trace(events, told["segments"], other).mismatch is not None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40 * MiB)), max_size=60), st.booleans())
def test_any_program_of_the_model_replays(steps: list[tuple[int, int]], expandable: bool) -> None:
    alloc_conf = EXPANDABLE if expandable else ""
    card = CachingAllocator(alloc_conf=alloc_conf)
    card.record_memory_history()
    live: list[int] = []
    for choice, size in steps:
        if choice == 9:
            card.empty_cache()
        elif choice > 5 and live:
            card.free(live.pop(size % len(live)))
        else:
            live.append(card.malloc(size if choice % 2 else size % 2**20 + 1, stream=size % 3))
    told = card.snapshot()
    (events,) = told["device_traces"]
    assert replay_trace(events, told["segments"], alloc_conf) == Replay(len(events), None, 0, 0)
