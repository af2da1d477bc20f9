"""Links the chapters to the glossary: a term's first mention in a chapter's prose.

Notebooks are read in Jupyter and on Colab as well, where Sphinx's ``{term}`` would
stand as text. So their sources name a term, and the book links it.
"""

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

# Terms whose word has other meanings here: linked where one of these stands in the paragraph.
MEANT_BY = {
    "block": re.compile(r"allocat|segment|split"),  # not the 64 weights that share a scale
    "buffer": re.compile(r"mask|parameter|tensor|\.half"),  # not what a CUDA graph keeps
    "measured": re.compile(r"[Ww]e measured|(?:are|were) measured"),  # by us, as its entry says
    "rank": re.compile(r"process|GPUs|cards"),  # not LoRA's
}

_NOT_IN = (nodes.title, nodes.reference, nodes.literal, nodes.table, nodes.raw, nodes.Invisible)


def link(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Replace the first mention of each term in a page of ``notebooks/``."""
    if not docname.startswith("notebooks/") or app.builder.format != "html":
        return
    objects = app.env.get_domain("std").get_objects()
    found = [(name, page, label) for name, _, kind, page, label, _ in objects if kind == "term"]
    terms = {name.lower(): (page, label) for name, page, label in found}
    written = {name.lower(): name for name, _, _ in found}
    already = {node.get("refuri", "").partition("#")[2] for node in tree.findall(nodes.reference)}
    terms = {name: at for name, at in terms.items() if at[1] not in already}
    if not terms:
        return
    longest_first = sorted(map(re.escape, terms), key=len, reverse=True)
    named = re.compile(rf"(?<![\w.-])({'|'.join(longest_first)})s?(?![\w-])", re.IGNORECASE)
    for text in list(tree.findall(nodes.Text)):
        if _is_prose(text):
            parts = list(_linked(app, docname, text, named, terms, written))
            if len(parts) > 1:
                text.parent.replace(text, parts)


def _is_prose(text: nodes.Text) -> bool:
    before = text.parent[: text.parent.index(text)]
    tags = [node.astext() for node in before if isinstance(node, nodes.raw)]
    if sum(tag.startswith("<a ") for tag in tags) > tags.count("</a>"):
        return False  # inside of a link that is written as HTML
    node: nodes.Node | None = text.parent
    in_paragraph = False
    while node is not None:
        if isinstance(node, _NOT_IN) or "output" in " ".join(
            getattr(node, "attributes", {}).get("classes", [])
        ):
            return False
        in_paragraph |= isinstance(node, nodes.paragraph)
        node = node.parent
    return in_paragraph


def _is_meant(word: str, text: nodes.Text, term: str) -> bool:
    """An abbreviation in its own capitals (zero is not ZeRO), a word where its meaning fits."""
    if any(letter.isupper() for letter in term[1:]) and not word.endswith(term[1:]):
        return False
    meaning = MEANT_BY.get(term.lower())
    if meaning is None:
        return True
    node: nodes.Node = text
    while not isinstance(node, nodes.paragraph):
        node = node.parent
    return meaning.search(node.astext()) is not None


def _linked(
    app: Sphinx,
    docname: str,
    text: nodes.Text,
    named: re.Pattern[str],
    terms: dict[str, tuple[str, str]],
    written: dict[str, str],
) -> Iterator[nodes.Node]:
    """The text in pieces; a term that is linked here leaves `terms`."""
    said, end = str(text), 0
    for match in named.finditer(said):
        word = match.group(1)
        if not _is_meant(word, text, written[word.lower()]):
            continue
        target = terms.pop(word.lower(), None)
        if target is None:
            continue
        yield nodes.Text(said[end : match.start()])
        words = nodes.inline("", match.group(0), classes=["std", "std-term"])
        yield make_refnode(app.builder, docname, target[0], target[1], words)
        end = match.end()
    yield nodes.Text(said[end:])


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
