# %% [markdown]
# # Troubleshooting: out of memory, and what to do
#
# **Why is your GPU out of memory, and what do you do about it?** Either the card is simply full, or memory that should be free is still held, or it is free only in pieces. The message tells these three apart: paste it below, or find your question in the list.
#
# After this chapter you can read an out-of-memory message, find what holds the memory, and cure it.
#
# - **Time:** a minute for your message, 40 for all entries; under a minute to run.
# - **Needs:** nothing. It runs on any machine, a GPU is optional, and nothing is downloaded.

# %% [markdown]
# ## Paste the message
#
# ```{explain}
# In the book a field stands here. In a terminal: every-byte explain --file train.log
# ```
#
# Or find your question:
#
# - **The message:** <a href="#oom">CUDA out of memory</a> · <a href="#fragmentation">while gigabytes are free</a> · <a href="#snapshot">which line holds the memory</a>
# - **It grows each step:** <a href="#grows">total += loss</a> · <a href="#outputs">kept outputs</a> · <a href="#hooks">hooks</a> · <a href="#cycles">cycles</a> · <a href="#graph">retain_graph</a> · <a href="#lengths">growing lengths</a>
# - **Where it is:** <a href="#del">it stays after <code>del</code></a> · <a href="#smi">nvidia-smi shows more</a> · <a href="#worker">workers and kernels</a> · <a href="#workspace">the last 8 or 32 MiB</a> · <a href="#adam">Adam's peak</a> · <a href="#units">GB or GiB</a>
# - **It saved nothing:** <a href="#saves">AMP</a> · <a href="#quarter">INT8 and 4 bits</a> · <a href="#fp8">FP8</a> · <a href="#recompute">checkpointing</a> · <a href="#gpus">two GPUs</a>
# - **It runs out somewhere else:** <a href="#evaluation">in evaluation</a> · <a href="#loading">while loading</a> · <a href="#resume">after load_state_dict</a>
# - **Arguments that have changed:** <a href="#amp">torch.cuda.amp</a> · <a href="#fp16">Accelerator(fp16=True)</a> · <a href="#dtype">torch_dtype</a> · <a href="#bits">load_in_8bit</a> · <a href="#silent">those that say nothing</a>
# - **Precision:** <a href="#which">which dtype was loaded</a> · <a href="#int8">moving an int8 model</a> · <a href="#half">not implemented for 'Half'</a> · <a href="#nan">NaN losses</a>
# - **Of 2023:** <a href="#import">Failed to import transformers…</a> · <a href="#offload">unexpected keyword argument 'offload_index'</a>

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import contextlib
import copy
import gc
import inspect
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections import Counter
from pathlib import Path

# Neither of these is of use here: kernels for 4 bits, and progress bars.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "IProgress not found")

import accelerate
import bitsandbytes
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from IPython import get_ipython
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from every_byte import VirtualGPU, as_cuda, estimate, open_gpu
from every_byte.data import cards
from every_byte.ranks import first_of
from every_byte.units import GB, MB, GiB, MiB, binary
from helpers import models
from helpers.environment import versions
from helpers.plots import segments, timeline, use_book_style
from helpers.tables import table

transformers.logging.disable_progress_bar()
use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "accelerate", "bitsandbytes"))

# %% [markdown]
# Every entry **causes** its problem with a few lines, explains it, and shows the **cure** at work. Messages are, word for word, those of the versions above, and only wrapped to fit the page. The cards are virtual, so you see the same on any machine.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how messages are caught", "code_prompt_hide": "Hide how messages are caught"}
def show(text):
    for line in str(text).splitlines():
        print(textwrap.fill(line, 76, break_on_hyphens=False))


