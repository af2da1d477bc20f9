"""What is seen of a program while it runs on a virtual card: its peak, its steps, its leaks.

A `Watch` looks at the allocator's requests; `every_byte.report` says what it saw. All sizes
are bytes.
"""

import gc
import linecache
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
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

from every_byte.estimate import block
from every_byte.gpu import VirtualGPU
from every_byte.leaks import Holder, holders
from every_byte.tracker import Timeline, in_backward
from every_byte.units import GB
from every_byte.virtual.values import program_place

LIMIT = 1_000_000
"""Births and deaths of tensors in a timeline at most: about 0.3 GB of the host's memory."""

EVERY = 10.0
"""Seconds between two lines of progress."""


class EnoughSteps(BaseException):
    """Ends a program after the steps that were asked for; no ``except Exception`` stops it."""


class Place(NamedTuple):
    """Where a program is.

    Attributes:
        step: optimizer steps that it has taken.
        phase: load (until the first forward), forward, backward, optimizer or other.
        file, line: of its own; "" and 0 if no line of its own is being carried out.
    """

    step: int = 0
    phase: str = "load"
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else "?"

    @property
    def source(self) -> str:
        """The line's text; empty if it cannot be read."""
        return linecache.getline(self.file, self.line).strip()


class Leak(NamedTuple):
    """What a step left behind.

    Attributes:
        nbytes: of blocks.
        made: the line that made the tensors, ``file:number``.
        holder: what keeps them alive; None if it was not found.
        each: whether what the program asked for has grown by as much in the step after, too. If
            not, that step alone may have left it, such as a copy of the best model so far.
    """

    nbytes: int
    made: str
    holder: Holder | None
    each: bool

    def __str__(self) -> str:
        kept = "" if self.holder is None else f", kept by {self.holder}"
        return f", made at {self.made}{kept}"


class _Trained(torch.nn.Module):
    """The models and optimizers that were at work so far, as one of each.

    In the end all models are: those that are loaded or kept beside have parameters, too.
    """

    def __init__(self) -> None:
        super().__init__()
        # Held by the program alone: what it drops is free, as on a card.
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._parts: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def add(self, module: torch.nn.Module) -> bool:
        """Take a module that is at work; False if it is a part of one that is known.

        Parts come by themselves where checkpointing computes a layer again, in backward.
        """
        if module in self._parts:
            return False
        self._parts.update(module.modules())
        self.models.add(module)
        return True

    def add_all(self) -> None:
        """Take what is at no work, too: a model that is being loaded, or an average of one."""
        for each in gc.get_objects():
            if issubclass(type(each), torch.nn.Module) and each is not self:
                if "training" in object.__getattribute__(each, "__dict__"):  # it is made
                    self.add(each)

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:
        """Those of all models."""
        for model in list(self.models):
            yield from model.modules()

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """Those of all models."""
        for model in list(self.models):
            yield from model.buffers()

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Those of all models, and of all optimizers' groups."""
        for model in list(self.models):
            yield from model.parameters()
        for optimizer in list(self.optimizers):
            for group in optimizer.param_groups:
                yield from group["params"]

    @property
    def state(self) -> dict[int, Any]:
        """All optimizers' states."""
        return dict(enumerate(list(o.state.values()) for o in list(self.optimizers)))


