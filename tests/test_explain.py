"""Out-of-memory messages of public threads, taken apart and judged."""

import argparse
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from every_byte.allocator import OutOfMemoryError
from every_byte.commands import Refused
from every_byte.commands.explain import add, shown
from every_byte.explain import Explanation, Message, explain, parse
from every_byte.units import GiB, KiB, MiB

ROOT = Path(__file__).parent.parent


def old(tried: str, total: str, allocated: str, free: str, reserved: str) -> str:
    """As torch 1.4 to 2.0 write it; up to 1.3 the last is "cached"."""
    rest = reserved if "cached" in reserved else f"{reserved} reserved in total by PyTorch"
    return (
        f"RuntimeError: CUDA out of memory. Tried to allocate {tried} (GPU 0; {total} total "
        f"capacity; {allocated} already allocated; {free} free; {rest})"
    )


def new(
    tried: str,
    total: str,
    free: str,
    allocated: str,
    rest: str,
    processes: str = "",
    backend: str = "CUDA",
    capacity: str = "capacity",
) -> str:
    """As torch 2.1 and newer write it; 2.1 writes "capacty"."""
    return (
        f"torch.OutOfMemoryError: {backend} out of memory. Tried to allocate {tried}. GPU 0 has a "
        f"total {capacity} of {total} of which {free} is free. {processes}Of the allocated memory "
        f"{allocated} is allocated by PyTorch, and {rest} is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF="
        "expandable_segments:True to avoid fragmentation.  See documentation for Memory Management"
    )


def this(in_use: str) -> str:
    return f"Including non-PyTorch memory, this process has {in_use} memory in use. "


