"""How far a convolution's estimated workspace is off where it was not fitted.

``python -m benchmarks.convolutions`` leaves out one network after the other that was measured,
fits the rule's constants to the others, and prints how far the workspaces of the network left
out are off: as shares of its peak. The constants in use are those that fit all of them, and
the U-Net and the ResNet in inference, whose convolutions were not measured one by one.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import combinations
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.proof import CARD, DATA, TORCH
from every_byte.gpu import VirtualGPU
from every_byte.virtual.kernels import convolution
from helpers import signatures
from helpers.measured import of_workloads

# Constants of the rule, and what is tried for each: the middle first.
TRIED = {
    "_SMALL_DEPTH": (32, 64, 128, 160, 256),
    "_FEW_CHANNELS": (16, 32, 64),
    "_SHALLOW": (0, 288, 576, 1152, 2304),
    "_MANY_ROWS": (3136, 6272, 12_544, 25_088, 50_176),
    "_HUGE": (1 << 23, 1 << 24, 1 << 25, 1 << 26, 1 << 27),
    "_DEEP": (2048, 2304, 4096, 4608, 8192),
    "_ROWS": (128, 256, 512),
}
OPERATIONS = ("aten.convolution.default", "aten.convolution_backward.default")


class Case(NamedTuple):
    """An operation of a network: what asks for workspaces, and the temporaries measured."""

    asked: list[tuple[Any, ...]]
    measured: list[int]


def cases() -> dict[str, list[Case]]:
    """Those of each network."""
    found: dict[str, list[Case]] = {}
    asked: list[tuple[Any, ...]] = []
    workspace = convolution.workspace

    def noted(*arguments: Any) -> int:
        asked.append(arguments)
        return workspace(*arguments)

    with (
        mock.patch.object(convolution, "workspace", noted),
        VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu,
    ):
        for one in signatures.measured(DATA / "kernels.json.xz"):
            if one.operation in OPERATIONS and one.group.startswith("tv-"):
                asked.clear()
                signatures.replayed(gpu, one.signature)
                freed = [-nbytes for nbytes in one.variants[0] if nbytes < 0]
                found.setdefault(one.group, []).append(Case(list(asked), freed))
    return found


def differences(case: Case) -> list[int]:
    """Estimated less measured, of each workspace; which is which, as it fits best in order."""
    estimated = [convolution.workspace(*arguments) for arguments in case.asked]
    many = min(len(estimated), len(case.measured))

    def matched() -> Iterator[list[int]]:
        for places in combinations(range(len(estimated)), many):
            for taken in combinations(case.measured, many):
                left = list(estimated)
                for place, nbytes in zip(places, taken, strict=True):
                    left[place] -= nbytes
                yield left

    return min(matched(), key=lambda found: sum(map(abs, found)))


def _with(constants: dict[str, int]) -> ExitStack:
    stack = ExitStack()
    for name, number in constants.items():
        stack.enter_context(mock.patch.object(convolution, name, number))
    return stack


def fit(networks: dict[str, list[Case]], peaks: dict[str, int]) -> dict[str, int]:
    """The constants that fit networks best, one after the other, twice."""
    chosen = {name: tried[len(tried) // 2] for name, tried in TRIED.items()}

    def error(constants: dict[str, int]) -> float:
        with _with(constants):
            return sum(
                abs(nbytes) / peaks[name]
                for name, of_one in networks.items()
                for case in of_one
                for nbytes in differences(case)
            )

    for _ in range(2):
        for name, tried in TRIED.items():
            each = [chosen | {name: number} for number in (chosen[name], *tried)]
            chosen = min(each, key=error)
    return chosen


def main() -> int:
    """The command line; returns the exit status."""
    warnings.simplefilter("ignore")
    networks = cases()
    told = of_workloads()
    peaks = {name: max(row[2] for row in told[name]["checkpoints"].values()) for name in networks}
    for name, of_one in networks.items():
        others = {other: them for other, them in networks.items() if other != name}
        with _with(fit(others, peaks)):
            off = [nbytes / peaks[name] for case in of_one for nbytes in differences(case)]
        equal = sum(abs(share) < 1e-5 for share in off)
        print(
            f"{name:30}{equal:4} of {len(off):3} equal{min(off):+10.1%}{max(off):+8.1%} of its peak"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
