"""What common operations take beside their result: ``python -m benchmarks.borrows``.

Writes ``book/borrows.json``, from which the book draws its page. Each operation is carried
out on a virtual GPU, forward and backward, and every call that PyTorch makes for it is looked up
in what the H200 measured (``tests/data/h200-torch-2.11/kernels.json.xz``).
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from every_byte.gpu import VirtualGPU
from helpers import signatures

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "tests" / "data" / "h200-torch-2.11" / "kernels.json.xz"
STORED = ROOT / "book" / "borrows.json"
CARD, TORCH = "H200", "2.11"
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
SHORT = {dtype: short for short, dtype in signatures.DTYPES.items()}
Events = list[int]
Measured = dict[str, Events]

Step = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation, as a reader would write it, and the tensors that it is given."""

    code: str
    given: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    run: Step
    trains: int = 1  # of so many of the tensors a gradient is asked
    names: str = "xwb"  # of the tensors, a letter each
    estimated: bool = False  # no rule: a model that was fitted
    # The calls that were measured, forward and backward, where the replay makes others for it.
    calls: tuple[str, ...] = ()


def _attention(backend: SDPBackend) -> Step:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def _sorted(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.sort())


def _largest(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.topk(50))


def _batch_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    mean, variance = (torch.empty(len(w), device=x.device) for _ in range(2))
    return F.batch_norm(x, mean, variance, w, b, training=True)


