"""Number formats from their bits: range, resolution, rounding, and bytes per parameter.

Plain Python without PyTorch, so that what a format can hold is computed from its
definition and can be checked against ``torch.finfo``.

Sources of the layouts and constants:

* FP64, FP32, FP16: IEEE 754-2019, binary64, binary32 and binary16.
* BF16: the upper half of an FP32 number (Kalamkar et al. 2019, arXiv 1905.12322).
* TF32: FP32's exponent with FP16's mantissa (NVIDIA A100 architecture white paper, 2020).
* FP8: "FP8 Formats for Deep Learning" (Micikevicius et al. 2022, arXiv 2209.05433)
  and the OCP 8-bit Floating Point Specification, revision 1.0 (2023).
* FP4: E2M1 of the OCP Microscaling Formats Specification, version 1.0 (2023).
* NF4 and double quantisation: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
* INT8 by rows: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: a sign bit, an exponent, a mantissa.

    A pattern with exponent field e and mantissa field m stands for
    ``2**(e - bias) * (1 + m / 2**mantissa_bits)``; with e = 0, a subnormal, for
    ``2**(1 - bias) * m / 2**mantissa_bits`` (IEEE 754-2019, 3.4).

    Attributes:
        name: as the book writes it.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the stored mantissa, without the implicit leading bit.
        special: which patterns are not numbers. ``ieee``: the highest exponent is
            for infinities and NaN; ``nan``: only the highest pattern, NaN, is not a
            number (E4M3, called *fn* in PyTorch); ``none``: every pattern is a number.
        dtype: PyTorch's name, or empty if it has none.
        storage_bits: what a number takes in memory: TF32's 19 bits take 32.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    special: Literal["ieee", "nan", "none"] = "ieee"
    dtype: str = ""
    storage_bits: int = 0

    def __post_init__(self) -> None:
        if not self.storage_bits:
            object.__setattr__(self, "storage_bits", self.bits)

    @property
    def bits(self) -> int:
        """Bits of sign, exponent and mantissa together."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field: half its range, rounded down."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def max_pattern(self) -> int:
        """The pattern of the largest number."""
        highest = (1 << (self.bits - 1)) - 1
        if self.special == "ieee":
            return highest - (1 << self.mantissa_bits)
        return highest - (self.special == "nan")

    @property
    def max(self) -> float:
        """The largest number."""
        return self.decode(self.max_pattern)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full mantissa: ``2**(1 - bias)``."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number: one step of the last mantissa bit."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """The step from 1 to the next number: ``2**-mantissa_bits``."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def digits(self) -> int:
        """Decimal digits that always survive: ``floor(mantissa_bits * log10(2))``.

        C's ``FLT_DIG`` (ISO C 5.2.4.2.2); ``torch.finfo(...).resolution`` is ten to
        the power of minus this.
        """
        return math.floor(self.mantissa_bits * math.log10(2))

    def decode(self, pattern: int) -> float:
        """The number that a bit pattern stands for (``inf`` and ``nan`` included).

        Raises:
            ValueError: there is no such pattern.
        """
        self._check(pattern)
        sign = -1.0 if pattern >> (self.bits - 1) else 1.0
        magnitude = pattern & ((1 << (self.bits - 1)) - 1)
        if magnitude > self.max_pattern:
            infinite = self.special == "ieee" and magnitude == self.max_pattern + 1
            return sign * math.inf if infinite else math.nan
        exponent, mantissa = divmod(magnitude, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return sign * math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    def encode(self, value: float) -> int:
        """The pattern of the nearest number; of two equally near, the even one.

        Beyond the range it is infinity, or in a format without infinities the
        largest number (the saturating conversion of the OCP specifications).

        Raises:
            ValueError: `value` is NaN, and the format has none.
        """
        sign = (math.copysign(1.0, value) < 0) << (self.bits - 1)
        if math.isnan(value):
            if self.special == "none":
                raise ValueError(f"{self.name} has no NaN: every pattern is a number")
            return (1 << (self.bits - 1)) - 1
        beyond = self.max_pattern + (self.special == "ieee")
        if value == 0 or math.isinf(value):
            return sign | (beyond if value else 0)
        # In steps of the last mantissa bit at this magnitude, rounded half to even.
        # The leading 1 of a normal number carries into the exponent field by itself.
        exponent = max(math.frexp(value)[1] - 1, 1 - self.bias)
        steps = round(math.ldexp(abs(value), self.mantissa_bits - exponent))
        return sign | min(steps + ((exponent + self.bias - 1) << self.mantissa_bits), beyond)

    def round(self, value: float) -> float:
        """The nearest number that the format can hold."""
        return self.decode(self.encode(value))

    def fields(self, pattern: int) -> str:
        """A pattern as sign, exponent and mantissa in binary: ``'0 01111 0000000000'``."""
        self._check(pattern)
        text = f"{pattern:0{self.bits}b}"
        split = 1 + self.exponent_bits
        return f"{text[0]} {text[1:split]} {text[split:]}"

    def _check(self, pattern: int) -> None:
        if not 0 <= pattern < 1 << self.bits:
            raise ValueError(f"{pattern} is no pattern of {self.name}: 0 to {(1 << self.bits) - 1}")


FP64 = Format("FP64", 11, 52, dtype="float64")
FP32 = Format("FP32", 8, 23, dtype="float32")
TF32 = Format("TF32", 8, 10, storage_bits=32)
BF16 = Format("BF16", 8, 7, dtype="bfloat16")
FP16 = Format("FP16", 5, 10, dtype="float16")
E5M2 = Format("FP8 E5M2", 5, 2, dtype="float8_e5m2")
E4M3 = Format("FP8 E4M3", 4, 3, "nan", dtype="float8_e4m3fn")
E2M1 = Format("FP4 E2M1", 2, 1, "none")

FORMATS = (FP64, FP32, TF32, BF16, FP16, E5M2, E4M3, E2M1)
"""The floating-point formats of the book, by range."""


def number_format(name: str) -> Format:
    """A format by the book's name or PyTorch's, in any case: ``fp16``, ``float16``.

    Raises:
        ValueError: there is no such format; the message lists those there are.
    """
    wanted = name.lower().removeprefix("torch.")
    for known in FORMATS:
        if wanted in (known.name.lower(), known.name.lower().split()[-1], known.dtype):
            return known
    names = ", ".join(known.name for known in FORMATS)
    raise ValueError(f"no format is named {name!r}: there are {names}")


def nf4_levels() -> tuple[float, ...]:
    """The 16 levels of NF4, ascending, from -1 to 1.

    Quantiles of the standard normal distribution at evenly spaced probabilities,
    7 below zero, zero, 8 above, divided by the largest (QLoRA, appendix E). The
    outermost probability, 0.9677083, is the mean of 1 - 1/30 and 1 - 1/32: half a
    step from 1 when 15 or 16 levels share the distribution
    (``bitsandbytes.functional.create_normal_map``).
    """
    outermost = 0.9677083

    def side(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [NormalDist().inv_cdf(outermost - step * i) for i in range(count)]

    levels = [-level for level in side(7)] + [0.0] + side(8)[::-1]
    return tuple(level / levels[-1] for level in levels)


def bytes_per_parameter(bits: int, block: int = 0, double: bool = False) -> float:
    """Bytes that a weight takes when blocks of weights share an FP32 scale.

    ``bits / 8 + 4 / block``; with double quantisation the scale takes 1 byte, and
    256 of these share an FP32 scale: ``bits / 8 + 1 / block + 4 / (256 * block)``
    (QLoRA, section 3).

    Args:
        bits: of a weight.
        block: weights that share a scale; 0 for none.
        double: whether the scales are quantised, too.

    Raises:
        ValueError: `block` is negative, or `double` is set without blocks.
    """
    if block < 0 or (double and not block):
        raise ValueError(f"block is {block}: 0 for no scale, else 1 or more (with double, 1)")
    if not block:
        return bits / 8
    return bits / 8 + (1 / block + 4 / (256 * block) if double else 4 / block)
