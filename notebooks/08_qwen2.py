# %% [markdown]
# # Qwen2-0.5B: the missing 200 MiB
#
# **Why did a model take a fifth more memory than its parameters times bytes?** Each of its 24 layers kept the same tables of positions, 192 MiB of buffers that no parameter count shows. Today's transformers keeps none of them, and every byte of the gap can be named.
#
# After this chapter you can load a model in the precision you mean, convert it on the GPU, and account for a gap between theory and measurement, byte by byte.
#
# - **Time:** 20 minutes to read, about a minute to run.
# - **Needs:** 5 GB of memory and 1 GB of disk. A GPU is optional, and nothing is downloaded: the first run makes a checkpoint of random weights.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import gc
import itertools
import warnings

warnings.filterwarnings("ignore", "IProgress not found")

import torch
import transformers
from accelerate.utils import calculate_maximum_sizes
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)

from every_byte import VirtualGPU, estimate, open_gpu, untracked
from every_byte.units import GiB, MiB
from helpers import models
from helpers.environment import versions
from helpers.measured import CARD, COLUMNS, beside_replay
from helpers.plots import stacked_bars, timeline, use_book_style
from helpers.tables import table

use_book_style()
transformers.utils.logging.disable_progress_bar()
NAME = "Qwen2-0.5B"
WEIGHTS = "random"  # "hub" for the published ones, a download of 1 GB
folder = models.checkpoint(NAME, WEIGHTS)
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "accelerate", "bitsandbytes"))

# %% [markdown]
# This chapter works through a second article {cite}`qwen2-notes`. Its author loads Qwen2-0.5B-Instruct {cite}`qwen2` in FP16, multiplies parameters by bytes, measures, and finds a fifth more than the product. The article explains the gap by the framework and the GPU's cache. We find every byte of it: the buffers in {numref}`qwen2-then-and-now`.
#
# The weights here are random, in the published shapes and dtype: memory does not depend on values. `WEIGHTS = "hub"` in the set-up takes the published ones.
#
# The article begins with versions and hardware, and so do we:

# %% tags=["nbval-ignore-output", "hide-input"]
print("transformers version:", transformers.__version__)
print("torch version:", torch.__version__)
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        print(f"GPU {i}:", device.name)
        print("compute capability:", f"{device.major}.{device.minor}")
        print("memory (GiB):", round(device.total_memory / GiB, 1))
else:
    print("no GPU available: the figures are replayed")
assert torch.cuda.is_available() == (gpu.device.type == "cuda")

# %% [markdown]
# The article's lines say transformers 4.41.0, torch 2.1.1+cu118, and an RTX 4050 Laptop GPU of 6 GiB, compute capability 8.9.

# %% [markdown]
# ## Predict
#
# ### Which dtype is it?
#
# A model's `config.json` names the dtype that its weights were saved in. The article's copy says `float16`. The published one says `bfloat16`.

# %%
config = AutoConfig.from_pretrained(folder)
print("the loaded config says:", config.dtype)

# %% [markdown]
# Whether `from_pretrained` follows it depends on the version. Transformers 4 loaded everything in FP32, unless told `torch_dtype="auto"` or a dtype. Since transformers 5, `"auto"` is the default, and the argument is called `dtype`.


# %% tags=["hide-input"]
def loaded_as(**options):
    with untracked():  # on the host: no business of the GPU's
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return str(model.dtype), sum(p.nbytes for p in model.parameters())


table(
    ["from_pretrained with", "dtype", "parameters (B)"],
    [
        ("nothing", *loaded_as()),
        ('dtype="auto"', *loaded_as(dtype="auto")),
        ("dtype=torch.float16", *loaded_as(dtype=torch.float16)),
    ],
)

# %% [markdown]
# Code that once loaded FP32 by default now loads half of that. So name the dtype, and print it.

# %% [markdown]
# ### How many parameters?
#
# The article asks `num_parameters()`. We count the same model without its weights, then in a way that goes wrong, and then with accelerate's estimator.

