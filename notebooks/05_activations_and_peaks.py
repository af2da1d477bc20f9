# %% [markdown]
# # Activations and peaks: what a training step needs at its worst
#
# **When does a training step need the most memory, and what brings that down?** It peaks at the beginning of backward, when every activation is still alive, or in the optimizer's step, when every gradient is. Find out which of the two is higher, then choose the lever that lowers it.
#
# After this chapter you can predict the peak of a training step, say what is alive at that moment, and choose the lever that brings it down.
#
# - **Time:** 25 minutes to read, under a minute to run.
# - **Needs:** nothing. A GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import logging
import warnings
from contextlib import contextmanager

# Neither of these is of use here: kernels for 4 bits, and progress bars.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "IProgress not found")

import bitsandbytes
import torch
from torch import nn, optim
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint

from every_byte import Breakdown, VirtualGPU, estimate, open_gpu
from every_byte.units import GB, GiB
from helpers import models
from helpers.environment import versions
from helpers.mlp import SimpleMLP
from helpers.plots import stacked_bars, timeline, use_book_style
from helpers.tables import table

use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "bitsandbytes"))

# %% [markdown]
# **Activations** are what forward leaves behind for backward. Nobody asks for them by name, they come and go within one step, and they are often the largest part of it. The article that this book began with leaves them for another day {cite}`hoperj2024`. This is the day.
#
# {numref}`step-of-gpt2-large` is one training step of gpt2-large {cite}`radford2019` with AdamW, on 4 texts of 512 tokens. The activations pile up in *forward*. In *backward*, gradients take their place. The peak lies between the two, at the very beginning of *backward*.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how a step is recorded", "code_prompt_hide": "Hide how a step is recorded"}
ATTENTION = {"eager": "eager", "fused": models.CAUSAL_SDPA}
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


def build(name, attention, device, dtype=torch.float32, **changes):
    if name.startswith("gpt2"):
        changes = NO_DROPOUT | changes
    how = {"attn_implementation": ATTENTION[attention], "use_cache": False}
    config = models.config(name, **how, **changes)
    return models.build(config, device, dtype).train()


def texts(model, batch, length):
    ids = torch.zeros(batch, length, dtype=torch.int64)
    given = {"input_ids": ids, "position_ids": torch.arange(length)[None]}
    if model.config._attn_implementation == "eager":
        future = torch.full((length, length), float("-inf")).triu(1)
        given["attention_mask"] = future[None, None].to(model.dtype)
    return {name: value.to(model.device) for name, value in given.items()}


def loss_of(model, given):
    logits = model(**given).logits
    return cross_entropy(logits.flatten(0, 1), given["input_ids"].flatten())


def step(model, optimizers, given, recorded):
    recorded.mark("forward")
    logits = model(**given).logits
    recorded.mark("loss")
    target = given["input_ids"].flatten()
    loss = cross_entropy(logits.flatten(0, 1), target)
    del logits
    recorded.mark("backward")
    loss.backward()
    recorded.mark("optimizer")
    for optimizer in optimizers:
        optimizer.step()
    recorded.mark("zero_grad")
    for optimizer in optimizers:
        optimizer.zero_grad()


def adamw(model, **options):
    return [optim.AdamW(model.parameters(), **options)]


