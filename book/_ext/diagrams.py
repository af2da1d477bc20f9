"""The diagrams of the page on the virtual GPU, drawn at each build; one of them stands twice.

``{pipeline}`` is the way of an operation through it, ``{requests}`` the allocator at ten
requests, each carried out by `every_byte.allocator` itself, and ``{ranks}`` what each of four
GPUs holds, by `every_byte.estimate`. All words are the page's own size on any screen: the
boxes and bars are HTML, in the theme's colours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte import estimate
from every_byte.allocator import CachingAllocator, SegmentInfo
from every_byte.allocator.config import kLargeBuffer, kMinBlockSize, kSmallBuffer
from every_byte.estimate import Setup
from every_byte.kinds import COLORS
from every_byte.units import GB, KiB, MiB, grouped

PAGE = "book/virtual_gpu"
RANKS_PAGE = "notebooks/10_beyond_one_gpu"

# The allocator


class Request(NamedTuple):
    """Something that a program asks for: to allocate bytes, to free a letter, or `empty_cache`."""

    what: str
    letter: str = ""
    nbytes: int = 0


REQUESTS = (
    Request("malloc", "A", 1000),
    Request("malloc", "B", 600 * KiB),
    Request("malloc", "C", 3 * MiB),
    Request("malloc", "D", 8 * MiB),
    Request("malloc", "E", 11 * MiB),
    Request("free", "C"),
    Request("free", "E"),
    Request("malloc", "F", 13 * MiB),
    Request("free", "D"),
    Request("empty_cache"),
)


class Block(NamedTuple):
    """A block as it is drawn: `asked` of its `size` bytes are what was asked for."""

    letter: str
    size: int
    asked: int


class Segment(NamedTuple):
    """A segment, small or large, and its blocks in order."""

    small: bool
    size: int
    blocks: list[Block]


class State(NamedTuple):
    """The allocator after a request, and what happened, in words."""

    title: str
    text: str
    segments: list[Segment]
    allocated: int
    reserved: int


def size(nbytes: int) -> str:
    """``'1,000 B'``, ``'2,047 KiB'``, ``'11.5 MiB'``, ``'9.91 MiB'``: whole where it can be."""
    if nbytes >= MiB and (nbytes % (MiB // 2) == 0 or nbytes >= 2 * MiB):
        return f"{nbytes / MiB:.4g} MiB"
    if nbytes >= KiB and nbytes % KiB == 0:
        return f"{nbytes // KiB:,} KiB"
    return f"{grouped(nbytes)} B"


def states(requests: Sequence[Request] = REQUESTS) -> list[State]:
    """What PyTorch's allocator, as the virtual GPU replays it, does with each request."""
    allocator = CachingAllocator()
    handles: dict[str, int] = {}
    places: dict[int, str] = {}  # address: letter
    found = []
    for request in requests:
        before, letter = allocator.memory_snapshot(), request.letter
        if request.what == "malloc":
            handles[letter] = allocator.malloc(request.nbytes)
            (address,) = _used(allocator.memory_snapshot()) - _used(before)
            places[address] = letter
            title = f"{letter} = malloc({size(request.nbytes)})"
            text = _allocated(request.nbytes, address, before, allocator.memory_snapshot())
        elif request.what == "free":
            address = next(where for where, name in places.items() if name == letter)
            allocator.free(handles.pop(letter))
            del places[address]
            title = f"free({letter})"
            text = _freed(address, before, allocator.memory_snapshot())
        else:
            allocator.empty_cache()
            title = "empty_cache()"
            text = _emptied(before, allocator.memory_snapshot())
        found.append(
            State(
                title,
                text,
                [_drawn(one, places) for one in _sorted(allocator.memory_snapshot())],
                allocator.memory_allocated(),
                allocator.memory_reserved(),
            )
        )
    return found


def _used(segments: Sequence[SegmentInfo]) -> set[int]:
    return {b["address"] for s in segments for b in s["blocks"] if b["state"] == "active_allocated"}


def _sorted(segments: Sequence[SegmentInfo]) -> list[SegmentInfo]:
    return sorted(segments, key=lambda one: (one["segment_type"] != "small", one["address"]))


def _drawn(segment: SegmentInfo, places: dict[int, str]) -> Segment:
    blocks = [
        Block(places.get(b["address"], ""), b["size"], b["requested_size"] if used else 0)
        for b in segment["blocks"]
        for used in [b["state"] == "active_allocated"]
    ]
    return Segment(segment["segment_type"] == "small", segment["total_size"], blocks)


