"""What a GPU measures beside what the virtual one replays: ``python -m helpers.record``.

Every experiment runs on the CUDA device, then on the virtual GPU in the same
process, each on an empty card. At every checkpoint both say what is allocated,
reserved, at the peak, and for what. The allocations on the device are also
recorded one by one, and replayed. Nothing is downloaded.
"""

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from every_byte.allocator.replay import replay_trace
from every_byte.gpu import GPU, CudaGPU, VirtualGPU
from every_byte.tracker import KINDS
from helpers.experiments import EXPERIMENTS, Experiment

FIGURES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
"""What is read at a checkpoint, in bytes; peaks are since the checkpoint before."""
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")
_KEPT = 2_000  # events; a longer trace is compared, too, but not written down
_SETTINGS = (
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE"),
)

Result = dict[str, Any]


# Running one


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
        rows[name]["by kind"] = dict(gpu.breakdown(*of))
        if message:
            messages[name] = message
        gpu.reset_peak_memory_stats()

    with gpu:
        try:
            experiment.run(gpu, look)
        finally:
            _empty_card(gpu)
    return rows, messages


def _measured(experiment: Experiment) -> tuple[Result, dict[str, str], Result, VirtualGPU]:
    """Figures and messages on the CUDA device, its trace replayed, and a virtual GPU like it."""
    gpu = CudaGPU()
    with ExitStack() as stack:
        with gpu:
            _empty_card(gpu)
        alike = VirtualGPU(alloc_conf=experiment.alloc_conf)
        if experiment.alloc_conf:
            torch.cuda.memory._set_allocator_settings(experiment.alloc_conf)
            off = experiment.alloc_conf.replace("True", "False")
            stack.callback(torch.cuda.memory._set_allocator_settings, off)
        if experiment.capacity is not None:
            free, total = gpu.mem_get_info()
            fraction = experiment.capacity / total
            torch.cuda.set_per_process_memory_fraction(fraction, gpu.device)
            stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0, gpu.device)
            conf, context = f"per_process_memory_fraction:{fraction}", total - free
            alike = VirtualGPU(
                capacity=total, alloc_conf=conf, context=context - gpu.memory_reserved()
            )
        held = gpu.memory_reserved()
        gpu.record_memory_history()
        stack.callback(gpu.record_memory_history, None)
        rows, messages = _carried_out(experiment, gpu)
        snapshot = gpu.snapshot()
        entries = snapshot["device_traces"][gpu.device.index or 0]
        replay = replay_trace(entries, gpu.memory_snapshot(), experiment.alloc_conf)
    trace = {"held before": held, **asdict(replay)}
    if len(entries) <= _KEPT:
        numbers: dict[int, int] = {}  # of streams, which CUDA names by an address
        trace["entries"] = [
            f"{e['action']} {e.get('addr', 0):#x} {e['size']} "
            f"{numbers.setdefault(e.get('stream', 0), len(numbers))}"
            for e in entries
        ]
    return rows, messages, trace, alike


def compare(experiment: Experiment) -> Result:
    """An experiment on both GPUs: each checkpoint measured, replayed, and the difference."""
    measured, said, trace, alike = _measured(experiment)
    try:
        replayed, would_say = _carried_out(experiment, alike)
    except Exception as error:
        raise RuntimeError(f"measured, but not replayed: {type(error).__name__}: {error}") from None
    checkpoints = {
        name: {"measured": row, "replayed": replayed[name], "difference": 0}
        for name, row in measured.items()
        if name in replayed
    }
    for row in checkpoints.values():
        row["difference"] = difference(row["measured"], row["replayed"])
    only = sorted(measured.keys() ^ replayed.keys())
    messages = {
        name: {"measured": said.get(name), "replayed": would_say.get(name)}
        for name in {**said, **would_say}
    }
    return {
        "allocator settings": experiment.alloc_conf,
        "checkpoints": checkpoints,
        "reached on one GPU only": only,
        "messages": messages,
        "trace": trace,
    }


def difference(measured: Result, replayed: Result) -> dict[str, int]:
    """Replayed less measured, in bytes, for each figure."""
    return {figure: replayed[figure] - measured[figure] for figure in FIGURES}


# The record


def machine() -> Result:
    """The card, its driver, the versions and the settings that matter to memory."""
    properties = torch.cuda.get_device_properties(0)
    asked = {"cublas": "cublas_workspace_size", "cublasLt": "cublaslt_workspace_size"}
    sizes = {name: getattr(torch.backends.cuda, f, None) for name, f in asked.items()}
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {
        "card": properties.name,
        "memory": properties.total_memory,
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: found.get(p) for p in PACKAGES},
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


def summary(experiments: Mapping[str, Result]) -> Result:
    """What follows from the rows: how many figures there are, and how many agree."""
    done = [result for result in experiments.values() if "skipped" not in result]
    rows = [row["difference"] for result in done for row in result["checkpoints"].values()]
    off = [abs(n) for row in rows for n in row.values()]
    return {
        "experiments": len(done),
        "skipped": len(experiments) - len(done),
        "checkpoints": len(rows),
        "figures": len(off),
        "figures that differ": sum(n != 0 for n in off),
        "largest difference": max(off, default=0),
        "checkpoints on one GPU only": sum(len(r["reached on one GPU only"]) for r in done),
        "traces that differ": sum(result["trace"]["mismatch"] is not None for result in done),
    }


