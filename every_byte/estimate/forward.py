"""What a forward pass leaves: activations for backward, logits, keys and values."""

import math
from fractions import Fraction

from every_byte.estimate.architecture import Dimensions, check_dimensions, inputs
from every_byte.estimate.checks import check_batch, check_choice, check_flag, check_whole, refuse
from every_byte.estimate.weights import bytes_per_parameter, computed_width

ATTENTION = ("eager", "flash", "efficient")
"""Kinds of attention: as a matrix of all scores, or by one of two fused kernels."""


def attention_kernel(sizes: Dimensions, dtype: str, attention: str) -> str:
    """What transformers' ``sdpa`` comes to; other kinds are themselves.

    In FP16 and BF16 flash attention (or cuDNN's, which keeps as much). In FP32
    memory-efficient attention, but with grouped heads PyTorch's plain ``math``: no
    fused kernel takes ``enable_gqa`` in FP32 (torch 2.11,
    ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``; transformers 5.17,
    ``integrations/sdpa_attention.py``). Gemma 2 and gpt-oss have no SDPA
    (``_supports_sdpa`` of their ``modeling_*.py``): transformers computes the matrix.
    """
    if attention != "sdpa":
        return attention
    if sizes.has("no sdpa"):
        return "eager"
    if computed_width(dtype) == 2:
        return "flash"
    grouped = sizes.num_key_value_heads < sizes.num_attention_heads
    return "math" if grouped or dtype == "fp64" else "efficient"


def masked_layers(sizes: Dimensions, length: int, attention: str) -> int:
    """How many layers have a mask in SDPA, for a window that the text is longer than.

    Memory-efficient attention or cuDNN's then, with keys and values repeated for all heads
    and the mask as numbers (transformers 5.23, ``masking_utils.py``, and
    ``integrations/sdpa_attention.py``, use_gqa_in_sdpa). Flash attention knows windows.
    """
    fused = attention in ("sdpa", "efficient") and not sizes.has("no sdpa")
    longer = 0 < sizes.sliding_window <= length
    return sizes.sliding_layers if fused and longer else 0


def kinds_of_layers(sizes: Dimensions, length: int, attention: str) -> dict[bool, int]:
    """How many layers there are with a mask (True), and without one."""
    masked = masked_layers(sizes, length, attention)
    found = {True: masked, False: sizes.num_hidden_layers - masked}
    return {kind: count for kind, count in found.items() if count} or {False: 0}


