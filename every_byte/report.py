"""What a program did to a virtual card's memory, in words. All sizes are bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from every_byte.data import cards, context_of
from every_byte.units import GB, grouped, short
from every_byte.watch import Place, Watch

PHASES = {
    "load": "before the first forward",
    "forward": "in forward",
    "backward": "in backward",
    "optimizer": "in the optimizer's step",
    "other": "outside of the model",
}
"""The phases of `every_byte.watch.Place`, as sentences name them."""


@dataclass(frozen=True)
class Saving:
    """What one change to a program saves, replayed.

    Attributes:
        lever: its name for ``every-byte run --lever``.
        change: what to write in the program.
        fits: whether the program fits with it.
        peak, reserved: with it.
        saved, saved_reserved: against the program as it is; None if that has no end to
            compare with.
    """

    lever: str
    change: str
    fits: bool
    peak: int
    reserved: int
    saved: int | None
    saved_reserved: int | None


@dataclass(frozen=True)
class PhasePeak:
    """The largest ``memory_allocated()`` of a phase of a step, and where it was."""

    step: int
    phase: str
    peak: int
    line: str


@dataclass(frozen=True)
class Report:
    """What a program did to a card's memory.

    Attributes:
        card: its name.
        capacity: bytes that it has.
        fits: whether the program ended before memory did.
        failed: whether the program ended with an error: the same holds then.
        interrupted: whether it was ended by Ctrl-C: all figures are of what it did until then.
        gpus: of how many it was the first.
        peak, line, phase: largest ``memory_allocated()``, and where the program was.
        source: that line's text.
        reserved: largest ``memory_reserved()``.
        by_kind: bytes at the peak; empty if the program was too long to be written down.
        after_step: ``memory_allocated()`` after each optimizer step.
        left: what each step leaves behind.
        phases: the peak of each phase.
        assumptions: values that were read though nobody knows them, in words, and how often.
        levers: what would help, if that was asked for; the largest saving first.
        needed, needed_allocated: peaks of ``memory_reserved()`` and ``memory_allocated()`` that
            it would have without a bound, where it does not fit and that was asked for.
        useless: names of levers that were tried, and save nothing.
        estimates: what the figures contain that is estimated, in words.
    """

    card: str
    capacity: int
    fits: bool
    peak: int
    line: str
    source: str
    phase: str
    reserved: int
    by_kind: dict[str, int]
    after_step: list[int]
    left: list[dict[str, Any]]
    phases: list[PhasePeak]
    assumptions: dict[str, int]
    interrupted: bool = False
    failed: bool = False
    gpus: int = 1
    levers: list[Saving] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)
    needed: int | None = None
    needed_allocated: int | None = None
    estimates: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        watch: Watch,
        fits: bool = True,
        *,
        interrupted: bool = False,
        failed: bool = False,
        gpus: int = 1,
    ) -> "Report":
        """What a watch saw."""
        gpu = watch.gpu
        return cls(
            card=gpu.memory.name,
            capacity=gpu.capacity or 0,
            fits=fits,
            interrupted=interrupted,
            failed=failed,
            gpus=gpus,
            peak=watch.peak,
            line=str(watch.place),
            source=watch.place.source,
            phase=watch.place.phase,
            reserved=gpu.max_memory_reserved(),
            by_kind={kind: n for kind, n in watch.timeline.highest.items() if n},
            after_step=watch.after_step,
            left=[
                {
                    "bytes": leak.nbytes,
                    "made": leak.made,
                    "holder": leak.holder and leak.holder.name,
                    "kept": leak.holder and leak.holder.line,
                    "words": str(leak),
                }
                for leak in watch.leaks
            ],
            phases=_phases(watch),
            assumptions={str(a): n for a, n in gpu.memory.values.assumptions.items()},
            estimates=gpu.estimates,
        )

    def others(self) -> dict[str, bool | None]:
        """Other cards: whether what was reserved here, and a context, fits what is usable there.

        None where only what was allocated fits: the allocator may get along with less in
        reserve, or not. Empty if the program did not fit here, and nobody asked what it needs.
        """
        if not self.fits and self.needed is None:
            return {}
        needed = self.reserved if self.needed is None else self.needed
        least = self.needed_allocated or self.peak
        rooms = {name: card.usable - card.context for name, card in cards().items()}
        return {
            name: True if needed <= room else None if least <= room else False
            for name, room in rooms.items()
            if name != self.card
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        yield from self._verdict()
        yield from self._held()
        yield from self._steps()
        yield from self._savings()
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

    def _verdict(self) -> Iterator[str]:
        size = f"{self.capacity / GB:.2f} GB"
        if self.interrupted:
            yield "Interrupted: this is what the script did until then."
        if self.failed:
            yield "The script ended with an error: this is what it did until then."
        if self.gpus > 1:
            yield f"This is the first of {self.gpus} GPUs; NCCL's own memory is not counted."
        if self.fits:
            so_far = " so far" if self.interrupted or self.failed else ""
            context = f"{context_of(self.card) / GB:.2f} GB"
            yield f"It fits on the {self.card} ({size}){so_far}, with a CUDA context of {context}."
        else:
            yield f"It does NOT fit on the {self.card} ({size}): memory ran out."
            if self.needed is not None:
                yield (
                    f"Without a bound it takes {self.needed / GB:.2f} GB, and a CUDA context of "
                    f"{context_of(self.card) / GB:.2f} GB."
                )
        others = self.others()
        for fits, words in (
            (True, "It also fits on" if self.fits else "It fits on"),
            (None, "It may fit, with less in reserve, on"),
            (False, "As it ran here, it is too large for"),
        ):
            names = [name for name, answer in others.items() if answer is fits]
            if names:
                yield f"{words}: {', '.join(names)}."

    def _held(self) -> Iterator[str]:
        if not self.fits:
            yield "Until then:"
        yield (
            f"Peak: {_both(self.peak)} allocated, {PHASES[self.phase]}, at {self.line}; "
            f"{_both(self.reserved)} reserved."
        )
        if self.source:
            yield f"    {self.source}"
        for kind, nbytes in sorted(self.by_kind.items(), key=lambda item: -item[1]):
            yield f"  {kind:<17}{short(nbytes):>8}{grouped(nbytes):>15} B"

    def _steps(self) -> Iterator[str]:
        if self.after_step:
            after = ", ".join(_both(n) for n in self.after_step[-3:])
            yield f"Allocated after the last steps: {after}."
        for leak in self.left:
            yield f"Each step leaves {_both(leak['bytes'])} behind{leak['words']}."

    def _savings(self) -> Iterator[str]:
        if self.levers:
            yield "What would help, each replayed alone:"
        for saving in self.levers:
            fits = "" if self.fits else "it fits, " if saving.fits else "it still does not fit, "
            saved = ""
            if saving.saved is not None and saving.saved_reserved is not None:
                saved = (
                    f"{short(-saving.saved, plus=True)} allocated, "
                    f"{short(-saving.saved_reserved, plus=True)} reserved: "
                )
            yield f"  {fits}{saved}{saving.change} (--lever {saving.lever})"
        if self.useless:
            yield f"Tried, and saves nothing: {', '.join(self.useless)}."


def _both(nbytes: int) -> str:
    """In three digits, then to the byte: ``'8.33 GB (8,334,437,888 B)'``."""
    in_short, exact = short(nbytes), f"{grouped(nbytes)} B"
    return f"{in_short} ({exact})" if abs(nbytes) >= 1000 else exact


def _phases(watch: Watch) -> list[PhasePeak]:
    """The peak of each phase of each step, in order."""
    found: dict[tuple[int, str], PhasePeak] = {}
    timeline = watch.timeline
    seen = [(place, step.total) for place, step in zip(timeline.where, timeline.steps, strict=True)]
    if watch.peak:
        seen.append((watch.place, watch.peak))
    for place, total in seen:
        assert isinstance(place, Place)
        key = step_of(place, len(watch.after_step)), place.phase
        if key not in found or total > found[key].peak:
            found[key] = PhasePeak(*key, total, str(place))
    return list(found.values())


def step_of(place: Place, taken: int) -> int:
    """The number of the step that a place belongs to, from 1: what ends the last one is its own."""
    return place.step if place.phase == "other" and place.step == taken > 0 else place.step + 1
