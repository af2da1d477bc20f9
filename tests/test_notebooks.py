"""The notebooks as files: in step with their sources, and compared to the last digit.

nbval executes them itself, beside these tests (see Makefile: make test).
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.provisioning import KernelProvisionerFactory
from nbformat import NotebookNode

from tools.kernels import fork_kernels
from tools.notebooks import STAMP, helpers_of, made, main, outputs_digest, problems, sources

ROOT = Path(__file__).parent.parent
SOURCES = sources(ROOT / "notebooks")
NAMES = [source.stem for source in SOURCES]


def read(source: Path) -> NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_there_are_notebooks_and_each_has_its_source() -> None:
    assert SOURCES
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_notebook_is_in_step_with_its_source(source: Path) -> None:
    assert problems(source, read(source)) == []


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_what_is_not_compared_says_what_bounds_it(source: Path) -> None:
    """Only the set-up cell, and cells that end in an assertion, are kept from nbval."""
    code = [cell for cell in read(source).cells if cell.cell_type == "code"]
    tags = [set(cell.metadata.get("tags", [])) for cell in code]
    assert not any({"nbval-skip", "raises-exception"} & of for of in tags)
    assert not any("NBVAL" in cell.source for cell in code)
    for cell, of in zip(code[1:], tags[1:], strict=True):
        if "nbval-ignore-output" in of:
            assert cell.source.splitlines()[-1].startswith("assert "), cell.source


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def said(cell: NotebookNode) -> str:
    """What a code cell printed or displayed, as text."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        texts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain", ""))
    return "\n".join(texts)


def test_how_many_numbers_nothing_guards() -> None:
    """A number is guarded by nbval, by an assertion that held when it was printed, or by the lock.

    That it stands as it was printed is the digest's (test_a_notebook_is_in_step_with_its_source).
    """
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE))
    numbers = unguarded = 0
    for source in SOURCES:
        for cell in read(source).cells:
            if cell.cell_type != "code":
                continue
            text = said(cell)
            numbers += len(NUMBER.findall(text))
            last = cell.source.splitlines()[-1]
            if "nbval-ignore-output" in cell.metadata.get("tags", []) and "assert" not in last:
                for name, version in re.findall(r"(\w+) (\d+\.\d+\.\w+)", text):
                    if name == "Python" or locked.get(name) == version:
                        text = text.replace(f"{name} {version}", "")
                unguarded += len(NUMBER.findall(text))
    print(f"{unguarded} of {numbers} printed numbers are guarded by nothing")
    assert unguarded < 0.03 * numbers
    assert numbers > 5000


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_figures_have_a_text_of_their_own(source: Path) -> None:
    for cell in read(source).cells:
        if any("image/svg+xml" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 60, cell.source


EVIDENCE = {"12_audit"}  # pages to look things up in, not chapters: no way through them


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_it_opens_with_what_it_takes_and_closes_with_what_it_gave(source: Path) -> None:
    text = [cell.source for cell in read(source).cells if cell.cell_type == "markdown"]
    title, *rest = text[0].splitlines()
    assert title.startswith("# ")
    assert re.search(r"^- \*\*Time:\*\* .*minute", text[0], re.MULTILINE)
    assert re.search(r"^- \*\*Needs:\*\* \w+", text[0], re.MULTILINE)
    if source.stem in EVIDENCE:
        return
    opening = [line for line in rest if line]
    question, answer = re.fullmatch(r"\*\*(.+\?)\*\* (.+)", opening.pop(0)).groups()  # type: ignore[union-attr]
    assert len(question.split()) <= 20
    assert len(re.findall(r"[.!](?= |$)", answer)) == 2, answer
    assert opening[0].startswith("After this chapter you can ")
    ends = {cell.split("\n")[0]: cell for cell in text if cell.startswith("## ")}
    assert list(ends)[-3:] == ["## What to remember", "## Exercises", "## Where to go next"]
    assert len(re.findall("^- ", ends["## What to remember"], re.MULTILINE)) == 3
    assert re.search(r"\]\((\.\./book/)?\w+\.(ipynb|md)\)", ends["## Where to go next"])


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_an_unexecuted_notebook_is_found_out(source: Path) -> None:
    notebook = made(source, None)
    found = problems(source, notebook)
    assert "it was not executed since its source changed" in found
    assert "it has no outputs" in found


def test_the_readme_says_what_chapter_10_replays() -> None:
    said = (ROOT / "README.md").read_text("utf-8")
    (figures,) = re.findall(r"82\.4 GiB.* 67\.0 .*: (.*) and (.*), or (.*) and (.*) with", said)
    (source,) = [source for source in SOURCES if source.stem.startswith("10_")]
    outputs = [o for cell in read(source).cells for o in cell.get("outputs", [])]
    (rows,) = [o.data["text/markdown"] for o in outputs if "82.4 |" in str(o.get("data"))]
    replayed = [row.split("|")[4].strip() for row in rows.splitlines()[2:]]
    assert list(figures) == [replayed[i] for i in (0, 2, 1, 3)]


def test_the_readme_shows_what_a_chapter_prints_of_a_script() -> None:
    shown = (ROOT / "README.md").read_text("utf-8").partition("$ every-byte run ")[2]
    (source,) = [source for source in SOURCES if source.stem.startswith("13_")]
    outputs = [o for cell in read(source).cells for o in cell.get("outputs", [])]
    (printed,) = [o.text for o in outputs if "Trainer(model" in o.get("text", "")]
    lines = shown.partition("```")[0].splitlines()[1:]
    assert len(lines) == 3
    assert [line for line in lines if line not in printed.splitlines()] == []


def break_source_hash(notebook: NotebookNode) -> None:
    notebook.metadata[STAMP]["source_sha256"] = "0" * 64


def break_cell(notebook: NotebookNode) -> None:
    notebook.cells[3].source += " "


def break_order(notebook: NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].execution_count, code[1].execution_count = 2, 1


def break_with_error(notebook: NotebookNode) -> None:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]))


