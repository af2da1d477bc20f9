"""The closed formulas, against published counts and against replays of the real models."""

import dataclasses
import math
import tomllib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedModel
from transformers import logging as transformers_logging

from benchmarks import estimates
from every_byte import estimate
from every_byte.allocator import CachingAllocator
from every_byte.data import known_models
from every_byte.estimate import Dimensions, Setup, architecture, forward, optimizers
from every_byte.gpu import VirtualGPU
from every_byte.kinds import FIELDS
from helpers import models
from tools.repository import ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORKSPACE_OF_H200 = 32 << 20


@pytest.mark.parametrize("name", known_models())
def test_counts_are_the_published_ones(name: str) -> None:
    sizes = estimate.dimensions(name)
    assert sum(estimate.parameters(sizes).values()) == known_models()[name]["published"]
    assert known_models()[name]["source"].startswith("https://huggingface.co/")


def test_a_mixture_of_experts_uses_fewer_than_it_loads() -> None:
    sizes = estimate.dimensions("Mixtral-8x7B-v0.1")
    # "uses 13B active parameters": Jiang et al. 2024, arXiv 2401.04088
    assert round(estimate.active_parameters(sizes) / 1e9) == 13
    dense = estimate.dimensions("Llama-3.1-8B")
    assert estimate.active_parameters(dense) == sum(estimate.parameters(dense).values())


def test_a_setup_without_a_length_has_no_activations() -> None:
    assert estimate.memory(estimate.dimensions("gpt2"), Setup()).activations == 0


def test_a_window_of_one_token_is_one() -> None:
    sizes = dataclasses.replace(
        estimate.dimensions("Mistral-7B-v0.1"), sliding_window=1, sliding_layers=5
    )
    assert forward.masked_layers(sizes, 1, "sdpa") == 5
    assert forward.masked_layers(sizes, 0, "sdpa") == 0


def test_apollo_still_has_a_matrixs_gradient_when_adamw_takes_the_rest() -> None:
    matrix, rest = Counter({(8, 16): 3}), Counter({(1000,): 1})
    taken = optimizers.step_temporaries(matrix, rest, "apollo", "fp32", "foreach")
    assert taken == 2 * 4 * 1000 + 4 * 8 * 16  # AdamW's two, and the limited gradient


# Against replays


def build(
    sizes: Dimensions, dtype: str, attention: str = "eager", dropout: float = 0.0
) -> PreTrainedModel:
    """The real model of these sizes, on the device in force."""
    device = torch.get_default_device()
    model: PreTrainedModel = estimates.build(sizes, DTYPES[dtype], device, attention, dropout)
    model.config.use_cache = False
    return model.train()


def step(
    gpu: VirtualGPU,
    sizes: Dimensions,
    optimizer: str,
    dtype: str,
    batch: int,
    length: int,
    lora: int = 0,
) -> tuple[dict[str, int], int]:
    """One real training step, replayed: bytes by kind after it, and activations before backward."""
    transformers_logging.set_verbosity_error()
    with gpu.device:
        model = build(sizes, dtype)
    if lora:
        estimates.with_lora(model, lora, DTYPES[dtype], 0.0)
    ids = torch.zeros(batch, length, dtype=torch.int64).to(gpu.device)
    causal = torch.zeros(batch, 1, length, length, dtype=DTYPES[dtype]).to(gpu.device)
    positions = torch.arange(length)[None].to(gpu.device)
    logits = model(input_ids=ids, attention_mask=causal, position_ids=positions).logits
    loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
    held = gpu.breakdown(model)["activations"]
    loss.backward()
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    opt.step()
    return dict(gpu.breakdown(model, opt)), held


def small(kind: str) -> Dimensions:
    """A small model of another family, with a window where it has one."""
    sizes = Dimensions(kind, 1000, 256, 2, 4, False, 2048, 768, 2, 48)
    windows = {"gemma3_text": {"sliding_window": 512, "sliding_layers": 1}}
    return dataclasses.replace(sizes, **windows.get(kind, {}))


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p),
    "momentum": lambda p: optim.SGD(p, momentum=0.9),
    "adam": lambda p: optim.Adam(p),
    "adamw": lambda p: optim.AdamW(p),
}
SMALL = {
    "gpt2": Dimensions("gpt2", 1000, 256, 3, 4, True, 1024),
    "llama": Dimensions("llama", 1000, 256, 3, 4, False, 2048, 768, 2),
    "qwen2": Dimensions("qwen2", 1000, 256, 2, 4, True, 2048, 768, 4),
    "qwen3": Dimensions("qwen3", 1000, 256, 2, 4, True, 2048, 768, 2, 128),
    "one key head": Dimensions("mistral", 1000, 256, 2, 4, False, 2048, 768, 1),
}
CASES = [
    *((SMALL["gpt2"], "adam", dtype, 2, 128) for dtype in DTYPES),
    *((SMALL["llama"], optimizer, "fp32", 2, 128) for optimizer in OPTIMIZERS),
    *((SMALL["qwen2"], "adamw", dtype, 1, 192) for dtype in DTYPES),
    *((SMALL["qwen3"], "momentum", dtype, 3, 64) for dtype in DTYPES),
    *((SMALL["one key head"], "adam", dtype, batch, 128) for dtype in DTYPES for batch in (1, 2)),
    (estimate.dimensions("gpt2-large"), "adam", "fp32", 1, 512),
    (estimate.dimensions("Qwen2-0.5B"), "adamw", "bf16", 2, 256),
]


@pytest.mark.parametrize(("sizes", "optimizer", "dtype", "batch", "length"), CASES)
def test_a_training_step_is_as_estimated(
    sizes: Dimensions, optimizer: str, dtype: str, batch: int, length: int
) -> None:
    expected = estimate.training(sizes, optimizer, dtype, batch, length)
    with VirtualGPU() as gpu:
        rows, held = step(gpu, sizes, optimizer, dtype, batch, length)
    assert rows["parameters"] == expected.parameters
    assert rows["gradients"] == expected.gradients
    assert rows["optimizer states"] == expected.optimizer_states
    # To the byte, but for the loss: its value, its mean's weight, and its counters.
    assert 0 <= held - expected.activations - expected.logits <= 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "one key head"])
def test_a_step_with_lora_is_as_estimated(kind: str, dtype: str) -> None:
    sizes, work = SMALL[kind], {"batch": 2, "length": 128}
    expected = estimate.memory(
        sizes, Setup(dtype=dtype, optimizer="adamw", rank=8, adapters=dtype, **work)
    )
    with VirtualGPU() as gpu:
        rows, held = step(gpu, sizes, "adamw", dtype, 2, 128, lora=8)
    assert rows["parameters"] == expected.parameters
    assert rows["gradients"] == expected.gradients
    assert rows["optimizer states"] == expected.optimizer_states
    assert 0 <= held - expected.activations - expected.logits <= 64