def told(action):
    """Carry out an action; show its warnings, and the error that ends it."""
    heard = logging.Handler()
    heard.emit = lambda record: show(record.getMessage())
    transformers.logging.disable_default_handler()
    logger = logging.getLogger("transformers")
    logger.addHandler(heard)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            result = action()
        except Exception as error:
            result = show(f"{type(error).__name__}: {error}")
    logger.removeHandler(heard)
    for warning in given:
        show(f"{warning.category.__name__}: {warning.message}")
    return result


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how other programs are run", "code_prompt_hide": "Hide how other programs are run"}
def write(folder, files):
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def run(code, folder):
    """What a new Python says that looks for packages in a folder first."""
    search = [str(folder), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    return subprocess.run(
        [sys.executable, *code], env=env, capture_output=True, text=True
    )


folder = tempfile.TemporaryDirectory()  # for files of this chapter

# %% [markdown]
# ## The message
#
# <a id="oom"></a>
# ### `torch.OutOfMemoryError: CUDA out of memory. Tried to allocate … GPU 0 has a total capacity of …`
#
# Our card is a laptop's, with 6 GiB. PyTorch never gets all of it: the CUDA context, with the code of the driver and the libraries, takes its part. We measured 726 MB of it on an H200 and 737 MB on an H100, [step by step](../book/records.md#beside-pytorch-the-context); 0.47 GiB are published for an A100 {cite}`ml-engineering`. Nobody has measured the laptop's. We take the H200's for it, as the [estimator](../book/estimator.md) does. Yours will differ.
#
# On this card we fine-tune gpt2-large {cite}`radford2019`, with batch 1, 512 tokens and no dropout.

# %%
CONTEXT = cards()["RTX 4050 Laptop"].context


def new_card(alloc_conf="", context=CONTEXT):
    return VirtualGPU(
        capacity=6 * GiB,
        name="laptop",
        alloc_conf=alloc_conf,
        context=context,
    )


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the batch", "code_prompt_hide": "Hide the batch"}
def inputs(dtype, length=512):
    ids = torch.zeros(1, length, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.zeros(1, 1, length, length, dtype=dtype),
        "position_ids": torch.arange(length)[None],
    }


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show one training step", "code_prompt_hide": "Hide one training step"}
def fine_tune(card, dtype, make_optimizer, recordings=None):
    """One training step; tells how far it came, and why no further."""
    stage = "loading"
    try:
        config = models.config("gpt2-large", attn_implementation="eager")
        model = models.build(config, card.device, dtype)
        optimizer = make_optimizer(model.parameters())
        batch = inputs(dtype).items()
        batch = {name: tensor.to(card.device) for name, tensor in batch}
        with contextlib.ExitStack() as stack:
            if recordings is not None:
                recording = card.record(model, optimizer)
                recordings.append(stack.enter_context(recording))
            stage = "forward"
            logits = model(**batch, use_cache=False).logits
            loss = cross_entropy(logits[0], batch["input_ids"][0])
            stage = "backward"
            loss.backward()
            stage = "optimizer step"
            optimizer.step()
    except torch.OutOfMemoryError as error:
        return stage, str(error), state(card)
    return "", "", state(card)


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the figures", "code_prompt_hide": "Hide the figures"}
def state(card):
    return {
        "capacity": card.mem_get_info()[1],
        "free": card.mem_get_info()[0],
        "process": CONTEXT + card.memory_reserved(),
        "allocated": card.memory_allocated(),
        "unallocated": card.memory_reserved() - card.memory_allocated(),
        "peak": card.max_memory_allocated(),
    }


# %%
with new_card() as card:
    stage, message, at_error = fine_tune(card, torch.float32, optim.AdamW)
print(f"stopped in: {stage}\n")
show(message)

# %% [markdown]
# {numref}`until-it-is-full` shows what filled the card up to that moment.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "until-it-is-full", "caption": "Fine-tuning gpt2-large on a card of 6 GiB, up to the error: allocated memory by kind. Dashed: what the card has for PyTorch."}, "image": {"alt": "Allocated memory of the card up to the error, stacked by kind. Parameters fill half of it from the start, and forward adds a slope of activations up to the dashed line of the card, where the program stops."}}
with new_card() as card:
    fine_tune(card, torch.float32, optim.AdamW, recordings := [])
figure = timeline(recordings[0], limit=6 * GiB - CONTEXT)

# %% [markdown]
# The parameters take half of the card. Then forward adds activations, layer by layer, until nothing is left. There are no gradients and no optimizer states yet.
#
# Now the message, word by word. The right column is what PyTorch's functions said at that moment.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
WORDS = [
    ("Tried to allocate", "the segment, the request rounded up", ""),
    ("total capacity of", "`torch.cuda.mem_get_info()[1]`", "capacity"),
    ("of which", "`torch.cuda.mem_get_info()[0]`", "free"),
    ("this process has", "segments and CUDA context", "process"),
    ("the allocated memory", "`memory_allocated()`", "allocated"),
    ("by PyTorch, and", "reserved minus allocated", "unallocated"),
]
rows = []
for words, meaning, key in WORDS:
    says = re.search(words + r" ([\d.]+ [KMG]iB)", message)[1]
    here = binary(at_error[key]) if key else ""
    numbers = [
        text.replace(" ", "\N{NO-BREAK SPACE}") for text in (says, here)
    ]
    rows.append((words + " …", meaning, *numbers))
table(["the message", "what it is", "says", "this GPU"], rows)

# %% [markdown]
# **Why.** *Tried to allocate* is small: it is the last straw. What matters is *allocated by PyTorch*, which is nearly the whole card. Compare it with the formula: in FP32, parameters, gradients and AdamW's states need 16 bytes for each parameter before any activation.

# %%
sizes = estimate.dimensions("gpt2-large")
wanted = estimate.training(sizes, "adamw", "fp32")
print(f"estimated: {wanted.total / GB:.2f} GB without activations")
print(f"the card:  {(6 * GiB - CONTEXT) / GB:.2f} GB for PyTorch")

# %% [markdown]
# **Cure.** Need less. We try again with fewer bytes for each parameter.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
ADAMW8 = bitsandbytes.optim.AdamW8bit
TRIES = {
    "FP32, AdamW": (torch.float32, optim.AdamW),
    "BF16, AdamW": (torch.bfloat16, optim.AdamW),
    "BF16, 8-bit AdamW": (torch.bfloat16, ADAMW8),
    "BF16, SGD": (torch.bfloat16, optim.SGD),
}
rows = []
for name, (dtype, make_optimizer) in TRIES.items():
    with new_card() as card:
        stage, message, then = fine_tune(card, dtype, make_optimizer)
    outcome = f"out of memory in {stage}" if stage else "fits"
    rows.append((name, outcome, then["peak"]))
table(["6 GiB card", "one step", "peak, this GPU (B)"], rows)

# %% [markdown]
# BF16 with AdamW gets as far as the optimizer. AdamW makes its states at the first step, and they don't fit. Eight-bit states do. You can also take a smaller batch or length, activation checkpointing, or LoRA: [Activations and peaks](05_activations_and_peaks.ipynb) measures each, and [Fine-tune an 8B model](14_fine_tune_8b.ipynb) puts them together.
#
# **Prevent.** Ask the [estimator](../book/estimator.md) first. Then run your script on a virtual card of your card's size: [Your own script](13_your_own_script.ipynb).

# %% [markdown]
# <a id="fragmentation"></a>
# ### `CUDA out of memory`, while gigabytes are free
#
# Sometimes the message says that a lot of memory *is reserved by PyTorch but unallocated*, and the request is smaller than that. Then the memory is there, but in pieces.
#
# Here is a program that does it. Large **activations** come and go. Then an optimizer makes its **states**, which stay. Then a longer batch needs one **large** tensor.


# %%
def empty(mebibytes):
    return torch.empty(mebibytes * MiB, dtype=torch.int8, device="meta")


def make_states():
    return [empty(400) for _ in range(4)]


# %%
def program(card, states_first=False, between=False, again=False):
    states = make_states() if states_first else None
    activations = [empty(768) for _ in range(4)]
    del activations
    if between:
        card.empty_cache()
    states = states or make_states()
    try:
        return states, empty(3584)
    except torch.OutOfMemoryError:
        if not again:
            raise
    card.empty_cache()
    return states, empty(3584)


# %%
with new_card(context=0) as card:
    try:
        program(card)
    except torch.OutOfMemoryError as error:
        show(str(error).partition(" If reserved")[0])
        free = 6 * GiB - card.memory_allocated()
        pieces = card.memory_snapshot()
print(f"\nwanted: 3.50 GiB    not allocated: {binary(free)}")

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "in-pieces", "caption": "The segments of the card when the request fails. Each state keeps a segment of its own."}, "image": {"alt": "Four segments of the large pool, 768 MiB each. In every one the first 400 MiB are in use by a state and the remaining 368 MiB are free. No free piece is larger than that."}}
figure = segments(pieces)

# %% [markdown]
# **Why.** This is fragmentation, drawn in {numref}`in-pieces`. Each of the four segments once held an activation. The first state was cut from the first segment. The 368 MiB that remained were too small for the second state, so it cut the next segment, and so on. PyTorch can't give any segment back, because a state lives in each. The 3 GiB outside are too few as well. And memory can't be moved, because tensors hold addresses.
#
# **Cures.** Each row is the same program with one thing changed.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
CURES = {
    "nothing": {},
    "`empty_cache()` after the error, then again": {"again": True},
    "`empty_cache()` between activations and states": {"between": True},
    "the states first": {"states_first": True},
    "`expandable_segments:True`": {"alloc_conf": "expandable_segments:True"},
    "`max_split_size_mb:256`": {"alloc_conf": "max_split_size_mb:256"},
}


def outcome(alloc_conf="", **how):
    with new_card(alloc_conf, context=0) as card:
        try:
            kept = program(card, **how)
        except torch.OutOfMemoryError:
            return "out of memory", ""
        return f"fits, {len(kept[0])} states kept", card.memory_reserved()


table(
    ["what is changed", "the large tensor", "reserved, this GPU (B)"],
    [(name, *outcome(**how)) for name, how in CURES.items()],
)

