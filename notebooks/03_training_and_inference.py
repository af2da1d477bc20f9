# %% [markdown]
# # Training and inference: what a model needs besides its parameters
#
# **What does a model need on the GPU besides its parameters?** Training adds a gradient and the optimizer's states to each of them, 16 bytes in all with Adam in FP32, and the batch's activations on top. Inference adds only the KV cache, which grows with every token.
#
# After this chapter you can say what an optimizer, a precision, a batch or a context length adds to a model's bytes, and check it.
#
# - **Time:** 20 minutes to read, half a minute to run.
# - **Needs:** nothing. A GPU is optional, and nothing is downloaded.

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
from every_byte.estimate import Dimensions, Setup
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
# The article that this book began with {cite}`hoperj2024` takes a model of one billion parameters as its example: 4 GB of parameters in FP32, 4 GB of gradients and 8 GB of Adam's states, 16 GB in all. Here we build it, as a transformer like Llama.

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

# %% [markdown]
# {numref}`training-and-inference` shows what it takes to train this model and to use it, on a batch of 4 texts of 512 tokens. Both bars come from formulas.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars for the billion-parameter model, estimated. Training with Adam in FP32: 4 GB parameters, 4 GB gradients, 8 GB states, about 10.6 GB activations with logits. Inference in FP32: 4 GB of parameters and a thin slice of KV cache."}, "figure": {"name": "training-and-inference", "caption": "A model of a billion parameters: training with Adam, and inference, both in FP32. Estimated."}}
BATCH, LENGTH = 4, 512
WORK = {"batch": BATCH, "length": LENGTH}
train = estimate.training(ONE_BILLION, "adam", "fp32", **WORK)
infer = estimate.inference(ONE_BILLION, "fp32", **WORK)
figure = stacked_bars(
    {"fp32": {"training": by_kind(train), "inference": by_kind(infer)}}
)


# %%
def build(dtype=torch.float32):
    sizes = {name: size for name, size in asdict(ONE_BILLION).items() if size}
    config = AutoConfig.for_model(
        **sizes, attn_implementation="eager", use_cache=False
    )
    with gpu.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


# %% tags=["hide-input"]
def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


# %%
model = build()
counted = sum(parameter.numel() for parameter in model.parameters())
print(
    f"counted in the model: {counted:,}, {counted - N} more than by formula"
)

# %% [markdown]
# ## Predict: bytes per parameter
#
# Three things are as large as the model, or a multiple of it: the parameters, their gradients, and what the optimizer remembers. Only the last of the three depends on the optimizer:
#
# | optimizer | remembers for each parameter |
# | --- | --- |
# | SGD | nothing |
# | SGD with momentum, Lion {cite}`chen2023` | one number |
# | Adam, AdamW {cite}`kingma2015` | two numbers |
# | 8-bit Adam {cite}`dettmers2022optimizers` | two bytes, and a scale for each 256 |
# | Adafactor {cite}`shazeer2018` | of a matrix, one number for each row and column |

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the cases", "code_prompt_hide": "Hide the cases"}
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

# %% tags=["hide-input"]
predicted = {
    name: estimate.training(ONE_BILLION, optimizer, dtype).total
    for name, (optimizer, dtype, _, _) in CASES.items()
}
for name, n in predicted.items():
    print(f"{name:18}{n / GB:6.2f} GB{n / N:8.3f} B per parameter")

# %% [markdown]
# ## Measure: one real step each
#
# Each row now takes a training step: the real module, the real optimizer class, a small batch. Then we count parameters, gradients and states.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the batch and the loss", "code_prompt_hide": "Hide the batch and the loss"}
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


# %%
del model
held = {name: replay(*case[1:]) for name, case in CASES.items()}

# %% [markdown]
# ## Compare
#
# *Predicted* is the formula's figure, *this GPU* the one named at the top of the page. Both are before the allocator's rounding.

# %% tags=["hide-input"]
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
# Every row agrees to the byte. The 8-bit states take a little over two bytes: there are scales, and small tensors stay in FP32.
#
# ### Other models
#
# One match may be luck. So we train four published models at full size, each in three ways. This time we also count the activations, which forward leaves for backward, on 2 texts of 256 tokens. Their formula follows further down.
#
# The states agree to the byte in all twelve rows. The activations are 4 or 8 B more than the formula: the loss, and the number it was divided by.


