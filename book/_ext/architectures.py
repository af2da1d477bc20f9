"""The table of architectures and libraries that run on a virtual card.

``{architectures}`` shows ``benchmarks/architectures.json``, which
``python -m benchmarks.architectures`` makes.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from helpers.tables import table

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "architectures.json"
_LONGEST = 120  # characters of a reason


def _reason(row: dict[str, Any]) -> str:
    why = row.get("why", "").replace("|", "\\|").replace("<", "&lt;")
    return why if len(why) <= _LONGEST else why[:_LONGEST].rstrip() + " ..."


def _figures(row: dict[str, Any]) -> list[str | int]:
    """What ran, and with what; empty where a row was noted without its figures."""
    figures = [row.get(of, "") for of in ("did", "parameters", "at rest")]
    return [*figures, ", ".join(row.get("assumed", []))]


def shown(told: dict[str, Any]) -> str:
    """The results as Markdown: counts, what does not run and why, and every row, folded."""
    cases = told["cases"]
    counts = {group: Counter[str]() for group in (row["group"] for row in cases)}
    for row in cases:
        counts[row["group"]][row["result"]] += 1
    results = ("runs", "refused", "wrong")
    total = Counter(row["result"] for row in cases)
    summary = [[group, *(count[each] for each in results)] for group, count in counts.items()]
    summary.append(["**all**", *(total[each] for each in results)])
    rest = [
        [row["group"], row["name"], row["result"], _reason(row)]
        for row in cases
        if row["result"] != "runs"
    ]
    every = [
        [row["group"], row["name"], *_figures(row)] for row in cases if row["result"] == "runs"
    ]
    with_versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    parts = [
        f"**{total['runs']} of {len(cases)} run**, on a virtual {told['card']}, with "
        f"{with_versions}.",
        table(["group", *results], summary).data,
    ]
    if rest:
        parts += ["**What does not run**, and why:"]
        parts += [table(["group", "case", "result", "reason"], rest).data]
    columns = ["group", "case", "what ran", "parameters", "at rest (B)", "values assumed"]
    parts.append(f"````{{dropdown}} Every case that runs\n{table(columns, every).data}\n````")
    return "\n\n".join(map(str, parts))


class Architectures(SphinxDirective):
    """``{architectures}``: counts, reasons and rows."""

    def run(self) -> list[nodes.Node]:
        """The tables."""
        self.env.note_dependency(str(RESULTS))
        return self.parse_text_to_nodes(shown(json.loads(RESULTS.read_text("utf-8"))))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("architectures", Architectures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