_ROWS, _WIDTH = 8192, 4096
_x = ((_ROWS, _WIDTH), BF16)
_w = ((_WIDTH,), BF16)
_heads = (((1, 2048, 32, 128), BF16), *(((1, 2048, 8, 128), BF16),) * 2)
_Q, _K = "bf16[1x32x2048x128]~8388608_128_4096_1", "bf16[1x8x2048x128]~2097152_128_1024_1"
_IMAGES, _OF_64 = "f32[16x64x112x112]", "f32[64], "
_numbers = (((10_000_000,), FP32),)
_images = ((16, 64, 112, 112), FP32)
OPERATIONS = (
    Operation("F.gelu(x)", (_x,), F.gelu),
    Operation("F.silu(x)", (_x,), F.silu),
    Operation("F.dropout(x, 0.1)", (_x,), lambda x: F.dropout(x, 0.1)),
    Operation("F.softmax(x, -1)", (_x,), lambda x: F.softmax(x, -1)),
    Operation(
        "F.layer_norm(x, (4096,), w, b)",
        (_x, _w, _w),
        lambda x, w, b: F.layer_norm(x, (_WIDTH,), w, b),
        3,
    ),
    Operation(
        "F.rms_norm(x, (4096,), w)",
        (_x, _w),
        lambda x, w: F.rms_norm(x, (_WIDTH,), w),
        2,
        calls=(
            "aten._fused_rms_norm.default(bf16[8192x4096], [4096], bf16[4096], None)",
            "aten._fused_rms_norm_backward.default(bf16[8192x4096], bf16[8192x4096], [4096], "
            "f32[8192x1], bf16[4096], [True,True])",
        ),
    ),
    Operation("x.sum(0)", (_x,), lambda x: x.sum(0)),
    Operation("x.sum(1)", (_x,), lambda x: x.sum(1)),
    Operation("x.sum()", (_x,), lambda x: x.sum()),
    Operation("x.float()", (_x,), lambda x: x.float()),
    Operation(
        "F.linear(x, w)",
        (((2048, 2048), BF16), ((8192, 2048), BF16)),
        lambda x, w: F.linear(x, w),
        2,
    ),
    Operation(
        "F.linear(x, w, b)",
        (((2048, 2048), BF16), ((8192, 2048), BF16), ((8192,), BF16)),
        F.linear,
        3,
    ),
    Operation(
        "F.embedding(i, w)",
        (((128_256, 2048), BF16), ((8192,), INT64)),
        lambda w, i: F.embedding(i, w),
        names="wi",
    ),
    Operation(
        "F.cross_entropy(x, y)",
        (((2048, 128_256), FP32), ((2048,), INT64)),
        F.cross_entropy,
        names="xy",
    ),
    Operation(
        "attention, cuDNN",
        _heads,
        _attention(SDPBackend.CUDNN_ATTENTION),
        3,
        "qkv",
        calls=(
            f"aten._scaled_dot_product_cudnn_attention.default({_Q}, {_K}, {_K}, None, "
            "True, 0, True)",
            f"aten._scaled_dot_product_cudnn_attention_backward.default({_Q}, {_Q}, {_K}, {_K}, "
            f"{_Q}, f32[1x32x2048x1], i64[], i64[], None, None, None, 2048, 2048, 0, True)",
        ),
    ),
    Operation("attention, flash", _heads, _attention(SDPBackend.FLASH_ATTENTION), 3, "qkv"),
    Operation(
        "attention, efficient",
        (((2, 512, 12, 64), FP32),) * 3,
        _attention(SDPBackend.EFFICIENT_ATTENTION),
        3,
        "qkv",
    ),
    Operation(
        "attention, math", (((2, 512, 12, 64), FP32),) * 3, _attention(SDPBackend.MATH), 3, "qkv"
    ),
    Operation("x.sort()", _numbers, _sorted, 0),
    Operation("x.topk(50)", _numbers, _largest, 0),
    Operation("x.cumsum(0)", _numbers, lambda x: x.cumsum(0), 0),
    Operation("x.argmax()", _numbers, lambda x: x.argmax(), 0),
    Operation("torch.linalg.vector_norm(x)", (_x,), lambda x: torch.linalg.vector_norm(x), 0),
    Operation(
        "x.index_put_((i,), y, accumulate=True)",
        (*_numbers * 2, ((10_000_000,), INT64)),
        lambda x, y, i: x.index_put_((i,), y, accumulate=True),
        0,
        "xyi",
    ),
    Operation("F.max_pool2d(x, 3, 2, 1)", (_images,), lambda x: F.max_pool2d(x, 3, 2, 1)),
    Operation(
        "F.batch_norm(x, m, v, w, b, True)",
        (_images, ((64,), FP32), ((64,), FP32)),
        _batch_norm,
        3,
        calls=(
            f"aten.cudnn_batch_norm.default({_IMAGES}, {_OF_64 * 4}True, 0.1, 1e-05)",
            f"aten.cudnn_batch_norm_backward.default({_IMAGES}, {_IMAGES}, {_OF_64 * 5}"
            "1e-05, u8[0])",
        ),
    ),
    Operation(
        "F.conv2d(x, w, padding=1)",
        (((16, 64, 56, 56), FP32), ((64, 64, 3, 3), FP32)),
        lambda x, w: F.conv2d(x, w, padding=1),
        2,
        estimated=True,
    ),
)


class Bytes(NamedTuple):
    """Bytes that were replayed, and what was measured; None if it was not."""

    replayed: int
    measured: int | None


@dataclass(frozen=True, slots=True)
class Borrowed:
    """What an operation takes, in bytes, as PyTorch asked for them."""

    code: str
    given: str
    inputs: int
    result: int
    forward: Bytes  # at the most, beside what stays
    keeps: list[str]  # for backward, of what there is anyway
    saves: int  # for backward, of its own
    backward: Bytes | None  # beside the gradients; None if there is none
    estimated: bool


UNSAID = ("layout", "device", "pin_memory")  # of copies; measured ones did not say them


class Calls(TorchDispatchMode):
    """Every call of PyTorch's operators by its signature, and the events of them all."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []  # and where its events begin and end
        self.events: Events = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry it out and write it down."""
        given = {key: value for key, value in (kwargs or {}).items() if key not in UNSAID}
        named = [f"{key}={shown(value)}" for key, value in given.items()]
        signature = f"{func}({', '.join([*map(shown, args), *named])})"
        begin = len(self.events)
        result = func(*args, **(kwargs or {}))
        self.found.append((signature, begin, len(self.events)))
        return result


