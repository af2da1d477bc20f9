"""What each peer says of every workload that was measured: ``python -m benchmarks.accuracy``.

Writes ``book/accuracy.json``, from which the book draws its page. Formulas are computed
anew each time. PyTorch's memory tracker takes minutes for a large model, so what it said stays,
but for the workloads of ``--track PATTERN``, each in a process of its own. The replay's figures
stand in ``book/records/replayed/proof.json``; ``python -m benchmarks.proof`` makes them.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import published
from every_byte import estimate
from every_byte.estimate.config import from_config
from helpers import workloads

STORED = Path(__file__).parent.parent / "book" / "accuracy.json"
LIMIT = 1200  # seconds that the tracker may take for one workload
TRACKER = "mem_tracker"
Said = int | str
"""Bytes at the peak; or why there are none, in a few words."""
Stored = dict[str, Any]


class Refused(Exception):
    """What a peer cannot be asked."""


# What a workload is


@dataclass(frozen=True, slots=True)
class Task:
    """A workload in the words of the formulas; types have the estimator's names."""

    parameters: int
    largest: int  # of one module's own parameters
    training: bool = True
    config: Any = None  # transformers' configuration, where the model is one of theirs
    network: str = ""  # torchvision's name, where it is one of theirs
    dtype: str = "fp32"
    amp: str | None = None
    bits: str | None = None
    batch: int = 1
    length: int = 0
    decoded: int = 0
    attention: str = "sdpa"
    optimizer: str = "adam"
    implementation: str = "foreach"
    checkpointing: bool = False
    accumulation: bool = False
    rank: int = 0
    frozen: bool = False


DTYPES: dict[Any, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OPTIMIZERS = {"AdamW": "adamw", "Adam": "adam", "SGD": "sgd", "RMSprop": "rmsprop"}


@cache
def task(name: str) -> Task:
    """What a workload of that name is, by its function's own arguments."""
    run: Any = workloads.WORKLOADS[name]
    kind = getattr(run, "func", run).__name__.lstrip("_")
    given = dict(getattr(run, "keywords", {}))
    # Quantised layers are not made on meta: those of the same model before.
    sizes = module_sizes("llama1b-bf16" if kind == "quantised" else name)
    known: dict[str, Any] = dict(zip(("parameters", "largest"), sizes, strict=True))
    if kind == "vision":
        known |= {"network": run.args[0], "training": given.get("train", True)}
        return Task(**known, optimizer="momentum", amp=DTYPES.get(given.get("amp")), batch=16)
    if kind not in ("training", "inference", "quantised"):
        return Task(**known)
    from transformers import AutoConfig

    if kind == "quantised":
        llama: Any = workloads.WORKLOADS["llama1b-bf16"]
        (model_type, settings), bits = llama.args, run.args[0]
        given = {"length": 512}
        known |= {"bits": {8: "int8", 4: "nf4"}[bits], "training": bits == 4}
    else:
        model_type, settings = run.args
        known["training"] = kind == "training"
    made = given.get("optimizer", optim.AdamW)
    how = getattr(made, "keywords", {})
    one_by_one = "for-loop" if how.get("foreach") is False else "foreach"
    trained = getattr(given.get("trained"), "__name__", "")
    return Task(
        **known,
        config=AutoConfig.for_model(model_type, **settings),
        dtype=DTYPES[given.get("dtype", torch.bfloat16)],
        amp=DTYPES.get(given.get("amp")),
        batch=given.get("batch", 1),
        length=given.get("length", 1024),
        decoded=given.get("decode", 0),
        attention=given.get("attention", "sdpa") or "eager",
        optimizer=OPTIMIZERS.get(
            getattr(getattr(made, "func", made), "__name__", ""), "adam 8-bit"
        ),
        implementation="fused" if how.get("fused") else one_by_one,
        checkpointing=given.get("reentrant") is not None,
        accumulation=given.get("accumulate", 1) > 1,
        rank=16 if trained == "_with_lora" or known.get("bits") == "nf4" else 0,
        frozen=trained == "_last_layer_only",
    )


class NoGPU:
    """Stands where a workload expects a GPU."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def empty_cache(self) -> None:
        """Nothing is cached."""


class _Enough(Exception):
    """Ends a workload early."""


def module_sizes(name: str) -> tuple[int, int]:
    """The number of a workload's parameters: of all its modules, and of the largest one."""
    found = list[tuple[int, int]]()
    before = WeakSet(_modules())

    def look(_: str) -> None:
        own = [[*m.parameters(recurse=False)] for m in _modules() if m not in before]
        every = {id(p): p.numel() for some in own for p in some}
        found.append((sum(every.values()), max(sum(p.numel() for p in some) for some in own)))
        raise _Enough

    with contextlib.suppress(_Enough):
        workloads.WORKLOADS[name](NoGPU("meta"), look)  # type: ignore[arg-type]
    return found[0]


def _modules() -> list[nn.Module]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]


