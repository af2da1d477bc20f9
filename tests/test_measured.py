"""What an H200 measured, replayed: single operations by signature, and whole runs."""

import json
import re

import pytest

from benchmarks import printed, published
from benchmarks.proof import CARD, DATA, ROOT, SHOWN, TORCH, Goal, equal, whole
from every_byte.data import cards
from every_byte.gpu import VirtualGPU
from helpers import signatures, workloads
from helpers.measured import NOT_KNOWN, cause_of, of_workloads

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
    *("aten.sort.default", "aten.topk.default", "aten.median.default", "aten.histc.default"),
    *("aten.cumsum.default", "aten._foreach_norm.Scalar"),
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


WITHIN_RUNS = (
    *("aten._scaled_dot_product_efficient_attention_backward.default",),
    *("aten.native_layer_norm_backward.default", "aten.embedding.default"),
    *("aten.embedding_dense_backward.default", "aten.nll_loss_forward.default"),
    *("aten.nll_loss_backward.default",),
)


@pytest.mark.parametrize("operation", WITHIN_RUNS)
def test_an_operation_within_a_run_takes_what_it_took_on_the_card(operation: str) -> None:
    """There tensors are views of others: these operations copy what is not contiguous."""
    found = 0
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        for one in signatures.measured(DATA / "kernels.json.xz"):
            if one.operation == operation and "~" in one.signature:
                events = signatures.replayed(gpu, one.signature)
                assert equal(one, events), (one.signature, events, one.variants)
                found += 1
    assert found


def test_a_single_query_borrows_by_splits_of_its_keys() -> None:
    """cuDNN's attention while Llama and GPT-2 generate, on an H200: equal at every length."""
    found = 0
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        for one in signatures.measured(DATA / "kernels.json.xz"):
            if (
                "infer" in one.group
                and one.operation == "aten.scaled_dot_product_attention.default"
            ):
                if "f16[" in one.signature:  # BF16, too
                    events = signatures.replayed(gpu, one.signature)
                    assert equal(one, events), (one.signature, events, one.variants)
                    found += 1
    assert found > 50


def test_group_norm_borrows_factors_for_channels_and_groups() -> None:
    """By PyTorch's source; published peaks of a B200 agree (book/records/liger.toml)."""
    import torch

    with VirtualGPU("B200", torch=TORCH) as gpu:
        layer = torch.nn.GroupNorm(8, 32, device=gpu.device)
        x = torch.empty(16, 32, 64, device=gpu.device, requires_grad=True)
        of_channels, of_groups = 16 * 32 * 4, 16 * 8 * 4
        gpu.reset_peak_memory_stats()
        before = gpu.memory_allocated()
        y = layer(x)
        assert gpu.memory_allocated() - before == y.nbytes + 2 * of_groups
        assert gpu.max_memory_allocated() - gpu.memory_allocated() == 2 * of_channels
        upper = torch.empty_like(y)
        gpu.reset_peak_memory_stats()
        before = gpu.memory_allocated()
        y.backward(upper)
        grads = x.nbytes + 2 * 512  # a block for each vector of 128 B
        assert gpu.max_memory_allocated() - before == grads + 3 * of_channels + 2 * of_groups


def test_softmax_in_backward_peaks_as_published() -> None:
    """pytorch#72450: bytes allocated of a softmax in BF16, and its peak."""
    import torch

    with VirtualGPU("A100 80 GB") as gpu:
        x = torch.rand(5120, 2, 384, 384, dtype=torch.bfloat16, device=gpu.device)
        x.requires_grad_()
        assert gpu.memory_allocated() == 3_019_898_880
        loss = torch.softmax(x, dim=-1).mean()
        assert gpu.memory_allocated() == 6_039_798_272
        loss.backward()
        assert gpu.max_memory_allocated() == 15_099_495_424


