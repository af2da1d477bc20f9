"""Whole numbers keep their values on the virtual GPU; what is unknown is assumed or refused."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from every_byte import VirtualGPU
from every_byte.virtual.values import LARGEST, UnknownValueError


@pytest.fixture(name="gpu")
def open_one() -> Iterator[VirtualGPU]:
    with VirtualGPU(values="assume") as gpu:
        yield gpu


def here(data: Any) -> torch.Tensor:
    return torch.tensor(data, device="meta")


KNOWN = {
    "from the host": (lambda: torch.tensor([1, 2]).to("meta").tolist(), [1, 2]),
    "made there": (lambda: here([[1, 2]]).tolist(), [[1, 2]]),
    "arithmetic": (lambda: (torch.arange(4, device="meta") * 3 % 4).tolist(), [0, 3, 2, 1]),
    "item": (lambda: here([True, False]).any().item(), True),
    "if": (lambda: bool(here([True, False]).all()), False),
    "mask": (
        lambda: list(torch.zeros(3, 5, device="meta")[here([True, False, True])].shape),
        [2, 5],
    ),
    "nonzero": (lambda: here([0, 4, 5]).nonzero().tolist(), [[1], [2]]),
    "unique": (lambda: torch.unique(here([5, 1, 5])).tolist(), [1, 5]),
    "bincount": (lambda: torch.bincount(here([0, 2, 2])).tolist(), [1, 0, 2]),
    "masked_select": (
        lambda: here([7, 8, 9]).masked_select(here([True, False, True])).tolist(),
        [7, 9],
    ),
    "repeat": (lambda: torch.repeat_interleave(here([1, 3])).tolist(), [0, 1, 1, 1]),
    "one hot": (lambda: nn.functional.one_hot(here([0, 2])).tolist(), [[1, 0, 0], [0, 0, 1]]),
    "equal": (lambda: torch.equal(here([1, 2]), here([1, 2])), True),
    "small float": (lambda: (here([1.5, 2.0]).sum() / 2).item(), 1.75),
    "numpy": (lambda: here([3, 4]).cpu().numpy().tolist(), [3, 4]),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_known_values_answer_with_the_truth(gpu: VirtualGPU, name: str, mode: Any) -> None:
    read, expected = KNOWN[name]
    with mode():
        assert read() == expected
    assert not gpu.memory.values.assumptions


def test_views_and_operations_in_place_share_the_values_of_a_storage(gpu: VirtualGPU) -> None:
    numbers = torch.zeros(2, 3, dtype=torch.long, device="meta")
    column = numbers.t()[1]
    column.add_(5)
    numbers[0, 0] = 7
    numbers.data.view(-1)[-1:].copy_(torch.tensor([9]))
    assert numbers.tolist() == [[7, 5, 0], [0, 5, 9]]
    assert column.tolist() == [5, 5]


def test_a_small_float_is_unknown_once_something_unknown_is_written_to_it(gpu: VirtualGPU) -> None:
    total = torch.zeros((), device="meta")
    assert total.item() == 0
    total += torch.empty(100, 100, device="meta").mean()
    assert math.isnan(total.item())
    total.fill_(2)
    assert total.item() == 2


def test_what_is_unknown_is_assumed_once_and_said_with_its_lines(gpu: VirtualGPU) -> None:
    logits = torch.empty(2000, 10, device="meta")
    for _ in range(3):
        chosen = logits.argmax(1)
        assert chosen[0].item() == 0
    (assumption,) = gpu.memory.values.assumptions
    assert gpu.memory.values.assumptions[assumption] == 3
    assert (assumption.operation, assumption.answer) == ("item()", "0")
    assert assumption.line.startswith("test_values.py:")
    assert assumption.made_by.startswith("argmax at test_values.py:")


def test_unknown_numbers_are_healthy(gpu: VirtualGPU) -> None:
    x = torch.empty(100, 100, device="meta")
    assert not torch.isnan(x).any()
    assert not torch.isinf(x).any()
    assert torch.isfinite(x).all()
    assert (x.abs() < math.inf).all()
    assert not gpu.memory.values.assumptions


def test_a_result_of_unknown_size_is_as_large_as_it_can_be(gpu: VirtualGPU) -> None:
    x = torch.empty(100, 100, device="meta")
    assert x[x > 0].shape == (10_000,)
    assert torch.masked_select(x, x > 0).shape == (10_000,)
    assert torch.unique(x.argmax(1)).shape == (100,)
    assert len(gpu.memory.values.assumptions) == 3


def test_an_assumed_token_is_none_in_particular(gpu: VirtualGPU) -> None:
    token = torch.empty(4, 1000, device="meta").argmax(1)
    assert torch.isin(token, here([0, 2])).tolist() == [False] * 4


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean().item(),
        lambda x: bool(x.max() > 0),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.argmax(1).tolist(),
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_unless_told_to_assume_an_unknown_value_is_refused(read: Any) -> None:
    with VirtualGPU() as gpu:
        x = torch.empty(100, 100, device=gpu.device)
        with pytest.raises(UnknownValueError, match=r"at test_values\.py:\d+ .*values='assume'"):
            read(x)
        assert here([3]).item() == 3


def test_values_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="values is 'guess': expected 'assume' or 'refuse'"):
        VirtualGPU(values="guess")  # type: ignore[arg-type]


def test_the_copies_on_the_host_are_not_counted(gpu: VirtualGPU) -> None:
    mask = torch.zeros(1024, dtype=torch.long, device="meta")
    assert gpu.memory_allocated() == 8 * 1024
    for _ in range(3):
        (mask.add_(1) > 5).any().item()
        torch.isnan(mask.float()).any().item()
    assert gpu.memory_allocated() == 8 * 1024
    x = mask.cpu()
    assert gpu.memory_allocated() == 8 * 1024
    assert x.tolist() == [3] * 1024


def test_a_mask_is_turned_into_places_as_on_cuda(gpu: VirtualGPU) -> None:
    x = torch.empty(1000, 128, device="meta")
    mask = torch.arange(1000, device="meta") < 500
    gpu.reset_peak_memory_stats()
    before = gpu.memory_allocated()
    kept = x[mask]
    assert gpu.memory_allocated() - before == kept.nbytes == 500 * 512
    assert gpu.max_memory_allocated() - before == kept.nbytes + 4096  # 500 places of 8 B


def test_a_list_of_truth_values_is_no_index(gpu: VirtualGPU) -> None:
    x = torch.arange(12, device="meta").view(3, 4)
    assert x[[0, 2]].shape == (2, 4)
    with pytest.raises(NotImplementedError, match=r"write torch\.tensor\(\[\.\.\.\], device"):
        x[[True, False, True]]


def test_numbers_on_the_device_are_read_from_lists(gpu: VirtualGPU) -> None:
    one, two = torch.tensor([1, 2], device="meta").unbind()
    assert torch.tensor([[one, 3], [two, one]], device="meta").tolist() == [[1, 3], [2, 1]]
    assert torch.tensor([one, two]).tolist() == torch.as_tensor((one, two)).tolist() == [1, 2]
    assert not gpu.memory.values.assumptions
    assert torch.tensor([torch.empty(9999, device="meta").sum()]).isnan()
    assert [a.operation for a in gpu.memory.values.assumptions] == ["item()"]


def test_draws_leave_no_trace_in_the_programs_generator(gpu: VirtualGPU) -> None:
    before = torch.get_rng_state()
    first = torch.randint(0, 10**9, (3,), device="meta").tolist()
    assert torch.randint(0, 10**9, (3,), device="meta").tolist() != first
    assert torch.equal(torch.get_rng_state(), before)


def test_large_tensors_are_not_kept(gpu: VirtualGPU) -> None:
    large = torch.zeros(LARGEST + 1, dtype=torch.uint8, device="meta")
    assert not hasattr(large.untyped_storage(), "_every_byte_copy")


@pytest.mark.parametrize("size", [8, 3 << 20])
def test_zeros_are_those_of_the_tensor_alone(gpu: VirtualGPU, size: int) -> None:
    """Those of a large one are new pages: 8-bit optimizers make gigabytes of zeros."""
    numbers = torch.full((size,), 7, dtype=torch.uint8, device="meta")
    ends = numbers[:: size - 1]
    numbers[:3].zero_()
    assert (numbers[1:5].tolist(), ends.tolist()) == ([0, 0, 7, 7], [0, 7])
    before = gpu.memory.values.known(numbers)
    numbers.zero_()
    assert (numbers[1:5].tolist(), ends.tolist()) == ([0] * 4, [0, 0])
    assert before is not None and before[-1] == 7
    ends += 1
    assert numbers[size - 1].item() == 1


def test_an_unknown_tensor_has_its_shape_and_strides_on_the_host(gpu: VirtualGPU) -> None:
    x = torch.empty(64, 100, device="meta").t()
    host = x.cpu()
    assert (host.device.type, host.shape, host.stride()) == ("cpu", (100, 64), (1, 100))
    assert not host.any()
    host += 1  # a tensor of its own
    assert torch.empty((), device="meta").cpu().isnan()
    model = nn.Linear(100, 100).to("meta").cpu()
    assert model.weight.device.type == "cpu"


@pytest.mark.parametrize("long", [False, True])
def test_a_mask_of_floating_point_is_known(gpu: VirtualGPU, long: bool) -> None:
    dtype = torch.int64 if long else torch.float32
    mask = torch.ones(300, 300, dtype=dtype, device="meta").float()
    small = nn.functional.interpolate(mask[None, None], size=(12, 12))
    assert small[0, 0].sum(dim=1)[0].long().item() == 12
    assert not gpu.memory.values.assumptions
