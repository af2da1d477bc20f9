"""Programs on a card while nobody looks on, and the same programs on the virtual one.

``python -m benchmarks.unwatched --measure FILE`` runs each in a process of its own on this
machine's GPU, as its user would: nothing of this project is at work there, and what is read
are ``torch.cuda``'s own figures. ``--replay FILE`` runs them on the virtual card of that name
(`every_byte.as_cuda`), with the versions installed here, and writes both side by side.
Without an option it prints how the two agree that the book shows.

The programs are the runs of `helpers.workloads`, and the cases of `benchmarks.architectures`
with two training steps each. A record (`helpers.record`) looks on, and PyTorch does some things
otherwise then; see `every_byte.in_place`.
"""

import argparse
import gc
import json
import lzma
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import architectures
from every_byte import as_cuda
from every_byte.allocator import CachingAllocator, OutOfMemoryError
from every_byte.allocator.placement import Downwards
from every_byte.files import written
from every_byte.units import MiB
from helpers import workloads
from helpers.measured import Figures, peak, peak_off, read_unwatched, unwatched_pairs
from helpers.record import machine, rules_of, versions
from helpers.workloads import FIGURES

_XZ = b"\xfd7zXZ"  # that a file begins with


class _Looks(Figures):
    """The figures at each checkpoint; peaks are since the one before."""

    def __call__(self, name: str, *_: object, **__: object) -> None:
        self[name] = [int(getattr(torch.cuda, figure)()) for figure in FIGURES]
        torch.cuda.reset_peak_memory_stats()


def _run(name: str, look: _Looks) -> None:
    card: Any = SimpleNamespace(
        device=torch.device("cuda", 0), empty_cache=lambda: torch.cuda.empty_cache()
    )
    workloads.WORKLOADS[name](card, look)


def _trained(look: _Looks) -> Callable[[Any, Any], Any]:
    def trained(_: object, workload: architectures.Workload) -> None:
        model = workload.model.train()
        look("built")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for number in range(2):
            loss = workload.loss()
            look(f"{number} forward")
            loss.backward()
            look(f"{number} backward")
            optimizer.step()
            look(f"{number} step")
            optimizer.zero_grad()
            del loss
            look(f"{number} zeroed")
        if workload.generate is not None:
            model.eval()
            workload.generate()
            look("generated")

    return trained


def _case(name: str, look: _Looks) -> None:
    named = {f"{case.group}/{case.name}": case for case in architectures.cases()}
    # Without the sums that a case is held against: they would look on.
    with (
        mock.patch.object(architectures, "trained", _trained(look)),
        mock.patch.object(architectures, "closes", lambda *_: look("done")),
    ):
        named[name].run(None)  # type: ignore[arg-type]


def names() -> list[str]:
    """Of the programs: runs, and cases as ``group/name``."""
    every = (f"{case.group}/{case.name}" for case in architectures.cases())
    return [*workloads.WORKLOADS, *every]


def figures_of(name: str) -> Figures:
    """What ``torch.cuda`` tells at each checkpoint of a program, in bytes; see `FIGURES`.

    Raises:
        Exception: whatever it meets.
    """
    look = _Looks()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        (_run if name in workloads.WORKLOADS else _case)(name, look)
    return dict(look)


def replayed(name: str, card: str, torch_version: str) -> Figures:
    """The same on the virtual card, by the rules of a version of PyTorch."""
    with as_cuda(card, torch_version=torch_version):
        return figures_of(name)


