"""The start page's picture: one training step by kind, with its peak and a card's line.

The heights are the estimator's (`every_byte.estimate`). This module draws the still picture
at each build; hero.js draws it again for what a reader chooses, by the estimator's port, and
tests/test_start.py holds the one against the other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from docutils import nodes
from estimator import data
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte import estimate
from every_byte.data import cards
from every_byte.estimate import Memory, Setup
from every_byte.estimate.presets import PRESETS
from every_byte.kinds import COLORS
from every_byte.units import GB, MB, GiB

PAGE = "book/index"
PICTURE = Path(__file__).parent.parent / "_static" / "step.svg"

MODELS = (
    *("Qwen3-0.6B", "Llama-3.2-1B", "Qwen2.5-3B", "Qwen3-4B", "Llama-3.1-8B"),
    *("Qwen3-14B", "Qwen3-32B", "Llama-3.1-70B"),
)
BATCHES = [2**n for n in range(8)]
LENGTHS = [2**n for n in range(7, 18)]
PRECISIONS: dict[str, dict[str, str | None]] = {
    "BF16": {"dtype": "bf16", "amp": None},
    "FP32": {"dtype": "fp32", "amp": None},
    "AMP, BF16": {"dtype": "fp32", "amp": "bf16"},
}

MOMENTS = (
    ("at rest", 0, 0, 0),
    ("end of forward: the loss", 34, 0, 100),
    ("start of backward: the loss", 37, 0, 100),
    ("backward: the head", 40, 0, 100),
    ("backward: the last layer", 43, 0, 100),
    ("backward: the first layer", 81, 90, 10),
    ("end of backward: the embedding", 86, 100, 0),
    ("optimizer step", 92, 100, 0),
)
"""The estimator's moments; where each stands in the picture, in percent of its width; and how
much of the gradients and of the activations is drawn there, in percent. The layers' backward
makes the ones and frees the others at an even pace, so both are drawn as straight lines."""
LAYERS, END = 30, 96  # where forward's last layer ends, and where the step has let go of all
PHASES = {"forward": 37, "backward": 49, "step": 14}  # widths in percent

KINDS = (
    ("parameters", "parameters", "parameters"),
    ("optimizer_states", "optimizer states", "optimizer states"),
    ("gradients", "gradients", "gradients"),
    ("activations", "activations", "activations"),
    ("rest", "temporaries", "the rest: logits, temporaries, context"),
)
"""From the bottom up: field of `Memory`, whose colour it has, what the legend says."""


@dataclass(frozen=True)
class Choice:
    """What a reader can choose; at first an 8B that a large card at home cannot train."""

    model: str = "Llama-3.1-8B"
    card: str = "RTX 4090"
    optimizer: str = "adamw"
    precision: str = "BF16"
    batch: int = 1
    length: int = 2048

    @property
    def setup(self) -> Setup:
        """For the estimator: its preset for full fine-tuning, with these choices."""
        return replace(
            PRESETS["full"][1],
            optimizer=self.optimizer,
            batch=self.batch,
            length=self.length,
            **PRECISIONS[self.precision],  # type: ignore[arg-type]
        )

    @property
    def memory(self) -> Memory:
        """What the estimator says."""
        card = cards()[self.card]
        sizes = estimate.dimensions(self.model)
        return estimate.memory(sizes, self.setup, card.cublas_workspace, card.context)


ENDS = {
    "does not fit": "out of memory.",
    "may fit": "it may fit, with nothing to spare.",
    "fits": "it fits.",
}
"""What the picture says for the estimator's verdict."""

Row = list[int]  # bytes of each kind, in order


def rows(memory: Memory) -> list[Row]:
    """The bytes of each kind at each moment, with the context's: what the card has to have then."""
    moments, found = dict(memory.moments), []
    for name, _, gradients, activations in MOMENTS:
        left = moments[name] + memory.context
        row = []
        for nbytes in (
            memory.parameters,
            memory.optimizer_states,
            memory.gradients * gradients // 100,
            memory.activations * activations // 100,
        ):
            row.append(min(nbytes, left))
            left -= row[-1]
        found.append([*row, left])
    return found


