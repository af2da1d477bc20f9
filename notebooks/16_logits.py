# %% [markdown]
# # The logits: when the loss costs more than the model
#
# **Why can the loss take more memory than the model?** A large vocabulary gives each token a long row of logits, and the loss holds them several times, partly in FP32. Computed in chunks, it holds one chunk at a time.
#
# After this chapter you can say what a vocabulary costs at the loss, see when it is your peak, and compute the same loss without it.
#
# - **Time:** 10 minutes to read, under a minute to run.
# - **Needs:** nothing. It runs on any machine, and nothing is downloaded. [Activations and peaks](05_activations_and_peaks.ipynb) explains what backward keeps.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import tomllib
import warnings

warnings.filterwarnings("ignore", "IProgress not found")

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from every_byte import VirtualGPU, estimate
from every_byte.units import GB, MiB
from helpers.environment import versions
from helpers.measured import RECORDS
from helpers.plots import timeline, use_book_style
from helpers.tables import table

use_book_style()
print(versions("torch", "transformers"))

# %% [markdown]
# A language model ends with a score for each word that could come next: its {term}`logits`. Llama 3 knows 128,256 words. So 8,192 tokens have a billion scores, about as many numbers as Llama-3.2-1B has parameters. And the loss holds several copies of them.
#
# {numref}`one-loss` is one loss of 8,192 tokens on a virtual GPU: the last layer of Llama-3.2-1B, transformers' loss and its backward.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "one-loss", "caption": "Allocated memory during one loss of 8,192 tokens, replayed. Dashed: the weights of all of Llama-3.2-1B."}, "image": {"alt": "Allocated memory during one loss of 8,192 tokens. The last layer stands at half a GB. Forward climbs in steps to 9 GB of activations, and backward begins with a tower of 13 GB. The whole model's weights, a dashed line at 2.5 GB, lie far below."}}
SIZES = estimate.dimensions("Llama-3.2-1B")
WORDS, WIDTH = SIZES.vocab_size, SIZES.hidden_size
WEIGHTS = estimate.parameter_bytes(SIZES, "bf16")


def with_transformers(hidden, head, target):
    return ForCausalLMLoss(
        head(hidden)[None], target[None], head.out_features
    )


def ends_of_model(device, tokens):
    """What the last layers get: hidden states, the head, the next words."""
    like = {"dtype": torch.bfloat16, "device": device}
    head = nn.Linear(WIDTH, WORDS, bias=False, **like)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True, **like)
    return hidden, head, torch.randint(WORDS, (tokens,), device=device)


with VirtualGPU() as gpu:
    hidden, head, target = ends_of_model(gpu.device, 8192)
    with gpu.record(head) as recorded:
        recorded.mark("forward")
        loss = with_transformers(hidden, head, target)
        recorded.mark("backward")
        loss.backward()
    del hidden, head, target, loss
figure = timeline(recorded)
line = figure.axes[0].axhline(WEIGHTS / GB, color="black", linestyle="--")

# %% [markdown]
# ## Predict
#
# With $T$ tokens and $V$ words there are $TV$ logits. In BF16 they take $2TV$ bytes. transformers first makes an FP32 copy, $4TV$. The loss keeps log-probabilities of the same size, $4TV$; the copy can go. At the start of backward their gradient comes, $4TV$, and from it the gradient of the logits, $4TV$. So at its worst the loss holds
#
# $$4TV + 4TV + 4TV = 12\,TV \text{ bytes},$$
#
# and two more for each logit if a variable still holds the model's output. Plain PyTorch on BF16 logits has the same three in BF16: $6\,TV$.
#
# ## Measure
#
# Four ways to write the same loss:


# %%
def plain(hidden, head, target):
    return cross_entropy(head(hidden), target)


def in_fp32(hidden, head, target):
    return cross_entropy(head(hidden).float(), target)


