# %% [markdown]
# # Training and inference: what a model needs beside itself
#
# After this chapter you can say what an optimizer, a precision, a batch or a context length adds to a model's bytes, and check it.
#
# - **Time:** 20 minutes to read, half a minute to run.
# - **Needs:** nothing. It runs on any machine, a GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import gc
import logging
import warnings
from dataclasses import asdict, replace

# Neither of these is of use here: kernels for 4 bits, and progress bars.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "IProgress not found")

import bitsandbytes
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from every_byte import estimate, open_gpu
from every_byte.estimate import Dimensions
from every_byte.units import GB, GiB
from helpers import models
from helpers.environment import versions
from helpers.plots import by_kind, stacked_bars, timeline, use_book_style
from helpers.tables import table

use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "bitsandbytes"))

# %% [markdown]
# ## A model of one billion parameters
#
# The source article {cite}`hoperj2024` uses a model of one billion parameters as its example: 4 GB of them in FP32, 4 GB of gradients, 8 GB of Adam's states. 16 GB in all. The article only calculates it. Here we build it.
#
# We take a transformer like Llama and choose its sizes so that it comes to a billion.

# %%
ONE_BILLION = Dimensions(
    model_type="llama",
    vocab_size=48_000,
    hidden_size=2_048,
    num_hidden_layers=20,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=5_632,
    tie_word_embeddings=True,
)
parts = estimate.parameters(ONE_BILLION)
N = sum(parts.values())
print({part: f"{count:,}" for part, count in parts.items() if count})
print(f"N = {N:,} parameters")


# %%
def build(dtype=torch.float32):
    sizes = {name: size for name, size in asdict(ONE_BILLION).items() if size}
    config = AutoConfig.for_model(
        **sizes, attn_implementation="eager", use_cache=False
    )
    with gpu.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


model = build()
counted = sum(parameter.numel() for parameter in model.parameters())
print(
    f"counted in the model: {counted:,}, {counted - N} more than by formula"
)

# %% [markdown]
# ## Predict: bytes per parameter
#
# Three things are as large as the model, or a multiple of it: the parameters, their gradients, and what the optimizer remembers. An optimizer is a choice of the last row:
#
# | optimizer | remembers for each parameter |
# | --- | --- |
# | SGD | nothing |
# | SGD with momentum, Lion {cite}`chen2023` | one number |
# | Adam, AdamW {cite}`kingma2015` | two numbers |
# | 8-bit Adam {cite}`dettmers2022optimizers` | two bytes, and a scale for each 256 |
# | Adafactor {cite}`shazeer2018` | of a matrix, one number for each row and column |

# %%
ADAM8 = bitsandbytes.optim.Adam8bit
CASES = {
    "SGD": ("sgd", "fp32", optim.SGD, {}),
    "SGD, momentum": ("momentum", "fp32", optim.SGD, {"momentum": 0.9}),
    "Adam": ("adam", "fp32", optim.Adam, {}),
    "AdamW": ("adamw", "fp32", optim.AdamW, {}),
    "Lion": ("lion", "fp32", bitsandbytes.optim.Lion, {}),
    "8-bit Adam": ("adam 8-bit", "fp32", ADAM8, {}),
    "SGD, all in bf16": ("sgd", "bf16", optim.SGD, {}),
    "AdamW, all in bf16": ("adamw", "bf16", optim.AdamW, {}),
    "8-bit Adam, bf16": ("adam 8-bit", "bf16", ADAM8, {}),
}

# %%
predicted = {
    name: estimate.training(ONE_BILLION, optimizer, dtype).total
    for name, (optimizer, dtype, _, _) in CASES.items()
}
for name, n in predicted.items():
    print(f"{name:20}{n:16,} B{n / N:9.3f} B per parameter")

# %% [markdown]
# ## Measure: one real step each
#
# Each row now takes a training step: the real module, the real optimizer class, a small batch. Then we count parameters, gradients and states.


# %%
def inputs(batch, length, dtype):
    """Token ids, a causal mask and positions, on the GPU."""
    scores = torch.zeros(1, 1, length, length, dtype=dtype)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    given = {
        "input_ids": torch.zeros(batch, length, dtype=torch.int64),
        "attention_mask": scores.masked_fill(future, float("-inf")),
        "position_ids": torch.arange(length)[None],
    }
    return {name: value.to(gpu.device) for name, value in given.items()}


def loss_of(model, given):
    logits = model(**given).logits
    return cross_entropy(logits.flatten(0, 1), given["input_ids"].flatten())


