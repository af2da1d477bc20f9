"""``every-byte replay``: a recorded snapshot, again on the model of the allocator."""

import argparse
import json
import pickle
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from every_byte.allocator import replay_trace
from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.units import GB, GiB, MiB, binary, grouped

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

EXPECTED = "expected what torch.cuda.memory._dump_snapshot wrote, or the same as JSON"

# A snapshot may come from anybody. A hundred bytes of pickle can ask for a table of 2**32 places,
# and say of one list a million times that it is among the traces: so what is read is bounded by
# the file, and the file by this.
LARGEST_FILE = 2 * GiB
TIMES, MORE = 32, 256 * MiB  # memory to read it: a recorded event takes 6 times its bytes
HIGHEST = 2**63  # of numbers: addresses and sizes are below


def add(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "replay",
        run,
        "replay a recorded memory snapshot, and compare it event by event",
        "The snapshot is what torch.cuda.memory._dump_snapshot wrote, recorded from an empty "
        "card on, or the same as JSON. Nothing in it is executed. Exits with 1 where the "
        "replay differs.",
    )
    parser.add_argument("trace", type=Path, help="the file, such as snapshot.pickle")
    parser.add_argument("--device", type=int, help="number of the GPU; the only one with events")
    parser.add_argument(
        "--alloc-conf", help="PYTORCH_ALLOC_CONF of the recording; the one that the file names"
    )


def run(options: argparse.Namespace) -> int:
    """Replay the trace of one device, and print how the replay compares."""
    snapshot = read(options.trace)
    try:
        traces, told, settings = _checked(snapshot)
        device = _device(traces, options.device)
        alloc_conf = settings if options.alloc_conf is None else options.alloc_conf
        segments = [segment for segment in told if segment["device"] == device]
        replay = replay_trace(traces[device], segments, alloc_conf)
    except ValueError as error:
        raise Refused(f"{options.trace}: {error}") from None
    found = {
        "device": device,
        "alloc_conf": alloc_conf,
        "events": replay.events,
        "mismatch": replay.mismatch,
        "peak_allocated": replay.peak_allocated,
        "peak_reserved": replay.peak_reserved,
        "allocated_difference": replay.allocated,
        "reserved_difference": replay.reserved,
    }
    agrees = replay.mismatch is None and not replay.allocated and not replay.reserved
    if options.json:
        print_json({"agrees": agrees, **found})
        return DONE if agrees else NO
    print(f"device {device}, {replay.events:,} events, allocator settings: {alloc_conf or 'none'}")
    print(f"peak allocated {_bytes(replay.peak_allocated)}, replayed")
    print(f"peak reserved  {_bytes(replay.peak_reserved)}, replayed")
    if agrees:
        print("The replay agrees with every event, and with how memory lay at the end.")
    else:
        print(f"The replay differs: {replay.mismatch}")
        for what, more in (("allocated", replay.allocated), ("reserved", replay.reserved)):
            print(f"{what} at the end, replayed less recorded: {more or 0:,} B")
    return DONE if agrees else NO


def _bytes(nbytes: int) -> str:
    return f"{nbytes / GB:.3f} GB ({grouped(nbytes)} B)"


class _PlainUnpickler(pickle.Unpickler):
    """Lists, tuples, dicts, strings, numbers: what names a class or a function is refused.

    Without a callable no pickle can do more than build such values: every opcode that
    finds one asks `find_class` (``Lib/pickle.py``, "Restricting Globals").
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        asked = "".join(c for c in f"{module}.{name}"[:80] if c.isprintable())
        raise pickle.UnpicklingError(f"it asks for {asked}, and is not read further")


def read(path: Path) -> Any:
    """The snapshot in a file: JSON, or a pickle of nothing but plain values.

    Raises:
        Refused: there is no such file, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise Refused(
            f"{path} is larger than {binary(LARGEST_FILE)}: expected less; record fewer events, by "
            "max_entries of torch.cuda.memory._record_memory_history"
        )
    try:
        with _at_most(TIMES * len(content) + MORE):
            if content.lstrip()[:1] in (b"{", b"["):
                snapshot = json.loads(content)
            else:
                snapshot = _PlainUnpickler(BytesIO(content)).load()
    except MemoryError:
        raise Refused(
            f"{path} cannot be read (its {len(content):,} bytes ask for more memory than "
            f"{binary(TIMES * len(content) + MORE)}): {EXPECTED}"
        ) from None
    except Exception as error:  # what a damaged pickle raises is as manifold as its damages
        said = " ".join(str(error).split()) or type(error).__name__
        raise Refused(f"{path} cannot be read ({said}): {EXPECTED}") from None
    try:
        _check_counts(snapshot, len(content))
    except ValueError as error:
        raise Refused(f"{path}: {error}") from None
    return snapshot


