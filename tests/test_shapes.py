"""What ``meta`` kernels answered is remembered, and made anew the same."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from every_byte import VirtualGPU
from every_byte.virtual import shapes

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shapes, "answers", {})
    yield


def of(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def described(result: Any) -> Any:
    """All that is to be known of a result."""
    if isinstance(result, (list, tuple)):
        return type(result), [described(each) for each in result]
    if not isinstance(result, Tensor):
        return result
    storage = result.untyped_storage()
    place = result.size(), result.stride(), result.storage_offset(), storage.nbytes()
    return place, result.dtype, result.device


CALLS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "broadcast": (aten.add.Tensor, lambda: (of(4, 1, 3), of(5, 1))),
    "a permuted result": (aten.mul.Tensor, lambda: (of(2, 3, 4).permute(2, 0, 1), 2.0)),
    "a number of another type": (aten.mul.Tensor, lambda: (of(3, dtype=torch.int64), 2.5)),
    "a whole number": (aten.mul.Tensor, lambda: (of(3, dtype=torch.int64), 2)),
    "a truth value": (aten.mul.Tensor, lambda: (of(3, dtype=torch.bool), True)),
    "sum": (aten.sum.dim_IntList, lambda: (of(4, 5), [1], True)),
    "several results": (aten.native_layer_norm.default, lambda: (of(4, 8), [8], of(8), None, 1e-5)),
    "a list": (aten._foreach_sqrt.default, lambda: ([of(2, 3), of(4)],)),
    "no bytes": (aten.add.Tensor, lambda: (of(0, 3), 1)),
    "copied": (torch.ops.aten._to_copy.default, lambda: (of(4, 3).t(),)),
    "channels last": (
        aten.clone.default,
        lambda: (of(2, 3, 4, 5).to(memory_format=torch.channels_last),),
    ),
    "in place": (aten.add_.Tensor, lambda: (of(4, 3), of(3))),
    "a list in place": (aten._foreach_mul_.Scalar, lambda: ([of(2), of(3)], 0.5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_made_anew_is_what_pytorch_answers(name: str) -> None:
    func, arguments = CALLS[name]
    expected = described(func(*arguments()))
    first = shapes.on_meta(func, arguments(), {})
    args = arguments()
    again = shapes.on_meta(func, args, {})
    assert described(first) == described(again) == expected
    (remembered,) = shapes.answers.values()
    assert remembered is not None, "nothing was remembered"
    if name == "in place":
        assert again is args[0]
    elif expected is not None:
        own = [t.untyped_storage()._cdata for t in tree_leaves((args, again)) if type(t) is Tensor]
        assert len(own) == len(set(own))  # its own memory


ONE, TWO, TRUTHS = of(3, dtype=torch.int64), of(4, 4), of(3, dtype=torch.bool)
DIFFERENT: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "types of numbers": (aten.mul.Tensor, [(ONE, 2), (ONE, 2.0), (ONE, True)]),
    "truth values and numbers": (aten.mul.Tensor, [(TRUTHS, 1), (TRUTHS, True), (TRUTHS, 1.0)]),
    "strides": (aten.clone.default, [(TWO,), (TWO.t(),)]),
    "dtypes": (aten.add.Tensor, [(TWO, TWO), (TWO.half(), TWO.half()), (TWO.half(), TWO)]),
    "dimensions": (aten.sum.dim_IntList, [(TWO, [0]), (TWO, [0, 1]), (TWO, [0], True)]),
    "sizes from floats": (
        aten.upsample_nearest2d.vec,
        [(of(1, 1, 4, 4), None, [2.0, 2.0]), (of(1, 1, 4, 4), None, [3.0, 3.0])],
    ),
    "sizes": (aten.add.Tensor, [(of(3, 1), of(3)), (of(3, 3), of(3))]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_get_their_own_answer(name: str) -> None:
    func, calls = DIFFERENT[name]
    for args in calls * 2:
        assert described(shapes.on_meta(func, args, {})) == described(func(*args))
    assert len(shapes.answers) == len(calls)


def test_the_default_dtype_is_part_of_the_question() -> None:
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            assert shapes.on_meta(aten.mul.Tensor, (ONE, 2.5), {}).dtype is dtype
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (TWO, [16])),
        (aten.t_.default, (of(2, 3),)),
        (aten.resize_.default, (of(2), [5])),
        (aten.add.out, (TWO, TWO)),
        (aten.add.Tensor, (torch.ones(2), torch.ones(2))),
        (aten.real.default, (of(2, dtype=torch.complex64),)),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_what_cannot_be_made_anew_is_not_remembered(func: Any, args: tuple[Any, ...]) -> None:
    given = {"out": of(4, 4)} if func is aten.add.out else {}
    for _ in range(2):
        shapes.on_meta(func, args, given)
    assert not any(shapes.answers.values())


def test_an_error_is_raised_each_time() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast"):
            shapes.on_meta(aten.add.Tensor, (of(2), of(3)), {})


def test_it_forgets_before_it_takes_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LARGEST", 3)
    for size in range(10):
        shapes.on_meta(aten.neg.default, (of(size),), {})
    assert len(shapes.answers) <= 3


def test_a_step_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> tuple[int, int, int, list[Any]]:
        with VirtualGPU("H200") as gpu:
            with gpu.device:
                layers = [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in "12"]
                model, data = nn.Sequential(*layers), torch.empty(2, 16, 64)
            optimizer = torch.optim.AdamW(model.parameters())
            gpu.record_memory_history()
            model(data).square().mean().backward()
            optimizer.step()
            trace = gpu.snapshot()["device_traces"][0]
            events = [(entry["action"], entry["addr"], entry["size"]) for entry in trace]
            return (
                gpu.max_memory_allocated(),
                gpu.memory_reserved(),
                gpu.memory_allocated(),
                events,
            )

    remembering = step(), step()
    assert len(shapes.answers) > 50
    monkeypatch.setattr(shapes, "may_be_remembered", lambda func: False)
    assert step() == remembering[0] == remembering[1]


@pytest.mark.parametrize(("name", "batch"), [("addmm", ()), ("baddbmm", (4,))])
def test_a_product_that_names_its_dtype_takes_its_result_and_the_workspaces(
    name: str, batch: tuple[int, ...]
) -> None:
    """Not as their decompositions, which take the dtype for a factor."""
    product = getattr(torch, name)
    with VirtualGPU("H100", torch="2.11") as gpu:
        sizes = {"device": gpu.device, "dtype": torch.bfloat16}
        a, b = torch.empty(*batch, 64, 32, **sizes), torch.empty(*batch, 32, 128, **sizes)
        into = torch.empty(*batch, 64, 128, device=gpu.device)
        before = gpu.memory_allocated()
        product(into, a, b, out_dtype=torch.float32, out=into)
        assert gpu.memory_allocated() - before == 32 << 20  # cuBLAS's workspace
        found = product(into, a, b, out_dtype=torch.float32)
        assert found.shape == into.shape and found.dtype is torch.float32
        assert gpu.memory_allocated() - before == (32 << 20) + into.nbytes
        with pytest.raises(RuntimeError, match=r"same reduction dim|batch2"):
            product(into, a, a, out_dtype=torch.float32)
