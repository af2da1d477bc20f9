# %% [markdown]
# # One training step, every byte
#
# **How many bytes does one training step take, and what is each of them for?** With Adam a model holds four times the bytes of its parameters after a step: the parameters, their gradients and two states. During the step, PyTorch's default needs five times as many for a moment, and that peak is what must fit.
#
# After this chapter you can predict how many bytes a training step takes, and say what each is for.
#
# - **Time:** 15 minutes to read, under a minute to run.
# - **Needs:** nothing. A GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import gc

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

from every_byte import open_gpu
from every_byte.units import MB, mb
from every_byte.virtual.memory import CUBLAS_WORKSPACE, cublas_workspace_size
from helpers.environment import versions
from helpers.measured import CARD, COLUMNS, beside_replay, of_articles
from helpers.mlp import SimpleMLP
from helpers.mnist import mnist
from helpers.plots import loss_curves, stacked_bars, timeline, use_book_style
from helpers.tables import table

use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "torchvision"))

# %% [markdown]
# The first line above names the GPU of this page. With a real one, its figures are **measured**. Without one, they are **replayed**: PyTorch runs every operation for its shapes, and a model of its memory allocator counts the bytes. The same card and the same versions give the same figures.

# %% [markdown]
# ## The step, drawn
#
# A small network reads the digits of MNIST {cite}`lecun1998`, 128 at a time, and learns with Adam {cite}`kingma2015`. We record its first step, and sort the bytes by what they are for.

# %% tags=["hide-input"]
BATCH_SIZE = 128
train_loader = DataLoader(mnist(train=True), BATCH_SIZE, shuffle=True)
test_loader = DataLoader(mnist(train=False), BATCH_SIZE)
print("layers:", " -> ".join(str(width) for width in SimpleMLP.widths))

# %%
with gpu.device:
    model = SimpleMLP()
optimizer = optim.Adam(model.parameters(), lr=0.001)
data, target = (tensor.to(gpu.device) for tensor in next(iter(train_loader)))

with gpu.record(model, optimizer) as recorded:
    recorded.mark("forward")
    loss = nn.CrossEntropyLoss()(model(data), target)
    recorded.mark("backward")
    loss.backward()
    recorded.mark("optimizer")
    optimizer.step()
highest = gpu.max_memory_allocated()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Allocated memory during one training step with Adam, stacked by kind. Forward adds little to the parameters. Backward adds the gradients layer by layer. The optimizer's step adds two sets of states, then for a moment a temporary as large as all parameters: the peak, 1.04 GB, is five times the parameters."}, "figure": {"name": "adam-step", "classes": "first", "caption": "Allocated memory during the first training step with Adam, by kind. The peak lies in the optimizer."}}
figure = timeline(recorded)

# %% [markdown]
# {numref}`adam-step`, at the top of this page, shows the whole chapter. *Forward* barely adds anything: this model has few activations. *Backward* adds the gradients, from the last layer to the first. The *optimizer* adds its two states, and then for a moment something that no summary lists. The rest of this page predicts every one of these bytes, and then counts them.

# %% [markdown]
# ## The experiment
#
# This page repeats an experiment of the article that the book began with {cite}`hoperj2024`. It trains this network and prints the GPU's memory at three stages: the model **loaded**, one **training** step done, one **inference** done. Then it swaps the optimizer and looks again.
#
# We repeat it with three optimizers: plain SGD, SGD with momentum, and Adam.

# %%
OPTIMIZERS = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.001),
    "SGD with momentum": lambda parameters: optim.SGD(
        parameters, lr=0.001, momentum=0.9
    ),
    "Adam": lambda parameters: optim.Adam(parameters, lr=0.001),
}

# %% [markdown]
# ## Predict
#
# ### Parameters
#
# A linear layer from $m$ to $n$ units has $m \cdot n$ weights and $n$ biases. In FP32 each takes 4 bytes.

# %%
layers = list(zip(SimpleMLP.widths, SimpleMLP.widths[1:]))
tensors = [count for m, n in layers for count in (m * n, n)]
parameters = sum(tensors)

