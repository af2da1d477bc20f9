# %% [markdown]
# # Conversion and hardware: fewer bits for a model you have
#
# **What is lost when a trained model is converted, and which format should you choose?** Each conversion to fewer bits changes almost every weight and cannot be undone, yet most models hardly notice until 4 bits. The bytes are always saved; time is saved only where the card computes in the format.
#
# After this chapter you can say what is lost when a model is converted or quantised, and which format to choose for which job and which card.
#
# - **Time:** 25 minutes to read, under half a minute to run.
# - **Needs:** nothing. A GPU is not used, and nothing is downloaded.

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

from every_byte import Breakdown
from every_byte.formats import (
    BF16,
    E2M1,
    FORMATS,
    FP16,
    FP32,
    TF32,
    bytes_per_parameter,
    nf4_levels,
)
from helpers.digits import digits, right, trained_network
from helpers.environment import formats, versions
from helpers.plots import COLORS, stacked_bars, use_book_style
from helpers.tables import table

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
use_book_style()
print(versions("torch", "transformers", "bitsandbytes"))
print(formats())

# %% [markdown]
# The last three lines say which formats your PyTorch, CPU and GPU know. Only they depend on the machine. Everything else is arithmetic on the CPU, the same everywhere, to the last digit.
#
# {numref}`billion-in-formats` is what the choice is about: the bytes of a billion weights, with the scales that the smaller formats need. This chapter asks what each of them costs in accuracy.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars of the bytes of a billion weights: FP32 4 GB, BF16 or FP16 2 GB, INT8 by rows 1 GB, NF4 0.56 GB, NF4 double quantised 0.52 GB."}, "figure": {"name": "billion-in-formats", "caption": "A billion weights in five formats, with their scales. By formula."}}
EACH = {
    "FP32": 4.0,
    "BF16, FP16": 2.0,
    "INT8, by rows of 4,096": bytes_per_parameter(8, 4096),
    "NF4": bytes_per_parameter(4, 64),
    "NF4, double quantised": bytes_per_parameter(4, 64, True),
}
figure = stacked_bars(
    {
        "a billion weights": {
            name: Breakdown(parameters=round(each * 10**9))
            for name, each in EACH.items()
        }
    }
)

# %% [markdown]
# ## Converting a model
#
# An article on Qwen2 {cite}`qwen2-notes` asks how to convert between precisions, and leaves the question open. The calls are short. What matters is what they do to the numbers.
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
# A conversion is lossless if each number comes back from it. A 16-bit format has only 65,536 patterns, so we try them all.


# %% tags=["hide-input"]
def come_back(source, through):
    """Numbers of a 16-bit or 8-bit format that survive the way and back."""
    ints = torch.int16 if source.itemsize == 2 else torch.uint8
    patterns = torch.arange(2 ** (8 * source.itemsize)).to(ints)
    numbers = patterns.view(source)
    back = numbers.to(through).to(source)
    is_number = ~numbers.double().isnan()
    same = (back.view(ints) == patterns) & is_number
    return is_number.sum().item(), same.sum().item()


# %% tags=["hide-input"]
half, brain = torch.float16, torch.bfloat16
fp8 = torch.float8_e4m3fn
WAYS = [(half, torch.float32), (brain, torch.float32), (fp8, half)]
WAYS += [(fp8, brain), (half, brain), (brain, half)]
table(
    ["from and back to", "through", "numbers", "come back"],
    [(f"{a}"[6:], f"{b}"[6:], *come_back(a, b)) for a, b in WAYS],
)

# %% [markdown]
# Every FP16 and every BF16 number is also an FP32 number: **widening loses nothing**. Between FP16 and BF16 neither way is safe: one loses digits, the other range. (NaN stays NaN and is not counted.)

# %% [markdown]
# ### What FP32 loses on the way down
#
# FP32 has over four billion patterns, too many to try. But rounding keeps the order of numbers, so a bisection finds where each fate begins, and the patterns between can be counted.

# %% tags=["hide-input"]
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


# %% tags=["hide-input"]
names = "become 0", "become subnormal", "stay normal", "become infinite"
rows = []
for name, *counts in zip(names, fates(FP16), fates(BF16)):
    shares = [f"{100 * count / len(patterns):.2f}" for count in counts]
    rows.append((name, counts[0], shares[0], counts[1], shares[1]))
table(["of FP32's numbers", "to FP16", "%", "to BF16", "%"], rows)