def _allocated(
    nbytes: int, address: int, before: Sequence[SegmentInfo], after: Sequence[SegmentInfo]
) -> str:
    """Where a request went: its rounding, its segment, and what was split off."""
    (segment,) = [s for s in after if address in {b["address"] for b in s["blocks"]}]
    (got,) = [b["size"] for b in segment["blocks"] if b["address"] == address]
    known = {s["address"] for s in before}
    rounded = -(-nbytes // kMinBlockSize) * kMinBlockSize
    said = []
    if rounded > nbytes:
        said.append(f"Rounded up to {size(rounded)}, a multiple of {kMinBlockSize} B.")
    if segment["address"] in known:
        (held,) = [s for s in before if s["address"] == segment["address"]]
        (free,) = [
            b["size"] for b in held["blocks"] if b["address"] <= address < b["address"] + b["size"]
        ]
        said.append(f"A free block of {size(free)} serves it: nothing is reserved.")
    else:
        pool = "small" if segment["segment_type"] == "small" else "large"
        free = segment["total_size"]
        own = "of its own " if free not in (kSmallBuffer, kLargeBuffer) else ""
        pieces = sum(
            b["size"]
            for s in before
            if s["segment_type"] == segment["segment_type"]
            for b in s["blocks"]
            if b["state"] == "inactive"
        )
        if pieces >= rounded:
            said.append(f"{size(pieces)} are free, but in pieces.")
        said.append(
            f"No free block is large enough, so a segment {own}is reserved: {size(free)}, "
            f"in the {pool} pool."
        )
    if free > got:
        said.append(f"The rest, {size(free - got)}, is split off and stays free.")
    elif got > rounded:
        said.append(f"The rest, {size(got - rounded)}, is too little to split off: it is wasted.")
    return " ".join(said)


def _freed(address: int, before: Sequence[SegmentInfo], after: Sequence[SegmentInfo]) -> str:
    """What became of a block that was given back."""
    (had,) = [b["size"] for s in before for b in s["blocks"] if b["address"] == address]
    (now,) = [
        b["size"]
        for s in after
        for b in s["blocks"]
        if b["address"] <= address < b["address"] + b["size"]
    ]
    merged = f" It merges with its free neighbours to {size(now)}." if now > had else ""
    return f"Its {size(had)} are free again.{merged} The segment stays reserved."


def _emptied(before: Sequence[SegmentInfo], after: Sequence[SegmentInfo]) -> str:
    """What went back to the driver."""
    left = {s["address"] for s in after}
    gone = [s["total_size"] for s in before if s["address"] not in left]
    free = sum(b["size"] for s in after for b in s["blocks"] if b["state"] == "inactive")
    count = {0: "No segment is", 1: "One segment is"}.get(len(gone), f"{len(gone)} segments are")
    return (
        f"{count} free as a whole and given back to the driver, {size(sum(gone))} in all. "
        f"{size(free)} stay free in a segment that is still in use."
    )


# Many GPUs

MODEL, GPUS = "Llama-3.1-8B", 4
SCHEMES = {
    "DDP": "none",
    "ZeRO 1": "ZeRO 1",
    "ZeRO 2": "ZeRO 2",
    "ZeRO 3, FSDP": "ZeRO 3",
}
SPLIT = ("parameters", "gradients", "optimizer_states")


class Part(NamedTuple):
    """A kind of memory on one GPU: its bytes, and which share of all it is."""

    kind: str
    nbytes: int
    share: float
    whole: bool


def ranks() -> dict[str, list[Part]]:
    """What each of four GPUs holds of an 8B that AdamW trains in BF16, by scheme."""
    dims = estimate.dimensions(MODEL)

    def held(sharding: str) -> dict[str, int]:
        setup = Setup(dtype="bf16", optimizer="adamw", gpus=GPUS, sharding=sharding)
        memory = estimate.memory(dims, setup)
        return {kind: getattr(memory, kind) for kind in SPLIT}

    whole = held("none")
    total = sum(whole.values())
    return {
        scheme: [
            Part(kind.replace("_", " "), nbytes, nbytes / total, nbytes == whole[kind])
            for kind, nbytes in held(sharding).items()
        ]
        for scheme, sharding in SCHEMES.items()
    }


# The directives


def rendered(template: str, **values: object) -> list[nodes.Node]:
    """The HTML of a template beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    html = environment.get_template(template).render(**values, colors=COLORS)
    return [nodes.raw("", html, format="html")]


class Pipeline(SphinxDirective):
    """``{pipeline}``: the way of an operation through the virtual GPU."""

    def run(self) -> list[nodes.Node]:
        """Boxes, one under the other."""
        return rendered("pipeline.html")


class Requests(SphinxDirective):
    """``{requests}``: ten requests, one picture each; allocator.js shows one at a time."""

    def run(self) -> list[nodes.Node]:
        """All of them, in order."""
        return rendered(
            "requests.html",
            states=states(),
            size=size,
            grouped=grouped,
            scale={True: kSmallBuffer, False: kLargeBuffer},
        )


class Ranks(SphinxDirective):
    """``{ranks}``: what each of four GPUs holds. Its content is for who reads it elsewhere."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """A row for each scheme, a column for each GPU."""
        return rendered(
            "ranks.html",
            schemes=ranks(),
            gpus=GPUS,
            model=MODEL,
            gb=lambda nbytes: f"{nbytes / GB:.1f}",
        )


def add_files(app: Sphinx, page: str, *_: object) -> None:
    """Load the diagrams' style and script only where they stand."""
    if page in (PAGE, RANKS_PAGE):
        app.add_css_file("diagrams.css")
    if page == PAGE:
        app.add_js_file("allocator.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("pipeline", Pipeline)
    app.add_directive("requests", Requests)
    app.add_directive("ranks", Ranks)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
