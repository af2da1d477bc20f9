# %% [markdown]
# # From parameters to bytes
#
# **How many bytes do a model's parameters take on a GPU?** Count the parameters and multiply by the bytes of their type: 4 GB for each billion in FP32, 2 GB in BF16. PyTorch counts a few per cent more at most, because it hands out memory in blocks that do not always fit.
#
# After this chapter you can tell from a model's configuration how many bytes its parameters take on a GPU, and name every byte that PyTorch counts on top.
#
# - **Time:** 20 minutes to read, under a minute to run.
# - **Needs:** nothing. It runs on any machine, a GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import gc
from collections import Counter

import torch
from torch import nn

from every_byte import Breakdown, open_gpu
from every_byte.estimate import (
    active_parameters,
    dimensions,
    known_models,
    parameters,
)
from every_byte.units import GB, GiB, MiB
from helpers.environment import versions
from helpers.models import build, config
from helpers.plots import segments, stacked_bars, use_book_style
from helpers.tables import table

use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers"))

# %% [markdown]
# The first line above names the GPU of this page. With a real one, its figures are **measured**. Without one, they are **replayed**: PyTorch makes every tensor with its shape and no contents, and a model of its memory allocator counts the bytes.

# %% [markdown]
# ## Predict
#
# ### One formula
#
# A model is a list of numbers, its parameters. Each takes as many bytes as its type says:
#
# $$\text{model size} = \text{parameters} \times \text{bytes per parameter}$$
#
# {numref}`models-and-cards` does this for seven models in BF16. The dotted lines are a card of 24 GiB and one of 80 GiB, with nothing else in memory.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars of the bytes of seven models in BF16, and two dotted lines for cards of 24 and 80 GiB. Qwen2-0.5B 0.99 GB, gpt2-large 1.55, Mistral-7B 14.48, Llama-3.1-8B 16.06 and Qwen3-8B 16.38 GB lie below the first line, Mixtral-8x7B with 93.41 and Llama-3.1-70B with 141.11 GB beyond the second."}, "figure": {"name": "models-and-cards", "caption": "Parameters of seven models in BF16, by formula, and cards of 24 and 80 GiB."}}
SHOWN = ["Qwen2-0.5B", "gpt2-large", "Mistral-7B-v0.1", "Llama-3.1-8B"]
SHOWN += ["Qwen3-8B", "Mixtral-8x7B-v0.1", "Llama-3.1-70B"]
bars = {
    name: Breakdown(parameters=2 * sum(parameters(dimensions(name)).values()))
    for name in SHOWN
}
figure = stacked_bars({"two bytes for each parameter": bars})
for size in (24, 80):
    edge = size * GiB / GB
    figure.axes[0].axvline(edge, color="black", linestyle=":")
    figure.axes[0].text(edge + 2, 1, f"{size} GiB", va="center")

# %% tags=["hide-input"]
table(
    ["type", "bytes each", "1 billion (GB)", "70 billion (GB)"],
    [
        (str(dtype).removeprefix("torch."), size, size * 1, size * 70)
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
        for size in (dtype.itemsize,)
    ],
)

# %% [markdown]
# So one billion parameters (1B) take 4 GB in FP32. Two of these three rows are worth remembering: 4 GB per billion in FP32, 2 GB in BF16 or FP16.

# %% [markdown]
# ### Seventy billion
#
# An article that this book began with {cite}`hoperj2024` takes Llama-3.1-70B as $70 \times 10^9$ parameters and finds 280 GB. But 70B is a name, and a round one. The exact count follows from the dimensions that its authors publish {cite}`llama3`, by a formula further down.

# %%
exact = sum(parameters(dimensions("Llama-3.1-70B")).values())
for label, count in (("round", 70 * 10**9), ("exact", exact)):
    nbytes = 4 * count
    print(
        f"{label}: {count:14,} x 4 B = {nbytes / GB:.2f} GB"
        f" = {nbytes / GiB:.2f} GiB"
    )

# %% [markdown]
# ### GB, GiB, and real cards
#
# 1 GB is $10^9$ bytes, 1 GiB is $2^{30}$: 7 % more. Memory chips come in powers of two, so a card sold with "24 GB" has 24 GiB, minus a little that the driver keeps.
#
# How many cards do the parameters of Llama-3.1-70B need, with nothing else in memory?

# %%
CARDS = {"RTX 4090": 24, "RTX 6000 Ada": 48, "H100 SXM": 80}


