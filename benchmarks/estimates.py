"""The estimator's peaks beside the replay's, on random set-ups of the models that it knows.

``python -m benchmarks.estimates --seeds 500 --results FILE`` goes on where FILE, a line of JSON
for each seed, ends; then it prints a table, and fails where an estimate is more than `ABOVE`
over the replay's peak, or more than `BELOW` under it, or where the replay runs out of memory
on a card of which the estimate says that it fits. ``--store`` keeps what the replays showed in
``benchmarks/estimates.json``, against which the tests hold the estimates and the page.
"""

import argparse
import dataclasses
import gc
import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.nn.functional import dropout

from every_byte import estimate
from every_byte.data import cards
from every_byte.estimate import Dimensions, Memory, Setup
from every_byte.estimate.architecture import with_layers
from every_byte.estimate.config import OTHER_NAMES, SAME_IN_BOTH
from every_byte.estimate.forward import masked_layers
from every_byte.gpu import VirtualGPU
from every_byte.tracker import untracked
from helpers.models import CAUSAL_SDPA

ABOVE, BELOW = 0.03, 0.005
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CARDS = ("H200", "A100 80 GB", "RTX 4090", "T4")
TORCH = "2.11"
STORED = Path(__file__).with_name("estimates.json")
FAMILIES = (
    "gemma-2b",
    "gemma-3-270m",
    "gemma-3-1b-it",
    "Phi-3-mini-4k-instruct",
    "Phi-4-mini-instruct",
    "OLMo-2-0425-1B",
    "OLMo-2-1124-7B",
    "granite-3.3-2b-base",
    "granite-3.3-8b-base",
)
"""Of those that are not the book's, what ``--families`` draws from."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A model, what is done with it, and the card of the replay."""

    name: str
    sizes: Dimensions
    setup: Setup
    card: str


def random_case(seed: int, layers: int | None = None, names: tuple[str, ...] = ()) -> Case:
    """A model and a set-up that a replay can follow, the same for a seed.

    Args:
        seed: of the random numbers.
        layers: the most that the model keeps of its layers; all if None.
        names: of the models; those of the book without experts if there are none.
    """
    rng = random.Random(seed)
    known = {n: estimate.dimensions(n) for n in names or estimate.known_models()}
    name = rng.choice([n for n, s in known.items() if not s.num_local_experts])
    sizes = known[name]
    if layers is not None:
        few = min(rng.randint(1, layers), sizes.num_hidden_layers)
        sizes = with_layers(sizes, few)
    task = rng.choice(["training", "training", "training", "inference"])
    dtype = rng.choice(["fp32", "bf16", "bf16", "fp16"])
    gpt2 = sizes.model_type == "gpt2"
    given: dict[str, Any] = {
        "task": task,
        "dtype": dtype,
        "batch": rng.choice([1, 1, 2, 3, 4, 8]),
        "length": rng.randint(1, 1024) if gpt2 else rng.choice([512, rng.randint(1, 4096)]),
        "attention": rng.choice(["sdpa", "sdpa", "sdpa", "eager"]),
        "load": rng.choice(["to", "device_map"]),
    }
    if sizes.sliding_layers:  # from the window's length on, there is a mask
        given["length"] = min(given["length"], sizes.sliding_window - 8)
    if task == "inference":
        given["all_logits"] = rng.random() < 0.5
        return Case(name, sizes, Setup(**given), rng.choice(CARDS))
    given["optimizer"] = rng.choice(
        ["sgd", "momentum", "adam", "adamw", "adamw", "rmsprop", "adafactor", "adam 8-bit", "lion"]
    )
    fused = estimate.OPTIMIZERS[given["optimizer"]].fused
    given["implementation"] = rng.choice(["foreach", "for-loop", *["fused"] * 2 * fused])
    given["amp"] = rng.choice([None, "bf16", "fp16"]) if dtype == "fp32" else None
    given["checkpointing"] = rng.random() < 0.3
    given["accumulation"] = rng.random() < 0.2
    given["dropout"] = gpt2 and rng.random() < 0.5
    if rng.random() < 0.25:
        given["rank"] = rng.choice([4, 8, 16, 64])
        given["adapters"] = rng.choice(["fp32", dtype])
        given["lora_dropout"] = rng.random() < 0.5
    return Case(name, sizes, Setup(**given), rng.choice(CARDS))


