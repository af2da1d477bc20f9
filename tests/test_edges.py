"""Rules at their edges: each of these was once a change to the code that no test noticed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

from every_byte.allocator import CachingAllocator
from every_byte.estimate import Setup, dimensions, fit, memory, parameters
from every_byte.gpu import VirtualGPU
from every_byte.tracker import scales, untracked
from every_byte.units import MiB
from every_byte.virtual.streams import streams_of


def test_a_batched_product_takes_a_workspace() -> None:
    with VirtualGPU() as gpu:
        a = torch.empty(2, 4, 4, device=gpu.device)
        product = torch.bmm(a, a)
        assert gpu.memory_allocated() == 8_519_680 + 2 * 512
        del product


@pytest.mark.filterwarnings("ignore")
def test_what_is_on_the_host_is_computed_there() -> None:
    def results() -> list[torch.Tensor]:
        x = torch.arange(24.0).reshape(1, 2, 3, 4).requires_grad_()
        y = F.softmax(x, -1) + F.layer_norm(x, (4,)) + x.cumsum(-1)
        y = F.scaled_dot_product_attention(y, y, y) + y.sort(-1).values @ y.mT @ y
        y.sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, x.nonzero(), x.unique(), x[x > 3], x[[0, 0], [1, 0]]]

    before = results()
    with VirtualGPU("RTX 4090") as gpu:
        during = results()
        assert gpu.max_memory_allocated() == 0
    for one, other in zip(before, during, strict=True):
        assert torch.equal(one, other)


def test_what_is_untracked_ends_with_an_error_too() -> None:
    with VirtualGPU() as gpu:
        with pytest.raises(KeyError), untracked():
            raise KeyError
        kept = torch.empty(1000, device=gpu.device)
        assert gpu.memory_allocated() == 4096
        del kept


def test_of_equal_peaks_the_first_is_the_peak() -> None:
    with VirtualGPU() as gpu, gpu.record() as timeline:
        for _ in range(3):
            kept = torch.empty(1000, device=gpu.device)
            del kept
    assert [step.total for step in timeline.steps] == [0, 4096, 0, 4096, 0, 4096, 0]
    assert timeline.peak == 1


def test_scales_of_scales_are_scales_with_their_code() -> None:
    layer = nn.Linear(2, 2, bias=False)
    tensors = [torch.empty(n) for n in (1, 2, 3, 4, 5)]
    nested = SimpleNamespace(absmax=tensors[3], code=tensors[4])
    layer.weight.quant_state = SimpleNamespace(  # type: ignore[attr-defined]
        absmax=tensors[0], code=tensors[1], offset=tensors[2], state2=nested
    )
    assert [t.numel() for t in scales(layer)] == [1, 2, 3, 4, 5]


def test_states_are_looked_at_before_each_step() -> None:
    """Made in the first step and gone before the recording ends: states all the same."""
    with VirtualGPU() as gpu:
        model = nn.Linear(1000, 1, bias=False, device=gpu.device)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with gpu.record(model, optimizer) as timeline:
            for _ in range(2):
                model(torch.empty(8, 1000, device=gpu.device)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.state.clear()
    assert max(step["optimizer states"] for step in timeline.steps) == 4000


def test_flash_attentions_backward_rounds_rows_to_128_and_columns_to_32() -> None:
    """flash_api.cpp, mha_bwd: softmax's sums for each row, and the query's gradient in FP32."""
    batch, heads, length, size = 1, 2, 130, 40
    with VirtualGPU() as gpu:

        def made() -> torch.Tensor:
            empty = torch.empty(batch, length, heads, size, device=gpu.device, dtype=torch.float16)
            return empty.transpose(1, 2)

        grad, query, key, value = (made() for _ in range(4))
        ways = torch.ops.aten._scaled_dot_product_flash_attention
        out, sums, *_, state, unused, _ = ways(query, key, value)
        del _
        before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(grad, query, key, value, out, sums, None, None, length, length, 0.0, False),
            *(state, unused),
        )
        peak = gpu.max_memory_allocated() - before
        del grads
    rows, columns = 256, 64
    gradients = 3 * -(-batch * length * heads * size * 2 // 512) * 512
    assert peak == gradients + 4 * heads * rows + 4 * rows * heads * columns


def test_master_weights_are_fp32() -> None:
    sizes = dimensions("gpt2")
    count = sum(parameters(sizes).values())
    found = memory(sizes, Setup(dtype="bf16", master_weights=True))
    assert found.optimizer_states == (2 * 2 + 4) * count


def test_half_of_an_odd_batch_is_rounded_up() -> None:
    found = fit.levers(dimensions("gpt2"), Setup(batch=5, length=1001))
    halved = {lever.name: lever.setup for lever in found}
    assert halved["half the batch"].batch == 3
    assert halved["half the length"].length == 501


# The allocator


def test_a_rest_of_one_mebibyte_stays_with_its_block() -> None:
    allocator = CachingAllocator()
    allocator.malloc(9 * MiB)
    allocator.malloc(10 * MiB)  # of the 11 MiB that are left of the segment of 20
    assert allocator.memory_allocated() == allocator.memory_reserved() == 20 * MiB


def test_a_request_of_the_largest_size_that_is_split_is_not_split_for() -> None:
    allocator = CachingAllocator(alloc_conf="max_split_size_mb:20")
    allocator.free(allocator.malloc(24 * MiB))
    allocator.malloc(20 * MiB)
    assert allocator.memory_allocated() == allocator.memory_reserved() == 24 * MiB


def test_of_equal_blocks_the_lowest_is_taken() -> None:
    allocator = CachingAllocator(alloc_conf="expandable_segments:True")
    handles = [allocator.malloc(20 * MiB) for _ in range(5)]
    for handle in (handles[3], handles[1]):
        allocator.free(handle)
    allocator.malloc(20 * MiB)
    (segment,) = allocator.memory_snapshot()
    free = [number for number, b in enumerate(segment["blocks"]) if b["state"] == "inactive"]
    assert free == [3]


def test_blocks_of_the_largest_size_that_is_split_are_given_back_as_needed() -> None:
    allocator = CachingAllocator(64 * MiB, "max_split_size_mb:20")
    for handle in [allocator.malloc(20 * MiB) for _ in range(3)]:
        allocator.free(handle)
    allocator.malloc(40 * MiB)
    assert allocator.memory_reserved() == 60 * MiB  # one of the three stays


def test_an_expandable_segment_has_addresses_for_nine_eighths_of_the_card() -> None:
    allocator = CachingAllocator(160 * MiB, "expandable_segments:True")
    allocator.malloc(20 * MiB, stream=0)
    allocator.malloc(20 * MiB, stream=1)
    first, second = (segment["address"] for segment in allocator.memory_snapshot())
    assert second - first == 180 * MiB


# One GPU of many


def test_a_stream_is_the_one_of_before_when_its_context_ends() -> None:
    device = SimpleNamespace(stream=3, new_stream=lambda: 7)
    streams = streams_of(device)
    with pytest.raises(KeyError), streams.stream(streams.Stream()):
        assert device.stream == 7
        raise KeyError
    assert device.stream == 3
