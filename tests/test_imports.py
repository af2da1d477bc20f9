"""Imports go down only: between the project's folders, and between a package's floors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.repository import ROOT
from tools.versions import engine_tests

# Who may stand on whom.
HOUSES = {
    "every_byte": {"every_byte"},
    "tools": {"tools", "every_byte"},
    "helpers": {"helpers", "every_byte"},
    "benchmarks": {"benchmarks", "helpers", "every_byte"},
    "book/_ext": {"tools", "helpers", "every_byte"},
    "notebooks": {"helpers", "every_byte"},
}
# The floors of a package from the bottom up: modules, and packages as a whole. Neighbours on a
# floor do not know each other.
FLOORS = {
    "every_byte": [
        {"units", "files", "formats", "kinds"},
        {"data"},
        {"environment", "allocator", "explain"},
        {"estimate", "memory", "in_place"},
        {"cuda", "tracker"},
        {"virtual"},
        {"gpu"},
        {"ranks"},
        {"script", "leaks"},
        {"watch"},
        {"report"},
        {"page", "levers", "pytest_plugin"},
        {"commands"},
        {"cli"},
        {"__main__"},
    ],
    "helpers": [
        {"environment", "mlp", "tables", "plots", "measured", "workloads", "signatures"},
        {"placement", "mnist"},
        {"models", "digits"},
        {"hollow", "experiments"},
        {"record"},
    ],
    "tools": [
        {"repository", "setup_cell", "bootstrap", "kernel_imports"},
        {"book", "kernels", "notebooks", "serve", "versions", "licences", "mutants"},
    ],
}
# What else the engine may import: its dependencies, and what says what an environment lacks.
DEPENDENCIES = {"torch", "sortedcontainers", "typing_extensions"}
MORE = {
    "environment.py": {"packaging", "platformdirs", "psutil"},
    "pytest_plugin.py": {"pytest"},
}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every module that a file imports, anywhere in it, and the name that it takes from it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"every_byte", "helpers", "tools", "benchmarks"}


@pytest.mark.parametrize("house", HOUSES)
def test_no_house_stands_on_a_higher_one(house: str) -> None:
    for path in files(house):
        used = {module.partition(".")[0] for module, _ in imports(path) if is_ours(module)}
        assert used <= HOUSES[house], path


@pytest.mark.parametrize("house", FLOORS)
def test_imports_go_down(house: str) -> None:
    floor = {name: at for at, names in enumerate(FLOORS[house]) for name in names}
    folder = ROOT / house
    for path in files(house):
        own = path.relative_to(folder).with_suffix("").parts[0]
        if own == "__init__":  # whose names are imported when they are first asked for
            continue
        assert own in floor, f"{path} has no floor: say in FLOORS where it stands"
        for module, name in imports(path):
            package, _, rest = module.partition(".")
            other = (rest or name).partition(".")[0]
            if package == house and other in floor and other != own:
                assert floor[other] < floor[own], f"{path} imports {module} {name}"


@pytest.mark.parametrize("house", HOUSES)
def test_no_private_name_of_another_module_is_imported(house: str) -> None:
    for path in files(house):
        for module, name in imports(path):
            assert not (is_ours(module) and name.startswith("_")), f"{path}: {module}.{name}"


def test_the_engine_imports_nothing_but_its_dependencies() -> None:
    for path in files("every_byte"):
        used = {module.partition(".")[0] for module, _ in imports(path)}
        more = MORE.get(path.name, set())
        allowed = DEPENDENCIES | more | {"every_byte"} | sys.stdlib_module_names
        assert used <= allowed, path


@pytest.mark.parametrize(
    "module",
    ["", ".allocator", ".estimate.fit", ".environment", ".data", ".formats", ".units", ".cli"],
)
def test_what_needs_no_torch_imports_none(module: str) -> None:
    code = f"import sys, every_byte{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_engines_tests_are_found() -> None:
    names = {path.stem for path in engine_tests()}
    assert {"test_allocator", "test_gpu", "test_replay", "test_autocast", "test_cli"} <= names
    assert not {"test_record", "test_checkpoints", "test_book", "test_notebooks"} & names