def make_states(model, optimizers):
    """A first step on gradients of zeros: now the states are there."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def replay(
    case, prepare=None, optimizer=adamw, train=step, capacity=None, **changes
):
    """The timeline of a step on a virtual card, with the states there."""
    name, attention, batch, length = case
    with VirtualGPU(capacity=capacity) as card:
        model = build(name, attention, card.device, **changes)
        if prepare:
            prepare(model)
        optimizers = optimizer(model)
        make_states(model, optimizers)
        given = texts(model, batch, length)
        with card.record(model, *optimizers) as recorded:
            train(model, optimizers, given, recorded)
    return recorded


# %% tags=["hide-input"] mystnb={"image": {"alt": "Allocated memory during a training step of gpt2-large with AdamW, stacked by kind: parameters and two states below, activations that grow to about 11 GB in forward, two more temporaries at the beginning of backward, where the peak is, then gradients that take the place of activations, and the optimizer's temporary."}, "figure": {"name": "step-of-gpt2-large", "caption": "Allocated memory during one training step of gpt2-large, by kind, on a virtual card without a bound."}}
recorded = replay(("gpt2-large", "fused", 4, 512))
figure = timeline(recorded)

# %% [markdown]
# That peak is more than many cards hold. So the steps of whole models on this page run on a second, *virtual* card without a limit, even if you have a real one. Their figures are **replayed**. The optimizer has its states already, as in the second step of any training.

# %% [markdown]
# ## Predict
#
# A linear layer computes $y = Wx + b$. Its backward needs $x$ for the gradient of $W$, and $W$ for the gradient of $x$. $W$ is there anyway. So the layer makes autograd keep **its input**. A ReLU keeps its output, which is the same tensor as the next layer's input.
#
# For the SimpleMLP of [One training step](04_mlp_adam_vs_sgd.ipynb) that is one number for each input of a layer and each image, and the logarithms of the softmax, which the loss keeps.

# %%
BATCH = 128
predicted = [4 * BATCH * width for width in SimpleMLP.widths]
for width, nbytes in zip(SimpleMLP.widths, predicted):
    print(f"{width:5} numbers for each image {nbytes:12,} B")
print(f"in all                       {sum(predicted):12,} B")

# %% [markdown]
# ## Measure
#
# ### Seeing what is saved
#
# `saved_tensors_hooks` calls a function with each tensor that autograd saves {cite}`pytorch-saved-tensors`. We note its storage, once, and the module that was running. We leave out parameters, which take no further memory.


# %%
def saved_tensors(model, run):
    """What autograd saves while `run` runs: (module, bytes) by storage."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    device, saved, running = next(model.parameters()).device, {}, ["loss"]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.device == device and storage._cdata not in parameters:
            saved.setdefault(storage._cdata, (running[-1], storage.nbytes()))
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with following(model, running):
            kept = run()
    return kept, list(saved.values())


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how the running module is followed", "code_prompt_hide": "Hide how the running module is followed"}
@contextmanager
def following(model, running):
    """Keep the name of the module that runs at the end of `running`."""
    names = {module: name for name, module in model.named_modules()}

    def begins(module, inputs):
        running.append(names.get(module, running[-1]))

    def ends(module, inputs, result):
        running.pop()

    with modules.register_module_forward_pre_hook(begins):
        with modules.register_module_forward_hook(ends):
            yield


# %%
with gpu.device:
    model = SimpleMLP()
    images = torch.empty(BATCH, 1, 28, 28)
    labels = torch.zeros(BATCH, dtype=torch.int64)
loss, saved = saved_tensors(
    model, lambda: cross_entropy(model(images), labels)
)
table(["module", "saved (B)"], saved)

# %% [markdown]
# Each layer's input is there. The loss keeps three things: the logarithms of the softmax, the labels, and the number that the sum is divided by.

# %% [markdown]
# ### A transformer's layer
#
# Now one layer of gpt2-large, with 2 texts of 512 tokens. Attention can be computed in two ways:
#
# - **Eager:** scores of each token for each other, a softmax, a product with the values.
# - **Fused:** one kernel that goes over the scores in tiles and never stores them {cite}`dao2022`.
#
# PyTorch's `scaled_dot_product_attention` chooses among such kernels: flash attention for 16-bit numbers, memory-efficient attention {cite}`rabe2021` for FP32.


# %% tags=["hide-input"]
def saved_by_module(card, model, batch, length):
    """Bytes saved, by the modules' last names; activations held then."""
    given, sums = texts(model, batch, length), {}
    alive, saved = saved_tensors(model, lambda: loss_of(model, given))
    held = card.breakdown(model)["activations"]
    del alive
    for module, nbytes in saved:
        place = module.split(".h.")[-1].lstrip("0123456789.")
        sums[place] = sums.get(place, 0) + nbytes
    return sums, held


# %%
WIDTH, HEADS = 1280, 20
TOKENS, LENGTH = 2 * 512, 512
row = 4 * WIDTH * TOKENS  # one number for each token and unit
FORMULA = {
    "ln_1": row + 8 * TOKENS,  # its input, mean and deviation
    "attn.c_attn": row,
    "attn": 3 * row + 4 * HEADS * LENGTH * TOKENS,  # and the scores
    "attn.c_proj": row,
    "ln_2": row + 8 * TOKENS,
    "mlp.c_fc": row,
    "mlp.act": 4 * 4 * row,
    "mlp.c_proj": 4 * row,
}