# %%
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATES = ("parameters", "gradients", "optimizer states")


def replay(dtype, optimizer_class, options):
    empty_card()
    model = build(DTYPES[dtype])
    optimizer = optimizer_class(model.parameters(), **options)
    loss_of(model, inputs(1, 64, DTYPES[dtype])).backward()
    optimizer.step()
    row = gpu.breakdown(model, optimizer)
    return sum(row[kind] for kind in STATES)


del model
held = {name: replay(*case[1:]) for name, case in CASES.items()}

# %% [markdown]
# ## Compare
#
# *Predicted* is the formula's figure, *this GPU* the one named at the top of the page. Both are before the allocator's rounding.

# %%
table(
    [
        "optimizer",
        "predicted (B)",
        "this GPU (B)",
        "off by (B)",
        "B / parameter",
    ],
    [
        (name, n, held[name], held[name] - n, f"{held[name] / N:.3f}")
        for name, n in predicted.items()
    ],
)

# %% [markdown]
# Every row agrees to the byte. The 8-bit states come to a little over two bytes: the scales, and the small tensors that stay in FP32.
#
# ### Other models
#
# One model may be luck. So here are four published ones, at full size, in three ways each. This time we also look at what forward leaves for backward, the activations, on 2 texts of 256 tokens. Their formula comes further below.


# %%
def published(name, dtype):
    changes = {"attn_implementation": "eager", "use_cache": False}
    if name.startswith("gpt2"):  # alone in having dropout, which we turn off
        changes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = models.config(name, **changes)
    return models.build(config, gpu.device, DTYPES[dtype]).train()


def differences(name, optimizer, dtype, optimizer_class, options):
    empty_card()
    model, given = published(name, dtype), inputs(2, 256, DTYPES[dtype])
    logits = model(**given).logits
    loss = cross_entropy(logits.flatten(0, 1), given["input_ids"].flatten())
    kept = gpu.breakdown(model)["activations"]
    loss.backward()
    opt = optimizer_class(model.parameters(), **options)
    opt.step()
    row = gpu.breakdown(model, opt)
    sizes = estimate.dimensions(name)
    memory = estimate.training(sizes, optimizer, dtype, 2, 256)
    states = memory.parameters + memory.gradients + memory.optimizer_states
    off = sum(row[kind] for kind in STATES) - states
    return states, off, kept, kept - memory.activations - memory.logits


# %%
NAMES = ("gpt2", "gpt2-large", "Qwen2-0.5B", "Qwen3-0.6B")
WAYS = ("SGD", "Adam", "AdamW, all in bf16")
table(
    [
        "model",
        "optimizer",
        "states (B)",
        "off by",
        "activations (B)",
        "off by",
    ],
    [
        (name, way, *differences(name, *CASES[way]))
        for name in NAMES
        for way in WAYS
    ],
)

# %% [markdown]
# *States* are parameters, gradients and optimizer states together, by formula. *Activations* are this GPU's, and *off by* is this GPU's figure less the formula's. The 4 or 8 bytes are the loss and the number it was divided by.
#
# ### Rows that this page does not replay
#
# **Adafactor** looks at its values while it steps (`.item()`), and the virtual GPU has none. So we run it for real on the host, on two small tensors, and count there.

# %%
small = nn.Linear(1000, 500)
adafactor = optim.Adafactor(small.parameters())
small(torch.ones(4, 1000)).sum().backward()
adafactor.step()
states = [
    v
    for state in adafactor.state.values()
    for k, v in state.items()
    if k != "step"
]
remembered = sum(value.nbytes for value in states if value is not None)
formula = estimate.optimizer_states(
    [p.shape for p in small.parameters()], "adafactor"
)
print(
    f"Adafactor for 1000 x 500 + 500 numbers: {remembered:,} B, by formula {formula:,} B"
)

of_a_billion = estimate.training(ONE_BILLION, "adafactor")
print(
    f"for a billion, by formula: {of_a_billion.optimizer_states:,} B of states"
)

# %% [markdown]
# **Mixed precision (AMP)** keeps parameters, gradients and states in FP32: the same 16 bytes with Adam {cite}`micikevicius2018`. Autocast adds a copy of each weight in half precision while forward and backward run. So it saves no bytes of parameters, it adds two each. What it can save is activations. The next figures are estimates; [Mixed precision](06_mixed_precision.ipynb) replays them, and shows when the two added bytes count.

