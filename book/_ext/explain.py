"""The field of the first-aid page that takes an out-of-memory message.

Patterns, words and cures stand once, in `every_byte.explain`; the page's script reads them
from a JSON element. What the directive contains is for those who read the page elsewhere.
"""

import json
from pathlib import Path

from docutils import nodes
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte.allocator import OutOfMemoryError
from every_byte.explain import data
from every_byte.units import GiB, MiB

PAGE = "notebooks/11_troubleshooting"
# A card of 6 GiB that is nearly full of tensors, in the words of the PyTorch of today.
_FULL = OutOfMemoryError(26 * MiB, 6 * GiB, 5_500 * MiB, 5_640 * MiB, context=482 * MiB)
EXAMPLE = f"torch.OutOfMemoryError: {_FULL}".partition(" If reserved")[0]


class Explain(SphinxDirective):
    """``{explain}``: the field, and its answer."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The page's HTML, from explain.html beside this file."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            trim_blocks=True,
            undefined=StrictUndefined,
        )
        script = json.dumps(data(), separators=(",", ":")).replace("<", "\\u003c")
        html = environment.get_template("explain.html").render(
            script=Markup(script), example=EXAMPLE
        )
        return [nodes.raw("", html, format="html")]


def add_files(app: Sphinx, page: str, *_: object) -> None:
    """Load the field's script and style on its own page only."""
    if page == PAGE:
        app.add_css_file("explain.css")
        app.add_js_file("explain.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("explain", Explain)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