def kept_output(hidden, head, target):
    logits = head(hidden)
    with_output.append(logits)  # as outputs.logits is
    return ForCausalLMLoss(logits[None], target[None], WORDS)


with_output = []


# %%
def peak(loss, tokens):
    """Bytes that a loss and its backward take on top."""
    with VirtualGPU() as gpu:
        given = ends_of_model(gpu.device, tokens)
        before = gpu.memory_allocated()
        loss(*given).backward()
        with_output.clear()
        return gpu.max_memory_allocated() - before


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
LOSSES = {
    "transformers' loss": with_transformers,
    "the same, output kept": kept_output,
    "plain, of FP32 logits": in_fp32,
    "plain, of BF16 logits": plain,
}
rows = []
for name, loss in LOSSES.items():
    held = peak(loss, 8192)
    each = held / (8192 * WORDS)
    rows.append((name, held, f"{held / GB:.2f}", f"{each:.2f}"))
rows.append(("the model's weights", WEIGHTS, f"{WEIGHTS / GB:.2f}", ""))
table(["8,192 tokens", "peak, replayed (B)", "GB", "B for each logit"], rows)

# %% [markdown]
# ## Compare
#
# Twelve bytes, fourteen with the output kept, six in BF16: as predicted. The rest is cuBLAS's {term}`workspace` and the gradient of the hidden states. The loss of 8,192 tokens takes five times what the model's weights take.
#
# BF16 is the cheap way, not the good one: a log-probability then has a mantissa of 7 bits, about two digits. That is why transformers goes to FP32.
#
# ## The loss in chunks
#
# A loss is a mean over tokens, and no token needs another one's logits. So take 1,024 tokens at a time, and let a checkpoint make a chunk's logits again in backward instead of keeping them. Nothing else changes.


# %%
def of_chunk(hidden, head, target):
    logits = head(hidden).float()
    return cross_entropy(logits, target, reduction="sum")


def in_chunks(hidden, head, target, size=1024):
    total = 0
    for h, t in zip(hidden.split(size), target.split(size)):
        given = h, head, t
        total += checkpoint(of_chunk, *given, use_reentrant=False)
    return total / len(target)


# %% [markdown]
# The same number, and the same gradients? On the CPU, with real values:

# %%
torch.manual_seed(0)
hidden = torch.randn(64, 32, requires_grad=True)
head = nn.Linear(32, 500, bias=False)
target = torch.randint(500, (64,))
whole = in_fp32(hidden, head, target)
parts = in_chunks(hidden, head, target, size=16)
print(f"whole {whole:.4f}, in chunks {parts:.4f}")
torch.testing.assert_close(
    torch.autograd.grad(whole, (hidden, head.weight)),
    torch.autograd.grad(parts, (hidden, head.weight)),
)
print("gradients agree")

# %% [markdown]
# {numref}`loss-by-tokens` shows what the chunks save.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "loss-by-tokens", "caption": "Peak of the loss against the tokens in a batch, replayed. Dashed: the weights of all of Llama-3.2-1B."}, "image": {"alt": "Peak of the loss over tokens from 1,024 to 32,768. transformers' loss climbs on a straight line to 50 GB, plain BF16 to half of it. In chunks it stays at 2 GB, below the dashed line of the model's weights."}}
TOKENS = [1024, 4096, 8192, 16384, 32768]
figure, axes = plt.subplots()
for (label, loss), marker in zip(
    {
        "transformers' loss": with_transformers,
        "plain, BF16": plain,
        "in chunks of 1,024": in_chunks,
    }.items(),
    "os^",
):
    peaks = [peak(loss, tokens) / GB for tokens in TOKENS]
    axes.plot(TOKENS, peaks, marker=marker, label=label)