# %%
layer = {}
for attention in ATTENTION:
    model = build("gpt2-large", attention, gpu.device, num_hidden_layers=1)
    layer[attention] = saved_by_module(gpu, model, 2, LENGTH)[0]

# %% tags=["hide-input"]
eager, fused = layer["eager"], layer["fused"]
total = (
    sum(FORMULA.values()),
    *(sum(sums.get(n, 0) for n in FORMULA) for sums in (eager, fused)),
)
table(
    ["module", "predicted, eager (B)", "eager (B)", "fused (B)"],
    [
        (name, n, eager[name], fused.get(name, 0))
        for name, n in FORMULA.items()
    ]
    + [("in all", *total)],
)

# %% [markdown]
# A storage is named after the module that saved it first. So in the fused column the attention's result belongs to the kernel and not to `c_proj`.
#
# For each token, with width $h$, $a$ heads and length $S$, a layer with eager attention keeps this many numbers:
#
# $$28h + aS$$
#
# $20h$ of them are the MLP's: its activation function is written as five operations, and autograd keeps what each needs. $aS$ is the **quadratic term**: each token has as many scores as there are tokens. The fused kernel keeps one number for each row of scores instead.

# %% [markdown]
# ## The whole gpt2-large
#
# All 36 layers, 4 texts of 1,024 tokens, in FP32. From here on, all figures are **replayed** on the second card. {numref}`saved-by-module` shows where the activations are. With eager attention, the largest part is attention's own, most of it scores. The fused kernel takes these away.


# %%
def forward(name, attention, batch, length, **changes):
    """Bytes saved in forward by module, and activations held after it."""
    with VirtualGPU() as card:
        model = build(name, attention, card.device, **changes)
        return saved_by_module(card, model, batch, length)


# %% tags=["hide-input"] mystnb={"image": {"alt": "Horizontal bars: bytes that gpt2-large saves for backward by module, for 4 texts of 1,024 tokens in FP32. Eager: attention 14.3 GB, of which most are scores, the MLP's activation function 12.1 GB, its last projection 3.0 GB, five others 0.8 GB each. Fused: attention falls to 3.0 GB, the rest stays."}, "figure": {"name": "saved-by-module", "caption": "What gpt2-large saves for backward, by module, with eager and with fused attention."}}
large = {way: forward("gpt2-large", way, 4, 1024) for way in ATTENTION}
figure = stacked_bars(
    {
        f"{way} attention": {
            name: Breakdown(activations=saved.get(name, 0))
            for name in FORMULA
        }
        for way, (saved, _) in large.items()
    }
)

# %% [markdown]
# `every_byte.estimate` has the formula for all of it. The few bytes that remain are the loss, and the number that it was divided by.

# %%
KIND = {"eager": "eager", "fused": "efficient"}  # in FP32


def formula(name, attention, batch, length, dropout=False):
    sizes = estimate.dimensions(name)
    work = (batch, length, "fp32")
    logarithms = estimate.logits(sizes, *work)
    return logarithms + estimate.activations(
        sizes, *work, KIND[attention], dropout=dropout
    )


# %% tags=["hide-input"]
rows = [
    (way, n, formula("gpt2-large", way, 4, 1024))
    for way, (_, n) in large.items()
]
table(
    ["attention", "predicted (B)", "replayed (B)", "off by (B)"],
    [(way, guess, n, n - guess) for way, n, guess in rows],
)

# %% [markdown]
# ### Batch and length, one at a time

# %% tags=["hide-input"]
SIZES = ((1, 256), (2, 256), (1, 512), (1, 1024))
base = {way: formula("gpt2-large", way, 1, 256) for way in ATTENTION}


def size_row(batch, length):
    for way in ATTENTION:
        n = forward("gpt2-large", way, batch, length)[1]
        yield n
        yield f"{n / base[way]:.2f}"
        yield n - formula("gpt2-large", way, batch, length)


# %% tags=["hide-input"]
table(
    [
        "texts",
        *(c for w in ATTENTION for c in (f"{w} (B)", "times", "off by")),
    ],
    [(f"{b} x {n}", *size_row(b, n)) for b, n in SIZES],
)