OTHERS = ["granite", "phi3", "olmo2", "gemma", "gemma3_text"]


@pytest.mark.parametrize(
    ("dtype", "attention", "rank", "amp"),
    [
        ("bf16", "flash", 0, None),
        ("bf16", "flash", 8, None),
        ("fp32", "eager", 8, None),
        ("fp32", "eager", 0, "bf16"),
    ],
)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_other_families_keep_is_as_estimated(
    kind: str, dtype: str, attention: str, rank: int, amp: str | None
) -> None:
    """To the byte, but for the loss."""
    sizes, work = small(kind), {"batch": 3, "length": 96}
    eager = attention == "eager"
    with VirtualGPU("H200", capacity=1 << 50, torch="2.11", values="assume") as gpu:
        with gpu.device:
            model = build(sizes, dtype, "eager" if eager else models.CAUSAL_SDPA)
        if rank:
            estimates.with_lora(model, rank, DTYPES[dtype], 0.0)
        with torch.autocast(gpu.device.type, torch.bfloat16, enabled=amp is not None):
            held, loss = held_after_forward(model, gpu, 3, 96, eager)
        del loss
    setup = Setup(
        dtype=dtype,
        attention=attention,
        rank=rank,
        amp=amp,
        adapters=dtype if rank else None,
        **work,
    )
    expected = estimate.memory(sizes, setup)
    assert abs(held - expected.activations - expected.logits) <= 12


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", SMALL)
def test_a_step_under_autocast_is_as_estimated(kind: str, batch: int) -> None:
    sizes = SMALL[kind]
    expected = estimate.memory(sizes, Setup(amp="bf16", batch=batch, length=96))
    with VirtualGPU() as gpu:
        with gpu.device:
            model = build(sizes, "fp32")
        ids = torch.zeros(batch, 96, dtype=torch.int64).to(gpu.device)
        causal = torch.zeros(batch, 1, 96, 96).to(gpu.device)
        positions = torch.arange(96)[None].to(gpu.device)
        with torch.autocast(gpu.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=causal, position_ids=positions).logits
            loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
        held = gpu.breakdown(model)
        del loss
    assert held["parameters"] == expected.parameters
    assert held["cast weights"] == expected.cast_weights
    assert 0 <= held["activations"] - expected.activations - expected.logits <= 64


def held_after_forward(
    model: PreTrainedModel, gpu: VirtualGPU, batch: int, length: int, mask: bool
) -> tuple[int, torch.Tensor]:
    """Bytes of activations between forward and backward, and the loss."""
    ids = torch.zeros(batch, length, dtype=torch.int64).to(gpu.device)
    given = {"input_ids": ids, "position_ids": torch.arange(length)[None].to(gpu.device)}
    if mask:
        causal = torch.zeros(1, 1, length, length, dtype=model.dtype)
        given["attention_mask"] = causal.to(gpu.device)
    logits = model(**given).logits
    loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
    return gpu.breakdown(model)["activations"], loss


FUSED = [
    (name, dtype, length, dropout)
    for name in SMALL
    for dtype in DTYPES
    for length in (96, 100)  # a multiple of 32 and none
    for dropout in (False, True)
    if name == "gpt2" or not dropout
]


@pytest.mark.parametrize(("name", "dtype", "length", "dropout"), FUSED)
def test_fused_attention_and_dropout_are_as_estimated(
    name: str, dtype: str, length: int, dropout: bool
) -> None:
    sizes = SMALL[name]
    fused = "efficient" if dtype == "fp32" else "flash"
    for kind in ("eager", fused):
        implementation = kind if kind == "eager" else models.CAUSAL_SDPA
        with VirtualGPU() as gpu:
            with gpu.device:
                model = build(sizes, dtype, implementation, 0.1 * dropout)
            held, loss = held_after_forward(model, gpu, 3, length, kind == "eager")
            loss.backward()
        expected = estimate.training(sizes, "sgd", dtype, 3, length, kind, dropout=dropout)
        assert 0 <= held - expected.activations - expected.logits <= 8  # the loss and its weight


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_saves_as_estimated(name: str, attention: str) -> None:
    sizes = dataclasses.replace(SMALL[name], num_hidden_layers=4)
    implementation = "eager" if attention == "eager" else models.CAUSAL_SDPA
    found = []
    for checkpointing in (False, True):
        with VirtualGPU() as gpu:
            with gpu.device:
                model = build(sizes, "bf16", implementation)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            held, loss = held_after_forward(model, gpu, 2, 256, attention == "eager")
            loss.backward()
        found.append(held)
    whole, inputs = (
        estimate.activations(sizes, 2, 256, "bf16", attention, every) for every in (0, 1)
    )
    layer = estimate.layer_activations(sizes, 2, 256, "bf16", attention)
    assert found[0] - found[1] == whole - (inputs - layer)


def test_a_checkpoint_of_many_layers_keeps_fewer_inputs_and_makes_more_again() -> None:
    sizes = dataclasses.replace(SMALL["llama"], num_hidden_layers=10)
    layer = estimate.layer_activations(sizes, 2, 64)
    state = 2 * 64 * 256 * 4  # of one layer's input
    each, four, all_ten, more = (
        estimate.activations(sizes, 2, 64, checkpointing=every) for every in (1, 4, 10, 11)
    )
    assert four - each == (3 - 10) * state + (4 - 1) * layer
    assert all_ten == more == estimate.activations(sizes, 2, 64) + state


