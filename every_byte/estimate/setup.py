"""What is done with a model, and what one GPU holds of it, by kind."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from every_byte.allocator.config import kLargeBuffer, kMinLargeAlloc, kSmallSize
from every_byte.data import CONTEXT
from every_byte.estimate.architecture import (
    TRAITS,
    Dimensions,
    check_dimensions,
    inputs,
    is_matrix,
    parameters,
    shape_counts,
    tensor_counts,
    with_layers,
)
from every_byte.estimate.blocks import block, shared_segments
from every_byte.estimate.checks import check_batch, check_choice, check_flag, check_whole, refuse
from every_byte.estimate.encoders import check_reading, is_other, reading_moments
from every_byte.estimate.forward import (
    ATTENTION,
    activations,
    attention_kernel,
    inner_numbers,
    kinds_of_layers,
    kv_cache,
    layer_activations,
    logits,
)
from every_byte.estimate.optimizers import (
    IMPLEMENTATIONS,
    OPTIMIZERS,
    step_temporaries,
    stored_states,
)
from every_byte.estimate.weights import (
    QUANTISED,
    STORED,
    adapters,
    bytes_per_parameter,
    computed_width,
    is_stored,
    stored,
    stored_weights,
    total_bytes,
)
from every_byte.kinds import FIELDS

# What ZeRO's stages split over the GPUs (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).
SHARDING = {
    "none": (),
    "ZeRO 1": ("optimizer_states",),
    "ZeRO 2": ("optimizer_states", "gradients"),
    "ZeRO 3": ("optimizer_states", "gradients", "parameters"),
    "FSDP": ("optimizer_states", "gradients", "parameters"),
}
OFFLOADED = {
    None: (),
    "optimizer": ("optimizer_states",),
    "all": ("optimizer_states", "gradients", "parameters"),
}
"""What lies on the host. ``optimizer``: DeepSpeed's ZeRO-Offload, whose step runs there; it
moves gradients as well, bucket by bucket, which are counted whole here: a bound. ``all``: what
FSDP's ``CPUOffloadPolicy`` moves (``torch/distributed/fsdp/_fully_shard/_fsdp_api.py``)."""


def shard(nbytes: int, gpus: int) -> int:
    """One GPU's part of bytes that are split evenly, in whole bytes: rounded up.

    Raises:
        ValueError: `gpus` is no whole number, or below 1; or `nbytes` is none, or
            negative.
    """
    check_whole("nbytes", nbytes)
    check_whole("gpus", gpus, 1)
    return -(-nbytes // gpus)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a model takes on one GPU, by kind, in bytes; `total` is their sum.

    Cast weights are the copies that autocast makes. Rounding is the
    allocator's, of parameters, gradients, optimizer states and KV cache.
    Moments: what is allocated at each, in bytes, without the CUDA context; the
    largest is the peak. Margin: what else of its segments the allocator may have to
    keep at the peak, see `shared_segments` and `fragments`. Host: what is offloaded,
    for each GPU, not in the total.
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
    moments: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)
    margin: int = field(default=0, kw_only=True)
    host: int = field(default=0, kw_only=True)

    @property
    def total(self) -> int:
        """The sum of all kinds, in bytes."""
        return sum(getattr(self, kind) for kind in FIELDS)

    @property
    def held(self) -> int:
        """What stays from step to step, in bytes: no activations, gradients set to None."""
        return dict(self.moments)["at rest"]

    @property
    def peak(self) -> int:
        """The largest moment, in bytes, without the CUDA context."""
        return max((nbytes for _, nbytes in self.moments), default=0)

    @property
    def peak_at(self) -> str:
        """The moment at which it peaks; of equal ones the first."""
        return max(self.moments, key=lambda moment: moment[1])[0]

    @property
    def least(self) -> int:
        """What a card cannot do without, in bytes: the peak and the CUDA context."""
        return self.peak + self.context

    @property
    def needed(self) -> int:
        """What is enough for certain, in bytes: the peak, its margin and the CUDA context."""
        return self.peak + self.margin + self.context

    def verdict(self, capacity: int) -> str:
        """``fits``, ``may fit`` or ``does not fit`` on a card of `capacity` bytes.

        It may fit between `least` and `needed`: whether it does is for the
        allocator's fragmentation to tell, which a replay follows and no formula.

        Raises:
            ValueError: `capacity` is no whole number, or negative.
        """
        check_whole("capacity", capacity)
        if self.needed <= capacity:
            return "fits"
        return "may fit" if self.least <= capacity else "does not fit"


