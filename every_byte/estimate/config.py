"""A model's own ``config.json``, read for the formulas; what they do not describe is named."""

from collections.abc import Mapping
from typing import Any

from every_byte.estimate.architecture import (
    PIXEL_CHANNELS,
    POSITION_BUCKETS,
    TRAITS,
    Dimensions,
    dimensions,
)
from every_byte.estimate.checks import refuse

SAME = {"qwen3_moe": "qwen3", "smollm3": "llama", "mt5": "t5"}
"""Architectures with the layers of another one (transformers 5.23, ``models/*/modular_*.py``):
SmolLM3 is Llama, some layers without rotation; Qwen3-MoE is Qwen3 with experts; mT5 is T5."""

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
    "t5": ("d_model", "d_ff", "d_kv", "num_heads", "num_layers"),
    "mt5": ("d_model", "d_ff", "d_kv", "num_heads", "num_layers"),
    "bart": ("d_model", "encoder_ffn_dim", "encoder_attention_heads", "decoder_layers"),
    "vit": ("intermediate_size", "image_size", "patch_size"),
}
OTHER_NAMES = {
    "t5": {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "head_dim": "d_kv",
        "num_attention_heads": "num_heads",
        "encoder_layers": "num_layers",
        "num_hidden_layers": "num_decoder_layers",
    },
    "bart": {
        "hidden_size": "d_model",
        "intermediate_size": "encoder_ffn_dim",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "decoder_layers",
    },
}
"""Sizes that encoder-decoders have under names of their own."""
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
NARROW = {"num_channels": PIXEL_CHANNELS, "relative_attention_num_buckets": POSITION_BUCKETS}
"""What is as usual, or is not described."""
SAME_IN_BOTH = ("ffn_dim", "attention_heads")  # of BART's encoder and decoder
LABELS = 2  # that a classifier has by default
BIASED = ("gpt_oss",)  # whose attention has biases, as the formulas know
GELU = ("gelu_pytorch_tanh", "gelu")
ACTIVATIONS = {
    "gpt2": ("gelu_new",),
    "gemma": GELU,
    "gemma2": GELU,
    "gemma3_text": GELU,
    "t5": ("relu", "gated-gelu"),
    "mt5": ("gated-gelu", "relu"),
    "bart": ("gelu",),
    "vit": ("gelu",),
}
ACTIVATION_NAMES = {
    "gpt2": "activation_function",
    "bart": "activation_function",
    "t5": "feed_forward_proj",
    "mt5": "feed_forward_proj",
    "gemma2": "hidden_activation",
    "gemma3_text": "hidden_activation",
}
GATED = ("silu", "swish")
TIED = ("gpt2", "smollm3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "t5", "bart")
"""By default."""


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
    for name, expected in NARROW.items():
        if config.get(name, expected) != expected:
            raise refuse(name, config[name], f"{expected}, which the formulas describe")
    if names := OTHER_NAMES.get(SAME.get(kind, kind)):
        given |= {name: config.get(other) for name, other in names.items()}
        if given["num_hidden_layers"] is None:  # T5's decoder is as deep as its encoder
            given["num_hidden_layers"] = given["encoder_layers"]
        if act == "gated-gelu":
            given["model_type"] = "t5_gated"
        for name in SAME_IN_BOTH if kind == "bart" else ():
            encoder, decoder = f"encoder_{name}", f"decoder_{name}"
            if config.get(decoder, config[encoder]) != config[encoder]:
                raise refuse(decoder, config[decoder], f"{config[encoder]}, as {encoder}")
    elif kind == "vit":
        given |= _image_sizes(config)
    given["sliding_layers"] = None  # `dimensions` counts them
    if given.get("tie_word_embeddings") is None:
        given["tie_word_embeddings"] = kind in TIED
    if type(given["tie_word_embeddings"]) is not bool:
        raise refuse("tie_word_embeddings", given["tie_word_embeddings"], "True or False")
    return dimensions(given)


def _image_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A vision transformer's positions and labels.

    Raises:
        ValueError: sizes that are no squares, or no biases.
    """
    for name in ("image_size", "patch_size"):
        if type(config[name]) is not int or config[name] < 1:
            raise refuse(name, config[name], "a whole number from 1 up, of a square")
    if not config.get("qkv_bias", True):
        raise refuse("qkv_bias", config["qkv_bias"], "True, which the formulas describe")
    named = config.get("id2label")
    count = len(named) if isinstance(named, Mapping) else 0
    return {
        "max_position_embeddings": (config["image_size"] // config["patch_size"]) ** 2 + 1,
        "vocab_size": count or config.get("num_labels") or LABELS,
        "tie_word_embeddings": False,
    }