# %% [markdown]
# - **`empty_cache()` after the error** changes nothing. PyTorch did it before it gave up. It gives whole segments back, and here none is whole.
# - **`empty_cache()` between** the two phases works: the empty segments are gone before a state can settle in them. It costs time, so call it once, not at every step.
# - **The states first:** allocate what stays before what goes. Then the states share segments of their own.
# - **`max_split_size_mb:256`** keeps PyTorch from cutting a free block of 256 MiB or more for a smaller request.
# - **`expandable_segments:True`** has one segment for all, which grows by pages {cite}`pytorch-cuda-notes`. Free pieces side by side become one, as in {numref}`expandable`.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "expandable", "caption": "The same requests in one expandable segment: the large tensor fits."}, "image": {"alt": "One expandable segment of the large pool. Four states of 400 MiB lie side by side at its beginning, then the tensor of 3584 MiB. Next to nothing is free."}}
with new_card("expandable_segments:True", context=0) as card:
    kept = program(card)
    figure = segments(card.memory_snapshot())
    del kept

# %% [markdown]
# **Prevent.** PyTorch reads the setting once, so set it before Python starts: `PYTORCH_ALLOC_CONF=expandable_segments:True python train.py`. The virtual GPU also replays `garbage_collection_threshold`, which PyTorch only heeds if `torch.cuda.set_per_process_memory_fraction` has set a limit. It refuses what it does not replay:

# %%
told(lambda: new_card("roundup_power2_divisions:[256:1]"))

# %% [markdown]
# <a id="snapshot"></a>
# ### Which line holds the memory? A snapshot
#
# PyTorch can note every allocation with the line of Python that made it {cite}`pytorch-memory-snapshot`. On CUDA you call `torch.cuda.memory._record_memory_history()`. `gpu.record_memory_history()` does the same on a real or a virtual GPU, and writes the same file. We look for a leak: a validation without `torch.no_grad()`, whose outputs keep all activations.


# %%
def make_model():
    return nn.Sequential(
        *(nn.Linear(1024, 1024, device="meta") for _ in range(4))
    )


def validate(model):
    return [model(torch.empty(8192, 1024, device="meta")) for _ in range(2)]


# %%
card = VirtualGPU(capacity=6 * GiB, name="laptop").open()
card.record_memory_history()
model = make_model()
outputs = validate(model)
snapshot_file = Path(folder.name, "snapshot.pickle")
card.dump_snapshot(snapshot_file)
print(f"allocated: {card.memory_allocated():,} B")

# %% [markdown]
# PyTorch reads the file at the command line. Each line is a segment of 20 MiB or more, and each character in brackets stands for 20 MiB of it. A letter is one block. A digit is several blocks that fill so many tenths.

# %%
viz = ["-m", "torch.cuda._memory_viz", "stats", str(snapshot_file)]
show(run(viz, "").stdout.partition("\nLegend")[0])

# %% [markdown]
# In the browser, drop the file on [pytorch.org/memory_viz](https://pytorch.org/memory_viz); it stays on your machine. *Active Memory Timeline* shows what is alive when: click on a band to see the lines that made it. *Allocator State History* shows segments and blocks.
#
# Or ask the snapshot in Python. A block's `frames` begin with the innermost line:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
held = Counter()
for segment in card.snapshot()["segments"]:
    for block in segment["blocks"]:
        names = [frame["name"] for frame in block["frames"]]
        for maker in ("make_model", "validate"):
            if maker in names:
                held[maker] += block["requested_size"]
for maker, nbytes in held.most_common():
    print(f"{maker:12}{nbytes:14,} B")

# %% [markdown]
# `validate` holds the input and the outputs of four layers, twice. cuBLAS's workspace was made there, too. **Cure:**

# %%
del outputs
with torch.no_grad():
    outputs = validate(model)
print(f"allocated: {card.memory_allocated():,} B")
del model, outputs
card.close()

# %% [markdown]
# ## It grows each step
#
# If the first steps run and a later one fails, each step leaves something behind. Look at `torch.cuda.memory_allocated()` after each step: it should repeat itself. In the six scripts that follow it doesn't. In each, `yield` is the end of a step, where we read it, and "cuda" is a virtual card of 6 GiB. {numref}`five-leaks` shows them side by side.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how steps are watched", "code_prompt_hide": "Hide how steps are watched"}
seen = {}


def after_each(script, steps=4, reserved=False, alloc_conf="", name=None):
    """Show what is allocated (or reserved) after each step."""
    gc.collect()
    gc.disable()  # the collector comes when it likes: here it doesn't
    with as_cuda(capacity=6 * GiB, alloc_conf=alloc_conf) as card:
        told = card.memory_reserved if reserved else card.memory_allocated
        running = script()
        sizes = [told() for _ in zip(range(steps), running)]
        running.close()
    gc.enable()
    seen[script] = sizes
    sizes = "".join(f"{nbytes / MiB:9,.3f}" for nbytes in sizes)
    print(f"{name or script.__name__:15}{sizes} MiB")


def peak_of(action, *arguments):
    with as_cuda(capacity=64 * GiB) as card:
        action(*arguments)
        return card.max_memory_allocated()


# %%
def new_model():
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).cuda()


def new_batch(rows=8192):
    return torch.randn(rows, 1024, device="cuda")


# %% [markdown]
# <a id="grows"></a>
# ### It grows each step: `total += loss`


# %%
def validation():
    model, total = new_model(), 0
    while True:
        loss = model(new_batch()).mean()
        total += loss
        yield


def with_item():
    model, total = new_model(), 0
    while True:
        loss = model(new_batch()).mean()
        total += loss.item()
        yield


# %%
after_each(validation)
after_each(with_item)

# %% [markdown]
# **Why.** `total` is a tensor with a graph, and the graph holds what a backward would need: every activation of every batch. **Cure:** `loss.item()`, a plain number.
#
# If you keep a loss *after* `loss.backward()`, it does little harm, because backward frees the activations. The loss itself stays, 512 B a step:


# %%
def training():
    model, losses = new_model(), []
    while True:
        loss = model(new_batch()).mean()
        loss.backward()
        losses.append(loss)
        yield


after_each(training)

# %% [markdown]
# <a id="outputs"></a>
# ### It grows each step: outputs in a list


# %%
def outputs():
    model, kept = new_model(), []
    while True:
        output = model(new_batch())
        output.mean().backward()
        kept.append(output)  # cure: output.detach().cpu()
        yield


after_each(outputs)

# %% [markdown]
# **Why.** Backward freed the activations, but an output in a list lives on, 32 MiB each time. `detach()` alone does not help here: it drops the graph and shares the memory. **Cure:** keep it on the host, with `output.detach().cpu()`, or keep only the number that you want from it.

# %% [markdown]
# <a id="hooks"></a>
# ### It grows each step: hooks


# %%
def hooks():
    model, features = new_model(), []
    model[1].register_forward_hook(lambda m, i, out: features.append(out))
    while True:
        model(new_batch()).mean().backward()
        yield


