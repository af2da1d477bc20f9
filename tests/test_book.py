"""The built book: whole, offline, and legible."""

import functools
import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from jupyter_book.cli.main import main as jupyter_book

import every_byte
from every_byte.cli import COMMANDS
from tools.book import build, is_up_to_date, main
from tools.notebooks import sources
from tools.repository import ROOT, address, web_address


class Links(HTMLParser):
    """Every address in a page, by element."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.doubles: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and value:
                self.found.append((tag, value))
            if name == "id" and value:
                (self.doubles if value in self.ids else self.ids).add(value)


@functools.cache
def links(page: Path) -> Links:
    parser = Links()
    parser.feed(page.read_text("utf-8"))
    return parser


def test_the_address_itself_leads_to_the_start_page(html: Path) -> None:
    assert ("a", "book/index.html") in links(html / "index.html").found
    assert 'content="0; url=book/index.html"' in (html / "index.html").read_text("utf-8")


def test_the_notebooks_can_be_downloaded(html: Path) -> None:
    for source in sources(ROOT / "notebooks"):
        stored = source.with_suffix(".ipynb")
        assert (html / "_sources" / "notebooks" / stored.name).read_bytes() == stored.read_bytes()


def test_no_page_is_heavy(html: Path, page: str) -> None:
    """Before compression, and without what all pages share: see `test_a_first_visit_is_light`."""
    assert (html / page).stat().st_size < 1_000_000


def test_nothing_is_loaded_from_elsewhere(html: Path, page: str) -> None:
    for tag, target in links(html / page).found:
        if tag != "a":
            assert not urlsplit(target).netloc, f"<{tag}> loads {target}"


def test_a_page_runs_nothing_but_the_books_own_files(html: Path, page: str) -> None:
    text = (html / page).read_text("utf-8")
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert len(policy) == 1 and "script-src 'self';" in policy[0]
    assert text.index("Content-Security-Policy") < text.index("<script")
    for attributes in re.findall(r"<script\b([^>]*)>", text):
        assert "src=" in attributes or "application/json" in attributes
    assert not re.search(r"<[a-z][^<>]*\son[a-z]+=", text)
    assert "javascript:" not in text


def test_links_within_the_book_lead_somewhere(html: Path, page: str) -> None:
    for tag, target in links(html / page).found:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        # The 404 page is shown at any address, so its links start at the root.
        there = html / page if not parts.path else (html / page).parent / unquote(parts.path)
        if parts.path.startswith("/"):
            there = html / unquote(parts.path[1:])
        assert there.exists(), f"<{tag}> {target}"
        if there.name == "estimator.html" and "=" in parts.fragment:
            continue  # what is chosen in its form
        if parts.fragment and there.suffix == ".html":
            assert parts.fragment in links(there).ids, target


def test_ids_are_unique(html: Path, page: str) -> None:
    assert links(html / page).doubles == set()


def test_images_have_a_text_of_their_own(html: Path, page: str) -> None:
    text = (html / page).read_text("utf-8")
    for label in re.findall(r'<svg class="cell-figure" role="img" aria-label="([^"]*)"', text):
        assert len(label) > 60
    for image in re.findall("<img[^>]*>", text):
        assert 'alt="' in image, image
        assert 'alt=""' not in image or "logo__image" in image, image  # beside the title


def test_a_page_is_of_bounded_size(html: Path, page: str) -> None:
    assert (html / page).stat().st_size < 1_000_000


def test_a_page_says_what_it_is_about(html: Path, page: str) -> None:
    if page in ("genindex.html", "search.html", "404.html"):
        return
    text = (html / page).read_text("utf-8")
    (said,) = re.findall(r'<meta name="description" content="([^"]*)">', text)
    assert said == re.findall(r'<meta property="og:description" content="([^"]*)">', text)[0]
    assert len(said) > 40


def test_figures_stand_in_the_page_with_a_name(html: Path) -> None:
    text = (html / "notebooks" / "04_mlp_adam_vs_sgd.html").read_text("utf-8")
    figures = re.findall(r'<svg class="cell-figure" role="img" aria-label="([^"]*)"', text)
    assert len(figures) == 3
    assert all(len(label) > 60 for label in figures)
    assert "833.58" in text


def test_no_formula_is_left_to_a_script(html: Path, page: str) -> None:
    text = (html / page).read_text("utf-8")
    assert not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE)
    assert r"\(" not in text


def test_references_show_no_latex(html: Path) -> None:
    page = (html / "book" / "references.html").read_text("utf-8")
    entries = re.findall(r'<div class="citation".*?</div>', page, re.DOTALL)
    assert len(entries) > 50
    assert not [entry for entry in entries if "\\" in entry or "{" in entry]


def test_formulas_are_mathml(html: Path) -> None:
    assert "<math" in (html / "book" / "index.html").read_text("utf-8")


def test_without_an_address_there_is_no_button(html: Path, page: str) -> None:
    text = (html / page).read_text("utf-8")
    assert "colab.research.google.com" not in text
    assert "executablebooks" not in text  # Jupyter Book's own address, its default
    assert "btn-source" not in text
    assert 'property="og:url"' not in text
    assert not (html / "sitemap.xml").exists()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the book to change; `build` builds it."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".*", "_build", "test_*.py", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)
    monkeypatch.setattr("tools.book.ROOT", copy)
    monkeypatch.chdir(copy)
    return copy


def test_with_addresses_the_pages_name_them(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository's in buttons, the site's in metadata, the sitemap and the 404 page.

    Of three pages, for the time it takes: what they link to is missing, so warnings are none.
    """
    toc = "format: jb-book\nroot: book/index\nchapters:\n"
    toc += "- file: book/glossary\n- file: notebooks/04_mlp_adam_vs_sgd\n"
    (copy / "_toc.yml").write_text(toc)
    repository, site = "https://github.com/someone/every-byte", "https://someone.org/byte/"
    monkeypatch.setenv("REPOSITORY", repository)
    config = copy / "_config.yml"
    config.write_text(config.read_text().replace('baseurl: ""', f"baseurl: {site.rstrip('/')}"))
    jupyter_book(["build", str(copy), "--path-output", str(tmp_path)], standalone_mode=False)
    html = tmp_path / "_build" / "html"
    page = html / "notebooks" / "04_mlp_adam_vs_sgd.html"
    targets = [target for _, target in links(page).found]
    colab = "https://colab.research.google.com/github/someone/every-byte/blob/main/notebooks/"
    assert colab + "04_mlp_adam_vs_sgd.ipynb" in targets
    assert repository in targets
    assert f"{repository}/edit/main/notebooks/04_mlp_adam_vs_sgd.py" in targets
    assert any(t.startswith(f"{repository}/issues/new") for t in targets)
    assert f"{site}notebooks/04_mlp_adam_vs_sgd.html" in targets  # canonical
    start = (html / "book" / "index.html").read_text("utf-8")
    assert f'<meta property="og:url" content="{site}book/index.html">' in start
    assert f'<meta property="og:image" content="{site}_static/card.png">' in start
    assert (html / "_static" / "card.png").stat().st_size < 40_000
    entries = re.findall("<loc>(.*)</loc>", (html / "sitemap.xml").read_text("utf-8"))
    assert {f"{site}book/index.html", f"{site}book/glossary.html"} < set(entries)
    assert all((html / entry.removeprefix(site)).is_file() for entry in entries)
    elsewhere = links(html / "404.html").found
    assert ("a", "/byte/book/glossary.html") in elsewhere
    assert all(target.startswith(("/byte/", "#", "http")) for _, target in elsewhere)


