"""What an optimizer remembers of each parameter, in bytes."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from every_byte.estimate.checks import check_choice
from every_byte.estimate.weights import bytes_per_parameter, total_bytes

# Each says what an optimizer stores for a parameter: bytes, tensor by tensor.


def blockwise(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    """States of 8 bits in blocks with an FP32 scale each, as bitsandbytes has them."""
    # bitsandbytes keeps tensors under 4096 numbers in FP32, and larger ones in
    # 8 bits with an FP32 scale for each 256 (bitsandbytes/optim/optimizer.py).
    count = math.prod(shape)
    return ((4 * count,) if count < 4096 else (count, 4 * -(-count // 256))) * states


def factored(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    """Means over rows and columns, as Adafactor has them."""
    # Means over rows and over columns instead of a whole second state
    # (arXiv 1804.04235; torch/optim/_adafactor.py).
    if len(shape) < 2:
        return (width * math.prod(shape),)
    *rest, rows, columns = shape
    return width * math.prod(rest) * rows, width * math.prod(rest) * columns


def whole(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    """As many numbers as the parameter has."""
    return (width * math.prod(shape),) * states


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What is known of an optimizer.

    Attributes:
        label: its name in the page's list.
        remembers: its states in words.
        states: how many it has for a parameter.
        store: their bytes, tensor by tensor.
        tables: of 256 levels in FP32, one for all parameters.
        foreach: whether PyTorch's default, the step over all parameters at once,
            makes a temporary as large as all of them.
        temporaries: as large as a parameter, that a step parameter by parameter makes.
        fused: whether PyTorch has a fused step.
        dtype: of its states where nothing else is asked for; the parameters' if None.
    """

    label: str
    remembers: str
    states: int
    store: Callable[[tuple[int, ...], int, int], tuple[int, ...]] = whole
    tables: int = 0
    foreach: bool = False
    temporaries: int = 0
    fused: bool = False
    dtype: str | None = None


OPTIMIZERS = {
    "sgd": Optimizer("SGD", "SGD without momentum remembers nothing", 0, fused=True),
    "momentum": Optimizer(
        "SGD with momentum", "one number for each trained parameter", 1, fused=True
    ),
    "adam": Optimizer(
        "Adam", "two numbers for each trained parameter", 2, foreach=True, temporaries=2, fused=True
    ),
    "adamw": Optimizer(
        "AdamW",
        "two numbers for each trained parameter",
        2,
        foreach=True,
        temporaries=2,
        fused=True,
    ),
    "rmsprop": Optimizer(
        "RMSprop", "one number for each trained parameter", 1, foreach=True, temporaries=1
    ),
    # bitsandbytes/optim/optimizer.py, init_state: FP32 where states have not 8 bits.
    "lion": Optimizer("Lion", "one FP32 number for each trained parameter", 1, dtype="fp32"),
    "adafactor": Optimizer(
        "Adafactor",
        "of each matrix one number for a row and one for a column",
        1,
        factored,
        foreach=True,
        temporaries=1,
    ),
    "adam 8-bit": Optimizer(
        "8-bit Adam",
        "two bytes for each trained parameter, and an FP32 scale for each 256; "
        "tensors under 4,096 numbers stay in FP32",
        2,
        blockwise,
        2,
    ),
    "lion 8-bit": Optimizer(
        "8-bit Lion",
        "one byte for each trained parameter, and an FP32 scale for each 256; "
        "tensors under 4,096 numbers stay in FP32",
        1,
        blockwise,
        1,
    ),
}
"""All optimizers that are counted, by the names of a `Setup`. What a step takes for the
moment: ``torch/optim/adam.py``, ``rmsprop.py``, ``_adafactor.py`` (torch 2.11); those of
bitsandbytes change a parameter in one kernel."""

IMPLEMENTATIONS = ("foreach", "fused", "for-loop")
"""How PyTorch's optimizers make a step: ``foreach`` is its default on a GPU,
``fused`` the default of transformers' Trainer (``adamw_torch_fused``)."""


def step_temporaries(
    trained: Counter[tuple[int, ...]], optimizer: str, dtype: str, how: str, following: int = 0
) -> int:
    """Bytes that an optimizer's step takes for the moment, its states in `dtype`.

    Adafactor's, parameter by parameter, still has that of the one before: `following`
    are the numbers of the parameter that follows the embedding.
    """
    known, width = OPTIMIZERS[optimizer], int(bytes_per_parameter(dtype))
    if how == "fused" and known.fused:
        return 0
    if how == "for-loop":
        largest = max(map(math.prod, trained), default=0)
        if known.store is factored:
            many = max((math.prod(shape) for shape, n in trained.items() if n > 2), default=0)
            return width * max(largest + min(following, largest), 2 * many)
        return known.temporaries * width * largest
    return known.foreach * width * sum(math.prod(shape) * n for shape, n in trained.items())


def optimizer_states(
    tensors: Iterable[tuple[int, ...]], optimizer: str, dtype: str = "fp32"
) -> int:
    """Bytes that an optimizer remembers on the device for parameters of these shapes.

    States have the parameters' dtype, but for the 8-bit ones. Host counters
    (``step``) do not count. Sources: ``torch/optim``, ``bitsandbytes/optim``.

    Raises:
        ValueError: an unknown optimizer or dtype.
    """
    return total_bytes(stored_states(Counter(tensors), optimizer, dtype))


def stored_states(parameters: Counter[tuple[int, ...]], optimizer: str, dtype: str) -> Counter[int]:
    """Bytes of a tensor of states: how many there are, for shapes and how many of each."""
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    known = OPTIMIZERS[optimizer]
    width, tensors = int(bytes_per_parameter(dtype)), Counter({4 * 256: known.tables})
    for shape, count in parameters.items():
        for nbytes in known.store(shape, width, known.states):
            tensors[nbytes] += count
    return tensors
