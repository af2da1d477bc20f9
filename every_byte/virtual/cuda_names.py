"""What ``torch.cuda`` and ``torch.accelerator`` answer for a virtual card.

`cuda_names` puts answers in the place of PyTorch's functions, under their names, and
takes them away again. A card that computes nothing is never busy: streams and events
are ready at once, and time between events is 0 ms. Which stream memory is taken on
is kept, since the caching allocator asks for it.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import torch

from every_byte.virtual.rules import Rules

# Without a named card the kernels are those of an A100 (`every_byte.virtual.kernels`).
_A100 = Rules(compute_capability=(8, 0), multiprocessors=108, version=(2, 14))


Card: TypeAlias = Any  # an every_byte.gpu.VirtualGPU, which stands above this module


def index_of(device: Any) -> int:
    """The number of a device as programs name it: None, 0, "cuda", "cuda:0", or a device.

    Raises:
        RuntimeError: there is no such card, in CUDA's words.
    """
    if device is None:
        return 0
    if isinstance(device, str):
        device = torch.device(device)
    index = device if isinstance(device, int) else device.index
    if index not in (None, 0, -1):
        raise RuntimeError(
            "CUDA error: invalid device ordinal\n"
            f"(the virtual machine has one card, cuda:0; asked for was cuda:{index})"
        )
    return 0


class Stream:
    """A stream of the virtual card: `stream_id` says which memory it takes."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        index_of(device)
        self.device = torch.device("cuda", 0)
        self.device_index, self.device_type = 0, 1  # DeviceType::CUDA
        self.priority = priority
        memory = _card().memory
        self.stream_id = kwargs["stream_id"] if "stream_id" in kwargs else memory.new_stream()
        self.cuda_stream = self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def __enter__(self) -> "Stream":
        memory = _card().memory
        self._before, memory.stream = memory.stream, self.stream_id
        return self

    def __exit__(self, *_: object) -> None:
        _card().memory.stream = self._before

    def record_event(self, event: Any = None) -> "Event":
        """An event that has happened."""
        return event if event is not None else Event()

    def query(self) -> bool:
        """Whether all is done: it is."""
        return True

    def is_capturing(self) -> bool:
        """Whether it captures a CUDA graph: none is."""
        return False

    def synchronize(self, *_: object) -> None:
        """Wait for nothing."""

    wait_event = wait_stream = synchronize


class DeviceGuard:
    """``torch.cuda.device``: there is one card, which is chosen already."""

    def __init__(self, device: Any = None) -> None:
        self.idx = index_of(device)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class DeviceOfTensor(DeviceGuard):
    """``torch.cuda.device_of``."""

    def __init__(self, obj: Any) -> None:
        super().__init__()