@contextmanager
def _at_most(nbytes: int) -> Iterator[None]:
    """Let no more memory be taken meanwhile, where the system can see to it: Linux.

    Raises:
        MemoryError: more was asked for.
    """
    taken = Path("/proc/self/statm")  # in pages, the addresses first: proc(5)
    if resource is None or not taken.is_file():
        yield
        return
    addresses = int(taken.read_text("ascii").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [addresses + nbytes, *(limit for limit in (soft, hard) if limit >= 0)]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _check_counts(snapshot: Any, nbytes: int) -> None:
    """Refuse more traces, events, segments and blocks than a file of so many bytes can write down.

    Raises:
        ValueError: there are more: one list stands in many places.
    """
    if not isinstance(snapshot, dict):
        return
    traces, segments = snapshot.get("device_traces"), snapshot.get("segments")
    outer = [found for found in (traces, segments) if isinstance(found, list)]
    count = sum(map(len, outer))
    if count <= nbytes:
        inner = [entry for found in outer for entry in found]
        inner = [e.get("blocks") if isinstance(e, dict) else e for e in inner]
        count += sum(len(entry) for entry in inner if isinstance(entry, list))
    if count > nbytes:
        raise ValueError(f"it says {count:,} events and blocks in {nbytes:,} bytes: {EXPECTED}")


def _checked(snapshot: Any) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]], str]:
    """The traces of the devices, the segments and the settings, each of the type it should be.

    Raises:
        ValueError: something is missing or of another type.
    """
    if not isinstance(snapshot, dict) or not {"device_traces", "segments"} <= snapshot.keys():
        raise ValueError(f"it has no device_traces and segments: {EXPECTED}")
    traces, segments = snapshot["device_traces"], snapshot["segments"]
    for trace in _lists("device_traces", traces):
        for number, event in enumerate(_dicts("a device's trace", trace)):
            _typed(f"event {number}", event, action=str, size=int, addr=int, stream=int)
            if not event.get("action", "_").isidentifier():  # it is printed
                raise ValueError(f"event {number} has action {_short(event['action'])}: {EXPECTED}")
    for segment in _dicts("segments", segments):
        _typed("a segment", segment, device=int)
        for block in _dicts("a segment's blocks", segment.get("blocks")):
            for name in ("address", "size", "state"):
                if name not in block:
                    raise ValueError(f"a block has no {name}: {EXPECTED}")
            _typed("a block", block, address=int, size=int, state=str)
        segment.setdefault("device", 0)
    settings = snapshot.get("allocator_settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"allocator_settings is {type(settings).__name__}: {EXPECTED}")
    text = settings.get("PYTORCH_ALLOC_CONF") or settings.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if not text and settings.get("expandable_segments") is True:  # set by a call, not a variable
        text = "expandable_segments:True"
    if not isinstance(text, str):
        raise ValueError(f"PYTORCH_ALLOC_CONF is {_short(text)}: {EXPECTED}")
    return traces, segments, text


def _lists(what: str, found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"{what}: a list was expected, not {type(found).__name__}; {EXPECTED}")
    return found


def _dicts(what: str, found: Any) -> list[dict[str, Any]]:
    for entry in _lists(what, found):
        if not isinstance(entry, dict):
            raise ValueError(f"{what}: a dict was expected, not {_short(entry)}; {EXPECTED}")
    return found


def _typed(what: str, entry: dict[str, Any], **types: type) -> None:
    for name, kind in types.items():
        if name not in entry:
            continue
        found = entry[name]
        if type(found) is not kind or (isinstance(found, int) and not 0 <= found < HIGHEST):
            raise ValueError(f"{what} has {name} {_short(found)}: {EXPECTED}")


def _short(found: object) -> str:
    """A value for a message; of a list only the beginning is looked at."""
    try:
        return reprlib.repr(found)[:40]
    except ValueError:
        return "a number of more digits than Python writes"


def _device(traces: list[list[Any]], chosen: int | None) -> int:
    with_events = [number for number, trace in enumerate(traces) if trace]
    if chosen is not None:
        if chosen not in range(len(traces)):
            raise ValueError(f"device is {chosen}: the file has {len(traces)} devices, from 0 on")
        return chosen
    if len(with_events) > 1:
        several = ", ".join(map(str, with_events))
        raise ValueError(f"devices {several} have events: choose one by --device")
    if not with_events:
        raise ValueError(
            "no device has events: record with torch.cuda.memory._record_memory_history()"
        )
    return with_events[0]
