"""Autocast on the virtual GPU beside PyTorch's own for CUDA: the lists, then what runs."""

import re
import sys
import types
import unittest
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from every_byte.gpu import VirtualGPU
from every_byte.virtual.autocast import POLICIES
from helpers.mlp import SimpleMLP

HALF = (torch.float16, torch.bfloat16)
WORKSPACE = 8_519_680


# The lists

KNOWN = {
    f"aten::{name}": policy
    for policy, names in POLICIES.items()
    for name in names
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
}
NOT_REPLAYED = {"aten::_cudnn_rnn", "aten::linalg_matrix_sqrth"}


def without_names(operators: Iterable[str]) -> set[str]:
    """Without those for named tensors, which older versions of PyTorch have."""
    return {name for name in operators if not re.search(r"(?i)dimname|names_", name)}


def test_the_lists_are_those_of_pytorchs_header() -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text("utf-8").replace("\\\n", " ")
    macros = {
        "lower_precision_fp": r"_\((\w+)(?:, (\w+))?\)",
        "fp32": r"_\((\w+)(?:, (\w+))?\)",
        "fp32_set_opt_dtype": r"_\((\w+)(?:, (\w+))?\)",
        "different_redispatch_signature": r'"(\w+)\.(\w+)"',
        "promote": r"_\((\w+)(?:, (\w+))?\)",
    }
    for policy, entry in macros.items():
        (body,) = re.findall(rf"#define AT_FORALL_{policy.upper()}\(_\)(.*)", text)
        listed = {f"aten::{'.'.join(filter(None, name))}" for name in re.findall(entry, body)}
        if policy == "lower_precision_fp":  # beside the macro, in autocast_mode.cpp
            listed |= {"aten::cudnn_convolution", "aten::cudnn_convolution_transpose"}
        name = policy.replace("different_redispatch_signature", "fp32_append_dtype")
        assert {key for key, of in KNOWN.items() if of == name} == without_names(listed), policy


def test_every_operator_that_cudas_autocast_treats_is_replayed() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    registered = {name for name in registered if name.startswith("aten::")}  # others' aside
    assert without_names(registered) - set(KNOWN) <= NOT_REPLAYED
    assert len(KNOWN) > 100


# What runs: PyTorch's autocast for CUDA on fake CUDA tensors, and ours on meta


class Trace(TorchDispatchMode):
    """Operators in order, with the shapes and dtypes that they are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":  # fake tensors are also asked for their device
            self.calls.append((str(func), described((args, kwargs)), described(result)))
        return result


def described(values: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


@contextmanager
def fake_cuda() -> Iterator[None]:
    """CUDA tensors without CUDA: operators run for their shapes, autocast is PyTorch's own."""
    with ExitStack() as stack:
        for module, name, answer in (
            (torch.cuda.amp.common, "amp_definitely_not_available", False),
            (torch.cuda, "is_bf16_supported", True),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda answer=answer: answer))
        stack.enter_context(FakeTensorMode())
        yield


def traced(device: str, work: Callable[[str, Trace], Any]) -> tuple[list[Any], type | None]:
    """What `work` did on a device, and with what error it ended."""
    with fake_cuda() if device == "cuda" else VirtualGPU(), Trace() as trace:
        try:
            work(device, trace)
        except Exception as error:
            return trace.calls, NoDriver if "driver" in str(error) else type(error)
    return trace.calls, None


class NoDriver(Exception):
    """Some operators ask CUDA's driver even for fake tensors: in PyTorch 2.8 all convolutions."""


OLD = torch.__version__ < "2.14"


def pytorchs_own_cases() -> list[Any]:
    """(list, operator, arguments, keywords) of PyTorch's tests of autocast on CUDA."""
    common: Any = types.ModuleType("torch.testing._internal.common_utils")
    common.TEST_WITH_ROCM, common.TestCase = False, unittest.TestCase
    with pytest.MonkeyPatch.context() as patch:  # it needs a package more
        patch.setitem(sys.modules, common.__name__, common)
        from torch.testing._internal.autocast_test_lists import AutocastTestLists
    lists = vars(AutocastTestLists("cpu"))
    return [
        pytest.param(name, *case[:2], case[2:], id=f"{name}-{case[0]}-{i}")
        for name in lists
        for i, case in enumerate(lists[name])
    ]


