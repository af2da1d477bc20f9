# %% [markdown]
# # Fine-tune an 8B model on 24 GB
#
# **How do you fine-tune an 8B model on a card of 24 GB?** Trained as older scripts do it, Llama-3.1-8B takes 108 GB. Seven changes bring that down to 7.2 GB, and at the fourth, checkpointing, it fits.
#
# After this chapter you can take a fine-tuning that runs out of memory at its first step down to a card you have, and say what each change saves and what it costs.
#
# - **Time:** 15 minutes to read, under a minute to run.
# - **Needs:** nothing. It runs on any machine, no GPU is used, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes peft

import gc
import io
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# Progress bars and advice of libraries are not what this page is about.
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch
import transformers

from every_byte import as_cuda, estimate
from every_byte.data import cards
from every_byte.tracker import Breakdown
from every_byte.units import GB
from every_byte.watch import EnoughSteps, Watch
from helpers.environment import versions
from helpers.hollow import hollow
from helpers.measured import of_ladder
from helpers.plots import stacked_bars, use_book_style
from helpers.tables import table

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
use_book_style()
folder = tempfile.TemporaryDirectory()
os.chdir(folder.name)  # what the scripts write goes there
torch.set_num_threads(1)  # nothing here computes
gc.freeze()  # what is imported need not be looked through each time
print(versions("torch", "transformers", "bitsandbytes", "peft"))

# %% [markdown]
# You have one card of 24 GB, and this script. It trains all of Llama-3.1-8B {cite}`llama3` on four texts of 1,024 tokens at a time, with `"eager"` attention, which many older scripts ask for:

# %%
FULL = """
import torch
from transformers import AutoModelForCausalLM
from transformers import Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(
    "Llama-3.1-8B", dtype=torch.bfloat16,
    device_map="cuda", attn_implementation="eager")
texts = torch.randint(0, 128_256, (64, 1024))
data = [{"input_ids": x, "labels": x} for x in texts]
options = TrainingArguments(
    "out", per_device_train_batch_size=4, bf16=True,
    max_steps=2, save_strategy="no", report_to=[])
Trainer(model, options, train_dataset=data).train()
"""

# %% [markdown]
# It stops at its first step, out of memory. Seven changes bring it down to what a card of 12 GB holds. Here they are, each on top of those above it:


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the seven changes", "code_prompt_hide": "Hide the seven changes"}
FOUR_BITS = """four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
"""
LORA = """model = get_peft_model(model, LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
))
"""
IN_CHUNKS = """

def loss_of(hidden, words):
    scores = core.lm_head(hidden).float()
    return cross_entropy(scores, words, reduction="sum")


class InChunks(Trainer):
    def compute_loss(
        self, model, inputs, num_items_in_batch=None, **_
    ):
        tokens, words = inputs["input_ids"], inputs["labels"]
        hidden = core.model(tokens).last_hidden_state
        parts = zip(
            hidden[:, :-1].flatten(0, 1).split(512),
            words[:, 1:].flatten().split(512),
        )
        total = sum(
            checkpoint(loss_of, *part, use_reentrant=False)
            for part in parts
        )
        return total / num_items_in_batch


core = model.get_base_model()
InChunks("""