@dataclass
class Watch:
    """What is seen of a program, while `watching`.

    Attributes:
        gpu: to look at.
        steps: optimizer steps after which the program is ended by `EnoughSteps`; 0: never.
        say: is given a line of progress every `EVERY` seconds.
        clock: tells the seconds.
        peak: largest ``memory_allocated()``, whatever the program resets.
        reserved: largest ``memory_reserved()``, likewise.
        place: of the program, at the peak.
        after_step: ``memory_allocated()`` after each optimizer step.
        leaks: what the last step but one left behind, the largest first.
        timeline: bytes by kind, with `Place` as ``where``.
        interrupted: set it, and the program is interrupted at its next allocation.
    """

    gpu: VirtualGPU
    steps: int = 3
    say: Callable[[str], None] | None = None
    clock: Callable[[], float] = time.monotonic
    peak: int = 0
    reserved: int = 0
    place: Place = field(default_factory=Place)
    after_step: list[int] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    interrupted: bool = False
    _asked: list[int] = field(default_factory=list)  # for by the program, after each step
    _births: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    _trained: _Trained = field(default_factory=_Trained)
    _forward: int = 0
    _has_begun: bool = False
    _in_optimizer: bool = False
    _last: Place = field(default_factory=Place)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the program that runs meanwhile."""
        memory, trained = self.gpu.memory, self._trained
        malloc, free = memory.malloc, memory.free
        taken: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = (
            weakref.WeakKeyDictionary()
        )  # steps
        began = told = self.clock()

        def watched_malloc(nbytes: int, stream: int | None = None) -> int:
            nonlocal told
            if self.interrupted:
                self.interrupted = False
                raise KeyboardInterrupt
            handle = malloc(nbytes, stream)
            self.reserved = max(self.reserved, memory.memory_reserved())
            if memory.memory_allocated() > self.peak:
                self.peak, self.place = memory.memory_allocated(), self.now()
                self.timeline.look(handle)
            if self.after_step:
                self._births[handle] = len(self.after_step), nbytes, str(self.now())
            if self.say is not None and self.clock() - told >= EVERY:
                told = self.clock()
                self.say(self._progress(told - began))
            return handle

        def watched_free(handle: int) -> None:
            self._births.pop(handle, None)
            free(handle)

        def enters(module: torch.nn.Module, _: object) -> None:
            if not self._forward and trained.add(module):
                self.timeline.see()
            self._forward += 1
            self._has_begun = True

        def leaves(*_: object) -> None:
            self._forward -= 1

        def begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self._in_optimizer = True
            trained.optimizers.add(optimizer)

        def ends(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self._in_optimizer = False
            taken[optimizer] = taken.get(optimizer, 0) + 1
            if taken[optimizer] == 1:
                self.timeline.see()  # its states, which the program may drop before the end
            if taken[optimizer] <= len(self.after_step):
                return  # another one's, of the same step
            self.after_step.append(memory.memory_allocated())
            self._asked.append(memory.memory_requested())
            if len(self.after_step) == self.steps:
                self.look_for_leaks()
                raise EnoughSteps

        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(enters),
                register_module_forward_hook(leaves, always_call=True),
                register_optimizer_step_pre_hook(begins),
                register_optimizer_step_post_hook(ends),
            ):
                stack.callback(handle.remove)
            stack.enter_context(mock.patch.object(memory, "malloc", watched_malloc))
            stack.enter_context(mock.patch.object(memory, "free", watched_free))
            record = self.gpu.record(trained, trained, where=self.now, limit=LIMIT)  # type: ignore[arg-type]
            self.timeline = stack.enter_context(record)
            stack.callback(trained.add_all)
            yield

    def look_for_leaks(self) -> None:
        """Note what the last step but one made and is alive, if the program asked for more since.

        What is allocated may shrink meanwhile: blocks are larger than what was asked for.

        Call it while the program's variables are there: within its last step, or, at its end,
        before it is left.
        """
        self._trained.add_all()
        self.timeline.see()
        last = len(self.after_step) - 1
        self.leaks = []
        if last < 2 or self._asked[-1] <= self._asked[-2]:
            return
        left = {
            handle: (nbytes, line)
            for handle, (step, nbytes, line) in list(self._births.items())
            if step == last - 1
        }
        found = holders(set(left), self.gpu)
        blocks: Counter[tuple[str, Holder | None]] = Counter()
        asked: Counter[tuple[str, Holder | None]] = Counter()
        for handle, (nbytes, line) in left.items():
            blocks[line, found.get(handle)] += block(nbytes)
            asked[line, found.get(handle)] += nbytes
        grown = self._asked[-1] - self._asked[-2]
        self.leaks = [
            Leak(nbytes, *key, each=asked[key] <= grown) for key, nbytes in blocks.most_common(5)
        ]

    def now(self) -> Place:
        """Where the program is."""
        file, line = program_place() or ("", 0)
        place = Place(len(self.after_step), self._phase(), file, line)
        if place != self._last:
            self._last = place
        return self._last  # one object for all that is made at one place

    def _phase(self) -> str:
        if self._in_optimizer:
            return "optimizer"
        if in_backward():
            return "backward"
        if self._forward:
            return "forward"
        return "other" if self._has_begun else "load"

    def _progress(self, seconds: float) -> str:
        step = len(self.after_step)
        of = f" of {self.steps}" if self.steps else ""
        return (
            f"every-byte run: {seconds:.0f} s, {step}{of} optimizer steps taken, peak so far "
            f"{self.peak / GB:.2f} GB"
        )