# The replay

KEPT = ("model_type", "tie_word_embeddings", "num_hidden_layers")  # whatever they are


def build(
    sizes: Dimensions,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: str = "eager",
    probability: float = 0.0,
) -> Any:
    """The real model of these sizes, on a device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if sizes.has("encoder") or sizes.has("images"):
        return build_other(sizes, dtype, device, attention)
    given = {name: n for name, n in dataclasses.asdict(sizes).items() if n or name in KEPT}
    given |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if sliding := given.pop("sliding_layers", 0):
        every = ["sliding_attention"] * sliding
        given["layer_types"] = every + ["full_attention"] * (sizes.num_hidden_layers - sliding)
    if sizes.has("latent"):
        given["n_routed_experts"] = given.pop("num_local_experts")
        given |= {"n_group": 1, "topk_group": 1, "head_dim": sizes.qk_rope_head_dim}
        given |= {"q_lora_rank": sizes.q_lora_rank or None}
        given["first_k_dense_replace"] = sizes.first_k_dense_replace
    if sizes.model_type == "falcon":
        del given["head_dim"], given["intermediate_size"]
    if sizes.model_type == "gpt2":
        del given["intermediate_size"], given["num_key_value_heads"], given["head_dim"]
        given |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), probability)
    config = AutoConfig.for_model(given.pop("model_type"), attn_implementation=attention, **given)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def build_other(
    sizes: Dimensions, dtype: torch.dtype, device: torch.device | str, attention: str
) -> Any:
    """The real encoder-decoder or vision transformer of these sizes, on a device."""
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM

    kind, given = sizes.model_type.partition("_")[0], dataclasses.asdict(sizes)
    if sizes.has("images"):
        side = math.isqrt(sizes.max_position_embeddings - 1) * sizes.patch_size
        asked: dict[str, Any] = {"image_size": side, "num_labels": sizes.vocab_size}
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size"):
            asked[name] = given[name]
        asked["num_hidden_layers"] = sizes.num_hidden_layers
    else:
        asked = {other: given[name] for name, other in OTHER_NAMES[kind].items()}
        asked |= {"vocab_size": sizes.vocab_size, "decoder_start_token_id": 0}
        if kind == "bart":
            asked |= {"encoder_layers": sizes.encoder_layers}
            asked |= {"max_position_embeddings": sizes.max_position_embeddings}
            asked |= {f"decoder_{name}": asked[f"encoder_{name}"] for name in SAME_IN_BOTH}
        if sizes.has("gated"):
            asked["feed_forward_proj"] = "gated-gelu"
    config = AutoConfig.for_model(kind, attn_implementation=attention, **asked)
    auto = AutoModelForImageClassification if sizes.has("images") else AutoModelForSeq2SeqLM
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)


class LoRA(nn.Module):
    """LoRA beside a linear layer, as PEFT's ``lora/layer.py`` computes it."""

    def __init__(self, linear: Any, rank: int, dtype: torch.dtype, probability: float) -> None:
        super().__init__()
        self.linear, self.probability = linear.requires_grad_(False), probability
        n, m = linear.weight.shape
        if isinstance(linear, nn.Linear):
            n, m = m, n
        device = linear.weight.device
        self.down = nn.Linear(n, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, m, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result and LoRA's."""
        result = self.linear(x)
        computed = result.dtype
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)
        if self.probability:
            x = dropout(x, self.probability, self.training)
        result = result + self.up(self.down(x)) * 2.0
        return result.to(computed)


def with_lora(model: Any, rank: int, dtype: torch.dtype, probability: float) -> Any:
    """The model, frozen, with LoRA's factors beside each linear layer of its blocks."""
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(False)
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear | Conv1D) and name != "lm_head":
                setattr(owner, name, LoRA(child, rank, dtype, probability))
    return model