# Formulas


def by_accelerate(task: Task) -> int:
    """`accelerate estimate-memory`, with the functions that its command calls.

    The command reads a configuration from the hub and makes the base model of it; here the
    configuration is at hand. Its column "Training using Adam" in training.
    """
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    if task.training and "adam" not in task.optimizer:
        raise Refused("Adam only")
    with torch.device("meta"):
        if task.config is not None:
            from transformers import AutoModel

            model = AutoModel.from_config(task.config, dtype=torch.float32)
        elif task.network:
            import torchvision

            model = getattr(torchvision.models, task.network)()
        else:
            raise Refused("models of the hub only")
    nbytes, _ = calculate_maximum_sizes(model)
    column = {"int8": "int8", "nf4": "int4"}.get(task.bits or "")
    column = column or ("float32" if (task.amp or task.dtype) == "fp32" else "float16")
    if not task.training:
        return int(nbytes // {"float32": 1, "float16": 2, "int8": 4, "int4": 8}[column])
    most = max(estimate_training_usage(nbytes, column).values())
    if most < 0:
        raise Refused("no training in 4 bits")
    return int(most)


def by_deepspeed(task: Task) -> int:
    """DeepSpeed's estimate_zero2_model_states_mem_needs() for one GPU, nothing offloaded.

    ``deepspeed/runtime/zero/stage_1_and_2.py`` of 0.19.8: 2 B for each parameter, and 18 B
    of gradients, FP32 parameters and Adam's states.
    """
    if not task.training:
        raise Refused("training only")
    return 2 * task.parameters + int(18 * task.parameters / 1)


def by_transformer_math(task: Task) -> int:
    """Transformer Math 101, by its authors' own calculator.

    EleutherAI/cookbook, ``calc/calc_transformer_mem.py`` at 069ae2e: 12 B for each
    parameter in the optimizer, of which its comment says what to change for others.
    """
    config = task.config
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise Refused("transformers only")
    if task.rank or task.frozen or task.bits:
        raise Refused("trains all, in 16 or 32 bits")
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    linears = 3 if _gated(config) else 2
    mixed = task.dtype != "fp32" or task.amp is not None
    low = 2 if mixed else 4
    length, tokens = task.length, task.batch * task.length
    parameters = 2 * vocabulary * hidden + hidden * length + 8 * hidden * layers + 2 * hidden
    parameters += int(2 * (1 + shared) * layers * hidden * hidden)
    parameters += linears * layers * hidden * inner
    one = tokens * hidden * (16 * low + 2)
    if not task.training:
        cache = low * hidden * layers * (length + task.decoded) * task.batch
        return one + cache + low * parameters
    kept = one * layers
    if not task.checkpointing:
        kept += tokens * layers * (2 * low + 1) * heads * length
    states = {"sgd": 8, "adam 8-bit": 6}.get(task.optimizer, 12)
    if task.optimizer == "rmsprop":
        raise Refused("Adam and SGD only")
    return kept + parameters * (low + 4 + states)


def _gated(config: Any) -> bool:
    return getattr(config, "hidden_act", "") == "silu"


def by_vram_estimator(task: Task) -> int:
    """The VRAM Estimator, by its source, without the 1,000 MiB that it adds for CUDA.

    furiousteabag/vram-calculator, ``app/_lib/index.ts`` at b367569. What was measured has
    no CUDA context in it.
    """
    config = task.config
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise Refused("transformers only")
    if task.rank or task.frozen or task.bits or task.checkpointing:
        raise Refused("plain training or inference only")
    if task.training and task.optimizer not in ("adam", "adamw", "sgd"):
        raise Refused("Adam and SGD only")
    width = 4 if (task.amp or task.dtype) == "fp32" else 2
    held = {(True, 2): 6, (True, 4): 4}.get((task.training, width), width)
    hidden, tokens = config.hidden_size, task.batch * task.length
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    shared = getattr(config, "num_key_value_heads", None) or heads
    keys = hidden // heads * shared
    scores = task.batch * heads * task.length**2
    attention = width * tokens * (3 * hidden + 2 * keys) + (2 * width + 1) * scores
    mlp = width * tokens * (hidden + 2 * inner)
    layer = attention + mlp + 2 * tokens * hidden + 2 * width * tokens * hidden
    scored = 4 * tokens * config.vocab_size
    if not task.training:
        return width * task.parameters + layer + scored
    states = 0 if task.optimizer == "sgd" else 8
    kept = layer * config.num_hidden_layers
    return (held + 4 + states) * task.parameters + kept + 2 * scored


def by_estimator(task: Task) -> int:
    """This book's own estimator; it refuses what its formulas do not describe."""
    if task.config is None:
        raise Refused("language models only")
    if task.frozen:
        raise Refused("no frozen layers")
    gpt2 = task.config.model_type == "gpt2"
    try:
        sizes = from_config(task.config.to_dict())
        setup = estimate.Setup(
            task="training" if task.training else "inference",
            dtype=task.dtype,
            amp=task.amp,
            quantised=task.bits,
            optimizer=task.optimizer,
            implementation=task.implementation,
            batch=task.batch,
            length=task.length,
            attention=task.attention,
            checkpointing=task.checkpointing,
            accumulation=task.accumulation,
            rank=task.rank,
            lora_dropout=task.rank > 0,
            dropout=gpt2 and task.training,
            all_logits=not task.training,
        )
        return estimate.memory(sizes, setup).peak
    except ValueError as error:
        known = "model_type" in str(error)
        raise Refused("does not know the model" if known else str(error)) from None


FORMULAS: dict[str, Callable[[Task], int]] = {
    "estimator": by_estimator,
    "accelerate": by_accelerate,
    "deepspeed": by_deepspeed,
    "transformer_math": by_transformer_math,
    "vram_estimator": by_vram_estimator,
}


def asked(formula: Callable[[Task], int], task: Task) -> Said:
    """What a formula says of a workload."""
    try:
        return formula(task)
    except Refused as why:
        return str(why)


# PyTorch's memory tracker


def _foreach(optimizer: optim.Optimizer, *_: Any) -> None:
    # As is the default of parameters on CUDA; on the CPU it is a loop.
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _converted(module: nn.Module, *given: Any, **_: Any) -> nn.Module:
    # A module of fake tensors refuses `to`, whose parameters it would swap.
    if dtype := next((one for one in given if isinstance(one, torch.dtype)), None):
        for owner in module.modules():
            for name, old in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(old.detach().to(dtype), old.requires_grad))
    return module


