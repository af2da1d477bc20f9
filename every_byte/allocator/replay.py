"""A recorded allocation trace, replayed event by event on the model of the allocator.

The trace is that of ``torch.cuda.memory._snapshot()["device_traces"]``, after
``_record_memory_history``. Requests and frees are what a program did; where the
blocks lie, and which segments are taken and given back for them, is what the
allocator made of it: that the replay has to find by itself, and it is compared
after every event.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from every_byte.allocator import CachingAllocator
from every_byte.allocator.placement import Upwards

_TAKEN = ("segment_alloc", "segment_map")
_GIVEN_BACK = ("segment_free", "segment_unmap")


@dataclass(frozen=True)
class Replay:
    """What became of a trace.

    Attributes:
        events: how many the trace has.
        mismatch: the first event at which the replay differs, and how; None if none does.
        allocated: bytes of the blocks handed out at the end, replayed less recorded;
            None where the recorded segments were not given.
        reserved: the same of the segments, by the events of the trace.
        peak_allocated: the most bytes handed out at once, as replayed: a trace has
            none to compare them with.
        peak_reserved: the same of the segments.
    """

    events: int
    mismatch: str | None
    allocated: int | None
    reserved: int
    peak_allocated: int = field(default=0, compare=False)
    peak_reserved: int = field(default=0, compare=False)


class _Replayed(CachingAllocator):
    """Puts its segments where the trace's lie, and tells which it takes and gives back."""

    def __init__(self, alloc_conf: str) -> None:
        nowhere = Upwards(1 << 60)  # for segments that the trace does not have
        super().__init__(alloc_conf=alloc_conf, placement=nowhere)
        self._ranges = nowhere
        self.place: int | None = None
        self.did: list[tuple[str, int, int]] = []

    def _place(self, size: int) -> int:
        place, self.place = self.place, None
        return super()._place(size) if place is None else place

    def _take(self, size: int, action: str, address: int, *where: Any) -> None:
        super()._take(size, action, address, *where)
        self.did.append((action, address, abs(size)))

    def address(self, handle: int) -> int:
        block = self._live[handle]
        if block is None:
            raise ValueError("the trace has a request of no bytes: the allocator notes none")
        return block.address


def replay_trace(
    trace: Iterable[Mapping[str, Any]],
    segments: Sequence[Mapping[str, Any]] | None = None,
    alloc_conf: str = "",
) -> Replay:
    """Replay a trace that begins on an empty card, and compare after every event.

    After a mismatch the replay goes on as well as it can, for the difference at the end.

    Args:
        trace: of one device, in the order in which things happened.
        segments: how the card's memory lay at the end, as
            ``torch.cuda.memory_snapshot()`` tells it: compared block by block.
        alloc_conf: the settings under which it was recorded; see
            `every_byte.allocator.config`.

    Raises:
        ValueError: an event lacks its action, address or size; `alloc_conf` is wrong.
    """
    card = _Replayed(alloc_conf)
    handles: dict[int, int] = {}  # address in the trace: handle
    taken: list[tuple[str, int, int]] = []  # by the trace, for the next request
    given: set[tuple[str, int, int]] = set()  # by the replay, not yet by the trace
    first: str | None = None
    reserved = 0
    number, where = -1, ""

    def differs(how: str) -> None:
        nonlocal first
        if first is None:
            first = f"{where}: {how}"

    for number, event in enumerate(trace):
        try:
            action, size = event["action"], event["size"]
            address = event["addr"] if action != "oom" else 0
        except KeyError as error:
            raise ValueError(
                f"event {number} of the trace has no {error}: expected an entry of "
                'torch.cuda.memory._snapshot()["device_traces"]'
            ) from None
        where = f"event {number}, {action} of {size:,} B at {address:#x}"
        if action in _GIVEN_BACK:
            if not given:  # somebody called empty_cache(), or memory ran out
                card.empty_cache()
                given = set(card.did)
                card.did.clear()
            if (action, address, size) not in given:
                differs("the replay keeps it")
            given.discard((action, address, size))
            reserved -= size
            continue
        if given:
            differs(f"before it, the replay gives back {_listed(given)} as well")
            given.clear()
        if action in _TAKEN:
            if not taken:
                card.place = address
            taken.append((action, address, size))
            reserved += size
        elif action == "alloc":
            handles[address] = handle = card.malloc(size, event.get("stream", 0))
            if card.did != taken:
                differs(f"for it, the replay takes {_listed(card.did)}, not {_listed(taken)}")
            if card.address(handle) != address:
                differs(f"replayed at {card.address(handle):#x}")
            taken, card.place = [], None
            card.did.clear()
        elif action == "free_completed":
            if address in handles:
                card.free(handles.pop(address))
            else:
                differs("nothing was allocated there: did the trace begin on an empty card?")
    if given:
        where = "the end"
        differs(f"the replay gives back {_listed(given)} as well")
    allocated = None
    if segments is not None:
        blocks = [b for s in segments for b in s["blocks"] if b["state"] != "inactive"]
        allocated = card.memory_allocated() - sum(b["size"] for b in blocks)
        if _layout(card.memory_snapshot()) != _layout(segments):
            where = "the end"
            differs("the blocks do not lie as they were recorded")
    return Replay(
        number + 1,
        first,
        allocated,
        card.memory_reserved() - reserved,
        card.max_memory_allocated(),
        card.max_memory_reserved(),
    )


def _listed(events: Iterable[tuple[str, int, int]]) -> str:
    return ", ".join(f"{a} of {s:,} B at {at:#x}" for a, at, s in sorted(events)) or "nothing"


def _layout(segments: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, bool]]:
    """Address, size and use of every block, in the order of their addresses."""
    return sorted(
        (b["address"], b["size"], b["state"] != "inactive") for s in segments for b in s["blocks"]
    )