# %% tags=["hide-input"]
with untracked():
    skeleton = models.build(NAME, "meta")
    N = skeleton.num_parameters()
    listed = sum(t.numel() for t in skeleton.state_dict().values())
    estimated, _ = calculate_maximum_sizes(skeleton)
    SHAPES = [p.shape for _, p in sorted(skeleton.named_parameters())]
    rotary = dict(skeleton.model.rotary_emb.named_buffers())
del skeleton

print(f"num_parameters():           {N:13,}")
print(f"sum over the state_dict:    {listed:13,}")
print(f"  more by the head:         {listed - N:13,}")
print(f"  vocabulary x width:       {151_936 * 896:13,}")
print(f"accelerate's estimator:     {estimated:13,} B")
print(f"  less 2 B a parameter:     {estimated - 2 * N:13,} B")

# %% [markdown]
# The output head *is* the embedding matrix, under a second name: the two are **tied**. If you count names instead of tensors, you add 28 %. Accelerate's estimator, called as a library, gets it right, and adds the buffers of today's rotary embedding. It does not know about rounding, or about anything that grows while the model runs.

# %% [markdown]
# ### Parameters times bytes

# %%
SIZES = estimate.dimensions(NAME)
WAYS = {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("bf16",)}
WAYS |= {"int8": ("fp16", "int8"), "nf4": ("fp16", "nf4")}
predicted = {
    name: estimate.parameter_bytes(SIZES, *way) for name, way in WAYS.items()
}
for name, nbytes in predicted.items():
    print(f"{name}: {nbytes:13,} B = {nbytes / GiB!r} GiB")

# %% [markdown]
# For FP16 the article prints the same digits, 0.9202077388763428, and calls them MB. Its code divides by 1024³, so they are GiB. For FP32 it prints them again: the factor 2 for FP16 was left in. FP32 takes 4 bytes.
#
# The two quantised rows store the matrices of the layers in 8 or 4 bits, with scales, and the rest in FP16.

# %% [markdown]
# ## Measure
#
# Each precision is loaded with `device_map`, as in the article, and computes once on eight tokens.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how a load is measured", "code_prompt_hide": "Hide how a load is measured"}
def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


def measure(precision):
    empty_card()
    model = models.load(NAME, precision, "device_map", WEIGHTS)
    held[precision] = gpu.breakdown(model)
    tokens = torch.arange(1_000, 1_008, device=model.device)[None]
    with torch.inference_mode():
        logits[precision] = model(tokens).logits.float().cpu()


held, logits = {}, {}
for precision in WAYS:
    measure(precision)

# %% tags=["hide-input"]
table(
    [
        "loaded in",
        "predicted (B)",
        "parameters, scales (B)",
        "memory_allocated() (B)",
        "in GiB",
    ],
    [
        (
            name,
            predicted[name],
            row["parameters"] + row["scales"],
            row.total,
            f"{row.total / GiB:.4f}",
        )
        for name, row in held.items()
    ],
)

# %% [markdown]
# With today's versions nothing is missing: theory and memory differ by kilobytes. (In NF4, the 168 tables of 16 levels add to that.) In FP16 the article measured **1.1154 GiB**. So something took 200 MiB then that takes nothing now.
#
# ### Does it compute?
#
# A figure for memory is worth nothing if the model is broken. So we compare the logits with those of FP32, by the largest and the root-mean-square difference. These differ a little from machine to machine.

# %% tags=["nbval-ignore-output", "hide-input"]
spread = logits["fp32"].std().item()
off = {name: values - logits["fp32"] for name, values in logits.items()}
rms = {n: d.square().mean().sqrt().item() for n, d in off.items()}
print(f"standard deviation of the logits: {spread:.3f}")
for name, d in off.items():
    print(f"{name}: at most {d.abs().max():.4f}, rms {rms[name]:.5f}")

