"""What this machine and this installation are."""

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
