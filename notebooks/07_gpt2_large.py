# %% [markdown]
# # gpt2-large in every precision
#
# **What does one model take on the GPU in 32, 16, 8 and 4 bits?** Parameters times bytes is right to within a few per cent in 32 and 16 bits, while INT8 takes more than a quarter of FP32 and NF4 more than an eighth. Embeddings stay in 16 bits, scales come on top, and the way of loading decides what the allocator adds.
#
# After this chapter you can load a model in 32, 16, 8 or 4 bits, say beforehand what it will take on the GPU, and name what the formula leaves out.
#
# - **Time:** 20 minutes to read, two minutes to run.
# - **Needs:** 8 GB of RAM, and 3.2 GB of disk. A GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import gc
import warnings

# Without ipywidgets, progress bars are plain: no need to say so here.
warnings.filterwarnings("ignore", "IProgress not found")

import torch
import transformers
from accelerate.utils import calculate_maximum_sizes
from IPython.display import display
from transformers import AutoModelForCausalLM

from every_byte import estimate, open_gpu, untracked
from every_byte.units import GB, MiB
from every_byte.virtual.memory import CUBLAS_WORKSPACE, cublas_workspace_size
from helpers.environment import versions
from helpers.measured import CARD, COLUMNS, beside_replay
from helpers.models import build, checkpoint, load
from helpers.plots import segments, stacked_bars, use_book_style
from helpers.tables import table

use_book_style()
transformers.utils.logging.disable_progress_bar()
folder = checkpoint("gpt2-large")  # made once, with a progress bar
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "accelerate", "bitsandbytes"))

# %% [markdown]
# ## The experiment
#
# This chapter repeats an experiment of the article that the book began with {cite}`hoperj2024`. It loads one model, gpt2-large {cite}`radford2019`, three times: in FP32, in FP16, and in INT8 with bitsandbytes {cite}`dettmers2022`. After each load it prints the GPU's memory: 3.21 GB, 1.60 GB, 0.89 GB.
#
# We load it ten times, at full size, with the same library. {numref}`gpt2-large-loaded` has the results. Today's call looks like this:
#
# ```python
# AutoModelForCausalLM.from_pretrained(
#     "openai-community/gpt2-large", dtype=torch.float16, device_map="cuda"
# )
# ```

# %% [markdown]
# ### Weights without a download
#
# The published weights are 3.2 GB away. So we use a checkpoint of the same size, made from the real configuration with random numbers. `checkpoint("gpt2-large", weights="hub")` would fetch the published one.
#
# Does that change the result? No: what a tensor takes depends on its shape and its type, never on its values:

# %%
sizes = {}
for name, fill in {"zeros": 0.0, "ones": 1.0, "random": None}.items():
    before = gpu.memory_allocated()
    weight = torch.empty(1280, 5120, device=gpu.device)
    weight.normal_() if fill is None else weight.fill_(fill)
    sizes[name] = gpu.memory_allocated() - before
    del weight
print(sizes)

# %% [markdown]
# This holds for every precision of this chapter: rows, blocks and scales follow from shapes, too.

# %% [markdown]
# ## Predict
#
# ### Plain formats
#
# Here the prediction is parameters times bytes. The article counts 812M parameters. That is what the hub shows, and it includes 36 stored masks (see [From parameters to bytes](01_parameters_to_bytes.ipynb)). The model has fewer:

# %%
model_sizes = estimate.dimensions("gpt2-large")
parts = estimate.parameters(model_sizes)
N = sum(parts.values())
print(f"{N:,} parameters; with the masks {N + 36 * 1024**2:,}")

# %% [markdown]
# ### Quantised formats
#
# bitsandbytes quantises the matrices of attention and MLP. The embeddings, the norms and the biases stay in 16 bits. And each quantised matrix needs **scales**: LLM.int8() one FP32 number for each row, NF4 and FP4 one for each 64 weights {cite}`dettmers2023`. Double quantisation stores these scales in 8 bits.

# %%
QUANTISED = {"int8": "int8", "nf4": "nf4"}
QUANTISED["fp4"] = "nf4"  # other levels, the same layout
QUANTISED["nf4 double"] = "nf4 double"
predicted = {
    precision: estimate.parameter_bytes(model_sizes, precision)
    for precision in ("fp32", "fp16", "bf16")
}
for precision, layout in QUANTISED.items():
    predicted[precision] = estimate.parameter_bytes(
        model_sizes, "fp16", quantised=layout
    )