# %% [markdown]
# *Times* is the ratio to the first row. Twice the batch takes twice the activations, either way. Twice the length takes more than twice with eager attention, and exactly twice with fused: the quadratic term is gone.
#
# ### With dropout
#
# As published, gpt2-large trains with dropout of 0.1 on scores, residuals and embedding. On CUDA each dropout is one kernel that keeps **a byte for each number**. Eager attention also keeps the scores a second time, after dropout. The fused kernel keeps nothing more: it draws the same random numbers again.

# %% tags=["hide-input"]
ON = dict.fromkeys(NO_DROPOUT, 0.1)
with_dropout = {
    way: forward("gpt2-large", way, 4, 1024, **ON)[1] for way in ATTENTION
}
for way, n in with_dropout.items():
    off = n - formula("gpt2-large", way, 4, 1024, dropout=True)
    more = n - large[way][1]
    print(
        f"{way}: {n / GB:.2f} GB, {more / GB:5.2f} GB for dropout,"
        f" off by {off} B"
    )

# %% [markdown]
# ## The anatomy of a step
#
# Where in the step of {numref}`step-of-gpt2-large` is the peak? We ask the recording: what is alive there, and what was alive one operation earlier?


# %%
def peak_of(recorded):
    """Bytes by kind at the peak, and the phase in which it falls."""
    begun = [n for n, i in recorded.marks.items() if i <= recorded.peak]
    return recorded.steps[recorded.peak], begun[-1]


# %% tags=["hide-input"]
row, phase = peak_of(recorded)
before = recorded.steps[recorded.peak - 1]
print(f"the peak falls in: {phase}")
table(
    ["kind", "at the peak (B)", "one operation earlier (B)"],
    [(k, row[k], before[k]) for k in row if row[k]]
    + [("in all", row.total, before.total)],
)

# %%
one = estimate.logits(estimate.dimensions("gpt2-large"), 4, 512)
print(f"that operation takes  {row.total - before.total:,} B")
print(f"logits of this batch  {one:,} B")

# %% [markdown]
# The peak is not at the end of forward but a little later. Backward begins at the loss. It makes the gradient of the logarithms, then that of the logits, each as large as the logits, while all activations are still alive. After that, each layer frees more than it makes.
#
# So a step has two summits. One is at the beginning of backward, the other in the optimizer:
#
# $$\text{peak} = P + \text{states} + \max(A, B)$$
#
# - $P$: the parameters.
# - $A$, where backward begins: the activations, and **two** more tensors as large as the logits. (The activations already include a third, the logarithms that the loss keeps.)
# - $B$, in the optimizer: the gradients, and once more $P$, the temporary of Adam's `foreach`.

# %% [markdown]
# ### Predicted and replayed
#
# We try the formula on gpt2-large and on a model of a billion, Llama-3.2-1B {cite}`llama3`. Both are in FP32 with AdamW, with eager and with fused attention.


# %%
def predicted_peak(name, attention, batch, length):
    sizes, work = estimate.dimensions(name), ("fp32", batch, length)
    m = estimate.training(sizes, "adamw", *work, KIND[attention])
    one = estimate.logits(sizes, batch, length)
    kept = m.activations + one  # with the loss's logarithms
    begin_of_backward = kept + 2 * one
    optimizer = m.gradients + m.parameters
    return (
        m.parameters + m.optimizer_states + max(begin_of_backward, optimizer)
    )


# %% tags=["hide-input"]
NAMES = ("gpt2-large", "Llama-3.2-1B")
CASES = [
    (name, way, batch, length)
    for name in NAMES
    for batch, length in ((1, 128), (4, 1024))
    for way in ATTENTION
]

# %%
timelines = {case: replay(case) for case in CASES}
results = {case: peak_of(recorded) for case, recorded in timelines.items()}


# %% tags=["hide-input"]
def compared(case):
    name, way, batch, length = case
    (row, phase), guess = results[case], predicted_peak(*case)
    off = f"{(row.total - guess) / row.total:.2%}"
    return name, way, f"{batch} x {length}", guess, row.total, off, phase