assert rms["fp16"] < rms["bf16"] < rms["int8"] < rms["nf4"] < spread, rms

# %% [markdown]
# FP16 comes closest, BF16 follows, and each bit you remove costs some accuracy. [Conversion and hardware](17_conversion_and_hardware.ipynb) says why. With random weights this shows that each load works, not how well a quantised model answers.

# %% [markdown]
# ## Compare: the missing 200 MiB
#
# ### What was there in 2024
#
# Qwen2 marks positions by rotating queries and keys. The angles' cosines and sines come from a table. In transformers 4.41 **every layer** kept its own tables, for all 32,768 positions that the model allows, in the model's dtype {cite}`transformers-4-41`:
#
# $$24 \cdot 2 \cdot 32{,}768 \cdot 64 \cdot 2 \text{ bytes}$$
#
# These are layers, tables, positions, numbers for each, and bytes for each number.

# %%
LAYERS, POSITIONS = 24, 32_768
HEAD = SIZES.head_dim
tables = LAYERS * 2 * POSITIONS * HEAD * 2
frequencies = LAYERS * HEAD // 2 * 4
print(f"tables:      {tables:11,} B = {tables // MiB} MiB")
print(f"frequencies: {frequencies:11,} B, the FP32 buffers they come from")

# %% [markdown]
# The 24 copies are equal. They are buffers, not parameters, so no count of parameters sees them. They are not saved in the checkpoint, either.
#
# ### Replay
#
# We repeat that load, tensor by tensor: the parameters in the order of their names, then each layer's buffers. After each parameter, the accelerate of that time emptied PyTorch's cache {cite}`accelerate-0-30`. That will matter later.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the load", "code_prompt_hide": "Hide the load"}
def load_as_then(dtype, emptying=True):
    def on_the_card(*shape, dtype=dtype):
        made.append(torch.empty(shape, dtype=dtype, device=gpu.device))

    made = []
    with gpu.label("parameters"):
        for shape in SHAPES:
            on_the_card(*shape)
            if emptying:
                gpu.empty_cache()
    with gpu.label("buffers"):
        for _ in range(LAYERS):
            on_the_card(HEAD // 2, dtype=torch.float32)
            on_the_card(POSITIONS, HEAD)
            on_the_card(POSITIONS, HEAD)
    return made


# %%
empty_card()
model = load_as_then(torch.float16)
then = gpu.breakdown()
print(f"this GPU:          {then.total / GiB!r} GiB")
print("article, measured: 1.115407943725586 GiB")

# %% [markdown]
# Every printed digit agrees.
#
# ### Every byte by cause
#
# It contains two kinds of rounding. Small tensors are filled up to multiples of 512 bytes. And in a large block, a remainder of up to 1 MiB is not split off: it stays with the block {cite}`pytorch-allocator`.


# %% tags=["hide-input"]
def roundings(snapshot):
    """To multiples of 512 bytes; and rests that were not split off."""
    steps = rests = 0
    for block in (b for segment in snapshot for b in segment["blocks"]):
        if block["state"] == "active_allocated":
            asked = block["requested_size"]
            stepped = -(-asked // 512) * 512
            steps += stepped - asked
            rests += block["size"] - stepped
    return steps, rests


steps, rests = roundings(gpu.memory_snapshot())

# %% tags=["hide-input"]
PRINTED = int(1.115407943725586 * GiB)
CAUSES = {
    "the formula: 2 B a parameter": 2 * N,
    "cosines and sines, 24 x 2 tables": tables,
    "inverse frequencies, 24 x 32": frequencies,
    "rounding to 512 B": steps,
    "rests not split off": rests,
}
table(
    ["cause", "B", "MiB"],
    [(cause, n, f"{n / MiB:.3f}") for cause, n in CAUSES.items()]
    + [("in all", total := sum(CAUSES.values()), f"{total / MiB:.3f}")]
    + [("article, measured", PRINTED, f"{PRINTED / MiB:.3f}")]
    + [("difference", PRINTED - total, "")],
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two stacked bars of memory for Qwen2-0.5B in FP16. With transformers 4.41: 988.07 MB of parameters, 201.33 MB of buffers, about 8 MB of rounding. Today: the same parameters and nothing else that can be seen."}, "figure": {"classes": "first", "name": "qwen2-then-and-now", "caption": "Qwen2-0.5B after loading in FP16, with the transformers of 2024 and of today."}}
figure = stacked_bars(
    {"Qwen2-0.5B in FP16": {"transformers 4.41": then, "today": held["fp16"]}}
)

# %% [markdown]
# So it was neither the framework itself nor a cache: `memory_allocated()` counts tensors, not the CUDA context and not what the cache holds in reserve.
#
# ### Why it is gone
#
# Today the whole model has *one* rotary module. It keeps the inverse frequencies, twice, and computes cosines and sines in each forward pass, only for the positions that it needs. The remainders are gone, too: transformers reserves one block for all parameters before it loads them, and they are cut from it.

# %%
print("today:", {name: f"{b.nbytes} B" for name, b in rotary.items()})
print(f"in a forward pass of 6,144 tokens: {2 * 6_144 * HEAD * 2:,} B")

# %% [markdown]
# ## The FP32 figure and its history
#
# For FP32 the article prints 2.2383761405944824 GiB. Parameters and tables as above, at 4 bytes, come close. But this time the card was not empty: the FP16 model was alive while the new one was loaded. And the cells are numbered 1, 2, 3, 4, **6**. What was in cell 5?
#
# Which block a tensor gets depends on what was there before. So we replay several histories, each with and without accelerate's emptying of the cache.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the histories", "code_prompt_hide": "Hide the histories"}
def in_fp32_after(*earlier, emptying=True):
    empty_card()
    cells = {}
    for dtype in (*earlier, torch.float32):
        # The new model is complete before the old one goes.
        cells["model"] = load_as_then(dtype, emptying)
    return gpu.memory_allocated()


FP16, FP32 = torch.float16, torch.float32
HISTORIES = {
    "nothing": (),
    "FP16": (FP16,),
    "FP32": (FP32,),
    "FP16, FP32": (FP16, FP32),
}
PRINTED_FP32 = int(2.2383761405944824 * GiB)
model = None

# %% tags=["hide-input"]
off = {
    name: [
        in_fp32_after(*earlier, emptying=emptying) - PRINTED_FP32
        for emptying in (True, False)
    ]
    for name, earlier in HISTORIES.items()
}
table(
    ["loaded before", "off by (B)", "without emptying, off by (B)"],
    [(name, *misses) for name, misses in off.items()],
)

# %%
print(f"this GPU:          {in_fp32_after(FP16, FP32) / GiB!r} GiB")
print("article, measured: 2.2383761405944824 GiB")

# %% [markdown]
# One history gives the article's figure in every digit: FP16, then FP32, then **FP32 again**, with accelerate's emptying. So cell 5 was most likely the load of cell 6, run once before.
#
# That is a reconstruction, not a record. The article says neither what cell 5 was nor which accelerate it used, and an exact hit among several tries may be luck. Exercise 1 tries more, and no other fits.

# %% [markdown]
# ## Convert the loaded model
#
# The article's second question: how does a model change its precision? `model.half()`, `model.float()` and `model.to(dtype)` convert it where it is. Each parameter is converted, replaced, and the old one is freed, one after the other.
#
# ### Predict the peak
#
# So the peak lies at the parameter where the old and the new ones together are largest.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the prediction", "code_prompt_hide": "Hide the prediction"}
def converting(model, width):
    """Peak bytes: before each old tensor goes, the new one is there."""
    now = peak = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        new = parameter.numel() * width
        peak = max(peak, now + new)
        now += new - parameter.nbytes
    return peak


CONVERSIONS = {
    "float()": (4, lambda model: model.float()),
    "half()": (2, lambda model: model.half()),
    "to(bfloat16)": (2, lambda model: model.to(torch.bfloat16)),
}

# %% [markdown]
# ### Measure
#
# The model comes in the checkpoint's BF16, by `.to(device)`, and is converted three times.

# %% tags=["hide-input"]
with untracked():
    host = AutoModelForCausalLM.from_pretrained(folder)
weights = [p.data for p in host.parameters()]  # for later, on the host
empty_card()
model = host.to(gpu.device)

rows = [("as loaded", "", "", gpu.memory_allocated(), gpu.memory_reserved())]
with gpu.record(model) as recorded, gpu.label("parameters"):
    for name, (width, convert) in CONVERSIONS.items():
        expected = converting(model, width)
        gpu.reset_peak_memory_stats()
        recorded.mark(name)
        convert(model)
        peak = gpu.max_memory_allocated()
        after = gpu.memory_allocated(), gpu.memory_reserved()
        rows.append((name, expected, peak, *after))

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the peaks in bytes", "code_prompt_hide": "Hide the peaks in bytes"}
table(
    [
        "step",
        "peak, predicted (B)",
        "peak (B)",
        "allocated after (B)",
        "reserved after (B)",
    ],
    rows,
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Allocated memory while a loaded model is converted. From 1 GB in BF16 it rises to 2 GB during float(). At half() it jumps by the FP16 copy of the embedding, the peak of about 2.25 GB, then falls at once as the FP32 embedding goes, and on down to 1 GB. to(bfloat16) rises by the embedding for a moment and comes back to 1 GB."}, "figure": {"name": "conversions", "caption": "Allocated memory while a loaded model is converted three times."}}
figure = timeline(recorded)

# %% [markdown]
# `half()` frees **at once**, tensor by tensor: there are never two models ({numref}`conversions`). The peak over the old model is the first and largest tensor, the embedding. The peaks are higher than predicted because of rounding and 256 bytes of buffers.
#
# What is freed stays *reserved* by PyTorch's cache. That is what `nvidia-smi` still shows, until the cache is emptied:

# %%
before = gpu.memory_reserved()
gpu.empty_cache()
print(f"reserved: {before:,} B, emptied: {gpu.memory_reserved():,} B")
print(f"allocated: {gpu.memory_allocated():,} B")

# %% [markdown]
# Not all of it comes back: the new tensors lie scattered over the old segments, and only segments that are wholly free are returned. If you load in the precision you want in the first place, nothing more than needed is reserved.
#
# ### What conversion does to values
#
# From BF16 to FP32 nothing is lost. From BF16 to FP16 the range shrinks: numbers over 65,504 become infinite, tiny ones lose digits or become zero. A round trip shows how many. BF16 has only 65,536 patterns, so we try each, and count how often the weights hold it.

# %% tags=["hide-input"]
patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
numbers = patterns.view(torch.bfloat16)
there = numbers.half()
changed = there.bfloat16() != numbers
zeroed = (there == 0) & (numbers != 0)

counts = torch.zeros(2**16, dtype=torch.int64)
for weight in weights:
    bits = weight.flatten().view(torch.int16).int() + 2**15
    counts += torch.bincount(bits, minlength=2**16)
largest = numbers[counts > 0].float().abs().max().item()
weights = bits = None

print(f"changed by BF16 -> FP16 -> BF16: {counts[changed].sum() / N:.3%}")
print(f"became zero: {counts[zeroed].sum() / N:.4%}")
print(f"became infinite: {counts[there.isinf()].sum()}")
print(f"largest weight: {largest:.3f}, largest of FP16: 65,504")

# %% [markdown]
# Only weights under $2^{-17}$ change, by at most $2^{-25}$: nothing that a sum of hundreds would notice. Activations are larger than weights, and FP16 can overflow there where BF16 does not. [Number formats](02_precision_formats.ipynb) has the limits.
#
# ### What conversion does to buffers
#
# `from_pretrained(dtype=...)` leaves the rotary frequencies in FP32. `half()` does not: it converts **every** floating-point tensor, buffers too.

# %%
with untracked():
    asked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    before = asked.model.rotary_emb.inv_freq.dtype
    asked.half()
print("from_pretrained(dtype=torch.float16):", before)
print("half():", asked.model.rotary_emb.inv_freq.dtype)
asked = None

# %% [markdown]
# An angle is the distance of two tokens times a frequency. An error in the frequency grows with the distance. With Qwen2's published base of 1,000,000:

# %%
exact = 1_000_000.0 ** -(torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    error = exact.to(dtype).double() - exact
    for distance in (100, 30_720):
        angle = distance * error.abs().max().item()
        print(
            f"{dtype!s:14} {distance:6,} tokens apart: {angle:7.4f} rad off"
        )

# %% [markdown]
# A whole turn is 6.28 rad. Across a long text the converted frequencies point anywhere, and converting them to FP32 does not bring them back. So load in the precision you want, or leave such buffers out of the conversion.

# %% [markdown]
# ## What running it adds
#
# So far the model has only sat there. Qwen's own benchmark generates 2,048 tokens after inputs of several lengths, on an A100 with flash attention. Qwen published it with transformers 4.38 for Qwen2 {cite}`qwen2-speed`, and with 4.46 for Qwen2.5 {cite}`qwen25-speed`, which has the same sizes.
#
# Two things grow with the input:
#
# - the **KV cache**, in BF16: $2 \cdot 24 \cdot 2 \cdot 64 \cdot 2$ bytes for each token;
# - the **logits**, 151,936 for each token. The old version computed them for *all* positions of the input, and held them in BF16 and FP32 at once: 6 bytes for each.

# %% tags=["hide-input"]
LENGTHS = (1, 6_144, 14_336, 30_720)
table(
    ["input tokens", "KV cache (B)", "logits of all, 6 B each (B)"],
    [
        (
            n,
            estimate.kv_cache(SIZES, 1, n),
            6 * n * SIZES.vocab_size,
        )
        for n in LENGTHS
    ],
)

# %% [markdown]
# No small card holds that. So this section opens a virtual GPU of its own, wherever it runs: its figures are **replayed**. Attention is PyTorch's flash kernel, which makes no matrix of scores.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the forward pass", "code_prompt_hide": "Hide the forward pass"}
def fused(module, query, key, value, mask, scaling=None, **_):
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    result = flash(query, key, value, 0.0, True, scale=scaling)[0]
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register("fused", fused)
BF16_MODEL = models.config(NAME, attn_implementation="fused")


def forward(model, tokens, cache, all_logits):
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    states = model.model(ids, past_key_values=cache).last_hidden_state
    if all_logits:
        return model.lm_head(states).float()
    return model.lm_head(states[:, -1:])


# %% [markdown]
# The peak of a generation is either that of reading the input, or that of the last of the 2,048 tokens.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how the peak is found", "code_prompt_hide": "Hide how the peak is found"}
@torch.inference_mode()
def peak_of_generating(tokens, as_then):
    with VirtualGPU() as card:
        model = models.build(BF16_MODEL, card.device, torch.bfloat16)
        card.empty_cache()
        old = LAYERS * 2 if as_then else 0
        model.tables = torch.zeros(
            old, POSITIONS, HEAD, dtype=torch.bfloat16, device=card.device
        )
        card.reset_peak_memory_stats()
        cache = DynamicCache(config=model.config)
        forward(model, tokens, cache, as_then)
        reading = card.max_memory_allocated()
        forward(model, 2_046, cache, False)  # the tokens in between
        card.reset_peak_memory_stats()
        forward(model, 1, cache, as_then)
        return max(reading, card.max_memory_allocated())


# %% tags=["hide-input"]
QWEN2 = (1.17, 6.42, 13.48, 27.61)
QWEN25 = (0.97, 1.23, 1.60, 2.34)


def beside(published, as_then):
    for tokens, figure in zip(LENGTHS, published, strict=True):
        n = peak_of_generating(tokens, as_then) / GiB
        yield tokens, f"{figure:.2f}", f"{n:.3f}", f"{n - figure:+.3f}"


table(
    ["input", "Qwen2, measured", "replayed as then (GiB)", "off by"],
    beside(QWEN2, as_then=True),
)

# %% tags=["hide-input"]
table(
    ["input", "Qwen2.5, measured", "replayed as now (GiB)", "off by"],
    beside(QWEN25, as_then=False),
)

# %% [markdown]
# The long inputs come out within 0.01 GiB of Qwen's figures, although the two versions of transformers are up to twelve times apart. So we know the reason: the old version computed the logits of all positions, today's only of the last one (`logits_to_keep`). For one token 0.01 to 0.02 GiB are missing. The replay leaves out the code that picks each of the 2,048 tokens from its scores. That may be the cause: we did not check.
#
# What Qwen calls GB must be GiB: in GB no row would fit.

# %% [markdown]
# ### What an H200 measured
#
# The same loads were **measured** on a card with nothing else on it. The folded table has the allocated bytes, and how far the replay of that card is off.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show what the card measured, in bytes", "code_prompt_hide": "Hide what the card measured, in bytes"}
print(CARD)
LOADS = [f"load-Qwen2-0.5B-{p}-to" for p in ("fp32", "fp16", "bf16")]
LOADS += [
    f"load-Qwen2-0.5B-{p}-device_map"
    for p in ("fp32", "fp16", "bf16", "int8", "nf4", "nf4-double", "fp4")
]
table(COLUMNS, beside_replay(*LOADS))

# %% [markdown]
# ## What to remember
#
# - Parameters times bytes is exact for parameters. **Buffers** come on top, and no parameter count shows them: here 24 equal tables, 192 MiB.
# - Converting frees tensor by tensor. The peak is the old model and its largest tensor, and the cache keeps what is freed. `half()` also converts buffers that need FP32.
# - `dtype="auto"` is today's default. In a long context the weights are the small part: the old logits of 30,720 tokens took 28 times as much.

# %% [markdown]
# ## Exercises
#
# **1.** Try all histories of up to three earlier loads, in FP16 or FP32. How many give the article's FP32 figure?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
host = model = None
tried, hits = 0, []
for length in range(4):
    for earlier in itertools.product((FP16, FP32), repeat=length):
        tried += 1
        if in_fp32_after(*earlier) == PRINTED_FP32:
            hits.append([str(dtype) for dtype in earlier])
print(f"{tried} histories tried, these fit: {hits}")

# %% [markdown]
# **2.** A model of 70 billion parameters, FP32, is on a card. Its embedding comes first, and its head, as large and not tied, comes last: 128,256 × 8,192 numbers each. What is the peak of `half()`, and what of `float()` on the way back?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
with untracked():
    large = models.build("Llama-3.1-70B", "meta", torch.float32)
    whole = 4 * large.num_parameters()
    there = converting(large, 2)
    large.half()
    back = converting(large, 4)
print(f"in FP32: {whole / GiB:7.2f} GiB")
print(f"half():  {there / GiB:7.2f} GiB, at the embedding")
print(f"float(): {back / GiB:7.2f} GiB, at the head")

# %% [markdown]
# **3.** What would the 24 rotary tables take for a model of 131,072 positions, and what part of FP16's parameters would that be?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
longer = LAYERS * 2 * 131_072 * HEAD * 2
print(f"{longer:,} B = {longer / MiB:.0f} MiB, {longer / (2 * N):.0%}")

# %% [markdown]
# ## Where to go next
#
# [gpt2-large](07_gpt2_large.ipynb) looks at the quantised loads byte by byte. [Training and inference](03_training_and_inference.ipynb) has the formulas for the KV cache and for training.