def break_with_stderr(notebook: NotebookNode) -> None:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="12%"))


def break_output(notebook: NotebookNode) -> None:
    cell = [c for c in notebook.cells if c.cell_type == "code" and c.outputs][-1]
    cell.outputs[0] = nbformat.from_dict(json.loads(json.dumps(cell.outputs[0]).replace("1", "2")))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (break_output, "an output is not what its execution wrote"),
        (break_source_hash, "it was not executed since its source changed"),
        (break_cell, "its cells are not those of its source"),
        (break_order, "its cells were not executed in order"),
        (break_with_error, "a cell ended in an error"),
        (break_with_stderr, "a cell wrote to stderr"),
    ],
)
def test_each_way_out_of_step_is_found(damage, expected: str) -> None:  # type: ignore[no-untyped-def]
    notebook = copy.deepcopy(read(SOURCES[0]))
    damage(notebook)
    (found,) = problems(SOURCES[0], notebook)
    assert found.startswith(expected)


def nbval(notebook: NotebookNode, folder: Path) -> subprocess.CompletedProcess[str]:
    nbformat.write(notebook, folder / "notebook.ipynb")
    command = "-m pytest --nbval --nbval-current-env -q -p no:xdist -p no:cacheprovider"
    return subprocess.run(
        [sys.executable, *command.split(), "notebook.ipynb"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_nbval_fails_where_a_stored_digit_is_changed(tmp_path: Path) -> None:
    """On notebook 04's own cells, up to the first figure that the GPU gives."""
    figure = "204,032,512"
    notebook = read(ROOT / "notebooks" / "04_mlp_adam_vs_sgd.py")
    ends = [i for i, cell in enumerate(notebook.cells) if '"allocated (B)"' in cell.source]
    notebook.cells = notebook.cells[: ends[0] + 1]
    (output,) = notebook.cells[-1].outputs
    table = output.data["text/markdown"]
    assert figure in table
    honest = nbval(notebook, tmp_path)
    assert honest.returncode == 0, honest.stdout
    output.data["text/markdown"] = table.replace(figure, "204,032,513", 1)
    changed = nbval(notebook, tmp_path)
    assert changed.returncode == 1
    assert "204,032,513" in changed.stdout


def test_a_notebook_is_executed_again_if_a_helper_that_it_reaches_changes() -> None:
    reached = {path.stem for path in helpers_of(ROOT / "notebooks" / "04_mlp_adam_vs_sgd.py")}
    assert {"gpu", "mlp", "plots"} <= reached  # imported
    assert {"model", "tracker", "units"} <= reached  # by these
    assert not {"models", "record"} & reached
    assert helpers_of(ROOT / "every_byte" / "units.py") == set()


SOURCE = """# %% [markdown]
# # A notebook

# %%
REPOSITORY = ""
print(6 * 7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "01_small.py").write_text(SOURCE)
    return tmp_path


def test_a_second_run_changes_no_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = folder / "01_small.ipynb"
    assert main(["--folder", str(folder)]) == 0
    first = small.read_bytes()
    assert main(["--folder", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("01_small: fresh\n")
    assert main(["--folder", str(folder), "--force"]) == 0  # nor does a second execution
    assert small.read_bytes() == first
    assert problems(folder / "01_small.py", read(folder / "01_small.py")) == []
    assert not list(folder.glob("*.new"))


SAID = "# # A notebook"
RAN = "print(6 * 7)"


def text_changed(folder: Path) -> tuple[NotebookNode, NotebookNode]:
    """The small notebook as it was executed, and after its text and tags changed."""
    source = folder / "01_small.py"
    assert main(["--folder", str(folder)]) == 0
    before = read(source)
    (output,) = before.cells[1].outputs
    output.text = "not what the code prints\n"  # to see that nothing is executed
    before.metadata[STAMP]["outputs_sha256"] = outputs_digest(before)
    nbformat.write(before, source.with_suffix(".ipynb"))
    said = SOURCE.replace(SAID, "# # Another title\n#\n# And a line.")
    source.write_text(said.replace("# %%\n", '# %% tags=["hide-input"]\n'))
    assert main(["--folder", str(folder)]) == 0
    return before, read(source)


def test_a_changed_text_is_carried_and_nothing_is_executed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = text_changed(folder)
    assert capsys.readouterr().out.endswith("text and tags carried, outputs as they were\n")
    assert after.cells[0].source == "# Another title\n\nAnd a line."
    assert after.cells[1].metadata.tags == ["hide-input"]
    assert after.cells[1].outputs == before.cells[1].outputs
    assert problems(folder / "01_small.py", after) == []
    assert main(["--folder", str(folder)]) == 0
    assert capsys.readouterr().out == "01_small: fresh\n"


@pytest.mark.parametrize("code", ["print(6 * 8)", f"{RAN}\n\n# %%\n1", f"{RAN}  # so"])
def test_a_changed_code_is_executed_and_never_carried(
    folder: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text_changed(folder)
    (folder / "01_small.py").write_text(SOURCE.replace(RAN, code))
    assert main(["--folder", str(folder), "--text"]) == 1
    assert "its code changed" in capsys.readouterr().err
    assert main(["--folder", str(folder)]) == 0
    (output,) = read(folder / "01_small.py").cells[1].outputs
    assert output.text == ("48\n" if "8" in code else "42\n")


def test_a_changed_helper_is_executed_unless_only_text_is_asked_for(folder: Path) -> None:
    source = folder / "01_small.py"
    _, after = text_changed(folder)
    after.metadata[STAMP]["helpers_sha256"] = "0" * 64
    nbformat.write(after, source.with_suffix(".ipynb"))
    source.write_text(SOURCE)
    assert main(["--folder", str(folder), "--text"]) == 0
    assert "not what" in read(source).cells[1].outputs[0].text
    assert main(["--folder", str(folder)]) == 0
    assert read(source).cells[1].outputs[0].text == "42\n"


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = folder / "01_small.ipynb"
    small.write_text("old")
    (folder / "01_small.py").write_text(SOURCE + "1 / 0\n")
    assert main(["--folder", str(folder)]) == 1
    assert "01_small.ipynb is as it was" in capsys.readouterr().err
    assert small.read_text() == "old"


def test_an_unknown_name_is_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", str(folder), "05_other"]) == 2
    assert capsys.readouterr().err == "NB is '05_other': expected one of 01_small\n"


def test_the_set_up_cell_takes_the_repositorys_address(folder: Path) -> None:
    notebook = made(folder / "01_small.py", "https://github.com/someone/every-byte")
    assert 'REPOSITORY = "https://github.com/someone/every-byte"' in notebook.cells[1].source
    for source in SOURCES:
        first = next(c for c in made(source, "https://e.org/x").cells if c.cell_type == "code")
        assert 'REPOSITORY = "https://e.org/x"' in first.source
        assert '"git", "clone"' in first.source


def test_a_folder_without_sources_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", str(tmp_path / "nosuch")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


SHARED = """# %%
import os, sys
print("torch" in sys.modules, os.path.basename(os.getcwd()), os.environ["MINE"])
import torch
print(hasattr(torch, "mark"))
torch.mark = os.environ["MINE"] = "changed"
os.chdir("/")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
def test_forked_kernels_share_imports_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = KernelProvisionerFactory.instance()
    monkeypatch.setattr(factory, "default_provisioner_name", factory.default_provisioner_name)
    fork_kernels()
    monkeypatch.setenv("MINE", "as it is now")
    for name in ("01_one", "02_other"):
        (tmp_path / f"{name}.py").write_text(SHARED)
    assert main(["--folder", str(tmp_path)]) == 0
    for name in ("01_one", "02_other"):
        (output,) = read(tmp_path / name).cells[0].outputs
        assert output.text == f"True {tmp_path.name} as it is now\nFalse\n"