@contextlib.contextmanager
def _fakes() -> Iterator[FakeTensorMode]:
    """Fake tensors of the CPU: without CUDA, none of a CUDA device has a backward pass."""
    converts = mock.patch.object(nn.Module, "to", _converted)
    hook = register_optimizer_step_pre_hook(_foreach)
    with FakeTensorMode() as mode, converts:
        yield mode
    hook.remove()


def _alive(mode: FakeTensorMode) -> list[Any]:
    """Every tensor and module there is, for the tracker to know."""
    fakes = [o for o in gc.get_objects() if issubclass(type(o), FakeTensor)]
    return [*_modules(), *(fake for fake in fakes if fake.fake_mode is mode)]


def _peak(tracker: MemTracker) -> int:
    return sum(told["Total"] for told in tracker.get_tracker_snapshot("peak").values())


def tracked(name: str) -> int:
    """The tracker's peak of a workload, in bytes.

    It begins where the model is loaded, as its documentation shows. Of inference it sees the
    prompt, where all of these have their peak: it takes one call of a model at a time.
    """
    tracker = MemTracker()

    def look(checkpoint: str) -> None:
        if checkpoint in ("loaded", "quantised"):
            tracker.track_external(*_alive(mode))
            tracking.enter_context(tracker)
        elif checkpoint in ("prefill", "inferred"):
            raise _Enough
        elif not checkpoint.endswith("forward"):
            tracker.reset_mod_stats()

    with _fakes() as mode, contextlib.ExitStack() as tracking:
        with contextlib.suppress(_Enough):
            workloads.WORKLOADS[name](NoGPU("cpu"), look)  # type: ignore[arg-type]
    return _peak(tracker)


