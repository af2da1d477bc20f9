"""Programs that ran on an H100 while nobody looked on, replayed on the virtual one."""

import json
import lzma
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from benchmarks import unwatched
from benchmarks.proof import ASSUMING, DATA, equal, of
from every_byte.gpu import VirtualGPU
from helpers import signatures
from helpers.measured import UNWATCHED, peak_off, read_unwatched, unwatched_pairs

EXTENSION = "records"
TOLD = read_unwatched()
# Of every kind one; those of transformers take what 5.17 takes with the version installed, too.
EQUAL = (
    *("embedding-layernorm", "gpt2-infer-fp16", "gpt2-fp32-dropout", "llama1b-bf16-sgd", "lstm"),
    *("recurrent/LSTMCell", "recurrent/GRU", "libraries/torch: checkpoint"),
)


@pytest.mark.parametrize("name", EQUAL)
def test_a_program_takes_what_it_took_on_the_card(name: str) -> None:
    """Allocated, reserved, and both peaks, at every checkpoint."""
    assert unwatched.replayed(name, "H100", "2.11") == TOLD["programs"][name]["figures"]


@pytest.mark.parametrize("name", ["recurrent/RNN", "recurrent/bidirectional LSTM"])
def test_a_bound_of_recurrent_layers_holds(name: str) -> None:
    measured = TOLD["programs"][name]["figures"]
    assert 0 <= peak_off(measured, unwatched.replayed(name, "H100", "2.11")) < 0.05


@pytest.mark.parametrize("name", ["gpt2-infer-fp16", "lstm"])
def test_the_least_memory_is_what_was_said_before_the_card_was_asked(name: str) -> None:
    assert unwatched.least(name, "H100", "2.11") == TOLD["least"][name]["bytes"]
    assert TOLD["least"][name]["ran"] and TOLD["least"][name]["ran out below"]


def test_language_models_are_equal_to_the_byte() -> None:
    """All that need no data to know what they do: allocated and peak, and most reserved."""
    same, reserved = 0, 0
    for name, measured, again in unwatched_pairs(TOLD):
        if not name.startswith("transformers, text/"):
            continue
        for checkpoint, row in measured.items():
            if (name, checkpoint) == ("transformers, text/pegasus", "built"):
                continue  # a peak while it is made
            assert again[checkpoint][0] == row[0] and again[checkpoint][2] == row[2], name
        same += 1
        reserved += all(again[c][1] == row[1] for c, row in measured.items())
    assert same >= 38 and reserved >= same - 3


def test_masks_and_few_bits_peak_within_a_thousandth_and_reserve_the_same() -> None:
    """Each alone in its process: on the H200 others had run before, and left holes."""
    few = [n for n in of(TOLD["programs"], *ASSUMING) if not n.startswith("tv-")]
    pairs = {name: told for name, *told in unwatched_pairs(TOLD) if name in few}
    assert len(pairs) == 8
    for name, (measured, again) in pairs.items():
        assert abs(peak_off(measured, again)) <= 0.001, name
        assert all(again[c][1] == row[1] for c, row in measured.items()), name


def test_the_page_counts_them(extension: Any) -> None:
    text = extension.programs(TOLD)
    pairs = list(unwatched_pairs(TOLD))
    same = sum(measured == again for _, measured, again in pairs)
    assert f"{len(pairs)} programs ran on both. Of {same}, **every figure" in text
    assert len(extension.program_pairs(TOLD)) == 4 * sum(len(of) for _, of, _ in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measure", str(UNWATCHED)], "exists: remove it, or name another file"),
        (["--replay", str(UNWATCHED), "--only", "gpt5"], "--only is 'gpt5': expected one of"),
        (["--replay", __file__], "Input format not supported"),
        (["--replay", str(UNWATCHED.with_name("kernels.json.xz"))], "is no file of --measure"),
        (["--replay", "nowhere.xz"], "No such file"),
    ],
)
def test_what_cannot_be_measured_or_replayed_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = UNWATCHED.read_bytes()
    assert unwatched.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert UNWATCHED.read_bytes() == before


def test_a_replay_goes_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "measured.json.xz"
    path.write_bytes(UNWATCHED.read_bytes())
    told = read_unwatched(path)
    del told["replayed"]
    path.write_bytes(lzma.compress(json.dumps(told).encode()))
    assert unwatched.main(["--replay", str(path), "--only", "recurrent/LSTMCell"]) == 0
    ((name, measured, again),) = unwatched_pairs(read_unwatched(path))
    assert name == "recurrent/LSTMCell" and measured == again