class Event:
    """An event of the virtual card, which happens at once."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Happen."""

    wait = synchronize = record

    def query(self) -> bool:
        """Whether it has happened: it has."""
        return True

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds until another: nothing is computed, so none."""
        return 0.0


class _Legacy(type):
    """The kind of ``torch.cuda.FloatTensor`` and its like, of before PyTorch 0.4."""

    dtype: torch.dtype

    def __call__(cls, *args: Any, **_: Any) -> torch.Tensor:
        if len(args) == 1 and not isinstance(args[0], (int, torch.Size)):
            return torch.tensor(args[0], dtype=cls.dtype, device="cuda")
        return torch.empty(*(args or (0,)), dtype=cls.dtype, device="cuda")

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.Tensor) and (
            instance.is_cuda and instance.dtype is cls.dtype
        )


LEGACY: dict[str, Any] = {
    name: _Legacy(name, (), {"dtype": dtype, "__module__": "torch.cuda"})
    for name, dtype in {
        "HalfTensor": torch.float16,
        "BFloat16Tensor": torch.bfloat16,
        "FloatTensor": torch.float32,
        "DoubleTensor": torch.float64,
        "BoolTensor": torch.bool,
        "ByteTensor": torch.uint8,
        "CharTensor": torch.int8,
        "ShortTensor": torch.int16,
        "IntTensor": torch.int32,
        "LongTensor": torch.int64,
    }.items()
}
"""Names of ``torch.cuda``: the old kinds of tensor."""


def legacy_dtype(kind: Any) -> torch.dtype | None:
    """The dtype of an old kind of CUDA tensor, or of its name; None if it is none."""
    if isinstance(kind, str) and kind.startswith("torch.cuda."):
        kind = LEGACY.get(kind.removeprefix("torch.cuda."))
    return kind.dtype if isinstance(kind, _Legacy) else None


_GRAPHS = "CUDA graphs keep memory of their own; run without them here"
_POOLS = "memory of other pools and allocators; leave PyTorch's own in place here"
_RAW = "memory without a tensor; make a tensor of torch.uint8 instead"
_HANDLES = "what the libraries of a real GPU know; leave it out here"
_REFUSED = {
    **dict.fromkeys(("CUDAGraph", "graph", "make_graphed_callables"), _GRAPHS),
    **dict.fromkeys(("MemPool", "use_mem_pool"), _POOLS),
    **dict.fromkeys(("CUDAPluggableAllocator", "change_current_allocator"), _POOLS),
    **dict.fromkeys(("caching_allocator_alloc", "caching_allocator_delete"), _RAW),
    **dict.fromkeys(("current_blas_handle", "current_solver_handle", "GreenContext"), _HANDLES),
}
"""Names of ``torch.cuda`` that are not replayed, and what is not."""


def _refusals() -> dict[str, Any]:
    def refusal(name: str, what: str) -> Any:
        def refuse(*_: object, **__: object) -> None:
            raise NotImplementedError(f"torch.cuda.{name} is not replayed on a virtual GPU: {what}")

        is_class = isinstance(getattr(torch.cuda, name), type)
        return type(name, (), {"__init__": refuse}) if is_class else refuse

    return {n: refusal(n, what) for n, what in _REFUSED.items() if hasattr(torch.cuda, n)}


_cards: list[Card] = []  # in use; the last one answers


def _card() -> Card:
    return _cards[-1]


def memory_stats(card: Card) -> OrderedDict[str, Any]:
    """As ``torch.cuda.memory_stats``, of what the replay knows; what it does not count is 0.

    Not counted are what was allocated and freed since the start, and peaks but those of all
    bytes allocated, active, reserved and requested.
    """
    stats: dict[str, Any] = {}
    for kind in (
        *("allocation", "segment", "active", "inactive_split"),
        *("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes"),
        "requested_bytes",
    ):
        for pool in ("all", "small_pool", "large_pool"):
            for what in ("current", "peak", "allocated", "freed"):
                stats[f"{kind}.{pool}.{what}"] = 0
    for kind in ("oversize_allocations", "oversize_segments"):
        for what in ("current", "peak", "allocated", "freed"):
            stats[f"{kind}.{what}"] = 0
    stats |= asdict(card.memory.counts)
    largest = card.memory.config.max_split_size
    stats["max_split_size"] = -1 if largest == sys.maxsize else largest
    for kind in ("allocated_bytes", "active_bytes"):
        stats[f"{kind}.all.current"] = card.memory_allocated()
        stats[f"{kind}.all.peak"] = card.max_memory_allocated()
    stats["reserved_bytes.all.current"] = card.memory_reserved()
    stats["reserved_bytes.all.peak"] = card.max_memory_reserved()
    stats["requested_bytes.all.current"] = card.memory.memory_requested()
    stats["requested_bytes.all.peak"] = card.memory.max_memory_requested()
    for segment in card.memory_snapshot():
        pool = {"small": "small_pool", "large": "large_pool"}[segment["segment_type"]]
        for of in ("all", pool):
            stats[f"segment.{of}.current"] += 1
            for block in segment["blocks"]:
                if block["state"].startswith("active"):
                    stats[f"allocation.{of}.current"] += 1
                    stats[f"active.{of}.current"] += 1
                elif len(segment["blocks"]) > 1:  # a part of a segment that is split
                    stats[f"inactive_split.{of}.current"] += 1
                    stats[f"inactive_split_bytes.{of}.current"] += block["size"]
        stats[f"reserved_bytes.{pool}.current"] += segment["total_size"]
        stats[f"requested_bytes.{pool}.current"] += segment["requested_size"]
        stats[f"allocated_bytes.{pool}.current"] += segment["allocated_size"]
        stats[f"active_bytes.{pool}.current"] += segment["allocated_size"]
    return OrderedDict(sorted(stats.items()))


def _answers(card: Card) -> dict[str, Callable[..., Any] | type]:
    """Names of ``torch.cuda``: their answers."""
    memory = card.memory
    rules = memory.rules or _A100
    capability = rules.compute_capability

    def nothing() -> Callable[..., None]:  # one for each name: torch._dynamo tells them apart
        return lambda *_, **__: None

    def properties(device: Any = None) -> SimpleNamespace:
        index_of(device)
        return SimpleNamespace(
            name=memory.name,
            major=capability[0],
            minor=capability[1],
            total_memory=card.mem_get_info()[1],
            multi_processor_count=rules.multiprocessors,
            max_threads_per_multi_processor=rules.threads,
            warp_size=32,
            is_integrated=0,
            is_multi_gpu_board=0,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=49152,
            gcnArchName=memory.name,
            uuid="00000000-0000-0000-0000-000000000000",
        )

    def of_device(answer: Callable[[], Any]) -> Callable[..., Any]:
        def asked(device: Any = None, *_: object, **__: object) -> Any:
            index_of(device)
            return answer()

        return asked

    @contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        before = memory.stream
        memory.stream = before if chosen is None else chosen.stream_id
        try:
            yield
        finally:
            memory.stream = before

    def set_stream(chosen: Any) -> None:
        memory.stream = chosen.stream_id

    def current_stream(device: Any = None) -> Stream:
        return Stream(stream_id=memory.stream)

    def default_stream(device: Any = None) -> Stream:
        return Stream(stream_id=0)

    def refuse_fraction(fraction: float, device: Any = None) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        total = card.mem_get_info()[1]
        memory.allowed = int(total * fraction)
        allowed[0] = fraction

    allowed = [1.0]

    def record_history(enabled: Any = "all", *_: object, **options: Any) -> None:
        more = {"max_entries": options["max_entries"]} if "max_entries" in options else {}
        card.record_memory_history("all" if enabled else None, **more)

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return capability >= (8, 0)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing(),
        "_lazy_init": nothing(),
        "_is_compiled": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": of_device(lambda: None),
        "device": DeviceGuard,
        "device_of": DeviceOfTensor,
        "get_device_name": of_device(lambda: memory.name),
        "get_device_capability": of_device(lambda: capability),
        "get_device_properties": properties,
        "get_arch_list": lambda: [f"sm_{capability[0]}{capability[1]}"],
        "can_device_access_peer": lambda *_: False,
        "is_bf16_supported": is_bf16_supported,
        "is_tf32_supported": lambda: capability >= (8, 0),
        "is_current_stream_capturing": lambda: False,
        "synchronize": of_device(lambda: None),
        "ipc_collect": nothing(),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        **LEGACY,
        **_refusals(),
        **{n: of_device(lambda: 0) for n in ("clock_rate", "power_draw", "temperature")},
        "utilization": of_device(lambda: 0),
        "memory_usage": of_device(lambda: 0),
        # random numbers are drawn on the host
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "seed": nothing(),
        "seed_all": nothing(),
        "initial_seed": lambda: torch.initial_seed(),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8, device="cpu")],
        "set_rng_state": nothing(),
        "set_rng_state_all": nothing(),
        # memory
        "memory_allocated": of_device(card.memory_allocated),
        "max_memory_allocated": of_device(card.max_memory_allocated),
        "memory_reserved": of_device(card.memory_reserved),
        "max_memory_reserved": of_device(card.max_memory_reserved),
        "memory_cached": of_device(card.memory_reserved),
        "max_memory_cached": of_device(card.max_memory_reserved),
        "reset_peak_memory_stats": of_device(card.reset_peak_memory_stats),
        "reset_max_memory_allocated": of_device(card.reset_peak_memory_stats),
        "reset_max_memory_cached": of_device(card.reset_peak_memory_stats),
        "reset_accumulated_memory_stats": of_device(memory.reset_accumulated_memory_stats),
        "empty_cache": card.empty_cache,
        "mem_get_info": of_device(card.mem_get_info),
        "memory_stats": of_device(lambda: memory_stats(card)),
        "memory_snapshot": lambda *_, **__: card.memory_snapshot(),
        "set_per_process_memory_fraction": refuse_fraction,
        "get_per_process_memory_fraction": of_device(lambda: allowed[0]),
        "device_memory_used": of_device(lambda: card.mem_get_info()[1] - card.mem_get_info()[0]),
        "list_gpu_processes": of_device(lambda: f"GPU:0\nprocess: this one, on {memory.name}"),
        "get_allocator_backend": lambda: "native",
        "_record_memory_history": record_history,
        "_snapshot": lambda *_, **__: card.snapshot(),
        "_dump_snapshot": card.dump_snapshot,
    }


def _again(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The same answer as a function of its own."""
    return lambda *args, **kwargs: answer(*args, **kwargs)