# The figures of public threads. The verdict is by the figures; threads are the source.
THREADS = [
    ("pytorch/pytorch/issues/59778", "unknown",
     old("2.26 GiB", "6.00 GiB", "781.59 MiB", "3.03 GiB", "1.24 GiB")),
    ("pytorch/pytorch/issues/16417", "unknown",
     old("12.50 MiB", "10.92 GiB", "8.57 MiB", "9.28 GiB", "4.68 MiB cached")),
    ("pytorch/pytorch/issues/16417", "too big",
     new("22.00 MiB", "23.65 GiB", "11.06 MiB", "22.90 GiB", "194.87 MiB", this("23.60 GiB"))),
    ("carolchenyx/MGFN./issues/35", "in pieces",
     new("1.70 GiB", "6.00 GiB", "0 bytes", "2.93 GiB", "2.30 GiB", capacity="capacty")),
    ("One-2-3-45/One-2-3-45/issues/25", "another process",
     old("1.69 GiB", "14.56 GiB", "649.97 MiB", "1.31 GiB", "1.01 GiB")),
    ("murong-xu/CADS/issues/4", "too big",
     new("22.78 GiB", "31.47 GiB", "12.73 GiB", "9.08 GiB", "9.35 GiB", this("18.73 GiB"))),
    ("ShannonAI/Self_Explaining_Structures_Improve_NLP_Models/issues/6", "too big",
     old("20.00 MiB", "1.96 GiB", "1.24 GiB", "2.88 MiB", "1.25 GiB")),
    ("wxian3/NeuroLens/issues/2", "too big",
     new("55.57 GiB", "12.00 GiB", "9.02 GiB", "984.52 MiB", "463.48 MiB", capacity="capacty")),
    ("Synthintel0/MyGirlGPT/issues/11", "another process",
     new("32.00 MiB", "4.00 GiB", "41.56 MiB", "2.58 GiB", "1.90 MiB", this("3.44 GiB"),
         capacity="capacty")),
    ("YingqianWang/iPASSR/issues/9", "too big",
     old("10.73 GiB", "8.00 GiB", "17.20 GiB", "0 bytes", "19.15 GiB")),
    ("2KangHo/vdsr_pytorch/issues/2", "in pieces",
     old("512.00 MiB", "15.90 GiB", "13.13 GiB", "415.88 MiB", "14.80 GiB")),
    ("OPIXray-author/OPIXray/issues/5", "in pieces",
     old("264.00 MiB", "2.00 GiB", "788.51 MiB", "145.93 MiB", "1.02 GiB")),
    ("lllyasviel/FramePack/issues/369", "too big",
     new("30.29 GiB", "10.74 GiB", "3.69 GiB", "6.10 GiB", "396.58 MiB", this("6.68 GiB"))),
    ("Comfy-Org/ComfyUI/issues/9529", "unknown",
     new("432.00 MiB", "15.92 GiB", "7.12 GiB", "8.08 GiB", "321.96 MiB", backend="HIP")),
    ("Tongyi-MAI/Z-Image/issues/103", "too big",
     new("1.88 GiB", "23.98 GiB", "1.70 GiB", "21.65 GiB", "279.78 MiB", backend="HIP")),
    ("ROCm/TheRock/issues/2118", "too big",
     new("2.00 MiB", "255.98 GiB", "244.65 GiB",
         "1017.01 MiB", "54.99 MiB", "1.05 GiB allowed; ", "HIP")),
    ("ROCm/TheRock/issues/1054", "too big",
     new("16.00 GiB", "15.24 GiB", "15.09 GiB", "0 bytes", "0 bytes", backend="HIP")),
    ("pytorch/pytorch/issues/175431", "unknown",
     new("2.00 MiB", "287.98 GiB", "203.49 GiB", "68.63 GiB", "14.93 GiB", backend="HIP")),
    ("pytorch/pytorch/issues/138002", "in pieces",
     new("6.64 GiB", "19.92 GiB", "6.22 GiB", "5.34 GiB", "7.10 GiB", backend="HIP")),
    ("bcmi/libcom/issues/54", "too big",
     new("256.00 MiB", "9.77 GiB", "185.50 MiB", "9.04 GiB", "142.12 MiB", this("9.43 GiB"))),
    ("vllm-project/vllm/issues/12529", "another process",
     new("1.16 GiB", "7.75 GiB", "1.17 GiB", "4.81 GiB", "18.97 MiB", this("5.02 GiB"))),
    ("vllm-project/vllm/issues/15039", "a context",
     new("128.00 MiB", "79.33 GiB", "16.00 MiB", "69.59 GiB", "118.89 MiB",
         "Process 36891 has 79.29 GiB memory in use. ")),
    ("noonghunna/club-3090/issues/58", "unknown",
     "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total "
     "capacity of 23.56 GiB of which 56.88 MiB is free"),
    ("huggingface/trl/pull/5197", "another process",
     new("2.60 GiB", "14.74 GiB", "2.44 GiB", "7.85 GiB", "86.90 MiB",
         "Process 1 has 366.00 MiB memory in use. Process 2 has 8.07 GiB memory in use. "
         "Process 3 has 3.40 GiB memory in use. Process 4 has 484.00 MiB memory in use. ")),
    ("jhc13/taggui/issues/188", "unknown",
     new("20.00 MiB", "4.00 GiB", "2.35 GiB", "825.15 MiB", "24.85 MiB")),
    ("tensorflow/tpu/issues/1058", "in pieces",
     new("7.50 GiB", "21.99 GiB", "6.62 GiB", "6.15 GiB", "8.71 GiB", this("15.35 GiB"))),
    ("Gaoyiminggithub/Graphonomy/issues/34", "too big",
     old("1.41 GiB", "2.00 GiB", "330.44 MiB", "1.23 GiB", "410.00 MiB")),
    ("FoundationVision/GenerateU/issues/10", "too big",
     new("496.00 MiB", "14.75 GiB", "235.06 MiB", "14.06 GiB", "330.42 MiB",
         "Process 20398 has 14.52 GiB memory in use. ", capacity="capacty")),
    ("RenYurui/StructureFlow/issues/35", "unknown",
     old("8.13 GiB", "10.76 GiB", "643.57 MiB", "8.20 GiB", "32.43 MiB cached")),
    ("rshaojimmy/MADDoG/issues/11", "in pieces",
     old("2.87 GiB", "14.76 GiB", "8.77 GiB", "19.75 MiB", "13.71 GiB")),
    ("neurosim/DNN_NeuroSim_V1.3/issues/28", "another process",
     old("1.12 MiB", "22.37 GiB", "15.87 GiB", "3.56 MiB", "787.74 MiB cached")),
    ("oobabooga/textgen/issues/963", "too big",
     old("166.00 MiB", "8.00 GiB", "6.93 GiB", "0 bytes", "7.22 GiB")),
    ("daitao/SAN/issues/39", "too big",
     old("9.80 GiB", "14.76 GiB", "9.94 GiB", "3.89 GiB", "160.79 MiB cached")),
    ("singhsourabh/Resume-NER/issues/4", "too big",
     old("92.00 MiB", "1.96 GiB", "1.46 GiB", "16.38 MiB", "1.51 GiB")),
    ("firewaterfire/HKDnet/issues/1", "too big",
     old("10.01 GiB", "14.75 GiB", "10.12 GiB", "4.39 GiB", "10.22 GiB")),
    ("open-mmlab/mmsegmentation/issues/944", "too big",
     old("1006.00 MiB", "10.91 GiB", "9.18 GiB", "569.81 MiB", "9.49 GiB")),
    ("vllm-project/vllm/issues/15598", "unknown",
     "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 6 has a total capacity of 44.53 GiB of "
     "which 448.00 KiB is free."),
    ("bluer555/CR-GAN/issues/8", "a context", "RuntimeError: CUDA error:out of memory"),
    ("rowanz/neural-motifs/issues/58", "a context",
     "RuntimeError: cuda runtime error (2) : out of memory at /pytorch/aten/THCTensorRandom.cu:25"),
    ("oobabooga/textgen/issues/963", "a context",
     "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("google-deepmind/jaxline/issues/11", "unknown",
     "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 285212672 bytes."),
    ("patrickbryant1/AFProfile/issues/8", "unknown",
     "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to "
     "allocate 4770354232 bytes.\nBufferAssignment OOM Debugging."),
    ("kingoflolz/mesh-transformer-jax/issues/66", "unknown",
     "RuntimeError: Resource exhausted: Failed to allocate request for 32.00MiB (33554432B) on "
     "device ordinal 0"),
    ("NovaSky-AI/SkyRL/issues/624", "too big",
     "gpu_async_1 cuMemAllocAsync failed to allocate 1225195446464 bytes: RESOURCE_EXHAUSTED: : "
     "CUDA_ERROR_OUT_OF_MEMORY: out of memory\n Reported by CUDA: Free memory/Total memory: "
     "22635544576/85095874560"),
]  # fmt: skip


