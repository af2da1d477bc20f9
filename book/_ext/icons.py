"""The theme's icon font, cut down to the icons that the pages show.

The whole font would be nearly half of a first visit. every-byte.css puts this
one before it; an icon that it lacks the browser still takes from the whole.
"""

import re
from pathlib import Path

from fontTools import subset
from sphinx.application import Sphinx

FONT = "vendor/fontawesome/webfonts/fa-solid-900.ttf"
NAME = re.compile(r"\bfa-[a-z0-9-]+")
RULE = re.compile(r'((?:\.fa-[a-z0-9-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')
CONTENT = re.compile(r'content:"\\(f[0-9a-f]{3})"')


def used(html: Path) -> set[int]:
    """The code points of the icons in the pages, the theme's scripts and its small style sheet."""
    styles = html / "_static" / "styles"
    theme = html / "_static" / "scripts"
    files = [*html.rglob("*.html"), *theme.glob("*theme.js")]
    names = {f".{name}:before" for file in files for name in NAME.findall(file.read_text("utf-8"))}
    rules = RULE.findall((styles / "pydata-sphinx-theme.css").read_text("utf-8"))
    codes = [code for selectors, code in rules if names.intersection(selectors.split(","))]
    codes += CONTENT.findall((styles / "sphinx-book-theme.css").read_text("utf-8"))
    return {int(code, 16) for code in codes}


def write_font(app: Sphinx, exception: Exception | None) -> None:
    """Write _static/icons.woff."""
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    options = subset.Options(flavor="woff", layout_features=[], notdef_outline=False)
    font = subset.load_font(str(static / FONT), options)
    cut = subset.Subsetter(options)
    cut.populate(unicodes=used(Path(app.outdir)))
    cut.subset(font)
    subset.save_font(font, str(static / "icons.woff"), options)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
