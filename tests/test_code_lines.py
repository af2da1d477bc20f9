"""Code on a phone: a wide line goes on below, and copies as it was written."""

import re
from html import unescape
from pathlib import Path
from types import ModuleType

from playwright.sync_api import Browser
from pygments import highlight
from pygments.lexers import PythonLexer

EXTENSION = "code_lines"
CODE = '''def f(x):
    """Two lines:

      and so on."""
    return (x <
                                 1)
'''


def test_a_line_knows_its_indentation_and_its_text_stays(extension: ModuleType) -> None:
    made = highlight(CODE, PythonLexer(), extension.Lines())
    assert unescape(re.sub("<[^>]+>", "", made)).strip() == CODE.strip()
    kinds = re.findall(r'<span class="line(?: in(\d+))?">', made)
    assert kinds == ["", "4", "", "4", "4", "20"]


def test_what_is_copied_on_a_phone_is_the_code(html: Path, browser: Browser) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((html / "notebooks/13_your_own_script.html").as_uri())
    cell = tab.locator("div.highlight", has_text="FINETUNE =").first
    code = cell.locator("pre").text_content()
    assert code is not None and "    optim=" in code and "\n\nmodel = " in code
    tab.evaluate("addEventListener('copy', (event) => { window.copied = event.target.value; })")
    cell.locator("button.copybtn").click()
    assert tab.evaluate("window.copied").strip() == code.strip()
    tab.close()
