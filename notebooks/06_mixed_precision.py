# %% [markdown]
# # Mixed precision: what autocast casts, keeps and saves
#
# **Does mixed precision save memory?** Not by itself: it stores parameters, gradients and optimizer states in FP32 as before, and adds a copy of the weights in 16 bits while forward runs. It saves on activations, and it buys speed; memory comes down when the weights themselves are stored in 16 bits.
#
# After this chapter you can say what each way of training in 16 bits stores in which dtype, what it saves, and when it breaks.
#
# - **Time:** 15 minutes to read, under a minute to run.
# - **Needs:** nothing. A GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import gc
import warnings
from dataclasses import asdict
from textwrap import fill

warnings.filterwarnings("ignore", "IProgress not found")  # of no use here

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

from every_byte import estimate, open_gpu
from every_byte.estimate import Dimensions
from every_byte.formats import BF16, FP16
from every_byte.units import GB, MB
from helpers.environment import versions
from helpers.measured import CARD, COLUMNS, beside_replay
from helpers.mlp import SimpleMLP
from helpers.mnist import mnist
from helpers.plots import COLORS, stacked_bars, use_book_style
from helpers.tables import table

gc.freeze()  # collecting garbage need not look at what was imported
use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "accelerate", "transformers"))

# %% [markdown]
# ## Two ways into 16 bits
#
# The article that this book began with {cite}`hoperj2024` shows both, for FP16 and for BF16:
#
# - **All in half precision:** `model.half()` or `model.to(torch.bfloat16)`. Weights, gradients, states and activations take two bytes.
# - **Mixed precision (AMP):** weights, gradients and states stay in FP32. *Autocast* runs some operators in half precision and casts their inputs {cite}`micikevicius2018`.
#
# The article says that mixed precision saves memory. {numref}`peaks-of-a-billion` says otherwise: at the peak of a training step of a billion parameters, AMP takes more than FP32. The rest of this page takes that apart.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the model and its step", "code_prompt_hide": "Hide the model and its step"}
def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()
    gpu.reset_peak_memory_stats()


ONE_BILLION = Dimensions(
    model_type="llama",
    vocab_size=48_000,
    hidden_size=2_048,
    num_hidden_layers=20,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=5_632,
    tie_word_embeddings=True,
)
billion = sum(estimate.parameters(ONE_BILLION).values())


def build():
    sizes = {name: size for name, size in asdict(ONE_BILLION).items() if size}
    config = AutoConfig.for_model(
        **sizes, attn_implementation="eager", use_cache=False
    )
    with gpu.device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def texts(dtype, batch=4, length=512):
    """Token ids, a causal mask and positions, on the GPU."""
    mask = torch.full((1, 1, length, length), float("-inf"), dtype=dtype)
    given = {
        "input_ids": torch.zeros(batch, length, dtype=torch.int64),
        "attention_mask": mask.triu(1),
        "position_ids": torch.arange(length)[None],
    }
    return {name: value.to(gpu.device) for name, value in given.items()}


def step_of_a_billion(model, optimizer, given, enabled, set_to_none=True):
    optimizer.zero_grad(set_to_none)
    with torch.autocast(
        gpu.device.type, dtype=torch.bfloat16, enabled=enabled
    ):
        logits = model(**given).logits.flatten(0, 1)
        loss = cross_entropy(logits, given["input_ids"].flatten())
    loss.backward()
    optimizer.step()


def at_most(enabled, dtype, set_to_none=True, half=False):
    empty_card()
    model = build().to(dtype) if half else build()
    optimizer = optim.Adam(model.parameters())
    given = texts(dtype)
    step_of_a_billion(model, optimizer, given, enabled)
    with gpu.record(model, optimizer) as recorded:
        step_of_a_billion(model, optimizer, given, enabled, set_to_none)
    return recorded.steps


# %% tags=["hide-input"] mystnb={"image": {"alt": "Stacked bars of what is alive at the peak of a training step of a billion parameters. FP32 takes 23.38 GB, of which 10.6 GB are activations. AMP takes 23.97 GB: a tenth less activations, and 2 GB of cast weights. AMP with gradients kept takes 27.97 GB. All in BF16 takes 14.73 GB."}, "figure": {"name": "peaks-of-a-billion", "caption": "What is alive at the peak of the second training step of a model of a billion parameters, with Adam, on 4 texts of 512 tokens."}}
WAYS = {
    "FP32": (False, torch.float32),
    "AMP": (True, torch.bfloat16),
    "AMP, set_to_none=False": (True, torch.bfloat16, False),
    "BF16": (False, torch.bfloat16, True, True),
}
recorded = {name: at_most(*way) for name, way in WAYS.items()}
figure = stacked_bars(
    {
        "at the peak": {
            name: max(steps, key=lambda step: step.total)
            for name, steps in recorded.items()
        }
    }
)

