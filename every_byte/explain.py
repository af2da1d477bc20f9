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
- JAX: ``RESOURCE_EXHAUSTED: Out of memory while trying to allocate N bytes`` (newer ones
  write ``12.50GiB``), ``Resource exhausted: Failed to allocate request for 32.00MiB
  (33554432B) on device ordinal 0``; on a TPU ``Ran out of memory in memory space hbm. Used
  30.21G of 15.48G hbm``, ``Attempting to reserve 9.62G at the bottom of memory``.
- Without a figure, from CUDA, ROCm, Level Zero and their libraries: ``CUDA error: out of
  memory``, ``CUBLAS_STATUS_ALLOC_FAILED`` and the like.

The page's script book/_static/explain.js does the same, and a test proves it. Patterns, words
and cures stand here only; `data` hands them over. Patterns keep to what Python and JavaScript
read alike: the text is ASCII with single spaces by then.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from every_byte.units import GiB, KiB, MiB, binary

Verdict = Literal["too big", "in pieces", "another process", "a leak", "a context", "unknown"]

LARGEST = 1 << 20  # characters that are looked at: a message is short, a log may not be
WINDOW = 4000  # of them may belong to one message
MOST = 1 << 50  # bytes: no memory has more, and a double holds a sum of them exactly
_TiB = 1024 * GiB
# MPS, TPUs and old versions write KB or K: binary all the same.
UNITS = {"bytes": 1, "B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": _TiB}
UNITS |= {"KB": KiB, "MB": MiB, "GB": GiB, "TB": _TiB, "K": KiB, "M": MiB, "G": GiB, "T": _TiB}
SIZE = r"(\d{1,15}(?:\.\d{1,4})?) ?(bytes|[KMGT]iB|[KMGT]B|[KMGT]|B)\b"
# What is not of a message: line breaks, boxes that terminals draw, what a web page adds.
BLANK = r"[^!-~]+"


