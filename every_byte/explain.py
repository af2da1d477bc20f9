"""An out-of-memory message, taken apart, judged, and answered with what to do.

`explain` is a pure function of the text: it needs no GPU and no PyTorch. Messages that
it knows, each as it is in the sources of the versions named:

- torch 1.4 to 2.0: ``Tried to allocate 2.26 GiB (GPU 0; 6.00 GiB total capacity;
  781.59 MiB already allocated; 3.03 GiB free; 1.24 GiB reserved in total by PyTorch)``;
  before 1.4 the last is ``cached``. With a memory fraction, ``... allowed;`` comes too.
- torch 2.1: ``GPU 0 has a total capacty of ... of which ... is free. Including
  non-PyTorch memory, this process has ... memory in use. Of the allocated memory ...``,
  misspelt; from 2.2 on ``capacity``. Other processes come as ``Process 12 has ...``, which
  in a container may be this one (numbers differ inside and outside).
- from 2.4 on ``with ... allocated in private pools (e.g., CUDA Graphs)`` (pytorch#124673).
- ``HIP out of memory`` on ROCm, ``XPU out of memory``: the same form.
- ``MPS backend out of memory (MPS allocated: ..., other allocations: ..., max allowed: ...)``.
- JAX: ``RESOURCE_EXHAUSTED: Out of memory while trying to allocate N bytes``, ``Resource
  exhausted: Failed to allocate request for 32.00MiB (33554432B) on device ordinal 0``.
- CUDA's own, without a figure: ``CUDA error: out of memory``,
  ``CUBLAS_STATUS_ALLOC_FAILED`` and the like.
"""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from every_byte.units import GiB, KiB, MiB, binary

Verdict = Literal["too big", "in pieces", "another process", "a leak", "a context", "unknown"]

