"""What others measured on real GPUs and published, carried out on a virtual one.

After the programs that made the figures, in our own words; the sources are named in
``book/records/liger.toml``. A function here makes its tensors on the open GPU and gives
what the program calls again and again; `peak` says what one such call takes at most.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from every_byte.gpu import VirtualGPU
from every_byte.units import MiB

SERIES = Path(__file__).parent.parent / "book" / "records" / "liger.toml"
ROUNDS = 3  # their median of ten is what a call takes once gradients are there
Call = Callable[[], Any]
BF16, FP32 = torch.bfloat16, torch.float32


class Random:
    """Tensors on a GPU, for a program's inputs."""

    def __init__(self, gpu: VirtualGPU) -> None:
        self.device = gpu.device

    def __call__(self, *sizes: int, dtype: torch.dtype = FP32, grad: bool = False) -> torch.Tensor:
        """A tensor, of which a gradient may be asked."""
        return torch.randn(*sizes, dtype=dtype, device=self.device, requires_grad=grad)

    def below(self, limit: int, *sizes: int) -> torch.Tensor:
        """Whole numbers."""
        return torch.randint(limit, sizes, device=self.device)

    def on(self, *modules: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """Modules brought onto the GPU: the first of them; the others stay alive with it."""
        first: Any = [module.to(self.device).to(dtype) for module in modules][:1].pop()
        first.others = list(modules[1:])
        return first


def _called(step: Call, mode: str, given: torch.Tensor, like: torch.Tensor) -> Call:
    """Forward, backward again and again through what was kept, or both."""
    if mode == "forward":
        return step
    if mode == "full":
        return lambda: (lambda y: y.backward(torch.randn_like(y), retain_graph=True))(step())
    upper = torch.randn_like(like)
    result = step()
    return lambda: result.backward(upper, retain_graph=True)


def cross_entropy(make: Random, vocabulary: int) -> Call:
    """Cross entropy of logits."""
    logits, target = make(16_384, vocabulary, grad=True), make.below(vocabulary, 16_384, 1)
    target = target.squeeze(1)
    return lambda: nn.CrossEntropyLoss()(logits, target).backward()


class Tiled(torch.autograd.Function):
    """DeepSpeed's tiled MLP: forward tile by tile, and again in backward."""

    @staticmethod
    def forward(ctx: Any, mlp: nn.Module, x: torch.Tensor, tiles: int) -> torch.Tensor:
        """Tile by tile, without a graph."""
        ctx.mlp, ctx.tiles = mlp, tiles
        ctx.save_for_backward(x)
        parts = list(torch.chunk(x, chunks=tiles, dim=-2))
        with torch.no_grad():
            done = [mlp(part) for part in parts]
        return torch.cat(done, dim=-2)

    @staticmethod
    def backward(ctx: Any, *upper: torch.Tensor) -> Any:
        """Each tile again, with a graph."""
        (x,) = ctx.saved_tensors
        needed, shape = x.requires_grad, x.shape
        x = x.detach().requires_grad_(needed)
        x = x.view(-1, shape[-1])
        above = upper[0].view(-1, shape[-1])
        gradient = torch.zeros_like(x)
        parts = list(torch.chunk(x, chunks=ctx.tiles, dim=0))
        for number, part in enumerate(parts):
            part.requires_grad_(needed)
            begin, rows = number * parts[0].shape[0], part.shape[0]
            part.grad = gradient.narrow(0, begin, rows).view_as(part)
            coming = above.narrow(0, begin, rows).view_as(part)
            with torch.enable_grad():
                result = ctx.mlp(part)
            torch.autograd.backward(result, coming)
        return None, gradient.view(shape), None


def mlp(
    make: Random,
    length: int,
    batch: int,
    width: int,
    hidden: int,
    act: str,
    mode: str = "full",
    tiles: int = 0,
) -> Call:
    """Llama's MLP, whole or in tiles."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    x = make(batch, length, width, dtype=BF16, grad=True)
    sizes: Any = {"hidden_size": width, "intermediate_size": hidden, "hidden_act": act}
    layer = make.on(LlamaMLP(LlamaConfig(**sizes)), dtype=BF16)
    step = (lambda: Tiled.apply(layer, x, tiles)) if tiles else (lambda: layer(x))
    return _called(step, mode, x, x)


def layer_norm(make: Random, width: int) -> Call:
    """LayerNorm; the other provider's layer is alive, too."""
    layer = make.on(nn.LayerNorm(width), nn.LayerNorm(width))
    x, upper = make(4096, width, grad=True), make(4096, width)
    return lambda: layer(x).backward(upper, retain_graph=True)


class LlamaRMSNorm(nn.Module):
    """Written out; with `add`, of the sum, which it gives as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> Any:
        """In FP32, the result in the type given."""
        given = x.dtype
        x = x.to(FP32)
        if add is not None:
            add = add.to(FP32)
            x = x + add
            add = x
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        if add is None:
            return self.weight * x.to(given)
        return self.weight * x.to(given), add.to(given)


def llama_rms_norm(make: Random, width: int) -> Call:
    """RMSNorm as Llama's model writes it."""
    layer = make.on(LlamaRMSNorm(width), LlamaRMSNorm(width))
    x, upper = make(2048, width, dtype=BF16, grad=True), make(2048, width, dtype=BF16)
    return lambda: layer(x).backward(upper, retain_graph=True)


def add_rms_norm(make: Random, width: int) -> Call:
    """A sum, then RMSNorm."""
    layer = make.on(*(LlamaRMSNorm(width) for _ in range(4)))
    x, add = make(2048, width, grad=True), make(2048, width, grad=True)
    upper = make(2048, width), make(2048, width)
    return lambda: torch.autograd.backward(layer(x, add), upper)


def rms_norm(make: Random, width: int) -> Call:
    """PyTorch's own RMSNorm."""
    layer, x = make.on(nn.RMSNorm(width), dtype=BF16), make(4096, 1, width, dtype=BF16, grad=True)

    def full() -> None:
        y = layer(x)
        y.sum().backward()

    return full


def group_norm(make: Random, channels: int) -> Call:
    """PyTorch's own GroupNorm."""
    layer = make.on(*(nn.GroupNorm(channels // 4, channels) for _ in range(2)))
    x, upper = make(128, channels, 512, grad=True), make(128, channels, 512)
    return lambda: layer(x).backward(upper, retain_graph=True)


def _angles(frequencies: torch.Tensor, positions: torch.Tensor) -> None:
    """The angles by a product, as transformers made them then: cuBLAS takes its workspace."""
    frequencies[None, :, None].expand(1, -1, 1).float() @ positions[:, None, :].float()


def rotary(make: Random, size: int, length: int = 0, width: int = 0) -> Call:
    """Rotary embedding as Llama's model writes it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    length, width = length or size, width or size
    q, k = (make(1, length, heads, width // 32, dtype=BF16, grad=True) for heads in (32, 8))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    upper = torch.randn_like(q), torch.randn_like(k)
    positions = torch.arange(length, device=make.device)[None]
    frequencies = make(width // 64)
    _angles(frequencies, positions)
    cos, sin = (make(1, length, width // 32, dtype=BF16) for _ in range(2))
    kept = positions, frequencies

    def full() -> object:
        turned = apply_rotary_pos_emb(q, k, cos, sin)
        torch.autograd.grad(turned, (q, k), upper, allow_unused=True, retain_graph=True)
        return kept

    return full


def llama4_rotary(make: Random, size: int, length: int = 0, width: int = 0) -> Call:
    """Rotary embedding of complex numbers."""
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    length, width = length or size, width or size
    q, k = (make(1, length, heads, width // 32, dtype=BF16, grad=True) for heads in (32, 8))
    upper = torch.randn_like(q), torch.randn_like(k)
    kept = torch.arange(length, device=make.device)[None], make(width // 64)
    _angles(kept[1], kept[0])
    turns = torch.empty(1, length, width // 64, dtype=torch.complex64, device=make.device)

    def full() -> object:
        turned = apply_rotary_emb(q, k, turns)
        torch.autograd.grad(turned, (q, k), upper, allow_unused=True, retain_graph=True)
        return kept

    return full


def kl_divergence(make: Random, vocabulary: int) -> Call:
    """Kullback-Leibler divergence."""
    x = make(16_384, vocabulary, grad=True).log_softmax(-1)
    target = make(16_384, vocabulary).softmax(-1)
    loss = nn.KLDivLoss(reduction="batchmean")
    return lambda: loss(x, target).backward(retain_graph=True)


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Jensen-Shannon's, as Liger's reference has it since it knows a beta."""
    kl = nn.KLDivLoss(reduction="batchmean", log_target=True)
    log_p, log_q = log_p.to(FP32), log_q.to(FP32)
    m = torch.lerp(torch.exp(log_p), torch.exp(log_q), 0.5)
    loss = 0.5 * kl(torch.log(m), log_p) + 0.5 * kl(torch.log(m), log_q)
    return loss.to(dtype)


def jsd(make: Random, vocabulary: int) -> Call:
    """Jensen-Shannon divergence by vocabulary."""
    x = make(8192, vocabulary, grad=True).log_softmax(-1)
    target = make(8192, vocabulary).log_softmax(-1)
    return lambda: _divergence(x, target, FP32).backward(retain_graph=True)


def jsd_by_rows(make: Random, rows: int) -> Call:
    """Jensen-Shannon divergence by rows, each summed on its own."""
    log_q = make(rows, 128_256, grad=True).log_softmax(-1)
    log_p = make(rows, 128_256).log_softmax(-1)
    kl = nn.KLDivLoss(reduction="none", log_target=True)

    def loss() -> torch.Tensor:
        m = torch.lerp(torch.exp(log_q), torch.exp(log_p), 0.5)
        both = 0.5 * kl(torch.log(m), log_p).sum(dim=-1) + 0.5 * kl(torch.log(m), log_q).sum(dim=-1)
        both = (both / log_q.shape[0]).sum()
        return both.to(FP32)

    return _called(loss, "full", log_q, log_q)


def head_cross_entropy(make: Random, tokens: int) -> Call:
    """An LM head and its cross entropy."""
    head, other = (
        nn.Linear(4096, 128_256, bias=False, dtype=BF16, device=make.device) for _ in range(2)
    )
    x, target = make(tokens, 4096, dtype=BF16, grad=True), make.below(128_256, tokens, 1)
    target = target.squeeze(1)

    def loss() -> torch.Tensor:
        logits = head(x)
        return nn.CrossEntropyLoss()(logits, target)

    return lambda: (loss().backward(), other)


def heads_jsd(make: Random, tokens: int) -> Call:
    """A student's and a teacher's LM head, and their divergence."""
    heads = [nn.Linear(4096, 128_256, bias=False, dtype=BF16, device=make.device) for _ in range(4)]
    student, teacher, other_student, other_teacher = heads
    for one, other in ((student, other_student), (teacher, other_teacher)):
        one.weight.data = other.weight.data = make(128_256, 4096, dtype=BF16)
    given, told = make(tokens, 4096, dtype=BF16, grad=True), make(tokens, 4096, dtype=BF16)

    def loss() -> torch.Tensor:
        ours, theirs = student(given), teacher(told)
        log_q = torch.log_softmax(ours / 1.0, dim=-1)
        log_p = torch.log_softmax(theirs / 1.0, dim=-1)
        return _divergence(log_q, log_p, BF16)

    return lambda: (loss().backward(), heads)


def grpo(make: Random, batch: int, level: str) -> Call:
    """GRPO's loss with a reference model."""
    heads = [nn.Linear(4096, 128_256, bias=False, dtype=BF16, device=make.device) for _ in range(4)]
    policy, reference = heads[:2]
    x = make(batch, 1024, 4096, dtype=BF16, grad=True)
    chosen = make.below(128_256, batch, 1024)
    mask = torch.ones(batch, 1024, device=make.device)
    advantages, told = make(batch, dtype=BF16), make(batch, 1024, 4096, dtype=BF16)

    def loss() -> tuple[torch.Tensor, Any]:
        logits = x @ policy.weight.t()
        log_probs = F.log_softmax(logits.float(), dim=-1)
        per_token = log_probs.gather(dim=-1, index=chosen.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            other = told @ reference.weight.t()
            others = F.log_softmax(other.float(), dim=-1)
            ref = others.gather(dim=-1, index=chosen.unsqueeze(-1)).squeeze(-1)
        ratio = per_token - per_token.detach()
        if level == "sequence":
            ratio = (ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
            ratio = ratio.unsqueeze(-1)
        importance = torch.exp(ratio)
        clipped = torch.clamp(importance, 0.8, 1.2)
        one, two = importance * advantages.unsqueeze(1), clipped * advantages.unsqueeze(1)
        each = -torch.min(one, two)
        ref = ref.float()
        kl = torch.exp(ref - per_token) - (ref - per_token) - 1.0
        each = each + 0.1 * kl
        total = (each * mask).sum() / torch.clamp(mask.sum(), min=1.0)
        metric = (kl * mask).sum() / torch.clamp(mask.sum(), min=1.0)
        return total, (metric, heads)

    return lambda: loss()[0].backward()


def total_variation(make: Random, vocabulary: int) -> Call:
    """Total variation distance."""
    p = make(16_384, vocabulary, grad=True).softmax(-1)
    q = make(16_384, vocabulary).softmax(-1)

    def loss() -> torch.Tensor:
        distance = torch.abs(p - q) / 2.0
        return torch.sum(distance) / p.size(0)

    return lambda: loss().backward(retain_graph=True)


def swiglu(make: Random, width: int) -> Call:
    """SwiGLU without a kernel of its own."""
    x = make(2048, 4, 2 * width, dtype=BF16, grad=True)

    def full() -> None:
        x.grad = None
        gate, up = torch.chunk(x, 2, -1)
        y = F.silu(gate) * up
        y.sum().backward()

    return full


def peak(series: dict[str, Any], size: int) -> int:
    """The highest bytes allocated in a call of a series' program at a size, as replayed."""
    card, version = series["card"], series["torch"]
    with VirtualGPU(card, capacity=1 << 50, torch=version, watched=False) as gpu:
        if series.get("arguments", {}).get("mode") == "forward":
            # A process that ran the whole step before: both threads have their workspaces.
            small = nn.Linear(8, 8, bias=False, device=gpu.device)
            small(torch.empty(8, 8, device=gpu.device)).sum().backward()
            del small
        call = globals()[series["replay"]](Random(gpu), size, **series.get("arguments", {}))
        for _ in range(ROUNDS):
            gpu.reset_peak_memory_stats()
            call()
            highest = gpu.max_memory_allocated()
        return highest


def as_printed(nbytes: int) -> float:
    """Bytes as the programs printed them: MiB, in float32."""
    return torch.tensor(nbytes / MiB, dtype=FP32).item()


def all_series() -> list[dict[str, Any]]:
    """Every series of the file."""
    found: list[dict[str, Any]] = tomllib.loads(SERIES.read_text("utf-8"))["series"]
    return found