axes.axhline(WEIGHTS / GB, color="black", ls="--", label="all weights")
axes.set(xlabel="tokens in the batch", ylabel="peak of the loss (GB)")
axes.set_xticks(TOKENS[1:], [f"{tokens:,}" for tokens in TOKENS[1:]])
figure.legend(loc="outside lower center", ncols=2)
plt.show()

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
table(
    ["peak, replayed (B)", "8,192 tokens", "32,768 tokens"],
    [
        (name, peak(loss, 8192), peak(loss, 32768))
        for name, loss in (
            ("transformers' loss", with_transformers),
            ("in chunks of 1,024", in_chunks),
        )
    ],
)

# %% [markdown]
# In chunks the loss hardly depends on the number of tokens. It holds one chunk's 12 bytes per logit, and the head's gradient. The price is one more product for each chunk, the head's forward: a few per cent of a step.
#
# ## What fused kernels save
#
# Liger's `fused_linear_cross_entropy` does the same, chunk by chunk in kernels of its own, and computes the gradients in forward, so that nothing is made twice. Its authors measured plain and fused losses with a head of 4,096 × 128,256 {cite}`liger-benchmarks`; here is the largest size of each (tokens, or texts of 1,024 for GRPO):

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
# benchmark/data/all_benchmark_data.csv of Liger-Kernel at ead96b6, in MiB
FUSED = {
    "fused_linear_cross_entropy": 5794.6259765625,
    "fused_linear_jsd": 8711.75,
    "fused_linear_grpo_loss_token": 7792.94091796875,
}
SERIES = tomllib.loads((RECORDS / "liger.toml").read_text("utf-8"))["series"]
published = {series["kernel"]: series for series in reversed(SERIES)}
rows = []
for kernel, fused in FUSED.items():
    series = published[kernel]
    size, whole = series["sizes"][-1], series["printed"][-1]
    row = (f"{size:,}", f"{whole:,.0f}", f"{fused:,.0f}")
    rows.append((f"`{kernel}`", *row, f"{1 - fused / whole:.0%}"))
table(["loss", "of", "plain (MiB)", "fused (MiB)", "saved"], rows)

# %% [markdown]
# In the Trainer it is `use_liger_kernel=True`. Chunks of your own save about as much and need no kernel.
#
# ## Losses that hold several
#
# Distillation compares two models' logits, GRPO and DPO a policy's with a reference's. Each brings its own copies. Liger's benchmark has plain versions of such losses; here they are in our own code.


# %%
BF16 = torch.bfloat16


def randn(device, *shape, **options):
    like = {"dtype": BF16, "device": device}
    return torch.randn(shape, **like, **options)


def heads(device, count):
    like = {"bias": False, "dtype": BF16, "device": device}
    sizes = 4096, 128_256
    return [nn.Linear(*sizes, **like) for _ in range(count)]


# %%
def alone(device, words):
    """Cross entropy of FP32 logits that are there."""
    logits = torch.randn(16_384, words, device=device)
    logits.requires_grad_()
    target = torch.randint(words, (16_384,), device=device)
    return lambda: cross_entropy(logits, target).backward()


# %%
def with_head(device, tokens):
    head, other = heads(device, 2)  # the other way's, alive too
    x = randn(device, tokens, 4096, requires_grad=True)
    like = {"device": device}
    target = torch.randint(128_256, (tokens,), **like)

    def loss():
        cross_entropy(head(x), target).backward()
        return other

    return loss


# %% [markdown]
# **Distillation.** The Jensen-Shannon divergence of a student's words and a teacher's:


# %%
def divergence(log_q, log_p):
    log_p, log_q = log_p.float(), log_q.float()
    m = torch.lerp(torch.exp(log_p), torch.exp(log_q), 0.5)
    how = {"reduction": "batchmean", "log_target": True}
    one = 0.5 * kl_div(torch.log(m), log_p, **how)
    loss = one + 0.5 * kl_div(torch.log(m), log_q, **how)
    return loss.bfloat16()