def layer_activations(
    sizes: Dimensions,
    batch: int,
    length: int,
    dtype: str = "fp32",
    attention: str = "eager",
    rank: int = 0,
    autocast: bool = False,
    dropout: bool = False,
    adapters: str | None = None,
    lora_dropout: bool = False,
    masked: bool = False,
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
        attention: one of `ATTENTION`, or ``sdpa`` (see `attention_kernel`).
        rank: of LoRA, if not 0: each matrix keeps what its first factor gives, and
            frozen norms keep less.
        autocast: of FP32 weights to `dtype`: norms and what runs between the layers
            stay in FP32, and each matrix keeps its own copy of what it reads.
        dropout: GPT-2's, of its scores, residuals and embedding: a byte each, and
            the scores once more.
        adapters: dtype of LoRA's factors, `dtype` if None. In another one each of
            them keeps its own copy of what it reads, as PEFT's do
            (``peft/tuners/lora/layer.py``, ``_cast_input_dtype``).
        lora_dropout: of what LoRA's factors read: a copy and a byte for each number.
        masked: whether the layer is one of `masked_layers`.

    Raises:
        ValueError: impossible sizes, an unknown dtype or kind of attention, or
            dropout where the architecture has none.
    """
    check_dimensions(sizes)
    check_batch(batch, length)
    check_choice("attention", attention, (*ATTENTION, "sdpa"))
    check_flag("masked", masked)
    attention = "masked" if masked else attention_kernel(sizes, dtype, attention)
    check_whole("rank", rank, 0, "0 for no LoRA")
    check_flag("autocast", autocast)
    check_flag("dropout", dropout)
    check_flag("lora_dropout", lora_dropout)
    if dropout and not sizes.has("dropout"):
        raise refuse("dropout", dropout, f"False, as {sizes.model_type} has none")
    b = computed_width(dtype)
    half = b < 4  # then norms and softmax are computed in FP32 (not so GPT-2's)
    h, heads = sizes.hidden_size, sizes.num_attention_heads
    queries, keys = heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    experts = max(1, sizes.num_experts_per_tok)
    once = 0  # for the whole batch
    gated, wide = sizes.has("gated"), 4 if autocast else b
    readers = sum(inputs(sizes)) if autocast else 2
    in_fp32 = autocast or not sizes.has("layer norm")  # the softmax
    scores = b + 4 * half if in_fp32 and half else b if half or not in_fp32 else 4
    norms = 4 if sizes.has("four norms") else 2
    token = norms * (_norm_input(sizes, wide) + _norm_rest(sizes, wide, rank)) + readers * b * h
    in_norm = 4 if half else b  # a number of what queries and keys are normalised from
    if sizes.has("query and key norms"):
        scaled = in_norm if sizes.has("wide norms") else b
        token += (in_norm + (0 if rank else scaled)) * (queries + keys)
        token += 4 * (heads + sizes.num_key_value_heads)
    if sizes.has("wide query and key norms"):  # each over all heads
        token += in_norm * (1 if rank else 2) * (queries + keys) + 2 * 4
    if sizes.has("wide norms"):  # 1 + weight of each
        once += max(4, wide) * norms * h
        once += max(4, wide) * 2 * sizes.head_dim * sizes.has("query and key norms")
    if attention == "eager":
        # Query, output, and keys and values repeated for all heads: a copy, unless
        # one head of one sequence can be looked at many times over. Autocast copies
        # the keys, which rotation has made FP32.
        single = batch == sizes.num_key_value_heads == 1
        repeated = (queries + keys if autocast else 2 * keys) if single else 2 * queries
        token += b * (2 * queries + repeated) + heads * length * scores
        token += heads * length * (1 + b) if dropout else 0
    elif attention == "math":
        # Scaled query and key, repeated, and value, repeated; softmax; output
        # (aten/src/ATen/native/transformers/attention.cpp, _attention_math).
        token += b * (4 * queries + heads * length)
    else:
        repeated = queries if masked and sizes.num_key_value_heads > 1 else keys
        token += 2 * b * (queries + repeated) + b * length * masked
        rows = batch * length
        if sizes.has("joined"):
            # The values are a part of what one matrix gave, which stays as a whole; the
            # queries' layout is another one, so the output is copied (rotary's torch.cat).
            token += b * (queries + keys) if repeated == keys else 0  # else values are copied
            token += b * queries if half else 0
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
    if known := sizes.num_local_experts:
        # What each expert reads and gives, in its order; the router's probabilities, the
        # chosen ones' before and after they are made to add up to 1, with their sum; four
        # lists of whole numbers (transformers 5.23, integrations/moe.py, grouped_mm).
        token += 2 * experts * b * h + 4 * known + 2 * 4 * experts + 4 + 4 * 8 * experts
        once += 4 * known
        if rank:  # frozen: what only gradients of experts and router would need is not kept
            token -= b * (experts * (h + sizes.intermediate_size) + h)
    if rank:
        token += _adapters_keep(sizes, rank, b, computed_width(adapters or dtype), lora_dropout)
    return batch * length * token + once


def _adapters_keep(sizes: Dimensions, rank: int, b: int, width: int, dropout: bool) -> int:
    """Bytes for each token that LoRA keeps beside the frozen layers, or instead of them."""
    h, i = sizes.hidden_size, sizes.intermediate_size
    queries = sizes.num_attention_heads * sizes.head_dim
    dense = not sizes.num_local_experts  # experts are not adapted, see `is_matrix`
    qkv, mlp = inputs(sizes)
    matrices = qkv + 1 + (1 + mlp) * dense
    kept = matrices * rank * width
    if width == b and not dropout:
        return kept
    read = qkv * h + queries + (mlp * h + i) * dense  # numbers that are read
    shared = h + (h + i) * dense  # what the frozen layers' inputs were counted for
    return kept + read * (width + dropout) - b * shared


def _norm_input(sizes: Dimensions, b: int) -> int:
    """Bytes for each token of a norm's input, in FP32 but GPT-2's, and of its statistics."""
    if sizes.has("layer norm"):
        return b * sizes.hidden_size + 2 * 4  # mean and deviation
    return max(4, b) * sizes.hidden_size + 4  # deviation


def _norm_rest(sizes: Dimensions, b: int, rank: int) -> int:
    """Bytes for each token of the normalised input, which the norm's own gradient needs."""
    if rank or sizes.has("layer norm"):
        return 0
    wide = sizes.has("wide norms") or sizes.has("norms after")  # before the weight, in FP32
    return (max(4, b) if wide else b) * sizes.hidden_size


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
    adapters: str | None = None,
    lora_dropout: bool = False,
) -> int:
    """Bytes that autograd keeps of the whole model but for the logits.

    With `checkpointing` of each so many layers: the inputs of these groups, and
    at the peak one group's activations, made again. With LoRA of a `rank`: no
    input of the head, and none of the first norm, before which nothing is trained.

    Raises:
        ValueError: impossible sizes, an unknown dtype or kind of attention, or
            dropout where the architecture has none.
    """
    kinds = kinds_of_layers(sizes, length, attention)
    kept = {
        kind: layer_activations(
            sizes,
            batch,
            length,
            dtype,
            attention,
            rank,
            autocast,
            dropout,
            adapters,
            lora_dropout,
            kind,
        )
        for kind in kinds
    }
    if not isinstance(checkpointing, bool):  # True: of each layer
        check_whole("checkpointing", checkpointing, 0, "0 for none")
    b, h, layers = computed_width(dtype), sizes.hidden_size, sizes.num_hidden_layers
    wide = 4 if autocast else b
    norm = _norm_input(sizes, wide)
    last = batch * length * (norm + _norm_rest(sizes, wide, rank) + (0 if rank else b * h))
    if not sizes.has("learned positions"):
        # The rotary embedding's cos and sin: OLMo 2's are FP32, Gemma 3's of two kinds.
        tables = 1 + (sizes.has("wide norms") and 0 < sizes.sliding_layers < layers)
        last += (
            2 * tables * (max(4, b) if sizes.has("norms after") else wide) * length * sizes.head_dim
        )
    if sizes.has("wide norms"):  # 1 + weight of the last norm; not of the first where it is frozen
        last += max(4, wide) * h * (not (rank and layers))
    last += batch * length * h if dropout else 0  # of the embedding
    if checkpointing:
        inputs = math.ceil(layers / checkpointing) * batch * length * h * wide
        scaled = sizes.has("learned positions") or sizes.has("scaled embedding")
        if rank and layers and scaled:
            # The embedding's output, whose gradient PEFT asks for, before what is done to it.
            inputs += batch * length * h * wide
        inputs += batch * length * length if True in kinds else 0  # the mask
        return last + inputs + min(checkpointing, layers) * max(kept.values())
    first = rank and layers and not sizes.has("norms after")
    every = sum(count * kept[kind] for kind, count in kinds.items())
    return last + every - (batch * length * norm if first else 0)


