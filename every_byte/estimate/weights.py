"""Bytes of a number in each format, and of a model's weights."""

import math
from collections import Counter
from fractions import Fraction

from every_byte import formats
from every_byte.estimate.architecture import Dimensions, is_matrix, tensor_counts
from every_byte.estimate.checks import check_choice, check_whole, refuse

# Of quantised weights with their scales: 4-bit formats have one for each 64
# weights. LLM.int8() has one FP32 scale a row, which is counted apart
# (arXiv 2208.07339).
BYTES: dict[str, Fraction] = {
    "fp64": Fraction(8),
    "fp32": Fraction(4),
    "fp16": Fraction(2),
    "bf16": Fraction(2),
    "fp8": Fraction(1),
    "int8": Fraction(1),
    "int4": Fraction(1, 2),
    "nf4": Fraction(formats.bytes_per_parameter(4, block=64)),
    "nf4 double": Fraction(formats.bytes_per_parameter(4, block=64, double=True)),
}
QUANTISED = ("int8", "nf4", "nf4 double")


def bytes_per_parameter(dtype: str) -> Fraction:
    """Bytes of one number of a dtype, its share of scales included.

    Raises:
        ValueError: the dtype is unknown; the message lists those that are not.
    """
    check_choice("dtype", dtype, tuple(BYTES))
    return BYTES[dtype]


def parameter_bytes(sizes: Dimensions, dtype: str, quantised: str | None = None) -> int:
    """The parameters' bytes, all in `dtype`, or the blocks' matrices quantised.

    Embeddings, norms, biases, routers, experts (see `is_matrix`) and the head keep
    `dtype`, as transformers and bitsandbytes leave them; LLM.int8() adds an FP32
    scale for each row of outputs.

    Raises:
        ValueError: an unknown dtype or quantisation.
    """
    return total_bytes(stored_weights(sizes, dtype, quantised))


def stored_weights(sizes: Dimensions, dtype: str, quantised: str | None) -> Counter[int]:
    """Bytes of a tensor of weights or of scales: how many such tensors there are."""
    check_choice("quantised", quantised, (None, *QUANTISED))
    width, tensors = bytes_per_parameter(dtype), Counter[int]()
    for (part, shape), count in tensor_counts(sizes).items():
        if quantised and is_matrix(sizes, part, shape):
            stored = stored_matrix(shape, quantised)
        else:
            stored = (math.ceil(math.prod(shape) * width),)
        for nbytes in stored:
            tensors[nbytes] += count
    return tensors


def stored_matrix(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Bytes of a quantised matrix, of its scales, and of these scales' own."""
    count = math.prod(shape)
    if dtype == "int8":
        return count, 4 * shape[1]
    packed, blocks = -(-count // 2), -(-count // 64)
    return (packed, blocks, 4 * -(-blocks // 256)) if "double" in dtype else (packed, 4 * blocks)


def total_bytes(tensors: Counter[int]) -> int:
    """The bytes of all tensors: a tensor's bytes, how many there are."""
    return sum(nbytes * count for nbytes, count in tensors.items())


def lora_parameters(sizes: Dimensions, rank: int) -> int:
    """The number of parameters of LoRA's adapters, beside every matrix of `is_matrix`.

    A matrix from n to m gets two factors of `rank`, n x rank and rank x m
    (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        ValueError: the rank is no whole number, or below 1.
    """
    check_whole("rank", rank, 1)
    return sum(math.prod(shape) * count for shape, count in adapters(sizes, rank).items())


def adapters(sizes: Dimensions, rank: int) -> Counter[tuple[int, ...]]:
    """LoRA's factors by shape."""
    factors: Counter[tuple[int, ...]] = Counter()
    for (part, shape), count in tensor_counts(sizes).items():
        if is_matrix(sizes, part, shape):
            factors[shape[0], rank] += count
            factors[rank, shape[1]] += count
    return factors


def computed_width(dtype: str) -> int:
    """Bytes of a number of a dtype that is computed in.

    Raises:
        ValueError: it is only stored in, or unknown.
    """
    width = bytes_per_parameter(dtype)
    if width < 2:
        raise refuse("dtype", dtype, "one that is computed in: fp64, fp32, fp16 or bf16")
    return int(width)


def stored(parameters: Counter[tuple[int, ...]], dtype: str) -> Counter[int]:
    """Bytes of a tensor: how many there are, for shapes and how many of each."""
    tensors: Counter[int] = Counter()
    for shape, count in parameters.items():
        tensors[math.prod(shape) * computed_width(dtype)] += count
    return tensors
