"""Which errors say that a script needs a real GPU: its compiled kernels run on no other."""

import re
import traceback
from pathlib import Path

from every_byte.virtual.values import is_library

_PACKAGE = Path(__file__).parents[1]
_SDPA = 'take attn_implementation="sdpa", whose kernels are replayed'
_PLAIN = "take the plain PyTorch of the same model here"

_EXTENSIONS = {
    "flash_attn": _SDPA,
    "flash_attn_interface": _SDPA,
    "flash_attn_3": _SDPA,
    "xformers": "take torch.nn.functional.scaled_dot_product_attention, which is replayed",
    "triton": "take the plain PyTorch that the kernel stands for here",
    "apex": "take torch.optim and torch.nn's own, such as AdamW(fused=True)",
    "deepspeed": "take fully_shard",
    "transformer_engine": _PLAIN,
    "mamba_ssm": _PLAIN,
    "causal_conv1d": _PLAIN,
    "fla": _PLAIN,
    "vllm": "its engine runs no Python step by step; `every-byte estimate` answers for serving",
    "tensorrt": _PLAIN,
    "cupy": _PLAIN,
    "pycuda": _PLAIN,
}
"""Packages of kernels, and what to do without."""

_MESSAGES = (
    (r"flash[ _-]?attn|flash ?attention[ _-]?[23]", "flash_attn"),
    (r"active drivers|triton|cannot be accessed from Triton|libcuda\.so cannot", "triton"),
)

_NO_META = (  # of an operator with Python's definition, and with C++'s
    r"^([\w:.]+): attempted to run this operator with Meta tensors",
    r"Could not run '([\w:.]+)' with arguments from the 'Meta' backend",
)


def needs_a_gpu(error: BaseException) -> str | None:
    """One line on what a script needs that only a real GPU has; None if that is not the matter.

    By the error, or one that it was raised from.
    """
    seen: BaseException | None = error
    while seen is not None:
        if (package := _package(seen)) is not None:
            return _line(error, package, _EXTENSIONS[package])
        text = str(seen)
        if re.search(r"CUDA_HOME environment variable is not set|nvcc", text):
            return _line(error, "a CUDA extension that it builds", _PLAIN)
        for pattern in _NO_META:
            found = re.search(pattern, text)
            if found and not found[1].startswith(("aten::", "prims::")):
                cure = "give it a meta kernel (torch.library.register_fake)"
                return _line(error, f"the operator {found[1]}", cure)
        seen = seen.__cause__ or seen.__context__
    return None


def is_refused(error: BaseException) -> str | None:
    """One line on what is not replayed, where this package itself refused it; else None."""
    entries = traceback.extract_tb(error.__traceback__)
    own = entries and Path(entries[-1].filename).is_relative_to(_PACKAGE)
    return f"{_where(error)}: {error}" if own and type(error) is NotImplementedError else None


def _package(error: BaseException) -> str | None:
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
        if name in _EXTENSIONS:
            return name
    if isinstance(error, (ImportError, RuntimeError, ValueError, OSError, AssertionError)):
        for pattern, package in _MESSAGES:
            if re.search(pattern, str(error), re.IGNORECASE):
                return package
    return None


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_library(f.filename)]
    frames = [f for f in frames if f.lineno is not None]
    return f"line {frames[-1].lineno} of {frames[-1].filename}" if frames else "the script"


def _line(error: BaseException, what: str, cure: str) -> str:
    return f"{_where(error)} needs {what}, whose kernels run on a real GPU alone: {cure}"
