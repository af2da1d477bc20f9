"""A model's own ``config.json``, read for the formulas; what they do not describe is named."""

from collections.abc import Mapping
from typing import Any

from every_byte.estimate.architecture import Dimensions, dimensions
from every_byte.estimate.checks import refuse

SAME = {"qwen3_moe": "qwen3", "smollm3": "llama"}
"""Architectures with the layers of another one (transformers 5.23, ``models/*/modular_*.py``):
SmolLM3 is Llama, some layers without rotation; Qwen3-MoE is Qwen3 with experts."""

# What a config.json must say, because transformers' defaults differ between architectures.
REQUIRED = {
    "gpt2": ("n_embd", "n_layer", "n_head", "n_positions"),
    "llama": ("intermediate_size",),
    "mistral": ("intermediate_size", "num_key_value_heads"),
    "mixtral": ("intermediate_size", "num_key_value_heads", "num_local_experts"),
    "qwen2": ("intermediate_size", "num_key_value_heads"),
    "qwen3": ("intermediate_size", "num_key_value_heads", "head_dim"),
    "qwen3_moe": ("moe_intermediate_size", "num_key_value_heads", "num_experts_per_tok"),
    "smollm3": ("intermediate_size", "num_key_value_heads"),
}
# What changes layers in a way that the formulas do not describe.
WITHOUT = ("attention_bias", "mlp_bias", "add_cross_attention", "mlp_only_layers")
ACTIVATIONS = {"gpt2": ("gelu_new",)}
GATED = ("silu", "swish")
TIED = ("gpt2", "smollm3")  # by default


def from_config(config: Mapping[str, Any]) -> Dimensions:
    """The sizes in what a ``config.json`` holds.

    Raises:
        ValueError: one line that names what the formulas do not describe, or what
            the file does not say.
    """
    if not isinstance(config, Mapping):
        raise refuse("config", type(config).__name__, "an object, as config.json holds one")
    if "text_config" in config:
        raise refuse("text_config", "there", "a language model alone: give what it holds")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in REQUIRED:
        known = ", ".join(REQUIRED)
        raise refuse("model_type", kind, f"one that the formulas describe: {known}")
    for name in REQUIRED[kind]:
        if config.get(name) is None:
            raise refuse(name, None, "the model's, as its config.json has it")
    for name in WITHOUT:
        if config.get(name):
            raise refuse(name, config[name], "none, for the formulas do not describe it")
    if config.get("decoder_sparse_step", 1) != 1:
        step = config["decoder_sparse_step"]
        raise refuse("decoder_sparse_step", step, "1, experts in every layer")
    acts = ACTIVATIONS.get(kind, GATED)
    act = config.get("activation_function" if kind == "gpt2" else "hidden_act", acts[0])
    if act not in acts:
        raise refuse("hidden_act", act, f"{acts[0]}, which the formulas describe")
    given = {**config, "model_type": SAME.get(kind, kind)}
    if kind == "qwen3_moe":
        given.setdefault("num_local_experts", config.get("num_experts"))
        given["intermediate_size"] = config["moe_intermediate_size"]
    elif kind != "mixtral":
        given["num_local_experts"] = given["num_experts_per_tok"] = 0
    if given.get("tie_word_embeddings") is None:
        given["tie_word_embeddings"] = kind in TIED
    if type(given["tie_word_embeddings"]) is not bool:
        raise refuse("tie_word_embeddings", given["tie_word_embeddings"], "True or False")
    return dimensions(given)