# %% tags=["hide-input"]
def published(name, dtype):
    changes = {"attn_implementation": "eager", "use_cache": False}
    if name.startswith("gpt2"):  # alone in having dropout, which we turn off
        changes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = models.config(name, **changes)
    return models.build(config, gpu.device, DTYPES[dtype]).train()


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how they are counted", "code_prompt_hide": "Hide how they are counted"}
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


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the twelve rows, in bytes", "code_prompt_hide": "Hide the twelve rows, in bytes"}
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
# *States* are parameters, gradients and optimizer states together, by formula. *Activations* are this GPU's, and *off by* is this GPU's figure minus the formula's.
#
# ### Rows that this page does not replay
#
# **Adafactor** looks at its values while it steps. So we run it for real on the host, on two small tensors, and count there.

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

# %% tags=["hide-input"]
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
# **Mixed precision (AMP)** keeps parameters, gradients and states in FP32: the same 16 bytes with Adam {cite}`micikevicius2018`. Autocast adds a copy of each weight in half precision while forward and backward run. So it saves no bytes of parameters, but adds two to each. What it can save is activations. The next figures are estimates. [Mixed precision](06_mixed_precision.ipynb) replays them, and shows when the two added bytes count.

# %% tags=["hide-input"]
amp = estimate.training(ONE_BILLION, "adam", "fp32").total
copies = estimate.parameter_bytes(ONE_BILLION, "bf16")
print(f"FP32 with Adam:        {amp / N:.0f} B per parameter")
print(f"AMP, copies cached:    {(amp + copies) / N:.0f} B per parameter")

# %% [markdown]
# ## LoRA: train a little beside a lot
#
# LoRA {cite}`hu2021` freezes the model and trains two thin matrices beside each of its own. Only those have gradients and states. In plain PyTorch:


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

# %% tags=["hide-input"]
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
# QLoRA {cite}`dettmers2023` also stores the frozen matrices in four bits. That is an estimate here.

# %%
quantised = estimate.parameter_bytes(ONE_BILLION, "bf16", "nf4 double")
total = quantised + 8 * adapters
print(f"QLoRA, estimated: {quantised:,} + {8 * adapters:,} = {total:,} B")
print(f"                  {total / N:.3f} B per parameter of the model")

# %% [markdown]
# ## The article's 16 GB, made real
#
# Now we run a whole step of the billion with Adam in FP32, on a batch of 4 texts of 512 tokens. The article counts what belongs to the parameters. The peak shows the rest.

# %%
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

# %% mystnb={"image": {"alt": "Allocated memory during one training step of the billion-parameter model, stacked by kind. Forward piles about 10.6 GB of activations on 4 GB of parameters. Backward turns activations into 4 GB of gradients. The optimizer adds 8 GB of states and, for a moment, a temporary of 4 GB: the peak, a little over 20 GB."}, "figure": {"name": "step-of-a-billion", "caption": "Allocated memory during one training step of the billion with Adam in FP32, by kind."}}
figure = timeline(recorded)

# %% tags=["hide-input"]
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

# %% [markdown]
# The article's 4, 4 and 8 GB are there, and yet a card of 16 GB would fail. {numref}`step-of-a-billion` shows why: the peak is five times the parameters, because Adam's step needs a temporary as large as the model. [One training step](04_mlp_adam_vs_sgd.ipynb) takes that apart. With `optim.Adam(..., fused=True)` there is no such temporary.

# %% [markdown]
# ### Activations by formula
#
# Forward leaves behind what backward will need. A layer like Llama's, with eager attention in FP32, keeps this many numbers for each token:
#
# $$6h + 4ad + 4i + aS$$
#
# with width $h$, $a$ heads of size $d$, MLP width $i$, and length $S$. The last term, one row of scores for each head, is what grows with the square of the length. We count as {cite:t}`korthikanti2022` do, with the tensors that transformers' layers save.

# %% tags=["hide-input"]
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
# with $L$ layers, $k$ key-value heads of size $d$, $S$ tokens so far and a batch of $B$. Grouped-query attention {cite}`ainslie2023` has fewer key-value heads than heads: 8 instead of 32 here, so a quarter of the cache.

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

