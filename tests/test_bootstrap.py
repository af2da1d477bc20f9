"""tools/bootstrap.py, run as the Makefile runs it, on projects that take no network."""

import glob
import hashlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pip
import pytest

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = PROJECT / "tools" / "bootstrap.py"
INPUTS = ("requirements.lock", "requirements.txt", "pyproject.toml")

# What can be wrong with a computer, as code that runs before the script.
OLD_PYTHON = "sys.version_info = (3, 10, 4, 'final', 0)"
OTHER_PYTHON = "sys.version_info = (3, 99, 0, 'final', 0)"
NO_VENV = "sys.modules['ensurepip'] = None"
FULL_DISK = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 2**30)"
INTERRUPTED = "import shutil, signal; shutil.disk_usage = lambda path: signal.raise_signal(2)"
VENV_FAILS = """
import venv
def create(self, path): raise ValueError("made afresh" if self.clear else "not cleared")
venv.EnvBuilder.create = create
"""
# The seconds that a venv takes go into its pip, so here it borrows that of the tests. Every make
# in a fresh checkout tests the real thing.
VENV_IS_QUICK = f"""
import pathlib, venv
make = venv.EnvBuilder.create
def create(self, path):
    self.with_pip = False
    make(self, path)
    packages = next(pathlib.Path(path).glob("lib/*/site-packages"))
    (packages / "pip").symlink_to({os.path.dirname(pip.__file__)!r})
venv.EnvBuilder.create = create
"""


def environ(wheels=None):
    """No network, and none of the settings for pip that this computer has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    found = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels or "")}
    return {**kept, **found, "PIP_CONFIG_FILE": os.devnull}


def command(root, before="", python=sys.executable):
    if not before:
        return [python, str(SCRIPT), "--root", str(root)]
    code = f"import runpy, sys\nsys.argv = [{str(SCRIPT)!r}, '--root', {str(root)!r}]\n{before}\n"
    return [python, "-c", code + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"]


def run(root, before="", python=sys.executable, wheels=None):
    return subprocess.run(
        command(root, before, python), capture_output=True, text=True, env=environ(wheels)
    )


def the_line(done, status=1):
    """What a run that failed said, which is one line and nothing else."""
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def is_current(root, before=""):
    """Whether the script finds nothing to do: anything else begins with looking for venv."""
    done = run(root, NO_VENV + "\n" + before)
    if done.returncode:
        assert "python3-venv" in the_line(done)
    return done.returncode == 0


def write_wheel(folder, name, version="1"):
    import pathlib
    import zipfile

    path = pathlib.Path(folder, f"{name}-{version}-py3-none-any.whl")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path.name


@pytest.fixture
def root(tmp_path):
    """The project's own lock, with nothing installed."""
    for name in INPUTS:
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "iniconfig")
    return folder


@pytest.fixture(scope="module")
def first_run(wheels, tmp_path_factory):
    """A project with a lock of one package, in a folder whose name takes quoting."""
    root = tmp_path_factory.mktemp("a project")
    digest = hashlib.sha256((wheels / "iniconfig-1-py3-none-any.whl").read_bytes()).hexdigest()
    (root / "requirements.lock").write_text(f"iniconfig==1 \\\n    --hash=sha256:{digest}\n")
    (root / "requirements.txt").write_text("iniconfig\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (root / "backend.py").write_text(
        inspect.getsource(write_wheel)
        + "def build_editable(folder, *_): return write_wheel(folder, 'the_project')\n"
    )
    return root, run(root, VENV_IS_QUICK, wheels=wheels)


@pytest.fixture
def installed(first_run):
    root, _ = first_run
    files = [root / name for name in (*INPUTS, "backend.py", ".venv/installed")]
    before = {path: path.read_bytes() for path in files}
    yield root
    for path, content in before.items():
        path.write_bytes(content)


def test_installs_the_lock_and_the_project(first_run):
    root, done = first_run
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Installing") and done.stdout.count("\n") == 1
    python = root / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", "import iniconfig, the_project"], check=True)
    assert not (root / ".venv" / "tmp").exists()