after_each(hooks)

# %% [markdown]
# **Why.** This is the same list in another place. The hook outlives the step, and so does what it collects. **Cure:** clear the list at each step, and call `handle.remove()` when you are done. If you register hooks again and again, they pile up as well.

# %% [markdown]
# <a id="cycles"></a>
# ### It grows each step: cycles, until garbage is collected


# %%
class Step:
    def __init__(self, batch):
        self.batch = batch
        self.callback = self.report  # a method holds its object

    def report(self):
        return self.batch.shape


def cycles():
    while True:
        Step(new_batch())
        yield


# %%
after_each(cycles)
with as_cuda() as card:
    Step(new_batch())
    print(f"{card.memory_allocated() / MiB} MiB", end=", ")
    gc.collect()
    print(f"after gc.collect(): {card.memory_allocated() / MiB} MiB")

# %% [markdown]
# **Why.** Python frees an object when nothing refers to it. Here the object refers to itself, through one of its own methods. So it waits for the garbage collector, which counts objects, not gigabytes. **Cure:** break the cycle, with a `weakref` or without the callback. A `gc.collect()` at each step is a crutch. `torch.utils.viz._cycles.warn_tensor_cycles()` finds such cycles on a GPU.

# %% [markdown]
# <a id="graph"></a>
# ### It grows each step: `retain_graph=True`


# %%
def graph():
    model, losses = new_model(), []
    while True:
        loss = model(new_batch()).mean()
        loss.backward(retain_graph=True)
        losses.append(loss)
        yield


after_each(graph)

# %% [markdown]
# **Why.** It tells backward to keep the activations for another backward. Each loss then holds its whole step, as in the validation above. People often add it to silence *Trying to backward through the graph a second time*. **Cure:** remove it, and `detach()` what goes from one step into the next, such as a hidden state.

# %% [markdown]
# <a id="lengths"></a>
# ### It grows each step: lengths that grow


# %%
def lengths():
    model = new_model().requires_grad_(False)
    for rows in range(1000, 7000, 1000):
        model(new_batch(rows))
        yield


def longest_first():
    model = new_model().requires_grad_(False)
    for rows in range(6000, 0, -1000):
        model(new_batch(rows))
        yield


# %%
after_each(lengths, 6, reserved=True)
after_each(lengths, 6, reserved=True, alloc_conf="expandable_segments:True")
after_each(longest_first, 6, reserved=True)

# %% [markdown]
# **Why.** Nothing leaks: *allocated* stays the same. But each batch is longer than any free block, so PyTorch takes new segments, and *reserved* grows. **Cure:** run the longest batch first, so that all later ones fit into its blocks (third line). Or pad to a few lengths. Or set `expandable_segments:True` (second line).

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code", "figure": {"name": "five-leaks", "caption": "Allocated memory after each of six steps: four scripts that leak, and the validation that is cured."}, "image": {"alt": "Allocated memory after each of six steps, a line for each of five scripts. retain_graph and the validation with total += loss climb steeply and side by side, cycles and kept outputs and hooks climb a quarter as fast, and the cured validation stays level."}}
LEAKS = (validation, graph, outputs, cycles, with_item)
with contextlib.redirect_stdout(None):
    for script in LEAKS:
        after_each(script, 6)
figure, axes = plt.subplots()
for script, marker in zip(LEAKS, "os^Dx"):
    curve = [nbytes / MB for nbytes in seen[script]]
    axes.plot(range(1, 7), curve, marker=marker, label=script.__name__)
axes.set(xlabel="step", ylabel="allocated after it (MB)", ylim=(0, None))
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# ## Where the memory is
#
# <a id="del"></a>
# ### Why does memory stay after `del model`?
#
# `del` removes a name. The memory is freed when the **last** reference goes, and three kinds of reference hide well. First, a **traceback**: an error keeps every local variable of every function that it passed through.

# %%
card = VirtualGPU(capacity=6 * GiB, name="laptop").open()


def forward():
    activations = empty(500)
    raise ValueError(f"shape {tuple(activations.shape)}")


try:
    forward()
except ValueError as error:
    kept = error  # a notebook does this for you, in sys.last_exc
print(f"the error is handled:  {card.memory_allocated():,} B")
traceback.clear_frames(kept.__traceback__)
print(f"its frames are cleared: {card.memory_allocated():,} B")

# %% [markdown]
# Second, a **closure**: a function that uses a variable keeps it. Hooks and callbacks are functions.


# %%
def make_callback(model):
    def callback():
        return model.shape

    return callback


model = empty(500)
callback = make_callback(model)
del model
print(f"model deleted:    {card.memory_allocated():,} B")
del callback
print(f"callback deleted: {card.memory_allocated():,} B")

# %% [markdown]
# Third, the **prompt**. Python and Jupyter keep what a line shows: as `_`, and Jupyter in `Out` as well.

# %%
model = empty(500)
model

# %%
del model
print(f"model deleted:  {card.memory_allocated():,} B")
get_ipython().run_line_magic("xdel", "_")  # in a cell: %xdel _
print(f"and the prompt: {card.memory_allocated():,} B")
card.close()

# %% [markdown]
# `%xdel name` deletes a variable with everything that Jupyter keeps of it; `%reset -f out` leaves the last one. In plain Python, `_ = None` is enough.
#
# **Prevent.** Do the work in a function: its variables end with it. Show numbers such as `model.shape`, not tensors. After an error in a notebook, set `sys.last_exc = None` or restart the kernel. Reference cycles wait for `gc.collect()`.

# %% [markdown]
# <a id="smi"></a>
# ### Why does `nvidia-smi` show more than `memory_allocated()`?
#
# Because it shows what the process has taken from the card, and PyTorch takes more than it needs at the moment.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
with new_card() as card:
    tensor, gone = empty(100), empty(900)
    del gone
    free, total = card.mem_get_info()
    rows = [
        (
            "`memory_allocated()`",
            "blocks of tensors",
            card.memory_allocated(),
        ),
        ("`memory_reserved()`", "+ free blocks", card.memory_reserved()),
        ("`nvidia-smi`, this process", "+ the CUDA context", total - free),
    ]
    del tensor
table(["who says it", "what it counts", "this GPU (B)"], rows)

# %% [markdown]
# PyTorch gives the free blocks to the next tensors without asking the driver. `empty_cache()` returns them. The context stays as long as the process. Other programs on the card come on top.

# %% [markdown]
# <a id="worker"></a>
# ### Nothing runs, and the card is full: workers and kernels
#
# Memory is freed when its process ends. A notebook's kernel runs until you shut it down, even if you close its tab. Workers of a `DataLoader` live as long as its iterator, and `persistent_workers=True` keeps them between epochs:

# %%
loader = DataLoader(range(8), num_workers=2, persistent_workers=True)
numbers = sorted(int(x) for x in loader)
print("read to the end:", len(multiprocessing.active_children()), "workers")
del loader
gc.collect()
print("loader deleted: ", len(multiprocessing.active_children()), "workers")

