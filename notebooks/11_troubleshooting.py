# %% [markdown]
# # Troubleshooting: the message, its cause, its cure
#
# After this chapter you can read an error of loading, precision or memory, cause it on purpose, and cure it.
#
# - **Time:** a few minutes for the entry you came for, 40 for all; about a minute to run.
# - **Needs:** nothing. It runs on any machine, a GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

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
import torch
import transformers
from accelerate import Accelerator
from IPython import get_ipython
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from every_byte import VirtualGPU, estimate, open_gpu
from every_byte.units import GB, GiB, MiB, binary
from helpers import models
from helpers.environment import versions
from helpers.plots import segments, use_book_style
from helpers.tables import table

transformers.logging.disable_progress_bar()
use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "accelerate", "bitsandbytes"))

# %% [markdown]
# Each entry has the message as its heading, then a cell that **causes** it, why it happens, a cell in which the **cure** works, and how to prevent it. Find yours:
#
# <ul>
# <li>Imports: <a href="#import">Failed to import transformers…</a> · <a href="#offload">dispatch_model() got an unexpected keyword argument 'offload_index'</a></li>
# <li>Arguments that have changed: <a href="#amp">torch.cuda.amp</a> · <a href="#fp16">Accelerator(fp16=True)</a> · <a href="#dtype">torch_dtype</a> · <a href="#bits">load_in_8bit</a> · <a href="#silent">those that say nothing</a></li>
# <li>Out of memory: <a href="#oom">CUDA out of memory</a> · <a href="#fragmentation">while gigabytes are free</a> · <a href="#snapshot">a snapshot of the memory</a></li>
# <li>Ask for memory: <a href="#smi">nvidia-smi shows more</a> · <a href="#del">it stays after <code>del</code></a> · <a href="#workspace">the last 8.125 MiB</a> · <a href="#worker">workers and kernels</a> · <a href="#adam">Adam's peak</a> · <a href="#units">GB or GiB</a></li>
# <li>Precision, asked: <a href="#which">which dtype was loaded</a> · <a href="#int8">moving an int8 model</a> · <a href="#quarter">why 4 bits are not a quarter</a> · <a href="#half">not implemented for 'Half'</a> · <a href="#nan">NaN losses</a> · <a href="#saves">why AMP does not save memory</a></li>
# </ul>
#
# Messages are those of the versions that the book's lock pins, word for word; here they are only wrapped to fit the page. Cards in this chapter are **replayed** ones of their own, so that you see the same on any machine.


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


# %% [markdown]
# ## Imports
#
# <a id="import"></a>
# ### `RuntimeError: Failed to import transformers.models.gpt2.modeling_gpt2 because of the following error (look up to see its traceback): module 'wandb.proto.wandb_internal_pb2' has no attribute 'Result'`
#
# The source article {cite}`hoperj2024` met this one. It takes an old transformers and a damaged wandb. Neither is installed here, so two stand-ins play them: a few files in a folder of their own, which a new Python process finds first.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how stand-ins are run", "code_prompt_hide": "Hide how stand-ins are run"}
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


# %% [markdown]
# The old transformers imported a model's module when it was first asked for, and put any failure into words of its own. On the way there it imported wandb, if it was installed, whether you used it or not.

# %%
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

# %%
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
# ## Arguments that have changed
#
# What the source articles wrote, and what the same line does today. A checkpoint of two tiny layers, made here in BF16, is enough to see it.

# %%
checkpoint = tempfile.TemporaryDirectory()
tiny = models.config(
    "gpt2-large",
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=2,
    vocab_size=512,
)
models.build(tiny, "cpu", torch.bfloat16).save_pretrained(checkpoint.name)


def load(**options):
    return AutoModelForCausalLM.from_pretrained(checkpoint.name, **options)


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
# **Cure:** `dtype=`. And without either, beware: transformers 5 takes the checkpoint's own type, where it once took FP32.

# %%
print("dtype=torch.float16:", told(lambda: load(dtype=torch.float16)).dtype)
print("nothing said:       ", told(load).dtype)

# %% [markdown]
# <a id="bits"></a>
# ### `TypeError: GPT2LMHeadModel.__init__() got an unexpected keyword argument 'load_in_8bit'`

