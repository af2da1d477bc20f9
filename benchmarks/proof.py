"""Prove the replay: everything that was measured on a card, beside what is replayed.

``python -m benchmarks.proof`` prints a table, and fails where a figure is worse than its gate:
the goal where it is reached, else what was reached so far, so that nothing becomes worse. It
also fails where the replays that the book shows are not what the rules give now; ``--write``
brings them up to date. Left out of the single operations: convolutions, linear algebra, FFT.
"""

import argparse
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import printed, published
from every_byte.allocator import Recorded
from every_byte.gpu import VirtualGPU
from every_byte.units import MiB
from helpers import signatures, workloads
from helpers.measured import Figures, cause_of, of_workloads, peak_off
from helpers.record import compared, replays_of

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "h200-torch-2.11"
RECORD = ROOT / "book" / "records" / "nvidia-h200-torch-2.11.0.json"
SHOWN = ROOT / "book" / "records" / "replayed" / "proof.json"
CARD, TORCH = "H200", "2.11"

# cuBLAS's and cuBLASLt's: they come with whichever product is the first of a group.
_WORKSPACES = (32 * MiB, 1 * MiB)
_PRODUCT = re.compile(
    r"^aten\.(mm|addmm|bmm|baddbmm|mv|_scaled_mm|_int_mm)\.|^bitsandbytes\.gemm_4bit\."
)
# Libraries whose choices nothing says beforehand.
_NOT_COVERED = re.compile(r"conv|linalg_(?!vector_norm)|_linalg|_fft")


def _own(sizes: list[int]) -> list[int]:
    """Events without the blocks of others that were freed meanwhile: bitsandbytes runs Python."""
    found, taken = [], Counter[int]()
    for size in sizes:
        taken[abs(size)] += 1 if size > 0 else -1
        if taken[abs(size)] >= 0:
            found.append(size)
        else:
            taken[abs(size)] = 0
    return found


ASSUMING = (
    *("*-mask", "*-eager", "*adafactor*", "bnb-*", "*-int8-*", "*-qlora-*", "*-amp-*", "*-lora-*"),
)
CONVOLUTIONS = ("tv-resnet*", "tv-vgg*", "tv-mobilenet*", "unet-*", "lstm")
"""Names of runs by what the goals say of them; the others are transformers."""


class Goal(NamedTuple):
    """A line of the table: what was reached, what is aimed at, and what must hold."""

    about: str
    reached: float
    goal: float
    gate: float  # the goal, or what was reached before
    more: bool  # whether more is better
    shown: Callable[[float], str]

    @property
    def holds(self) -> bool:
        """Whether it is no worse than its gate."""
        return self.reached >= self.gate if self.more else self.reached <= self.gate

    @property
    def met(self) -> bool:
        """Whether the goal itself is reached."""
        return self.reached >= self.goal if self.more else self.reached <= self.goal


def equal(one: signatures.Measured, events: list[int]) -> bool:
    """Whether events are one of the variants measured; of products, workspaces apart."""
    if one.operation.startswith("bitsandbytes."):
        one = replace(one, variants=list(map(_own, one.variants)))
    if not _PRODUCT.match(one.operation):
        return events in one.variants

    def kept(sizes: list[int]) -> list[int]:
        return [size for size in sizes if size not in _WORKSPACES]

    return any(kept(variant) == kept(events) for variant in one.variants)


def operations() -> tuple[Counter[str], Counter[str], list[tuple[str, str]]]:
    """All and the equal signatures of single operations by group, and those that differ."""
    every, same, others = Counter[str](), Counter[str](), []
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        for one in signatures.measured(DATA / "kernels.json.xz"):
            if not one.group.startswith("single operations"):
                continue
            if _NOT_COVERED.search(one.operation.removeprefix("aten.")):
                continue
            every[one.group] += 1
            try:
                events = signatures.replayed(gpu, one.signature)
            except signatures.Unread as error:
                others.append((one.signature, str(error)))
                continue
            if equal(one, events):
                same[one.group] += 1
            else:
                others.append((one.signature, f"{events}, measured {one.variants[0]}"))
    return every, same, others


def replayed_workloads() -> dict[str, Figures]:
    """Those that are replayed: their figures at each checkpoint; what is lacking is said."""
    measured, found = of_workloads(), {}
    for name in workloads.WORKLOADS:
        try:
            left_over = measured[name]["left over"]
            found[name] = workloads.replayed(name, CARD, TORCH, left_over)
        except (ImportError, NotImplementedError) as error:
            print(f"{name:32}not replayed: {error}", flush=True)
    return found


