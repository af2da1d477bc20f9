# %% [markdown]
# # Number formats: what the bits of a number can hold
#
# **What do you give up when a number has fewer bits?** Fewer exponent bits cost range, and fewer mantissa bits cost digits: FP16 overflows past 65,504, and BF16 goes as far as FP32 but keeps only two digits. Halving the bits halves the bytes, exactly.
#
# After this chapter you can say what a number format can hold, what it costs in bytes, and how a number gets lost in it.
#
# - **Time:** 20 minutes to read, under half a minute to run.
# - **Needs:** nothing. A GPU is optional, and nothing is downloaded.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from every_byte import open_gpu
from every_byte.formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    FP64,
    nf4_levels,
)
from every_byte.units import GiB
from helpers.digits import digits, right, trained_network
from helpers.environment import versions
from helpers.mlp import SimpleMLP
from helpers.plots import COLORS, use_book_style
from helpers.tables import table

use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch"))

# %% [markdown]
# The first line names the GPU of this page. Only one section looks at its memory. Everything else is arithmetic, done for real on the CPU, and the same everywhere to the last digit.

# %% [markdown]
# ## Three fields
#
# A floating-point number has a **sign**, an **exponent** that says how large it is, and a **mantissa** that says where between two powers of two {cite}`ieee754`. {numref}`bits-of-formats` shows how many bits each format gives to them.

# %% tags=["hide-input"]
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

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bits of eleven formats, one box for each bit. FP64: 1 sign, 11 exponent, 52 mantissa. FP32: 1, 8, 23. TF32: 1, 8, 10, stored in 32. BF16: 1, 8, 7. FP16: 1, 5, 10. FP8 E5M2: 1, 5, 2. FP8 E4M3: 1, 4, 3. FP4 E2M1: 1, 2, 1. INT8: 8 bits of an integer. INT4: 4 bits of an integer. NF4: 4 bits that number a table of 16 levels."}, "figure": {"name": "bits-of-formats", "caption": "The bits of eleven formats. From the left: sign (orange), exponent (blue), mantissa (green)."}}
figure, axes = plt.subplots(figsize=(5.4, 6.2))
for row, (label, colors) in enumerate(fields.items()):
    axes.bar(range(len(colors)), 0.45, 0.82, row, color=colors, align="edge")
    axes.text(0, row - 0.09, label, size=12, va="bottom")
axes.set(xlim=(0, 64), ylim=(len(fields) - 0.4, -0.55))
axes.set_axis_off()

# %% [markdown]
# With exponent field $e$, bias $b$ and $M$ mantissa bits holding $m$, the number is
#
# $$(-1)^{s} \cdot 2^{e-b} \cdot \left(1 + \frac{m}{2^{M}}\right)$$
#
# The 1 is implicit: it costs no bit. So a format has one bit more of precision than it stores: BF16 stores 7 and has 8. This book counts the stored ones. When $e = 0$ the 1 falls away, and the exponent stays at $1-b$. These are the **subnormal** numbers. They fill the gap around zero.

# %% [markdown]
# TF32 exists only inside tensor cores {cite}`nvidia-a100`: in memory it takes the 32 bits of FP32. BF16 is the upper half of FP32 {cite}`kalamkar2019`. INT8 and INT4 are plain integers that need a scale, and NF4 numbers the rows of a table: [Conversion and hardware](17_conversion_and_hardware.ipynb) has both.
#
# The number 0.1 is not a sum of a few powers of two. Each format stores the nearest number that it has:

# %%
for known in (FP32, BF16, FP16, E4M3):
    pattern = known.encode(0.1)
    print(f"{known.name:9} {known.fields(pattern)}")
    print(f"{'':9} = {known.decode(pattern):.20f}")

# %% [markdown]
# ## What a format saves
#
# **Predict.** A model of $N$ parameters takes $N$ times the bytes of one, plus a little rounding: PyTorch's allocator hands out multiples of 512 bytes {cite}`pytorch-allocator`.

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

# %% tags=["hide-input"]
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
# The rest of what the article measured has causes of its own, above all tables of positions: [Qwen2-0.5B](08_qwen2.ipynb) finds them. The bytes are the easy part of the question. The rest of this chapter is about what they hold.

# %% [markdown]
# ## Range and resolution, from the bits
#
# Exponent bits buy **range**, mantissa bits buy **resolution**. **Epsilon** is the step from 1 to the next number: $2^{-M}$. *Digits* counts the decimal digits that always survive: $M \log_{10} 2$, rounded down.


# %% tags=["hide-input"]
def short(number):
    """Whole numbers and fractions in full, others by their power of ten."""
    if number == int(number) and number < 1e6:
        return f"{number:,.0f}"
    return f"{number:.4g}" if 0.1 < number < 1 else f"{number:.2e}"


# %% tags=["hide-input"]
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
# We computed all of this from the widths of the fields. Does PyTorch's own table agree?

# %% tags=["hide-input"]
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
# BF16 is often called "like FP16 with a larger range", for example in the article that this book began with {cite}`hoperj2024`. The other half of the sentence is missing: it pays for the range with resolution.

# %% tags=["hide-input"]
print(f"range:  BF16 reaches {BF16.max / FP16.max:.1e} times as far")
print(f"steps:  BF16's are {BF16.eps / FP16.eps:.0f} times as coarse")
print(f"digits: {BF16.digits} instead of {FP16.digits}")

