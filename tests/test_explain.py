"""Out-of-memory messages of public threads, taken apart and judged."""

import argparse
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from every_byte.allocator import OutOfMemoryError
from every_byte.commands import Refused
from every_byte.commands.explain import add, shown
from every_byte.explain import CURES, NAMES, Explanation, Message, explain, parse
from every_byte.units import GiB, KiB, MiB

ROOT = Path(__file__).parent.parent


def old(tried: str, total: str, allocated: str, free: str, reserved: str) -> str:
    """As torch 1.4 to 2.0 write it; up to 1.3 the last is "cached"."""
    rest = reserved if "cached" in reserved else f"{reserved} reserved in total by PyTorch"
    return (
        f"RuntimeError: CUDA out of memory. Tried to allocate {tried} (GPU 0; {total} total "
        f"capacity; {allocated} already allocated; {free} free; {rest})"
    )


def new(
    tried: str,
    total: str,
    free: str,
    allocated: str,
    rest: str,
    processes: str = "",
    backend: str = "CUDA",
    capacity: str = "capacity",
) -> str:
    """As torch 2.1 and newer write it; 2.1 writes "capacty"."""
    return (
        f"torch.OutOfMemoryError: {backend} out of memory. Tried to allocate {tried}. GPU 0 has a "
        f"total {capacity} of {total} of which {free} is free. {processes}Of the allocated memory "
        f"{allocated} is allocated by PyTorch, and {rest} is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF="
        "expandable_segments:True to avoid fragmentation.  See documentation for Memory Management"
    )


def this(in_use: str) -> str:
    return f"Including non-PyTorch memory, this process has {in_use} memory in use. "


# Of public threads, with their parts and the verdict by the figures: see the file's head.
MESSAGES = tomllib.loads((ROOT / "tests/data/oom_messages.toml").read_text("utf-8"))["message"]
IN_PIECES = next(m["text"].strip() for m in MESSAGES if m["verdict"] == "in pieces")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 2**10, "MB": 2**20}
UNITS["GB"] = 2**30


def nbytes(said: str) -> int:
    """A figure of the file's parts in bytes."""
    number, unit = said.split()
    return round(float(number) * UNITS[unit])


@pytest.mark.parametrize("told", MESSAGES, ids=lambda told: told["thread"])
def test_a_message_of_a_public_thread_is_taken_apart_and_judged(told: dict[str, Any]) -> None:
    text = told["text"].strip()
    found = explain(text)
    assert found.verdict == told["verdict"], found.because
    if "parts" not in told:
        assert (found.message, found.cures) == (None, ())
        return
    assert found.because and len(set(found.cures)) == len(found.cures) > 1
    (message,) = parse(text)
    parts = {name: nbytes(said) for name, said in told["parts"].items() if name != "others"}
    if "unallocated" in parts:
        parts["reserved"] = parts["allocated"] + parts.pop("unallocated")
    if "other" in parts:
        parts["in_use"] = parts["allocated"] + parts.pop("other")
    for field in (*NAMES, "others"):
        wanted = parts.get(field) if field != "others" else ()
        if field == "others":
            wanted = tuple(nbytes(said) for said in told["parts"].get("others", ()))
        assert getattr(message, field) == wanted, field
    # The same among the lines of a log, folded by a terminal in a box, and quoted.
    log = (
        f"Traceback (most recent call last):\n│ x = y\n{text.replace('. ', '.  │' + chr(10))}\nbye"
    )
    assert explain(log) == found


def test_there_are_enough_of_them() -> None:
    assert len([told for told in MESSAGES if "parts" in told]) >= 70
    assert len({told["version"] for told in MESSAGES}) >= 20
    assert {told["verdict"] for told in MESSAGES} == {
        *("too big", "in pieces", "another process", "a context", "unknown"),
    }


def one(thread: str) -> Message:
    """What the message of a thread says."""
    (found,) = parse(next(told["text"] for told in MESSAGES if thread in told["thread"]))
    return found


def test_who_ran_out_and_on_which_card_is_told() -> None:
    assert (one("59778").backend, one("59778").device) == ("CUDA", 0)
    assert (one("2118").backend, one("Self_Explaining").backend) == ("HIP", "PyTorch")
    assert (one("mesh").backend, one("mesh").device) == ("JAX", 0)
    assert (one("EasyDeL").backend, one("xpu-ops/issues/2392").backend) == ("TPU", "XPU")
    assert (one("7440").backend, one("Open-Sora").backend) == ("MPS", "driver")
    absurd = new("2.00 GiB", "8.00 GiB", "1.00 GiB", "5.00 GiB", f"{'9' * 15} GiB")
    assert parse(absurd)[0].reserved is None  # no memory is as large: not a figure


def test_what_else_a_message_tells_is_assumed_aloud() -> None:
    found = explain(next(told["text"] for told in MESSAGES if "meshgen" in told["thread"]))
    assert (
        found.assumed == "the driver lends the host's memory: PyTorch holds more than the card has"
    )
    found = explain(next(told["text"] for told in MESSAGES if "Mask2DiT" in told["thread"]))
    assert found.assumed == "the process that holds 53.16 GiB is this one"
    assert found.message is not None
    assert (found.message.in_use, found.message.others) == (round(53.16 * GiB), ())