@dataclass(frozen=True)
class Message:
    """What a message says, in bytes; None where it does not say it.

    PyTorch prints two decimals of a unit, so a figure is known to 0.005 of it.

    Attributes:
        backend: who ran out: "CUDA", "HIP", "XPU", "MPS", "JAX" or "TPU" (JAX's on one);
            "PyTorch" where the message's first words are missing; "driver" where it is an
            error of CUDA, HIP or one of their libraries, which has no figures.
        device: the number of the GPU.
        tried: the request that failed; on a TPU what the whole program needs.
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
    """One thing to do, the most promising first.

    Attributes:
        do: what to do.
        why: what it changes.
        chapter: of the book, which proves it.
        section: of that chapter, by the name of its anchor; "" for all of it.
    """

    do: str
    why: str
    chapter: str
    section: str = ""


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

# Where a message begins, by the form of its figures. What stands lower is only looked for
# where nothing above is found.
STARTS: tuple[dict[str, str], ...] = (
    {
        "PyTorch": r"\b(?:CUDA|HIP|XPU) out of (?:the )?memory\b",
        "MPS": r"\bMPS backend out of memory\b",
        "JAX": r"failed to allocate \d{1,18} bytes: RESOURCE_EXHAUSTED"
        r"|(?:RESOURCE_EXHAUSTED|Resource exhausted): (?:Out of memory|Failed to allocate)",
        "TPU": r"Ran out of memory in memory space hbm\b|\bAttempting to reserve (?=\d)",
    },
    {"PyTorch": r"\bTried to allocate (?=\d)"},
    {
        "driver": r"CUDA (?:runtime |driver )?error(?: [(]2[)])? ?: ?out of memory"
        r"|Cuda failure (?:2 )?'out of memory'|cuda(?:Malloc failed: out of|ErrorMemoryAllocation)"
        r"|CUDA_ERROR_OUT_OF_MEMORY|(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED"
        r"|HIP error: out of memory|hipErrorOutOfMemory|HIPBLAS_STATUS_ALLOC_FAILED"
        r"|rocblas_status_memory_error|UR_RESULT_ERROR_OUT_OF_(?:DEVICE_MEMORY|RESOURCES)",
    },
)
# What each form says, {} being a size, the first pattern that is found. "cached" and "other"
# are no part of `Message`: they add up to reserved and in_use.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "PyTorch": {
        "tried": (r"Tried to allocate {}",),
        "capacity": (r"total capaci?ty of {}", r"{} total capacity"),
        "free": (r"of which {} is free", r"; {} free"),
        "in_use": (r"this process has {} memory in use",),
        "allowed": (r"{} allowed",),
        "allocated": (
            r"Of the allocated memory {} is allocated by PyTorch",
            r"{} already allocated",
        ),
        "reserved": (r"{} reserved in total by PyTorch",),
        # Before torch 1.4 "cached" is what is not allocated of it, too.
        "cached": (r"{} is reserved by PyTorch but unallocated", r"{} cached[)]"),
        "private_pools": (r"with {} allocated in private pools",),
    },
    "MPS": {
        "tried": (r"Tried to allocate {}",),
        "allowed": (r"max allowed: {}",),
        "allocated": (r"MPS allocated: {}",),
        "other": (r"other allocations: {}",),
    },
    "JAX": {
        "tried": (
            r"request for [^(]{0,40}[(]{}[)]",
            r"allocat(?:e|ing) (?:request for )?{}",
        ),
        "capacity": (r"Free memory/Total memory: \d{1,18}/(\d{1,15})\b",),
        "free": (r"Free memory/Total memory: (\d{1,15})/",),
    },
    "TPU": {
        "tried": (r"Used {} of ", r"Attempting to reserve {}"),
        "capacity": (r"Used [^ ]{1,20} of {} hbm",),
        "free": (r"There are {} free",),
    },
    "driver": {},
}
DEVICE = r"(?:GPU|device ordinal) (\d{1,4})\b"
PROCESSES = r"Process \d{1,10} has {} memory in use"
# What they are called where a message is shown, in that order.
NAMES = {
    "tried": "tried to allocate",
    "capacity": "the card has",
    "free": "free",
    "in_use": "this process",
    "allowed": "allowed",
    "allocated": "allocated",
    "reserved": "reserved",
    "private_pools": "in private pools",
}


def parse(text: str) -> list[Message]:
    """The out-of-memory messages of a text, such as a log; none if none is recognised."""
    text = re.sub(BLANK, " ", text)[-LARGEST:]
    found: list[tuple[int, str]] = []
    for level in STARTS:
        found = found or [
            (match.start(), form)
            for form, pattern in level.items()
            for match in re.finditer(pattern, text, re.IGNORECASE)
        ]
    found.sort()
    ends = [*(start for start, _ in found), len(text)][1:]
    messages = [
        _message(form, text[start : min(end, start + WINDOW)])
        for (start, form), end in zip(found, ends, strict=True)
    ]
    # What repeats an error without its figures tells nothing beside one that has them.
    return [message for message in messages if message.tried is not None] or messages


def _message(form: str, text: str) -> Message:
    said = {name: _size(text, patterns) for name, patterns in PARTS[form].items()}
    cached, other = said.pop("cached", None), said.pop("other", None)
    allocated = said.get("allocated")
    if allocated is not None and cached is not None and said["reserved"] is None:
        said["reserved"] = allocated + cached
    if allocated is not None and other is not None:
        said["in_use"] = allocated + other
    device = re.search(DEVICE, text)
    name = re.match(r"CUDA|HIP|XPU", text, re.IGNORECASE)
    others = re.finditer(PROCESSES.replace("{}", SIZE), text, re.IGNORECASE)
    sizes = (_nbytes(*match.groups()) for match in others)
    return Message(
        backend=name[0].upper() if form == "PyTorch" and name else form,
        device=None if device is None or form == "driver" else int(device[1]),
        others=tuple(size for size in sizes if size is not None),
        **said,
    )


def _size(text: str, patterns: Sequence[str]) -> int | None:
    """The bytes of the size at ``{}`` in the first pattern that is found."""
    for pattern in patterns:
        match = re.search(pattern.replace("{}", SIZE), text, re.IGNORECASE)
        if match is not None:
            return _nbytes(*match.groups())
    return None


_ANY_CASE = {name.lower(): nbytes for name, nbytes in UNITS.items()}


def _nbytes(number: str, unit: str = "bytes") -> int | None:
    nbytes = float(number) * _ANY_CASE[unit.lower()]
    return round(nbytes) if nbytes <= MOST else None


# Judging

CONTEXT = 2 * GiB  # a process holds 0.4 to 1 GiB beside the allocator: its kernels, libraries
DRIVERS = 32 * MiB  # it gives out large pieces in granules of as much
TENTH = 10  # of the card, one part: less of it in the wrong place is not what is the matter
PRINTED = 5000  # one part of a figure, by which 9.99 GiB may be off

CURES = {
    "smaller": Cure(
        "Make the batch or the sequence smaller; accumulate gradients to keep the effective batch.",
        "Activations grow with both, attention's and the logits' with the sequence first.",
        "05_activations_and_peaks",
    ),
    "checkpoint": Cure(
        "Turn gradient checkpointing on.",
        "Only the inputs of the layers stay from forward to backward; a third more time.",
        "05_activations_and_peaks",
    ),
    "logits": Cure(
        "If the line that failed computes the loss: compute it in chunks, or with a fused kernel.",
        "In FP32 it holds 12 bytes for each token and word of the vocabulary at its worst.",
        "16_logits",
    ),
    "no_grad": Cure(
        "If you don't train, run under torch.no_grad() or torch.inference_mode().",
        "Otherwise every activation is kept for a backward that never comes.",
        "11_troubleshooting",
        "evaluation",
    ),
    "less_state": Cure(
        "Hold less for each parameter: BF16 or 4-bit weights, LoRA, an 8-bit optimizer.",
        "Full training with Adam in FP32 takes 16 bytes for each parameter, before activations.",
        "03_training_and_inference",
    ),
    "shard": Cure(
        "Share the model out with FSDP or ZeRO, or offload to the host.",
        "Data parallelism alone (DDP) gives every GPU all of it.",
        "10_beyond_one_gpu",
    ),
    "shape": Cure(
        "Look at the shapes of the line that failed: one tensor is larger than all there is.",
        "A broadcast of [n, 1] with [n], or a matrix of all pairs, is the usual cause.",
        "11_troubleshooting",
        "oom",
    ),
    "expandable": Cure(
        "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before Python starts "
        "(PYTORCH_ALLOC_CONF is its newer name).",
        "Segments then grow page by page, and free pieces come together.",
        "11_troubleshooting",
        "fragmentation",
    ),
    "padding": Cure(
        "Let lengths vary less: pad to a few fixed lengths, and run the largest batch first.",
        "Each new size cuts the free blocks otherwise.",
        "11_troubleshooting",
        "fragmentation",
    ),
    "others": Cure(
        "See with nvidia-smi who uses the card, and end what you don't need: old kernels of "
        "notebooks, runs that hang, a server.",
        "Their memory is theirs until the process ends.",
        "11_troubleshooting",
        "worker",
    ),
    "elsewhere": Cure(
        "Take another card: CUDA_VISIBLE_DEVICES=1.",
        "Device 0 is everybody's default.",
        "11_troubleshooting",
        "worker",
    ),
    "reservation": Cure(
        "If one of them is vLLM or JAX, let it take less: gpu_memory_utilization, "
        "XLA_PYTHON_CLIENT_MEM_FRACTION.",
        "Both take most of the card at their start, needed or not.",
        "11_troubleshooting",
        "worker",
    ),
    "fraction": Cure(
        "Raise the limit: set_per_process_memory_fraction, or per_process_memory_fraction.",
        "The card has more than this process may take.",
        "11_troubleshooting",
        "oom",
    ),
    "release": Cure(
        "Keep numbers, not tensors: total += loss.item(), outputs.append(output.detach().cpu()).",
        "A loss that nobody called backward() on holds every activation of its step.",
        "11_troubleshooting",
        "grows",
    ),
    "cycles": Cure(
        "Look for lists, hooks, caches and retain_graph=True that outlive a step; record a "
        "snapshot of two steps and compare.",
        "What grows is held by name somewhere.",
        "11_troubleshooting",
        "cycles",
    ),
    "grows": Cure(
        "If the first steps ran, find out whether it grows: print memory_allocated() each step.",
        "One message can't tell a leak from a card that is too small.",
        "11_troubleshooting",
        "grows",
    ),
    "workers": Cure(
        "Let fewer processes use the card: no CUDA in workers of a DataLoader, one process a GPU.",
        "Each takes a context of its own.",
        "11_troubleshooting",
        "worker",
    ),
    "libraries": Cure(
        "See what allocates beside PyTorch: NCCL, TensorRT, CuPy, CUDA graphs, a second framework.",
        "torch.cuda's figures don't count it; nvidia-smi does.",
        "11_troubleshooting",
        "smi",
    ),
    "restart": Cure(
        "Restart the process, then watch nvidia-smi from its start.",
        "After CUDA's own error its state is not to be trusted.",
        "11_troubleshooting",
        "worker",
    ),
    "preallocate": Cure(
        "Set XLA_PYTHON_CLIENT_PREALLOCATE=false to see what JAX needs.",
        "It takes three quarters of the card at its start, and says nothing of the rest.",
        "11_troubleshooting",
        "worker",
    ),
    "host": Cure(
        "Forbid the driver to lend the host's memory: CUDA's sysmem fallback policy, on Windows.",
        "What does not fit then fails at once instead of crawling over the bus.",
        "11_troubleshooting",
        "oom",
    ),
    "rematerialise": Cure(
        "Wrap layers in jax.checkpoint.",
        "Activations are computed again in backward instead of kept.",
        "05_activations_and_peaks",
    ),
}
TOO_BIG = ("smaller", "checkpoint", "logits", "no_grad", "less_state", "shard", "grows")
# What decided, in words; figures stand at their names.
SAID = {
    "nothing": "no out-of-memory message of PyTorch, CUDA, ROCm or JAX is in it",
    "grows": "{count} messages: allocated grows from {first} to {last}",
    "in order": "the messages are of one process, in this order",
    "driver": "the driver itself ran out, for a context, a library or a kernel: PyTorch's "
    "allocator did not get to say how much there is",
    "no request": "the message is cut off before it says how much was asked for",
    "whole": "paste it whole, up to 'reserved by PyTorch'",
    "larger than the card": "{tried} in one request, and the card has {limit}",
    "larger than allowed": "{tried} in one request, and this process may take {limit}",
    "larger than the TPU": "the program needs {tried}, and the TPU has {limit}",
    "no room": "{tried} more, and {free} are free",
    "no hole": "{tried} more at one end of the memory, and {free} are free elsewhere",
    "JAX": "{tried} more; the message does not say who holds the rest",
    "MPS": "{tried} more beside {used}",
    "more": "{tried} more",
    "cut off": "{tried} more; the message is cut off before it says what there is",
    "beside": "{tried} more beside {allocated} in use, of {limit}",
    "lent": "the driver lends the host's memory: PyTorch holds more than the card has",
    "refused": "{tried} are asked for and {free} are free, and yet the driver refused: it has a "
    "limit that the message does not show (a container's, the host's share of unified memory, "
    "Windows), or another process was faster",
    "in pieces": "{cached} are reserved by PyTorch and not in use, but no piece of them has "
    "{tried}",
    "outside": "{outside} of the card are not this process's",
    "context": "this process holds {context} that PyTorch's allocator did not take",
    "own": "the process that holds {own} is this one",
}


def explain(text: str) -> Explanation:
    """Judge the last out-of-memory message of a text, by its own figures.

    Never raises, whatever the text is. Sums allow for the two decimals that are printed.
    """
    messages = parse(text)
    if not messages:
        return _told(None, "unknown", _said("nothing"))
    last = messages[-1]
    grown = [m.allocated for m in messages if m.device == last.device and m.allocated]
    if len(grown) > 2 and all(a < b for a, b in pairwise(grown)):
        because = _said("grows", count=str(len(grown)), first=grown[0], last=grown[-1])
        return _told(
            last, "a leak", because, "release", "cycles", "no_grad", "smaller", assumed="in order"
        )
    if last.backend == "driver":
        cures = ("others", "restart", "workers", "smaller", "elsewhere")
        return _told(last, "a context", _said("driver"), *cures)
    if last.tried is None:
        return _told(last, "unknown", _said("no request"), *TOO_BIG, assumed="whole")
    return _judged(last, last.tried)


def data() -> dict[str, Any]:
    """All that the page's script needs to say the same, under the names of this module."""
    return {
        "largest": LARGEST,
        "window": WINDOW,
        "most": MOST,
        "units": _ANY_CASE,
        "size": SIZE,
        "blank": BLANK,
        "starts": STARTS,
        "parts": PARTS,
        "device": DEVICE,
        "processes": PROCESSES,
        "names": NAMES,
        "context": CONTEXT,
        "drivers": DRIVERS,
        "tenth": TENTH,
        "printed": PRINTED,
        "said": SAID,
        "cures": {name: asdict(cure) for name, cure in CURES.items()},
        "too_big": TOO_BIG,
    }


