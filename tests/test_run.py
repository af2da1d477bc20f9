"""The command ``every-byte run``: its report, and its exit status."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from every_byte.cli import main
from every_byte.data import cards
from every_byte.gpu import VirtualGPU
from every_byte.ranks import one_of
from every_byte.tracker import untracked
from every_byte.units import short

CARD = ("--card", "RTX 4090", "--torch", "2.14")  # whose rules say where the peak is
TRAIN = """
import sys
import torch
from torch import nn
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).cuda()
opt = torch.optim.AdamW(model.parameters())
kept = []
for step in range(10):
    loss = model(torch.randn(512, 64).to("cuda")).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if "leak" in sys.argv:
        kept.append(torch.ones(1000, device="cuda"))
    print("step", step, "loss", loss.item(), sys.argv[1:], __name__)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "train.py"
    path.write_text(text)
    return str(path)


def test_a_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, TRAIN)
    assert main(["run", path, "a", *CARD, "--", "--lr", "3"]) == 0
    said = capsys.readouterr().out
    assert "step 1 loss nan ['a', '--lr', '3'] __main__" in said
    assert "step 2 loss" not in said  # the third step of the optimizer ends it
    assert "It fits on the RTX 4090 (24.96 GB usable)" in said
    assert "in backward, at train.py:11" in said
    assert "train.py:15: item() answered nan, 2 times" in said
    assert "behind" not in said


def test_a_leak_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, TRAIN)
    assert main(["run", path, "leak", *CARD, "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (left,) = found["left"]
    assert (left["bytes"], left["made"]) == (4096, "train.py:14")
    assert (left["holder"], left["kept"]) == ("kept", "train.py:14")
    sizes = found["after_step"]
    assert [b - a for a, b in pairwise(sizes)] == [4096] * 3
    weights = 4 * (64 * 256 + 256 + 256 * 10 + 10)
    kinds = found["by_kind"]
    assert kinds["parameters"] == weights
    assert kinds["optimizer states"] == 2 * weights
    assert sum(kinds.values()) == found["peak"]


def test_out_of_memory_is_pytorchs_own_and_status_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, "import torch\nx = torch.zeros(30 * 2**30, device='cuda')\n")
    assert main(["run", path, *CARD]) == 3
    said = capsys.readouterr()
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 120.00 GiB." in said.err
    assert 'train.py", line 2' in said.err
    assert "It does NOT fit on the RTX 4090" in said.out


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('no data')", 1, "no data\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("x = (", 2, "train.py, line 1: '(' was never closed\n"),
        ("x = 1\0", 2, "source code string cannot contain null bytes\n"),
        ("import torch; torch.zeros(9999, device='cuda').normal_().mean().item()", 0, ""),
    ],
)
def test_the_exit_status_is_the_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, status: int, said: str
) -> None:
    assert main(["run", script(tmp_path, text), "--card", "T4", "--torch", "2.14"]) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["nowhere.py", "--card", "T4", "--torch", "2.14"],
            "nowhere.py: No such file or directory",
        ),
        (
            ["train.py", "--card", "T4", "--lr", "3"],
            "--lr is no option of every-byte run: arguments of the script that begin with a dash "
            "stand after --",
        ),
        (
            ["-m", "torch.distributed.run", "--card", "T4", "--", "train.py"],
            "torch.distributed.run starts processes of its own, which have no virtual card: name",
        ),
        (["nowhere.py", "--card", "T5"], "--card is 'T5': expected one of"),
        (
            ["nowhere.py", "--card", "T4", "--torch", "2.14", "--steps", "-1"],
            "--steps is -1: expected 0 or more",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_unknown_values_can_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, TRAIN)
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--values", "refuse"]) == 2
    assert "item() at train.py:15 reads a value" in capsys.readouterr().err