@pytest.mark.parametrize(
    ("repository", "edit", "colab"),
    [
        ("https://github.com/a/b", "https://github.com/a/b/edit/trunk/", True),
        ("https://gitlab.example.org/a/b", "https://gitlab.example.org/a/b/-/edit/trunk/", False),
        ("https://codeberg.org/a/b", None, False),
    ],
)
def test_a_host_has_the_buttons_that_it_understands(
    monkeypatch: pytest.MonkeyPatch, repository: str, edit: str | None, colab: bool
) -> None:
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    links = importlib.import_module("repository_links")
    monkeypatch.setenv("REPOSITORY", repository)
    config = SimpleNamespace(html_theme_options={"repository_branch": "trunk"}, html_context={})
    links.add_links(None, config)
    options = config.html_theme_options
    assert options["use_edit_page_button"] == options["use_issues_button"] == (edit is not None)
    assert options["repository_url"] == (repository if edit else "")
    assert bool(options["launch_buttons"]) == colab
    template = config.html_context.get("edit_page_url_template")
    assert template is None if edit is None else template.startswith(edit)


def test_a_warning_fails_the_build(copy: Path, tmp_path: Path) -> None:
    (copy / "_toc.yml").write_text("format: jb-book\nroot: book/references\n")  # is quick
    page = build(tmp_path).parent / "book" / "references.html"
    assert is_up_to_date(tmp_path)
    written = page.read_bytes()
    page.write_bytes(written + b" ")  # not as it was built
    assert not is_up_to_date(tmp_path)
    page.write_bytes(written)
    assert is_up_to_date(tmp_path)
    (copy / "helpers" / "another.py").touch()
    assert not is_up_to_date(tmp_path)
    with (copy / "book" / "references.md").open("a") as source:
        source.write("\nSee [nowhere](nowhere.md).\n")
    with pytest.raises(RuntimeError, match=r"nowhere\.md"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("git@github.com:someone/every-byte.git\n", "https://github.com/someone/every-byte"),
        ("ssh://git@github.com/someone/every-byte", "https://github.com/someone/every-byte"),
        ("https://github.com/someone/every-byte.git", "https://github.com/someone/every-byte"),
        ("https://user:secret@gitlab.com/a/b/c/", "https://gitlab.com/a/b/c"),
        ("http://example.org/a", "https://example.org/a"),
        ("/home/someone/every-byte", None),
        ("../every-byte.git", None),
        ("file:///srv/every-byte", None),
        ("", None),
        # Written into Python and HTML: nothing may end a string or an attribute.
        ('https://x.y/"; import os; os.remove("a") #', None),
        ("https://x.y/a'><script>alert(1)</script>", None),
        ("git@x.y:a\\nb", None),
        ("https://x.y/a b", None),
        ("https://x.y/a?b#c", None),
        ("https://x.y:port/a", None),
        ("https://x.y:8443/a", "https://x.y:8443/a"),
        ("javascript:alert(1)//x.y/a", None),
    ],
)
def test_web_address(remote: str, expected: str | None) -> None:
    assert web_address(remote) == expected