# What to change: a text, and what stands in its place.
CHANGES = {
    "full, eager attention": [],
    "SDPA": [(', attn_implementation="eager"', "")],
    "LoRA": [
        (
            "import torch\n",
            "import torch\nfrom peft import LoraConfig, get_peft_model\n",
        ),
        ("texts =", LORA + "texts ="),
    ],
    "weights in 4 bits": [
        (
            "import AutoModelForCausalLM",
            "import AutoModelForCausalLM, BitsAndBytesConfig",
        ),
        ("model = Auto", FOUR_BITS + "model = Auto"),
        ('"cuda")', '"cuda",\n    quantization_config=four_bits)'),
    ],
    "checkpointing": [
        ("bf16=True,", "bf16=True,\n    gradient_checkpointing=True,")
    ],
    "loss in chunks": [
        (
            "import torch\n",
            "import torch\nfrom torch.nn.functional import cross_entropy\n",
        ),
        (
            "import cross_entropy\n",
            "import cross_entropy\nfrom torch.utils.checkpoint import checkpoint\n",
        ),
        ("Trainer(model", IN_CHUNKS + "model"),
    ],
    "one text at a time": [
        ("batch_size=4,", "batch_size=1,\n    gradient_accumulation_steps=4,")
    ],
    "AdamW in 8 bits": [("bf16=True,", 'bf16=True, optim="adamw_bnb_8bit",')],
}
SCRIPTS, text = {}, FULL
for name, changes in CHANGES.items():
    for old, new in changes:
        before, found, after = text.rpartition(old)
        assert found, old
        text = before + new + after
    SCRIPTS[name] = text

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how they are replayed", "code_prompt_hide": "Hide how they are replayed"}
LLAMA, QWEN, LAST = "Llama-3.1-8B", "Qwen3-8B", "AdamW in 8 bits"
DEPTH = {LLAMA: 32, QWEN: 36}
WORDS = {LLAMA: "128_256", QWEN: "151_936"}
for model in DEPTH:
    for layers in (1, 2):
        hollow(model, f"{model}-{layers}", num_hidden_layers=layers)


def shorter(text):
    """Two texts show what four do: gradients are there when one comes."""
    return text.replace("accumulation_steps=4", "accumulation_steps=2")


# The last script with all layers, beside the rest: it takes the longest.
hollow(LLAMA)
Path("finetune.py").write_text(shorter(SCRIPTS[LAST]))
COMMAND = "run finetune.py --steps 2 --json --card"
whole = subprocess.Popen(
    [sys.executable, "-m", "every_byte", *COMMAND.split(), "RTX 4090"],
    env=os.environ | {"OMP_NUM_THREADS": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
)


def replay(text, layers, model=LLAMA, card="RTX 4090"):
    """Run a script for two steps, with so many of the model's layers."""
    text = text.replace(f'"{LLAMA}"', f'"{model}-{layers}"')
    text = text.replace(WORDS[LLAMA], WORDS[model])
    Path("script.py").write_text(shorter(text))
    quiet = io.StringIO()
    with redirect_stdout(quiet), redirect_stderr(quiet):
        with as_cuda(card, capacity=2**50) as gpu:
            watch = Watch(gpu, steps=2)
            try:
                with watch.watching():
                    runpy.run_path("script.py", run_name="__main__")
            except EnoughSteps:
                pass
    return watch.timeline.highest


def at_full_depth(text, model=LLAMA):
    """What 1 and 2 layers take, carried on to all: layers are alike."""
    one, two = (replay(text, layers, model) for layers in (1, 2))
    more = DEPTH[model] - 1
    return Breakdown({k: n + more * (two[k] - n) for k, n in one.items()})


# All weights trained, with checkpointing, one text at a time
BARE = SCRIPTS["SDPA"].replace(
    "batch_size=4, ", "batch_size=1, gradient_checkpointing=True,\n    "
)
OPTIMIZERS = {
    "AdamW, foreach": "adamw_torch",
    "AdamW, fused": "adamw_torch_fused",
    "AdamW in 8 bits": "adamw_bnb_8bit",
}
LADDER = {name: at_full_depth(text) for name, text in SCRIPTS.items()}
ALL_WEIGHTS = {
    name: at_full_depth(
        BARE.replace("bf16=True", f'bf16=True, optim="{optim}"')
    )
    for name, optim in OPTIMIZERS.items()
}

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "ladder-8b", "caption": "The peak of fine-tunings of Llama-3.1-8B, replayed, by kind. The dashed line is a card of 24 GB. Above, each bar has one change more than the one before."}, "image": {"alt": "Horizontal bars of the peak of fine-tunings of Llama-3.1-8B, stacked by kind, with a line for a card of 24 GB. Full fine-tuning with eager attention takes over 100 GB, with SDPA 81. LoRA removes the optimizer's states, weights in 4 bits two thirds of the parameters, and checkpointing most of the activations: with it the training is left of the line. The last three rungs are smaller still. Below, all weights trained with checkpointing: three bars of 80, 64 and 52 GB by optimizer, all far right of the line."}}
figure = stacked_bars(
    {
        "each on top of those above": LADDER,
        "all weights, checkpointing, one text": ALL_WEIGHTS,
    }
)
axes = figure.axes[0]
card, (bottom, top) = 24 * 2**30 / GB, axes.get_ylim()
parts = (bottom, 5.5), (4.5, top)  # not across checkpointing's figure
for part in parts:
    axes.plot((card, card), part, color="black", linestyle="--")