def cards(bytes_each, size):
    return -(-bytes_each * exact // (size * GiB))


# %% tags=["hide-input"]
table(
    ["card", "memory (GiB)", "in GB", "cards in FP32", "cards in BF16"],
    [
        (card, n, f"{n * GiB / GB:.2f}", cards(4, n), cards(2, n))
        for card, n in CARDS.items()
    ],
)

# %% [markdown]
# The article says that a 4090 has "up to 48G". NVIDIA's specifications say 24 GB. 48 GB is the RTX 6000 Ada, built on the same chip {cite}`nvidia-ada`, and 80 GB the H100 {cite}`nvidia-h100`. The article's conclusion holds: no consumer card fits this model.

# %% [markdown]
# ### A count from the configuration
#
# Take Llama's architecture, with hidden size $h$, MLP width $i$, vocabulary $v$, $L$ layers. The keys and values of all heads together are $k$ wide.
#
# | part | parameters |
# | --- | --- |
# | attention: queries and output, keys and values | $2h^2 + 2hk$ |
# | MLP: gate, up, down | $3hi$ |
# | two norms | $2h$ |
# | embedding and head, last norm | $2vh + h$ |
#
# The first three rows count once for each layer.

# %%
llama = dimensions("Llama-3.1-8B")
h, i, v = llama.hidden_size, llama.intermediate_size, llama.vocab_size
L, k = llama.num_hidden_layers, llama.num_key_value_heads * llama.head_dim

per_layer = 2 * h**2 + 2 * h * k + 3 * h * i + 2 * h
print(f"h={h}, i={i}, v={v}, L={L}, k={k}")
print(f"Llama-3.1-8B: {L * per_layer + 2 * v * h + h:,} parameters")

# %% [markdown]
# `every_byte.estimate` holds such a formula for each architecture of this book. Where are most of the parameters?

# %% tags=["hide-input"]
NAMES = ["gpt2-large", "Qwen2-0.5B", "Llama-3.1-8B", "Mixtral-8x7B-v0.1"]
parts = [parameters(dimensions(name)) for name in NAMES]
table(
    ["part (% of all)", *NAMES],
    [
        (part, *(f"{100 * of[part] / sum(of.values()):.1f}" for of in parts))
        for part in ("embedding", "attention", "mlp", "head")
    ],
)

# %% [markdown]
# The norms make up the rest, and in Mixtral the routers. A head of 0 % is tied to the embedding, which is explained below.

# %% [markdown]
# ## Measure
#
# A formula can be wrong. So we build the models themselves, with the transformers library {cite}`wolf2020`, from nothing but their configuration, and count. PyTorch's `meta` device makes that cheap: a tensor there has a shape and a type, and no storage. The largest model has 405 billion parameters. It takes no memory, and a fraction of a second to make.


# %%
def number_of_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


counted = {
    name: number_of_parameters(build(name, "meta")) for name in known_models()
}
billions = sum(counted.values()) / 10**9
print(f"{len(counted)} models, {billions:.1f} billion parameters")

# %% [markdown]
# ## Compare
#
# For GPT-2 {cite}`radford2019`, *published* is the count that KerasHub states {cite}`kerashub-gpt2`. For the others {cite}`qwen2,qwen3,llama3,mistral7b,mixtral` it is the size of the checkpoint on the Hugging Face hub, which has two bytes for each parameter. Each name links to its source. *Difference* is counted minus published.

# %% tags=["hide-input"]
table(
    ["model", "counted", "formula", "published", "difference"],
    [
        (
            f"[{name}]({facts['source']})",
            counted[name],
            sum(parameters(dimensions(name)).values()),
            facts["published"],
            counted[name] - facts["published"],
        )
        for name, facts in known_models().items()
    ],
)

# %% [markdown]
# Three independent counts agree on every model. But "number of parameters" does not always mean the same thing.

# %% [markdown]
# ## What "number of parameters" hides
#
# ### One tensor, two names
#
# The embedding turns tokens into vectors, and the head turns vectors into scores for tokens. Both are matrices of vocabulary by hidden size. Small models often use *one* matrix for both: the two are **tied**. A tied matrix takes memory once. If you add up the tensors by name, you count it twice.


# %%
def added_up_by_name(name):
    model = build(name, "meta")
    tensors = model.named_parameters(remove_duplicate=False)
    return sum(tensor.numel() for _, tensor in tensors)


# %% tags=["hide-input"]
table(
    ["model", "tied", "in memory", "added up by name"],
    [
        (name, str(tied), counted[name], added_up_by_name(name))
        for name in ("gpt2-large", "Qwen2-0.5B", "Qwen3-0.6B", "Qwen3-8B")
        for tied in (dimensions(name).tie_word_embeddings,)
    ],
)

# %% [markdown]
# ### Buffers
#
# A **buffer** is a tensor that belongs to the model and is not trained. It takes memory but is not a parameter. Today's transformers has few of them left: two small tables for the rotary positions.


# %%
def buffers(name):
    sizes = [buffer.nbytes for buffer in build(name, "meta").buffers()]
    return len(sizes), sum(sizes)


# %% tags=["hide-input"]
table(
    ["model", "buffers", "bytes"],
    [
        (name, *buffers(name))
        for name in ("gpt2-large", "Qwen2-0.5B", "Llama-3.1-8B")
    ],
)

# %% [markdown]
# ### Where "812M" comes from
#
# The article gives gpt2-large "about 812M" parameters, as its page on the hub does. Its configuration gives 774M. The hub adds up whatever a checkpoint stores, and the old checkpoints of GPT-2 store a buffer beside the parameters: the causal mask of each layer, a table of 1,024 x 1,024 that says which token may look at which.

# %% tags=["hide-input"]
PUBLISHED = {"gpt2": "137,022,720", "gpt2-large": "812M"}
rows = []
for name, stored in PUBLISHED.items():
    sizes = dimensions(name)
    masks = sizes.num_hidden_layers * sizes.max_position_embeddings**2
    rows.append((name, counted[name], masks, counted[name] + masks, stored))
table(["model", "parameters", "mask entries", "sum", "hub, published"], rows)

# %% [markdown]
# For gpt2 the documentation of safetensors prints what the hub counts {cite}`safetensors-metadata`, and every digit agrees. The masks are not trained, and today's transformers does not even load them. So gpt2-large has 774 million parameters, as its model card says, and not 812 million.

# %% [markdown]
# ### What is loaded, and what is used
#
# In a **mixture of experts**, each layer has several MLPs, the experts. A small router picks a few for each token. All of them must be in memory, but a token only uses the ones that were picked for it. Mixtral has 8 and picks 2.

# %% tags=["hide-input"]
mixtral = dimensions("Mixtral-8x7B-v0.1")
loaded = sum(parameters(mixtral).values())
used = active_parameters(mixtral)
table(
    ["Mixtral-8x7B", "parameters", "in BF16 (GB)", "published"],
    [
        ("loaded", loaded, f"{2 * loaded / GB:.2f}", "46.7B"),
        ("used by a token", used, f"{2 * used / GB:.2f}", "12.9B"),
    ],
)

# %% [markdown]
# The published figures are Mistral's own {cite}`mixtral-announced`. The first row decides the memory, and the second the time for a token. The "8x7B" in the name is neither: only the MLPs exist eight times.

# %% [markdown]
# ### What quantisation leaves alone
#
# "One byte each" does not hold for all parameters. bitsandbytes, as transformers uses it, quantises the weights of linear layers (`nn.Linear`, and GPT-2's `Conv1D`) except the head. The embedding, the norms and the biases stay in 16 bits. For the dense models:

# %%
from transformers.pytorch_utils import Conv1D


def quantisable(model):
    """The number of weights that bitsandbytes would quantise."""
    return sum(
        layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, (nn.Linear, Conv1D))
        and layer is not model.get_output_embeddings()
    )