def optimizer_of(setup: Setup) -> Callable[[Any], optim.Optimizer]:
    """The optimizer that a set-up names, by its library."""
    how = {"foreach": {"foreach": True}, "fused": {"fused": True}, "for-loop": {"foreach": False}}
    step = how[setup.implementation]
    if "8-bit" in setup.optimizer or setup.optimizer == "lion":
        import bitsandbytes

        names = {"adam 8-bit": "AdamW8bit", "lion": "Lion", "lion 8-bit": "Lion8bit"}
        made: Callable[[Any], optim.Optimizer] = getattr(bitsandbytes.optim, names[setup.optimizer])
        return made
    if "adam" not in setup.optimizer and setup.implementation == "fused":
        step = {"foreach": False}  # ``meta`` has no fused kernel of SGD, which takes as little
    if setup.optimizer == "momentum":
        return lambda p: optim.SGD(p, momentum=0.9, **step)
    names = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
    names["adafactor"] = "Adafactor"
    kind = getattr(optim, names[setup.optimizer])
    return lambda p: kind(p, **step)


def onto(model: Any, gpu: VirtualGPU, load: str) -> Any:
    """The model on the card: tensor by tensor, or from one block of the size of all."""
    if load == "device_map":
        whole = sum(parameter.nbytes for parameter in model.parameters())
        torch.empty(whole, dtype=torch.uint8, device=gpu.device)

    def put(tensor: torch.Tensor) -> torch.Tensor:
        there = gpu.accounts_for(tensor)  # the embedding, that is the head as well
        return tensor if there else torch.empty_like(tensor, device=gpu.device)

    model._apply(put)
    gpu.reset_peak_memory_stats()
    return model


def replayed(case: Case) -> dict[str, int]:
    """What the replay of a case shows: its peak in bytes, and whether it runs where it fits.

    On a card of just the bytes that the estimate calls enough. Of training the second
    step, of inference a prompt and four more tokens.
    """
    enough = estimated(case)
    try:
        return {"peak": _replayed(case, enough.needed, enough.context), "fits": 1}
    except torch.OutOfMemoryError:
        gc.collect()
        return {"peak": _replayed(case, 1 << 50, 0), "fits": 0}


def _replayed(case: Case, capacity: int, context: int) -> int:
    setup, sizes = case.setup, case.sizes
    attention = "eager" if setup.attention == "eager" else CAUSAL_SDPA
    other = sizes.has("encoder") or sizes.has("images")
    trained = setup.task == "training"
    if attention != "eager" and (other or (trained and masked_layers(sizes, setup.length, "sdpa"))):
        attention = "sdpa"
    dtype, batch, length = DTYPES[setup.dtype], setup.batch, setup.length
    with untracked():
        model = build(sizes, dtype, "meta", attention, 0.1 * setup.dropout)
    with VirtualGPU(
        case.card, capacity=capacity, context=context, torch=TORCH, values="assume"
    ) as gpu:
        model = onto(model, gpu, setup.load)
        if other:
            with torch.inference_mode():
                read = _labelled if sizes.has("images") else _written
                return read(gpu, model.eval(), batch, length)
        ids = torch.zeros(batch, length, dtype=torch.int64).to(gpu.device)
        positions = torch.arange(length)[None].to(gpu.device)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        if attention == "eager":
            causal = torch.zeros(batch, 1, length, length, dtype=dtype)
            inputs["attention_mask"] = causal.to(gpu.device)
        if setup.task == "inference":
            model.eval()
            with torch.inference_mode():
                found = _inferred(gpu, model, inputs, setup.all_logits)
        else:
            if setup.rank:
                factors = DTYPES[setup.adapters or setup.dtype]
                with_lora(model, setup.rank, factors, 0.05 * setup.lora_dropout)
            model.train()
            found = _trained(gpu, model, inputs, setup)
        del model, inputs, ids, positions
    gc.collect()
    return found