CHOICES: dict[str, tuple[str | None, ...]] = {
    "task": ("training", "inference"),
    "amp": (None, "bf16", "fp16"),
    "quantised": (None, *QUANTISED),
    "optimizer": tuple(OPTIMIZERS),
    "attention": (*ATTENTION, "sdpa"),
    "implementation": IMPLEMENTATIONS,
    "adapters": (None, "fp32", "fp16", "bf16"),
    "sharding": tuple(SHARDING),
    "load": ("to", "device_map"),
    "offload": tuple(OFFLOADED),
}
"""What there is to choose from for a `Setup`, beside dtypes and numbers."""


FLAGS = (
    "master_weights",
    "checkpointing",
    "dropout",
    "lora_dropout",
    "accumulation",
    "all_logits",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is done with a model, and how.

    Choices are those of `CHOICES`.

    Attributes:
        task: training or inference.
        dtype: of the weights, and of what is computed without autocast.
        gradients: their dtype; the weights' if None.
        states: dtype of the optimizer's states; what its library makes if None, mostly the
            weights'.
        master_weights: the optimizer keeps an FP32 copy of weights in fewer bits
            (Micikevicius et al. 2018; the ZeRO paper counts it with the states).
        amp: the dtype that autocast computes in, None for no autocast. It is counted
            where weights are in FP32.
        quantised: how the blocks' matrices are stored, if not in `dtype`.
        optimizer: whose states are kept.
        rank: LoRA's; only its factors are trained. 0 trains the model itself.
        batch: sequences on each GPU.
        length: tokens of each.
        attention: eager, one of the fused kernels, or ``sdpa``, transformers' default.
        dropout: GPT-2's, of which transformers' default is 0.1.
        implementation: how the optimizer makes its step, see `IMPLEMENTATIONS`.
        adapters: dtype of LoRA's factors; the weights' if None. PEFT makes them FP32.
        lora_dropout: whether what LoRA's factors read is dropped out.
        accumulation: whether gradients of earlier batches are there in forward.
        all_logits: whether prefill gives the logits of all positions, as a plain
            forward does, or of the last one only, as generating does.
        checkpointing: whether layers' activations are made again in backward.
        cache_dtype: the KV cache's; the weights' if None.
        gpus: how many, each with a batch of its own.
        sharding: what is split over them, by `SHARDING`.
        offload: what lies on the host, by `OFFLOADED`; of training only.
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
    dropout: bool = False
    implementation: str = "foreach"
    adapters: str | None = "fp32"
    lora_dropout: bool = False
    accumulation: bool = False
    all_logits: bool = False
    offload: str | None = None

    def __post_init__(self) -> None:
        for what, known in CHOICES.items():
            check_choice(what, getattr(self, what), known)
        for dtype in (self.dtype, self.gradients, self.states):
            computed_width(self.dtype if dtype is None else dtype)
        bytes_per_parameter(self.dtype if self.cache_dtype is None else self.cache_dtype)
        for what in FLAGS:
            check_flag(what, getattr(self, what))
        check_batch(self.batch, self.length)
        check_whole("rank", self.rank, 0, "0 for no LoRA")
        shard(0, self.gpus)
        if self.task == "training" and self.quantised and not self.rank:
            raise refuse(
                "rank", 0, "1 or more, for quantised weights are not trained; LoRA's factors are"
            )
        if self.task == "training" and self.quantised and not STORED[self.quantised].trained:
            trained = ", ".join(name for name, known in STORED.items() if known.trained)
            raise refuse("quantised", self.quantised, f"one that LoRA is trained beside: {trained}")


WORKSPACE = 8_519_680
"""What cuBLAS takes for each thread that multiplies matrices, in bytes: PyTorch's default
``:4096:2:16:8`` (``aten/src/ATen/cuda/CublasHandlePool.cpp``). From Hopper on it is 32 MiB."""


LT_WORKSPACE = 2**20
"""What cuBLASLt keeps from its first product with a bias on, in bytes (torch 2.11, measured)."""


def training_moments(
    sizes: Dimensions,
    setup: Setup,
    at_rest: int,
    gradients: int,
    kept: int,
    again: int,
    one: int,
    outer: int,
    step: int,
    cast: int,
) -> tuple[tuple[str, int], ...]:
    """What is allocated at the points of a training step at which it may peak, in bytes.

    The loss is transformers' (``loss/loss_utils.py``, ForCausalLMLoss): logits in FP32
    beside those of the model, and their log-probabilities, which stay.

    Args:
        sizes: of the model.
        setup: what is done.
        at_rest: parameters, states and workspaces.
        gradients: of all trained parameters.
        kept: for backward, but the log-probabilities.
        again: activations that a checkpoint makes again in backward.
        one: activations of one layer, and autocast's copies of its weights.
        outer: what is kept for backward outside of the layers.
        step: what the optimizer takes for the moment.
        cast: copies of layers' weights that autocast keeps until the forward pass
            ends, and no longer, for checkpoints make them again.
    """
    tokens = setup.batch * setup.length
    autocast = setup.amp is not None and setup.dtype == "fp32"
    b = 2 if autocast else computed_width(setup.dtype)
    scores = block(tokens * sizes.vocab_size * b, own_segment=True)
    upcast = block(tokens * sizes.vocab_size * max(4, b), own_segment=True)
    forward = at_rest + kept + gradients * setup.accumulation
    whole_gradients = computed_width(setup.gradients or setup.dtype)
    root, unit = gathered(sizes, setup)
    # The embedding's own gradient is dense (aten/src/ATen/native/cuda/Embedding.cu).
    # Tied, the head's is there as well, and their sum is a third tensor
    # (torch/csrc/autograd/input_buffer.cpp).
    embedding = (
        0
        if setup.rank
        else block(sizes.vocab_size * sizes.hidden_size * whole_gradients, own_segment=True)
    )
    extra = 2 * sizes.tie_word_embeddings + setup.accumulation
    head = 0 if setup.rank else sizes.vocab_size * sizes.hidden_size * b
    width = tokens * sizes.hidden_size * b
    layer = layer_temporaries(sizes, setup, b)
    # Of the first layer and of the embedding there are none yet, but of a tied head.
    outside = sum(parameters(with_layers(sizes, 0)).values())
    whole = sum(parameters(sizes).values())
    of_layers = gradients * (whole - outside) // whole
    done = gradients - of_layers // max(1, sizes.num_hidden_layers)
    done -= 0 if sizes.tie_word_embeddings else embedding
    last = forward - cast + again + head * (not setup.accumulation) + layer
    first, ending = at_rest + done + one + layer, gradients
    if root:  # gradients of layers are parts, the root's are whole until backward ends
        trained = 0 if setup.rank else 1
        ending = of_layers + root + (root + unit) * trained
        last = forward - cast + root + head
        kept_on = 0 if setup.checkpointing else one
        last += max(
            again - outer + 2 * unit + layer,
            # A layer on, whose gradients wait to be sent while this one's are made.
            again - outer - kept_on + (2 + trained) * unit + layer,
            -outer - 2 * kept_on + (2 + 2 * trained) * unit + 3 * width,
        )
        layers = sizes.num_hidden_layers
        parts = of_layers * max(0, layers - 2) // max(1, layers)
        first = at_rest + parts + root + head + (2 + 2 * trained) * unit
        first += kept_on + 3 * width
    return (
        ("at rest", at_rest),
        (
            "end of forward: the loss",
            forward + root + unit + 2 * upcast + (scores if b < 4 else 0),
        ),
        ("start of backward: the loss", forward - cast + root + unit + 3 * upcast),
        (
            "backward: the head",
            forward - cast + root + 2 * unit + head + max(scores + width, head * autocast),
        ),
        ("backward: the last layer", last),
        ("backward: the first layer", first),
        ("end of backward: the embedding", at_rest + ending + extra * embedding + 3 * width),
        ("optimizer step", at_rest + gradients + step),
    )


def gathered(sizes: Dimensions, setup: Setup) -> tuple[int, int]:
    """Bytes of what a sharded model has whole while it computes, in the weights' dtype.

    What stands outside of the layers, which FSDP's root keeps until backward ends; and one
    layer. A layer that computes stands beside the next one, which is fetched ahead: as it
    arrives, and as the parameters made of it. In backward a layer's gradient is whole until
    it is reduced, and that of the layer after waits for it to be sent
    (``torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py``, replayed with torch 2.14).
    """
    sharded = setup.gpus > 1 and "parameters" in SHARDING[setup.sharding]
    if not (sharded or setup.offload == "all"):
        return 0, 0
    none = with_layers(sizes, 0)
    width = computed_width(setup.dtype)
    outside = sum(parameters(none).values())
    layer = sum(parameters(with_layers(sizes, 1)).values()) - outside
    return width * outside, width * layer * (sizes.num_hidden_layers > 0)


def layer_temporaries(sizes: Dimensions, setup: Setup, b: int) -> int:
    """Bytes that a layer's backward takes for the moment, its MLP's or its attention's.

    Of the MLP the gradients of the product and its two factors, and of the matrix that
    comes last. Of attention as a matrix those of the scores, before and after the
    softmax, and their product, in the softmax's dtype (``softmax_backward_cuda_out`` in
    ``aten/src/ATen/native/cuda/SoftMax.cu``); what was kept for the MLP, and the
    scores' copy in fewer bits, is gone by then, and its matrices have gradients.
    """
    tokens, experts = setup.batch * setup.length, max(1, sizes.num_experts_per_tok)
    computed = {2: "bf16", 4: "fp32", 8: "fp64"}[b]
    kernel = attention_kernel(sizes, computed, setup.attention)
    autocast = setup.amp is not None and setup.dtype == "fp32"
    gated = sizes.has("gated")
    powers = 4 * (autocast and not gated)  # of GPT-2's GELU, in FP32
    own = 0 if setup.rank else computed_width(setup.gradients or setup.dtype)
    root, _ = gathered(sizes, setup)
    own *= 1 if root or setup.gpus == 1 or "gradients" not in SHARDING[setup.sharding] else 0
    matrix = own * sizes.hidden_size * sizes.intermediate_size * max(1, sizes.num_local_experts)
    last = matrix * (2 if sizes.has("joined") and gated else 1)
    taken = tokens * (3 * b + powers) * experts * sizes.intermediate_size + last
    kinds = kinds_of_layers(sizes, setup.length, setup.attention)
    if kernel in ("eager", "math") and False in kinds:
        softmax = b if sizes.has("layer norm") and not autocast else max(4, b)
        scores = 3 * softmax - (b if softmax > b else 0)
        if softmax > b and "fp16" in (setup.dtype, setup.amp if autocast else None):
            scores -= b  # softmax goes from FP16 to FP32 and back by itself
        mlp = (4 if gated else 5) * b * experts * sizes.intermediate_size
        mlp += 3 * b * sizes.hidden_size  # its norm and what linear layers read
        if setup.rank and not sizes.num_local_experts:  # what its factors read
            width = b if autocast else computed_width(setup.adapters or setup.dtype)
            if width != b or setup.lora_dropout:
                read = inputs(sizes)[1] * sizes.hidden_size + sizes.intermediate_size
                shared = sizes.hidden_size + sizes.intermediate_size
                mlp += read * (width + setup.lora_dropout) - b * shared
        output = own * sizes.num_attention_heads * sizes.head_dim * sizes.hidden_size
        attention = tokens * (sizes.num_attention_heads * setup.length * scores - mlp)
        if not setup.accumulation:  # else gradients are added to what was there
            attention += (2 + gated) * matrix + output
            # Autocast's copies go with it.
            attention -= ((2 + gated) * matrix + output) // 2 if autocast else 0
        taken = max(taken, attention)
    return taken


def inference_moments(sizes: Dimensions, setup: Setup, at_rest: int) -> tuple[tuple[str, int], ...]:
    """What is allocated while a prompt of `length` is read, and while more is generated."""
    b, h = computed_width(setup.dtype), sizes.hidden_size
    tokens, rows = setup.batch * setup.length, setup.batch
    scored = tokens if setup.all_logits else rows
    scores = block(scored * sizes.vocab_size * b, own_segment=True)
    cache = kv_cache(sizes, *(setup.batch, setup.length), setup.cache_dtype or setup.dtype)
    grown = cache // max(1, sizes.num_hidden_layers)  # a layer's, made anew with one token more
    scaled = 2 if sizes.has("scaled logits") else 1  # before and after
    kernel = attention_kernel(sizes, setup.dtype, setup.attention)
    mask = tokens * setup.length * b * (kernel == "eager")
    positions = setup.length * h * b * sizes.has("learned positions")
    layer = prefill_temporaries(sizes, setup, b) + positions
    return (
        ("at rest", at_rest),
        ("prefill: a layer", at_rest + mask + layer),
        ("prefill: the logits", at_rest + mask + scaled * scores + tokens * b * h),
        ("decoding", at_rest + grown + mask + rows * sizes.vocab_size * b),
    )


def prefill_temporaries(sizes: Dimensions, setup: Setup, b: int) -> int:
    """Bytes that the last layer takes for the moment while a prompt is read.

    Its MLP, its attention, or the norms of its queries, whichever takes most, beside
    what the calling functions still hold: the embedding's output, the layer's input,
    and the normalised one (transformers 5, ``models/*/modeling_*.py``).
    """
    h, heads, gpt2 = sizes.hidden_size, sizes.num_attention_heads, not sizes.has("gated")
    tokens, queries = setup.batch * setup.length, heads * sizes.head_dim
    callers = 3 if gpt2 else 1 + min(sizes.num_hidden_layers, 2)
    kernel = attention_kernel(sizes, setup.dtype, setup.attention)
    repeated = sizes.num_key_value_heads < heads
    # Gate, up and their product. GPT-2's: the input, and three of its GELU's.
    inner = tokens * b * inner_numbers(sizes)
    joined = sizes.has("joined") and not gpt2  # gate and up are one tensor, which stays
    most = (3 + gpt2 + joined) * block(inner, own_segment=True)
    if kSmallSize < inner < kMinLargeAlloc:
        most += kSmallSize  # what one of them may keep of its segment, see `shared_segments`
    most += tokens * (1 + gpt2) * b * h  # the sum after attention, and GPT-2's attention itself
    most = max(most, tokens * b * of_experts(sizes), tokens * b * of_latent_attention(sizes))
    if sizes.sliding_layers and sizes.sliding_window <= setup.length and kernel != "eager":
        # A mask of what the window shows, as truth values and as numbers to add.
        most += tokens * setup.length * (1 + b)
    if kernel == "eager":
        most += tokens * b * heads * setup.length  # returned, and held until the layer ends
        # Scores before and after the softmax, which is in FP32 but GPT-2's: of BF16 with
        # a copy (softmax in aten/src/ATen/native/SoftMax.cpp), of FP16 without.
        score = 2 * b if gpt2 or b == 4 else 2 * b + 4 + 2 * (setup.dtype == "bf16")
        attention = heads * setup.length * score + (1 + 2 * repeated) * b * queries
        keys = sizes.num_key_value_heads * sizes.head_dim
        if gpt2:  # the query is a part of what one matrix gave, which stays as a whole
            attention += 2 * b * keys
        elif sizes.has("joined"):
            attention += b * (queries + 2 * keys)
        most = max(most, tokens * attention)
    elif kernel == "math":
        # The same, and a byte that tells infinite ones (_safe_softmax in
        # aten/src/ATen/native/transformers/attention.cpp).
        most = max(most, tokens * (heads * setup.length * (2 * b + 1) + 4 * b * queries))
    if sizes.has("query and key norms"):
        most = max(most, tokens * (b + 2 * max(4, b)) * queries)
    return tokens * callers * b * h + most


def of_experts(sizes: Dimensions) -> int:
    """Numbers for each token that a layer's experts take for the moment, in the model's dtype.

    What each expert reads; gate and up in one; the activation and the product. Then what
    they give: in their order, weighted, and in the tokens' order (transformers 5.23,
    ``integrations/moe.py``, grouped_mm). DeepSeek-V3's weights are FP32, and so are the
    last two.
    """
    if not sizes.num_local_experts:
        return 0
    read = sizes.num_experts_per_tok * sizes.hidden_size
    inner = sizes.num_experts_per_tok * (sizes.moe_intermediate_size or sizes.intermediate_size)
    given = 6 if sizes.model_type == "deepseek_v3" else 4
    return max(read + 4 * inner, given * read) + sizes.hidden_size + 4 * sizes.num_local_experts


def of_latent_attention(sizes: Dimensions) -> int:
    """Numbers for each token that DeepSeek's attention takes for the moment.

    Queries as they come and with their rotated part; keys and values as they come, the keys
    with theirs; the values as a tensor of their own; the result.
    """
    if not sizes.has("latent"):
        return 0
    query = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
    head = 3 * query + sizes.qk_nope_head_dim + 3 * sizes.v_head_dim
    return sizes.num_attention_heads * head + sizes.kv_lora_rank


def check_together(sizes: Dimensions, setup: Setup) -> None:
    """Refuse what this model cannot do.

    Raises:
        ValueError: more tokens than learned positions, a rank above a matrix's own,
            flash attention in FP32.
    """
    if sizes.has("learned positions") and setup.length > sizes.max_position_embeddings:
        most = f"at most the {sizes.max_position_embeddings} positions that the model has learned"
        raise refuse("length", setup.length, most)
    if setup.task == "inference" and is_other(sizes):
        check_reading(sizes, setup)
    if setup.task == "training":
        if sizes.has("inference only"):
            trained = ", ".join(name for name in TRAITS if "inference only" not in TRAITS[name])
            raise refuse(
                "model_type",
                sizes.model_type,
                f"for training one whose activations the formulas describe: {trained}",
            )
        narrow = sizes.hidden_size
        if setup.rank > narrow:
            raise refuse("rank", setup.rank, f"at most hidden_size {narrow}")
        computed = setup.amp if setup.amp and setup.dtype == "fp32" else setup.dtype
        if setup.attention == "flash" and computed_width(computed) != 2:
            raise refuse(
                "attention", "flash", f"another one, for flash is for fp16 and bf16, not {computed}"
            )


def fragments(sizes: Dimensions, setup: Setup) -> int:
    """Bytes that may lie idle in segments when the peak comes: a bound, measured, not proven.

    Before memory runs out PyTorch gives segments back, but only whole ones
    (``c10/cuda/CUDACachingAllocator.cpp``, release_cached_blocks). What outlives a step,
    such as the optimizer's states in the first one, may lie in segments that were taken
    for its largest blocks; these then have to be taken again. Two of the largest, the
    model's own logits beside those in FP32, and a segment of smaller blocks, are enough
    for all traces of an H200 (`least` in ``tests/measured_peaks.toml``) and for replays
    of random set-ups with few layers, where states leave most of a segment idle
    (``python -m benchmarks.estimates``). With attention as a matrix, or with a mask, one of
    each kind of large block besides.
    """
    training = setup.task == "training"
    autocast = training and setup.amp is not None and setup.dtype == "fp32"
    b = 2 if autocast else computed_width(setup.dtype)
    tokens, h, heads = setup.batch * setup.length, sizes.hidden_size, sizes.num_attention_heads
    scored = (tokens if training or setup.all_logits else setup.batch) * sizes.vocab_size
    large = [
        scored * (max(4, b) if training else b),
        tokens * inner_numbers(sizes) * b,
    ]
    if sizes.has("position bias"):
        large.append(heads * setup.length**2 * b)
    if training and not setup.rank:
        large.append(sizes.vocab_size * h * computed_width(setup.gradients or setup.dtype))
    computed = {2: "bf16", 4: "fp32", 8: "fp64"}[b]
    if sizes.has("query and key norms"):
        large.append(tokens * heads * sizes.head_dim * max(4, b))
    once = 0
    kinds = kinds_of_layers(sizes, setup.length, setup.attention)
    kernel = attention_kernel(sizes, computed, setup.attention)
    matrices = []
    if kernel in ("eager", "math") and (False in kinds or not training):
        matrices.append(tokens * heads * setup.length * max(4, b))
    if training and True in kinds:  # a mask of numbers
        matrices.append(tokens * setup.length * b)
    if matrices:
        large += matrices
        once = sum(block(n, own_segment=True) for n in large) - block(max(large), own_segment=True)
    narrow = scored * b if training and b < 4 else 0
    found = 2 * block(max(large), own_segment=True) + once
    return found + block(narrow, own_segment=True) + kLargeBuffer


def memory(
    sizes: Dimensions, setup: Setup, workspace: int = WORKSPACE, context: int = CONTEXT
) -> Memory:
    """What one GPU holds, its allocator's rounding and the CUDA context included.

    Training: between forward and backward, with the gradients and the states of
    a step before. Of the logits also the log-probabilities that the cross-entropy
    keeps, under autocast in FP32 as well. Inference: between two steps of
    generating, with a cache of `length` positions and the logits of one.
    `Memory.moments` says what is allocated at which point of a step.

    Of what is sharded a GPU holds one flat tensor, its part in whole bytes,
    rounded up.

    Not in it: buffers, and what communication needs.

    Args:
        sizes: of the model.
        setup: what is done with it.
        workspace: what cuBLAS takes for each thread, in bytes; see
            `every_byte.data.Card.cublas_workspace`.
        context: the CUDA context's bytes; see `every_byte.data.Card.context`.

    Raises:
        ValueError: the model cannot do it, see `check_together`; or `sizes` or `setup` is
            something else.
    """
    check_dimensions(sizes)
    if not isinstance(setup, Setup):
        raise refuse("setup", setup, "a Setup")
    check_together(sizes, setup)
    check_whole("workspace", workspace)
    check_whole("context", context)
    return assemble(sizes, setup, workspace=workspace, context=context)


def trained_tensors(
    sizes: Dimensions, rank: int
) -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]:
    """What is trained, by shape: the layers' matrices (or LoRA's factors), and the rest."""
    if rank:
        return adapters(sizes, rank), Counter()
    matrices: Counter[tuple[int, ...]] = Counter()
    for (part, shape), count in tensor_counts(sizes).items():
        if is_matrix(sizes, part, shape):
            matrices[shape] += count
    return matrices, shape_counts(sizes) - matrices


