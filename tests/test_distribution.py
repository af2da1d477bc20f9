"""The wheel: built, installed alone, used beside a folder that has helpers of its own."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tools.repository import ROOT, links

ADDRESS = "https://example.org/someone/every-byte"
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "_config.yml")
FOLDERS = ("every_byte", "helpers", "requirements", "tools")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel, which is built from the source distribution."""
    root, built, folder = map(tmp_path_factory.mktemp, ("root", "built", "installed"))
    for name in FILES:
        shutil.copy(ROOT / name, root)
    for name in FOLDERS:
        unwanted = shutil.ignore_patterns("__pycache__", "mnist-10k")
        shutil.copytree(ROOT / name, root / name, ignore=unwanted)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(root), "REPOSITORY": ADDRESS}
    sdist = f"from setuptools import build_meta; print(build_meta.build_sdist({str(built)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", sdist], cwd=root, env=env, check=True, capture_output=True, text=True
    )
    archive = built / done.stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(archive)]
    subprocess.run(build, cwd=built, env=env, check=True)
    (wheel,) = built.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(install, cwd=built, env=env, check=True)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder, with helpers of its own."""
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("MINE = True\n")
    return tmp_path


def run(folder: Path, installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A new Python with the wheel and the packages of this one, without the project's folder."""
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    begin = f"import sys; sys.path[:] = {['', str(installed), *packages]} + sys.path[1:]\n"
    command = [sys.executable, "-S", "-c", begin + code]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


# The article's network and step; its figure for SGD, 425.51 MB, completed to the byte by its
# parts (README).
STEP = """
import every_byte
assert every_byte.__file__.startswith({installed!r}), every_byte.__file__
assert "torch" not in sys.modules
import torch
from torch import nn, optim
import helpers
assert helpers.MINE

gpu = every_byte.VirtualGPU().open()
with gpu.device:
    widths = (784, 8192, 4096, 2048, 1024, 512, 10)
    layers = [x for n, m in zip(widths, widths[1:]) for x in (nn.Linear(n, m), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
data = torch.randn(128, 784).to(gpu.device)
target = torch.randint(0, 10, (128,)).to(gpu.device)
optimizer = optim.SGD(model.parameters(), lr=0.001)
optimizer.zero_grad()
output = model(data)
loss = nn.CrossEntropyLoss()(output, target)
loss.backward()
optimizer.step()
print(gpu.memory_allocated())
unwanted = {{"jupyter_book", "transformers", "bitsandbytes", "accelerate", "matplotlib", "psutil"}}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""


def test_a_training_step_in_a_folder_with_other_helpers(installed: Path, elsewhere: Path) -> None:
    done = run(elsewhere, installed, STEP.format(installed=str(installed)))
    assert (done.returncode, done.stdout) == (0, "425512448\n"), done.stderr


def test_only_the_engine_is_in_it(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if path.is_dir()}
    (described,) = packages - {"bin", "every_byte"}
    assert described.endswith(".dist-info")
    assert (installed / "every_byte" / "py.typed").exists()
    there = {p.relative_to(installed).as_posix() for p in installed.glob("every_byte/**/*.*")}
    ours = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("every_byte/**/*.*")}
    assert {p for p in there ^ ours if "__pycache__" not in p} == set()


def test_the_metadata_knows_version_licence_and_links(installed: Path) -> None:
    (found,) = metadata.distributions(name="every-byte", path=[str(installed)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert found.version == project["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {found.version}\n" in citation
    assert found.metadata["License-Expression"] == "MIT"
    assert "Permission is hereby granted" in (found.read_text("licenses/LICENSE") or "")
    assert found.metadata["Description"].startswith("# Every Byte")
    urls = found.metadata.get_all("Project-URL")
    assert urls == [f"Repository, {ADDRESS}", f"Issues, {ADDRESS}/issues"]
    (script,) = found.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("every-byte", "every_byte.cli:main")
    (plugin,) = found.entry_points.select(group="pytest11")
    assert plugin.name == plugin.value == "every_byte.pytest_plugin"


def test_it_asks_for_three_packages_and_brings_the_rest_by_extras(installed: Path) -> None:
    (found,) = metadata.distributions(name="every-byte", path=[str(installed)])
    required = found.requires or []
    base = [line.split(">")[0] for line in required if "extra" not in line]
    assert base == ["torch", "sortedcontainers", "typing-extensions"]
    by_extra: dict[str, set[str]] = {}
    for line in required:
        wanted, _, condition = line.partition("; extra == ")
        if condition:
            by_extra.setdefault(condition.strip('"'), set()).add(wanted)
    assert set(by_extra) == {"transformers", "book"}
    assert by_extra["transformers"] < by_extra["book"]
    names = {wanted.split(">")[0].split("<")[0] for wanted in by_extra["book"]}
    assert {"jupyter-book", "transformers", "bitsandbytes", "nbval"} <= names


def test_the_command_that_it_installs(installed: Path, elsewhere: Path) -> None:
    script = (installed / "bin" / "every-byte").read_text("utf-8")
    code = f"sys.argv = ['every-byte', 'estimate', 'gpt2', '--json']\n{script}"
    done = run(elsewhere, installed, code)
    assert done.returncode == 0, done.stderr
    assert '"model": "gpt2"' in done.stdout


def test_the_check_asks_only_for_what_it_needs(installed: Path, elsewhere: Path) -> None:
    code = "from every_byte.cli import main; sys.exit(main(['check']))"
    done = run(elsewhere, installed, code)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("[OK]   torch: 2")
    assert any(line.startswith("[OK]   transformers: ") for line in lines)  # it is there
    assert not any("cache folder" in line or "memory" in line for line in lines)
    hidden = f"import importlib.metadata as m\n{HIDE}\n{code}"
    done = run(elsewhere, installed, hidden)
    assert (done.returncode, done.stderr) == (0, "")
    assert "transformers" not in done.stdout


HIDE = """
known = m.version
def version(name):
    if name == "transformers":
        raise m.PackageNotFoundError(name)
    return known(name)
m.version = version
"""


def test_links_come_from_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REPOSITORY", raising=False)
    (tmp_path / "_config.yml").write_text('repository: {url: ""}\nhtml: {baseurl: ""}\n')
    assert links(tmp_path) == {}
    (tmp_path / "_config.yml").write_text(
        "repository: {url: https://e.org/a/b}\nhtml: {baseurl: https://a.e.org/b/}\n"
    )
    assert links(tmp_path) == {
        "Documentation": "https://a.e.org/b/",
        "Repository": "https://e.org/a/b",
        "Issues": "https://e.org/a/b/issues",
    }
