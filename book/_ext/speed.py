"""The page of speed, made at each build from what ``python -m benchmarks.speed`` wrote.

``{speed-beside}`` is the replay beside PyTorch's tracker, ``{speed-steps}`` whole steps and what
a process takes, ``{speed-growth}`` how time grows, ``{speed-conditions}`` where it was measured.
What was not measured is not shown.
"""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte.units import MB
from helpers.tables import table

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "speed.json"
Figure = dict[str, Any]


def spread(figure: Figure, unit: str = "s", per: float = 1) -> str:
    """A median, with its range where there is more than one figure."""
    median, low, high = (figure[name] / per for name in ("median", "low", "high"))
    told = f"{_number(median)} {unit}".rstrip()
    return told if low == high else f"{told} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return f"{value:#.2g}" if value < 9.95 else f"{value:,.0f}"


def beside(found: Figure) -> str:
    """The replay beside PyTorch's tracker."""
    rows = [
        (name, spread(of["replay"]), spread(of["mem_tracker"]), spread(of["ratio"], ""))
        for name, of in found["beside"].items()
    ]
    return str(table(["one training step", "replay", "MemTracker", "times as long"], rows).data)


def steps(found: Figure) -> str:
    """Whole steps, the allocator, imports and memory."""
    rows = [(f"{name}, one training step", spread(of)) for name, of in found["steps"].items()]
    rows += [
        (f"The allocator with {int(live):,} live blocks", spread(of, "pairs a second"))
        for live, of in found["pairs"].items()
    ]
    rows += [(f"`import {name}`", spread(of)) for name, of in found.get("imports", {}).items()]
    if "added memory" in found:
        rows.append(("RAM that the 70B's step adds", spread(found["added memory"], "MB", MB)))
    return str(table(["what", "takes"], rows).data)


SIZES = {"layers": "{} layers", "tokens": "{} tokens", "batch": "batch of {}", "width": "width {}"}
"""What grows, as a row names it. Time grows with the layers alone, so it is divided by them."""


def growth(found: Figure) -> str:
    """Time against size, and how it changes from the smallest size on."""
    rows = []
    for what, sizes in found["growth"].items():
        first: float | None = None
        for size, figure in sizes.items():
            layers = what == "layers"
            each = figure["median"] / (int(size) if layers else 1)
            first = each if first is None else first
            told = SIZES[what].format(f"{int(size):,}")
            per = " for each layer" if layers else ""
            rows.append((told, spread(figure), f"{each / first:.2f}{per}"))
    return str(table(["size", "step", "relative to the smallest"], rows).data)


def conditions(found: Figure) -> str:
    """Where and how it was measured, in words."""
    of = found["conditions"]
    return (
        f"Measured on {of['date']} with Python {of['python']} and PyTorch {of['torch']} on "
        f"{of['processors']} processors, which had {of['load'][0]:g} programs waiting for them on "
        f"average as it began. A loop of five million additions in plain Python took "
        f"{spread(of['loop'])} there: time it on your machine to compare."
    )


def results() -> Figure:
    """What the benchmark wrote."""
    return dict(json.loads(RESULTS.read_text("utf-8")))


class _Shown(SphinxDirective):
    tell = staticmethod(conditions)

    def run(self) -> list[nodes.Node]:
        """The table, or the sentence."""
        self.env.note_dependency(str(RESULTS))
        return self.parse_text_to_nodes(self.tell(results()))


class Beside(_Shown):
    """``{speed-beside}``."""

    tell = staticmethod(beside)


class Steps(_Shown):
    """``{speed-steps}``."""

    tell = staticmethod(steps)


class Growth(_Shown):
    """``{speed-growth}``."""

    tell = staticmethod(growth)


class Conditions(_Shown):
    """``{speed-conditions}``."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    for directive in (Beside, Steps, Growth, Conditions):
        app.add_directive(f"speed-{directive.__name__.lower()}", directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
