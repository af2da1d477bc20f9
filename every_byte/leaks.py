"""What keeps tensors alive: the program's variable that leads to them, and the line that fills it.

`holders` goes down from the variables of the functions that are being carried out, and of the
program's modules, through containers, objects and autograd's graphs, the shortest way first.
"""

import ast
import linecache
import os
import sys
from collections import deque
from collections.abc import Collection, Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from every_byte.gpu import VirtualGPU
from every_byte.virtual.values import is_library

_STEPS = 200_000  # objects to look at, at most
_ADDING = frozenset(("append", "appendleft", "extend", "add", "insert", "update", "setdefault"))


class Holder(NamedTuple):
    """What keeps tensors alive.

    Attributes:
        name: of the variable, such as ``losses`` or ``self.history``.
        line: that fills it, ``file:number``; "" if none was found.
        source: that line's text.
        by_graph: whether it is not the tensors that it holds, but the autograd graph behind.
    """

    name: str
    line: str
    source: str
    by_graph: bool

    def __str__(self) -> str:
        how = "the autograd graph behind " if self.by_graph else ""
        where = f" ({self.line}: {self.source})" if self.line else ""
        return f"{how}{self.name}{where}"


def holders(handles: Collection[int], gpu: VirtualGPU) -> dict[int, Holder]:
    """For the allocator's handles, of blocks that are alive: what keeps each one's tensors.

    Those that no variable leads to are missing.
    """
    if not handles:
        return {}
    found: dict[int, Holder] = {}
    seen: set[int] = set()
    nodes: set[int] = set()
    left = deque(_variables())
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        for _ in range(_STEPS):
            if not left or len(found) == len(handles):
                break
            value, name, top, file = left.popleft()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if issubclass(type(value), torch.Tensor):
                for handle, by_graph in _held(value, gpu, nodes):
                    if handle in handles and handle not in found:
                        found[handle] = Holder(name, *_filled_at(name, top, file), by_graph)
            else:
                left += ((v, n, top, file) for v, n in _inside(value, name))
    return found


def _variables() -> Iterator[tuple[Any, str, str, str]]:
    """Value, name, and the variable and file to look in: the program's own ones come first."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("every_byte."):
            frames.append(frame)
        frame = frame.f_back
    own = [f for f in frames if not is_library(f.f_code.co_filename)]
    modules = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    for frame in own:
        for name, value in frame.f_locals.items():
            yield value, name, name, frame.f_code.co_filename
    for module in modules:
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and not is_library(file):
            for name, value in vars(module).items():
                yield value, name, name, file
    for frame in frames:
        if frame not in own:
            for name, value in frame.f_locals.items():
                yield value, name, name, frame.f_code.co_filename


_PLAIN = (str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, torch.dtype)


def _inside(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    """What a container or an object holds; what a list holds goes by the list's name."""
    if isinstance(value, _PLAIN):
        return
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((item, name) for item in list(value))
    elif isinstance(value, dict):
        yield from ((item, name) for item in list(value.values()))
    else:
        inside = getattr(value, "__dict__", None)
        if type(inside) is dict:
            yield from ((item, f"{name}.{key}") for key, item in list(inside.items()))


def _held(tensor: torch.Tensor, gpu: VirtualGPU, nodes: set[int]) -> Iterator[tuple[int, bool]]:
    """The handles that a tensor keeps: its own, and those that its graph has saved."""
    if (handle := _handle(tensor, gpu)) is not None:
        yield handle, False
    if tensor.is_leaf and tensor.grad is not None:
        if (handle := _handle(tensor.grad, gpu)) is not None:
            yield handle, False
    left = [tensor.grad_fn]
    kept = []  # else a node's address could be another's
    while left:
        node = left.pop()
        if node is None or hash(node) in nodes:
            continue
        nodes.add(hash(node))
        kept.append(node)
        left += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                try:
                    saved = getattr(node, name)
                except Exception:  # it was freed by backward, or belongs to someone's hooks
                    continue
                for one in saved if isinstance(saved, (list, tuple)) else [saved]:
                    if isinstance(one, torch.Tensor):
                        handle = _handle(one, gpu)
                        if handle is not None:
                            yield handle, True


def _handle(tensor: torch.Tensor, gpu: VirtualGPU) -> int | None:
    try:
        return gpu.handle_of(tensor)
    except (NotImplementedError, RuntimeError):  # it has no storage
        return None


def _filled_at(name: str, top: str, file: str) -> tuple[str, str]:
    """The line of a file that adds to a variable, and its text; empty if there is none."""
    lines = linecache.getlines(file)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return "", ""
    best: list[tuple[int, int]] = []
    for node in ast.walk(tree):
        rank = _adds(node, (name, top))
        if rank is not None:
            best.append((rank, node.lineno))  # type: ignore[attr-defined]
    if not best:
        return "", ""
    line = min(best)[1]
    return f"{os.path.basename(file)}:{line}", lines[line - 1].strip()


def _adds(node: ast.AST, names: tuple[str, ...]) -> int | None:
    """How surely a statement makes a variable hold more, 0 surest; None if it does not."""
    match node:
        case ast.Call(func=ast.Attribute(value=held, attr=attr)) if attr in _ADDING:
            return 0 if ast.unparse(held) in names else None
        case ast.AugAssign(target=target) if ast.unparse(target) in names:
            return 1
        case ast.Assign(targets=targets):
            for one in targets:
                if isinstance(one, ast.Subscript) and ast.unparse(one.value) in names:
                    return 1
                parts = one.elts if isinstance(one, ast.Tuple) else [one]
                if any(ast.unparse(part) in names for part in parts):
                    used = {ast.unparse(n) for n in ast.walk(node.value)}
                    return 2 if used & set(names) else 3
    return None
