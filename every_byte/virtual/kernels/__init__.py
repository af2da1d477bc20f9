"""Operations that CUDA computes with kernels of its own, for their allocations alone.

`attention` and `recurrent` have what every card does; the others what one card does (`Rules`): they
hold for a virtual GPU that is told which card it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from every_byte.virtual.kernels import (
    activations,
    attention,
    convolution,
    ctc,
    cudnn_attention,
    fused_attention,
    grouped,
    indexing,
    losses,
    normalisation,
    quantised,
    recurrent,
)
from every_byte.virtual.kernels.attention import attention_kernel
from every_byte.virtual.kernels.images import image_temporaries
from every_byte.virtual.kernels.products import by_cublaslt, product_temporaries
from every_byte.virtual.kernels.reductions import reduction_temporaries
from every_byte.virtual.rules import Rules

__all__ = [
    "COMPOSITES",
    "KERNELS",
    "attention_kernel",
    "by_cublaslt",
    "estimate_in",
    "kernel_of",
    "registered",
    "temporaries",
]

COMPOSITES: dict[Any, Callable[..., Any]] = {
    **activations.COMPOSITES,
    **attention.COMPOSITES,
    **recurrent.COMPOSITES,
}
KERNELS: dict[Any, Callable[..., Any]] = {
    **activations.KERNELS,
    **attention.KERNELS,
    **fused_attention.KERNELS,
    **recurrent.KERNELS,
    **ctc.KERNELS,
}
_OF_A_CARD: dict[Any, Callable[..., Any]] = {
    **cudnn_attention.KERNELS,
    **normalisation.KERNELS,
    **indexing.KERNELS,
    **convolution.KERNELS,
}
_OF_A_CARD_COMPOSITES: dict[Any, Callable[..., Any]] = {
    **cudnn_attention.COMPOSITES,
    **normalisation.COMPOSITES,
}
_WITH_RULES = {
    **_OF_A_CARD_COMPOSITES,
    **fused_attention.WITH_RULES,
    **convolution.WITH_RULES,
    **losses.WITH_RULES,
}
_in_force: list[Rules | None] = []  # of the GPUs that are open


def kernel_of(operation: Any, rules: Rules | None) -> Callable[..., Any] | None:
    """What allocates in an operation's place as CUDA's kernel does; None for most."""
    if (function := grouped.WITH_RULES.get(operation)) is not None:
        return partial(function, rules)
    if rules is not None:
        if operation.namespace == "bitsandbytes":
            if (function := quantised.WITH_RULES.get(str(operation))) is not None:
                return partial(function, rules)
            return quantised.KERNELS.get(str(operation))
        if (function := _WITH_RULES.get(operation)) is not None:
            return partial(function, rules)
        if (kernel := _OF_A_CARD.get(operation)) is not None:
            return kernel
    return KERNELS.get(operation)


_ESTIMATES = {
    packet: module.ESTIMATE for module in (convolution, recurrent) for packet in module.OPERATIONS
}


def estimate_in(operation: Any) -> str | None:
    """What of an operation is estimated, in words; None where its allocations are by rule."""
    return _ESTIMATES.get(operation.overloadpacket)


def temporaries(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Rules
) -> list[int]:
    """Bytes that an operation takes after its results and gives back at its end, in order.

    A negative number gives back what was taken last.
    """
    found = reduction_temporaries(operation, args, kwargs, rules)
    if found is None:
        found = product_temporaries(operation, args, rules)
    if found is None:
        found = image_temporaries(operation, args)
    if found is None:
        found = normalisation.temporaries(operation, args, kwargs)
    if found is None:
        found = indexing.temporaries(operation, args, kwargs, rules)
    return found or []


def _composite(operation: Any) -> Callable[..., Any]:
    """A composite operation as the GPU in use makes it."""
    of_a_card, of_all = _OF_A_CARD_COMPOSITES.get(operation), COMPOSITES.get(operation)

    def made(*args: Any, **kwargs: Any) -> Any:
        rules = _in_force[-1] if _in_force else None
        if rules is not None and of_a_card is not None:
            return of_a_card(rules, *args, **kwargs)
        if of_all is not None:
            return of_all(*args, **kwargs)
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        return operation._op_dk(key, *args, **kwargs)

    return made


@contextmanager
def registered(rules: Rules | None = None) -> Iterator[None]:
    """Let composite operations on ``meta`` tensors be made as on CUDA.

    Autograd then finds the kernels' own operations, with PyTorch's formulas for
    their gradients. What `KERNELS` allocate is for the one who accounts to ask for.
    Within itself it only changes the rules.
    """
    _in_force.append(rules)
    try:
        if len(_in_force) > 1:
            yield
            return
        with torch.library._scoped_library("aten", "IMPL") as library:
            for operation in {**COMPOSITES, **_OF_A_CARD_COMPOSITES}:
                library.impl(operation, _composite(operation), "AutogradMeta")
            yield
    finally:
        _in_force.pop()
