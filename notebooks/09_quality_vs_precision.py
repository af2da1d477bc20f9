# %% [markdown]
# # Quality against precision: what the saved bytes cost
#
# **Is a given number of bytes better spent on more parameters or on more bits?** On more parameters: a larger model in fewer bits beats a smaller one in 16, down to about four bits. Below that, plain rounding ruins it, because each bit you remove makes the loss four times as large.
#
# After this chapter you can say what a number format costs in quality, how to measure that on a model of your own, and whether a given number of bytes is better spent on more parameters or on more bits.
#
# - **Time:** 25 minutes to read, two to three minutes to run.
# - **Needs:** nothing. A GPU is optional, and nothing is downloaded. Training always runs on the CPU.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up with bitsandbytes

import copy
import hashlib
import logging
import math
import statistics
import unicodedata

# That inputs are cast for the 8-bit product is no news here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes.functional as bnb
import matplotlib.pyplot as plt
import numpy as np
import torch
from bitsandbytes.nn import Linear8bitLt
from IPython.display import display
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from every_byte import open_gpu
from every_byte.formats import BF16, E4M3, E5M2, FP16, bytes_per_parameter
from every_byte.units import KiB
from helpers.environment import versions
from helpers.mnist import mnist
from helpers.plots import COLORS, against_bytes, use_book_style
from helpers.tables import table

use_book_style()
gpu = open_gpu()
print(gpu)
print(versions("torch", "torchvision", "bitsandbytes"))
gpu.close()  # until its memory is looked at
torch.set_num_threads(1)  # sums in one order, however many cores there are

# %% [markdown]
# The article that this book began with {cite}`hoperj2024` closes with a figure of llama.cpp's *k-quants* {cite}`kquants`: the perplexity of LLaMA models in 2 to 6 bits, against their size. It draws two conclusions. Quality falls smoothly with size, so one can choose. And 6 bits are within 0.1 % of FP16.
#
# We make such figures ourselves, with models small enough to be trained here: networks that read digits, and language models ({numref}`perplexity-against-bytes`). Then we look at where the loss comes from.

# %% [markdown]
# ## Fourteen formats
#
# [Number formats](02_precision_formats.ipynb) and [Conversion and hardware](17_conversion_and_hardware.ipynb) explain them. Here they are put to work. All of them change the *matrices of linear layers*:
#
# - In FP32, BF16 and FP16 the whole model is in that format, and computes in it.
# - Below 16 bits the matrices are turned back before each product, which is computed in FP32. Biases, norms and embeddings are kept in FP16.
# - Only LLM.int8() multiplies integers.
#
# **Round to nearest** is the naive way: $L = 2^{b-1}-1$ steps on either side of zero, with the largest weight of a block on the last of them. Three bits must really take three bits, so we pack them.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how bits are packed", "code_prompt_hide": "Hide how bits are packed"}
def pack(numbers, bits):
    """Whole numbers below 2**bits, without a gap between them."""
    planes = (numbers[:, None] >> torch.arange(bits)) & 1
    return torch.from_numpy(np.packbits(planes.to(torch.uint8).numpy()))


def unpack(packed, bits, count):
    planes = np.unpackbits(packed.numpy(), count=bits * count)
    planes = torch.from_numpy(planes).view(count, bits).int()
    return (planes << torch.arange(bits)).sum(1)


# %% [markdown]
# Each format is a function. It takes a matrix, and returns the tensors that have to be kept and the matrix that comes back from them.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show rounding to nearest", "code_prompt_hide": "Hide rounding to nearest"}
def integers(bits, block):
    """Round to nearest, with an FP32 scale for each `block` weights."""
    steps = 2 ** (bits - 1) - 1

    def quantise(w):
        blocks = w.flatten().split(block(w))
        blocks = nn.utils.rnn.pad_sequence(blocks, batch_first=True)
        largest = blocks.abs().amax(1, keepdim=True)
        q = (blocks * (steps / largest)).round().int() + steps
        packed = pack(q.flatten()[: w.numel()], bits)
        back = torch.zeros_like(blocks).flatten()
        back[: w.numel()] = unpack(packed, bits, w.numel()) - steps
        back = back.view_as(blocks) * (largest / steps)
        return (packed, largest), back.flatten()[: w.numel()].view_as(w)

    return quantise