@pytest.mark.parametrize("name", ["adam 8-bit", "lion", "lion 8-bit"])
def test_the_states_of_bitsandbytes_optimizers(name: str) -> None:
    import bitsandbytes

    classes = {"adam 8-bit": "Adam8bit", "lion": "Lion", "lion 8-bit": "Lion8bit"}
    with VirtualGPU() as gpu:
        with gpu.device:
            model = nn.Sequential(nn.Linear(1000, 500), nn.Linear(4095, 1), nn.Linear(4096, 1))
        opt = getattr(bitsandbytes.optim, classes[name])(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        opt.step()
        states = gpu.breakdown(model, opt)["optimizer states"]
    assert states == estimate.optimizer_states([p.shape for p in model.parameters()], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_muon_is_as_estimated(dtype: str) -> None:
    """States and temporaries to the byte; all sizes are multiples of the allocator's blocks."""
    shapes = [(256, 256), (256, 768), (768, 256)]
    other = [(3000, 256), (256,)]
    with VirtualGPU("H200", torch="2.11") as gpu:
        with gpu.device:
            matrices, rest = (
                [nn.Parameter(torch.empty(shape, dtype=DTYPES[dtype])) for shape in some]
                for some in (shapes, other)
            )
        for p in (*matrices, *rest):
            p.grad = torch.empty_like(p)
        muon, adamw = optim.Muon(matrices), optim.AdamW(rest, foreach=False)
        before = gpu.memory_allocated()
        for _ in range(2):  # the first makes the states and the workspace
            gpu.reset_peak_memory_stats()
            held = gpu.memory_allocated()
            muon.step()
            taken = gpu.max_memory_allocated() - held
            adamw.step()
        states = gpu.memory_allocated() - before - WORKSPACE_OF_H200
    counts = Counter(shapes), Counter(other)
    expected = optimizers.stored_states(*counts, "muon", dtype)
    assert states == sum(nbytes * count for nbytes, count in expected.items())
    assert taken == optimizers.step_temporaries(*counts, "muon", dtype, "fused")


def test_what_paged_states_and_projected_ones_leave_on_the_card() -> None:
    shapes = [(1000, 500), (100, 100), (100,)]
    # bitsandbytes: from 100,000 numbers on in managed memory.
    assert estimate.optimizer_states(shapes, "paged adamw") == 2 * 4 * (10_000 + 100)
    # apollo-torch: two of 128 x the longer side, the projection of 128 x the shorter one.
    matrices = 2 * 128 * (1000 + 100) + 128 * (500 + 100)
    assert estimate.optimizer_states(shapes, "apollo", "bf16") == 2 * (matrices + 2 * 100)


def test_the_states_of_adafactor() -> None:
    """On the host: its step looks at values, which the virtual GPU does not have."""
    model = nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50))
    opt = optim.Adafactor(model.parameters())
    model(torch.ones(2, 100)).sum().backward()
    opt.step()
    found = sum(
        value.nbytes
        for state in opt.state.values()
        for name, value in state.items()
        if name != "step" and value is not None
    )
    assert found == estimate.optimizer_states([p.shape for p in model.parameters()], "adafactor")


def test_the_kv_cache_is_that_of_transformers() -> None:
    from transformers import DynamicCache

    sizes = SMALL["llama"]
    cache = DynamicCache()
    keys = torch.empty(2, sizes.num_key_value_heads, 40, sizes.head_dim, dtype=torch.bfloat16)
    for layer in range(sizes.num_hidden_layers):
        cache.update(keys, keys.clone(), layer)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == estimate.kv_cache(sizes, 2, 40, "bf16")


# Properties

SIZES = st.builds(
    lambda kind, vocabulary, width, layers, groups, keys, tied: Dimensions(
        kind, vocabulary, 16 * groups * keys * width, layers, groups * keys, tied, 512, 64, keys
    ),
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.integers(1, 1000),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
KINDS = st.sampled_from(["fp32", "fp16", "bf16"])


@settings(deadline=None, derandomize=True)
@given(
    SIZES, KINDS, st.sampled_from(list(estimate.OPTIMIZERS)), st.integers(0, 4), st.integers(0, 64)
)
def test_parts_add_up(
    sizes: Dimensions, dtype: str, optimizer: str, batch: int, length: int
) -> None:
    memory = estimate.training(sizes, optimizer, dtype, batch, length)
    kinds = [getattr(memory, field) for field in FIELDS]
    assert memory.total == sum(kinds)
    assert min(kinds) >= 0
    assert memory.held <= memory.peak == dict(memory.moments)[memory.peak_at]


@settings(deadline=None, derandomize=True)
@given(
    SIZES,
    KINDS,
    st.integers(1, 4),
    st.integers(1, 64),
    st.sampled_from(["num_hidden_layers", "vocab_size", "intermediate_size"]),
)
def test_more_takes_more(
    sizes: Dimensions, dtype: str, batch: int, length: int, grown: str
) -> None:
    larger = dataclasses.replace(sizes, **{grown: getattr(sizes, grown) + 1})
    for attention in estimate.ATTENTION:
        for checkpointing in (False, True):
            base = estimate.training(
                sizes, "adam", dtype, batch, length, attention, checkpointing
            ).total
            for other, b, n in ((larger, batch, length), (sizes, batch + 1, length)):
                more = estimate.training(other, "adam", dtype, b, n, attention, checkpointing)
                assert more.total >= base
            longer = estimate.training(
                sizes, "adam", dtype, batch, length + 1, attention, checkpointing
            )
            assert longer.total > base
    assert (
        estimate.inference(larger, dtype, batch, length).total
        >= estimate.inference(sizes, dtype, batch, length).total
    )


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 4), st.integers(1, 64))
def test_dtypes_are_in_their_ratio(sizes: Dimensions, batch: int, length: int) -> None:
    double, whole, half = (
        estimate.training(sizes, "adam", d, batch, length) for d in ("fp64", "fp32", "bf16")
    )
    for name in ("parameters", "gradients", "optimizer_states", "logits"):
        assert getattr(whole, name) == 2 * getattr(half, name)
        assert getattr(double, name) == 2 * getattr(whole, name)
    caches = [estimate.kv_cache(sizes, batch, length, d) for d in ("fp32", "bf16", "fp8")]
    assert caches[0] == 2 * caches[1] == 4 * caches[2]


@settings(deadline=None, derandomize=True)
@given(SIZES, KINDS)
def test_training_is_linear_in_the_parameters(sizes: Dimensions, dtype: str) -> None:
    count = sum(estimate.parameters(sizes).values())
    width = estimate.bytes_per_parameter(dtype)
    for optimizer, copies in (("sgd", 2), ("momentum", 3), ("adam", 4), ("adamw", 4)):
        assert estimate.training(sizes, optimizer, dtype).total == copies * count * width


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 4), st.integers(1, 64))
def test_flash_attention_and_checkpointing_never_cost_more(
    sizes: Dimensions, batch: int, length: int
) -> None:
    eager = estimate.activations(sizes, batch, length)
    flash = estimate.activations(sizes, batch, length, attention="flash")
    assert flash <= eager + 24 * sizes.num_hidden_layers  # its random state
    if sizes.num_hidden_layers > 1:
        assert estimate.activations(sizes, batch, length, checkpointing=True) <= eager


def test_quantised_bytes_of_a_parameter() -> None:
    known = ("int8", "nf4", "nf4 double")
    digits = {d: round(float(estimate.bytes_per_parameter(d)), 3) for d in known}
    assert digits == {"int8": 1.0, "nf4": 0.562, "nf4 double": 0.516}
    assert estimate.bytes_per_parameter("nf4") == Fraction(9, 16)