KERNELS = list(signatures.measured(UNWATCHED.with_name("kernels.json.xz")))
LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
BACKWARD = "aten.convolution_backward.default(f32"
SCANS = ("cumsum", "cumprod", "logcumsumexp")


@pytest.mark.parametrize("name", [*LOSSES, *SCANS])
def test_losses_and_scans_take_what_they_took_on_the_card(name: str) -> None:
    found = [one for one in KERNELS if one.operation == f"aten.{name}.default"]
    assert found
    with VirtualGPU("H100", capacity=1 << 50, torch="2.11") as gpu:
        for one in found:
            assert equal(one, signatures.replayed(gpu, one.signature)), one


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("_scaled_dot_product_efficient_attention_backward", 60),
        ("mish_backward", 2),
        *(("native_batch_norm" + which, 16) for which in ("", "_backward")),
        *(("upsample_nearest2d" + which, 12) for which in ("", "_backward")),
        *(("upsample_bilinear2d" + which, 12) for which in ("", "_backward")),
        *(("reflection_pad2d" + which, 12) for which in ("", "_backward")),
    ],
)
def test_all_of_an_operations_sizes_take_what_they_took(name: str, many: int) -> None:
    """Also heads of 72 and 80 numbers, whose blocks are of 128 queries, and channels last."""
    found = [one for one in KERNELS if one.operation == f"aten.{name}.default"]
    assert len(found) == many
    with VirtualGPU("H100", capacity=1 << 50, torch="2.11") as gpu:
        for one in found:
            assert equal(one, signatures.replayed(gpu, one.signature)), one


def test_a_loss_keeps_its_elements_as_long_as_it_lives() -> None:
    """mse_loss writes its mean into the block of its elements."""
    import torch

    with VirtualGPU("H100", torch="2.11") as gpu:
        x = torch.empty(1 << 20, device=gpu.device)
        loss = torch.nn.functional.mse_loss(x, x)
        assert loss.shape == () and gpu.memory_allocated() == 2 * x.nbytes
        assert gpu.max_memory_allocated() >= 3 * x.nbytes
        del loss
        assert gpu.memory_allocated() == x.nbytes


def test_operations_at_sizes_that_no_rule_was_fitted_to() -> None:
    """An eighth of reductions, norms, embeddings, losses, products, attention, bitsandbytes."""
    every, same = Counter[str](), Counter[str]()
    with VirtualGPU("H100", capacity=1 << 50, torch="2.11") as gpu:
        for one in KERNELS[::8]:
            group = one.group.rpartition(" ")[2]
            if group in ("conv", "misc"):
                continue
            every[group] += 1
            same[group] += equal(one, signatures.replayed(gpu, one.signature))
    assert {group for group in every if same[group] == every[group]} >= {"bnb", "red"}
    assert same["emb"] / every["emb"] > 0.99 and same["att"] / every["att"] > 0.95


def test_most_convolutions_borrow_what_is_estimated() -> None:
    """Of 228 that an H100 measured, in FP32 and BF16, NCHW and NHWC, by themselves."""
    equal_ones = low = every = 0
    with VirtualGPU("H100", capacity=1 << 50, torch="2.11") as gpu:
        for one in KERNELS:
            if one.operation == "aten.convolution.default":
                measured, again = map(
                    _peak, (one.variants[0], signatures.replayed(gpu, one.signature))
                )
                every += 1
                equal_ones += abs(again - measured) <= 600  # the rests of 16 to 400 B
                low += again < measured * 0.995
    assert every == 228 and equal_ones >= 184 and low <= 19


def test_a_weights_gradient_that_copies_nothing_is_what_it_is_by_formula() -> None:
    """Winograd's, of small images in FP32; of larger ones it is not taken."""
    found = 0
    with VirtualGPU("H100", capacity=1 << 50, torch="2.11") as gpu:
        for shape, workspace in (
            ("[1x256x64x64], f32[1x128x64x64], f32[256x128x3x3]", 18_874_368),
            ("[1x256x32x32], f32[1x256x32x32], f32[256x256x3x3]", 14_155_776),
            ("[1x512x16x16], f32[1x512x16x16], f32[512x512x3x3]", 0),
            ("[4x256x32x32], f32[4x256x32x32], f32[256x256x3x3]", 0),
        ):
            (one,) = (k for k in KERNELS if k.signature.startswith(BACKWARD + shape))
            assert (-workspace in one.variants[0]) == (workspace > 0)
            again = signatures.replayed(gpu, one.signature)
            found += workspace > 0
            assert (-workspace in again) == (workspace > 0), shape
    assert found == 2