for precision, n in predicted.items():
    print(f"{precision:11}{n:14,} B = {n / N:.3f} B per parameter")

# %% [markdown]
# ### What an estimator says
#
# `accelerate estimate-memory` builds the model without storage, adds up its tensors, and divides {cite}`accelerate-estimate`. We call the same function:

# %%
with untracked():  # it is to take nothing on our GPU
    empty = build("gpt2-large", "meta", torch.float32)
total, _ = calculate_maximum_sizes(empty)
DIVIDE = {"fp32": 1, "fp16": 2, "bf16": 2, "int8": 4, "nf4": 8}
DIVIDE |= {"nf4 double": 8, "fp4": 8}
estimator = {precision: total // by for precision, by in DIVIDE.items()}
print(f"{total:,} B; as int8 {estimator['int8']:,} B")

# %% [markdown]
# ## Measure
#
# Load, look, compute, clean up. The forward pass shows that what we loaded is the model: its logits must be close to those of FP32. Without a GPU it runs on the CPU, with the same weights.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how a load is measured", "code_prompt_hide": "Hide how a load is measured"}
prompt = torch.arange(8)[None] * 37
logits, rows, reserved, drawn = {}, {}, {}, {}


def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


def load_and_measure(name, precision, path="device_map", **options):
    model = load("gpt2-large", precision, path, **options)
    rows[name] = gpu.breakdown(model)
    reserved[name] = gpu.memory_reserved()
    drawn[name] = gpu.memory_snapshot()
    with torch.no_grad():
        logits[name] = model(prompt.to(model.device)).logits.float().cpu()
    del model
    empty_card()


# %% [markdown]
# ### As in 2024
#
# First the article's own model. It used the transformers of 2024, whose GPT-2 kept two buffers in each layer: a causal mask of 1,024 x 1,024 bytes, and a single number to put where the mask forbids attention. We put them back, and move the model to the GPU as the article did.


# %%
def as_in_2024(dtype):
    with untracked():  # on the host; nothing of it is on the GPU yet
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for block in model.transformer.h:
            mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool).tril()
            block.attn.register_buffer("bias", mask, persistent=False)
            hidden = torch.tensor(-1e4)
            block.attn.register_buffer("masked_bias", hidden, False)
    return model.to(gpu.device)


# %% [markdown]
# We load FP16 twice: onto an empty card, and right after FP32 without emptying the cache, so that it lies in FP32's old segments.

# %% tags=["hide-input"]
history = {}
for name, dtype, leave_empty in (
    ("FP16, empty card", torch.float16, True),
    ("FP32, empty card", torch.float32, False),
    ("FP16, in FP32's segments", torch.float16, True),
):
    model = as_in_2024(dtype)
    history[name] = gpu.breakdown(model)
    del model
    gc.collect()
    if leave_empty:
        empty_card()
    print(f"{name:25}{history[name].total:14,} B")

# %% [markdown]
# ### As today
#
# There are two ways onto the GPU. `.to("cuda")` loads on the host and moves tensor by tensor, as the article does for FP32 and FP16. `device_map=` goes straight to the card, as it does for INT8, and as is usual today.

# %%
for precision in ("fp32", "fp16"):
    load_and_measure(f"{precision}, .to()", precision, "to")
load_and_measure("int8, no dtype", "int8", dtype="auto")
for precision in predicted:
    load_and_measure(precision, precision)

for name, row in rows.items():
    print(f"{name:15}{row.total:14,} B = {row.total / GB:.2f} GB")

# %% [markdown]
# Between two runs we delete everything and empty the cache. Is anything left at the end?

# %%
print(f"{gpu.memory_allocated():,} B")

# %% [markdown]
# With double quantisation, bitsandbytes makes a table of 256 FP32 numbers once in a process, and keeps it. (Without a GPU these figures are replayed: the model computes on the CPU, and its bytes go to the virtual GPU in the order of the libraries' code.)

