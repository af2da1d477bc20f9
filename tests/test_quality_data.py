"""The numbers that notebook 09 keeps with its figures: complete, bytes as the formulas say."""

import csv
import math
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "09_quality_vs_precision.ipynb"
MATRICES = {"FP8 E4M3": 8, "FP8 E5M2": 8, "INT8, one scale": 8, "INT6": 6, "INT4": 4}
MATRICES |= {"NF4": 4, "FP4": 4, "INT3": 3, "INT2": 2}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The table that stands folded below the figures, as a reader copies it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    texts = [o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])]
    (text,) = [text for text in texts if text.startswith("task,measure,model,format,bytes")]
    return list(csv.DictReader(text.splitlines()))


def test_each_model_was_measured_in_each_format_from_five_seeds(
    rows: list[dict[str, str]],
) -> None:
    formats = {row["format"] for row in rows}
    models = {(row["task"], row["model"]) for row in rows}
    assert len(formats) == 14
    assert sum(task == "digits" for task, _ in models) >= 5
    assert sum(task == "names" for task, _ in models) >= 3
    measures = {(row["task"], row["measure"]) for row in rows}
    assert measures == {
        ("digits", "wrong %"),
        ("digits", "cross-entropy"),
        ("names", "perplexity"),
    }
    assert len(rows) == len({tuple(row.values())[:4] for row in rows})
    assert len(rows) == 14 * sum(2 if task == "digits" else 1 for task, _ in models)
    for row in rows:
        seeds = [float(row[seed]) for seed in "01234"]
        assert all(0 < value < math.inf for value in seeds)
        assert len(set(seeds)) > 1, row


def digits_bytes(width: int, name: str) -> int:
    """Three matrices in the format, biases in 16 bits; a scale is 4 bytes."""
    matrices = [(width, 576), (width, width), (10, width)]
    weights = [rows * columns for rows, columns in matrices]
    biases = 2 * width + 10
    if name in ("FP32", "BF16", "FP16"):
        return (4 if name == "FP32" else 2) * (sum(weights) + biases)
    if name in ("INT8, by rows", "LLM.int8()"):
        return sum(weights) + 4 * biases + 2 * biases  # as many rows as biases
    stored = sum(math.ceil(MATRICES[name] * n / 8) for n in weights)
    blocks = 3 if MATRICES[name] == 8 else sum(math.ceil(n / 64) for n in weights)
    return stored + 4 * blocks + 2 * biases


def test_the_bytes_are_those_of_the_formulas(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if row["task"] == "digits":
            width = int(row["model"].split()[0])
            assert int(row["bytes"]) == digits_bytes(width, row["format"]), row