# %% [markdown]
# ## What autocast decides
#
# PyTorch sorts operators into lists {cite}`pytorch-amp`: matrix products and convolutions run in half precision, sums, exponentials, norms and losses in FP32, and all others in the type of their inputs. CUDA and the CPU have lists of their own. So we ask both: what does an operator return for FP32, and what for FP16?

# %% tags=["hide-input"]
OPERATORS = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "conv2d": lambda x: F.conv2d(x[None], x[None, None]),
    "relu": F.relu,
    "x + x": lambda x: x + x,
    "layer_norm": lambda x: F.layer_norm(x, x.shape),
    "softmax": lambda x: x.softmax(-1),
    "exp": torch.exp,
    "sum": torch.sum,
    "cross_entropy": lambda x: cross_entropy(x, x[0].long()),
    "mse_loss": lambda x: F.mse_loss(x, x),
}


SHORT = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


def gives(operator, device, dtype):
    x = torch.ones(4, 4, dtype=dtype, device=device)
    with torch.autocast(x.device.type, dtype=torch.float16):
        return SHORT[operator(x).dtype]


ASKED = [
    (device, dtype)
    for device in (gpu.device, "cpu")
    for dtype in (torch.float32, torch.float16)
]
GIVEN = ("this GPU, of FP32", "of FP16", "CPU, of FP32", "of FP16")
table(
    ["operator", *GIVEN],
    [
        (name, *(gives(operator, *asked) for asked in ASKED))
        for name, operator in OPERATORS.items()
    ],
)

# %% [markdown]
# *This GPU* is the one named at the top of the page. The virtual one replays CUDA's lists, not the CPU's. On the CPU `layer_norm`, `softmax`, `exp` and `sum` stay in half precision. So bytes of activations that you measure there are not a GPU's.
#
# A matrix product needs its weight in half precision. Autocast casts it at its first use and keeps the copy in a **cache** until its context ends.

# %% [markdown]
# ## Predict
#
# For $N$ parameters, of which autocast casts all but the norms', and Adam:
#
# | | FP32 | AMP | all in 16 bits |
# | --- | --- | --- | --- |
# | parameters | $4N$ | $4N$ | $2N$ |
# | gradients | $4N$ | $4N$ | $2N$ |
# | Adam's states | $8N$ | $8N$ | $4N$ |
# | after the step | $16N$ | $16N$ | $8N$ |
# | cast weights, forward | | $2N$ | |
#
# So AMP stores nothing less, and during forward it stores $2N$ more. What it can save is activations: each layer's output is kept, with 4 bytes a number in FP32 and 2 under autocast. Autocast also keeps a cast copy of the images. From which batch size on does that pay off, for the article's network?