# %% [markdown]
# ## Compare
#
# ### Did we load the model?
#
# Here are the logits beside those of FP32. They differ a little from machine to machine, so the check of this notebook does not compare this table. What must hold everywhere is asserted.

# %% tags=["nbval-ignore-output", "hide-input"]
exact = logits["fp32, .to()"]
LIMITS = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05, "int8": 0.1, "nf4": 0.6}
checks = {}
for name, values in logits.items():
    off = values - exact
    spread = off.square().mean().sqrt() / exact.std()
    limit = LIMITS.get(name.split(",")[0].removesuffix(" double"), 0.7)
    checks[name] = (off.abs().max().item(), spread.item(), limit)
display(
    table(
        ["loaded as", "largest difference", "RMS, relative to FP32's"],
        [(k, f"{a:.4f}", f"{b:.4f}") for k, (a, b, _) in checks.items()],
    )
)
assert all(spread < limit for _, spread, limit in checks.values()), checks

# %% [markdown]
# Two bytes change next to nothing. INT8 is close. Four bits move the logits by a good part of their spread. These weights are random; [Quality against precision](09_quality_vs_precision.ipynb) measures what four bits do to trained ones.

# %% [markdown]
# ### Prediction, measurement, article

# %% tags=["hide-input"]
ARTICLE = {"fp32": "3.21", "fp16": "1.60", "int8": "0.89"}
table(
    [
        "precision",
        "predicted (B)",
        "this GPU (B)",
        "off by (B)",
        "accelerate (B)",
        "article (GB)",
    ],
    [
        (
            precision,
            n,
            rows[precision].total,
            rows[precision].total - n,
            estimator[precision],
            ARTICLE.get(precision, ""),
        )
        for precision, n in predicted.items()
    ],
)

# %% [markdown]
# *Predicted* is right to the byte for FP32, FP16, BF16 and INT8 loaded with `device_map`. The 4-bit rows are off, and the article's figures are all higher. Each of these has a reason.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars of the bytes of gpt2-large after loading, by kind. FP32 takes about 3.1 GB, FP16 and BF16 half of it, INT8 0.84 GB, and the 4-bit formats a little over 0.5 GB, of which scales and rounding are visible parts."}, "figure": {"classes": "first", "name": "gpt2-large-loaded", "caption": "gpt2-large after loading, in every precision and in two ways."}}
figure = stacked_bars(
    {
        "loaded by .to()": {
            precision: rows[f"{precision}, .to()"]
            for precision in ("fp32", "fp16")
        },
        "loaded by device_map": {k: rows[k] for k in predicted},
    }
)

# %% [markdown]
# ### One model, two ways, two figures

# %% tags=["hide-input"]
moved, mapped = rows["fp32, .to()"], rows["fp32"]
matrices = 2 * model_sizes.num_hidden_layers
embedding = 4 * model_sizes.vocab_size * model_sizes.hidden_size
not_split = matrices * MiB + (-embedding) % (2 * MiB)
print(f".to():      {moved.total:,} B")
print(f"device_map: {mapped.total:,} B")
print(f"difference: {moved.total - mapped.total:,} B")
print(f"predicted:  {not_split:,} B")

# %% [markdown]
# With `.to()`, each of the 72 MLP matrices, of exactly 25 MiB, gets a segment of 26 MiB ({numref}`segments-by-to`). PyTorch splits a large block only if more than 1 MiB remains, so the last MiB stays with the matrix. The embedding keeps the end of its segment in the same way.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Segments of the card after loading in FP32 by .to(). 72 segments of 26 MiB each hold one matrix of 25 MiB and one MiB that was not split off. Others of 20 MiB hold attention matrices. One of 246 MiB holds the embedding."}, "figure": {"name": "segments-by-to", "caption": "What the allocator holds after loading in FP32 with .to()."}}
figure = segments(drawn["fp32, .to()"])

# %% [markdown]
# With `device_map`, transformers first reserves one block as large as all parameters and gives it back. All large tensors are then cut from a single segment, and nothing is left over ({numref}`segments-by-device-map`).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Segments of the card after loading in FP32 by device_map: one segment of 2954 MiB is filled by the large tensors with no bytes added, and two small segments of 2 MiB hold biases and norms."}, "figure": {"name": "segments-by-device-map", "caption": "What the allocator holds after loading in FP32 with device_map."}}
figure = segments(drawn["fp32"])

