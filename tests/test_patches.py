"""PyTorch's private names: the table holds those that the package uses, and no others."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from every_byte.gpu import VirtualGPU
from every_byte.virtual.patches import PRIVATE_NAMES, find

ROOT = Path(__file__).parent.parent
TABLE = {private.name for private in PRIVATE_NAMES}
# Three are recognised on the stack, so that beam search and Whisper come to an end; one tells
# what a lever would change.
OF_TRANSFORMERS = {
    "_check_early_stop_heuristic": "GenerationMixin",
    "_update_finished_beams": "GenerationMixin",
    "_retrieve_segment": "WhisperForConditionalGeneration",
    "_attn_implementation": "PreTrainedConfig",
}
DOCUMENTED = {"_saved_"}  # of a graph's nodes: "Autograd mechanics" in PyTorch's documentation
OF_BITSANDBYTES = {
    *("_gemm_4bit_custom_max_m", "_gemm_4bit_use_custom_cuda", "_gpu_dispatch_props")
}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def parsed() -> Iterator[ast.Module]:
    for path in sorted((ROOT / "every_byte").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        tree.body = [node for node in tree.body if "PrivateName(" not in ast.unparse(node)[:40]]
        yield tree


@cache
def own_names() -> set[str]:
    """The private names that the package itself defines: of functions, classes, attributes."""
    names = set()
    for node in (node for tree in parsed() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    # It overrides this one of PyTorch's.
    ours = {name for name in names if is_private(name)} - {"_should_skip_dynamo"}
    return ours | {"_every_byte_copy"}  # an attribute that it gives to PyTorch's storages


def chain(node: ast.expr, imported: dict[str, str]) -> str:
    """A dotted expression, from ``torch`` where it begins there, else from ``*``."""
    match node:
        case ast.Name(id=name):
            return imported.get(name, "*")
        case ast.Attribute(value=value, attr=attr):
            return f"{chain(value, imported)}.{attr}"
    return "*"


def used(tree: ast.Module) -> Iterator[str]:
    """The private names in use: dotted from ``torch``, or from ``*`` if not known of what."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                imported |= {a.asname or a.name.partition(".")[0]: a.name for a in aliases}
            case ast.ImportFrom(module=str(module), names=aliases) if module.startswith("torch"):
                imported |= {a.asname or a.name: f"{module}.{a.name}" for a in aliases}
    imported |= {name: "torch" for name, of in imported.items() if of.partition(".")[0] == name}
    yield from imported.values()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                yield chain(node, imported)
            case ast.Constant(value=str(text)) if re.fullmatch(r"torch[.\w]*\._[.\w]+", text):
                yield text
            case ast.Constant(value=str(text)) if is_private(text):
                yield f"*.{text}"
            case ast.FunctionDef(name="_should_skip_dynamo" as name):
                yield f"*.{name}"


@cache
def operators() -> set[str]:
    """Operators are named by their schemas, and called through ``torch.ops``."""
    names = torch._C._dispatch_get_all_op_names()
    parts = {part for name in names for part in re.split(r"::|\.", name)}
    return parts | {part.rstrip("123d") for part in parts}  # named in an f-string, by dimension


@cache
def names_in_use() -> set[str]:
    others = OF_TRANSFORMERS.keys() | OF_BITSANDBYTES | DOCUMENTED | {"__future__", "_getframe"}
    ours = own_names() | operators() | others
    found = set()
    for name in (name for tree in parsed() for name in used(tree)):
        if not name.startswith(("torch.", "*.")) or name.startswith("torch.ops."):
            continue
        parts = name.split(".")
        private = [i for i, part in enumerate(parts) if is_private(part) and part not in ours]
        if private:
            # What is private of a private module: the first name below it.
            found.add(".".join(parts[: private[-1] + 1]) if parts[0] == "*" else name)
    return found


def is_in_table(name: str) -> bool:
    if name.startswith("*."):
        last = name.rpartition(".")[2]
        # Attributes of objects alone stand with their class, in its purpose.
        named = {word for private in PRIVATE_NAMES for word in private.purpose.split()}
        return last in named or any(last in entry.split(".") for entry in TABLE)
    return any(name == entry or name.startswith(f"{entry}.") for entry in TABLE) or any(
        entry.startswith(f"{name}.") for entry in TABLE
    )


def test_transformers_has_the_private_names_that_are_recognised() -> None:
    transformers = pytest.importorskip("transformers")
    for name, owner in OF_TRANSFORMERS.items():
        assert hasattr(getattr(transformers, owner), name)


def test_bitsandbytes_has_the_private_names_that_decide_its_kernels() -> None:
    cuda = pytest.importorskip("bitsandbytes.backends.cuda.ops")
    assert all(hasattr(cuda, name) for name in OF_BITSANDBYTES)


def test_every_private_name_in_use_is_in_the_table() -> None:
    assert {name for name in names_in_use() if not is_in_table(name)} == set()


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_name_in_the_table_is_in_use(name: str) -> None:
    last = name.rpartition(".")[2]
    assert any(
        used == name or used.startswith(f"{name}.") or used == f"*.{last}"
        for used in names_in_use()
    )


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: private.name)
def test_pytorch_has_every_name_in_the_table(private: SimpleNamespace) -> None:
    if private.needed_by == "cuda" and torch.version.cuda is None:
        pytest.skip("a build of PyTorch for CUDA has it")
    if private.needed_by == "speed" and not torch.__version__.startswith(private.checked):
        pytest.skip(f"PyTorch {' and '.join(private.checked)} have it")
    find(private.name)


def test_a_name_that_is_not_in_the_table_would_be_found() -> None:
    code = """
import torch
from torch.utils import _pytree as trees
from torch._subclasses import FakeTensorMode
torch._C._new_name()
trees.tree_all
x._another
mock.patch.object(x, "_third")
"""
    found = {name for name in used(ast.parse(code)) if not is_in_table(name)}
    assert found >= {
        "torch._subclasses.FakeTensorMode",
        "torch._C._new_name",
        "torch.utils._pytree.tree_all",
        "*._another",
        "*._third",
    }


def test_a_pytorch_that_lacks_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = VirtualGPU()
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(
        RuntimeError, match=r"has no torch\._C\._current_graph_task_id, which tells"
    ):
        gpu.open()
    monkeypatch.undo()
    with gpu:  # nothing was left half open
        assert gpu.memory_allocated() == 0