table(
    ["model", "way", "texts", "predicted (B)", "replayed (B)", "off", "in"],
    [compared(case) for case in CASES],
)

# %% [markdown]
# *Off* is what the formula leaves out: cuBLAS's workspaces, the allocator's rounding, the batch, and in gpt2-large the blocks that are not split. With short texts it makes no difference how attention is computed, since the peak is the optimizer's.

# %% [markdown]
# ### The optimizer's own peak
#
# Adam's `foreach=True`, the default on CUDA, treats all tensors at once and needs a temporary as large as all of them: **5P**. `fused=True` is one kernel without it, and `foreach=False` goes tensor by tensor: **4P**, and little more.
#
# Not all gradients have to be alive at once, either. PyTorch can call a function as soon as one is complete. If that function steps the optimizer for this parameter and drops the gradient, the **step happens within backward** {cite}`pytorch-step-in-backward`: 3P, and little more.


# %%
def one_by_one(model):
    return adamw(model, foreach=False)


def in_one_kernel(model):
    return adamw(model, fused=True)


# %%
def within_backward(model, kind=optim.AdamW):
    """An optimizer for each parameter, which steps in backward."""
    optimizers = {p: kind([p]) for p in model.parameters()}

    def step_now(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step_now)
    return list(optimizers.values())


# %%
CASE = ("Llama-3.2-1B", "fused", 1, 128)
P = estimate.parameter_bytes(estimate.dimensions(CASE[0]), "fp32")
WAYS = {
    "foreach=True": adamw,
    "fused=True": in_one_kernel,
    "foreach=False": one_by_one,
    "within backward": within_backward,
}
own = {name: peak_of(replay(CASE, None, way)) for name, way in WAYS.items()}


# %% tags=["hide-input"]
def in_p(row):
    parts = (row.total, row["gradients"], row["temporaries"])
    return [f"{n / P:.2f}" for n in parts]


table(
    ["step", "peak (B)", "in P", "gradients", "temporaries", "in"],
    [(name, r.total, *in_p(r), phase) for name, (r, phase) in own.items()],
)

# %% [markdown]
# The bytes beyond 4P and 3P come from backward. This model's embedding is also its head. At the end of backward there are gradients of both uses, each as large as the embedding, until they are added up. A model of many equal tensors comes closer to 4P and 3P.

# %% [markdown]
# ### When gradients live
#
# The gradients live from backward until `zero_grad()`, unless the step happens within backward. Two habits keep them for longer:
#
# - `zero_grad(set_to_none=False)` fills them with zeros instead of dropping them. They are there in the next forward too.
# - **Gradient accumulation** adds up the gradients of small batches and steps once. They are there in every forward but the first. But the activations are only those of one small batch.


# %% tags=["hide-input"]
def zeros_kept(model, optimizers, given, recorded):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # what set_to_none=False leaves
    step(model, optimizers, given, recorded)


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how gradients are accumulated", "code_prompt_hide": "Hide how gradients are accumulated"}
def accumulate(model, optimizers, given, recorded):
    for i, ids in enumerate(given["input_ids"].split(1)):
        recorded.mark(f"forward {i + 1}")
        loss = loss_of(model, {**given, "input_ids": ids})
        recorded.mark(f"backward {i + 1}")
        loss.backward()
    recorded.mark("optimizer")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# %% tags=["hide-input"]
def gb(nbytes):
    return f"{nbytes / GB:.2f}"


CASE = ("gpt2-large", "fused", 4, 512)
habits = {
    "as above": recorded,
    "set_to_none=False": replay(CASE, train=zeros_kept),
    "accumulated, 1 text at a time": replay(CASE, train=accumulate),
}
peaks = {name: peak_of(habit) for name, habit in habits.items()}
table(
    ["4 x 512 tokens", "peak (GB)", "gradients then (GB)", "in"],
    [(n, gb(r.total), gb(r["gradients"]), p) for n, (r, p) in peaks.items()],
)

