# %% [markdown]
# # Serving: how many users fit?
#
# **How many users can one card serve at a time?** It holds the weights once, and for each user a KV cache that grows with every token. Divide what the weights leave free by one user's cache, and you have their number.
#
# After this chapter you can say what a model server holds on a card, how many users it can answer at a time and at which length, and what would make room for more.
#
# - **Time:** 15 minutes to read, half a minute to run.
# - **Needs:** nothing. It runs on any machine, no GPU is used, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import logging
import os
import tempfile
import warnings
from dataclasses import replace

# Progress bars and advice of libraries are not what this page is about.
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import matplotlib.pyplot as plt
import torch
import transformers
from transformers import AutoModelForCausalLM

from every_byte import as_cuda, estimate
from every_byte.data import cards
from every_byte.estimate import Serving, dimensions, serve
from every_byte.units import GB, GiB
from helpers import workloads
from helpers.environment import versions
from helpers.hollow import hollow
from helpers.measured import CARD, of_workloads
from helpers.plots import COLORS, use_book_style
from helpers.tables import table

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
use_book_style()
folder = tempfile.TemporaryDirectory()
os.chdir(folder.name)
llama = dimensions("Llama-3.1-8B")
print(versions("torch", "transformers"))

# %% [markdown]
# You start vLLM with Llama-3.1-8B {cite}`llama3`, and `nvidia-smi` shows a full card, whatever its size. What fills it?

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "vllm-shares", "caption": "How vLLM shares a card out at its start, estimated, and how many users of 4,096 tokens that serves at a time."}, "image": {"alt": "Three stacked bars, each the whole memory of a card: 24, 80 and 141 GB. In each, the weights of Llama-3.1-8B take 16 GB, and what a step needs for the moment 1 to 5 GB. The rest, 4 GB of the first card, 55 of the second and 116 of the third, is KV cache."}}
PARTS = {
    "weights": ("weights", COLORS["parameters"]),
    "activations": ("a step's activations", COLORS["activations"]),
    "graphs": ("CUDA graphs, at most", COLORS["temporaries"]),
    "non_torch": ("outside PyTorch", COLORS["CUDA context"]),
    "kv_cache": ("KV cache", COLORS["KV cache"]),
}
SHOWN = {24: "RTX 4090", 80: "H100", 141: "H200"}
figure, axes = plt.subplots(figsize=(5.4, 2.6))
for row, card in enumerate(SHOWN.values()):
    served, left = serve(llama, Serving(), cards()[card]), 0
    for field, (label, color) in PARTS.items():
        n = getattr(served, field) / GB
        axes.barh(
            row, n, 0.7, left, color=color, label=label if not row else None
        )
        left += n
    axes.annotate(
        f"{served.users} users",
        (left, row),
        (4, 0),
        textcoords="offset points",
        va="center",
    )
axes.set_yticks(
    range(3), [f"{card}\n{size} GB" for size, card in SHOWN.items()]
)
axes.invert_yaxis()
axes.set_xlim(0, 165)
axes.set_xlabel("memory (GB)")
legend = figure.legend(loc="outside lower center", ncols=2)

# %% [markdown]
# {numref}`vllm-shares` shows three cards. Whatever weights and a step leave becomes cache, and the cache decides how many users there are.
#
# The weights are the same on each card. Everything that is left becomes **KV cache**: the keys and values of all the tokens that are being worked on. So a larger card doesn't run the same model better. It has room for more users, or longer texts.

# %% [markdown]
# ## What a user takes
#
# For each token, each layer keeps a key and a value for each of its key-value heads:
#
# $$\text{bytes per token} = 2 \cdot L \cdot k \cdot d \cdot \text{bytes}$$
#
# Llama-3.1-8B has $L = 32$ layers and $k = 8$ heads of $d = 128$ numbers. In BF16 a token takes $2 \cdot 32 \cdot 8 \cdot 128 \cdot 2 = 131{,}072$ bytes, and a user with 8,000 tokens takes 1 GB.
#
# Let us check. Here transformers' own `generate()` runs on a virtual RTX 4090, with all 32 layers of the model:

