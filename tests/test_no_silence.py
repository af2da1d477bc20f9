"""No path leads from a program that allocates to an answer that leaves it out.

One property over the public surface: however a program makes tensors on a virtual card, in
whatever surroundings, each figure that it may ask for has at least the bytes that are alive by
then, or something on the way was refused with an error.
"""

import _thread
import asyncio
import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint

from every_byte import VirtualGPU, as_cuda

N = 3000
pytestmark = pytest.mark.filterwarnings("ignore")


# What is alive, by the storages themselves: nothing of the engine's


def tensors(made: Any) -> Iterator[Any]:
    match made:
        case Tensor() | torch.UntypedStorage():
            yield made
        case nn.Module():
            yield from made.buffers()
            for parameter in made.parameters():
                yield from (t for t in (parameter, parameter.grad) if t is not None)
        case optim.Optimizer():
            yield from tensors(list(made.state.values()))
        case list() | tuple():
            for each in made:
                yield from tensors(each)
        case dict():
            yield from tensors(list(made.values()))


def alive(made: Any) -> int:
    """Bytes of all storages on the card, each once, in blocks of 512 B."""
    storages: dict[int, int] = {}
    with torch._C.DisableTorchFunction():
        for each in tensors(made):
            storage = each.untyped_storage() if isinstance(each, Tensor) else each
            if storage.device.type == "meta":
                storages[storage._cdata] = storage.nbytes()
    return sum(-(-nbytes // 512) * 512 for nbytes in storages.values())


# Ways to make tensors


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad


class Held(Tensor):
    """A tensor that computes by another one, and does not say by which."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return Tensor._make_wrapper_subclass(cls, inner.shape, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [a.inner if isinstance(a, Held) else a for a in args]
        return Held(func(*inner, **(kwargs or {})))


class Named(Tensor):
    pass


class Box:
    def __init__(self, held: Tensor) -> None:
        self.held = held


def loaded(what: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


def layer(d: Any) -> nn.Module:
    return nn.Linear(50, 60, device=d)


def step(model: nn.Module, d: Any, **options: Any) -> list[Any]:
    optimizer = optim.AdamW(model.parameters(), **options)
    model(torch.ones(3, 50, device=d)).sum().backward()
    optimizer.step()
    return [model, optimizer]


def of_a_hook(d: Any) -> list[Any]:
    kept: list[Tensor] = []
    x = torch.ones(N, device=d, requires_grad=True)
    x.register_hook(lambda grad: kept.append(torch.zeros(N, device=d)))
    (x * 2).sum().backward()
    return [x, x.grad, kept]


def of_a_default(d: Any) -> list[Any]:
    torch.set_default_device(d)
    try:
        return [torch.zeros(N), torch.tensor([1.0] * N), nn.Linear(50, 60)]
    finally:
        torch.set_default_device(None)


def of_a_context(d: Any) -> list[Any]:
    with torch.device(d):
        return [torch.zeros(N), torch.tensor([1.0] * N), nn.Linear(50, 60)]


def resized(d: Any) -> list[Tensor]:
    one, other = torch.zeros(N, device=d), torch.zeros(N, device=d)
    one.resize_(10 * N)
    other.untyped_storage().resize_(40 * N)
    return [one, other]


def set_data(d: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(1, device=d))
    parameter.data = torch.zeros(N, device=d)
    parameter.grad = torch.zeros(N, device=d)
    return parameter


def of_a_process(d: Any) -> Any:
    """What a forked process makes lies on the same card."""
    process = multiprocessing.get_context("fork").Process(
        target=torch.zeros, args=(N,), kwargs={"device": d}
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the other process was refused")
    return torch.zeros(10**6, device="meta")  # which is counted by nobody


def placed(d: Any) -> Any:
    return {"map_location": d} if d == "cuda" else {}


WAYS: dict[str, Callable[[Any], Any]] = {
    "empty": lambda d: torch.empty(N, device=d),
    "factories": lambda d: [
        *(make(N, device=d) for make in (torch.zeros, torch.ones, torch.rand, torch.randn)),
        *(make(N, device=d) for make in (torch.arange, torch.randperm, torch.hann_window)),
        *(torch.full((N,), 2, device=d), torch.eye(60, device=d), torch.randint(9, (N,), device=d)),
        *(torch.linspace(0, 1, N, device=d), torch.empty_strided((N,), (2,), device=d)),
        *(torch.scalar_tensor(3.0, device=d), torch.tril_indices(50, 60, device=d)),
        torch.normal(0.0, 1.0, (N,), device=d),
    ],
    "from data": lambda d: [
        *(make([1.0] * N, device=d) for make in (torch.tensor, torch.as_tensor, torch.asarray)),
        torch.from_numpy(np.zeros(N)).to(d),
        torch.as_tensor(np.zeros(N), device=d),
        torch.frombuffer(bytearray(4 * N), dtype=torch.float32).to(d),
    ],
    "like": lambda d: [
        x := torch.zeros(N, device=d),
        *(make(x) for make in (torch.empty_like, torch.ones_like, torch.rand_like)),
        *(x.new_zeros(N), x.new_tensor([1.0] * N), x.new_full((N,), 1.0), x.new(N)),
        *(torch.zeros_like(torch.zeros(N), device=d), torch.zeros(1).new_zeros(N, device=d)),
    ],
    "converted": lambda d: [
        x := torch.zeros(N, device=d),
        *(x.half(), x.double(), x.to(torch.int64), x.type(torch.bfloat16), x.bool(), x.clone()),
    ],
    "to": lambda d: [torch.zeros(N).to(d), torch.zeros(N).to(torch.zeros(1, device=d))],
    "cuda": lambda d: [torch.zeros(N).cuda(), layer("cpu").cuda(), torch.zeros(N).to(0)],
    "pinned": lambda d: torch.zeros(N).pin_memory().to(d, non_blocking=True),
    "legacy": lambda d: [torch.zeros(N).type("torch.cuda.FloatTensor"), torch.cuda.FloatTensor(N)],
    "generator": lambda d: torch.randn(N, device=d, generator=torch.Generator(d)),
    "copied": lambda d: [
        x := torch.zeros(N, device=d),
        *(copy.deepcopy(x), copy.copy(x), copy.deepcopy(layer(d))),
    ],
    "pickled": lambda d: pickle.loads(pickle.dumps(torch.zeros(N, device=d))),
    "loaded": lambda d: loaded({"a": [torch.zeros(N)]}, **placed(d)),
    "loaded by name": lambda d: loaded(torch.zeros(N), map_location={"cpu": str(d)}),
    "loaded as it was": lambda d: loaded({"a": torch.zeros(N, device=d), "b": layer(d)}),
    "loaded in a box": lambda d: [box := loaded(Box(torch.zeros(N, device=d))), box.held],
    "storages": lambda d: [
        storage := torch.UntypedStorage(4 * N, device=d),
        *(torch.empty(0, device=d).set_(storage), storage.clone()),
    ],
    "resized": resized,
    "set": set_data,
    "to_empty": lambda d: [
        layer("meta").to_empty(device=d),
        nn.utils.skip_init(nn.Linear, 50, 60, device=d),
    ],
    "assigned": lambda d: [
        model := layer("cpu"),
        model.load_state_dict({k: v.to(d) for k, v in model.state_dict().items()}, assign=True),
    ],
    "averaged": lambda d: [model := layer(d), optim.swa_utils.AveragedModel(model)],
    "lazy": lambda d: [model := nn.LazyLinear(50, device=d), model(torch.zeros(2, 60, device=d))],
    "recurrent": lambda d: [m := nn.LSTM(30, 40).to(d), m(torch.zeros(5, 2, 30, device=d))],
    "trained": lambda d: [step(layer(d), d), step(layer("cpu").to(d), d, fused=True)],
    "compiled": lambda d: [model := layer(d), torch.compile(model)(torch.ones(3, 50, device=d))],
    "checkpointed": lambda d: [
        x := torch.ones(N, device=d, requires_grad=True),
        checkpoint(lambda x: x.sin().cos(), x, use_reentrant=False),
    ],
    "function": lambda d: Doubled.apply(torch.ones(N, device=d, requires_grad=True)),
    "hook": of_a_hook,
    "vmap": lambda d: torch.func.vmap(lambda x: x * 2)(torch.ones(9, N, device=d)),
    "grad": lambda d: torch.func.grad(lambda x: (x * 2).sum())(torch.ones(N, device=d)),
    "out": lambda d: torch.mul(torch.ones(N, device=d), 2, out=torch.empty(0, device=d)),
    "foreach": lambda d: torch._foreach_mul([torch.ones(N, device=d)], 2),
    "subclass": lambda d: [
        torch.zeros(N, device=d).as_subclass(Named),
        nn.Buffer(torch.zeros(N, device=d)),
    ],
    "wrapper": lambda d: [(w := Held(torch.zeros(N, device=d))).inner, (w * 2).inner],
    "default": of_a_default,
    "context": of_a_context,
    "process": of_a_process,
    "jagged": lambda d: torch.nested.nested_tensor(
        [torch.zeros(N), torch.zeros(9)], device=d, layout=torch.jagged
    ).values(),
    "sparse": lambda d: torch.eye(50, device=d).to_sparse().values(),
    "dlpack": lambda d: torch.from_dlpack(torch.zeros(N, device=d)),
}


# Surroundings


def in_a_thread(way: Callable[[Any], Any], d: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(way, d).result()


def in_threads(way: Callable[[Any], Any], d: Any) -> Any:
    return in_a_thread(lambda d: in_a_thread(way, d), d)


def in_a_bare_thread(way: Callable[[Any], Any], d: Any) -> Any:
    made: list[Any] = []
    done = threading.Event()

    def run(**options: Any) -> None:
        try:
            made.append(way(options["d"]))
        except Exception as error:
            made.append(error)
        done.set()

    _thread.start_new_thread(run, (), {"d": d})
    assert done.wait(60)
    if isinstance(made[0], Exception):
        raise made[0]
    return made


def within(context: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    def surrounded(way: Callable[[Any], Any], d: Any) -> Any:
        with context():
            return way(d)

    return surrounded


SURROUNDINGS: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
    "plain": lambda way, d: way(d),
    "thread": in_a_thread,
    "thread of a thread": in_threads,
    "bare thread": in_a_bare_thread,
    "asyncio": lambda way, d: asyncio.run(asyncio.to_thread(way, d)),
    "no_grad": within(torch.no_grad),
    "inference": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cuda", dtype=torch.bfloat16)),
    "stream": within(lambda: torch.cuda.stream(torch.cuda.Stream())),
    "default device": within(lambda: torch.device("cpu")),
}


# Figures


def asked_of_cuda(gpu: VirtualGPU) -> dict[str, int]:
    cuda, free = torch.cuda, torch.cuda.mem_get_info()
    return {
        "cuda.memory_allocated": cuda.memory_allocated(),
        "cuda.max_memory_allocated": cuda.max_memory_allocated(),
        "cuda.memory_reserved": cuda.memory_reserved("cuda:0"),
        "cuda.memory_stats": cuda.memory_stats()["allocated_bytes.all.current"],
        "cuda.mem_get_info": free[1] - free[0] - gpu.memory.context,
        "accelerator.memory_allocated": torch.accelerator.memory_allocated(),
    }


def asked(gpu: VirtualGPU) -> dict[str, int]:
    segments = gpu.snapshot()["segments"]
    free, total = gpu.mem_get_info()
    return {
        "memory_allocated": gpu.memory_allocated(),
        "max_memory_allocated": gpu.max_memory_allocated(),
        "memory_reserved": gpu.memory_reserved(),
        "breakdown": gpu.breakdown().total,
        "snapshot": sum(
            b["size"] for s in segments for b in s["blocks"] if b["state"] != "inactive"
        ),
        "memory_snapshot": sum(s["allocated_size"] for s in gpu.memory_snapshot()),
        "mem_get_info": total - free - gpu.memory.context,
    }


FRONTS = ("as_cuda", "VirtualGPU")


def check(front: str, program: list[tuple[str, str]]) -> list[str]:
    """Run a program, and ask after each of its lines; returns the lines that were not refused."""
    is_cuda, kept, done = front == "as_cuda", [], []
    with as_cuda("RTX 4090") if is_cuda else VirtualGPU("RTX 4090") as gpu:
        device = "cuda" if is_cuda else gpu.device
        with gpu.record() as timeline:
            for way, surroundings in program:
                try:
                    kept.append(SURROUNDINGS[surroundings](WAYS[way], device))
                except Exception:  # refused: that is no answer
                    continue
                done.append(way)
                expected = alive(kept)
                for what, told in (asked(gpu) | (asked_of_cuda(gpu) if is_cuda else {})).items():
                    assert told >= expected, f"{what}: {told:,} B of {expected:,} B, {way}"
        assert timeline.steps[-1].total >= alive(kept)
    return done


# What is refused where; everything else has to work, so that the property is not empty.
REFUSED = {
    "as_cuda": {"loaded in a box", "process", "sparse", "dlpack"},
    "VirtualGPU": {"cuda", "generator", "pinned", "process", "sparse", "dlpack", "legacy"},
}


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_counted_or_refused(front: str, way: str) -> None:
    assert check(front, [(way, "plain")]) == ([] if way in REFUSED[front] else [way])


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(FRONTS),
    st.lists(
        st.tuples(st.sampled_from(sorted(WAYS)), st.sampled_from(sorted(SURROUNDINGS))), max_size=5
    ),
)
def test_any_program_is_counted_or_refused(front: str, program: list[tuple[str, str]]) -> None:
    check(front, program)


def test_what_is_made_on_a_closed_gpus_device_is_told_of() -> None:
    gpu = VirtualGPU("RTX 4090").open()
    device = gpu.device
    gpu.close()
    kept = layer(device)
    with pytest.warns(UserWarning, match="is closed, and its figures leave out") as told:
        gpu.max_memory_allocated()
    words = str(told[0].message).replace(",", "").split()
    assert int(words[words.index("bytes") - 1]) >= sum(p.nbytes for p in kept.parameters())


@pytest.mark.parametrize("way", ["empty", "to", "cuda", "from data", "context", "default"])
def test_nothing_is_made_on_a_card_that_was_closed(way: str) -> None:
    with as_cuda("RTX 4090") as gpu:
        gpu.close()
        with pytest.raises(RuntimeError, match="is not open: what is made on its device now"):
            WAYS[way]("cuda")
