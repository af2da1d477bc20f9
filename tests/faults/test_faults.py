"""The worst day: kills, a full disk, two at once, no network, no home, another locale.

Each test has the promise that it checks as its first line: CONTRIBUTING.md lists them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.repository import ROOT

pytestmark = pytest.mark.slow

# A checkpoint of the usual way, of a model that is small.
CHECKPOINT = """
import os, signal, sys
from transformers import GPT2Config
from helpers import models
models.config = lambda name, **_: GPT2Config(
    n_layer=2, n_embd=8, n_head=2, vocab_size=64, n_positions=8, dtype="float32",
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
at, random, save = sys.argv[1], models._random, models.save_file
left = [int(at.partition(":")[2] or 0)]
def counted(*args):
    left[0] -= 1
    if at.startswith("random") and left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return random(*args)
def saved(*args):
    save(*args)
    if at == "saved":
        os.kill(os.getpid(), signal.SIGKILL)
models._random, models.save_file = counted, saved
if at == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    print(models.checkpoint("gpt2"))
except OSError as error:
    print(error)
"""

TRAIN = """
import os, signal, sys, torch
x = torch.ones(1000, device="cuda", requires_grad=True)
opt = torch.optim.SGD([x])
for step in range(3):
    x.sum().backward()
    opt.step()
    if "die" in sys.argv and step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def python(
    *arguments: str, before: tuple[str, ...] = (), **changes: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    command = [*before, sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def one_line(said: str) -> str:
    assert said.count("\n") == 1 and "Traceback" not in said, said
    return said


@pytest.mark.parametrize("at", ["random:1", "random:9", "saved"])
def test_a_killed_checkpoint(tmp_path: Path, at: str) -> None:
    """A killed checkpoint leaves nothing that the next run does not remove."""
    cache = {"EVERY_BYTE_CACHE": str(tmp_path)}
    assert python("-c", CHECKPOINT, at, **cache).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "checkpoints")) == 1
    done = python("-c", CHECKPOINT, "", **cache)
    assert done.stdout.strip() == str(tmp_path / "checkpoints" / "gpt2"), done.stderr
    assert os.listdir(tmp_path / "checkpoints") == ["gpt2"]


def test_a_disk_that_fills_while_a_checkpoint_is_made(tmp_path: Path) -> None:
    """A full disk is one line, and nothing is left."""
    done = python("-c", CHECKPOINT, "full", EVERY_BYTE_CACHE=str(tmp_path))
    assert "could not be written" in one_line(done.stdout), done.stderr
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_disk_that_fills_while_a_snapshot_is_written(tmp_path: Path) -> None:
    """The snapshot of before stays whole."""
    code = (
        "import resource, sys\nfrom every_byte import VirtualGPU\nimport torch\n"
        "with VirtualGPU() as gpu:\n"
        "    gpu.record_memory_history()\n    x = torch.empty(9, device=gpu.device)\n"
        "    gpu.dump_snapshot(sys.argv[1])\n"
        "    kept = [torch.empty(9, device=gpu.device) for _ in range(500)]\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "    try:\n        gpu.dump_snapshot(sys.argv[1])\n"
        "    except OSError as error:\n        print(error)\n"
    )
    target = tmp_path / "a.pickle"
    done = python("-c", code, str(target))
    assert "a.pickle cannot be written: File too large" in one_line(done.stdout), done.stderr
    assert os.listdir(tmp_path) == ["a.pickle"]
    assert python("-m", "every_byte", "replay", str(target)).returncode == 0


def test_a_run_that_is_killed(tmp_path: Path) -> None:
    """A killed run leaves an older snapshot as it was."""
    script, snapshot = tmp_path / "train.py", tmp_path / "a.pickle"
    script.write_text(TRAIN)
    run = ("-m", "every_byte", "run", str(script), "--card", "RTX 4090")
    assert python(*run, "--snapshot", str(snapshot)).returncode == 0
    before = snapshot.read_bytes()
    killed = python(*run, "--snapshot", str(snapshot), "--", "die")
    assert killed.returncode == -signal.SIGKILL
    assert snapshot.read_bytes() == before


NOTEBOOK = """# %%
# set-up
# %%
import os, signal
print("made")
who = {"kernel": os.getpid(), "program": os.getppid()}.get(os.environ.get("DIE"))
if who:
    os.kill(who, signal.SIGKILL)
"""


def test_a_notebook_whose_kernel_or_program_is_killed(tmp_path: Path) -> None:
    """A notebook that could not be executed is as it was."""
    (tmp_path / "01_small.py").write_text(NOTEBOOK)
    make = ("-m", "tools.notebooks", "--force", "--folder", str(tmp_path))
    assert python(*make).returncode == 0
    before = (tmp_path / "01_small.ipynb").read_bytes()
    for who, status in (("kernel", 1), ("program", -signal.SIGKILL)):
        assert python(*make, DIE=who).returncode == status
        assert (tmp_path / "01_small.ipynb").read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["01_small.ipynb", "01_small.py"]


REPLAY = """
import os, signal, sys
from helpers import record
at, path = sys.argv[1:]
replay, replace = record.replay, os.replace
left = [int(at) if at.isdecimal() else 0]
def replayed(*args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replay(*args)
def replaced(*args):
    if at == "written":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*args)
record.replay, os.replace = replayed, replaced
sys.exit(record.main(["--replay", path]))
"""


def test_a_replay_of_a_record_that_is_killed(tmp_path: Path) -> None:
    """A killed replay of a record leaves the one of before, and the next one is whole."""
    (measured,) = (ROOT / "book" / "records").glob("nvidia-h200*.json")
    record = json.loads(measured.read_text("utf-8"))
    few = ("mlp-sgd", "mlp-adam")
    record["experiments"] = {name: record["experiments"][name] for name in few}
    path, replayed = tmp_path / "card.json", tmp_path / "replayed" / "card.json"
    path.write_text(json.dumps(record))
    assert python("-c", REPLAY, "", str(path)).returncode == 0
    before = replayed.read_bytes()
    for at in ("1", "2", "written"):
        assert python("-c", REPLAY, at, str(path)).returncode == -signal.SIGKILL
        assert replayed.read_bytes() == before
    assert python("-c", REPLAY, "", str(path)).returncode == 0
    assert replayed.read_bytes() == before
    assert os.listdir(replayed.parent) == ["card.json"]


def build(folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tools.book", "--force", "--output", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def is_whole(html: Path) -> bool:
    """Whether every page is there, with the checksums of its files."""
    pages = [html / "404.html", html / "genindex.html", html / "book" / "index.html"]
    return all(re.search(r"\.css\?v=\w+", page.read_text("utf-8")) for page in pages)


def test_builds_of_the_book_that_are_killed_or_two(tmp_path: Path) -> None:
    """A killed build leaves the earlier book whole; two at once leave one whole book."""
    html = tmp_path / "_build" / "html"
    assert build(tmp_path).wait() == 0
    killed = build(tmp_path)
    time.sleep(8)
    assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert is_whole(html) and len(os.listdir(html.parent)) == 2
    both = [build(tmp_path), build(tmp_path)]
    assert [one.wait() for one in both] == [0, 0]
    assert is_whole(html) and os.listdir(html.parent) == ["html"]


def test_the_smallest_surroundings(tmp_path: Path) -> None:
    """No home, no git, locale C, a path with umlauts and a space: it runs."""
    folder = tmp_path / "ä ö"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    few = ("env", "-i", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")
    few += (f"PYTHONPATH={ROOT}",)
    run = ("-m", "every_byte", "run", str(folder / "train.py"), "--card", "RTX 4090")
    done = python(*run, "--snapshot", str(folder / "a.pickle"), before=few)
    assert done.returncode == 0, done.stderr
    assert (folder / "a.pickle").exists()


def test_four_gigabytes_of_memory(tmp_path: Path) -> None:
    """With 4 GB of addresses a script for a card of 24 GB runs."""
    (tmp_path / "train.py").write_text(TRAIN.replace("1000", "1_000_000_000"))
    limit = ("prlimit", f"--as={4 * 2**30}")
    run = ("-m", "every_byte", "run", str(tmp_path / "train.py"), "--card", "RTX 4090")
    assert python(*run, before=limit, OMP_NUM_THREADS="1").returncode == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own may not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_user_who_is_not_root(open_folder: Path) -> None:
    """Who is not root runs, and is told in a line what cannot be written."""
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if os.getuid() == 0:
        if shutil.which("setpriv") is None or python("-c", "", before=nobody).returncode:
            pytest.skip("no other user of this machine may run this Python")
    else:
        nobody = ()
    own, other = open_folder / "own", open_folder / "other"
    for folder, mode in ((own, 0o777), (other, 0o555)):
        folder.mkdir()
        (folder / "train.py").write_text(TRAIN)
        (folder / "01_small.py").write_text(NOTEBOOK)
        folder.chmod(mode)
    here = {"HOME": str(own), "EVERY_BYTE_CACHE": str(own)}
    run = ("-m", "every_byte", "run", "--card", "RTX 4090", "--snapshot")
    done = python(*run, str(own / "a"), str(own / "train.py"), before=nobody, **here)
    assert done.returncode == 0, done.stderr
    done = python(*run, str(other / "a"), str(other / "train.py"), before=nobody, **here)
    assert "cannot be written: name another file" in one_line(done.stderr)
    make = ("-m", "tools.notebooks", "--folder", str(other))
    done = python(*make, before=nobody, **here)
    assert "cannot be written: nothing was executed" in one_line(done.stderr)


def namespace(*options: str) -> tuple[str, ...]:
    """A command's beginning that runs it apart from the network or the file systems."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    for way in (("unshare", *options), ("unshare", "--map-root-user", *options)):
        if subprocess.run([*way, "true"], check=False, capture_output=True).returncode == 0:
            return way
    pytest.skip("this machine allows no namespaces")


def test_no_network_and_no_loopback(tmp_path: Path) -> None:
    """Without any network what needs none runs, and what needs the loopback says so in a line."""
    apart = namespace("--net")
    (tmp_path / "train.py").write_text(TRAIN)
    run = ("-m", "every_byte", "run", str(tmp_path / "train.py"), "--card", "RTX 4090")
    assert python(*run, before=apart).returncode == 0
    (tmp_path / "01_small.py").write_text(NOTEBOOK)
    done = python("-m", "tools.notebooks", "--folder", str(tmp_path), before=apart)
    assert done.returncode == 1
    assert "127.0.0.1 cannot be used" in one_line(done.stderr)


def test_a_place_that_is_read_only(tmp_path: Path) -> None:
    """A place that cannot be written is named in one line, before the work begins."""
    apart = namespace("--mount")
    (tmp_path / "01_small.py").write_text(NOTEBOOK)
    (tmp_path / "train.py").write_text(TRAIN)
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    before = (*apart, "sh", "-c", f'{mount} || exit 77; exec "$@"', "sh")
    done = python("-m", "tools.notebooks", "--folder", str(tmp_path), before=before)
    if done.returncode == 77:
        pytest.skip("this machine lets nothing be mounted")
    assert "cannot be written: nothing was executed" in one_line(done.stderr)
    done = python("-m", "tools.book", "--output", str(tmp_path), before=before)
    assert "name another folder with --output" in one_line(done.stderr)
    run = ("-m", "every_byte", "run", str(tmp_path / "train.py"), "--card", "RTX 4090")
    done = python(*run, "--snapshot", str(tmp_path / "a"), before=before)
    assert "cannot be written" in one_line(done.stderr)
    cache = {"EVERY_BYTE_CACHE": str(tmp_path / "cache")}
    done = python("-c", CHECKPOINT, "", before=before, **cache)
    assert "set EVERY_BYTE_CACHE to a folder that can be written" in one_line(done.stdout)