# Bits for each weight of a large matrix: llama.cpp's tools/quantize/README.md prints those of
# GGUF's types; of MXFP4 and NVFP4 they are the formats' own.
BITS = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q4_0": 4.5, "Q3_K": 3.4375}
BITS |= {"Q2_K": 2.625, "mxfp4": 4.25, "nvfp4": 4.5, "awq": 4.15625, "nf4": 4.5}


@pytest.mark.parametrize("format", BITS)
def test_bits_of_a_weight(format: str) -> None:
    sizes = dataclasses.replace(estimate.dimensions("Llama-3.1-8B"), vocab_size=1)
    matrices = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    rest = sum(estimate.parameters(sizes).values()) - matrices
    found = estimate.parameter_bytes(sizes, "bf16", format)
    whole = 2 * 4096 * (16 - BITS[format]) / 8 if format.startswith("Q") else 0  # words
    assert (found - 2 * rest + whole) * 8 / matrices == pytest.approx(BITS[format], abs=1e-6)


def test_experts_are_stored_in_formats_that_know_them() -> None:
    sizes = estimate.dimensions("Mixtral-8x7B-v0.1")
    sizes_of = {f: estimate.parameter_bytes(sizes, "bf16", f) / 1e9 for f in ("nf4", "awq", "Q4_K")}
    assert round(sizes_of["nf4"], 1) == 91.5
    assert sizes_of["awq"] < 26 and sizes_of["Q4_K"] < 27
    with pytest.raises(ValueError, match="quantised is 'Q4_K': expected one that LoRA is trained"):
        Setup(quantised="Q4_K", rank=8)


def test_what_is_quantised_and_what_is_not() -> None:
    sizes = SMALL["llama"]
    parts = estimate.parameters(sizes)
    rest = parts["embedding"] + parts["norm"] + parts["head"]
    blocks = parts["attention"] + parts["mlp"]
    assert estimate.parameter_bytes(sizes, "bf16", "nf4") == rest * 2 + blocks * 9 // 16
    rows = sizes.num_hidden_layers * (256 + 128 + 128 + 256 + 768 + 768 + 256)
    assert estimate.parameter_bytes(sizes, "bf16", "int8") == rest * 2 + blocks + rows * 4


# Sharding

# Table 1 of the ZeRO paper (arXiv 1910.02054): GB for each of so many GPUs, of
# models of 7.5, 128 and 1000 billion parameters, in ZeRO 1, 2 and 3.
ZERO_PAPER = {
    1: ((120, 120, 120), (2048, 2048, 2048), (16000, 16000, 16000)),
    4: ((52.5, 41.3, 30), (896, 704, 512), (7000, 5500, 4000)),
    16: ((35.6, 21.6, 7.5), (608, 368, 128), (4750, 2875, 1000)),
    64: ((31.4, 16.6, 1.88), (536, 284, 32), (4187, 2218, 250)),
    256: ((30.4, 15.4, 0.47), (518, 263, 8), (4046, 2054, 62.5)),
    1024: ((30.1, 15.1, 0.12), (513, 257, 2), (4011, 2013, 15.6)),
}
PAPERS_ADAM = {"dtype": "fp16", "states": "fp32", "master_weights": True, "batch": 0}


@pytest.mark.parametrize("gpus", ZERO_PAPER)
def test_sharding_is_that_of_the_paper(gpus: int) -> None:
    sizes = estimate.dimensions("Llama-3.1-8B")
    count = sum(estimate.parameters(sizes).values())
    for stage in (1, 2, 3):
        setup = Setup(gpus=gpus, sharding=f"ZeRO {stage}", **PAPERS_ADAM)  # type: ignore[arg-type]
        memory = estimate.memory(sizes, setup)
        held = memory.parameters + memory.gradients + memory.optimizer_states
        for billions, row in zip((7.5, 128, 1000), ZERO_PAPER[gpus], strict=True):
            published = row[stage - 1]
            # The paper rounds, or cuts off, at three or four digits.
            assert held / count * billions == pytest.approx(published, rel=0.007, abs=0.005)


MANY = st.integers(1, 100)
STAGES = st.sampled_from(list(estimate.SHARDING))


@settings(deadline=None, derandomize=True)
@given(SIZES, KINDS, st.sampled_from(list(estimate.OPTIMIZERS)), STAGES, MANY)
def test_shards_hold_the_whole_and_little_more(
    sizes: Dimensions, dtype: str, optimizer: str, stage: str, gpus: int
) -> None:
    whole = estimate.training(sizes, optimizer, dtype)
    part = estimate.training(sizes, optimizer, dtype, gpus=gpus, sharding=stage)
    for field in FIELDS:
        all_of_it, one = getattr(whole, field), getattr(part, field)
        if field in estimate.SHARDING[stage]:
            assert 0 <= gpus * one - all_of_it < gpus
        else:
            assert one == all_of_it


@settings(deadline=None, derandomize=True)
@given(SIZES, KINDS, st.sampled_from(list(estimate.OPTIMIZERS)), STAGES, MANY, st.booleans())
def test_more_gpus_never_hold_more_each(
    sizes: Dimensions, dtype: str, optimizer: str, stage: str, gpus: int, loaded: bool
) -> None:
    setup = Setup(
        dtype=dtype,
        optimizer=optimizer,
        length=16,
        gpus=gpus,
        sharding=stage,
        load="to" if loaded else "device_map",
    )
    now = estimate.memory(sizes, setup)
    more = estimate.memory(sizes, dataclasses.replace(setup, gpus=gpus + 1))
    assert more.total <= now.total
    assert more.context == now.context
    if gpus == 1:
        assert now == estimate.memory(sizes, dataclasses.replace(setup, sharding="none"))
    stages = [
        estimate.memory(sizes, dataclasses.replace(setup, sharding=s)).total
        for s in estimate.SHARDING
    ]
    assert stages == sorted(stages, reverse=True)


# Rounding


@pytest.mark.parametrize("name", known_models())
@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_rounding_of_the_weights_beside_a_replay(name: str, dtype: str, width: int) -> None:
    sizes = estimate.dimensions(name)
    for load in ("to", "device_map"):
        card = CachingAllocator()
        requests = [width * math.prod(shape) for _, shape in estimate.shapes(sizes)]
        if load == "device_map":
            card.free(card.malloc(sum(requests) + 512 * len(requests)))
        for nbytes in requests:
            card.malloc(nbytes)
        setup = Setup(task="inference", dtype=dtype, batch=0, load=load)
        memory = estimate.memory(sizes, setup)
        allocated = memory.parameters + memory.rounding
        if load == "device_map":  # but for what is left at the end of the one block
            assert 0 <= card.memory_allocated() - allocated <= 2**20
        else:  # what small segments leave is not in the formula
            assert allocated <= card.memory_allocated() <= 1.025 * allocated