# %% [markdown]
# Most of FP32's numbers lie outside of FP16's normal range. BF16 loses almost none of them to range, but it loses digits in almost all.

# %% [markdown]
# ### A trained model
#
# What does that mean for weights that training has produced? We take a small network that has learned to read digits. **Predict:** a conversion leaves a weight as it is only if the mantissa bits that it drops happen to be zero. From FP32 to FP16 and TF32 these are 13 bits, to BF16 16 bits: about one weight in $2^{13}$ or $2^{16}$.

# %%
network = trained_network()
trained = {name: w.float() for name, w in network.state_dict().items()}
weights = torch.cat([w.flatten() for w in trained.values()])
print(f"{weights.numel():,} weights")
print(f"{right(network, trained):,} of 2,000 test digits right")

# %% tags=["hide-input"]
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


# %% tags=["hide-input"]
rows = []
for name, known in {f.name: f for f in FORMATS if f.name in CASTS}.items():
    state = converted(CASTS[name])
    new = torch.cat([w.flatten() for w in state.values()])
    dropped = max(0, FP32.mantissa_bits - known.mantissa_bits)
    expected = len(new) - len(new) / 2**dropped
    changed = (new != weights).sum().item()
    zero = (new == 0).sum().item()
    read = right(network, state)
    rows.append((name, f"{expected:,.0f}", changed, zero, read))
table(
    ["there and back", "predicted", "changed", "now 0", "digits right"],
    rows,
)

# %% [markdown]
# Almost every weight changes, and the network reads the digits nearly as well as before. That is the whole secret of low precision: networks are robust to small errors in each weight, as long as none of them is *large*. (To predict how many FP8 turns into zero, you would also need their distribution.)

# %% [markdown]
# ### Why converting back brings nothing back
#
# `.float()` after `.half()` takes the bytes of FP32 and has the values of FP16: the dropped bits come back as zeros.

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
# Not everything in a model is a parameter. `.half()` also casts floating-point buffers, and leaves integers alone:

# %% tags=["hide-input"]
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
# We make a small Qwen2 from a configuration, with uniform random weights, save it and load it again. `dtype=` is the name since transformers 4.56; older code says `torch_dtype=`. Without it, transformers 5 keeps the checkpoint's own dtype, while version 4 took FP32.

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


# %%
def load(**how):
    return Qwen2ForCausalLM.from_pretrained(folder.name, **how)


# %% tags=["hide-input"]
def describe(model):
    rotary = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    nbytes = model.num_parameters() * model.dtype.itemsize
    return str(model.dtype)[6:], nbytes, str(rotary.dtype)[6:]


# %% tags=["hide-input"]
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
# Loading *in* FP16 and converting *to* FP16 are not the same. `from_pretrained` leaves the rotary embedding's frequencies in FP32, where positions in the thousands need their digits. `.half()` casts them with the rest, and `.float()` does not bring them back. So **choose the dtype when loading**.

# %%
fine = dict(load().named_buffers())["model.rotary_emb.inv_freq"]
coarse = dict(load().half().named_buffers())["model.rotary_emb.inv_freq"]
error = ((coarse.double() - fine.double()) / fine.double()).abs().max()
print(f"largest relative error of a frequency: {error.item():.1e}")
print(f"FP16's rounding: at most 2^-11 =       {2**-11:.1e}")

# %% [markdown]
# `save_pretrained` writes what is there. After a detour through FP16 the checkpoint says FP16, and loading it in FP32 gives FP16's values:

# %% tags=["hide-input"]
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

# %% tags=["hide-input"]
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
# `.bfloat16()` is not refused in this version. It leaves the integers alone and casts what was not quantised:


# %% tags=["hide-input"]
def kinds(model):
    held = Counter()
    for parameter in model.parameters():
        held[str(parameter.dtype)[6:]] += parameter.numel()
    return ", ".join(f"{n:,} x {dtype}" for dtype, n in sorted(held.items()))


print("loaded:     ", kinds(quantised))
print(".bfloat16():", kinds(quantised.bfloat16()))

# %% [markdown]
# (Two 4-bit weights share a `uint8`.) **What to do instead:** choose both when loading: `dtype=`, and `bnb_4bit_compute_dtype=` for the dtype that it computes in. To undo quantisation, load the original checkpoint again. `.dequantize()` gives floating-point weights, but not the ones you had:

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
# Eight or four bits cannot hold weights of all sizes. They don't have to: the weights of a layer are of similar size. So we store small integers and a **scale**. *Absmax* quantisation maps the largest absolute value $a$ to 127:
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


