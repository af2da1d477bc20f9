"""The estimator's list of models, and what is read of a config.json."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

from every_byte.data import catalogue, known_models
from every_byte.estimate import (
    Dimensions,
    config,
    dimensions,
    from_config,
    kv_cache,
    parameter_bytes,
    parameters,
)


def test_there_are_a_hundred() -> None:
    assert len(catalogue()) >= 100
    assert list(catalogue())[: len(known_models())] == list(known_models())


@pytest.mark.parametrize("name", catalogue())
def test_a_model_has_as_many_parameters_as_published(name: str) -> None:
    model, count = catalogue()[name], sum(parameters(dimensions(name)).values())
    published = model["published"]
    if isinstance(published, str):  # as far as it is given
        digits = len(published[:-1].partition(".")[2])
        scale = {"B": 10**9, "M": 10**6}[published[-1]]
        assert f"{count / scale:.{digits}f}{published[-1]}" == published
    else:
        assert count == published
    assert model["source"].startswith("https://huggingface.co/")


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    "d_model": 64,
    "d_ff": 48,
    "d_kv": 24,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "encoder_layers": 3,
    "decoder_layers": 2,
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "image_size": 50,
    "patch_size": 8,
}
OTHER = {"vit": AutoModelForImageClassification}
OTHER |= dict.fromkeys(("t5", "mt5", "bart"), AutoModelForSeq2SeqLM)


def small(kind: str, **changes: Any) -> dict[str, Any]:
    known = set(AutoConfig.for_model(kind).to_dict())
    given = {k: v for k, v in {**SMALL, **changes}.items() if k in known}
    if kind.startswith("deepseek"):
        given["num_key_value_heads"] = 4
        del given["head_dim"]
    if kind == "gpt2":
        given = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoConfig.for_model(kind, **given, **tokens).to_dict()


@pytest.mark.parametrize("kind", config.REQUIRED)
def test_a_configuration_is_read_as_transformers_builds_it(kind: str) -> None:
    given = small(kind)
    with torch.device("meta"):
        model = OTHER.get(kind, AutoModelForCausalLM).from_config(AutoConfig.for_model(**given))
    sizes = from_config(given)
    assert sum(parameters(sizes).values()) == sum(p.numel() for p in model.parameters())
    assert asdict(sizes)["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t5", {"feed_forward_proj": "gated-gelu"}),
        ("t5", {"num_decoder_layers": None}),
        ("mt5", {"feed_forward_proj": "relu"}),
        ("bart", {"encoder_layers": 1}),
        ("vit", {"id2label": {"0": "cat", "1": "dog", "2": "pen"}, "image_size": 224}),
    ],
)
def test_encoders_and_images_are_read_as_transformers_builds_them(
    kind: str, changes: dict[str, Any]
) -> None:
    given = small(kind, **changes)
    with torch.device("meta"):
        model = OTHER[kind].from_config(AutoConfig.for_model(**given))
    assert sum(parameters(from_config(given)).values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_head_of_its_own_is_counted() -> None:
    """T5 1.1 has one, which transformers leaves untied: its checkpoint has both."""
    given = small("t5")
    tied, own = (
        sum(parameters(from_config({**given, "tie_word_embeddings": one})).values())
        for one in (True, False)
    )
    assert own - tied == 96 * 64


@pytest.mark.parametrize("kind", [k for k in config.REQUIRED if k != "gpt2" and k not in OTHER])
def test_a_cache_is_as_transformers_holds_it(kind: str) -> None:
    """Also with windows that are full, and compressed."""
    given = small(kind)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).eval()
    with torch.inference_mode():
        past = model(torch.zeros(2, 20, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))
    assert held == kv_cache(from_config(given), 2, 20, "fp32")


def test_scales_of_a_quantised_cache_and_windows_of_real_models() -> None:
    llama, gemma = dimensions("Llama-3.1-8B"), dimensions("gemma-3-1b-it")
    position = 2 * 32 * 8 * 128
    assert kv_cache(llama, 1, 64, "int8") == 64 * position * 17 // 16
    assert kv_cache(llama, 1, 64, "int4") == 64 * position * 9 // 16
    # 4 layers see all, 22 the last 512 tokens, of which 511 are kept.
    assert kv_cache(gemma, 1, 4096) == 2 * 2 * 256 * (4 * 4096 + 22 * 511)
    # "576": DeepSeek-V3 keeps 512 compressed numbers and 64 that are rotated.
    assert kv_cache(dimensions("DeepSeek-V3"), 1, 1) == 2 * 61 * 576


def test_gpt_oss_is_stored_as_it_is_published() -> None:
    """Experts in MXFP4, the rest in BF16: checkpoints of 12.8 and 60.8 GiB (arXiv 2508.10925)."""
    for name, published in (("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)):
        size = parameter_bytes(dimensions(name), "bf16", "mxfp4") / 2**30
        assert size == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True: expected none"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu': expected silu"),
        ("llama", {"intermediate_size": None}, "intermediate_size is None"),
        ("llama", {"model_type": "bert"}, "model_type is 'bert': expected one that the formulas"),
        ("llama", {"text_config": {}}, "text_config is 'there': expected a language model alone"),
        ("llama", {"hidden_size": 1.5}, "hidden_size is 1.5: expected a whole number"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ("gpt2", {"activation_function": "relu"}, "hidden_act is 'relu': expected gelu_new"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3", {"head_dim": None}, "head_dim is None"),
        ("gemma2", {"layer_types": ["mamba"]}, "layer_types is 'mamba': expected full_attention"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm is True: expected none"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is None"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "hidden_act is 'gated-silu': expected relu"),
        ("t5", {"relative_attention_num_buckets": 64}, "num_buckets is 64: expected 32"),
        ("bart", {"decoder_ffn_dim": 49}, "decoder_ffn_dim is 49: expected 48, as encoder_ffn_dim"),
        ("vit", {"image_size": [8, 9]}, r"image_size is \[8, 9\]: expected a whole number"),
        ("vit", {"qkv_bias": False}, "qkv_bias is False: expected True"),
        ("vit", {"num_channels": 1}, "num_channels is 1: expected 3"),
        ("llama", {"model_type": "whisper"}, "model_type is 'whisper': expected one that"),
    ],
)
def test_what_cannot_be_described_is_named(kind: str, change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        from_config({**small(kind), **change})


def test_a_list_is_no_configuration() -> None:
    with pytest.raises(ValueError, match="config is 'list': expected an object"):
        from_config([])  # type: ignore[arg-type]


def test_sizes_are_those_of_the_type() -> None:
    assert isinstance(from_config(small("qwen3_moe")), Dimensions)
