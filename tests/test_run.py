"""The command ``every-byte run``: its report, and its exit status."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from every_byte.cli import main

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
    assert main(["run", path, "a", "--card", "RTX 4090", "--", "--lr", "3"]) == 0
    said = capsys.readouterr().out
    assert "step 1 loss nan ['a', '--lr', '3'] __main__" in said
    assert "step 2 loss" not in said  # the third step of the optimizer ends it
    assert "It fits on the RTX 4090 (25.77 GB)" in said
    assert "in backward, at train.py:11" in said
    assert "train.py:15: item() answered nan, 2 times" in said
    assert "behind" not in said


def test_a_leak_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, TRAIN)
    assert main(["run", path, "leak", "--card", "RTX 4090", "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left"] == {"train.py:14": 4000}
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
    assert main(["run", path, "--card", "RTX 4090"]) == 3
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
        ("import torch; torch.zeros(9999, device='cuda').normal_().mean().item()", 0, ""),
    ],
)
def test_the_exit_status_is_the_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, status: int, said: str
) -> None:
    assert main(["run", script(tmp_path, text), "--card", "T4"]) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py", "--card", "T4"], "nowhere.py: No such file or directory"),
        (["nowhere.py", "--card", "T5"], "--card is 'T5': expected one of"),
        (["nowhere.py", "--card", "T4", "--steps", "-1"], "--steps is -1: expected 0 or more"),
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
    assert main(["run", path, "--card", "T4", "--values", "refuse"]) == 2
    assert "item() at train.py:15 reads a value" in capsys.readouterr().err


def test_room_for_the_cuda_context_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "import torch\nx = torch.zeros(15 * 2**28, device='cuda')\n"  # 15 GiB
    assert main(["run", script(tmp_path, text), "--card", "RTX 4080"]) == 0  # of 16 GiB
    said = capsys.readouterr().out
    assert "It fits on the RTX 4080 (17.18 GB)" in said
    assert "too large for: RTX 4050 Laptop" in said
    nearly = script(tmp_path, text.replace("15 * 2**28", "31 * 2**27"))  # 15.5 GiB
    assert main(["run", nearly, "--card", "RTX 4080"]) == 3
    assert "It does NOT fit on the RTX 4080 (17.18 GB)" in capsys.readouterr().out


def test_a_snapshot_replaces_no_file_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the script runs; a snapshot of an earlier run is replaced."""
    path, precious = script(tmp_path, TRAIN), tmp_path / "precious.pt"
    precious.write_text("weights")
    command = ["run", path, "--card", "RTX 4090", "--steps", "1", "--snapshot"]
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
