"""Troubleshooting and the glossary: the way to each entry, and that messages are stored whole."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
CHAPTER = nbformat.read(ROOT / "notebooks" / "11_troubleshooting.ipynb", as_version=4)
TEXT = "\n".join(cell.source for cell in CHAPTER.cells if cell.cell_type == "markdown")
TERM = re.compile(r"^(\S.*)\n  (\S.*)$", re.MULTILINE)


def printed() -> str:
    """All that the chapter prints, without the line breaks that fit it to the page."""
    outputs = [output for cell in CHAPTER.cells for output in cell.get("outputs", [])]
    return re.sub(r"\s+", " ", " ".join(output.get("text", "") for output in outputs))


def test_the_contents_lead_to_every_entry() -> None:
    targets = re.findall(r'<a id="(\w+)">', TEXT)
    assert len(targets) == len(set(targets)) > 20
    assert re.findall(r'<a href="#(\w+)">', TEXT) == targets
    # Each stands right above its heading.
    assert len(re.findall(r'^<a id="\w+"></a>\n### ', TEXT, re.MULTILINE)) == len(targets)


@pytest.mark.parametrize(
    "message",
    [
        "RuntimeError: Failed to import transformers.models.gpt2.modeling_gpt2 because of the "
        "following error (look up to see its traceback): "
        "module 'wandb.proto.wandb_internal_pb2' has no attribute 'Result'",
        "TypeError: dispatch_model() got an unexpected keyword argument 'offload_index'",
        "FutureWarning: `torch.cuda.amp.autocast(args...)` is deprecated",
        "TypeError: Accelerator.__init__() got an unexpected keyword argument 'fp16'",
        "`torch_dtype` is deprecated! Use `dtype` instead!",
        "TypeError: GPT2LMHeadModel.__init__() got an unexpected keyword argument 'load_in_8bit'",
        "ValueError: Calling `cuda()` is not supported for `8-bit` quantized models",
    ],
)
def test_a_heading_is_a_message_that_the_chapter_causes(message: str) -> None:
    assert any(message in line for line in TEXT.splitlines() if line.startswith("### "))
    assert message in printed()


def test_what_grows_grows_and_what_is_cured_does_not() -> None:
    rows = re.findall(r"(\w+|as it is|and \.cpu\(\)) +((?:\d+\.\d{3} +){4,}?)MiB", printed())
    sizes = {name: [float(size) for size in row.split()] for name, row in rows}
    growth = {name: {round(b - a, 1) for a, b in pairwise(s)} for name, s in sizes.items()}
    for name in ("validation", "outputs", "hooks", "cycles", "graph", "as it is"):
        (each,) = growth[name]  # the same at every step
        assert each >= 32, name
    for name in ("with_item", "longest_first", "and .cpu()"):
        assert growth[name] == {0.0}, name
    assert sizes["inference_mode"][-1] < sizes["as it is"][-1] / 4


def test_nothing_stored_depends_on_the_machine() -> None:
    assert not re.search(r"/tmp|/home|/root|0x[0-9a-f]{6}|pid \d", printed())


def test_the_glossary_says_each_term_in_two_sentences() -> None:
    terms = TERM.findall((ROOT / "book" / "glossary.md").read_text("utf-8"))
    names = [name for name, _ in terms]
    assert len(terms) >= 40
    assert names == sorted(names, key=str.lower), "in alphabetical order"
    for name, meaning in terms:
        plain = re.sub(r"`[^`]*`", "x", meaning)
        assert len(re.findall(r"[.](?: |$)", plain)) == 2, name
