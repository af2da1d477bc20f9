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
import multiprocessing
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
from every_byte.data import ALSO_NAMED
from every_byte.units import MiB
from helpers import workloads
from helpers.measured import UNWATCHED, Figures, peak_off, read_unwatched, unwatched_pairs
from helpers.record import versions
from helpers.workloads import FIGURES

SECONDS = 300  # that a program may take


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
    below = max(row[2] for row in figures.values()) // step - 1
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
    context: Any = multiprocessing.get_context("spawn" if on is None else "fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, on, there))
    process.start()
    there.close()
    try:
        if here.poll(SECONDS):
            found: dict[str, Any] = here.recv()
            return found
        return {"error": f"takes more than {SECONDS} s"}
    except EOFError:
        return {"error": "ends its process"}
    finally:
        process.kill()
        process.join()


def _write(path: Path, what: dict[str, Any]) -> None:
    beside = path.with_name(path.name + ".new")
    with lzma.open(beside, "wt") as file:
        json.dump(what, file, separators=(",", ":"))
    os.replace(beside, path)


def _printed(told: dict[str, Any]) -> None:
    same = every = 0
    for name, measured, again in unwatched_pairs(told):
        every += 1
        same += measured == again
        if measured != again:
            print(f"{name:60}{peak_off(measured, again):+12.4%} of the peak")
    print(f"{same} of {every} programs: every figure equal to the byte")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unwatched", description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="run them on this card")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="replay what FILE has")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these programs")
    asked = parser.parse_args(arguments)
    path = asked.measure or asked.replay
    if path is None:
        _printed(read_unwatched(UNWATCHED))
        return 0
    if asked.measure is not None:
        if not torch.cuda.is_available():
            print("torch.cuda.is_available() is False: --measure needs a GPU", file=sys.stderr)
            return 1
        about = {"versions": versions(), "card": torch.cuda.get_device_name()}
        told: dict[str, Any] = {"machine": about, "programs": {}}
        into, on = told["programs"], None
    else:
        told = read_unwatched(path)
        told["replayed"] = {"programs": {}} | told.get("replayed", {}) | {"versions": versions()}
        card = told["machine"]["card"].removeprefix("NVIDIA ")
        version = ".".join(told["machine"]["versions"]["torch"].split(".")[:2])
        into, on = told["replayed"]["programs"], (ALSO_NAMED.get(card, card), version)
        for module in ("transformers.trainer", "torchvision", "timm", "peft", "diffusers"):
            with suppress(ImportError):
                import_module(module)  # once, for all processes
        with as_cuda(on[0], torch_version=on[1]):
            torch.ones(1, device="cuda")
    gc.freeze()  # collecting garbage need not look at what was imported
    for name in asked.only or (names() if on is None else told["programs"]):
        into[name] = in_its_own_process(name, on)
        print(name, into[name].get("error", ""), flush=True)
        _write(path, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