def test_a_pointwise_gradient_of_few_images_is_one_of_each() -> None:
    """ShuffleNet's last one, 464 channels to 1,024, of two images: its peak on the H100."""
    import torch

    with VirtualGPU("H100", torch="2.11") as gpu:
        x = torch.empty(2, 464, 7, 7, device=gpu.device)
        w = torch.empty(1024, 464, 1, 1, device=gpu.device, requires_grad=True)
        y = torch.nn.functional.conv2d(x, w)
        grad = torch.empty_like(y)
        before = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        y.backward(grad)
        assert gpu.max_memory_allocated() - before == w.nbytes + 2 * w.nbytes


def test_a_pointwise_gradient_in_nhwc_is_summed_in_parts_that_fill_the_card() -> None:
    """Of 1, 4 and 32 images with 96 channels to 192: 12, 44 and 88 parts, as on the H100."""
    found = [
        k for k in KERNELS if k.signature.startswith(BACKWARD) and "192x96x1x1]" in k.signature
    ]
    found = [k for k in found if "~" in k.signature]
    with VirtualGPU("H100", capacity=1 << 50, torch="2.11") as gpu:
        for one in found:
            assert equal(one, signatures.replayed(gpu, one.signature)), one
    assert len(found) == 3


def test_a_gradient_of_one_pixel_borrows_nothing() -> None:
    """MobileNet's squeezed channels: but for 1,920 B of one of them."""
    squeezed = re.compile(r"convolution_backward.*\(f32\[16x\d+x1x1\], f32\[16x")
    found = [
        k for k in signatures.measured(DATA / "kernels.json.xz") if squeezed.search(k.signature)
    ]
    with VirtualGPU("H200", capacity=1 << 50, torch="2.11") as gpu:
        for one in found:
            again = signatures.replayed(gpu, one.signature)
            assert 0 <= _peak(one.variants[0]) - _peak(again) <= 960, one
    assert len(found) == 10


def test_two_classes_of_channels_last_borrow_as_segformers() -> None:
    """The only measure is its peak, 845,301,248 B, and what is reserved: both are equal then."""
    import torch

    with VirtualGPU("H100", torch="2.11") as gpu, torch.no_grad():
        layer = torch.nn.Conv2d(256, 2, 1, device=gpu.device)
        x = torch.empty(2, 256, 128, 128, device=gpu.device).to(memory_format=torch.channels_last)
        gpu.reset_peak_memory_stats()
        y = layer(x)
        borrowed = gpu.max_memory_allocated() - gpu.memory_allocated()
        assert borrowed == 64 * y[:, :1].nbytes + layer.weight.nbytes
        x = torch.empty(8, 64, 256, 256, device=gpu.device).to(memory_format=torch.channels_last)
        layer = torch.nn.Conv2d(64, 2, 1, device=gpu.device)
        del y
        gpu.reset_peak_memory_stats()
        before = gpu.memory_allocated()
        made = layer(x).nbytes  # of fewer channels: nothing more, as measured
        assert gpu.max_memory_allocated() - before == made


def test_filters_that_are_far_apart_keep_a_whole_sum_of_each_part() -> None:
    """DeepLab's with dilation 12, of two images: five sums beside the copies, 128 MB."""
    import torch

    with VirtualGPU("H100", torch="2.11") as gpu:
        x = torch.empty(2, 2048, 28, 28, device=gpu.device)
        w = torch.empty(256, 2048, 3, 3, device=gpu.device, requires_grad=True)
        for dilation, sums in ((12, 5), (4, 0.42)):
            y = torch.nn.functional.conv2d(x, w, padding=dilation, dilation=dilation)
            before = gpu.memory_allocated()
            gpu.reset_peak_memory_stats()
            y.backward(y.detach())
            copies = x.nbytes + y.nbytes + w.nbytes
            found = gpu.max_memory_allocated() - before - w.nbytes - copies
            assert found == pytest.approx(sums * w.nbytes, rel=0.01)
            w.grad = None


def _peak(events: list[int]) -> int:
    return max(accumulate(events))