# %% [markdown]
# ## Levers
#
# Now we bring the peak of Llama-3.2-1B down, one lever at a time, on 4 texts of 1,024 tokens with fused attention.
#
# ### Checkpointing: compute again instead of keeping
#
# **Activation checkpointing** {cite}`chen2016` keeps only the input of a group of layers. In backward it runs the group again and then has what it needs. The larger the groups, the fewer inputs are kept, but the more is made again at a time. With $L$ layers in groups of $k$, the step keeps
#
# $$\frac{L}{k} \cdot \text{input} + k \cdot \text{layer's activations}$$


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the layers of a group", "code_prompt_hide": "Hide the layers of a group"}
class Group(nn.Module):
    """Layers of which only the first one's input is kept."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def run(self, hidden, **given):
        for layer in self.layers:
            hidden = layer(hidden, **given)
        return hidden

    def forward(self, hidden, **given):
        return checkpoint(self.run, hidden, use_reentrant=False, **given)


# %% tags=["hide-input"]
def checkpointed(k):
    """For `replay`: groups of k layers, and a note of each layer's run."""

    def prepare(model):
        layers = model.model.layers
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: ran.append(k))
        groups = [layers[i : i + k] for i in range(0, len(layers), k)]
        model.model.layers = nn.ModuleList(map(Group, groups))

    return prepare


# %% tags=["hide-input"]
ONE_BILLION, SIZES = CASES[-1], estimate.dimensions("Llama-3.2-1B")
GROUPS, ran, kept = (1, 2, 4, 8, 16), [], {0: timelines[ONE_BILLION]}
for k in GROUPS:
    kept[k] = replay(ONE_BILLION, checkpointed(k))


def held(recorded):
    """Activations between forward and backward."""
    return recorded.steps[recorded.marks["backward"]]["activations"]


def by_formula(k):
    work = (SIZES, 4, 1024, "fp32", "efficient")
    made_again = k * estimate.layer_activations(*work)
    return estimate.activations(*work, k) - made_again


# %% tags=["hide-input"]
def summit(recorded):
    """The highest of forward and backward, over parameters and states."""
    rows = recorded.steps[: recorded.marks["optimizer"]]
    row = max(rows, key=lambda row: row.total)
    return row.total - row["parameters"] - row["optimizer states"]


def saved_by(k):
    predicted = by_formula(0) - by_formula(k)
    replayed = held(kept[0]) - held(kept[k])
    return predicted, replayed, f"{replayed / predicted - 1:.2%}"


table(
    ["k", "saved, predicted (B)", "replayed (B)", "off", "summit (GB)"],
    [("none", "", "", "", gb(summit(kept[0])))]
    + [(str(k), *saved_by(k), gb(summit(kept[k]))) for k in GROUPS],
)

# %% tags=["hide-input"]
layers = SIZES.num_hidden_layers
print(f"layers: {layers}, run in a step with checkpoints: {ran.count(1)}")

# %% [markdown]
# Checkpoints save what the formula says. Each layer runs twice. A layer's forward is about a third of its work, so a step costs about a third more.
#
# *Summit* is the highest point of forward and backward, on top of parameters and states. It soon stops falling: the logarithms and the two gradients, each for 128,256 words, are larger than any layer. With large groups it rises again, because backward makes a whole group at once.

# %% [markdown]
# ### Offloading: keep it elsewhere
#
# The same hooks can send what is saved to the host's memory and bring it back in backward. `torch.autograd.graph.save_on_cpu` does so. On a virtual card there is nothing to copy, so a shape and a type stand in for the copy on the host. Unlike `save_on_cpu`, we leave the parameters on the card.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the hooks", "code_prompt_hide": "Hide the hooks"}
def on_host(model):
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def away(tensor):  # save_on_cpu: tensor.cpu()
        if tensor.untyped_storage()._cdata in own:
            return tensor
        moved.append(tensor.nbytes)
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def back(saved):  # save_on_cpu: saved.to(device)
        if isinstance(saved, torch.Tensor):
            return saved
        shape, stride, dtype, device = saved
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return saved_tensors_hooks(away, back)


# %% tags=["hide-input"]
def offloading(model, optimizers, given, recorded):
    with on_host(model):
        loss = loss_of(model, given)
    recorded.mark("backward")
    loss.backward()
    recorded.mark("optimizer")
    optimizers[0].step()


moved = []
away = replay(ONE_BILLION, train=offloading)
table(
    ["activations are", "summit (GB)", "layers run", "to the host (GB)"],
    [
        ("kept", gb(summit(kept[0])), layers, "0"),
        ("made again", gb(summit(kept[1])), ran.count(1), "0"),
        ("on the host", gb(summit(away)), layers, gb(sum(moved))),
    ],
)

