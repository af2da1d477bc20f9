"""Training and inference runs that were measured on a card, carried out on a virtual GPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import nn

from every_byte.allocator import Placement
from every_byte.gpu import VirtualGPU

FIGURES = (
    "memory_allocated",
    "memory_reserved",
    "max_memory_allocated",
    "max_memory_reserved",
)
Look = Callable[[str], None]
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_LLAMA_1B: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    **{"vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 500000.0},
    **_NO_TOKENS,
}
_LLAMA_8B = _LLAMA_1B | {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"head_dim": 128, "tie_word_embeddings": False},
}


def _model(
    gpu: VirtualGPU,
    kind: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    attention: str | None = "sdpa",
    head: str = "AutoModelForCausalLM",
) -> Any:
    import transformers

    how = {} if attention is None else {"attn_implementation": attention}
    with gpu.device:
        model = getattr(transformers, head).from_config(
            transformers.AutoConfig.for_model(kind, **settings), dtype=dtype, **how
        )
    for part in model.modules():
        if type(part).__name__.endswith("RotaryEmbedding"):
            part.forward = partial(_angles_by_a_product, part)
    return model


@torch.no_grad()
def _angles_by_a_product(
    rotary: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as transformers 5.17 made them, with which it was measured.

    Its product is the first of a run, and takes cuBLAS's workspace; 5.23 multiplies.
    """
    frequencies = rotary.inv_freq[None, :, None].expand(position_ids.size(0), -1, 1)
    frequencies = frequencies.to(dtype=torch.float, device=x.device)
    positions = position_ids[:, None, :].float()
    with torch.autocast(x.device.type, enabled=False):
        angles = (frequencies @ positions).transpose(1, 2)
        both = torch.cat((angles, angles), dim=-1)
        cos = both.cos() * rotary.attention_scaling
        sin = both.sin() * rotary.attention_scaling
    return cos.to(x.dtype), sin.to(x.dtype)


def _steps(
    gpu: VirtualGPU,
    look: Look,
    model: Any,
    loss_of: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    amp: torch.dtype | None = None,
    accumulate: int = 1,
    clip: bool = False,
    overflows: bool = False,
) -> None:
    """Two training steps; FP16 has a scaler, which leaves out a step that `overflows`."""
    look("loaded")
    scaler = torch.amp.GradScaler(gpu.device.type, enabled=amp is torch.float16)
    for number in range(2):
        for _ in range(accumulate):
            with torch.autocast(gpu.device.type, amp or torch.bfloat16, amp is not None):
                loss = loss_of()
            look(f"{number} forward")
            scaler.scale(loss).backward()
            look(f"{number} backward")
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not overflows:
            scaler.step(optimizer)
        scaler.update()
        look(f"{number} step")
        optimizer.zero_grad()
        del loss
        look(f"{number} zeroed")


def _training(
    kind: str,
    settings: dict[str, Any],
    gpu: VirtualGPU,
    look: Look,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    length: int = 1024,
    attention: str | None = "sdpa",
    mask: bool = False,
    classify: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    reentrant: bool | None = None,
    trained: Callable[[Any, VirtualGPU], Any] | None = None,
    **how: Any,
) -> None:
    head = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    model = _model(gpu, kind, settings, dtype, attention, head)
    if trained is not None:
        model = trained(model, gpu)
    tokens = torch.zeros(batch, length, dtype=torch.int64).to(gpu.device)
    given = {}
    if mask:
        given["attention_mask"] = torch.ones(batch, length, dtype=torch.int64).to(gpu.device)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )

    def loss_of() -> Any:
        if classify:
            return model(tokens, labels=tokens[:, 0], **given).loss
        return model(tokens, labels=tokens, use_cache=False, **given).loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    _steps(gpu, look, model, loss_of, optimizer(parameters), **how)


