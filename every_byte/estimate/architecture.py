"""A decoder-only transformer's sizes, and the shapes of its parameters."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
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
}


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
            raise refuse("model_type", self.model_type, f"one of {', '.join(TRAITS)}")
        for field in fields(self):
            size = getattr(self, field.name)
            needed = field.name in ("vocab_size", "hidden_size", "num_attention_heads")
            if field.type is int and (type(size) is not int or size < needed):
                raise refuse(field.name, size, f"a whole number from {int(needed)} up")

        def default(name: str, value: int) -> None:
            if not getattr(self, name):
                object.__setattr__(self, name, value)

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

    def has(self, trait: str) -> bool:
        """Whether the architecture has a trait of `TRAITS`."""
        return trait in TRAITS[self.model_type]


# GPT-2's own names of its sizes (transformers' GPT2Config.attribute_map).
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


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
    missing = [
        field.name
        for field in fields(Dimensions)
        if found[field.name] is None and field.default is MISSING
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

    Parts: embedding, attention, mlp, router, norm, head. A tied head has no
    tensor of its own. Source: transformers' ``models/*/modeling_*.py``.

    Raises:
        ValueError: `sizes` is no `Dimensions`.
    """
    check_dimensions(sizes)
    yield ParameterShape("embedding", (sizes.vocab_size, sizes.hidden_size))
    if sizes.has("learned positions"):
        yield ParameterShape("embedding", (sizes.max_position_embeddings, sizes.hidden_size))
    layer = list(_layer(sizes))
    for _ in range(sizes.num_hidden_layers):
        yield from layer
    yield from _norm(sizes)
    if not sizes.tie_word_embeddings:
        yield ParameterShape("head", (sizes.hidden_size, sizes.vocab_size))


def _norm(sizes: Dimensions) -> Iterator[ParameterShape]:
    for _ in range(1 + sizes.has("layer norm")):
        yield ParameterShape("norm", (sizes.hidden_size,))


def _layer(sizes: Dimensions) -> Iterator[ParameterShape]:
    h, i = sizes.hidden_size, sizes.intermediate_size
    queries = sizes.num_attention_heads * sizes.head_dim
    keys = sizes.num_key_value_heads * sizes.head_dim
    biases = sizes.has("biases")
    qkv_biases = biases or sizes.has("query, key and value biases")

    def linear(part: str, n: int, m: int, bias: bool) -> Iterator[ParameterShape]:
        yield ParameterShape(part, (n, m))
        if bias:
            yield ParameterShape(part, (m,))

    yield from _norm(sizes)
    if sizes.model_type == "gpt2":  # one matrix for all three
        yield from linear("attention", h, 3 * h, biases)
    else:
        for width in (queries, keys, keys):
            yield from linear("attention", h, width, qkv_biases)
    if sizes.has("query and key norms"):
        yield from (ParameterShape("norm", (sizes.head_dim,)) for _ in range(2))
    yield from linear("attention", queries, h, biases)
    yield from _norm(sizes)
    if sizes.num_local_experts:
        yield from linear("router", h, sizes.num_local_experts, False)
    for _ in range(max(1, sizes.num_local_experts)):
        for _ in range(1 + sizes.has("gated")):
            yield from linear("mlp", h, i, biases)
        yield from linear("mlp", i, h, biases)


def is_matrix(sizes: Dimensions, part: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a linear layer's matrix: what is quantised, and LoRA adapts.

    Experts are none: transformers 5 holds those of a layer in one parameter of three
    dimensions (``models/mixtral/modeling_mixtral.py``, MixtralExperts), which
    bitsandbytes (``replace_with_bnb_linear`` looks for nn.Linear) and PEFT leave.
    """
    return len(shape) == 2 and (
        part == "attention" or (part == "mlp" and not sizes.num_local_experts)
    )


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
        parts[part] += count * math.prod(shape)
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