# %% [markdown]
# ### 3.21 GB
#
# The article's model also had 36 masks, and 36 single numbers that take 512 bytes each:

# %%
then = history["FP32, empty card"]
for kind in ("parameters", "buffers", "rounding"):
    print(f"{kind:12}{then[kind]:14,} B")
print(f"{'in all':12}{then.total:14,} B = {then.total / GB:.2f} GB")

# %% [markdown]
# The article prints 3.21 GB. Transformers has since dropped the stored masks: today it makes them when they are needed.

# %% [markdown]
# ### 0.89 GB is not a quarter
#
# A quarter of the FP32 bytes would be 0.77 GB. INT8 takes more, because not every number has one byte. With an FP32 checkpoint and no `dtype=`, the rest even stays in FP32:

# %% tags=["hide-input"]
kinds = {"matrices": parts["attention"] + parts["mlp"]}
norms_and_biases = sum(
    shape[0] for _, shape in estimate.shapes(model_sizes) if len(shape) == 1
)
biases = norms_and_biases - parts["norm"]
kinds["matrices"] -= biases
outputs = rows["int8"]["scales"] // 4
table(
    ["int8", "numbers", "dtype=float16 (B)", "no dtype (B)"],
    [
        ("matrices", n := kinds["matrices"], n, n),
        ("their scales", outputs, 4 * outputs, 4 * outputs),
        ("embeddings", n := parts["embedding"], 2 * n, 4 * n),
        ("norms, biases", n := norms_and_biases, 2 * n, 4 * n),
        (
            "predicted",
            "",
            predicted["int8"],
            estimate.parameter_bytes(model_sizes, "fp32", "int8"),
        ),
        (
            "this GPU",
            "",
            rows["int8"].total,
            rows["int8, no dtype"].total,
        ),
    ],
)

# %% [markdown]
# The reason is the embedding: 50,257 words of 1,280 numbers each, which bitsandbytes does not quantise. Larger models have relatively smaller embeddings, and come closer to a quarter.
#
# The 4-bit formats add two things. Their scales are an eighth of the weights that they serve, less with double quantisation:

# %% tags=["hide-input"]
table(
    ["loaded as", "parameters (B)", "scales (B)", "rounding (B)"],
    [
        (name, row["parameters"], row["scales"], row["rounding"])
        for name, row in rows.items()
        if row["scales"]
    ],
)

# %% [markdown]
# And their rounding is large. Each weight arrives on the card in FP16 and is quantised there, into a gap that earlier copies left. The FP16 copy goes, but what is left at the end of the gap, up to 1 MiB, stays with the block.
#
# The formula leaves out one more thing: each matrix has its own table of 16 levels, and with double quantisation another of 256 and an offset. Together that is every byte of the difference:

# %% tags=["hide-input"]
quantised = 4 * model_sizes.num_hidden_layers  # matrices
tables = {"nf4": 4 * 16, "fp4": 4 * 16, "nf4 double": 4 * (16 + 256 + 1)}
kept = {"nf4 double": 4 * 256}  # the one that stays in the process
table(
    ["precision", "rounding (B)", "tables (B)", "sum (B)", "difference (B)"],
    [
        (
            name,
            waste := rows[name]["rounding"],
            more := quantised * size + kept.get(name, 0),
            waste + more,
            rows[name].total - predicted[name],
        )
        for name, size in tables.items()
    ],
)

# %% [markdown]
# ### The two figures that stay open
#
# The article prints 1.60 and 0.89 GB for FP16 and INT8. With the buffers of 2024 and an empty card, the replay gives less. What else could have been on the card? We try FP32's segments, and workspaces that an earlier matrix product left behind.

# %% tags=["hide-input"]
workspace = cublas_workspace_size(CUBLAS_WORKSPACE)
buffers = 36 * (1024**2 + 512)  # with their rounding
totals = {name: row.total for name, row in history.items()}
totals["INT8, empty card"] = rows["int8"].total + buffers
for name in ("FP16, empty card", "INT8, empty card"):
    for count, word in ((1, "workspace"), (2, "workspaces")):
        totals[f"{name}, {count} {word}"] = totals[name] + count * workspace
