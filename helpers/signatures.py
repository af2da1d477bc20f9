"""Operations measured one by one on a card, carried out again on a virtual GPU.

A signature is an operation with its arguments, such as
``aten.sum.dim_IntList(f32[4096x8192], [0])``: a tensor is ``dtype[sizes]``, with
``~strides`` where it is not contiguous and ``@cpu`` on the host. Beside it stand
the events that were measured: ``+bytes`` for each block that the operation took,
``-bytes`` for each that it freed, in order, and how often.
"""

import ast
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from every_byte.gpu import VirtualGPU

DTYPES = {
    **{"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16},
    **{"i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8},
    **{
        "b8": torch.bool,
        "i16": torch.int16,
        "uint64": torch.uint64,
        "float8_e4m3fn": torch.float8_e4m3fn,
    },
}
_TENSOR = re.compile(r"^([a-z]+[0-9]*[a-z0-9_]*)\[([0-9x]*)\](?:~([0-9_]*))?(@cpu)?$")
_WORD = re.compile(r"^torch\.[a-z_0-9]+$")


class Unread(ValueError):
    """A signature that does not say enough to be carried out again."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An operation, and the events that were measured: the most frequent variant first."""

    group: str
    signature: str
    variants: list[list[int]]

    @property
    def operation(self) -> str:
        """Its name, such as ``aten.sum.dim_IntList``."""
        return self.signature.split("(", 1)[0]


def measured(path: Path) -> Iterator[Measured]:
    """The signatures of a file of ``kernels.json.xz``'s form."""
    with lzma.open(path, "rt") as file:
        for group, signatures in json.load(file)["operations"].items():
            for signature, variants in signatures.items():
                yield Measured(group, signature, [events for events, _ in variants])


def _parts(text: str) -> list[str]:
    """A list's text cut at the commas that are not within brackets."""
    found, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            found.append(text[begin:at].strip())
            begin = at + 1
    rest = text[begin:].strip()
    return [*found, rest] if rest else found


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """With what no operation refuses: the index 0, the weight 1."""
    return tensor.fill_(1) if tensor.is_floating_point() else tensor.zero_()


def _argument(text: str, device: torch.device) -> Any:
    if (tensor := _TENSOR.match(text)) and tensor[1] in DTYPES:
        sizes = [int(n) for n in tensor[2].split("x")] if tensor[2] else []
        where = "cpu" if tensor[4] else device
        dtype = DTYPES[tensor[1]]
        if tensor[3] is not None:
            strides = [int(n) for n in tensor[3].split("_")]
            return _filled(torch.empty_strided(sizes, strides, dtype=dtype, device=where))
        return _filled(torch.empty(sizes, dtype=dtype, device=where))
    if text.startswith("[") and text.endswith("]"):
        parts = _parts(text[1:-1])
        if len(parts) == 2 and (several := re.match(r"^\.\.\.(\d+)$", parts[1])):
            return [_argument(parts[0], device) for _ in range(int(several[1]))]
        return [_argument(part, device) for part in parts]
    if text.startswith("cuda"):
        return device
    if text in ("inf", "-inf", "nan"):
        return float(text)
    if _WORD.match(text):
        return getattr(torch, text.removeprefix("torch."))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextmanager
def watched(gpu: VirtualGPU, events: list[int]) -> Iterator[None]:
    """Write down what is taken, ``+bytes``, and given back, ``-bytes``, as it was asked for."""
    memory, sizes = gpu.memory, dict[int, int]()
    malloc, free = memory.malloc, memory.free

    def taking(nbytes: int, stream: int | None = None) -> int:
        handle = malloc(nbytes, stream)
        if nbytes:
            sizes[handle] = nbytes
            events.append(nbytes)
        return handle

    def freeing(handle: int) -> None:
        free(handle)
        if handle in sizes:
            events.append(-sizes.pop(handle))

    memory.malloc, memory.free = taking, freeing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del memory.malloc, memory.free


def prepared(device: torch.device, signature: str) -> Callable[[], Any]:
    """An operation with its arguments, made on a device: a call of it.

    Raises:
        Unread: the signature does not say enough.
    """
    name, _, rest = signature.partition("(")
    try:
        space, packet, overload = name.split(".")
        if space == "bitsandbytes":  # which defines its operations when it is imported
            import_module(space)
        operation = getattr(getattr(getattr(torch.ops, space), packet), overload)
    except (AttributeError, ImportError, ValueError) as error:
        raise Unread(f"{name} is not an operation here: {error}") from None
    types = {a.name: str(a.type) for a in operation._schema.arguments}
    args, kwargs = [], {}
    for text in _parts(rest[: rest.rindex(")")]):
        keyword = re.match(r"^([a-z_]+)=(.*)$", text)
        if keyword:
            kwargs[keyword[1]] = _argument(keyword[2], device)
        else:
            args.append(_argument(text, device))
    for number, (argument, kind) in enumerate(zip(args, types.values(), strict=False)):
        if "float" in kind.lower() and isinstance(argument, int) and kind != "number":
            args[number] = float(argument)

    def call() -> Any:
        try:
            return operation(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise Unread(str(error).splitlines()[0]) from None

    return call


def replayed(gpu: VirtualGPU, signature: str) -> list[int]:
    """The events of a signature on a virtual GPU that is open.

    Raises:
        Unread: the signature cannot be carried out again.
    """
    call, events = prepared(gpu.device, signature), list[int]()
    with watched(gpu, events):
        result = call()
        done = list(events)
        del result
    return done