print(f"{parameters:,} parameters x 4 B = {4 * parameters:,} B")

# %% [markdown]
# ### Rounding
#
# PyTorch's allocator hands out memory in multiples of 512 bytes {cite}`pytorch-allocator`. Eleven of the twelve tensors fit such a multiple. The last bias, 10 numbers, takes 40 bytes and is given 512.


# %%
def rounded(nbytes):
    """Bytes that the allocator hands out for a request of `nbytes`."""
    return -(-nbytes // 512) * 512


P = sum(rounded(4 * count) for count in tensors)
print(f"P = {P:,} B, of which rounding: {P - 4 * parameters} B")

# %% [markdown]
# ### What the optimizer keeps
#
# Each parameter gets a gradient of its own size. What an optimizer remembers between steps comes on top:
#
# | optimizer | remembers for each parameter | parameters + gradients + states |
# | --- | --- | --- |
# | SGD | nothing | $2P$ |
# | SGD with momentum | a running mean of gradients | $3P$ |
# | Adam | running means of gradients and of their squares | $4P$ |

# %% [markdown]
# ### The rest
#
# Four small things are also in memory after the step: the batch, the model's output, the loss, and the workspaces of cuBLAS, the library that multiplies matrices. It takes a workspace at the first product in each thread. PyTorch runs forward and backward in two threads, so there are two.

# %%
workspace = cublas_workspace_size(CUBLAS_WORKSPACE)
images = rounded(4 * BATCH_SIZE * 28 * 28)
labels = rounded(8 * BATCH_SIZE)
output = rounded(4 * BATCH_SIZE * 10)
loss_value = rounded(4)

rest = images + labels + 2 * workspace + output + loss_value
predicted = {
    "SGD": 2 * P + rest,
    "SGD with momentum": 3 * P + rest,
    "Adam": 4 * P + rest,
}
print(f"workspaces: 2 x {workspace:,} B;  batch: {images:,} + {labels:,} B")
for name, nbytes in predicted.items():
    print(f"{name:18}{nbytes:14,} B")

# %% [markdown]
# ### Where are the activations?
#
# Between forward and backward, autograd holds the output of every layer. By the end of the step all of them are gone, so they do not count here. They do count at the peak, which we come to further down.

# %% [markdown]
# ## Measure
#
# First the training step, in plain PyTorch. It returns what the article's script still refers to afterwards: the output and the loss.


# %%
def train_step(model, optimizer, data, target):
    optimizer.zero_grad()
    output = model(data)
    loss = nn.CrossEntropyLoss()(output, target)
    loss.backward()
    optimizer.step()
    return {"output": output, "loss": loss}


# %% [markdown]
# Each run begins on an empty card. So we first give back what the step above left behind.


# %%
def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


del model, optimizer, data, target, loss
empty_card()
print(f"[Before loading model] {gpu.memory_allocated():,} B")

# %% [markdown]
# Now the article's script, stage by stage. `breakdown` sorts the allocated bytes by what they are for. Its rows add up to `memory_allocated()` exactly.


# %%
def load_and_train(make_optimizer, stages):
    with gpu.device:
        model = SimpleMLP()
    stages["loaded"] = gpu.breakdown(model)

    data, target = next(iter(train_loader))
    data, target = data.to(gpu.device), target.to(gpu.device)
    stages["batch"] = gpu.breakdown(model)

    optimizer = make_optimizer(model.parameters())
    alive = train_step(model, optimizer, data, target)
    stages["training"] = gpu.breakdown(model, optimizer)
    return model, alive


# %% [markdown]
# For inference the article drops the optimizer and the gradients. Its variable `loss` lives on. We look once with the loss and once without.


# %%
def infer(model, alive, stages):
    model.zero_grad()
    data, _ = next(iter(test_loader))
    data = data.to(gpu.device)
    with torch.no_grad():
        alive["output"] = model(data)
    stages["inference, loss kept"] = gpu.breakdown(model)
    del alive["loss"]
    stages["inference"] = gpu.breakdown(model)


# %%
runs = {}
for name, make_optimizer in OPTIMIZERS.items():
    empty_card()
    runs[name] = {}
    infer(*load_and_train(make_optimizer, runs[name]), runs[name])

# %% tags=["hide-input"]
table(
    ["allocated (B)", *runs],
    [
        (stage, *(stages[stage].total for stages in runs.values()))
        for stage in runs["SGD"]
    ],
)

# %% [markdown]
# ## Compare
#
# ### Prediction and measurement
#
# *This GPU* is the one named at the top of the page.

# %% tags=["hide-input"]
counted = {name: stages["training"].total for name, stages in runs.items()}
table(
    [
        "after one training step",
        "predicted (B)",
        "this GPU (B)",
        "difference (B)",
    ],
    [
        (name, predicted[name], n, n - predicted[name])
        for name, n in counted.items()
    ],
)

# %% [markdown]
# ### Every byte by kind
#
# First the three stages in megabytes, in {numref}`mlp-bars`. Then the bytes after the training step.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars of allocated memory for SGD, SGD with momentum and Adam at three stages. Loading is 204.03 MB of parameters for each. Training is 425.51, 629.54 and 833.58 MB: parameters and gradients, then one and two sets of optimizer states. Inference is 221.48 MB for each."}, "figure": {"name": "mlp-bars", "caption": "Allocated memory at three stages, for three optimizers."}}
BARS = {
    "loaded": "loading",
    "training": "training",
    "inference": "inference",
}
figure = stacked_bars(
    {
        name: {label: stages[stage] for stage, label in BARS.items()}
        for name, stages in runs.items()
    }
)

# %% tags=["hide-input"]
after = [stages["training"] for stages in runs.values()]
kinds = [kind for kind in after[0] if any(row[kind] for row in after)]
table(
    ["after one training step (B)", *runs],
    [(kind, *(row[kind] for row in after)) for kind in kinds]
    + [("memory_allocated()", *(row.total for row in after))],
)

# %% [markdown]
# *Activations* are what is left of them: the output and the loss. *Rounding* is the sum of all steps up to 512.

# %% [markdown]
# ### The article's figures
#
# The article was run on a real GPU and prints megabytes with two decimals. Here they are beside ours.

# %% tags=["hide-input"]
PUBLISHED = [
    ("model loaded", "204.03", "Adam", "loaded"),
    ("training step, SGD", "425.51", "SGD", "training"),
    ("training step, “Adam” as printed", "629.54", "Adam", "training"),
    ("training step, Adam as charted", "833", "Adam", "training"),
    ("inference", "221.48", "Adam", "inference, loss kept"),
]
table(
    ["stage", "article, measured (MB)", "this GPU (MB)", "this GPU (B)"],
    [
        (stage, article, f"{(n := runs[run][key].total) / MB:.2f}", n)
        for stage, article, run, key in PUBLISHED
    ],
)

# %% [markdown]
# Four of the five agree in every digit that is printed. So does the batch (0.40 MB). One does not: the block of output headed “Adam” says 629.54 MB, where Adam takes 833.58 MB.

# %%
for name, stages in runs.items():
    step = stages["training"].total - stages["batch"].total
    in_all = stages["training"].total
    print(f"{name:18} step {mb(step)}, in all {mb(in_all)}")

# %% [markdown]
# The article prints 425.11 MB for the step and 629.54 MB in all: to the last digit what **SGD with momentum** gives, one state for each parameter. The article's own chart shows 833 MB, and its text gives the ratio 1 : 4 : 1 of loading, training and inference. Both are Adam's. So the chart and the text are right, and the printed block seems to come from another run.

# %%
for name, stages in runs.items():
    ratios = [stages[stage].total / stages["loaded"].total for stage in BARS]
    print(f"{name:18}", " : ".join(f"{ratio:.2f}" for ratio in ratios))

# %% [markdown]
# ### The 512 bytes of the loss
#
# The variable `loss` outlives the training loop. As long as a name refers to a tensor, its block stays allocated: four bytes of loss, rounded up to 512.

# %%
kept_loss = runs["Adam"]["inference, loss kept"].total
without = runs["Adam"]["inference"].total
print(f"with the loss:    {kept_loss:,} B")
print(f"without:          {without:,} B, {kept_loss - without} B less")
print(f"predicted so:     {P + 2 * workspace + images + output:,} B")

# %% [markdown]
# ### What an H200 measured
#
# The article's three scripts ran on a newer card as well, with PyTorch's own settings. These figures are **measured**. Hopper's cuBLAS keeps 32 MiB for each thread, where this page's keeps 8.125 MiB, and torch 2.11 keeps 1 MiB more for cuBLASLt.

# %% tags=["hide-input"]
print(CARD)
table(
    ["script", "stage", "measured (B)"],
    [
        (row["script"], row["stage"], row["allocated"])
        for row in of_articles(*OPTIMIZERS)
    ],
)

# %% [markdown]
# With these workspaces in place of ours, the prediction is what the card measured:

# %%
hopper = 32 * 2**20
more = 2 * (hopper - workspace) + 2**20
for row in of_articles(*OPTIMIZERS):
    if row["stage"] == "after training":
        n = predicted[row["script"]] + more
        print(f"{row['script']:18} predicted {n:,} B, off by", end=" ")
        print(f"{row['allocated'] - n} B")

# %% [markdown]
# ## At the peak
#
# Back to the step of {numref}`adam-step`. What is alive at its highest point, and what at its end?

# %% tags=["hide-input"]
peak = recorded.steps[recorded.peak]
end = recorded.steps[-1]
table(
    ["kind", "at the peak (B)", "at the end (B)", "peak / P"],
    [(k, peak[k], end[k], f"{peak[k] / P:.2f}") for k in peak if peak[k]]
    + [("in all", peak.total, end.total, f"{peak.total / P:.2f}")],
)

# %% [markdown]
# The peak is **5P**, not 4P. By default, PyTorch's Adam treats all tensors at once on a GPU (`foreach=True`), so the square root of its second state needs a temporary as large as all parameters together. The card must have room for it. `max_memory_allocated()` agrees:

# %%
print(f"timeline's peak:        {peak.total:,} B")
print(f"max_memory_allocated(): {highest:,} B")

# %% [markdown]
# ### Three ways to step
#
# `optim.Adam(..., fused=True)` does all of it in one kernel, with no such temporary: its peak is near 4P. The third way, `foreach=False`, is an exercise below. Here is the peak of a step that the H200 measured, with the default and with the fused kernel.

# %%
print(CARD)
both = beside_replay(
    "mlp-adam", "mlp-adam-fused", figure="max_memory_allocated"
)
table(COLUMNS, [row for row in both if row[1] == "training"])

# %% [markdown]
# ## What the states buy
#
# Two extra copies of the model: are they worth it? We train for real, on the GPU if there is one and otherwise on the CPU, 15 steps with each optimizer. The learning rates are common choices, not tuned ones.


# %%
@torch.no_grad()
def accuracy(model, device):
    right = 0
    for data, target in test_loader:
        right += (
            (model(data.to(device)).argmax(1).cpu() == target).sum().item()
        )
    return right / len(test_loader.dataset)


# %%
def train(make_optimizer, steps=15):
    torch.manual_seed(0)
    device = gpu.device if gpu.device.type == "cuda" else torch.device("cpu")
    model = SimpleMLP().to(device)
    optimizer = make_optimizer(model.parameters())
    losses = []
    for data, target in train_loader:
        alive = train_step(
            model, optimizer, data.to(device), target.to(device)
        )
        losses.append(alive["loss"].item())
        if len(losses) == steps:
            return losses, accuracy(model, device)


# %%
TRAINED = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.05),
    "SGD with momentum": lambda parameters: optim.SGD(
        parameters, lr=0.05, momentum=0.9
    ),
    "Adam": lambda parameters: optim.Adam(parameters, lr=0.001),
}
empty_card()
curves = {name: train(optimizer) for name, optimizer in TRAINED.items()}

