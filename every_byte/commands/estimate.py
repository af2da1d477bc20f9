"""``every-byte estimate``: what a model takes on one GPU, by formulas."""

import argparse
import inspect
import json
import re
import urllib.request
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.data import Card, unknown_card
from every_byte.data.others import RULES, all_cards, kind_of
from every_byte.estimate import (
    CHOICES,
    Dimensions,
    Memory,
    Serving,
    Setup,
    catalogue,
    dimensions,
    from_config,
    memory,
    serve,
)
from every_byte.estimate.fit import levers, most_sequences, shortest
from every_byte.estimate.presets import PRESETS
from every_byte.kinds import FIELDS
from every_byte.units import GB, GiB, grouped

SHOWN = 5  # levers, of all that there are
HUB = "https://huggingface.co"
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"


def add(subparsers: Subparsers) -> None:
    """Add the subcommand: an option for each field of `Setup`."""
    parser = subcommand(
        subparsers,
        "estimate",
        run,
        "estimate what a model takes on one GPU, by kind",
        "By closed formulas, without PyTorch: nothing is run, and only --hub downloads. "
        "1 GB is 10^9 B. With a card it exits with 0 only where the model fits for certain: "
        "1 where it does not fit, or may not, which is for the allocator's fragmentation to tell.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a name of the list; or the path of a config.json, or of a folder that holds one; or "
        "org/name, of the list or fetched from the Hugging Face hub. The list: "
        + ", ".join(catalogue()),
    )
    parser.add_argument("--config", type=Path, help="a config.json of your own, instead of a name")
    parser.add_argument(
        "--hub", action="store_true", help="org/name is one of the hub, whatever lies at that path"
    )
    parser.add_argument("--card", help="a card by name, such as 'RTX 4090': does it fit?")
    parser.add_argument("--gib", type=int, help="GiB that a card without a name here is sold with")
    parser.add_argument(
        "--for",
        dest="preset",
        choices=PRESETS,
        default="full",
        help="what you want to do; sets what the options below do not (default: full)",
    )
    parser.add_argument(
        "--vllm",
        action="store_true",
        help="how many users of --length tokens vLLM serves at a time on --card, or on --gpus "
        "of them by tensor parallelism",
    )
    parser.add_argument(
        "--utilization", type=int, help="with --vllm: percent of the card that it may take"
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
    except ValueError as error:
        raise Refused(error) from None
    name, card = _card(options)
    if options.vllm or options.utilization is not None:
        return _serve(options, sizes, setup, given, name, card)
    of_card = {"workspace": card.cublas_workspace, "context": card.context} if card else {}
    try:
        found = memory(sizes, setup, **of_card)
    except ValueError as error:
        raise Refused(error) from None
    capacity = card.usable if card else None
    verdict = None if capacity is None else found.verdict(capacity)
    ways = [] if capacity is None else shortest(sizes, setup, capacity, **of_card)
    most = None if capacity is None else most_sequences(sizes, setup, capacity, **of_card)
    helps = levers(sizes, setup, **of_card)
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
                "least": found.least,
                "needed": found.needed,
                "card": name,
                "rule": RULES.get(kind_of(name or "")),
                "capacity": capacity,
                "verdict": verdict,
                "fits": {"fits": True, "does not fit": False}.get(verdict or ""),
                "most_sequences": most,
                "combinations": [{"names": w.names, "needed": w.needed} for w in ways],
                "host": found.host,
                "levers": [{"name": lever.name, "saved": lever.saved} for lever in helps],
            }
        )
        return DONE if verdict in (None, "fits") else NO
    for kind, nbytes in _parts(found).items():
        if nbytes:
            print(_line(kind.replace("_", " "), nbytes))
    print(_line("held between steps", found.held))
    print(_line(f"peak, {found.peak_at}", found.peak))
    print(_line("least, with CUDA context", found.least))
    print(_line("enough, with fragmentation", found.needed))
    if found.host:
        print(_line("on the host, for each GPU", found.host))
    if capacity is not None:
        print(f"\n{name}: {_room(found, capacity)}")
        if kind := kind_of(name or ""):
            print(f"estimated: {RULES[kind]}")
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
    return DONE if verdict in (None, "fits") else NO


SERVING = ("dtype", "quantised", "cache_dtype", "length", "gpus")  # what both setups have