def test_the_message_of_the_measured_card_is_judged() -> None:
    record = json.loads((ROOT / "book/records/nvidia-h200-torch-2.11.0.json").read_text("utf-8"))
    text = record["experiments"]["out-of-memory"]["messages"]["at the error"]
    found = explain(text)
    assert found.verdict == "in pieces"  # Troubleshooting shows which
    assert found.message is not None
    assert found.message.others[-1] == round(3.54 * GiB) and len(found.message.others) == 7
    figures = record["experiments"]["out-of-memory"]["checkpoints"]["at the error"]
    assert found.message.allocated == figures["memory_allocated"]
    assert found.message.reserved == figures["memory_reserved"]


def test_what_grows_from_message_to_message_is_a_leak() -> None:
    log = [new("20.00 MiB", "7.50 GiB", "1.00 MiB", f"{n}.00 GiB", "9.00 MiB") for n in (5, 6, 7)]
    assert explain("\n".join(log)).verdict == "a leak"
    assert explain("\n".join(log[::-1])).verdict == explain(log[0]).verdict == "too big"
    assert explain("\n".join(log[:2])).verdict == "too big"  # two may be chance


sizes = st.integers(0, 2**45)


@given(tried=sizes, free=sizes, allocated=sizes, cached=sizes, context=sizes,
       allowed=st.none() | sizes)  # fmt: skip
def test_our_own_message_comes_back(
    tried: int, free: int, allocated: int, cached: int, context: int, allowed: int | None
) -> None:
    reserved = allocated + cached
    capacity = free + reserved + context
    error = OutOfMemoryError(tried, capacity, allocated, reserved, context, allowed)
    (found,) = parse(f"every_byte.OutOfMemoryError: {error}\n")
    wanted = {
        "tried": tried,
        "capacity": capacity,
        "free": free,
        "in_use": context + reserved,
        "allowed": allowed,
        "allocated": allocated,
    }
    for field, nbytes in wanted.items():
        told = getattr(found, field)
        assert (told is None) == (nbytes is None)
        if nbytes is not None:  # two decimals of its unit are printed
            unit = next((u for u in (GiB, MiB, KiB) if nbytes > u), 1)
            assert abs(told - nbytes) <= 0.005 * unit + 1, field
    assert (found.device, found.others) == (0, ())
    verdict = explain(str(error)).verdict
    if tried > 1.01 * min(capacity, capacity if allowed is None else allowed) + MiB:
        assert verdict == "too big"


pieces = st.sampled_from(
    [
        *("CUDA out of memory. ", "HIP out of memory", "MPS backend out of memory (", "0 bytes"),
        *("Tried to allocate ", "9.99 GiB", "RESOURCE_EXHAUSTED: Out of memory", " free", "GPU 7 "),
        *(
            "Of the allocated memory ",
            " is allocated by PyTorch",
            " allowed",
            "1e999 GiB",
            "-1 MiB",
        ),
        *("Process 3 has ", " memory in use", "has a total capacity of ", "of which ", " is free"),
        *("9" * 400, " GiB", "\0", "<script>", "CUDA error: out of memory", "\n", " cached)"),
    ]
)


@given(st.text() | st.lists(pieces | st.text(max_size=5), max_size=30).map("".join))
def test_hostile_text_never_raises(text: str) -> None:
    found = explain(text)
    assert isinstance(found, Explanation)
    assert "<script>" not in shown(found)
    json.dumps(found.because)


def test_a_long_log_is_read_from_its_end() -> None:
    text = "x" * 3_000_000 + IN_PIECES + "\n" * 1000
    assert explain(text).verdict == "in pieces"
    assert explain("9" * 2_000_000 + "CUDA out of memory " * 1000).verdict == "unknown"


# The command


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers(required=True))
    options = parser.parse_args(["explain", *arguments])
    status: int = options.run(options)
    return status


def test_the_command_takes_an_argument_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = IN_PIECES
    assert run(*text.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Verdict: in pieces\nBecause: 2.30 GiB are reserved by PyTorch")
    assert re.search(r"^  tried to allocate +1\.70 GiB$", printed, re.MULTILINE)
    assert "\n  1. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in printed
    log = tmp_path / "log.txt"
    log.write_bytes(b"\xff\xfe" + text.encode())
    assert run("--file", str(log)) == 0
    assert capsys.readouterr().out == printed
    for arguments in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert run(*arguments) == 0
        assert capsys.readouterr().out == printed
    assert run("--json", text) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "in pieces"
    assert found["message"]["tried"] == round(1.7 * GiB)
    assert found["cures"][0].keys() == {"do", "why", "chapter", "section"}


def test_what_is_not_recognised_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Killed") == 1
    assert capsys.readouterr().out == (
        "Verdict: unknown\n"
        "Because: no out-of-memory message of PyTorch, CUDA, ROCm or JAX is in it\n"
    )
    with pytest.raises(Refused, match="No such file or directory; name a log"):
        run("--file", str(tmp_path / "none"))
    with pytest.raises(Refused, match="expected one of them"):
        run("--file", "a", "b")


def test_every_cure_names_a_place_of_the_book_that_exists() -> None:
    for cure in CURES.values():
        source = (ROOT / "notebooks" / f"{cure.chapter}.py").read_text("utf-8")
        assert not cure.section or f'<a id="{cure.section}"></a>' in source, cure
        assert cure.do.endswith((".", ").")) and cure.why.endswith("."), cure