# %%
dense = [n for n in known_models() if not dimensions(n).num_local_experts]
linear = {name: quantisable(build(name, "meta")) for name in dense}
stays = {name: counted[name] - linear[name] for name in dense}

# %% [markdown]
# The last column is an **estimate** by formula: one byte for each quantised weight, two for the rest, as a share of two bytes for all.

# %% tags=["hide-input"]
table(
    ["model", "stays in 16 bits", "% of all", "INT8 / FP16"],
    [
        (
            name,
            stays[name],
            f"{100 * stays[name] / counted[name]:.1f}",
            f"{(linear[name] + 2 * stays[name]) / (2 * counted[name]):.2f}",
        )
        for name in dense
    ],
)

# %% [markdown]
# The smaller the model and the larger its vocabulary, the more stays in 16 bits. In Qwen2-0.5B it is more than a quarter, almost all of it the embedding. So INT8 takes not half the bytes, but nearly two thirds.

# %% [markdown]
# ## From parameters to `memory_allocated`
#
# ### A prediction that fails
#
# Back to bytes, and to a GPU. gpt2-large in FP32 should take four bytes for each parameter. We empty the card, make the model on it at full size, and ask PyTorch.


# %%
def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()


empty_card()
print(f"before:             {gpu.memory_allocated():,} B")
model = build("gpt2-large", gpu.device, torch.float32)
P = 4 * counted["gpt2-large"]
allocated = gpu.memory_allocated()
print(f"predicted:          {P:,} B")
print(f"memory_allocated(): {allocated:,} B")
print(f"difference:         {allocated - P:13,} B")