axes.set_ylim(bottom, top)
note = axes.text(card + 1, 7, "a card of 24 GB", va="center")

# %% [markdown]
# In {numref}`ladder-8b`, the rung that first fits is checkpointing.
#
# Read it from the top. A seventh of the first bar is the model. At the fourth rung the weights are small, and what is left is made of **activations**, which no adapter and no quantisation touches. That is why checkpointing is the rung that brings the training onto the card.
#
# The lower bars are for those who want to train all weights: no optimizer brings that onto a card of 24 GB.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
PRICE = {
    "SDPA": "none",
    "LoRA": "quality, where the task is far",
    "weights in 4 bits": "time, if tokens are few",
    "checkpointing": "20 to 56 % more time",
    "loss in chunks": "2 % of the arithmetic",
    "one text at a time": "time, more so in 4 bits",
    "AdamW in 8 bits": "none was found",
}
OF_QWEN = {name: at_full_depth(text, QWEN) for name, text in SCRIPTS.items()}
rows, before = [], None
for name, peak in LADDER.items():
    saved = "" if before is None else f"{(before - peak.total) / GB:.3g}"
    both = f"{peak.total / GB:.3g}", f"{OF_QWEN[name].total / GB:.3g}"
    rows.append((name, both[0], saved, both[1], PRICE.get(name, "")))
    before = peak.total
table(["rung", f"{LLAMA} (GB)", "saves", f"{QWEN} (GB)", "price"], rows)

# %% [markdown]
# Qwen3-8B needs a little more throughout: four more layers, and 151,936 words in place of 128,256. Each rung below says where its price comes from.

# %% [markdown]
# ## How it is replayed
#
# Each bar is the script above with the changes made, run for two steps on a virtual RTX 4090 without a bound. On your machine it is one line:
#
# ```
# every-byte run finetune.py --card "RTX 4090"
# ```
#
# The model comes from its configuration. Its checkpoint is **hollow**: 16 GB of zeros that take no space on the disk. What a weight takes doesn't depend on its value, and transformers, peft and bitsandbytes load it as they load the published one.
#
# All layers of these models are alike. So the figure replays one layer and two layers, and extends the difference to 32. Further down, the last rung is replayed at full depth, to see how well that works.

# %% [markdown]
# ## What each rung costs
#
# ### SDPA
#
# Eager attention writes the scores of all pairs of tokens: 0.27 GB in every layer in BF16. Backward keeps these, and the softmax's result in FP32. PyTorch's `scaled_dot_product_attention` computes them tile by tile, and again in backward ([Dao et al. 2022](https://arxiv.org/abs/2205.14135)). It is transformers' default: leave `attn_implementation` out.
#
# *The price:* none. It is faster, and exact except for rounding.
#
# ### LoRA
#
# ```python
# model = get_peft_model(model, LoraConfig(
#     r=16, lora_alpha=32,
#     target_modules="all-linear", task_type="CAUSAL_LM",
# ))
# ```
#
# The model's weights are frozen. Beside each matrix two thin ones are trained {cite}`hu2021`, 42 million numbers in place of 8 billion. So the gradients and AdamW's states go, 48 GB. The activations stay: the gradient still has to come down through every layer.
#
# *The price:* quality, where the task is far from what the model knows. On code and mathematics LoRA learned less than full fine-tuning, and forgot less ([Biderman et al. 2024](https://arxiv.org/abs/2405.09673)).

