"""How many users one GPU, or a few of them, can serve at a time: as vLLM shares memory out.

``serve(sizes, Serving(...), card)`` is the front door:

>>> from every_byte import estimate
>>> from every_byte.data import cards
>>> sizes = estimate.dimensions("Llama-3.1-8B")
>>> served = estimate.serve(sizes, estimate.Serving(length=16_000), cards()["RTX 4090"])
>>> served.users, served.tokens, served.kv_cache  # at a time; that the cache holds; bytes

All results are of each GPU, in bytes unless a name says otherwise. All of them are
estimated: weights and cache by formulas, the rest from published logs.
"""

import math
from collections import Counter
from dataclasses import dataclass

from every_byte.data import Card
from every_byte.data.others import OtherCard
from every_byte.estimate.architecture import Dimensions, check_dimensions, tensor_counts
from every_byte.estimate.checks import check_choice, check_flag, check_whole, refuse
from every_byte.estimate.encoders import is_other
from every_byte.estimate.forward import cache_bytes, inner_numbers
from every_byte.estimate.weights import (
    QUANTISED,
    bytes_per_parameter,
    computed_width,
    is_stored,
    stored_matrix,
    total_bytes,
)

LOGIT_BYTES = 38
"""Bytes for each logit while vLLM samples: in BF16 and FP32, sorted with their indices,
their probabilities and sums. Not derived: it is what is left of the peak activations that
logs of five models on an H100 tell (``llm-d/llm-d-benchmark``,
``config_explorer/empirical-vllm-memory-results.md``), by their vocabularies."""

NON_TORCH = 139_586_437, 590_558_003
"""Bytes outside PyTorch that vLLM finds beside the context while it profiles: 0.13 GiB on
one GPU; 0.55 GiB on each of several, which NCCL needs (the same logs)."""

GRAPHS = 1_105_954_079
"""Bytes of CUDA graphs, at most: 1.03 GiB. Logs tell 0.1 to 1.03 GiB (the same, and
vllm-project/vllm#21489). vLLM's own estimate, which it takes off since 0.21, may be far
above (vllm-project/vllm#45178, #53013)."""

LARGE = 70 << 30  # bytes of a card on which vLLM takes more at a time

