"""Which models and libraries run unchanged, made from the benchmark's results at each build.

``python -m benchmarks.architectures`` writes them. ``{architectures}`` draws the share that
runs, ``{architectures-not-running}`` lists what does not, ``{architectures-running}`` what does.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from docutils import nodes
from inline_figures import inline
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from helpers.plots import use_book_style
from helpers.tables import table

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "architectures.json"
COLORS = {"runs": "#0a7d5c", "refused": "#c2570c", "wrong": "#b3261e"}


def library(case: dict[str, Any]) -> str:
    """The bar of the figure that a case belongs to; transformers has one for each kind."""
    group = str(case["group"])
    if group == "libraries":
        return "training libraries"
    return group if group.startswith("transformers") else group.partition(",")[0]


def counted(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many cases of each library came to which result."""
    found: dict[str, dict[str, int]] = {}
    for case in cases:
        of = found.setdefault(library(case), dict.fromkeys(COLORS, 0))
        of[case["result"]] += 1
    return found


def told(cases: Sequence[dict[str, Any]]) -> str:
    """The result in one sentence."""
    ran = sum(case["result"] == "runs" for case in cases)
    wrong = sum(case["result"] == "wrong" for case in cases)
    none = "none gives a wrong figure" if not wrong else f"{wrong} give a wrong figure"
    return f"{ran} of {len(cases)} cases run ({100 * ran / len(cases):.0f} %); {none}."


def figure(cases: Sequence[dict[str, Any]]) -> str:
    """A bar for each library, as SVG: the share that runs, and what does not."""
    use_book_style()
    found = counted(cases)
    shown, axes = plt.subplots(figsize=(5.4, 0.9 + 0.32 * len(found)))
    for place, of in enumerate(found.values()):
        every, left = sum(of.values()), 0.0
        for result, color in COLORS.items():
            share = 100 * of[result] / every
            axes.barh(place, share, left=left, color=color, height=0.7)
            left += share
    names = [f"{name} ({of['runs']} of {sum(of.values())})" for name, of in found.items()]
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("cases (%)")
    for result, color in COLORS.items():
        if any(of[result] for of in found.values()):
            axes.barh(0, 0, color=color, label=result)
    shown.legend(loc="outside lower center", ncols=3, handlelength=1)
    file = io.StringIO()
    shown.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(shown)
    return file.getvalue()


def not_running(cases: Sequence[dict[str, Any]]) -> str:
    """The cases that do not run, each with its reason."""
    rows = [
        (case["group"], f"`{case['name']}`", case["result"], _short(case["why"]))
        for case in cases
        if case["result"] != "runs"
    ]
    if not rows:
        return "Every case runs."
    return str(table(["library", "case", "result", "why"], rows).data)


def _short(why: str) -> str:
    """The beginning of an error's line, as code that a table can hold."""
    begin = why.replace("`", "'").replace("|", "/")
    return f"`{begin if len(begin) <= 160 else begin[:160].rpartition(' ')[0] + ' …'}`"


def every(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A folded table for each group: what ran, and what had to be assumed."""
    for group in dict.fromkeys(case["group"] for case in cases):
        rows = [
            (
                f"`{case['name']}`",
                case["did"],
                case["parameters"],
                case["at rest"],
                ", ".join(case["assumed"]) or "nothing",
            )
            for case in cases
            if case["group"] == group and case["result"] == "runs"
        ]
        columns = ["case", "ran", "parameters", "at rest (B)", "assumed at"]
        yield f"````{{dropdown}} {group}: {len(rows)} run\n{table(columns, rows).data}\n````"


def results() -> dict[str, Any]:
    """What the benchmark wrote."""
    return dict(json.loads(RESULTS.read_text("utf-8")))


class Architectures(SphinxDirective):
    """``{architectures}``: the share that runs, in words and as a figure."""

    def run(self) -> list[nodes.Node]:
        """The sentence, the figure, and what it was run with."""
        found = results()
        cases = found["cases"]
        said = told(cases)
        shares = [
            f"{name}: {of['runs']} of {sum(of.values())}" for name, of in counted(cases).items()
        ]
        svg = inline(figure(cases), "architectures", f"{said} {'; '.join(shares)}.")
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        return [
            *self.parse_text_to_nodes(f"**{said}**"),
            nodes.raw("", svg, format="html"),
            *self.parse_text_to_nodes(f"Run on a virtual {found['card']} with {versions}."),
        ]


class NotRunning(SphinxDirective):
    """``{architectures-not-running}``: each case that does not run, and why."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(not_running(results()["cases"]))


class Running(SphinxDirective):
    """``{architectures-running}``: each case that runs, by library."""

    def run(self) -> list[nodes.Node]:
        """The folded tables."""
        return self.parse_text_to_nodes("\n\n".join(every(results()["cases"])))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("architectures", Architectures)
    app.add_directive("architectures-not-running", NotRunning)
    app.add_directive("architectures-running", Running)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