def points(memory: Memory) -> list[tuple[int, Row]]:
    """What is drawn, from left to right: places in percent, and bytes of each kind.

    Beside the moments: the end of forward's layers, before the loss, and rest again.
    """
    found = rows(memory)
    rest = min(found[0][-1] + memory.cast_weights, found[1][-1])
    drawn = [(place, row) for (_, place, _, _), row in zip(MOMENTS, found, strict=True)]
    drawn.insert(1, (LAYERS, [*found[1][:-1], rest]))
    return [*drawn, (END, found[0]), (100, found[0])]


def paths(drawn: Sequence[tuple[int, Row]], top: float) -> list[str]:
    """One area for each kind, as SVG's path data in a box of 100 by 100; `top` is its height."""
    under = [0] * len(drawn)
    areas = []
    for kind in range(len(KINDS)):
        over = [below + row[kind] for below, (_, row) in zip(under, drawn, strict=True)]
        places = [place for place, _ in drawn]
        line = [(x, n) for x, n in zip(places, over, strict=True)]
        line += reversed(list(zip(places, under, strict=True)))
        areas.append("M" + "L".join(f"{x} {100 - 100 * n / top:.2f}" for x, n in line) + "Z")
        under = over
    return areas


def short(nbytes: int) -> str:
    """With three digits: ``'65.4 GB'``, ``'1.50 GB'``, ``'27.1 MB'``."""
    if not nbytes:
        return "0 B"
    unit, name = (GB, "GB") if nbytes >= 0.9995 * GB else (MB, "MB")
    number = nbytes / unit
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{decimals}f} {name}"


def sold() -> dict[str, str]:
    """How large each card is called: ``'24 GiB'``; programs can have a little less."""
    return {name: f"{card.memory / GiB:.0f} GiB" for name, card in cards().items()}


def view(choice: Choice) -> dict[str, Any]:
    """What the template shows of a choice."""
    memory, capacity = choice.memory, cards()[choice.card].usable
    peak, found = memory.least, rows(memory)
    moment = [name for name, *_ in MOMENTS].index(memory.peak_at)
    now = found[moment]
    top = 1.14 * max(peak, capacity)
    verdict = f"Training {choice.model} takes {short(peak)} at its peak. "
    verdict += f"The {choice.card} can give {short(capacity)}: "
    end = ENDS[memory.verdict(capacity)]
    place = MOMENTS[moment][1]
    sizes = [short(n) for n in now]
    parts = ", ".join(f"{label} {size}" for (_, _, label), size in zip(KINDS, sizes, strict=True))
    return {
        "fits": memory.verdict(capacity) != "does not fit",
        "verdict": verdict,
        "end": end,
        "spoken": f"Memory during one training step, by kind. {verdict}{end} At the peak, "
        f"{memory.peak_at}: {parts}.",
        "paths": paths(points(memory), top),
        "card_top": f"{100 - 100 * capacity / top:.2f}",
        "card_label": f"{choice.card}: {sold()[choice.card]}",
        "peak_left": place,
        "now_left": place,
        "peak_top": f"{100 - 100 * peak / top:.2f}",
        "peak_label": f"peak {short(peak)}",
        "moment": moment,
        "at": memory.peak_at,
        "now": now,
        "sizes": sizes,
        "total": sum(now),
        "total_label": short(sum(now)),
    }


