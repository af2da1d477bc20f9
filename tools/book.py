"""Build the book's HTML from the notebooks' stored outputs, with warnings as errors.

A book that is up to date is not built again: it holds a digest of all that it was made of, and of
itself.
"""

import argparse
import contextlib
import hashlib
import io
import platform
import sys
from importlib import metadata
from pathlib import Path

from every_byte.files import folder_beside, swap
from tools.repository import ROOT, address

# What pages, figures and extensions are made of, or read while the book is built.
INPUTS = [
    *("_config.yml", "_toc.yml", "requirements.lock", "pyproject.toml", "book", "notebooks"),
    *("every_byte", "helpers", "tools", "benchmarks", "tests/data"),
]
STAMP = ".made-of"  # in the book's folder


def digest(folder: Path, names: list[str]) -> str:
    """SHA-256 over the names and contents of files, and of all that lie in folders."""
    total = hashlib.sha256()
    for name in names:
        place = folder / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and path.name != STAMP and "__pycache__" not in path.parts:
                content = path.read_bytes()
                total.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
                total.update(content)
    return total.hexdigest()


def stamp(html: Path) -> str:
    """What tells whether a built book is still what a build would give now."""
    libraries = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
    around = repr((platform.python_version(), libraries, address(ROOT)))
    known = hashlib.sha256(around.encode()).hexdigest()
    return "\n".join((digest(ROOT, INPUTS), known, digest(html, ["."]), ""))


def is_up_to_date(output: Path) -> bool:
    """Whether `output` holds a book that a build would make again as it is."""
    html = output / "_build" / "html"
    left = html / STAMP
    return left.is_file() and left.read_text("utf-8") == stamp(html)


def build(output: Path) -> Path:
    """Build into `output`/_build/html and return the start page.

    It is built in a folder beside, which then takes the place of the earlier book: that stays
    whole until then, and whatever happens. Of two that are built at once the later one stays.

    Raises:
        OSError: `output` is no folder, or cannot be written.
        RuntimeError: the build failed; the message is what Sphinx said.
    """
    from jupyter_book.cli.main import main as jupyter_book  # takes seconds

    target = output / "_build"
    said = io.StringIO()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with folder_beside(target / "html") as beside:
            command = ["build", str(ROOT), "--path-output", str(beside), "-W", "-n", "--keep-going"]
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    jupyter_book(command, standalone_mode=False)
            except (Exception, SystemExit) as error:
                raise RuntimeError(said.getvalue()) from error
            made = beside / "_build" / "html"
            (made / STAMP).write_text(stamp(made), "utf-8")
            swap(made, target / "html", beside / "old")
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror}): name another folder with --output"
        ) from None
    return target / "html" / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make book", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder to make _build/html in")
    parser.add_argument("--force", action="store_true", help="build it even if nothing changed")
    options = parser.parse_args(arguments)
    output: Path = options.output.resolve()
    if not options.force and is_up_to_date(output):
        print(f"The book is up to date; its start page: {output / '_build/html/index.html'}")
        return 0
    try:
        start = build(output)
    except OSError as error:
        print(f"The book was not built: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"{error}\nThe book was not built: see the warnings above.", file=sys.stderr)
        return 1
    print(f"The book's start page: {start}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