# %% [markdown]
# Offloading computes nothing twice. The price is traffic: a tensor that several operations save travels several times.

# %% [markdown]
# ### Optimizers and LoRA
#
# 8-bit Adam {cite}`dettmers2022optimizers` shrinks the states. LoRA {cite}`hu2021` freezes the model and trains two thin matrices beside each of its own: nearly no gradients and states, as [Training and inference](03_training_and_inference.ipynb) shows. Adafactor's {cite}`shazeer2018` row is **estimated**.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show LoRA", "code_prompt_hide": "Hide LoRA"}
class LoRA(nn.Module):
    def __init__(self, linear, rank=16):
        super().__init__()
        self.linear = linear
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def with_lora(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, LoRA(child))
    checkpointed(1)(model)


# %% tags=["hide-input"]
def adam8(model):
    return [bitsandbytes.optim.AdamW8bit(model.parameters())]


def of_adapters(model):
    return [optim.AdamW(p for p in model.parameters() if p.requires_grad)]


LORA = {"prepare": with_lora, "optimizer": of_adapters}
CASE, each = ("Llama-3.2-1B", "fused", 1, 1024), checkpointed(1)
trained = {
    "AdamW": replay(CASE, each),
    "AdamW, tensor by tensor": replay(CASE, each, one_by_one),
    "8-bit AdamW": replay(CASE, each, adam8),
    "LoRA": replay(CASE, **LORA),
}

# %% tags=["hide-input"]
tensors = [shape for _, shape in estimate.shapes(SIZES)]
adafactor = estimate.optimizer_states(tensors, "adafactor")
peaks = {name: peak_of(recorded) for name, recorded in trained.items()}
table(
    ["1 x 1024 tokens, FP32", "states (B)", "peak (GB)", "in"],
    [
        (name, row["optimizer states"], gb(row.total), phase)
        for name, (row, phase) in peaks.items()
    ]
    + [("Adafactor, estimated", adafactor, "", "")],
)

# %% [markdown]
# ## Compare: down the ladder
#
# {numref}`ladder` has all levers on one model and 4 texts of 1,024 tokens. The first rung is the article's: 16 bytes for each parameter, and all activations. Each further rung adds a lever. *1 text at a time* steps after each text: that is a different training, with four times as many steps. LoRA takes all four texts again.


# %% tags=["hide-input"]
def adam8_within_backward(model):
    return within_backward(model, bitsandbytes.optim.AdamW8bit)


def only_backward(model, optimizers, given, recorded):
    recorded.mark("forward")
    loss = loss_of(model, given)
    recorded.mark("backward")
    loss.backward()


# %%
HALF = {"prepare": each, "dtype": torch.bfloat16}
LAST = {**HALF, "optimizer": adam8_within_backward, "train": only_backward}
RUNGS = {
    "FP32, AdamW, eager": (4, {}),
    "+ fused attention": (4, {}),
    "+ checkpoints": (4, {"prepare": each}),
    "+ tensor by tensor": (4, {"prepare": each, "optimizer": one_by_one}),
    "+ all in BF16": (4, {**HALF, "optimizer": one_by_one}),
    "+ 8-bit AdamW": (4, {**HALF, "optimizer": adam8}),
    "+ step within backward": (4, LAST),
    "+ 1 text at a time": (1, LAST),
    "LoRA, BF16, 4 texts": (4, {**HALF, **LORA}),
}


# %% tags=["hide-input"]
def rung(name, capacity=None):
    batch, options = RUNGS[name]
    way = "eager" if name.endswith("eager") else "fused"
    case = ("Llama-3.2-1B", way, batch, 1024)
    return peak_of(replay(case, **options, capacity=capacity))