def standalone(choice: Choice) -> str:
    """The same picture as a file of its own, for the README: light and dark by the reader's system.

    Written to `PICTURE` by ``python book/_ext/hero.py``; a test says when it is out of date.
    """
    shown, names = view(choice), [label for _, _, label in KINDS]
    colors = [COLORS[color] for _, color, _ in KINDS]
    areas = [
        f'<path d="{path}" fill="{color}"/>'
        for path, color in zip(shown["paths"], colors, strict=True)
    ]
    line = 80 + 3 * float(shown["card_top"])
    peak = (20 + 4.4 * shown["peak_left"], 80 + 3 * float(shown["peak_top"]))
    first, second = shown["verdict"].split(". ", 1)
    words, begin = [], 20.0
    for phase, width in PHASES.items():
        words.append(f'<text x="{begin + 2.2 * width:g}" y="400" class="mid">{phase}</text>')
        begin += 4.4 * width
    keys = zip(names, colors, shown["sizes"], strict=True)
    for place, (name, color, nbytes) in enumerate(reversed(list(keys))):
        y = 240 + 30 * place
        words.append(f'<rect x="482" y="{y - 13}" width="14" height="14" fill="{color}"/>')
        words.append(f'<text x="504" y="{y}">{name.partition(":")[0]}</text>')
        words.append(f'<text x="740" y="{y}" class="end">{nbytes}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 420" role="img">
<title>{shown["spoken"]}</title>
<style>
text {{ font: 16px system-ui, sans-serif; fill: #1f2328 }}
.mid {{ text-anchor: middle }} .end {{ text-anchor: end }} .bold {{ font-weight: 700 }}
.title {{ font-size: 20px; font-weight: 700 }}
.line {{ stroke: #1f2328; fill: none }} .back {{ fill: #fff }} circle {{ fill: #1f2328 }}
@media (prefers-color-scheme: dark) {{
text, circle {{ fill: #e6edf3 }} .line {{ stroke: #e6edf3 }} .back {{ fill: #0d1117 }}
}}
</style>
<rect class="back" width="760" height="420" rx="8"/>
<text x="20" y="30" class="title">{first}.</text>
<text x="20" y="58" class="title">{second}{shown["end"]}</text>
<g transform="translate(20 80) scale(4.4 3)">{"".join(areas)}
<rect class="back" width="100" height="{shown["card_top"]}" opacity="0.45"/></g>
<path class="line" d="M20 380H460"/>
<path class="line" stroke-width="2" stroke-dasharray="7 4" d="M20 {line:g}H460"/>
<rect class="back" x="310" y="{line - 27:g}" width="148" height="23" rx="3"/>
<text x="384" y="{line - 10:g}" class="mid">{shown["card_label"]}</text>
<circle cx="{peak[0]:g}" cy="{peak[1]:g}" r="5"/>
<text x="{peak[0]:g}" y="{peak[1] - 14:g}" class="mid bold">{shown["peak_label"]}</text>
{chr(10).join(words)}
</svg>
"""


def constants() -> dict[str, Any]:
    """What hero.js asks for, beside what is in the page's elements."""
    estimator = data()
    models = estimator["models"]
    estimator["models"] = {name: models[name] for name in MODELS}
    for unused in ("levers", "halves", "order", "config"):
        estimator.pop(unused, None)
    return {
        "estimator": estimator,
        "sold": sold(),
        "precisions": PRECISIONS,
        "ends": ENDS,
        "batches": BATCHES,
        "lengths": LENGTHS,
        "moments": MOMENTS,
        "layers": LAYERS,
        "end": END,
        "kinds": [kind for kind, _, _ in KINDS],
        "labels": [label for _, _, label in KINDS],
    }


class Hero(SphinxDirective):
    """``{hero}``: the picture and its form."""

    def run(self) -> list[nodes.Node]:
        """The page's HTML, from hero.html beside this file."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        script = json.dumps(constants(), separators=(",", ":")).replace("<", "\\u003c")
        optimizers = {name: known.label for name, known in estimate.OPTIMIZERS.items()}
        html = environment.get_template("hero.html").render(
            script=Markup(script),
            start=Choice(),
            view=view(Choice()),
            models={name: name for name in MODELS},
            cards={name: f"{name}, {size}" for name, size in sold().items()},
            optimizers=optimizers,
            precisions={name: name for name in PRECISIONS},
            batches=BATCHES,
            lengths=LENGTHS,
            kinds=[{"color": COLORS[color], "label": label} for _, color, label in KINDS],
            phases=PHASES,
            moments=len(MOMENTS),
        )
        return [nodes.raw("", html, format="html")]


def add_files(app: Sphinx, page: str, *_: object) -> None:
    """Load the picture's scripts and style on its own page only."""
    if page == PAGE:
        app.add_css_file("hero.css")
        app.add_js_file("estimate.js", loading_method="defer")
        app.add_js_file("hero.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("hero", Hero)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    PICTURE.write_text(standalone(Choice()), "utf-8")
