"""The virtual GPU beside published measurements, and the rules it accounts by."""

import gc
import importlib
import inspect
import os
import pickle
import pickletools
import runpy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import nn, optim
from torch.cuda import _memory_viz

from every_byte.allocator import CachingAllocator
from every_byte.cuda import CudaMemory
from every_byte.gpu import GPU, CudaGPU, VirtualGPU, open_gpu
from every_byte.tracker import KINDS, untracked
from every_byte.units import GiB, MiB
from every_byte.virtual.memory import CUBLAS_WORKSPACE, cublas_workspace_size
from helpers.mlp import SimpleMLP

ROOT = Path(__file__).parent.parent


# The article's experiment: figures printed there, completed to the byte (README, notebook 04).

MODEL, BATCH, WORKSPACE = 204_032_512, 402_432, 8_519_680
OPTIMIZERS: dict[str, tuple[Callable[..., optim.Optimizer], int, int]] = {
    # after one step, its peak; no published peak for SGD, whose gradients arrive in backward
    "SGD": (lambda p: optim.SGD(p, lr=0.001), 425_512_448, 0),
    "momentum": (lambda p: optim.SGD(p, lr=0.001, momentum=0.9), 629_544_960, 0),
    "Adam": (lambda p: optim.Adam(p, lr=0.001), 833_577_472, 833_577_472 + MODEL),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_articles_experiment(gpu: VirtualGPU, name: str) -> None:
    make_optimizer, after_step, peak = OPTIMIZERS[name]
    with gpu.device:
        model = SimpleMLP()
    assert gpu.memory_allocated() == MODEL

    images, labels = torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))
    data, target = images.to(gpu.device), labels.to(gpu.device)
    assert gpu.memory_allocated() == MODEL + BATCH

    optimizer = make_optimizer(model.parameters())
    optimizer.zero_grad()
    output = model(data)
    loss = nn.CrossEntropyLoss()(output, target)
    loss.backward()
    optimizer.step()
    assert gpu.memory_allocated() == after_step
    rows = gpu.breakdown(model, optimizer)
    assert tuple(rows) == KINDS
    assert rows.total == after_step
    states = round((after_step - 425_512_448) / MODEL)
    assert rows["parameters"] == rows["gradients"] == 51_008_010 * 4
    assert rows["optimizer states"] == states * 51_008_010 * 4
    assert rows["batch"] == BATCH
    assert rows["workspaces"] == 2 * WORKSPACE
    assert rows["activations"] == 128 * 10 * 4 + 4  # the output and the loss
    assert rows["rounding"] == (2 + states) * 472 + 508
    assert rows["buffers"] == rows["temporaries"] == 0
    if peak:
        assert gpu.max_memory_allocated() == peak

    del optimizer, target
    model.zero_grad()
    with torch.no_grad():
        data = images.to(gpu.device)
        output = model(data)
    assert gpu.memory_allocated() == 221_478_400 + 512
    del loss
    assert gpu.memory_allocated() == 221_478_400

    del model, data, output
    gpu.clear_cublas_workspaces()
    assert gpu.memory_allocated() == 0
    gpu.empty_cache()
    assert gpu.memory_reserved() == 0


def test_the_readme_shows_these_figures() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for _, after_step, _ in OPTIMIZERS.values():
        assert f"{after_step:,}" in readme


def test_loading_by_to_and_by_device_gives_the_same_bytes() -> None:
    figures = []
    for load in (lambda gpu: nn.Linear(3000, 1000).to(gpu.device), None):
        with VirtualGPU() as gpu:
            if load:
                model = load(gpu)
            else:
                with gpu.device:
                    model = nn.Linear(3000, 1000)
            figures.append((gpu.memory_allocated(), gpu.memory_reserved(), gpu.breakdown(model)))
    assert figures[0] == figures[1]


# What counts, and when


def test_views_and_in_place_operations_count_once(gpu: VirtualGPU) -> None:
    x = torch.empty(1000, 1000, device=gpu.device)
    before = gpu.memory_allocated()
    kept = [x.view(-1), x[10:20], x.t(), x.detach(), x.expand(5, 1000, 1000)]
    x.add_(1).mul_(2)
    x[3] = 0
    assert gpu.memory_allocated() == before
    del x
    assert gpu.memory_allocated() == before  # the views hold the storage
    del kept
    assert gpu.memory_allocated() == 0


def test_an_output_given_by_hand_counts_once(gpu: VirtualGPU) -> None:
    a = torch.empty(512, 512, device=gpu.device)
    out = torch.empty(512, 512, device=gpu.device)
    before = gpu.memory_allocated()
    torch.add(a, a, out=out)
    assert gpu.memory_allocated() == before


def test_a_resized_storage_counts_at_its_new_size(gpu: VirtualGPU) -> None:
    x = torch.empty(128, device=gpu.device)
    x.resize_(1024)
    assert gpu.memory_allocated() == 4096
    del x
    assert gpu.memory_allocated() == 0


def test_tensors_of_the_host_do_not_count(gpu: VirtualGPU) -> None:
    here = torch.zeros(10**6)
    assert gpu.memory_allocated() == 0
    there = here.to(gpu.device)
    assert gpu.breakdown()["batch"] == 4 * 10**6 == there.nbytes


def test_adams_step_counter_is_the_hosts(gpu: VirtualGPU) -> None:
    weight = nn.Parameter(torch.empty(128, device=gpu.device))
    weight.grad = torch.empty_like(weight)
    optimizer = optim.Adam([weight])
    optimizer.step()
    assert optimizer.state[weight]["step"].device.type == "cpu"
    assert gpu.memory_allocated() == 4 * 512


