"""The address of the book's repository, from one place: for buttons, Colab and metadata.

The first that is set of: the environment's ``REPOSITORY`` (``make book
REPOSITORY=https://...``), ``repository.url`` in ``_config.yml``, the clone's
``origin``. Where none is a web address, there is none, and no button.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent


def web_address(remote: str) -> str | None:
    """The https address of a git remote: ``git@host:a/b.git`` gives ``https://host/a/b``.

    None for what no browser can open, such as a folder, and for what has a character in it
    that could end a string of Python or an attribute of HTML: the address is written into both.
    """
    remote = remote.strip().removesuffix("/").removesuffix(".git")
    ssh = re.fullmatch(r"(?:ssh://)?git@([\w.-]+)[:/](.+)", remote)
    try:
        parts = urlsplit(f"https://{ssh[1]}/{ssh[2]}" if ssh else remote)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:  # no port, or a wrong IPv6 address
        return None
    if parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        return None
    if not _HOST.fullmatch(parts.hostname or "") or not _PATH.fullmatch(parts.path):
        return None
    return f"https://{parts.hostname}{port}{parts.path}"


_HOST = re.compile(r"(?:[a-z0-9-]+\.)+[a-z0-9-]+", re.ASCII)
_PATH = re.compile(r"(?:/[\w.~%+-]+)+", re.ASCII)  # no space, quote, bracket, backslash


def address(root: Path = ROOT) -> str | None:
    """The repository's https address, or None where it has none.

    Raises:
        ValueError: ``REPOSITORY`` is set, and is no web address.
    """
    chosen = os.environ.get("REPOSITORY")
    if chosen:
        found = web_address(chosen)
        if found is None:
            raise ValueError(
                f"REPOSITORY is {chosen!r}: expected a web address "
                "such as https://github.com/someone/every-byte"
            )
        return found
    configured = (_config(root).get("repository") or {}).get("url") or ""
    return web_address(configured) or web_address(_origin(root))


def links(root: Path = ROOT) -> dict[str, str]:
    """The addresses that the distribution's metadata names: those that there are.

    Raises:
        ValueError: ``REPOSITORY`` is set, and is no web address.
    """
    repository = address(root)
    found = {
        "Documentation": (_config(root).get("html") or {}).get("baseurl"),
        "Repository": repository,
        "Issues": repository and f"{repository}/issues",
    }
    return {name: link for name, link in found.items() if link}


def _config(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "_config.yml").read_text("utf-8")) or {}


def _origin(root: Path) -> str:
    command = ["git", "-C", str(root), "config", "--get", "remote.origin.url"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # no git
        return ""