def tracked_series(number: int) -> list[int]:
    """The tracker's peaks of a published series, at each of its sizes."""
    series = published.all_series()[number]
    function, found = getattr(published, series["replay"]), []
    for size in series["sizes"]:
        with _fakes() as mode:
            made: Any = published.Random(NoGPU("cpu"))  # type: ignore[arg-type]
            call = function(made, size, **series.get("arguments", {}))
            tracker = MemTracker()
            tracker.track_external(*_alive(mode))
            for _ in range(published.ROUNDS):
                with tracker:  # its peak begins anew
                    call()
                tracker.reset_mod_stats()
            found.append(_peak(tracker))
            del call
    return found


def track(what: str) -> Any:
    """The same in a process of its own; or in a few words why not."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.accuracy", "--one", what]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return f"not within {LIMIT // 60} minutes"
    if ran.returncode:
        print(ran.stderr[-2000:], file=sys.stderr)
        # What it says, without the objects that it names.
        return ran.stderr.strip().splitlines()[-1].partition(" x.")[0][:100]
    return json.loads(ran.stdout.splitlines()[-1])


# The file


def stored() -> Stored:
    """The file as it is; empty if there is none."""
    if not STORED.exists():
        return {"versions": {}, "workloads": {}, "series": {}}
    found: Stored = json.loads(STORED.read_text("utf-8"))
    return found


def with_formulas(before: Stored) -> Stored:
    """The same with what the formulas say now."""
    told = {}
    for name in workloads.WORKLOADS:
        told[name] = dict(before["workloads"].get(name, {}))
        try:
            known = task(name)
        except ImportError as error:
            print(f"{name}: what formulas say stays as it was: {error}", file=sys.stderr)
        else:
            told[name] |= {peer: asked(formula, known) for peer, formula in FORMULAS.items()}
    return {**before, "workloads": told}


def write(told: Stored) -> None:
    """Write the file: a line for each workload."""
    lines = []
    for key, some in told.items():
        rows = [f"    {json.dumps(name)}: {json.dumps(one)}" for name, one in some.items()]
        lines.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n  }")
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument(
        "--track",
        metavar="PATTERN",
        nargs="+",
        help="ask the tracker again, of these workloads, or of the published series by number",
    )
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if given.one:
        name = given.one
        print(json.dumps(tracked_series(int(name)) if name.isdigit() else tracked(name)))
        return 0
    told = stored()
    if given.track:
        told["versions"] = {p: metadata.version(p) for p in ("torch", "transformers", "accelerate")}
        every = [str(number) for number in range(len(published.all_series()))]
        for name in [*workloads.WORKLOADS, *every]:
            if any(fnmatch(name, pattern) for pattern in given.track):
                said = track(name)
                print(name, said, flush=True)
                told = stored() | {"versions": told["versions"]}
                if name.isdigit():
                    told["series"][name] = said
                else:
                    told["workloads"].setdefault(name, {})[TRACKER] = said
                write(told)
    else:
        write(with_formulas(stored()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
