"""The number formats: against torch.finfo, against PyTorch's casts, against bitsandbytes."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from every_byte.environment import formats
from every_byte.formats import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    FP64,
    TF32,
    Format,
    bytes_per_parameter,
    nf4_levels,
    number_format,
)

IN_TORCH = [known for known in FORMATS if known.dtype]
NAMES = [known.name for known in IN_TORCH]
INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
finite = st.floats(allow_nan=False, allow_infinity=False)


def dtype(known: Format) -> torch.dtype:
    found = getattr(torch, known.dtype)
    assert isinstance(found, torch.dtype)
    return found


def every_pattern(known: Format) -> tuple[torch.Tensor, list[float]]:
    """All numbers of a small format as PyTorch reads its bits, and as we do."""
    patterns = torch.arange(2**known.bits)
    ours = [known.decode(pattern) for pattern in patterns.tolist()]
    return patterns.to(INTEGERS[known.bits]).view(dtype(known)).double(), ours


# Golden: torch.finfo, and the figures of the standards.


@pytest.mark.parametrize("known", IN_TORCH, ids=NAMES)
def test_range_and_resolution_are_those_of_finfo(known: Format) -> None:
    info = torch.finfo(dtype(known))
    assert (known.max, known.eps, known.bits) == (info.max, info.eps, info.bits)
    assert known.smallest_normal == info.smallest_normal
    assert 10**-known.digits == pytest.approx(info.resolution)


@pytest.mark.parametrize(
    ("known", "largest", "normal", "subnormal"),
    [  # IEEE 754 table 3.5; arXiv 2209.05433 table 1; OCP Microscaling Formats table 5
        (FP64, (2 - 2**-52) * 2.0**1023, 2.0**-1022, 2.0**-1074),
        (FP32, (2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149),
        (TF32, (2 - 2**-10) * 2.0**127, 2.0**-126, 2.0**-136),
        (FP16, 65504.0, 2.0**-14, 2.0**-24),
        (E5M2, 57344.0, 2.0**-14, 2.0**-16),
        (E4M3, 448.0, 2.0**-6, 2.0**-9),
        (E2M1, 6.0, 1.0, 0.5),
    ],
)
def test_figures_of_the_standards(
    known: Format, largest: float, normal: float, subnormal: float
) -> None:
    assert (known.max, known.smallest_normal, known.smallest_subnormal) == (
        largest,
        normal,
        subnormal,
    )
    assert known.decode(1) == subnormal


def test_what_memory_holds() -> None:
    assert {f.name: f.storage_bits for f in FORMATS if f.storage_bits != f.bits} == {"TF32": 32}
    assert TF32.bits == 19
    assert FP16.fields(FP16.encode(-1.5)) == "1 01111 1000000000"


def test_the_patterns_of_e2m1_are_its_sixteen_numbers() -> None:
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [E2M1.decode(p) for p in range(16)] == positive + [-x for x in positive]


# Every pattern of the formats of up to 16 bits.


@pytest.mark.parametrize("known", [FP16, BF16, E5M2, E4M3], ids=lambda f: f.name)
def test_every_pattern_is_read_as_pytorch_reads_it(known: Format) -> None:
    theirs, ours = every_pattern(known)
    assert torch.equal(theirs.isnan(), torch.tensor(ours, dtype=torch.float64).isnan())
    assert all(a == b or math.isnan(b) for a, b in zip(theirs.tolist(), ours, strict=True))


@pytest.mark.parametrize(
    "known", [FP16, BF16, E5M2, E4M3, E2M1, TF32], ids=lambda known: known.name
)
def test_every_number_comes_back_as_its_pattern(known: Format) -> None:
    for pattern in range(2**known.bits):
        number = known.decode(pattern)
        if not math.isnan(number):
            assert known.encode(number) == pattern


# Properties.


@given(st.sampled_from(FORMATS), st.data())
def test_patterns_are_in_the_order_of_their_numbers(known: Format, data: st.DataObject) -> None:
    pattern = data.draw(st.integers(0, known.max_pattern - 1))
    assert known.decode(pattern) < known.decode(pattern + 1)


@given(st.sampled_from(FORMATS), finite, finite)
def test_rounding_keeps_the_order(known: Format, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert known.round(low) <= known.round(high)


@given(st.sampled_from([f for f in FORMATS if f is not FP64]), st.data())
def test_no_neighbour_is_nearer_and_ties_go_to_the_even(known: Format, data: st.DataObject) -> None:
    value = data.draw(st.floats(0, known.max))
    pattern = known.encode(value)
    error = abs(known.decode(pattern) - value)
    for neighbour in (pattern - 1, pattern + 1):
        if 0 <= neighbour <= known.max_pattern:
            other = abs(known.decode(neighbour) - value)
            assert error < other or (error == other and pattern % 2 == 0)


@given(st.sampled_from(FORMATS), st.floats())
def test_the_sign_is_a_bit_of_its_own(known: Format, value: float) -> None:
    if not math.isnan(value):
        assert known.encode(-value) == known.encode(value) ^ (1 << (known.bits - 1))


@given(finite)
def test_fp64_is_what_python_computes_with(value: float) -> None:
    assert FP64.encode(value) == int.from_bytes(struct.pack(">d", value))


@pytest.mark.parametrize("known", [FP32, BF16, FP16], ids=lambda known: known.name)
@given(value=finite)
def test_rounding_is_pytorchs_cast(known: Format, value: float) -> None:
    # PyTorch casts float64 to the half formats by way of float32: so do we here.
    single = torch.tensor(FP32.round(value), dtype=torch.float32)
    assert known.round(single.item()) == single.to(dtype(known)).item()


@pytest.mark.parametrize("known", [E5M2, E4M3], ids=lambda known: known.name)
@given(value=st.floats(-464, 464, width=32))  # beyond, PyTorch's own versions differ
def test_rounding_to_fp8_is_pytorchs_cast(known: Format, value: float) -> None:
    single = torch.tensor(value, dtype=torch.float32)
    assert known.round(value) == single.to(dtype(known)).float().item()


@pytest.mark.parametrize("known", [FP16, BF16], ids=lambda known: known.name)
def test_ties_between_all_neighbours_round_as_pytorch_does(known: Format) -> None:
    numbers = torch.tensor([known.decode(p) for p in range(known.max_pattern + 1)])
    ties = (numbers[:-1] + numbers[1:]) / 2  # exact in float32
    ours = torch.tensor([known.round(tie) for tie in ties.tolist()])
    assert torch.equal(ours, ties.to(dtype(known)).float())


# Beyond the range.


def test_beyond_the_range() -> None:
    assert FP16.round(65519.99) == 65504.0
    assert FP16.round(65520.0) == math.inf == torch.tensor(65520.0).half().item()
    assert FP16.round(-math.inf) == -math.inf
    assert E4M3.round(1e9) == 448.0 and E4M3.round(-math.inf) == -448.0
    assert E2M1.round(1e9) == 6.0
    assert FP16.round(2**-25) == 0.0 and FP16.round(math.nextafter(2**-25, 1)) == 2**-24
    assert all(math.isnan(known.round(math.nan)) for known in FORMATS if known is not E2M1)


# What is impossible is said in one line.


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no format is named 'fp12': there are FP64, .*E2M1$"):
        number_format("fp12")


@pytest.mark.parametrize(
    ("name", "known"),
    [("fp16", FP16), ("bfloat16", BF16), ("torch.float8_e4m3fn", E4M3), ("E5M2", E5M2)],
)
def test_formats_by_name(name: str, known: Format) -> None:
    assert number_format(name) is known


def test_patterns_that_do_not_exist() -> None:
    for pattern in (-1, 16):
        with pytest.raises(ValueError, match=r"no pattern of FP4 E2M1: 0 to 15"):
            E2M1.decode(pattern)
        with pytest.raises(ValueError, match="no pattern of FP4 E2M1"):
            E2M1.fields(pattern)
    with pytest.raises(ValueError, match="FP4 E2M1 has no NaN"):
        E2M1.encode(math.nan)


# Quantisation.


def test_nf4_levels_are_bitsandbytes_own(caplog: pytest.LogCaptureFixture) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu").double()
    ours = torch.tensor(nf4_levels(), dtype=torch.float64)
    assert (ours - theirs).abs().max() < 2**-22  # theirs were computed in FP32
    assert nf4_levels()[7] == 0.0 and len(set(nf4_levels())) == 16


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [  # QLoRA, section 3: 32 bits for 64 weights; 8 bits and 32 bits for 256 of these
        ((4,), 0.5),
        ((4, 64), 0.5625),
        ((4, 64, True), 0.5 + (8 / 64 + 32 / (64 * 256)) / 8),
        ((8, 1024), 1 + 4 / 1024),
        ((16,), 2.0),
    ],
)
def test_bytes_per_parameter(arguments: tuple[int, ...], expected: float) -> None:
    assert bytes_per_parameter(*arguments) == expected


def test_blocks_that_cannot_be() -> None:
    for block, double in ((-1, False), (0, True)):
        with pytest.raises(ValueError, match=rf"block is {block}: 0 for no scale"):
            bytes_per_parameter(4, block, double)


# What the machine has.


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "BF16 no, TF32 no; tensor cores for: none"),
        ((7, 5), "BF16 no, TF32 no; tensor cores for: FP16, INT8, INT4"),
        ((9, 0), "BF16 yes, TF32 yes; tensor cores for: FP64, TF32, BF16, FP16, FP8, INT8"),
        ((99, 0), "BF16 yes, TF32 yes; tensor cores for: not known"),
    ],
)
def test_formats_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    modern = capability >= (8, 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: modern)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: modern)
    assert formats().endswith(f"GPU: in hardware: {expected}")
