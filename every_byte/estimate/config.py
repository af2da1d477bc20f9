"""A model's own ``config.json``, read for the formulas; what they do not describe is named."""

from collections.abc import Mapping
from typing import Any

from every_byte.estimate.architecture import TRAITS, Dimensions, dimensions
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
    "gemma": ("intermediate_size", "num_key_value_heads", "head_dim"),
    "gemma2": ("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window"),
    "gemma3_text": ("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window"),
    "phi3": ("intermediate_size",),
    "granite": ("intermediate_size",),
    "olmo2": ("intermediate_size",),
    "cohere": ("intermediate_size",),
    "cohere2": ("intermediate_size", "sliding_window"),
    "gpt_oss": ("intermediate_size", "head_dim", "num_local_experts", "sliding_window"),
    "deepseek_v2": ("intermediate_size", "n_routed_experts", "moe_intermediate_size"),
    "deepseek_v3": ("intermediate_size", "n_routed_experts", "moe_intermediate_size"),
}
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_shared_experts")
"""What DeepSeek's must say, too. Their ``q_lora_rank`` may be null."""

# What changes layers in a way that the formulas do not describe.
WITHOUT = (
    "attention_bias",
    "mlp_bias",
    "add_cross_attention",
    "mlp_only_layers",
    "use_sliding_window",
    "use_qk_norm",
)
BIASED = ("gpt_oss",)  # whose attention has biases, as the formulas know
GELU = ("gelu_pytorch_tanh", "gelu")
ACTIVATIONS = {"gpt2": ("gelu_new",), "gemma": GELU, "gemma2": GELU, "gemma3_text": GELU}
ACTIVATION_NAMES = {
    "gpt2": "activation_function",
    "gemma2": "hidden_activation",
    "gemma3_text": "hidden_activation",
}
GATED = ("silu", "swish")
TIED = ("gpt2", "smollm3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2")  # by default


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
    latent = LATENT if "latent" in TRAITS.get(kind, ()) else ()
    for name in REQUIRED[kind] + latent:
        if config.get(name) is None:
            raise refuse(name, None, "the model's, as its config.json has it")
    for name in WITHOUT:
        if config.get(name) and not (kind in BIASED and name == "attention_bias"):
            raise refuse(name, config[name], "none, for the formulas do not describe it")
    if config.get("decoder_sparse_step", 1) != 1:
        step = config["decoder_sparse_step"]
        raise refuse("decoder_sparse_step", step, "1, experts in every layer")
    acts = ACTIVATIONS.get(kind, GATED)
    act = config.get(ACTIVATION_NAMES.get(kind, "hidden_act"), acts[0])
    if act not in acts:
        raise refuse("hidden_act", act, f"{acts[0]}, which the formulas describe")
    given = {**config, "model_type": SAME.get(kind, kind)}
    if kind == "qwen3_moe":
        given.setdefault("num_local_experts", config.get("num_experts"))
        given["intermediate_size"] = config["moe_intermediate_size"]
    elif latent:
        given["num_local_experts"] = config["n_routed_experts"]
        given["q_lora_rank"] = config.get("q_lora_rank") or 0
        given["head_dim"] = None  # of the part that is rotated, which has a name of its own
    elif kind not in ("mixtral", "gpt_oss"):
        given["num_local_experts"] = given["num_experts_per_tok"] = 0
    given["sliding_layers"] = None  # `dimensions` counts them
    if given.get("tie_word_embeddings") is None:
        given["tie_word_embeddings"] = kind in TIED
    if type(given["tie_word_embeddings"]) is not bool:
        raise refuse("tie_word_embeddings", given["tie_word_embeddings"], "True or False")
    return dimensions(given)
