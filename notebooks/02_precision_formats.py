# %% [markdown]
# # Precision: what the bits of a number can hold
#
# After this chapter you can say what a number format can hold and what it costs in bytes, what is lost when a model is converted, and which format to choose for which job and which card.
#
# - **Time:** 35 minutes to read, under half a minute to run.
# - **Needs:** nothing. It runs on any machine, a GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import logging
import math
import tempfile
import textwrap
import warnings
from bisect import bisect_left
from collections import Counter
from itertools import pairwise

# Progress bars, and fast paths that are not installed, are no news here.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes.functional as bnb
import matplotlib.pyplot as plt
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from every_byte import open_gpu
from every_byte.formats import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    FP64,
    TF32,
    bytes_per_parameter,
    nf4_levels,
)
from every_byte.units import GiB
from helpers.environment import formats, versions
from helpers.mlp import SimpleMLP
from helpers.mnist import mnist
from helpers.plots import COLORS, use_book_style
from helpers.tables import table

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "transformers", "bitsandbytes"))
print(formats())

# %% [markdown]
# The first line says which GPU this page is about, the last three which formats your PyTorch, CPU and GPU know. They are the only lines here that depend on the machine. Everything else is arithmetic, done for real on the CPU: the same everywhere, to the last digit. Only the next section looks at the GPU's memory.

# %% [markdown]
# ## What a format saves
#
# **Predict.** A model of $N$ parameters takes $N$ times the bytes of one, and a little rounding: PyTorch's allocator hands out multiples of 512 bytes {cite}`pytorch-allocator`.

# %%
with gpu.device:
    model = SimpleMLP()
