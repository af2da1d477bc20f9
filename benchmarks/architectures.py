# Libraries that are not in the lock, and have no types here:
# mypy: disable-error-code="import-not-found,var-annotated,arg-type,assignment,unused-ignore"
"""What of other people's models and libraries runs unchanged on a virtual card.

``python -m benchmarks.architectures`` runs each case of ``architectures.toml`` in a process of
its own, under ``every_byte.as_cuda(CARD)``: a training step with AdamW, and generation where a
model can. It writes `RESULTS`, which the book shows. Models are of random weights, of the real
width, and with two layers of each stack where their configuration says how many.

Each case is held against sums that the accounting has no part in (`Checked`): what the tensors
that Python and autograd can reach take, each rounded up to 512 B, and for parameters, gradients
and AdamW's states their sizes by the model itself. The allocator is told of
``expandable_segments``, since it then splits every block and the sums have to close to the byte.
"""

import argparse
import copy
import gc
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import tomllib
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import every_byte
from every_byte.units import GiB, MiB

CASES = Path(__file__).parent / "architectures.toml"
RESULTS = Path(__file__).parent / "architectures.json"
CARD = "H200"
CAPACITY = 1 << 50  # what fits is not the question here
SECONDS, MEMORY = 300, 12 * GiB  # that a case may take on the host
BLOCK = 512  # bytes that the allocator rounds to
WORKSPACE = 32 * MiB  # of cuBLAS on Hopper, for each thread that multiplies matrices
LENGTH = 128  # tokens

_LAYERS = re.compile(
    r"^(num_(hidden|encoder|decoder)?_?layers|n_layers?|(en|de)coder_layers|depth)$"
)
_STAGES = ("out_features", "out_indices", "stage_names")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")


class Wrong(Exception):
    """A figure is not what it has to be."""


@dataclass
class Workload:
    """A model on the card and what a script does with it.

    Attributes:
        model: on the card.
        loss: one forward pass of the training.
        generate: what a script does after training, if anything.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    generate: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table: its group, its name, what builds it, and its library."""

    group: str
    name: str
    run: Callable[["every_byte.VirtualGPU"], "Checked"]
    needs: str


@dataclass(frozen=True)
class Checked:
    """What a case came to.

    Attributes:
        parameters: numbers of the model.
        at_rest: bytes allocated after the step, with nothing but the model, its gradients and the
            optimizer's states alive, without cuBLAS's workspaces.
        did: what was run.
    """

    parameters: int
    at_rest: int
    did: str


# Sums of our own


def _rounded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def _bytes_of(tensors: Iterator[Tensor]) -> int:
    """Bytes of the blocks that tensors on the card lie in, each storage once."""
    found: dict[int, int] = {}
    with torch._C.DisableTorchFunction():
        for tensor in tensors:
            if tensor.is_meta and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                found[storage._cdata] = _rounded(storage.nbytes())
    return sum(found.values())


def _reachable(gpu: "every_byte.VirtualGPU") -> Iterator[Tensor]:
    """The card's tensors that Python can reach."""
    gc.collect()
    with torch._C.DisableTorchFunction():
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and each.is_meta and gpu.accounts_for(each):
                yield each


def _same(what: str, allocated: int, expected: int) -> None:
    """See that what is allocated is what is expected, but for cuBLAS's workspaces.

    Raises:
        Wrong: it is not.
    """
    if allocated - expected not in (0, WORKSPACE, 2 * WORKSPACE):
        raise Wrong(f"{what}: {allocated:,} B are allocated, the tensors take {expected:,}")


