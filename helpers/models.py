"""Transformers of the book's data file: built from their configuration, or loaded at full size.

Nothing is downloaded unless ``weights="hub"`` asks for it: dimensions stand in
``every_byte/data/models.toml``, and checkpoints of random weights are made from
them. ``python -m helpers.models gpt2-large`` makes one.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from every_byte.data import known_models
from every_byte.files import folder_beside, remove_left_over, swap
from every_byte.gpu import VirtualGPU, open_gpu
from every_byte.tracker import untracked
from every_byte.units import GB, MB
from helpers.environment import cache_folder, require

require("transformers")
with warnings.catch_warnings():
    # In a notebook without ipywidgets tqdm complains that its bars will be plain.
    warnings.filterwarnings("ignore", "IProgress not found")
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download as hub_download
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AttentionInterface,
        AutoConfig,
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from helpers.placement import replay_device_map, replay_to

CAUSAL_SDPA = "causal_sdpa"
"""For ``attn_implementation``: transformers' ``"sdpa"`` for whole texts without padding.

Only that transformers makes no mask for it. For ``"sdpa"`` it looks at the values
of positions and padding to find that it needs none, and ``meta`` has no values."""
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)

# What the data file says of a model that its config.json does not.
_NOT_OF_THE_CONFIG = ("published", "source")


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a model of the data file.

    Special tokens have no ids, so that any vocabulary will do; settings that
    change no size, such as rotary scaling, are the architecture's defaults.

    Args:
        name: as in ``every_byte/data/models.toml``.
        changes: what is to differ, under the configuration's names.

    Raises:
        ValueError: it is not there; the message lists those that are.
    """
    if not isinstance(name, str) or name not in known_models():
        raise ValueError(f"model is {name!r}: expected one of {', '.join(known_models())}")
    known = {k: v for k, v in known_models()[name].items() if k not in _NOT_OF_THE_CONFIG}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return AutoConfig.for_model(**{**tokens, **known, **changes})