_LARGEST = 1 << 20  # characters that are looked at: a message is short, a log may not be
_UNITS = {"bytes": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": 1024 * GiB}
_UNITS |= {"B": 1, "KB": KiB, "MB": MiB, "GB": GiB}  # MPS and old ones: binary all the same
_SIZE = r"(\d{1,15}(?:\.\d{1,4})?) ?(bytes|[KMGT]iB|[KMG]B|B)\b"


@dataclass(frozen=True)
class Message:
    """What a message says, in bytes; None where it does not say it.

    PyTorch prints two decimals of a unit, so a figure is known to 0.005 of it.

    Attributes:
        backend: who ran out: "CUDA", "HIP", "XPU", "MPS" or "JAX"; "driver" where it is an
            error of CUDA, HIP or one of their libraries, which has no figures.
        device: the number of the GPU.
        tried: the request that failed.
        capacity: of the card.
        free: on the card, as the driver tells it.
        in_use: what this process holds, its context and libraries included.
        others: what each other process holds.
        allowed: what a memory fraction allows the process.
        allocated: handed out by PyTorch's allocator to tensors.
        reserved: all that the allocator holds; what is not allocated of it is cached.
        private_pools: allocated in pools of their own, such as CUDA graphs'.
    """

    backend: str
    device: int | None = None
    tried: int | None = None
    capacity: int | None = None
    free: int | None = None
    in_use: int | None = None
    others: tuple[int, ...] = ()
    allowed: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    private_pools: int | None = None

    @property
    def cached(self) -> int | None:
        """Reserved by the allocator and not allocated."""
        if self.allocated is None or self.reserved is None:
            return None
        return max(0, self.reserved - self.allocated)


@dataclass(frozen=True)
class Cure:
    """One thing to do, the most promising first; `chapter` of the book proves it."""

    do: str
    why: str
    chapter: str


@dataclass(frozen=True)
class Explanation:
    """A message, its verdict, why, and what to do.

    Attributes:
        message: None where no message was recognised.
        verdict: what is the matter, by the figures of the message alone.
        because: the figures that decided.
        assumed: what the message does not say and the verdict takes for granted.
        cures: ranked.
    """

    message: Message | None
    verdict: Verdict
    because: str
    assumed: str
    cures: tuple[Cure, ...]


# Taking apart

_PYTORCH = re.compile(r"\b(CUDA|HIP|XPU) out of (?:the )?memory\b", re.IGNORECASE)
_MPS = re.compile(r"\bMPS backend out of memory\b")
_JAX = re.compile(
    r"failed to allocate \d{1,18} bytes: RESOURCE_EXHAUSTED"
    r"|(?:RESOURCE_EXHAUSTED|Resource exhausted): (?:Out of memory|Failed to allocate)"
)
# A driver's or a library's, without figures.
_BARE = re.compile(
    r"CUDA (?:runtime )?error(?: \(2\))? ?: ?out of memory|cudaErrorMemoryAllocation"
    r"|CUDA_ERROR_OUT_OF_MEMORY|(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED"
    r"|HIP error: out of memory|hipErrorOutOfMemory",
    re.IGNORECASE,
)


def parse(text: str) -> list[Message]:
    """The out-of-memory messages of a text, such as a log; none if none is recognised."""
    text = re.sub(r"\s+", " ", text[-_LARGEST:])
    known = ((_PYTORCH, _pytorch), (_MPS, _mps), (_JAX, _jax))
    found = [
        (match.start(), reader) for pattern, reader in known for match in pattern.finditer(text)
    ] or [(match.start(), _bare) for match in _BARE.finditer(text)]
    found.sort(key=lambda place: place[0])
    ends = [*(start for start, _ in found), len(text)][1:]
    messages = [
        reader(text[start : min(end, start + 4000)])
        for (start, reader), end in zip(found, ends, strict=True)
    ]
    # What repeats an error without its figures tells nothing beside one that has them.
    return [message for message in messages if message.tried is not None] or messages


def _size(text: str, pattern: str) -> int | None:
    """The bytes of a size at ``{}`` in a pattern, where it is first found."""
    match = re.search(pattern.replace("{}", _SIZE), text)
    return None if match is None else _nbytes(*match.groups())


def _nbytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _first(*sizes: int | None) -> int | None:
    return next((size for size in sizes if size is not None), None)


def _pytorch(text: str) -> Message:
    device = re.search(r"GPU (\d{1,4})\b", text)
    allocated = _first(
        _size(text, r"Of the allocated memory {} is allocated by PyTorch"),
        _size(text, r"{} already allocated"),
    )
    cached = _size(text, r"{} is reserved by PyTorch but unallocated")
    reserved = _size(text, r"{} reserved in total by PyTorch")
    if reserved is None and allocated is not None:
        # Before torch 1.4 "cached" is what is not allocated of it, too.
        rest = _first(cached, _size(text, r"{} cached\)"))
        reserved = None if rest is None else allocated + rest
    others = re.findall(rf"Process \d+ has {_SIZE} memory in use", text)
    return Message(
        backend=text[:4].strip().upper(),
        device=None if device is None else int(device[1]),
        tried=_size(text, r"Tried to allocate {}"),
        capacity=_first(_size(text, r"total capaci?ty of {}"), _size(text, r"{} total capacity")),
        free=_first(_size(text, r"of which {} is free"), _size(text, r"; {} free")),
        in_use=_size(text, r"this process has {} memory in use"),
        others=tuple(_nbytes(*other) for other in others),
        allowed=_size(text, r"{} allowed"),
        allocated=allocated,
        reserved=reserved,
        private_pools=_size(text, r"with {} allocated in private pools"),
    )


def _mps(text: str) -> Message:
    allocated = _size(text, r"MPS allocated: {}")
    other = _size(text, r"other allocations: {}")
    in_use = None if allocated is None or other is None else allocated + other
    return Message(
        backend="MPS",
        tried=_size(text, r"Tried to allocate {}"),
        in_use=in_use,
        allowed=_size(text, r"max allowed: {}"),
        allocated=allocated,
    )


def _jax(text: str) -> Message:
    device = re.search(r"device ordinal (\d{1,4})\b", text)
    told = re.search(r"Free memory/Total memory: (\d{1,18})/(\d{1,18})", text)
    return Message(
        backend="JAX",
        device=None if device is None else int(device[1]),
        tried=_first(
            _size(text, r"request for [^(]{0,40}\({}\)"),
            _size(text, r"trying to allocate {}"),
            _size(text, r"failed to allocate {}"),
            _size(text, r"allocate (?:request for )?{}"),
        ),
        capacity=None if told is None else int(told[2]),
        free=None if told is None else int(told[1]),
    )


def _bare(text: str) -> Message:
    return Message(backend="driver")


# Judging

_CONTEXT = 2 * GiB  # a process holds 0.4 to 1 GiB beside the allocator: its kernels, libraries
_DRIVERS = 32 * MiB  # it gives out large pieces in granules of as much
_MUCH = 0.1  # of the card: less of it in the wrong place is not what is the matter

SMALLER = Cure(
    "Make the batch or the sequence smaller; accumulate gradients to keep the effective batch.",
    "Activations grow with both, attention's and the logits' with the sequence first.",
    "05_activations_and_peaks",
)
CHECKPOINT = Cure(
    "Turn gradient checkpointing on.",
    "Only the inputs of the layers stay from forward to backward; a third more time.",
    "05_activations_and_peaks",
)
NO_GRAD = Cure(
    "If you don't train, run under torch.no_grad() or torch.inference_mode().",
    "Otherwise every activation is kept for a backward that never comes.",
    "03_training_and_inference",
)
LESS_STATE = Cure(
    "Hold less for each parameter: BF16 or 4-bit weights, LoRA, an 8-bit optimizer.",
    "Full training with Adam in FP32 takes 16 bytes for each parameter, before activations.",
    "03_training_and_inference",
)
SHARD = Cure(
    "Share the model out with FSDP or ZeRO, or offload to the host.",
    "Data parallelism alone (DDP) gives every GPU all of it.",
    "10_beyond_one_gpu",
)
SHAPE = Cure(
    "Look at the shapes of the line that failed: one tensor is larger than all there is.",
    "A broadcast of [n, 1] with [n], or a matrix of all pairs, is the usual cause.",
    "11_troubleshooting",
)
EXPANDABLE = Cure(
    "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before Python starts "
    "(PYTORCH_ALLOC_CONF is its newer name).",
    "Segments then grow page by page, and free pieces come together.",
    "11_troubleshooting",
)
PADDING = Cure(
    "Let lengths vary less: pad to a few fixed lengths, and run the largest batch first.",
    "Each new size cuts the free blocks otherwise.",
    "11_troubleshooting",
)
OTHERS = Cure(
    "See with nvidia-smi who uses the card, and end what you don't need: old kernels of "
    "notebooks, runs that hang, a server.",
    "Their memory is theirs until the process ends.",
    "11_troubleshooting",
)
ELSEWHERE = Cure(
    "Take another card: CUDA_VISIBLE_DEVICES=1.",
    "Device 0 is everybody's default.",
    "11_troubleshooting",
)
RESERVATION = Cure(
    "If one of them is vLLM or JAX, let it take less: gpu_memory_utilization, "
    "XLA_PYTHON_CLIENT_MEM_FRACTION.",
    "Both take most of the card at their start, needed or not.",
    "11_troubleshooting",
)
FRACTION = Cure(
    "Raise the limit: set_per_process_memory_fraction, or per_process_memory_fraction.",
    "The card has more than this process may take.",
    "11_troubleshooting",
)
RELEASE = Cure(
    "Keep no tensor that hangs on a graph: total += loss.item(), outputs.detach().",
    "One loss holds every activation of its step.",
    "11_troubleshooting",
)
CYCLES = Cure(
    "Look for lists, hooks, caches and retain_graph=True that outlive a step; record a "
    "snapshot of two steps and compare.",
    "What grows is held by name somewhere.",
    "11_troubleshooting",
)
GROWS = Cure(
    "If the first steps ran, find out whether it grows: print memory_allocated() each step.",
    "One message can't tell a leak from a card that is too small.",
    "11_troubleshooting",
)
WORKERS = Cure(
    "Let fewer processes use the card: no CUDA in workers of a DataLoader, one process a GPU.",
    "Each takes a context of its own.",
    "11_troubleshooting",
)
LIBRARIES = Cure(
    "See what allocates beside PyTorch: NCCL, TensorRT, CuPy, CUDA graphs, a second framework.",
    "torch.cuda's figures don't count it; nvidia-smi does.",
    "11_troubleshooting",
)
RESTART = Cure(
    "Restart the process, then watch nvidia-smi from its start.",
    "After CUDA's own error its state is not to be trusted.",
    "11_troubleshooting",
)
PREALLOCATE = Cure(
    "Set XLA_PYTHON_CLIENT_PREALLOCATE=false to see what JAX needs.",
    "It takes three quarters of the card at its start, and says nothing of the rest.",
    "11_troubleshooting",
)
REMATERIALISE = Cure(
    "Wrap layers in jax.checkpoint.",
    "Activations are computed again in backward instead of kept.",
    "05_activations_and_peaks",
)
_TOO_BIG = (SMALLER, CHECKPOINT, NO_GRAD, LESS_STATE, SHARD, GROWS)


def explain(text: str) -> Explanation:
    """Judge the last out-of-memory message of a text, by its own figures.

    Never raises, whatever the text is. Sums allow for the two decimals that are printed.
    """
    messages = parse(text)
    if not messages:
        return Explanation(
            None, "unknown", "no out-of-memory message of PyTorch, CUDA or JAX is in it", "", ()
        )
    last = messages[-1]
    grown = [m.allocated for m in messages if m.device == last.device and m.allocated]
    if len(grown) > 2 and all(a < b for a, b in pairwise(grown)):
        return Explanation(
            last,
            "a leak",
            f"{len(grown)} messages: allocated grows from {binary(grown[0])} to "
            f"{binary(grown[-1])}",
            "the messages are of one process, in this order",
            (RELEASE, CYCLES, NO_GRAD, SMALLER),
        )
    if last.backend == "driver":
        return Explanation(
            last,
            "a context",
            "CUDA itself ran out, for a context, a library or a kernel: PyTorch's allocator "
            "did not get to say how much there is",
            "",
            (OTHERS, RESTART, WORKERS, SMALLER, ELSEWHERE),
        )
    return _judged(last)


_CUT_OFF = "paste it whole, up to 'reserved by PyTorch'"


def _judged(message: Message) -> Explanation:
    tried = message.tried
    if tried is None:
        because = "the message is cut off before it says how much was asked for"
        return Explanation(message, "unknown", because, _CUT_OFF, _TOO_BIG)
    limits = [n for n in (message.capacity, message.allowed) if n is not None]
    limit = min(limits, default=None)
    slack = (limit or tried) // 5000  # a figure printed as 9.99 GiB may be off by 0.005
    if limit is not None and tried > limit + slack:
        what = "the card has" if limit == message.capacity else "this process may take"
        because = f"{binary(tried)} in one request, and {what} {binary(limit)}"
        first = (SHAPE,) if limit == message.capacity else (FRACTION, SHAPE)
        return Explanation(message, "too big", because, "", (*first, SMALLER, LESS_STATE, SHARD))
    if message.backend == "JAX":
        return Explanation(
            message,
            "unknown",
            f"{binary(tried)} more; the message does not say who holds the rest",
            "",
            (PREALLOCATE, SMALLER, REMATERIALISE, OTHERS),
        )
    if message.backend == "MPS":
        used = message.in_use
        because = f"{binary(tried)} more" + (f" beside {binary(used)}" if used else "")
        return Explanation(message, "too big", because, "", (SMALLER, CHECKPOINT, NO_GRAD))
    if limit is None or message.allocated is None or message.reserved is None:
        return Explanation(
            message,
            "unknown",
            f"{binary(tried)} more; the message is cut off before it says what there is",
            _CUT_OFF,
            _TOO_BIG,
        )
    return _weighed(message, tried, limit, message.reserved, message.cached or 0, slack)


def _weighed(
    message: Message, tried: int, limit: int, reserved: int, cached: int, slack: int
) -> Explanation:
    """Which memory in the wrong place would have been enough."""
    free = limit - reserved if message.free is None else message.free
    if message.allowed is not None:
        free = min(free, max(0, message.allowed - reserved))
    elif free > tried + _DRIVERS + slack:
        return Explanation(
            message,
            "unknown",
            f"{binary(tried)} are asked for and {binary(free)} are free, and yet the driver "
            "refused: it has a limit that the message does not show (a container's, the "
            "host's share of unified memory, Windows), or another process was faster",
            "",
            (OTHERS, EXPANDABLE, RESTART, SMALLER),
        )
    message, assumed = _told_apart(message, reserved)
    outside = 0 if message.allowed is not None else _outside(message, reserved)
    context = max(0, message.in_use - reserved) if message.in_use is not None else 0
    # What would be enough if it were free as well, with the cures for it.
    wrong: list[tuple[int, Verdict, str, tuple[Cure, ...]]] = []
    if cached + free + slack >= tried and cached >= _MUCH * limit:
        wrong.append(
            (
                cached,
                "in pieces",
                f"{binary(cached)} are reserved by PyTorch and not in use, but no piece of them "
                f"has {binary(tried)}",
                (EXPANDABLE, PADDING, *((FRACTION,) if message.allowed else ()), SMALLER),
            )
        )
    if outside + free + slack >= tried and outside >= _MUCH * limit:
        wrong.append(
            (
                outside,
                "another process",
                f"{binary(outside)} of the card are not this process's",
                (OTHERS, ELSEWHERE, RESERVATION, SMALLER),
            )
        )
    if context > _CONTEXT and context + free + slack >= tried:
        wrong.append(
            (
                context,
                "a context",
                f"this process holds {binary(context)} that PyTorch's allocator did not take",
                (LIBRARIES, WORKERS, SMALLER),
            )
        )
    if wrong:
        _, verdict, because, cures = max(wrong, key=lambda found: found[0])
        return Explanation(message, verdict, because, assumed, cures)
    because = (
        f"{binary(tried)} more beside {binary(message.allocated or 0)} in use, of {binary(limit)}"
    )
    cures = (*((FRACTION,) if message.allowed else ()), *_TOO_BIG)
    if cached >= tried:
        cures += (EXPANDABLE,)
    return Explanation(message, "too big", because, assumed, cures)


def _told_apart(message: Message, reserved: int) -> tuple[Message, str]:
    """The message with this process among the others found, and what is assumed for it."""
    # In a container PyTorch does not find its own number, and lists itself with the rest.
    own = min((n for n in message.others if n >= reserved * 0.999), default=None)
    if message.in_use is not None or own is None:
        return message, ""
    others = list(message.others)
    others.remove(own)
    told = replace(message, in_use=own, others=tuple(others))
    return told, f"the process that holds {binary(own)} is this one"


def _outside(message: Message, reserved: int) -> int:
    """What others hold of the card, in bytes."""
    if message.others or message.capacity is None or message.free is None:
        return sum(message.others)
    if message.in_use is not None:
        return max(0, message.capacity - message.free - message.in_use)
    # Before torch 2.1, and on ROCm, the message does not say whose the rest is: up to
    # _CONTEXT of it is taken for this process's own.
    return max(0, message.capacity - message.free - reserved - _CONTEXT)