def test_rounding_of_published_loads() -> None:
    """gpt2-large in FP32: 3,096,120,320 B of weights, and 72 matrices of 25 MiB in 26 MiB each."""
    sizes = estimate.dimensions("gpt2-large")
    by = {
        load: estimate.memory(sizes, Setup(task="inference", batch=0, load=load)).rounding
        for load in ("to", "device_map")
    }
    embedding = 50257 * 1280 * 4
    left = -embedding % (2 * 2**20)  # of the embedding's segment
    assert by == {"to": 72 * 2**20 + left, "device_map": 0}


def test_a_block_is_a_multiple_of_512() -> None:
    mib = 2**20
    assert [estimate.block(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert estimate.block(25 * mib, own_segment=True) == 26 * mib
    assert estimate.block(25 * mib) == 25 * mib
    assert estimate.block(9 * mib + 1, own_segment=True) == 9 * mib + 512
    assert (
        estimate.block(25 * mib - 512, own_segment=True) == 25 * mib - 512
    )  # the rest is split off
    assert estimate.block(10 * mib, own_segment=True) == 10 * mib


# All options together


def test_mixed_precision_keeps_what_it_is_known_to_keep() -> None:
    sizes = estimate.dimensions("Llama-3.1-8B")
    count = sum(estimate.parameters(sizes).values())
    full = estimate.memory(sizes, Setup())
    amp = estimate.memory(sizes, Setup(amp="bf16"))
    assert (amp.parameters, amp.gradients) == (full.parameters, full.gradients)
    assert amp.optimizer_states == full.optimizer_states == 8 * count
    # All but the embedding and the norms are cast to two bytes.
    parts = estimate.parameters(sizes)
    assert amp.cast_weights == 2 * (parts["attention"] + parts["mlp"] + parts["head"])
    # Half weights with FP32 states and master weights: 2 + 2 + 12 bytes (arXiv 1910.02054).
    paper = estimate.memory(sizes, Setup(**PAPERS_ADAM))  # type: ignore[arg-type]
    assert paper.parameters + paper.gradients + paper.optimizer_states == 16 * count
    # Nothing to cast where the weights are in as few bits.
    half = Setup(dtype="bf16", batch=2, length=64)
    cast = dataclasses.replace(half, amp="bf16")
    assert estimate.memory(sizes, cast) == estimate.memory(sizes, half)


def test_a_tied_head_is_cast_by_autocast() -> None:
    sizes = estimate.dimensions("gpt2")
    h, i = sizes.hidden_size, sizes.intermediate_size
    matrices = sizes.num_hidden_layers * (4 * h * h + 2 * h * i)
    copies = estimate.memory(sizes, Setup(amp="fp16")).cast_weights
    assert copies == 2 * (matrices + sizes.vocab_size * h)


def test_quantised_weights_are_trained_with_lora_only() -> None:
    sizes = SMALL["llama"]
    with pytest.raises(ValueError, match=r"rank is 0: expected 1 or more, for quantised weights"):
        Setup(quantised="nf4")
    memory = estimate.memory(sizes, Setup(dtype="bf16", quantised="nf4", rank=8, adapters="bf16"))
    adapters = estimate.lora_parameters(sizes, 8)
    assert memory.parameters == estimate.parameter_bytes(sizes, "bf16", "nf4") + 2 * adapters
    assert memory.gradients == 2 * adapters


def test_the_context_is_a_measured_one() -> None:
    assert estimate.CONTEXT == MEASURED["machine"]["context"]
    assert estimate.memory(SMALL["gpt2"], Setup()).context == estimate.CONTEXT


def test_experts_are_neither_quantised_nor_adapted() -> None:
    """Mixtral in NF4: its experts stay in BF16, as one parameter of three dimensions."""
    sizes = estimate.dimensions("Mixtral-8x7B-v0.1")
    parts = estimate.parameters(sizes)
    left = sum(parts.values()) - parts["attention"]
    quantised = estimate.parameter_bytes(sizes, "bf16", "nf4")
    assert quantised == 2 * left + parts["attention"] * 9 // 16
    assert round(quantised / 1e9, 1) == 91.5
    layers, h = sizes.num_hidden_layers, sizes.hidden_size
    assert estimate.lora_parameters(sizes, 1) == layers * (2 * 2 * h + 2 * (h + h // 4))
    with torch.device("meta"):
        model = build(dataclasses.replace(sizes, num_hidden_layers=1), "bf16")
    linear = [m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert sum(linear) * layers == parts["attention"]


MIXTURE = Dimensions("mixtral", 1000, 256, 2, 4, False, 2048, 512, 2, 0, 8, 2)


@pytest.mark.parametrize(
    "change", [{}, {"num_experts_per_tok": 3}, {"num_local_experts": 16, "num_hidden_layers": 3}]
)
def test_a_step_with_experts_is_as_estimated(change: dict[str, int]) -> None:
    """Weights, gradients, states and activations to the byte, and the peak."""
    sizes = dataclasses.replace(MIXTURE, **change)  # type: ignore[arg-type]
    setup = Setup(dtype="bf16", optimizer="adamw", batch=2, length=128)
    with VirtualGPU("H200", capacity=1 << 50, torch="2.11", values="assume") as gpu:
        rows, held = step(gpu, sizes, "adamw", "bf16", 2, 128)
    expected = estimate.memory(sizes, setup)
    assert rows["parameters"] == expected.parameters
    assert rows["gradients"] == expected.gradients
    assert rows["optimizer states"] == expected.optimizer_states
    assert 0 <= held - expected.activations - expected.logits <= 64


def test_lora_beside_experts_is_as_estimated() -> None:
    """PEFT adapts linear layers, and experts are none: weights, states and activations."""
    setup = Setup(dtype="bf16", optimizer="adamw", rank=8, adapters="bf16", batch=2, length=128)
    expected = estimate.memory(MIXTURE, setup)
    with VirtualGPU("H200", capacity=1 << 50, torch="2.11", values="assume") as gpu:
        rows, held = step(gpu, MIXTURE, "adamw", "bf16", 2, 128, lora=8)
    assert rows["parameters"] == expected.parameters
    assert rows["gradients"] == expected.gradients
    assert rows["optimizer states"] == expected.optimizer_states
    assert 0 <= held - expected.activations - expected.logits <= 64


@pytest.mark.parametrize("quantised", ["int8", "nf4"])
def test_bitsandbytes_replaces_no_expert(quantised: str) -> None:
    """The very modules that transformers gives to bitsandbytes, and no more, are in fewer bits."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = build(MIXTURE, "bf16")
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        how = BitsAndBytesConfig(
            **{"load_in_8bit" if quantised == "int8" else "load_in_4bit": True}
        )
        model = replace_with_bnb_linear(model, ["lm_head"], how)
    replaced = [n for n, m in model.named_modules() if n in linear and type(m) is not nn.Linear]
    assert replaced and all("self_attn" in name for name in replaced)
    counts = [(*linear[name].weight.shape,) for name in replaced]
    fewer = sum(2 * n * m for n, m in counts) - sum(
        n * m + 4 * n if quantised == "int8" else n * m // 2 + 4 * (n * m // 64) for n, m in counts
    )
    whole = estimate.parameter_bytes(MIXTURE, "bf16")
    assert whole - estimate.parameter_bytes(MIXTURE, "bf16", quantised) == fewer


# Peaks

MEASURED = tomllib.loads(Path(__file__).with_name("measured_peaks.toml").read_text("utf-8"))


def measured(name: str) -> tuple[estimate.Memory, int]:
    """The estimate of a measured workload, and its measured peak."""
    given = MEASURED["workloads"][name]
    sizes = estimate.dimensions(given.get("model") or given["sizes"])
    # Models were made on the card, tensor after tensor from segments that were there.
    setup = Setup(load="device_map", **given["setup"])
    return estimate.memory(sizes, setup), given["peak"]


@pytest.mark.parametrize("name", MEASURED["workloads"])
def test_a_measured_peak_is_as_estimated(name: str) -> None:
    memory, peak = measured(name)
    assert -0.005 <= memory.peak / peak - 1 <= 0.03, (name, memory.peak_at)


@pytest.mark.parametrize("name", MEASURED["workloads"])
def test_the_page_shows_it_as_it_is(name: str) -> None:
    memory, peak = measured(name)
    sizes = f"{peak / 1e9:.2f} | {memory.peak / 1e9:.2f} | {memory.peak / peak - 1:+.2%}"
    row = f"| {name} | {sizes[:-1]} % | {memory.peak_at} |"
    assert row in (ROOT / "book" / "estimator.md").read_text("utf-8").splitlines()


@pytest.mark.parametrize("name", MEASURED["workloads"])
def test_the_verdict_on_a_measured_workload_is_right(name: str) -> None:
    """On cards of just the size that it needs, and of just too little.

    "Fits" is not said where the allocator runs out of memory, and "does not fit" is not
    said where it ran: with what was reserved, or with the least that it gets along with.
    """
    memory, _ = measured(name)
    workload, context = MEASURED["workloads"][name], MEASURED["machine"]["context"]
    assert memory.verdict(workload["reserved"] + context) in ("fits", "may fit")
    assert memory.verdict(workload["peak"] * 99 // 100 + context) == "does not fit"
    if "least" in workload:
        assert memory.verdict(workload["least"] - 2**21 + context) != "fits"
        # Nor is far more asked for.
        assert memory.needed <= 1.25 * (workload["least"] + context)


REPLAYED = estimates.stored()


@pytest.mark.parametrize(("kind", "count"), [("peaks", 500), ("families", 100)])
def test_the_peaks_of_random_set_ups_are_as_estimated(kind: str, count: int) -> None:
    """Beside the replays' peaks that are stored, and as the page says it."""
    ratios = [estimates.estimated(case).peak / peak - 1 for case, peak in estimates.stored(kind)]
    assert len(ratios) == count
    assert -estimates.BELOW <= min(ratios) and max(ratios) <= estimates.ABOVE
    page = (ROOT / "book" / "estimator.md").read_text("utf-8")
    said = f"all {len(ratios)} lie between {-min(ratios):.2%} below and {max(ratios):.2%} above"
    assert said.replace("%", " %") in page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_replayed_peak_of_another_family_is_as_stored(seed: int) -> None:
    case, peak = estimates.stored("families")[seed]
    assert estimates.replayed(case) == {"peak": peak, "fits": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1, 3, 4, 6, 7, 8, 10])
def test_a_replayed_peak_is_as_estimated(seed: int) -> None:
    """A random set-up of a model of the book, with up to four of its layers, on a card.

    A sample of those that are stored, with cards of just the bytes that are enough.
    """
    case = estimates.random_case(seed, layers=4)
    found, memory = estimates.replayed(case), estimates.estimated(case)
    peak = found["peak"]
    assert peak == REPLAYED[seed][1]  # the very bytes that are stored
    assert found["fits"], (case, memory.needed)  # on a card of just the bytes that are enough
    assert memory.peak <= (1 + estimates.ABOVE) * peak, (case, memory.moments, peak)
    assert memory.peak >= (1 - estimates.BELOW) * peak, (case, memory.moments, peak)


FAMILIES = ["aya-expanse-8b", "DeepSeek-V2-Lite"]  # that are counted for inference alone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_another_family_peaks_as_estimated(name: str) -> None:
    sizes = architecture.with_layers(estimate.dimensions(name), 2)
    setup = Setup(task="inference", dtype="bf16", length=700, attention="sdpa", all_logits=True)
    case = estimates.Case(name, sizes, dataclasses.replace(setup, load="device_map"), "H200")
    found, memory = estimates.replayed(case), estimates.estimated(case)
    assert found["fits"]
    assert -estimates.BELOW <= memory.peak / found["peak"] - 1 <= estimates.ABOVE, memory.moments


T5 = Dimensions("t5", 32_128, 512, 2, 8, True, 0, 2048, 8, 64, encoder_layers=2)
GATED_T5 = Dimensions("t5_gated", 32_128, 768, 1, 12, True, 0, 2048, 12, 64, encoder_layers=1)
BART = Dimensions("bart", 50_265, 768, 2, 12, True, 1024, 3072, 12, 64, encoder_layers=2)
VIT = Dimensions("vit", 1000, 768, 2, 12, False, 197, 3072, 12, 64, patch_size=16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sizes", "dtype", "batch", "length", "attention"),
    [
        (T5, "bf16", 1, 512, "sdpa"),  # its tables of positions are the largest
        (T5, "fp32", 16, 100, "eager"),
        (GATED_T5, "fp32", 16, 100, "sdpa"),
        (GATED_T5, "bf16", 2, 1024, "eager"),
        (BART, "fp16", 3, 333, "sdpa"),
        (BART, "bf16", 1, 1000, "eager"),
        (VIT, "bf16", 8, 197, "sdpa"),
        (VIT, "fp16", 1, 197, "eager"),
        (dataclasses.replace(VIT, num_hidden_layers=1), "fp32", 16, 197, "sdpa"),
    ],
)
def test_encoders_and_images_peak_as_estimated(
    sizes: Dimensions, dtype: str, batch: int, length: int, attention: str
) -> None:
    setup = Setup(task="inference", dtype=dtype, batch=batch, length=length, attention=attention)
    case = estimates.Case("", sizes, dataclasses.replace(setup, load="device_map"), "H200")
    found, memory = estimates.replayed(case), estimates.estimated(case)
    assert found["fits"]
    assert -estimates.BELOW <= memory.peak / found["peak"] - 1 <= estimates.ABOVE, memory.moments


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        (VIT, {"length": 196}, "length is 196: expected 197, an image's patches and one more"),
        (BART, {"all_logits": True}, "all_logits is True: expected False, for bart reads before"),
        (BART, {"length": 1025}, "length is 1025: expected at most the 1024 positions"),
        (T5, {"dtype": "fp16"}, "dtype is 'fp16': expected fp32 or bf16, for in FP16 a part of"),
        (T5, {"attention": "flash"}, "attention is 'flash': expected another one, for flash takes"),
        (T5, {"task": "training"}, "model_type is 't5': expected for training one whose"),
    ],
)
def test_what_encoders_cannot_do_is_refused(
    sizes: Dimensions, asked: dict[str, str], message: str
) -> None:
    given = {"task": "inference", "dtype": "bf16", **asked}
    with pytest.raises(ValueError, match=message):
        estimate.memory(sizes, Setup(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "phi3"])
def test_what_a_window_keeps_is_as_estimated(kind: str, dtype: str) -> None:
    """From its length on SDPA has a mask, and another kernel: to the byte, but for the loss."""
    layers = 1 if kind == "gemma3_text" else 2
    sizes = dataclasses.replace(small(kind), sliding_window=64, sliding_layers=layers)
    with VirtualGPU("H200", capacity=1 << 50, torch="2.11", values="assume") as gpu:
        with gpu.device:
            model = build(sizes, dtype, "sdpa")
        held, loss = held_after_forward(model, gpu, 3, 96, mask=False)
        del loss
    expected = estimate.activations(sizes, 3, 96, dtype, "sdpa")
    assert abs(held - expected - 2 * estimate.logits(sizes, 3, 96, dtype)) <= 64
    shorter = dataclasses.replace(sizes, sliding_window=97)
    assert estimate.activations(shorter, 3, 96, dtype, "sdpa") != expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "window", "length", "given"),
    [
        ("Phi-3-mini-4k-instruct", 2047, 2300, {"dtype": "bf16"}),
        ("Mistral-7B-v0.1", 512, 1500, {"dtype": "bf16", "rank": 16, "checkpointing": True}),
        ("Mistral-7B-v0.1", 512, 700, {"dtype": "fp32"}),
        ("gemma-3-1b-it", 512, 900, {"dtype": "fp32", "amp": "bf16"}),
    ],
)
def test_a_peak_beyond_a_window_is_as_estimated(
    name: str, window: int, length: int, given: dict[str, str]
) -> None:
    sizes = architecture.with_layers(estimate.dimensions(name), 2)
    sizes = dataclasses.replace(sizes, sliding_window=window)
    setup = Setup(optimizer="adamw", implementation="fused", attention="sdpa", length=length)
    case = estimates.Case(name, sizes, dataclasses.replace(setup, **given), "H200")
    found, memory = estimates.replayed(case), estimates.estimated(case)
    assert found["fits"]
    assert -estimates.BELOW <= memory.peak / found["peak"] - 1 <= estimates.ABOVE, memory.moments