def least(name: str, card: str, torch_version: str) -> int:
    """The fewest bytes, in steps of 2 MiB, with which a program runs to its end.

    Of what PyTorch may take (``set_per_process_memory_fraction``): with less, its allocator
    gives back what is free, tries again, and runs out. Found by its requests alone, which do
    not depend on the memory there is, as long as no library takes another kernel.
    """
    with as_cuda(card, torch_version=torch_version):
        torch.cuda.memory._record_memory_history("all")
        figures = figures_of(name)
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
    asked = [e for e in trace if e["action"] in ("alloc", "free_completed")]
    step = 2 * MiB
    below = peak(figures) // step - 1
    enough = -(-max(row[3] for row in figures.values()) // step)
    while enough - below > 1:
        middle = (enough + below) // 2
        if _runs(asked, middle * step):
            enough = middle
        else:
            below = middle
    return enough * step


def _runs(asked: list[dict[str, Any]], allowed: int) -> bool:
    """Whether requests and frees are served where so many bytes may be taken."""
    capacity = 1 << 40
    conf = f"per_process_memory_fraction:{allowed / capacity!r}"
    card = CachingAllocator(capacity, conf, placement=Downwards())
    handles: dict[int, int] = {}
    try:
        for one in asked:
            if one["action"] == "alloc":
                handles[one["addr"]] = card.malloc(one["size"])
            else:
                card.free(handles.pop(one["addr"]))
    except OutOfMemoryError:
        return False
    return True


def _send(name: str, on: tuple[str, str] | None, to: Any) -> None:
    try:
        to.send({"figures": figures_of(name) if on is None else replayed(name, *on)})
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        to.send({"error": f"{type(error).__name__}: {first[:200]}"})


def in_its_own_process(name: str, on: tuple[str, str] | None) -> dict[str, Any]:
    """The "figures" of a program, or its "error"; `on`: a virtual card and PyTorch's version."""
    # On a card without this one's imports: some of them use CUDA, and cannot be forked then.
    method = "spawn" if on is None else "fork"
    try:
        found: dict[str, Any] = architectures.in_a_process(_send, name, on, method=method)
        return found
    except TimeoutError as error:
        return {"error": str(error)}
    except EOFError:
        return {"error": "ends its process"}


def _write(path: Path, what: dict[str, Any]) -> None:
    with written(path, "a file of programs", lambda head: head.startswith(_XZ)) as file:
        file.write(lzma.compress(json.dumps(what, separators=(",", ":")).encode()))


def _printed(told: dict[str, Any]) -> None:
    same = every = 0
    for name, measured, again in unwatched_pairs(told):
        every += 1
        same += measured == again
        if measured != again:
            print(f"{name:60}{peak_off(measured, again):+12.4%} of the peak")
    print(f"{same} of {every} programs: every figure equal to the byte")


_Begun = tuple[dict[str, Any], dict[str, Any], tuple[str, str] | None]


def _measurements(path: Path) -> _Begun:
    """A file to be, its programs, and no virtual card.

    Raises:
        OSError: there is a file, or no GPU.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: remove it, or name another file")
    if not torch.cuda.is_available():
        raise OSError("torch.cuda.is_available() is False: --measure needs a GPU")
    told: dict[str, Any] = {"machine": machine(), "programs": {}}
    return told, told["programs"], None


def _replays(path: Path) -> _Begun:
    """What a file has, its replays, and the virtual card with its version of PyTorch.

    Raises:
        OSError, ValueError: it is no such file, or of a card that is not known.
    """
    told = read_unwatched(path)
    if not isinstance(told, dict) or not told.keys() >= {"machine", "programs"}:
        raise ValueError(f"{path} is no file of --measure")
    card, version = rules_of(told["machine"])
    if card is None:
        raise ValueError(f"{path} is of {told['machine']['card']!r}, which every_byte doesn't know")
    again = {"programs": {}} | told.get("replayed", {}) | {"versions": versions()}
    told["replayed"] = again
    return told, again["programs"], (card, version)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unwatched", description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="run them on this card")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="replay what FILE has")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these programs")
    asked = parser.parse_args(arguments)
    path = asked.measure or asked.replay
    if path is None:
        _printed(read_unwatched())
        return 0
    try:
        told, into, on = _replays(path) if asked.replay else _measurements(path)
        known = list(told["programs"]) if asked.replay else names()
        if missing := set(asked.only or ()) - set(known):
            raise ValueError(f"--only is {sorted(missing)[0]!r}: expected one of the programs")
    except (OSError, ValueError, lzma.LZMAError) as error:
        print(error, file=sys.stderr)
        return 2
    for module in (
        "torch._dynamo",
        "transformers.trainer",
        "torchvision",
        "timm",
        "peft",
        "diffusers",
    ):
        with suppress(ImportError):
            if on is not None:
                import_module(module)  # once, for all processes
    gc.freeze()  # collecting garbage need not look at what was imported
    todo = asked.only or known
    for number, name in enumerate(todo, 1):
        into[name] = in_its_own_process(name, on)
        print(f"[{number}/{len(todo)}]", name, into[name].get("error", ""), flush=True)
        _write(path, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