# %% tags=["hide-input"]
inputs, *outputs = SimpleMLP.widths
N = sum((m + 1) * n for m, n in zip(SimpleMLP.widths, SimpleMLP.widths[1:]))
saved = 2 * sum(outputs) - 2 * inputs
print(f"N = {N:,} parameters")
print(f"autocast costs 2 N = {2 * N:,} B, and saves {saved:,} B an image")
pays_from = -(-2 * N // saved)
print(f"it pays from {pays_from:,} images in a batch on")

# %% [markdown]
# ## Measure: the loops of the article
#
# We write each loop once and run it twice. It takes one step on the GPU, at the article's full size, so that we can count the bytes. And it trains on the digits for real: on the GPU if there is one, otherwise on the CPU. It is a generator, so that we can look at each step from outside.
#
# FP16 needs a `GradScaler`: it multiplies the loss before backward, and divides the gradients after. BF16 does not: `enabled=False` makes it do nothing.


# %%
def train_amp(
    model, loader, dtype, scaled, criterion=cross_entropy, **settings
):
    device = next(model.parameters()).device
    optimizer = optim.Adam(model.parameters(), **settings)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            loss = criterion(model(data), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield loss, optimizer


# %% [markdown]
# The other loop is plain PyTorch, for a model that is converted as a whole:


# %%
def train_plain(model, loader, optimizer_of=optim.Adam, **settings):
    like = next(model.parameters())
    optimizer = optimizer_of(model.parameters(), **settings)
    for data, target in loader:
        data = data.to(like.device, like.dtype)
        optimizer.zero_grad()
        loss = cross_entropy(model(data), target.to(like.device))
        loss.backward()
        optimizer.step()
        yield loss, optimizer


# %% [markdown]
# Accelerate {cite}`accelerate` wraps the same autocast and the same scaler. Its `prepare` makes forward run under autocast and turns the result into FP32, and the loss is computed outside. It chooses its device by itself and does not know the virtual one, so for the bytes we do by hand what `prepare` does.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how a step is looked at", "code_prompt_hide": "Hide how a step is looked at"}
def images(batch):
    return torch.zeros(batch, 1, 28, 28), torch.zeros(batch).long()


def one_step(loop, convert=None, batch=128, **settings):
    empty_card()
    with gpu.device:
        model = SimpleMLP()
    if convert:
        convert(model)
    looks = []
    model.register_forward_hook(lambda *_: looks.append(gpu.breakdown(model)))
    steps = loop(model, [images(batch)], **settings)
    _, optimizer = next(steps)
    return model, optimizer, looks[0], gpu.breakdown(model, optimizer)


KINDS = ("parameters", "cast weights", "gradients")
KINDS += ("optimizer states", "activations")
KEPT, ROWS = {}, []


def keeps(name, loop, cast=None, **settings):
    """Note one step's bytes by kind, and in which dtype they are."""
    model, optimizer, forward, after = one_step(loop, **settings)
    KEPT[name] = forward, after
    first = next(model.parameters())
    dtypes = {
        "parameters": first.dtype,
        "cast weights": cast,
        "gradients": first.grad.dtype,
        "optimizer states": optimizer.state[first]["exp_avg"].dtype,
    }
    for k in KINDS:
        dtype = SHORT.get(dtypes.get(k), "")
        ROWS.append((name, k, dtype, forward[k], after[k]))


def prepared(model):
    under_autocast = torch.autocast(gpu.device.type, dtype=torch.float16)
    model.forward = convert_outputs_to_fp32(under_autocast(model.forward))


def train_prepared(model, loader):
    optimizer = optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler(gpu.device.type)
    for data, target in loader:
        data, target = data.to(gpu.device), target.to(gpu.device)
        optimizer.zero_grad()
        loss = cross_entropy(model(data), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield loss, optimizer


# %% tags=["hide-input"]
FP16_, BF16_ = torch.float16, torch.bfloat16
keeps("FP32", train_plain)
keeps("BF16", train_plain, convert=nn.Module.bfloat16)
keeps("AMP, FP16", train_amp, cast=FP16_, dtype=FP16_, scaled=True)
keeps("AMP, BF16", train_amp, cast=BF16_, dtype=BF16_, scaled=False)
keeps("Accelerate, FP16", train_prepared, FP16_, convert=prepared)
columns = ["way", "kind", "dtype", "end of forward (B)", "after the step (B)"]
table(columns, [row for row in ROWS if row[0] in ("FP32", "AMP, FP16")])

# %% [markdown]
# Everything that lasts is in FP32. The cast weights come on top, and they are gone when the optimizer runs. A GradScaler looks for infinities in the gradients, and skips the step if it finds any; the virtual GPU replays a step without any. The scaler itself keeps 8 bytes, its factor and a counter.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the other ways", "code_prompt_hide": "Hide the other ways"}
table(columns, [row for row in ROWS if row[0] not in ("FP32", "AMP, FP16")])

# %% [markdown]
# BF16 takes the same bytes as FP16, except for the scaler. With Accelerate the context around forward has already ended when we look, so the cache is empty: what is left of the cast weights is what backward needs. The first layer's is not among them, since nobody asks for the gradient of an image.

# %% [markdown]
# ## For real
#
# We take a smaller network with the same layers, so that it trains in seconds on a CPU. Its numbers differ a little from machine to machine. So the check of this notebook does not compare them, and each cell ends in an assertion instead.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the digits and the network", "code_prompt_hide": "Hide the digits and the network"}
device = gpu.device if gpu.device.type == "cuda" else torch.device("cpu")
torch.set_num_threads(1)  # the quickest for so small a network


class Digits(SimpleMLP):
    widths = (784, 256, 128, 10)


def whole(digits):
    images = torch.stack([image for image, _ in digits])
    return TensorDataset(images, digits.targets)


train_set, test_set = whole(mnist(train=True)), whole(mnist(train=False))
print("layers:", " -> ".join(str(width) for width in Digits.widths))
print(f"{len(train_set):,} digits to train with, {len(test_set):,} to test")


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is trained", "code_prompt_hide": "Hide how it is trained"}
@torch.no_grad()
def accuracy(model):
    like = next(model.parameters())
    data, target = test_set.tensors
    chosen = model(data.to(like.device, like.dtype)).argmax(1)
    return (chosen.cpu() == target).float().mean().item()


LOSSES = {}


def train(name, loop, convert=None, **settings):
    torch.manual_seed(0)
    model = Digits().to(device)
    if convert:
        convert(model)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(train_set, 32, shuffle=True, generator=order)
    steps = loop(model, loader, **settings)
    LOSSES[name] = [loss.item() for loss, _ in steps]
    print(f"{name}: loss {LOSSES[name][0]:.3g} at first,", end=" ")
    print(f"{sum(LOSSES[name][-20:]) / 20:.3g} in the last 20 steps")
    print(f"{(right := accuracy(model)):.1%} of the test digits right")
    return model, right


# %% tags=["hide-input", "nbval-ignore-output"]
momentum = {"optimizer_of": optim.SGD, "lr": 0.03, "momentum": 0.9}
trained, right = train("FP32", train_plain)
rights = [
    right,
    train("AMP, FP16", train_amp, dtype=torch.float16, scaled=True)[1],
    train("AMP, BF16", train_amp, dtype=torch.bfloat16, scaled=False)[1],
    train("FP16, SGD", train_plain, nn.Module.half, **momentum)[1],
    train("BF16", train_plain, nn.Module.bfloat16)[1],
]
assert min(rights) > 0.9, rights

# %% [markdown]
# All of them learn. Converting a *trained* model is safer still: nothing is updated, so nothing gets lost on the way, and only the last digits of the logits move.

# %% tags=["hide-input", "nbval-ignore-output"]
exact = accuracy(trained)
halves = {
    "FP16": accuracy(trained.half()),
    "BF16": accuracy(trained.to(torch.bfloat16)),
}
print(
    f"FP32 {exact:.2%},", {k: f"{right:.2%}" for k, right in halves.items()}
)
assert all(abs(right - exact) < 0.01 for right in halves.values()), halves

# %% [markdown]
# ### Is it what you asked for?
#
# Accelerate's loop no longer shows what runs. So we ask the first layer for the dtype of its output.


# %%
def train_accelerate(model, loader, precision):
    AcceleratorState._reset_state(reset_partial_state=True)  # one a process
    accelerator = Accelerator(mixed_precision=precision)
    optimizer = optim.Adam(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for data, target in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(data), target)
        accelerator.backward(loss)
        optimizer.step()
        yield loss, optimizer


# %% tags=["hide-input", "nbval-ignore-output"]
rights = [
    train("Accelerate, BF16", train_accelerate, precision="bf16")[1],
    train("Accelerate, FP16", train_accelerate, precision="fp16")[1],
]
assert min(rights) > 0.9, rights

# %% tags=["hide-input", "nbval-ignore-output"]
computed = {}
for precision in ("fp16", "bf16"):
    model = Digits().to(device)

    def look(layer, given, output, asked=precision):
        computed[asked] = output.dtype

    model.layers[0].register_forward_hook(look)
    next(train_accelerate(model, DataLoader(train_set, 32), precision))
    print(f"asked for {precision}, computed in {SHORT[computed[precision]]}")

on_gpu = {"fp16": torch.float16, "bf16": torch.bfloat16}
on_cpu = on_gpu | {"fp16": torch.float32}
assert computed == (on_gpu if device.type == "cuda" else on_cpu), computed

# %% [markdown]
# On a CPU, Accelerate takes `mixed_precision="fp16"` and trains in FP32, without a word: no autocast, no scaler. It only does what you ask on a GPU. Check what really runs.

# %% [markdown]
# ## What goes wrong
#
# ### Adam's epsilon is zero in FP16
#
# Adam divides by $\sqrt{v} + \varepsilon$. PyTorch's default is $\varepsilon = 10^{-8}$, below the least number that FP16 can hold. $v$ is a mean of squared gradients, and the squares are soon too small as well.

# %% tags=["hide-input"]
print(f"least number of FP16: {FP16.smallest_subnormal:.1e}")
print(f"1e-8 becomes {FP16.round(1e-8)}, 1e-4 becomes {FP16.round(1e-4):.1e}")
print(f"the square of 1e-4 becomes {FP16.round(1e-4**2)}")

# %% tags=["hide-input", "nbval-ignore-output"]
model, right = train("FP16, Adam", train_plain, nn.Module.half)
weights = torch.cat([p.flatten() for p in model.parameters()])
print(f"{weights.isnan().float().mean():.0%} of the weights are not a number")
assert weights.isnan().any() and right < 0.2, right

# %% [markdown]
# Zero divided by zero is not a number, and one such weight spoils all the others. An $\varepsilon$ that FP16 can hold cures it here.

# %% tags=["hide-input", "nbval-ignore-output"]
_, right = train(
    "FP16, Adam, eps=1e-4", train_plain, nn.Module.half, eps=1e-4
)
assert right > 0.9, right

# %% [markdown]
# ### Gradients fall below FP16's least number
#
# Gradients are small. A loss with a small weight, one term of several, makes them smaller still. We divide ours by $2^{20}$. In FP32 this changes nothing for Adam, which divides it out again. {numref}`gradients-in-fp16` shows how many gradients FP16 rounds to zero.

# %% tags=["hide-input"]
WEIGHT = 2.0**-20


def weighted(output, target):
    return WEIGHT * cross_entropy(output, target)


def gradients(factor):
    """Of the loss, times a factor, in FP32: those that are not zero."""
    torch.manual_seed(0)
    model = Digits()
    data, target = (part[:32] for part in test_set.tensors)
    (factor * cross_entropy(model(data), target)).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    return found[found != 0].abs()


# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"image": {"alt": "Histogram of the sizes of gradients by powers of two. Gradients of the loss lie around 2 to the power of minus 11, nearly all above FP16's least number, 2 to the power of minus 24. Those of the loss divided by 2 to the 20 lie 20 powers lower, nearly all below it."}, "figure": {"name": "gradients-in-fp16", "caption": "Sizes of the gradients of a loss, and of the same loss divided by 2²⁰. The dotted line is the least number of FP16."}}
figure, axes = plt.subplots()
lost = {}
for (label, factor), color in zip(
    {"loss": 1.0, "loss / 2²⁰": WEIGHT}.items(),
    (COLORS["parameters"], COLORS["gradients"]),
):
    sizes = gradients(factor)
    lost[label] = (sizes.half() == 0).float().mean().item()
    said = f"{label}: FP16 makes {lost[label]:.1%} zero"
    powers = sizes.log2().numpy()
    axes.hist(powers, range(-50, 1), histtype="step", color=color, label=said)
axes.axvline(-24, color="black", linestyle=":")
axes.annotate("FP16's least", (-23, 0.94), xycoords=("data", "axes fraction"))
axes.set_xlabel("size of a gradient (power of two)")
axes.set_ylabel("gradients")
figure.legend(loc="outside lower center")
assert lost["loss"] < 0.01 and lost["loss / 2²⁰"] > 0.9, lost

# %% [markdown]
# On these digits the plain loss would pass without a scaler. The divided one does not. In training it is even worse than in the figure: backward begins at the logits, whose gradients are at most the weight divided by the batch of 32, and FP16 rounds that to zero. Then all others are zero, too. BF16 has FP32's exponent, and its least number lies far to the left.

# %% tags=["hide-input"]
for name, number_format in (("FP16", FP16), ("BF16", BF16)):
    least = number_format.smallest_subnormal
    first = number_format.round(WEIGHT / 32)
    print(
        f"{name}: least number {least:.1e}, {WEIGHT / 32:.1e} is {first:.1e}"
    )

# %% tags=["hide-input", "nbval-ignore-output"]
WEIGHTED = {
    "FP16, small loss": (torch.float16, False),
    "FP16, small loss, scaled": (torch.float16, True),
    "BF16, small loss": (torch.bfloat16, False),
}
rights = []
for name, (dtype, scaled) in WEIGHTED.items():
    small = {"dtype": dtype, "scaled": scaled, "criterion": weighted}
    rights.append(train(name, train_amp, **small, eps=1e-15)[1])
    LOSSES[name] = [loss / WEIGHT for loss in LOSSES[name]]
assert rights[0] < 0.2 and min(rights[1:]) > 0.9, rights

# %% [markdown]
# The scaler begins with a factor of $2^{16}$. If a gradient becomes infinite, it skips the step and halves the factor. After 2,000 good steps it doubles it. (Here we also made Adam's $\varepsilon$ smaller than the gradients.)

# %% [markdown]
# ### Updates vanish in BF16
#
# BF16 stores 7 bits of a mantissa, so its numbers lie far apart. An update that is less than half the distance from a weight to its neighbour changes nothing. With a small learning rate this is nearly every update.

# %% tags=["hide-input"]
SMALL_LR = 2e-5  # of a fine-tuning
w = BF16.round(0.03)
print(f"0.03 in BF16 is {w}, a last bit of it {w * BF16.eps:.1e}")
print(f"0.03 + {SMALL_LR} is {BF16.round(w + SMALL_LR)}")

# %% tags=["hide-input", "nbval-ignore-output"]
slow = {"lr": SMALL_LR}
_, in_fp32 = train("FP32, small steps", train_plain, **slow)
_, in_bf16 = train(
    "BF16, small steps", train_plain, nn.Module.bfloat16, **slow
)
assert in_fp32 > 0.6 and in_bf16 < in_fp32 - 0.2, (in_fp32, in_bf16)

# %% [markdown]
# There are two cures {cite}`zamirai2020`:
#
# - **Master weights:** keep the weights in FP32 and compute with copies. That is what autocast does.
# - **Stochastic rounding:** round up or down by chance, so that an update of a tenth of the last bit is made one time in ten {cite}`gupta2015`. A BF16 number is the upper half of an FP32 one: add a random lower half, then cut it off.


# %%
@torch.no_grad()
def round_stochastically(x):
    bits = x.view(torch.int32)
    bits = bits + torch.randint_like(bits, 2**16)
    return (bits & -(2**16)).view(torch.float32).bfloat16()


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the training", "code_prompt_hide": "Hide the training"}
def train_stochastic(model, loader, lr):
    weights = list(model.parameters())
    exact = [nn.Parameter(p.float()) for p in weights]
    optimizer = optim.Adam(exact, lr=lr)
    for data, target in loader:
        data, target = data.to(weights[0]), target.to(weights[0].device)
        loss = cross_entropy(model(data), target)
        found = torch.autograd.grad(loss, weights)
        for p, x, gradient in zip(weights, exact, found):
            x.data, x.grad = p.float(), gradient.float()
        optimizer.step()
        for p, x in zip(weights, exact):
            p.data = round_stochastically(x)
        yield loss, optimizer


# %% tags=["hide-input", "nbval-ignore-output"]
_, by_master = train(
    "AMP, BF16, small steps",
    train_amp,
    dtype=torch.bfloat16,
    scaled=False,
    **slow,
)
_, by_chance = train(
    "BF16, small steps, by chance",
    train_stochastic,
    nn.Module.bfloat16,
    **slow,
)
assert min(by_master, by_chance) > in_fp32 - 0.05, (by_master, by_chance)

# %% [markdown]
# Stochastic rounding forgets the lower halves after every step: the weights are in BF16 alone. (In the folded cell, `exact` holds them only while a step is computed. An optimizer made for this would go one tensor after the other.)
#
# {numref}`losses-in-16-bits` has the losses of these trainings. Those that work in 16 bits follow FP32's, so most lie on top of each other. A cross marks where a loss stopped being a number.


# %% tags=["hide-input"]
def panel_of(name):
    if "small steps" in name:
        return 2
    return 1 if "Adam" in name or "small loss" in name else 0


def draw(axes, at, name, losses):
    """A mean of 10 steps, thinner the later it is drawn, and where it ends."""
    recent = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
    smooth = [sum(some) / len(some) for some in recent]
    look = {"color": list(COLORS.values())[at], "label": name}
    steps = range(1, len(losses) + 1)
    axes.plot(steps, smooth, linewidth=max(1, 6 - 1.2 * at), **look)
    end = sum(loss == loss for loss in smooth)
    if end < len(losses):
        cross = {"color": COLORS["temporaries"], "markersize": 10}
        axes.plot(end, smooth[end - 1], "X", zorder=9, **cross)


# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"image": {"alt": "Loss over 250 steps in three panels. In the first, AMP in FP16 and BF16, FP32, BF16 and FP16 with SGD all fall together from 2.3 to about 0.3. In the second, FP16 with Adam breaks off after the first step, at a cross, and FP16 with a small loss does not fall; a larger epsilon, the scaler and BF16 fall like the others. In the third, with small steps, BF16 falls far more slowly than FP32, AMP and stochastic rounding."}, "figure": {"name": "losses-in-16-bits", "caption": "Loss over 250 steps, the mean of 10."}}
figure, panels = plt.subplots(3, figsize=(5.4, 9.6), sharex=True)
for name, losses in LOSSES.items():
    if "Accelerate" in name:  # as AMP
        continue
    axes = panels[panel_of(name)]
    draw(axes, len(axes.get_legend_handles_labels()[0]), name, losses)
for axes, title in zip(
    panels, ("trains", "fails, or is cured", "small steps")
):
    axes.set(title=title, ylabel="loss, mean of 10 steps", ylim=(0, 3))
    axes.legend()
panels[-1].set_xlabel("step")
broken = [name for name, losses in LOSSES.items() if losses[-1] != losses[-1]]
assert broken == ["FP16, Adam"], broken

# %% [markdown]
# ## Compare: the truth about memory
#
# ### By parameter
#
# For each loop, here are the bytes that belong to the parameters after a step, beside the rule of [Training and inference](03_training_and_inference.ipynb).

# %% tags=["hide-input"]
RULE = {"FP32": 16, "BF16": 8, "AMP, FP16": 16, "AMP, BF16": 16}
RULE["Accelerate, FP16"] = 16
LASTING = ("parameters", "gradients", "optimizer states")
table(
    ["way", "rule (B)", "this GPU (B)", "B / parameter", "cast, forward (B)"],
    [
        (
            name,
            rule * N,
            n := sum(KEPT[name][1][kind] for kind in LASTING),
            f"{n / N:.2f}",
            KEPT[name][0]["cast weights"],
        )
        for name, rule in RULE.items()
    ],
)

# %% [markdown]
# Mixed precision stores the bytes of FP32, to the last one.
#
# ### By batch
#
# Now the batch size. We replay a second step, with Adam's states in place. *Forward* is what activations and cast weights take at the end of forward, and *peak* the most that the step takes.


# %% tags=["hide-input"]
def second_step(batch, dtype):
    empty_card()
    with gpu.device:
        model = SimpleMLP()
    looks = []
    model.register_forward_hook(lambda *_: looks.append(gpu.breakdown(model)))
    settings = {"dtype": dtype, "scaled": False} if dtype else {}
    steps = (train_amp if dtype else train_plain)(
        model, [images(batch)] * 2, **settings
    )
    next(steps)
    gpu.reset_peak_memory_stats()
    next(steps)
    return looks[1], gpu.max_memory_allocated()


def compared(batch):
    (fp32, fp32_peak), (amp, amp_peak) = (
        second_step(batch, dtype) for dtype in (None, torch.bfloat16)
    )
    kept = [row["activations"] + row["cast weights"] for row in (fp32, amp)]
    return *kept, fp32_peak, amp_peak


def as_mb(nbytes):
    return f"{nbytes / MB:,.1f}"


BATCHES = (1, 128, 1_024, 4_096, 16_384)
table(
    [
        "batch",
        "FP32, forward (MB)",
        "AMP, forward",
        "FP32, peak",
        "AMP, peak",
    ],
    [(batch, *map(as_mb, compared(batch))) for batch in BATCHES],
)

# %% [markdown]
# At the article's batch of 128, AMP costs more than it saves. Adam's peak is the optimizer's own and the same for both: by then the cast weights are gone. AMP lowers the peak only where activations outweigh the parameters.
#
# The prediction names the smallest batch at which AMP's forward holds less. We try that batch, and one image fewer.

# %% tags=["hide-input"]
for batch in (pays_from - 1, pays_from):
    fp32, amp, *_ = compared(batch)
    print(f"{batch:,} images: FP32 {fp32:,} B, AMP {amp:,} B")

# %% [markdown]
# ### A transformer of a billion parameters
#
# [Training and inference](03_training_and_inference.ipynb) estimates 18 bytes per parameter for AMP with its copies. Do all 18 ever exist at once? These are the steps of {numref}`peaks-of-a-billion`. *Activations* and *peak* are in GB, the columns before them in bytes per parameter.

# %% tags=["hide-input"]
ON_PARAMETERS = (*LASTING, "cast weights")


def most(steps, *kinds):
    return max(sum(step[kind] for kind in kinds) for step in steps)


table(
    [
        "a billion, second step",
        "estimate",
        "this GPU, at most",
        "cast weights",
        "activations",
        "peak",
    ],
    [
        (
            name,
            rule,
            f"{most(steps, *ON_PARAMETERS) / billion:.2f}",
            f"{most(steps, 'cast weights') / billion:.2f}",
            f"{most(steps, 'activations') / GB:.2f}",
            f"{max(step.total for step in steps) / GB:.2f}",
        )
        for (name, steps), rule in zip(recorded.items(), (16, 18, 18, 8))
    ],
)

# %% [markdown]
# By default you never see all 18 at once. `zero_grad()` drops the gradients, so at the end of forward there are parameters, states and cast weights, 14 bytes. Backward frees a layer's cast weight while it makes its gradient: two bytes go, four come. It ends at 16. You only reach 18 if you keep the gradients, to accumulate them or with `set_to_none=False`.
#
# And the activations? They shrink by a tenth, less than the cast weights take. So for this batch AMP *raises* the peak.
#
# Why so little? Norms, softmax and the sum that runs through all layers stay in FP32. And autocast caches weights only: an activation is cast anew for each operator that reads it, so query, key and value each keep a copy of the same input. We count them in one layer.


# %% tags=["hide-input"]
def copies_of_input(batch=4, length=512):
    layer = build().model.layers[0].self_attn
    x = torch.empty(batch, length, 2_048, device=gpu.device)
    before = gpu.breakdown()["activations"]
    with torch.autocast(gpu.device.type, dtype=torch.bfloat16):
        results = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
    kept = gpu.breakdown()["activations"] - before
    kept -= sum(result.nbytes for result in results)
    return kept, kept / (2 * x.numel())


kept, copies = copies_of_input()
print(
    f"beside the three results: {kept:,} B, {copies:.0f} copies of the input"
)

# %% [markdown]
# What AMP buys on a GPU is speed, from the units that multiply in 16 bits ([Conversion and hardware](17_conversion_and_hardware.ipynb)), and trainings that converge as in FP32. Memory comes down with weights *stored* in BF16, or with larger batches.

# %% [markdown]
# ### What an H200 measured
#
# One step of mixed precision of this network is an experiment of our [records](../book/records.md). The folded table has what the card measured, and the replay by its rules.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show what the card measured, in bytes", "code_prompt_hide": "Hide what the card measured"}
print(CARD)
table(COLUMNS, beside_replay("amp-fp16", "amp-bf16"))

# %% [markdown]
# ## The article's forms today
#
# The article was written for older versions. This is what they became:
#
# | in the article | today |
# | --- | --- |
# | `torch.cuda.amp.autocast()` | `torch.autocast("cuda", dtype=torch.float16)` |
# | `torch.cuda.amp.GradScaler()` | `torch.amp.GradScaler("cuda")` |
# | `Accelerator(fp16=True)` | `Accelerator(mixed_precision="fp16")` |
#
# Without a GPU, the first two also switch themselves off, with a warning. The article's loops would then train in FP32.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show what the old forms say now", "code_prompt_hide": "Hide what the old forms say now"}
OLD = {
    "torch.cuda.amp.autocast()": lambda: torch.cuda.amp.autocast(),
    "torch.cuda.amp.GradScaler()": lambda: torch.cuda.amp.GradScaler(),
    "Accelerator(fp16=True)": lambda: Accelerator(fp16=True),
}
for name, old in OLD.items():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            old()
        except TypeError as error:
            print(f"{name}: TypeError\n{fill(str(error))}\n")
    for warning in said:
        if warning.category is FutureWarning:
            print(f"{name}: FutureWarning\n{fill(str(warning.message))}\n")

# %% [markdown]
# ## What to remember
#
# - Mixed precision **stores the bytes of FP32**. During forward it adds a copy of the weights in 16 bits; it saves on activations, and only some of them.
# - FP16 needs a loss scaler, and an Adam in pure FP16 a larger epsilon. BF16 needs neither, but small updates to BF16 weights vanish: keep master weights, or round stochastically.
# - What is asked for is not always what runs. Look at the dtype of an output.

# %% [markdown]
# ## Exercises
#
# **1.** `torch.autocast(..., cache_enabled=False)` drops the cache. How many bytes of cast weights does backward find then, if a layer of 4096 x 4096 is used three times in a row?


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
def cast_weights(cache_enabled):
    empty_card()
    with gpu.device:
        layer = nn.Linear(4096, 4096, bias=False)
        x = torch.zeros(1, 4096)
    with torch.autocast(gpu.device.type, cache_enabled=cache_enabled):
        y = layer(layer(layer(x)))
    assert y.dtype is torch.float16
    return gpu.breakdown(layer)["cast weights"]


for cache_enabled in (True, False):
    print(f"cache {cache_enabled!s:5}: {cast_weights(cache_enabled):,} B")

# %% [markdown]
# <details><summary>Why so?</summary>
#
# With the cache, all uses share one copy of 2 x 4096 x 4096 bytes. Without it, each use makes its own, and backward needs two of the three copies. The first would only serve the gradient of `x`, which nobody needs.
#
# </details>
#
# **2.** How many bytes does a `GradScaler` take on the card, and as how many blocks?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
loss = torch.ones((), device=gpu.device)
before, held = gpu.breakdown()["activations"], gpu.memory_allocated()
scaler = torch.amp.GradScaler(gpu.device.type)
scaler.scale(loss)
print(f"{gpu.breakdown()['activations'] - before} B asked for,", end=" ")
print(f"{gpu.memory_allocated() - held:,} B in blocks of 512 B")

# %% [markdown]
# **3.** Does AMP raise SGD's peak for the article's network and batch, and why not Adam's?


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
def peak_of_sgd(enabled):
    empty_card()
    with gpu.device:
        model = SimpleMLP()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    data, target = (part.to(gpu.device) for part in images(128))
    with torch.autocast(gpu.device.type, torch.bfloat16, enabled=enabled):
        loss = cross_entropy(model(data), target)
    loss.backward()
    optimizer.step()
    return gpu.max_memory_allocated()


for enabled in (False, True):
    print(f"autocast={enabled!s:5} peak {peak_of_sgd(enabled):,} B")

# %% [markdown]
# <details><summary>And Adam?</summary>
#
# SGD's peak falls into backward, where cast weights and gradients meet. Adam's falls into the optimizer's step, into a temporary as large as all parameters. By then the cast weights are gone.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [gpt2-large](07_gpt2_large.ipynb) goes on to inference, in 16, 8 and 4 bits. [Number formats](02_precision_formats.ipynb) shows the bits behind what went wrong here. [One training step](04_mlp_adam_vs_sgd.ipynb) takes the step in FP32 apart. The [references](../book/references.md) list the papers and PyTorch's sources.