# %% [markdown]
# Let workers make CPU tensors and leave CUDA to the main process. Then they hold nothing on the card. To find out who does, run `nvidia-smi --query-compute-apps=pid,used_memory --format=csv`. PyTorch's own message names them too: *Process … has … memory in use*, for every other process. The virtual GPU knows only one process and does not replay that sentence.

# %% [markdown]
# <a id="workspace"></a>
# ### Everything is deleted. What are the last 8.125 MiB?
#
# cuBLAS's workspace, taken at the first matrix product. Someone asked this about a model of two numbers, for which `memory_allocated()` printed 8519680 on an A10G {cite}`pytorch-issue-95668`.

# %%
with VirtualGPU(capacity=6 * GiB, name="laptop") as card:
    model, x = (
        nn.Linear(1, 1, device="meta"),
        torch.empty(1, 1, device="meta"),
    )
    y = model(x)
    del model, x, y
    left = card.memory_allocated()
    card.clear_cublas_workspaces()
    print(f"left: {left:,} B = {left / MiB} MiB")
    print(f"workspaces cleared: {card.memory_allocated()} B")

# %% [markdown]
# On CUDA, `torch._C._cuda_clearCublasWorkspaces()` frees it. But the next product takes it again, so leave it alone. From Hopper on it is 32 MiB. `CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8` makes it 8.125 MiB everywhere, as this book does.

# %% [markdown]
# <a id="adam"></a>
# ### Why is Adam's peak higher than 4P?
#
# Four copies are what stays. During its step Adam holds a fifth for a moment, because it updates all tensors at once. `fused=True` avoids it. [One training step](04_mlp_adam_vs_sgd.ipynb) shows it as a timeline.

# %%
with VirtualGPU(capacity=6 * GiB, name="laptop") as card:
    model = make_model()
    optimizer = optim.Adam(model.parameters())
    P = card.memory_allocated()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    print(f"after the step: {card.memory_allocated() / P:.2f} P")
    print(f"at its peak:    {card.max_memory_allocated() / P:.2f} P")
    del model, optimizer, parameter

# %% [markdown]
# <a id="units"></a>
# ### GB or GiB?
#
# Both, and often under the same name. Parameters times bytes gives GB. Cards, `nvidia-smi` (in MiB) and PyTorch's messages count in powers of two. At this size the gap is 7 %:

# %%
print(f"a card of 24 GiB:         {24 * GiB:,} B = {24 * GiB / GB:.2f} GB")
print(f"a model of 24 GB takes:   {24 * GB / GiB:.2f} GiB of it")

# %% [markdown]
# ## It saved nothing
#
# <a id="saves"></a>
# ### Why does AMP not save memory?
#
# Because it is made for speed, and keeps its parameters in FP32. Autocast converts on the way. The results of matrix products become half as large, but parameters get a second copy in 16 bits for as long as the context lasts.

# %%
model = nn.Linear(64, 64)
with torch.autocast("cpu", dtype=torch.bfloat16):
    activation = model(torch.ones(8, 64))
activation.sum().backward()
adam = optim.Adam(model.parameters())
adam.step()
print("activation:     ", activation.dtype)
print("parameter:      ", model.weight.dtype)
print("gradient:       ", model.weight.grad.dtype)
print("optimizer state:", adam.state[model.weight]["exp_avg"].dtype)

# %% [markdown]
# So the 16 bytes for each parameter stay 16, and the copies come on top. It only saves memory where activations outweigh them, with large batches or long sequences.


# %%
def trained(amp, rows):
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8))).cuda()
    optimizer = optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = model(torch.randn(rows, 4096, device="cuda")).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
rows = []
for tokens in (64, 4096, 16384):
    without = peak_of(trained, False, tokens)
    rows.append((f"{tokens:,}", without, peak_of(trained, True, tokens)))
table(["rows in a batch", "FP32, peak (B)", "autocast, peak (B)"], rows)

# %% [markdown]
# [Mixed precision](06_mixed_precision.ipynb) counts what it adds and what it saves.

# %% [markdown]
# <a id="quarter"></a>
# ### Why do int8 and 4 bits save less than half and a quarter?
#
# There are three reasons. Only the matrices of linear layers are quantised, not embeddings, norms and biases. Each block of weights carries a scale. And activations and caches stay as they are. [gpt2-large](07_gpt2_large.ipynb) takes it apart, byte by byte. By formula:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
fp16 = estimate.parameter_bytes(sizes, "fp16")
rows = [("FP16", fp16, "1.000")]
for name in ("int8", "nf4"):
    held = estimate.parameter_bytes(sizes, "fp16", name)
    rows.append((name.upper(), held, f"{held / fp16:.3f}"))
table(["parameters as", "estimated (B)", "of FP16"], rows)

# %% [markdown]
# <a id="fp8"></a>
# ### Why does FP8 not save memory?
#
# Because training in FP8 means *computing* in FP8. Weights, gradients, states and what backward keeps stay in BF16; both operands are cast just before each product. Here is such a layer:


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the product", "code_prompt_hide": "Hide the product"}
def product(a, b):
    one = torch.ones((), device="cuda")  # the scale
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    b = b.t().contiguous().t()
    return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)


# %%
class FP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    def backward(ctx, upper):
        x, weight = ctx.saved_tensors
        return product(upper, weight), product(upper.t().contiguous(), x)


# %%
class LinearFP8(nn.Linear):
    def forward(self, x):
        return FP8.apply(x, self.weight)


def trained_in(layer, rows):
    layers = (layer(4096, 4096, bias=False) for _ in range(8))
    model = nn.Sequential(*layers).bfloat16().cuda()
    optimizer = optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        model(x).mean().backward()
        optimizer.step()


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
rows = []
for tokens in (64, 4096, 16384):
    bf16, fp8 = (
        peak_of(trained_in, layer, tokens) for layer in (nn.Linear, LinearFP8)
    )
    rows.append((f"{tokens:,}", bf16, fp8, fp8 - bf16))
table(
    ["rows in a batch", "BF16, peak (B)", "FP8, peak (B)", "more (B)"], rows
)

# %% [markdown]
# FP8 needs more each time, by the operands' copies. **Cure.** There is none: it is made for speed. FP8 saves memory where you *store* in it: weights for inference, a KV cache, an optimizer's states, or what backward keeps.

# %% [markdown]
# <a id="recompute"></a>
# ### Why did checkpointing save nothing?
#
# There are three usual reasons. You put **one** checkpoint around the whole model, so backward makes all activations again at once. Or the **peak is elsewhere**, in the optimizer's step or at the logits. Or it was **not on**: transformers skips it in `model.eval()`.


# %%
def deep(width, forward, rows):
    layer = nn.Sequential(nn.Linear(width, width), nn.GELU())
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(12))).cuda()
    optimizer = optim.AdamW(model.parameters())
    x = torch.randn(rows, width, device="cuda", requires_grad=True)
    forward(model, x).mean().backward()
    optimizer.step()


