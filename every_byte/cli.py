"""The command every-byte, which ``python -m every_byte`` is as well.

Exit status: 0 it is so (it fits, all is well, the replay agrees), 1 it is not, 2 what was
asked for cannot be done, as one line on standard error says, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from importlib import import_module

from every_byte.commands import NO, REFUSED, Refused

# Modules of every_byte.commands, in the order of the help.
COMMANDS = ("run", "estimate", "explain", "replay", "record", "check")


def parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The arguments of subcommands."""
    made = argparse.ArgumentParser(
        prog="every-byte",
        description="Where GPU memory goes, to the byte.",
        epilog=(__doc__ or "").partition("\n\n")[2],
    )
    subparsers = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        import_module(f"every_byte.commands.{name}").add(subparsers)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Only what is asked for is imported: check is for where things are missing.
    known = [name for name in COMMANDS if arguments[:1] == [name]]
    options = parser(known or COMMANDS).parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except Refused as error:
        print(f"every-byte {options.command}: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # whoever read along has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO
    except KeyboardInterrupt:
        print(f"every-byte {options.command}: interrupted", file=sys.stderr)
        return 130
    return status
