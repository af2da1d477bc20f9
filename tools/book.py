"""Build the book's HTML from the notebooks' stored outputs, with warnings as errors."""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

from jupyter_book.cli.main import main as jupyter_book

from tools.repository import ROOT


def build(output: Path) -> Path:
    """Build into `output`/_build/html and return the start page.

    Pages of an earlier build are removed: Jupyter Book would leave them.

    Raises:
        RuntimeError: the build failed; the message is what Sphinx said.
    """
    shutil.rmtree(output / "_build", ignore_errors=True)
    command = ["build", str(ROOT), "--path-output", str(output), "-W", "-n", "--keep-going"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            jupyter_book(command, standalone_mode=False)
    except (Exception, SystemExit) as error:
        raise RuntimeError(said.getvalue()) from error
    return output / "_build" / "html" / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make book", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder to make _build/html in")
    options = parser.parse_args(arguments)
    try:
        start = build(options.output.resolve())
    except RuntimeError as error:
        print(f"{error}\nThe book was not built: see the warnings above.", file=sys.stderr)
        return 1
    print(f"The book's start page: {start}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