# %% tags=["hide-input"]
taken = gpu.memory_allocated() - before
peak = gpu.max_memory_allocated() - before
workspace = gpu.breakdown()["workspaces"]
formula = estimate.kv_cache(ONE_BILLION, BATCH, LENGTH, "bf16")
print(f"KV cache of {BATCH} x {LENGTH} tokens: {taken - workspace:14,} B")
print(f"by formula:                {formula:14,} B")
print(f"peak over it:              {peak - taken:14,} B")

# %% [markdown]
# *Peak over it* is what one layer needs while it computes, most of it attention's scores.
#
# ### Batch and length
#
# The cache grows with both, the parameters with neither. Here is Llama-3.1-8B in BF16, estimated:

# %% tags=["hide-input"]
llama = estimate.dimensions("Llama-3.1-8B")
LENGTHS, BATCHES = (1_024, 8_192, 32_768, 131_072), (1, 8, 32)


def gib(length, batch):
    return f"{estimate.kv_cache(llama, batch, length) / GiB:.2f}"


table(
    ["tokens so far", *(f"batch of {batch} (GiB)" for batch in BATCHES)],
    [(n, *(gib(n, batch) for batch in BATCHES)) for n in LENGTHS],
)

# %% tags=["hide-input"]
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
# The article sends its readers to a website with four tasks. We answer them with `every_byte.estimate`, for the billion, a batch of 4 and 512 tokens. All figures in this section are **estimated**.
#
# ### 1. Compare training and inference
#
# That is {numref}`training-and-inference`, at the top of this page. Training takes more than six times as much.

# %% [markdown]
# ### 2. Which part does FP16 shrink?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars, estimated. Everything in FP32: 26.57 GB. Mixed precision: 27.56 GB; its activations are a tenth less than in FP32, and two GB of cast weights come on top. Everything in FP16: 16.31 GB, half of the parameters, gradients and states, and four fifths of the activations."}, "figure": {"name": "what-fp16-shrinks", "caption": "The same training step in FP32, in mixed precision and in FP16. Estimated."}}
half = estimate.training(ONE_BILLION, "adam", "fp16", **WORK)
mixed = estimate.memory(ONE_BILLION, Setup(amp="fp16", **WORK))
mixed = replace(mixed, rounding=0, context=0)
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
# All of it, if all of it is in FP16, as {numref}`what-fp16-shrinks` shows. Activations do not come down to half: norms and softmax stay in FP32. *Mixed* takes more than FP32: its activations shrink by a tenth, and autocast's copies of the weights take about twice what that saves. [Mixed precision](06_mixed_precision.ipynb) replays the same step.
#
# ### 3. Compare Adam, momentum and SGD
#
# Only the states differ in {numref}`three-optimizers`.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars, estimated, for SGD, SGD with momentum and Adam in FP32. Parameters, gradients and activations are the same in all three. Momentum adds 4 GB of optimizer states, Adam 8 GB."}, "figure": {"name": "three-optimizers", "caption": "The same step with three optimizers in FP32. Estimated."}}
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
# We double one thing at a time and leave the rest as it is ({numref}`one-size-doubled`). The table says by what factor the parts grow.

# %% tags=["hide-input"]
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

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars, estimated: the billion-parameter model as it is, and with one size doubled. Twice the batch or length makes only the activations larger. Twice the layers or the width makes everything larger."}, "figure": {"name": "one-size-doubled", "caption": "The billion as it is, and with one size doubled. Estimated."}}
bars = {"as it is": train, **changed}
figure = stacked_bars(
    {"doubled": {name: by_kind(m) for name, m in bars.items()}}
)


# %% tags=["hide-input"]
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
# Batch and length change only the activations. Doubling the length more than doubles them: the scores of attention grow with its square. Width and depth change both. (When `hidden_size` doubles, the size of a head stays the same. So attention's matrices double, as the others do, and do not grow fourfold.)

# %% [markdown]
# ## What to remember
#
# - Training with Adam in FP32 takes **16 bytes per parameter**, and **20 at the peak** of the optimizer's step (not with `fused=True`). Other optimizers change the states: from nothing to 8 bytes.
# - Mixed precision saves no bytes of parameters. LoRA removes nearly all gradients and states.
# - At inference the parameters stay the same, and the **KV cache** grows with every token of every text.

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
# [Activations and peaks](05_activations_and_peaks.ipynb) opens up the step: what forward keeps, when the peak comes, and how to bring it down. [One training step](04_mlp_adam_vs_sgd.ipynb) follows a model small enough to train.
