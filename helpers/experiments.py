"""The book's experiments as functions of a GPU: the same one runs on a real and on a virtual card.

Each tells `look` where it is, with the model and the optimizers that live then.
Only shapes matter: batches are zeros, models have random weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from every_byte.gpu import GPU
from every_byte.units import GiB, MiB
from helpers.mlp import SimpleMLP

Look = Callable[..., None]


def mlp(gpu: GPU, look: Look, make: Callable[..., optim.Optimizer], **settings: Any) -> None:
    """The article's script: load, train one step, infer (notebook 04)."""
    with gpu.device:
        model = SimpleMLP()
    look("loaded", model)
    images, labels = torch.zeros(128, 1, 28, 28), torch.zeros(128, dtype=torch.int64)
    data, target = images.to(gpu.device), labels.to(gpu.device)
    look("batch", model)
    optimizer = make(model.parameters(), lr=0.001, **settings)
    optimizer.zero_grad()
    output = model(data)
    loss = nn.CrossEntropyLoss()(output, target)
    look("forward", model, optimizer)
    loss.backward()
    look("backward", model, optimizer)
    optimizer.step()
    look("training", model, optimizer)
    del optimizer, target
    model.zero_grad()
    data = images.to(gpu.device)
    with torch.no_grad():
        output = model(data)
    look("inference, loss kept", model)
    del loss
    look("inference", model)
    del model, data, output
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    look("all deleted")


def amp(gpu: GPU, look: Look, dtype: torch.dtype) -> None:
    """One step of mixed precision (notebook 06); FP16 with a scaled loss."""
    with gpu.device:
        model = SimpleMLP()
    data = torch.zeros(128, 1, 28, 28).to(gpu.device)
    target = torch.zeros(128, dtype=torch.int64).to(gpu.device)
    optimizer = optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler(gpu.device.type, enabled=dtype is torch.float16)
    model.register_forward_hook(lambda *_: look("end of forward", model, optimizer))
    with torch.autocast(gpu.device.type, dtype=dtype):
        loss = cross_entropy(model(data), target)
    scaler.scale(loss).backward()
    look("backward", model, optimizer)
    scaler.step(optimizer)
    scaler.update()
    look("training", model, optimizer)


def load(gpu: GPU, look: Look, name: str, precision: str, path: str) -> None:
    """A model at full size, by either way onto the card (notebooks 07 and 08)."""
    from helpers import models

    model = models.load(name, precision, path)
    look("loaded", model)


def training_step(gpu: GPU, look: Look, dtype: torch.dtype, attention: str) -> None:
    """One step of gpt2-large with AdamW on 512 tokens (notebook 05)."""
    from helpers import models

    how = {"attn_implementation": attention if attention == "eager" else models.CAUSAL_SDPA}
    none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = models.config("gpt2-large", **how, **none, use_cache=False)
    model = models.build(config, gpu.device, dtype).train()
    look("loaded", model)
    optimizer = optim.AdamW(model.parameters())
    tokens, given = _text(512, dtype, gpu, attention == "eager")
    loss = cross_entropy(model(tokens, **given).logits.flatten(0, 1), tokens.flatten())
    look("forward", model, optimizer)
    loss.backward()
    look("backward", model, optimizer)
    optimizer.step()
    look("training", model, optimizer)


