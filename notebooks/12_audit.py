# %% [markdown]
# # The audit: every published number
#
# **Are the numbers right that the two articles print?** Most of them: 29 of 39 are confirmed in every digit, 5 are explained, 3 corrected, and 2 stay open.
#
# The two articles taught the authors of this book, and gave it its shape {cite}`hoperj2024,qwen2-notes`. They print what they measured, with their code, so that anyone can check. Few texts do. This page checks each of their numbers, one row each.
#
# - **Time:** 10 minutes to read, under a minute to run.
# - **Needs:** nothing. The articles' numbers are in `helpers/data/audit.toml`; the cells above each table compute the rest.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}
# set-up

import gc
import tomllib
import warnings
from importlib import resources
from typing import NamedTuple

# Without ipywidgets, progress bars are plain: no need to say so here.
warnings.filterwarnings("ignore", "IProgress not found")

import torch
from torch import nn, optim

from every_byte import VirtualGPU, estimate, untracked
from every_byte.formats import number_format
from every_byte.units import GB, MB, GiB
from every_byte.virtual.memory import CUBLAS_WORKSPACE, cublas_workspace_size
from helpers.environment import versions
from helpers.mlp import SimpleMLP
from helpers.models import build
from helpers.tables import table

gpu = VirtualGPU().open()
print(gpu)
print(versions("torch", "transformers"))

# %% [markdown]
# ## How to read the tables
#
# *Prints* and *says* are the article's. *Formula* is the closed formula that its text is about. *This GPU* is the virtual one named above, on every machine: its figures are replayed, and the verdicts don't depend on your card. For the second article it is that article's: an RTX 4050, by the rules of PyTorch 2.1. What a card of our own measured stands in [the records](../book/records.md).
#
# - **confirmed**: we agree in every digit that is printed;
# - **explained**: we do not, and know why to the byte;
# - **corrected**: the article is wrong or out of date;
# - **open**: we cannot reproduce it.
#
# A cell decides what is confirmed, by comparing text with text.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
class Number(NamedTuple):
    number: str  # what it is, and where it stands
    prints: str
    says: str
    formula: str
    here: str  # what this GPU gives
    verdict: str  # where we do not agree
    why: str
    proof: str  # chapter#section


audited = []


def judged(number):
    """The number with its verdict: ours must fit the figures."""
    agree = number.prints == (number.here or number.formula)
    if agree == bool(number.verdict):
        raise ValueError(f"the verdict does not fit: {number}")
    return number._replace(verdict=number.verdict or "confirmed")


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
CHAPTERS = {
    "01": "01_parameters_to_bytes",
    "02": "02_precision_formats",
    "03": "03_training_and_inference",
    "04": "04_mlp_adam_vs_sgd",
    "07": "07_gpt2_large",
    "08": "08_qwen2",
}
COLUMNS = [f.replace("here", "this GPU") for f in Number._fields[:-1]]


DATA = resources.files("helpers") / "data" / "audit.toml"
PRINTED = tomllib.loads(DATA.read_text("utf-8"))


def audit(section, **ours):
    """Judge a section's numbers by ours, and show what is known of them."""
    numbers = [
        Number(*(row.get(f, "").format(**ours) for f in Number._fields))
        for row in PRINTED[section]
    ]
    audited.extend(map(judged, numbers))
    rows = []
    for number in audited[-len(numbers) :]:
        chapter, section = number.proof.split("#")
        link = f"[proof]({CHAPTERS[chapter]}.ipynb#{section})"
        rows.append((*number[:-1], link))
    columns = list(zip([*COLUMNS, ""], *rows))
    shown = [column for column in columns if any(column[1:])]
    shown.insert(1, shown.pop([c[0] for c in shown].index("verdict")))
    head, *lines = zip(*shown)
    return table(head, lines)