# %%
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
# To multiply in INT8, the *activations* must be quantised as well. In large language models a few of their columns hold values many times larger than all others {cite}`dettmers2022`. A row's scale then follows the outlier, and the rest of the row rounds to almost nothing. LLM.int8() takes out the columns with a value of 6 or more, multiplies these in 16 bits, and the rest in INT8.

# %%
X = digits(train=False)[0][:64].float()  # activations that behave
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
# FP4 is the other 4-bit type of bitsandbytes: a float with 2 exponent bits and 1 mantissa bit. It differs from the standard's E2M1 in one level, its only subnormal.

# %% tags=["hide-input"]
positive = bnb.get_4bit_type("fp4", device="cpu")[:8].sort().values
standard = [E2M1.decode(pattern) / E2M1.max for pattern in range(8)]
print("bitsandbytes:", " ".join(f"{x:.4f}" for x in positive.tolist()))
print("E2M1 / 6:    ", " ".join(f"{x:.4f}" for x in standard))

# %% [markdown]
# {numref}`nf4-levels` shows the three sets of levels under the weights that they must hold.

# %% tags=["hide-input"]
blocks = W.reshape(-1, 64)
scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
levels = {
    "INT4": [i / 7 for i in range(-7, 8)],
    "FP4": [*positive.tolist(), *(-positive).tolist()],
    "NF4": ours.tolist(),
}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Levels of INT4, FP4 and NF4 between -1 and 1, above a histogram of the trained weights of one layer, each block of 64 divided by its largest. INT4's levels are evenly spaced. FP4's are dense at zero and far apart at the ends. NF4's follow the bell shape of the histogram."}, "figure": {"name": "nf4-levels", "caption": "Levels of INT4, FP4 and NF4, and above them the weights of a trained layer, each block of 64 divided by its largest."}}
figure, axes = plt.subplots(figsize=(5.4, 3.2))
counts = torch.histc(scaled.double(), bins=40, min=-1, max=1).tolist()
edges = [i / 20 - 1 for i in range(40)]
axes.bar(
    edges,
    [c / max(counts) for c in counts],
    0.045,
    color=COLORS["workspaces"],
    align="edge",
)
for row, (name, marks) in enumerate(levels.items()):
    at = -0.3 - 0.34 * row
    color = COLORS[("gradients", "parameters", "optimizer states")[row]]
    axes.vlines(marks, at - 0.1, at + 0.1, color=color, linewidth=2)
    axes.text(-1.06, at, name, ha="right", va="center", size=12)
axes.set(xlim=(-1.32, 1.05), xticks=(-1, 0, 1), xlabel="weight / scale")
axes.set_yticks([])
axes.spines["left"].set_visible(False)

# %% [markdown]
# ### Blocks and scales
#
# A scale for each block of 64 weights keeps an outlier's damage within these 64. By hand: scale, find the nearest level, pack two to a byte.
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


# %%
packed, scales = nf4_by_hand(W)
theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
print("packed bytes equal:", torch.equal(packed, theirs.flatten()))
print("scales equal:      ", torch.equal(scales, state.absmax))

# %% tags=["hide-input"]
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


# %% tags=["hide-input"]
def thousandths(number):
    """Half upwards: 0.5625 is a tie, and Python prints the even 0.562."""
    return f"{math.floor(number * 1000 + 0.5) / 1000:.3f}"


# %% tags=["hide-input"]
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
# Now all of it on one network: bytes per weight, rounding error relative to the size of a weight, and the digits that it reads. Only the two weight matrices are quantised, as bitsandbytes does with linear layers.


# %% tags=["hide-input"]
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


# %% tags=["hide-input"]
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

# %% tags=["hide-input"]
rows = []
for name, (nbytes, cast) in METHODS.items():
    state = {key: cast(w) if w.ndim == 2 else w for key, w in trained.items()}
    error = rms_error(W, state["0.weight"]) / rms_error(W, 0 * W)
    percent = f"{100 * error:.3f}"
    read = right(network, state)
    rows.append((name, thousandths(nbytes), percent, read))
table(
    ["weights in", "bytes each", "error (%)", "digits right"],
    rows,
)

# %% [markdown]
# The error grows with each bit that you save, and this easy task hardly notices. How much a *language model* notices differs from model to model: measure it on yours. Two lessons hold here already: with the same bytes NF4 is more accurate than FP4, and INT8 with scales than FP8 without.

