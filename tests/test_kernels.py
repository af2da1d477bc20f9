"""Every operation that an H200 measured by itself, by a few of its signatures.

Those with rules of their own have more of them in test_measured.py, and ``make proof`` has all.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.proof import CARD, DATA, SHOWN, TORCH, equal
from every_byte.gpu import VirtualGPU
from helpers import signatures

FEW = 4
LIBRARIES = ("conv", "linalg_", "_fft")  # of which nothing says beforehand what they choose


def measured() -> dict[str, list[signatures.Measured]]:
    others = set(json.loads(SHOWN.read_text("utf-8"))["others"])
    found = defaultdict(list)
    for one in signatures.measured(DATA / "kernels.json.xz"):
        by_library = any(name in one.operation for name in LIBRARIES)
        if one.group.startswith("single") and not by_library and one.signature not in others:
            found[one.operation].append(one)
    return {name: every[:: max(1, len(every) // FEW)] for name, every in found.items()}


MEASURED = measured()


@pytest.fixture(scope="module")
def card() -> Iterator[VirtualGPU]:
    with VirtualGPU(CARD, capacity=1 << 50, torch=TORCH) as gpu:
        yield gpu


@pytest.mark.parametrize("operation", MEASURED)
def test_an_operation_takes_what_it_took_on_the_card(card: VirtualGPU, operation: str) -> None:
    for one in MEASURED[operation]:
        events = signatures.replayed(card, one.signature)
        assert equal(one, events), (one.signature, events, one.variants)


def test_there_are_many_operations() -> None:
    assert len(MEASURED) > 40


def events(run: Callable[[], object], version: str = TORCH, card: str = CARD) -> list[int]:
    """What is taken and given back while `run` runs on a card, in order; tensors at the end."""
    found: list[int] = []
    with VirtualGPU(card, torch=version) as gpu, gpu.device, signatures.watched(gpu, found):
        kept = run()
        del kept
    return found


def test_a_running_sum_borrows_for_a_whole_tensor_alone() -> None:
    rows = events(lambda: torch.empty(4, 1000).cumsum(1))
    whole = events(lambda: torch.empty(4000).cumsum(0))
    assert [n for n in rows if n > 0] == [16_000, 16_000]
    assert len([n for n in whole if n > 0]) == 3


@pytest.mark.parametrize(("dtype", "digits"), [(torch.int64, 8), (torch.float32, 4)])
def test_the_largest_are_counted_by_digits_of_eight_bits(dtype: torch.dtype, digits: int) -> None:
    assert 2 * digits in events(lambda: torch.empty(10**6, dtype=dtype).topk(5))


def test_an_image_that_is_not_contiguous_is_copied_to_be_padded() -> None:
    image = torch.empty(2, 3, 8, 16, device="meta")
    pad = torch.ops.aten.reflection_pad2d.default

    def turned() -> object:
        return pad(torch.empty(image.shape).transpose(2, 3), [1, 1, 1, 1])

    assert [n for n in events(turned) if n > 0].count(image.nbytes) == 2
    assert [n for n in events(lambda: pad(torch.empty(image.shape), [1] * 4))].count(
        image.nbytes
    ) == 1


def test_grouped_products_fit_together() -> None:
    def run(inner: int) -> object:
        left = torch.empty(64, inner, dtype=torch.bfloat16)
        right = torch.empty(3, 32, 16, dtype=torch.bfloat16)
        offsets = torch.empty(3, dtype=torch.int32)
        return torch.ops.aten._grouped_mm(left, right, offsets)

    for card in ("RTX 4090", CARD):
        found = events(lambda: run(32), card=card)
        assert found[3] == 64 * 16 * 2
        for inner in (16, 48):
            with pytest.raises(RuntimeError, match="contraction dimension"):
                events(lambda inner=inner: run(inner), card=card)  # type: ignore[misc]


@pytest.mark.parametrize(("k", "sorts"), [(4096, False), (4097, True)])
def test_many_results_of_a_row_are_sorted_where_that_is_asked(k: int, sorts: bool) -> None:
    """As native/cuda/TensorTopK.cpp says: their places, their values and their order anew."""
    rows = 3

    def taken(in_order: bool) -> list[int]:
        return [
            n for n in events(lambda: torch.empty(rows, 5000).topk(k, sorted=in_order)) if n > 0
        ]

    more = [8 * rows * k, 4 * rows * k, 8 * rows * k] if sorts else []
    assert sorted(taken(True)) == sorted([*taken(False), *more])


def test_a_recurrent_layer_gives_what_it_was_given_first() -> None:
    given = {"batch_first": True, "proj_size": 2, "bidirectional": True}
    with VirtualGPU(CARD, torch=TORCH) as gpu:
        layer = torch.nn.LSTM(4, 6, **given).to(gpu.device)  # type: ignore[arg-type]
        output, (hidden, cell) = layer(torch.empty(3, 5, 4, device=gpu.device))
        assert output.shape == (3, 5, 4) and output.transpose(0, 1).is_contiguous()
    assert (hidden.shape, cell.shape) == ((2, 3, 2), (2, 3, 6))


def test_a_mask_is_padded_to_eight_columns() -> None:
    """As ``pad_bias`` in native/transformers/attention.cpp: by what is left to a multiple of 8."""
    batch, heads, length, keys = 2, 4, 16, 13

    def attend() -> object:
        query, key = torch.empty(batch, heads, length, 32), torch.empty(batch, heads, keys, 32)
        mask = torch.empty(batch, heads, length, keys)
        return torch.nn.functional.scaled_dot_product_attention(query, key, key, mask)

    found = events(attend)
    assert 4 * batch * heads * length * 16 in found
    assert 4 * batch * heads * length * 17 not in found