# %% [markdown]
# ## The first article: theory
#
# Its sums for models of one and of 70 billion parameters {cite}`hoperj2024`.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
LLAMA = estimate.dimensions("Llama-3.1-70B")
llama = sum(estimate.parameters(LLAMA).values())
weights = 4 * 10**9 // GB
states = estimate.optimizer_states([(10**9,)], "adam") // GB
audit(
    "theory",
    **{n: number_format(n).bits // 8 for n in ("fp32", "fp16", "bf16")},
    weights=weights,
    half=weights // 2,
    seventy=70 * weights,
    llama=f"{4 * llama / GB:.1f}",
    states=states,
    training=2 * weights + states,
)

# %% [markdown]
# INT8 as "one byte" and "a quarter of FP32" is true of the quantised weights, not of a model:

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
ONE = estimate.dimensions("Llama-3.2-1B")
n = sum(estimate.parameters(ONE).values())
of_int8 = estimate.parameter_bytes(ONE, "fp16", "int8") / n
share = estimate.parameter_bytes(ONE, "fp16", "int8") / (4 * n)
audit("quantised", int8=f"{of_int8:.2f}", share=f"{share:.2f}")

# %% [markdown]
# ## The first article: the experiment
#
# Its script once with each optimizer, stage by stage.


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
def empty_card():
    gc.collect()
    gpu.clear_cublas_workspaces()
    gpu.empty_cache()


def experiment(optimizer_class, **options):
    """Allocated bytes at each stage at which the article prints them."""
    empty_card()
    stages = {"before": gpu.memory_allocated()}
    with gpu.device:
        model = SimpleMLP()
    stages["loaded"] = gpu.memory_allocated()
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
    images = torch.zeros(128, 1, 28, 28)
    labels = torch.zeros(128, dtype=torch.int64)
    data, target = images.to(gpu.device), labels.to(gpu.device)
    stages["batch"] = gpu.memory_allocated()
    output = model(data)
    loss = nn.CrossEntropyLoss()(output, target)
    loss.backward()
    optimizer.step()
    stages["trained"] = gpu.memory_allocated()
    model.zero_grad()
    del optimizer, target
    data = images.to(gpu.device)
    with torch.no_grad():
        output = model(data)
    stages["inference"] = gpu.memory_allocated()
    return stages


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
RUNS = {
    "Adam": experiment(optim.Adam),
    "SGD": experiment(optim.SGD),
    "momentum": experiment(optim.SGD, momentum=0.9),
}
with untracked(), torch.device("meta"):
    P = sum(p.nbytes for p in SimpleMLP().parameters())


def step(run):
    return RUNS[run]["trained"] - RUNS[run]["batch"]


def in_mb(**nbytes):
    """As the article prints them."""
    return {name: f"{n / MB:.2f}" for name, n in nbytes.items()}


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
adam, sgd = RUNS["Adam"], RUNS["SGD"]
audit(
    "experiment",
    **in_mb(once=P, twice=2 * P, three_times=3 * P, four_times=4 * P),
    **in_mb(**{f"adam_{stage}": n for stage, n in adam.items()}),
    **in_mb(**{f"sgd_{stage}": n for stage, n in sgd.items()}),
    **in_mb(adam_step=step("Adam"), sgd_step=step("SGD")),
    **in_mb(images=adam["batch"] - adam["loaded"]),
    **in_mb(
        momentum_step=step("momentum"),
        momentum_trained=RUNS["momentum"]["trained"],
    ),
)

# %% [markdown]
# The chart and the ratios, which the article gives without decimals:


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
def ratio(run):
    loaded = RUNS[run]["loaded"]
    stages = (loaded, RUNS[run]["trained"], RUNS[run]["inference"])
    return " : ".join(f"{stage / loaded:.0f}" for stage in stages)


audit(
    "ratios",
    charted=int(adam["trained"] / MB),
    adam=ratio("Adam"),
    sgd=ratio("SGD"),
)

# %% [markdown]
# ## The first article: gpt2-large
#
# Its transformers kept two buffers in each of 36 layers: a mask of 1,024 x 1,024 bytes, and one number. The model is made on the GPU, with these buffers.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
GPT2 = estimate.dimensions("gpt2-large")
parameters = sum(estimate.parameters(GPT2).values())


def as_in_2024(dtype):
    empty_card()
    model = build("gpt2-large", gpu.device, dtype)
    buffers = [
        torch.empty(size, dtype=torch.uint8, device=gpu.device)
        for _ in range(GPT2.num_hidden_layers)
        for size in (GPT2.max_position_embeddings**2, 4)
    ]
    return gpu.memory_allocated() if model and buffers else 0


loaded = {
    dtype: as_in_2024(getattr(torch, dtype))
    for dtype in ("float32", "float16")
}
buffers = GPT2.num_hidden_layers * (GPT2.max_position_embeddings**2 + 512)
int8 = estimate.parameter_bytes(GPT2, "fp16", "int8")
masks = GPT2.num_hidden_layers * GPT2.max_position_embeddings**2

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
workspace = cublas_workspace_size(CUBLAS_WORKSPACE)
in_fp16 = loaded["float16"]
audit(
    "gpt2_large",
    parameters=f"{parameters / 1e6:.0f}",
    masks=f"{masks / 1e6:.0f}",
    fp32=f"{4 * parameters / GB:.2f}",
    fp32_loaded=f"{loaded['float32'] / GB:.2f}",
    fp32_bytes=f"{loaded['float32']:,}",
    fp16=f"{2 * parameters / GB:.2f}",
    fp16_loaded=f"{in_fp16 / GB:.2f}",
    fp16_workspaces=f"{(in_fp16 + 2 * workspace) / GB:.2f}",
    int8=f"{int8 / GB:.2f}",
    int8_loaded=f"{(int8 + buffers) / GB:.2f}",
    int8_workspace=f"{(int8 + buffers + workspace) / GB:.2f}",
)

# %% [markdown]
# ## The second article: Qwen2-0.5B
#
# It loads Qwen2-0.5B-Instruct with transformers 4.41 {cite}`qwen2-notes`. Its rotary embedding kept two tables for 32,768 positions in each of 24 layers, and accelerate emptied the cache after each parameter. The chapter finds the order of the loads; here they are again.

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
QWEN = estimate.dimensions("Qwen2-0.5B")
count = sum(estimate.parameters(QWEN).values())
with untracked():
    skeleton = dict(build("Qwen2-0.5B", "meta").named_parameters())


def load_as_then(card, dtype):
    made = []
    for name in sorted(skeleton):
        size = skeleton[name].shape
        made.append(torch.empty(size, dtype=dtype, device=card.device))
        card.empty_cache()
    for _ in range(QWEN.num_hidden_layers):
        made.append(torch.empty(QWEN.head_dim // 2, device=card.device))
        for _ in ("cos", "sin"):
            size = (32_768, QWEN.head_dim)
            made.append(torch.empty(size, dtype=dtype, device=card.device))
    return made


# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
with VirtualGPU("RTX 4050", torch="2.1") as card:
    alive = load_as_then(card, torch.float16)
    in_fp16 = card.memory_allocated()
    for _ in range(2):  # each complete before the one before it goes
        alive = load_as_then(card, torch.float32)
    in_fp32 = card.memory_allocated()
    del alive

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
audit(
    "qwen2",
    count=count,
    fp16_bytes=number_format("fp16").bits // 8,
    fp32_bytes=number_format("fp32").bits // 8,
    fp16=repr(2 * count / GiB),
    fp32=repr(4 * count / GiB),
    fp16_loaded=repr(in_fp16 / GiB),
    fp32_loaded=repr(in_fp32 / GiB),
)

# %% [markdown]
# Its card has 6.0 GB, it says: 6 GiB, as all cards count. The `torch_dtype` of its configuration, `float16`, is that of its own copy; the published one says `bfloat16`.

# %% [markdown]
# ## In sum

# %% tags=["hide-input"] mystnb={"code_prompt_show": "Show how it is made", "code_prompt_hide": "Hide how it is made"}
verdicts = ("confirmed", "explained", "corrected", "open")
counted = {v: sum(n.verdict == v for n in audited) for v in verdicts}
assert len(audited) == sum(map(len, PRINTED.values()))
print(f"{len(audited)} numbers:", counted)
print("open:", ", ".join(n.number for n in audited if n.verdict == "open"))

# %% [markdown]
# ## Statements
#
# What the articles say in words, where it is out of date or not quite so:
#
# | statement | today | evidence |
# | --- | --- | --- |
# | an RTX 4090 has up to 48 GB | 24 GB {cite}`nvidia-ada` | [parameters to bytes](01_parameters_to_bytes.ipynb) |
# | gpt2-large has about 812M parameters | 774M; the hub counts stored masks as well | [parameters to bytes](01_parameters_to_bytes.ipynb) |
# | INT8 takes a quarter of FP32 | the quantised weights do; embeddings, norms and scales come on top | [gpt2-large](07_gpt2_large.ipynb) |
# | INT8 with bitsandbytes needs no special hardware | on NVIDIA's cards LLM.int8() needs compute capability 7.5; today it also runs on CPUs {cite}`bitsandbytes-install` | [conversion and hardware](17_conversion_and_hardware.ipynb) |
# | BF16 needs Ampere or newer | that is right; `is_bf16_supported()` says yes on older cards too, by emulation: pass `including_emulation=False` | [conversion and hardware](17_conversion_and_hardware.ipynb) |
# | mixed precision saves memory | it saves activations, but not a byte of the parameters | [mixed precision](06_mixed_precision.ipynb) |
# | plain SGD takes no memory | none for states; its gradients take as much as Adam's | [one training step](04_mlp_adam_vs_sgd.ipynb) |
# | inference keeps the current step's activations | it also keeps the cache of keys and values | [training and inference](03_training_and_inference.ipynb) |
# | activations are left for another day | that day has a chapter | [activations](05_activations_and_peaks.ipynb) |
# | the gap at Qwen2 is due to torch, transformers and the cache | 192 MiB of it are rotary tables | [Qwen2](08_qwen2.ipynb) |
# | “GB” and “MB” above figures divided by $1024^3$ | GiB | [Qwen2](08_qwen2.ipynb) |
# | `load_in_8bit=True`, `Accelerator(fp16=True)`, `torch.cuda.amp` | errors and warnings today | [troubleshooting](11_troubleshooting.ipynb) |
# | six bits are within 0.1 % of FP16's perplexity | published for LLaMA by its author, in k-quants; not our measurement | [quality](09_quality_vs_precision.ipynb) |
#
# Most of the articles' numbers stand, to the last digit, years and many versions later. That is rare, and it is why this book could be written.
