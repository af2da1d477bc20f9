"""What this machine and this installation are: ``every-byte check`` checks it.

One line for each requirement, [OK] or [FAIL], the latter with what to do. Nothing
but Python is needed to say so.
"""

import errno
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from every_byte.units import GiB, MiB, binary


def cache_folder(*below: str) -> Path:
    """A folder for what can be made again, which can be written: made if missing.

    ``EVERY_BYTE_CACHE`` if set, else the user's cache folder; `below` names
    folders inside of it.

    Raises:
        OSError: it cannot be made; the message says what to set.
    """
    import platformdirs

    chosen = os.environ.get("EVERY_BYTE_CACHE")
    folder = (Path(chosen) if chosen else platformdirs.user_cache_path("every-byte")).joinpath(
        *below
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
    except OSError as error:
        raise OSError(
            f"the cache folder {folder} cannot be written ({error.strerror}): "
            "set EVERY_BYTE_CACHE to a folder that can be written"
        ) from None
    return folder


# Number formats that tensor cores multiply, by compute capability: table "Input Data
# Types Supported by Tensor Core Acceleration" of the CUDA Programming Guide 13; 7.0 from
# the Volta tuning guide. Before 7.0 there are no tensor cores.
TENSOR_CORES = {
    (7, 0): "FP16",
    (7, 5): "FP16, INT8, INT4",
    (8, 0): "FP64, TF32, BF16, FP16, INT8, INT4",
    (8, 6): "TF32, BF16, FP16, INT8, INT4",
    (8, 7): "TF32, BF16, FP16, INT8, INT4",
    (8, 9): "TF32, BF16, FP16, FP8, INT8, INT4",
    (9, 0): "FP64, TF32, BF16, FP16, FP8, INT8",
    (10, 0): "FP64, TF32, BF16, FP16, FP8, FP6, FP4, INT8",
    (10, 3): "TF32, BF16, FP16, FP8, FP6, FP4, INT8",
    (11, 0): "TF32, BF16, FP16, FP8, FP6, FP4, INT8",
    (12, 0): "TF32, BF16, FP16, FP8, FP6, FP4, INT8",
    (12, 1): "TF32, BF16, FP16, FP8, FP6, FP4, INT8",
}

_DTYPES = {
    "FP64": "float64",
    "FP32": "float32",
    "BF16": "bfloat16",
    "FP16": "float16",
    "FP8 E4M3": "float8_e4m3fn",
    "FP8 E5M2": "float8_e5m2",
    "FP4 E2M1": "float4_e2m1fn_x2",
    "INT8": "int8",
}
_CPU_INSTRUCTIONS = (
    *("avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_fp16", "amx_int8"),
    *("bf16", "fp16_arith", "i8mm"),  # Arm
)


def formats() -> str:
    """The number formats that this PyTorch stores, and those its devices compute with.

    A line each for PyTorch, the CPU and the GPU. That PyTorch has a type says nothing
    about speed: where a device has no units for it, it is converted on the way.
    """
    import torch

    held = [name for name, dtype in _DTYPES.items() if hasattr(torch, dtype)]
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in torch 2.8
    found = capabilities() if capabilities else {}
    low = [name for name in _CPU_INSTRUCTIONS if found.get(name)]
    return "\n".join(
        [
            f"PyTorch has: {', '.join(held)}",
            f"CPU: {torch.backends.cpu.get_cpu_capability()}, "
            f"low-precision instructions: {', '.join(low) or 'none known'}",
            f"GPU: {_gpu_formats()}",
        ]
    )


def _gpu_formats() -> str:
    import torch

    if torch.cuda.is_available():
        native = {
            "BF16": torch.cuda.is_bf16_supported(including_emulation=False),
            "TF32": torch.cuda.is_tf32_supported(),
        }
        says = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in native.items())
        if torch.version.hip:
            return f"{torch.cuda.get_device_properties(0).gcnArchName}; in hardware: {says}"
        capability = torch.cuda.get_device_capability()
        units = TENSOR_CORES.get(capability, "not known" if capability > (7, 0) else "none")
        return f"in hardware: {says}; tensor cores for: {units}"
    if torch.backends.mps.is_available():
        return "Apple's, by MPS: FP32, FP16, BF16; no FP64"
    return "no CUDA device"


@dataclass(frozen=True, slots=True)
class Check:
    """One requirement: whether it is met, what was found, what to do where it is not."""

    name: str
    ok: bool
    found: str
    cure: str = ""

    def __str__(self) -> str:
        mark = "[OK]  " if self.ok else "[FAIL]"
        return f"{mark} {self.name}: {self.found}" + (f"; {self.cure}" if not self.ok else "")


# Below these a notebook of the book cannot count on running through.
FREE_MEMORY, FREE_DISK = 2 * GiB, 2 * GiB


def checks() -> Iterator[Check]:
    """Check the machine and the installation, the quick things first.

    Of the book's checkout all that its requirements.txt asks for, and what the
    notebooks want of memory and disk; otherwise what the installed package asks for.
    """
    yield _python()
    try:
        lines = requirements()
    except OSError as error:
        yield Check("requirements", False, str(error), _pip("every-byte"))
        lines = []
    yield from filter(None, map(package, lines))
    if CHECKOUT is not None:
        yield _memory()
        yield from _cache_and_disk()
    yield from _cuda()


