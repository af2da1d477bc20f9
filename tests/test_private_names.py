"""No module reaches into another's private names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("every_byte", "helpers", "tools", "book/_ext", "tests", "benchmarks")
OURS = ("every_byte", "helpers", "tools", "tests")
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8"), str(path))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def is_private(name: str) -> bool:
    public = {"_replace", "_asdict", "_fields"}  # a named tuple's
    return name.startswith("_") and not name.endswith("__") and name not in public


def private_members(tree: ast.Module) -> Iterator[str]:
    """The private names that a module defines for itself, its classes, and their objects."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


DEFINED = {
    place: {name for name in private_members(tree) if is_private(name)}
    for place, tree in TREES.items()
}


def foreign(place: str, tree: ast.Module) -> Iterator[str]:
    """The private names of another module of ours that a module imports, or takes of an object."""
    others = set().union(*(names for other, names in DEFINED.items() if other != place))
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases) if module.startswith(OURS):
                yield from (f"{module}.{a.name}" for a in aliases if is_private(a.name))
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass  # of an object of its own
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(value=value, attr=name) if is_private(name):
                if name in others - DEFINED[place] and "torch" not in ast.unparse(value):
                    yield ast.unparse(node)


@pytest.mark.parametrize("place", TREES)
def test_no_module_reaches_into_anothers_private_names(place: str) -> None:
    assert list(foreign(place, TREES[place])) == []


def test_a_reach_into_a_private_name_would_be_found() -> None:
    code = "from every_byte.tracker import _running\nprint(gpu._tracker)\nself._own"
    tree = ast.parse(code)
    DEFINED["reaching.py"] = set()
    try:
        assert list(foreign("reaching.py", tree)) == ["every_byte.tracker._running", "gpu._tracker"]
    finally:
        del DEFINED["reaching.py"]
