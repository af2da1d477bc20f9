"""Bytes of a number in each format, and of a model's weights."""

import math
from collections import Counter
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Stored:
    """How a matrix is stored in fewer bits.

    Attributes:
        label: its name in the page's list.
        tensors: for each tensor that it takes, so many bytes for so many numbers.
        outputs: bytes for each output, of a scale a row.
        inputs: bytes for each input.
        experts: whether it goes for experts, too.
        whole: whether it goes for the embedding and the head, too.
        trained: whether LoRA is trained beside it.
    """

    label: str
    tensors: tuple[tuple[int, int], ...]
    outputs: int = 0
    inputs: int = 0
    experts: bool = True
    whole: bool = False
    trained: bool = True


STORED = {
    # bitsandbytes: one FP32 scale a row (arXiv 2208.07339); 4 bits with an FP32 scale for
    # each 64, or a byte for each 64 and an FP32 scale for each 256 of those (arXiv 2305.14314).
    "int8": Stored("INT8 (bitsandbytes)", ((1, 1),), outputs=4, experts=False),
    "nf4": Stored("NF4 (bitsandbytes)", ((1, 2), (4, 64)), experts=False),
    "nf4 double": Stored("NF4, double quantised", ((1, 2), (1, 64), (4, 64 * 256)), experts=False),
    # 8 bits with an FP32 scale a row, as vllm-project/llm-compressor's FP8_DYNAMIC has it.
    "fp8": Stored("FP8, a scale a row", ((1, 1),), outputs=4, trained=False),
    # 4 bits in groups of 128 with an FP16 scale and a 4-bit zero each
    # (casper-hansen/AutoAWQ, awq/modules/linear/gemm.py); GPTQ has a group's number of 4 bytes
    # for each input besides (ModelCloud/GPTQModel, g_idx).
    "awq": Stored("AWQ, 4 bits, groups of 128", ((1, 2), (2, 128), (1, 256))),
    "gptq": Stored("GPTQ, 4 bits, groups of 128", ((1, 2), (2, 128), (1, 256)), inputs=4),
    # 4 bits with an 8-bit scale for each 32 (OCP Microscaling Formats 1.0) or each 16 (NVIDIA).
    "mxfp4": Stored("MXFP4", ((1, 2), (1, 32)), trained=False),
    "nvfp4": Stored("NVFP4", ((1, 2), (1, 16)), trained=False),
    # Blocks of 32 or 256 (ggml-org/llama.cpp, ggml/src/ggml-common.h, block_q8_0 and so on),
    # in llama.cpp alone: transformers makes 16 bits of them.
    **{
        name: Stored(f"GGUF {name}", ((nbytes, numbers),), whole=True, trained=False)
        for name, nbytes, numbers in (
            ("Q8_0", 34, 32),
            ("Q6_K", 210, 256),
            ("Q5_K", 176, 256),
            ("Q4_K", 144, 256),
            ("Q4_0", 18, 32),
            ("Q3_K", 110, 256),
            ("Q2_K", 84, 256),
        )
    },
}
"""All formats that weights are stored in, by the names of a `Setup`. Of GGUF's those of one
type for all matrices: a file called ``Q4_K_M`` has some of its matrices in ``Q6_K``."""

QUANTISED = tuple(STORED)


def bytes_per_parameter(dtype: str) -> Fraction:
    """Bytes of one number of a dtype, its share of scales included.

    Raises:
        ValueError: the dtype is unknown; the message lists those that are not.
    """
    check_choice("dtype", dtype, tuple(BYTES))
    return BYTES[dtype]


def parameter_bytes(sizes: Dimensions, dtype: str, quantised: str | None = None) -> int:
    """The parameters' bytes, all in `dtype`, or the blocks' matrices quantised.

    Embeddings, norms, biases, routers and the head keep `dtype`, and so do experts where
    bitsandbytes quantises (see `is_matrix`); GGUF has embedding and head in fewer bits, too.

    Raises:
        ValueError: an unknown dtype or quantisation.
    """
    return total_bytes(stored_weights(sizes, dtype, quantised))


def stored_weights(sizes: Dimensions, dtype: str, quantised: str | None) -> Counter[int]:
    """Bytes of a tensor of weights or of scales: how many such tensors there are."""
    check_choice("quantised", quantised, (None, *QUANTISED))
    width, tensors = bytes_per_parameter(dtype), Counter[int]()
    for (part, shape), count in tensor_counts(sizes).items():
        if quantised and is_stored(sizes, part, shape, quantised):
            stored = stored_matrix(shape, quantised)
        else:
            stored = (math.ceil(math.prod(shape) * width),)
        for nbytes in stored:
            tensors[nbytes] += count
    return tensors


def is_stored(sizes: Dimensions, part: str, shape: tuple[int, ...], quantised: str) -> bool:
    """Whether a parameter is stored in a format of `STORED`: a matrix, but see `is_matrix`."""
    known = STORED[quantised]
    if sizes.model_type == "gpt_oss" and quantised == "mxfp4":
        # As it is published (openai/gpt-oss-20b, config.json, modules_to_not_convert).
        return len(shape) == 2 and part == "mlp"
    if len(shape) == 2 and part == "mlp" and known.experts:
        return True
    matrix = len(shape) == 2 and known.whole and part in ("embedding", "head")
    return matrix or is_matrix(sizes, part, shape)


def stored_matrix(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Bytes of a quantised matrix, of its scales, and of these scales' own."""
    known, count = STORED[dtype], math.prod(shape)
    found = [nbytes * -(-count // numbers) for nbytes, numbers in known.tensors]
    found += [n for n in (known.outputs * shape[1], known.inputs * shape[0]) if n]
    return tuple(found)


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
