"""What operations borrow, from ``book/borrows.json``: a picture and a table.

``python -m benchmarks.borrows`` writes the file.
"""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from docutils import nodes
from inline_figures import inline
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte.units import short
from helpers.plots import use_book_style
from helpers.tables import table

STORED = Path(__file__).parent.parent / "borrows.json"
COLORS = {"forward": "#2f6fd0", "saved": "#0a7d5c", "backward": "#c2570c"}
SEEN = 0.05  # of the inputs
Row = dict[str, Any]


def rows() -> list[Row]:
    """What the file has."""
    found: list[Row] = json.loads(STORED.read_text("utf-8"))
    return found


def best(pair: list[int | None] | None) -> int:
    """What was measured, else what is replayed, in bytes; nothing where there is no backward."""
    if pair is None:
        return 0
    replayed, measured = pair
    return int(replayed or 0) if measured is None else measured


def shares(row: Row) -> dict[str, float]:
    """What is borrowed and saved, each as a share of what the operation is given."""
    parts = {
        "forward": best(row["forward"]),
        "saved": row["saves"],
        "backward": best(row["backward"]),
    }
    return {name: nbytes / row["inputs"] for name, nbytes in parts.items()}


def figure(some: list[Row]) -> str:
    """What each operation takes beside its result, in its inputs' sizes, as SVG.

    Only what is a twentieth of the inputs, or more: less could not be seen.
    """
    use_book_style()
    drawn = [(max(shares(row).values()), row) for row in some]
    ordered = sorted(((most, row) for most, row in drawn if most >= SEEN), key=lambda one: one[0])
    shown, axes = plt.subplots(figsize=(5.4, 0.9 + 0.58 * len(ordered)))
    for at, (_, row) in enumerate(ordered):
        axes.text(0.04, at + 0.42, row["code"], va="center")
        bars = [(name, share) for name, share in shares(row).items() if share >= SEEN]
        for number, (name, share) in enumerate(bars):
            height = at + 0.1 - 0.19 * number
            axes.barh(height, share, 0.15, color=COLORS[name])
            axes.text(share + 0.06, height, f"{share:.2g}", fontsize=9.5, va="center")
    axes.set_ylim(-0.5, len(ordered) - 0.35)
    axes.set_yticks([])
    axes.set_xlabel("bytes beside the result (its inputs are 1)")
    labels = {
        "forward": "borrowed in forward",
        "saved": "kept for backward",
        "backward": "borrowed in backward",
    }
    for name, label in labels.items():
        axes.barh(0, 0, color=COLORS[name], label=label)
    shown.legend(loc="outside lower center", ncols=2)
    file = io.StringIO()
    shown.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(shown)
    return file.getvalue()


def in_short(nbytes: int) -> str:
    """Bytes in three digits, small ones as they are."""
    return short(nbytes) if nbytes >= 10_000 else f"{nbytes:,} B" if nbytes else "0"


def told(pair: list[int | None] | None, estimated: bool) -> str:
    """A cell: the bytes, and how they are known."""
    if pair is None:
        return ""
    replayed, measured = pair
    how = "est." if estimated else "replayed"
    if measured is None:
        return f"{in_short(int(replayed or 0))} ({how})"
    if measured == replayed:
        return in_short(measured)
    return f"{in_short(measured)} ({how} {in_short(int(replayed or 0))})"


def code(text: str) -> str:
    """A call as code; a name as it is."""
    return f"`{text}`" if "(" in text else text


def listed(some: list[Row]) -> str:
    """The table: an operation on its inputs, and what it takes."""
    lines = []
    for row in some:
        keeps = [f"`{name}`" if len(name) == 1 else name for name in row["keeps"]]
        keeps += [in_short(row["saves"])] if row["saves"] else []
        lines.append(
            (
                f"{code(row['code'])} on {row['given']}",
                told(row["forward"], row["estimated"]),
                ", ".join(keeps),
                told(row["backward"], row["estimated"]),
            )
        )
    columns = ["operation", "borrows", "keeps for backward", "borrows in backward"]
    return str(table(columns, lines).data)


class BorrowsFigure(SphinxDirective):
    """``{borrows-figure}``: the picture."""

    def run(self) -> list[nodes.Node]:
        """A figure."""
        some = rows()
        most = max(some, key=lambda row: max(shares(row).values()))
        said = f"{most['code']} takes {max(shares(most).values()):.1f} times its inputs."
        svg = inline(figure(some), "borrows", f"Bytes beside the result of operations. {said}")
        return [nodes.raw("", svg, format="html")]


class Borrows(SphinxDirective):
    """``{borrows}``: the table."""

    def run(self) -> list[nodes.Node]:
        """A table."""
        return self.parse_text_to_nodes(listed(rows()))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("borrows-figure", BorrowsFigure)
    app.add_directive("borrows", Borrows)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