def _said(name: str, **figures: int | str) -> str:
    sizes = {n: binary(size) if isinstance(size, int) else size for n, size in figures.items()}
    return SAID[name].format(**sizes)


def _told(
    message: Message | None, verdict: Verdict, because: str, *cures: str, assumed: str = ""
) -> Explanation:
    return Explanation(
        message, verdict, because, SAID.get(assumed, assumed), tuple(CURES[c] for c in cures)
    )


def _judged(message: Message, tried: int) -> Explanation:
    limits = [n for n in (message.capacity, message.allowed) if n is not None]
    limit = min(limits, default=None)
    slack = (limit or tried) // PRINTED
    if message.backend == "TPU":
        return _tpu(message, tried, limit)
    if limit is not None and tried > limit + slack:
        if limit == message.capacity:
            because = _said("larger than the card", tried=tried, limit=limit)
            return _told(message, "too big", because, "shape", "smaller", "less_state", "shard")
        because = _said("larger than allowed", tried=tried, limit=limit)
        return _told(
            message, "too big", because, "fraction", "shape", "smaller", "less_state", "shard"
        )
    if message.backend == "JAX":
        cures = ("preallocate", "smaller", "rematerialise", "others")
        return _told(message, "unknown", _said("JAX", tried=tried), *cures)
    if message.backend == "MPS":
        used = message.in_use
        because = _said("MPS", tried=tried, used=used) if used else _said("more", tried=tried)
        return _told(message, "too big", because, "smaller", "checkpoint", "no_grad")
    allocated, reserved = message.allocated, message.reserved
    if limit is not None and allocated is not None and tried + allocated > limit + slack:
        return _full(message, tried, limit, allocated, slack)
    if limit is None or allocated is None or reserved is None:
        return _told(message, "unknown", _said("cut off", tried=tried), *TOO_BIG, assumed="whole")
    return _weighed(message, tried, limit, allocated, reserved, slack)


