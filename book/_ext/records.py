"""The tables of what real GPUs measured, made from ``book/records/`` at each build.

``{records}`` shows the records of readers and authors, ``{published}`` what others
printed, beside what the virtual GPU replays while the page is built.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from torch import nn

from every_byte.gpu import VirtualGPU
from every_byte.units import binary
from helpers.record import problems
from helpers.tables import table

FOLDER = Path(__file__).parent.parent / "records"
NONE_YET = """**No record of our own exists yet.** Nothing on this page was measured by us:
a figure here is either published by others, and says by whom, or replayed."""


# What others published, replayed


def linear() -> int:
    """Bytes that stay after a forward pass of a 1 x 1 linear layer, everything deleted."""
    with VirtualGPU() as card, card.device:
        nn.Linear(1, 1)(torch.empty(1, 1))
        return card.memory_allocated()


def convolution(dtype: torch.dtype) -> int:
    """Bytes at the peak of PyTorch's issue 50990: a layer, its input and its output."""
    with VirtualGPU() as card:
        model = nn.Conv2d(32, 32, 3).to(dtype).to(card.device)
        _kept = model(torch.empty(512, 32, 84, 84, dtype=dtype, device=card.device))
        return card.max_memory_allocated()


REPLAYS: dict[str, Callable[[], int]] = {
    "linear": linear,
    "convolution_fp32": lambda: convolution(torch.float32),
    "convolution_fp16": lambda: convolution(torch.float16),
}


def published(path: Path) -> str:
    """The published figures as Markdown tables: those that are replayed here, and the others."""
    here, others = [], []
    for figure in tomllib.loads(path.read_text("utf-8"))["figure"]:
        case = (f"[{figure['case']}]({figure['url']})", figure["on"])
        if "replay" in figure:
            printed, replayed = int(figure["printed"]), REPLAYS[figure["replay"]]()
            here.append((*case, printed, replayed, f"{replayed - printed:,}"))
        else:
            others.append((*case, f"{figure['printed']} {figure['unit']}", figure["replayed"]))
    columns = ["case", "on", "published, measured (B)", "replayed (B)", "difference (B)"]
    return "\n\n".join(
        str(shown.data)
        for shown in (
            table(columns, here),
            table(["case, at its peak", "on", "published, measured", "replayed?"], others),
        )
    )


# The records


def found(folder: Path) -> dict[str, Any]:
    """The records of a folder by file name.

    Raises:
        ExtensionError: one of them is not whole.
    """
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ExtensionError(f"book/records/{path.name} is no JSON: {error}") from None
        if wrong := problems(record):
            raise ExtensionError(f"book/records/{path.name}: {'; '.join(wrong)}")
        records[path.name] = record
    return records


def shown(records: Mapping[str, Any]) -> str:
    """The records as Markdown: the machines, what differs, what was skipped, and every row."""
    if not records:
        return NONE_YET
    parts = [machines(records)]
    rows = [row for record in records.values() for row in checkpoints(record)]
    off = [row for row in rows if any(n != "0" for n in row[-3:])]
    if off:
        parts += ["**What differs:**", _rows(off)]
    else:
        parts.append("Every figure agrees to the byte.")
    for record in records.values():
        card, experiments = record["machine"]["card"], record["experiments"]
        notes = [f"- {card}, `{name}`: {text}" for name, text in _notes(experiments)]
        parts += ["\n".join(notes)] if notes else []
    parts.append(f"````{{dropdown}} Every checkpoint\n{_rows(rows)}\n````")
    return "\n\n".join(parts)


def machines(records: Mapping[str, Any]) -> str:
    """A row for each record: what it was made on, and its summary."""
    rows = []
    for record in records.values():
        about, told = record["machine"], record["summary"]
        versions = [f"torch {about['versions']['torch']}", f"CUDA {about['CUDA']}"]
        versions += [f"transformers {n}" for n in [about["versions"].get("transformers")] if n]
        versions += [f"driver {about['driver']}"] if about["driver"] else []
        card = f"{about['card']}, {binary(about['memory'])}, {about['compute capability']}"
        counts = ("figures", "figures that differ", "largest difference", "traces that differ")
        rows.append((card, ", ".join(versions), record["date"][:10], *map(told.get, counts)))
    columns = ["GPU", "with", "on", "figures", "differ", "at most by (B)", "traces differ"]
    return str(table(columns, rows).data)


def checkpoints(record: Mapping[str, Any]) -> Iterator[tuple[str | int, ...]]:
    """A row for each checkpoint: allocated bytes, and all differences (replayed less measured)."""
    for name, result in record["experiments"].items():
        for checkpoint, row in result.get("checkpoints", {}).items():
            off = row["difference"]
            yield (
                record["machine"]["card"],
                f"{name}, {checkpoint}",
                row["measured"]["memory_allocated"],
                row["replayed"]["memory_allocated"],
                f"{off['memory_allocated']:,}",
                f"{off['memory_reserved']:,}",
                f"{off['max_memory_allocated']:,}",
            )


def _rows(rows: list[tuple[str | int, ...]]) -> str:
    columns = ["GPU", "checkpoint", "allocated, measured (B)", "replayed (B)", "difference (B)"]
    return str(table([*columns, "of reserved", "of peak"], rows).data)


def _notes(experiments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, result in experiments.items():
        if "skipped" in result:
            yield name, f"skipped, {result['skipped']}"
            continue
        if alone := result["reached on one GPU only"]:
            yield name, f"on one GPU only: {', '.join(alone)}"
        if result["trace"]["mismatch"] is not None:
            yield name, f"the trace differs at {result['trace']['mismatch']}"
        if result["trace"]["held before"]:
            yield name, "the card was not empty before"


class Records(SphinxDirective):
    """``{records}``: what ``python -m helpers.record`` wrote on real GPUs."""

    def run(self) -> list[nodes.Node]:
        """The tables, or the sentence that there are none."""
        return self.parse_text_to_nodes(shown(found(FOLDER)))


class Published(SphinxDirective):
    """``{published}``: what others measured and printed."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(published(FOLDER / "published.toml"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("records", Records)
    app.add_directive("published", Published)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