VOCABULARY_MULTIPLE = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is served.

    Attributes:
        dtype: of the weights that are not quantised, and of what is computed.
        quantised: how the layers' matrices are stored, experts too, if not in `dtype`.
        cache_dtype: the KV cache's; `dtype` if None.
        length: tokens of each user's sequence, prompt and answer.
        gpus: over which weights and key-value heads are split (tensor parallelism).
        utilization: the part of the GPU's memory that vLLM may take, in percent
            (``--gpu-memory-utilization``: 92 is 0.92, the default of ``vllm/config/cache.py``
            in 2026; it was 0.9).
        sequences: that it runs at a time (``--max-num-seqs``); 0 for its default on the card.
        batched_tokens: that one step reads of prompts (``--max-num-batched-tokens``); 0 for
            its default on the card.
        block_size: tokens of a block of the cache.
        graphs: whether CUDA graphs are captured (no ``--enforce-eager``).

    Raises:
        ValueError: an unknown choice, or an impossible number.
    """

    dtype: str = "bf16"
    quantised: str | None = None
    cache_dtype: str | None = None
    length: int = 4096
    gpus: int = 1
    utilization: int = 92
    sequences: int = 0
    batched_tokens: int = 0
    block_size: int = 16
    graphs: bool = True

    def __post_init__(self) -> None:
        computed_width(self.dtype)
        bytes_per_parameter(self.cache_dtype or self.dtype)
        check_choice("quantised", self.quantised, (None, *QUANTISED))
        for what in ("length", "gpus", "block_size", "utilization"):
            check_whole(what, getattr(self, what), 1)
        if self.utilization > 100:
            raise refuse("utilization", self.utilization, "at most 100, in percent")
        for what in ("sequences", "batched_tokens"):
            check_whole(what, getattr(self, what), 0, "0 for vLLM's default")
        check_flag("graphs", self.graphs)


@dataclass(frozen=True, slots=True)
class Served:
    """What each GPU holds, in bytes, and whom it serves.

    Attributes:
        weights: its part of the parameters.
        activations: the most that a step takes for the moment, cuBLAS's workspace
            included: reading prompts, or sampling for all sequences.
        non_torch: what is outside PyTorch, but for the CUDA context.
        graphs: CUDA graphs.
        allowed: what vLLM may take of the card.
        kv_cache: what is left of it for keys and values; 0 if nothing is.
        token: the cache's bytes for each token.
        tokens: that the cache holds, in whole blocks.
        sequences: that vLLM runs at a time, at most.
        users: sequences of the length asked for that the cache holds at a time, and
            `sequences` at most.
    """

    weights: int
    activations: int
    non_torch: int
    graphs: int
    allowed: int
    kv_cache: int
    token: int
    tokens: int
    sequences: int
    users: int


def default_limits(card: Card) -> tuple[int, int]:
    """How many sequences and batched tokens vLLM's server takes on a card.

    1,024 and 8,192 from 70 GiB on, but not on an A100, else 256 and 2,048
    (``vllm/engine/arg_utils.py``, get_batch_defaults).
    """
    large = card.usable >= LARGE and card.compute_capability != "8.0"
    return (1024, 8192) if large else (256, 2048)


def part_of(gpus: int, sizes: Dimensions, shape: tuple[int, ...], part: str) -> tuple[int, ...]:
    """The shape of one GPU's part of a parameter under tensor parallelism.

    Queries, keys and values and the MLP's first matrices are split by outputs, those
    that follow by inputs; embedding and head by words, up to a multiple of 64; norms,
    routers and what each head shares are whole (``vllm/model_executor/layers/linear.py``).
    """
    if part in ("norm", "router", "latent") or gpus == 1:
        return shape
    if part in ("embedding", "head"):
        words = sizes.vocab_size
        if words not in shape:  # learned positions
            return shape
        padded = -(-words // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        return tuple(-(-padded // gpus) if n == words else n for n in shape)
    if sizes.has("biases") and shape == (sizes.hidden_size,):
        return shape  # of a matrix that is split by inputs
    return (*shape[:-1], -(-shape[-1] // gpus))


def weights(sizes: Dimensions, serving: Serving) -> int:
    """Bytes of one GPU's weights, and of the rotary embedding's table.

    Raises:
        ValueError: the heads cannot be split so.
    """
    tensors: Counter[int] = Counter()
    width = bytes_per_parameter(serving.dtype)
    keys = sizes.num_key_value_heads * sizes.head_dim
    for (part, shape), count in tensor_counts(sizes).items():
        own = part_of(serving.gpus, sizes, shape, part)
        separate = not (sizes.model_type == "gpt2" or sizes.has("joined") or sizes.has("latent"))
        if part == "attention" and keys in shape[-1:] and separate:
            # Key-value heads are at least one on each GPU, copied if need be.
            heads = key_value_heads(sizes, serving.gpus)
            square = sizes.num_attention_heads == sizes.num_key_value_heads
            own = own if square else (*shape[:-1], heads * sizes.head_dim)
        if serving.quantised and is_served(sizes, part, shape, serving.quantised):
            stored = stored_matrix(own, serving.quantised)
        else:
            stored = (math.ceil(math.prod(own) * width),)
        for nbytes in stored:
            tensors[nbytes] += count
    rotary = 0
    if not sizes.has("learned positions"):
        rotary = math.ceil(sizes.max_position_embeddings * sizes.head_dim * width)
    return total_bytes(tensors) + rotary


def is_served(sizes: Dimensions, part: str, shape: tuple[int, ...], quantised: str) -> bool:
    """Whether vLLM has a parameter in fewer bits: experts, too, whatever the format."""
    return (len(shape) == 2 and part == "mlp") or is_stored(sizes, part, shape, quantised)


def key_value_heads(sizes: Dimensions, gpus: int) -> int:
    """Key-value heads on each GPU: its part, or one that several of them have.

    Raises:
        ValueError: query or key-value heads do not come out even.
    """
    heads, keys = sizes.num_attention_heads, sizes.num_key_value_heads
    if heads % gpus:
        raise refuse("gpus", gpus, f"a divisor of the {heads} attention heads")
    if keys % gpus and gpus % keys and not sizes.has("latent"):
        raise refuse("gpus", gpus, f"a divisor or a multiple of the {keys} key-value heads")
    return max(1, keys // gpus)


def serve(sizes: Dimensions, serving: Serving, card: Card) -> Served:
    """What each GPU holds when vLLM serves the model, and how many users at a time.

    As vLLM shares memory out at its start: it may take a part of the card; weights, the
    peak of a profiled step, what is outside PyTorch and CUDA graphs are taken off, and
    the rest becomes the cache (``vllm/v1/worker/gpu_worker.py``,
    determine_available_memory), in blocks of `block_size` tokens of all layers.

    Raises:
        ValueError: heads that cannot be split over so many GPUs; or an argument is
            something else.
    """
    check_dimensions(sizes)
    if not isinstance(serving, Serving):
        raise refuse("serving", serving, "a Serving")
    if not isinstance(card, Card):
        raise refuse("card", card, "a Card, such as cards()['H100']")
    if isinstance(card, OtherCard) and card.kind == "Apple":
        raise refuse("card", "Apple's", "one that vLLM shares out: of NVIDIA or AMD")
    if is_other(sizes):
        raise refuse("model_type", sizes.model_type, "a decoder-only one, for vLLM")
    if sizes.has("learned positions") and serving.length > sizes.max_position_embeddings:
        most = f"at most the {sizes.max_position_embeddings} positions that the model has learned"
        raise refuse("length", serving.length, most)
    sequences, batched = default_limits(card)
    sequences, batched = serving.sequences or sequences, serving.batched_tokens or batched
    heads = key_value_heads(sizes, serving.gpus)
    held, b, h = weights(sizes, serving), computed_width(serving.dtype), sizes.hidden_size
    # Reading prompts: hidden states and residuals, the gate, up, and their product.
    inner = -(-inner_numbers(sizes) // serving.gpus)
    reading = batched * b * (4 * h + 3 * inner)
    sampling = sequences * sizes.vocab_size * LOGIT_BYTES + (batched + sequences) * h * b
    activations = max(reading, sampling) + card.cublas_workspace
    outside, graphs = NON_TORCH[serving.gpus > 1], GRAPHS * serving.graphs
    allowed = card.usable * serving.utilization // 100
    left = max(0, allowed - held - activations - outside - graphs)
    numbers = 2 * heads * sizes.head_dim
    if sizes.has("latent"):  # whole on each GPU
        numbers = sizes.kv_lora_rank + sizes.qk_rope_head_dim
    width = cache_bytes(serving.cache_dtype or serving.dtype)
    token = math.ceil(sizes.num_hidden_layers * numbers * width)
    blocks = left // (serving.block_size * token) if token else 0
    needed = -(-serving.length // serving.block_size)
    return Served(
        weights=held,
        activations=activations,
        non_torch=outside,
        graphs=graphs,
        allowed=allowed,
        kv_cache=blocks * serving.block_size * token,
        token=token,
        tokens=blocks * serving.block_size,
        sequences=sequences,
        users=min(sequences, blocks // needed),
    )
