"""Bytes, and the names of their multiples.

Decimal units for what people quote (1 MB = 10^6 B), binary ones for what
hardware comes in (1 MiB = 2^20 B); never one under the other's name.
"""

MB, GB = 10**6, 10**9
KiB, MiB, GiB = 2**10, 2**20, 2**30


def mb(nbytes: int) -> str:
    """Bytes as megabytes with two decimals: ``204032512`` gives ``'204.03 MB'``."""
    return f"{nbytes / MB:.2f} MB"


def grouped(nbytes: int) -> str:
    """Bytes in full, thousands set apart: ``204032512`` gives ``'204,032,512'``."""
    return f"{nbytes:,}"


def binary(nbytes: int) -> str:
    """Bytes as PyTorch's error messages write them: ``'20.00 MiB'``, ``'512 bytes'``.

    A unit begins above, not at, its first multiple (``'1024.00 MiB'``), as in
    ``format_size`` of PyTorch's ``c10/cuda/CUDACachingAllocator.cpp``.
    """
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if nbytes > unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"