ladder = {name: rung(name) for name in RUNGS}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars of what is alive at the peak of a training step of Llama-3.2-1B, lever by lever. The first, FP32 with AdamW and eager attention, is 43.8 GB, of which 26.8 GB are activations. Fused attention takes it to 34.4 GB, checkpoints to 24.7, tensor by tensor to 21.9, BF16 to 11.0, 8-bit AdamW to 8.5, the step within backward to 8.5, one text at a time to 6.6, LoRA with all texts to 6.0. A line marks 8 GiB, which the last two stay well below."}, "figure": {"name": "ladder", "caption": "What is alive at the peak of a training step of Llama-3.2-1B, lever by lever. The dotted line is 8 GiB."}}
figure = stacked_bars(
    {"at the peak": {name: row for name, (row, _) in ladder.items()}}
)
limit = figure.axes[0].axvline(8 * GiB / GB, color="black", linestyle=":")

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the peaks in bytes", "code_prompt_hide": "Hide the peaks in bytes"}
table(
    ["lever", "peak (B)", "in"],
    [(name, row.total, phase) for name, (row, phase) in ladder.items()],
)

# %% [markdown]
# The dotted line is a card of "8 GB", which has 8 GiB. The CUDA context takes some hundred megabytes of them. To test the last rungs, we run the same steps on a virtual card of 8 GiB.

# %%
for name in list(RUNGS)[-4:]:
    try:
        row, _ = rung(name, capacity=8 * GiB)
        print(f"{name:24}fits, peak {row.total / GiB:.2f} GiB")
    except torch.OutOfMemoryError as error:
        print(f"{name:24}{str(error).partition('.')[0]}")

# %% [markdown]
# Two rungs end just below the line and still fail. Their blocks would fit, but the free memory lies in pieces between them, in segments that the allocator cannot give back.
#
# What a lever is worth depends on where the peak is. Once checkpoints have lowered the first summit, the optimizer's is the higher one, so the next lever is for the optimizer. *Step within backward* hardly helps with four texts: the peak is then at the logits, before any gradient. With one text it is what makes room. What BF16 costs in quality is another question.

# %% [markdown]
# ## What to remember
#
# - Autograd keeps the **inputs of layers** and what else their backward needs: in proportion to the batch, and with eager attention to the **square of the length**. A fused kernel keeps one number for each row of scores.
# - A step has **two summits**: the beginning of backward, with all activations and twice the logits, and the optimizer, with all gradients and its temporary. The higher one is what must fit.
# - Find the summit first, then choose the lever: checkpoints and offloading for the first, `fused=True` or `foreach=False`, smaller states, a step within backward or LoRA for the second.

# %% [markdown]
# ## Exercises
#
# **1.** With eager attention, from which length on would gpt2-large keep more for scores than for all else in a layer? Use the formula above.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
print(f"28 h = a S at S = {28 * WIDTH // HEADS:,} tokens")
for length in (1_792, 1_793):
    layer = estimate.layer_activations(
        estimate.dimensions("gpt2-large"), 1, length
    )
    scores = 4 * HEADS * length**2
    print(f"{length:,} tokens: scores {scores / layer:.2%} of a layer")

# %% [markdown]
# **2.** Gradient accumulation is not on the ladder. What would it do to "+ 8-bit AdamW"? Guess, then replay it.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
options = RUNGS["+ 8-bit AdamW"][1] | {"train": accumulate}
row, phase = peak_of(replay(ONE_BILLION, **options))
print(f"4 texts at once        {ladder['+ 8-bit AdamW'][0].total:14,} B")
print(f"1 at a time, added up  {row.total:14,} B, in {phase}")

# %% [markdown]
# <details><summary>Why?</summary>
#
# It makes room where activations and logits are larger than the gradients, as in the table of gpt2-large. Here checkpoints have already taken the activations away. The smaller batch saves in logits about as much as the gradients take, which now live through forward.
#
# </details>

# %% [markdown]
# **3.** The SimpleMLP's ReLU is replaced by a GELU. How much more is saved?
#
# <details><summary>Solution</summary>
#
# A ReLU's gradient follows from its output, which the next layer keeps anyway. A GELU's needs its input. So each hidden layer keeps two tensors instead of one: nearly twice as much in all. To see it, swap `nn.ReLU()` for `nn.GELU()` in `model.layers` and call `saved_tensors` again.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Mixed precision](06_mixed_precision.ipynb) asks what 16 bits do to these activations. [Training and inference](03_training_and_inference.ipynb) has the formulas for other optimizers and for inference. The kernels that this page replays follow PyTorch's sources {cite}`pytorch-sdpa`.
