"""What a GPU measures beside what the virtual one replays: ``python -m helpers.record``.

Every experiment runs on the CUDA device, then on the virtual GPU in the same
process, each on an empty card. At every checkpoint both say what is allocated,
reserved, at the peak, and for what. The allocations on the device are also
recorded one by one, and replayed. Nothing is downloaded.

A record holds what was measured. The replay stands in a file of its own, made anew
by ``python -m helpers.record --replay RECORD`` whenever the rules have changed;
differences are computed from both and stored nowhere.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from every_byte.allocator.replay import replay_trace
from every_byte.data import cards, named
from every_byte.gpu import GPU, CudaGPU, VirtualGPU
from every_byte.tracker import KINDS, untracked
from every_byte.virtual.memory import CUBLAS_WORKSPACE
from helpers import signatures, workloads
from helpers.experiments import EXPERIMENTS, Experiment, Look

RECORDS = Path(__file__).parent.parent / "book" / "records"
FIGURES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
"""What is read at a checkpoint, in bytes; peaks are since the checkpoint before."""
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")
_KEPT = 500  # events; a longer trace is compared, too, but not written down
_SETTINGS = (
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE"),
)

OPERATIONS = RECORDS.parent.parent / "tests" / "data" / "h200-torch-2.11" / "kernels.json.xz"
_REHEARSED = "H200"  # the card of --dry-run
_OF_EACH = 12  # signatures of an operation that --all measures, far from each other
_MADE_OF = ("transformers", "accelerate", "bitsandbytes", "torchaudio", "torch.distributed.fsdp")

Result = dict[str, Any]


def _key(kind: str) -> str:
    return kind.replace(" ", "_")


# What there is


def _run_of(name: str) -> Experiment:
    """A run of a whole model, as an experiment."""
    run: Any = workloads.WORKLOADS[name]
    return Experiment(lambda gpu, look: run(gpu, lambda checkpoint: look(checkpoint)))


def _operation(of: list[str], gpu: GPU, look: Look) -> None:
    """One operation after the other, each a checkpoint that is named by its signature.

    Raises:
        Unread: none can be carried out with the versions installed, or on this GPU.
    """
    why: Exception | None = None
    reached = False
    for signature in of:
        try:
            call = signatures.prepared(gpu.device, signature)
            result = call()
        except (signatures.Unread, torch.OutOfMemoryError) as error:
            why = error
            continue  # not here; the checkpoint is on one GPU only, which the notes name
        look(signature)
        reached = True
        del call, result
    if why is not None and not reached:
        raise signatures.Unread(str(why).partition("\n")[0])


@cache
def more() -> dict[str, Experiment]:
    """What ``--all`` adds: runs of other models, and single operations by name."""
    found = {f"run-{name}": _run_of(name) for name in workloads.WORKLOADS}
    named: dict[str, list[str]] = {}
    for one in signatures.measured(OPERATIONS):
        if one.group.startswith("single operations"):
            named.setdefault(f"operation-{one.operation}", []).append(one.signature)
    for name, of in named.items():
        few = of[:: -(-len(of) // _OF_EACH)]
        found[name] = Experiment(partial(_operation, few))
    return found


def _experiment(name: str) -> Experiment:
    return EXPERIMENTS[name] if name in EXPERIMENTS else more()[name]


# Running one


def import_first() -> None:
    """Import what experiments use, before a device is set.

    What is imported under a device context is made on that device: transformers imports
    torchaudio, whose ``compliance/kaldi.py`` makes a constant of 4 B.
    """
    for name in _MADE_OF:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    if importlib.util.find_spec("transformers"):
        from helpers.models import build

        with untracked():
            for name in ("gpt2", "Qwen2-0.5B", "Llama-3.2-1B"):
                build(name, "meta")


def _empty_card(gpu: GPU) -> None:
    gc.collect()
    gpu.clear_cublas_workspaces()
    tables = getattr(sys.modules.get("bitsandbytes.functional"), "name2qmap", {})
    tables.clear()  # of quantisation levels, made once in a process
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


def _carried_out(experiment: Experiment, gpu: GPU) -> tuple[Result, dict[str, str]]:
    """The figures and the messages of each checkpoint on an empty GPU, which it leaves so."""
    rows: Result = {}
    messages: dict[str, str] = {}

    def look(name: str, *of: Any, message: str = "") -> None:
        rows[name] = {figure: getattr(gpu, figure)() for figure in FIGURES}
        kinds = gpu.breakdown(*of)
        rows[name]["by_kind"] = {_key(kind): kinds[kind] for kind in KINDS if kinds[kind]}
        if message:
            messages[name] = message
        gpu.reset_peak_memory_stats()

    with gpu:
        try:
            experiment.run(gpu, look)
        finally:
            _empty_card(gpu)
    return rows, messages


def measure(experiment: Experiment) -> Result:
    """An experiment on the CUDA device: what each checkpoint measured, and the trace.

    Raises:
        Exception: whatever the experiment meets, such as too little memory.
    """
    gpu = CudaGPU()
    result: Result = {"alloc_conf": experiment.alloc_conf}
    with ExitStack() as stack:
        with gpu:
            _empty_card(gpu)
        if experiment.alloc_conf:
            torch.cuda.memory._set_allocator_settings(experiment.alloc_conf)
            off = experiment.alloc_conf.replace("True", "False")
            stack.callback(torch.cuda.memory._set_allocator_settings, off)
        held = gpu.memory_reserved()
        if experiment.capacity is not None:
            free, total = gpu.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(experiment.capacity / total, gpu.device)
            stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0, gpu.device)
            result["outside"] = total - free - held
        gpu.record_memory_history()
        stack.callback(gpu.record_memory_history, None)
        result["checkpoints"], result["messages"] = _carried_out(experiment, gpu)
        snapshot = gpu.snapshot()
        entries = snapshot["device_traces"][gpu.device.index or 0]
        again = replay_trace(entries, gpu.memory_snapshot(), experiment.alloc_conf)
    result["trace"] = {"held_before": held, "events": again.events, "mismatch": again.mismatch}
    if len(entries) <= _KEPT:
        numbers: dict[int, int] = {}  # of streams, which CUDA names by an address
        result["trace"]["entries"] = [
            f"{e['action']} {e.get('addr', 0):#x} {e['size']} "
            f"{numbers.setdefault(e.get('stream', 0), len(numbers))}"
            for e in entries
        ]
    return result


def rules_of(machine: Mapping[str, Any]) -> tuple[str | None, str]:
    """The name here of a record's card, if it is known, and its version of PyTorch, as "2.11"."""
    return named(machine["card"]), ".".join(machine["versions"]["torch"].split(".")[:2])