def _tpu(message: Message, tried: int, limit: int | None) -> Explanation:
    """JAX on a TPU: XLA plans the whole program before it runs."""
    if limit is not None:
        because = _said("larger than the TPU", tried=tried, limit=limit)
    elif message.free is None:
        return _told(
            message, "unknown", _said("more", tried=tried), "smaller", "rematerialise", "shard"
        )
    elif message.free >= tried:
        because = _said("no hole", tried=tried, free=message.free)
        return _told(message, "in pieces", because, "smaller", "rematerialise", "shard")
    else:
        because = _said("no room", tried=tried, free=message.free)
    return _told(message, "too big", because, "smaller", "rematerialise", "shard")


def _full(message: Message, tried: int, limit: int, allocated: int, slack: int) -> Explanation:
    """What is in use leaves too little room, wherever the rest of the memory is."""
    because = _said("beside", tried=tried, allocated=allocated, limit=limit)
    if message.allowed is not None:
        return _told(message, "too big", because, "fraction", *TOO_BIG)
    message, assumed = _told_apart(message)
    if message.capacity is not None and (message.reserved or 0) > message.capacity + slack:
        return _told(message, "too big", because, *TOO_BIG, "host", assumed="lent")
    return _told(message, "too big", because, *TOO_BIG, assumed=assumed)


