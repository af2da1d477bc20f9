"""What a notebook says and asks of the machine: versions, number formats, a folder, a package."""

import platform
import re
from importlib import metadata

from every_byte.environment import cache_folder, formats, package, requirements

__all__ = ["cache_folder", "formats", "require", "versions"]


def versions(*packages: str) -> str:
    """Python's version and those of the named packages, as one line."""
    found = [f"Python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def require(name: str) -> None:
    """Check that a package is installed, in a version that requirements.txt asks for.

    Raises:
        ImportError: it is not; the message says what to do.
    """
    try:
        lines = [line for line in requirements() if re.findall(r"^[\w.-]+", line) == [name]]
    except OSError:  # nothing says which version
        return
    for check in map(package, lines):
        if check is not None and not check.ok:
            raise ImportError(f"{check.name}: {check.found}; {check.cure}")