@pytest.mark.parametrize(("thread", "verdict", "text"), THREADS)
def test_messages_of_public_threads_are_judged(thread: str, verdict: str, text: str) -> None:
    found = explain(text)
    assert found.verdict == verdict, (thread, found.because)
    assert found.message is not None and found.because
    assert found.cures and len({cure.do for cure in found.cures}) == len(found.cures)
    # The same among the lines of a log, folded by a terminal, and quoted.
    log = f"Traceback (most recent call last):\n  x = y\n{text.replace('. ', '.' + chr(10))}\nbye"
    assert explain(log).verdict == verdict


def test_there_are_enough_of_them() -> None:
    assert len(THREADS) >= 40
    assert {verdict for _, verdict, _ in THREADS} == {
        *("too big", "in pieces", "another process", "a context", "unknown"),
    }


def test_what_a_message_says_is_taken_apart() -> None:
    (found,) = parse(THREADS[0][2])
    assert found == Message(
        "CUDA", 0, round(2.26 * GiB), 6 * GiB, round(3.03 * GiB), None, (), None,
        round(781.59 * MiB), round(1.24 * GiB),
    )  # fmt: skip
    (found,) = parse(next(text for _, _, text in THREADS if "cached" in text))
    assert found.reserved == round(8.57 * MiB) + round(4.68 * MiB)
    (found,) = parse(next(text for thread, _, text in THREADS if "trl" in thread))
    assert found.others == (366 * MiB, round(8.07 * GiB), round(3.4 * GiB), 484 * MiB)
    (found,) = parse(next(text for thread, _, text in THREADS if "2118" in thread))
    assert (found.backend, found.allowed) == ("HIP", round(1.05 * GiB))
    (found,) = parse(next(text for thread, _, text in THREADS if "SkyRL" in thread))
    assert (found.tried, found.capacity) == (1225195446464, 85095874560)
    (found,) = parse(next(text for thread, _, text in THREADS if "mesh" in thread))
    assert (found.backend, found.device, found.tried) == ("JAX", 0, 32 * MiB)
    text = new("2.00 GiB", "8.00 GiB", "1.00 GiB", "5.00 GiB", "1.00 MiB")
    pools = text.replace(
        "PyTorch, and",
        "PyTorch, with 46.00 MiB allocated in private pools (e.g., CUDA Graphs), and",
    )
    (found,) = parse(pools)
    assert found.private_pools == 46 * MiB and found.allocated == 5 * GiB
    (found,) = parse(
        "RuntimeError: MPS backend out of memory (MPS allocated: 8.17 GB, other allocations: "
        "384.00 KB, max allowed: 9.07 GB). Tried to allocate 1.00 GB on private pool."
    )
    assert (found.backend, found.tried, found.allowed) == ("MPS", GiB, round(9.07 * GiB))
    assert found.in_use == round(8.17 * GiB) + 384 * KiB


def test_the_message_of_the_measured_card_is_judged() -> None:
    record = json.loads((ROOT / "book/records/nvidia-h200-torch-2.11.0.json").read_text("utf-8"))
    text = record["experiments"]["out-of-memory"]["messages"]["at the error"]
    found = explain(text)
    assert found.verdict == "in pieces"  # Troubleshooting shows which
    assert found.message is not None
    assert found.message.others[-1] == round(3.54 * GiB) and len(found.message.others) == 7
    figures = record["experiments"]["out-of-memory"]["checkpoints"]["at the error"]
    assert found.message.allocated == figures["memory_allocated"]
    assert found.message.reserved == figures["memory_reserved"]


