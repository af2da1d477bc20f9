"""Closed formulas for what a decoder-only transformer takes: no torch, no model, no GPU.

All results are bytes unless a name says otherwise, before the allocator's
rounding. Names of dimensions are those of transformers' configurations.
"""

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

from helpers import precision

# What tells the architectures apart, by transformers' model_type.
_TRAITS: dict[str, frozenset[str]] = {
    "gpt2": frozenset({"biases", "dropout", "layer norm", "learned positions"}),
    "llama": frozenset({"gated"}),
    "mistral": frozenset({"gated"}),
    "mixtral": frozenset({"gated"}),
    "qwen2": frozenset({"gated", "query, key and value biases"}),
    "qwen3": frozenset({"gated", "query and key norms"}),
}


def _refuse(what: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{what} is {value!r}: expected {expected}")


@dataclass(frozen=True, slots=True)
class Dimensions:
    """A decoder-only transformer's sizes, under transformers' names.

    Zero stands for what follows from the rest: `intermediate_size` from
    ``4 * hidden_size`` (GPT-2), `num_key_value_heads` from `num_attention_heads`
    (no grouped-query attention), `head_dim` from ``hidden_size // heads``;
    without `num_local_experts` the model is dense.

    Raises:
        ValueError: a size is negative, no whole number, or does not fit the others.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 0
    intermediate_size: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    num_local_experts: int = 0
    num_experts_per_tok: int = 0

    def __post_init__(self) -> None:
        if self.model_type not in _TRAITS:
            raise _refuse("model_type", self.model_type, f"one of {', '.join(_TRAITS)}")
        for field in fields(self):
            size = getattr(self, field.name)
            needed = field.name in ("vocab_size", "hidden_size", "num_attention_heads")
            if field.type is int and (type(size) is not int or size < needed):
                raise _refuse(field.name, size, f"a whole number from {int(needed)} up")

        def default(name: str, value: int) -> None:
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        heads = self.num_attention_heads
        default("intermediate_size", 4 * self.hidden_size)
        default("num_key_value_heads", heads)
        if not self.head_dim and self.hidden_size % heads:
            raise _refuse(
                "num_attention_heads", heads, f"a divisor of hidden_size {self.hidden_size}"
            )
        default("head_dim", self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise _refuse("num_key_value_heads", self.num_key_value_heads, f"a divisor of {heads}")
        if self.num_experts_per_tok > self.num_local_experts:
            experts = f"at most num_local_experts {self.num_local_experts}"
            raise _refuse("num_experts_per_tok", self.num_experts_per_tok, experts)

    def has(self, trait: str) -> bool:
        """Whether the architecture has a trait of `_TRAITS`."""
        return trait in _TRAITS[self.model_type]


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Name: what the book's data file says of a model (``helpers/data/models.toml``)."""
    file = resources.files("helpers").joinpath("data", "models.toml")
    return tomllib.loads(file.read_text("utf-8"))


def dimensions(name: str) -> Dimensions:
    """The sizes of a model of the data file.

    Raises:
        ValueError: it is not there; the message lists those that are.
    """
    models = known_models()
    if name not in models:
        raise _refuse("model", name, f"one of {', '.join(models)}")
    wanted = {field.name for field in fields(Dimensions)}
    return Dimensions(**{key: value for key, value in models[name].items() if key in wanted})


# Parameters


def shapes(sizes: Dimensions) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each parameter tensor of the model: its part, and its shape.

    Parts: embedding, attention, mlp, router, norm, head. A tied head has no
    tensor of its own. Source: transformers' ``models/*/modeling_*.py``.
    """
    h, i = sizes.hidden_size, sizes.intermediate_size
    queries = sizes.num_attention_heads * sizes.head_dim
    keys = sizes.num_key_value_heads * sizes.head_dim
    biases = sizes.has("biases")
    qkv_biases = biases or sizes.has("query, key and value biases")

    def norm() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "norm", (h,)
        if sizes.has("layer norm"):
            yield "norm", (h,)

    def linear(part: str, n: int, m: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield part, (n, m)
        if bias:
            yield part, (m,)

    yield "embedding", (sizes.vocab_size, h)
    if sizes.has("learned positions"):
        yield "embedding", (sizes.max_position_embeddings, h)
    for _ in range(sizes.num_hidden_layers):
        yield from norm()
        if sizes.model_type == "gpt2":  # one matrix for all three
            yield from linear("attention", h, 3 * h, biases)
        else:
            for width in (queries, keys, keys):
                yield from linear("attention", h, width, qkv_biases)
        if sizes.has("query and key norms"):
            yield from (("norm", (sizes.head_dim,)) for _ in range(2))
        yield from linear("attention", queries, h, biases)
        yield from norm()
        if sizes.num_local_experts:
            yield from linear("router", h, sizes.num_local_experts, False)
        for _ in range(max(1, sizes.num_local_experts)):
            for _ in range(1 + sizes.has("gated")):
                yield from linear("mlp", h, i, biases)
            yield from linear("mlp", i, h, biases)
    yield from norm()
    if not sizes.tie_word_embeddings:
        yield "head", (h, sizes.vocab_size)


def parameters(sizes: Dimensions) -> dict[str, int]:
    """The number of parameters by part; see `shapes`."""
    parts = dict.fromkeys(("embedding", "attention", "mlp", "router", "norm", "head"), 0)
    for part, shape in shapes(sizes):
        parts[part] += math.prod(shape)
    return parts


def active_parameters(sizes: Dimensions) -> int:
    """The number of parameters that one token uses: of all experts only the chosen ones."""
    parts = parameters(sizes)
    if sizes.num_local_experts:
        parts["mlp"] = parts["mlp"] // sizes.num_local_experts * sizes.num_experts_per_tok
    return sum(parts.values())


# Bytes of a parameter

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
    "nf4": Fraction(precision.bytes_per_parameter(4, block=64)),
    "nf4 double": Fraction(precision.bytes_per_parameter(4, block=64, double=True)),
}
QUANTISED = ("int8", "nf4", "nf4 double")


def bytes_per_parameter(dtype: str) -> Fraction:
    """Bytes of one number of a dtype, its share of scales included.

    Raises:
        ValueError: the dtype is unknown; the message lists those that are not.
    """
    if dtype not in BYTES:
        raise _refuse("dtype", dtype, f"one of {', '.join(BYTES)}")
    return BYTES[dtype]


def parameter_bytes(sizes: Dimensions, dtype: str, quantised: str | None = None) -> int:
    """The parameters' bytes, all in `dtype`, or the blocks' matrices quantised.

    Embeddings, norms, biases, routers and the head keep `dtype`, as transformers
    and bitsandbytes leave them; LLM.int8() adds an FP32 scale for each row of
    outputs.

    Raises:
        ValueError: an unknown dtype or quantisation.
    """
    if quantised is not None and quantised not in QUANTISED:
        raise _refuse("quantised", quantised, f"None or one of {', '.join(QUANTISED)}")
    plain, total = bytes_per_parameter(dtype), Fraction(0)
    for part, shape in shapes(sizes):
        if quantised and part in ("attention", "mlp") and len(shape) == 2:
            total += math.prod(shape) * bytes_per_parameter(quantised)
            total += 4 * shape[1] if quantised == "int8" else 0
        else:
            total += math.prod(shape) * plain
    return math.ceil(total)


# Optimizer states


def _adam_8bit(shape: tuple[int, ...], width: int, states: int) -> int:
    # bitsandbytes keeps tensors under 4096 numbers in FP32, and larger ones in
    # 8 bits with an FP32 scale for each 256 (bitsandbytes/optim/optimizer.py).
    count = math.prod(shape)
    return states * (4 * count if count < 4096 else count + 4 * math.ceil(count / 256))


def _adafactor(shape: tuple[int, ...], width: int, states: int) -> int:
    # Means over rows and over columns instead of a whole second state
    # (arXiv 1804.04235; torch/optim/_adafactor.py).
    count = math.prod(shape)
    return width * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)


def _whole(shape: tuple[int, ...], width: int, states: int) -> int:
    return states * width * math.prod(shape)


# Optimizer: how its states are stored, how many there are, bytes once for all tensors.
_OPTIMIZERS = {
    "sgd": (_whole, 0, 0),
    "momentum": (_whole, 1, 0),
    "adam": (_whole, 2, 0),
    "adamw": (_whole, 2, 0),
    "lion": (_whole, 1, 0),
    "adafactor": (_adafactor, 1, 0),
    "adam 8-bit": (_adam_8bit, 2, 2 * 256 * 4),  # and two tables of 256 levels
    "lion 8-bit": (_adam_8bit, 1, 256 * 4),
}
OPTIMIZERS = tuple(_OPTIMIZERS)


def optimizer_states(
    tensors: Iterator[tuple[int, ...]] | list[tuple[int, ...]], optimizer: str, dtype: str = "fp32"
) -> int:
    """Bytes that an optimizer remembers on the device for parameters of these shapes.

    States have the parameters' dtype, but for the 8-bit ones. Host counters
    (``step``) do not count. Sources: ``torch/optim``, ``bitsandbytes/optim``.

    Raises:
        ValueError: an unknown optimizer or dtype.
    """
    if optimizer not in _OPTIMIZERS:
        raise _refuse("optimizer", optimizer, f"one of {', '.join(OPTIMIZERS)}")
    store, states, once = _OPTIMIZERS[optimizer]
    width = bytes_per_parameter(dtype)
    return sum(store(shape, int(width), states) for shape in tensors) + once


def lora_parameters(sizes: Dimensions, rank: int) -> int:
    """The number of parameters of LoRA's adapters, beside every matrix of the blocks.

    A matrix from n to m gets two factors of `rank`, n x rank and rank x m
    (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        ValueError: the rank is no whole number, or below 1.
    """
    if type(rank) is not int or rank < 1:
        raise _refuse("rank", rank, "a whole number from 1 up")
    matrices = (s for part, s in shapes(sizes) if part in ("attention", "mlp") and len(s) == 2)
    return sum(rank * sum(shape) for shape in matrices)


# Activations

ATTENTION = ("eager", "flash", "efficient")


def layer_activations(
    sizes: Dimensions,
    batch: int,
    length: int,
    dtype: str = "fp32",
    attention: str = "eager",
    dropout: bool = False,
) -> int:
    """Bytes that autograd keeps of one decoder layer from forward to backward.

    Counted from what transformers' layers save, tensor by tensor; the same way of
    counting as in Korthikanti et al. 2022 (arXiv 2205.05198). Eager attention
    keeps a matrix of `length` x `length` for each head; flash attention (FP16 and
    BF16) and memory-efficient attention (FP32 too) one number for each row of it,
    and their random state: see `helpers.cuda_kernels`.

    Args:
        sizes: of the model.
        batch: texts.
        length: tokens of each.
        dtype: what the model computes in.
        attention: one of `ATTENTION`.
        dropout: GPT-2's, of its scores, residuals and embedding: a byte each, and
            the scores once more.

    Raises:
        ValueError: impossible sizes, an unknown dtype or kind of attention, or
            dropout where the architecture has none.
    """
    _check_batch(batch, length)
    if attention not in ATTENTION:
        raise _refuse("attention", attention, f"one of {', '.join(ATTENTION)}")
    if dropout and not sizes.has("dropout"):
        raise _refuse("dropout", dropout, f"False, as {sizes.model_type} has none")
    b = _width(dtype)
    half = b < 4  # then norms and softmax are computed in FP32 (not so GPT-2's)
    h, heads = sizes.hidden_size, sizes.num_attention_heads
    queries, keys = heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    experts = max(1, sizes.num_experts_per_tok)
    once = 0  # for the whole batch
    if sizes.has("layer norm"):
        norm = 2 * b * h + 2 * 4  # input and output; mean and deviation
        scores = b
    else:
        norm = (4 + 2 * b if half else 3 * b) * h + 4  # input, normalised, output; deviation
        scores = 4 + b if half else 4
    token = 2 * norm
    if sizes.has("query and key norms"):
        token += (4 + b if half else 2 * b) * (queries + keys)
        token += 4 * (heads + sizes.num_key_value_heads)
    if attention == "eager":
        # Query, output, and keys and values repeated for all heads: a copy, unless
        # one head of one sequence can be looked at many times over.
        repeated = keys if batch == sizes.num_key_value_heads == 1 else queries
        token += 2 * b * (queries + repeated) + heads * length * scores
        token += heads * length * (1 + b) if dropout else 0
    else:
        token += 2 * b * (queries + keys)
        rows = batch * length
        if attention == "flash":
            once += 24 if rows else 0
        else:
            rows = batch * 32 * math.ceil(length / 32)
            once += 16 if rows and not dropout else 0  # with dropout it is on the host
        once += 4 * heads * rows
    token += 2 * h if dropout else 0
    if sizes.has("gated"):  # gate, its SiLU, up, their product
        token += experts * 4 * b * sizes.intermediate_size
    else:  # input, half of it, tanh, 1 + tanh, their product
        token += 5 * b * sizes.intermediate_size
    return batch * length * token + once


def activations(
    sizes: Dimensions,
    batch: int,
    length: int,
    dtype: str = "fp32",
    attention: str = "eager",
    checkpointing: int = 0,
    dropout: bool = False,
) -> int:
    """Bytes that autograd keeps of the whole model but for the logits.

    With `checkpointing` of each so many layers: the inputs of these groups, and
    at the peak one group's activations, made again.

    Raises:
        ValueError: impossible sizes, an unknown dtype or kind of attention, or
            dropout where the architecture has none.
    """
    layer = layer_activations(sizes, batch, length, dtype, attention, dropout)
    if not isinstance(checkpointing, int) or checkpointing < 0:
        raise _refuse("checkpointing", checkpointing, "a number of layers, 0 for none")
    b, h, layers = _width(dtype), sizes.hidden_size, sizes.num_hidden_layers
    if sizes.has("layer norm"):
        last = batch * length * (2 * b * h + 2 * 4)
    else:
        last = batch * length * ((4 + 2 * b if b < 4 else 3 * b) * h + 4)
        last += 2 * b * length * sizes.head_dim  # the rotary embedding's cos and sin
    last += batch * length * h if dropout else 0  # of the embedding
    if checkpointing:
        inputs = math.ceil(layers / checkpointing) * batch * length * h * b
        return last + inputs + min(checkpointing, layers) * layer
    return last + layers * layer


def logits(sizes: Dimensions, batch: int, length: int, dtype: str = "fp32") -> int:
    """Bytes of the scores of all words at `length` positions.

    Raises:
        ValueError: impossible sizes, or an unknown dtype.
    """
    _check_batch(batch, length)
    return batch * length * sizes.vocab_size * _width(dtype)


def kv_cache(sizes: Dimensions, batch: int, length: int, dtype: str = "bf16") -> int:
    """Bytes of the keys and values of `length` positions in all layers.

    Two tensors for each layer, of the key-value heads only: grouped-query
    attention (arXiv 2305.13245) divides them by heads / key-value heads.

    Raises:
        ValueError: impossible sizes, or an unknown dtype.
    """
    _check_batch(batch, length)
    position = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
    return math.ceil(batch * length * position * bytes_per_parameter(dtype))


def _check_batch(batch: int, length: int) -> None:
    for what, size in (("batch", batch), ("length", length)):
        if type(size) is not int or size < 0:
            raise _refuse(what, size, "a whole number from 0 up")


def _width(dtype: str) -> int:
    width = bytes_per_parameter(dtype)
    if width < 2:
        raise _refuse("dtype", dtype, "one that is computed in: fp64, fp32, fp16 or bf16")
    return int(width)


# All together


@dataclass(frozen=True, slots=True)
class Memory:
    """What a model takes, by kind, in bytes; `total` is their sum."""

    parameters: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """The sum of all kinds, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def training(
    sizes: Dimensions,
    optimizer: str = "adam",
    dtype: str = "fp32",
    batch: int = 1,
    length: int = 0,
    attention: str = "eager",
    checkpointing: int = 0,
    dropout: bool = False,
) -> Memory:
    """What a training step holds between forward and backward, its states included.

    Parameters, gradients and states in `dtype`; of the logits also the
    log-probabilities that the cross-entropy keeps. Not in it: the optimizer's
    temporaries, workspaces, rounding and the CUDA context.

    Raises:
        ValueError: impossible sizes, an unknown dtype, optimizer or attention, or
            dropout where the architecture has none.
    """
    held = parameter_bytes(sizes, dtype)
    return Memory(
        parameters=held,
        gradients=held,
        optimizer_states=optimizer_states([s for _, s in shapes(sizes)], optimizer, dtype),
        activations=activations(sizes, batch, length, dtype, attention, checkpointing, dropout),
        logits=2 * logits(sizes, batch, length, dtype),
    )


def inference(
    sizes: Dimensions,
    dtype: str = "bf16",
    batch: int = 1,
    length: int = 0,
    quantised: str | None = None,
    cache_dtype: str | None = None,
) -> Memory:
    """What generating with a cache of `length` positions holds between two steps.

    The parameters, perhaps quantised, the KV cache (in `dtype` unless
    `cache_dtype` says otherwise), and the logits of one position.

    Raises:
        ValueError: impossible sizes, or an unknown dtype or quantisation.
    """
    return Memory(
        parameters=parameter_bytes(sizes, dtype, quantised),
        logits=logits(sizes, batch, 1, dtype),
        kv_cache=kv_cache(sizes, batch, length, cache_dtype or dtype),
    )