def replay(name: str, measured: Result, machine: Mapping[str, Any]) -> Result:
    """The same experiment on a virtual GPU: its checkpoints and messages, or why there are none.

    By the rules of the card and of the version of PyTorch that the record is of, where
    they are known, and with the cuBLAS workspaces that every record fixes.

    Args:
        name: of the experiment.
        measured: what the card measured; under its allocator settings it is replayed.
        machine: what the record says of the card; see `machine`.
    """
    experiment = _experiment(name)
    card, version = rules_of(machine)
    like: Result = {"card": card, "torch": card and version}
    total: int = machine["memory"]
    gpu = VirtualGPU(**like, capacity=total, alloc_conf=measured["alloc_conf"])
    if experiment.capacity is not None:
        conf = f"per_process_memory_fraction:{experiment.capacity / total}"
        gpu = VirtualGPU(**like, capacity=total, alloc_conf=conf, context=measured["outside"])
    try:
        with mock.patch.dict(os.environ, CUBLAS_WORKSPACE_CONFIG=CUBLAS_WORKSPACE):
            rows, messages = _carried_out(experiment, gpu)
    except Exception as error:  # what is not replayed is named; the others still are
        said = str(error).strip().partition("\n")[0]
        return {"not_replayed": f"{type(error).__name__}: {said}"}
    return {"checkpoints": rows, "messages": messages}


class Row(NamedTuple):
    """One checkpoint on both GPUs; `difference` is replayed less measured, figure by figure."""

    experiment: str
    checkpoint: str
    measured: Result
    replayed: Result
    difference: dict[str, int]

    def by_kind(self) -> dict[str, int]:
        """Replayed less measured of each kind that differs, in bytes."""
        one, other = self.replayed["by_kind"], self.measured["by_kind"]
        off = {kind: one.get(kind, 0) - other.get(kind, 0) for kind in {**one, **other}}
        return {kind: nbytes for kind, nbytes in off.items() if nbytes}


def compared(measured: Mapping[str, Result], replayed: Mapping[str, Result]) -> Iterator[Row]:
    """Every checkpoint that both GPUs reached, of experiments by name."""
    for name, result in measured.items():
        rows = replayed.get(name, {}).get("checkpoints", {})
        for checkpoint, row in result.get("checkpoints", {}).items():
            if checkpoint in rows:
                again = rows[checkpoint]
                off = {figure: again[figure] - row[figure] for figure in FIGURES}
                yield Row(name, checkpoint, row, again, off)