# %%
def each_layer(model, x):
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def whole(model, x):
    return checkpoint(model, x, use_reentrant=False)


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the table", "code_prompt_hide": "Hide the table"}
rows = []
HOW = {"none": nn.Sequential.__call__, "whole": whole, "layers": each_layer}
for name, width, batch in (
    ("activations are most", 1024, 8192),
    ("states are most", 4096, 512),
):
    peaks = [peak_of(deep, width, f, batch) for f in HOW.values()]
    rows.append((name, *peaks))
table(["peak (B)", "none", "around the model", "around each layer"], rows)

# %% [markdown]
# **Cure.** If activations are what is large, put a checkpoint around each layer, as `gradient_checkpointing_enable()` does. If the optimizer is, take `fused=True`, 8-bit states or LoRA. If the logits are, see [the logits](16_logits.ipynb).

# %% [markdown]
# <a id="gpus"></a>
# ### Why did two GPUs not help?
#
# Because data parallelism gives each GPU the whole model, and buckets for the gradients on top. Here is the same step, alone and as the first of two:


# %%
def one_step(wrap):
    model = wrap(new_model())
    optimizer = optim.AdamW(model.parameters(), fused=True)
    model(new_batch(64)).mean().backward()
    optimizer.step()


def of_two(model):
    dist.init_process_group("nccl")
    return DistributedDataParallel(model)


# %%
print(f"alone:  {peak_of(one_step, nn.Sequential):,} B")
with as_cuda() as card, first_of(2):
    one_step(of_two)
    print(f"of two: {card.max_memory_allocated():,} B on each")

# %% [markdown]
# **Cure.** Two GPUs halve the time, or let you double the batch. To halve the *model*, divide it with FSDP or ZeRO, as in [Beyond one GPU](10_beyond_one_gpu.ipynb). `device_map="auto"` puts half of the layers on each GPU, but one of them waits while the other works.

# %% [markdown]
# ## It runs out somewhere else
#
# <a id="evaluation"></a>
# ### Why does evaluation run out where training did not?
#
# Training frees its activations in backward. An evaluation has no backward. Without `no_grad` it keeps them as long as you keep its outputs, for example to score them later.


# %%
def evaluation(no_grad, to_host):
    model, logits = new_model(), []
    while True:
        with torch.inference_mode(no_grad):
            output = model(new_batch())
            logits.append(output.cpu() if to_host else output)
        yield


after_each(lambda: evaluation(False, False), name="as it is")
after_each(lambda: evaluation(True, False), name="inference_mode")
after_each(lambda: evaluation(True, True), name="and .cpu()")

# %% [markdown]
# **Cure.** Put `torch.inference_mode()` around it, and move what you keep to the host, or keep only a metric. A Trainer also collects logits on the GPU. `eval_accumulation_steps` moves them to the host, and `preprocess_logits_for_metrics` makes them small first.

# %% [markdown]
# <a id="loading"></a>
# ### Why does loading take twice the model?
#
# Because there are two copies for a moment: the model, and the dictionary that it is loaded from. We save a small model and load it in four ways.


# %%
def small(device):
    layers = (nn.Linear(512, 512, device=device) for _ in range(8))
    return nn.Sequential(*layers)


file = Path(folder.name, "model.pt")
torch.save(small("cpu").state_dict(), file)


def to_the_card():
    small("cuda").load_state_dict(torch.load(file, map_location="cuda"))


def by_the_host():
    small("cuda").load_state_dict(torch.load(file, map_location="cpu"))


# %%
def assigned():
    model = small("meta")  # shapes without memory
    state = torch.load(file, map_location="cuda")
    model.load_state_dict(state, assign=True)


def half_on_the_card():
    small("cuda").half()


for action in (to_the_card, by_the_host, assigned, half_on_the_card):
    print(f"{action.__name__:17} peak {peak_of(action) / MiB:6.2f} MiB")

# %% [markdown]
# **Cure.** Use `map_location="cpu"`, or `assign=True`, which makes the dictionary's tensors the model's own. And convert first: `model.half().cuda()` takes half of what `model.cuda().half()` takes at its peak. `from_pretrained(..., dtype=..., device_map=...)` does both.

# %% [markdown]
# <a id="resume"></a>
# ### Why does it run out after `load_state_dict`, and ran before?
#
# A first run has no optimizer states until its first step. A resumed run has them from the start, and often the checkpoint as well.

# %%
model = small("cpu")
optimizer = optim.AdamW(model.parameters())
model(torch.ones(1, 512)).sum().backward()
optimizer.step()
stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
torch.save(stored, file)


def resume(map_location):
    stored = torch.load(file, map_location=map_location)
    model = small("cuda")
    model.load_state_dict(stored["model"])
    optimizer = optim.AdamW(model.parameters())
    optimizer.load_state_dict(stored["optimizer"])
    return model, optimizer, stored


# %%
for place in ("cuda", "cpu"):
    with as_cuda() as card:
        model, optimizer, stored = resume(place)
        with_checkpoint = card.memory_allocated() / MiB
        del stored
        without = card.memory_allocated() / MiB
        print(f'"{place}": {with_checkpoint:.2f} MiB', end=", ")
        print(f"without the checkpoint {without:.2f} MiB")
        del model, optimizer

# %% [markdown]
# **Why.** If the checkpoint is on the card, the optimizer takes its tensors as they are, but the model copies them. So the weights exist twice until you delete the checkpoint. **Cure:** `map_location="cpu"`, and `del` the checkpoint before the first step. And count the states from the start: what fits in the first step may fail in the second.

# %% [markdown]
# ## Arguments that have changed
#
# This is what the source articles wrote, and what the same line does today. A checkpoint of two tiny layers, made here in BF16, is enough to see it.

# %%
saved = Path(folder.name, "tiny")
tiny = models.config(
    "gpt2-large",
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=2,
    vocab_size=512,
)
models.build(tiny, "cpu", torch.bfloat16).save_pretrained(saved)


def load(**options):
    return AutoModelForCausalLM.from_pretrained(saved, **options)


# %% [markdown]
# <a id="amp"></a>
# ### ``FutureWarning: `torch.cuda.amp.autocast(args...)` is deprecated``

# %%
for old in (torch.cuda.amp.autocast, torch.cuda.amp.GradScaler):
    told(old)

# %% [markdown]
# **Why.** Mixed precision works on more than CUDA, so the device became an argument. **Cure,** with no warning:

# %%
autocast = told(lambda: torch.amp.autocast("cuda", dtype=torch.float16))
scaler = told(lambda: torch.amp.GradScaler("cuda"))
print("no warning")

# %% [markdown]
# <a id="fp16"></a>
# ### `TypeError: Accelerator.__init__() got an unexpected keyword argument 'fp16'`

# %%
told(lambda: Accelerator(fp16=True))

