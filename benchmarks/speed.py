"""How long the virtual GPU takes, beside PyTorch's memory tracker: ``python -m benchmarks.speed``.

Writes ``benchmarks/speed.json``, from which the book draws its page. Every figure is CPU time of
one process with one thread (``time.process_time``), so that other programs disturb it little; it
is taken several times, and kept is the median with the range. What is compared is taken in turns
in the same run. What a process takes for itself, imports and memory, is asked of new ones.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import fully_shard

from every_byte.allocator import CachingAllocator
from every_byte.gpu import VirtualGPU
from every_byte.ranks import one_of
from every_byte.tracker import untracked

STORED = Path(__file__).parent / "speed.json"
CARD = "H200"
ROOM = 2**46  # bytes: more than any model here takes
LLAMA_70B: dict[str, Any] = {
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
    **{"vocab_size": 128256, "tie_word_embeddings": False},
}
LLAMA_405B = LLAMA_70B | {
    **{"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
    "num_attention_heads": 128,
}
Stored = dict[str, Any]


# Training steps: each is built on a device, and returns what carries out one step


def _llama(settings: dict[str, Any], tokens: int = 2048, batch: int = 1) -> Callable[..., Any]:
    def build(device: torch.device) -> Callable[[], Any]:
        import transformers

        with device:
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**settings), dtype=torch.bfloat16
            )
            ids = torch.zeros(batch, tokens, dtype=torch.int64)
        return _training(model, lambda: model(input_ids=ids, labels=ids).loss)

    return build


def _bert(device: torch.device) -> Callable[[], Any]:
    import transformers

    with device:
        model = transformers.BertForMaskedLM(transformers.BertConfig())
        ids = torch.zeros(16, 128, dtype=torch.int64)
    return _training(model, lambda: model(input_ids=ids, labels=ids).loss)


def _resnet(device: torch.device) -> Callable[[], Any]:
    models = import_module("torchvision.models")
    with device:
        model, images = models.resnet50(), torch.empty(32, 3, 224, 224)
    return _training(model, lambda: model(images).square().mean())


def _lstm(device: torch.device) -> Callable[[], Any]:
    with device:
        model, data = nn.LSTM(512, 512, 2, batch_first=True), torch.empty(16, 128, 512)
    return _training(model, lambda: model(data)[0].square().mean())


def _training(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    optimizer = optim.AdamW(model.parameters(), foreach=True)

    def step() -> tuple[nn.Module, optim.Optimizer]:
        loss().backward()
        optimizer.step()
        return model, optimizer

    return step


def replay(build: Callable[[torch.device], Callable[[], Any]]) -> float:
    """CPU seconds of one step on the virtual GPU, its model's making included."""
    with VirtualGPU(CARD, ROOM, values="assume") as gpu:
        begin = time.process_time()
        build(gpu.device)()
        return time.process_time() - begin


def mem_tracker(build: Callable[[torch.device], Callable[[], Any]]) -> float:
    """The same by PyTorch's tracker, on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        begin = time.process_time()
        step = build(torch.device("cpu"))
        tracker = MemTracker()
        with tracker:
            step()
        return time.process_time() - begin


def one_rank(settings: dict[str, Any], gpus: int) -> float:
    """CPU seconds of one GPU's step of as many, each layer cut by ``fully_shard``."""
    import transformers

    with VirtualGPU(CARD, ROOM, values="assume") as gpu, one_of(gpus) as mesh:
        begin = time.process_time()
        with untracked():
            with torch.device("meta"):
                config = transformers.LlamaConfig(**settings)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model.to_empty(device=gpu.device)
        ids = torch.zeros(1, 2048, dtype=torch.int64).to(gpu.device)
        _training(model, lambda: model(input_ids=ids, labels=ids).loss)()
        return time.process_time() - begin


# The allocator alone


def pairs(live: int, count: int = 100_000) -> float:
    """Frees with an allocation each, in a second, while so many blocks are live."""
    chance = random.Random(0)
    sizes = [512 * chance.choice((1, 4, 16, 128, 2048, 6144, 16384)) for _ in range(live)]
    allocator = CachingAllocator()
    handles = [allocator.malloc(size) for size in sizes]
    which = [chance.randrange(live) for _ in range(count)]
    begin = time.process_time()
    for i in which:
        allocator.free(handles[i])
        handles[i] = allocator.malloc(sizes[i])
    return count / (time.process_time() - begin)


def python_loop() -> float:
    """CPU seconds of a loop in plain Python: what this machine is, on this day."""
    begin, total = time.process_time(), 0
    for i in range(5_000_000):
        total += i
    return time.process_time() - begin


# In processes of their own

_IMPORT = "import time; b = time.process_time(); import {0}; print(time.process_time() - b)"


