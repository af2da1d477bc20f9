"""Run the engine's tests with the oldest and the newest PyTorch that can be had.

Each has an environment of its own, in the cache folder, of the engine's requirements and
pytest alone. The tests are those that need no more: see `engine_tests`. Then the libraries of
the record come in, just as old or new, and it is seen that each of its experiments runs, on
the virtual GPU: ``every-byte record --dry-run``.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from every_byte.environment import cache_folder
from tools.repository import ROOT

RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}  # uv's names
_OF_RECORD = re.compile("(platformdirs|peft|torchvision)\\b")
ALLOWED = {"every_byte", "helpers.mlp", "hypothesis", "pytest", "torch"}


def engine_tests(folder: Path = ROOT / "tests") -> list[Path]:
    """The test files that import nothing but the engine, what it needs, and one model."""
    return [path for path in sorted(folder.glob("test_*.py")) if _imports(path) <= ALLOWED]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    tops = {name if name.startswith("helpers.") else name.partition(".")[0] for name in found}
    return tops - sys.stdlib_module_names


def environment(which: str) -> Path:
    """Make the environment, or bring it up to date, and return its Python.

    Raises:
        CalledProcessError: uv failed; it has said why.
    """
    folder = cache_folder("versions") / f"{which}-{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv = [sys.executable, "-m", "uv", "--quiet"]
    install = [*uv, "pip", "install", "--python", str(python)]
    requirements = str(ROOT / "requirements" / "engine.txt")
    if not python.exists():
        subprocess.run([*uv, "venv", "--python", sys.executable, str(folder)], check=True)
    how = ["--upgrade", "--resolution", RESOLUTIONS[which]]
    subprocess.run([*install, *how, "-r", requirements], check=True)
    # numpy: torch does without, but what it exchanges with it is tested too.
    subprocess.run([*install, "pytest", "hypothesis", "numpy"], check=True)
    return python


def add_the_records(python: Path, which: str) -> None:
    """Install what the record's experiments use beside the engine.

    Raises:
        CalledProcessError: uv failed; it has said why.
    """
    lists = [ROOT / "requirements" / f"{name}.txt" for name in ("engine", "transformers", "book")]
    asked = [line for path in lists[:2] for line in path.read_text("utf-8").splitlines()]
    asked += [line for line in lists[2].read_text("utf-8").splitlines() if _OF_RECORD.match(line)]
    ranges = [line for line in asked if line and not line.startswith("#")]
    install = [sys.executable, "-m", "uv", "--quiet", "pip", "install", "--python", str(python)]
    # In one call: torchvision goes with one version of torch alone.
    subprocess.run([*install, "--resolution", RESOLUTIONS[which], *ranges], check=True)


def run(which: str) -> bool:
    """Run the tests and the record's experiments with one of `RESOLUTIONS`; whether they pass."""
    python = environment(which)
    tell = "import platform, torch; print('Python', platform.python_version(), torch.__version__)"
    said = subprocess.run([python, "-c", tell], check=True, capture_output=True, text=True)
    print(f"{which}: {said.stdout.strip()}", flush=True)
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    tests = [str(path) for path in engine_tests()]
    env |= {"PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", "pytest", "-q", *tests]
    tested = subprocess.run(command, cwd=ROOT, check=False, env=env)
    add_the_records(python, which)
    dry = [str(python), "-m", "helpers.record", "--dry-run"]
    ran = subprocess.run(dry, cwd=ROOT, check=False, env=env)
    return tested.returncode == ran.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make test-versions", description=__doc__)
    parser.add_argument("which", nargs="*", help=f"{' or '.join(RESOLUTIONS)}; else both")
    chosen = parser.parse_args(arguments).which or list(RESOLUTIONS)
    unknown = [which for which in chosen if which not in RESOLUTIONS]
    if unknown:
        parser.error(f"{unknown[0]!r} is unknown: expected {' or '.join(RESOLUTIONS)}")
    try:
        passed = {which: run(which) for which in chosen}
    except subprocess.CalledProcessError as error:
        print(f"an environment could not be made: {error}", file=sys.stderr)
        return 1
    for which, ok in passed.items():
        print(f"{which}: {'passed' if ok else 'failed'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
