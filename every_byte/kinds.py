"""What a byte can be for, in one table: the kinds, their colours, and how estimates call them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of memory.

    Attributes:
        name: as figures and tables show it.
        color: in figures. Each at least 3 : 1 against white and against the dark
            theme's background (WCAG 1.4.11), after the palette of Okabe and Ito for
            all kinds of sight.
        field: of `every_byte.estimate.Memory`; empty where estimates do not have it.
        tracked: whether a `every_byte.tracker.Tracker` tells it apart.
    """

    name: str
    color: str
    field: str = ""
    tracked: bool = True


ALL_KINDS = (
    Kind("parameters", "#0072b2", "parameters"),
    Kind("scales", "#6b8e23"),
    Kind("gradients", "#d55e00", "gradients"),
    Kind("optimizer states", "#009070", "optimizer_states"),
    Kind("buffers", "#8a6fc0"),
    Kind("cast weights", "#b264dc", "cast_weights"),
    Kind("batch", "#2a8fc9"),
    Kind("activations", "#a07c00", "activations"),
    Kind("temporaries", "#c2568f"),
    Kind("gathered", "#5b7fe0"),
    Kind("workspaces", "#767676"),
    Kind("rounding", "#8c6d5a", "rounding"),
    Kind("logits", "#c4742f", "logits", tracked=False),
    Kind("KV cache", "#5b86a8", "kv_cache", tracked=False),
    Kind("CUDA context", "#6f7f33", "context", tracked=False),
)

KINDS = tuple(kind.name for kind in ALL_KINDS if kind.tracked)
"""What a byte can be for. Scales: what quantised parameters are read with. Cast
weights: autocast's copies of parameters in its lower precision. Batch: copied from
the host. Activations: made outside of backward and of the optimizer. Temporaries:
made inside of either, and neither gradients of parameters nor optimizer states.
Gathered: FSDP's copies of parameters whose parts other GPUs hold. Workspaces:
cuBLAS's. Rounding: the allocator's, from the bytes asked for to the block handed out."""

COLORS = {kind.name: kind.color for kind in ALL_KINDS}
"""The colour of each kind in figures and on the estimator's page."""

FIELDS = {kind.field: kind.name for kind in ALL_KINDS if kind.field}
"""The fields of `every_byte.estimate.Memory`, by the names of figures."""