def test_what_is_not_described_is_not_trained() -> None:
    expected = "model_type is 'gemma2': expected for training one whose activations the formulas"
    with pytest.raises(ValueError, match=expected):
        estimate.memory(estimate.dimensions("gemma-2-2b"), Setup(dtype="bf16"))


SHARDED = Dimensions("llama", 65_536, 1024, 3, 8, True, 2048, 4096, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False, "vocab_size": 8192, "num_hidden_layers": 6}, {}),
        ({}, {"offload": "all"}),
    ],
)
def test_a_peak_with_fsdp_is_as_estimated(change: dict[str, int], given: dict[str, str]) -> None:
    """What is gathered, whole gradients, and those that wait to be sent."""
    sizes = dataclasses.replace(SHARDED, **change)  # type: ignore[arg-type]
    setup = Setup(dtype="bf16", optimizer="adamw", implementation="fused", attention="sdpa")
    setup = dataclasses.replace(setup, length=64, gpus=8, sharding="FSDP", **given)  # type: ignore[arg-type]
    peak = estimates.replayed_sharded(sizes, setup)
    memory = estimate.memory(sizes, setup, workspace=WORKSPACE_OF_H200)
    assert -estimates.BELOW <= memory.peak / peak - 1 <= estimates.ABOVE, (memory.moments, peak)


