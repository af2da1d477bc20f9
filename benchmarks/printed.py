"""What programs of others printed on real GPUs, to a few digits, carried out on a virtual one.

After the programs, in our own words; ``book/records/printed.toml`` names them.
"""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from every_byte.gpu import VirtualGPU
from every_byte.tracker import untracked
from every_byte.units import GiB

ROWS = Path(__file__).parent.parent / "book" / "records" / "printed.toml"


class _WrittenLayerNorm(nn.Module):
    """Written out, as for teaching."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised by rows."""
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        norm_x = (x - mean) / torch.sqrt(var + 1e-5)
        return self.scale * norm_x + self.shift


class _WrittenGELU(nn.Module):
    """Written out, its constant made on the host."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By the hyperbolic tangent."""
        root = torch.sqrt(torch.tensor(2.0 / torch.pi))
        return 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * torch.pow(x, 3))))


class _WrittenAttention(nn.Module):
    """Scores, mask and softmax written out; the mask a buffer, or made anew in each call."""

    mask: torch.Tensor | None

    def __init__(self, width: int, length: int, heads: int, keeps_mask: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        mask = torch.triu(torch.ones(length, length), diagonal=1) if keeps_mask else None
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each head's values, weighed by softmax."""
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        keys = self.key(x)
        queries = self.query(x)
        values = self.value(x)
        keys = keys.view(split)
        values = values.view(split)
        queries = queries.view(split)
        keys = keys.transpose(1, 2)
        queries = queries.transpose(1, 2)
        values = values.transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        if self.mask is not None:
            mask = self.mask.bool()[:length, :length]
        else:
            mask = torch.triu(torch.ones(length, length, device=x.device), diagonal=1).bool()
        scores.masked_fill_(mask, -torch.inf)
        weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
        weights = self.dropout(weights)
        mixed = (weights @ values).transpose(1, 2)
        mixed = mixed.reshape(batch, length, width)
        mixed = self.out(mixed)
        return mixed


class _FusedAttention(nn.Module):
    """PyTorch's own attention, of one product for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each head's values, weighed by softmax."""
        batch, length, width = x.shape
        qkv = self.qkv(x)
        qkv = qkv.view(batch, length, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv
        dropout = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=None, dropout_p=dropout, is_causal=True
        )
        mixed = mixed.transpose(1, 2).contiguous().view(batch, length, width)
        mixed = self.proj(mixed)
        return mixed


class _Block(nn.Module):
    def __init__(self, attention: nn.Module, norms: list[nn.Module], gelu: nn.Module) -> None:
        super().__init__()
        width = 768
        self.att, (self.norm1, self.norm2) = attention, norms
        layers = nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width)
        self.ff, self.drop = nn.Sequential(*layers), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and the MLP, each beside a shortcut."""
        shortcut = x
        x = self.norm1(x)
        x = self.att(x)
        x = self.drop(x)
        x = x + shortcut
        shortcut = x
        x = self.norm2(x)
        x = self.ff(x)
        x = self.drop(x)
        x = x + shortcut
        return x


class _WrittenGPT2(nn.Module):
    """GPT-2 of 124M with a head of its own."""

    def __init__(
        self, attention: str, norm: type[nn.Module], gelu: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        width, heads, length, vocabulary = 768, 12, 1024, 50_257
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(0.1)

        def attending() -> nn.Module:
            if attention == "fused":
                return _FusedAttention(width, heads)
            return _WrittenAttention(width, length, heads, attention == "mask kept")

        self.blocks = nn.Sequential(
            *(_Block(attending(), [norm(width) for _ in range(2)], gelu()) for _ in range(12))
        )
        self.norm, self.head = norm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """The logits."""
        length = given.shape[1]
        tokens = self.tokens(given)
        places = self.places(torch.arange(length, device=given.device))
        x = tokens + places
        x = self.drop(x)
        x = self.blocks(x)
        x = self.norm(x)
        return self.head(x)


def gpt2_from_scratch(
    gpu: VirtualGPU, attention: str, dtype: str, own_layers: bool, fused: bool, allocated: bool
) -> list[str]:
    """What a teaching script reserves, or has allocated, after an epoch and a sample, in GiB.

    Of its epoch three steps: an evaluation follows the first. The others repeat them.
    """
    norm: Any = nn.LayerNorm if own_layers else _WrittenLayerNorm
    gelu: Any = (lambda: nn.GELU(approximate="tanh")) if own_layers else _WrittenGELU
    with untracked():
        model = _WrittenGPT2(attention, norm, gelu)
    model.to(gpu.device).to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=fused)
    batches = [torch.zeros(8, 1024, dtype=torch.int64) for _ in range(2)]

    def loss_of() -> torch.Tensor:
        given, wanted = (batch.to(gpu.device) for batch in batches)
        logits = model(given)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    model.train()
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        if step == 0:
            model.eval()
            with torch.no_grad():
                for _ in range(2):
                    evaluated = loss_of()
                del evaluated
            model.train()
    model.eval()
    written = torch.zeros(1, 4, dtype=torch.int64).to(gpu.device)
    with torch.no_grad():
        for _ in range(4):  # of 50: each takes a little more than the one before
            logits = model(written[:, -1024:])
            logits = logits[:, -1, :]
            following = torch.argmax(logits, dim=-1, keepdim=True)
            written = torch.cat((written, following), dim=1)
    del written, following, logits
    nbytes = gpu.memory_allocated() if allocated else gpu.memory_reserved()
    del loss
    return [f"{nbytes / GiB:.4f} GiB"]


class _Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        """Three results, each as large as what is given, and their sum."""
        y = x.div(2)
        z = y.add(10)
        l = z.mul(2.0)  # noqa: E741
        return l.sum(), y, z, l


class _ForgetfulChain(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        """The same, and the sum alone is given back."""
        y = x.div(2)
        z = y.add(10)
        l = z.mul(2.0)  # noqa: E741
        return l.sum()


def out_of_memory(gpu: VirtualGPU, elements: float, in_backward: bool) -> list[str]:
    """What the message says of a program that asks for too much: tried, allocated, unallocated."""
    x = torch.empty(int(elements), device=gpu.device, requires_grad=True)
    try:
        if in_backward:
            loss, *kept = _Chain()(x)
            loss.backward()
            del kept
        else:
            _ForgetfulChain()(x).backward()
    except torch.OutOfMemoryError as error:
        patterns = r"allocate (\S+ \w+)", r"(\S+ \w+) is allocated by", r"(\S+ \w+) is reserved"
        return [re.findall(pattern, str(error))[0] for pattern in patterns]
    return []


def all_rows() -> list[dict[str, Any]]:
    """Every row of the file."""
    found: list[dict[str, Any]] = tomllib.loads(ROWS.read_text("utf-8"))["row"]
    return found


def said(row: dict[str, Any]) -> list[str]:
    """What a row's program prints, as replayed."""
    how: dict[str, Any] = {
        name: int(row[name] * GiB) for name in ("capacity", "context") if name in row
    }
    with VirtualGPU(row["card"], torch=row["torch"], watched=False, **how) as gpu:
        told: list[str] = globals()[row["replay"]](gpu, **row["arguments"])
        return told
