"""Tables of bytes in three digits, and the exact bytes folded under them.

Notebooks print bytes in full, so that they can be compared. A reader looks for the pattern
first: in a column whose heading says ``(B)`` the book writes ``833,577,472`` as ``834 MB``.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from every_byte.units import MB, short

MARK = re.compile(r"\s*\(B\)")
WHOLE = re.compile(r"[+-]?\d[\d,]*")
MEASURE = re.compile(r"[-+]?[\d.,]+ (%|s|[kMGT]?i?B)")
FOLD = '<details class="exact-bytes"><summary>Exact bytes</summary>'


class ExactBytes(SphinxPostTransform):
    """Rewrites each table that has a million bytes or more in a column of bytes."""

    default_priority = 20  # after myst-nb has chosen the outputs' MIME types
    formats = ("html",)

    def run(self, **_: Any) -> None:
        """Shorten the numbers, and fold a copy of the table as it was."""
        for table in list(self.document.findall(nodes.table)):
            keep_together(table)
            exact = table.deepcopy()
            if shorten(table):
                for node in exact.findall(nodes.Element):
                    node["ids"] = []
                fold = [nodes.raw("", FOLD, format="html"), exact]
                where = table.parent.index(table) + 1
                table.parent[where:where] = [*fold, nodes.raw("", "</details>", format="html")]


def keep_together(table: nodes.table) -> None:
    """A number and its unit stay on one line."""
    for text in list(table.findall(nodes.Text)):
        if MEASURE.fullmatch(text):
            text.parent.replace(text, nodes.Text(text.replace(" ", "\N{NO-BREAK SPACE}")))


def shorten(table: nodes.table) -> bool:
    """Write its bytes in three digits; False, and nothing done, if they need no more anyway."""
    heads = [row for head in table.findall(nodes.thead) for row in head.findall(nodes.row)]
    rows = [row for body in table.findall(nodes.tbody) for row in body.findall(nodes.row)]
    if not heads:
        return False
    marked = [i for i, cell in enumerate(heads[0]) if MARK.search(cell.astext())]
    columns = range(1, len(heads[0])) if marked == [0] else marked
    cells = [row[i] for row in rows for i in columns if i < len(row)]
    whole = [cell for cell in cells if WHOLE.fullmatch(cell.astext())]
    if not any(abs(_read(cell.astext())) >= MB for cell in whole):
        return False
    in_other_units = _twice([cell.astext() for cell in heads[0]])
    for j, head in in_other_units.values():
        heads[0][j][:] = [nodes.paragraph("", head)]
    for cell in heads[0]:
        for text in list(cell.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(MARK.sub("", text)))
    for cell in whole:
        for text in list(cell.findall(nodes.Text)):
            in_short = short(_read(text), text.startswith("+")).replace(" ", "\N{NO-BREAK SPACE}")
            text.parent.replace(text, nodes.Text(in_short))
    for i in sorted(in_other_units, reverse=True):
        for row in (*heads, *rows):
            del row[i]
        (group,) = table.findall(nodes.tgroup)
        del group[i]  # what says how wide a column is; these come first
        group["cols"] -= 1
    return True


def _twice(heads: list[str]) -> dict[int, tuple[int, str]]:
    """Columns of bytes that stand in other units, too: where, and what that column says."""
    found = {}
    for i, head in enumerate(heads):
        base = MARK.sub("", head)
        for j, other in enumerate(heads):
            if MARK.search(head) and other in (f"{base} (MB)", f"{base} (GB)"):
                found[i] = j, other
            elif MARK.search(head) and j == i + 1 and other.strip("()") == "GB":
                found[i] = j, f"{base} (GB)"
    return found


def _read(text: str) -> int:
    return int(text.replace(",", ""))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_post_transform(ExactBytes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
