"""The HTML file of every-byte run: offline, by keyboard, both themes, no markup from outside."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from every_byte.cli import main
from every_byte.units import grouped, short

SCRIPT = """
import torch
from torch import nn
class A(nn.Module):  # </script><img src=x onerror=alert(1)>
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(640, 2560), nn.Linear(2560, 10)
    def forward(self, x):
        return self.two(self.one(x).relu())  # "<b>" & 'more'
model = A().cuda()
opt = torch.optim.AdamW(model.parameters())
for step in range(3):
    loss = model(torch.randn(512, 640, device="cuda")).mean()  # </script><b id="made">x</b>
    loss.backward()  # </script><b id="made">x</b> & <img src=x onerror="alert(1)">
    opt.step()
    opt.zero_grad()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("<b id=made>")
    script, path = folder / "<i>train.py", folder / "report.html"
    script.write_text(SCRIPT)
    assert main(["run", str(script), "--card", "RTX 4090", "--report", str(path)]) == 0
    return path


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_read_by_pointer_and_keyboard(browser: Browser, report: Path, theme: str) -> None:
    tab = browser.new_page(color_scheme=theme, viewport={"width": 1280, "height": 900})  # type: ignore[arg-type]
    errors: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(report.as_uri())
    chart = tab.get_by_role("slider")
    at_peak = tab.locator(".where").inner_text()
    said = re.fullmatch(r"Step \d, in backward, at <i>train.py:14: (.+) \((.+) B\)", at_peak)
    assert said is not None and said[1] == short(int(said[2].replace(",", "")))
    expect(tab.locator(".source")).to_contain_text('<img src=x onerror="alert(1)">')
    chart.press("Home")
    expect(tab.locator(".where")).to_contain_text("before the first forward")
    chart.press("End")
    expect(tab.locator(".where")).to_contain_text("Step 3, outside of the model, at <i>train.py:15")
    last = chart.get_attribute("aria-valuenow")
    assert last == chart.get_attribute("aria-valuemax")
    box = chart.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    assert 0 < int(chart.get_attribute("aria-valuenow") or 0) < int(last or 0)
    assert tab.locator("#made").count() == tab.locator("img").count() == 0
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    # Its axis has the unit of its largest, and fits a phone.
    axis = tab.locator('.chart text[text-anchor="end"]')
    assert str(axis.last.text_content()).split()[1] == said[1].split()[1] == "MB"
    edges = axis.evaluate_all("texts => texts.map((text) => text.getBoundingClientRect().left)")
    assert min(edges) >= chart.evaluate("chart => chart.getBoundingClientRect().left")
    assert errors == [] and len(requests) == 1
    # Its policy forbids what is not in it: neither a script, nor a style, nor a request.
    tab.evaluate("document.body.append(document.createElement('script'))")
    forbidden = tab.evaluate("fetch('https://example.org').then(() => 'sent', () => 'blocked')")
    assert forbidden == "blocked"
    tab.close()


def test_it_says_the_same_in_words_and_figures(report: Path) -> None:
    text = report.read_text("utf-8")
    (data,) = re.findall(r'<script type="application/json" id="timeline">(.*?)</script>', text)
    told = json.loads(data)
    totals = [sum(row) for row in told["places"]["bytes"]]
    ((size, peak),) = re.findall(r"Peak: (\S+ MB) \(([\d,]+) B\) allocated", text)
    assert max(totals) == totals[told["at"]] == int(peak.replace(",", ""))
    assert size == short(max(totals))
    shown, exact = re.findall(
        r"<table>.*?</table>", text.partition("The peak of each phase")[2], re.S
    )
    assert f">{size}</td>" in shown and f">{grouped(max(totals))} B</td>" in exact
    assert (
        "style=" not in text
        and "onload" not in text
        and "http" not in text.split("<main>")[0][300:]
    )


def test_a_file_of_another_kind_is_kept(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "a.py"
    script.write_text("import torch\ntorch.ones(1).cuda()\nprint('ran')\n")
    other = tmp_path / "notes.html"
    other.write_text("<p>mine")
    arguments = ["run", str(script), "--card", "T4", "--report"]
    assert main([*arguments, str(other)]) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and "is not a report of every-byte run: name another file, or replace it with --force"
        in said.err
    )
    assert other.read_text() == "<p>mine"
    assert main([*arguments, str(other), "--force"]) == 0
    assert main([*arguments, str(other)]) == 0  # its own kind
    assert main([*arguments, str(tmp_path / "no" / "r.html")]) == 2
    assert main([*arguments, str(tmp_path)]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.py", "notes.html"]