# %% [markdown]
# ## When to choose which
#
# An article's advice {cite}`hoperj2024` is sound in outline: FP32 where exactness counts, 16 bits for training large models, INT8 for inference. Here it is in full:
#
# | you want to | choose | because | watch out for |
# | --- | --- | --- | --- |
# | train, card with BF16 | BF16 mixed precision, FP32 master weights | FP32's range, no loss scaling | weights kept in BF16 alone: small updates vanish |
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
# Formats for weights alone have no units anywhere: NF4 and bitsandbytes' FP4 are turned back into 16 bits for each product. (Blackwell's FP4 units take E2M1 with scales of their own.) They can be slower than FP16 on the same card. They are faster only where most of the time goes into reading the weights.

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
# <details><summary>AMD, Intel and Apple</summary>
#
# Each row follows its maker's documentation. "?" means that it says nothing of it.
#
# | device | FP64 | TF32 | BF16 | FP16 | FP8 | FP4 | INT8 | source |
# | --- | --- | --- | --- | --- | --- | --- | --- | --- |
# | AMD CDNA 1 (MI100) | – | – | ✓ | ✓ | – | – | ✓ | {cite}`rocm-precision` |
# | AMD CDNA 2 (MI250) | ✓ | – | ✓ | ✓ | – | – | ✓ | {cite}`rocm-precision` |
# | AMD CDNA 3 (MI300) | ✓ | ✓ | ✓ | ✓ | ✓ (own variant) | – | ✓ | {cite}`rocm-precision` |
# | AMD CDNA 4 (MI350) | ✓ | emulated | ✓ | ✓ | ✓ | ✓ | ✓ | {cite}`rocm-precision,hipblaslt-tf32` |
# | AMD RDNA 3 (RX 7900) | – | – | ✓ | ✓ | – | – | ✓ | {cite}`rocm-precision` |
# | AMD RDNA 4 (RX 9070) | – | – | ✓ | ✓ | ✓ | – | ✓ | {cite}`rocm-precision` |
# | Intel Arc A (XMX) | ? | ? | ✓ | ✓ | ? | ? | ✓ | {cite}`intel-xmx` |
# | Intel Xeon, 4th gen. (AMX) | ? | ? | ✓ | ? | ? | ? | ✓ | {cite}`pytorch-amx` |
# | Apple GPU (a type, not a unit) | – | ? | ✓ (macOS 14) | ✓ | ? | ? | ? | {cite}`pytorch-mps,apple-bfloat` |
#
# </details>
#
# The MI350 has no TF32 units: AMD's library emulates TF32 with several BF16 products. A CPU without any such units still holds every format: PyTorch converts on the way.

# %% [markdown]
# ### Four lines to correct
#
# | the article says | what holds |
# | --- | --- |
# | INT8 by bitsandbytes "needs no special hardware" | LLM.int8() needs compute capability 7.5 (RTX 20, T4), NF4 6.0 {cite}`bitsandbytes-install`; today it also runs on CPUs, as this page shows |
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
# - Widening loses nothing, narrowing changes almost every weight, and **converting back brings nothing back**. Choose the dtype when loading.
# - A scale should cover few weights, so that an outlier spoils few. A 4-bit weight takes **0.563** bytes with its scale, or **0.516** double quantised.
# - Bytes are always saved. Time is saved only where the card has units for the format.

# %% [markdown]
# ## Exercises
#
# **1.** Which block size makes NF4 take the bytes of double-quantised NF4 with blocks of 64, without double quantisation? What would you lose?
#
# <details><summary>Solution</summary>
#
# $4/B = 1/64 + 4/(64 \cdot 256)$ gives $B \approx 241$: about 256. Each scale would then cover four times as many weights, so an outlier would coarsen four times as many. Double quantisation keeps blocks of 64 at nearly the same price.
#
# </details>

# %% [markdown]
# **2.** A checkpoint is in BF16 and your card computes only in FP16. What can go wrong when you convert it, and how do you find out?
#
# <details><summary>Solution</summary>
#
# Values past 65,504 become infinite, and values below $2^{-14}$ lose digits or become zero. Convert it and compare: `w.half().isinf().any()` for each tensor. Weights are rarely that large, but activations can be.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Mixed precision](06_mixed_precision.ipynb) trains in 16 bits. [Quality against precision](09_quality_vs_precision.ipynb) measures what the saved bytes cost a language model. [Number formats](02_precision_formats.ipynb) has the bits themselves. The [references](../book/references.md) list the sources.