def test_what_grows_from_message_to_message_is_a_leak() -> None:
    log = [new("20.00 MiB", "7.50 GiB", "1.00 MiB", f"{n}.00 GiB", "9.00 MiB") for n in (5, 6, 7)]
    assert explain("\n".join(log)).verdict == "a leak"
    assert explain("\n".join(log[::-1])).verdict == explain(log[0]).verdict == "too big"
    assert explain("\n".join(log[:2])).verdict == "too big"  # two may be chance


sizes = st.integers(0, 2**45)


@given(tried=sizes, free=sizes, allocated=sizes, cached=sizes, context=sizes,
       allowed=st.none() | sizes)  # fmt: skip
def test_our_own_message_comes_back(
    tried: int, free: int, allocated: int, cached: int, context: int, allowed: int | None
) -> None:
    reserved = allocated + cached
    capacity = free + reserved + context
    error = OutOfMemoryError(tried, capacity, allocated, reserved, context, allowed)
    (found,) = parse(f"every_byte.OutOfMemoryError: {error}\n")
    wanted = {
        "tried": tried,
        "capacity": capacity,
        "free": free,
        "in_use": context + reserved,
        "allowed": allowed,
        "allocated": allocated,
    }
    for field, nbytes in wanted.items():
        told = getattr(found, field)
        assert (told is None) == (nbytes is None)
        if nbytes is not None:  # two decimals of its unit are printed
            unit = next((u for u in (GiB, MiB, KiB) if nbytes > u), 1)
            assert abs(told - nbytes) <= 0.005 * unit + 1, field
    assert (found.device, found.others) == (0, ())
    verdict = explain(str(error)).verdict
    if tried > 1.01 * min(capacity, capacity if allowed is None else allowed) + MiB:
        assert verdict == "too big"


pieces = st.sampled_from(
    [
        *("CUDA out of memory. ", "HIP out of memory", "MPS backend out of memory (", "0 bytes"),
        *("Tried to allocate ", "9.99 GiB", "RESOURCE_EXHAUSTED: Out of memory", " free", "GPU 7 "),
        *(
            "Of the allocated memory ",
            " is allocated by PyTorch",
            " allowed",
            "1e999 GiB",
            "-1 MiB",
        ),
        *("Process 3 has ", " memory in use", "has a total capacity of ", "of which ", " is free"),
        *("9" * 400, " GiB", "\0", "<script>", "CUDA error: out of memory", "\n", " cached)"),
    ]
)


@given(st.text() | st.lists(pieces | st.text(max_size=5), max_size=30).map("".join))
def test_hostile_text_never_raises(text: str) -> None:
    found = explain(text)
    assert isinstance(found, Explanation)
    assert "<script>" not in shown(found)
    json.dumps(found.because)


def test_a_long_log_is_read_from_its_end() -> None:
    text = "x" * 3_000_000 + THREADS[3][2] + "\n" * 1000
    assert explain(text).verdict == "in pieces"
    assert explain("9" * 2_000_000 + "CUDA out of memory " * 1000).verdict == "unknown"


# The command


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers(required=True))
    options = parser.parse_args(["explain", *arguments])
    status: int = options.run(options)
    return status


def test_the_command_takes_an_argument_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = THREADS[3][2]
    assert run(*text.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Verdict: in pieces\nBecause: 2.30 GiB are reserved by PyTorch")
    assert re.search(r"^  tried to allocate +1\.70 GiB$", printed, re.MULTILINE)
    assert "\n  1. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in printed
    log = tmp_path / "log.txt"
    log.write_bytes(b"\xff\xfe" + text.encode())
    assert run("--file", str(log)) == 0
    assert capsys.readouterr().out == printed
    for arguments in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert run(*arguments) == 0
        assert capsys.readouterr().out == printed
    assert run("--json", text) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "in pieces"
    assert found["message"]["tried"] == round(1.7 * GiB)
    assert found["cures"][0].keys() == {"do", "why", "chapter"}


def test_what_is_not_recognised_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Killed") == 1
    assert capsys.readouterr().out == (
        "Verdict: unknown\nBecause: no out-of-memory message of PyTorch, CUDA or JAX is in it\n"
    )
    with pytest.raises(Refused, match="No such file or directory; name a log"):
        run("--file", str(tmp_path / "none"))
    with pytest.raises(Refused, match="expected one of them"):
        run("--file", "a", "b")


def test_every_cure_names_a_chapter_that_exists() -> None:
    cures = {cure for _, _, text in THREADS for cure in explain(text).cures}
    for cure in cures:
        assert (ROOT / "notebooks" / f"{cure.chapter}.py").is_file(), cure
        assert cure.do.endswith(".") or cure.do.endswith(")."), cure