# %%
amp = estimate.training(ONE_BILLION, "adam", "fp32").total
copies = estimate.parameter_bytes(ONE_BILLION, "bf16")
print(f"FP32 with Adam:        {amp / N:.0f} B per parameter")
print(f"AMP, copies cached:    {(amp + copies) / N:.0f} B per parameter")

# %% [markdown]
# ## LoRA: train a little beside a lot
#
# LoRA {cite}`hu2021` freezes the model and trains two thin matrices beside each of its own. Gradients and states are only for those. In plain PyTorch:


# %%
class LoRA(nn.Module):
    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


# %%
RANK = 16
empty_card()
model = build(torch.bfloat16).requires_grad_(False)
for layer in model.model.layers:
    for block in (layer.self_attn, layer.mlp):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, LoRA(child, RANK))

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = optim.AdamW(trained)
loss_of(model, inputs(1, 64, torch.bfloat16)).backward()
optimizer.step()
lora = gpu.breakdown(model, optimizer)

# %%
adapters = estimate.lora_parameters(ONE_BILLION, RANK)
base = estimate.parameter_bytes(ONE_BILLION, "bf16")
formula = {
    "parameters": base + 2 * adapters,
    "gradients": 2 * adapters,
    "optimizer states": 4 * adapters,
}
print(f"{adapters:,} adapter parameters, {adapters / N:.1%} of the model")
table(
    ["LoRA of rank 16, AdamW, bf16", "predicted (B)", "this GPU (B)"],
    [(kind, formula[kind], lora[kind]) for kind in STATES]
    + [("in all", sum(formula.values()), sum(lora[kind] for kind in STATES))],
)

# %% [markdown]
# QLoRA {cite}`dettmers2023` also stores the frozen matrices in four bits. Quantising needs values, so this row is an estimate here too.

# %%
quantised = estimate.parameter_bytes(ONE_BILLION, "bf16", "nf4 double")
total = quantised + 8 * adapters
print(f"QLoRA, estimated: {quantised:,} + {8 * adapters:,} = {total:,} B")
print(f"                  {total / N:.3f} B per parameter of the model")

# %% [markdown]
# ## The article's 16 GB, made real
#
# Now a whole step of the billion with Adam in FP32, on a batch of 4 texts of 512 tokens. The article counts what hangs on the parameters. The rest comes to light at the peak.

# %%
BATCH, LENGTH = 4, 512
model = optimizer = trained = layer = block = child = None
empty_card()
model = build()
optimizer = optim.Adam(model.parameters())
given = inputs(BATCH, LENGTH, torch.float32)
with gpu.record(model, optimizer) as recorded:
    recorded.mark("forward")
    logits = model(**given).logits
    loss = cross_entropy(logits.flatten(0, 1), given["input_ids"].flatten())
    forward_end = gpu.breakdown(model, optimizer)
    recorded.mark("backward")
    loss.backward()
    recorded.mark("optimizer")
    optimizer.step()

# %%
end, peak = recorded.steps[-1], recorded.steps[recorded.peak]
ARTICLE = {"parameters": "4", "gradients": "4", "optimizer states": "8"}
table(
    ["kind", "article (GB)", "after the step (GB)", "at the peak (GB)"],
    [
        (k, ARTICLE.get(k, ""), f"{end[k] / GB:.3f}", f"{peak[k] / GB:.3f}")
        for k in end
        if end[k] or peak[k]
    ]
    + [("in all", "16", f"{end.total / GB:.3f}", f"{peak.total / GB:.3f}")],
)

# %% mystnb={"image": {"alt": "Allocated memory during one training step of the billion-parameter model, stacked by kind. Forward piles about 10.6 GB of activations on 4 GB of parameters. Backward turns activations into 4 GB of gradients. The optimizer adds 8 GB of states and, for a moment, a temporary of 4 GB: the peak, a little over 20 GB."}}
figure = timeline(recorded)

# %% [markdown]
# The article's 4, 4 and 8 GB are there. A card of 16 GB would still fail: the peak is five times the parameters, because Adam's step needs a temporary as large as the model. [Adam against SGD](04_mlp_adam_vs_sgd.ipynb) takes that apart.

# %% [markdown]
# ### Activations by formula
#
# Forward leaves behind what backward will need. For a layer like Llama's, with eager attention in FP32, these are so many numbers for each token:
#
# $$6h + 4ad + 4i + aS$$
#
# with width $h$, $a$ heads of size $d$, MLP width $i$, and length $S$. The last term, one row of scores for each head, is what grows with the square of the length. The way of counting is that of {cite:t}`korthikanti2022`, the numbers are those that transformers' layers save.

