"""``every-byte record``: what a GPU measures, beside what the virtual one replays."""

import argparse
import subprocess
import sys
from importlib.util import find_spec

from every_byte.commands import Refused, Subparsers

MODULE = "helpers.record"
"""Where the experiments are: in the book's folder, which stands on this package."""


def add(subparsers: Subparsers) -> None:
    """Add the subcommand. Its arguments are the module's own, and so is its help."""
    parser = subparsers.add_parser(
        "record",
        help="measure the book's experiments on your GPU; --all: models and operations too",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Hand the arguments on, in a process of its own: the card must be empty."""
    if find_spec(MODULE.partition(".")[0]) is None or find_spec(MODULE) is None:
        raise Refused(
            "the experiments are not here: expected a checkout of the book; run it there, as "
            f"python -m {MODULE}"
        )
    command = [sys.executable, "-m", MODULE, *options.arguments]
    return subprocess.run(command, check=False).returncode
