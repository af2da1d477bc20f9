"""The tables of what real GPUs measured, made from ``book/records/`` at each build.

``{records}`` shows the records of readers and authors beside their replays, ``{context}``
and ``{articles}`` what else was measured on the same cards, ``{published}`` what others
printed beside what the virtual GPU replays while the page is built.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from torch import nn

from every_byte.gpu import VirtualGPU
from every_byte.units import binary
from helpers.record import Row, compared, notes, problems, replays_of, summary
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


class Record(NamedTuple):
    """What a card measured, and the replay of the same experiments, by name."""

    about: dict[str, Any]
    date: str
    measured: dict[str, Any]
    replayed: dict[str, Any]

    @property
    def card(self) -> str:
        """Its name."""
        return str(self.about["card"])


def found(folder: Path) -> list[Record]:
    """The records of a folder, by file name.

    Raises:
        ExtensionError: one of them is not whole, or has no replay.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ExtensionError(f"book/records/{path.name} is no JSON: {error}") from None
        if wrong := problems(record):
            raise ExtensionError(f"book/records/{path.name}: {'; '.join(wrong)}")
        try:
            again = json.loads(replays_of(path).read_text("utf-8"))["experiments"]
        except (OSError, ValueError, KeyError):
            raise ExtensionError(
                f"book/records/{path.name} has no replay: python -m helpers.record --replay "
                f"book/records/{path.name}"
            ) from None
        about, date = record["machine"], record["date"][:10]
        records.append(Record(about, date, record["experiments"], again))
    return records


def causes(path: Path) -> list[dict[str, Any]]:
    """Why figures differ, as far as it is known: see the file."""
    return tomllib.loads(path.read_text("utf-8"))["cause"]


def shown(records: Sequence[Record], known: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown: the machines, what differs and why, and every row."""
    if not records:
        return NONE_YET
    parts = [machines(records)]
    rows = [(record, row) for record in records for row in compared(*record[2:])]
    off = [(record, row) for record, row in rows if any(row.difference.values())]
    if off:
        # Numbered as they are needed: Markdown leaves no number out.
        met = {number for _, row in off for number in _causes_of(row, known)}
        needed = [cause for number, cause in enumerate(known, 1) if number in met]
        why = [(record, row, _causes_of(row, needed)) for record, row in off]
        parts += ["**What differs**, and the cause by its number below:", _differences(why)]
        parts.append("\n".join(f"{n}. {cause['text']}" for n, cause in enumerate(needed, 1)))
    else:
        parts.append("Every figure agrees to the byte.")
    told = [f"- {record.card}, {note}" for record in records for note in notes(*record[2:])]
    parts += ["\n".join(told)] if told else []
    columns = ["GPU", "checkpoint", "allocated, measured (B)", "replayed (B)"]
    columns += ["reserved, measured (B)", "replayed (B)"]
    lines = [[*_where(record, row), *_pairs(row)] for record, row in rows]
    every = table(columns, lines)
    parts.append(f"````{{dropdown}} Every checkpoint\n{every.data}\n````")
    return "\n\n".join(parts)


def machines(records: Sequence[Record]) -> str:
    """A row for each record: what it was made on, and how its replay does."""
    rows: list[list[str | int]] = []
    for record in records:
        about, told = record.about, summary(record.measured, record.replayed)
        versions = [f"torch {about['versions']['torch']}", f"CUDA {about['cuda']}"]
        versions += [f"transformers {n}" for n in [about["versions"].get("transformers")] if n]
        versions += [f"driver {about['driver']}"] if about["driver"] else []
        card = f"{about['card']}, {binary(about['memory'])}, {about['compute_capability']}"
        counts = ("figures", "figures_that_differ", "largest_difference", "traces_that_differ")
        rows.append([card, ", ".join(versions), record.date, *(told[key] for key in counts)])
    columns = ["GPU", "with", "on", "figures", "differ", "at most by (B)", "traces differ"]
    return str(table(columns, rows).data)


def _where(record: Record, row: Row) -> list[str | int]:
    return [record.card, f"{row.experiment}, {row.checkpoint}"]


def _pairs(row: Row) -> Iterator[int]:
    for figure in ("memory_allocated", "memory_reserved"):
        yield row.measured[figure]
        yield row.replayed[figure]


def _causes_of(row: Row, known: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the causes that name this experiment, and a figure or kind that is off."""
    off = {figure for figure, nbytes in row.difference.items() if nbytes} | row.by_kind().keys()
    return [
        number
        for number, cause in enumerate(known, 1)
        if off & set(cause["of"])
        and any(fnmatch(row.experiment, pattern) for pattern in cause["experiments"])
    ]


def _differences(rows: Sequence[tuple[Record, Row, list[int]]]) -> str:
    lines: list[list[str | int]] = []
    for record, row, numbers in rows:
        off = row.difference
        kinds = [f"{kind.replace('_', ' ')} {n:,}" for kind, n in row.by_kind().items()]
        lines.append(
            [
                *_where(record, row),
                row.measured["memory_allocated"],
                f"{off['memory_allocated']:,}",
                f"{off['memory_reserved']:,}",
                f"{off['max_memory_allocated']:,}",
                ", ".join(kinds),
                ", ".join(map(str, numbers)) or "not known",
            ]
        )
    columns = ["GPU", "checkpoint", "allocated, measured (B)", "difference (B)"]
    columns += ["of reserved", "of peak", "by kind", "cause"]
    return str(table(columns, lines).data)


# What else was measured


def _measured_on(told: dict[str, Any]) -> str:
    return f"Measured on one {told['card']} with {told['versions']}, on {told['date']}."


def context(path: Path) -> str:
    """What a process holds on the card outside PyTorch's allocator, step by step."""
    told = tomllib.loads(path.read_text("utf-8"))
    rows = [(step["after"], step["outside"], step["nvidia_smi_mib"]) for step in told["step"]]
    columns = ["after the", "outside PyTorch (B)", "nvidia-smi, all together (MiB)"]
    return f"{_measured_on(told)}\n\n{table(columns, rows).data}"


def articles(path: Path) -> str:
    """What the articles' own scripts print on a newer card."""
    told = tomllib.loads(path.read_text("utf-8"))
    rows = [(row["script"], row["stage"], row["allocated"]) for row in told["row"]]
    columns = ["script", "stage", "allocated, measured (B)"]
    return f"{_measured_on(told)}\n\n{table(columns, rows).data}"


class Records(SphinxDirective):
    """``{records}``: what ``python -m helpers.record`` wrote on real GPUs, and its replay."""

    def run(self) -> list[nodes.Node]:
        """The tables, or the sentence that there are none."""
        known = causes(FOLDER / "causes.toml")
        return self.parse_text_to_nodes(shown(found(FOLDER), known))


class Context(SphinxDirective):
    """``{context}``: what a process holds outside PyTorch's allocator."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(context(FOLDER / "context.toml"))


class Articles(SphinxDirective):
    """``{articles}``: the two articles' scripts on a card of our own."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(articles(FOLDER / "articles.toml"))


class Published(SphinxDirective):
    """``{published}``: what others measured and printed."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(published(FOLDER / "published.toml"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("records", Records)
    app.add_directive("context", Context)
    app.add_directive("articles", Articles)
    app.add_directive("published", Published)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