def at_the_drivers_addresses(runs: dict[str, Figures]) -> dict[str, Figures]:
    """Those that are off, again with each segment where the driver placed it.

    They ran in processes that had run others before, so that the driver filled holes that
    their traces do not show: only there does its rule, as we know it, lead elsewhere.
    """
    measured, found = of_workloads(), {}
    for name in runs:
        if any(map(any, off(name, runs[name]))) and (segments := measured[name].get("segments")):
            placed = Recorded(_addresses(segments))
            left_over = measured[name]["left over"]
            found[name] = workloads.replayed(name, CARD, TORCH, left_over, placed)
    return found


def _addresses(steps: list[int]) -> Iterator[tuple[int, int]]:
    """Address and size of each segment from their file, in steps of 2 MiB."""
    address = 0
    for step, size in zip(steps[::2], steps[1::2], strict=True):
        address += step
        yield address * 2 * MiB, size * 2 * MiB


def replayed_series() -> list[list[int]]:
    """What the programs of published series take at each of their sizes."""
    return [[published.peak(one, n) for n in one["sizes"]] for one in published.all_series()]


def replayed_rows() -> list[list[str]]:
    """What programs of others print here that printed to some digits."""
    return [printed.said(row) for row in printed.all_rows()]


def of(names: Iterator[str] | dict[str, Any], *patterns: str) -> list[str]:
    """The names that one of the patterns fits."""
    return [name for name in names if any(fnmatch(name, p) for p in patterns)]


def off(name: str, found: Figures) -> Iterator[tuple[int, int, int, int]]:
    """Replayed less measured at each checkpoint, figure by figure."""
    for checkpoint, row in of_workloads()[name]["checkpoints"].items():
        yield tuple(a - b for a, b in zip(found[checkpoint], row, strict=True))


def worst(runs: dict[str, Figures], names: list[str], figure: int, relative: bool = False) -> float:
    """The largest difference of a figure in any of these runs: bytes, or a share."""
    largest = 0.0
    for name in names:
        told = of_workloads()[name]["checkpoints"]
        for checkpoint, row in told.items():
            nbytes = abs(runs[name][checkpoint][figure] - row[figure])
            largest = max(largest, nbytes / row[figure] if relative and nbytes else float(nbytes))
    return largest


def whole(number: float) -> str:
    """Bytes, or a count."""
    return f"{number:,.0f}"


def share(number: float) -> str:
    """A share in percent."""
    return f"{number:.2%}"


def peak_of(runs: dict[str, Figures], names: list[str], goal: float, gate: float) -> list[Goal]:
    """The line of the peaks of these runs, if there are any."""
    if not names:
        return []
    return [Goal("of these, peak", worst(runs, names, 2, True), goal, gate, False, share)]


def _replayed(about: str, done: list[str], every: list[str], gate: int) -> Goal:
    return Goal(f"{about}: of {len(every)} replayed", len(done), len(every), gate, True, whole)


