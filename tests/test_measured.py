"""What an H200 measured, replayed: single operations by signature, and whole runs."""

import json

import pytest

from benchmarks import published, signatures, workloads
from benchmarks.proof import CARD, DATA, SHOWN, TORCH, Goal, equal, measured_workloads, whole
from every_byte.gpu import VirtualGPU

# A few of every rule: the n-th signature of each operation.
OPERATIONS = (
    *("aten.sum.dim_IntList", "aten.mean.dim", "aten.sum.default", "aten.amax.default"),
    *("aten.linalg_vector_norm.default", "aten.var.correction", "aten.std.correction"),
    *("aten._softmax_backward_data.default", "aten._fused_rms_norm.default"),
    *("aten.native_layer_norm_backward.default", "aten.embedding_dense_backward.default"),
    *("aten._scaled_dot_product_cudnn_attention.default",),
    *("aten._scaled_dot_product_cudnn_attention_backward.default",),
    *("aten._scaled_dot_product_efficient_attention.default",),
    *("aten._scaled_dot_product_efficient_attention_backward.default",),
    *("aten._scaled_dot_product_flash_attention.default",),
    *("aten._scaled_dot_product_flash_attention_backward.default",),
    *("aten.sort.default", "aten.cumsum.default", "aten._foreach_norm.Scalar"),
    *("aten._safe_softmax.default", "aten.nll_loss_forward.default", "aten.mm.default"),
    *("bitsandbytes.gemm_4bit.default", "bitsandbytes.int8_scaled_mm.default"),
    *("bitsandbytes.int8_vectorwise_quant.default", "bitsandbytes.quantize_blockwise.default"),
)


@pytest.fixture(scope="module")
def measured() -> dict[str, list[signatures.Measured]]:
    found: dict[str, list[signatures.Measured]] = {}
    for one in signatures.measured(DATA / "kernels.json.xz"):
        if one.group.startswith("single"):
            found.setdefault(one.operation, []).append(one)
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_takes_what_it_took_on_the_card(
    measured: dict[str, list[signatures.Measured]], operation: str
) -> None:
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        for one in measured[operation][:: max(1, len(measured[operation]) // 12)]:
            events = signatures.replayed(gpu, one.signature)
            assert equal(one, events), (one.signature, events, one.variants)


RUNS = (
    *("llama1b-bf16-adamw-fused", "llama1b-fp32", "llama1b-bf16-ckpt"),
    *("gpt2-bf16-dropout", "phi3-2l", "embedding-layernorm"),
)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_shows_what_it_showed_on_the_card(name: str) -> None:
    """Allocated, reserved and their peaks, at every checkpoint, to the byte."""
    told = measured_workloads()[name]
    assert workloads.replayed(name, CARD, TORCH, told["left over"]) == told["checkpoints"]


SERIES = published.all_series()


@pytest.mark.parametrize("number", range(len(SERIES)), ids=lambda n: SERIES[n]["replay"])
def test_a_published_peak_is_what_the_book_shows_beside_it(number: int) -> None:
    """The first size of each program; `make proof` has the others."""
    one = SERIES[number]
    shown = json.loads(SHOWN.read_text("utf-8"))["series"][number]
    assert len(shown) == len(one["sizes"]) == len(one["printed"])
    assert published.peak(one, one["sizes"][0]) == shown[0], "python -m benchmarks.proof --write"
    assert abs(shown[0] / 2**20 / one["printed"][0] - 1) < 0.0015


def test_a_gate_holds_what_was_reached_and_shows_a_missed_goal() -> None:
    better, same, worse = (Goal("", n, 10, 8, True, whole) for n in (10, 8, 7))
    assert (better.met, better.holds) == (True, True)
    assert (same.met, same.holds) == (False, True)
    assert (worse.met, worse.holds) == (False, False)
    assert not Goal("", 9, 0, 8, False, whole).holds


def test_a_card_says_by_what_its_figures_are() -> None:
    assert "measured with torch 2.11" in str(VirtualGPU("H200"))
    assert "by PyTorch's source, not measured" in str(VirtualGPU("RTX 4090"))
    assert str(VirtualGPU()) == "Virtual GPU: no CUDA device in use, figures are replayed"


@pytest.mark.parametrize("version", ["2", "new", "1.13", "3.0"])
def test_a_version_that_is_not_covered_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"torch is '{version}': expected a version"):
        VirtualGPU("H200", torch=version)


def test_a_version_without_a_card_is_refused() -> None:
    with pytest.raises(ValueError, match="no card whose rules it could change"):
        VirtualGPU(torch="2.11")


@pytest.mark.parametrize(
    ("card", "version", "workspaces"),
    [
        ("H200", "2.8", 33_554_432),
        ("H200", "2.11", 33_554_432 + 1_048_576),
        ("H200", "2.14", 33_554_432),
        ("RTX 4090", "2.11", 8_519_680 + 1_048_576),
        ("RTX 4090", "2.14", 8_519_680),
    ],
)
def test_workspaces_are_the_cards_and_the_versions(
    card: str, version: str, workspaces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with VirtualGPU(card, torch=version) as gpu:
        layer = torch.nn.Linear(64, 64, device=gpu.device)
        layer(torch.empty(8, 64, device=gpu.device))
        assert gpu.breakdown()["workspaces"] == workspaces