def test_room_for_the_cuda_context_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "import torch\nx = torch.zeros(14 * 2**28, device='cuda')\n"  # 14 GiB
    assert (
        main(["run", script(tmp_path, text), "--card", "RTX 4080"]) == 0
    )  # of 16 GiB, 15.5 usable
    said = capsys.readouterr().out
    assert "It fits on the RTX 4080 (16.64 GB usable)" in said
    assert "too large for: RTX 4050 Laptop" in said
    nearly = script(tmp_path, text.replace("14 * 2**28", "15 * 2**28"))  # and a context
    assert main(["run", nearly, "--card", "RTX 4080"]) == 3
    assert "It does NOT fit on the RTX 4080 (16.64 GB usable)" in capsys.readouterr().out


LEAKS = """
import torch
from torch import nn
model = nn.Linear(64, 64).cuda()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
{before}
for step in range(9):
    out = model(torch.randn(512, 64, device="cuda"))
    {line}
    opt.zero_grad()
    out.sum().backward()
    opt.step()
"""


SHRINKING = """
import torch
model = torch.nn.Linear(64, 64).cuda()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
a, hole, c = (torch.empty(5 << 19, dtype=torch.uint8, device="cuda") for _ in range(3))
del hole
kept, room = [], None
for step in range(3):
    model(torch.randn(8, 64, device="cuda")).sum().backward()
    opt.step()
    kept.append(torch.ones(1000, device="cuda"))
    room, fits = None, None
    if step == 1:
        fits = torch.empty(5 << 19, dtype=torch.uint8, device="cuda")
    room = torch.empty(1_600_000, dtype=torch.uint8, device="cuda")  # all of the hole, if it fits
    fits = None
"""


def test_what_one_step_left_is_not_said_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
import copy
import torch
from torch import nn
model = nn.Linear(1000, 1000).cuda()
opt, kept, best = torch.optim.SGD(model.parameters(), 0.1), [], None
for i in range(4):
    loss = model(torch.ones(4, 1000, device="cuda")).sum()
    loss.backward()
    opt.step()
    opt.zero_grad()
    kept.append(loss.detach())
    if i == 0:
        best = copy.deepcopy(model.state_dict())
