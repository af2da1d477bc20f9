# %% [markdown]
# # Your own script: will it fit, and at which line does it not?
#
# **Will your script fit on a card that you don't have, and if not, which line is too much?** Run it there. `every-byte run` gives an unchanged CUDA script a virtual card, stops it after three steps, and names the peak, the line it falls on, and what filled the memory.
#
# After this chapter you can run your own script on any card, read the report, find a leak, and keep your code within a budget.
#
# - **Time:** 15 minutes to read, about a minute to run.
# - **Needs:** nothing. It runs on any machine, no GPU is used, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import io
import json
import logging
import os
import runpy
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# Progress bars and advice of libraries are not what this page is about.
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import transformers

from every_byte import as_cuda
from every_byte.cli import main
from every_byte.report import Report
from every_byte.units import GB
from every_byte.watch import EnoughSteps, Watch
from helpers.environment import versions
from helpers.plots import timeline, use_book_style
from helpers.tables import table

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
use_book_style()
folder = tempfile.TemporaryDirectory()
os.chdir(folder.name)  # what the scripts write goes there
print(versions("torch", "torchvision", "transformers"))

# %% [markdown]
# ## A fine-tuning with the Trainer
#
# Here is a script like many others. It trains gpt2 {cite}`radford2019` with the `Trainer` of transformers, and takes whatever GPU it finds.

# %%
FINETUNE = """\
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import Trainer, TrainingArguments

model = GPT2LMHeadModel(GPT2Config())
texts = torch.randint(0, 50257, (64, 512))
data = [{"input_ids": text, "labels": text} for text in texts]
options = TrainingArguments(
    "out", per_device_train_batch_size=8, max_steps=50,
    optim="adamw_torch", report_to=[], save_strategy="no",
    disable_tqdm=True)
Trainer(model, options, train_dataset=data).train()
"""

# %% [markdown]
# **Predict:** gpt2 has 124 million parameters, 0.498 GB in FP32. Will this training fit on an RTX 3060 with 12 GB?

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "image": {"alt": "Allocated memory during three training steps of gpt2 with the Trainer, stacked by kind. Each step is a hill of activations, steep at the end of forward where the logits are, on a floor of parameters, to which the first step adds gradients and optimizer states. The second and third hill are alike."}, "figure": {"name": "three-steps", "caption": "Allocated memory during three training steps of the script, by kind, replayed on an RTX 3060."}}
Path("finetune.py").write_text(FINETUNE)
with as_cuda("RTX 3060") as gpu, redirect_stderr(io.StringIO()):
    watch = Watch(gpu)
    try:
        with watch.watching():
            runpy.run_path("finetune.py", run_name="__main__")
    except EnoughSteps:
        pass

for index, place in enumerate(watch.timeline.where):
    if place.step and place.phase == "forward":
        watch.timeline.marks.setdefault(f"step {place.step + 1}", index)
figure = timeline(watch.timeline)

# %% [markdown]
# It fits. {numref}`three-steps` shows three hills of activations on a floor of parameters, gradients and states. The third hill is as high as the second, and the rest of the training would look the same. So three steps are enough, and the run ends there.
#
# In a terminal all of this is one line, and the script stays as it is:
#
# ```
# every-byte run finetune.py --card "RTX 3060"
# ```
#
# It prints:

# %%
print(Report.of(watch))

# %% [markdown]
# Read it from the top:
#
# - **Does it fit?** On this card, and on the others that it names.
# - **Where is the peak?** In backward, at a line of *your* script. Below it stands what filled the memory at that moment.
# - **What is left after each step?** The last two numbers are the same, so nothing leaks.

# %% [markdown]
# ## A training with a leak
#
# The second script trains a network of torchvision and keeps a history for a plot. Can you see what is wrong with it?

# %%
CLASSIFY = """\
import torch
from torch.nn.functional import cross_entropy
from torchvision.models import vit_b_16
model, history = vit_b_16().to("cuda"), []
optimizer = torch.optim.AdamW(model.parameters())
for step in range(1000):
    images = torch.randn(32, 3, 224, 224).to("cuda")
    labels = torch.randint(0, 1000, (32,)).to("cuda")
    outputs = model(images)
    loss = cross_entropy(outputs, labels)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    history.append((outputs, loss))
    print(f"step {step}")
"""


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
def run(name, script, *options):
    Path(name).write_text(script)
    with redirect_stderr(io.StringIO()):  # progress
        status = main(["run", name, *options])
    print(f"exit status {status}")


run("classify.py", CLASSIFY, "--card", "RTX 4090", "--steps", "4")

# %% [markdown]
# First comes what the script itself prints: three steps, and the fourth ends it. Then the report. Each step leaves the outputs and the loss behind. It names the line that made them and the list that **keeps them alive**.
#
# `outputs` and `loss` are tensors on the GPU, and a list that holds them holds their memory. Here that is little. If an autograd graph hangs on them, it can be gigabytes. The cure is `history.append(loss.item())`, or `.detach().cpu()`.