def kv_cache(gpu: GPU, look: Look) -> None:
    """The keys and values of 1,024 tokens of Qwen2-0.5B in BF16 (notebook 03)."""
    from transformers import DynamicCache

    from helpers import models

    config = models.config("Qwen2-0.5B", attn_implementation="eager")
    model = models.build(config, gpu.device, torch.bfloat16)
    look("loaded", model)
    cache = DynamicCache(config=model.config)
    tokens, given = _text(1024, torch.bfloat16, gpu, mask=True)
    with torch.no_grad():
        model(tokens, **given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    look("cache filled", model)
    del cache
    look("cache deleted", model)


def _text(
    length: int, dtype: torch.dtype, gpu: GPU, mask: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    given = {"position_ids": torch.arange(length)[None].to(gpu.device)}
    if mask:
        future = torch.full((length, length), float("-inf")).triu(1)
        given["attention_mask"] = future[None, None].to(dtype).to(gpu.device)
    return torch.zeros(1, length, dtype=torch.int64).to(gpu.device), given


def one_of_eight(gpu: GPU, look: Look, param_dtype: torch.dtype | None = None) -> None:
    """Two steps of FSDP on the first of eight GPUs, of which there is one (notebook 10)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from every_byte.ranks import one_of

    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=param_dtype and torch.float32)
    with one_of(8) as mesh:
        with gpu.device:
            model = SimpleMLP()
        linear = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
        for module in (*linear, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        look("sharded", model)
        optimizer = optim.Adam(model.parameters())
        for number in ("first", "second"):
            data = torch.zeros(64, 1, 28, 28).to(gpu.device)
            target = torch.zeros(64, dtype=torch.int64).to(gpu.device)
            optimizer.zero_grad()
            loss = cross_entropy(model(data), target)
            look(f"{number} forward", model, optimizer)
            loss.backward()
            look(f"{number} backward", model, optimizer)
            optimizer.step()
            look(f"{number} step", model, optimizer)


def fragmentation(gpu: GPU, look: Look) -> None:
    """What stays reserved, and in which pieces (notebook 11)."""

    def empty(mebibytes: int) -> torch.Tensor:
        return torch.empty(mebibytes * MiB, dtype=torch.int8, device=gpu.device)

    activations = [empty(192) for _ in range(4)]
    look("activations")
    del activations
    look("activations deleted")
    states = [empty(100) for _ in range(4)]
    look("states")
    large = empty(896)
    look("a large tensor")
    del large
    gpu.empty_cache()
    look("cache emptied")
    del states
    gpu.empty_cache()
    look("all deleted")


def out_of_memory(gpu: GPU, look: Look) -> None:
    """The same on a card of 1.5 GiB, which is enough and yet is not (notebook 11)."""
    try:
        fragmentation(gpu, look)
    except torch.OutOfMemoryError as error:
        message = str(error)
        look("at the error", message=message)
        del error
    look("after the error")


@dataclass(frozen=True)
class Experiment:
    """What runs on both GPUs; `capacity` bytes are allowed, under allocator settings."""

    run: Callable[[GPU, Look], None]
    alloc_conf: str = ""
    capacity: int | None = None


LOADS: dict[str, tuple[str, ...]] = {"to": ("fp32", "fp16", "bf16")}
LOADS["device_map"] = (*LOADS["to"], "int8", "nf4", "nf4 double", "fp4")
EXPANDABLE = "expandable_segments:True"
EXPERIMENTS = {
    "mlp-sgd": Experiment(partial(mlp, make=optim.SGD)),
    "mlp-momentum": Experiment(partial(mlp, make=optim.SGD, momentum=0.9)),
    "mlp-adam": Experiment(partial(mlp, make=optim.Adam)),
    "mlp-adam-for-loop": Experiment(partial(mlp, make=optim.Adam, foreach=False)),
    "mlp-adam-fused": Experiment(partial(mlp, make=optim.Adam, fused=True)),
    "mlp-adam-expandable": Experiment(partial(mlp, make=optim.Adam), EXPANDABLE),
    "amp-fp16": Experiment(partial(amp, dtype=torch.float16)),
    "amp-bf16": Experiment(partial(amp, dtype=torch.bfloat16)),
    "fragmentation": Experiment(fragmentation),
    "fragmentation-expandable": Experiment(fragmentation, EXPANDABLE),
    "out-of-memory": Experiment(out_of_memory, capacity=3 * GiB // 2),
    "kv-cache": Experiment(kv_cache),
    "fsdp-fp32": Experiment(one_of_eight),
    "fsdp-bf16": Experiment(partial(one_of_eight, param_dtype=torch.bfloat16)),
    **{
        f"step-gpt2-large-{short}-{attention}": Experiment(
            partial(training_step, dtype=dtype, attention=attention)
        )
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for attention in ("eager", "fused")
    },
    **{
        f"load-{name}-{precision}-{path}".replace(" ", "-"): Experiment(
            partial(load, name=name, precision=precision, path=path)
        )
        for name in ("gpt2-large", "Qwen2-0.5B")
        for path, precisions in LOADS.items()
        for precision in precisions
    },
}
