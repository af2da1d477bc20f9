"""every-byte check, on machines that lack what it checks."""

import json
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from every_byte import cli, environment
from every_byte.environment import Check, checks
from every_byte.units import GiB, MiB
from helpers.environment import require

ROOT = Path(__file__).parent.parent
RUN = "import sys; from every_byte.cli import main; sys.exit(main(['check', *sys.argv[1:]]))"


@pytest.fixture(autouse=True)
def a_machine_that_has_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = SimpleNamespace(available=8 * GiB, total=16 * GiB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    disk = SimpleNamespace(free=100 * GiB)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: disk)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tmp_path / "cache"))


def found() -> dict[str, Check]:
    return {check.name: check for check in checks()}


def the_failure(name: str) -> str:
    (failed,) = [check for check in checks() if not check.ok]
    assert failed.name == name
    return str(failed)


def run(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(before) + RUN
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_machine_without_cuda_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "All is well."
    assert all(line.startswith("[OK]   ") for line in lines[:-1])
    assert "[OK]   CUDA: no device; figures are replayed on the virtual GPU" in lines
    assert any(line.startswith("[OK]   formats, PyTorch: FP64, FP32, BF16") for line in lines)


def test_every_requirement_has_its_line() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "requirements").glob("*.txt")]
    lines = [line for text in texts for line in text.splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    names = found()
    assert len(wanted) > 15
    for line in wanted:
        name = line.partition(">=")[0]
        assert names[name].found.startswith(metadata.version(name)), name
        for bound in line.removeprefix(name).split(","):
            assert bound in names[name].found


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["checks"][0]["name"] == "Python"
    assert {"name", "ok", "found", "cure"} == set(report["checks"][0])


def version(monkeypatch: pytest.MonkeyPatch, package: str, says: str | None) -> None:
    known = metadata.version

    def tell(name: str) -> str | None:
        if name != package:
            return known(name)
        if says == "":
            raise metadata.PackageNotFoundError(name)
        return says

    monkeypatch.setattr(metadata, "version", tell)


def test_a_wrong_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version(monkeypatch, "transformers", "4.41.0")
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert (
        '[FAIL] transformers: 4.41.0 (>=5.4); python -m pip install --upgrade "transformers>=5.4"\n'
    ) in out
    assert "\n1 of " in out and "Traceback" not in out
    with pytest.raises(ImportError, match=r"^transformers: 4.41.0 \(>=5.4\); python -m pip instal"):
        require("transformers")
    require("torch")


@pytest.mark.parametrize(
    ("says", "ok"), [("2.8.0+cu128", True), ("2.9.0rc1", True), ("2.7", False)]
)
def test_local_and_early_versions(monkeypatch: pytest.MonkeyPatch, says: str, ok: bool) -> None:
    version(monkeypatch, "torch", says)
    assert found()["torch"].ok is ok


def test_a_version_beyond_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "jupyter-book", "2.1")
    assert "2.1 (<2,>=1.0.4.post1)" in the_failure("jupyter-book")


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "bitsandbytes", "")
    assert "not installed (>=0.50); python -m pip" in the_failure("bitsandbytes")


@pytest.mark.parametrize("says", [None, "unknown"])
def test_a_package_with_damaged_metadata(monkeypatch: pytest.MonkeyPatch, says: str | None) -> None:
    version(monkeypatch, "tqdm", says)
    assert f"[FAIL] tqdm: {says} (>=4.66)" in the_failure("tqdm")


def test_nothing_is_installed(tmp_path: Path) -> None:
    """Python without site-packages: each line says what is missing."""
    command = [sys.executable, "-S", "-m", "every_byte", "check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("[OK]   Python: 3.")
    assert "[FAIL] torch: not installed (>=2.8)" in done.stdout
    assert "[FAIL] import torch: No module named 'torch'" in done.stdout
    assert "[FAIL] memory: not known: No module named 'psutil'" in done.stdout


def test_torch_is_there_and_cannot_be_imported() -> None:
    done = run(
        """
        import sys
        class Broken:
            def find_spec(self, name, *_):
                if name == "torch":
                    raise OSError("libcudart.so.13: cannot open shared object file")
        sys.meta_path.insert(0, Broken())
        """
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "[OK]   torch: 2" in done.stdout
    assert "[FAIL] import torch: libcudart.so.13: cannot open shared" in done.stdout


def test_without_packaging_versions_are_told_and_not_compared() -> None:
    done = run("import sys; sys.modules['packaging.requirements'] = None\n")
    assert done.stderr == ""
    assert "[OK]   torchvision: " in done.stdout and ", not compared with >=0.23" in done.stdout


def test_help_and_start_are_quick() -> None:
    """Nothing heavy is imported before it is asked for."""
    code = """
import sys
from every_byte import cli
cli.parser(["check"])
print("torch" in sys.modules, len(sys.modules) < 200)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False True\n"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_folder_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tmp_path / place))
    line = the_failure("cache folder")
    assert f"{tmp_path / place} cannot be written" in line
    assert line.endswith("; set EVERY_BYTE_CACHE to a folder that can be written")


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    assert "/cache: Permission denied; set EVERY_BYTE_CACHE" in the_failure("cache folder")


def test_too_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    little = SimpleNamespace(available=GiB, total=2 * GiB, free=GiB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: little)
    failed = [str(check) for check in checks() if not check.ok]
    assert [line.split(":")[0] for line in failed] == ["[FAIL] memory", "[FAIL] disk"]
    assert "1024.00 MiB of 2.00 GiB free; end other programs" in failed[0]


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "python_version_tuple", lambda: ("3", "9", "1"))
    assert "install Python 3.11 or newer" in the_failure("Python")


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old.\nMore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert "driver on your system is too old.; update the driver" in the_failure("CUDA")


def card(monkeypatch: pytest.MonkeyPatch, major: int, free: int) -> None:
    properties = SimpleNamespace(name="A Card", major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GiB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_90"])
    monkeypatch.setattr(environment, "formats", lambda: "GPU: all of them")


def test_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 9, 20 * GiB)
    lines = found()
    assert all(check.ok for check in lines.values())
    assert lines["card"].found == "A Card, 20.00 GiB of 24.00 GiB free"
    assert lines["compute capability"].found == "9.0"


def test_a_card_that_is_too_old_or_full(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 5, 20 * GiB)
    assert "5.0; this PyTorch was built for 7.5 and newer" in the_failure("compute capability")
    card(monkeypatch, 9, 100 * MiB)
    assert "end what else uses the card" in the_failure("card")