# %%
told(lambda: load(load_in_8bit=True))

# %% [markdown]
# **Why.** What `from_pretrained` does not know it passes on to the model. **Cure:** a configuration for the quantisation, and a type for the rest. Without the second, what is not quantised keeps the checkpoint's type.

# %%
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
int8 = told(lambda: load(quantization_config=EIGHT_BITS, dtype=torch.float16))
for dtype, count in Counter(p.dtype for p in int8.parameters()).items():
    print(f"{count:2} tensors of {dtype}")

# %% [markdown]
# <a id="silent"></a>
# ### Those that say nothing, or little
#
# `low_cpu_mem_usage=True` is accepted and ignored: loading is frugal anyway. Two old names of `torch.cuda` still work and say what they are called now. `PYTORCH_CUDA_ALLOC_CONF` is still read; its name today is `PYTORCH_ALLOC_CONF`.

# %%
told(lambda: load(low_cpu_mem_usage=True))
print("low_cpu_mem_usage: not a word")
for old in (torch.cuda.memory_cached, torch.cuda.max_memory_cached):
    told(old)

# %% [markdown]
# **Prevent.** Run your script once with `python -W error::FutureWarning`: what will break later breaks now.

# %% [markdown]
# ## Out of memory
#
# <a id="oom"></a>
# ### `torch.OutOfMemoryError: CUDA out of memory. Tried to allocate … GPU 0 has a total capacity of …`
#
# The card is a laptop's, with 6 GiB. A part of it is never PyTorch's: the {term}`CUDA context`, with the driver's and the libraries' code. One published measurement found 0.47 GiB of it on an A100 {cite}`ml-engineering`. We give our card as much; yours differs.
#
# On it we fine-tune gpt2-large: batch 1, 512 tokens, dropout off.

# %%
CONTEXT = round(0.47 * GiB)


def new_card(alloc_conf="", context=CONTEXT):
    return VirtualGPU(
        capacity=6 * GiB,
        name="laptop",
        alloc_conf=alloc_conf,
        context=context,
    )


def inputs(dtype, length=512):
    ids = torch.zeros(1, length, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.zeros(1, 1, length, length, dtype=dtype),
        "position_ids": torch.arange(length)[None],
    }


# %%
def fine_tune(card, dtype, make_optimizer):
    """One training step; tells how far it came, and why no further."""
    stage = "loading"
    try:
        config = models.config("gpt2-large", attn_implementation="eager")
        model = models.build(config, card.device, dtype)
        optimizer = make_optimizer(model.parameters())
        batch = inputs(dtype).items()
        batch = {name: tensor.to(card.device) for name, tensor in batch}
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


# %%
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
# Now word by word. The right column is what the functions said at that moment, written as PyTorch writes it.

# %%
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
# **Why.** *Tried to allocate* is small: it is the drop that spills the glass. What matters is *allocated by PyTorch*, nearly the whole card. Compare it with the formula: FP32 parameters, gradients and AdamW's states want 16 bytes per parameter before any activation.

# %%
sizes = estimate.dimensions("gpt2-large")
wanted = estimate.training(sizes, "adamw", "fp32")
print(f"estimated: {wanted.total / GB:.2f} GB without activations")
print(f"the card:  {(6 * GiB - CONTEXT) / GB:.2f} GB for PyTorch")

# %% [markdown]
# **Cure.** Want less. We try again with fewer bytes for each parameter.

# %%
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
# BF16 with AdamW comes as far as the optimizer: its states are made at the first step, so that is where it ends. Eight-bit states make room for it. More ways: a smaller batch or length, activation checkpointing, LoRA; [Activations and peaks](05_activations_and_peaks.ipynb) measures each.
#
# **Prevent.** Estimate first: `estimate.training(...)`, then replay the step on a `VirtualGPU` of your card's size, as above.

# %% [markdown]
# <a id="fragmentation"></a>
# ### `CUDA out of memory`, while gigabytes are free
#
# Sometimes the message says that much *is reserved by PyTorch but unallocated*, and the request would fit into what is free in all. Then memory is there, but in pieces.
#
# A program that does it: large **activations** come and go; then an optimizer makes its **states**, which stay; then a longer batch wants one **large** tensor.