def test_what_is_offloaded_lies_on_the_host() -> None:
    sizes, setup = estimate.dimensions("Llama-3.1-8B"), Setup(dtype="bf16", optimizer="adamw")
    whole = estimate.memory(sizes, setup)
    some = estimate.memory(sizes, dataclasses.replace(setup, offload="optimizer"))
    assert some.host == whole.optimizer_states
    assert (some.optimizer_states, some.gradients) == (0, whole.gradients)
    two = dataclasses.replace(setup, offload="all", gpus=2, sharding="FSDP")
    both = estimate.memory(sizes, two)
    assert both.parameters == both.gradients == both.optimizer_states == 0
    assert both.host == (whole.parameters + whole.gradients + whole.optimizer_states) // 2


def test_measured_peaks_come_at_different_moments() -> None:
    found = {measured(name)[0].peak_at for name in MEASURED["workloads"]}
    assert {"start of backward: the loss", "optimizer step"} < found
    assert "end of backward: the embedding" in found


# The front door, and models that are no name


@settings(deadline=None, derandomize=True)
@given(
    SIZES,
    KINDS,
    st.sampled_from(list(estimate.OPTIMIZERS)),
    st.integers(0, 3),
    st.integers(0, 64),
    st.sampled_from(["eager", "efficient", "sdpa"]),
    st.booleans(),
)
def test_the_short_forms_agree_with_the_front_door(
    sizes: Dimensions,
    dtype: str,
    optimizer: str,
    batch: int,
    length: int,
    attention: str,
    checkpointing: bool,
) -> None:
    work = {"dtype": dtype, "batch": batch, "length": length}
    setup = Setup(optimizer=optimizer, attention=attention, checkpointing=checkpointing, **work)
    short = estimate.training(sizes, optimizer, dtype, batch, length, attention, int(checkpointing))
    whole = estimate.memory(sizes, setup)
    assert short == dataclasses.replace(whole, rounding=0, context=0)
    generating = estimate.memory(sizes, Setup(task="inference", **work))
    short = estimate.inference(sizes, dtype, batch, length)
    assert short == dataclasses.replace(generating, rounding=0, context=0)