def _inference(
    kind: str,
    settings: dict[str, Any],
    gpu: VirtualGPU,
    look: Look,
    *,
    length: int,
    decode: int,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    model = _model(gpu, kind, settings, dtype).eval()
    tokens = torch.zeros(1, length, dtype=torch.int64).to(gpu.device)
    look("loaded")
    with torch.inference_mode():
        out = model(tokens, use_cache=True)
        look("prefill")
        past, following = out.past_key_values, out.logits[:, -1:].argmax(-1)
        del out
        look("cache")
        for _ in range(decode):
            out = model(following, past_key_values=past, use_cache=True)
            following, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            del out
        look("decoded")


def _embedding_and_norms(gpu: VirtualGPU, look: Look) -> None:
    with gpu.device:
        model = nn.Sequential(
            nn.Embedding(50000, 1024),
            nn.LayerNorm(1024),
            nn.Linear(1024, 4096),
            nn.GELU(),
            nn.Linear(4096, 1024),
            nn.RMSNorm(1024),
        )
    tokens = torch.zeros(16, 512, dtype=torch.int64).to(gpu.device)
    optimizer = torch.optim.AdamW(model.parameters())
    _steps(gpu, look, model, lambda: model(tokens).float().pow(2).mean(), optimizer)


def _last_layer_only(model: Any, _: VirtualGPU) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in (model.lm_head, model.model.layers[-1]):
        for parameter in part.parameters():
            parameter.requires_grad_(True)
    return model


def _with_lora(model: Any, gpu: VirtualGPU) -> Any:
    peft: Any = import_module("peft")
    settings = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with gpu.device:
        return peft.get_peft_model(model, settings)


def _adam_8bit(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    optimizers: Any = import_module("bitsandbytes.optim")
    adamw: torch.optim.Optimizer = optimizers.AdamW8bit(parameters)
    return adamw


def _quantised(bits: int, gpu: VirtualGPU, look: Look) -> None:
    """Llama's linear layers in bitsandbytes' 8 or 4 bits: inference, or LoRA."""
    layers: Any = import_module("bitsandbytes.nn")
    model = _model(gpu, "llama", _LLAMA_1B, torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        sizes = layer.in_features, layer.out_features
        weight = torch.empty_like(layer.weight.data, device="cpu")  # as .cpu(), without values
        new: Any
        if bits == 4:
            new = layers.Linear4bit(
                *sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = layers.Params4bit(
                weight, requires_grad=False, quant_type="nf4", module=new
            )
        else:
            new = layers.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new.to(gpu.device))
        del layer, weight, new
    gc.collect()
    gpu.empty_cache()
    tokens = torch.zeros(1, 512, dtype=torch.int64).to(gpu.device)
    look("quantised")
    if bits == 8:
        model.eval()
        with torch.inference_mode():
            for number in range(2):
                out = model(tokens, use_cache=False)
                del out
                look(f"inferred {number}")
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    model = _with_lora(model, gpu)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    _steps(
        *(gpu, look, model),
        lambda: model(tokens, labels=tokens, use_cache=False).loss,
        optimizer,
    )


def _encoder(gpu: VirtualGPU, look: Look) -> None:
    with gpu.device:
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(512, 8, batch_first=True), 6, enable_nested_tensor=False
        )
    inputs = torch.zeros(32, 128, 512).to(gpu.device)
    optimizer = torch.optim.Adam(model.parameters())
    _steps(gpu, look, model, lambda: model(inputs).mean(), optimizer)


_llama = partial(_training, "llama", _LLAMA_1B)
_two_layers = {"num_hidden_layers": 2, **_NO_TOKENS}
_four_layers = _two_layers | {"num_hidden_layers": 4}
_adamw, _fp32 = torch.optim.AdamW, torch.float32
WORKLOADS: dict[str, Callable[[VirtualGPU, Look], None]] = {
    "llama1b-bf16": _llama,
    "llama1b-bf16-b4-mask": partial(_llama, batch=4, length=512, mask=True),
    "llama1b-bf16-ckpt": partial(_llama, length=2048, reentrant=False),
    "llama1b-bf16-ckpt-reentrant": partial(_llama, length=2048, reentrant=True),
    # The card's figures show no optimizer states: there the first scale, 65,536, was too large,
    # and both steps were left out. A replay cannot know that.
    "llama1b-amp-fp16-scaler-clip": partial(
        _llama, dtype=_fp32, amp=torch.float16, clip=True, overflows=True
    ),
    "llama1b-fp32": partial(_llama, dtype=_fp32),
    "llama1b-bf16-accumulate-clip": partial(_llama, accumulate=3, clip=True),
    "llama1b-bf16-adamw-fused": partial(_llama, optimizer=partial(_adamw, fused=True)),
    "llama1b-bf16-adamw-forloop": partial(_llama, optimizer=partial(_adamw, foreach=False)),
    "llama1b-bf16-sgd": partial(_llama, optimizer=partial(torch.optim.SGD, lr=0.1)),
    "llama1b-bf16-rmsprop": partial(_llama, optimizer=torch.optim.RMSprop),
    "llama1b-lora-bf16": partial(_llama, trained=_with_lora),
    "llama1b-int8-infer": partial(_quantised, 8),
    "llama1b-qlora-nf4": partial(_quantised, 4),
    "llama1b-bf16-frozen": partial(_llama, trained=_last_layer_only),
    "llama1b-infer-bf16": partial(_inference, "llama", _LLAMA_1B, length=2048, decode=32),
    "llama1b-infer-fp32": partial(
        _inference, "llama", _LLAMA_1B, length=1024, decode=8, dtype=_fp32
    ),
    "llama8b-infer-bf16": partial(_inference, "llama", _LLAMA_8B, length=4096, decode=8),
    "gpt2-bf16-dropout": partial(_training, "gpt2", _NO_TOKENS, batch=4),
    "gpt2-fp32-dropout": partial(_training, "gpt2", _NO_TOKENS, batch=4, dtype=_fp32),
    "gpt2-fp32-eager": partial(
        _training, "gpt2", _NO_TOKENS, batch=4, length=512, dtype=_fp32, attention="eager"
    ),
    "bnb-adam8bit-gpt2": partial(
        _training, "gpt2", _NO_TOKENS, batch=2, length=512, optimizer=_adam_8bit
    ),
    "gpt2-infer-fp16": partial(
        _inference, "gpt2", _NO_TOKENS, length=512, decode=16, dtype=torch.float16
    ),
    "qwen3-2l": partial(_training, "qwen3", _two_layers, length=2048),
    # gemma2-2l is left out: it ran with "sdpa", which transformers 5.23 refuses for Gemma 2.
    "phi3-2l": partial(_training, "phi3", _two_layers),
    "bert-base-fp32-mask": partial(
        _training, "bert", {}, batch=8, length=128, dtype=_fp32, mask=True, classify=True
    ),
    "transformer-encoder-dropout": _encoder,
    "embedding-layernorm": _embedding_and_norms,
    "mamba-4l": partial(_training, "mamba", _four_layers, length=256, dtype=_fp32, attention=None),
}
"""The runs by the names under which they were measured: each on a GPU that is open."""


# Convolutions and recurrent layers


def _vision(
    name: str,
    gpu: VirtualGPU,
    look: Look,
    *,
    amp: torch.dtype | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    train: bool = True,
) -> None:
    import torchvision

    with gpu.device:
        model = getattr(torchvision.models, name)()
    model = model.to(memory_format=layout)
    images = torch.zeros(16, 3, 224, 224).to(gpu.device).to(memory_format=layout)
    labels = torch.zeros(16, dtype=torch.int64).to(gpu.device)
    if not train:
        model.eval()
        look("loaded")
        with torch.inference_mode():
            out = model(images)
        look("inferred")
        del out
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = nn.functional.cross_entropy
    _steps(gpu, look, model, lambda: loss(model(images), labels), optimizer, amp=amp)


def _lstm(gpu: VirtualGPU, look: Look) -> None:
    with gpu.device:
        model = nn.LSTM(512, 1024, 2, batch_first=True)
    inputs = torch.zeros(32, 128, 512).to(gpu.device)
    optimizer = torch.optim.Adam(model.parameters())
    _steps(gpu, look, model, lambda: model(inputs)[0].mean(), optimizer)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)),
        *(nn.ReLU(inplace=True), nn.Conv2d(outputs, outputs, 3, padding=1)),
        *(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
    )


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _double(3, 64), _double(64, 128), _double(128, 256)
        self.u1, self.u2 = nn.ConvTranspose2d(256, 128, 2, 2), nn.ConvTranspose2d(128, 64, 2, 2)
        self.d1, self.d2, self.out = _double(256, 128), _double(128, 64), nn.Conv2d(64, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = partial(nn.functional.max_pool2d, kernel_size=2)
        a = self.a(x)
        b = self.b(pool(a))
        c = self.c(pool(b))
        y = self.d1(torch.cat([self.u1(c), b], 1))
        y = self.d2(torch.cat([self.u2(y), a], 1))
        out: torch.Tensor = self.out(y)
        return out


def _unet(gpu: VirtualGPU, look: Look) -> None:
    with gpu.device:
        model = _UNet()
    images = torch.zeros(8, 3, 256, 256).to(gpu.device)
    labels = torch.zeros(8, 256, 256, dtype=torch.int64).to(gpu.device)
    optimizer = torch.optim.Adam(model.parameters())
    loss = nn.functional.cross_entropy
    _steps(gpu, look, model, lambda: loss(model(images), labels), optimizer)


WORKLOADS |= {
    **{
        f"tv-{name}-fp32": partial(_vision, name)
        for name in (
            *("resnet18", "resnet50", "vgg16", "mobilenet_v3_large", "vit_b_16", "swin_t"),
        )
    },
    "tv-resnet50-amp-bf16-cl": partial(
        _vision, "resnet50", amp=torch.bfloat16, layout=torch.channels_last
    ),
    "tv-resnet50-infer": partial(_vision, "resnet50", train=False),
    "lstm": _lstm,
    "unet-small": _unet,
}


@contextmanager
def _workspaces() -> Iterator[None]:
    """cuBLAS's workspaces as they were set where it was measured."""
    with mock.patch.dict("os.environ", {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}):
        yield


def replayed(
    name: str,
    card: str,
    torch_version: str,
    left_over: int,
    placement: Placement | None = None,
) -> dict[str, list[int]]:
    """What a run shows at its checkpoints: `FIGURES`, in bytes.

    Args:
        name: one of `WORKLOADS`.
        card, torch_version: where it was measured.
        left_over: bytes that were allocated before it began, and stayed so.
        placement: where the driver places segments; by the card's rule if None.
    """
    found: dict[str, list[int]] = {}
    gpu = VirtualGPU(card, torch=torch_version)
    if placement is not None:
        gpu.memory.placement = placement

    def look(checkpoint: str) -> None:
        found[checkpoint] = [getattr(gpu, figure)() for figure in FIGURES]
        gpu.reset_peak_memory_stats()

    with _workspaces(), gpu:
        before = torch.empty(left_over, dtype=torch.uint8, device=gpu.device)
        WORKLOADS[name](gpu, look)
        del before
    return found