# %%
def empty(mebibytes):
    return torch.empty(mebibytes * MiB, dtype=torch.int8, device="meta")


def program(card, states_first=False, between=False, again=False):
    """Ends in an error, or returns what is alive."""
    if states_first:
        states = [empty(400) for _ in range(4)]
    activations = [empty(768) for _ in range(4)]
    del activations
    if between:
        card.empty_cache()
    if not states_first:
        states = [empty(400) for _ in range(4)]
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

# %% mystnb={"image": {"alt": "Four segments of the large pool, 768 MiB each. In every one the first 400 MiB are in use by a state and the remaining 368 MiB are free. No free piece is larger than that."}}
figure = segments(pieces)

# %% [markdown]
# **Why.** This is {term}`fragmentation`. Each of the four segments once held an activation. The first state was cut from the first of them; what remained, 368 MiB, was too small for the second state, which cut the next, and so on. No segment can be given back, because a state lives in each. Outside are 3 GiB, too few as well. Memory cannot be moved: tensors hold addresses.
#
# **Cures.** Each is the same program, and one thing changed.

# %%
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
# - **`empty_cache()` after the error** changes nothing. PyTorch did it before it gave up. It gives whole segments back to *other* programs, and here none is whole.
# - **`empty_cache()` between** the two phases works: the emptied segments are gone before a state can settle in them. It costs time, so once, not at every step.
# - **What stays first, what goes later**: then states lie in segments of their own.
# - **`max_split_size_mb:256`** forbids that a free block of 256 MiB or more be cut for a smaller request.
# - **`expandable_segments:True`** has one segment for all, which grows by pages {cite}`pytorch-cuda-notes`. Free pieces side by side become one, as the figure shows.

# %% mystnb={"image": {"alt": "One expandable segment of the large pool. Four states of 400 MiB lie side by side at its beginning, then the tensor of 3584 MiB. Next to nothing is free."}}
with new_card("expandable_segments:True", context=0) as card:
    kept = program(card)
    figure = segments(card.memory_snapshot())
    del kept

# %% [markdown]
# **Prevent.** Set it before Python starts, for it is read once: `PYTORCH_ALLOC_CONF=expandable_segments:True python train.py`. `garbage_collection_threshold` is replayed as well; PyTorch heeds it only where `torch.cuda.set_per_process_memory_fraction` set a limit. What the virtual GPU does not replay it refuses:

# %%
told(lambda: new_card("roundup_power2_divisions:[256:1]"))

# %% [markdown]
# <a id="snapshot"></a>
# ### Which line holds the memory? A snapshot
#
# PyTorch can note every allocation with the line of Python that made it {cite}`pytorch-memory-snapshot`. On CUDA it is `torch.cuda.memory._record_memory_history()`; `gpu.record_memory_history()` does the same on either GPU, and writes the same file. We look for a leak: a validation without `torch.no_grad()`, whose outputs keep all activations.


# %%
def make_model():
    return nn.Sequential(
        *(nn.Linear(1024, 1024, device="meta") for _ in range(4))
    )


def validate(model):
    return [model(torch.empty(8192, 1024, device="meta")) for _ in range(2)]


card = VirtualGPU(capacity=6 * GiB, name="laptop").open()
card.record_memory_history()
model = make_model()
outputs = validate(model)
snapshot_file = Path(checkpoint.name, "snapshot.pickle")
card.dump_snapshot(snapshot_file)
print(f"allocated: {card.memory_allocated():,} B")

# %% [markdown]
# PyTorch reads the file at the command line. Each line is a segment of 20 MiB or more, each character in brackets 20 MiB of it: a letter for one block, a digit for several, which fill so many tenths.

# %%
viz = ["-m", "torch.cuda._memory_viz", "stats", str(snapshot_file)]
show(run(viz, "").stdout.partition("\nLegend")[0])

# %% [markdown]
# In the browser: drop the file on [pytorch.org/memory_viz](https://pytorch.org/memory_viz); it stays on your machine. *Active Memory Timeline* shows what is alive when, a click on a band the lines that made it. *Allocator State History* shows segments and blocks.
#
# Or ask the snapshot in Python. A block's `frames` begin with the innermost line:

# %%
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
# `validate` holds the input and the outputs of four layers, and that twice; cuBLAS's workspace came to life there too. **Cure:**