@pytest.mark.parametrize("name", known_models())
def test_a_configuration_is_as_good_as_a_name(name: str) -> None:
    sizes = estimate.dimensions(name)
    given = {n: x for n, x in dataclasses.asdict(sizes).items() if x or n in estimates.KEPT}
    kind = given.pop("model_type")
    if kind == "gpt2":
        del given["num_key_value_heads"], given["head_dim"]
        given["n_inner"] = given.pop("intermediate_size")
    config = AutoConfig.for_model(kind, **given)
    assert estimate.dimensions(config) == sizes
    assert estimate.dimensions(config.to_dict()) == sizes


def test_a_configuration_that_lacks_a_size() -> None:
    with pytest.raises(ValueError, match="vocab_size is None: expected the model's, as its"):
        estimate.dimensions({"model_type": "llama"})
    with pytest.raises(ValueError, match="model_type is 'bert': expected one of gpt2"):
        estimate.dimensions(AutoConfig.for_model("bert"))
    # BART's MLP has another name, and would be taken for one of the usual width.
    with pytest.raises(ValueError, match="intermediate_size is None: expected the model's"):
        estimate.dimensions(AutoConfig.for_model("bart", encoder_ffn_dim=64))


# Impossible input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert': expected one of gpt2, llama, mistral"),
        ({"hidden_size": -1}, "hidden_size is -1: expected a whole number from 1 up"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5: expected a whole number"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2: expected a whole number from 0 up"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3: expected a divisor of"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3: expected a divisor of 4"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok is 2: expected at most"),
        ({"model_type": "bart"}, "encoder_layers is 0: expected a whole number from 1 up, of bart"),
        ({"model_type": "vit"}, "patch_size is 0: expected a whole number from 1 up, of vit"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str) -> None:
    given = {**dataclasses.asdict(SMALL["llama"]), "head_dim": 0, **change}
    with pytest.raises(ValueError, match=message):
        Dimensions(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: estimate.training(s, "adagrad"), "optimizer is 'adagrad': expected one of sgd"),
        (lambda s: estimate.training(s, dtype="fp12"), "dtype is 'fp12': expected one of fp64"),
        (lambda s: estimate.activations(s, 1, 1, "nf4"), "dtype is 'nf4': expected one that is"),
        (lambda s: estimate.activations(s, -1, 1), "batch is -1: expected a whole number from 0"),
        (lambda s: estimate.kv_cache(s, 1, 2.5), "length is 2.5: expected a whole number from 0"),
        (
            lambda s: estimate.activations(s, 1, 1, attention="linear"),
            "attention is 'linear': expected one of eager, flash",
        ),
        (
            lambda s: estimate.activations(s, 1, 1, dropout=True),
            "dropout is True: expected False, as llama has none",
        ),
        (
            lambda s: estimate.activations(s, 1, 1, checkpointing=-1),
            "checkpointing is -1: expected a whole number from 0 up, 0 for none",
        ),
        (
            lambda s: estimate.inference(s, quantised="int3"),
            "quantised is 'int3': expected None or one of int8",
        ),
        (lambda s: Setup(gpus=0), "gpus is 0: expected a whole number from 1 up"),
        (lambda s: estimate.training(s, gpus=2.0), "gpus is 2.0: expected a whole number from 1"),
        (lambda s: Setup(sharding="ZeRO 4"), "sharding is 'ZeRO 4': expected one of none, ZeRO 1"),
        (lambda s: Setup(amp="fp32"), "amp is 'fp32': expected None or one of bf16, fp16"),
        (lambda s: Setup(states="int8"), "dtype is 'int8': expected one that is computed in"),
        (lambda s: Setup(rank=-1), "rank is -1: expected a whole number from 0 up"),
        (lambda s: Setup(load="disk"), "load is 'disk': expected one of to, device_map"),
        (lambda s: estimate.activations(s, 1, 1, rank=-1), "rank is -1: expected a whole number"),
        (lambda s: estimate.layer_activations(s, 1, 1, rank=math.nan), "rank is nan: expected"),
        (
            lambda s: estimate.layer_activations(s, 1, 1, autocast=-1),
            "autocast is -1: expected True or False",
        ),
        (lambda s: estimate.activations(s, 1, 1, dropout=""), "dropout is '': expected True or"),
        (lambda s: estimate.block(-1), "nbytes is -1: expected a whole number from 0 up"),
        (lambda s: estimate.block(1.5), "nbytes is 1.5: expected a whole number from 0 up"),
        (lambda s: estimate.block(math.nan), "nbytes is nan: expected a whole number"),
        (lambda s: estimate.shard(-1, 2), "nbytes is -1: expected a whole number from 0 up"),
        (lambda s: estimate.shard(1.5, 2), "nbytes is 1.5: expected a whole number from 0 up"),
        (lambda s: Setup(gradients=""), "dtype is '': expected one of fp64"),
        (lambda s: Setup(gradients=[]), r"dtype is \[\]: expected one of fp64"),
        (lambda s: Setup(cache_dtype=""), "dtype is '': expected one of fp64"),
        (lambda s: Setup(master_weights="no"), "master_weights is 'no': expected True or False"),
        (lambda s: Setup(dropout="yes"), "dropout is 'yes': expected True or False"),
        (
            lambda s: estimate.memory(estimate.dimensions("gpt2"), Setup(length=100_000)),
            "length is 100000: expected at most the 1024 positions that the model has learned",
        ),
        (lambda s: estimate.memory(s, Setup(rank=100_000)), "rank is 100000: expected at most"),
        (
            lambda s: estimate.memory(s, Setup(attention="flash")),
            "attention is 'flash': expected another one, for flash is for fp16 and bf16, not fp32",
        ),
        (lambda s: Setup(checkpointing=2), "checkpointing is 2: expected True or False"),
        (lambda s: Setup(optimizer=[]), r"optimizer is \[\]: expected one of sgd"),
        (lambda s: estimate.dimensions("gpt5"), "model is 'gpt5': expected one of gpt2, gpt2-m"),
    ],
)
def test_impossible_questions_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(SMALL["llama"])
