"""Transformers of the book's data file, built on a device from their configuration alone.

Nothing is downloaded: dimensions stand in ``helpers/data/models.toml``. Weights
are random, or on PyTorch's ``meta`` device none at all.
"""

import warnings
from copy import deepcopy
from typing import Any

import torch

from helpers.estimate import dimensions, known_models

with warnings.catch_warnings():
    # In a notebook without ipywidgets tqdm complains that its bars will be plain.
    warnings.filterwarnings("ignore", "IProgress not found")
    from transformers import (
        AttentionInterface,
        AutoConfig,
        AutoModelForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
        name: as in ``helpers/data/models.toml``.
        changes: what is to differ, under the configuration's names.

    Raises:
        ValueError: it is not there; the message lists those that are.
    """
    dimensions(name)  # refuses a name that it does not know
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
        ValueError: the name is unknown, or `dtype` is no floating-point type.
    """
    settings = config(model) if isinstance(model, str) else deepcopy(model)
    wanted = settings.dtype if dtype is None else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(f"dtype is {wanted!r}: expected a floating-point one of torch's")
    with torch.device(device):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=wanted)
    return made.eval()