sizes = [parameter.numel() for parameter in model.parameters()]
predicted = {
    nbytes: sum(-(-nbytes * size // 512) * 512 for size in sizes)
    for nbytes in (4, 2, 1)
}
print(f"{sum(sizes):,} parameters in {len(sizes)} tensors")

# %% [markdown]
# **Measure**, and **compare**:

# %%
rows = []
for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
    model.to(dtype)
    n, expected = gpu.memory_allocated(), predicted[dtype.itemsize]
    rows.append((f"{dtype}"[6:], dtype.itemsize, expected, n, n - expected))
del model
gpu.close()
table(["", "bytes", "predicted (B)", "this GPU (B)", "difference"], rows)

# %% [markdown]
# An article on Qwen2-0.5B-Instruct {cite}`qwen2-notes` measured 1.115 GiB in FP16 and 2.238 GiB in FP32. For *both* it computes 2 bytes per parameter and prints the result as MB. FP32 takes 4, and the unit is GiB:

# %%
QWEN2 = 494_032_768
for name, nbytes in (("FP16", 2), ("FP32", 4)):
    print(f"{name}: {QWEN2:,} x {nbytes} B = {QWEN2 * nbytes / GiB:.3f} GiB")

# %% [markdown]
# What remains above that has causes of its own, among them a copy of the embedding. The bytes are the easy part of the question. The rest of this chapter is about what they hold.

# %% [markdown]
# ## Three fields
#
# A floating-point number has a **sign**, an **exponent** that says how large it is, and a **mantissa** that says where between two powers of two {cite}`ieee754`. With exponent field $e$, bias $b$ and $M$ mantissa bits holding $m$:
#
# $$(-1)^{s} \cdot 2^{e-b} \cdot \left(1 + \frac{m}{2^{M}}\right)$$
#
# The 1 is implicit: it costs no bit. When $e = 0$ it falls away, and the exponent stays at $1-b$. These are the **subnormal** numbers, which fill the gap around zero.

# %%
SIGN, EXPONENT, MANTISSA = (
    COLORS[kind] for kind in ("gradients", "parameters", "optimizer states")
)
fields = {
    f"{f.name}: 1 + {f.exponent_bits} + {f.mantissa_bits}": (
        [SIGN] + [EXPONENT] * f.exponent_bits + [MANTISSA] * f.mantissa_bits
    )
    for f in FORMATS
}
GREY = COLORS["workspaces"]
fields |= {"INT8: an integer": [GREY] * 8, "INT4: an integer": [GREY] * 4}
fields["NF4: the number of a level"] = [GREY] * 4

# %% mystnb={"image": {"alt": "Bits of eleven formats, one box for each bit. FP64: 1 sign, 11 exponent, 52 mantissa. FP32: 1, 8, 23. TF32: 1, 8, 10, stored in 32. BF16: 1, 8, 7. FP16: 1, 5, 10. FP8 E5M2: 1, 5, 2. FP8 E4M3: 1, 4, 3. FP4 E2M1: 1, 2, 1. INT8: 8 bits of an integer. INT4: 4 bits of an integer. NF4: 4 bits that number a table of 16 levels."}}
figure, axes = plt.subplots(figsize=(5.4, 6.2))
for row, (label, colors) in enumerate(fields.items()):
    axes.bar(range(len(colors)), 0.45, 0.82, row, color=colors, align="edge")
    axes.text(0, row - 0.09, label, size=12, va="bottom")
axes.set(xlim=(0, 64), ylim=(len(fields) - 0.4, -0.55))
axes.set_axis_off()

# %% [markdown]
# From the left: sign (red), exponent (blue), mantissa (green). TF32 exists only inside tensor cores {cite}`nvidia-a100`: in memory it takes the 32 bits of FP32. BF16 is the upper half of FP32 {cite}`kalamkar2019`. INT8 and INT4 are plain integers that need a scale, NF4 numbers the rows of a table: both come below.
#
# The number 0.1 is no sum of few powers of two. Each format stores the nearest number that it has:

# %%
for known in (FP32, BF16, FP16, E4M3):
    pattern = known.encode(0.1)
    print(f"{known.name:9} {known.fields(pattern)}")
    print(f"{'':9} = {known.decode(pattern):.20f}")

# %% [markdown]
# ## Range and resolution, from the bits
#
# Exponent bits buy **range**, mantissa bits buy **resolution**. **Epsilon** is the step from 1 to the next number: $2^{-M}$. *Digits* counts the decimal digits that always survive: $M \log_{10} 2$, rounded down.


# %%
def short(number):
    """Whole numbers and fractions in full, others by their power of ten."""
    if number == int(number) and number < 1e6:
        return f"{number:,.0f}"
    return f"{number:.4g}" if 0.1 < number < 1 else f"{number:.2e}"


# %%
rows = []
for f in FORMATS:
    limits = f.max, f.smallest_normal, f.smallest_subnormal, f.eps
    nbytes = f"{f.storage_bits / 8:g}"
    rows.append((f.name, nbytes, *map(short, limits), f.digits))
table(
    ["", "bytes", "largest", "least normal", "least", "epsilon", "digits"],
    rows,
)

# %% [markdown]
# *Least* is the smallest positive number, a subnormal. FP8 comes in two kinds {cite}`micikevicius2022`: E4M3 for weights and activations, E5M2 for gradients, which need range. E4M3 gives up infinity to reach 448 instead of 240. FP4 gives up infinity and NaN {cite}`ocp-mx`.
#
# All of this was computed from the widths of the fields. PyTorch has its own table:

# %%
for known in FORMATS:
    dtype = getattr(torch, known.dtype or "no type", None)
    if dtype is None:
        print(f"{known.name:9} no PyTorch type to compute with")
        continue
    info = torch.finfo(dtype)
    least = torch.tensor([1] + [0] * 7, dtype=torch.uint8).view(dtype)[0]
    assert known.max == info.max and known.eps == info.eps
    assert known.smallest_normal == info.smallest_normal
    assert known.smallest_subnormal == least.double().item()
    assert math.isclose(10**-known.digits, info.resolution)
    print(f"{known.name:9} agrees with torch.finfo({dtype})")

# %% [markdown]
# BF16 is often called "like FP16 with a larger range", in the source article too {cite}`hoperj2024`. The other half of the sentence is missing: it pays for the range with resolution.

# %%
print(f"range:  BF16 reaches {BF16.max / FP16.max:.1e} times as far")
print(f"steps:  BF16's are {BF16.eps / FP16.eps:.0f} times as coarse")
print(f"digits: {BF16.digits} instead of {FP16.digits}")

# %% [markdown]
# ## Three ways to lose a number
#
# ### Overflow
#
# FP16 ends at 65,504. What is nearer to 65,536 than to that becomes infinite, and a single infinity in a sum makes the whole sum infinite. A product of two numbers no larger than 256 is enough.

# %%
edge = torch.tensor([65504.0, 65519.0, 65520.0, 70000.0])
print("FP32", edge.tolist())
print("FP16", edge.half().tolist())
print("BF16", edge.bfloat16().tolist())
print("256 x 256 in FP16:", (torch.tensor(256.0).half() ** 2).item())

# %% [markdown]
# ### Absorption
#
# Adding a small number to a large one changes nothing when the step between neighbours is too wide. **Predict:** with $M$ mantissa bits, the neighbours of $2^{M+1}$ lie 2 apart, so adding 1 gives a tie, and ties go to the even mantissa: back down.

# %%
for known in (FP32, FP16, BF16):
    big = 2 ** (known.mantissa_bits + 1)
    number = torch.tensor(big, dtype=getattr(torch, known.dtype))
    print(f"{known.name}: {big:>10,} + 1 = {(number + 1).item():>10,.0f}")

# %% [markdown]
# In training this is the update that does nothing. A weight near 1 with a gradient step of 0.001 stays where it is in BF16, forever:

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    weight = torch.tensor(1.0, dtype=dtype)
    for _ in range(1000):
        weight = weight - 0.001
    print(f"{dtype!s:15} 1 - 1000 steps of 0.001 = {weight.item():.4f}")

# %% [markdown]
# So mixed precision keeps **master weights** in FP32 and only computes in 16 bits {cite}`micikevicius2018`.

# %% [markdown]
# ### Underflow
#
# At the other end, a number below half of the least subnormal becomes zero. Gradients are small, so let us take real ones: of a network trained on the digits. We cut their empty border of two pixels: 576 pixels remain.


# %%
def digits(train, count):
    data = mnist(train=train)
    pixels = data.data[:count, 2:-2, 2:-2].flatten(1).double() / 255
    return (pixels - 0.1307) / 0.3081, data.targets[:count]


# %%
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # for this network only: see below
network = nn.Sequential(nn.Linear(576, 64), nn.Tanh(), nn.Linear(64, 10))
torch.set_default_dtype(torch.float32)
loss_of = nn.CrossEntropyLoss()
inputs, labels = digits(train=True, count=2000)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
for _ in range(60):
    optimizer.zero_grad()
    loss_of(network(inputs), labels).backward()
    optimizer.step()

# %% [markdown]
# We train in FP64 and round to FP32 at the end. Machines differ in their last digits, and the 29 bits of mantissa that FP32 drops swallow that: the FP32 weights, and all that follows, are the same everywhere.

# %%
trained = {name: w.float() for name, w in network.state_dict().items()}
test_inputs, test_labels = digits(train=False, count=2000)


@torch.no_grad()
def right(state):
    """Test digits that the network reads with these weights (in FP64)."""
    network.load_state_dict(state)
    return (network(test_inputs).argmax(1) == test_labels).sum().item()


weights = torch.cat([w.flatten() for w in trained.values()])
print(f"{weights.numel():,} weights")
print(f"{right(trained):,} of {len(test_labels):,} test digits right")

# %% [markdown]
# Now one more step, on the single digit that the network knows best. Its gradients are tiny. **Loss scaling** multiplies the loss, and so all gradients, by a power of two before they are stored, and divides afterwards.

# %%
losses = nn.CrossEntropyLoss(reduction="none")(network(inputs), labels)
best = losses.argmin()
network.zero_grad()
loss_of(network(inputs[best, None]), labels[best, None]).backward()
gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
gradients = gradients.float()

# %%
stored = {
    "FP32": gradients,
    "BF16": gradients.bfloat16(),
    "FP16": gradients.half(),
    "FP16, loss times 65,536": (gradients * 2**16).half(),
}
table(
    ["gradients stored in", "are zero", "of"],
    [(k, (g == 0).sum().item(), len(g)) for k, g in stored.items()],
)

# %% [markdown]
# BF16 has FP32's exponent and keeps them all: it needs no loss scaling.

# %% [markdown]
# ## Rounding error against magnitude
#
# Here is every format in one picture: the largest relative error of rounding, in each interval from a power of two to the next. Within its range a float is equally good at all magnitudes: $2^{-M-1}$. Below its normal numbers it fades, above its range it ends. An integer with a scale is the opposite: its steps are equal, so its relative error grows as the number shrinks.


# %%
def worst(rounding, power):
    """The largest relative error of 32 numbers from 2**power upwards."""
    if rounding == FP64.round:  # Python itself computes in FP64
        return FP64.eps / 2
    values = [2.0**power * (1 + (i + 0.5) / 32.7) for i in range(32)]
    return max(abs(rounding(value) - value) / value for value in values)


def int8(value):
    return round(value * 127) / 127


def nf4(value):
    return min(nf4_levels(), key=lambda level: abs(level - value))


# %%
ROUNDINGS = {
    known.name: (known.round, min(20, math.frexp(known.max)[1] - 1))
    for known in FORMATS
}
ROUNDINGS["INT8, scale 1/127"] = int8, 0
ROUNDINGS["NF4, scale 1"] = nf4, 0
STYLES = ("-", "-", "-", "-", "--", "-", "--", "-", ":", ":")
KINDS = [SIGN, EXPONENT, MANTISSA, GREY, "black"]
KINDS += [COLORS[k] for k in ("buffers", "batch", "activations")]
KINDS += [COLORS[k] for k in ("temporaries", "rounding")]

# %% mystnb={"image": {"alt": "Largest relative rounding error against magnitude from 2 to the -40 to 2 to the 20, both logarithmic. FP64, FP32, TF32 and BF16 are flat across the picture, at about 1e-16, 6e-8, 5e-4 and 4e-3. FP16 lies on TF32's line between 2 to the -14 and 2 to the 16, and rises to 1 below. FP8 and FP4 lie above 0.05 and are short. INT8 and NF4 end at 1 and lose accuracy as the number shrinks."}}
figure, axes = plt.subplots(figsize=(5.4, 4.6))
for (name, (rounding, end)), style, color in zip(
    ROUNDINGS.items(), STYLES, KINDS
):
    errors = {power: worst(rounding, power) for power in range(-40, end)}
    drawn = {power: e for power, e in errors.items() if e < 1}
    axes.plot(*zip(*drawn.items()), style, color=color, label=name)
axes.set(yscale="log", ylim=(3e-17, 1), xlim=(-40, 20))
axes.set_xticks(
    range(-40, 21, 10), [f"$2^{{{p}}}$" for p in range(-40, 21, 10)]
)
axes.set(xlabel="magnitude", ylabel="largest relative error")
legend = figure.legend(loc="outside lower center", ncols=3, handlelength=1.8)

# %% [markdown]
# ## Converting a model
#
# The article on Qwen2 asks how to convert between precisions, and leaves it open. The calls are short; what they do to the numbers is the question.
#
# | call | what it converts |
# | --- | --- |
# | `tensor.half()`, `.bfloat16()`, `.float()`, `.to(dtype)` | one tensor, into a new one |
# | the same on a module | its floating-point parameters and buffers, in place |
# | `{name: w.half() for name, w in state.items()}` | a state dict, integers included |
# | `from_pretrained(folder, dtype=...)` | a checkpoint, tensor by tensor, as it is read |
# | `save_pretrained(folder)` | nothing: it writes the dtype that the model has |

# %% [markdown]
# ### Which conversions are lossless?
#
# A conversion is lossless if each number comes back from it. A 16-bit format has 65,536 patterns, so we need not argue: we try them all.


# %%
def come_back(source, through):
    """Numbers of a 16-bit or 8-bit format that survive the way and back."""
    ints = torch.int16 if source.itemsize == 2 else torch.uint8
    patterns = torch.arange(2 ** (8 * source.itemsize)).to(ints)
    numbers = patterns.view(source)
    back = numbers.to(through).to(source)
    is_number = ~numbers.double().isnan()
    same = (back.view(ints) == patterns) & is_number
    return is_number.sum().item(), same.sum().item()


# %%
half, brain = torch.float16, torch.bfloat16
fp8 = torch.float8_e4m3fn
WAYS = [(half, torch.float32), (brain, torch.float32), (fp8, half)]
WAYS += [(fp8, brain), (half, brain), (brain, half)]
table(
    ["from and back to", "through", "numbers", "come back"],
    [(f"{a}"[6:], f"{b}"[6:], *come_back(a, b)) for a, b in WAYS],
)

# %% [markdown]
# Every FP16 and every BF16 number is also an FP32 number: **widening loses nothing**. Between FP16 and BF16 neither way is safe: one loses digits, the other range. (A few patterns are NaN and are not counted: they stay NaN.)

# %% [markdown]
# ### What FP32 loses on the way down
#
# FP32 has over four thousand million patterns. Rounding keeps the order of numbers, so a bisection finds where each fate begins, and the patterns between can be counted.

# %%
patterns = range(1, FP32.max_pattern + 1)  # all positive numbers of FP32


def fates(known):
    """How many become 0, subnormal, normal, infinite."""

    def first(target):
        return bisect_left(
            patterns, target, key=lambda p: known.encode(FP32.decode(p))
        )

    normal = known.encode(known.smallest_normal)
    ends = [0, first(1), first(normal), first(known.max_pattern + 1)]
    ends.append(len(patterns))
    return [b - a for a, b in pairwise(ends)]


# %%
names = "become 0", "become subnormal", "stay normal", "become infinite"
rows = []
for name, *counts in zip(names, fates(FP16), fates(BF16)):
    shares = [f"{100 * count / len(patterns):.2f}" for count in counts]
    rows.append((name, counts[0], shares[0], counts[1], shares[1]))
table(["of FP32's numbers", "to FP16", "%", "to BF16", "%"], rows)

# %% [markdown]
# Most of FP32's numbers lie outside of FP16's normal range. BF16 loses next to none to range, and digits in almost all.

# %% [markdown]
# ### A trained model
#
# What does that mean for weights that training has produced? **Predict:** a conversion leaves a weight alone only if the mantissa bits that it drops are zero by chance. From FP32 to FP16 and TF32 that is 13 bits, to BF16 16 bits: about one weight in $2^{13}$ or $2^{16}$.

# %%
CASTS = {
    name: lambda w, dtype=dtype: w.to(dtype).float()
    for name, dtype in {
        "FP64": torch.float64,
        "FP16": torch.float16,
        "BF16": torch.bfloat16,
        "FP8 E4M3": torch.float8_e4m3fn,
        "FP8 E5M2": torch.float8_e5m2,
    }.items()
}
CASTS["TF32"] = lambda w: torch.tensor(
    [TF32.round(x) for x in w.flatten().tolist()]
).view_as(w)


def converted(cast):
    return {name: cast(w) for name, w in trained.items()}


# %%
rows = []
for name, known in {f.name: f for f in FORMATS if f.name in CASTS}.items():
    state = converted(CASTS[name])
    new = torch.cat([w.flatten() for w in state.values()])
    dropped = max(0, FP32.mantissa_bits - known.mantissa_bits)
    expected = len(new) - len(new) / 2**dropped
    changed = (new != weights).sum().item()
    zero = (new == 0).sum().item()
    rows.append((name, f"{expected:,.0f}", changed, zero, right(state)))
table(
    ["there and back", "predicted", "changed", "now 0", "digits right"],
    rows,
)

# %% [markdown]
# Almost every weight changes, and the network reads the digits all but as well as before. That is the whole secret of low precision: networks are robust to small errors in each weight, as long as none of them is *large*. (A prediction of numbers that FP8 turns into zero would need their distribution as well.)

# %% [markdown]
# ### Why converting back brings nothing back
#
# `.float()` after `.half()` gives the bytes of FP32 and the values of FP16: the dropped bits are filled with zeros.

# %%
weight = weights[0].item()
for label, number in {
    "FP32": weight,
    "to BF16 and back": BF16.round(weight),
}.items():
    print(f"{label:17} {FP32.fields(FP32.encode(number))} = {number:.9f}")

# %% [markdown]
# ### Buffers
#
# Not everything in a model is a parameter. `.half()` casts floating-point buffers, too, and leaves integers alone:

# %%
norm = nn.BatchNorm1d(64)
by_hand = {name: w.half() for name, w in norm.state_dict().items()}
norm.half()
table(
    ["state of BatchNorm1d", "norm.half()", "w.half() for each"],
    [
        (name, f"{w.dtype}"[6:], f"{by_hand[name].dtype}"[6:])
        for name, w in norm.state_dict().items()
    ],
)

# %% [markdown]
# Casting a state dict by hand must do the same: `w.half() if w.is_floating_point() else w`. A counter in FP16 sticks at 2,048, by absorption.

# %% [markdown]
# ### A transformers model
#
# A small Qwen2, made from a configuration, with uniform random weights, saved and loaded again. `dtype=` is the name since transformers 4.56; older code says `torch_dtype=`. Without it, transformers 5 keeps the checkpoint's own dtype, where version 4 took FP32.

# %%
small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
small |= {"num_hidden_layers": 2, "tie_word_embeddings": True}
small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
original = Qwen2ForCausalLM(Qwen2Config(**small))
torch.manual_seed(0)
with torch.no_grad():
    for p in original.parameters():
        p.copy_((torch.rand(p.shape, dtype=torch.float64) - 0.5) / 16)
folder = tempfile.TemporaryDirectory()
original.save_pretrained(folder.name)


def load(**how):
    return Qwen2ForCausalLM.from_pretrained(folder.name, **how)


# %%
def describe(model):
    rotary = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    nbytes = model.num_parameters() * model.dtype.itemsize
    return str(model.dtype)[6:], nbytes, str(rotary.dtype)[6:]


# %%
table(
    ["made by", "parameters", "bytes", "rotary buffer"],
    [
        ("load(), the checkpoint's dtype", *describe(load())),
        ("load(dtype=float16)", *describe(load(dtype=torch.float16))),
        ("load(dtype=bfloat16)", *describe(load(dtype=torch.bfloat16))),
        ("load().half()", *describe(load().half())),
        ("load().half().float()", *describe(load().half().float())),
    ],
)

# %% [markdown]
# Loading *in* FP16 and converting *to* FP16 are not the same. `from_pretrained` leaves the rotary embedding's frequencies in FP32, where positions of thousands need their digits. `.half()` casts them with the rest, and `.float()` does not heal them. So **choose the dtype when loading**.

# %%
fine = dict(load().named_buffers())["model.rotary_emb.inv_freq"]
coarse = dict(load().half().named_buffers())["model.rotary_emb.inv_freq"]
error = ((coarse.double() - fine.double()) / fine.double()).abs().max()
print(f"largest relative error of a frequency: {error.item():.1e}")
print(f"FP16's rounding: at most 2^-11 =       {2**-11:.1e}")

# %% [markdown]
# `save_pretrained` writes what is there. After a detour by FP16 the checkpoint says so, and FP32 gets back FP16's values:

# %%
load(dtype=torch.float16).save_pretrained(folder.name)
again = load(dtype=torch.float32)
print("the checkpoint's dtype is now", load().dtype)
changed = sum(
    (a != b).sum().item()
    for a, b in zip(original.parameters(), again.parameters())
)
as_half = all(
    torch.equal(a.half().float(), b)
    for a, b in zip(original.parameters(), again.parameters())
)
print(f"{changed:,} of {original.num_parameters():,} parameters changed")
print("all are what FP16 left of them:", as_half)

# %% [markdown]
# ### A quantised model
#
# A model loaded by bitsandbytes holds integers and scales. Casting these would destroy them, so transformers refuses:

# %%
quantised = load(
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"
    ),
    dtype=torch.float16,
    device_map="cpu",
)

# %%
for call in (
    lambda: quantised.half(),
    lambda: quantised.float(),
    lambda: quantised.to(torch.bfloat16),
):
    try:
        call()
    except ValueError as error:
        print(textwrap.fill(f"ValueError: {error}", 72))


# %% [markdown]
# Not every door is locked. `.bfloat16()` raises nothing in this version. It leaves the integers alone and casts what was not quantised:


# %%
def kinds(model):
    held = Counter()
    for parameter in model.parameters():
        held[str(parameter.dtype)[6:]] += parameter.numel()
    return ", ".join(f"{n:,} x {dtype}" for dtype, n in sorted(held.items()))


print("loaded:     ", kinds(quantised))
print(".bfloat16():", kinds(quantised.bfloat16()))

# %% [markdown]
# (Two 4-bit weights share a `uint8`.) **What to do instead:** choose `dtype=`, and the dtype it computes in, `bnb_4bit_compute_dtype=`, when loading. To leave quantisation behind, load the original checkpoint again. `.dequantize()` gives floating-point weights, but not the ones you had:

# %%
weight = "model.layers.0.mlp.up_proj.weight"
before = load().state_dict()[weight].float()
after = quantised.dequantize().state_dict()[weight].float()
share = (after != before).float().mean().item()
rms = ((after - before).square().mean() / before.square().mean()).sqrt()
print(f"{share:.1%} of its weights differ, by {rms.item():.1%} (RMS)")
folder.cleanup()

# %% [markdown]
# ## Quantisation by hand
#
# Eight or four bits cannot hold weights of all sizes, but they need not: the weights of a layer are of similar size. So one stores small integers and a **scale**. *Absmax* quantisation maps the largest absolute value $a$ to 127:
#
# $$q = \mathrm{round}\left(\frac{127}{a} \cdot w\right), \qquad w \approx \frac{a}{127} \cdot q$$
#
# With one scale for the whole tensor, a single large weight makes all steps coarse. One scale for each row confines the damage.


# %%
def absmax_int8(w, rows):
    """Integers from -127 to 127, and the scale or scales `a`."""
    a = w.abs().amax(1, keepdim=True) if rows else w.abs().max()
    return torch.round(w * (127.0 / a)).to(torch.int8), a


def rms_error(w, back):
    return ((w - back).double().square().mean()).sqrt().item()


W = trained["0.weight"]
for rows in (False, True):
    q, a = absmax_int8(W, rows)
    label = "a scale for each row" if rows else "one scale for all"
    print(f"{label:21} RMS error {rms_error(W, q * a / 127):.2e}")

# %% [markdown]
# bitsandbytes quantises by rows. Its result and ours, number by number:

# %%
q, a = absmax_int8(W, rows=True)
theirs, scales, _ = bnb.int8_vectorwise_quant(W.clone())
print("integers equal:", torch.equal(q, theirs))
print("scales equal:  ", torch.equal(a.flatten(), scales))
print(f"bytes per parameter: {(q.nbytes + 4 * a.numel()) / q.numel():.3f}")
print(
    f"                     {bytes_per_parameter(8, block=576):.3f} predicted"
)

# %% [markdown]
# ### LLM.int8() and its outliers
#
# To multiply in INT8, the *activations* must be quantised as well. In large language models a few of their columns hold values many times larger than all others {cite}`dettmers2022`. A row's scale then follows the outlier, and the rest of the row rounds to almost nothing. LLM.int8() takes the columns with a value of 6 or more out, multiplies these in 16 bits, and the rest in INT8.

# %%
X = test_inputs[:64].float()  # activations that behave
X[:, 300] = torch.where(
    torch.arange(64) % 2 == 0, 60.0, -55.0
)  # and some not
exact = X.double() @ W.double().T


def int8_product(X, W):
    (qx, ax), (qw, aw) = absmax_int8(X, True), absmax_int8(W, True)
    sums = qx.double() @ qw.double().T  # whole numbers: exact
    return sums * (ax.double() / 127) * (aw.double().T / 127)


# %%
outliers = (X.abs() >= 6.0).any(0)
parts = int8_product(X[:, ~outliers], W[:, ~outliers])
parts += X[:, outliers].double() @ W[:, outliers].double().T
print("outlier columns:", outliers.nonzero().flatten().tolist())
print(f"INT8 alone:  RMS error {rms_error(exact, int8_product(X, W)):.4f}")
print(f"LLM.int8():  RMS error {rms_error(exact, parts):.4f}")
print(f"(the products themselves: {exact.square().mean().sqrt():.2f} RMS)")

# %% [markdown]
# bitsandbytes finds the same column, sets it to zero in the INT8 part, and multiplies the integers exactly:

# %%
theirs, scales, columns = bnb.int8_vectorwise_quant(X.clone(), threshold=6.0)
rest = X.masked_fill(outliers, 0.0)
ours, a = absmax_int8(rest, rows=True)
print("outlier columns:", columns.tolist())
print("integers equal: ", torch.equal(ours, theirs))
print("scales equal:   ", torch.equal(a.flatten(), scales))
sums = bnb.int8_linear_matmul(theirs, q)
print("products equal: ", torch.equal(sums, ours.int() @ q.int().T))

# %% [markdown]
# ### NF4: levels where the weights are
#
# Trained weights are roughly normally distributed, so equal steps waste levels on the empty tails. NF4 puts its 16 levels at quantiles of the normal distribution: 7 below zero, zero, and 8 above, divided by the largest {cite}`dettmers2023`. Python's standard library has the inverse distribution; the outermost probability is bitsandbytes' own constant.

# %%
table_of_bnb = bnb.get_4bit_type("nf4", device="cpu").double()
ours = torch.tensor(nf4_levels(), dtype=torch.float64)
print(" ".join(f"{level:.4f}" for level in ours[:8].tolist()))
print(" ".join(f"{level:.4f}" for level in ours[8:].tolist()))
difference = (ours - table_of_bnb).abs().max().item()
print(f"largest difference from bitsandbytes' table: {difference:.1e}")

# %% [markdown]
# The difference is FP32's rounding: that table was computed in it.
#
# FP4 is the other 4-bit type of bitsandbytes: a float with 2 exponent bits and 1 mantissa bit. Beside the E2M1 of the standard, one level is elsewhere: its only subnormal.

# %%
positive = bnb.get_4bit_type("fp4", device="cpu")[:8].sort().values
standard = [E2M1.decode(pattern) / E2M1.max for pattern in range(8)]
print("bitsandbytes:", " ".join(f"{x:.4f}" for x in positive.tolist()))
print("E2M1 / 6:    ", " ".join(f"{x:.4f}" for x in standard))

# %%
blocks = W.reshape(-1, 64)
scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
levels = {
    "INT4": [i / 7 for i in range(-7, 8)],
    "FP4": [*positive.tolist(), *(-positive).tolist()],
    "NF4": ours.tolist(),
}

# %% mystnb={"image": {"alt": "Levels of INT4, FP4 and NF4 between -1 and 1, above a histogram of the trained weights of one layer, each block of 64 divided by its largest. INT4's levels are evenly spaced. FP4's are dense at zero and far apart at the ends. NF4's follow the bell shape of the histogram."}}
figure, axes = plt.subplots(figsize=(5.4, 3.2))
counts = torch.histc(scaled.double(), bins=40, min=-1, max=1).tolist()
edges = [i / 20 - 1 for i in range(40)]
axes.bar(
    edges, [c / max(counts) for c in counts], 0.045, color=GREY, align="edge"
)
for row, (name, marks) in enumerate(levels.items()):
    at = -0.3 - 0.34 * row
    axes.vlines(marks, at - 0.1, at + 0.1, color=KINDS[row], linewidth=2)
    axes.text(-1.06, at, name, ha="right", va="center", size=12)
axes.set(xlim=(-1.32, 1.05), xticks=(-1, 0, 1), xlabel="weight / scale")
axes.set_yticks([])
axes.spines["left"].set_visible(False)

# %% [markdown]
# ### Blocks and scales
#
# A scale for each block of 64 weights keeps an outlier's damage within 64. By hand: scale, find the nearest level, pack two to a byte.
#
# (A row of our matrix is 9 blocks. Where rows end inside a block, bitsandbytes 0.50.2 gives wrong weights back on CPUs with AVX-512: compare before you trust it there.)


# %%
def nf4_by_hand(w):
    """Packed level numbers, and the scales: as bitsandbytes stores them."""
    blocks = w.reshape(-1, 64)
    scales = blocks.abs().amax(1)
    borders = (table_of_bnb[1:] + table_of_bnb[:-1]).float() / 2
    numbers = torch.bucketize(blocks * (1 / scales)[:, None], borders)
    first, second = numbers.flatten()[::2], numbers.flatten()[1::2]
    return (first * 16 + second).to(torch.uint8), scales


packed, scales = nf4_by_hand(W)
theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
print("packed bytes equal:", torch.equal(packed, theirs.flatten()))
print("scales equal:      ", torch.equal(scales, state.absmax))

# %%
numbers = torch.stack([packed // 16, packed % 16], 1).long().reshape(-1, 64)
ours = (table_of_bnb.float()[numbers] * scales[:, None]).view_as(W)
back = bnb.dequantize_4bit(theirs, state)
print("weights equal:     ", torch.equal(ours, back))
print(
    f"RMS error {rms_error(W, ours):.2e}, W itself {rms_error(W, 0 * W):.2e}"
)

# %% [markdown]
# ### Double quantisation
#
# The scales cost 4 bytes for 64 weights. **Double quantisation** stores them in 8 bits, with an FP32 scale for 256 of them {cite}`dettmers2023`, in the 8-bit type of the 8-bit optimizers {cite}`dettmers2022optimizers`. **Predict**, per parameter:
#
# $$0.5 + \frac{4}{64} \qquad \mathrm{and} \qquad 0.5 + \frac{1}{64} + \frac{4}{64 \cdot 256}$$
#
# **Measure** on a matrix of 1024 by 1024:


# %%
def thousandths(number):
    """Half upwards: 0.5625 is a tie, and Python prints the even 0.562."""
    return f"{math.floor(number * 1000 + 0.5) / 1000:.3f}"


# %%
square = torch.rand(1024, 1024) - 0.5
rows = []
for double in (False, True):
    q4, state = bnb.quantize_4bit(
        square, quant_type="nf4", compress_statistics=double
    )
    stored = q4.nbytes + state.absmax.nbytes
    stored += state.state2.absmax.nbytes if double else 0
    expected = bytes_per_parameter(4, block=64, double=double)
    name = "NF4, double quantised" if double else "NF4"
    measured = thousandths(stored / square.numel())
    rows.append((name, thousandths(expected), measured, stored))
table(["", "predicted (B)", "counted (B)", "all of it (B)"], rows)

# %% [markdown]
# The small tables that a tensor needs once (16 and 256 levels, one mean) are not counted: they do not grow with it.

# %% [markdown]
# ## Bytes against error
#
# Everything on one network: bytes per weight, rounding error beside the size of a weight, and the digits that it reads. Only the two weight matrices are quantised, as bitsandbytes does with linear layers.


# %%
def through_4bit(kind, double=False):
    def cast(w):
        q4, state = bnb.quantize_4bit(
            w, quant_type=kind, compress_statistics=double
        )
        return bnb.dequantize_4bit(q4, state)

    return cast


def through_int8(w):
    q, a = absmax_int8(w, rows=True)
    return q * a / 127


# %%
METHODS = {
    "FP32": (4.0, lambda w: w),
    "BF16": (2.0, CASTS["BF16"]),
    "FP16": (2.0, CASTS["FP16"]),
    "INT8, by rows": (bytes_per_parameter(8, 576), through_int8),
    "FP8 E4M3, no scale": (1.0, CASTS["FP8 E4M3"]),
    "NF4": (bytes_per_parameter(4, 64), through_4bit("nf4")),
    "NF4, double": (
        bytes_per_parameter(4, 64, True),
        through_4bit("nf4", True),
    ),
    "FP4": (bytes_per_parameter(4, 64), through_4bit("fp4")),
}

# %%
rows = []
for name, (nbytes, cast) in METHODS.items():
    state = {key: cast(w) if w.ndim == 2 else w for key, w in trained.items()}
    error = rms_error(W, state["0.weight"]) / rms_error(W, 0 * W)
    percent = f"{100 * error:.3f}"
    rows.append((name, thousandths(nbytes), percent, right(state)))
table(
    ["weights in", "bytes each", "error (%)", "digits right"],
    rows,
)

# %% [markdown]
# The error grows with each bit that is saved, and this easy task hardly notices. How much a *language model* notices differs between models: measure it on yours. Two lessons hold here already: with the same bytes NF4 is more accurate than FP4, and INT8 with scales than FP8 without.

# %% [markdown]
# ## When to choose which
#
# The source article's advice is sound in outline: FP32 where exactness counts, 16 bits for training large models, INT8 for inference. Completed:
#
# | you want to | choose | because | mind |
# | --- | --- | --- | --- |
# | train, card with BF16 | BF16 mixed precision, FP32 master weights | FP32's range, no loss scaling | updates of BF16 weights themselves are absorbed, see above |
# | train, older card | FP16 mixed precision with `GradScaler` | tensor cores from Volta on | overflow past 65,504 |
# | fine-tune a model that barely fits | NF4 base, 16-bit adapters (QLoRA) | half a byte per frozen weight | computes in 16 bits, does not save activations |
# | run a model | the checkpoint's own dtype | nothing is lost | a BF16 checkpoint may overflow in FP16 |
# | run a model that is too large | INT8, then NF4 | 1 and about 0.5 bytes | measure its quality |
# | serve many users, Ada or newer | FP8 with scales | units that compute in it | calibrated scales |
# | solve a problem of a few parameters exactly | FP32 or FP64 | digits | TF32 may be on: three digits in products |

# %% [markdown]
# ### Accuracy against performance
#
# "Lower precision computes faster" needs a condition: **if the card has units for it**. A GTX 10 card stores FP16 in half the bytes, and computes it at 1/64 of its FP32 rate: 2 results per clock and multiprocessor against 128 {cite}`nvidia-cuda-throughput`.
#
# Weight-only formats have no units anywhere: NF4 and bitsandbytes' FP4 are turned back into 16 bits for each product. (Blackwell's FP4 units take E2M1 with scales of its own.) They can be slower than FP16 on the same card, and faster only where reading the weights is what takes the time. Bytes are always saved; time is not.

# %% [markdown]
# ## Which card computes in what
#
# Matrix units (tensor cores) of NVIDIA's generations, by the CUDA Programming Guide {cite}`nvidia-cuda-capabilities`; Volta by {cite}`nvidia-volta-tuning,nvidia-tensorrt-matrix`; Pascal has none. All of them store every format, and compute in FP32 and FP64 outside of matrix units.
#
# | generation | capability | FP64 | TF32 | BF16 | FP16 | FP8 | FP4 | INT8 | INT4 |
# | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
# | Pascal (P100, GTX 10) | 6.0, 6.1 | – | – | – | – | – | – | – | – |
# | Volta (V100) | 7.0 | – | – | – | ✓ | – | – | – | – |
# | Turing (T4, RTX 20) | 7.5 | – | – | – | ✓ | – | – | ✓ | ✓ |
# | Ampere (A100) | 8.0 | ✓ | ✓ | ✓ | ✓ | – | – | ✓ | ✓ |
# | Ampere (RTX 30) | 8.6 | – | ✓ | ✓ | ✓ | – | – | ✓ | ✓ |
# | Ada (RTX 40, L4) | 8.9 | – | ✓ | ✓ | ✓ | ✓ | – | ✓ | ✓ |
# | Hopper (H100, H200) | 9.0 | ✓ | ✓ | ✓ | ✓ | ✓ | – | ✓ | – |
# | Blackwell (B200) | 10.0 | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | – |
# | Blackwell (RTX 50) | 12.0 | – | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | – |

# %% [markdown]
# The others, each by its maker's documentation. "?" means: not documented there.
#
# | device | FP64 | TF32 | BF16 | FP16 | FP8 | FP4 | INT8 | source |
# | --- | --- | --- | --- | --- | --- | --- | --- | --- |
# | AMD CDNA 1 (MI100) | – | – | ✓ | ✓ | – | – | ✓ | {cite}`rocm-precision` |
# | AMD CDNA 2 (MI250) | ✓ | – | ✓ | ✓ | – | – | ✓ | {cite}`rocm-precision` |
# | AMD CDNA 3 (MI300) | ✓ | ✓ | ✓ | ✓ | ✓ (own variant) | – | ✓ | {cite}`rocm-precision` |
# | AMD CDNA 4 (MI350) | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | {cite}`rocm-precision` |
# | AMD RDNA 3 (RX 7900) | – | – | ✓ | ✓ | – | – | ✓ | {cite}`rocm-precision` |
# | AMD RDNA 4 (RX 9070) | – | – | ✓ | ✓ | ✓ | – | ✓ | {cite}`rocm-precision` |
# | Intel Arc A (XMX) | ? | ? | ✓ | ✓ | ? | ? | ✓ | {cite}`intel-xmx` |
# | Intel Xeon, 4th gen. (AMX) | ? | ? | ✓ | ? | ? | ? | ✓ | {cite}`pytorch-amx` |
# | Apple GPU (a type, not a unit) | – | ? | ✓ (macOS 14) | ✓ | ? | ? | ? | {cite}`pytorch-mps,apple-bfloat` |
#
# A CPU without such units still holds every format: PyTorch converts on the way.

# %% [markdown]
# ### Four lines to correct
#
# | the article says | what holds |
# | --- | --- |
# | INT8 by bitsandbytes "needs no special hardware" | LLM.int8() needs compute capability 7.5 (RTX 20, T4), NF4 6.0 {cite}`bitsandbytes-install`; by now it also runs on CPUs, as this page shows |
# | FP16: "RTX 20 and newer" | the P100 computes FP16 at twice its FP32 rate {cite}`nvidia-cuda-throughput`, Volta has tensor cores for it; every card *stores* it |
# | BF16: "Ampere and newer" | right for units; PyTorch runs it on older cards by conversion, so ask with `including_emulation=False` |
# | FP16 and INT8 "compute faster" | where there are units, see above |

# %% [markdown]
# Ask your own machine: `every-byte check` prints what the set-up cell of this page printed. It asks PyTorch:
#
# ```python
# torch.cuda.get_device_capability()  # (8, 9) on an RTX 4050
# torch.cuda.is_bf16_supported(including_emulation=False)  # in hardware?
# torch.cuda.is_tf32_supported()
# torch.get_float32_matmul_precision()  # "highest": TF32 is off
# ```

# %% [markdown]
# ## What to remember
#
# - Exponent bits are range, mantissa bits are digits. FP16 overflows past **65,504**; BF16 has two digits and **256 + 1 = 256**.
# - Widening loses nothing, narrowing changes almost every weight, and **converting back brings nothing back**. Choose the dtype when loading.
# - A 4-bit weight takes **0.563** bytes, or **0.516** double quantised. Bytes are always saved, time only where the card has units.

# %% [markdown]
# ## Exercises
#
# **1.** What is the smallest whole number that FP16 cannot hold? And FP8 E4M3? Predict from $M$, then search.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
for known in (FP16, BF16, E4M3, E5M2):
    n = next(n for n in range(1, 10**6) if known.round(n) != n)
    bits = known.mantissa_bits + 1
    print(f"{known.name:9} {n:>5,} = 2^{bits} + 1, predicted {2**bits + 1:,}")

# %% [markdown]
# **2.** Adding the numbers 1, 1, 1, … in BF16 stops at a number. Which one, and why does adding in blocks of 256 get further?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
ones = [1.0] * 4096
total = 0.0
for one in ones:
    total = BF16.round(total + one)
print(f"one after the other: {total:,.0f}")

block_sums = [0.0] * 16
for block in range(16):
    for one in ones[256 * block : 256 * (block + 1)]:
        block_sums[block] = BF16.round(block_sums[block] + one)
total = 0.0
for partial in block_sums:
    total = BF16.round(total + partial)
print(f"in blocks of 256:    {total:,.0f}")

# %% [markdown]
# <details><summary>Why?</summary>
#
# At 256 the neighbours lie 2 apart: adding 1 is a tie that goes down. Block sums are as large as each other, so nothing is absorbed. That is why matrix units add products of 16-bit numbers in FP32.
#
# </details>

# %% [markdown]
# **3.** Which block size makes NF4 take the bytes of double-quantised NF4 with blocks of 64, without double quantisation? What would you lose?
#
# <details><summary>Solution</summary>
#
# $4/B = 1/64 + 4/(64 \cdot 256)$ gives $B \approx 241$: about 256. Each scale would then cover four times as many weights, so an outlier would coarsen four times as many. Double quantisation keeps blocks of 64 at nearly the same price.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Training and inference](03_training_and_inference.ipynb) counts what a model keeps beside its weights, to the byte. The [references](../book/references.md) list the standards and papers behind this chapter.