def test_the_address_comes_from_the_first_place_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REPOSITORY", raising=False)
    config = tmp_path / "_config.yml"
    config.write_text("title: Book\n")
    assert address(tmp_path) is None
    monkeypatch.setattr("tools.repository._origin", lambda root: "git@example.org:a/origin.git")
    assert address(tmp_path) == "https://example.org/a/origin"
    config.write_text("repository: {url: https://example.org/a/config}\n")
    assert address(tmp_path) == "https://example.org/a/config"
    monkeypatch.setenv("REPOSITORY", "https://example.org/a/chosen")
    assert address(tmp_path) == "https://example.org/a/chosen"
    monkeypatch.setenv("REPOSITORY", "somewhere")
    with pytest.raises(ValueError, match="REPOSITORY is 'somewhere': expected a web address"):
        address(tmp_path)


@pytest.mark.parametrize("source", sources(ROOT / "notebooks"), ids=lambda source: source.stem)
def test_a_chapter_links_the_glossarys_terms_at_their_first_mention(
    html: Path, source: Path
) -> None:
    page = (html / "notebooks" / f"{source.stem}.html").read_text("utf-8")
    linked = re.findall(r'href="\.\./book/glossary\.html#term-([^"]+)"', page)
    assert len(linked) >= 5
    assert len(set(linked)) == len(linked)
    said = dict(re.findall(r'glossary\.html#term-([^"]+)"[^>]*><span[^>]*>([^<]*)</span>', page))
    assert said.get("ZeRO", "ZeRO") == "ZeRO"  # not zero
    assert "block" not in linked or source.stem[:2] not in {"02", "09", "17"}  # of weights, there
    for code in re.findall(r"<pre.*?</pre>|<h[1-6].*?</h[1-6]>|<table.*?</table>", page, re.DOTALL):
        assert "glossary.html#term-" not in code


def test_jupyter_book_builds_it_too(tmp_path: Path) -> None:
    """By its own command, and with the project not installed: one page, for the time it takes."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(ROOT / "_config.yml", root)
    for folder in ("book", "every_byte", "helpers", "tools"):
        unwanted = shutil.ignore_patterns("__pycache__", "mnist-10k")
        shutil.copytree(ROOT / folder, root / folder, ignore=unwanted)
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/references\n")
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = (
        f"import sys; sys.path += {packages}; from jupyter_book.cli.main import main; "
        "main(['build', 'root'])"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "REPOSITORY": "https://github.com/a/b"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = (root / "_build" / "html" / "book" / "references.html").read_text("utf-8")
    assert "https://github.com/a/b/edit/main/book/references.md" in page


def test_the_api_page_has_every_public_name(html: Path) -> None:
    ids = links(html / "book" / "api.html").ids
    names = set(every_byte.__all__) - {"KINDS", "estimate"}
    assert {f"every_byte.{name}" for name in names} <= ids
    assert {"every_byte.tracker.KINDS", "every_byte.estimate.Setup"} <= ids


def test_the_api_page_names_every_command() -> None:
    page = (ROOT / "book" / "api.md").read_text("utf-8")
    assert re.findall(r"^\| `every-byte (\w+)", page, re.MULTILINE) == list(COMMANDS)


def test_a_file_in_the_folders_place_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "file/_build cannot be written (Not a directory): name another folder" in said