def build(
    model: str | PreTrainedConfig,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Make a causal language model directly on a device, in evaluation mode.

    Parameters are allocated one by one, in the order of the modules. Where the
    head is tied to the embedding it is made as well, then dropped: its segment
    stays reserved until ``empty_cache()``.

    Args:
        model: a name for `config`, or a configuration; it is left as it was.
        device: where; on ``meta`` tensors have shapes and no storage.
        dtype: of the parameters; the configuration's if None.

    Raises:
        ValueError: the name or the device is unknown, `model` is something else, or `dtype` is
            no floating-point type.
    """
    if not isinstance(model, (str, PreTrainedConfig)):
        raise ValueError(f"model is {model!r}: expected a name, or a configuration")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}: expected one of PyTorch's, or meta") from None
    settings = config(model) if isinstance(model, str) else deepcopy(model)
    wanted = settings.dtype if dtype is None else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(f"dtype is {wanted!r}: expected a floating-point one of torch's")
    # Imports the architecture's module. Under the device below, the constants of whatever is
    # imported for the first time would be made there, and stay: 512 B on a real card.
    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    with torch.device(device):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=wanted)
    return made.eval()


# Checkpoints

_INDEX = "model.safetensors.index.json"
_SHARD = 512 * MB
# What safetensors calls the dtypes of published checkpoints.
_STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Planned = Mapping[str, torch.Tensor]  # the parameters by name, without storage


def checkpoint(name: str, weights: str = "random") -> Path:
    """A folder that ``from_pretrained`` takes: a model's configuration and safetensors.

    Random weights are made once, at full size, in the published dtype, the same
    ones on every machine, and kept in the cache folder (see
    `helpers.environment.cache_folder`). What a model takes does not depend on its
    weights' values.

    Args:
        name: as in ``every_byte/data/models.toml``.
        weights: "random", or "hub" for the published ones, downloaded once by
            huggingface_hub into its own cache. Only configurations and
            safetensors are fetched: no code, no pickle.

    Raises:
        ValueError: an unknown name, or kind of weights.
        OSError: too little disk space; or the hub cannot be reached, or does not give it.
        MemoryError: too little free memory.
    """
    settings = config(name)
    if weights == "hub":
        return _from_hub(name)
    if weights != "random":
        raise ValueError(f"weights is {weights!r}: expected 'random' or 'hub'")
    folder = cache_folder("checkpoints") / name
    with untracked():
        planned: Planned = dict(build(settings, "meta").named_parameters())  # tied ones once
    if not _is_whole(folder, planned):
        _make(folder, settings, planned)
    return folder


def _is_whole(folder: Path, planned: Planned) -> bool:
    """Whether index, configuration and shards are there, each shard as long as it says."""
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
        shards: dict[str, str] = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
        stored: dict[str, tuple[str, list[int]]] = {}
        for shard in set(shards.values()):
            # Opening reads the header alone, and refuses a file that is not as long as that says.
            with safe_open(folder / shard, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    stored[name] = tensor.get_dtype(), tensor.get_shape()
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return shards.keys() == planned.keys() and all(
        stored.get(name) == (_STORED_DTYPES.get(parameter.dtype), list(parameter.shape))
        for name, parameter in planned.items()
    )


def _make(folder: Path, settings: PreTrainedConfig, planned: Planned) -> None:
    """Write a checkpoint of random weights beside its place, then move it there."""
    size = sum(parameter.nbytes for parameter in planned.values())
    split = split_torch_state_dict_into_shards(dict(planned), max_shard_size=_SHARD)
    shards = split.filename_to_tensors
    largest = max(sum(planned[n].nbytes for n in names) for names in shards.values())
    remove_left_over(folder)
    free, memory = shutil.disk_usage(folder.parent).free, psutil.virtual_memory().available
    if free < size + 100 * MB:
        raise OSError(
            f"{folder.name} needs {size / GB:.1f} GB in {folder.parent}, and {free / GB:.1f} GB "
            "are free: make room, or set EVERY_BYTE_CACHE to a folder with more"
        )
    if memory < 2 * largest:  # the shard, and its copy on the way to the file
        raise MemoryError(
            f"making {folder.name} needs {2 * largest / GB:.1f} GB of memory, and "
            f"{memory / GB:.1f} GB are free: close other programs"
        )
    deviation = settings.initializer_range
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"making {folder.name}", leave=False)
    try:
        with folder_beside(folder) as beside:
            made = beside / folder.name
            made.mkdir()
            with bar:
                for file, names in shards.items():
                    tensors = {}
                    for name in names:
                        tensors[name] = _random(name, planned[name], deviation)
                        bar.update(planned[name].nbytes)
                    save_file(tensors, made / file, {"format": "pt"})
            settings.save_pretrained(made)
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (made / _INDEX).write_text(json.dumps(index, indent=1), "utf-8")
            if not _is_whole(folder, planned):  # else another process was faster
                swap(made, folder, beside / "damaged")
    except SafetensorError as error:
        raise OSError(
            f"{folder.name} could not be written to {folder.parent} ({error}): make room, or set "
            "EVERY_BYTE_CACHE to another folder"
        ) from None


def _random(name: str, like: torch.Tensor, deviation: float) -> torch.Tensor:
    """Weights as a new model has them: matrices random, biases 0, norms 1."""
    made = torch.empty(like.shape, dtype=like.dtype)
    if made.dim() > 1:  # seeded by name: the same in whatever order they are made
        seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return made.normal_(0, deviation, generator=seeded)
    return made.fill_(name.endswith("weight"))


def _from_hub(name: str) -> Path:
    source = known_models()[name]["source"].removeprefix("https://huggingface.co/")
    wanted = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(hub_download(source, allow_patterns=wanted))
    except hub.GatedRepoError:
        reason = "is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    except hub.RepositoryNotFoundError:
        reason = "is not there, or is private: log in with `hf auth login` if it is yours"
    except hub.LocalEntryNotFoundError:
        reason = (
            "is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it"
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            else "cannot be reached: see to the network, or take weights='random'"
        )
    except (hub.HfHubHTTPError, OSError) as error:
        reason = f"could not be fetched ({str(error).strip().splitlines()[0]})"
    raise OSError(f"{source} on the hub {reason}") from None


# Loading

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
PRECISIONS = (*DTYPES, *_QUANTISED)


def load(
    name: str,
    precision: str,
    path: str = "device_map",
    weights: str = "random",
    dtype: torch.dtype | str = torch.float16,
) -> Any:
    """Load a model at full size with ``from_pretrained``, onto the GPU in use.

    With CUDA it is on the card. Without, it is on the host, where it computes, and
    its bytes are on the virtual GPU, by the way they go on CUDA, until the
    model is deleted; what is done to the model on the host is not followed.

    Args:
        name: as in ``every_byte/data/models.toml``.
        precision: one of `PRECISIONS`; int8 is LLM.int8(), the 4-bit ones are bitsandbytes'.
        path: "device_map", straight to the card, or "to", to the host and then
            by ``.to(device)``.
        weights: of the `checkpoint`.
        dtype: where `precision` quantises, of all that stays unquantised; "auto": the
            checkpoint's.

    Raises:
        ValueError: an unknown name, precision or path, or one that the precision does not have.
        OSError, MemoryError: see `checkpoint`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if path not in ("device_map", "to"):
        raise ValueError(f"path is {path!r}: expected 'device_map' or 'to'")
    wanted = DTYPES.get(precision, dtype)
    options: dict[str, Any] = {"dtype": wanted, "use_safetensors": True, "local_files_only": True}
    if precision in _QUANTISED:
        if path == "to":
            raise ValueError(
                f"path is 'to' for {precision}: expected 'device_map', since bitsandbytes "
                "quantises on the way to the card"
            )
        options["quantization_config"] = BitsAndBytesConfig(**_QUANTISED[precision])
    folder = checkpoint(name, weights)
    gpu = open_gpu()
    if isinstance(gpu, VirtualGPU):
        with untracked():  # transformers begins with a model on the meta device
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, device_map={"": "cpu"}, **options
            )
        twins = (
            replay_to(model, gpu) if path == "to" else replay_device_map(model, gpu, model.dtype)
        )
        model.on_the_virtual_gpu = twins  # they live as long as it does
        return model
    if path == "to":
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        return model.to(gpu.device)
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": gpu.device}, **options)


def main(arguments: list[str] | None = None) -> int:
    """The command line: makes or fetches checkpoints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.models",
        description="Make checkpoints of random weights in the cache folder, at full size, or "
        "fetch the published ones, and print where they are.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="a model of the book's data file")
    parser.add_argument("--weights", choices=("random", "hub"), default="random")
    asked = parser.parse_args(arguments)
    for name in asked.names:
        try:
            print(checkpoint(name, asked.weights))
        except (ValueError, OSError, MemoryError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