def assemble(
    sizes: Dimensions,
    setup: Setup,
    every: int | None = None,
    workspace: int = WORKSPACE,
    context: int = CONTEXT,
) -> Memory:
    """The same for what need not go together, with checkpoints of so many layers."""
    dtype, work = setup.dtype, (setup.batch, setup.length)
    tensors = {"parameters": stored_weights(sizes, dtype, setup.quantised)}
    held, margin = {"context": context, "rounding": 0}, fragments(sizes, setup)
    cast = copy = host = 0
    if setup.task == "training":
        matrices, others = trained_tensors(sizes, setup.rank)
        trained = matrices + others
        own_dtype = (setup.adapters or dtype) if setup.rank else dtype
        if setup.rank:
            tensors["parameters"] += stored(trained, own_dtype)
        states = setup.states or OPTIMIZERS[setup.optimizer].dtype or own_dtype
        tensors["gradients"] = stored(trained, setup.gradients or own_dtype)
        tensors["optimizer_states"] = stored_states(matrices, others, setup.optimizer, states)
        if setup.master_weights and computed_width(own_dtype) < 4:
            tensors["optimizer_states"] += stored(trained, "fp32")
        autocast = setup.amp is not None and dtype == "fp32"
        computed = setup.amp if setup.amp and autocast else dtype
        groups = int(setup.checkpointing) if every is None else every
        read = computed if autocast else own_dtype
        of_setup: dict[str, Any] = {
            **{"dtype": computed, "attention": setup.attention, "autocast": autocast},
            **{"rank": setup.rank, "adapters": read, "lora_dropout": setup.lora_dropout},
            "dropout": setup.dropout,
        }
        held["activations"] = kept = activations(sizes, *work, checkpointing=groups, **of_setup)
        for width in (sizes.hidden_size, sizes.intermediate_size):
            # Most of them are of one of these sizes, or small multiples.
            size = width * setup.batch * setup.length * computed_width(computed)
            if kSmallSize < size < kMinLargeAlloc:
                rest = shared_segments(Counter({size: -(-kept // size)}))
                kept, margin = kept + rest, margin + rest
                break
        if setup.attention == "eager":  # the mask, transformers' masking_utils.py
            kept += setup.batch * setup.length**2 * computed_width(dtype)
        layer = max(
            layer_activations(sizes, *work, masked=masked, **of_setup)
            for masked in kinds_of_layers(sizes, setup.length, setup.attention)
        )
        again = min(groups, sizes.num_hidden_layers) * layer
        outer = activations(with_layers(sizes, 0), *work, **of_setup)
        held["logits"] = 2 * logits(sizes, *work, computed)
        if autocast:
            held["logits"] += logits(sizes, *work, "fp32")
            held["cast_weights"] = total_bytes(_cast_weights(sizes, setup, computed))
            none, layers = with_layers(sizes, 0), sizes.num_hidden_layers
            copies = held["cast_weights"] - total_bytes(_cast_weights(none, setup, computed))
            copy = copies // max(1, layers)
            cast = copies - copy * groups if groups and layers > groups else 0
    else:
        held["logits"] = logits(sizes, setup.batch, 1, dtype)
        held["kv_cache"] = kv_cache(sizes, *work, setup.cache_dtype or dtype)
        caches = 2 * sizes.num_hidden_layers
        if caches:
            held["rounding"] = caches * block(-(-held["kv_cache"] // caches)) - held["kv_cache"]
    rounded, shared = {}, {}
    for kind, some in tensors.items():
        nbytes, own = total_bytes(some), kind == "parameters" and setup.load == "to"
        if setup.task == "training" and kind in OFFLOADED[setup.offload]:
            host += shard(nbytes, setup.gpus if kind in SHARDING[setup.sharding] else 1)
            nbytes, some = 0, Counter()
        if setup.gpus > 1 and kind in SHARDING[setup.sharding]:
            nbytes = shard(nbytes, setup.gpus)
            some, own = Counter({nbytes: 1}), False
        held[kind] = nbytes
        blocks = sum(block(n, own) * count for n, count in some.items())
        held["rounding"] += blocks - nbytes
        rounded[kind] = sum(
            block(n, own or kind != "parameters") * count for n, count in some.items()
        )
        shared[kind] = shared_segments(some)
    biased = sizes.has("biases") or sizes.has("query, key and value biases")
    rest = workspace + LT_WORKSPACE * biased
    if setup.task == "inference":
        rest += rounded["parameters"] + shared["parameters"]
        if is_other(sizes):
            moments = reading_moments(sizes, setup, rest, held["kv_cache"])
        else:
            moments = inference_moments(sizes, setup, rest + held["kv_cache"])
    else:
        following = 0 if setup.rank else sizes.hidden_size * sizes.num_attention_heads
        step = step_temporaries(
            matrices,
            others,
            setup.optimizer,
            states,
            setup.implementation,
            following * sizes.head_dim,
        )
        split = "optimizer_states" in SHARDING[setup.sharding]
        step = 0 if setup.offload else shard(step, setup.gpus if split else 1)
        moments = training_moments(
            sizes,
            setup,
            at_rest=rest
            + workspace
            # Checkpoints multiply in backward's thread, which has a workspace of its own.
            + LT_WORKSPACE * (biased and groups > 0)
            + sum(rounded[kind] + shared[kind] for kind in ("parameters", "optimizer_states")),
            gradients=rounded["gradients"] + shared["gradients"],
            kept=kept + held.get("cast_weights", 0) - again,
            again=again,
            one=layer + copy if sizes.num_hidden_layers else 0,
            outer=outer,
            step=step + shared["gradients"],
            cast=cast,
        )
    return Memory(**held, moments=moments, margin=margin + sum(shared.values()), host=host)


def _cast_weights(sizes: Dimensions, setup: Setup, dtype: str) -> Counter[int]:
    """The matrices of linear layers, LoRA's included, of which autocast keeps a copy, by bytes.

    Of a tied embedding as well, for the head; not of quantised matrices, whose
    values are made anew each time. Biases are cast too, but not kept for backward.
    """
    cast: Counter[tuple[int, ...]] = Counter()
    for (part, shape), count in tensor_counts(sizes).items():
        tied = sizes.tie_word_embeddings and part == "embedding"
        if part in ("attention", "mlp", "router", "head") and len(shape) == 2:
            if not (setup.quantised and is_stored(sizes, part, shape, setup.quantised)):
                cast[shape] += count
        elif tied and shape[0] == sizes.vocab_size:
            cast[shape] += 1
    if setup.rank:
        cast += adapters(sizes, setup.rank)
    return stored(cast, dtype)


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
    if not isinstance(checkpointing, bool):  # True: of each layer
        check_whole("checkpointing", checkpointing, 0, "0 for none")
    setup = Setup(
        task="training",
        optimizer=optimizer,
        dtype=dtype,
        batch=batch,
        length=length,
        attention=attention,
        checkpointing=checkpointing > 0,
        dropout=dropout,
        gpus=gpus,
        sharding=sharding,
    )
    return replace(assemble(sizes, setup, checkpointing), rounding=0, context=0)


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
    return replace(assemble(sizes, setup), rounding=0, context=0)