# %%
activations = estimate.activations(ONE_BILLION, BATCH, LENGTH)
scores = 2 * estimate.logits(ONE_BILLION, BATCH, LENGTH)
print(f"layers, by formula:           {activations:16,} B")
print(f"logits, and their logarithms: {scores:16,} B")
print(f"activations after forward:    {forward_end['activations']:16,} B")
left = forward_end["activations"] - activations - scores
print(f"in neither, but the loss:     {left:16,} B")

# %% [markdown]
# ## Inference
#
# Without training there are no gradients, no states, and only one layer's activations at a time. What grows instead is the **KV cache**: the keys and values of all tokens so far, in every layer.
#
# $$\text{KV cache} = 2 \cdot L \cdot k \cdot d \cdot S \cdot B \cdot \text{bytes}$$
#
# with $L$ layers and $k$ key-value heads of size $d$. Grouped-query attention {cite}`ainslie2023` has fewer of these than heads: 8 instead of 32 here, a quarter of the cache.

# %%
model = optimizer = logits = loss = given = None
empty_card()
model = build(torch.bfloat16).eval()
given = inputs(BATCH, LENGTH, torch.bfloat16)
before, cache = gpu.memory_allocated(), DynamicCache(config=model.config)
gpu.reset_peak_memory_stats()
with torch.inference_mode():
    scores = model(
        **given, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    del scores

taken = gpu.memory_allocated() - before
peak = gpu.max_memory_allocated() - before
workspace = gpu.breakdown()["workspaces"]
formula = estimate.kv_cache(ONE_BILLION, BATCH, LENGTH, "bf16")
print(f"KV cache of {BATCH} x {LENGTH} tokens: {taken - workspace:14,} B")
print(f"by formula:                {formula:14,} B")
print(f"peak over it:              {peak - taken:14,} B")

# %% [markdown]
# The peak over the cache is what one layer computes with at a time, most of it attention's scores.
#
# ### Batch and length
#
# The cache grows with both, the parameters with neither. For Llama-3.1-8B in BF16, estimated:

# %%
llama = estimate.dimensions("Llama-3.1-8B")
LENGTHS, BATCHES = (1_024, 8_192, 32_768, 131_072), (1, 8, 32)


def gib(length, batch):
    return f"{estimate.kv_cache(llama, batch, length) / GiB:.2f}"


table(
    ["tokens so far", *(f"batch of {batch} (GiB)" for batch in BATCHES)],
    [(n, *(gib(n, batch) for batch in BATCHES)) for n in LENGTHS],
)

# %%
ungrouped = replace(llama, num_key_value_heads=llama.num_attention_heads)
FIGURES = {
    "the parameters": estimate.inference(llama).parameters,
    "one text of full length": estimate.kv_cache(llama, 1, LENGTHS[-1]),
    "if no head shared": estimate.kv_cache(ungrouped, 1, LENGTHS[-1]),
}
for name, nbytes in FIGURES.items():
    print(f"{name:25}{nbytes / GiB:6.2f} GiB")

# %% [markdown]
# ## The article's four tasks
#
# The article sends its readers to a website with four tasks. Here they are answered with `every_byte.estimate`, for the billion, a batch of 4 and 512 tokens. All figures in this section are **estimated**.
#
# ### 1. Compare training and inference

# %% mystnb={"image": {"alt": "Stacked bars for the billion-parameter model, estimated. Training with Adam in FP32: 4 GB parameters, 4 GB gradients, 8 GB states, about 10.6 GB activations with logits. Inference in FP32: 4 GB of parameters and a thin slice of KV cache."}}
WORK = {"batch": BATCH, "length": LENGTH}
train = estimate.training(ONE_BILLION, "adam", "fp32", **WORK)
infer = estimate.inference(ONE_BILLION, "fp32", **WORK)
figure = stacked_bars(
    {"fp32": {"training": by_kind(train), "inference": by_kind(infer)}}
)

# %% [markdown]
# ### 2. Which part does FP16 shrink?

# %% mystnb={"image": {"alt": "Stacked bars, estimated. Everything in FP32, everything in FP16, and mixed precision. All in FP16 halves parameters, gradients and states, and takes well over half of the activations. Mixed precision leaves parameters, gradients and states as in FP32."}}
half = estimate.training(ONE_BILLION, "adam", "fp16", **WORK)
mixed = replace(train, activations=half.activations, logits=half.logits)
figure = stacked_bars(
    {
        "Adam": {
            "all FP32": by_kind(train),
            "mixed": by_kind(mixed),
            "all FP16": by_kind(half),
        }
    }
)
print(f"activations: {half.activations / train.activations:.0%} of FP32's")

# %% [markdown]
# All of it, if all of it is in FP16. Activations do not come down to half: norms and softmax stay in FP32. *Mixed* is drawn with the activations of pure FP16. Autocast leaves some more, and its cached copies are not drawn: it is the least that mixed precision can take.
#
# ### 3. Compare Adam, momentum and SGD

# %% mystnb={"image": {"alt": "Stacked bars, estimated, for SGD, SGD with momentum and Adam in FP32. Parameters, gradients and activations are the same in all three. Momentum adds 4 GB of optimizer states, Adam 8 GB."}}
figure = stacked_bars(
    {
        "fp32": {
            label: by_kind(
                estimate.training(ONE_BILLION, optimizer, "fp32", **WORK)
            )
            for label, optimizer in (
                ("SGD", "sgd"),
                ("momentum", "momentum"),
                ("Adam", "adam"),
            )
        }
    }
)

# %% [markdown]
# ### 4. Change one parameter at a time
#
# We double one thing at a time and leave the rest. The table says how many times as large the parts become.

# %%
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "intermediate_size",
)


