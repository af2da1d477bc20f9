"""Keeps PyTorch's optimizers and meta kernels from importing ``torch._dynamo``.

They import it at their first use (130 MB of RAM, 1 s), only to step out of
``torch.compile``'s way: ``disable`` in ``torch/_compile.py``, ``graph_break`` in
``torch/optim/optimizer.py``. Where nothing is compiled, neither has an effect.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    """Answers the two calls by itself, and anything else with the real module."""

    @staticmethod
    def disable(function: Any = None, *_: object, **__: object) -> Any:
        return function or (lambda decorated: decorated)

    @staticmethod
    def graph_break() -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # of no use but to look around
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        return getattr(importlib.import_module(_NAME), name)


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Put off the import of ``torch._dynamo`` until something really needs it."""
    stand_in = _StandIn(_NAME)
    sys.modules.setdefault(_NAME, stand_in)
    try:
        yield
    finally:
        if sys.modules.get(_NAME) is stand_in:
            del sys.modules[_NAME]
