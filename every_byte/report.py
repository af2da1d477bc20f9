"""What a program did to a virtual card's memory: its peak, what each step left behind.

A `Watch` looks at the allocator while a program runs; `Report` says what it saw.
All sizes are bytes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from every_byte.data import cards
from every_byte.estimate import CONTEXT
from every_byte.gpu import VirtualGPU
from every_byte.tracker import Timeline, in_backward
from every_byte.units import GB, grouped
from every_byte.virtual.values import program_line


class EnoughSteps(BaseException):
    """Ends a program after the steps that were asked for; no ``except Exception`` stops it."""


class _Trained(torch.nn.Module):
    """What the optimizers that have stepped so far train, and, as an optimizer, their states."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizers: list[torch.optim.Optimizer] = []

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Those of all optimizers' groups."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    @property
    def state(self) -> dict[int, Any]:
        """All optimizers' states."""
        return dict(enumerate(list(o.state.values()) for o in self.optimizers))


@dataclass
class Watch:
    """What is seen of a program, while `watching`.

    Attributes:
        gpu: to look at.
        steps: optimizer steps after which the program is ended by `EnoughSteps`; 0: never.
        peak: largest ``memory_allocated()``.
        line, phase: of the program, at the peak.
        after_step: ``memory_allocated()`` after each optimizer step.
        left: line: bytes made there in the last step but one, and alive after the last.
        timeline: bytes by kind.
    """

    gpu: VirtualGPU
    steps: int = 3
    peak: int = 0
    line: str = "?"
    phase: str = "load"
    after_step: list[int] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    timeline: Timeline = field(default_factory=Timeline)
    _births: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    _forward: int = 0
    _in_optimizer: bool = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the program that runs meanwhile."""
        memory, trained = self.gpu.memory, _Trained()
        malloc, free = memory.malloc, memory.free
        taken: dict[int, int] = defaultdict(int)  # steps by optimizer

        def watched_malloc(nbytes: int, stream: int | None = None) -> int:
            handle = malloc(nbytes, stream)
            if memory.memory_allocated() > self.peak:
                self.peak, self.line = memory.memory_allocated(), program_line()
                self.phase = self._phase()
            if self.after_step:
                self._births[handle] = len(self.after_step), nbytes, program_line()
            return handle

        def watched_free(handle: int) -> None:
            self._births.pop(handle, None)
            free(handle)

        def forward(change: int) -> Any:
            def hook(*_: object) -> None:
                self._forward += change

            return hook

        def begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self._in_optimizer = True
            if not any(o is optimizer for o in trained.optimizers):
                trained.optimizers.append(optimizer)

        def ends(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self._in_optimizer = False
            taken[id(optimizer)] += 1
            if taken[id(optimizer)] <= len(self.after_step):
                return  # another one's, of the same step
            last_but_one = len(self.after_step) - 1
            self.after_step.append(memory.memory_allocated())
            self.left = Counter()
            for step, nbytes, line in list(self._births.values()):
                if step == last_but_one:
                    self.left[line] += nbytes
            if len(self.after_step) == self.steps:
                raise EnoughSteps

        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(forward(+1)),
                register_module_forward_hook(forward(-1), always_call=True),
                register_optimizer_step_pre_hook(begins),
                register_optimizer_step_post_hook(ends),
            ):
                stack.callback(handle.remove)
            stack.enter_context(mock.patch.object(memory, "malloc", watched_malloc))
            stack.enter_context(mock.patch.object(memory, "free", watched_free))
            if self.steps:  # to its end, a program may be too long to be written down
                self.timeline = stack.enter_context(self.gpu.record(trained, trained))  # type: ignore[arg-type]
            yield

    def _phase(self) -> str:
        if self._in_optimizer:
            return "optimizer"
        if in_backward():
            return "backward"
        return "forward" if self._forward else "load"


@dataclass(frozen=True)
class Report:
    """What a program did to a card's memory.

    Attributes:
        card: its name.
        capacity: bytes that it has.
        fits: whether the program ended before memory did.
        peak, line, phase: largest ``memory_allocated()``, and where the program was.
        reserved: largest ``memory_reserved()``.
        by_kind: bytes at the peak.
        after_step: ``memory_allocated()`` after each optimizer step.
        left: line: bytes that each step leaves behind.
        assumptions: values that were read though nobody knows them, in words, and how often.
        estimates: what the figures contain that is estimated, in words.
    """

    card: str
    capacity: int
    fits: bool
    peak: int
    line: str
    phase: str
    reserved: int
    by_kind: dict[str, int]
    after_step: list[int]
    left: dict[str, int]
    assumptions: dict[str, int]
    estimates: tuple[str, ...] = ()

    @classmethod
    def of(cls, watch: Watch, fits: bool) -> "Report":
        """What a watch saw."""
        gpu, steps = watch.gpu, watch.timeline.steps
        kinds = {k: n for k, n in steps[watch.timeline.peak].items() if n} if steps else {}
        grown = watch.after_step[-1] - watch.after_step[-2] if len(watch.after_step) > 2 else 0
        return cls(
            card=gpu.memory.name,
            capacity=gpu.capacity or 0,
            fits=fits,
            peak=watch.peak,
            line=watch.line,
            phase=watch.phase,
            reserved=gpu.max_memory_reserved(),
            by_kind=kinds,
            after_step=watch.after_step,
            left=dict(watch.left.most_common(5)) if grown > 0 else {},
            assumptions={str(a): n for a, n in gpu.memory.values.assumptions.items()},
            estimates=gpu.estimates,
        )

    def others(self) -> dict[str, bool]:
        """Other cards: whether what was reserved here, and a context, fits there.

        Empty if it did not fit here.
        """
        if not self.fits:
            return {}
        needed = self.reserved + CONTEXT
        return {n: needed <= c.memory for n, c in cards().items() if n != self.card}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        size = f"{self.capacity / GB:.2f} GB"
        if self.fits:
            context = f"{CONTEXT / GB:.2f} GB"
            yield f"It fits on the {self.card} ({size}), with a CUDA context of {context}."
            others = self.others()
            fitting = [name for name, fits in others.items() if fits]
            if fitting:
                yield f"It also fits on: {', '.join(fitting)}."
            if len(fitting) < len(others):
                not_there = ", ".join(name for name, fits in others.items() if not fits)
                yield f"As it ran here, it is too large for: {not_there}."
        else:
            yield f"It does NOT fit on the {self.card} ({size}): memory ran out."
            yield "Up to there:"
        yield (
            f"Peak: {grouped(self.peak)} B allocated ({self.peak / GB:.2f} GB), in {self.phase}, "
            f"at {self.line}; {grouped(self.reserved)} B reserved."
        )
        for kind, nbytes in sorted(self.by_kind.items(), key=lambda item: -item[1]):
            yield f"  {kind:<18}{grouped(nbytes):>18} B"
        if self.after_step:
            after = ", ".join(f"{grouped(n)} B" for n in self.after_step[-3:])
            yield f"Allocated after the last steps: {after}."
        for line, nbytes in self.left.items():
            yield f"Each step leaves {grouped(nbytes)} B behind that {line} made."
        if self.assumptions:
            yield "Assumed, because the values depend on weights or data that are not computed:"
            for text, count in self.assumptions.items():
                yield f"  {text}" + (f", {count} times" if count > 1 else "")
        for text in self.estimates:
            yield f"Estimated: {text}."
        if self.estimates:
            yield "All other figures are replayed."
        else:
            yield "All figures are replayed."