def doubled(name):
    if name in WORK:
        return ONE_BILLION, {**WORK, name: 2 * WORK[name]}
    return replace(
        ONE_BILLION, **{name: 2 * getattr(ONE_BILLION, name)}
    ), WORK


def doubled_memory(name):
    sizes, work = doubled(name)
    return estimate.training(sizes, "adam", "fp32", **work)


changed = {name: doubled_memory(name) for name in (*WORK, *SIZES)}

# %% mystnb={"image": {"alt": "Stacked bars, estimated: the billion-parameter model as it is, and with one size doubled. Twice the batch or length makes only the activations larger. Twice the layers or the width makes everything larger."}}
bars = {"as it is": train, **changed}
figure = stacked_bars(
    {"doubled": {name: by_kind(m) for name, m in bars.items()}}
)


# %%
def two_parts(m):
    return (
        m.parameters + m.gradients + m.optimizer_states,
        m.activations + m.logits,
    )


base = two_parts(train)
rows = [(name, *two_parts(m)) for name, m in changed.items()]
table(
    ["doubled", "parameters, gradients, states", "activations, logits"],
    [
        (name, f"{a / base[0]:.2f}", f"{b / base[1]:.2f}")
        for name, a, b in rows
    ],
)

# %% [markdown]
# Batch and length touch only the activations. Doubling the length more than doubles them: the scores of attention grow with its square. Width and depth touch both. (With `hidden_size` the size of a head stays, so attention's own matrices double where the others do.)

# %% [markdown]
# ## What to remember
#
# - Training with Adam in FP32 takes **16 bytes per parameter**, and **20 at the peak** of the optimizer's step. Other optimizers change the states: from nothing to 8 bytes.
# - Mixed precision saves no bytes of parameters. LoRA does away with nearly all gradients and states.
# - At inference the parameters stand still and the **KV cache** grows with every token of every text.

# %% [markdown]
# ## Exercises
#
# **1.** Which is larger for Llama-3.1-70B in BF16: its parameters, or the KV cache of 64 texts of 8,192 tokens? Guess first.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
both = estimate.inference(
    estimate.dimensions("Llama-3.1-70B"), "bf16", 64, 8_192
)
print(
    f"parameters {both.parameters / GiB:.1f} GiB, KV cache {both.kv_cache / GiB:.1f} GiB"
)

# %% [markdown]
# **2.** From which length on does one layer of the billion keep more for its attention scores than for all the rest?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
pair = 4 * ONE_BILLION.num_attention_heads  # a score of each head
rest = estimate.layer_activations(ONE_BILLION, 1, 1) - pair
print(f"{rest:,} B for each token, {pair} B for each pair of tokens")
print(f"from {rest // pair + 1:,} tokens on")

# %% [markdown]
# **3.** What would checkpointing every layer, and flash attention, leave of the activations? Both are estimates: ask `estimate.activations`.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for attention in estimate.ATTENTION:
    for checkpointing in (False, True):
        kept = estimate.activations(
            ONE_BILLION, BATCH, LENGTH, "fp32", attention, checkpointing
        )
        print(
            f"{attention:10}checkpointing={checkpointing!s:6}{kept / GB:7.3f} GB"
        )

# %% [markdown]
# ## Where to go next
#
# [Adam against SGD](04_mlp_adam_vs_sgd.ipynb) follows one training step operation by operation, on a model small enough to train.