# %% [markdown]
# ## A generation
#
# The third script trains nothing, and runs to its end.

# %%
GENERATE = """\
import torch
from transformers import GPT2Config, GPT2LMHeadModel

model = GPT2LMHeadModel(GPT2Config(n_layer=6)).half().cuda().eval()
prompt = torch.randint(3, 50257, (16, 512), device="cuda")
tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
print("tokens", tuple(tokens.shape))
"""
run("generate.py", GENERATE, "--card", "RTX 4060")

# %% [markdown]
# How much of this is the KV cache? It is counted among the activations, because PyTorch does not tell the two apart: $2 \times 6$ layers $\times 16 \times 519 \times 768$ numbers of 2 bytes, 0.153 GB.
#
# The last lines list the values that were not computed. A virtual card knows shapes, and whole numbers that come from the host, but it has no weights. So it cannot know the scores that choose the tokens. The report names each place that looks at them, and what it assumed there. This text ends at the longest length that it can have. If your program *decides* something by such a value, you know where to look.

# %% [markdown]
# ## What would help?
#
# With `--levers` the command runs the script again, changes one thing each time, and says what each change saves. It tries a fused optimizer, gradient checkpointing, half the batch, `zero_grad(set_to_none=True)`, SDPA instead of eager attention, `no_grad` where nobody asks for gradients, and expandable segments. It only tries what applies to your script, and it guesses nothing.
#
# `--lever NAME` runs it with one of them. Here are two:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
peaks = {"as it is": watch.peak}
for lever in ("half-batch", "checkpointing"):
    said = io.StringIO()
    with redirect_stderr(io.StringIO()), redirect_stdout(said):
        options = ["--card", "RTX 3060", "--lever", lever, "--json"]
        main(["run", "finetune.py", *options])
    peaks[lever] = json.loads(said.getvalue())["peak"]
table(
    ["`finetune.py`", "peak (B)", "saved (B)"],
    [(name, peak, watch.peak - peak) for name, peak in peaks.items()],
)

# %% [markdown]
# Each saves 40 to 50 % of the peak. With half the batch you take twice as many steps. With checkpointing you keep the batch, and compute forward twice.

# %% [markdown]
# ## A page to look at
#
# ```
# every-byte run finetune.py --card "RTX 3060" --report report.html
# ```
#
# writes one HTML file that needs no network. It shows the timeline by kind with the card's limit, and the line of your script at each point: use the pointer or the arrow keys.
#
# - `--snapshot memory.pickle` writes a file for [PyTorch's memory viewer](https://pytorch.org/memory_viz).
# - `-m` runs a module.
# - `--gpus 8` plays the first of eight processes that `torchrun` would start, or that the script spawns itself (DDP, `fully_shard`). Name the script, not the launcher.
# - What stands after `--` is the script's own: `every-byte run train.py --card T4 -- --lr 3`.
# - `--json` is for other programs.
#
# `every-byte run --help` has the rest.

# %% [markdown]
# ## A budget that your tests keep
#
# Once the package is installed, pytest has a fixture `virtual_gpu`. While a test runs, it makes "cuda" a virtual card, even on a machine that has none:
#
# ```python
# import pytest
#
#
# @pytest.mark.virtual_gpu("RTX 4090")
# def test_a_step_stays_within_its_budget(virtual_gpu):
#     train(steps=2)  # your code, with device="cuda"
#     virtual_gpu.assert_max_memory_allocated(below=6 * 10**9)
# ```
#
# If someone doubles the batch, the test fails, and names the phase and the line of the peak. `virtual_gpu_card` in pytest's configuration sets a card for all tests. `torch.cuda.max_memory_allocated()` works in them, too.

# %% [markdown]
# ## What to remember
#
# - You don't have to change a script, or own the card, to learn what it will allocate: `every-byte run script.py --card "RTX 4090"`.
# - The report names the line of the peak and what filled it. If a step leaves something behind, it says what keeps that alive.
# - The report lists what depends on values that were not computed. Everything else is replayed to the byte.

# %% [markdown]
# ## Exercises
#
# **1.** How much does the peak of `classify.py` fall with half the batch? Predict, then measure.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
Path("half.py").write_text(CLASSIFY.replace("32", "16"))
with as_cuda("RTX 4090") as gpu:
    half = Watch(gpu, steps=4)
    try:
        with half.watching():
            runpy.run_path("half.py", run_name="__main__")
    except EnoughSteps:
        print(f"{half.peak / GB:.2f} GB with half the batch")

# %% [markdown]
# <details><summary>Why not half?</summary>
#
# Only the activations depend on the batch. Parameters, gradients and two states of each parameter stay.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Fine-tune an 8B model on 24 GB](14_fine_tune_8b.ipynb) takes a script that does not fit, and makes it fit. [Activations and peaks](05_activations_and_peaks.ipynb) explains why the peak is where it is, and what each lever costs. [Troubleshooting](11_troubleshooting.ipynb) starts from the error message. The [estimator](../book/estimator.md) answers before there is a script.