# %%
def distillation(device, tokens):
    student, teacher, *others = heads(device, 4)
    for ours, theirs in zip((student, teacher), others):
        weight = randn(device, 128_256, 4096)
        ours.weight.data = theirs.weight.data = weight  # shared
    given = randn(device, tokens, 4096, requires_grad=True)
    told = randn(device, tokens, 4096)

    def loss():
        ours, theirs = student(given), teacher(told)
        log_q = log_softmax(ours / 1.0, dim=-1)
        log_p = log_softmax(theirs / 1.0, dim=-1)
        return divergence(log_q, log_p)

    return lambda: (loss().backward(), others)


# %% [markdown]
# **GRPO.** The log-probability of each chosen word, under the policy and under the reference:


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show what is made of them", "code_prompt_hide": "Hide what is made of them"}
def pick(log_probs, chosen):
    return log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def clipped_loss(ours, theirs, mask, gain):
    ratio = torch.exp(ours - ours.detach())
    clipped = torch.clamp(ratio, 0.8, 1.2)
    each = -torch.min(ratio * gain, clipped * gain)
    each = each + 0.1 * (torch.exp(theirs - ours) - (theirs - ours) - 1.0)
    return (each * mask).sum() / torch.clamp(mask.sum(), min=1.0)


# %%
def grpo_loss(x, told, policy, reference, chosen, *rest):
    logits = x @ policy.t()
    log_probs = log_softmax(logits.float(), dim=-1)
    ours = pick(log_probs, chosen)
    with torch.no_grad():
        other = told @ reference.t()
        others = log_softmax(other.float(), dim=-1)
        theirs = pick(others, chosen)
    return clipped_loss(ours, theirs, *rest)


# %% [markdown]
# Its names `logits`, `log_probs`, `other` and `others` live until it returns. In functions of their own, each goes as soon as it has been used:


# %%
def chosen_words(x, weight, chosen):
    logits = (x @ weight.t()).float()
    return pick(log_softmax(logits, dim=-1), chosen)


def tidy_loss(x, told, policy, reference, chosen, *rest):
    ours = chosen_words(x, policy, chosen)
    with torch.no_grad():
        theirs = chosen_words(told, reference, chosen)
    return clipped_loss(ours, theirs, *rest)


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show what it is given, and DPO", "code_prompt_hide": "Hide what it is given, and DPO"}
def grpo(device, batch, loss=grpo_loss):
    policy, reference, *others = heads(device, 4)
    x = randn(device, batch, 1024, 4096, requires_grad=True)
    chosen = torch.randint(128_256, (batch, 1024), device=device)
    mask = torch.ones(batch, 1024, device=device)
    gain = randn(device, batch).unsqueeze(1)
    told = randn(device, batch, 1024, 4096)
    given = (x, told, policy.weight, reference.weight, chosen, mask, gain)
    return lambda: (loss(*given).backward(), others)


def tidy(device, batch):
    return grpo(device, batch, tidy_loss)


def dpo(device, pairs):
    policy, reference = (head.weight for head in heads(device, 2))
    x = randn(device, 2 * pairs, 1024, 4096, requires_grad=True)
    told = randn(device, 2 * pairs, 1024, 4096)
    chosen = torch.randint(128_256, (2 * pairs, 1024), device=device)

    def loss():
        ours = chosen_words(x, policy, chosen).sum(-1)
        with torch.no_grad():
            theirs = chosen_words(told, reference, chosen).sum(-1)
        gained = (ours - theirs).view(2, -1)
        return -nn.functional.logsigmoid(0.1 * (gained[0] - gained[1])).mean()

    return lambda: loss().backward()


def replayed(program, size, series):
    """The peak of a call, once gradients are there: MiB in FP32, as printed."""
    card, version = series["card"], series["torch"]
    with VirtualGPU(card, capacity=1 << 50, torch=version) as gpu:
        call = program(gpu.device, size)
        for _ in range(3):
            gpu.reset_peak_memory_stats()
            call()
            highest = gpu.max_memory_allocated()
        return torch.tensor(highest / MiB, dtype=torch.float32).item()


