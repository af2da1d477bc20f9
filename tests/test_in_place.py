"""What PyTorch does in place where nobody watches is done so under the tracker, too."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from every_byte import in_place
from every_byte.gpu import VirtualGPU

IN_PLACE = ("add_", "sub_", "mul_", "scatter_", "scatter_add_", "index_add_", "put_")
IN_PLACE += ("_index_put_impl_", "index_fill_", "masked_scatter_", "masked_fill_")


class Unwatched(TorchDispatchMode):
    """Does to tensors on the host what the tracker does to those on its device."""

    def __init__(self) -> None:
        super().__init__()
        in_place.prepare()
        self.made_by: dict[int, Any] = {}
        self.called = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if in_place.may_overwrite(func) and isinstance(args[0], Tensor):
            made_by = self.made_by.get(args[0].untyped_storage()._cdata)
            func, args = in_place.overwriting(func, args, kwargs or {}, made_by)
        result = func(*args, **kwargs or {})
        if in_place.node() is not None:
            self.called[func.overloadpacket.__name__] += 1
        if isinstance(result, Tensor) and not func.is_view and result is not args[0]:
            self.made_by[result.untyped_storage()._cdata] = in_place.node()
        return result


def leaf(*sizes: int) -> Tensor:
    return torch.randn(*sizes, requires_grad=True)


INDEX = torch.tensor([0, 1])
MASK = torch.tensor([True, False, True, True])


def residual(x: Tensor) -> Tensor:
    y = x.exp()
    return y + nn.functional.gelu(y @ y) + y.tanh()


def held(x: Tensor) -> Tensor:
    """A gradient that the program keeps: autograd leaves it as it is."""
    kept: list[Tensor] = []
    y = x.exp()
    one = y.sin()
    one.register_hook(lambda gradient: kept.append(gradient * 1))
    z = one + y.tanh()
    z.register_hook(kept.append)
    return z + y * kept[0] if kept else z + y


def expanded(x: Tensor) -> Tensor:
    y = x.exp()
    return y.sum() + y.cos().sum()


def transposed(x: Tensor) -> Tensor:
    y = x.exp()
    return y.t().sin() + y.cos().t()


CASES: dict[str, Callable[[], Tensor]] = {
    "three readers": lambda: (lambda y: y.sin() + y.cos() + y.tanh())(leaf(4, 4).exp()),
    **{f.__name__: lambda f=f: f(leaf(4, 4)) for f in (residual, held, expanded, transposed)},
    "std_mean": lambda: sum(torch.std_mean(leaf(4, 3), 1)),  # a sum of its formula's own
    "maximum": lambda: torch.maximum(leaf(4), leaf(4)),
    "clamp": lambda: torch.clamp(leaf(4), leaf(4), leaf(4)),
    "atan2": lambda: torch.atan2(leaf(4), leaf(4)),
    "index": lambda: leaf(4, 3)[INDEX],
    "topk": lambda: torch.topk(leaf(4, 5), 2)[0],
    "max": lambda: torch.max(leaf(4, 5), 1)[0],
    "sort": lambda: torch.sort(leaf(4, 5))[0],
    "cummax": lambda: torch.cummax(leaf(4, 5), 1)[0],
    "masked_select": lambda: torch.masked_select(leaf(4), MASK),
    "gather": lambda: torch.gather(leaf(4, 5), 1, torch.zeros(4, 1, dtype=torch.long)),
    "index_select": lambda: torch.index_select(leaf(4, 5), 0, INDEX),
    "take": lambda: torch.take(leaf(4), INDEX),
    "trace": lambda: torch.trace(leaf(4, 4)),
    "bce": lambda: F.binary_cross_entropy_with_logits(leaf(4), torch.rand(4)),
    "bce, pos_weight": lambda: F.binary_cross_entropy_with_logits(
        leaf(4), torch.rand(4), pos_weight=torch.rand(4)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_as_many_operations_in_place_as_pytorch_itself_where_nobody_watches(case: str) -> None:
    loss = CASES[case]().sum()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss.backward()
    alone = Counter(
        event.name.removeprefix("aten::")
        for event in profiled.events()
        if not (event.cpu_parent and event.cpu_parent.name.removeprefix("aten::") in IN_PLACE)
    )
    with Unwatched() as mode:
        CASES[case]().sum().backward()
    for name in IN_PLACE:
        assert (name, mode.called[name]) == (name, alone[name])


def graph(seed: int) -> list[Tensor]:
    """The gradients of a program that reads tensors again and again, and keeps some gradients."""
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    leaves = [torch.randn(4, 4, generator=generator, requires_grad=True) for _ in range(2)]
    values, kept = [t * 1 for t in leaves], []
    unary = (torch.sin, torch.tanh, torch.t, torch.relu, lambda t: t.reshape(16).view(4, 4))
    binary = (torch.add, torch.mul, torch.mm, torch.maximum, torch.sub)
    for _ in range(12):
        if chosen.random() < 0.4:
            value = chosen.choice(unary)(chosen.choice(values))
        else:
            value = chosen.choice(binary)(chosen.choice(values), chosen.choice(values))
        if chosen.random() < 0.3:
            value.register_hook(kept.append)
        if chosen.random() < 0.2:
            value.retain_grad()
            kept_value = value
            kept.append(kept_value)
        values.append(value)
    sum(value.sum() for value in values[-4:]).backward()
    gradients = [t.grad for t in leaves] + [t.grad if t.retains_grad else t for t in kept]
    return [t.detach().clone() for t in gradients if t is not None]


@pytest.mark.parametrize("seed", range(40))
def test_gradients_are_the_same_to_the_bit(seed: int) -> None:
    expected = graph(seed)
    with Unwatched():
        found = graph(seed)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("watched", "blocks"), [(False, 3), (True, 4)])
def test_a_second_gradient_is_added_to_the_first(watched: bool, blocks: int) -> None:
    """Of y: relu's and hardtanh's, and where somebody watches their sum as well."""
    with VirtualGPU(watched=watched) as gpu:
        x = torch.empty(1 << 20, device=gpu.device, requires_grad=True)
        y = x * 2
        loss = (y.relu() + nn.functional.hardtanh(y)).sum()
        before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        loss.backward(retain_graph=True)
        assert gpu.max_memory_allocated() - before - 512 == (blocks - 1) * x.nbytes


def taken(gpu: VirtualGPU, run: Callable[[], object]) -> list[int]:
    """The requests of a program, in bytes."""
    gpu.record_memory_history()
    kept = run()
    (entries,) = gpu.snapshot()["device_traces"]
    gpu.record_memory_history(None)
    del kept
    return [entry["size"] for entry in entries if entry["action"] == "alloc"]


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize(("watched", "more"), [(False, []), (True, [240])])
def test_linear_adds_its_bias_to_a_product_of_its_own(
    watched: bool, more: list[int], graded: bool
) -> None:
    """As measured on an H100: nn.MultiheadAttention gives it an input that is not contiguous."""
    with VirtualGPU(watched=watched) as gpu, torch.set_grad_enabled(graded):
        with gpu.device:
            layer, x = nn.Linear(8, 4), torch.zeros(3, 5, 8).transpose(0, 1)
        layer(x)  # takes cuBLAS's workspace
        assert taken(gpu, lambda: layer(x)) == [480, 240, *more]
        own = taken(gpu, lambda: x @ layer.weight.t() + layer.bias)
        assert own == [480, 240, 240]  # here the program holds the product
        if graded:
            layer(x).sum().backward()
            assert layer.bias.grad is not None and layer.bias.grad.shape == (4,)


def test_linear_gives_the_same_gradients_where_it_adds_in_place() -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    layer = nn.Linear(8, 4)
    layer(x.transpose(0, 1)).square().sum().backward()
    assert layer.weight.grad is not None and x.grad is not None
    alone = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = layer.bias.grad = None
    with AddingBiases() as mode:
        layer(x.transpose(0, 1)).square().sum().backward()
    assert mode.added == 1
    assert torch.equal(x.grad, alone[0]) and torch.equal(layer.weight.grad, alone[1])


class AddingBiases(TorchDispatchMode):
    """Does to a bias on the host what the tracker does to one on its device."""

    def __init__(self) -> None:
        super().__init__()
        in_place.prepare()
        self.product: int | None = None
        self.added = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if in_place.adds_bias(func, args, kwargs or {}, self.product):
            self.added += 1
            return torch.ops.aten.alias.default(torch.ops.aten.add_.Tensor(*args))
        result = func(*args, **kwargs or {})
        if in_place.is_product(func):
            self.product = result.untyped_storage()._cdata
        return result