# %% [markdown]
# **Why.** There is more than one half precision. **Cure:** name it.

# %%
accelerator = told(lambda: Accelerator(mixed_precision="bf16", cpu=True))
print(accelerator.mixed_precision)

# %% [markdown]
# <a id="dtype"></a>
# ### `` `torch_dtype` is deprecated! Use `dtype` instead! ``

# %%
model = told(lambda: load(torch_dtype=torch.float16))
print(model.dtype)

# %% [markdown]
# **Cure:** `dtype=`. If you give neither, beware: transformers 5 takes the checkpoint's own type, where it once took FP32.

# %%
print("dtype=torch.float16:", told(lambda: load(dtype=torch.float16)).dtype)
print("nothing said:       ", told(load).dtype)

# %% [markdown]
# <a id="bits"></a>
# ### `TypeError: GPT2LMHeadModel.__init__() got an unexpected keyword argument 'load_in_8bit'`

# %%
told(lambda: load(load_in_8bit=True))

# %% [markdown]
# **Why.** `from_pretrained` passes on to the model what it does not know. **Cure:** a configuration for the quantisation, and a type for the rest. Without that type, what is not quantised keeps the checkpoint's.

# %%
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
int8 = told(lambda: load(quantization_config=EIGHT_BITS, dtype=torch.float16))
for dtype, count in Counter(p.dtype for p in int8.parameters()).items():
    print(f"{count:2} tensors of {dtype}")

# %% [markdown]
# <a id="silent"></a>
# ### Those that say nothing, or little
#
# `low_cpu_mem_usage=True` is accepted and ignored, since loading needs little memory anyway. Two old names of `torch.cuda` still work and say what they are called now. `PYTORCH_CUDA_ALLOC_CONF` is still read; today its name is `PYTORCH_ALLOC_CONF`.

# %%
told(lambda: load(low_cpu_mem_usage=True))
print("low_cpu_mem_usage: not a word")
for old in (torch.cuda.memory_cached, torch.cuda.max_memory_cached):
    told(old)

# %% [markdown]
# **Prevent.** Run your script once with `python -W error::FutureWarning`: what will break later breaks now.

# %% [markdown]
# ## Precision
#
# <a id="which"></a>
# ### Which dtype was loaded?
#
# Ask the tensors. A model's `.dtype` is that of its first parameter, and its configuration says what was saved or asked for. [Qwen2](08_qwen2.ipynb) loads one model in several ways.

# %%
mixed = told(lambda: load(dtype=torch.float16))
mixed.lm_head = nn.Linear(64, 512, bias=False)  # a part in another type
print("model.dtype:       ", mixed.dtype)
print("model.config.dtype:", mixed.config.dtype)
for dtype, count in Counter(p.dtype for p in mixed.parameters()).items():
    print(f"parameters:         {count} of {dtype}")

# %% [markdown]
# <a id="int8"></a>
# ### `` ValueError: Calling `cuda()` is not supported for `8-bit` quantized models ``
#
# bitsandbytes puts a quantised model in its place while loading. Moving or casting it afterwards would undo that. We use the 8-bit model from above:

# %%
for move in (int8.cuda, int8.half, lambda: int8.to(torch.bfloat16)):
    told(move)

# %% [markdown]
# **Cure.** Say both while loading: `device_map={"": 0}` for the card, and `dtype=` for what is not quantised. Older scripts often end with `.to(device)`: leave it out.

# %% [markdown]
# <a id="half"></a>
# ### `NotImplementedError: "…" not implemented for 'Half'`
#
# You can store any type on any device. To compute, you need a kernel for this operation, this type and this device. PyTorch once had no FP16 matrix product for CPUs. It has one today, and still lacks others:

# %%
half = torch.eye(3).half()
print("FP16 product on the CPU:", (half @ half).dtype)
told(lambda: torch.linalg.cholesky(half))
told(lambda: half.to(torch.float8_e4m3fn) + 1)
told(lambda: nn.Linear(3, 3).half()(torch.eye(3)))

# %% [markdown]
# **Cure.** Compute that operation in FP32, and convert back. The last message is another matter: model and data have different types. Convert the data, or use autocast.

# %%
print(torch.linalg.cholesky(half.float()).half().dtype)
print(nn.Linear(3, 3).half()(torch.eye(3).half()).dtype)

# %% [markdown]
# On a GPU, ask first. Cards before Ampere run BF16 by conversion, so `torch.cuda.is_bf16_supported()` is true there. `is_bf16_supported(including_emulation=False)` asks about the hardware. [Conversion and hardware](17_conversion_and_hardware.ipynb) has the table.

# %% [markdown]
# <a id="nan"></a>
# ### `loss: nan` in FP16
#
# FP16 ends at 65,504. A sum of squares soon exceeds that and becomes infinity. Infinity minus infinity is not a number, and one such loss ruins every parameter.

# %%
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    logits = torch.full((1, 3), 300.0, dtype=dtype)
    squared = logits * logits
    loss = cross_entropy(squared, torch.tensor([0]))
    print(f"{dtype!s:15} 300 * 300 = {squared[0, 0]:8}  loss {loss:.4f}")

# %% [markdown]
# At the other end, numbers below 6e-8 become zero, and training stands still. **Cure.** BF16, if the hardware has it: its range is FP32's. Or autocast with a `GradScaler`. Then parameters stay in FP32 and gradients are multiplied up. After an infinity the scaler skips the step and lowers the scale:

