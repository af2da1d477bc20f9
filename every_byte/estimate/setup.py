"""What is done with a model, and what one GPU holds of it, by kind."""

from collections import Counter
from dataclasses import dataclass, fields, replace

from every_byte.allocator.config import kMinBlockSize, kMinLargeAlloc, kRoundLarge, kSmallSize
from every_byte.estimate.architecture import Dimensions, shape_counts, tensor_counts
from every_byte.estimate.checks import check_batch, check_choice, check_flag, check_whole, refuse
from every_byte.estimate.forward import ATTENTION, activations, kv_cache, logits
from every_byte.estimate.optimizers import OPTIMIZERS, stored_states
from every_byte.estimate.weights import (
    QUANTISED,
    adapters,
    bytes_per_parameter,
    computed_width,
    is_matrix,
    stored,
    stored_weights,
    total_bytes,
)
from every_byte.units import GiB

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

    Raises:
        ValueError: `nbytes` is no whole number, or negative.
    """
    check_whole("nbytes", nbytes)
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
    "optimizer": tuple(OPTIMIZERS),
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
            check_choice(what, getattr(self, what), known)
        for dtype in (self.dtype, self.gradients, self.states):
            computed_width(self.dtype if dtype is None else dtype)
        bytes_per_parameter(self.dtype if self.cache_dtype is None else self.cache_dtype)
        for what in ("master_weights", "checkpointing"):
            check_flag(what, getattr(self, what))
        check_batch(self.batch, self.length)
        check_whole("rank", self.rank, 0, "0 for no LoRA")
        shard(0, self.gpus)
        if self.task == "training" and self.quantised and not self.rank:
            raise refuse(
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
    tensors = {"parameters": stored_weights(sizes, dtype, setup.quantised)}
    held = {"context": CONTEXT[-1], "rounding": 0}
    if setup.task == "training":
        trained = adapters(sizes, setup.rank) if setup.rank else shape_counts(sizes)
        if setup.rank:
            tensors["parameters"] += stored(trained, dtype)
        tensors["gradients"] = stored(trained, setup.gradients or dtype)
        tensors["optimizer_states"] = stored_states(trained, setup.optimizer, setup.states or dtype)
        if setup.master_weights and computed_width(dtype) < 4:
            tensors["optimizer_states"] += stored(trained, "fp32")
        autocast = setup.amp is not None and dtype == "fp32"
        computed = setup.amp if setup.amp and autocast else dtype
        held["activations"] = activations(
            sizes, *work, computed, setup.attention, setup.checkpointing, setup.rank, autocast
        )
        held["logits"] = 2 * logits(sizes, *work, computed)
        if autocast:
            held["logits"] += logits(sizes, *work, "fp32")
            held["cast_weights"] = total_bytes(_cast_weights(sizes, setup, computed))
    else:
        held["logits"] = logits(sizes, setup.batch, 1, dtype)
        held["kv_cache"] = kv_cache(sizes, *work, setup.cache_dtype or dtype)
        caches = 2 * sizes.num_hidden_layers
        if caches:
            held["rounding"] = caches * block(-(-held["kv_cache"] // caches)) - held["kv_cache"]
    for kind, some in tensors.items():
        nbytes, own = total_bytes(some), kind == "parameters" and setup.load == "to"
        if setup.gpus > 1 and kind in SHARDING[setup.sharding]:
            nbytes = shard(nbytes, setup.gpus)
            some, own = Counter({nbytes: 1}), False
        held[kind] = nbytes
        held["rounding"] += sum(block(n, own) * count for n, count in some.items()) - nbytes
    return Memory(**held)


def _cast_weights(sizes: Dimensions, setup: Setup, dtype: str) -> Counter[int]:
    """The matrices of linear layers, LoRA's included, of which autocast keeps a copy, by bytes.

    Of a tied embedding as well, for the head; not of quantised matrices, whose
    values are made anew each time. Biases are cast too, but not kept for backward.
    """
    cast: Counter[tuple[int, ...]] = Counter()
    for (part, shape), count in tensor_counts(sizes).items():
        tied = sizes.tie_word_embeddings and part == "embedding"
        if part in ("attention", "mlp", "router", "head") and len(shape) == 2:
            if not (setup.quantised and is_matrix(part, shape)):
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
