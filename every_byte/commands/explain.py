"""``every-byte explain``: an out-of-memory message taken apart, judged, and answered."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.explain import NAMES, Cure, Explanation, explain
from every_byte.units import binary


def add(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "explain",
        run,
        "say what an out-of-memory message means, and what to do",
        "By the message's own figures. Messages of PyTorch (CUDA, ROCm, XPU, MPS), of drivers and "
        "their libraries, and of JAX are known. Exit status: 0 a message was found, 1 none was.",
    )
    parser.add_argument(
        "message", nargs="*", help="the message, or - or nothing to read standard input"
    )
    parser.add_argument("--file", type=Path, help="a log that has it; the last one counts")


def run(options: argparse.Namespace) -> int:
    """Print the explanation; returns the exit status."""
    if options.file is not None and options.message:
        raise Refused("--file and a message: expected one of them")
    if options.file is not None:
        try:
            text = options.file.read_text("utf-8", errors="replace")
        except OSError as error:
            raise Refused(
                f"--file is {str(options.file)!r}: {error.strerror}; name a log that can be read"
            ) from None
    elif options.message and options.message != ["-"]:
        text = " ".join(options.message)
    else:
        text = sys.stdin.read()
    found = explain(text)
    if options.json:
        print_json(asdict(found))
    else:
        print(shown(found))
    return NO if found.message is None else DONE


def shown(found: Explanation) -> str:
    """The explanation as text; nothing of the message but its figures is in it."""
    lines = [f"Verdict: {found.verdict}", f"Because: {found.because}"]
    if found.assumed:
        lines.append(f"Assumed: {found.assumed}")
    if found.message is not None:
        sizes = [
            f"  {name:<18}{binary(nbytes):>12}"
            for field, name in NAMES.items()
            if (nbytes := getattr(found.message, field)) is not None
        ]
        sizes += [f"  {'another process':<18}{binary(n):>12}" for n in found.message.others]
        lines += [f"The message ({found.message.backend}):", *sizes] if sizes else []
    lines += ["What to do:"] if found.cures else []
    lines += [
        f"  {number}. {cure.do}\n     {cure.why}\n     Proof: {proof(cure)}"
        for number, cure in enumerate(found.cures, 1)
    ]
    return "\n".join(lines)


def proof(cure: Cure) -> str:
    """Where the book proves a cure, as part of its address."""
    return f"notebooks/{cure.chapter}.html" + (f"#{cure.section}" if cure.section else "")