# Where meta takes another way than CUDA below autocast, in fused kernels: casts are compared.
FUSED = {"lstm_cell", "gru_cell", "rms_norm"}
# What meta does not do: look at values, convolve with cuDNN, do what autocast bans.
REFUSED = {"equal", "cudnn_convolution", "cudnn_convolution_transpose", "binary_cross_entropy"}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")  # some of these operators are deprecated
@pytest.mark.parametrize(("listed", "operator", "args", "more"), pytorchs_own_cases())
def test_each_operator_runs_as_under_cudas_autocast(
    listed: str, operator: str, args: Any, more: Any, dtype: torch.dtype
) -> None:
    if operator == "einsum":
        args, more = (args, list(more[0])), ()
    keywords = more[0] if more and isinstance(more[0], dict) else {}

    def work(device: str, _: Trace) -> Any:
        def there(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty(value.shape, dtype=value.dtype, device=device)
            return value

        given = tree_map(there, args)
        with torch.autocast(device, dtype=dtype):
            if listed.startswith("methods"):
                return getattr(given[0], operator)(*given[1:], **keywords)
            homes = (torch._C._nn,) if listed in ("nn_fp16", "nn_fp32", "banned") else ()
            home = next(h for h in (*homes, torch, torch._C._linalg) if hasattr(h, operator))
            return getattr(home, operator)(*given, **keywords)

    of_cuda, of_meta = traced("cuda", work), traced("meta", work)
    if operator in FUSED:
        cast_by = [[c for c in calls if "_to_copy" in c[0]] for calls, _ in (of_cuda, of_meta)]
        assert cast_by[0] == cast_by[1] != []
        assert of_meta[1] is None
    elif operator in REFUSED:
        assert of_cuda[0] == of_meta[0]
        assert of_meta[1]
    elif OLD and of_cuda[1] is NoDriver:
        pytest.skip("not without CUDA's driver in this version of PyTorch")
    else:
        assert of_cuda == of_meta
        # PyTorch refuses to promote FP16 under BF16; and its case for einsum is none.
        refused = operator == "einsum" or (listed.endswith("promote") and dtype is torch.bfloat16)
        assert of_meta[1] is None or refused


class Block(nn.Module):
    """What transformers and image models call, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU())
        self.out, self.conv = nn.Linear(32, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.group_norm = nn.GroupNorm(4, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        scores = (y @ y.mT / 4).softmax(-1)
        x = x + scores @ y
        x = x + self.out(self.mlp(self.norm(x)))
        x = self.group_norm(torch.relu(self.conv(x.mT))).mT
        return torch.einsum("bld,vd->blv", torch.cat([x, y]), self.embed.weight)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_whole_models_run_as_under_cudas_autocast(dtype: torch.dtype) -> None:
    def work(device: str, trace: Trace) -> None:
        with torch.device(device):
            block, tokens = Block(), torch.zeros(2, 5, dtype=torch.int64)
            mlp, images = SimpleMLP(), torch.empty(3, 1, 28, 28)
            labels = torch.zeros(3, dtype=torch.int64)
        trace.calls.clear()
        with torch.autocast(device, dtype=dtype):
            block(tokens)  # casts the weights
            logits = block(tokens)  # finds them in the cache
            F.cross_entropy(logits.flatten(0, 1), torch.cat([tokens, tokens]).flatten())
            with torch.autocast(device, enabled=False):
                mlp(images)
            F.nll_loss(F.log_softmax(mlp(images), -1), labels)
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            F.cross_entropy(mlp(images), labels, label_smoothing=0.1)
            F.mse_loss(torch.sigmoid(mlp(images)), images.flatten(1)[:, :10])
        with torch.no_grad(), torch.autocast(device, dtype=dtype):
            mlp(images).float().norm()

    of_cuda = traced("cuda", work)
    if OLD and of_cuda[1] is NoDriver:
        pytest.skip("not without CUDA's driver in this version of PyTorch")
    assert len(of_cuda[0]) > 100
    assert of_cuda == traced("meta", work)
    assert of_cuda[1] is None


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_where_the_lists_of_cpu_and_cuda_agree_so_do_the_results(dtype: torch.dtype) -> None:
    def results(device: str) -> list[torch.dtype]:
        with torch.device(device):
            x, image, target = torch.ones(4, 4), torch.ones(1, 4, 8, 8), torch.zeros(4).long()
            low = torch.ones(4, 4, dtype=dtype)
        with torch.autocast(device, dtype=dtype):
            return [
                t.dtype
                for t in (
                    F.linear(x, x, x[0]),
                    x @ low,
                    torch.bmm(x[None], x[None]),
                    F.conv2d(image, image),
                    F.scaled_dot_product_attention(x[None], x[None], x[None]),
                    F.prelu(x, x[0, :1]),
                    F.cross_entropy(low, target),
                    F.mse_loss(low, low),
                    F.binary_cross_entropy_with_logits(low, low),
                    low.prod(),
                    F.relu(low),
                    low + x,
                )
            ]

    with VirtualGPU():
        assert results("meta") == results("cpu")


# The cache of cast weights, contexts, and what they leave behind


def linear(gpu: VirtualGPU) -> tuple[nn.Linear, torch.Tensor]:
    with gpu.device:
        return nn.Linear(1000, 1000), 2 * torch.empty(10, 1000, requires_grad=True)


def test_weights_are_cast_once_and_kept_until_the_outermost_context_ends(gpu: VirtualGPU) -> None:
    model, x = linear(gpu)
    cast = 2 * (1000 * 1000 + 1000)
    with torch.autocast(gpu.device.type, dtype=torch.bfloat16):
        with torch.no_grad():
            model(x)
        assert gpu.breakdown(model)["cast weights"] == cast
        with torch.autocast(gpu.device.type, dtype=torch.bfloat16):
            y = model(x)
        assert gpu.breakdown(model)["cast weights"] == cast
    # What backward needs outlives the cache, but not its history: the cast without a
    # gradient came first, so y does not lead back to the weights. PyTorch's rule.
    assert gpu.breakdown(model)["cast weights"] == 2 * 1000 * 1000
    y.sum().backward()
    assert model.weight.grad is None
    assert gpu.breakdown(model)["cast weights"] == 0


def test_what_is_no_parameter_is_cast_each_time(gpu: VirtualGPU) -> None:
    model, x = linear(gpu)
    with gpu.device:
        part = torch.empty(2000, 1000)[:1000].requires_grad_()  # a leaf, but a view
    for weight in (model.weight.detach(), model.weight * 2, part):
        with torch.autocast(gpu.device.type), Trace() as trace:
            F.linear(x, weight)
            F.linear(x, weight)
        cast = [call[1][0][0] for call in trace.calls if "_to_copy" in call[0]]
        assert cast == [(1000, 1000), (10, 1000)] * 2


def test_only_autocast_makes_cast_weights(gpu: VirtualGPU) -> None:
    model, _ = linear(gpu)
    copy = model.weight.half()
    row = gpu.breakdown(model)
    assert row["cast weights"] == 0
    assert row["activations"] == 4 * 10 * 1000 * 2 + copy.nbytes


def test_without_its_cache_each_use_casts_again(gpu: VirtualGPU) -> None:
    model, x = linear(gpu)
    with torch.autocast(gpu.device.type, cache_enabled=False):
        first = model(x)
        assert gpu.breakdown(model)["cast weights"] == 2 * 1000 * 1000
        second = model(x)
        assert gpu.breakdown(model)["cast weights"] == 2 * 2 * 1000 * 1000
    assert first.dtype == second.dtype == torch.float16  # CUDA's default


def test_contexts_nest_and_say_what_holds(gpu: VirtualGPU) -> None:
    kind = gpu.device.type
    model, x = linear(gpu)
    assert torch.amp.is_autocast_available(kind) and not torch.is_autocast_enabled(kind)
    with torch.autocast(kind, dtype=torch.bfloat16):
        assert torch.is_autocast_enabled(kind)
        assert torch.get_autocast_dtype(kind) is model(x).dtype is torch.bfloat16
        with torch.autocast(kind, enabled=False):
            assert not torch.is_autocast_enabled(kind)
            assert model(x).dtype is torch.float32
        with torch.autocast(kind):
            assert model(x).dtype is torch.bfloat16
        with torch.autocast(kind, dtype=torch.float16):
            assert torch.get_autocast_dtype(kind) is torch.float16
        assert model(x).dtype is torch.bfloat16
    assert torch.get_autocast_dtype(kind) is torch.float16
    assert model(x).dtype is torch.float32
    decorated = torch.autocast(kind, dtype=torch.bfloat16)(model.forward)
    assert decorated(x).dtype is torch.bfloat16


def test_double_precision_integers_and_the_host_are_left_alone(gpu: VirtualGPU) -> None:
    with gpu.device:
        double, whole = torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4).long()
    host = torch.ones(4, 4)
    with torch.autocast(gpu.device.type):
        assert (double @ double).dtype is torch.float64
        assert double.sum().dtype is torch.float64
        assert whole.sum().dtype is torch.int64
        assert (host @ host).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (host @ host).dtype is torch.bfloat16
        with gpu.device:
            assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype is torch.float32


def test_a_closed_gpu_leaves_pytorch_as_it_was() -> None:
    before = [torch.is_autocast_enabled, torch.get_autocast_dtype, torch.clear_autocast_cache]
    with VirtualGPU() as outer, VirtualGPU() as inner:
        model, x = linear(inner)
        with torch.autocast("meta"):
            model(x)
        assert outer is not inner
    after = [torch.is_autocast_enabled, torch.get_autocast_dtype, torch.clear_autocast_cache]
    assert after == before
    with pytest.raises(RuntimeError):
        torch.autocast("meta")
    assert model(x).dtype is torch.float32


def test_a_checkpointed_block_is_computed_again_under_autocast(gpu: VirtualGPU) -> None:
    model, x = linear(gpu)
    with torch.autocast(gpu.device.type, dtype=torch.bfloat16):
        y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward()  # raises if it were computed again in another dtype
    assert model.weight.grad is not None and model.weight.grad.dtype is torch.float32


# Bytes of a step


def test_the_bytes_of_a_step_are_those_of_the_rules(gpu: VirtualGPU) -> None:
    """For n x n weights and b rows: what autograd keeps, and what becomes of it."""
    n, b = 1000, 10
    with gpu.device:
        model, x = nn.Linear(n, n, bias=False), torch.empty(b, n)
    optimizer = torch.optim.Adam(model.parameters())
    with torch.autocast(gpu.device.type):
        y = model(x)
        inside = gpu.breakdown(model, optimizer)
    outside = gpu.breakdown(model, optimizer)
    assert inside["cast weights"] == 2 * n * n
    assert outside["cast weights"] == 0  # x needs no gradient, so backward needs no weights
    assert inside["activations"] == outside["activations"] == 4 * b * n + 2 * 2 * b * n
    y.float().sum().backward()
    optimizer.step()
    after = gpu.breakdown(model, optimizer)
    assert after["parameters"] == after["gradients"] == 4 * n * n
    assert after["optimizer states"] == 8 * n * n
    assert after["workspaces"] == 2 * WORKSPACE
    assert after["cast weights"] == after["temporaries"] == 0


def test_softmax_of_fp16_reads_it_without_a_copy_as_on_cuda(gpu: VirtualGPU) -> None:
    with gpu.device:
        scores = torch.empty(1000, 1000, dtype=torch.float16)
    peaks = {}
    for dtype in HALF:
        gpu.reset_peak_memory_stats()
        before = gpu.memory_allocated()
        with torch.autocast(gpu.device.type):
            assert scores.to(dtype).softmax(-1).dtype is torch.float32
        peaks[dtype] = gpu.max_memory_allocated() - before
    result, copy = 4 * 1000 * 1000, 4 * 1000 * 1000
    assert peaks[torch.float16] < result + copy <= peaks[torch.bfloat16]


def test_a_scaled_step_is_replayed_as_if_no_gradient_were_infinite(gpu: VirtualGPU) -> None:
    model, x = linear(gpu)
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler(gpu.device.type)
    before = gpu.memory_allocated()
    loss = model(x.detach()).sum()
    scaled = scaler.scale(loss)
    held = gpu.memory_allocated()
    scaler.scale(loss.detach())  # makes nothing that lasts
    assert gpu.memory_allocated() == held
    scaled.backward()
    scaler.step(optimizer)
    assert len(optimizer.state) == 2
    scaler.update()
    del loss, scaled
    optimizer.zero_grad()
    optimizer.state.clear()
    # What lasts: the scale and the growth tracker, a block of 512 B each.
    assert gpu.memory_allocated() - before == 2 * 512 + 2 * WORKSPACE
    assert scaler.get_scale() == 65536.0  # one of the numbers whose values are known


def test_real_gradients_are_still_looked_at(gpu: VirtualGPU) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, expected in ((float("inf"), 1.0), (0.25, 0.75)):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.item() == expected


def test_cudas_autocast_and_scaler_serve_the_virtual_gpu(
    gpu: VirtualGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(64, 64, device=gpu.device)
    for made in (torch.autocast("cuda"), torch.autocast(device_type="cuda", enabled=True)):
        assert not torch.is_autocast_enabled()
        with made:
            assert (x @ x).dtype is torch.float16
            assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert (x @ x).dtype is torch.get_autocast_dtype("cuda") is torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype is torch.float32
    with torch.autocast("cpu"):
        assert (x @ x).dtype is torch.float32
    for scaler in (torch.amp.GradScaler(), torch.amp.GradScaler(device="cuda", init_scale=2.0)):
        assert scaler.is_enabled()
        before = gpu.memory_allocated()
        scaler.scale(torch.empty((), device=gpu.device))
        assert gpu.memory_allocated() == before + 2 * 512  # the scale and the growth tracker
        del scaler
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for make in (torch.autocast, torch.amp.GradScaler):
        with pytest.raises(RuntimeError, match=r"a virtual GPU is in use: say .*gpu\.device\.type"):
            make("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is CUDA's")
def test_cudas_autocast_is_its_own_again_when_no_virtual_gpu_is_open(gpu: VirtualGPU) -> None:
    gpu.close()
    with pytest.warns(UserWarning, match="CUDA is not available"):
        torch.autocast("cuda")
    with pytest.warns(UserWarning, match="CUDA is not available"):
        torch.amp.GradScaler("cuda")