def _inferred(gpu: VirtualGPU, model: Any, inputs: dict[str, Any], all_logits: bool) -> int:
    batch, length = inputs["input_ids"].shape
    out = model(**inputs, use_cache=True, logits_to_keep=0 if all_logits else 1)
    past, following = out.past_key_values, out.logits[:, -1:].argmax(-1)
    del out
    for number in range(4):
        positions = torch.full((1, 1), length + number).to(gpu.device)
        given: dict[str, Any] = {"input_ids": following, "position_ids": positions}
        if "attention_mask" in inputs:
            seen = length + number + 1
            mask = torch.zeros(batch, 1, 1, seen, dtype=inputs["attention_mask"].dtype)
            given["attention_mask"] = mask.to(gpu.device)
        out = model(**given, past_key_values=past, use_cache=True)
        following, past = out.logits[:, -1:].argmax(-1), out.past_key_values
        del out
    return gpu.max_memory_allocated()


def _labelled(gpu: VirtualGPU, model: Any, batch: int, _: int) -> int:
    """The peak of a vision transformer that looks at images."""
    side = model.config.image_size
    pixels = torch.zeros(batch, 3, side, side, dtype=model.dtype).to(gpu.device)
    model(pixel_values=pixels)
    return gpu.max_memory_allocated()


def _written(gpu: VirtualGPU, model: Any, batch: int, length: int) -> int:
    """The peak of an encoder-decoder that reads a text and writes the end of one as long.

    What was written up to there is there at once, as keys and values.
    """
    ids = torch.zeros(batch, length, dtype=torch.int64).to(gpu.device)
    read = model.get_encoder()(input_ids=ids)
    peak, past = gpu.max_memory_allocated(), None
    for number in range(5):
        out = model(
            encoder_outputs=read,
            decoder_input_ids=ids[:, :1],
            past_key_values=past,
            use_cache=True,
        )
        past, following = out.past_key_values, out.logits.argmax(-1)
        del out, following
        if not number:
            for layer in past.self_attention_cache.layers:
                heads, width = layer.keys.shape[1], layer.keys.shape[3]
                shape = batch, heads, max(1, length - 4), width
                layer.keys = torch.zeros(shape, dtype=model.dtype, device=gpu.device)
                layer.values = torch.zeros(shape, dtype=model.dtype, device=gpu.device)
    return max(peak, gpu.max_memory_allocated())


def _trained(gpu: VirtualGPU, model: Any, inputs: dict[str, Any], setup: Setup) -> int:
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if setup.rank:
            model.enable_input_require_grads()  # as PEFT does
    steps = optimizer_of(setup)([p for p in model.parameters() if p.requires_grad])
    computed = DTYPES[setup.amp or "bf16"]
    for _ in range(2):
        gpu.reset_peak_memory_stats()
        for _ in range(1 + setup.accumulation):
            with torch.autocast(gpu.device.type, computed, enabled=setup.amp is not None):
                loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            loss.backward()
            del loss
        steps.step()
        steps.zero_grad()
    return gpu.max_memory_allocated()


