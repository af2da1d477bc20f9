"""What this machine and this installation are: ``python -m helpers.environment`` checks it.

One line for each requirement, [OK] or [FAIL], the latter with what to do. Nothing
but Python is needed to say so.
"""

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from every_byte.units import GiB, MiB, binary


def versions(*packages: str) -> str:
    """Python's version and those of the named packages, as one line."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def cache_folder(*below: str) -> Path:
    """A folder for what can be made again: made if missing.

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
    except OSError as error:
        raise OSError(
            f"the cache folder {folder} cannot be made ({error.strerror}): "
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
    """Check the machine and the installation, the quick things first."""
    yield _python()
    try:
        requirements = _requirements()
    except OSError as error:
        yield Check("requirements", False, str(error), "reinstall the book")
        requirements = []
    for requirement in requirements:
        check = _package(requirement)
        if check is not None:
            yield check
    yield _memory()
    yield from _cache_and_disk()
    yield from _cuda()


def _python() -> Check:
    found = platform.python_version()
    enough = tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11)
    return Check("Python", enough, f"{found} (>=3.11)", "install Python 3.11 or newer")


def _requirements() -> list[str]:
    """The lines of requirements.txt in a checkout; else what the installed package asks for."""
    root = Path(__file__).parent.parent
    if (root / "pyproject.toml").is_file():
        lines = (root / "requirements.txt").read_text("utf-8").splitlines()
        return [text for line in lines if (text := line.partition("#")[0].strip())]
    try:
        return metadata.requires("every-byte") or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError("neither requirements.txt nor the package is installed") from None


_NAME = re.compile(r"^[\w.-]+")


def _package(line: str) -> Check | None:
    """One requirement against what is installed; None where it is for other machines."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # which has a line of its own
        name, wanted = _NAME.findall(line)[0], _NAME.sub("", line, count=1)
        requirement = None
    else:
        requirement = Requirement(line)
        name, wanted = requirement.name, str(requirement.specifier)
        if requirement.marker is not None and not requirement.marker.evaluate():
            return None
    cure = _pip(name + wanted)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, f"not installed ({wanted})", cure)
    if requirement is None:
        return Check(name, True, f"{found}, not compared with {wanted}")
    try:
        ok = requirement.specifier.contains(found, prereleases=True)
    except (TypeError, ValueError):  # its metadata is damaged
        ok = False
    return Check(name, ok, f"{found} ({wanted})", cure)


def require(package: str) -> None:
    """Check that a package is installed, in a version that requirements.txt asks for.

    Raises:
        ImportError: it is not; the message says what to do.
    """
    try:
        lines = [line for line in _requirements() if _NAME.findall(line) == [package]]
    except OSError:  # nothing says which version
        return
    for check in map(_package, lines):
        if check is not None and not check.ok:
            raise ImportError(f"{check.name}: {check.found}; {check.cure}")


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


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0 if every requirement is met, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.environment",
        description="Check Python, packages, memory, disk and the GPU, and say which number "
        "formats the machine computes in. Exit status: 0 all is well, 1 something is not. "
        "No CUDA device is well: the virtual GPU takes its place.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    done: list[Check] = []
    for check in checks():
        done.append(check)
        if not options.json:
            print(check, flush=True)
    failed = [check for check in done if not check.ok]
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(c) for c in done]}, indent=2))
    else:
        print("All is well." if not failed else f"{len(failed)} of {len(done)} need attention.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