# %% [markdown]
# ### Weights in 4 bits
#
# ```python
# four_bits = BitsAndBytesConfig(
#     load_in_4bit=True, bnb_4bit_quant_type="nf4",
#     bnb_4bit_use_double_quant=True,
#     bnb_4bit_compute_dtype=torch.bfloat16,
# )
# ```
#
# This is QLoRA {cite}`dettmers2023`. The layers' matrices take half a byte for each weight, and a little for their scales. The embedding and the head stay in BF16: 2.1 GB of the 5.9.
#
# *The price:* time, since each product first turns its matrix back into BF16, forward and backward. One published comparison on an A100 says [39 % more](https://magazine.sebastianraschka.com/p/practical-tips-for-finetuning-llms); its two times, 1.85 and 2.79 hours, are 51 % apart. On our H100 it took nothing more with four texts at once, as the last section shows. Quality was that of 16 bits in the paper's experiments.

# %% [markdown]
# ### Checkpointing
#
# ```python
# TrainingArguments(..., gradient_checkpointing=True)
# ```
#
# Of each layer only the input is kept, and the rest is computed again in backward ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)).
#
# *The price:* one more forward pass. The paper measured 30 % more time. transformers' documentation said [about 20 %](https://huggingface.co/docs/transformers/v4.47.1/en/perf_train_gpu_one), and today gives no number. On our H100, on top of 4 bits, it was 56 %. The result is the same.

# %% [markdown]
# ### The loss in chunks
#
# Now the largest block is one that many people don't expect: the scores of 128,256 words for each of 4,096 tokens. They exist in BF16, in FP32, and once more as their gradient. In chunks of 512 tokens most of that goes. The script at the end does it in twenty lines; [Liger's kernels](https://github.com/linkedin/Liger-Kernel) do it on a real GPU with `use_liger_kernel=True`.
#
# *The price:* the head's product is computed twice. The head has 0.53 of 8.0 billion weights, so that is about 2 % of the arithmetic. The result is the same except for rounding.

# %% [markdown]
# ### One text at a time, shorter ones, packed ones
#
# ```python
# TrainingArguments(
#     ..., per_device_train_batch_size=1,
#     gradient_accumulation_steps=4,
# )
# ```
#
# The optimizer still sees the gradient of four texts. Activations are those of one.
#
# *The price:* time, since the card is busier with four. With weights in 4 bits it is more: our H100 took three times as long, for each text turns every matrix back once more.
#
# Memory goes by **tokens in a batch**, padding included. Shorter texts save, and the model learns from less. **Packing** saves the padding: transformers' `DataCollatorWithFlattening` puts short texts one after the other into one row, each with its own positions. Four texts of 256 tokens take what one of 1,024 takes:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
PACKED = SCRIPTS[LAST]
for old, new in (
    ("(64, 1024)", "(64, 256)"),
    ("batch_size=1", "batch_size=4"),
    ("import Trainer,", "import DataCollatorWithFlattening, Trainer,"),
    ("=data)", "=data,\n    data_collator=DataCollatorWithFlattening())"),
):
    assert old in PACKED, old
    PACKED = PACKED.replace(old, new)
for name, text in {"one": SCRIPTS[LAST], "packed": PACKED}.items():
    print(f"{name:7} {replay(text, 1).total:,} B with one layer")

# %% [markdown]
# ### The optimizer
#
# `optim="adamw_bnb_8bit"` keeps the two states in one byte each {cite}`dettmers2022optimizers`. LoRA has few of them, so it saves little here. Training all the weights needs many: see the lower bars of {numref}`ladder-8b`, and this.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
rows = [
    (f'`"{OPTIMIZERS[name]}"`', f"{peak.total / GB:.3g}")
    for name, peak in ALL_WEIGHTS.items()
]
eight = ALL_WEIGHTS["AdamW in 8 bits"]
least = eight.total - eight["optimizer states"]
paged = f"{least / GB:.3g} to {eight.total / GB:.3g}"
table(["`optim=`", "peak (GB)"], [*rows, ('`"paged_adamw_8bit"`', paged)])