def notes(measured: Mapping[str, Result], replayed: Mapping[str, Result]) -> Iterator[str]:
    """What stands in no row: experiments skipped or not replayed, checkpoints of one GPU only."""
    for name, result in measured.items():
        again = replayed.get(name, {"not_replayed": "nobody has tried"})
        if "skipped" in result:
            yield f"`{name}`: skipped, {result['skipped']}"
            continue
        if "not_replayed" in again:
            yield f"`{name}`: not replayed, {again['not_replayed']}"
        elif alone := sorted(result["checkpoints"].keys() ^ again["checkpoints"].keys()):
            yield f"`{name}`: on one GPU only: {', '.join(alone)}"
        if held := result["trace"]["held_before"]:
            yield f"`{name}`: the card was not empty before, {held:,} B were reserved"
        elif mismatch := result["trace"]["mismatch"]:
            yield f"`{name}`: the trace differs at {mismatch}"


# The record


def versions() -> Result:
    """Those of Python and of the packages that matter to memory; None where one is missing."""
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {"python": platform.python_version()} | {p: found.get(p) for p in PACKAGES}


def machine() -> Result:
    """The card, its driver, the versions and the settings that matter to memory."""
    properties = torch.cuda.get_device_properties(0)
    asked = {"cublas": "cublas_workspace_size", "cublaslt": "cublaslt_workspace_size"}
    sizes = {name: getattr(torch.backends.cuda, f, None) for name, f in asked.items()}
    return {
        "card": properties.name,
        "memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "allocator": torch.cuda.memory._snapshot().get("allocator_settings"),
        "workspaces": {name: size() if size else None for name, size in sizes.items()},
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, by nvidia-smi; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    if shutil.which(command[0]) is None:
        return None
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return told.stdout.strip() or None


def summary(measured: Mapping[str, Result], replayed: Mapping[str, Result]) -> dict[str, int]:
    """How many figures there are, and how many the replay gets to the byte."""
    rows = list(compared(measured, replayed))
    off = [abs(nbytes) for row in rows for nbytes in row.difference.values()]
    traces = [r["trace"] for r in measured.values() if "trace" in r]
    return {
        "experiments": len(traces),
        "skipped": len(measured) - len(traces),
        "checkpoints": len(rows),
        "figures": len(off),
        "figures_that_differ": sum(nbytes != 0 for nbytes in off),
        "largest_difference": max(off, default=0),
        "traces_that_differ": sum(t["mismatch"] is not None for t in traces),
    }


def problems(record: Any) -> list[str]:
    """Why something is no whole record; nothing if it is one.

    Its form, that the kinds add up, and that its traces replay as well as they did.
    """
    try:
        return [*_problems(record)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"it has not the form of a record: {type(error).__name__} {error}"]


def _problems(record: Any) -> Iterator[str]:
    datetime.fromisoformat(record["date"])
    known = {_key(kind) for kind in KINDS}
    about = record["machine"]
    for key, kind in {"card": str, "memory": int, "compute_capability": str, "cuda": str}.items():
        if not isinstance(about[key], kind) or not about[key]:
            yield f"machine: {key} is {about[key]!r}"
    if missing := [name for name in ("python", "torch") if not about["versions"].get(name)]:
        yield f"machine: no version of {', '.join(missing)}"
    for name, result in record["experiments"].items():
        if "skipped" in result:
            if not result["skipped"]:
                yield f"{name}: skipped, and no reason given"
            continue
        for checkpoint, row in result["checkpoints"].items():
            kinds = row["by_kind"]
            numbers = [*(row[figure] for figure in FIGURES), *kinds.values()]
            if any(type(n) is not int for n in numbers):
                yield f"{name}, {checkpoint}: a figure is no whole number of bytes"
            elif not kinds.keys() <= known or sum(kinds.values()) != row[FIGURES[0]]:
                yield f"{name}, {checkpoint}: the kinds do not add up to memory_allocated"
        trace = result["trace"]
        if "entries" in trace and not trace["held_before"]:
            # A model that has learned since may do better, never worse.
            again = replay_trace(_entries(trace["entries"]), alloc_conf=result["alloc_conf"])
            if again.events != trace["events"] or (again.mismatch and not trace["mismatch"]):
                yield f"{name}: its trace replays otherwise: {again.mismatch}"


def _entries(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        action, address, size, stream = line.split()
        yield {
            "action": action,
            "addr": int(address, 16),
            "size": int(size),
            "stream": int(stream),
        }


def _json(record: Result) -> str:
    """A line for each experiment: small, and what changed shows."""
    head = {key: value for key, value in record.items() if key != "experiments"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [
        f"{json.dumps(name)}: {json.dumps(result, separators=(',', ':'))}"
        for name, result in record["experiments"].items()
    ]
    lines.append('"experiments": {\n' + ",\n".join(rows) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def replays_of(record: Path) -> Path:
    """Where the replay of a record stands."""
    return record.parent / "replayed" / record.name


def _replay_again(path: Path) -> int:
    """Write the replay of a record beside it; returns the exit status."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        print(f"--replay {path}: {error}: expected a record's file", file=sys.stderr)
        return 2
    if wrong := problems(record):
        print(f"--replay {path}: {wrong[0]}", file=sys.stderr)
        return 2
    again: Result = {"versions": versions(), "experiments": {}}
    for name, result in record["experiments"].items():
        if "skipped" not in result and (name in EXPERIMENTS or name in more()):
            again["experiments"][name] = replay(name, result, record["machine"])
    told = summary(record["experiments"], again["experiments"])
    if not _written(replays_of(path), again):
        return 2
    print(
        f"{replays_of(path)}: {told['figures']} figures, {told['figures_that_differ']} differ, "
        f"by at most {told['largest_difference']:,} B"
    )
    return 0


def _written(path: Path, record: Result) -> bool:
    """Write beside, then move into place: an interruption leaves a whole file.

    False if it cannot be written, which it says; what was there before stays.
    """
    beside = path.with_name(path.name + ".new")
    try:
        if path.parent.name == "replayed":
            path.parent.mkdir(exist_ok=True)
        beside.write_text(_json(record), "utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        print(
            f"{path} cannot be written ({error.strerror}): make room, or name another file "
            "with --out",
            file=sys.stderr,
        )
        return False
    return True


def _dry_run(names: list[str]) -> int:
    """Carry experiments out on a virtual card as if one were recorded; returns the exit status.

    By the rules of the installed PyTorch. What raises is said, and what would tell nothing;
    an operation that this version does not have is no fault. No file is written.
    """
    import_first()
    about: Result = {"card": _REHEARSED, "memory": cards()[_REHEARSED].usable}
    about |= {"versions": versions()}
    failed = absent = 0
    for number, name in enumerate(names, 1):
        alloc_conf = _experiment(name).alloc_conf
        told = replay(name, {"alloc_conf": alloc_conf, "outside": 0}, about)
        reached = told.get("checkpoints", {})
        why = told.get("not_replayed", "" if reached else "no checkpoint was reached")
        absent += why.startswith(signatures.Unread.__name__)
        failed += bool(why)
        print(f"[{number}/{len(names)}] {name}: {why or f'{len(reached)} checkpoints'}", flush=True)
    told_by = f"PyTorch {about['versions']['torch']}"
    but = f"; {absent} are of operations that it does not have" if absent else ""
    print(f"{len(names) - failed} of {len(names)} experiments run with {told_by}{but}")
    return 1 if failed > absent else 0


def _chosen(patterns: list[str] | None, every: bool = False) -> list[str]:
    """The experiments that the patterns name, in order; `every`: of those that ``--all`` adds, too.

    Raises:
        ValueError: a pattern names none.
    """
    known = [*EXPERIMENTS, *(more() if every else ())]
    for pattern in patterns or []:
        if not any(fnmatch(name, pattern) for name in known):
            raise ValueError(
                f"--only is {pattern!r}: expected a name or a pattern such as 'mlp-*'; "
                "--list prints the names"
            )
    return [n for n in known if not patterns or any(fnmatch(n, p) for p in patterns)]


def _begun(path: Path, here: Result) -> tuple[Result, Result]:
    """A record that was begun on this machine, and its replay.

    Raises:
        ValueError: it is no record, or of another card or other versions.
    """
    record: Result = json.loads(path.read_text("utf-8"))
    if wrong := problems(record):
        raise ValueError(wrong[0])
    for what in ("card", "driver", "versions"):
        if record["machine"][what] != here[what]:
            raise ValueError(
                f"its {what} is {record['machine'][what]!r}, expected this machine's, "
                f"{here[what]!r}: name another file with --out"
            )
    again = replays_of(path)
    replayed = {"versions": versions(), "experiments": {}}
    return record, json.loads(again.read_text("utf-8")) if again.exists() else replayed


def _expected(names: list[str]) -> str:
    """How many experiments there are to do, and how long they took others."""
    took: dict[str, float] = {}
    for path in sorted(RECORDS.glob("*.json")):
        for name, result in json.loads(path.read_text("utf-8"))["experiments"].items():
            if "seconds" in result:
                took[name] = result["seconds"]
    known = [took[name] for name in names if name in took]
    told = f"{len(names)} experiments to measure"
    if not known:
        return f"{told}; no record says how long they take"
    about = "" if len(known) == len(names) else f" for {len(known)} of them"
    return f"{told}; on a card of the records they took {sum(known):.0f} s{about}"


def _line(name: str, result: Result, replayed: Result) -> str:
    """One experiment's outcome in a line."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    measured, again = {name: result}, {name: replayed}
    told = summary(measured, again)
    figures = f"{told['figures']} figures, {told['figures_that_differ']} differ"
    if told["figures_that_differ"]:
        figures += f", by at most {told['largest_difference']:,} B"
    events = f"{result['trace']['events']} events"
    return "; ".join([figures, events, *notes(measured, again)])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.record",
        description="Measure every experiment of the book on this machine's CUDA device, replay "
        "it on the virtual GPU, and write both into one JSON file. Needs no network; the first "
        "run makes models of random weights (4 GB of disk) in the cache folder.",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also the runs of other models (run-*) and single operations (operation-*)",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, by name or pattern")
    parser.add_argument("--out", type=Path, help="the file to write; else named after the card")
    parser.add_argument("--list", action="store_true", help="print the experiments' names")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the file, with what it does not have yet"
    )
    parser.add_argument(
        "--replay", type=Path, metavar="RECORD", help="replay a record anew; needs no GPU"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="see that each runs on a virtual card with the versions installed here; needs no GPU",
    )
    asked = parser.parse_args(arguments)
    if asked.replay is not None:
        return _replay_again(asked.replay)
    try:
        names = _chosen(asked.only, asked.all)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(names))
        return 0
    if asked.dry_run:
        return _dry_run(names)
    if not torch.cuda.is_available():
        print(
            "torch.cuda.is_available() is False: recording needs an NVIDIA GPU and a CUDA build "
            "of PyTorch. Without one the notebooks replay the same experiments: make test",
            file=sys.stderr,
        )
        return 1
    if changed := [name for name in _SETTINGS[:3] if os.environ.get(name)]:
        print(f"{changed[0]} is set: unset it, an experiment sets what it needs", file=sys.stderr)
        return 2
    import_first()
    with CudaGPU() as gpu:  # fixes cuBLAS's workspaces before the first product
        _empty_card(gpu)
        if held := gpu.memory_allocated():
            print(
                f"the card is not empty: this process has {held:,} B allocated on it before the "
                "first experiment, expected 0. Something that was imported made a tensor there: "
                "name it in an issue, or record in a process of its own",
                file=sys.stderr,
            )
            return 2
        record: Result = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        record |= {"machine": machine(), "experiments": {}}
    name = f"{record['machine']['card']}-torch-{record['machine']['versions']['torch']}"
    out: Path = asked.out or Path(re.sub(r"[^\w.+-]+", "-", name).lower() + ".json")
    replayed: Result = {"versions": versions(), "experiments": {}}
    if out.exists():
        if not asked.resume:
            print(
                f"{out} exists: remove it, or name another file with --out, or go on with it "
                "by --resume",
                file=sys.stderr,
            )
            return 2
        try:
            before = _begun(out, record["machine"])
        except ValueError as error:
            print(f"--resume {out}: {error}", file=sys.stderr)
            return 2
        record, replayed = before
    names = [name for name in names if name not in record["experiments"]]
    if not _written(out, record):
        return 2
    print(_expected(names), file=sys.stderr)
    gc.freeze()  # collecting garbage need not look at what was imported
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ... ", end="", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            result = measure(_experiment(name))
            result["seconds"] = round(time.monotonic() - begin, 1)
            replayed["experiments"][name] = replay(name, result, record["machine"])
        except KeyboardInterrupt:
            print(f"interrupted: {out} has what was done before", file=sys.stderr)
            return 130
        except Exception as error:  # whatever this machine lacks: the others can still run
            said = str(error).strip().partition("\n")[0].partition(" GPU 0 has")[0]
            result = {"skipped": f"{type(error).__name__}: {said}"}
        record["experiments"][name] = result
        if not _written(out, record) or not _written(replays_of(out), replayed):
            return 2
        print(_line(name, result, replayed["experiments"].get(name, {})), file=sys.stderr)
    told = summary(record["experiments"], replayed["experiments"])
    print(f"{out}: {told['experiments']} experiments recorded, {told['skipped']} skipped")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