"""
    assert main(["run", script(tmp_path, text), "--card", "RTX 4090"]) == 0
    said = capsys.readouterr().out
    assert "Each step leaves 512 B behind" in said
    assert "The last step but one left 4.00 MB" in said
    assert "Each step leaves 4" not in said


def test_a_leak_is_found_where_blocks_happen_to_fit_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, SHRINKING)
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after_step"][-1] < found["after_step"][-2]
    assert [left["holder"] for left in found["left"]] == ["kept"]


@pytest.mark.parametrize(
    ("before", "line", "holder", "by_graph"),
    [
        ("log = {'losses': []}", "log['losses'].append(out.detach())", "log", False),
        ("h = torch.zeros(512, 64).cuda()", "h = torch.tanh(h * 2 + model(out))", "h", True),
        ("class A: pass\na = A(); a.seen = {}", "a.seen[step] = out.detach()", "a.seen", False),
    ],
)
def test_a_leak_is_traced_to_what_keeps_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: str,
    line: str,
    holder: str,
    by_graph: bool,
) -> None:
    path = script(tmp_path, LEAKS.format(before=before, line=line))
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--steps", "4", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["left"]
    assert any(leak["holder"] == holder for leak in left), left
    text = next(x["words"] for x in left if x["holder"] == holder)
    assert ("the autograd graph behind" in text) is by_graph
    assert line in text or holder == "log"


def test_ctrl_c_ends_with_the_report_so_far(tmp_path: Path) -> None:
    text = TRAIN.replace("range(10)", "range(10**9)").replace("__name__)", "__name__, flush=True)")
    command = [
        sys.executable,
        "-m",
        "every_byte",
        "run",
        script(tmp_path, text),
        "--card",
        "T4",
        "--torch",
        "2.14",
    ]
    page = tmp_path / "report.html"
    with subprocess.Popen(
        [*command, "--steps", "0", "--report", str(page)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As in a terminal: a shell's background jobs, of which this may be one, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 4 "):
                break
        os.kill(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted: this is what the script did until then." in said
    assert "in backward, at train.py:11" in said
    assert "Traceback" not in errors
    assert "every-byte run" in page.read_text("utf-8")


def test_an_interruption_that_a_finalizer_swallows_is_raised_again(gpu: Any) -> None:
    import torch

    from every_byte.watch import Watch

    watch = Watch(gpu)
    with watch.watching():
        torch.empty(1, device=gpu.device)
        watch.interrupted = True
        with pytest.raises(KeyboardInterrupt):
            torch.empty(1, device=gpu.device)
        torch.empty(1, device=gpu.device)


def test_progress_is_told_now_and_then(gpu: Any) -> None:
    import torch

    from every_byte.watch import Watch

    seconds = iter([0.0, 4.0, 11.0, 11.0, 12.0, 20.0, 22.0, 22.0])
    said: list[str] = []
    watch = Watch(gpu, say=said.append, clock=lambda: next(seconds))
    with watch.watching():
        kept = [torch.empty(10**7, device=gpu.device) for _ in range(5)]
    assert len(kept) == 5
    assert said == [
        "every-byte run: 11 s, 0 of 3 optimizer steps taken, peak so far 0.08 GB",
        "every-byte run: 22 s, 0 of 3 optimizer steps taken, peak so far 0.20 GB",
    ]


def test_a_script_that_resets_its_peaks_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
import torch
x = torch.zeros(10**9, device="cuda")
del x
torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
y = torch.zeros(10, device="cuda")
"""
    assert main(["run", script(tmp_path, text), "--card", "RTX 5090", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reserved"] >= told["peak"] >= 4 * 10**9
    card = cards()["RTX 5090"]
    assert (told["capacity"], told["context"]) == (card.usable, card.context)


def test_layers_that_are_computed_again_are_not_models_of_their_own(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each look at the model would be one for each of its layers: quadratic."""
    from torch.utils.checkpoint import checkpoint

    from every_byte.tracker import Timeline
    from every_byte.watch import Watch

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    model = Deep().to(gpu.device)
    other = nn.Linear(8, 8, device=gpu.device)
    watch, looks = Watch(gpu), list[int]()
    with watch.watching():
        monkeypatch.setattr(Timeline, "see", lambda _: looks.append(1))
        for _ in range(2):
            model(torch.ones(2, 8, device=gpu.device)).sum().backward()
        other(torch.ones(2, 8, device=gpu.device))
    assert len(looks) == 2  # at the model and at the other one
    assert watch.timeline.steps[-1]["gradients"] == 3 * (8 * 8 + 8) * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import flash_attn", 'line 1 of {path} needs flash_attn, .* attn_implementation="sdpa"'),
        ("import triton.language", "line 1 of {path} needs triton, .* plain PyTorch"),
        (
            "raise AssertionError('libcuda.so cannot found!\\nPlease make sure')",  # autotune's
            "line 1 of {path} needs triton, .* plain PyTorch",
        ),
        (
            "raise OSError('CUDA_HOME environment variable is not set. Please set it')",
            "line 1 of {path} needs a CUDA extension that it builds",
        ),
        (
            "import torch\n"
            "torch.library.define('mine::twice', '(Tensor x) -> Tensor')\n"
            "torch.ops.mine.twice(torch.zeros(2, device='cuda'))",
            "line 3 of {path} needs the operator mine::twice, .* a meta kernel",
        ),
        (
            "import torch\n"
            "loss = torch.nn.Linear(2000, 3000).cuda()(torch.randn(2, 2000).cuda()).sum()\n"
            "int(loss.item())",
            r"int\(\) of a number .* \(item\(\) at .*:3\), which a virtual GPU does not have",
        ),
    ],
)
def test_what_needs_a_real_gpu_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    said: str,
) -> None:
    for name in ("flash_attn", "triton"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    path = script(tmp_path, text)
    assert main(["run", path, "--card", "T4", "--torch", "2.14"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(said.format(path=re.escape(path)), error)


def test_a_module_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_package_of_mine").mkdir()
    (tmp_path / "a_package_of_mine" / "__main__.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "-m", "a_package_of_mine", "--card", "T4", "--torch", "2.14"]) == 0
    assert "in backward, at __main__.py:11" in capsys.readouterr().out
    assert main(["run", "-m", "a_package_of_nobody", "--card", "T4", "--torch", "2.14"]) == 2
    assert "there is no such module" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "status"), [("1 / 0", 1), ("exit(4)", 4)])
def test_an_error_is_not_reported_as_a_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str, status: int
) -> None:
    text = f"import torch\nx = torch.zeros(9, device='cuda')\n{end}\n"
    run = ["run", script(tmp_path, text), "--card", "T4", "--torch", "2.14", "--json"]
    assert main(run) == status
    assert json.loads(capsys.readouterr().out)["failed"] is True


PLAIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader
model = nn.Sequential(nn.Linear(640, 640), nn.ReLU(), nn.Linear(640, 640)).cuda()
opt = torch.optim.AdamW(model.parameters())
for x in DataLoader(torch.randn(4096, 640), batch_size=8):
    loss = model(x.cuda()).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run scripts again without a process for each: PyTorch takes seconds to import."""
    from every_byte import levers

    def again(arguments: list[str], *_: object) -> dict[str, Any] | None:
        with redirect_stdout(io.StringIO()) as said:
            main(arguments)
        told: dict[str, Any] = json.loads(said.getvalue())
        return told

    monkeypatch.setattr(levers, "again", again)


def test_a_script_runs_again_in_a_process_of_its_own(tmp_path: Path) -> None:
    from every_byte import levers

    path = script(tmp_path, "import torch\nx = torch.zeros(99, device='cuda')\n")
    arguments = ["run", path, "--card", "T4", "--torch", "2.14", "--unbounded", "--json"]
    told = levers.again(arguments, tmp_path, dict(os.environ))
    assert told is not None and told["peak"] == 512
    assert levers.again(arguments[:-1], tmp_path, dict(os.environ)) is None


@pytest.mark.usefixtures("in_this_process")
def test_levers_are_replayed_and_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, PLAIN)
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--levers", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [lever["lever"] for lever in told["levers"]] + told["useless"]
    assert sorted(names) == ["expandable-segments", "fused", "half-batch"]  # nothing else applies
    saved = {lever["lever"]: lever["saved"] for lever in told["levers"]}
    assert saved["fused"] > 4 * 640 * 640  # foreach takes copies of the parameters
    assert max(told["levers"], key=lambda lever: lever["saved_reserved"]) == told["levers"][0]
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--lever", "fused", "--json"]) == 0
    assert told["peak"] - json.loads(capsys.readouterr().out)["peak"] == saved["fused"]


@pytest.mark.usefixtures("in_this_process")
def test_where_it_does_not_fit_levers_say_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
import torch
from torch import nn
model = nn.Linear(8192, 8192, bias=False).cuda()
x = torch.zeros(2**18, 8192, device="cuda")  # 8.6 GB
y = model(x)
z = y * y
"""
    assert (
        main(
            ["run", script(tmp_path, text), "--card", "T4", "--torch", "2.14", "--levers", "--json"]
        )
        == 3
    )
    told = json.loads(capsys.readouterr().out)
    assert told["needed"] >= told["needed_allocated"] > 3 * 2**18 * 8192 * 4
    assert told["others"]["A100 80 GB"] is True and told["others"]["RTX 4090"] is False
    assert [lever["lever"] for lever in told["levers"]]


def test_an_unknown_lever_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = script(tmp_path, "")
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--lever", "magic"]) == 2
    assert "--lever is 'magic': expected one of fused, " in capsys.readouterr().err


MANY = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group(backend="nccl")
rank = int(os.environ["LOCAL_RANK"])
model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).to(rank)
if dist.get_world_size() > 1:
    model = DistributedDataParallel(model, device_ids=[rank])
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    loss = model(torch.zeros(8, 1024).to(rank)).mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rank)
print("of", len(everyone))
"""


def test_the_first_of_several_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, MANY)
    weights = 4 * 4 * (1024 * 1024 + 1024)
    for gpus, gradients in ((4, 2), (2, 2)):  # DDP's buckets hold them once more
        assert (
            main(["run", path, "--card", "T4", "--torch", "2.14", "--gpus", str(gpus), "--json"])
            == 0
        )
        told = json.loads(capsys.readouterr().out)
        assert told["by_kind"]["parameters"] == weights
        assert told["by_kind"]["gradients"] == gradients * weights
    assert "RANK" not in os.environ


SPAWNS = """
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
def work(rank, world):
    dist.init_process_group("nccl", rank=rank, world_size=world)
    model = DistributedDataParallel(nn.Linear(1000, 1000).to(rank), device_ids=[rank])
    model(torch.ones(8, 1000).to(rank)).sum().backward()
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(work, args=(NUMBER,), nprocs=NUMBER)
"""


def test_of_processes_that_a_script_spawns_the_first_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, gpus in (("torch.cuda.device_count()", "1"), ("4", "4")):
        path = script(tmp_path, SPAWNS.replace("NUMBER", number))
        assert main(["run", path, "--card", "RTX 4090", "--gpus", gpus, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        # DDP's buckets are the gradients.
        assert told["by_kind"]["gradients"] == told["by_kind"]["parameters"] == 1001 * 1000 * 4
    path = script(tmp_path, SPAWNS.replace("NUMBER", "4"))
    assert main(["run", path, "--card", "RTX 4090"]) == 1
    assert "of 4 processes is not replayed for 1: run it with --gpus 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import torch; torch.ones(10) + 1", 'it made no tensor on "cuda"\n'),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
            "another process, started at train.py:1: what it puts on a card is not counted\n",
        ),
    ],
)
def test_a_script_that_puts_nothing_on_the_card_does_not_fit_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert main(["run", script(tmp_path, text), "--card", "T4", "--torch", "2.14"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "put nothing on the card, so there is nothing to judge" in told.err
    assert told.err.endswith(said)


def test_other_cards_are_judged_by_what_programs_can_have_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An RTX 4090's driver keeps some of its 24 GB for itself."""
    other = cards()["RTX 4090"]
    room = (other.usable - other.context) // 2**21 * 2**21
    assert room + 2**21 + other.context < other.memory
    text = "import sys, torch\nx = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda')"
    path = script(tmp_path, text)
    for size, answer in ((room, True), (room + 2**21, False)):
        assert main(["run", path, str(size), "--card", "H100", "--torch", "2.14", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["others"]["RTX 4090"] is answer


SHARDED = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("nccl")
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
for layer in model:
    fully_shard(layer)
fully_shard(model)
model.to_empty(device="cuda")
opt = torch.optim.AdamW(model.parameters())
for _ in range(3):
    model(torch.zeros(8, 1024, device="cuda")).mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
print(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
"""


def test_a_script_that_shards_takes_what_fully_shard_takes_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with VirtualGPU("T4", torch="2.14") as gpu, one_of(4) as mesh:
        with untracked():
            model = nn.Sequential(*(nn.Linear(1024, 1024, device="meta") for _ in range(4)))
            for part in (*model, model):
                fully_shard(part, mesh=mesh)
        model.to_empty(device=gpu.device)
        opt = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            model(torch.zeros(8, 1024, device=gpu.device)).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        expected = f"{gpu.max_memory_allocated()} {gpu.max_memory_reserved()}"
    path = script(tmp_path, SHARDED)
    command = ["run", path, "--card", "T4", "--torch", "2.14", "--gpus", "4", "--steps", "0"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith(expected + "\n")
    quarter = 4 * 4 * (1024 * 1024 + 1024) // 4
    assert f"  optimizer states {short(2 * quarter):>8}{2 * quarter:15,} B" in said


def test_what_one_of_several_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MANY.replace("DistributedDataParallel(model, device_ids=[rank])", "wrap(model)")
    begin = "from torch.distributed.fsdp import FullyShardedDataParallel as wrap\n"
    path = script(tmp_path, begin + text)
    assert main(["run", path, "--card", "T4", "--torch", "2.14", "--gpus", "2"]) == 1
    said = capsys.readouterr().err
    assert "FullyShardedDataParallel of a script is not replayed: take fully_shard" in said
    assert said.count("\n") == 1 and said.startswith("every-byte run: line ")


def test_what_is_not_replayed_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, "import torch\ntorch.ones(3).cuda()\ntorch.cuda.CUDAGraph()")
    assert main(["run", path, *CARD]) == 1
    said = capsys.readouterr().err
    begin = f"every-byte run: line 3 of {path}: torch.cuda.CUDAGraph is not replayed"
    assert said.startswith(begin) and said.endswith("run without them here\n")
    assert said.count("\n") == 1


ASIDE = """
import copy, torch
from torch import nn
model = nn.Linear(1024, 1024, bias=False).cuda()
{average}
opt = torch.optim.SGD(model.parameters())
for _ in range(2):
    model(torch.ones(1, 1024, device="cuda")).sum().backward()
    opt.step()
"""


@pytest.mark.parametrize("average", ["", "average = copy.deepcopy(model)"])
@pytest.mark.parametrize("steps", ["2", "0"])
def test_a_model_that_is_not_at_work_has_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], average: str, steps: str
) -> None:
    path = script(tmp_path, ASIDE.format(average=average))
    assert main(["run", path, *CARD, "--steps", steps, "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["by_kind"]
    assert held["parameters"] == (1 + bool(average)) * 4 * 1024**2


def test_an_optimizer_that_is_dropped_takes_nothing_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ASIDE.format(average="").replace("SGD", "Adam").replace("\n", "\n    ")
    text = f"""
def train():{lines}
train()
import gc, torch
gc.collect()
torch._C._cuda_clearCublasWorkspaces()
print(torch.cuda.memory_allocated())
"""
    assert main(["run", script(tmp_path, text), *CARD, "--steps", "0"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("0\n")
    assert re.search(r"^  optimizer states .* 8,388,608 B$", said, re.MULTILINE), said


def test_a_model_that_does_not_fit_has_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where memory runs out while it is brought to the card."""
    text = "from torch import nn\nwith __import__('torch').device('meta'):\n"
    text += "    model = nn.Sequential(*(nn.Linear(2**15, 2**15, bias=False) for _ in range(9)))\n"
    path = script(tmp_path, text + "model.to_empty(device='cuda')")
    assert main(["run", path, *CARD, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["by_kind"]["parameters"] == report["peak"]


def test_what_a_script_imports_stays_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a library is imported in parts twice, and its classes are not the same any more."""
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    main_before = sys.modules["__main__"]
    path = script(tmp_path, "import colorsys, torch\ntorch.ones(3).cuda()")
    assert main(["run", path, *CARD]) == 0
    assert "colorsys" in sys.modules and sys.modules["__main__"] is main_before


def test_a_snapshot_replaces_no_file_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the script runs; a snapshot of an earlier run is replaced."""
    path, precious = script(tmp_path, TRAIN), tmp_path / "precious.pt"
    precious.write_text("weights")
    command = ["run", path, *CARD, "--steps", "1", "--snapshot"]
    assert main([*command, str(precious)]) == 2
    said = capsys.readouterr()
    assert "step 0" not in said.out and precious.read_text() == "weights"
    assert said.err.count("\n") == 1 and "is not a memory snapshot" in said.err
    assert "replace it with --force" in said.err
    assert main([*command, str(tmp_path / "none" / "a.pickle")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main([*command, str(precious), "--force"]) == 0
    assert main([*command, str(precious)]) == 0  # which is a snapshot now
    capsys.readouterr()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious.pt", "train.py"]
