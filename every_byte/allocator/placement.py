"""Where in a card's address space a new segment lies: the driver's affair, not PyTorch's.

It matters to what is reserved: of free blocks of one size PyTorch takes the one
with the lowest address.
"""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from every_byte.units import MiB

_ALIGNMENT = 2 * MiB


class Placement(Protocol):
    """A rule for the addresses of segments (all numbers are bytes)."""

    def place(self, size: int) -> int:
        """Where a segment of `size` begins, which is taken from now on."""

    def give_back(self, address: int, size: int) -> None:
        """Take note of a segment that was freed."""


class Upwards:
    """Each segment lies above all earlier ones, and no address is used again."""

    def __init__(self, first: int = _ALIGNMENT) -> None:
        self._next = first

    def place(self, size: int) -> int:
        """Where a segment of `size` begins."""
        address = self._next
        self._next = -(-(address + size) // _ALIGNMENT) * _ALIGNMENT
        return address

    def give_back(self, address: int, size: int) -> None:
        """Take note of a segment that was freed: nothing to do."""


class Recorded:
    """The addresses that a driver gave to the segments of a run, in their order.

    They depend on what its process did before, which no later trace shows. A segment of
    another size than the next one recorded lies below all of them.

    Args:
        segments: address and size of each.
    """

    def __init__(self, segments: Iterable[tuple[int, int]]) -> None:
        self._left = deque(segments)
        self._others = Upwards()

    def place(self, size: int) -> int:
        """Where the next segment begins."""
        if self._left and self._left[0][1] == size:
            return self._left.popleft()[0]
        return self._others.place(size)

    def give_back(self, address: int, size: int) -> None:
        """Take note of a segment that was freed: nothing to do."""


class Downwards:
    """As ``cudaMalloc`` of NVIDIA's driver 580.159 does on Linux, as far as it was measured.

    No published rule: it was read off the addresses of the segments that PyTorch 2.11
    took on an H200 in 43 training and inference runs. Address space is taken from the
    top down in granules of 32 MiB. A segment that fits into a hole, what is left of a
    granule or was freed, goes to its lower end; of several holes to the one that was made
    or used last. It is no exact account of the driver: every measured process had holes
    that its trace does not show, and where several known ones fitted, the driver took
    this one in 703 of 1,264 cases, more than any simpler rule explains. What PyTorch
    reserves was equal in most runs all the same.
    """

    GRANULE = 32 * MiB
    TOP = 127 << 40  # below the end of Linux's user space

    def __init__(self) -> None:
        self._low = self.TOP
        self._holes: list[tuple[int, int]] = []  # begin and end, the one used last at the end

    def place(self, size: int) -> int:
        """Where a segment of `size` begins."""
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        for number in reversed(range(len(self._holes))):
            begin, end = self._holes[number]
            if end - begin >= size:
                del self._holes[number]
                break
        else:
            end = self._low
            begin = self._low = end - -(-size // self.GRANULE) * self.GRANULE
        if begin + size < end:
            self._holes.append((begin + size, end))
        return begin

    def give_back(self, address: int, size: int) -> None:
        """Take note of a segment that was freed: it joins the holes beside it."""
        begin, end = address, address + -(-size // _ALIGNMENT) * _ALIGNMENT
        for hole in [h for h in self._holes if h[1] == begin or h[0] == end]:
            self._holes.remove(hole)
            begin, end = min(begin, hole[0]), max(end, hole[1])
        self._holes.append((begin, end))