def test_autograd_holds_activations_until_backward(gpu: VirtualGPU) -> None:
    with gpu.device:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(4)))
        x = torch.empty(256, 256)
    loss = model(x).sum()
    held = gpu.breakdown(model)["activations"]
    # x, four outputs of ReLU (which needs its output, not its input), the loss
    assert held == 5 * 256 * 256 * 4 + 4
    loss.backward()
    assert gpu.breakdown(model)["activations"] == 256 * 256 * 4 + 4


def test_without_gradients_activations_go_at_once(gpu: VirtualGPU) -> None:
    peaks = []
    for mode in (torch.no_grad, torch.inference_mode):
        gpu.clear_cublas_workspaces()
        gpu.reset_peak_memory_stats()
        with gpu.device, mode():
            model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
            x = torch.empty(256, 256)
            y = model(x)
        peaks.append((gpu.memory_allocated(), gpu.max_memory_allocated()))
        del model, x, y
    assert peaks[0] == peaks[1]
    assert peaks[0][0] == 4 * (2 * (256 * 256 + 256) + 2 * 256 * 256) + WORKSPACE


def test_a_sparse_tensor_is_refused_rather_than_miscounted(gpu: VirtualGPU) -> None:
    with gpu.device:
        embedding = nn.Embedding(1000, 64, sparse=True)
        tokens = torch.empty(10, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="only dense tensors are accounted"):
        embedding(tokens).sum().backward()


def test_buffers_are_the_models(gpu: VirtualGPU) -> None:
    with gpu.device:
        model = nn.BatchNorm1d(1000)
    rows = gpu.breakdown(model)
    assert rows["parameters"] == 8000
    assert rows["buffers"] == 8000 + 8  # mean, variance, and a 64-bit counter
    assert rows.total == gpu.memory_allocated()


def test_tied_parameters_count_once(gpu: VirtualGPU) -> None:
    with gpu.device:
        embedding, head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
    head.weight = embedding.weight
    assert gpu.breakdown(nn.ModuleList([embedding, head]))["parameters"] == 100 * 64 * 4
    assert gpu.memory_allocated() == 100 * 64 * 4