# %% [markdown]
# What Liger's benchmark printed, on an A100 and an H100, and our replay of the same:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
PROGRAMS = {
    "cross_entropy": ("cross entropy, words", alone),
    "fused_linear_cross_entropy": (
        "head and cross entropy, tokens",
        with_head,
    ),
    "fused_linear_jsd": ("two heads and JSD, tokens", distillation),
    "fused_linear_grpo_loss_token": ("GRPO, texts of 1,024", grpo),
}
rows, apart = [], []
for kernel, (name, program) in PROGRAMS.items():
    series = published[kernel]
    for size, printed in zip(series["sizes"], series["printed"]):
        ours = replayed(program, size, series)
        apart.append(ours - printed)
        row = (
            f"{name}: {size:,}",
            f"{printed:,}",
            f"{ours:,}",
            f"{apart[-1]}",
        )
        rows.append(row)
table(["loss", "published (MiB)", "replayed (MiB)", "difference"], rows)

# %%
equal = apart.count(0)
print(f"{equal} of {len(apart)} equal to the last digit")

# %% [markdown]
# Two rows of distillation differ, by less than 0.1 %. What the allocator gives for a large request depends on which blocks are free at the moment, and so on everything that the process did before.
#
# How many copies is that? The bytes that each further token adds, divided by its 128,256 words:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
A100 = published["fused_linear_cross_entropy"]
rows = []
for name, program, sizes, tokens in (
    ("head and cross entropy, BF16", with_head, (16384, 32768), 16384),
    ("GRPO", grpo, (8, 16), 8192),
    ("GRPO, tidied", tidy, (8, 16), 8192),
    ("DPO, pairs of 1,024 tokens each", dpo, (4, 8), 8192),
    ("distillation by JSD", distillation, (4096, 8192), 4096),
):
    less, more = (replayed(program, size, A100) for size in sizes)
    each = (more - less) * MiB / (tokens * 128_256)
    rows.append((name, f"{each:.1f}", f"{each / 2:.0f}"))
table(["loss", "B for each logit", "as copies in BF16"], rows)

# %% [markdown]
# Tidying up alone saves a quarter of GRPO's copies. Distillation is the worst by far: it holds two models' logits, log-probabilities and exponentials, their mean, its logarithm, and gradients of them. Each of these losses can be computed in chunks as well: trl and Liger do it.

# %% [markdown]
# ## What to remember
#
# - At its worst the loss holds $12\,TV$ bytes in transformers, $6\,TV$ in plain BF16: for 8,192 tokens and 128,256 words 12.6 GB, five times the weights of a 1B.
# - A loss is a mean over tokens: in chunks, or in a fused kernel, it takes 2 GB instead, for one more product.
# - GRPO, DPO and distillation hold several copies. Look at the line of your peak before you look at the model.

# %% [markdown]
# ## Exercises
#
# **1.** Which size of a chunk is best? Predict the peak for chunks of 64, 256, 1,024 and 4,096 of 8,192 tokens, then replay.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for size in (64, 256, 1024, 4096):
    held = peak(lambda *given, size=size: in_chunks(*given, size), 8192)
    print(f"{size:5,}: {held / GB:5.2f} GB")

# %% [markdown]
# <details><summary>Why does it stop falling?</summary>
#
# What remains has the head's size, 0.53 GB, three times: the gradient so far, what a chunk adds, and their sum. Below a few hundred tokens only time is lost.
#
# </details>
#
# **2.** From how many tokens on does transformers' loss take more than all weights of Llama-3.1-8B (16 GB in BF16)?
#
# <details><summary>Solution</summary>
#
# $16.06 \cdot 10^9 / (12 \cdot 128{,}256) \approx 10{,}400$ tokens: a batch of 5 with 2,048 each.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Activations and peaks](05_activations_and_peaks.ipynb) shows where the other peaks are. [Troubleshooting](11_troubleshooting.ipynb) is for the message that you get. The [records](../book/records.md) have all the figures that others published, next to their replay.
