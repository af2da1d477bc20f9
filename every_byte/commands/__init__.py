"""The subcommands of every-byte, a module each; `every_byte.cli` lists them.

A module has ``add(subparsers)``, which adds its parser and sets ``run`` among its
defaults: a function that is given the parsed arguments, prints, and returns the
exit status. What needs PyTorch is imported there, and not at the top.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DONE, NO, REFUSED = 0, 1, 2  # exit statuses, as every_byte.cli describes them


class Refused(Exception):
    """What is wrong with what was asked for, what is expected, and what to do; one line."""


def subcommand(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    details: str = "",
) -> argparse.ArgumentParser:
    """Add a subcommand, with ``--json``, and return its parser for the other arguments."""
    parser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)
    return parser


def print_json(result: dict[str, Any]) -> None:
    """Print what a subcommand found for other programs."""
    print(json.dumps(result, indent=2))
