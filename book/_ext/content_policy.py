"""A strict content security policy for every page: scripts come from the book's own files only.

Themes and extensions write scripts into the pages, and handlers into their buttons. Once all
pages are there, the scripts are moved into files, named after what they say, and the handlers
into _static/actions.js. Then each page declares that it runs nothing else, so that markup
which somebody smuggles in stays markup. Style attributes are allowed: figures have them.
"""

import hashlib
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data:",
    "font-src": "'self'",
    "connect-src": "'self'",  # the search reads the pages that it found
    "form-action": "'self'",
    "base-uri": "'none'",
}
META = '<meta http-equiv="Content-Security-Policy" content="{}">'.format(
    "; ".join(f"{what} {sources}" for what, sources in POLICY.items())
)
# What the theme's buttons say that they do, and what actions.js calls it.
ACTIONS = {"toggleFullScreen()": "fullscreen", "window.print()": "print"}

_SCRIPT = re.compile(r"<script\b([^>]*)>(.*?)</script>", re.DOTALL)
_ROOT = re.compile(r'data-content_root="([^"]*)"')
_HANDLER = re.compile(r'(<[a-z][^<>]*?)\son[a-z]+="([^"]*)"')


def strict(page: str, static: Path) -> str:
    """The same page without scripts and handlers of its own, which go to files in `static`.

    Raises:
        ExtensionError: it has a handler that `ACTIONS` does not know.
    """
    found = _ROOT.search(page)
    root = found[1] if found else ""

    def moved(script: re.Match[str]) -> str:
        attributes, text = script.groups()
        if "src=" in attributes or "application/json" in attributes:
            return script[0]
        name = f"inline/{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
        (static / name).parent.mkdir(exist_ok=True)
        (static / name).write_text(text.strip() + "\n", "utf-8")
        return f'<script{attributes} src="{root}_static/{name}"></script>'

    def named(tag: re.Match[str]) -> str:
        if tag[2] not in ACTIONS:
            raise ExtensionError(
                f"a page has the handler {tag[2]!r}, which no content security policy lets run: "
                "put it into actions.js and ACTIONS of content_policy.py"
            )
        return f'{tag[1]} data-action="{ACTIONS[tag[2]]}"'

    page = _HANDLER.sub(named, _SCRIPT.sub(moved, page))
    before, charset, after = page.partition('<meta charset="utf-8"')
    end = after.index(">") + 1
    return f"{before}{charset}{after[:end]}\n{META}{after[end:]}"


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Make every page strict."""
    if exception or app.builder.name != "html":
        return
    html = Path(app.outdir)
    for page in (page for page in html.rglob("*.html") if "_static" not in page.parts):
        page.write_text(strict(page.read_text("utf-8"), html / "_static"), "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_js_file("actions.js", loading_method="defer")
    app.connect("build-finished", finish, priority=900)  # after all that writes pages
    return {"parallel_read_safe": True, "parallel_write_safe": True}