def imports(name: str) -> float:
    """CPU seconds that a module's import takes in a new process."""
    run = [sys.executable, "-c", _IMPORT.format(name)]
    return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


def added_memory() -> float:
    """Bytes that a new process grows by in the 70B's step, after imports and a small step."""
    run = [sys.executable, "-m", "benchmarks.speed", "--added-memory"]
    return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


def _highest_rss() -> int:
    """Bytes of RAM that this process had at most, on Linux.

    Not ``ru_maxrss``, which begins with what its parent had.
    """
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _added_memory() -> int:
    replay(_llama(LLAMA_70B | {"num_hidden_layers": 1}))
    before = _highest_rss()
    replay(_llama(LLAMA_70B))
    return _highest_rss() - before


# All of it


def _spread(values: list[float]) -> Stored:
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "low": float(f"{min(values):.4g}"),
        "high": float(f"{max(values):.4g}"),
        "rounds": len(values),
    }


def _times(rounds: int, *what: Callable[[], float]) -> list[list[float]]:
    """What each says, in turns."""
    said: list[list[float]] = [[] for _ in what]
    for _ in range(rounds):
        for one, values in zip(what, said, strict=True):
            gc.collect()
            values.append(one())
    return said


def _beside(build: Any, rounds: int) -> Stored:
    ours, theirs = _times(rounds, partial(replay, build), partial(mem_tracker, build))
    ratios = [peer / own for own, peer in zip(ours, theirs, strict=True)]
    return {"replay": _spread(ours), "mem_tracker": _spread(theirs), "ratio": _spread(ratios)}


def _growth(what: str, sizes: dict[int, Any], rounds: int) -> Stored:
    say(f"growth over {what}")
    tasks = [partial(replay, build) for build in sizes.values()]
    return {
        str(size): _spread(values)
        for size, values in zip(sizes, _times(rounds, *tasks), strict=True)
    }


def _layers(count: int, **more: Any) -> dict[str, Any]:
    return LLAMA_70B | {"num_hidden_layers": count} | more


def say(line: str) -> None:
    """Tell where it is."""
    print(line, file=sys.stderr, flush=True)


def measured(rounds: int) -> Stored:
    """Every figure."""
    torch.set_num_threads(1)
    said: Stored = {
        "conditions": {
            "date": datetime.now(UTC).date().isoformat(),
            "processors": os.cpu_count(),
            "load": [round(value, 1) for value in os.getloadavg()],
            "python": platform.python_version(),
            "torch": torch.__version__.partition("+")[0],
            "loop": _spread(_times(rounds, python_loop)[0]),
        }
    }
    say("first steps: imports, and what is made once")
    small = _llama(_layers(1))
    for build in (small, _bert, _resnet, _lstm):
        replay(build)
    one_rank(LLAMA_405B | {"num_hidden_layers": 1}, 64)
    for build in (small, _bert, _resnet):
        mem_tracker(build)
    say("beside the tracker")
    said["beside"] = {
        "Llama-3.1-70B, 4 of 80 layers": _beside(_llama(_layers(4)), rounds),
        "BERT": _beside(_bert, rounds),
        "ResNet-50": _beside(_resnet, rounds),
    }
    say("whole steps")
    steps = {"Llama-3.1-70B": _llama(LLAMA_70B), "LSTM of 128 steps": _lstm}
    whole = _times(rounds, *[partial(replay, build) for build in steps.values()])
    said["steps"] = {name: _spread(v) for name, v in zip(steps, whole, strict=True)}
    sharded = _times(1, partial(one_rank, LLAMA_405B, 64))[0]  # a minute or more
    said["steps"]["Llama-3.1-405B, one GPU of 64"] = _spread(sharded)
    few = max(1, rounds // 2)
    said["growth"] = {
        "layers": _growth("layers", {n: _llama(_layers(n)) for n in (20, 40, 80, 160)}, few),
        "tokens": _growth("tokens", {n: _llama(_layers(4), n) for n in (512, 4096, 32768)}, few),
        "batch": _growth("batch", {n: _llama(_layers(4), batch=n) for n in (1, 8, 64)}, few),
        "width": _growth(
            "width",
            {
                n: _llama(_layers(4, hidden_size=n, intermediate_size=4 * n, head_dim=n // 64))
                for n in (2048, 8192, 32768)
            },
            few,
        ),
    }
    say("allocator, imports and memory")
    said["pairs"] = {
        str(live): _spread(_times(few, partial(pairs, live))[0]) for live in (10_000, 1_000_000)
    }
    said["imports"] = {
        name: _spread(_times(few, partial(imports, name))[0]) for name in ("torch", "every_byte")
    }
    said["added memory"] = _spread(_times(few, added_memory)[0])
    return said


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=STORED)
    parser.add_argument("--added-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.added_memory:
        print(_added_memory())
        return
    said = measured(options.rounds)
    options.output.write_text(json.dumps(said, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