def test_a_product_copies_a_batch_whose_rows_overlap() -> None:
    """pytorch#52111: it tries to allocate 37.25 GiB."""
    import torch

    batch, rows, columns = 1000, 100, 100_000
    with VirtualGPU("H200", capacity=16 << 30) as gpu:
        numbers = torch.empty(batch + rows + columns, device=gpu.device)
        left = numbers.as_strided([batch, rows, columns], [1, 1, 1])
        right = numbers.as_strided([batch, columns, 1], [1, 1, 1])
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 37\.25 GiB"):
            torch.bmm(left, right)


RUNS = (
    *("llama1b-bf16-adamw-fused", "llama1b-fp32", "llama1b-bf16-ckpt"),
    *("gpt2-bf16-dropout", "phi3-2l", "embedding-layernorm", "lstm"),
)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_shows_what_it_showed_on_the_card(name: str) -> None:
    """Allocated, reserved and their peaks, at every checkpoint, to the byte."""
    told = of_workloads()[name]
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


def test_programs_print_what_the_book_shows_beside_what_they_printed() -> None:
    """Those that run out of memory on a B200; `make proof` has the others, which take minutes."""
    shown = json.loads(SHOWN.read_text("utf-8"))["printed"]
    rows = printed.all_rows()
    assert [len(row["printed"]) for row in rows] == list(map(len, shown))
    short = [n for n, row in enumerate(rows) if row["replay"] == "out_of_memory"]
    assert len(short) == 2
    for number in short:
        assert printed.said(rows[number]) == shown[number] == rows[number]["printed"]


def test_every_operation_that_differs_has_its_cause() -> None:
    others = json.loads(SHOWN.read_text("utf-8"))["others"]
    assert others and all(cause_of(one) != NOT_KNOWN for one in others)
    assert cause_of("aten.sum.default(f32[8])") == NOT_KNOWN


def test_a_gate_holds_what_was_reached_and_shows_a_missed_goal() -> None:
    better, same, worse = (Goal("", n, 10, 8, True, whole) for n in (10, 8, 7))
    assert (better.met, better.holds) == (True, True)
    assert (same.met, same.holds) == (False, True)
    assert (worse.met, worse.holds) == (False, False)
    assert not Goal("", 9, 0, 8, False, whole).holds


NETWORKS = ("unet-small", "tv-resnet18-fp32", "tv-vgg16-fp32")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_convolutional_network_peaks_as_on_the_card(name: str) -> None:
    """cuDNN's workspaces are estimated: at most 1 % high, never 0.5 % low."""
    told = of_workloads()[name]
    found = workloads.replayed(name, CARD, TORCH, told["left over"])
    for checkpoint, (_, _, peak, _) in told["checkpoints"].items():
        if "step" not in checkpoint and "zeroed" not in checkpoint:
            assert -0.005 < found[checkpoint][2] / peak - 1 < 0.01, checkpoint


def test_a_gpu_says_what_is_estimated() -> None:
    import torch

    with VirtualGPU(CARD, torch=TORCH) as gpu:
        torch.empty(2, 3, device=gpu.device).sum()
        assert gpu.estimates == ()
        layer = torch.nn.Conv2d(8, 8, 3, device=gpu.device)
        layer(torch.empty(2, 8, 16, 16, device=gpu.device))
        torch.nn.GRU(8, 8, device=gpu.device)(torch.empty(4, 2, 8, device=gpu.device))
        convolution, recurrent = gpu.estimates
        assert "convolutions" in convolution and "recurrent" in recurrent


@pytest.mark.parametrize(
    ("layer", "kept"), [(0, 736_000_000), (1, 864_000_000)], ids=["LSTM", "GRU"]
)
def test_a_reserve_is_what_a_P100_kept(layer: int, kept: int) -> None:
    """pytorch#2895: four layers of 320, 25,000 steps of all sequences."""
    import torch

    with VirtualGPU() as gpu:
        model = (torch.nn.LSTM, torch.nn.GRU)[layer](123, 320, 4, device=gpu.device)
        steps = torch.empty(200, 125, 123, device=gpu.device)
        before = gpu.memory_allocated()
        output, hidden = model(steps)
        results = [output, *(hidden if layer == 0 else [hidden])]
        zeros = (1 + (layer == 0)) * 4 * 125 * 320 * 4  # the states it begins with
        found = gpu.memory_allocated() - before - sum(t.nbytes for t in results) - zeros
        assert found == pytest.approx(kept, abs=1 << 20)  # to the allocator's rounding


