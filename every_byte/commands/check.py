"""``every-byte check``: Python, the packages, the machine."""

import argparse
from dataclasses import asdict

from every_byte.commands import DONE, NO, Subparsers, print_json, subcommand
from every_byte.environment import Check, checks


def add(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    subcommand(
        subparsers,
        "check",
        run,
        "check Python, the packages and the GPU",
        "One line for each, [OK] or [FAIL], and the number formats that the machine computes "
        "in. In the book's folder also what its notebooks need. No CUDA device is well: the "
        "virtual GPU takes its place.",
    )


def run(options: argparse.Namespace) -> int:
    """Print the checks, each as soon as it is made."""
    done: list[Check] = []
    for check in checks():
        done.append(check)
        if not options.json:
            print(check, flush=True)
    failed = [check for check in done if not check.ok]
    if options.json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in done]})
    else:
        print("All is well." if not failed else f"{len(failed)} of {len(done)} need attention.")
    return NO if failed else DONE
