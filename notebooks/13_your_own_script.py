# %% [markdown]
# # Your own script: will it fit, and at which line does it not?
#
# After this chapter you can run your own CUDA script on a card that you don't have, read what its memory is for, and keep it within a budget.
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
import textwrap
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
# Here is a script as many people have it: a model of transformers, its `Trainer`, nothing said about a device. It takes the GPU that it finds.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
def write(name, text):
    Path(name).write_text(textwrap.dedent(text).lstrip())


# %%
write(
    "finetune.py",
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers import Trainer, TrainingArguments

    model = GPT2LMHeadModel(GPT2Config())
    texts = torch.randint(0, 50257, (64, 512))
    data = [{"input_ids": text, "labels": text} for text in texts]
    options = TrainingArguments(
        "out",
        per_device_train_batch_size=8,
        optim="adamw_torch",
        max_steps=50,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, options, train_dataset=data).train()
    """,
)

# %% [markdown]
# **Predict:** gpt2 has 124 million parameters, 0.5 GB. Does this training fit on an RTX 3060 of 12 GB?
#
# `as_cuda` plays the card for everything inside. A `Watch` looks on, and ends the script after three steps of its optimizer: memory repeats itself from then on.

# %% mystnb={"image": {"alt": "Allocated memory during three training steps of gpt2 with the Trainer, stacked by kind. Each step is a hill of activations, steep at the end of forward where the logits are, on a floor of parameters, to which the first step adds gradients and optimizer states. The second and third hill are alike."}}
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
# Three hills of activations on a floor of parameters, gradients and states. The second hill is as high as the third: what you see here goes on for the rest of the training.
#
# The same in words, as the command prints it. In a terminal it is one line, and the script stays as it is:
#
# ```
# every-byte run finetune.py --card "RTX 3060"
# ```

# %%
print(Report.of(watch))

# %% [markdown]
# Read it from the top. *Does it fit?* On this card, and on those named next. *Where is the peak?* In backward, at a line of **this** script, with what held it. *What is left after each step?* The last two numbers are the same: nothing leaks.

# %% [markdown]
# ## A training with a leak
#
# The second script trains a network of torchvision and keeps a history, for a plot. Can you see what is wrong with it?

# %%
write(
    "classify.py",
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torchvision.models import vit_b_16

    model = vit_b_16().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    history = []
    for step in range(1000):
        images = torch.randn(32, 3, 224, 224).to("cuda")
        labels = torch.randint(0, 1000, (32,)).to("cuda")
        outputs = model(images)
        loss = cross_entropy(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((outputs, loss))
        print(f"step {step}")
    """,
)


# %%
def run(command):
    with redirect_stderr(io.StringIO()):  # progress
        status = main(["run", *command])
    print(f"exit status {status}")


run(["classify.py", "--card", "RTX 4090", "--steps", "4"])

# %% [markdown]
# The script's own output comes first: three steps, and the fourth ends it. Then the report says it: each step leaves the outputs and the loss behind, and names both the line that made them and the list that **keeps them alive**. `outputs` and `loss` are tensors on the GPU, and a list that holds them holds their memory. That is little here. With an autograd graph behind it, it can be gigabytes. The cure is `history.append(loss.item())`, or `.detach().cpu()`.

# %% [markdown]
# ## A generation
#
# The third script trains nothing. It runs to its end.

# %%
write(
    "generate.py",
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=6)).half().cuda().eval()
    prompt = torch.randint(3, 50257, (16, 512), device="cuda")
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    print("tokens", tuple(tokens.shape))
    """,
)
run(["generate.py", "--card", "RTX 4060"])

# %% [markdown]
# Is the KV cache the largest part? It is among the activations, since PyTorch does not tell it apart: $2 \times 6$ layers $\times 16 \times 519 \times 768$ numbers of 2 bytes, 0.15 GB.
#
# At the end stand the values that nobody computed. A virtual card knows shapes, and whole numbers that come from the host, but no weights. So nobody knows the scores that choose the tokens: each place that looks at them is listed, with what was assumed. The text ends by its length, which is the longest that it can be. If a program *decides* by such a value, you know where to look.

# %% [markdown]
# ## What would help?
#
# With `--levers` the command runs the script again, with one thing changed each time, and says what each saves: a fused optimizer, gradient checkpointing, half the batch, `zero_grad(set_to_none=True)`, SDPA instead of eager attention, `no_grad` where nobody asks for gradients, expandable segments. It only tries what applies to your script, and guesses nothing. `--lever NAME` runs it with one of them, to look at that report:

# %%
peaks = {"as it is": watch.peak}
for lever in ("half-batch", "checkpointing"):
    said = io.StringIO()
    with redirect_stderr(io.StringIO()), redirect_stdout(said):
        options = ["--card", "RTX 3060", "--lever", lever, "--json"]
        main(["run", "finetune.py", *options])
    peaks[lever] = json.loads(said.getvalue())["peak"]
table(
    ["finetune.py", "peak (B)", "saved (B)"],
    [(name, peak, watch.peak - peak) for name, peak in peaks.items()],
)

# %% [markdown]
# Either one saves about half of the peak here. Half the batch takes twice as many steps. Checkpointing keeps the batch, and computes forward twice.

# %% [markdown]
# ## A page to look at
#
# ```
# every-byte run finetune.py --card "RTX 3060" --report report.html
# ```
#
# writes one HTML file that needs no network: the timeline by kind, the card's limit, and at each point the line of your script, by pointer or arrow keys. `--snapshot memory.pickle` writes what [PyTorch's memory viewer](https://pytorch.org/memory_viz) opens. `-m` runs a module, `--gpus 8` is the first of eight processes that `torchrun` would start (DDP), and `--json` is for other programs. `every-byte run --help` has the rest.

# %% [markdown]
# ## A budget that your tests keep
#
# Where the package is installed, pytest has a fixture `virtual_gpu`. It makes "cuda" a virtual card while a test runs, on a machine without any:
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
# If someone doubles the batch, the test fails, with the phase and the line of the peak. `virtual_gpu_card` in pytest's configuration names a card for all tests, and `torch.cuda.max_memory_allocated()` answers in them as well.

# %% [markdown]
# ## What to remember
#
# - A script needs no change and no GPU to tell what it will allocate: `every-byte run script.py --card "RTX 4090"`.
# - The report names the peak's line and kinds, and what keeps alive what a step leaves behind.
# - What depends on values that nobody computed is listed. Everything else is replayed to the byte.

# %% [markdown]
# ## Exercises
#
# **1.** How much does the peak of `classify.py` fall with half the batch? Predict, then measure.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
write("half.py", Path("classify.py").read_text().replace("32", "16"))
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
# [Activations and peaks](05_activations_and_peaks.ipynb) explains why the peak is where it is, and what each lever costs. [Troubleshooting](11_troubleshooting.ipynb) has the message that you get where it does not fit. The [estimator](../book/estimator.md) answers before there is a script.
