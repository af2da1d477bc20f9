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


def paged(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    """FP32 states of small tensors; those of others lie where CUDA moves them to the host."""
    # bitsandbytes/optim/optimizer.py, get_state_buffer: from 100,000 numbers on they are
    # in managed memory, outside of PyTorch's allocator, and give way where it gets short.
    count = math.prod(shape)
    return (4 * count,) * states if count < PAGED else ()


def projected(shape: tuple[int, ...], width: int, states: int) -> tuple[int, ...]:
    """States of a gradient in `APOLLO_RANK` rows or columns, and the matrix that makes it."""
    # PyPI's apollo-torch 1.0.3, apollo.py and random_projector.py: the longer side stays.
    return (width * APOLLO_RANK * max(shape),) * states + (width * APOLLO_RANK * min(shape),)


PAGED = 100_000
APOLLO_RANK = 128  # transformers 5.23, trainer_optimizer.py, of ``apollo_adamw``


# What a step takes for the moment for one matrix, in bytes.


def orthogonalised(shape: tuple[int, ...], width: int) -> int:
    """Muon's: the update, its BF16 form before and after a product, and two of its rows."""
    # torch/optim/_muon.py (torch 2.14), _zeropower_via_newtonschulz.
    count, rows = math.prod(shape), min(shape)
    return (width + 4) * count + 4 * rows * rows


def scaled(shape: tuple[int, ...], width: int) -> int:
    """APOLLO's: the gradient before, the scaled one, and the limited one; a bound."""
    return 3 * width * math.prod(shape)


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
        rest: the optimizer of what is no matrix of a layer, if it is another one.
        matrix: what a step takes for the moment for one matrix, where `rest` is there.
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
    rest: str = ""
    matrix: Callable[[tuple[int, ...], int], int] | None = None


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
    "paged adamw": Optimizer(
        "paged AdamW",
        "of tensors under 100,000 numbers two in FP32; the others' are moved to the host "
        "where memory gets short",
        2,
        paged,
        dtype="fp32",
    ),
    "muon": Optimizer(
        "Muon, AdamW for the rest",
        "of the layers' matrices one number for each parameter, of the rest two",
        1,
        rest="adamw",
        matrix=orthogonalised,
    ),
    "apollo": Optimizer(
        "APOLLO, rank 128",
        "of the layers' matrices two numbers for each of 128 rows of the longer side, and the "
        "matrix that makes them; of the rest AdamW's two",
        2,
        projected,
        rest="adamw",
        matrix=scaled,
    ),
}
"""All optimizers that are counted, by the names of a `Setup`. What a step takes for the
moment: ``torch/optim/adam.py``, ``rmsprop.py``, ``_adafactor.py`` (torch 2.11); those of
bitsandbytes change a parameter in one kernel. Muon's are replayed; APOLLO's are a bound."""

IMPLEMENTATIONS = ("foreach", "fused", "for-loop")
"""How PyTorch's optimizers make a step: ``foreach`` is its default on a GPU,
``fused`` the default of transformers' Trainer (``adamw_torch_fused``)."""


def step_temporaries(
    matrices: Counter[tuple[int, ...]],
    others: Counter[tuple[int, ...]],
    optimizer: str,
    dtype: str,
    how: str,
    following: int = 0,
) -> int:
    """Bytes that an optimizer's step takes for the moment, its states in `dtype`.

    Adafactor's, parameter by parameter, still has that of the one before: `following`
    are the numbers of the parameter that follows the embedding.
    """
    known, width = OPTIMIZERS[optimizer], int(bytes_per_parameter(dtype))
    if known.matrix is not None:
        largest = max((known.matrix(shape, width) for shape in matrices), default=0)
        one_by_one = "for-loop" if known.matrix is scaled else how
        rest = step_temporaries(Counter(), others, known.rest, dtype, one_by_one)
        if known.matrix is scaled:  # what the matrix before has left
            rest += largest // 3
        return max(largest, rest)
    trained = matrices + others
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
    (``step``) do not count. Muon and APOLLO get all matrices, AdamW the rest.
    Sources: ``torch/optim``, ``bitsandbytes/optim``.

    Raises:
        ValueError: an unknown optimizer or dtype.
    """
    counts = Counter(tensors)
    matrices = Counter[tuple[int, ...]](
        {shape: n for shape, n in counts.items() if len(shape) == 2}
    )
    return total_bytes(stored_states(matrices, counts - matrices, optimizer, dtype))


def stored_states(
    matrices: Counter[tuple[int, ...]],
    others: Counter[tuple[int, ...]],
    optimizer: str,
    dtype: str,
) -> Counter[int]:
    """Bytes of a tensor of states: how many there are, for shapes and how many of each.

    Args:
        matrices: those of layers.
        others: all else that is trained.
        optimizer: one of `OPTIMIZERS`.
        dtype: of the states.
    """
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    known = OPTIMIZERS[optimizer]
    if known.rest:
        tensors = stored_states(Counter(), others, known.rest, dtype)
        parameters = matrices
    else:
        tensors, parameters = Counter({4 * 256: known.tables}), matrices + others
    width = int(bytes_per_parameter(dtype))
    for shape, count in parameters.items():
        for nbytes in known.store(shape, width, known.states):
            tensors[nbytes] += count
    return tensors