# %%
name = hollow("Llama-3.1-8B")
with as_cuda("RTX 4090") as gpu:
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, device_map="cuda"
    ).eval()
    loaded = gpu.memory_allocated()
    prompt = torch.zeros(2, 4000, dtype=int, device="cuda")
    answer = model.generate(
        prompt,
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    taken = gpu.memory_allocated() - loaded
    workspaces = gpu.breakdown(model)["workspaces"]
    peak = gpu.max_memory_allocated()

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
tokens = 2 * (4000 + 3)  # the last token is chosen, but nobody reads it
formula = estimate.kv_cache(llama, 2, 4003, "bf16")
print(f"weights                       {loaded / GB:6.3f} GB")
print(f"taken by {tokens:,} tokens        {taken / GB:6.3f} GB")
print(f"  of which cuBLAS's workspace {workspaces / GB:6.3f} GB")
print(f"KV cache by the formula       {formula / GB:6.3f} GB")
print(f"left: tokens, rounding        {taken - workspaces - formula:,} B")
print(f"at the peak                   {peak / GB:6.3f} GB")

# %% [markdown]
# The formula is the cache, to 0.3 %: the token numbers, and what the allocator rounds up. The peak is higher for a moment. It comes in **prefill**, when the whole prompt goes through each layer at once. Decoding takes one token at a time, and next to nothing beyond the cache.

# %% [markdown]
# ## Models with smaller caches
#
# The cache decides how many users there are, so architectures are built around it:
#
# - **Grouped heads** (GQA {cite}`ainslie2023`): several query heads share a key and a value. Llama-3.1-8B has 32 query heads and 8 key-value heads.
# - **Latent attention** (MLA): DeepSeek-V3 keeps one vector of 512 + 64 numbers per layer, from which all heads' keys and values are made ([DeepSeek-AI 2024](https://arxiv.org/abs/2412.19437)).
# - **Sliding windows**: in five of six layers Gemma 3 looks back 1,024 tokens only, and keeps no more ([Gemma Team 2025](https://arxiv.org/abs/2503.19786)).
# - **A quantised cache**: FP8 halves every number, whatever the architecture.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
LENGTHS = (4_096, 32_768, 131_072)
heads = replace(llama, num_key_value_heads=32)


def gemma_27b(n):
    """62 layers of 16 heads of 128, of which every sixth sees everything."""
    far = 62 // 6
    return 2 * 16 * 128 * 2 * (far * n + (62 - far) * min(n, 1024))


CACHES = {
    "Llama-3.1-8B, if no head were shared": lambda n: estimate.kv_cache(
        heads, 1, n
    ),
    "Llama-3.1-8B": lambda n: estimate.kv_cache(llama, 1, n),
    "Llama-3.1-8B, cache in FP8": lambda n: estimate.kv_cache(
        llama, 1, n, "fp8"
    ),
    "Gemma-3-27B, sliding windows": gemma_27b,
    "DeepSeek-V3 (671B), latent": lambda n: 61 * (512 + 64) * 2 * n,
}
table(
    ["one user's cache (GB)", *(f"{n:,} tokens" for n in LENGTHS)],
    [
        (name, *(f"{cache(n) / GB:.3g}" for n in LENGTHS))
        for name, cache in CACHES.items()
    ],
)

# %% [markdown]
# DeepSeek-V3 is eighty times the size of the 8B, and its cache is smaller. llama.cpp prints what it allocates, so this can be checked: for DeepSeek-R1, of the same architecture, with 32,768 tokens in its 8-bit format (34 bytes for 32 numbers), a user was told [1,166.62 MiB](https://github.com/ikawrakow/ik_llama.cpp/pull/259).

# %%
print(f"{61 * 576 * 32_768 * 34 / 32 / 2**20:.2f} MiB")

# %% [markdown]
# ## Pages, and what they waste
#
# transformers keeps one tensor for a batch: every text is as long as the longest. Servers before vLLM reserved the longest answer that could come. Only 20 to 38 % of that memory ever held a token ([Kwon et al. 2023](https://arxiv.org/abs/2309.06180)).
#
# vLLM hands the cache out in **blocks** of 16 tokens, as an operating system hands out pages. A user takes a new one when the last is full. Each user wastes the rest of one block, at most 15 tokens:

# %%
lengths = [100, 500, 900, 4000]  # four users
padded = len(lengths) * max(lengths)
paged = sum(-(-n // 16) * 16 for n in lengths)
used = sum(lengths)
for how, n in ("padded", padded), ("in blocks of 16", paged):
    print(f"{how:16} {n:6,} tokens, {1 - used / n:4.0%} wasted")

# %% [markdown]
# ## How many users?
#
# Take what vLLM may use, subtract the weights and what a step needs, and divide by what one user takes. `estimate.serve` does it as vLLM does at its start. The estimator says <a href="../book/estimator.html#task=inference&amp;model=Llama-3.1-8B&amp;dtype=bf16&amp;length=4096">the same</a> beside your model, and so does the command line:
#
# ```
# every-byte estimate Llama-3.1-8B --vllm --card "RTX 4090"
# ```

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "users-by-length", "caption": "Users at a time against the length of each, estimated. \"Both small\": weights in 4 bits, too. Above, each line ends at the most sequences that vLLM runs."}, "image": {"alt": "Users at a time against tokens of each, both axes logarithmic, for Llama-3.1-8B. All lines fall in proportion to the length until they end at the most sequences that vLLM runs. On an RTX 4090 a cache in FP8 is twice as many users as BF16, weights in 4 bits and an FP8 cache more than six times as many, and an H100 in BF16 is above all of them."}}
AT = [2**n for n in range(8, 18)]
LINES = {
    "RTX 4090": ("RTX 4090", {}, "-"),
    "RTX 4090, cache in FP8": ("RTX 4090", {"cache_dtype": "fp8"}, "--"),
    "RTX 4090, both small": (
        "RTX 4090",
        {"cache_dtype": "fp8", "quantised": "nf4"},
        "-.",
    ),
    "H100": ("H100", {}, ":"),
}
figure, axes = plt.subplots()
for (label, (card, given, line)), color in zip(
    LINES.items(), COLORS.values()
):
    given = [Serving(length=n, **given) for n in AT]
    users = [serve(llama, asked, cards()[card]).users for asked in given]
    users = [n or None for n in users]  # where it does not fit, no line
    axes.plot(AT, users, line, color=color, label=label)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(AT[::2], [f"{n:,}" for n in AT[::2]])
axes.set_xlabel("tokens of each user, prompt and answer")
note = axes.set_ylabel("users at a time")
legend = figure.legend(loc="outside lower center", ncols=2)

# %% [markdown]
# {numref}`users-by-length` says it for every length: half the bytes per token means twice the users.
#
# On the 24 GB card, 16 GB of weights leave 4 GB to the users. So there, 4-bit weights help more than a small cache, and both together most. On the H100 weights are a fifth of the card, and hardly matter.

# %% [markdown]
# ## Why vLLM takes the whole card
#
# At its start vLLM runs one step with as many tokens and users as it will ever take at a time, and looks at the peak. Then it reserves all that is left up to `gpu_memory_utilization` (0.92 by default in 2026, 0.9 before) for the cache, at once and for good. That is not a leak, and not what your users need now: it is what they may need. To leave room for another program, set that number lower.
#
# Its log says what it found. Beside it, the same by `estimate.serve`, in GiB as vLLM has them:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
# https://github.com/llm-d/llm-d-benchmark, config_explorer/empirical-vllm-memory-results.md,
# and https://github.com/vllm-project/vllm/issues/10517 (Llama-3.1-8B on an RTX 3090).
H100 = replace(cards()["H100"], available=int(79.18 * GiB))
RTX = replace(cards()["RTX 3090"], available=int(23.58 * GiB))
SHORT = {"sequences": 256, "batched_tokens": 29_000, "length": 29_000}
LOGS = [
    ("Llama-3.1-8B", H100, {}, 14.99, 51.38),
    ("Qwen3-0.6B", H100, {}, 1.12, 64.45),
    ("Qwen3-32B", H100, {}, 61.03, 4.45),
    ("Llama-3.1-8B", RTX, SHORT, 14.99, 2.89),
]
rows = []
for model, card, given, weights, cache in LOGS:
    asked = Serving(utilization=90, graphs=False, **given)
    ours = serve(dimensions(model), asked, card)
    on = "H100" if card is H100 else "RTX 3090"
    told = f"{ours.weights / GiB:.2f}", f"{ours.kv_cache / GiB:.2f}"
    rows.append(
        (f"{model}, {on}", f"{weights}", told[0], f"{cache}", told[1])
    )
table(["", "weights, logged", "ours", "KV cache, logged", "ours"], rows)

# %% [markdown]
# These versions did not subtract CUDA graphs in advance. Weights are counted. What a step takes is partly derived from vLLM's code, and partly fitted to logs of the H100; the last row was not among them. (A second log of that card, for 20,000 tokens at a time, says 3.81 where we say 3.88.)
#
# A model that nothing was fitted to is gemma-3-4b-it on a B200, whose [log](https://github.com/vllm-project/vllm/issues/21489) names each part. It also looks at images, so it is not in the estimator's list, but its sizes say enough:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
gemma = replace(
    llama,  # its language model has these sizes
    model_type="gemma3_text",
    vocab_size=262_208,
    hidden_size=2560,
    num_hidden_layers=34,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    intermediate_size=10_240,
    tie_word_embeddings=True,
)
ours = serve(gemma, Serving(), cards()["B200"])
IMAGES = 2 * 416_866_032  # SigLIP's tower, which looks at images, in BF16
PRINTED = {
    "weights": (8.58, ours.weights + IMAGES),
    "a step, at its peak": (9.96, ours.activations),
    "outside PyTorch": (0.07, ours.non_torch),
    "CUDA graphs": (0.65, ours.graphs),
}
table(
    ["gemma-3-4b-it, B200 (GiB)", "logged", "ours", "off by"],
    [
        (part, f"{gib}", f"{n / GiB:.2f}", f"{n / GiB - gib:+.2f}")
        for part, (gib, n) in PRINTED.items()
    ],
)

# %% [markdown]
# Its vocabulary of 262,208 words decides what a step takes, and the formula finds all but 4 % of that. It also misses 0.5 GiB of the weights; we don't know what they are. The graphs stay below the bound.
#
# **CUDA graphs** are recorded after that, one for each batch size. They keep buffers of their own, 0.1 to 1 GiB in logs. We have no formula for that, so `serve` takes the largest value seen. `--enforce-eager` does without, and is slower.

# %% [markdown]
# ## More than one GPU
#
# With **tensor parallelism** each GPU has a part of every matrix, and some of the key-value heads. Twice the GPUs have room for more than twice the users, because the GPUs share one copy of the weights:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
rows = []
for gpus in (1, 2, 4, 8):
    served = serve(
        dimensions("Llama-3.1-70B"), Serving(gpus=gpus), cards()["H100"]
    )
    weights, cache = served.weights / GB, served.kv_cache / GB
    rows.append((gpus, f"{weights:.3g}", f"{cache:.3g}", served.users))
table(
    [
        "H100s",
        "weights on each (GB)",
        "KV cache on each (GB)",
        "users of 4,096",
    ],
    rows,
)

# %% [markdown]
# One GPU cannot load the 70B, and two have no room left for a user. Beyond 8 GPUs its 8 key-value heads can no longer be split: then they are copied, and more GPUs no longer make the cache larger.

# %% [markdown]
# ## Mixtures of experts
#
# A mixture of experts has many MLPs in each layer and sends each token through a few of them. All of them have to be in memory, since the next token may choose others:

# %%
for name in ("Llama-3.1-8B", "Mixtral-8x7B-v0.1"):
    sizes = dimensions(name)
    n = sum(estimate.parameters(sizes).values())
    at_work = estimate.active_parameters(sizes)
    print(f"{name:18} {2 * n / GB:5.1f} GB", end=", ")
    print(f"at work {2 * at_work / GB:4.1f} GB")

# %% [markdown]
# It computes like a 13B and fills a card like a 47B. Its cache is that of its attention alone, 131,072 bytes for each token, as small as the 8B's.

# %% [markdown]
# ## A second model that guesses
#
# In **speculative decoding** a small model guesses some tokens, and the large one checks them all in one step ([Leviathan et al. 2023](https://arxiv.org/abs/2211.17192)). It is faster, and costs memory twice: for the small model's weights, and for its own cache of every token. With Llama-3.2-1B as the guesser:

# %%
draft = dimensions("Llama-3.2-1B")
for card in ("RTX 4090", "H100"):
    alone = serve(llama, Serving(), cards()[card])
    guesser = serve(draft, Serving(), cards()[card])
    left = alone.kv_cache - guesser.weights
    users = left // (4096 * (alone.token + guesser.token))
    print(f"{card:9} {alone.users:4} users", end=", ")
    print(f"with a guesser {users:4}")

# %% [markdown]
# ## Checked against published figures and a real card
#
# Without vLLM nothing is reserved ahead, so a peak shows what a user takes. Qwen [printed](https://qwen.readthedocs.io/en/v2.5/benchmark/speed_benchmark.html) it for Qwen2.5-0.5B in transformers: a prompt, then 2,048 tokens more, on an A100 with flash attention. Beside it, the estimate of the same:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
qwen = dimensions("Qwen2-0.5B")  # Qwen2.5-0.5B has the same sizes
PRINTED = {1: 0.97, 6_144: 1.23, 14_336: 1.60, 30_720: 2.34}


def moments(length):
    asked = estimate.Setup(
        task="inference", dtype="bf16", attention="flash", length=length
    )
    return dict(estimate.memory(qwen, asked, context=0).moments)


rows = []
for n, printed in PRINTED.items():
    peak = max(moments(n).values())  # while the prompt is read
    peak = max(peak, moments(n + 2048)["decoding"]) / GiB
    rows.append(
        (n, f"{printed:.2f}", f"{peak:.3f}", f"{peak - printed:+.3f}")
    )
table(["prompt", "printed (GiB)", "estimated", "off by"], rows)

# %% [markdown]
# All four are right to the last digit that was printed. (Qwen writes GB, and means GiB.) [Qwen2](08_qwen2.ipynb) replays them, with the older table beside it.
#
# We ran Llama-3.1-8B on an H200, in BF16 with transformers: a prompt of 4,096 tokens, then eight more. The same program, replayed by that card's rules:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
NAME = "llama8b-infer-bf16"
measured = of_workloads()[NAME]
again = workloads.replayed(NAME, "H200", "2.11", measured["left over"])
print(CARD)
table(
    [
        "checkpoint",
        "measured (B)",
        "off by (B)",
        "its peak (B)",
        "off by (B)",
    ],
    [
        (name, now, again[name][0] - now, peak, again[name][2] - peak)
        for name, (now, _, peak, _) in measured["checkpoints"].items()
    ],
)

# %% [markdown]
# The prompt's cache is the difference between *cache* and *loaded*, less one cuBLAS workspace: 536,870,912 bytes by the formula. In *prefill* this program asks for the scores of all 4,096 tokens, 1.05 GB. `generate()` and servers only ask for the last one's.

# %% [markdown]
# ## What to remember
#
# - A server holds weights, what a step needs while it runs, and KV cache. The cache is what users take: $2 \cdot L \cdot k \cdot d$ numbers for each token.
# - vLLM takes the whole card on purpose. Its log tells how many tokens that holds; divide by your users' length.
# - On a small card make the weights smaller, on a large one the cache.

# %% [markdown]
# ## Exercises
#
# **1.** Your users send 2,000 tokens and get 500. How many of them does Llama-3.1-8B serve at a time on an RTX 4090, with weights in 4 bits and the cache in FP8? Predict, then ask.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
asked = Serving(length=2_500, quantised="nf4", cache_dtype="fp8")
served = serve(llama, asked, cards()["RTX 4090"])
print(f"{served.users} users; the cache holds {served.tokens:,} tokens")

# %% [markdown]
# **2.** Why does doubling `max_num_seqs` make the cache smaller, though nobody has come yet?
#
# <details><summary>Solution</summary>
#
# vLLM profiles a step with that many sequences. For each of them it needs the scores of all 128,256 words while it chooses one, and that peak is taken off before the cache is made.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Training and inference](03_training_and_inference.ipynb) has the cache's formula step by step, [Qwen2](08_qwen2.ipynb) replays a published table of growing prompts. [Fine-tune an 8B](14_fine_tune_8b.ipynb) is where the model came from, and the [estimator](../book/estimator.md) answers for other models.
