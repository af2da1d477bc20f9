"""Bytes, and the names of their multiples.

Decimal units for what people quote (1 MB = 10^6 B), binary ones for what
hardware comes in (1 MiB = 2^20 B); never one under the other's name.
"""

MB, GB = 10**6, 10**9
KiB, MiB, GiB = 2**10, 2**20, 2**30
_UNITS = ((1000, "kB"), (MB, "MB"), (GB, "GB"))


def mb(nbytes: int) -> str:
    """Bytes as megabytes with two decimals: ``204032512`` gives ``'204.03 MB'``."""
    return f"{nbytes / MB:.2f} MB"


def unit(nbytes: int) -> tuple[int, str]:
    """The decimal unit in which bytes have up to three digits before the point, and its name.

    One rule for tables, reports and the axes of figures: ``(10**9, 'GB')`` from 999.5 MB up.
    """
    return next(((n, name) for n, name in _UNITS if abs(nbytes) / n < 999.5), (GB, "GB"))


def short(nbytes: int, plus: bool = False) -> str:
    """Bytes in three digits and a decimal unit: ``'834 MB'``, ``'1.04 GB'``, ``'-512 B'``, ``'0'``.

    Args:
        plus: write the sign of a positive number, too.
    """
    sign = "-" if nbytes < 0 else "+" if plus else ""
    size = abs(nbytes)
    if size < 1000:
        return f"{sign}{size} B" if size else "0"
    one, name = unit(size)
    places = next((i for i, end in ((2, 9.995), (1, 99.95)) if size / one < end), 0)
    return f"{sign}{size / one:,.{places}f} {name}"


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