# %% [markdown]
# 2.5 % too much, and not because of buffers: gpt2-large has none. `breakdown` says what it is.

# %% tags=["hide-input"]
rows = gpu.breakdown(model)
table(
    ["kind", "bytes"],
    [(kind, nbytes) for kind, nbytes in rows.items() if nbytes]
    + [("memory_allocated()", rows.total)],
)

# %% [markdown]
# ### Segments and blocks
#
# PyTorch does not ask CUDA for each tensor. Its allocator {cite}`pytorch-allocator` takes memory in **segments** and cuts **blocks** from them:
#
# - up to 1 MiB: from the small pool, segments of 2 MiB;
# - above 1 MiB and below 10 MiB: from the large pool, segments of 20 MiB;
# - from 10 MiB up: a segment of its own, the request rounded up to 2 MiB.
#
# We make one layer of gpt2-large. {numref}`one-layer` draws what the allocator holds for it.

# %% mystnb={"image": {"alt": "Five segments that hold one layer of gpt2-large. A small one of 2 MiB holds 65 KiB of biases and norms. Two of 20 MiB hold the attention's matrices of 6.25 and 18.75 MiB, the rest of each is free. Two of 26 MiB hold one MLP matrix of 25 MiB each, and the last MiB of each is handed out with it."}, "figure": {"name": "one-layer", "caption": "What the allocator holds for one layer of gpt2-large: segments, and the blocks in them."}}
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

del model
empty_card()
with gpu.device:
    layer = GPT2Block(config("gpt2-large"))
figure = segments(gpu.memory_snapshot())

# %% [markdown]
# ### What is not split off
#
# The free part of a segment serves later requests. But in the large pool, a remainder of 1 MiB or less is not split off. It stays with the block, and `memory_allocated` counts it. So a matrix of 25 MiB gets a segment of 26 MiB, and all 26 count.
#
# The rule in a few lines, for a tensor that gets a segment of its own or shares one without loss:


