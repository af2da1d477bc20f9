"""The set-up cell finds the book's own packages, whatever else bears their names."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tools.notebooks import made, sources
from tools.repository import ROOT

SOURCES = sources(ROOT / "notebooks")
IMPORTS = "import every_byte.units, helpers.tables"
TELL = "print(every_byte.units.__file__, helpers.tables.__file__, sep='\\n')"


def cell(source: Path, repository: str | None) -> str:
    """What a notebook's set-up cell does before the notebook's own imports."""
    text = next(c for c in made(source, repository).cells if c.cell_type == "code").source
    return str(text.partition("            del sys.modules[name]\n")[0]) + (
        "            del sys.modules[name]\n"
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A git repository of the book's code."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "_toc.yml", root)
    for package in ("every_byte", "helpers"):
        unwanted = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(ROOT / package, root / package, ignore=unwanted)
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "All of it")):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root.as_uri()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that has helpers of its own."""
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    return tmp_path


def run(folder: Path, *code: str) -> subprocess.CompletedProcess[str]:
    """A new Python in a folder, with the packages that are installed but not with the book."""
    paths = ["", sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    begin = f"import sys; sys.path[:] = {paths} + [p for p in sys.path if p]"
    command = [sys.executable, "-S", "-c", "\n".join([begin, *code])]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)


def test_every_notebook_has_it_from_one_place() -> None:
    for source in SOURCES:
        text, begin = source.read_text("utf-8"), cell(source, None)
        assert begin.startswith("import importlib.util\n") and '"git"' not in text.split("# %%")[2]
        assert max(map(len, begin.splitlines())) <= 78
        if re.search(r"^(from|import) bitsandbytes", text, re.MULTILINE):
            assert '"tabulate", "bitsandbytes"]' in begin, source.stem


def test_beside_other_helpers_it_fetches_the_books(elsewhere: Path, repository: str) -> None:
    begin = cell(SOURCES[0], "https://e.org/x").replace("https://e.org/x", repository)
    done = run(elsewhere, begin, IMPORTS, TELL)
    assert done.returncode == 0, done.stderr
    book = elsewhere / "every-byte"
    files = [book / "every_byte" / "units.py", book / "helpers" / "tables.py"]
    assert done.stdout.splitlines() == list(map(str, files))
    again = run(elsewhere, begin.replace(repository, "https://nowhere.invalid/x"), IMPORTS, TELL)
    assert again.stdout == done.stdout  # what was fetched is kept


def test_other_helpers_that_are_imported_already_are_replaced(
    elsewhere: Path, repository: str
) -> None:
    begin = cell(SOURCES[0], "https://e.org/x").replace("https://e.org/x", repository)
    done = run(elsewhere, "import helpers", begin, IMPORTS, TELL)
    assert done.returncode == 0, done.stderr
    first, *files = done.stdout.splitlines()
    other = elsewhere / "helpers" / "__init__.py"
    assert first == f"helpers: from now on the book's, not {other}"
    assert files[1] == str(elsewhere / "every-byte" / "helpers" / "tables.py")


def test_without_an_address_it_says_so(elsewhere: Path) -> None:
    done = run(elsewhere, cell(SOURCES[0], None), IMPORTS)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ModuleNotFoundError: helpers: run this notebook in the book's folder; "
    )


def test_inside_the_book_nothing_is_fetched_and_nothing_said() -> None:
    done = run(ROOT / "notebooks", cell(SOURCES[0], None), IMPORTS, TELL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(ROOT / "every_byte" / "units.py"),
        str(ROOT / "helpers" / "tables.py"),
    ]


def test_new_pythons_find_the_book_as_well() -> None:
    child = "subprocess.run([sys.executable, '-c', 'import helpers.tables'], check=True)"
    where = "print(os.environ['PYTHONPATH'])"
    done = run(ROOT / "notebooks", cell(SOURCES[0], None), child, where)
    assert (done.returncode, done.stdout) == (0, f"{ROOT}\n"), done.stderr


def test_missing_packages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    (source,) = [source for source in SOURCES if source.stem.startswith("09_")]
    exec(cell(source, "https://e.org/x"), {})
    clone, pip = commands
    assert clone[-2:] == ["https://e.org/x", str(tmp_path / "every-byte")]
    assert pip[-4:] == ["platformdirs", "sortedcontainers", "tabulate", "bitsandbytes"]