# %%
del outputs
with torch.no_grad():
    outputs = validate(model)
print(f"allocated: {card.memory_allocated():,} B")
del model, outputs
card.close()

# %% [markdown]
# ## Ask for memory
#
# <a id="smi"></a>
# ### Why does `nvidia-smi` show more than `memory_allocated()`?
#
# Because it shows what the process took from the card, and PyTorch takes in advance.

# %%
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
# Kept memory serves the next tensor without asking the driver. `empty_cache()` returns it; the context stays as long as the process. Other programs on the card come on top.

# %% [markdown]
# <a id="del"></a>
# ### Why does memory stay after `del model`?
#
# `del` removes a name. Memory goes when the **last** reference goes. Three hide well. First, a **traceback**: an error keeps every local variable of every function that it passed through.

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
# `%xdel name` deletes a variable with all that Jupyter keeps of it; `%reset -f out` leaves the last one. In plain Python `_ = None` does it. **Prevent.** Do the work in a function: its variables end with it. Show numbers, not tensors: `model.shape`. After an error in a notebook, `sys.last_exc = None` or a new kernel. Reference cycles wait for `gc.collect()`.

# %% [markdown]
# <a id="workspace"></a>
# ### Everything is deleted. What are the last 8.125 MiB?
#
# cuBLAS's {term}`workspace`, taken at the first matrix product. The question was asked with a model of two numbers, and `memory_allocated()` printed 8519680 on an A10G {cite}`pytorch-issue-95668`.

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
# On CUDA: `torch._C._cuda_clearCublasWorkspaces()`. It is taken again at the next product, so leave it. Hopper takes 32 MiB; `CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8` makes it 8.125 MiB everywhere, as this book does.

# %% [markdown]
# <a id="worker"></a>
# ### Nothing runs, and the card is full: workers and kernels
#
# Memory ends with its process. A notebook's kernel runs until it is shut down, even with its tab closed. Workers of a `DataLoader` live as long as its iterator, and `persistent_workers=True` keeps them between epochs:

# %%
loader = DataLoader(range(8), num_workers=2, persistent_workers=True)
numbers = sorted(int(x) for x in loader)
print("read to the end:", len(multiprocessing.active_children()), "workers")
del loader
gc.collect()
print("loader deleted: ", len(multiprocessing.active_children()), "workers")

# %% [markdown]
# Workers should make CPU tensors and leave CUDA to the main process; then they hold no card. To find who does: `nvidia-smi --query-compute-apps=pid,used_memory --format=csv`. PyTorch's own message says it too, with a sentence *Process … has … memory in use* for every other process. The virtual GPU knows one process, so that sentence is not replayed.

# %% [markdown]
# <a id="adam"></a>
# ### Why is Adam's peak higher than 4P?
#
# Four copies are what stays. During its step Adam holds a fifth for a moment, because it updates all tensors at once. [Adam against SGD](04_mlp_adam_vs_sgd.ipynb) shows it as a timeline.

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
# Both, and often under the same name. Parameters times bytes is naturally in GB; cards, `nvidia-smi` (MiB) and PyTorch's messages count in powers of two. The gap is 7 % at this size:

# %%
print(f"a card of 24 GiB:         {24 * GiB:,} B = {24 * GiB / GB:.2f} GB")
print(f"a model of 24 GB takes:   {24 * GB / GiB:.2f} GiB of it")

# %% [markdown]
# ## Precision, asked
#
# <a id="which"></a>
# ### Which dtype was loaded?
#
# Ask the tensors. A model's `.dtype` is that of its first parameter, and a configuration says what was saved or wished. [Qwen2](08_qwen2.ipynb) loads one model in several ways.

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
# bitsandbytes puts a quantised model where it belongs while loading. Moving or casting it afterwards would undo that. We use the 8-bit model from above:

# %%
for move in (int8.cuda, int8.half, lambda: int8.to(torch.bfloat16)):
    told(move)

# %% [markdown]
# **Cure.** Say both while loading: `device_map={"": 0}` for the card, `dtype=` for what is not quantised. Older scripts often end with `.to(device)`: leave it out.

