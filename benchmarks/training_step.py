"""The virtual GPU beside PyTorch's own memory tracker: what they say, and how long they take.

Both follow one training step of the article's model with Adam, without a GPU, in
this same process. The peer, ``torch.distributed._tools.mem_tracker``, rounds each
tensor up to 512 B but has no model of the allocator and knows no workspaces.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from every_byte.allocator import CachingAllocator
from every_byte.allocator.history import TraceEntry
from every_byte.allocator.replay import replay_trace
from every_byte.gpu import VirtualGPU
from helpers.mlp import SimpleMLP

ROUNDS = 7
PUBLISHED = 833_577_472  # after the step: shown as 833 MB in the article's chart


def step(device: torch.device) -> tuple[nn.Module, optim.Optimizer, Callable[[], Any]]:
    """A model, its optimizer, and a function that trains one step."""
    with device:
        model, data = SimpleMLP(), torch.empty(128, 1, 28, 28)
        target = torch.empty(128, dtype=torch.int64)
    optimizer = optim.Adam(model.parameters(), foreach=True)

    def train() -> Any:
        output = model(data)
        loss = nn.functional.cross_entropy(output, target)
        loss.backward()
        optimizer.step()
        return output, loss

    return model, optimizer, train


def virtual_gpu() -> tuple[int, int]:
    """Bytes after the step, and at its peak, by the virtual GPU."""
    with VirtualGPU() as gpu:
        _model, _optimizer, train = step(gpu.device)
        _kept = train()
        return gpu.memory_allocated(), gpu.max_memory_allocated()


def mem_tracker() -> tuple[int, int]:
    """The same by PyTorch's tracker."""
    with FakeTensorMode():
        device = torch.device("cpu")
        model, optimizer, train = step(device)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            _kept = train()
            now = tracker.get_tracker_snapshot("current")[device]["Total"]
        return now, tracker.get_tracker_snapshot("peak")[device]["Total"]


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Print bytes and the ratio of times, pair by pair."""
    ours, theirs = virtual_gpu(), mem_tracker()  # the first of each also imports and warms up
    pairs = [(seconds(virtual_gpu), seconds(mem_tracker)) for _ in range(ROUNDS)]
    ratio = statistics.median(peer / own for own, peer in pairs)
    print(f"{'':14}{'after the step (B)':>20}{'off by (B)':>14}{'peak (B)':>16}")
    for name, (after, peak) in {"virtual GPU": ours, "mem_tracker": theirs}.items():
        print(f"{name:14}{after:20,}{after - PUBLISHED:14,}{peak:16,}")
    print(f"mem_tracker takes {ratio:.1f} times as long (median of {ROUNDS} pairs)")

    def replay() -> None:
        allocator, live = CachingAllocator(), list[int]()
        for i in range(100_000):
            if i % 3 == 2:
                allocator.free(live.pop((i * 7919) % len(live)))
            else:
                live.append(allocator.malloc((i * 104_729) % (16 * 2**20) + 1))

    own = min(seconds(replay) for _ in range(3))
    print(f"allocator: 100,000 events in {own:.2f} s")
    trace = recorded(100_000)
    compared = min(seconds(lambda: replay_trace(trace)) for _ in range(3))
    print(f"a recorded trace of {len(trace):,} events, compared after each: {compared:.2f} s")


def recorded(events: int) -> list[TraceEntry]:
    """A trace of at least so many events, as the allocator's model writes it."""
    allocator, live = CachingAllocator(), list[int]()
    allocator.record_memory_history()
    assert allocator.history is not None
    while len(allocator.history.entries) < events:
        i = len(allocator.history.entries)
        if i % 3 == 2:
            allocator.free(live.pop((i * 7919) % len(live)))
        else:
            live.append(allocator.malloc((i * 104_729) % (16 * 2**20) + 1))
    return list(allocator.history.entries)


if __name__ == "__main__":
    main()
