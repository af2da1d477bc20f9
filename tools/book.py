"""Build the book's HTML from the notebooks' stored outputs, with warnings as errors."""

import argparse
import contextlib
import io
import sys
from pathlib import Path

from jupyter_book.cli.main import main as jupyter_book

from every_byte.files import folder_beside, swap
from tools.repository import ROOT


def build(output: Path) -> Path:
    """Build into `output`/_build/html and return the start page.

    It is built in a folder beside, which then takes the place of the earlier book: that stays
    whole until then, and whatever happens. Of two that are built at once the later one stays.

    Raises:
        OSError: `output` is no folder, or cannot be written.
        RuntimeError: the build failed; the message is what Sphinx said.
    """
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
            swap(beside / "_build" / "html", target / "html", beside / "old")
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror}): name another folder with --output"
        ) from None
    return target / "html" / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make book", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder to make _build/html in")
    options = parser.parse_args(arguments)
    try:
        start = build(options.output.resolve())
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