# %% [markdown]
# <a id="quarter"></a>
# ### Why do int8 and 4 bits save less than half and a quarter?
#
# Three reasons. Only matrices of linear layers are quantised, not embeddings, norms and biases. Each block carries a scale. And activations and caches stay as they are. [gpt2-large](07_gpt2_large.ipynb) takes it apart, byte by byte. By formula:

# %%
fp16 = estimate.parameter_bytes(sizes, "fp16")
rows = [("FP16", fp16, "1.000")]
for name in ("int8", "nf4"):
    held = estimate.parameter_bytes(sizes, "fp16", name)
    rows.append((name.upper(), held, f"{held / fp16:.3f}"))
table(["parameters as", "estimated (B)", "of FP16"], rows)

# %% [markdown]
# <a id="half"></a>
# ### `NotImplementedError: "…" not implemented for 'Half'`
#
# A type can be stored everywhere; computing needs a kernel for this operation, this type and this device. CPUs once lacked FP16's matrix product. They have it today, and still lack others:

# %%
half = torch.eye(3).half()
print("FP16 product on the CPU:", (half @ half).dtype)
told(lambda: torch.linalg.cholesky(half))
told(lambda: half.to(torch.float8_e4m3fn) + 1)
told(lambda: nn.Linear(3, 3).half()(torch.eye(3)))

# %% [markdown]
# **Cure.** Compute that operation in FP32, and convert back. The last message is another matter: model and data of different types. Convert the data, or use autocast.

# %%
print(torch.linalg.cholesky(half.float()).half().dtype)
print(nn.Linear(3, 3).half()(torch.eye(3).half()).dtype)

# %% [markdown]
# On a GPU ask first. BF16 runs on cards before Ampere by conversion, so `torch.cuda.is_bf16_supported()` is true there; `is_bf16_supported(including_emulation=False)` tells about the hardware. [Number formats](02_precision_formats.ipynb) has the table.

# %% [markdown]
# <a id="nan"></a>
# ### `loss: nan` in FP16
#
# FP16 ends at 65,504. A sum of squares passes that soon, infinity minus infinity is not a number, and one such loss ruins every parameter.

# %%
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    logits = torch.full((1, 3), 300.0, dtype=dtype)
    squared = logits * logits
    loss = cross_entropy(squared, torch.tensor([0]))
    print(f"{dtype!s:15} 300 * 300 = {squared[0, 0]:8}  loss {loss:.4f}")

# %% [markdown]
# At the other end, what is below 6e-8 becomes zero, and training stands still. **Cure.** BF16, where the hardware has it: FP32's range. Or autocast with a `GradScaler`: parameters stay in FP32, gradients are multiplied up, and a step with an infinity is left out, with a smaller scale after it:

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
# The first step left the weight as it was and halved the scale. The second was taken. **Prevent.** `torch.autograd.set_detect_anomaly(True)` names the operation that made the first NaN; it is slow, so only to search.

# %% [markdown]
# <a id="saves"></a>
# ### Why does AMP not save memory?
#
# Because it is made for speed and keeps its parameters in FP32. Autocast converts on the way: what matrix products give becomes half as large, and parameters get a copy in 16 bits for as long as the context lasts.

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
# So the 16 bytes per parameter stay 16. It saves where activations outweigh them: large batches, long sequences. [Mixed precision](06_mixed_precision.ipynb) counts both sides.

# %% [markdown]
# ## What to remember
#
# - Read a chained traceback from the **top**: the last error is only where it surfaced. A strange keyword inside a library means versions of different age: `every-byte check`.
# - In an out-of-memory message, look at *allocated* first. Only if *reserved but unallocated* is large are the settings of the allocator of any use.
# - Memory is held by **references**, of tracebacks, closures and prompts too. A snapshot names the line.

# %% [markdown]
# ## Exercises
#
# **1.** The program above fails with states of 400 MiB. For which sizes does it fit without any cure? Predict, then replay 300 to 700 MiB.

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
# Up to 384 MiB two states share a segment, so two of the four segments become whole again and PyTorch can give them back. Above, each state pins a segment of its own.
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
# *3.00 GiB allowed*: half of the card. More than the request is free, and still it fails. On CUDA, `torch.cuda.set_per_process_memory_fraction(0.5)` does the same.
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
