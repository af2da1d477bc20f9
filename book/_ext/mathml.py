"""Formulas as MathML, made at build time: no script, no font, nothing from afar.

Browsers lay MathML out by themselves, and screen readers read it.
"""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

LOGGER = logging.getLogger(__name__)


def mathml(node: nodes.Element, display: str) -> str:
    """A formula's LaTeX as a MathML element; warns of what the converter does not know."""
    latex = node.astext()
    element = convert(latex, display=display)
    if "\\" in element:
        LOGGER.warning(
            "a command of the formula %r is unknown to latex2mathml", latex, location=node
        )
    return element


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on its own, with its number if it has one."""
    # By the second name the theme's script lets the keyboard scroll it, where it is too wide.
    self.body.append(self.starttag(node, "div", CLASS="math pst-scrollable-table-container"))
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(mathml(node, "block") + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
