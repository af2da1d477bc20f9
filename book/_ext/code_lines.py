"""Each line of code as an element that knows its indentation.

So a line that is wider than a phone goes on below, four characters further in than it began:
`every-byte.css` does the rest.
"""

import re
from collections.abc import Iterator

from pygments.formatters import HtmlFormatter
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder

TAGS = re.compile(r"<[^>]+>")
STEP, DEEPEST = 4, 20  # characters: of indentation, as the styles' classes have it


class Lines(HtmlFormatter[str]):
    """Pygments' HTML, each line in a ``<span class="line in8">``."""

    def wrap(self, source: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Pygments calls this with pairs: 1 and a line that ends in a newline."""
        return super().wrap(_enclosed(source))


def _enclosed(source: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for is_code, line in source:
        text = TAGS.sub("", line)
        indent = min(len(text) - len(text.lstrip(" ")), DEEPEST) // STEP * STEP
        deep = f" in{indent}" if indent else ""
        yield is_code, f'<span class="line{deep}">{line}</span>'


def use_lines(app: Sphinx) -> None:
    """Let the HTML builder write code so."""
    if isinstance(app.builder, StandaloneHTMLBuilder):
        app.builder.highlighter.formatter = Lines


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("builder-inited", use_lines)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
