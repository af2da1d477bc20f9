"""Closed formulas for what a decoder-only transformer takes: no torch, no model, no GPU.

All results are bytes unless a name says otherwise, before the allocator's
rounding, which `memory` counts apart. Names of dimensions are those of
transformers' configurations.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache

from every_byte import formats
from every_byte.allocator.config import kMinBlockSize, kMinLargeAlloc, kRoundLarge, kSmallSize
from every_byte.data import known_models as known_models
from every_byte.units import GiB

# What tells the architectures apart, by transformers' model_type.
TRAITS: dict[str, frozenset[str]] = {
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
        if self.model_type not in TRAITS:
            raise _refuse("model_type", self.model_type, f"one of {', '.join(TRAITS)}")
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
        """Whether the architecture has a trait of `TRAITS`."""
        return trait in TRAITS[self.model_type]


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


Tensor = tuple[str, tuple[int, ...]]  # a parameter's part of the model, and its shape


def shapes(sizes: Dimensions) -> Iterator[Tensor]:
    """Each parameter tensor of the model: its part, and its shape.

    Parts: embedding, attention, mlp, router, norm, head. A tied head has no
    tensor of its own. Source: transformers' ``models/*/modeling_*.py``.
    """
    yield "embedding", (sizes.vocab_size, sizes.hidden_size)
    if sizes.has("learned positions"):
        yield "embedding", (sizes.max_position_embeddings, sizes.hidden_size)
    layer = list(_layer(sizes))
    for _ in range(sizes.num_hidden_layers):
        yield from layer
    yield from _norm(sizes)
    if not sizes.tie_word_embeddings:
        yield "head", (sizes.hidden_size, sizes.vocab_size)


def _norm(sizes: Dimensions) -> Iterator[Tensor]:
    for _ in range(1 + sizes.has("layer norm")):
        yield "norm", (sizes.hidden_size,)


def _layer(sizes: Dimensions) -> Iterator[Tensor]:
    h, i = sizes.hidden_size, sizes.intermediate_size
    queries = sizes.num_attention_heads * sizes.head_dim
    keys = sizes.num_key_value_heads * sizes.head_dim
    biases = sizes.has("biases")
    qkv_biases = biases or sizes.has("query, key and value biases")

    def linear(part: str, n: int, m: int, bias: bool) -> Iterator[Tensor]:
        yield part, (n, m)
        if bias:
            yield part, (m,)

    yield from _norm(sizes)
    if sizes.model_type == "gpt2":  # one matrix for all three
        yield from linear("attention", h, 3 * h, biases)
    else:
        for width in (queries, keys, keys):
            yield from linear("attention", h, width, qkv_biases)
    if sizes.has("query and key norms"):
        yield from (("norm", (sizes.head_dim,)) for _ in range(2))
    yield from linear("attention", queries, h, biases)
    yield from _norm(sizes)
    if sizes.num_local_experts:
        yield from linear("router", h, sizes.num_local_experts, False)
    for _ in range(max(1, sizes.num_local_experts)):
        for _ in range(1 + sizes.has("gated")):
            yield from linear("mlp", h, i, biases)
        yield from linear("mlp", i, h, biases)


@lru_cache
def _counts(sizes: Dimensions) -> Counter[Tensor]:
    """How many parameter tensors of each part and shape there are."""
    return Counter(shapes(sizes))


def parameters(sizes: Dimensions) -> dict[str, int]:
    """The number of parameters by part; see `shapes`."""
    parts = dict.fromkeys(("embedding", "attention", "mlp", "router", "norm", "head"), 0)
    for (part, shape), count in _counts(sizes).items():
        parts[part] += count * math.prod(shape)
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
    "nf4": Fraction(formats.bytes_per_parameter(4, block=64)),
    "nf4 double": Fraction(formats.bytes_per_parameter(4, block=64, double=True)),
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
    return _sum(_weights(sizes, dtype, quantised))


def _weights(sizes: Dimensions, dtype: str, quantised: str | None) -> Counter[int]:
    """Bytes of a tensor of weights or of scales: how many such tensors there are."""
    if quantised is not None and quantised not in QUANTISED:
        raise _refuse("quantised", quantised, f"None or one of {', '.join(QUANTISED)}")
    width, tensors = bytes_per_parameter(dtype), Counter[int]()
    for (part, shape), count in _counts(sizes).items():
        if quantised and _is_matrix(part, shape):
            stored = _quantised(shape, quantised)
        else:
            stored = (math.ceil(math.prod(shape) * width),)
        for nbytes in stored:
            tensors[nbytes] += count
    return tensors


def _is_matrix(part: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix of the blocks: what is quantised, and LoRA adapts."""
    return part in ("attention", "mlp") and len(shape) == 2