# %%
weight = nn.Parameter(torch.ones(1))
sgd = optim.SGD([weight], lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
for step, factor in enumerate((float("inf"), 1.0)):
    sgd.zero_grad()
    scaler.scale(weight.sum() * factor).backward()
    scaler.step(sgd)
    scaler.update()
    print(f"step {step}: weight {weight.item():.1f},", end=" ")
    print(f"scale {scaler.get_scale():.0f}")

# %% [markdown]
# The first step was skipped, and the scale halved. The second was taken. **Prevent.** `torch.autograd.set_detect_anomaly(True)` names the operation that made the first NaN. It is slow, so use it only to search.

# %% [markdown]
# ## Two errors of 2023
#
# The article that this book began with met these two. Both are about versions, not memory, and neither comes back with what you install today.
#
# <a id="import"></a>
# ### `RuntimeError: Failed to import transformers.models.gpt2.modeling_gpt2 because of the following error (look up to see its traceback): module 'wandb.proto.wandb_internal_pb2' has no attribute 'Result'`
#
# The source article {cite}`hoperj2024` met this one. It takes an old transformers and a damaged wandb. Neither is installed here, so two stand-ins play them: a few files in a folder of their own, which a new Python process finds first.
#
# The old transformers imported a model's module when it was first asked for, and put its own message around any failure. On the way it also imported wandb, if that was installed, whether you used it or not.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the stand-ins", "code_prompt_hide": "Hide the stand-ins"}
stand_ins = tempfile.TemporaryDirectory()
WANDB = {
    "wandb/__init__.py": """
        import wandb.proto.wandb_internal_pb2
        answer = wandb.proto.wandb_internal_pb2.Result
        """,
    "wandb/proto/wandb_internal_pb2.py": "# of another version: no Result",
}
OLD_TRANSFORMERS = {
    "transformers/__init__.py": """
        import importlib
        def load(name):
            try:
                return importlib.import_module(name)
            except Exception as error:
                raise RuntimeError(
                    f"Failed to import {name} because of the following "
                    f"error (look up to see its traceback):\\n{error}"
                ) from error
        """,
    "transformers/models/gpt2/modeling_gpt2.py": "import wandb",
}
old = write(Path(stand_ins.name, "old"), WANDB | OLD_TRANSFORMERS)

# %%
LOAD = """
import transformers
transformers.load("transformers.models.gpt2.modeling_gpt2")
"""
failed = run(["-c", LOAD], old)
show(
    "\n".join(x for x in failed.stderr.splitlines() if not x.startswith(" "))
)

# %% [markdown]
# **Why.** These are the lines of the traceback that are not indented: one for each error. Read such a chain from the top. The last error says only that something failed. *The above exception was the direct cause* points up, and the first error is the real one: wandb asks its own generated file for a name that the file does not have. Files of two versions are mixed. GPT-2 has nothing to do with it.
#
# In code, `__cause__` leads there:

# %%
READ = f"""
try:
{textwrap.indent(LOAD, "    ")}
except RuntimeError as error:
    while error.__cause__:
        error = error.__cause__
    print(type(error).__name__, error, sep=": ")
"""
show(run(["-c", READ], old).stdout)

# %% [markdown]
# **Cure.** Reinstall the package that the *first* error names: `pip uninstall wandb`, then `pip install wandb` if you need it. The article's second way, `WANDB_DISABLED`, is no longer read: transformers 5 reports to nobody by default, and `report_to="none"` says so explicitly. It also imports wandb only where it is asked to report there. The same damaged wandb does no harm to the transformers of today:

# %%
damaged = write(Path(stand_ins.name, "damaged"), WANDB)
NOW = """
import sys
from transformers import GPT2LMHeadModel, TrainingArguments
print(GPT2LMHeadModel.__name__, "imported; wandb:", "wandb" in sys.modules)
print("report_to:", TrainingArguments("unused").report_to)
"""
show(run(["-c", NOW], damaged).stdout)

# %% [markdown]
# **Prevent.** One environment for each project, and packages installed together, so that pip can see what fits what.

# %% [markdown]
# <a id="offload"></a>
# ### `TypeError: dispatch_model() got an unexpected keyword argument 'offload_index'`
#
# The article's second error. transformers hands a model to accelerate's `dispatch_model`. If transformers is newer than accelerate, it passes an argument that the other does not know yet. Accelerate 0.12.0 had no `offload_index`; 0.15.0 had it. The stand-in has the older one's signature and its metadata:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the stand-in", "code_prompt_hide": "Hide the stand-in"}
OLD_ACCELERATE = {
    "accelerate/__init__.py": """
        def dispatch_model(
            model, device_map, main_device=None, state_dict=None,
            offload_dir=None, offload_buffers=False,
            preload_module_classes=None,
        ): ...
        """,
    "accelerate-0.12.0.dist-info/METADATA": """\
        Metadata-Version: 2.1
        Name: accelerate
        Version: 0.12.0
        """,
}
mismatch = write(Path(stand_ins.name, "mismatch"), OLD_ACCELERATE)
CALL = """
from accelerate import dispatch_model
dispatch_model("a model", device_map={"": 0}, offload_index=None)
"""
show(run(["-c", CALL], mismatch).stderr.splitlines()[-1])

# %% [markdown]
# **Why.** An *unexpected keyword argument* inside of a library, in a call that you did not write, is nearly always two packages of different ages. `every-byte check` compares each package with what the book needs, and says which one is behind:

# %%
checked = run(["-m", "every_byte", "check"], mismatch).stdout
show(next(x for x in checked.splitlines() if "accelerate:" in x))

# %% [markdown]
# **Cure.** The command at the end of that line. Here is the same call's signature with what this book runs on:

# %%
known = inspect.signature(accelerate.dispatch_model).parameters
print("offload_index" in known)

# %% [markdown]
# **Prevent.** Upgrade packages that call each other in one command: `pip install --upgrade transformers accelerate`. The check exits with 1 if anything is amiss, so a script can begin with it.

# %% [markdown]
# ## What to remember
#
# - In an out-of-memory message, look at *allocated* first. The allocator's settings only help if *reserved but unallocated* is large.
# - **References** hold memory, also those of tracebacks, closures and prompts. A snapshot names the line.
# - If the first step fits and a later one fails, look for what a step leaves behind.

# %% [markdown]
# ## Exercises
#
# **1.** The program whose memory is in pieces fails with states of 400 MiB. For which sizes does it fit without any cure? Predict, then replay 300 to 700 MiB.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for size in (300, 380, 390, 500, 700):
    with new_card(context=0) as card:
        try:
            activations = [empty(768) for _ in range(4)]
            del activations
            states = [empty(size) for _ in range(4)]
            large = empty(3584)
            said = f"fits, {card.memory_reserved() / MiB:.0f} MiB reserved"
            del large
        except torch.OutOfMemoryError:
            said = f"fails, {len(card.memory_snapshot())} segments left"
        states = None
    print(f"states of {size} MiB: {said}")

# %% [markdown]
# <details><summary>Why?</summary>
#
# Up to 384 MiB, two states share a segment. So two of the four segments stay whole, and PyTorch can give them back. Above that, each state pins a segment of its own.
#
# </details>

# %% [markdown]
# **2.** A process on the 6 GiB card may use half of it: `per_process_memory_fraction:0.5`. What does the message say now, and which number is new?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
with new_card("per_process_memory_fraction:0.5") as card:
    try:
        empty(4000)
    except torch.OutOfMemoryError as error:
        show(str(error).partition(" If reserved")[0])

# %% [markdown]
# <details><summary>Which one?</summary>
#
# *3.00 GiB allowed*: half of the card. More than the request is free, but it still fails. On CUDA, `torch.cuda.set_per_process_memory_fraction(0.5)` does the same.
#
# </details>

# %% [markdown]
# **3.** Why must `PYTORCH_ALLOC_CONF` be set before Python starts, and what goes wrong with `os.environ[...] = ...` in the middle of a notebook?
#
# <details><summary>Solution</summary>
#
# PyTorch reads it once, when its allocator is set up. Later changes of the variable are not seen. In the first cell, before `import torch`, it works; afterwards `torch.cuda.memory._set_allocator_settings(...)` is the way.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [From parameters to bytes](01_parameters_to_bytes.ipynb) explains segments and blocks from the start. [Training and inference](03_training_and_inference.ipynb) has the formulas that tell whether a model fits. The [glossary](../book/glossary.md) has the words.