# %% [markdown]
# Losses differ a little from machine to machine, so {numref}`mlp-losses` is not compared when the notebook is checked. What must hold everywhere is asserted.

# %% tags=["nbval-ignore-output", "hide-input"] mystnb={"image": {"alt": "Training loss over 15 steps. Adam falls from 2.30 to well below 1. SGD with momentum begins to fall near the end. Plain SGD stays at 2.30."}, "figure": {"name": "mlp-losses", "caption": "Training loss over 15 steps with each optimizer."}}
figure = loss_curves(
    {
        f"{name}: {right:.0%} of the test digits right": losses
        for name, (losses, right) in curves.items()
    }
)

last = {name: losses[-1] for name, (losses, _) in curves.items()}
assert last["Adam"] < 1.5 < last["SGD with momentum"] < 2.4, last
assert 2.2 < last["SGD"] < 2.4 and curves["Adam"][1] > 0.6, curves["Adam"][1]

# %% [markdown]
# In 15 steps Adam reads most digits, while plain SGD has hardly moved. For this network the two copies earn their place. SGD gets there too, with more steps.

# %% [markdown]
# ## What to remember
#
# - After a step, training holds **2P** with SGD, **3P** with momentum, **4P** with Adam, and a little more that can be named to the byte.
# - The peak is what must fit, and Adam's is **5P** on a GPU, or near **4P** with `fused=True`: by default a temporary lives inside its step.
# - What a name refers to stays allocated, even a loss that nobody needs.