def test_moving_a_module_keeps_its_parameters_and_ties(gpu: VirtualGPU) -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100, bias=False))
    model[1].weight = model[0].weight
    weight = model[0].weight
    optimizer = optim.Adam(model.parameters())
    model.to(gpu.device)
    assert model[0].weight is model[1].weight is weight
    assert gpu.memory_allocated() == 100 * 64 * 4
    model(torch.zeros(3, dtype=torch.int64, device=gpu.device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert gpu.breakdown(model, optimizer)["optimizer states"] == 2 * 100 * 64 * 4
    model.half()
    assert gpu.breakdown(model)["parameters"] == 100 * 64 * 2


def test_converting_a_module_frees_each_tensor_as_soon_as_it_is_replaced(gpu: VirtualGPU) -> None:
    # On CUDA ``Module._apply`` sets ``param.data``: weight and its half, then the weight is gone.
    with gpu.device:
        model = nn.Linear(1024, 1024)
    weight, bias = 1024 * 1024 * 4, 1024 * 4
    with gpu.record(model) as recorded:
        model.half()
    assert [step.total for step in recorded.steps] == [
        weight + bias,
        weight + bias + weight // 2,
        bias + weight // 2,
        bias + weight // 2 + bias // 2,
        bias // 2 + weight // 2,
    ]
    assert gpu.max_memory_allocated() == weight + bias + weight // 2


def test_each_thread_takes_its_workspace_at_its_first_matrix_product(gpu: VirtualGPU) -> None:
    x = torch.empty(64, 64, device=gpu.device, requires_grad=True)
    y = x * 2
    assert gpu.breakdown()["workspaces"] == 0
    z = y @ y
    assert gpu.breakdown()["workspaces"] == WORKSPACE
    z = z @ y
    assert gpu.breakdown()["workspaces"] == WORKSPACE
    z.sum().backward()
    assert gpu.breakdown()["workspaces"] == 2 * WORKSPACE
    gpu.clear_cublas_workspaces()
    assert gpu.breakdown()["workspaces"] == 0


@pytest.mark.parametrize(("version", "taken"), [("2.11", 2**21 + 2**20), ("2.14", 2**21)])
def test_a_product_of_eight_bit_floats_takes_cublaslts_workspace(version: str, taken: int) -> None:
    """On an H200 with torch 2.11: 2,097,152 and 1,048,576 bytes, after another product."""
    with VirtualGPU("H200", torch=version) as gpu:
        x = torch.ones(1024, 1024, device=gpu.device, dtype=torch.bfloat16)
        _ = x @ x
        small, scale = x.to(torch.float8_e4m3fn), torch.ones((), device=gpu.device)
        before = gpu.memory_allocated()
        product = torch._scaled_mm(small, small.t(), scale, scale, out_dtype=torch.bfloat16)
        assert gpu.memory_allocated() - before == taken
        assert product.shape == x.shape
    with VirtualGPU("RTX 4090") as gpu:  # it may be the first
        small = torch.ones(64, 64, device=gpu.device, dtype=torch.bfloat16).to(small.dtype)
        scale = torch.ones((), device=gpu.device)
        product = torch._scaled_mm(small, small.t(), scale, scale, out_dtype=torch.bfloat16)
        assert gpu.breakdown()["workspaces"] >= 8_519_680


def test_each_thread_has_a_cublaslt_workspace_where_it_is_not_cublas_own() -> None:
    """Measured on an H100 with 2.11: a layer that is computed again in backward takes another."""
    from torch.utils.checkpoint import checkpoint

    with VirtualGPU("H100", torch="2.11") as gpu:
        with gpu.device:
            # Of the last layer nothing is computed again: its inputs are enough.
            layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            x = torch.zeros(4, 8, requires_grad=True)
        before = gpu.memory_allocated()
        loss = checkpoint(layers, x, use_reentrant=False).sum()
        assert gpu.memory_allocated() - before - 512 == 32 * MiB + 1 * MiB
        loss.backward()
        del loss
        gradients = 5 * 512
        assert gpu.memory_allocated() - before - gradients == 2 * (32 * MiB + 1 * MiB)
        gpu.clear_cublas_workspaces()
        assert gpu.memory_allocated() - before == gradients


def test_a_product_on_the_host_takes_no_workspace(gpu: VirtualGPU) -> None:
    torch.ones(4, 4) @ torch.ones(4, 4)
    assert gpu.memory_allocated() == 0


def test_the_workspaces_size_is_pytorchs_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with VirtualGPU() as gpu:
        x = torch.empty(64, 64, device=gpu.device)
        y = x @ x
        assert gpu.breakdown()["workspaces"] == 16 * 1024 * 8
        del y
    assert cublas_workspace_size(CUBLAS_WORKSPACE) == WORKSPACE
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG is 'large'"):
        cublas_workspace_size("large")


def test_optimizers_run_as_on_cuda(gpu: VirtualGPU) -> None:
    peaks = {}
    for foreach in (None, True, False):
        weights = [nn.Parameter(torch.empty(2**20, device=gpu.device)) for _ in range(8)]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer = optim.Adam(weights, foreach=foreach)
        gpu.reset_peak_memory_stats()
        optimizer.step()
        peaks[foreach] = gpu.max_memory_allocated() / (8 * weights[0].nbytes)
        del weights, weight, optimizer
        gpu.empty_cache()
    assert peaks[None] == peaks[True]  # foreach is CUDA's default
    assert peaks[True] == 5
    # One tensor in eight at a time: a square root, its quotient, and the quotient of
    # the tensor before, which the loop's variable still holds.
    assert peaks[False] == 4 + 3 / 8


# A card of a given size


def test_a_card_of_a_given_size_runs_out_of_memory() -> None:
    with VirtualGPU(capacity=1 * GiB, name="Small card") as gpu:
        assert str(gpu).startswith("Small card, 1024.00 MiB")
        kept = torch.empty(700 * MiB, dtype=torch.uint8, device=gpu.device)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 400\.00 MiB\. GPU 0"):
            torch.empty(400 * MiB, dtype=torch.uint8, device=gpu.device)
        assert gpu.memory_allocated() == 700 * MiB
        del kept
        torch.empty(1000 * MiB, dtype=torch.uint8, device=gpu.device)


def test_an_operation_that_fails_leaves_nothing_behind() -> None:
    with VirtualGPU(capacity=100 * MiB) as gpu:
        x = torch.empty(30 * MiB, dtype=torch.uint8, device=gpu.device)
        for _ in range(3):
            try:
                torch.cat([x, x, x])
            except torch.OutOfMemoryError:
                pass
        assert gpu.memory_allocated() == 30 * MiB
        del x
        assert gpu.memory_allocated() == 0


def test_an_error_that_is_kept_keeps_no_memory() -> None:
    with VirtualGPU(capacity=100 * MiB) as gpu:
        x = torch.empty(2, 30 * MiB, dtype=torch.uint8, device=gpu.device)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            x.max(dim=0)  # the values fit, their 64-bit indices do not
        assert gpu.memory_allocated() == x.nbytes
        assert "240.00 MiB" in str(caught.value)


def test_a_step_that_fails_does_not_colour_what_follows() -> None:
    with VirtualGPU(capacity=90 * MiB) as gpu:
        weight = nn.Parameter(torch.empty(5 * MiB, device=gpu.device))
        weight.grad = torch.empty_like(weight)
        with pytest.raises(torch.OutOfMemoryError):
            optim.Adam([weight]).step()
        rows = gpu.breakdown()
        kept = torch.empty(512, device=gpu.device)
        assert gpu.breakdown()["activations"] == rows["activations"] + kept.nbytes


# Opening and closing


def test_closed_it_sees_nothing_new_and_still_frees() -> None:
    gpu = VirtualGPU().open()
    seen = torch.empty(1000, device="meta")
    gpu.close()
    unseen = torch.empty(1000, device="meta")
    with pytest.warns(UserWarning, match=r"closed, .* leave out .* bytes of tensors on meta"):
        assert gpu.memory_allocated() == 4096
    del seen, unseen
    assert gpu.memory_allocated() == 0
    gpu.close()  # harmless


def test_the_gpu_opened_last_is_in_use() -> None:
    with VirtualGPU() as outer:
        with VirtualGPU() as inner:
            x = torch.empty(1000, device="meta")
            assert (outer.memory_allocated(), inner.memory_allocated()) == (0, 4096)
            with pytest.raises(RuntimeError, match="opened later: close it first"):
                outer.close()
        y = torch.empty(10, device="meta")
        assert (outer.memory_allocated(), inner.memory_allocated()) == (512, 4096)
        del x, y


def test_opening_twice_is_refused(gpu: VirtualGPU) -> None:
    with pytest.raises(RuntimeError, match="is open already"):
        gpu.open()


def test_a_gpu_is_closed_where_it_was_opened(gpu: VirtualGPU) -> None:
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(gpu.close)
        with pytest.raises(RuntimeError, match="was opened in another thread: close it there"):
            closing.result()
    kept = torch.empty(10, device=gpu.device)
    assert gpu.memory_allocated() == 512 > kept.nbytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"capacity": -1}, "capacity is -1 bytes"),
        ({"capacity": 1.5}, "capacity is 1.5: expected a whole number"),
        ({"capacity": float("nan")}, "capacity is nan"),
        ({"capacity": "24 GB"}, "capacity is '24 GB'"),
        ({"capacity": True}, "capacity is True"),
        ({"card": ["H200"]}, r"card is \['H200'\]: expected text"),
        ({"card": "H2000"}, "card is 'H2000': expected one of"),
        ({"name": 3}, "name is 3: expected text"),
        ({"alloc_conf": None}, "alloc_conf is None: expected text"),
        ({"context": -1}, "context is -1 bytes"),
    ],
)
def test_a_gpu_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        VirtualGPU(**wrong)


