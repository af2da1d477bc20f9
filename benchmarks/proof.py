"""Prove the replay: everything that was measured on a card, beside what is replayed.

``python -m benchmarks.proof`` prints a table, and fails where less than `GOAL` of the single
operations are equal. Left out of these: convolutions, linear algebra, FFT.
"""

import argparse
import json
import lzma
import re
import sys
import warnings
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import signatures, workloads
from every_byte.gpu import VirtualGPU
from every_byte.units import MiB

DATA = Path(__file__).parent.parent / "tests" / "data" / "h200-torch-2.11"
CARD, TORCH = "H200", "2.11"
GOAL = 0.98  # of the single operations

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


def measured_workloads() -> dict[str, Any]:
    """The figures of the runs that were measured, by name."""
    with lzma.open(DATA / "workloads.json.xz", "rt") as file:
        found: dict[str, Any] = json.load(file)["workloads"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__)
    parser.add_argument("--list", action="store_true", help="every operation that differs")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    print(f"{CARD}, torch {TORCH}: measured against replayed\n")
    every, same, others = operations()
    for group, number in every.items():
        print(f"{group:32} {same[group]:5} of {number:5} signatures equal")
    share = sum(same.values()) / sum(every.values())
    print("without convolutions, linear algebra, and FFT:")
    print(f"{'all':32} {sum(same.values()):5} of {sum(every.values()):5} = {share:.2%}")
    if asked.list:
        for signature, how in others:
            print(f"  {signature[:160]}\n    {how[:200]}")
    print("\nlargest difference at any checkpoint, in bytes: allocated, reserved, and their peaks")
    if find_spec("transformers") is not None:
        for name in workloads.WORKLOADS:
            told = measured_workloads()[name]
            try:
                found = workloads.replayed(name, CARD, TORCH, told["left over"])
            except (ImportError, NotImplementedError) as error:
                print(f"{name:32}not replayed: {error}", flush=True)
                continue
            rows = [
                [a - b for a, b in zip(found[k], v, strict=True)]
                for k, v in told["checkpoints"].items()
            ]
            worst = [max(column, key=abs) for column in zip(*rows, strict=True)]
            print(f"{name:32}" + "".join(f"{number:16,}" for number in worst), flush=True)
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