def _quantised(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Bytes of a quantised matrix, of its scales, and of these scales' own."""
    count = math.prod(shape)
    if dtype == "int8":
        return count, 4 * shape[1]
    packed, blocks = -(-count // 2), -(-count // 64)
    return (packed, blocks, 4 * -(-blocks // 256)) if "double" in dtype else (packed, 4 * blocks)


def _sum(tensors: Counter[int]) -> int:
    return sum(nbytes * count for nbytes, count in tensors.items())


# Optimizer states


# Each says what an optimizer stores for a parameter: bytes, tensor by tensor.


def _adam_8bit(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    # bitsandbytes keeps tensors under 4096 numbers in FP32, and larger ones in
    # 8 bits with an FP32 scale for each 256 (bitsandbytes/optim/optimizer.py).
    count = math.prod(shape)
    return ((4 * count,) if count < 4096 else (count, 4 * -(-count // 256))) * states


def _adafactor(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    # Means over rows and over columns instead of a whole second state
    # (arXiv 1804.04235; torch/optim/_adafactor.py).
    if len(shape) < 2:
        return (width * math.prod(shape),)
    *rest, rows, columns = shape
    return width * math.prod(rest) * rows, width * math.prod(rest) * columns


def _whole(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    return (width * math.prod(shape),) * states


# Optimizer: how its states are stored, how many there are, tables of 256 levels for all.
STORES: dict[str, tuple[Callable[[tuple[int, ...], int, int], tuple[int, ...]], int, int]] = {
    "sgd": (_whole, 0, 0),
    "momentum": (_whole, 1, 0),
    "adam": (_whole, 2, 0),
    "adamw": (_whole, 2, 0),
    "lion": (_whole, 1, 0),
    "adafactor": (_adafactor, 1, 0),
    "adam 8-bit": (_adam_8bit, 2, 2),
    "lion 8-bit": (_adam_8bit, 1, 1),
}
OPTIMIZERS = tuple(STORES)


def optimizer_states(
    tensors: Iterable[tuple[int, ...]], optimizer: str, dtype: str = "fp32"
) -> int:
    """Bytes that an optimizer remembers on the device for parameters of these shapes.

    States have the parameters' dtype, but for the 8-bit ones. Host counters
    (``step``) do not count. Sources: ``torch/optim``, ``bitsandbytes/optim``.

    Raises:
        ValueError: an unknown optimizer or dtype.
    """
    return _sum(_states(Counter(tensors), optimizer, dtype))


def _states(parameters: Counter[tuple[int, ...]], optimizer: str, dtype: str) -> Counter[int]:
    """Bytes of a tensor of states: how many there are, for shapes and how many of each."""
    if optimizer not in STORES:
        raise _refuse("optimizer", optimizer, f"one of {', '.join(OPTIMIZERS)}")
    store, states, tables = STORES[optimizer]
    width, tensors = int(bytes_per_parameter(dtype)), Counter({4 * 256: tables})
    for shape, count in parameters.items():
        for nbytes in store(shape, width, states):
            tensors[nbytes] += count
    return tensors


def lora_parameters(sizes: Dimensions, rank: int) -> int:
    """The number of parameters of LoRA's adapters, beside every matrix of the blocks.

    A matrix from n to m gets two factors of `rank`, n x rank and rank x m
    (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        ValueError: the rank is no whole number, or below 1.
    """
    if type(rank) is not int or rank < 1:
        raise _refuse("rank", rank, "a whole number from 1 up")
    return sum(math.prod(shape) * count for shape, count in _adapters(sizes, rank).items())


def _adapters(sizes: Dimensions, rank: int) -> Counter[tuple[int, ...]]:
    """LoRA's factors by shape."""
    factors: Counter[tuple[int, ...]] = Counter()
    for (part, shape), count in _counts(sizes).items():
        if _is_matrix(part, shape):
            factors[shape[0], rank] += count
            factors[rank, shape[1]] += count
    return factors


# Activations

ATTENTION = ("eager", "flash", "efficient")


def layer_activations(
    sizes: Dimensions,
    batch: int,
    length: int,
    dtype: str = "fp32",
    attention: str = "eager",
    rank: int = 0,
    autocast: bool = False,
    dropout: bool = False,
) -> int:
    """Bytes that autograd keeps of one decoder layer from forward to backward.

    Counted from what transformers' layers save, tensor by tensor; the same way of
    counting as in Korthikanti et al. 2022 (arXiv 2205.05198). Eager attention
    keeps a matrix of `length` x `length` for each head; flash attention (FP16 and
    BF16) and memory-efficient attention (FP32 too) one number for each row of it,
    and their random state: see `every_byte.virtual.kernels`.

    Args:
        sizes: of the model.
        batch: texts.
        length: tokens of each.
        dtype: what the model computes in.
        attention: one of `ATTENTION`.
        rank: of LoRA, if not 0: each matrix keeps what its first factor gives, and
            frozen norms keep less.
        autocast: of FP32 weights to `dtype`: norms and what runs between the layers
            stay in FP32, and each matrix keeps its own copy of what it reads.
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
    gated, wide = sizes.has("gated"), 4 if autocast else b
    readers = (1 if sizes.model_type == "gpt2" else 3) + 1 + gated if autocast else 2
    in_fp32 = autocast or not sizes.has("layer norm")  # the softmax
    scores = b + 4 * half if in_fp32 and half else b if half or not in_fp32 else 4
    token = 2 * (_norm_input(sizes, wide) + _norm_rest(sizes, wide, rank)) + readers * b * h
    if sizes.has("query and key norms"):
        token += ((4 if half else b) + (0 if rank else b)) * (queries + keys)
        token += 4 * (heads + sizes.num_key_value_heads)
    if attention == "eager":
        # Query, output, and keys and values repeated for all heads: a copy, unless
        # one head of one sequence can be looked at many times over. Autocast copies
        # the keys, which rotation has made FP32.
        single = batch == sizes.num_key_value_heads == 1
        repeated = (queries + keys if autocast else 2 * keys) if single else 2 * queries
        token += b * (2 * queries + repeated) + heads * length * scores
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
    if gated:  # gate, its SiLU, up, their product
        token += experts * 4 * b * sizes.intermediate_size
    else:  # input, half of it, tanh, 1 + tanh, their product; autocast's power is in FP32
        token += (5 * b + 6 * autocast) * sizes.intermediate_size
    matrices = (2 if sizes.model_type == "gpt2" else 4) + experts * (2 + gated)
    return batch * length * (token + matrices * rank * b) + once


def _norm_input(sizes: Dimensions, b: int) -> int:
    """Bytes for each token of a norm's input, in FP32 but GPT-2's, and of its statistics."""
    if sizes.has("layer norm"):
        return b * sizes.hidden_size + 2 * 4  # mean and deviation
    return max(4, b) * sizes.hidden_size + 4  # deviation


def _norm_rest(sizes: Dimensions, b: int, rank: int) -> int:
    """Bytes for each token of the normalised input, which the norm's own gradient needs."""
    return 0 if rank or sizes.has("layer norm") else b * sizes.hidden_size


def activations(
    sizes: Dimensions,
    batch: int,
    length: int,
    dtype: str = "fp32",
    attention: str = "eager",
    checkpointing: int = 0,
    rank: int = 0,
    autocast: bool = False,
    dropout: bool = False,
) -> int:
    """Bytes that autograd keeps of the whole model but for the logits.

    With `checkpointing` of each so many layers: the inputs of these groups, and
    at the peak one group's activations, made again. With LoRA of a `rank`: no
    input of the head, and none of the first norm, before which nothing is trained.

    Raises:
        ValueError: impossible sizes, an unknown dtype or kind of attention, or
            dropout where the architecture has none.
    """
    layer = layer_activations(sizes, batch, length, dtype, attention, rank, autocast, dropout)
    if not isinstance(checkpointing, int) or checkpointing < 0:
        raise _refuse("checkpointing", checkpointing, "a number of layers, 0 for none")
    b, h, layers = _width(dtype), sizes.hidden_size, sizes.num_hidden_layers
    wide = 4 if autocast else b
    norm = _norm_input(sizes, wide)
    last = batch * length * (norm + _norm_rest(sizes, wide, rank) + (0 if rank else b * h))
    if not sizes.has("learned positions"):
        last += 2 * wide * length * sizes.head_dim  # the rotary embedding's cos and sin
    last += batch * length * h if dropout else 0  # of the embedding
    if checkpointing:
        inputs = math.ceil(layers / checkpointing) * batch * length * h * wide
        return last + inputs + min(checkpointing, layers) * layer
    return last + layers * layer - (batch * length * norm if rank and layers else 0)


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


# Beside the tensors

CONTEXT = (47 * GiB // 100, 92 * GiB // 100)
"""The CUDA context, from and to: PyTorch 2.1.1 on an A100, with CUDA's modules loaded
lazily (the default of recent CUDA) and eagerly. Published, not estimated: Bekman,
Machine Learning Engineering (https://github.com/stas00/ml-engineering)."""


def block(nbytes: int, own_segment: bool = False) -> int:
    """Bytes of the allocator's block for a request.

    A multiple of 512 B. A request from 10 MiB up that no free block serves gets a
    segment of its own, a multiple of 2 MiB, and keeps what is left of it up to
    1 MiB (`every_byte.allocator`). Where smaller requests leave such a rest is not
    told by a formula: replay them.

    Args:
        nbytes: the request.
        own_segment: whether no free block serves it.
    """
    size = nbytes + -nbytes % kMinBlockSize
    rest = -size % kRoundLarge
    return size + rest if own_segment and size >= kMinLargeAlloc and rest <= kSmallSize else size


# What ZeRO's stages split over the GPUs (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).
SHARDING = {
    "none": (),
    "ZeRO 1": ("optimizer_states",),
    "ZeRO 2": ("optimizer_states", "gradients"),
    "ZeRO 3": ("optimizer_states", "gradients", "parameters"),
}


def shard(nbytes: int, gpus: int) -> int:
    """One GPU's part of bytes that are split evenly, in whole bytes: rounded up.

    Raises:
        ValueError: `gpus` is no whole number, or below 1.
    """
    if type(gpus) is not int or gpus < 1:
        raise _refuse("gpus", gpus, "a whole number from 1 up")
    return -(-nbytes // gpus)


# All together


@dataclass(frozen=True, slots=True)
class Memory:
    """What a model takes on one GPU, by kind, in bytes; `total` is their sum.

    Cast weights are the copies that autocast makes. Rounding is the
    allocator's, of parameters, gradients, optimizer states and KV cache.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    cast_weights: int = 0
    rounding: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """The sum of all kinds, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


CHOICES: dict[str, tuple[str | None, ...]] = {
    "task": ("training", "inference"),
    "amp": (None, "bf16", "fp16"),
    "quantised": (None, *QUANTISED),
    "optimizer": OPTIMIZERS,
    "attention": ATTENTION,
    "sharding": tuple(SHARDING),
    "load": ("to", "device_map"),
}
"""What there is to choose from for a `Setup`, beside dtypes and numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is done with a model, and how.

    Choices are those of `CHOICES`.

    Attributes:
        task: training or inference.
        dtype: of the weights, and of what is computed without autocast.
        gradients: their dtype; the weights' if None.
        states: dtype of the optimizer's states; the weights' if None.
        master_weights: the optimizer keeps an FP32 copy of weights in fewer bits
            (Micikevicius et al. 2018; the ZeRO paper counts it with the states).
        amp: the dtype that autocast computes in, None for no autocast. It is counted
            where weights are in FP32.
        quantised: how the blocks' matrices are stored, if not in `dtype`.
        optimizer: whose states are kept.
        rank: LoRA's; only its factors are trained. 0 trains the model itself.
        batch: sequences on each GPU.
        length: tokens of each.
        attention: eager, or fused (flash).
        checkpointing: whether layers' activations are made again in backward.
        cache_dtype: the KV cache's; the weights' if None.
        gpus: how many, each with a batch of its own.
        sharding: what is split over them, by `SHARDING`.
        load: how the weights got onto the GPU. ``to``: tensor by tensor, each from
            10 MiB up into a segment of its own; ``device_map``: from one block of
            the size of all (transformers' ``caching_allocator_warmup``).

    Raises:
        ValueError: an unknown choice, an impossible number, or weights that are
            both quantised and trained.
    """

    task: str = "training"
    dtype: str = "fp32"
    gradients: str | None = None
    states: str | None = None
    master_weights: bool = False
    amp: str | None = None
    quantised: str | None = None
    optimizer: str = "adam"
    rank: int = 0
    batch: int = 1
    length: int = 0
    attention: str = "eager"
    checkpointing: bool = False
    cache_dtype: str | None = None
    gpus: int = 1
    sharding: str = "none"
    load: str = "to"

    def __post_init__(self) -> None:
        for what, known in CHOICES.items():
            value = getattr(self, what)
            if value not in known:
                none = "None or " if None in known else ""
                raise _refuse(what, value, f"{none}one of {', '.join(filter(None, known))}")
        for dtype in (self.dtype, self.gradients, self.states):
            _width(dtype or self.dtype)
        bytes_per_parameter(self.cache_dtype or self.dtype)
        _check_batch(self.batch, self.length)
        if type(self.rank) is not int or self.rank < 0:
            raise _refuse("rank", self.rank, "a whole number from 0 up, 0 for no LoRA")
        shard(0, self.gpus)
        if self.task == "training" and self.quantised and not self.rank:
            raise _refuse(
                "rank", 0, "1 or more, for quantised weights are not trained; LoRA's factors are"
            )


def memory(sizes: Dimensions, setup: Setup) -> Memory:
    """What one GPU holds, its allocator's rounding and the CUDA context included.

    Training: between forward and backward, with the gradients and the states of
    a step before. Of the logits also the log-probabilities that the cross-entropy
    keeps, under autocast in FP32 as well. Inference: between two steps of
    generating, with a cache of `length` positions and the logits of one.

    Of what is sharded a GPU holds one flat tensor, its part in whole bytes,
    rounded up. Of the context the larger figure counts.

    Not in it: temporaries, workspaces, buffers, and what communication needs.
    """
    dtype, work = setup.dtype, (setup.batch, setup.length)
    tensors = {"parameters": _weights(sizes, dtype, setup.quantised)}
    held = {"context": CONTEXT[-1], "rounding": 0}
    if setup.task == "training":
        trained = _adapters(sizes, setup.rank) if setup.rank else _shapes(sizes)
        if setup.rank:
            tensors["parameters"] += _stored(trained, dtype)
        tensors["gradients"] = _stored(trained, setup.gradients or dtype)
        tensors["optimizer_states"] = _states(trained, setup.optimizer, setup.states or dtype)
        if setup.master_weights and _width(dtype) < 4:
            tensors["optimizer_states"] += _stored(trained, "fp32")
        autocast = setup.amp is not None and dtype == "fp32"
        computed = setup.amp if setup.amp and autocast else dtype
        held["activations"] = activations(
            sizes, *work, computed, setup.attention, setup.checkpointing, setup.rank, autocast
        )
        held["logits"] = 2 * logits(sizes, *work, computed)
        if autocast:
            held["logits"] += logits(sizes, *work, "fp32")
            held["cast_weights"] = _sum(_cast_weights(sizes, setup, computed))
    else:
        held["logits"] = logits(sizes, setup.batch, 1, dtype)
        held["kv_cache"] = kv_cache(sizes, *work, setup.cache_dtype or dtype)
        caches = 2 * sizes.num_hidden_layers
        if caches:
            held["rounding"] = caches * block(-(-held["kv_cache"] // caches)) - held["kv_cache"]
    for kind, some in tensors.items():
        nbytes, own = _sum(some), kind == "parameters" and setup.load == "to"
        if setup.gpus > 1 and kind in SHARDING[setup.sharding]:
            nbytes = shard(nbytes, setup.gpus)
            some, own = Counter({nbytes: 1}), False
        held[kind] = nbytes
        held["rounding"] += sum(block(n, own) * count for n, count in some.items()) - nbytes
    return Memory(**held)


def _shapes(sizes: Dimensions) -> Counter[tuple[int, ...]]:
    """How many parameter tensors of each shape there are."""
    counts: Counter[tuple[int, ...]] = Counter()
    for (_, shape), count in _counts(sizes).items():
        counts[shape] += count
    return counts


def _stored(parameters: Counter[tuple[int, ...]], dtype: str) -> Counter[int]:
    """Bytes of a tensor: how many there are, for shapes and how many of each."""
    tensors: Counter[int] = Counter()
    for shape, count in parameters.items():
        tensors[math.prod(shape) * _width(dtype)] += count
    return tensors


def _cast_weights(sizes: Dimensions, setup: Setup, dtype: str) -> Counter[int]:
    """The matrices of linear layers, LoRA's included, of which autocast keeps a copy, by bytes.

    Of a tied embedding as well, for the head; not of quantised matrices, whose
    values are made anew each time. Biases are cast too, but not kept for backward.
    """
    cast: Counter[tuple[int, ...]] = Counter()
    for (part, shape), count in _counts(sizes).items():
        tied = sizes.tie_word_embeddings and part == "embedding"
        if part in ("attention", "mlp", "router", "head") and len(shape) == 2:
            if not (setup.quantised and _is_matrix(part, shape)):
                cast[shape] += count
        elif tied and shape[0] == sizes.vocab_size:
            cast[shape] += 1
    if setup.rank:
        cast += _adapters(sizes, setup.rank)
    return _stored(cast, dtype)


def training(
    sizes: Dimensions,
    optimizer: str = "adam",
    dtype: str = "fp32",
    batch: int = 1,
    length: int = 0,
    attention: str = "eager",
    checkpointing: int = 0,
    dropout: bool = False,
    gpus: int = 1,
    sharding: str = "none",
) -> Memory:
    """What a training step holds between forward and backward, its states included.

    Parameters, gradients and states in `dtype`; of the logits also the
    log-probabilities that the cross-entropy keeps. On one of `gpus`, each with a
    batch of its own. Not in it: the optimizer's temporaries, workspaces, rounding
    and the CUDA context.

    Raises:
        ValueError: impossible sizes, an unknown dtype, optimizer, attention or
            sharding, or dropout where the architecture has none.
    """
    setup = Setup(
        task="training",
        optimizer=optimizer,
        dtype=dtype,
        batch=batch,
        length=length,
        attention=attention,
        checkpointing=checkpointing > 0,
        gpus=gpus,
        sharding=sharding,
    )
    kept = activations(
        sizes, batch, length, dtype, attention, checkpointing=checkpointing, dropout=dropout
    )
    return replace(memory(sizes, setup), activations=kept, rounding=0, context=0)


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
    `cache_dtype` says otherwise), and the logits of one position. Not in it:
    rounding and the CUDA context.

    Raises:
        ValueError: impossible sizes, or an unknown dtype or quantisation.
    """
    setup = Setup(
        task="inference",
        dtype=dtype,
        batch=batch,
        length=length,
        quantised=quantised,
        cache_dtype=cache_dtype,
    )
    return replace(memory(sizes, setup), rounding=0, context=0)
