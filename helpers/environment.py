"""What this machine and this installation are: ``python -m helpers.environment`` prints it."""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path

import platformdirs


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


def main(arguments: list[str] | None = None) -> int:
    """The command line: versions, device and number formats; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.environment",
        description="Print the versions, the device and the number formats of this machine.",
    )
    parser.parse_args(arguments)
    import torch

    print(versions("torch", "torchvision", "transformers", "accelerate", "bitsandbytes"))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        print(f"device: {name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}")
    else:
        print("device: no CUDA device, the book's figures are replayed on the virtual GPU")
    print(formats())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