def test_does_nothing_twice(installed):
    def state():
        return {path: path.lstat().st_mtime_ns for path in installed.rglob("*")}

    before = state()
    done = run(installed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert state() == before


def change(path):
    with path.open("a") as file:
        file.write("# changed\n")


def test_notices_another_lock_and_nothing_else(installed):
    change(installed / "pyproject.toml")
    change(installed / "requirements.txt")
    assert is_current(installed)
    change(installed / "requirements.lock")
    assert not is_current(installed)


def test_notices_another_python(installed):
    assert is_current(installed)
    assert not is_current(installed, OTHER_PYTHON)


def test_notices_a_move(installed):
    moved = installed.rename(installed.with_name("moved"))
    try:
        assert not is_current(moved)
    finally:
        moved.rename(installed)


def test_notices_a_missing_python(installed):
    python = installed / ".venv" / "bin" / "python"
    aside = python.rename(python.with_name("aside"))
    try:
        assert not is_current(installed)
    finally:
        aside.rename(python)


def test_a_changed_lock_updates_the_environment_in_place(installed, wheels):
    change(installed / "requirements.lock")
    done = run(installed, VENV_FAILS, wheels=wheels)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Updating") and done.stdout.count("\n") == 1
    assert is_current(installed)


def test_an_unfinished_environment_is_made_afresh(installed, wheels):
    (installed / ".venv" / "installed").unlink()
    assert "made afresh" in the_line(run(installed, VENV_FAILS, wheels=wheels))


def test_another_pythons_environment_is_made_afresh(installed, wheels):
    before = VENV_FAILS + OTHER_PYTHON
    assert "made afresh" in the_line(run(installed, before, wheels=wheels))


def test_what_works_stays_where_its_replacement_fails(installed, wheels):
    assert run(installed, VENV_FAILS + OTHER_PYTHON, wheels=wheels).returncode == 1
    assert is_current(installed)
    (installed / "backend.py").write_text("raise SystemExit('broken')\n")
    done = run(installed, VENV_IS_QUICK + OTHER_PYTHON, wheels=wheels)
    assert done.returncode == 1 and "failed" in done.stderr.splitlines()[-1]
    assert is_current(installed)
    subprocess.run([installed / ".venv/bin/python", "-c", "import the_project"], check=True)
    assert not (installed / ".venv.before").exists()


def test_a_kill_between_the_two_is_undone(installed):
    venv, before = installed / ".venv", installed / ".venv.before"
    venv.rename(before)
    venv.mkdir()  # as far as the replacement came
    assert is_current(installed)
    assert not before.exists()


def test_too_little_disk_beside_what_works(installed, wheels):
    with (installed / ".venv" / "large").open("wb") as file:
        file.truncate(12 * 2**30)  # takes no room
    line = the_line(run(installed, FULL_DISK + "\n" + OTHER_PYTHON, wheels=wheels))
    assert "1.0 GiB of disk are free" in line and "or remove .venv itself" in line
    (installed / ".venv" / "large").unlink()


def test_a_failed_update_says_why_and_leaves_no_stamp(installed, wheels):
    with (installed / "requirements.lock").open("a") as file:
        file.write(f"nowhere==1 \\\n    --hash=sha256:{'0' * 64}\n")
    done = run(installed, wheels=wheels)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No matching distribution found for nowhere==1" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("bootstrap: pip install --require-hashes") and "failed" in last
    assert not (installed / ".venv" / "installed").exists()


def test_ctrl_c_while_pip_runs(installed, wheels):
    change(installed / "requirements.lock")
    (installed / "backend.py").write_text(
        "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(5)\n"
    )
    process = subprocess.Popen(
        command(installed),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(wheels),
        start_new_session=True,
    )
    while not (installed / "started").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate()
    assert (process.returncode, error.count("\n")) == (130, 1), error
    assert not (installed / ".venv" / "installed").exists()


def test_ctrl_c_before_that(root):
    assert "interrupted" in the_line(run(root, INTERRUPTED), status=130)


def test_without_a_network_the_first_run_leaves_nothing(root):
    line = the_line(run(root, VENV_IS_QUICK))
    assert "no package index" in line and "needs the network" in line
    assert sorted(path.name for path in root.iterdir()) == sorted(INPUTS)


def test_without_a_network_what_was_there_stays(installed):
    stamp = (installed / ".venv" / "installed").read_text()
    assert "no package index" in the_line(run(installed, OTHER_PYTHON))
    assert (installed / ".venv" / "installed").read_text() == stamp
    assert is_current(installed)


@pytest.mark.parametrize("name", INPUTS)
def test_a_missing_file(root, name):
    (root / name).unlink()
    assert f"there is no {name}" in the_line(run(root))


def test_without_venv(root):
    assert "apt install python3-venv" in the_line(run(root, NO_VENV))


def test_too_little_disk(root):
    assert "1.0 GiB of disk are free" in the_line(run(root, FULL_DISK))


def test_a_python_that_says_it_is_old(root):
    line = the_line(run(root, OLD_PYTHON))
    assert "Python 3.10.4" in line and "3.11" in line and "PYTHON=python3.12" in line


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.10"])
def test_a_python_that_is_old(root, version):
    found = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))
    for python in filter(None, [*found, shutil.which(f"python{version}")]):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            assert f"Python {version}." in the_line(run(root, python=python))
            return
    pytest.skip(f"there is no Python {version} here")
