"""Puts the cells' SVG figures into the page itself, so that the theme can colour them.

Inside an ``<img>`` a figure keeps its black text on white in dark mode, too.
Inline, every-byte.css gives text and lines the page's own colour.

A figure of the class ``first`` (``"figure": {"classes": "first"}`` in its cell's header) stands
at the top of its page, before the first section, and not where its cell is.
"""

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform


class InlineFigures(SphinxPostTransform):
    """Replaces images of cells' outputs that are SVG files by the SVG elements."""

    default_priority = 900  # after myst-nb has chosen the output's MIME type
    formats = ("html",)

    def run(self, **_: Any) -> None:
        """Replace all of a page's figures."""
        for number, image in enumerate(list(self.document.findall(nodes.image))):
            path = Path(self.app.srcdir, image["uri"])
            if path.suffix != ".svg" or "jupyter_execute" not in path.parts:
                continue
            svg = inline(path.read_text("utf-8"), f"figure-{number}", image.get("alt", ""))
            image.replace_self(nodes.raw("", svg, format="html"))


class FirstFigures(SphinxTransform):
    """Moves figures of the class ``first`` up; before figures are numbered, so in order."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Move them, with their captions."""
        page = next(iter(self.document.findall(nodes.section)), None)
        for figure in list(self.document.findall(nodes.figure)):
            if page is None or "first" not in figure["classes"]:
                continue
            figure.parent.remove(figure)
            first = next(i for i, node in enumerate(page) if isinstance(node, nodes.section))
            page.insert(first, figure)


def inline(svg: str, prefix: str, alt: str) -> str:
    """An SVG file as an element of a page: named for screen readers, its ids unique."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'((?: id="|url\(#|href="#))', rf"\1{prefix}-", element)
    label = html.escape(alt, quote=True)
    return element.replace("<svg", f'<svg class="cell-figure" role="img" aria-label="{label}"', 1)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_transform(FirstFigures)
    app.add_post_transform(InlineFigures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