def logits(sizes: Dimensions, batch: int, length: int, dtype: str = "fp32") -> int:
    """Bytes of the scores of all words at `length` positions.

    Raises:
        ValueError: impossible sizes, or an unknown dtype.
    """
    check_dimensions(sizes)
    check_batch(batch, length)
    return batch * length * sizes.vocab_size * computed_width(dtype)


def kv_cache(sizes: Dimensions, batch: int, length: int, dtype: str = "bf16") -> int:
    """Bytes of the keys and values of `length` positions in all layers.

    Two tensors for each layer, of the key-value heads only: grouped-query
    attention (arXiv 2305.13245) divides them by heads / key-value heads.

    Raises:
        ValueError: impossible sizes, or an unknown dtype.
    """
    check_dimensions(sizes)
    check_batch(batch, length)
    return math.ceil(batch * cached_numbers(sizes, length) * cache_bytes(dtype))


def cached_numbers(sizes: Dimensions, length: int) -> int:
    """How many numbers one sequence of `length` tokens has in the caches of all layers.

    An encoder-decoder has as many of the text that it read; a vision transformer has none.

    A layer with a sliding window keeps the window's tokens but one; one with latent
    attention the compressed keys and values, and the part of the key that is rotated
    (transformers 5.23, ``cache_utils.py``, DynamicSlidingWindowLayer, and
    ``models/deepseek_v3/modeling_deepseek_v3.py``).
    """
    if sizes.has("images"):
        return 0
    if sizes.has("encoder"):
        length *= 2
    if sizes.has("latent"):
        return sizes.num_hidden_layers * length * (sizes.kv_lora_rank + sizes.qk_rope_head_dim)
    sliding = sizes.sliding_layers if sizes.sliding_window else 0
    seen = min(length, max(0, sizes.sliding_window - 1))
    tokens = (sizes.num_hidden_layers - sliding) * length + sliding * seen
    return 2 * tokens * sizes.num_key_value_heads * sizes.head_dim


def inner_numbers(sizes: Dimensions) -> int:
    """How many numbers a token has between an MLP's matrices, of all experts that it uses."""
    experts = max(1, sizes.num_experts_per_tok) + sizes.n_shared_experts
    chosen = experts * (sizes.moe_intermediate_size or sizes.intermediate_size)
    return max(chosen, sizes.intermediate_size * (sizes.first_k_dense_replace > 0))


SCALES = {"int8": Fraction(4, 64), "int4": Fraction(4, 64)}
"""Bytes of scales for each number of a quantised cache: a scale and a shift of 2 B for each
64 (transformers 5.23, ``cache_utils.py``, QuantizedLayer, ``q_group_size``). FP8 has one
for a whole layer (vLLM, ``--kv-cache-dtype fp8``), which is not counted."""


def cache_bytes(dtype: str) -> Fraction:
    """Bytes of one number in a cache, its share of scales included.

    Raises:
        ValueError: the dtype is unknown.
    """
    return bytes_per_parameter(dtype) + SCALES.get(dtype, 0)