# %% [markdown]
# - **Foreach** updates all tensors at once, and needs one more copy of all gradients for it. **Fused**, the Trainer's default, does without, and is no slower.
# - **8 bits** saves three quarters of the states, except for the embedding's: the Trainer keeps those in FP32, 4.2 GB of them. *The price:* none was found in the paper's experiments.
# - **Paged** states may leave the card for the host when memory is short {cite}`dettmers2023`. CUDA moves them, not PyTorch, so no replay can say how many: the table has the bounds. *The price:* time, whenever they move.

# %% [markdown]
# ## What does not help, or hurts
#
# Many QLoRA tutorials have one more line, `model = prepare_model_for_kbit_training(model)`. It turns on checkpointing, and casts all that is not quantised to FP32: norms, which are small, and embedding and head, which are not.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
PREPARED = SCRIPTS["checkpointing"].replace(
    "model = get_peft",
    "from peft import prepare_model_for_kbit_training\n"
    "model = prepare_model_for_kbit_training(model)\nmodel = get_peft",
)
plain, prepared = (
    replay(text, 1) for text in (SCRIPTS["checkpointing"], PREPARED)
)
for kind in ("parameters", "activations"):
    more = prepared[kind] - plain[kind]
    print(f"{kind:12} {more / GB:+.2f} GB")

# %% [markdown]
# The hidden states that come out of an FP32 embedding are FP32 as well. The rungs above do without that line, and lose nothing: the adapters are in FP32 anyway.
#
# **A smaller rank** saves little. At rank 16 the adapters and all that belongs to them take 0.7 GB.

# %% [markdown]
# ## The script to copy
#
# Here all seven changes are made. With your own texts in `data`, and the name as the hub has it, this is a fine-tuning of Llama-3.1-8B:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
print(SCRIPTS[LAST])

# %% [markdown]
# And this is what `every-byte run` says of it with all 32 layers, on a card of 24 GB:

# %%
told = json.loads(whole.communicate()[0])
carried_on = LADDER[LAST].total
context = cards()["RTX 4090"].context
held = told["reserved"]
print(f"fits               {told['fits']}")
print(f"at the peak        {told['peak'] / GB:6.3f} GB")
print(f"from 1 and 2 layers{carried_on / GB:6.3f} GB")
print(f"reserved           {held / GB:6.3f} GB")
print(f"with CUDA's context{(held + context) / GB:6.3f} GB")

# %% [markdown]
# The last line is what counts for a card. The allocator keeps some free blocks that nothing fits into.
#
# The [estimator](../book/estimator.md) gives an answer in the same terms before there is a script. It knows all of this but the loss in chunks, so we ask it for the rung before: <a href="../book/estimator.html#model=Llama-3.1-8B&amp;quantised=nf4+double&amp;rank=16&amp;checkpointing=1&amp;batch=4&amp;length=1024">the same state, filled in</a>.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
asked = estimate.Setup(
    dtype="bf16",
    quantised="nf4 double",
    rank=16,
    optimizer="adamw",
    implementation="fused",
    attention="sdpa",
    checkpointing=True,
    batch=4,
    length=1024,
)
told = estimate.memory(estimate.dimensions(LLAMA), asked).peak
replayed = LADDER["checkpointing"].total
print(f"estimated {told / GB:.3f} GB, replayed {replayed / GB:.3f} GB")

# %% [markdown]
# ## With 16, 12 or 8 GB
#
# The same rungs against smaller cards. What a card can give is less than its name says, since the driver keeps some. The figures are peaks with a CUDA context. "Tight" means that the peak fits, and that up to a seventh more, which the allocator may hold in pieces, does not.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
CARDS = {24: "RTX 4090", 16: "RTX 4080", 12: "RTX 3060", 8: "RTX 4060"}
SHORT = SCRIPTS[LAST].replace("(64, 1024)", "(64, 512)")
found = {name: peak.total for name, peak in LADDER.items()}
found["texts of 512 tokens"] = at_full_depth(SHORT).total
found["that rung, Qwen3-8B"] = OF_QWEN[LAST].total