def _serve(
    options: argparse.Namespace,
    sizes: Dimensions,
    setup: Setup,
    given: dict[str, Any],
    name: str | None,
    card: Card | None,
) -> int:
    """Print how many users vLLM serves at a time, and what takes the memory.

    Raises:
        Refused: no card, or what serving has no use for, or what cannot be served so.
    """
    if card is None or not options.vllm:
        raise Refused("vllm: expected a --card or --gib beside it, and --utilization with it only")
    if rest := sorted(set(given) - set(SERVING) - {"task"}):
        raise Refused(f"{rest[0]} is given: expected of {', '.join(SERVING)} only, with --vllm")
    asked = {what: getattr(setup, what) for what in SERVING}
    if "length" not in given:
        asked["length"] = min(4096, sizes.max_position_embeddings or 4096)
    if options.utilization is not None:
        asked["utilization"] = options.utilization
    try:
        serving = Serving(**asked)
        served = serve(sizes, serving, card)
    except ValueError as error:
        raise Refused(error) from None
    if options.json:
        setting = {field.name: getattr(serving, field.name) for field in fields(serving)}
        found = {field.name: getattr(served, field.name) for field in fields(served)}
        model = options.model or str(options.config)
        print_json({"model": model, "card": name, "serving": setting, **found})
        return DONE if served.users else NO
    for what, nbytes in (
        ("weights", served.weights),
        ("activations, at the peak", served.activations),
        ("outside PyTorch", served.non_torch),
        ("CUDA graphs, at most", served.graphs),
        ("KV cache", served.kv_cache),
        (f"allowed: {serving.utilization} % of the card", served.allowed),
    ):
        print(_line(what, nbytes))
    each = f", on each of {serving.gpus}" if serving.gpus > 1 else ""
    print(
        f"\n{name}{each}: {grouped(served.users)} users of {grouped(serving.length)} tokens at a "
        f"time; the cache holds {grouped(served.tokens)} tokens of {grouped(served.token)} B"
    )
    return DONE if served.users else NO


def _parts(found: Memory) -> dict[str, Any]:
    return {name: getattr(found, name) for name in FIELDS}


def _sizes(options: argparse.Namespace) -> Dimensions:
    """Of a name, of a file, or of what the hub has.

    A name of the list comes first, then a path that is there, then the list by the hub's
    names, then the hub.

    Raises:
        Refused: none of them or two are given, or it cannot be read.
    """
    name, path = options.model, options.config
    if (name is None) == (path is None):
        raise Refused("model: expected a name, or --config with a file")
    if path is None and not options.hub:
        if name in catalogue():
            return dimensions(name)
        path = Path(name) if Path(name).exists() else None
        listed = {model["source"]: known for known, model in catalogue().items()}
        if path is None and (known := listed.get(f"{HUB}/{name}")):
            return dimensions(known)  # the same sizes, without a network
    if path is not None:
        path = path / "config.json" if path.is_dir() else path
        return from_config(_read(str(path), path.read_bytes))
    if not re.fullmatch(HUB_NAME, name):
        if not options.hub:
            return dimensions(name)  # which refuses it, and lists what there is
        raise Refused(f"model is {name!r}: expected org/name, as the hub has it")
    address = f"{HUB}/{name}/resolve/main/config.json"

    def fetched() -> bytes:
        with urllib.request.urlopen(address, timeout=30) as answer:
            found: bytes = answer.read()
        return found

    return from_config(_read(address, fetched))


def _read(where: str, reader: Callable[[], bytes]) -> Any:
    """What a ``config.json`` holds.

    Raises:
        Refused: it cannot be read; without a network a path does.
    """
    try:
        return json.loads(reader())
    except (OSError, ValueError) as error:
        hub = ": give the path of its config.json" if where.startswith("https:") else ""
        raise Refused(f"{where}: cannot be read: {error}{hub}") from None


def _card(options: argparse.Namespace) -> tuple[str | None, Card | None]:
    """The card in words, and what is known of it.

    One without a name is taken for one of the newest, whose workspaces are the largest.

    Raises:
        Refused: there is no such card, or it is given twice.
    """
    if options.gib is not None:
        if options.card is not None or options.gib < 1:
            raise Refused(f"gib is {options.gib}: expected 1 or more, and no card beside it")
        return f"a card of {options.gib} GiB", unknown_card(options.gib * GiB)
    if options.card is None:
        return None, None
    for name, card in all_cards().items():
        if name.casefold() == options.card.casefold():
            return name, card
    raise Refused(f"card is {options.card!r}: expected one of {', '.join(all_cards())}")


def _line(name: str, nbytes: int) -> str:
    return f"{name:<34}{nbytes / GB:>10.3f} GB {grouped(nbytes):>20} B"


def _room(found: Memory, capacity: int) -> str:
    verdict, needed = found.verdict(capacity), found.needed
    if verdict == "may fit":
        return (
            f"it may fit: the peak does, but {(needed - capacity) / GB:.3f} GB of "
            f"{capacity / GB:.3f} GB are missing to be certain"
        )
    left = capacity - needed if verdict == "fits" else found.least - capacity
    rest = "are left" if verdict == "fits" else "are missing at least"
    return f"it {verdict}, {left / GB:.3f} GB of {capacity / GB:.3f} GB {rest}"