def _at_rest(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, gradients, and AdamW's two states of each."""
    trained = [p for p in model.parameters() if p.grad is not None]
    states = 2 * sum(_rounded(p.numel() * p.element_size()) for p in trained)
    gradients = iter([p.grad for p in trained if p.grad is not None])
    return _bytes_of(_held(model)) + _bytes_of(gradients) + states


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def trained(gpu: "every_byte.VirtualGPU", workload: Workload) -> Checked:
    """Train a step with AdamW, and hold the figures against our own sums.

    Raises:
        Wrong: they are not equal.
    """
    model = workload.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    saved: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = workload.loss()
    kept = [tensor for tensor in (each() for each in saved) if tensor is not None]
    alive = _bytes_of(iter([*_reachable(gpu), *kept]))
    _same("after forward", gpu.memory_allocated(), alive)
    del kept
    saved.clear()
    loss.backward()
    optimizer.step()
    del loss
    own = [*_held(model), *(p.grad for p in model.parameters() if p.grad is not None)]
    own += [t for state in optimizer.state.values() for t in state.values()]
    # Besides there are inputs, and what a model keeps without calling it a buffer.
    more = _bytes_of(iter([*own, *_reachable(gpu)])) - _bytes_of(iter(own))
    expected = _at_rest(model)
    _same("after the step", gpu.memory_allocated(), expected + more)
    did = "a training step"
    del own
    if workload.generate is not None:
        optimizer.zero_grad()
        model.eval()
        workload.generate()
        did += ", generate()"
    return Checked(sum(p.numel() for p in model.parameters()), expected, did)


# transformers


def _short(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with two layers of each stack."""
    for name, value in list(config.items()):
        if name in _STAGES:
            del config[name]  # follow from the layers
        elif isinstance(value, dict):
            _short(value)
        elif _LAYERS.match(str(name)) and isinstance(value, int):
            config[name] = min(value, 2)
        elif name in _PER_LAYER and isinstance(value, list):
            config[name] = value[:2]
    return config


def _transformers(name: str, about: dict[str, Any]) -> Workload:
    import transformers

    given = about.get("config", {})
    config = transformers.AutoConfig.for_model(name, **copy.deepcopy(given))
    if not about.get("whole"):
        config = type(config).from_dict({**_short(config.to_dict()), **given})
    head = getattr(transformers, about["head"])
    with torch.device("cuda"):
        make = getattr(head, "from_config", None) or head._from_config
        model = make(config).cuda()  # torch.Tensor(...) of old code pays no heed to the context
        inputs = _INPUTS[about.get("inputs", "auto")](config, about)

    def loss() -> Tensor:
        output = model(**inputs)
        if getattr(output, "loss", None) is not None:
            return output.loss
        return _sum(output)

    def generate() -> Any:
        given = {k: v for k, v in inputs.items() if not k.startswith(("labels", "decoder"))}
        return model.generate(**given, max_new_tokens=3)

    return Workload(model, loss, generate if about.get("generate") else None)


def _sum(output: Any) -> Tensor:
    """A loss of an output that has none: the sum of its numbers."""
    leaves = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
    return torch.stack([t.float().sum() for t in leaves if t.requires_grad]).sum()


def _size(config: Any, about: dict[str, Any]) -> tuple[int, int]:
    vision = getattr(config, "vision_config", None) or config
    size = about.get("size") or getattr(vision, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _pixels(config: Any, about: dict[str, Any], many: int = 2) -> Tensor:
    return torch.randn(many, 3, *_size(config, about))


def _tokens(about: dict[str, Any]) -> dict[str, Tensor]:
    ids = torch.randint(5, 900, (2, about.get("length", LENGTH)))
    mask = torch.ones_like(ids)
    mask[0, :28] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def _auto(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    if "Image" in about["head"]:
        return {"pixel_values": _pixels(config, about), "labels": torch.randint(0, 2, (2,))}
    tokens = _tokens(about)
    if "Classification" in about["head"]:
        return {**tokens, "labels": torch.randint(0, 2, (2,))}
    return {**tokens, "labels": tokens["input_ids"].clone()}


def _detection(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    boxes = torch.rand(3, 4) * 0.2 + 0.3
    labels = [{"class_labels": torch.tensor([1, 2, 3]), "boxes": boxes} for _ in range(2)]
    return {"pixel_values": _pixels(config, about), "labels": labels}


def _segmentation(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    pixels = _pixels(config, {"size": [512, 512]})
    return {"pixel_values": pixels, "labels": torch.randint(0, 2, (2, 512, 512))}


def _speech(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    mask = torch.ones(2, 32_000, dtype=torch.long)
    mask[0, 24_000:] = 0
    labels = torch.randint(3, 30, (2, 12))
    return {"input_values": torch.randn(2, 32_000), "attention_mask": mask, "labels": labels}


def _spectrum(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    labels = torch.randint(5, 900, (2, 16))
    return {"input_features": torch.randn(2, *about["shape"]), "labels": labels}


def _spectrogram(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    labels = torch.randint(0, 2, (2,))
    return {"input_values": torch.randn(2, *about["shape"]), "labels": labels}


def _pair(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    tokens = _tokens({"length": 64, **about})
    return {**tokens, "pixel_values": _pixels(config, about), "return_loss": True}


def _caption(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    tokens = _tokens({"length": 64})
    labels = tokens["input_ids"].clone()
    return {**tokens, "pixel_values": _pixels(config, about), "labels": labels}


def _question(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    tokens = _tokens(about)
    labels = torch.rand(2, config.num_labels)
    return {**tokens, "pixel_values": _pixels(config, about), "labels": labels}


def _text_with_images(config: Any, about: dict[str, Any], many: int) -> dict[str, Tensor]:
    """Two texts, of which each has the places of so many parts of an image."""
    image = about.get("image") or config.image_token_id
    ids = torch.randint(5, 900, (2, LENGTH + many))
    ids[:, 4 : 4 + many] = image
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def _images_in_text(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    image = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None)
    text = _text_with_images(config, {**about, "image": image or about["image"]}, about["images"])
    types = (text["input_ids"] == (image or about["image"])).long()
    more = {"token_type_ids": types} if config.model_type in ("gemma3", "paligemma") else {}
    return {**text, **more, "pixel_values": _pixels(config, about)}


def _tiles(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    text = _text_with_images(config, {"image": config.image_token_id}, about["images"])
    pixels = _pixels(config, about)[:, None].contiguous()
    masks = torch.ones(2, 1, *about["size"], dtype=torch.bool)
    return {**text, "pixel_values": pixels, "pixel_attention_mask": masks}


def _patches(config: Any, about: dict[str, Any]) -> dict[str, Any]:
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, 16, 16]] * 2)
    text = _text_with_images(config, {"image": config.image_token_id}, 64)
    types = (text["input_ids"] == config.image_token_id).int()
    pixels = torch.randn(2 * 256, width)
    return {**text, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}


_INPUTS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "auto": _auto,
    "pixels": lambda config, about: {"pixel_values": _pixels(config, about)},
    "video": lambda config, about: {
        "pixel_values": torch.randn(1, config.num_frames, 3, *_size(config, about)),
        "labels": torch.zeros(1, dtype=torch.long),
    },
    "detection": _detection,
    "segmentation": _segmentation,
    "speech": _speech,
    "spectrum": _spectrum,
    "spectrogram": _spectrogram,
    "pair": _pair,
    "caption": _caption,
    "question": _question,
    "images in text": _images_in_text,
    "tiles": _tiles,
    "patches": _patches,
}


# Images


def _torchvision(kind: str, name: str) -> Workload:
    from torchvision import models

    with torch.device("cuda"):
        if kind == "detection":
            model = models.get_model(name, weights=None, weights_backbone=None)
            images = [torch.rand(3, 480, 640), torch.rand(3, 500, 600)]
            box = torch.tensor([[10.0, 20.0, 200.0, 220.0], [50.0, 60.0, 300.0, 400.0]])
            target = {"boxes": box, "labels": torch.tensor([1, 1])}
            if "mask" in name:
                target["masks"] = torch.ones(2, 480, 640, dtype=torch.uint8)
            if "keypoint" in name:
                target["keypoints"] = torch.ones(2, 17, 3)
            targets = [dict(target), dict(target)]
            if "mask" in name:
                targets[1]["masks"] = torch.ones(2, 500, 600, dtype=torch.uint8)

            def loss() -> Tensor:
                return torch.stack(list(model(images, targets).values())).sum()

            return Workload(model, loss, lambda: model(images))
        options = {"weights_backbone": None} if kind == "segmentation" else {}
        model = models.get_model(name, weights=None, **options)
        shape = {"video": (2, 3, 16, 224, 224), "optical flow": (1, 3, 256, 256)}.get(
            kind,
            (2, 3, 299 if name == "inception_v3" else 224, 299 if "inception" in name else 224),
        )
        x = torch.randn(shape)
    inputs = (x, x.clone()) if kind == "optical flow" else (x,)
    return Workload(model, lambda: _sum(model(*inputs)))


def _timm(kind: str, name: str) -> Workload:
    import timm

    with torch.device("cuda"):
        model = timm.create_model(name, pretrained=False)
        x = torch.randn(2, *model.default_cfg["input_size"])
        y = torch.randint(0, 1000, (2,))
    return Workload(model, lambda: nn.functional.cross_entropy(model(x), y))


def _diffusers(kind: str, name: str) -> Workload:
    import diffusers

    options: dict[str, Any] = {
        "UNet2DConditionModel": {"cross_attention_dim": 768},
        "DiTTransformer2DModel": {"num_layers": 2},
        "FluxTransformer2DModel": {
            "num_layers": 2,
            "num_single_layers": 2,
            "guidance_embeds": True,
        },
        "SD3Transformer2DModel": {"num_layers": 2},
        "AutoencoderKL": {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
    }[name]
    with torch.device("cuda"):
        model = getattr(diffusers, name)(**options)
        time = torch.randint(0, 1000, (2,))
        inputs = {
            "UNet2DConditionModel": lambda: {
                "sample": torch.randn(2, 4, 64, 64),
                "timestep": time,
                "encoder_hidden_states": torch.randn(2, 77, 768),
            },
            "DiTTransformer2DModel": lambda: {
                "hidden_states": torch.randn(2, 4, 32, 32),
                "timestep": time,
                "class_labels": time,
            },
            "FluxTransformer2DModel": lambda: {
                "hidden_states": torch.randn(2, 1024, 64),
                "encoder_hidden_states": torch.randn(2, 77, 4096),
                "pooled_projections": torch.randn(2, 768),
                "timestep": time.float(),
                "img_ids": torch.zeros(1024, 3),
                "txt_ids": torch.zeros(77, 3),
                "guidance": torch.ones(2),
            },
            "SD3Transformer2DModel": lambda: {
                "hidden_states": torch.randn(2, 16, 64, 64),
                "encoder_hidden_states": torch.randn(2, 77, 4096),
                "pooled_projections": torch.randn(2, 2048),
                "timestep": time,
            },
            "AutoencoderKL": lambda: {"sample": torch.randn(2, 3, 256, 256)},
        }[name]()
    return Workload(model, lambda: model(**inputs).sample.float().pow(2).mean())


def _recurrent(kind: str, name: str) -> Workload:
    with torch.device("cuda"):
        x = torch.randn(16, 64, 256)
        if name == "LSTMCell":
            cell = nn.LSTMCell(256, 512)

            def steps() -> Tensor:
                state = (torch.zeros(16, 512, device="cuda"), torch.zeros(16, 512, device="cuda"))
                for each in x.unbind(1):
                    state = cell(each, state)
                return state[0].sum()

            return Workload(cell, steps)
        both = name.startswith("bidirectional")
        make = getattr(nn, name.removeprefix("bidirectional "))
        model = make(256, 512, num_layers=2, batch_first=True, bidirectional=both)
    return Workload(model, lambda: model(x)[0].sum())


# Libraries


def _llama(**more: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=1000,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def closes(gpu: "every_byte.VirtualGPU", model: nn.Module, did: str) -> Checked:
    """The figures after a library's training: its tensors are found by Python alone.

    Raises:
        Wrong: they are not all that is allocated.
    """
    gc.collect()
    _same("after training", gpu.memory_allocated(), _bytes_of(_reachable(gpu)))
    trains = [p for p in model.parameters() if p.requires_grad]
    return Checked(
        sum(p.numel() for p in model.parameters()),
        _bytes_of(_held(model)),
        f"{did}; {sum(p.numel() for p in trains):,} parameters trained",
    )


def _loaded(device_map: str, **bits: bool) -> Any:
    """A small Llama that transformers loads and bitsandbytes quantises."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        _llama().save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.BitsAndBytesConfig(**bits),
            device_map=device_map,
        )


def _peft(gpu: "every_byte.VirtualGPU", name: str) -> Checked:
    import peft

    if name == "QLoRA":
        model = _loaded("cuda", load_in_4bit=True)
        model = peft.prepare_model_for_kbit_training(model)
    else:
        model = _llama().cuda()
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    ids = torch.randint(0, 1000, (2, 64)).cuda()
    return trained(gpu, Workload(model, lambda: model(input_ids=ids, labels=ids).loss))


def _accelerate(gpu: "every_byte.VirtualGPU", name: str) -> Checked:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=name)
    model = _llama()
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.utils.data.DataLoader(torch.randint(0, 1000, (8, 64)), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for ids in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    del loss, ids
    return closes(gpu, model, "four training steps")


def _rows(many: int = 6) -> list[dict[str, Any]]:
    return [{"input_ids": i, "labels": i} for i in torch.randint(0, 1000, (many, 64)).tolist()]


def _of_trainer(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **more,
    }


def _trl(gpu: "every_byte.VirtualGPU", name: str) -> Checked:
    import datasets
    import transformers
    import trl

    tokenizer = _tokenizer(transformers)
    text = "some words that a model may learn "
    with tempfile.TemporaryDirectory() as folder:
        if name == "SFT":
            rows = datasets.Dataset.from_list([{"text": text * 4}] * 6)
            trainer = trl.SFTTrainer(
                _llama(),
                args=trl.SFTConfig(**_of_trainer(folder), max_length=64),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        else:
            rows = datasets.Dataset.from_list(
                [{"prompt": text, "chosen": text * 2, "rejected": text}] * 6
            )
            trainer = trl.DPOTrainer(
                _llama(),
                ref_model=_llama(),
                args=trl.DPOConfig(**_of_trainer(folder), max_length=64),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        trainer.train()
    return closes(gpu, trainer.model, "three training steps")


def _tokenizer(transformers: Any) -> Any:
    """A tokenizer of whole words, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "[UNK] [PAD] [EOS] some words that a model may learn".split()
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )


def _lightning(gpu: "every_byte.VirtualGPU", name: str) -> Checked:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = _llama()

        def training_step(self, ids: Tensor, index: int) -> Any:
            loss = self.model(input_ids=ids, labels=ids).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = Module()
    data = torch.utils.data.DataLoader(torch.randint(0, 1000, (8, 64)), batch_size=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=3,
            precision=name.partition(", ")[2] or "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    return closes(gpu, module, "three training steps")


def _trainer(gpu: "every_byte.VirtualGPU", name: str) -> Checked:
    import transformers

    if name.startswith("device_map"):
        model = _loaded("auto", load_in_8bit=True)
        ids = torch.randint(0, 1000, (2, 64)).cuda()
        with torch.no_grad():
            model(input_ids=ids)
        return closes(gpu, model, "loading and a forward pass")
    precision = name.partition(", ")[2]
    more = {precision: True} if precision else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(**_of_trainer(folder, **more))
        trainer = transformers.Trainer(_llama(), arguments, train_dataset=_rows())
        trainer.data_collator = transformers.default_data_collator
        trainer.train()
    return closes(gpu, trainer.model, "three training steps")


def _torch(gpu: "every_byte.VirtualGPU", name: str) -> Checked:
    model: Any = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).cuda()
    x = torch.randn(64, 512).cuda().requires_grad_()
    if name == "DataParallel":
        parallel = nn.DataParallel(model)
        return trained(gpu, Workload(parallel, lambda: parallel(x).sum()))
    if name == "AMP":
        scaler = torch.amp.GradScaler("cuda")
        optimizer = torch.optim.AdamW(model.parameters())
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(x).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        del loss
        return closes(gpu, model, "a training step")
    if name == "checkpoint":
        from torch.utils.checkpoint import checkpoint_sequential

        run = lambda: checkpoint_sequential(model, 2, x, use_reentrant=False).sum()  # noqa: E731
    else:

        def run() -> Tensor:
            with torch.autograd.graph.save_on_cpu(pin_memory=True):
                return model(x).sum()

    return trained(gpu, Workload(model, run))


_LIBRARIES = {
    "peft": _peft,
    "accelerate": _accelerate,
    "trl": _trl,
    "lightning": _lightning,
    "transformers": _trainer,
    "torch": _torch,
}


# All of it


def cases(path: Path = CASES) -> list[Case]:
    """The cases of a file, in its order."""
    told = tomllib.loads(path.read_text("utf-8"))
    found: list[Case] = []

    def add(group: str, name: str, needs: str, make: Callable[[], Workload]) -> None:
        found.append(Case(group, name, lambda gpu: trained(gpu, make()), needs))

    for kind, models in told["transformers"].items():
        for name, about in models.items():
            add(
                f"transformers, {kind.replace('_', ' ')}",
                name,
                "transformers",
                lambda name=name, about=about: _transformers(name, about),  # type: ignore[misc]
            )
    makers = {"torchvision": _torchvision, "timm": _timm, "diffusers": _diffusers}
    for library, maker in {**makers, "recurrent": _recurrent}.items():
        for kind, names in told[library].items():
            group = library if kind in ("models",) else f"{library}, {kind}"
            for name in names:
                add(
                    group,
                    name,
                    "torch" if library == "recurrent" else library,
                    lambda maker=maker, kind=kind, name=name: maker(kind, name),  # type: ignore[misc]
                )
    for library, names in told["libraries"].items():
        for name in names:
            run = _LIBRARIES[library]
            found.append(
                Case(
                    "libraries",
                    f"{library}: {name}",
                    lambda gpu, run=run, name=name: run(gpu, name),  # type: ignore[misc]
                    library,
                )
            )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        nowhere = stack.enter_context(open(os.devnull, "w"))
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        stack.callback(os.close, before)
        stack.callback(os.dup2, before, 2)
        yield


def result(case: Case) -> dict[str, Any]:
    """What becomes of a case, as a row of `RESULTS`."""
    row: dict[str, Any] = {"group": case.group, "name": case.name}
    try:
        with every_byte.as_cuda(
            CARD, CAPACITY, alloc_conf="expandable_segments:True", context=0
        ) as gpu:
            checked = case.run(gpu)
            read = gpu.memory.values.assumptions
    except Wrong as error:
        return {**row, "result": "wrong", "why": str(error)}
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        first = re.sub(rf" at {Path(__file__).name}:\d+", "", first)  # of no reader's file
        return {**row, "result": "refused", "why": f"{type(error).__name__}: {first}"}
    return {
        **row,
        "result": "runs",
        "did": checked.did,
        "parameters": checked.parameters,
        "at rest": checked.at_rest,
        "assumed": sorted({a.operation for a in read}),
    }


def _send(case: Case, to: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.manual_seed(0)
    with _quiet():
        to.send(result(case))


def in_a_process(send: Callable[..., None], *args: Any, method: str = "fork") -> Any:
    """What ``send(*args, connection)`` sends from a process of its own.

    Raises:
        TimeoutError: nothing comes in `SECONDS`; the process is ended.
        EOFError: it ends without.
    """
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(*args, there))
    process.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            raise TimeoutError(f"takes more than {SECONDS} s on the host")
        return here.recv()
    finally:
        process.kill()
        process.join()


def in_its_own_process(case: Case) -> dict[str, Any]:
    """The result of a case, which may take `SECONDS` and `MEMORY` and no more."""
    try:
        found: dict[str, Any] = in_a_process(_send, case)
        return found
    except TimeoutError as error:
        why = str(error)
    except EOFError:
        why = f"ends its process, which may take {MEMORY / GiB:.0f} GiB"
    return {"group": case.group, "name": case.name, "result": "refused", "why": why}


def versions() -> dict[str, str]:
    """Of the libraries that are installed here."""
    found = {}
    for name in sorted({"torch", *(case.needs for case in cases()), "bitsandbytes"}):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the cases and write their results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("--only", default="*", help="names of cases, such as 'mixtral'")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    before = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    known = {(row["group"], row["name"]): row for row in before.get("cases", [])}
    for module in ("torch._dynamo", "transformers", "torchvision"):
        import_module(module)  # once, for all processes
    for case in cases():
        place = (case.group, case.name)
        if not fnmatch(case.name, options.only) or find_spec(case.needs) is None:
            continue  # what was found earlier stays
        known[place] = in_its_own_process(case)
        print(*place, known[place]["result"], known[place].get("why", ""), flush=True)
        rows = [known[place] for place in ((c.group, c.name) for c in cases()) if place in known]
        told = {"card": CARD, "versions": {**before.get("versions", {}), **versions()}}
        text = json.dumps({**told, "cases": rows}, indent=1, ensure_ascii=False)
        options.output.write_text(text + "\n", "utf-8")  # each time: a run may be cut off
    rows = list(known.values())
    ran = sum(row["result"] == "runs" for row in rows)
    print(f"{ran} of {len(rows)} run", file=sys.stderr)


if __name__ == "__main__":
    main()