def _weighed(
    message: Message, tried: int, limit: int, allocated: int, reserved: int, slack: int
) -> Explanation:
    """Which memory in the wrong place would have been enough."""
    cached = message.cached or 0
    free = limit - reserved if message.free is None else message.free
    if message.allowed is not None:
        free = min(free, max(0, message.allowed - reserved))
    message, assumed = _told_apart(message)
    outside = 0 if message.allowed is not None else _outside(message, reserved)
    theirs = _said("outside", outside=outside)
    others = ("others", "elsewhere", "reservation", "smaller")
    if free > tried + DRIVERS + slack:
        if message.others and outside * TENTH >= limit:  # one of them was faster
            return _told(message, "another process", theirs, *others, assumed=assumed)
        because = _said("refused", tried=tried, free=free)
        return _told(message, "unknown", because, "others", "expandable", "restart", "smaller")
    context = max(0, message.in_use - reserved) if message.in_use is not None else 0
    raised = ("fraction",) if message.allowed is not None else ()
    # What would be enough if it were free as well, with the cures for it.
    wrong: list[tuple[int, Verdict, str, tuple[str, ...]]] = []
    if cached + free + slack >= tried and cached * TENTH >= limit:
        because = _said("in pieces", cached=cached, tried=tried)
        wrong.append((cached, "in pieces", because, ("expandable", "padding", *raised, "smaller")))
    if outside + free + slack >= tried and outside * TENTH >= limit:
        wrong.append((outside, "another process", theirs, others))
    if context > CONTEXT and context + free + slack >= tried:
        because = _said("context", context=context)
        wrong.append((context, "a context", because, ("libraries", "workers", "smaller")))
    if wrong:
        _, verdict, because, cures = max(wrong, key=lambda found: found[0])
        return _told(message, verdict, because, *cures, assumed=assumed)
    because = _said("beside", tried=tried, allocated=allocated, limit=limit)
    pieces = ("expandable",) if cached >= tried else ()
    return _told(message, "too big", because, *raised, *TOO_BIG, *pieces, assumed=assumed)


def _told_apart(message: Message) -> tuple[Message, str]:
    """The message with this process among the others found, and what is assumed for it."""
    # In a container PyTorch does not find its own number, and lists itself with the rest.
    reserved = message.reserved or message.allocated or 0
    own = min((n for n in message.others if n >= reserved - reserved // 1000), default=None)
    if message.in_use is not None or own is None:
        return message, ""
    others = list(message.others)
    others.remove(own)
    told = replace(message, in_use=own, others=tuple(others))
    return told, _said("own", own=own)


def _outside(message: Message, reserved: int) -> int:
    """What others hold of the card, in bytes."""
    if message.others or message.capacity is None or message.free is None:
        return sum(message.others)
    if message.in_use is not None:
        return max(0, message.capacity - message.free - message.in_use)
    # Before torch 2.1, and on ROCm, the message does not say whose the rest is: up to
    # CONTEXT of it is taken for this process's own.
    return max(0, message.capacity - message.free - reserved - CONTEXT)