def test_a_breakdown_of_something_else_is_refused(gpu: VirtualGPU) -> None:
    with pytest.raises(TypeError, match=r"model is 'x': expected a torch\.nn\.Module"):
        gpu.breakdown("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer is 3: expected a torch\.optim\.Optimizer"):
        gpu.breakdown(None, 3)  # type: ignore[arg-type]


def test_open_gpu_returns_the_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = open_gpu()
    try:
        assert isinstance(gpu, VirtualGPU)
        assert open_gpu() is gpu
    finally:
        gpu.close()


def test_what_is_patched_is_restored() -> None:
    import torch.utils._foreach_utils as foreach

    patched: tuple[tuple[Any, str], ...] = (
        (foreach, "_get_foreach_kernels_supported_devices"),
        (nn.Module, "_apply"),
        (torch.UntypedStorage, "resize_"),
        (torch, "tensor"),
        (torch, "compile"),
        (torch, "is_autocast_enabled"),
        (torch.Tensor, "new_tensor"),
        (torch.Tensor, "_make_subclass"),
        (torch.autocast, "__init__"),
        (torch.amp.GradScaler, "__init__"),
        (threading.Thread, "start"),
        (SourceFileLoader, "exec_module"),
    )
    before = [getattr(*each) for each in patched]
    with VirtualGPU():
        assert "meta" in foreach._get_foreach_kernels_supported_devices()
        with VirtualGPU():
            assert all(getattr(*each) != old for each, old in zip(patched, before, strict=True))
    assert "meta" not in foreach._get_foreach_kernels_supported_devices()
    assert [getattr(*each) for each in patched] == before


def test_a_gpu_opened_among_what_is_untracked_sees_what_is_made() -> None:
    apply = nn.Module._apply
    gpu = VirtualGPU()
    with untracked():
        gpu.open()
        kept = torch.empty(1000, device=gpu.device)
        assert gpu.memory_allocated() == kept.nbytes + 96
        with untracked():
            torch.empty(1000, device=gpu.device)
            assert gpu.max_memory_allocated() == kept.nbytes + 96
    assert open_gpu() is gpu
    gpu.close()
    assert nn.Module._apply is apply


def test_a_gpu_that_was_never_open_has_no_answer() -> None:
    gpu = VirtualGPU("RTX 4090")
    model = nn.Linear(1000, 1000).to("meta")
    ask: tuple[Callable[[], object], ...] = (
        gpu.memory_allocated,
        gpu.memory_reserved,
        gpu.max_memory_allocated,
        gpu.max_memory_reserved,
        gpu.memory_snapshot,
        gpu.snapshot,
        gpu.mem_get_info,
        gpu.breakdown,
    )
    for question in ask:
        with pytest.raises(
            RuntimeError, match=r"RTX 4090.* was never open .*: begin with open\(\)"
        ):
            question()
    with gpu:
        assert gpu.memory_allocated() == 0
        with pytest.raises(RuntimeError, match="4,000,000 bytes no one accounts for"):
            model(torch.empty(1, 1000, device=gpu.device))
        with pytest.raises(RuntimeError, match=r"breakdown\(\) of parameters got a tensor"):
            gpu.breakdown(model)
    with pytest.warns(UserWarning, match=r"RTX 4090.* is closed, .* leave out"):
        gpu.memory_allocated()


def test_a_gpu_that_is_not_open_gives_no_device_to_make_tensors_on() -> None:
    gpu = VirtualGPU("RTX 4090")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is not open: what is made on its device now"):
            torch.empty(1000, device=gpu.device)
        with gpu:
            torch.empty(1000, device=gpu.device)


def test_the_workspaces_setting_is_left_as_the_program_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, "what is taken back at the end")
    monkeypatch.delenv(name)
    with VirtualGPU():
        assert os.environ[name] == CUBLAS_WORKSPACE
        with VirtualGPU():
            monkeypatch.setenv("EVERY_BYTE_TEST", "set meanwhile")
        assert os.environ[name] == CUBLAS_WORKSPACE
    assert name not in os.environ
    assert os.environ["EVERY_BYTE_TEST"] == "set meanwhile"
    with VirtualGPU():
        monkeypatch.setenv(name, ":16:8")
    assert os.environ[name] == ":16:8"
    with VirtualGPU():
        pass
    assert os.environ[name] == ":16:8"