def _accelerators(card: Card, answers: dict[str, Any]) -> dict[str, Any]:
    """Names of ``torch.accelerator``: their answers."""
    same = (
        *("is_available", "device_count", "synchronize", "current_stream", "set_stream"),
        *("empty_cache", "memory_allocated", "max_memory_allocated", "memory_reserved"),
        *("max_memory_reserved", "reset_peak_memory_stats", "memory_stats"),
        *("reset_accumulated_memory_stats",),
    )
    return {
        **{name: _again(answers[name]) for name in same},
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": _again(answers["current_device"]),
        "current_device_idx": _again(answers["current_device"]),
        "set_device_index": _again(answers["set_device"]),
        "set_device_idx": _again(answers["set_device"]),
        "device_index": _again(answers["device"]),
        "get_memory_info": _again(answers["mem_get_info"]),
    }


@contextmanager
def cuda_names(card: Card) -> Iterator[None]:
    """Let a virtual card answer for ``torch.cuda`` and ``torch.accelerator``."""
    answers = _answers(card)
    modules: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, answers),
        (torch.cuda.memory, {name: answers[name] for name in answers if _is_in(name)}),
        (torch.cuda.random, {name: answers[name] for name in answers if "rng" in name}),
        (torch.accelerator, _accelerators(card, answers)),
        (torch, {name: answers[name] for name in ("Stream", "Event")}),
    ]
    with ExitStack() as stack:
        for module, names in modules:
            for name, answer in names.items():
                stack.enter_context(mock.patch.object(module, name, answer, create=True))
        _cards.append(card)
        stack.callback(_cards.remove, card)
        yield


def _is_in(name: str) -> bool:
    return hasattr(torch.cuda.memory, name) and name != "is_initialized"
