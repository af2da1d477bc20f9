"""``every-byte estimate``: what a model takes on one GPU, by formulas."""

import argparse
import inspect
import re
from dataclasses import fields
from typing import Any, get_type_hints

from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.data import cards
from every_byte.estimate import CHOICES, Memory, Setup, dimensions, known_models, memory
from every_byte.estimate.fit import levers
from every_byte.kinds import FIELDS
from every_byte.units import GB, grouped

SHOWN = 5  # levers, of all that there are


def add(subparsers: Subparsers) -> None:
    """Add the subcommand: an option for each field of `Setup`."""
    parser = subcommand(
        subparsers,
        "estimate",
        run,
        "estimate what a model takes on one GPU, by kind",
        "By closed formulas, without PyTorch: nothing is downloaded, nothing is run. "
        "1 GB is 10^9 B. With --card it exits with 1 where the model does not fit.",
    )
    parser.add_argument("model", help=f"one of {', '.join(known_models())}")
    parser.add_argument("--card", help="a card by name, such as 'RTX 4090': does it fit?")
    kinds, described = get_type_hints(Setup), _attributes(Setup)
    for field in fields(Setup):
        option = f"--{field.name.replace('_', '-')}"
        known = ", ".join(filter(None, CHOICES.get(field.name, ())))
        default = "" if field.default is None else f"default: {field.default}"
        says = described.get(field.name, "").rstrip(".")
        told = "; ".join(filter(None, (says, known, default))).replace("%", "%%")
        if kinds[field.name] is bool:
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=field.default, help=told
            )
        else:
            kind = int if kinds[field.name] is int else str
            parser.add_argument(option, type=kind, default=field.default, help=told)


def _attributes(described: type) -> dict[str, str]:
    """What a class's docstring says of each of its attributes."""
    entries = re.findall(
        r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(described) or "", re.MULTILINE
    )
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}


def run(options: argparse.Namespace) -> int:
    """Print the parts and the peak; with a card, whether it fits and what would help."""
    try:
        sizes = dimensions(options.model)
        setup = Setup(**{field.name: getattr(options, field.name) for field in fields(Setup)})
        found = memory(sizes, setup)
    except ValueError as error:
        raise Refused(error) from None
    card = None if options.card is None else _card(options.card)
    capacity = None if card is None else cards()[card].memory
    fits = None if capacity is None else found.needed <= capacity
    helps = levers(sizes, setup)
    if options.json:
        print_json(
            {
                "model": options.model,
                "setup": {field.name: getattr(setup, field.name) for field in fields(setup)},
                "parts": _parts(found),
                "total": found.total,
                "held": found.held,
                "peak": found.peak,
                "peak_at": found.peak_at,
                "needed": found.needed,
                "card": card,
                "capacity": capacity,
                "fits": fits,
                "levers": [{"name": lever.name, "saved": lever.saved} for lever in helps],
            }
        )
        return NO if fits is False else DONE
    for name, nbytes in _parts(found).items():
        if nbytes:
            print(_line(name.replace("_", " "), nbytes))
    print(_line("held between steps", found.held))
    print(_line(f"peak, {found.peak_at}", found.peak))
    print(_line("a card needs, with CUDA context", found.needed))
    if capacity is not None:
        print(f"\n{card}: {_room(found.needed, capacity)}")
    if helps:
        print("\nwhat saves memory, one at a time:")
    for lever in helps[:SHOWN]:
        print(_line(f"  {lever.name}", -lever.saved))
    return NO if fits is False else DONE


def _parts(found: Memory) -> dict[str, Any]:
    return {name: getattr(found, name) for name in FIELDS}


def _card(name: str) -> str:
    for card in cards():
        if card.casefold() == name.casefold():
            return card
    raise Refused(f"card is {name!r}: expected one of {', '.join(cards())}")


def _line(name: str, nbytes: int) -> str:
    return f"{name:<34}{nbytes / GB:>10.3f} GB {grouped(nbytes):>20} B"


def _room(needed: int, capacity: int) -> str:
    left = capacity - needed
    says = "it fits" if left >= 0 else "it does not fit"
    rest = "are left" if left >= 0 else "are missing"
    return f"{says}, {abs(left) / GB:.3f} GB of {capacity / GB:.3f} GB {rest}"
