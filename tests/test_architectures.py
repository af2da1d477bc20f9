"""The table of architectures is true: a sample of it is run again, and a wrong sum is found."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import every_byte
from benchmarks import architectures

TOLD = json.loads(architectures.RESULTS.read_text("utf-8"))
ROWS = {(row["group"], row["name"]): row for row in TOLD["cases"]}
CASES = {(case.group, case.name): case for case in architectures.cases()}

SAMPLE = (
    ("transformers, text", "gpt2"),
    ("transformers, experts", "olmoe"),
    ("torchvision, classification", "mobilenet_v2"),
    ("timm, classification", "mixer_b16_224"),
    ("libraries", "peft: LoRA"),
    ("libraries", "torch: checkpoint"),
)


@pytest.mark.parametrize("place", SAMPLE, ids=lambda place: place[1])
def test_a_row_comes_out_again(place: tuple[str, str]) -> None:
    pytest.importorskip(CASES[place].needs, reason="not among the libraries that are locked")
    found, told = architectures.result(CASES[place]), ROWS[place]
    assert {name: found[name] for name in told} == told


def test_the_table_is_of_these_cases_and_nothing_is_wrong() -> None:
    assert list(ROWS) == [place for place in CASES if place in ROWS]
    assert len(ROWS) >= 0.9 * len(CASES)
    results = [row["result"] for row in ROWS.values()]
    assert "wrong" not in results
    transformers = [p for p in ROWS if p[0].startswith("transformers")]
    torchvision = [p for p in ROWS if p[0].startswith("torchvision")]
    assert (len(transformers) >= 60, len(torchvision) >= 25) == (True, True)


def workload(gpu: every_byte.VirtualGPU) -> architectures.Workload:
    model = nn.Linear(100, 100).cuda()
    x = torch.randn(8, 100, device="cuda")
    return architectures.Workload(model, lambda: model(x).relu().sum())


def test_bytes_that_no_tensor_holds_are_wrong() -> None:
    options: dict[str, Any] = {"alloc_conf": "expandable_segments:True", "context": 0}
    with every_byte.as_cuda(architectures.CARD, **options) as gpu:
        assert architectures.trained(gpu, workload(gpu)).at_rest == 4 * (40_448 + 512)
        gpu.memory.malloc(512)
        with pytest.raises(architectures.Wrong, match="after forward"):
            architectures.trained(gpu, workload(gpu))


def test_experts_are_chosen_evenly_and_the_worst_is_told() -> None:
    with every_byte.as_cuda("RTX 4090") as gpu:
        chosen = (
            torch.randn(64, 2048, device="cuda")
            .matmul(torch.randn(2048, 32, device="cuda"))
            .topk(2)[1]
        )
        assert chosen.flatten().bincount().tolist() == [4] * 32
        assert (chosen == 3).nonzero().shape == (4, 2)
    told = [str(assumption) for assumption in gpu.memory.values.assumptions]
    assert any("an even choice gives, 4 rows; at worst it is 128" in each for each in told)


@pytest.mark.parametrize("card, products", [("H200", False), ("RTX 4090", True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_products_of_every_dtype(card: str, products: bool, dtype: torch.dtype) -> None:
    """By cuBLAS, with its workspace, where CUDA has no kernel of its own for it."""
    with every_byte.as_cuda(card, context=0) as gpu:
        rows = torch.randn(64, 12, device="cuda", dtype=dtype, requires_grad=True)
        experts = torch.randn(4, 12, 6, device="cuda", dtype=dtype, requires_grad=True)
        ends = torch.arange(16, 65, 16, device="cuda", dtype=torch.int32)
        before = gpu.memory_allocated()
        y = nn.functional.grouped_mm(rows, experts, offs=ends)
        taken = gpu.memory_allocated() - before
        padded = 16 // y.element_size() * y.element_size()  # of 6 numbers each
        result = 64 * -(-6 * y.element_size() // 16) * 16
        assert padded == 16
        assert y.stride(0) * y.element_size() * 64 == result
        has_workspace = products or dtype is torch.float32
        assert taken - result == (gpu.memory.default_workspace if has_workspace else 0)
        y.sum().backward()
        assert (rows.grad is not None, experts.grad is not None) == (True, True)


def test_ctc_loss_with_lengths_that_are_tensors() -> None:
    with every_byte.as_cuda("RTX 4090", context=0) as gpu:
        x = torch.randn(50, 4, 32, device="cuda", requires_grad=True)
        lengths = torch.full((4,), 50, device="cuda"), torch.full((4,), 10, device="cuda")
        log_probs = x.log_softmax(2)
        before = gpu.memory_allocated()
        loss = nn.functional.ctc_loss(log_probs, torch.ones(4, 10, device="cuda").long(), *lengths)
        loss.backward()
        assert x.grad is not None
        assert gpu.memory_allocated() - before >= x.nbytes