# %% [markdown]
# ## Exercises
#
# **1.** Which rows change if the batch is halved, and by how much? Predict first.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
model = optimizer = loss = data = target = None
empty_card()
half_loader = DataLoader(mnist(train=True), BATCH_SIZE // 2)
with gpu.device:
    model = SimpleMLP()
optimizer = OPTIMIZERS["Adam"](model.parameters())
data, target = (tensor.to(gpu.device) for tensor in next(iter(half_loader)))
alive = train_step(model, optimizer, data, target)
half, whole = gpu.breakdown(model, optimizer), runs["Adam"]["training"]
table(
    ["kind", "batch of 128 (B)", "batch of 64 (B)"],
    [
        (kind, whole[kind], half[kind])
        for kind in whole
        if whole[kind] != half[kind]
    ],
)

# %% [markdown]
# **2.** `optim.Adam(..., foreach=False)` updates one tensor after the other. What happens to the 5P?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for foreach in (True, False):
    model = optimizer = alive = data = target = None
    empty_card()
    with gpu.device:
        model = SimpleMLP()
    optimizer = optim.Adam(model.parameters(), foreach=foreach)
    data, target = (
        tensor.to(gpu.device) for tensor in next(iter(train_loader))
    )
    alive = train_step(model, optimizer, data, target)
    highest = gpu.max_memory_allocated()
    print(f"foreach={foreach!s:5}  peak {highest:,} B = {highest / P:.2f} P")

largest = 4 * max(tensors)
print(f"the largest tensor: {largest:,} B = {largest / P:.2f} P")

# %% [markdown]
# <details><summary>Why is the peak higher, not lower?</summary>
#
# One tensor at a time, Adam makes *two* temporaries: the square root of the second state, and that root divided by its bias correction. Most models have many tensors of similar size, so two temporaries of one tensor are next to nothing and the peak comes close to 4P. Here a single matrix holds two thirds of all parameters. Twice two thirds is more than one.
#
# </details>

# %% [markdown]
# **3.** `memory_reserved()` after Adam's step is larger than `memory_allocated()`. By how much, and who holds the difference?
#
# <details><summary>Solution</summary>
#
# Add `gpu.memory_reserved()` and `gpu.memory_snapshot()` to the step. The difference is held by the allocator: blocks that were freed during the step, among them Adam's temporary, kept for the next request. `empty_cache()` gives back the segments that are wholly free.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Activations and peaks](05_activations_and_peaks.ipynb) opens up the step, and brings its peak down. [Training and inference](03_training_and_inference.ipynb) does the same for a transformer of a billion parameters, and for more optimizers. The [references](../book/references.md) list the article and PyTorch's sources. To check this page on a card of your own, run `make gpu-test` there: it compares every table and figure with what your GPU says.