def shown(value: Any) -> str:
    """An argument as the measured signatures have it."""
    if isinstance(value, torch.Tensor):
        sizes, strides = "x".join(map(str, value.shape)), "_".join(map(str, value.stride()))
        apart = "" if value.is_contiguous() else f"~{strides}"
        host = "@cpu" if value.device.type == "cpu" else ""
        return f"{SHORT[value.dtype]}[{sizes}]{apart}{host}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(shown, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def beside(events: Events) -> int:
    """The most that was held beside what stays, in bytes."""
    now = most = 0
    for nbytes in events:
        now += nbytes
        most = max(most, now)
    return most - max(now, 0)


def measured_beside(calls: Calls, measured: Measured) -> int | None:
    """The same with the events of each call as they were measured; None if one was not."""
    events, at = Events(), 0
    for name, begin, end in calls.found:
        if begin == end and name not in measured:  # it takes nothing
            continue
        if name not in measured:
            return None
        events += calls.events[at:begin] + measured[name]
        at = end
    return beside(events + calls.events[at:])


def borrowed(gpu: VirtualGPU, one: Operation, measured: Measured) -> Borrowed:
    """What an operation takes on a virtual GPU that is open."""
    tensors = [torch.empty(sizes, dtype=dtype, device=gpu.device) for sizes, dtype in one.given]
    for tensor in tensors[: one.trains]:
        tensor.requires_grad_()
    saved = list[torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def watch(step: Callable[[], Any], like: Sequence[str]) -> tuple[Any, Bytes]:
        calls = Calls()
        with signatures.watched(gpu, calls.events), calls:
            done = step()
        if like:  # the one call that the card makes for it
            calls.found = [(like[0], 0, len(calls.events))]
        return done, Bytes(beside(calls.events), measured_beside(calls, measured))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        done, forward = watch(lambda: one.run(*tensors), one.calls[:1])
    results = done if isinstance(done, tuple) else (done,)
    names = {_storage(tensor): name for tensor, name in zip(tensors, one.names, strict=False)}
    own = {_storage(t): t.untyped_storage().nbytes() for t in saved}
    keeps = [name for at, name in {**names, _storage(results[0]): "result"}.items() if at in own]
    extra = own.keys() - names.keys() - {_storage(results[0])}
    backward = None
    if one.trains:
        upper = torch.empty_like(results[0])
        given = tensors[: one.trains]
        _, backward = watch(lambda: torch.autograd.grad(results[0], given, upper), one.calls[1:])
    return Borrowed(
        code=one.code,
        given=", ".join(dict.fromkeys(shown(tensor) for tensor in tensors)),
        inputs=sum(tensor.nbytes for tensor in tensors),
        result=sum(result.nbytes for result in results),
        forward=forward,
        keeps=keeps,
        saves=sum(own[at] for at in extra),
        backward=backward,
        estimated=one.estimated,
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def all_borrowed() -> list[Borrowed]:
    """Every operation, each with cuBLAS's workspaces there already."""
    known: Measured = {}
    for one in signatures.measured(KERNELS):
        known.setdefault(one.signature, one.variants[0])  # the most frequent
    with VirtualGPU(CARD, torch=TORCH) as gpu:
        first = nn.Linear(8, 8, device=gpu.device)
        first(torch.empty(8, 8, device=gpu.device)).sum().backward()
        return [borrowed(gpu, one, known) for one in OPERATIONS]


def main() -> int:
    """Write the file, and print it."""
    rows = [asdict(one) for one in all_borrowed()]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    STORED.write_text(f"[\n{lines}\n]\n", "utf-8")
    print(STORED.read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
