"""What a site needs beside its pages: descriptions, a social card, a sitemap, a 404 page.

Descriptions and the 404 page are always there. What has to name the site's own
address needs `html.baseurl` in _config.yml: links to cards, and the sitemap.
"""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.sax.saxutils import escape as xml_escape

from docutils import nodes
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from sphinx.application import Sphinx

CARD = "_static/card.png"
CARD_SIZE = (1200, 630)  # what the large networks show uncut

# Search fetches the pages that it found, for a line of each. From a file it must not.
FROM_A_FILE = (
    'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;'
)

NOT_FOUND = """
<section>
<h1>404: not allocated</h1>
<p>No page stands at this address. It may have moved: <a href="search.html">search for its
words</a>, or begin at <a href="book/index.html">the start page</a>.</p>
</section>
"""

# At the address itself: Jupyter Book writes a redirection without a word.
REDIRECT = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
{tags}
<link rel="canonical" href="{start}">
<meta http-equiv="refresh" content="0; url={start}">
<p><a href="{start}">{title}</a></p>
</html>
"""


def description(doctree: nodes.document) -> str:
    """A page's first paragraph."""
    return next((p.astext().replace("\n", " ") for p in doctree.findall(nodes.paragraph)), "")


def address(app: Sphinx) -> str:
    """The site's address, ending in a slash, or nothing."""
    configured: str = app.config.html_baseurl
    return configured.rstrip("/") + "/" if configured else ""


def add_metadata(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Describe a page to search engines, and to whoever shows a link to it."""
    if doctree is None:
        return
    title = re.sub(r"<[^>]*>", "", context["title"])  # HTML, already escaped
    said = escape(description(doctree))
    site = address(app)
    tags = [f'<meta name="description" content="{said}">']
    properties = {"title": title, "type": "article", "site_name": escape(app.config.html_title)}
    properties["description"] = said
    if site:
        properties |= {"url": f"{site}{page}.html", "image": site + CARD}
        properties |= {"image:width": str(CARD_SIZE[0]), "image:height": str(CARD_SIZE[1])}
        properties["image:alt"] = f"{app.config.html_title}, and the eight bits of the letter E"
        tags.append('<meta name="twitter:card" content="summary_large_image">')
    tags += [f'<meta property="og:{name}" content="{text}">' for name, text in properties.items()]
    context["metatags"] += "\n".join(tags)


def not_found(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The page that a server shows where there is none."""
    yield "404", {"title": "Not found", "body": NOT_FOUND}, "page.html"


def draw_card(path: Path, title: str) -> None:
    """The picture beside a link: the logo's bits, the title, the question."""
    card = Image.new("RGB", CARD_SIZE, "#121212")
    draw = ImageDraw.Draw(card)
    for bit, one in enumerate(f"{ord('E'):08b}"):
        x, y = 90 + bit % 4 * 70, 90 + bit // 4 * 130
        color = "#2a8fc9" if one == "1" else "#193747"
        draw.rounded_rectangle((x, y, x + 54, y + 114), 12, fill=color)
    file = font_manager.findfont("DejaVu Sans:bold")
    draw.text((90, 370), title, "white", ImageFont.truetype(file, 84))
    file = font_manager.findfont("DejaVu Sans")
    draw.text((90, 490), "Why is my GPU out of memory?", "#ced6dd", ImageFont.truetype(file, 44))
    card.save(path, optimize=True)


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Write what stands beside the pages, once these are there."""
    if exception or app.builder.name != "html":
        return
    html, site = Path(app.outdir), address(app)
    # A server shows it at any address: what it names has to be found from there.
    page = html / "404.html"
    root = urlsplit(site).path or "/"
    text = page.read_text("utf-8")
    text = re.sub(r'\b(href|src|action)="(?!#|/|[\w.+-]+:)', rf'\1="{root}', text)
    page.write_text(text.replace('data-content_root="./"', f'data-content_root="{root}"'), "utf-8")
    start = f"{app.config.root_doc}.html"
    described = (html / start).read_text("utf-8")
    tags = re.findall(r'<meta (?:name="description"|property=)[^>]*>', described)
    (html / "index.html").write_text(
        REDIRECT.format(title=app.config.html_title, tags="\n".join(tags), start=start), "utf-8"
    )
    if not site:
        return
    draw_card(html / CARD, app.config.html_title)
    names = sorted(app.env.found_docs)
    pages = [f"<url><loc>{xml_escape(site + name)}.html</loc></url>" for name in names]
    (html / "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
        + "\n".join(pages)
        + "\n</urlset>\n",
        "utf-8",
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_js_file(None, body=FROM_A_FILE, priority=900)
    app.connect("html-page-context", add_metadata)
    app.connect("html-collect-pages", not_found)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
