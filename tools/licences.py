"""List the licences of all that requirements.lock installs: requirements/licences.csv.

    make lock

A package tells its licence in one of four ways; the first that it has is taken. What this machine
does not install, such as a package for Windows alone, keeps the line that it has.
"""

import csv
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "requirements" / "licences.csv"


def locked() -> list[str]:
    """The names in requirements.lock, each once, in its order."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    return list(dict.fromkeys(re.findall(r"^([\w.-]+)==", text, re.MULTILINE)))


def listed() -> dict[str, str]:
    """The licences by name, as requirements/licences.csv has them."""
    if not LIST.is_file():
        return {}
    with LIST.open(encoding="utf-8", newline="") as file:
        return {row["package"]: row["licence"] for row in csv.DictReader(file)}


def licence(name: str) -> str:
    """What an installed package says of its licence; empty if it says nothing, or is not here."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return ""
    return next(filter(None, _told(package)), "")


def _told(package: metadata.Distribution) -> Iterator[str]:
    def fields(name: str) -> list[str]:
        return package.metadata.get_all(name) or []

    yield from fields("License-Expression")
    classes = [c.split(" :: ")[-1] for c in fields("Classifier") if c.startswith("License :: ")]
    yield " and ".join(c for c in classes if c != "OSI Approved")
    texts = [package.read_text(f"licenses/{file}") or "" for file in fields("License-File")]
    for text in (*fields("License"), *texts):  # the first line, such as "MIT License"
        yield (text.strip().splitlines() or [""])[0]


def main() -> int:
    """Write the list; name what has no licence, and return how many."""
    known = listed()
    rows = [(name, licence(name) or known.get(name, "")) for name in locked()]
    with LIST.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("package", "licence"), *rows])
    missing = [name for name, of in rows if not of]
    for name in missing:
        print(f"{name}: no licence is known; write it into {LIST.name} by hand", file=sys.stderr)
    return min(len(missing), 1)


if __name__ == "__main__":
    sys.exit(main())