table(
    ["history", "replayed (B)", "(GB)", "article, measured (GB)"],
    [
        (name, n, f"{n / GB:.2f}", ARTICLE[name[:4].lower()])
        for name, n in sorted(totals.items())
    ],
)

# %% [markdown]
# No single history gives both. One workspace would explain INT8, two would explain FP16, and FP32 is right without any. The article does not print the libraries' versions. We leave it open.

# %% [markdown]
# ### What `memory_allocated` does not count
#
# It counts the blocks that are handed out. The segments that PyTorch holds are larger. `nvidia-smi` shows these and the CUDA context, which takes 0.3 to 1.8 GB, depending on version and card.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show what is allocated and reserved, in bytes", "code_prompt_hide": "Hide what is allocated and reserved, in bytes"}
table(
    ["loaded as", "allocated (B)", "reserved (B)", "free inside (B)"],
    [
        (name, row.total, held := reserved[name], held - row.total)
        for name, row in rows.items()
    ],
)

# %% [markdown]
# ### Yesterday's arguments
#
# The article warns that `load_in_8bit=True` is deprecated and shows `BitsAndBytesConfig` instead. By now the old argument is an error:

# %%
try:
    AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
except TypeError as error:
    print(f"TypeError: {error}")

# %% [markdown]
# The new ones, for INT8 and for NF4:
#
# ```python
# BitsAndBytesConfig(load_in_8bit=True)
# BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
#                    bnb_4bit_use_double_quant=True)
# ```
#
# Pass `dtype=torch.float16` as well, for everything that is not quantised.

# %% [markdown]
# ### What an H200 measured
#
# The same loads were **measured** on a card with nothing else on it. The folded table has the allocated bytes, and how far the replay of that card is off.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show what the card measured, in bytes", "code_prompt_hide": "Hide what the card measured, in bytes"}
print(CARD)
LOADS = [f"load-gpt2-large-{p}-to" for p in ("fp32", "fp16", "bf16")]
LOADS += [
    f"load-gpt2-large-{p}-device_map"
    for p in ("fp32", "fp16", "bf16", "int8", "nf4", "nf4-double", "fp4")
]
table(COLUMNS, beside_replay(*LOADS))

# %% [markdown]
# ## What to remember
#
# - Loading takes parameters times bytes, and the rest can be named: buffers, scales, and what the allocator does not split off. The last depends on the **way of loading**.
# - INT8 is more than a quarter and NF4 more than an eighth: embeddings, norms and biases stay in 16 bits, and scales come on top.
# - Say `dtype=`. Without it, what is not quantised keeps the checkpoint's type.

# %% [markdown]
# ## Exercises
#
# **1.** How large would gpt2-large be in INT8 if the embedding were quantised as well, by rows? Predict it from the tables above.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
saved = parts["embedding"]  # one byte instead of two
added = 4 * (model_sizes.vocab_size + model_sizes.max_position_embeddings)
n = predicted["int8"] - saved + added
print(f"{n:,} B, {n / predicted['fp32']:.3f} of FP32")

# %% [markdown]
# **2.** The same formula for a model a hundred times larger, Llama-3.1-70B: how far is INT8 from a quarter of FP32 there?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for name in ("gpt2-large", "Llama-3.1-70B"):
    dims = estimate.dimensions(name)
    n = estimate.parameter_bytes(dims, "bf16", "int8")
    share = n / estimate.parameter_bytes(dims, "fp32")
    print(f"{name:14}{n:16,} B, {share:.3f} of FP32")

# %% [markdown]
# **3.** Why does FP16 by `.to()` waste nothing on this model, while FP32 does?
#
# <details><summary>Solution</summary>
#
# In FP16 an MLP matrix has 12.5 MiB and gets a segment of 14 MiB. 1.5 MiB remain: more than 1 MiB, so they are split off and stay free for others. In FP32 exactly 1 MiB remains, and that is not more than 1 MiB.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Qwen2](08_qwen2.ipynb) finds 200 MiB that an article could not account for, and converts a loaded model from one precision to another. [Conversion and hardware](17_conversion_and_hardware.ipynb) shows what INT8 and NF4 do to single numbers.
