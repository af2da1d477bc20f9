"""Closed formulas for what a transformer takes: no torch, no model, no GPU.

The front door is `memory`: what one GPU holds, for `Dimensions` of a model and a
`Setup` of what is done with it. `training` and `inference` are short forms of it.
`serve` is the same for many users at a time, as vLLM shares memory out:
`every_byte.estimate.serving` says how to call it.

All results are bytes unless a name says otherwise, before the allocator's
rounding, which `memory` counts apart. Names of dimensions are those of
transformers' configurations.
"""

from every_byte.data import CONTEXT, catalogue, known_models
from every_byte.estimate.architecture import (
    TRAITS,
    Dimensions,
    ParameterShape,
    active_parameters,
    dimensions,
    parameters,
    shapes,
)
from every_byte.estimate.blocks import block
from every_byte.estimate.config import from_config
from every_byte.estimate.forward import (
    ATTENTION,
    activations,
    kv_cache,
    layer_activations,
    logits,
)
from every_byte.estimate.optimizers import IMPLEMENTATIONS, OPTIMIZERS, Optimizer, optimizer_states
from every_byte.estimate.serving import Served, Serving, serve
from every_byte.estimate.setup import (
    CHOICES,
    FLAGS,
    LT_WORKSPACE,
    SHARDING,
    WORKSPACE,
    Memory,
    Setup,
    inference,
    memory,
    shard,
    training,
)
from every_byte.estimate.weights import (
    BYTES,
    QUANTISED,
    bytes_per_parameter,
    lora_parameters,
    parameter_bytes,
)

__all__ = [
    "ATTENTION",
    "BYTES",
    "CHOICES",
    "CONTEXT",
    "FLAGS",
    "IMPLEMENTATIONS",
    "LT_WORKSPACE",
    "OPTIMIZERS",
    "QUANTISED",
    "SHARDING",
    "TRAITS",
    "WORKSPACE",
    "Dimensions",
    "Memory",
    "Optimizer",
    "ParameterShape",
    "Served",
    "Serving",
    "Setup",
    "activations",
    "active_parameters",
    "block",
    "bytes_per_parameter",
    "catalogue",
    "dimensions",
    "from_config",
    "inference",
    "known_models",
    "kv_cache",
    "layer_activations",
    "logits",
    "lora_parameters",
    "memory",
    "optimizer_states",
    "parameter_bytes",
    "parameters",
    "serve",
    "shapes",
    "shard",
    "training",
]