# %%
def handed_out(nbytes):
    """Bytes that count for a tensor of `nbytes`."""
    size = -(-nbytes // 512) * 512
    segment = -(-size // (2 * MiB)) * (2 * MiB)
    if size >= 10 * MiB and segment - size <= MiB:
        return segment
    return size


for mib in (18.75, 25):
    nbytes = int(mib * MiB)
    more = handed_out(nbytes) - nbytes
    print(f"{mib:5} MiB: {more:,} B more than asked for")

# %% [markdown]
# ### Every byte of the difference
#
# We make the whole model again and let that rule predict it tensor by tensor. Then we ask the allocator for each block that is larger than its request.

# %%
del layer
empty_card()
model = build("gpt2-large", gpu.device, torch.float32)
predicted = sum(handed_out(p.nbytes) for p in model.parameters())

larger = Counter(
    (block["requested_size"], block["size"])
    for segment in gpu.memory_snapshot()
    for block in segment["blocks"]
    if block["state"] == "active_allocated"
    and block["size"] > block["requested_size"]
)
print(f"predicted:          {predicted:,} B")
print(f"memory_allocated(): {gpu.memory_allocated():,} B")

# %% tags=["hide-input"]
shape = {p.nbytes: " x ".join(map(str, p.shape)) for p in model.parameters()}
rows = [
    (shape[asked], asked, got, count, count * (got - asked))
    for (asked, got), count in sorted(larger.items())
]
rows.append(("in all", "", "", larger.total(), sum(row[-1] for row in rows)))
table(
    ["tensor", "asked for (B)", "got (B)", "blocks", "difference (B)"],
    rows,
)

# %% [markdown]
# There are two MLP matrices in each of 36 layers, with 1 MiB more each. The end of the embedding's segment is the rest: that is every byte. The order doesn't matter here, so `.to("cuda")` gives the same sum as making the model on the GPU.

# %% [markdown]
# ### The article's 3.21 GB
#
# The article measured 3.21 GB for this model, with the transformers library of 2024. That version still kept two buffers in each layer: the causal mask, one byte for each entry, and a single number to put where the mask forbids attention. We add them.

# %%
before = gpu.memory_allocated()
old_buffers = [
    (
        torch.empty(1024, 1024, dtype=torch.bool, device=gpu.device),
        torch.empty((), device=gpu.device),
    )
    for _ in range(36)
]
more = gpu.memory_allocated() - before
print(f"buffers: 36 x ({1024**2:,} + 4) B asked for, {more:,} B counted")
print(f"in all:  {gpu.memory_allocated():,} B; the article: 3.21 GB")

# %% [markdown]
# ### When 512 bytes matter
#
# Each of these single numbers took not 4 bytes but 512: every block is a multiple of that. For matrices this is nothing. For many tiny tensors it is nearly everything:

# %%
for count, size in ((1, 1000), (1000, 1)):
    before = gpu.memory_allocated()
    tensors = [torch.empty(size, device=gpu.device) for _ in range(count)]
    more = gpu.memory_allocated() - before
    print(f"{count:4} x {size:4} numbers, {4 * size * count:,} B: {more:,} B")
    del tensors

# %% [markdown]
# ### One segment for all
#
# How a model is loaded matters too. Suppose that one block as large as all parameters is allocated and freed first. That leaves one large segment. The tensors are cut from it one after the other, and nothing is left over:

# %%
del model, old_buffers
empty_card()
first = torch.empty(P, dtype=torch.uint8, device=gpu.device)
del first
model = build("gpt2-large", gpu.device, torch.float32)
allocated = gpu.memory_allocated()
print(f"parameters:         {P:,} B")
print(f"memory_allocated(): {allocated:,} B, {allocated - P} B more")

# %% [markdown]
# This is what `from_pretrained(..., device_map=...)` does in today's transformers, to load faster. [gpt2-large](07_gpt2_large.ipynb) loads models both ways. To predict bytes, you have to know how the model is loaded.

# %% [markdown]
# ## What to remember
#
# - Bytes are parameters times bytes per parameter: **4 GB** per billion in FP32, **2 GB** in BF16. Ask what was counted: tied matrices, buffers, all experts or the active ones.
# - A configuration is enough to count a model exactly, on the `meta` device or by formula. Nothing needs to be downloaded.
# - PyTorch hands out blocks in steps of **512 B**, and a large block keeps a remainder of up to **1 MiB**. The tensors' shapes decide whether you notice.

# %% [markdown]
# ## Exercises
#
# **1.** Which of these models fit, parameters alone, on one card of 24, 48 or 80 GiB: in FP32, and in BF16?


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
def smallest(nbytes):
    fitting = [card for card, n in CARDS.items() if n * GiB >= nbytes]
    return f"{nbytes / GiB:.2f} GiB: {fitting[0] if fitting else 'none'}"


table(
    ["model", "in FP32", "in BF16"],
    [(name, smallest(4 * n), smallest(2 * n)) for name, n in counted.items()],
)

# %% [markdown]
# **2.** In BF16, gpt2-large has half the bytes. Does it also have half of what came on top? Predict with `handed_out`, then measure.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
del model
empty_card()
model = build("gpt2-large", gpu.device, torch.bfloat16)
predicted = sum(handed_out(p.nbytes) for p in model.parameters())
print(f"predicted: {predicted - P // 2} B on top")
print(f"this GPU:  {gpu.memory_allocated() - P // 2} B on top")
print(f"a matrix of 12.5 MiB leaves {14 - 12.5} MiB of its segment")

# %% [markdown]
# <details><summary>Why none at all?</summary>
#
# Half of 25 MiB is 12.5 MiB. Its segment has 14 MiB, and the remaining 1.5 MiB is more than 1 MiB: it is split off and free for others. What is left of the embedding's segment is now larger than 1 MiB, too.
#
# </details>

# %% [markdown]
# **3.** Mixtral is called "8x7B". Eight models of Mistral-7B's size would have a quarter more parameters. Which ones are missing?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
one = parameters(dimensions("Mistral-7B-v0.1"))
rows = [
    (part, 8 * one[part], count, 8 * one[part] - count)
    for part, count in parameters(mixtral).items()
]
sums = (sum(row[column] for row in rows) for column in (1, 2, 3))
table(
    ["part", "8 x Mistral-7B", "Mixtral-8x7B", "difference"],
    [*rows, ("in all", *sums)],
)

# %% [markdown]
# ## Where to go next
#
# Parameters are only the beginning. [One training step](04_mlp_adam_vs_sgd.ipynb) finds the gradients, optimizer states and activations that join them, and [Training and inference](03_training_and_inference.ipynb) counts these for a model of a billion. The [references](../book/references.md) list the sources.