def test_half_precision_convolutions_copy_to_nhwc_and_back() -> None:
    """pytorch#123533: GiB allocated and reserved at nine widths."""
    import torch

    reserved = (4.02, 5.52, 6.15, 6.77, 7.40, 8.02, 8.65, 9.27, 9.90)
    with VirtualGPU("A100 80 GB") as gpu:
        layer = torch.nn.Conv2d(256, 256, 3, padding=1).half().to(gpu.device)
        for width, told in zip(range(1024, 2049, 128), reserved, strict=True):
            image = torch.zeros(1, 256, 2048, width, dtype=torch.half, device=gpu.device)
            layer(image)
            assert gpu.memory_reserved() / 2**30 == pytest.approx(told, abs=0.006), width
            gpu.empty_cache()


def test_a_card_says_by_what_its_figures_are() -> None:
    assert "measured with torch 2.11" in str(VirtualGPU("H200"))
    assert "by PyTorch's source, not measured" in str(VirtualGPU("RTX 4090"))
    assert str(VirtualGPU()) == "Virtual GPU: no CUDA device in use, figures are replayed"


@pytest.mark.parametrize("version", ["2", "new", "1.13", "3.0"])
def test_a_version_that_is_not_covered_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"torch is '{version}': expected a version"):
        VirtualGPU("H200", torch=version)


def test_the_second_articles_card_and_version() -> None:
    """Chapter 12's; what 2.1 does otherwise is said."""
    gpu = VirtualGPU("RTX 4050", torch="2.1")
    assert gpu.capacity == cards()["RTX 4050 Laptop"].usable
    assert str(gpu).startswith("RTX 4050 Laptop, 5.81 GiB: ")  # usable of 6
    assert str(gpu).endswith("; attention and norms as in torch 2.4")
    assert "attention" not in str(VirtualGPU("RTX 4050", torch="2.4"))


def test_the_audits_verdicts_do_not_ask_which_card_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chapter 12 opens virtual cards, and they are the same where a CUDA device is said to be."""
    import torch

    source = (ROOT / "notebooks" / "12_audit.py").read_text("utf-8")
    assert not re.findall(r"open_gpu|CudaGPU|torch\.cuda\.(?!amp)", source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with VirtualGPU() as gpu:
        layer = torch.nn.Linear(64, 64, device=gpu.device)
        layer(torch.empty(8, 64, device=gpu.device))
        assert gpu.breakdown()["workspaces"] == 8_519_680


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


def test_batch_norm_of_channels_last_stages_its_sums() -> None:
    """Equal to what was measured of ResNet-50 in BF16."""
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        found = 0
        for one in signatures.measured(DATA / "kernels.json.xz"):
            if one.operation.startswith("aten.native_batch_norm"):
                assert signatures.replayed(gpu, one.signature) in one.variants, one.signature
                found += 1
        assert found > 10


def test_convolutions_refuse_what_PyTorch_refuses() -> None:
    import torch

    with VirtualGPU(CARD, torch=TORCH) as gpu:
        layer = torch.nn.Conv2d(8, 16, 3, device=gpu.device)
        with pytest.raises(RuntimeError, match="to have 8 channels, but got 4"):
            layer(torch.empty(2, 4, 16, 16, device=gpu.device))
        with pytest.raises(RuntimeError, match="should be the same"):
            layer(torch.empty(2, 8, 16, 16, device=gpu.device, dtype=torch.half))


def test_recurrent_layers_follow_autocast() -> None:
    import torch

    with VirtualGPU(CARD, torch=TORCH) as gpu:
        layer = torch.nn.LSTM(8, 8, device=gpu.device)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output, _ = layer(torch.empty(4, 2, 8, device=gpu.device))
        assert output.dtype is torch.bfloat16
        output.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters())
