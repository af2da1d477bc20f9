"""bitsandbytes' layers on a virtual card: what they leave there, and what their products borrow."""

import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import LinearNF4
from bitsandbytes.nn.modules import Linear8bitLt

import every_byte
from every_byte.gpu import VirtualGPU
from every_byte.tracker import scales
from every_byte.virtual.values import UnknownValueError


def card() -> VirtualGPU:
    return VirtualGPU("H200", torch="2.11")


def blocks(*sizes: int) -> int:
    return sum(-(-size // 512) * 512 for size in sizes)


def test_four_bits_on_a_card_are_its_weight_and_its_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})  # as in a new process
    layer = LinearNF4(256, 512)
    weight = layer.weight
    with card() as gpu:
        layer.to(gpu.device)
        assert layer.weight is weight  # an optimizer made before would hold it
        assert weight.shape == (256 * 512 // 2, 1) and weight.is_meta
        held = blocks(
            256 * 512 // 2,
            256 * 512 // 64,  # the scales, in 8 bits
            256 * 512 // 64 // 256 * 4,  # theirs
            *(4, 16 * 4, 256 * 4),  # their mean, the levels of 4 bits and of 8
            256 * 4,  # a copy of these for all layers
            512 * 4,  # the bias
        )
        assert gpu.memory_allocated() == held
        x = torch.empty(2048, 256, device=gpu.device, requires_grad=True)
        before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        result = layer(x)
        workspaces = gpu.breakdown()["workspaces"]
        borrowed = blocks(2 * 256 * 512 // 64 * 4, 256 * 512 * 4)
        assert gpu.memory_allocated() == before + result.nbytes + workspaces
        assert gpu.max_memory_allocated() == gpu.memory_allocated() + borrowed
        result.sum().backward()
        assert x.grad is not None


def test_eight_bits_on_a_card_are_its_weight_and_a_scale_for_each_row() -> None:
    layer = Linear8bitLt(256, 512, bias=False, has_fp16_weights=False)
    with card() as gpu:
        layer.to(gpu.device)
        assert layer.weight.dtype is torch.int8
        assert gpu.memory_allocated() == blocks(256 * 512, 512 * 4)
        layer(torch.empty(8, 256, device=gpu.device, dtype=torch.float16))


@pytest.mark.parametrize("kind", [LinearNF4, Linear8bitLt])
def test_a_script_takes_what_a_virtual_gpu_takes(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    options = {"has_fp16_weights": False} if kind is Linear8bitLt else {}
    for front in (card(), every_byte.as_cuda("H200", torch_version="2.11")):
        monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})  # as in a new process
        with front as gpu:
            layer = kind(256, 512, **options).to(gpu.device)
            taken.append((gpu.memory_allocated(), gpu.max_memory_allocated()))
            layer(torch.zeros(4, 256, dtype=torch.float16, device=gpu.device))
            taken[-1] += (gpu.max_memory_allocated(),)
    assert taken[0] == taken[1] and taken[0][0] > 256 * 512 // 2


def test_whether_there_are_outliers_is_an_assumption() -> None:
    layer = Linear8bitLt(256, 512, bias=False, has_fp16_weights=False, threshold=6.0)
    with card() as gpu:
        layer.to(gpu.device)
        x = torch.empty(8, 2048, device=gpu.device, dtype=torch.float16)[:, :256]
        with pytest.raises(UnknownValueError, match=r"item\(\) at test_quantised"):
            layer(x)
    with VirtualGPU("H200", torch="2.11", values="assume") as gpu:
        layer = Linear8bitLt(256, 512, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.to(gpu.device)
        x = torch.empty(8, 2048, device=gpu.device, dtype=torch.float16)[:, :256]
        before = gpu.memory_allocated()
        assert layer(x).shape == (8, 512)
        assert gpu.memory_allocated() == before
        assert [a.operation for a in gpu.memory.values.assumptions] == ["item()"]


@pytest.mark.parametrize(("bits", "numbers"), [(8, 1), (4, 2)])
def test_transformers_quantises_on_the_card(bits: int, numbers: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1000}
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=8, **sizes)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with every_byte.as_cuda("H200") as gpu:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            device_map="auto",
            quantization_config=transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        )
        layers = [m.weight for m in model.modules() if "bitsandbytes" in type(m).__module__]
        assert len(layers) == 7
        assert sum(w.nbytes for w in layers) == (4 * 512**2 + 3 * 512 * 1024) // numbers
        held = [*model.parameters(), *model.buffers(), *scales(model)]
        assert gpu.memory_allocated() == blocks(*(tensor.nbytes for tensor in held))
        ids = torch.randint(0, 1000, (2, 64), device="cuda")
        model(input_ids=ids, labels=ids).loss.backward()


def test_tables_of_levels_end_with_the_card() -> None:
    with card() as gpu:
        LinearNF4(64, 64).to(gpu.device)
        one = gpu.memory_allocated()
    with card() as gpu:
        LinearNF4(64, 64).to(gpu.device)
        assert gpu.memory_allocated() == one
    tables = sys.modules["bitsandbytes.functional"].name2qmap
    assert not any(table.is_meta for table in tables.values())