def replayed_sharded(sizes: Dimensions, setup: Setup, card: str = "H200") -> int:
    """The peak of one of the GPUs of `setup` with FSDP, each layer a unit, in bytes."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    from every_byte.ranks import one_of

    with (
        VirtualGPU(card, capacity=1 << 50, context=0, torch=TORCH, values="assume") as gpu,
        one_of(setup.gpus) as mesh,
    ):
        how: dict[str, Any] = {"mesh": mesh}
        if setup.offload == "all":
            how["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        with untracked():
            model = build(sizes, DTYPES[setup.dtype], "meta", CAUSAL_SDPA)
            for layer in model.model.layers:
                fully_shard(layer, **how)
            fully_shard(model, **how)
        model.to_empty(device="cpu" if setup.offload == "all" else gpu.device)
        model.train()
        ids = torch.zeros(setup.batch, setup.length, dtype=torch.int64).to(gpu.device)
        positions = torch.arange(setup.length)[None].to(gpu.device)
        found = _trained(gpu, model, {"input_ids": ids, "position_ids": positions}, setup)
        del model, ids, positions
    gc.collect()
    return found


# All of them


def stored(kind: str = "peaks") -> list[tuple[Case, int]]:
    """The cases of ``estimates.json``, and the peak in bytes that the replay of each showed.

    Args:
        kind: ``peaks``, or ``families`` for those of `FAMILIES`.
    """
    known = json.loads(STORED.read_text("utf-8"))
    names = FAMILIES if kind == "families" else ()
    return [(random_case(n, known["layers"], names), peak) for n, peak in enumerate(known[kind])]


def store(kind: str, found: list[dict[str, Any]], layers: int | None) -> None:
    """Write ``estimates.json``: of what versions, and each seed's peak, from 0 on.

    Raises:
        ValueError: a seed is missing, or its replay ran out of memory or failed.
    """
    import transformers

    if bad := [n for n, one in enumerate(found) if one["seed"] != n or not one.get("fits")]:
        raise ValueError(f"seed is {bad[0]}: expected all from 0 on, each of which ran")
    known = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {}
    known |= {"torch": torch.__version__, "transformers": transformers.__version__}
    known |= {"rules_of_torch": TORCH, "layers": layers, kind: [one["peak"] for one in found]}
    STORED.write_text(json.dumps(known, indent=0) + "\n", "utf-8")


def compared(
    seeds: range, results: Path, layers: int | None, names: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """What each seed's replay showed, from the file as far as it goes, then replayed."""
    known: dict[int, dict[str, Any]] = {}
    if results.exists():
        lines = map(json.loads, results.read_text("utf-8").splitlines())
        known = {line["seed"]: line for line in lines}
    for seed in seeds:
        if seed not in known:
            case = random_case(seed, layers, names)
            try:
                known[seed] = {"seed": seed, **replayed(case)}
            except Exception as error:
                known[seed] = {"seed": seed, "error": f"{type(error).__name__}: {error}"[:200]}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[seed]) + "\n")
        yield known[seed]


def estimated(case: Case) -> Memory:
    """The estimate for a case, on its card."""
    card = cards()[case.card]
    return estimate.memory(case.sizes, case.setup, card.cublas_workspace, card.context)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many set-ups")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--layers", type=int, help="the most layers of a model; all by default")
    parser.add_argument("--results", type=Path, default=Path("estimates.jsonl"))
    parser.add_argument("--families", action="store_true", help="of models beyond the book's")
    parser.add_argument("--store", action="store_true", help="write benchmarks/estimates.json")
    parser.add_argument("--worst", type=int, default=20, help="how many of the worst to print")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    from transformers import logging

    logging.set_verbosity_error()
    rows, errors = [], []
    seeds = range(asked.first, asked.first + asked.seeds)
    names = FAMILIES if asked.families else ()
    results = list(compared(seeds, asked.results, asked.layers, names))
    if asked.store:
        store("families" if asked.families else "peaks", results, asked.layers)
    for found in results:
        case = random_case(found["seed"], asked.layers, names)
        if "error" in found:
            errors.append((found["seed"], found["error"]))
            continue
        memory = estimated(case)
        rows.append((memory.peak / found["peak"] - 1, found, memory, case))
    rows.sort(key=lambda row: row[0])
    off = [row for row in rows if not -BELOW <= row[0] <= ABOVE]
    for row in rows[: asked.worst] + rows[-asked.worst :]:
        difference, found, memory, case = row
        default = Setup()
        given = {
            field.name: getattr(case.setup, field.name)
            for field in dataclasses.fields(Setup)
            if getattr(case.setup, field.name) != getattr(default, field.name)
        }
        print(
            f"{found['seed']:4} {difference:+7.2%} {found['peak']:>15,} {memory.peak:>15,} "
            f"{memory.peak_at:32} {case.name} {case.sizes.num_hidden_layers} {case.card} {given}"
        )
    for seed, error in errors:
        print(seed, error)
    if rows:
        print(
            f"{len(rows) - len(off)} of {len(rows)} within {-BELOW:+.1%} and {ABOVE:+.1%}; "
            f"from {rows[0][0]:+.2%} to {rows[-1][0]:+.2%}"
        )
        short = [found["seed"] for _, found, _, _ in rows if not found["fits"]]
        print(f"{len(rows) - len(short)} of {len(rows)} ran where the estimate is sure: {short}")
        return 1 if off or errors or short else 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