def judged(peak, card):
    usable, context = cards()[card].usable, cards()[card].context
    if peak * 8 // 7 + context <= usable:
        return "fits"
    return "tight" if peak + context <= usable else "no"


table(
    ["rung", "needs (GB)", *(f"{size} GB" for size in CARDS)],
    [
        (
            name.replace("that rung", LAST),
            f"{(peak + context) / GB:.3g}",
            *(judged(peak, card) for card in CARDS.values()),
        )
        for name, peak in found.items()
    ],
)

# %% [markdown]
# If yours doesn't fit, take a smaller model before a smaller rank: half the parameters are half of everything here. A 3B or 4B model with this script is at home on 8 GB.

# %% [markdown]
# ## Checked against a real card
#
# We ran these scripts on an H100 with 80 GB: all 32 layers, random weights, five optimizer steps each. The replays are those of {numref}`ladder-8b`, from 1 and 2 layers and by an RTX 4090's rules.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
rows = []
for name, on_card in of_ladder().items():
    rung = name.removeprefix("all weights: ")
    peak = (LADDER if rung == name else ALL_WEIGHTS)[rung].total
    if "message" in on_card:
        rows.append((name, "out of memory", f"{peak / GB:.4g}", "", ""))
        continue
    off = f"{100 * (peak / on_card['peak'] - 1):+.1f} %"
    shown = (f"{n / GB:.4g}" for n in (on_card["peak"], peak))
    rows.append((name, *shown, off, f"{on_card['seconds']:.2f}"))
table(
    ["rung", "measured (GB)", "replayed (GB)", "off by", "s per step"],
    rows,
)

# %% [markdown]
# No peak is off by more than a hundredth. What differs is mostly cuBLAS's workspace: 67 MB on an H100, 17 MB on an RTX 4090. By the H100's own rules, at full depth and with the same versions of the libraries, `every-byte run` gives 7,281,765,888 B for the last rung. That is what the card printed.
#
# The last column is the price in time, measured on that card and for 4,096 tokens a step. Each rung is on top of those before it. **4 bits** took nothing more with four texts at once. **Checkpointing** then took 56 % more: the layers are computed once more, and their matrices turned back from 4 bits once more. With **one text at a time** the step became three times as long, for each product turns its whole matrix back into BF16, however few the tokens are.

# %% [markdown]
# ## What to remember
#
# - LoRA takes away gradients and states, 4 bits take away weights. What is left are activations and logits: checkpointing and a loss in chunks take those.
# - QLoRA of an 8B takes less than half of a 24 GB card. The rest is yours, for longer texts or more of them.
# - `prepare_model_for_kbit_training` costs 2 GB with these vocabularies.

# %% [markdown]
# ## Exercises
#
# **1.** How many gigabytes do the adapters of rank 16 take, with their gradients and AdamW's states, all in FP32? Predict it, then ask for rank 64.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for rank in (16, 64):
    n = estimate.lora_parameters(estimate.dimensions(LLAMA), rank)
    print(f"rank {rank}: {n:,} parameters, {16 * n / GB:.2f} GB")

# %% [markdown]
# **2.** Why does the batch matter so little at the last rungs?
#
# <details><summary>Solution</summary>
#
# With checkpointing a text of 1,024 tokens keeps 8 MB for each of 32 layers, 0.27 GB. The loss takes 512 tokens at a time, however many there are. Everything else is the model.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Serving](15_serving.ipynb) is about the model once it is trained. [Your own script](13_your_own_script.ipynb) has more of what `every-byte run` can tell, and [Activations and peaks](05_activations_and_peaks.ipynb) explains checkpointing from the inside.
