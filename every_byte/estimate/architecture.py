"""A transformer's sizes, and the shapes of its parameters."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

from every_byte.data import catalogue, known_models
from every_byte.estimate.checks import refuse

# What tells the architectures apart, by transformers' model_type.
TRAITS: dict[str, frozenset[str]] = {
    "gpt2": frozenset({"biases", "dropout", "layer norm", "learned positions"}),
    "llama": frozenset({"gated"}),
    "mistral": frozenset({"gated"}),
    "mixtral": frozenset({"gated"}),
    "qwen2": frozenset({"gated", "query, key and value biases"}),
    "qwen3": frozenset({"gated", "query and key norms"}),
    "gemma": frozenset({"gated", "wide norms", "scaled embedding"}),
    "gemma2": frozenset({"gated", "four norms", "no sdpa", "scaled logits", "inference only"}),
    "gemma3_text": frozenset({"gated", "four norms", "query and key norms", "wide norms"}),
    "phi3": frozenset({"gated", "joined"}),
    "granite": frozenset({"gated", "scaled logits", "scaled embedding"}),
    "olmo2": frozenset({"gated", "wide query and key norms", "norms after"}),
    "cohere": frozenset({"gated", "one norm", "scaled logits", "inference only"}),
    "cohere2": frozenset({"gated", "one norm", "scaled logits", "inference only"}),
    "gpt_oss": frozenset({"gated", "biases", "sinks", "no sdpa", "inference only"}),
    "falcon": frozenset({"layer norm", "one norm", "joined", "inference only"}),
    "deepseek_v2": frozenset({"gated", "latent", "inference only"}),
    "deepseek_v3": frozenset({"gated", "latent", "inference only"}),
    "t5": frozenset({"encoder", "position bias", "inference only"}),
    "t5_gated": frozenset({"encoder", "position bias", "gated", "inference only"}),
    "bart": frozenset({"encoder", "biases", "layer norm", "learned positions", "inference only"}),
    "vit": frozenset({"images", "biases", "layer norm", "learned positions", "inference only"}),
}
POSITION_BUCKETS = 32
"""Of T5's position bias (transformers 5.23, ``models/t5/configuration_t5.py``)."""
PIXEL_CHANNELS = 3
BART_OFFSET = 2
"""Positions that BART has beyond those that its configuration says
(``models/bart/modeling_bart.py``, BartLearnedPositionalEmbedding)."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """A transformer's sizes, under transformers' names.

    Zero stands for what follows from the rest: `intermediate_size` from
    ``4 * hidden_size`` (GPT-2), `num_key_value_heads` from `num_attention_heads`
    (no grouped-query attention), `head_dim` from ``hidden_size // heads``;
    without `num_local_experts` the model is dense.

    `sliding_layers` of the layers look back over `sliding_window` tokens only. With
    DeepSeek's latent attention (arXiv 2405.04434) `kv_lora_rank` and what follows are its
    sizes; its first `first_k_dense_replace` layers have no experts, the others
    `n_shared_experts` beside those that are chosen, all of `moe_intermediate_size`.

    An encoder-decoder has `encoder_layers` beside the `num_hidden_layers` of its decoder.
    A vision transformer has an image's patches of `patch_size` x `patch_size` pixels, and
    one more, as `max_position_embeddings`; its `vocab_size` are the labels.

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
    sliding_window: int = 0
    sliding_layers: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    moe_intermediate_size: int = 0
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    encoder_layers: int = 0
    patch_size: int = 0

    def __post_init__(self) -> None:
        if self.model_type not in TRAITS:
            raise refuse("model_type", self.model_type, f"one of {', '.join(TRAITS)}")
        for field in fields(self):
            size = getattr(self, field.name)
            needed = field.name in ("vocab_size", "hidden_size", "num_attention_heads")
            if field.type is int and (type(size) is not int or size < needed):
                raise refuse(field.name, size, f"a whole number from {int(needed)} up")

        def default(name: str, value: int) -> None:
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        for trait, name in OWN_NAMES.items():
            if self.has(trait) and not getattr(self, name):
                raise refuse(name, 0, f"a whole number from 1 up, of {self.model_type}")
        heads = self.num_attention_heads
        default("intermediate_size", 4 * self.hidden_size)
        default("num_key_value_heads", heads)
        if not self.head_dim and self.hidden_size % heads:
            raise refuse(
                "num_attention_heads", heads, f"a divisor of hidden_size {self.hidden_size}"
            )
        default("head_dim", self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise refuse("num_key_value_heads", self.num_key_value_heads, f"a divisor of {heads}")
        if self.num_experts_per_tok > self.num_local_experts:
            experts = f"at most num_local_experts {self.num_local_experts}"
            raise refuse("num_experts_per_tok", self.num_experts_per_tok, experts)
        for name in ("sliding_layers", "first_k_dense_replace"):
            if getattr(self, name) > self.num_hidden_layers:
                layers = f"at most num_hidden_layers {self.num_hidden_layers}"
                raise refuse(name, getattr(self, name), layers)

    def has(self, trait: str) -> bool:
        """Whether the architecture has a trait of `TRAITS`."""
        return trait in TRAITS[self.model_type]


def with_layers(sizes: Dimensions, layers: int) -> Dimensions:
    """The same model with so many layers, of which no more slide or are dense."""
    return replace(
        sizes,
        num_hidden_layers=layers,
        sliding_layers=min(layers, sizes.sliding_layers),
        first_k_dense_replace=min(layers, sizes.first_k_dense_replace),
    )


# GPT-2's own names of its sizes (transformers' GPT2Config.attribute_map).
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
OWN_NAMES = {"encoder": "encoder_layers", "images": "patch_size"}
"""By trait, what such a model has and no decoder-only one."""


SLIDING = {
    "gemma2": 2,
    "gemma3_text": 6,
    "cohere2": 4,
    "gpt_oss": 2,
    "mistral": 0,
    "mixtral": 0,
    "phi3": 0,
}
"""Of how many layers one sees all, where ``layer_types`` does not say it; 0: none does
(transformers 5.23, ``models/*/configuration_*.py``, and ``cache_utils.py``, DynamicCache)."""
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")


def sliding_layers(config: Mapping[str, Any], kind: str) -> int:
    """How many layers have a sliding window.

    Raises:
        ValueError: ``layer_types`` has others than full and sliding attention.
    """
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if isinstance(types, list) and types:
        if other := [one for one in types if one not in KINDS_OF_LAYERS]:
            raise refuse("layer_types", other[0], " or ".join(KINDS_OF_LAYERS))
        return types.count(KINDS_OF_LAYERS[1]) if config.get("sliding_window") else 0
    if kind not in SLIDING or not config.get("sliding_window") or type(layers) is not int:
        return 0
    pattern = config.get("sliding_window_pattern") or SLIDING[kind]
    return layers - (layers // pattern if pattern else 0)


def dimensions(model: str | Mapping[str, Any] | object) -> Dimensions:
    """The sizes of a model: by its name in the data file, or from a configuration.

    Args:
        model: a name of `catalogue`; or what a ``config.json`` holds, as a dict;
            or an object with its attributes, such as transformers' configurations.

    Raises:
        ValueError: the name is not there (the message lists those that are), or the
            configuration lacks a size or has one that these formulas do not know.
    """
    if isinstance(model, str):
        models = {**catalogue(), **known_models()}
        if model not in models:
            raise refuse("model", model, f"one of {', '.join(models)}")
        model = models[model]

    def given(name: str) -> Any:
        for key in filter(None, (name, ALIASES.get(name))):
            value = model.get(key) if isinstance(model, Mapping) else getattr(model, key, None)
            if value is not None:
                return value
        return None

    found = {field.name: given(field.name) for field in fields(Dimensions)}
    if found["tie_word_embeddings"] is None:  # transformers' default: GPT-2 ties them
        found["tie_word_embeddings"] = found["model_type"] == "gpt2"
    if found["sliding_layers"] is None:
        names = ("layer_types", "num_hidden_layers", "sliding_window", "sliding_window_pattern")
        said = {name: given(name) for name in names}
        found["sliding_layers"] = sliding_layers(said, found["model_type"])
    if not found["sliding_layers"]:
        found["sliding_window"] = 0
    # Others have these sizes under names of their own: see `every_byte.estimate.config`.
    apart = TRAITS.get(str(found["model_type"]), frozenset()) & OWN_NAMES.keys()
    needed = ("intermediate_size", *(OWN_NAMES[trait] for trait in apart)) if apart else ()
    missing = [
        field.name
        for field in fields(Dimensions)
        if found[field.name] is None and (field.default is MISSING or field.name in needed)
    ]
    if missing:
        raise refuse(missing[0], None, "the model's, as its config.json has it")
    return Dimensions(**{name: value for name, value in found.items() if value is not None})


def check_dimensions(sizes: object) -> None:
    """Refuse what stands where a model's sizes are expected, such as its name.

    Raises:
        ValueError: it is no `Dimensions`.
    """
    if not isinstance(sizes, Dimensions):
        raise refuse("sizes", sizes, "a model's Dimensions, as dimensions('gpt2') gives them")


class ParameterShape(NamedTuple):
    """A parameter's part of the model, and its shape."""

    part: str
    shape: tuple[int, ...]


def shapes(sizes: Dimensions) -> Iterator[ParameterShape]:
    """Each parameter tensor of the model: its part, and its shape.

    Parts: embedding, attention, mlp, router, norm, head; of DeepSeek also shared (experts
    that all tokens use, and MLPs of layers without any) and latent; of T5 also whole (the
    last matrix of each MLP, which nothing quantises). A tied head has no tensor of its own.
    Source: transformers' ``models/*/modeling_*.py``.

    Raises:
        ValueError: `sizes` is no `Dimensions`.
    """
    check_dimensions(sizes)
    if sizes.has("images"):
        yield from _image(sizes)
        return
    yield ParameterShape("embedding", (sizes.vocab_size, sizes.hidden_size))
    if sizes.has("encoder"):
        yield from _encoder_and_decoder(sizes)
        return
    if sizes.has("learned positions"):
        yield ParameterShape("embedding", (sizes.max_position_embeddings, sizes.hidden_size))
    dense, layer = list(_layer(sizes, True)), list(_layer(sizes, False))
    for index in range(sizes.num_hidden_layers):
        yield from dense if index < sizes.first_k_dense_replace else layer
    yield from _norm(sizes)
    if not sizes.tie_word_embeddings:
        yield ParameterShape("head", (sizes.hidden_size, sizes.vocab_size))


def _encoder_and_decoder(sizes: Dimensions) -> Iterator[ParameterShape]:
    """Both stacks and the head (``models/t5/modeling_t5.py``, ``models/bart/modeling_bart.py``)."""
    for layers, attentions in ((sizes.encoder_layers, 1), (sizes.num_hidden_layers, 2)):
        yield from _norm(sizes)  # BART's of the embedding, T5's last
        if sizes.has("learned positions"):
            positions = sizes.max_position_embeddings + BART_OFFSET
            yield ParameterShape("embedding", (positions, sizes.hidden_size))
        elif layers:  # the first layer's, which all of them use
            yield ParameterShape("embedding", (POSITION_BUCKETS, sizes.num_attention_heads))
        for _ in range(layers):
            for _ in range(attentions):
                yield from _norm(sizes)
                yield from _attention(sizes)
            yield from _norm(sizes)
            yield from _mlp(sizes)
    if not sizes.tie_word_embeddings:
        yield ParameterShape("head", (sizes.hidden_size, sizes.vocab_size))


def _image(sizes: Dimensions) -> Iterator[ParameterShape]:
    """A vision transformer and its classifier (``models/vit/modeling_vit.py``)."""
    h = sizes.hidden_size
    yield from _linear("embedding", PIXEL_CHANNELS * sizes.patch_size**2, h, bias=True)
    yield ParameterShape("embedding", (h,))
    yield ParameterShape("embedding", (sizes.max_position_embeddings, h))
    for _ in range(sizes.num_hidden_layers):
        yield from _layer(sizes, True)
    yield from _norm(sizes)
    yield from _linear("head", h, sizes.vocab_size, bias=True)


def _mlp(sizes: Dimensions) -> Iterator[ParameterShape]:
    """The matrices of an encoder-decoder's MLP; T5's last one stays as it is.

    Nothing quantises it: ``_keep_in_fp32_modules`` (``quantizers/base.py``,
    get_modules_to_not_convert).
    """
    h, i, biases = sizes.hidden_size, sizes.intermediate_size, sizes.has("biases")
    for _ in range(1 + sizes.has("gated")):
        yield from _linear("mlp", h, i, biases)
    yield from _linear("whole" if sizes.has("position bias") else "mlp", i, h, biases)


def _norm(sizes: Dimensions) -> Iterator[ParameterShape]:
    for _ in range(1 + sizes.has("layer norm")):
        yield ParameterShape("norm", (sizes.hidden_size,))


def _linear(part: str, n: int, m: int, bias: bool = False) -> Iterator[ParameterShape]:
    yield ParameterShape(part, (n, m))
    if bias:
        yield ParameterShape(part, (m,))


def _layer(sizes: Dimensions, dense: bool) -> Iterator[ParameterShape]:
    """One layer, of which some models have a `dense` MLP in the first ones."""
    h, i = sizes.hidden_size, sizes.intermediate_size
    biases, norms = sizes.has("biases"), 1 if sizes.has("one norm") else 2
    for _ in range(4 if sizes.has("four norms") else norms):
        yield from _norm(sizes)
    if sizes.has("latent"):
        yield from _latent_attention(sizes)
    else:
        yield from _attention(sizes)
    gated = range(1 + sizes.has("gated"))
    experts = 0 if dense else sizes.num_local_experts
    if not experts:
        part = "shared" if sizes.num_local_experts else "mlp"
        if sizes.has("joined") and sizes.has("gated"):
            yield from _linear(part, h, 2 * i)
        else:
            for _ in gated:
                yield from _linear(part, h, i, biases)
        yield from _linear(part, i, h, biases)
        return
    yield from _linear("router", h, experts, sizes.has("sinks"))
    inner = sizes.moe_intermediate_size or i
    for number in range(experts + 1):
        part, width = "mlp", inner
        if number == experts:
            part, width = "shared", inner * sizes.n_shared_experts
        if width:
            for _ in gated:
                yield from _linear(part, h, width, biases)
            yield from _linear(part, width, h, biases)


def _attention(sizes: Dimensions) -> Iterator[ParameterShape]:
    h = sizes.hidden_size
    queries = sizes.num_attention_heads * sizes.head_dim
    keys = sizes.num_key_value_heads * sizes.head_dim
    biases = sizes.has("biases")
    qkv_biases = biases or sizes.has("query, key and value biases")
    if sizes.model_type == "gpt2":  # one matrix for all three
        yield from _linear("attention", h, 3 * h, biases)
    elif sizes.has("joined"):
        yield from _linear("attention", h, queries + 2 * keys)
    else:
        for width in (queries, keys, keys):
            yield from _linear("attention", h, width, qkv_biases)
    if sizes.has("query and key norms"):
        yield from (ParameterShape("norm", (sizes.head_dim,)) for _ in range(2))
    if sizes.has("wide query and key norms"):
        yield from (ParameterShape("norm", (width,)) for width in (queries, keys))
    yield from _linear("attention", queries, h, biases)
    if sizes.has("sinks"):
        yield ParameterShape("attention", (sizes.num_attention_heads,))


def _latent_attention(sizes: Dimensions) -> Iterator[ParameterShape]:
    """DeepSeek's (transformers, ``models/deepseek_v3/modeling_deepseek_v3.py``)."""
    h, heads = sizes.hidden_size, sizes.num_attention_heads
    queries = heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    if sizes.q_lora_rank:
        yield from _linear("latent", h, sizes.q_lora_rank)
        yield ParameterShape("norm", (sizes.q_lora_rank,))
    yield from _linear("attention", sizes.q_lora_rank or h, queries)
    yield from _linear("latent", h, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
    yield ParameterShape("norm", (sizes.kv_lora_rank,))
    keys_and_values = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
    yield from _linear("attention", sizes.kv_lora_rank, keys_and_values)
    yield from _linear("attention", heads * sizes.v_head_dim, h)


def is_matrix(sizes: Dimensions, part: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a linear layer's matrix: what is quantised, and LoRA adapts.

    Experts are none: transformers 5 holds those of a layer in one parameter of three
    dimensions (``models/mixtral/modeling_mixtral.py``, MixtralExperts), which
    bitsandbytes (``replace_with_bnb_linear`` looks for nn.Linear) and PEFT leave.
    """
    return len(shape) == 2 and (
        part in ("attention", "latent", "shared") or (part == "mlp" and not sizes.num_local_experts)
    )


def inputs(sizes: Dimensions) -> tuple[int, int]:
    """How many matrices read the input of a layer's attention, and that of its MLP."""
    joined = sizes.has("joined")
    attention = 1 if joined or sizes.model_type == "gpt2" else 3
    return attention, 1 + (sizes.has("gated") and not joined)


def tensor_counts(sizes: Dimensions) -> Counter[ParameterShape]:
    """How many parameter tensors of each part and shape there are.

    Raises:
        ValueError: `sizes` is no `Dimensions`.
    """
    check_dimensions(sizes)
    return _tensor_counts(sizes)


@lru_cache
def _tensor_counts(sizes: Dimensions) -> Counter[ParameterShape]:
    return Counter(shapes(sizes))


def parameters(sizes: Dimensions) -> dict[str, int]:
    """The number of parameters by part; see `shapes`."""
    parts = dict.fromkeys(("embedding", "attention", "mlp", "router", "norm", "head"), 0)
    for (part, shape), count in tensor_counts(sizes).items():
        parts[part] = parts.get(part, 0) + count * math.prod(shape)
    return parts


def active_parameters(sizes: Dimensions) -> int:
    """The number of parameters that one token uses: of all experts only the chosen ones."""
    parts = parameters(sizes)
    if sizes.num_local_experts:
        parts["mlp"] = parts["mlp"] // sizes.num_local_experts * sizes.num_experts_per_tok
    return sum(parts.values())


def shape_counts(sizes: Dimensions) -> Counter[tuple[int, ...]]:
    """How many parameter tensors of each shape there are."""
    counts: Counter[tuple[int, ...]] = Counter()
    for (_, shape), count in tensor_counts(sizes).items():
        counts[shape] += count
    return counts