def goals(
    runs: dict[str, Figures],
    placed: dict[str, Figures],
    series: list[list[int]],
    rows: list[list[str]],
    operations: float,
) -> list[Goal]:
    """The table: what was reached beside its goal and its gate; `placed`, by the driver."""
    record, again = (json.loads(p.read_text("utf-8")) for p in (RECORD, replays_of(RECORD)))
    figures = [
        nbytes
        for row in compared(record["experiments"], again["experiments"])
        for nbytes in row.difference.values()
    ]
    measured = of_workloads()
    assuming, convolutions = of(measured, *ASSUMING), of(measured, *CONVOLUTIONS)
    plain = [n for n in runs if n not in (*assuming, *convolutions)]
    exact = [
        published.as_printed(nbytes) == told
        for one, row in zip(published.all_series(), series, strict=True)
        for nbytes, told in zip(row, one["printed"], strict=True)
    ]
    digits = [
        said == told
        for one, row in zip(printed.all_rows(), rows, strict=True)
        for said, told in zip(row, one["printed"], strict=True)
    ]
    done = [name for name in assuming if name in runs]
    networks = [name for name in convolutions if name in runs]
    reserved = sum(worst(runs, [name], 1) == 0 for name in plain)
    given = runs | placed
    every = [name for name in (*plain, *done) if not name.startswith("tv-")]  # no convolutions
    whole_runs = [peak_off(measured[n]["checkpoints"], runs[n]) for n in networks] or [0.0]
    lines = [
        Goal("record, figures that differ", sum(map(bool, figures)), 0, 68, False, whole),
        Goal("record, largest difference (B)", max(map(abs, figures)), 0, 66_560, False, whole),
        Goal("transformers, allocated (B)", worst(runs, plain, 0), 0, 4_325_376, False, whole),
        Goal("transformers, peak (B)", worst(runs, plain, 2), 0, 6_422_528, False, whole),
        Goal(f"of {len(plain)}, reserved equal", reserved, len(plain) // 2 + 1, 21, True, whole),
        Goal("transformers, reserved", worst(runs, plain, 1, True), 0.002, 0.0064, False, share),
        # What is left of these is LoRA's: another peft casts its adapters at another moment.
        *(
            Goal(
                f"at the driver's addresses, {name} (B)",
                worst(given, every, n),
                0,
                gate,
                False,
                whole,
            )
            for n, (name, gate) in enumerate(
                (("allocated", 512), ("reserved", 2_097_152), ("peak", 197_120))
            )
        ),
        *(
            Goal(f"there, {about}", worst(given, names, n, True), goal, goal, False, share)
            for about, names, n, goal in (
                ("transformers, reserved", [n for n in every if n in plain], 1, 0.002),
                ("masks, 8 and 4 bits, peak", [n for n in every if n in done], 2, 0.001),
            )
        ),
        _replayed("masks, 8 and 4 bits", done, assuming, 9),
        *peak_of(runs, done, 0.001, 0.008),
        _replayed("convolutions", networks, convolutions, 8),
        *peak_of(runs, networks, 0.01, 0.022),  # at rest, too, where a block more is much
        Goal("of whole runs, peak too high", max(whole_runs), 0.01, 0.01, False, share),
        Goal("of whole runs, peak too low", -min(whole_runs), 0.005, 0.005, False, share),
        Goal("single operations equal", operations, 0.98, 0.996, True, share),
        Goal(f"published: equal of {len(exact)}", sum(exact), 185, 188, True, whole),
        Goal(f"printed: equal of {len(digits)}", sum(digits), len(digits), 11, True, whole),
    ]
    return lines


def _print_differences(name: str, found: Figures) -> None:
    largest = [max(column, key=abs) for column in zip(*off(name, found), strict=True)]
    print(f"{name:32}" + "".join(f"{nbytes:16,}" for nbytes in largest))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__)
    parser.add_argument("--list", action="store_true", help="how each operation differs")
    parser.add_argument("--write", action="store_true", help="bring the book's replays up to date")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast
    if find_spec("transformers") is None:
        print("transformers is not installed: make proof replays its models", file=sys.stderr)
        return 2
    print(f"{CARD}, torch {TORCH}: measured against replayed\n")
    every, same, others = operations()
    for group, number in every.items():
        print(f"{group:32} {same[group]:5} of {number:5} signatures equal")
    for signature, how in others:
        print(f"  {signature[:160]}\n    {cause_of(signature)}")
        if asked.list:
            print(f"    {how[:200]}")
    print("\nlargest difference at any checkpoint, in bytes: allocated, reserved, and their peaks")
    runs = replayed_workloads()
    for name, found in runs.items():
        _print_differences(name, found)
    placed = at_the_drivers_addresses(runs)
    print("\nof these again, each segment where the driver placed it")
    for name, found in placed.items():
        _print_differences(name, found)
    series = replayed_series()
    rows = replayed_rows()
    made: dict[str, Any] = {"workloads": runs, "placed": placed, "series": series}
    made |= {"printed": rows, "operations": sum(every.values())}
    made["others"] = [signature for signature, _ in others]
    if asked.write:
        SHOWN.write_text(json.dumps(made, separators=(",", ":")) + "\n", "utf-8")
    lines = goals(runs, placed, series, rows, sum(same.values()) / sum(every.values()))
    print(f"\n{'':44}{'reached':>16}{'goal':>16}{'gate':>16}")
    for line in lines:
        numbers = (line.reached, line.goal, line.gate)
        columns = "".join(f"{line.shown(number):>16}" for number in numbers)
        state = "" if line.met else "  goal missed" if line.holds else "  WORSE than its gate"
        print(f"{line.about:44}{columns}{state}")
    if stale := json.loads(SHOWN.read_text("utf-8")) != made:
        print(f"\n{SHOWN.name}: the book shows other replays: python -m benchmarks.proof --write")
    return 0 if all(line.holds for line in lines) and not stale else 1


if __name__ == "__main__":
    sys.exit(main())