def problems(record: Any) -> list[str]:
    """Why something is no whole record; nothing if it is one.

    Its form, and that differences, summary and traces follow from what was measured.
    """
    try:
        return [*_problems(record)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"it has not the form of a record: {type(error).__name__} {error}"]


def _problems(record: Any) -> list[str]:
    found = []
    datetime.fromisoformat(record["date"])
    about = record["machine"]
    for key, kind in {"card": str, "memory": int, "compute capability": str, "CUDA": str}.items():
        if not isinstance(about[key], kind) or not about[key]:
            found.append(f"machine: {key} is {about[key]!r}")
    if missing := [name for name in ("python", "torch") if not about["versions"].get(name)]:
        found.append(f"machine: no version of {', '.join(missing)}")
    for name, result in record["experiments"].items():
        if "skipped" in result:
            if not result["skipped"]:
                found.append(f"{name}: skipped, and no reason given")
            continue
        for checkpoint, row in result["checkpoints"].items():
            where, sides = f"{name}, {checkpoint}", (row["measured"], row["replayed"])
            if row["difference"] != difference(*sides):
                found.append(f"{where}: the difference is not that of the figures")
            for side in sides:
                kinds = side["by kind"]
                numbers = [*(side[figure] for figure in FIGURES), *kinds.values()]
                if any(type(n) is not int for n in numbers):
                    found.append(f"{where}: a figure is no whole number of bytes")
                elif not kinds.keys() <= set(KINDS) or sum(kinds.values()) != side[FIGURES[0]]:
                    found.append(f"{where}: the kinds do not add up to memory_allocated")
        trace = result["trace"]
        if "entries" in trace and not trace["held before"]:
            # A model that has learned since may do better, never worse.
            again = replay_trace(
                _entries(trace["entries"]), alloc_conf=result["allocator settings"]
            )
            if again.events != trace["events"] or (again.mismatch and not trace["mismatch"]):
                found.append(f"{name}: its trace replays otherwise: {again.mismatch}")
    if record["summary"] != summary(record["experiments"]):
        found.append("the summary does not follow from the rows")
    return found


def _entries(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        action, address, size, stream = line.split()
        yield {
            "action": action,
            "addr": int(address, 16),
            "size": int(size),
            "stream": int(stream),
        }


def _written(path: Path, record: Result) -> bool:
    """Write beside, then move into place: an interruption leaves a whole file.

    False if it cannot be written, which it says; what was there before stays.
    """
    record["summary"] = summary(record["experiments"])
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
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


def _chosen(patterns: list[str] | None) -> list[str]:
    """The experiments that the patterns name, in order.

    Raises:
        ValueError: a pattern names none.
    """
    for pattern in patterns or []:
        if not any(fnmatch(name, pattern) for name in EXPERIMENTS):
            raise ValueError(
                f"--only is {pattern!r}: expected a name or a pattern such as 'mlp-*'; "
                "--list prints the names"
            )
    return [n for n in EXPERIMENTS if not patterns or any(fnmatch(n, p) for p in patterns)]


def _line(result: Result) -> str:
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    told = summary({"": result})
    figures = f"{told['figures']} figures, {told['figures that differ']} differ"
    if told["figures that differ"]:
        figures += f", by at most {told['largest difference']:,} B"
    if alone := result["reached on one GPU only"]:
        figures += f"; on one GPU only: {', '.join(alone)}"
    trace = result["trace"]
    how = trace["mismatch"] or "the same replayed"
    return f"{figures}; {trace['events']} events, {how}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.record",
        description="Measure every experiment of the book on this machine's CUDA device, replay "
        "it on the virtual GPU, and write both into one JSON file. Needs no network; the first "
        "run makes models of random weights (4 GB of disk) in the cache folder.",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, by name or pattern")
    parser.add_argument("--out", type=Path, help="the file to write; else named after the card")
    parser.add_argument("--list", action="store_true", help="print the experiments' names")
    asked = parser.parse_args(arguments)
    try:
        names = _chosen(asked.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(names))
        return 0
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
    with CudaGPU():  # fixes cuBLAS's workspaces before the first product
        record: Result = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        record |= {"machine": machine(), "experiments": {}}
    name = f"{record['machine']['card']}-torch-{record['machine']['versions']['torch']}"
    out: Path = asked.out or Path(re.sub(r"[^\w.+-]+", "-", name).lower() + ".json")
    if out.exists():
        print(f"{out} exists: remove it, or name another file with --out", file=sys.stderr)
        return 2
    if not _written(out, record):
        return 2
    gc.freeze()  # collecting garbage need not look at what was imported
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ... ", end="", file=sys.stderr, flush=True)
        try:
            result = compare(EXPERIMENTS[name])
        except KeyboardInterrupt:
            print(f"interrupted: {out} has what was done before", file=sys.stderr)
            return 130
        except Exception as error:  # whatever this machine lacks: the others can still run
            said = str(error).strip().partition("\n")[0].partition(" GPU 0 has")[0]
            result = {"skipped": f"{type(error).__name__}: {said}"}
        record["experiments"][name] = result
        if not _written(out, record):
            return 2
        print(_line(result), file=sys.stderr)
    told = record["summary"]
    print(f"{out}: {told['experiments']} experiments recorded, {told['skipped']} skipped")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
