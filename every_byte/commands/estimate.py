"""``every-byte estimate``: what a model takes on one GPU, by formulas."""

import argparse
import inspect
import json
import re
import urllib.request
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.data import cards
from every_byte.estimate import (
    CHOICES,
    Dimensions,
    Memory,
    Setup,
    catalogue,
    dimensions,
    from_config,
    memory,
)
from every_byte.estimate.fit import levers, most_sequences, shortest
from every_byte.estimate.presets import PRESETS
from every_byte.kinds import FIELDS
from every_byte.units import GB, GiB, grouped

SHOWN = 5  # levers, of all that there are
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"


def add(subparsers: Subparsers) -> None:
    """Add the subcommand: an option for each field of `Setup`."""
    parser = subcommand(
        subparsers,
        "estimate",
        run,
        "estimate what a model takes on one GPU, by kind",
        "By closed formulas, without PyTorch: nothing is run, and only --hub downloads. "
        "1 GB is 10^9 B. With a card it exits with 1 where the model does not fit.",
    )
    parser.add_argument("model", nargs="?", help=f"one of {', '.join(catalogue())}")
    parser.add_argument("--config", type=Path, help="a config.json of your own, instead of a name")
    parser.add_argument(
        "--hub",
        action="store_true",
        help="the model is a name such as org/name on the Hugging Face hub: fetch its config.json",
    )
    parser.add_argument("--card", help="a card by name, such as 'RTX 4090': does it fit?")
    parser.add_argument("--gib", type=int, help="GiB of a card that has no name here")
    parser.add_argument(
        "--for",
        dest="preset",
        choices=PRESETS,
        default="full",
        help="what you want to do; sets what the options below do not (default: full)",
    )
    kinds, described = get_type_hints(Setup), _attributes(Setup)
    first = PRESETS["full"][1]
    for field in fields(Setup):
        option = f"--{field.name.replace('_', '-')}"
        known = ", ".join(filter(None, CHOICES.get(field.name, ())))
        value = getattr(first, field.name)
        default = "" if value is None else f"default: {value}"
        says = described.get(field.name, "").rstrip(".")
        told = "; ".join(filter(None, (says, known, default))).replace("%", "%%")
        if kinds[field.name] is bool:
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=told
            )
        else:
            kind = int if kinds[field.name] is int else str
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=told)


def _attributes(described: type) -> dict[str, str]:
    """What a class's docstring says of each of its attributes."""
    entries = re.findall(
        r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(described) or "", re.MULTILINE
    )
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}


def run(options: argparse.Namespace) -> int:
    """Print the parts and the peak; with a card, whether it fits and what would help."""
    try:
        sizes = _sizes(options)
        given = {f.name: getattr(options, f.name) for f in fields(Setup) if f.name in options}
        setup = replace(PRESETS[options.preset][1], **given)
        if "length" not in given and sizes.has("learned positions"):
            setup = replace(setup, length=min(setup.length, sizes.max_position_embeddings))
        found = memory(sizes, setup)
    except ValueError as error:
        raise Refused(error) from None
    card, capacity = _capacity(options)
    fits = None if capacity is None else found.needed <= capacity
    ways = [] if capacity is None else shortest(sizes, setup, capacity)
    most = None if capacity is None else most_sequences(sizes, setup, capacity)
    helps = levers(sizes, setup)
    if options.json:
        print_json(
            {
                "model": options.model or str(options.config),
                "for": options.preset,
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
                "most_sequences": most,
                "combinations": [{"names": w.names, "needed": w.needed} for w in ways],
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
        print(
            f"the largest batch of {grouped(setup.length)} tokens that fits: {grouped(most or 0)}"
        )
    if ways:
        print("\nwhat would make it fit, in as few changes as there can be:")
    for way in ways[:SHOWN]:
        print(_line(f"  {' + '.join(way.names)}", way.needed))
    if helps:
        print("\nwhat saves memory, one at a time:")
    for lever in helps[:SHOWN]:
        print(_line(f"  {lever.name}", -lever.saved))
    return NO if fits is False else DONE


def _parts(found: Memory) -> dict[str, Any]:
    return {name: getattr(found, name) for name in FIELDS}


def _sizes(options: argparse.Namespace) -> Dimensions:
    """Of a name, of a file, or, if asked for, of what the hub has.

    Raises:
        Refused: none of them or two are given, or it cannot be read.
    """
    if (options.model is None) == (options.config is None):
        raise Refused("model: expected a name, or --config with a file")
    if options.config is None and not options.hub:
        return dimensions(options.model)
    if options.hub and (options.model is None or not re.fullmatch(HUB_NAME, options.model)):
        raise Refused(f"model is {options.model!r}: expected org/name, as the hub has it")
    address = f"https://huggingface.co/{options.model}/resolve/main/config.json"
    try:
        if options.config is not None:
            text = options.config.read_bytes()
        else:
            with urllib.request.urlopen(address, timeout=30) as answer:
                text = answer.read()
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise Refused(f"{options.config or address}: cannot be read: {error}") from None
    return from_config(config)


def _capacity(options: argparse.Namespace) -> tuple[str | None, int | None]:
    """The card in words, and its bytes.

    Raises:
        Refused: there is no such card, or it is given twice.
    """
    if options.gib is not None:
        if options.card is not None or options.gib < 1:
            raise Refused(f"gib is {options.gib}: expected 1 or more, and no card beside it")
        return f"{options.gib} GiB", options.gib * GiB
    if options.card is None:
        return None, None
    card = _card(options.card)
    return card, cards()[card].memory


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