def test_a_module_makes_its_constants_on_the_host(
    gpu: VirtualGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space").mkdir()  # a namespace package
    source = "import torch\nCONSTANT = torch.arange(1000.0)\n"
    for name in ("constants_of_a_library.py", "space/constants.py"):
        (tmp_path / name).write_text(source)
    with ZipFile(tmp_path / "zipped.zip", "w") as file:
        file.writestr("zipped_constants.py", source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    with gpu.device:
        for name in ("constants_of_a_library", "space.constants", "zipped_constants"):
            module = importlib.import_module(name)
            assert module.CONSTANT.device.type == "cpu"
            assert importlib.reload(module).CONSTANT.device.type == "cpu"
        assert torch.ones(1).is_meta
        assert gpu.memory_allocated() == 0


# Threads: PyTorch's modes are each thread's own


def test_tensors_of_other_threads_count(gpu: VirtualGPU) -> None:
    kept: list[torch.Tensor] = []

    def make() -> None:
        kept.append(torch.empty(10**6, device=gpu.device))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert gpu.memory_allocated() == 4_000_256
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            pool.submit(make).result()
    assert gpu.memory_allocated() == 4 * 4_000_256
    kept.clear()
    assert gpu.memory_allocated() == 0


def test_a_thread_has_a_label_and_a_pause_of_its_own(gpu: VirtualGPU) -> None:
    def run(work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    def make() -> torch.Tensor:
        return torch.empty(10**6, device=gpu.device)

    with gpu.label("batch"):
        kept = run(make)
    assert gpu.breakdown()["activations"] == kept.nbytes
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with untracked():  # of this thread alone
            kept = pool.submit(make).result()
        assert gpu.memory_allocated() == kept.nbytes + 256


def test_a_thread_that_outlives_the_pause_it_was_started_in_is_seen(gpu: VirtualGPU) -> None:
    with ThreadPoolExecutor(1) as pool:
        with untracked():
            pool.submit(torch.empty, 10**6, device=gpu.device).result()
            assert gpu.memory_allocated() == 0
        kept = pool.submit(torch.empty, 10**6, device=gpu.device).result()
        assert gpu.memory_allocated() == kept.nbytes + 256


def test_a_thread_follows_the_gpu_in_use() -> None:
    with VirtualGPU() as outer, ThreadPoolExecutor(1) as pool:
        kept = [pool.submit(torch.empty, 128, device="meta").result()]
        with VirtualGPU() as inner:
            kept.append(pool.submit(torch.empty, 10**6, device="meta").result())
            assert (outer.memory_allocated(), inner.memory_allocated()) == (512, 4_000_256)


def test_a_tensor_that_nobody_saw_made_is_refused() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # a thread that ran before
        with VirtualGPU() as gpu:
            unseen = pool.submit(torch.empty, 1000, device="meta").result()
            torch.empty_like(unseen)  # its shape may be known
            with pytest.raises(
                RuntimeError, match=r"got a tensor of shape \(1000,\) .* 4,000 bytes"
            ):
                unseen + 1
            with pytest.raises(RuntimeError, match="no one accounts for: make it while the GPU"):
                torch.cat([torch.empty_like(unseen), unseen])
            assert gpu.memory_allocated() == 0


def test_threads_at_once_lose_nothing(gpu: VirtualGPU) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:

            def work(number: int) -> torch.Tensor:
                for size in range(1, 40):
                    cycle: list[Any] = [torch.empty(size * 1000, device=gpu.device)]
                    cycle.append(cycle)  # for the garbage collector, which runs at any time
                return torch.empty(1000 * (number + 1), device=gpu.device)

            kept = list(pool.map(work, range(16)))
    finally:
        sys.setswitchinterval(before)
    gc.collect()
    rows = gpu.breakdown()
    assert rows.total == gpu.memory_allocated()
    assert rows["activations"] == sum(tensor.nbytes for tensor in kept)
    assert sum(s["allocated_size"] for s in gpu.memory_snapshot()) == gpu.memory_allocated()


def test_a_thread_leaves_its_cublas_handle_to_the_next(gpu: VirtualGPU) -> None:
    x = torch.empty(64, 64, device=gpu.device)

    def product() -> None:
        x @ x

    def run(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            together = threading.Barrier(threads)
            for each in [pool.submit(lambda: (product(), together.wait())) for _ in range(threads)]:
                each.result()

    run(1)
    assert gpu.breakdown()["workspaces"] == WORKSPACE
    run(1)
    assert gpu.breakdown()["workspaces"] == WORKSPACE
    run(3)
    assert gpu.breakdown()["workspaces"] == 3 * WORKSPACE
    product()
    assert gpu.breakdown()["workspaces"] == 3 * WORKSPACE


def test_autocast_works_in_other_threads(gpu: VirtualGPU) -> None:
    x = torch.empty(64, 64, device=gpu.device)

    def product() -> torch.Tensor:
        with torch.autocast(gpu.device.type):
            return x @ x

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(product).result().dtype is torch.float16


@pytest.mark.parametrize("name", ["tensor", "as_tensor", "asarray"])
def test_a_tensor_made_of_numbers_counts(gpu: VirtualGPU, name: str) -> None:
    make = getattr(torch, name)
    tensor = make([0.0] * 1000, device=gpu.device)
    assert gpu.breakdown()["batch"] == tensor.nbytes == 4000
    with gpu.device:
        other = tensor.new_tensor([0.0] * 100), make([0])
    assert gpu.breakdown().total == 4096 + 2 * 512
    del tensor, other
    assert gpu.memory_allocated() == 0


def test_a_storage_lives_as_long_as_its_tensor(gpu: VirtualGPU) -> None:
    """Python's garbage collector may take the Python object, while PyTorch keeps the storage."""
    tensor = torch.empty(1000, device=gpu.device)
    cycle: list[object] = [tensor.untyped_storage()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert gpu.memory_allocated() == 4096
    del tensor
    assert gpu.memory_allocated() == 0


# The timeline


def test_a_recorded_step_adds_up(gpu: VirtualGPU) -> None:
    with gpu.device:
        model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
        x = torch.empty(64, 512)
    optimizer = optim.Adam(model.parameters())
    gpu.reset_peak_memory_stats()
    with gpu.record(model, optimizer) as recorded:
        recorded.mark("forward")
        loss = model(x).sum()
        recorded.mark("backward")
        loss.backward()
        recorded.mark("optimizer")
        optimizer.step()
        recorded.mark("end")
        kept = gpu.breakdown(model, optimizer)
        optimizer.zero_grad()
    steps = recorded.steps
    assert steps[recorded.peak].total == gpu.max_memory_allocated() == max(s.total for s in steps)
    assert steps[recorded.marks["end"]] == kept
    assert steps[-1] == gpu.breakdown(model, optimizer)
    assert all(min(row.values()) >= 0 for row in steps)
    assert list(recorded.marks) == ["forward", "backward", "optimizer", "end"]
    parameters = steps[0]["parameters"]
    at = recorded.marks
    assert steps[at["backward"]]["gradients"] == 0
    assert steps[at["optimizer"]]["gradients"] == parameters
    assert steps[at["optimizer"]]["optimizer states"] == 0
    assert steps[-1]["optimizer states"] == 2 * parameters
    assert steps[recorded.peak]["temporaries"] == parameters
    assert steps[-1]["temporaries"] == 0


def test_the_block_that_is_being_made_counts_once_at_the_highest(
    gpu: VirtualGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    malloc = gpu.memory.malloc

    def looked_at(nbytes: int, stream: int | None = None) -> int:
        handle = malloc(nbytes, stream)
        timeline.look(handle)
        return handle

    with gpu.record() as timeline:
        monkeypatch.setattr(gpu.memory, "malloc", looked_at)
        x = torch.empty(1000, device=gpu.device)
    assert timeline.highest["activations"] == x.nbytes
    assert timeline.highest.total == 4096 and timeline.highest["workspaces"] == 0


def test_a_recording_that_ends_in_an_error_is_kept() -> None:
    with VirtualGPU(capacity=100 * MiB) as gpu:
        with pytest.raises(torch.OutOfMemoryError), gpu.record() as recorded:
            kept = [torch.empty(40 * MiB, dtype=torch.uint8, device="meta") for _ in range(3)]
        totals = [step.total // MiB for step in recorded.steps]
        assert totals == [0, 40, 80, 0]
        assert "kept" not in locals()


def test_recording_is_refused_where_it_cannot_be(gpu: VirtualGPU) -> None:
    with gpu.record() as recorded:
        with pytest.raises(RuntimeError, match="another recording is under way"):
            with gpu.record():
                pass
    with pytest.raises(RuntimeError, match="after the recording"):
        recorded.mark("late")
    gpu.close()
    with pytest.raises(RuntimeError, match=r"cannot record: open\(\) it first"):
        with gpu.record():
            pass


# The real one, as far as a machine without one can tell: torch.cuda's memory
# functions stand in for the card, everything above them is what runs there.


class MemoryStandIn(CudaMemory):
    """A `CudaMemory` of the meta device, whose torch.cuda is fed by a virtual one's rules."""

    def __init__(self, card: CachingAllocator) -> None:
        self.device = torch.device("meta")
        self.card = card

    def malloc(self, nbytes: int) -> int:
        return self.card.malloc(nbytes)

    def free(self, handle: int) -> None:
        self.card.free(handle)


def test_the_real_gpu_accounts_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    card = CachingAllocator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: getattr(card, name)())
    stats = {"requested_bytes.all.current": card.memory_requested}
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: {key: read() for key, read in stats.items()}
    )

    def row(gpu: GPU, workspace: Callable[[], object]) -> dict[str, int]:
        model = nn.Linear(100, 100, device=gpu.device)
        x = torch.empty(10, 100).to(gpu.device)
        workspace()
        loss = model(x).sum()
        found = gpu.breakdown(model)
        assert found.total == gpu.memory_allocated()
        del loss  # lived until here
        return found

    expected = {
        "parameters": 4 * (100 * 100 + 100),
        "batch": 4 * 10 * 100,
        "activations": 4,  # the loss
        "workspaces": WORKSPACE,
        # To the next 512 B: 40,000 and 400 of the layer, 4,000 of the batch, 4 of the loss.
        "rounding": 448 + 112 + 96 + 508,
    }
    with GPU(MemoryStandIn(card)) as real:
        on_card = row(real, lambda: card.malloc(WORKSPACE))
    assert {kind: nbytes for kind, nbytes in on_card.items() if nbytes} == expected
    with VirtualGPU() as virtual:
        replayed = row(virtual, lambda: None)
    assert {kind: nbytes for kind, nbytes in replayed.items() if nbytes} == expected


def test_a_cuda_gpu_without_cuda_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"CudaGPU needs an NVIDIA GPU .* VirtualGPU\(\) needs"):
        CudaGPU()


def test_the_real_gpu_records_by_torchs_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[tuple[object, ...]] = []
    own = torch.cuda.memory

    def record(enabled: object, stacks: str, max_entries: int) -> None:
        asked.append((enabled, stacks, max_entries))

    monkeypatch.setattr(own, "_record_memory_history", record)
    monkeypatch.setattr(own, "_snapshot", lambda: {"segments": []})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2))
    gpu = CudaGPU()
    gpu.record_memory_history(max_entries=7)
    gpu.record_memory_history(None)
    gpu.dump_snapshot(tmp_path / "file")
    assert asked == [("all", "python", 7), (None, "python", sys.maxsize)]
    assert pickle.loads((tmp_path / "file").read_bytes()) == gpu.snapshot() == {"segments": []}
    assert gpu.mem_get_info() == (1, 2)


# The snapshot, as PyTorch's own tools read it


CONFS = ("", "expandable_segments:True", "max_split_size_mb:20")


def a_step(alloc_conf: str, file: Path) -> dict[str, Any]:
    """A recorded training step on a small card, an allocation too many, and its snapshot."""
    with VirtualGPU(capacity=300 * MiB, alloc_conf=alloc_conf) as gpu:
        gpu.record_memory_history()
        with gpu.device:
            model = nn.Sequential(nn.Linear(1000, 3000), nn.ReLU(), nn.Linear(3000, 1000))
            x = torch.empty(100, 1000)
        optimizer = optim.Adam(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(400 * MiB, dtype=torch.uint8, device="meta")
        del x
        gpu.dump_snapshot(file)
        snapshot = gpu.snapshot()
        assert sum(s["allocated_size"] for s in snapshot["segments"]) == gpu.memory_allocated()
        assert sum(s["total_size"] for s in snapshot["segments"]) == gpu.memory_reserved()
    return snapshot


@pytest.mark.parametrize("alloc_conf", CONFS)
def test_torchs_viewer_reads_the_snapshot(
    tmp_path: Path,
    alloc_conf: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, page = tmp_path / "snapshot.pickle", tmp_path / "page.html"
    snapshot = a_step(alloc_conf, file)
    commands: dict[tuple[str, ...], str] = {
        ("stats",): "total_allocated:",
        ("trace",): "raise OutOfMemoryError # 400.0MiB requested",
        ("trace_plot", "-o", str(page)): "Active Memory Timeline",
        ("trace_plot", "-s", "-o", str(page)): "Active Cached Memory Timeline",
        ("segment_plot", "-o", str(page)): "Allocator State History",
    }
    if "filter_freed" in inspect.signature(_memory_viz.trace_plot).parameters:  # not in 2.8
        commands["trace_plot", "-f", "-o", str(page)] = "Active Memory Timeline"
    for (command, *options), expected in commands.items():
        monkeypatch.setattr(sys, "argv", ["_memory_viz", command, str(file), *options])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it is imported already
            runpy.run_module("torch.cuda._memory_viz", run_name="__main__")
        said = capsys.readouterr().out + (page.read_text() if options else "")
        assert expected in said, command
    # These draw with a script that they would download: here they get the lines alone.
    lines = _memory_viz.memory(snapshot, format_flamegraph=str)
    held = sum(int(line.rpartition(" ")[2]) for line in lines.splitlines())
    assert held == sum(s["total_size"] for s in snapshot["segments"])
    assert "test_gpu.py" in lines and ":a_step" in lines
    assert "seg_" in _memory_viz.segments(snapshot, format_flamegraph=str)
    changed = _memory_viz.compare(snapshot["segments"], [], format_flamegraph=str)
    assert "only_before" in changed and "only_after" not in changed


# What ``unpickle`` of PyTorch's torch/utils/viz/MemoryViz.js understands.
VIEWER = """APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINUNICODE DICT EMPTY_DICT
    EMPTY_LIST EMPTY_TUPLE FRAME LIST LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE
    NONE PROTO SETITEM SETITEMS SHORT_BINUNICODE STOP TUPLE TUPLE1 TUPLE2 TUPLE3"""


@pytest.mark.parametrize("alloc_conf", CONFS)
def test_the_viewer_in_the_browser_can_decode_the_file(tmp_path: Path, alloc_conf: str) -> None:
    file = tmp_path / "snapshot.pickle"
    snapshot = a_step(alloc_conf, file)
    codes = {(code.name, value) for code, value, _ in pickletools.genops(file.read_bytes())}
    assert {name for name, _ in codes} <= set(VIEWER.split())
    assert ("PROTO", 4) in codes
    # JavaScript's numbers are whole up to 2**53: addresses too have to stay below.
    assert all(s["address"] + s["total_size"] < 2**53 for s in snapshot["segments"])


@pytest.mark.parametrize("alloc_conf", CONFS)
def test_the_trace_leads_to_the_segments(tmp_path: Path, alloc_conf: str) -> None:
    """Replaying the events from nothing gives the blocks and the memory of the snapshot."""
    snapshot = a_step(alloc_conf, tmp_path / "snapshot.pickle")
    live: dict[int, int] = {}
    mapped: set[int] = set()
    for event in snapshot["device_traces"][0]:
        match event["action"]:
            case "alloc":
                assert event["addr"] not in live
                live[event["addr"]] = event["size"]
            case "free_completed":
                assert live.pop(event["addr"]) == event["size"]
            case "segment_alloc" | "segment_map" | "segment_free" | "segment_unmap" as action:
                pages = range(event["addr"], event["addr"] + event["size"], 2 * MiB)
                assert mapped.isdisjoint(pages) is (action in ("segment_alloc", "segment_map"))
                mapped ^= set(pages)
    blocks = [b for s in snapshot["segments"] for b in s["blocks"]]
    assert live == {b["address"]: b["requested_size"] for b in blocks if b["requested_size"]}
    spans = [range(s["address"], s["address"] + s["total_size"]) for s in snapshot["segments"]]
    assert mapped == {page for span in spans for page in span[:: 2 * MiB]}


# No hardware, and next to no memory

EXPERIMENT = """
import re
import torch
def peak():  # of this program alone; getrusage would count the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
import torch._dynamo  # PyTorch's optimizers import it, on any device
before = peak()
from torch import nn, optim
from every_byte.gpu import VirtualGPU
from helpers.mlp import SimpleMLP
with VirtualGPU() as gpu:
    with gpu.device:
        model = SimpleMLP()
    data = torch.randn(128, 1, 28, 28).to(gpu.device)
    target = torch.randint(0, 10, (128,)).to(gpu.device)
    optimizer = optim.Adam(model.parameters())
    loss = nn.CrossEntropyLoss()(model(data), target)
    loss.backward()
    optimizer.step()
    assert gpu.memory_allocated() > 833_000_000
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_experiment_takes_under_100_mb_more_than_pytorch() -> None:
    command = [sys.executable, "-c", EXPERIMENT]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0 < int(run.stdout) < 100e6


def test_nothing_is_imported_while_operations_are_looked_at(tmp_path: Path) -> None:
    code = """
import sys, torch
from every_byte.gpu import VirtualGPU
with VirtualGPU() as gpu:
    assert "torch._dynamo" in sys.modules
    there = set(sys.modules)
    with gpu.device:
        model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.empty(1, 3, device=gpu.device)).sum().backward()
    optimizer.step()
    late = {name for name in set(sys.modules) - there if name.startswith("torch._dynamo")}
    assert not late, late
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_torch_compile_says_that_it_does_nothing(gpu: VirtualGPU) -> None:
    compiled = torch.compile
    with gpu.device:
        model, x = nn.Linear(64, 64), torch.empty(8, 64)
    with pytest.warns(UserWarning, match="torch.compile does nothing on a virtual GPU"):
        assert torch.compile(model, fullgraph=True) is model
    with pytest.warns(UserWarning, match="the figures are those of eager mode"):

        @torch.compile(mode="reduce-overhead")
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    with pytest.warns(UserWarning, match="does nothing"):
        model.compile()
    assert twice(model(x)).shape == (8, 64)
    gpu.close()
    assert torch.compile is not compiled


@pytest.mark.parametrize("layer", ["LinearNF4", "Linear8bitLt"])
def test_what_bitsandbytes_would_quantise_on_the_way_is_refused(
    gpu: VirtualGPU, layer: str
) -> None:
    layers = pytest.importorskip("bitsandbytes.nn")  # the engine does without
    options = {} if layer == "LinearNF4" else {"has_fp16_weights": False}
    model = getattr(layers, layer)(64, 64, bias=False, **options)
    for move in (lambda: model.to(gpu.device), lambda: model.weight.to(gpu.device)):
        with pytest.raises(NotImplementedError, match="bitsandbytes quantises on its way"):
            move()
        assert gpu.memory_allocated() == 0


def test_four_bits_on_the_virtual_gpu_are_refused(gpu: VirtualGPU) -> None:
    layers = pytest.importorskip("bitsandbytes.nn")
    with gpu.device:
        with pytest.raises(
            NotImplementedError, match=r"a Params4bit of torch\.float32 on a virtual"
        ):
            layers.LinearNF4(64, 64)
        assert gpu.memory_allocated() == 0
        with untracked():
            layers.LinearNF4(64, 64)
    assert type(layers.LinearNF4(64, 64).weight).__name__ == "Params4bit"  # on the host


def test_several_optimizers_each_have_their_states(gpu: VirtualGPU) -> None:
    """One for each parameter, which steps within backward and drops the gradient."""
    with gpu.device:
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
        x = torch.empty(1, 1000)
    each = [optim.Adam([p]) for p in model.parameters()]

    def step_now(p: torch.Tensor) -> None:
        owner = next(o for o in each if o.param_groups[0]["params"][0] is p)
        owner.step()
        owner.zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    with gpu.record(model, *each) as recorded:
        model(x).sum().backward()
    one = 1000 * 1000 * 4
    rows = gpu.breakdown(model, *each)
    assert rows["optimizer states"] == recorded.steps[-1]["optimizer states"] == 4 * one
    assert max(row["gradients"] for row in recorded.steps) == one
    assert gpu.breakdown(model, each[0])["optimizer states"] == 2 * one


def test_a_module_that_stays_on_the_host_is_converted_as_without_a_gpu() -> None:
    """Swapped, a quantised parameter would lose its class, and with it its scales."""
    with VirtualGPU() as gpu:
        layers = pytest.importorskip("bitsandbytes.nn")
        layer = layers.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        assert layer.weight.dtype is torch.int8
        assert type(layer.weight).__name__ == "Int8Params"
        assert gpu.memory_allocated() == 0


def test_an_index_that_is_a_list_is_counted_as_what_it_becomes(gpu: VirtualGPU) -> None:
    x = torch.empty(3, 4, device=gpu.device)
    before = gpu.memory_allocated()
    gpu.reset_peak_memory_stats()
    part = x[:, [0, 2]]
    assert part.shape == (3, 2)
    # On CUDA the list is a tensor of two whole numbers for the moment, and goes with the call.
    assert gpu.memory_allocated() == before + 512
    assert gpu.max_memory_allocated() == before + 2 * 512
    with gpu.record() as timeline:
        x[[0, 1]] = 1.0
    assert max(step["batch"] for step in timeline.steps) == 2 * 8
    assert gpu.memory_allocated() == before + 512
    assert gpu.breakdown().total == gpu.memory_allocated()