# %% [markdown]
# bitsandbytes has NF4 and FP4. Its blocks run on from row to row, so we may give it a matrix as one long row. (Version 0.50.2 needs that: where *rows* end inside a block, it gives wrong weights back on CPUs with AVX-512.)


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show NF4, FP4 and FP8", "code_prompt_hide": "Hide NF4, FP4 and FP8"}
def four_bit(kind):
    def quantise(w):
        row = F.pad(w.flatten(), (0, -w.numel() % 64))[None]
        q, state = bnb.quantize_4bit(row, blocksize=64, quant_type=kind)
        back = bnb.dequantize_4bit(q, state).flatten()[: w.numel()]
        packed = q.flatten()[: -(-w.numel() // 2)]
        return (packed, state.absmax), back.view_as(w)

    return quantise


def fp8(dtype):
    """A scale for the tensor: its largest weight becomes the largest FP8."""

    def quantise(w):
        scale = w.abs().max() / torch.finfo(dtype).max
        q = (w / scale).to(dtype)
        return (q, scale), q.float() * scale

    return quantise


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the fourteen formats", "code_prompt_hide": "Hide the fourteen formats"}
FORMATS = {
    "FP32": torch.float32,
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
    "FP8 E4M3": fp8(torch.float8_e4m3fn),
    "FP8 E5M2": fp8(torch.float8_e5m2),
    "INT8, one scale": integers(8, lambda w: w.numel()),
    "INT8, by rows": integers(8, lambda w: w.shape[1]),
    "LLM.int8()": Linear8bitLt,
    "INT6": integers(6, lambda w: 64),
    "NF4": four_bit("nf4"),
    "FP4": four_bit("fp4"),
    "INT4": integers(4, lambda w: 64),
    "INT3": integers(3, lambda w: 64),
    "INT2": integers(2, lambda w: 64),
}

# %% [markdown]
# LLM.int8() {cite}`dettmers2022` is a layer, not only a way to store weights: it quantises its inputs, too.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show LLM.int8()", "code_prompt_hide": "Hide LLM.int8()"}
def llm_int8(model, threshold=6.0):
    """A copy with bitsandbytes' layers instead of PyTorch's."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                shape = layer.in_features, layer.out_features
                eight_bit = Linear8bitLt(
                    *shape, has_fp16_weights=False, threshold=threshold
                )
                eight_bit.load_state_dict(layer.state_dict())
                setattr(parent, name, eight_bit.to("cpu"))  # quantises
    return model.eval()  # in training mode it would only store in INT8


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the conversion of a model", "code_prompt_hide": "Hide the conversion of a model"}
@torch.no_grad()
def convert(model, name):
    """A copy of the model in a format, and the tensors to be kept."""
    how = FORMATS[name]
    if isinstance(how, torch.dtype):
        model = copy.deepcopy(model).to(how)
        return model, [p.data for p in model.parameters()]
    model = llm_int8(model) if how is Linear8bitLt else copy.deepcopy(model)
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    kept = []
    for p in model.parameters():
        if p.dtype == torch.int8:
            stored = p.data, p.SCB
        elif any(p is weight for weight in linear):
            stored, p.data = how(p.data)
        else:
            stored = (p.data.half(),)
            p.data = stored[0].float()
        kept += stored
    return model, kept


# %% [markdown]
# ### Bytes
#
# **Predict.** A $b$-bit weight takes $b/8$ bytes, and $4/B$ for its share of a scale. **Measure** what really has to be kept of a matrix of normally distributed weights:

# %% tags=["hide-input"]
torch.manual_seed(0)
uniform = torch.rand(512, 576, dtype=torch.float64)
W = torch.special.ndtri(uniform).float()  # normally distributed
shapes = {"INT8, one scale": (8, W.numel()), "INT8, by rows": (8, 576)}
shapes |= {"INT6": (6, 64), "NF4": (4, 64), "FP4": (4, 64)}
shapes |= {"INT4": (4, 64), "INT3": (3, 64), "INT2": (2, 64)}
rows = []
for name, (bits, block) in shapes.items():
    kept = sum(tensor.nbytes for tensor in FORMATS[name](W)[0])
    expected = bytes_per_parameter(bits, block) * W.numel()
    rows.append((name, int(expected), kept, f"{kept / W.numel():.4f}"))
table(["", "predicted (B)", "kept (B)", "each weight (B)"], rows)

# %% [markdown]
# Our INT8 by rows and bitsandbytes' are one and the same:

# %% tags=["hide-input"]
(packed, largest), back = FORMATS["INT8, by rows"](W)
theirs, scales, _ = bnb.int8_vectorwise_quant(W.clone())
ours = unpack(packed, 8, W.numel()).view_as(W) - 127
print("integers equal:", torch.equal(ours, theirs.int()))
print("scales equal:  ", torch.equal(largest.flatten(), scales))

# %% [markdown]
# Are these the bytes that the card holds? We take a network with three linear layers in each format and send its kept tensors to the GPU. **Predict** the bytes, with each tensor rounded up to 512: the prediction is right for all fourteen.


# %%
def mlp(width):
    return nn.Sequential(
        *(nn.Linear(576, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 10),
    )


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the fourteen rows, in bytes", "code_prompt_hide": "Hide the fourteen rows, in bytes"}
network = mlp(256)
stored = {name: convert(network, name)[1] for name in FORMATS}
rows = []
with gpu:
    for name, kept in stored.items():
        expected = sum(-(-t.nbytes // 512) * 512 for t in kept)
        there = [t.to(gpu.device) for t in kept]
        n = gpu.memory_allocated()
        total = sum(t.nbytes for t in kept)
        rows.append((name, total, expected, n, n - expected))
        del there
headers = ["", "kept (B)", "predicted (B)", "this GPU (B)", "difference"]
table(headers, rows)

# %% [markdown]
# ### Error
#
# **Predict.** Rounding to steps of size $s$ makes an error that is spread evenly over one step: $s/\sqrt{12}$ (root mean square). One bit fewer doubles the step and so the error. A float with $M$ mantissa bits has steps in proportion to the number: relative to it, on average, $0.196 \cdot 2^{-M}$.


# %% tags=["hide-input"]
def rms(x):
    return x.double().square().mean().sqrt().item()


def expected_error(name):
    """In percent of the weights' RMS; None where levels are no steps."""
    floats = {"BF16": BF16, "FP16": FP16, "FP8 E4M3": E4M3, "FP8 E5M2": E5M2}
    if name in floats:
        return 19.6 * 2.0 ** -floats[name].mantissa_bits
    if not name.startswith("INT"):
        return None
    steps = 2 ** (int(name[3]) - 1) - 1
    _, largest = FORMATS[name](W)[0]
    return 100 * rms(largest / steps) / math.sqrt(12) / rms(W)


# %% tags=["hide-input"]
def there_and_back(name):
    how = FORMATS[name]
    return W.to(how).float() if isinstance(how, torch.dtype) else how(W)[1]


rows = []
for name in FORMATS:
    if name not in ("FP32", "LLM.int8()"):
        expected = expected_error(name)
        predicted = "" if expected is None else f"{expected:.3g}"
        error = 100 * rms(there_and_back(name) - W) / rms(W)
        rows.append((name, predicted, f"{error:.3g}"))
table(["", "error, predicted (%)", "error, measured (%)"], rows)

# %% [markdown]
# (The factor 0.196 is $1/\sqrt{12}$ divided by the root mean square of numbers between 1 and 2 whose logarithms are evenly spread.) INT2 has only three levels: most weights become zero, and the formula for small steps no longer holds. On such a matrix, FP8 with its few mantissa bits does worse than INT8, and NF4 does better than the other formats of its size.

# %% [markdown]
# ## Digits
#
# Five networks of two hidden layers, 16 to 256 wide, learn 8,000 digits. 2,000 others are the test. Each is trained from five seeds, to see how much is chance. `torch.func` stacks the five and trains them at once, with the same code as for one.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the training", "code_prompt_hide": "Hide the training"}
SEEDS = 5


def train(make, batches, steps, lr):
    """Five models, trained together on the same batches."""
    models = [seeded(make, seed) for seed in range(SEEDS)]
    weights, _ = stack_module_state(models)
    run = vmap(lambda w, x: functional_call(models[0], w, x), (0, None))
    optimizer = torch.optim.Adam(weights.values(), lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for x, y in batches(steps):
        optimizer.zero_grad()
        logits = run(weights, x).flatten(0, -2)
        loss = F.cross_entropy(logits, y.repeat(SEEDS))
        (SEEDS * loss).backward()  # the sum of theirs
        optimizer.step()
        rate.step()
    return unstack(models, weights)


# %% tags=["hide-input"]
def seeded(make, seed):
    torch.manual_seed(seed)
    return make()


@torch.no_grad()
def unstack(models, weights):
    for seed, model in enumerate(models):
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][seed])
    return models


# %% [markdown]
# A digit has 28 by 28 pixels with an empty border. A batch cuts out 24 by 24 of them, each time at another place, so that the networks don't learn places by heart. The test takes the middle.


# %% tags=["hide-input"]
def digits(train):
    data = mnist(train=train)
    return (data.data.float() / 255 - 0.1307) / 0.3081, data.targets


def digit_batches(steps, size=100):
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        i, j = torch.randint(5, (2,), generator=chance).tolist()
        some = torch.randint(len(images), (size,), generator=chance)
        crop = images[some, i : i + 24, j : j + 24]
        yield crop.flatten(1), labels[some]


# %%
images, labels = digits(train=True)
test_images, test_labels = digits(train=False)
test_images = test_images[:, 2:-2, 2:-2].flatten(1)
print(f"{len(images):,} digits to learn, {len(test_images):,} to test")

# %%
WIDTHS = (16, 32, 64, 128, 256)
networks = {
    f"{width} wide": train(
        lambda width=width: mlp(width), digit_batches, steps=800, lr=2e-3
    )
    for width in WIDTHS
}
for name, models in networks.items():
    n = sum(p.numel() for p in models[0].parameters())
    print(f"{name}: {n:,} parameters")

# %% [markdown]
# Each is trained once and evaluated in every format, by two measures: the share of test digits read wrongly, and the **cross-entropy**, the mean of $-\ln p$ over the test digits, where $p$ is the probability that the network gave to the right answer. The second notices more: an answer gets less certain before it gets wrong.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the evaluation", "code_prompt_hide": "Hide the evaluation"}
@torch.no_grad()
def test_digits(model):
    *_, bias = model.parameters()  # the inputs take the dtype of the last
    logits = model(test_images.to(bias.dtype)).float()
    wrong = (logits.argmax(1) != test_labels).float().mean().item()
    return 100 * wrong, F.cross_entropy(logits, test_labels).item()


def evaluate(models, test):
    """For each format: bytes, and what `test` says for each seed."""
    found = {}
    for name in FORMATS:
        said = []
        for model in models:
            converted, kept = convert(model, name)
            said.append(test(converted))
        found[name] = sum(t.nbytes for t in kept), said
    return found


# %%
read = {
    name: evaluate(models, test_digits) for name, models in networks.items()
}


# %% tags=["hide-input"]
def measured(results, index=0):
    """One measure: model: format: bytes, and a value for each seed."""
    return {
        model: {
            name: (nbytes, [values[index] for values in said])
            for name, (nbytes, said) in found.items()
        }
        for model, found in results.items()
    }


def middle(results, index=0):
    """(Model, format): the median of the seeds."""
    return {
        (model, name): statistics.median(values)
        for model, found in measured(results, index).items()
        for name, (_, values) in found.items()
    }


# %% [markdown]
# {numref}`digits-against-bytes` is in the style of the article's figure: a colour for each network, and a marker for each format at the median of the five seeds, with a bar from the best to the worst. Training differs in its last digits from machine to machine, so the check of this notebook does not compare its results. What must hold everywhere is asserted.

# %% tags=["nbval-ignore-output", "hide-input"] mystnb={"image": {"alt": "Two panels above each other, against bytes from 2 KiB to 1 MiB, both axes logarithmic: the share of test digits read wrongly, and the cross-entropy. Each of five networks is a line that runs level from FP32 through 16, 8 and 6 bits, bends a little at 4 bits, and rises steeply at 3 and 2 bits. The lines of larger networks lie lower and further right. In 4 bits a network lies below one of half its width in 16 bits, with fewer bytes."}, "figure": {"name": "digits-against-bytes", "caption": "Five networks that read digits, in fourteen formats: wrong answers and cross-entropy against bytes."}}
figure = against_bytes(
    {
        "test digits read wrongly (%)": measured(read, 0),
        "cross-entropy": measured(read, 1),
    }
)
loss = middle(read, 1)
exact = [loss[model, "FP32"] for model in networks]
assert exact == sorted(exact, reverse=True), exact
for model in networks:
    for name in ("BF16", "FP16", "INT8, by rows", "LLM.int8()", "INT6"):
        assert abs(loss[model, name] / loss[model, "FP32"] - 1) < 0.03, name
    assert loss[model, "INT2"] > 1.5 * loss[model, "FP32"], model
assert loss["256 wide", "NF4"] < loss["128 wide", "FP16"]

# %% [markdown]
# Down to 6 bits each network stays as good as it was, within a fraction of what another seed would change. At 4 bits it begins to lose, at 3 it loses clearly, and 2 bits ruin it. Larger networks bear it better: the one that is 256 wide is nearly itself in 3 bits, the one that is 16 wide is not.

# %% [markdown]
# ## A language model
#
# The article's figure is about language. Our models must learn theirs in seconds, so we take a small one that comes with every Python: the **names of the characters** in Unicode 3.2. Python keeps that edition unchanged {cite}`python-unicodedata`. We take names of up to 31 letters and without digits, and leave out the Hangul syllables, which follow a formula. We sort them by their hash, and hold out 400 for the test.

# %% tags=["hide-input"]
names = [
    name
    for code in range(0x110000)
    if (name := unicodedata.ucd_3_2_0.name(chr(code), ""))
    and len(name) < 32
    and not name.startswith("HANGUL SYLLABLE")
    and not any(letter.isdigit() for letter in name)
]
names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
held_out, learned = names[:400], names[400:]
print(f"{len(learned):,} names to learn, {len(held_out)} to test, such as")
print(*learned[2:7], sep="\n")

# %% tags=["hide-input"]
text = "\n".join(names)
print(f"{len(text):,} characters, {len(set(text))} different")
print("SHA-256:", hashlib.sha256(text.encode()).hexdigest()[:32], "...")

# %% [markdown]
# (The check of this page compares that line: the text is the same everywhere.) A model reads characters and predicts the next one. Every row begins and ends with a line break, and nothing is predicted after the end.

# %% tags=["hide-input"]
alphabet = "\n -ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IGNORED = -100  # what cross_entropy leaves out


def encode(names):
    """Rows of 32 characters, and the character that follows each."""
    lines = ["\n" + name.ljust(32, "\n") for name in names]
    rows = torch.tensor([[alphabet.index(c) for c in line] for line in lines])
    x, y = rows[:, :-1], rows[:, 1:].clone()
    for row, name in zip(y, names):
        row[len(name) + 1 :] = IGNORED
    return x, y


# %% [markdown]
# The model is a decoder-only transformer of two blocks, in plain PyTorch: attention, then an MLP with four times the width.


# %%
def attention(q, k, v):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the block", "code_prompt_hide": "Hide the block"}
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 8))
        q, k, v = heads.movedim(-4, -2).unbind(-4)
        x = x + self.out(attention(q, k, v).transpose(-3, -2).flatten(-2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show the model", "code_prompt_hide": "Hide the model"}
class LanguageModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(len(alphabet), width)
        self.position = nn.Embedding(32, width)
        for vectors in (self.embed, self.position):
            nn.init.normal_(vectors.weight, std=0.3)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(alphabet))

    def forward(self, characters):
        places = torch.arange(characters.shape[-1])
        x = self.embed(characters) + self.position(places)
        return self.head(self.norm(self.blocks(x)))


# %% tags=["hide-input"]
def name_batches(steps, size=48):
    chance = torch.Generator().manual_seed(0)
    x, y = encode(learned)
    for _ in range(steps):
        some = torch.randint(len(x), (size,), generator=chance)
        yield x[some], y[some].flatten()


# %% tags=["hide-input"]
language = {
    f"{width} wide": train(
        lambda width=width: LanguageModel(width), name_batches, 250, lr=1e-2
    )
    for width in (16, 24, 40, 64)
}
for name, models in language.items():
    n = sum(p.numel() for p in models[0].parameters())
    print(f"{name}: {n:,} parameters")

# %% [markdown]
# **Perplexity** is $e$ to the power of the mean cross-entropy: the number of equally likely characters between which the model hesitates. 29 would be pure guessing. The results are in {numref}`perplexity-against-bytes`, at the top of this page.

# %%
test_characters, test_next = encode(held_out)


@torch.no_grad()
def perplexity(model):
    logits = model(test_characters).float().flatten(0, 1)
    return (F.cross_entropy(logits, test_next.flatten()).exp().item(),)


spoken = {
    name: evaluate(models, perplexity) for name, models in language.items()
}

# %% tags=["nbval-ignore-output", "hide-input"] mystnb={"image": {"alt": "Perplexity on held-out names against bytes from 4 KiB to 512 KiB, both axes logarithmic. Four language models, 16 to 64 wide, each a line that runs level from FP32 to 6 bits, rises a little at 4 bits, clearly at 3, and steeply at 2 bits. Each line in 4 bits lies below the next smaller model in 16 bits, with fewer bytes."}, "figure": {"classes": "first", "name": "perplexity-against-bytes", "caption": "Perplexity of four small language models in fourteen formats, against their bytes."}}
figure = against_bytes({"perplexity": measured(spoken)})
ppl = middle(spoken)
exact = [ppl[model, "FP32"] for model in language]
assert exact == sorted(exact, reverse=True) and exact[-1] < 3.5, exact
for model in language:
    assert ppl[model, "INT6"] < 1.02 * ppl[model, "FP32"], model
    assert ppl[model, "NF4"] < 1.25 * ppl[model, "FP32"], model
    assert ppl[model, "INT2"] > 2 * ppl[model, "FP32"], model
assert ppl["64 wide", "NF4"] < ppl["40 wide", "FP16"]

# %% [markdown]
# It is the same picture as with the digits, and as in the article: level, a bend, a cliff. A perplexity is only a number, so let us hear the models as well. Each invents 200 names. A word counts as real if it occurs in any of Unicode's.


# %% tags=["hide-input"]
@torch.no_grad()
def invent(model, count=200):
    chance = torch.Generator().manual_seed(0)
    rows = torch.zeros(count, 1, dtype=torch.long)  # 0: line break
    while rows.shape[1] < 32:
        p = model(rows)[:, -1].softmax(-1)
        following = torch.multinomial(p, 1, generator=chance)
        rows = torch.cat([rows, following], 1)
    lines = ["".join(alphabet[i] for i in row) for row in rows.tolist()]
    return [line[1:].split("\n")[0] for line in lines]


# %% tags=["nbval-ignore-output", "hide-input"]
words, real, rows = set(" ".join(names).split()), {}, []
for name in ("FP32", "INT6", "NF4", "INT3", "INT2"):
    invented = invent(convert(language["64 wide"][0], name)[0])
    said = " ".join(invented).split()
    real[name] = 100 * sum(word in words for word in said) / len(said)
    example = max(invented[:8], key=len)
    rows.append((name, f"{real[name]:.0f}", f"`{example}`"))
display(table(["", "real words (%)", "the longest of its first eight"], rows))
assert real["FP32"] > 40 and real["INT2"] < real["FP32"] - 15, real

# %% [markdown]
# ## With the same bytes: larger, or more exact?
#
# This is the question behind the article's figure. For each budget, we look for the best of all models and formats that fit into it, and for the best one in FP16:


# %% tags=["hide-input"]
def best(results, index, budget, formats):
    """The least median loss within a budget, its model and its format."""
    losses = middle(results, index)
    return min(
        (losses[model, name], model, name)
        for model, found in results.items()
        for name, (nbytes, _) in found.items()
        if nbytes <= budget and name in formats
    )


def choices(results, index, budgets):
    for budget in budgets:
        least, model, name = best(results, index, budget * KiB, FORMATS)
        half, smaller, _ = best(results, index, budget * KiB, ["FP16"])
        chosen = f"{model}, {name}"
        yield f"{budget} KiB", chosen, f"{least:.3f}", smaller, f"{half:.3f}"


# %% tags=["nbval-ignore-output", "hide-input"]
rows = list(choices(read, 1, (24, 32, 48, 64, 96, 128, 192)))
display(table(["digits", "best", "loss", "best in FP16", "loss"], rows))
losers = "FP32", "BF16", "FP16", "INT2"
assert not any(row[1].endswith(losers) for row in rows), rows

# %% tags=["nbval-ignore-output", "hide-input"]
rows = list(choices(spoken, 0, (16, 24, 32, 48, 64, 96, 128)))
headers = ["names", "best", "perplexity", "best in FP16", "perplexity"]
display(table(headers, rows))
assert not any(row[1].endswith(losers) for row in rows), rows

# %% [markdown]
# **Yes: a larger model in fewer bits.** Sixteen bits never win where a larger model fits in eight, six or four. The rule ends at about four: naive 3 bits win a few budgets of the digits and none of the names here, and 2 bits win none at all. Where the largest model fits comfortably, the remaining bytes go into bits, and there is little left to gain.
#
# The bytes are those of the weights. A larger model also computes more and has more activations.

# %% [markdown]
# Here are the numbers of both figures, for your own use: bytes, then a value for each seed.

# %% tags=["nbval-ignore-output", "hide-output", "hide-input"]
print("task,measure,model,format,bytes,0,1,2,3,4")
tasks = [("digits", "wrong %", measured(read, 0))]
tasks += [("digits", "cross-entropy", measured(read, 1))]
tasks += [("names", "perplexity", measured(spoken))]
for task, measure, models in tasks:
    for model, found in models.items():
        for name, (nbytes, values) in found.items():
            seeds = ",".join(f"{value:.5g}" for value in values)
            print(f'{task},{measure},{model},"{name}",{nbytes},{seeds}')
complete = {len(found) for *_, m in tasks for found in m.values()}
assert complete == {len(FORMATS)}, complete

# %% [markdown]
# ## Six bits, and the published figure
#
# *"6-bit is within 0.1 % of FP16"* is what the k-quants' author found for the LLaMA models of 2023 {cite}`kquants`, and the article repeats it. llama.cpp's own later measurements {cite}`llamacpp-perplexity`, all on WikiText-2:
#
# | perplexity above FP16's | Q8_0 | Q6_K | Q4_K_M | Q2_K |
# | --- | --- | --- | --- | --- |
# | Llama 2 70B {cite}`llamacpp-scorechart` | | 0.16 % | 1.20 % | 8.82 % |
# | Llama 2 7B | 0.07 % | 0.24 % | 1.42 % | 10.8 % |
# | Llama 3 8B | 0.02 % | 0.32 % | 2.79 % | 56.4 % |
#
# (Llama 2 7B: against FP16 logits stored in 16 bits, which adds a few hundredths.) The claim was made for LLaMA, and does not carry over to its successors: 0.16 to 0.32 % is still little, but it is not 0.1 %. Ours are of the same order ({numref}`above-fp16`):

# %% tags=["hide-input"]
# Size in GiB and perplexity: FP16, then Q8_0, Q6_K, Q5_K_M to Q2_K.
PUBLISHED = {
    "Llama 3 8B, k-quants": (
        (14.97, 7.96, 6.14, 5.33, 4.58, 3.74, 2.96),
        (6.2332, 6.2343, 6.2534, 6.2886, 6.4071, 6.8885, 9.7516),
    ),
    "Llama 2 70B, k-quants": (  # without Q8_0
        (128.5, 52.70, 45.41, 38.54, 30.83, 27.27),
        (3.4313, 3.4367, 3.4451, 3.4725, 3.5932, 3.7339),
    ),
}
NAIVE = "FP16", "INT6", "INT4", "INT3", "INT2"
OURS = {
    f"ours, {model}: INT6 to 2": (
        [spoken[model][name][0] for name in NAIVE],
        [ppl[model, name] for name in NAIVE],
    )
    for model in ("16 wide", "40 wide", "64 wide")
}
STYLES = *["o-"] * len(OURS), "s--", "D--"

# %% tags=["nbval-ignore-output", "hide-input"] mystnb={"image": {"alt": "Increase of perplexity in percent, logarithmic, against size as a share of FP16's. Published k-quants of Llama 3 8B fall from 56 percent at a fifth of the size to 0.02 percent at half, those of Llama 2 70B from 9 percent at a fifth to 0.16 percent at two fifths. Our models in naive 2, 3, 4 and 6 bits fall more steeply, from far above at 2 bits, to the same region at 4 bits and between 0.05 and 0.5 percent at 6 bits, the smaller the model the more. A dotted line marks 0.1 percent."}, "figure": {"name": "above-fp16", "caption": "How much perplexity rises above FP16's, against size as a share of FP16's: published k-quants, and our models."}}
figure, axes = plt.subplots(figsize=(5.4, 4))
for (label, (sizes, p)), style, color in zip(
    (OURS | PUBLISHED).items(), STYLES, COLORS.values()
):
    shares = [size / sizes[0] for size in sizes[1:]]
    above = [100 * (one / p[0] - 1) for one in p[1:]]
    axes.plot(shares, above, style, color=color, label=label)
axes.axhline(0.1, color=COLORS["workspaces"], linewidth=0.8, linestyle=":")
axes.set(yscale="log", xlabel="bytes, as a share of FP16's")
axes.set(ylabel="perplexity above FP16's (%)")
legend = figure.legend(loc="outside lower center", ncols=2)
six = [ppl[model, "INT6"] / ppl[model, "FP16"] - 1 for model in language]
assert all(-0.005 < increase < 0.02 for increase in six), six

# %% [markdown]
# **You can compare** the shape, and the ratio of each model to itself in 16 bits. **You cannot compare** the perplexities as such: ours are of characters and names, theirs of tokens and prose, and their models are ten thousand times as large. And k-quants are cleverer than rounding to nearest: 16 or 32 weights share a scale of 6 or 8 bits, and more important matrices get more bits. That is why their 2 and 3 bits are usable, and ours are not.

# %% [markdown]
# ## Where the loss comes from
#
# We follow the error through one language model. {numref}`outputs-moved` shows how far the output of each linear layer moves, relative to its size, in five of the formats.


# %% tags=["hide-input"]
@torch.no_grad()
def outputs(model):
    """What each linear layer gives, for the characters that are asked."""
    asked, seen, hooks = test_next != IGNORED, {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def keep(module, inputs, output, name=name):
                seen[name.replace("blocks.", "")] = output.float()[asked]

            hooks.append(layer.register_forward_hook(keep))
    model(test_characters)
    for hook in hooks:
        hook.remove()
    return seen


# %% tags=["hide-input"]
speaker = language["64 wide"][0]
before = outputs(speaker)
after = {
    name: outputs(convert(speaker, name)[0])
    for name in FORMATS
    if name != "FP32"
}
moved = {
    name: [100 * rms(seen[at] - before[at]) / rms(before[at]) for at in seen]
    for name, seen in after.items()
}

# %% tags=["nbval-ignore-output", "hide-input"] mystnb={"image": {"alt": "How far the outputs of nine linear layers move, in percent, logarithmic, one line for each of five formats. The lines are nearly level and parallel: FP16 lies below 0.1 percent, INT8 near 0.6, INT6 near 3, INT4 near 12 and INT2 near 90 percent. All rise by a factor of about two from the first layer to the sixth, and fall a little after it."}, "figure": {"name": "outputs-moved", "caption": "How far the output of each linear layer moves when the model is converted."}}
figure, axes = plt.subplots(figsize=(5.4, 4))
shown = "INT2", "INT4", "INT6", "INT8, by rows", "FP16"
for name, marker, color in zip(shown, "osD^v", COLORS.values()):
    axes.plot(
        list(before), moved[name], f"{marker}-", color=color, label=name
    )
axes.set(yscale="log", ylabel="output moved (%, RMS)")
axes.yaxis.set_major_formatter("{x:g}")
axes.tick_params(axis="x", rotation=45)
legend = figure.legend(loc="outside lower center", ncols=3)
logits = {name: layers[-1] for name, layers in moved.items()}
assert logits["FP16"] < logits["BF16"] < logits["INT6"] < logits["INT4"]
assert logits["LLM.int8()"] < logits["INT6"] and logits["INT3"] < 100

# %% [markdown]
# The error does not pile up from layer to layer, because the residual stream bypasses each matrix. And the lines are parallel. In the formats that only store, the logits move by about the same multiple of the rounding error, which we could predict from the steps. FP16, BF16 and LLM.int8() lie higher than their weights alone would: they round the activations, too.

# %% [markdown]
# ### From logits to loss
#
# **Predict.** Let the logits move by $\delta$, and let $p$ be the probabilities before. To second order, the model's distribution moves away from the old one by
#
# $$\mathrm{KL} \approx \tfrac{1}{2} \, \mathrm{Var}_p(\delta)$$
#
# (Kullback-Leibler divergence, averaged over the text). The first-order part is zero, because probabilities always sum to one. So the loss grows with the **square** of the error: one bit more halves the error and quarters the loss.

# %% tags=["hide-input"]
p, rows, shifts = before["head"].softmax(-1), [], {}
expected_next = test_next[test_next != IGNORED]
for name, seen in after.items():
    delta = seen["head"] - before["head"]
    mean = (p * delta).sum(-1, keepdim=True)
    predicted = (p * (delta - mean) ** 2).sum(-1).mean().item() / 2
    logs = [s["head"].log_softmax(-1) for s in (before, seen)]
    kl = (p * (logs[0] - logs[1])).sum(-1).mean().item()
    cost = [F.nll_loss(log, expected_next).item() for log in logs]
    shifts[name] = predicted, kl, cost[1] - cost[0]

# %% tags=["nbval-ignore-output", "hide-input"]
headers = ["", "logits moved (%)", "KL, predicted", "KL, measured", "loss"]
rows = [
    (name, f"{logits[name]:.2f}", *(f"{value:.6f}" for value in shift))
    for name, shift in shifts.items()
]
display(table(headers, rows))
for name in ("BF16", "FP8 E4M3", "INT8, by rows", "INT6", "NF4", "INT4"):
    assert 0.85 < shifts[name][1] / shifts[name][0] < 1.25, name
ratio = shifts["INT4"][0] / shifts["INT6"][0]
assert 12 < ratio < 32, ratio  # predicted: (31 / 7)^2 = 19.6

# %% [markdown]
# The prediction holds down to 4 bits. At 2 bits the error is no longer small. *Loss* is measured on one test text: where the error is small, luck decides its sign.
#
# That is why llama.cpp reports KL beside perplexity: 0.0127 for Llama 2 7B and 0.0313 for Llama 3 8B in Q4_K_M, 0.0021 and 0.0055 in Q6_K {cite}`llamacpp-perplexity`. From Q4_K_M to Q6_K they add 1.7 bits, for which the square law promises a factor of 11. They get about 6: real models gain less from the last bits than ours do.

# %% [markdown]
# ## Outliers, made and cured
#
# Large language models have a few columns of huge activations {cite}`dettmers2022`. We can *make* one without changing the model. ReLU lets positive factors through, so multiply one hidden unit's incoming weights by $c$ and divide its outgoing ones by $c$. With $c$ a power of two nothing is rounded:


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
@torch.no_grad()
def with_outlier(model, c):
    """The same function, with a hidden unit that is c times as loud."""
    model, inputs = copy.deepcopy(model), []
    block = model.blocks[0]
    hook = block.down.register_forward_pre_hook(
        lambda module, x: inputs.append(x[0])
    )
    model(test_characters)
    hook.remove()
    unit = inputs[0].mean((0, 1)).argmax()  # the most active one
    block.up.weight[unit] *= c
    block.up.bias[unit] *= c
    block.down.weight[:, unit] /= c
    return model


with torch.no_grad():
    same = speaker(test_characters)
    loud = with_outlier(speaker, 64)(test_characters)
print("FP32 says the same, to the last bit:", torch.equal(same, loud))

# %% [markdown]
# The function is the same, the numbers are not. {numref}`an-outlier` compares four ways to store them in INT8: one scale for a matrix; a scale for each row; integers multiplied with integers (the inputs scaled by rows, too); and LLM.int8(), which multiplies the columns with a value of 6 or more in 16 bits.

# %% tags=["hide-input"]
WAYS = {
    "one scale": lambda model: convert(model, "INT8, one scale")[0],
    "by rows": lambda model: convert(model, "INT8, by rows")[0],
    "by rows, inputs too": lambda model: llm_int8(model, threshold=0.0),
    "LLM.int8()": llm_int8,
}
FACTORS = [4**k for k in range(6)]
hurt = {name: [] for name in WAYS}
for c in FACTORS:
    model = with_outlier(speaker, float(c))
    for name, way in WAYS.items():
        delta = outputs(way(model))["head"] - before["head"]
        hurt[name].append(100 * rms(delta) / rms(before["head"]))

# %% tags=["nbval-ignore-output", "hide-input"] mystnb={"image": {"alt": "How far the logits move, in percent, against the outlier's factor from 1 to 1024, both logarithmic. With one scale for the matrix the line rises from 1 to more than 50 percent. By rows, with inputs in INT8 too, it rises from factor 16 on to more than 20 percent. By rows with exact inputs it rises to about 3 percent and levels off, and LLM.int8() follows it."}, "figure": {"name": "an-outlier", "caption": "How far the logits move when one hidden unit is made louder, in four ways of INT8."}}
figure, axes = plt.subplots()
for (name, values), style, color in zip(
    hurt.items(), ("-", "--", "-.", ":"), COLORS.values()
):
    axes.plot(FACTORS, values, style, color=color, label=name)
axes.set(xscale="log", yscale="log", xlabel="the outlier's factor")
axes.set(ylabel="logits moved (%, RMS)")
axes.xaxis.set_major_formatter("{x:g}")
axes.yaxis.set_major_formatter("{x:g}")
legend = figure.legend(loc="outside lower center", ncols=2)
last = {name: values[-1] for name, values in hurt.items()}
assert last["one scale"] > 5 * last["by rows"], last
assert last["by rows, inputs too"] > 1.5 * last["LLM.int8()"], last

# %% [markdown]
# - **One scale** follows the loud row, and all other rows round to nothing.
# - **By rows** cures the weights: the damage stays in one row. But the *input* of the next layer now has a loud column, and its scale spoils every product with integers.
# - **LLM.int8()** cures that: the column is multiplied separately. What remains are the small outgoing weights, which INT8 can no longer tell from zero.
#
# (In training mode, bitsandbytes 0.50.2 does not multiply integers on a CPU. That is why `llm_int8` calls `.eval()`.)

# %% [markdown]
# ## What to remember
#
# - With the same bytes, **a larger model in fewer bits is better**, down to about four bits. Below, rounding to nearest is not enough.
# - The loss grows with the square of the rounding error: **each bit more quarters it**. Eight and six bits cost almost nothing. How little depends on the model: measure yours.
# - A scale should cover few weights, and **outliers need a scale of their own**: by rows, by blocks, or in 16 bits.

# %% [markdown]
# ## Exercises
#
# **1.** Naive INT2 has three levels: $-1$, 0, 1. Four patterns allow four: $-1$, $-\frac{1}{3}$, $\frac{1}{3}$, 1. Which is better for normally distributed weights, with a scale for 64? Predict, then measure. And what does a scale set by the largest weight waste?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
blocks = W.view(-1, 64)
scaled = blocks / blocks.abs().amax(1, keepdim=True)
for label, levels in {
    "three levels": (-1, 0, 1),
    "four levels": (-1, -1 / 3, 1 / 3, 1),
    "four, half as far apart": (-1 / 2, -1 / 6, 1 / 6, 1 / 2),
}.items():
    levels = torch.tensor(levels)
    nearest = (scaled[..., None] - levels).abs().argmin(-1)
    back = levels[nearest] * blocks.abs().amax(1, keepdim=True)
    print(f"{label:24} error {100 * rms(back - blocks) / rms(W):.1f} %")

# %% [markdown]
# <details><summary>Why?</summary>
#
# Most weights are far smaller than the largest of 64, and three levels turn them into zero. Four levels without a zero keep at least their sign. Clipping the few large ones buys finer steps for the many. Good 2-bit formats choose the scale for the least error, not for the largest weight.
#
# </details>

# %% [markdown]
# **2.** A scale costs 4 bytes. How accurate is INT4 in blocks of 16, 32, 64, 128 or 256 weights, and what does it take with its scales? Would a fifth bit be the better buy?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
rows = []
for bits, block in ((4, 16), (4, 32), (4, 64), (4, 128), (4, 256), (5, 256)):
    kept, back = integers(bits, lambda w, block=block: block)(W)
    each = sum(t.nbytes for t in kept) / W.numel()
    error = f"{100 * rms(back - W) / rms(W):.2f}"
    rows.append((f"INT{bits}, {block}", f"{8 * each:.3f}", error))
table(["", "bits, with scale", "error (%)"], rows)

# %% [markdown]
# <details><summary>What follows?</summary>
#
# Small blocks with FP32 scales are a bad bargain: INT4 in blocks of 32 takes as much as 5 bits, and INT5 in blocks of 256 is more accurate. That is why k-quants keep their scales in 6 or 8 bits, and QLoRA quantises the scales.
#
# </details>

# %% [markdown]
# **3.** A card has 24 GiB, of which 4 are for cache and activations. Llama 2 comes with 7, 13 and 70 billion parameters. Which would you load, and in which format?
#
# <details><summary>Solution</summary>
#
# 20 GiB hold 7 billion in FP16 (13 GiB), 13 billion in INT8 (12 GiB) or in 4 bits, and 70 billion in no more than 2.4 bits, below the cliff. So load 13 billion in INT8. The next larger model would need fewer than four bits, and with 13 billion there is no reason to go below 8.
#
# </details>

# %% [markdown]
# ## Where to go next
#
# [Beyond one GPU](10_beyond_one_gpu.ipynb) divides what fewer bits cannot make small enough. [Troubleshooting](11_troubleshooting.ipynb) is for the day when it does not fit. [Training and inference](03_training_and_inference.ipynb) counts what a larger model costs besides its weights. The [references](../book/references.md) list the papers and measurements behind this chapter.