def _python() -> Check:
    found = platform.python_version()
    enough = tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11)
    return Check("Python", enough, f"{found} (>=3.11)", "install Python 3.11 or newer")


def _checkout() -> Path | None:
    root = Path(__file__).parent.parent
    return root if (root / "_toc.yml").is_file() and (root / "requirements.txt").is_file() else None


CHECKOUT = _checkout()
"""The book's folder, where this is part of it."""


def requirements() -> list[str]:
    """What a checkout's requirements.txt asks for; else what the installed package does.

    Raises:
        OSError: there is neither.
    """
    if CHECKOUT is not None:
        return list(_lines(CHECKOUT / "requirements.txt"))
    try:
        return metadata.requires("every-byte") or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError("the package every-byte is not installed") from None


def _lines(path: Path) -> Iterator[str]:
    """The requirements of a file, and of those that it names by ``-r``."""
    for line in path.read_text("utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            yield from _lines(path.parent / text.removeprefix("-r "))
        elif text:
            yield text


_NAME = re.compile(r"^[\w.-]+")
_EXTRA = re.compile(r"""extra == ["']([\w.-]+)""")


def package(line: str) -> Check | None:
    """One requirement, such as ``torch>=2.8``, against what is installed.

    None where it is for other machines, or for an extra and not installed.
    """
    line, _, condition = line.partition(";")
    extra = _EXTRA.search(condition)
    name, wanted = _NAME.findall(line)[0], _NAME.sub("", line, count=1).strip()
    cure = _pip(name + wanted)
    try:
        from packaging.markers import Marker
        from packaging.requirements import Requirement
    except ImportError:
        requirement = None
    else:
        requirement = Requirement(line)
        wanted = str(requirement.specifier)
        known = {"extra": extra[1] if extra else ""}
        if condition and not Marker(condition).evaluate(known):
            return None
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None if extra else Check(name, False, f"not installed ({wanted})", cure)
    if requirement is None:
        return Check(name, True, f"{found}, not compared with {wanted}")
    try:
        ok = requirement.specifier.contains(found, prereleases=True)
    except (TypeError, ValueError):  # its metadata is damaged
        ok = False
    return Check(name, ok, f"{found} ({wanted})", cure)


def _pip(requirement: str) -> str:
    return f'python -m pip install --upgrade "{requirement}"'


def _memory() -> Check:
    try:
        import psutil

        memory = psutil.virtual_memory()
    except (ImportError, OSError) as error:
        return Check("memory", False, f"not known: {error}", _pip("psutil"))
    found = f"{binary(memory.available)} of {binary(memory.total)} free"
    cure = f"end other programs: the notebooks want {binary(FREE_MEMORY)}"
    return Check("memory", memory.available >= FREE_MEMORY, found, cure)


def _cache_and_disk() -> Iterator[Check]:
    other = "set EVERY_BYTE_CACHE to a folder that can be written"
    try:
        folder = cache_folder()
    except ImportError as error:
        yield Check("cache folder", False, f"not known: {error}", _pip("platformdirs"))
        return
    except OSError as error:
        found = str(error).removeprefix("the cache folder ").removesuffix(f": {other}")
        yield Check("cache folder", False, found, other)
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Check("cache folder", False, f"{folder}: {error.strerror}", other)
        return
    yield Check("cache folder", True, f"{folder} can be written")
    cure = f"make room, or {other}: the notebooks want {binary(FREE_DISK)}"
    yield Check("disk", free >= FREE_DISK, f"{binary(free)} free", cure)


def _cuda() -> Iterator[Check]:
    """PyTorch, the card if there is one, and the number formats of both."""
    try:
        import torch
    except Exception as error:  # whatever stands in the way of its libraries
        said = str(error).strip().splitlines() or [type(error).__name__]
        yield Check("import torch", False, said[-1], _pip("torch"))
        return
    with warnings.catch_warnings(record=True) as said_by_driver:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        computes_with = formats().splitlines()
    if available:
        yield from _card()
    elif said_by_driver:
        said = str(said_by_driver[0].message).strip().splitlines()
        yield Check("CUDA", False, said[0], "update the driver, or install a CPU build of PyTorch")
    else:
        yield Check("CUDA", True, "no device; figures are replayed on the virtual GPU")
    for line in computes_with:
        device, _, has = line.partition(": ")
        yield Check(f"formats, {device.removesuffix(' has')}", True, has)


def _card() -> Iterator[Check]:
    import torch

    yield Check("CUDA", True, f"{torch.version.cuda or torch.version.hip}, as PyTorch brings it")
    card = torch.cuda.get_device_properties(0)
    try:
        free, total = torch.cuda.mem_get_info(0)
    except RuntimeError as error:  # held by others to the last byte
        said = str(error).strip().splitlines()[0]
        yield Check("card", False, f"{card.name}: {said}", "end what else uses the card")
        return
    yield Check(
        "card",
        free >= 512 * MiB,
        f"{card.name}, {binary(free)} of {binary(total)} free",
        "end what else uses the card: nvidia-smi lists it",
    )
    built_for = [
        int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"
    ]
    has = 10 * card.major + card.minor
    lowest = min(built_for, default=0)
    yield Check(
        "compute capability",
        has >= lowest,
        f"{card.major}.{card.minor}",
        f"this PyTorch was built for {lowest // 10}.{lowest % 10} and newer: install an older one",
    )