# %% [markdown]
# ## Three ways to lose a number
#
# ### Overflow
#
# FP16 ends at 65,504. Whatever would round to 65,536 becomes infinite, and a single infinity in a sum makes the whole sum infinite. A product of two numbers no larger than 256 is enough.

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
# In training, this is an update that does nothing. A weight near 1 with a gradient step of 0.001 stays where it is in BF16, forever:

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
# At the other end, a number below half of the smallest subnormal becomes zero. Gradients are small, so let us take real ones, of a small network that has learned to read digits. It was trained in FP64 and rounded to FP32. Machines differ in the last digits of FP64, and rounding drops those: the weights are the same everywhere.

# %%
network = trained_network()
trained = {name: w.float() for name, w in network.state_dict().items()}
inputs, labels = digits(train=True)

weights = torch.cat([w.flatten() for w in trained.values()])
print(f"{weights.numel():,} weights")
print(f"{right(network, trained):,} of 2,000 test digits right")

# %% [markdown]
# Now one more step, on the single digit that the network knows best. Its gradients are tiny. **Loss scaling** multiplies the loss, and so all gradients, by a power of two before they are stored, and divides afterwards.

# %%
losses = nn.CrossEntropyLoss(reduction="none")(network(inputs), labels)
best = losses.argmin()
network.zero_grad()
nn.CrossEntropyLoss()(
    network(inputs[best, None]), labels[best, None]
).backward()
gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
gradients = gradients.float()

# %% tags=["hide-input"]
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
# {numref}`rounding-error` has every format: the largest relative error of rounding, in each interval from a power of two to the next. Within its range a float is equally good at all magnitudes: $2^{-M-1}$. Below its normal numbers it loses digits, and above its range it ends. An integer with a scale is the opposite: its steps are equal, so its relative error grows as the number shrinks.


# %% tags=["hide-input"]
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


# %% tags=["hide-input"]
ROUNDINGS = {
    known.name: (known.round, min(20, math.frexp(known.max)[1] - 1))
    for known in FORMATS
}
ROUNDINGS["INT8, scale 1/127"] = int8, 0
ROUNDINGS["NF4, scale 1"] = nf4, 0
STYLES = ("-", "-", "-", "-", "--") * 2
KINDS = [SIGN, EXPONENT, MANTISSA, GREY, "black"]
KINDS += [COLORS[k] for k in ("buffers", "batch", "activations")]
KINDS += [COLORS[k] for k in ("temporaries", "rounding")]

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels of the largest relative rounding error against magnitude from 2 to the -40 to 2 to the 20, both logarithmic. In the first, FP64, FP32, TF32 and BF16 are flat across the picture, at about 1e-16, 6e-8, 5e-4 and 4e-3. FP16 lies on TF32's line between 2 to the -14 and 2 to the 16, and rises to 1 below. In the second, FP8 and FP4 lie above 0.05 and are short. INT8 and NF4 end at 1 and lose accuracy as the number shrinks."}, "figure": {"name": "rounding-error", "caption": "Largest relative rounding error of each format against the size of the number. Above: formats of 16 bits and more. Below: of 8 and 4 bits."}}
figure, panels = plt.subplots(2, figsize=(5.4, 7.2), sharex=True)
drawings = list(zip(ROUNDINGS.items(), STYLES, KINDS))
for axes, some in zip(panels, (drawings[:5], drawings[5:])):
    for (name, (rounding, end)), style, color in some:
        errors = {power: worst(rounding, power) for power in range(-40, end)}
        drawn = {power: e for power, e in errors.items() if e < 1}
        axes.plot(*zip(*drawn.items()), style, color=color, label=name)
    axes.set(yscale="log", xlim=(-40, 20), ylabel="largest relative error")
    axes.set_ylim(top=1)
    axes.legend(loc="center left", bbox_to_anchor=(0, 0.32))
ticks = range(-40, 21, 10)
panels[1].set_xticks(ticks, [f"$2^{{{p}}}$" for p in ticks])
panels[1].set_xlabel("magnitude")
legends = [axes.get_legend() for axes in panels]

# %% [markdown]
# ## What to remember
#
# - Exponent bits are range, mantissa bits are digits. FP16 overflows past **65,504**; BF16 has two digits and **256 + 1 = 256**.
# - A small number added to a large one can vanish, and a small gradient can become zero. **Master weights** in FP32 prevent the first, **loss scaling** the second.
# - Half the bits are half the bytes, exactly. What they cost is range, digits, or both.

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
# **3.** Which is the better choice for a sum of 10,000 numbers near 1: FP16 or BF16? Say why before you try it.
#
# <details><summary>Solution</summary>
#
# Neither holds it: a running sum stops at 2,048 in FP16 and at 256 in BF16. FP16 gets further, since it has three more mantissa bits, and its range is large enough. Keep the sum in FP32, as PyTorch does.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Conversion and hardware](17_conversion_and_hardware.ipynb) converts whole models, quantises them by hand, and says which card computes in which format. [Mixed precision](06_mixed_precision.ipynb) trains in 16 bits. The [references](../book/references.md) list the standards and papers behind this chapter.
