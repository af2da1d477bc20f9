"""The tables of what real GPUs measured, made from ``book/records/`` at each build.

``{measured}`` draws all of it in one figure, ``{records}`` shows the records of readers and
authors beside their replays, ``{context}`` and ``{articles}`` what else was measured on the
same cards, ``{unwatched}`` programs that ran while nobody looked on, and ``{series}``,
``{printed}`` and ``{published}`` what others printed, beside its replay.
"""

import io
import json
import lzma
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from docutils import nodes
from inline_figures import inline
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from torch import nn

from every_byte.data import named
from every_byte.gpu import VirtualGPU
from every_byte.units import GB, MiB, binary
from helpers.measured import cause_of, peak, peak_off, read_unwatched, unwatched_pairs
from helpers.plots import use_book_style
from helpers.record import Row, compared, notes, problems, replays_of, summary
from helpers.tables import table

FOLDER = Path(__file__).parent.parent / "records"
MEASURED = FOLDER.parent.parent / "tests" / "data" / "h200-torch-2.11" / "workloads.json.xz"
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
        met = {number for record, row in off for number in causes_of(row, known, record.card)}
        needed = [cause for number, cause in enumerate(known, 1) if number in met]
        why = [(record, row, causes_of(row, needed, record.card)) for record, row in off]
        parts += ["**What differs**, and the cause by its number below:", differences(why)]
        parts.append("\n".join(f"{n}. {cause['text']}" for n, cause in enumerate(needed, 1)))
    else:
        parts.append("Every figure agrees to the byte.")
    told: dict[tuple[str, str], list[str]] = {}  # of a card what is said: of which experiments
    for record in records:
        for note in notes(*record[2:]):
            name, said = note.split(": ", 1)
            told.setdefault((record.card, said), []).append(name)
    if told:
        lines = [f"- {card}, {', '.join(names)}: {said}" for (card, said), names in told.items()]
        parts.append("\n".join(lines))
    columns = ["GPU", "checkpoint", "allocated, measured (B)", "replayed (B)"]
    columns += ["reserved, measured (B)", "replayed (B)"]
    every = table(columns, [[*_where(record, row), *_pairs(row)] for record, row in rows])
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


def causes_of(row: Row, known: Sequence[dict[str, Any]], card: str) -> list[int]:
    """The numbers of the causes that name this experiment, and a figure or kind that is off.

    And the card, where a cause names one.
    """
    off = {figure for figure, nbytes in row.difference.items() if nbytes} | row.by_kind().keys()
    return [
        number
        for number, cause in enumerate(known, 1)
        if off & set(cause["of"])
        and cause.get("card", card) == card
        and any(fnmatch(row.experiment, pattern) for pattern in cause["experiments"])
    ]


def differences(rows: Sequence[tuple[Record, Row, list[int]]]) -> str:
    """A line for what differs alike, by the same cause; a cause not known has a line each."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for record, row, numbers in rows:
        off = row.difference
        kinds = [f"{kind.replace('_', ' ')} {n:,}" for kind, n in sorted(row.by_kind().items())]
        told = (
            f"{off['memory_allocated']:,}",
            f"{off['memory_reserved']:,}",
            f"{off['max_memory_allocated']:,}",
            ", ".join(kinds),
            ", ".join(map(str, numbers)) or "not known",
        )
        alone = () if numbers else (row.experiment, row.checkpoint)
        alike.setdefault((record.card, *alone, told), []).append(row)
    lines = [[key[0], _at(together), *key[-1]] for key, together in alike.items()]
    columns = ["GPU", "checkpoint", "difference (B)"]
    columns += ["of reserved", "of peak", "by kind", "cause"]
    return str(table(columns, lines).data)


def _at(rows: Sequence[Row]) -> str:
    """One checkpoint by its name, or how many there are in which experiments."""
    if len(rows) == 1:
        return f"{rows[0].experiment}, {rows[0].checkpoint}"
    experiments = ", ".join(dict.fromkeys(row.experiment for row in rows))
    return f"{len(rows)} checkpoints of {experiments}"


# Everything beside its replay


class Pair(NamedTuple):
    """A figure that was measured, and its replay, in bytes; `equal` by the digits told."""

    measured: float
    replayed: int
    equal: bool


def recorded_pairs(records: Sequence[Record]) -> list[Pair]:
    """Every figure of the records."""
    return [
        Pair(nbytes, row.replayed[figure], row.replayed[figure] == nbytes)
        for record in records
        for row in compared(*record[2:])
        for figure, nbytes in row.measured.items()
        if figure != "by_kind"
    ]


def run_pairs(measured: Path, replayed: Path) -> list[Pair]:
    """Every figure of the runs that were measured and are replayed."""
    with lzma.open(measured, "rt") as file:
        told = json.load(file)["workloads"]
    again = json.loads(replayed.read_text("utf-8"))["workloads"]
    return [
        Pair(nbytes, other, nbytes == other)
        for name, checkpoints in again.items()
        for checkpoint, figures in checkpoints.items()
        for nbytes, other in zip(told[name]["checkpoints"][checkpoint], figures, strict=True)
    ]


def runs_counted(measured: Path, replayed: Path) -> str:
    """How many of the runs that were measured the figure has."""
    with lzma.open(measured, "rt") as file:
        every = len(json.load(file)["workloads"])
    done = len(json.loads(replayed.read_text("utf-8"))["workloads"])
    if done == every:
        return f"All {every} runs of other models that were measured are among them."
    return (
        f"Of {every} runs of other models that were measured, {done} are replayed so far and "
        "stand here; the others are not counted."
    )


def program_pairs(told: dict[str, Any]) -> list[Pair]:
    """Every figure of the programs that ran on a card while nobody looked on."""
    return [
        Pair(nbytes, other, nbytes == other)
        for _, measured, again in unwatched_pairs(told)
        for checkpoint, figures in measured.items()
        for nbytes, other in zip(figures, again.get(checkpoint, []), strict=True)
    ]


def programs(told: dict[str, Any]) -> str:
    """How the programs that nobody watched agree with their replay, as Markdown."""
    every = list(unwatched_pairs(told))
    same = sum(measured == again for _, measured, again in every)
    peaks = {name: peak_off(measured, again) for name, measured, again in every}
    peak_alone = sum(not off for off in peaks.values()) - same
    within = sum(abs(off) <= 0.01 for off in peaks.values())
    parts = [
        f"{len(every)} programs ran on both. Of {same}, **every figure is equal to the byte**, and "
        f"of {peak_alone} more the peak. {within} peaks ({100 * within / len(every):.0f} %) are "
        "within 1 %."
    ]
    others = sorted((item for item in every if peaks[item[0]]), key=lambda o: -abs(peaks[o[0]]))
    lines = [
        [f"`{name}`", f"{peak(measured) / GB:.3f}", f"{100 * peaks[name]:+.4f} %"]
        for name, measured, _ in others
    ]
    some = table(["program", "peak, measured (GB)", "replayed, off by"], lines).data
    parts.append(f"````{{dropdown}} The {len(lines)} peaks that are not equal\n{some}\n````")
    least = told["least"]
    right = sum(one["ran"] and one["ran out below"] for one in least.values())
    not_so = [n for n, one in least.items() if not (one["ran"] and one["ran out below"])]
    parts.append(
        f"And does it fit? For {len(least)} of these runs we computed beforehand the least memory "
        "that gets them to their end. Then we gave them exactly that on the card, and 2 MiB less. "
        f"{right} ran with it and ran out of memory with less. The others: "
        f"{', '.join(f'`{name}`' for name in not_so)}."
    )
    return "\n\n".join(parts)


def published_pairs(series: Path, replayed: Path) -> list[Pair]:
    """Every figure of published series, which are in MiB as float32 holds them."""
    told = tomllib.loads(series.read_text("utf-8"))["series"]
    again = json.loads(replayed.read_text("utf-8"))["series"]
    return [
        Pair(printed * MiB, nbytes, printed == torch.tensor(nbytes / MiB).item())
        for one, row in zip(told, again, strict=True)
        for printed, nbytes in zip(one["printed"], row, strict=True)
    ]


def all_pairs() -> dict[str, list[Pair]]:
    """What is measured and replayed, by source."""
    again = FOLDER / "replayed" / "proof.json"
    return {
        "the book's experiments, both cards": recorded_pairs(found(FOLDER)),
        "other models' runs, H200": run_pairs(MEASURED, again),
        "unwatched programs, H100": program_pairs(read_unwatched()),
        "published by others": published_pairs(FOLDER / "liger.toml", again),
    }


def told(pairs: Mapping[str, Sequence[Pair]]) -> str:
    """What the figure shows, in words: the alternative text, and the share that is equal."""
    every = [pair for some in pairs.values() for pair in some]
    near = sum(abs(pair.replayed - pair.measured) <= pair.measured / 100 for pair in every)
    parts = [f"{name}: {_share(some)}" for name, some in pairs.items()]
    return (
        f"{_share(every)} are equal to the last digit, {_of(near, len(every))} within 1 %. "
        f"{'; '.join(parts)}."
    )


def _share(pairs: Sequence[Pair]) -> str:
    same = sum(pair.equal for pair in pairs)
    return f"{same:,} of {len(pairs):,} figures ({_percent(same, len(pairs))})"


def _of(many: int, every: int) -> str:
    return f"{many:,} ({_percent(many, every)})"


def _percent(many: int, every: int) -> str:
    """Cut off, so that 100 % is all."""
    return f"{math.floor(1000 * many / every) / 10} %"


def figure(pairs: Mapping[str, Sequence[Pair]]) -> str:
    """Measured against replayed as SVG: each point a figure, open where it differs."""
    use_book_style()
    shown, axes = plt.subplots(figsize=(5.4, 5.2))
    ends = (1e7, 1e11)
    axes.plot(ends, ends, color="black", linewidth=0.6)
    marks = {"o": "#0a7d5c", "s": "#2f6fd0", "D": "#7a3fa0", "^": "#c2570c"}
    for (name, some), (mark, color) in zip(pairs.items(), marks.items(), strict=True):
        label = f"{name}: {sum(p.equal for p in some):,} of {len(some):,} equal"
        for equal in (True, False):
            # Points that would fall on one another are drawn once.
            places = {
                (round(math.log10(p.measured), 2), round(math.log10(p.replayed), 2))
                for p in some
                if p.equal is equal and p.measured > 0 and p.replayed > 0
            }
            axes.scatter(
                [10**x for x, _ in sorted(places)],
                [10**y for _, y in sorted(places)],
                s=16 if equal else 40,
                marker=mark,
                facecolors=color if equal else "none",
                edgecolors=color,
                linewidths=0.4 if equal else 1.2,
                label=label if equal else None,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    ticks = [10.0**power for power in range(7, 12)]
    names = ["10 MB", "100 MB", "1 GB", "10 GB", "100 GB"]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.minorticks_off()
    axes.set_xlabel("measured")
    axes.set_ylabel("replayed")
    shown.legend(loc="outside lower center", ncols=1, handlelength=1.6)
    file = io.StringIO()
    shown.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(shown)
    return file.getvalue()


def series(path: Path, replayed: Path) -> str:
    """The published series as a Markdown table: a line for each program on a card."""
    told = tomllib.loads(path.read_text("utf-8"))["series"]
    pairs = iter(published_pairs(path, replayed))
    lines: list[list[str | int]] = []
    for one in told:
        row = [next(pairs) for _ in one["sizes"]]
        shares = [pair.replayed / pair.measured - 1 for pair in row if not pair.equal]
        off = max(shares, key=abs, default=0.0)
        ends = f"{one['printed'][0]:,.10g} … {one['printed'][-1]:,.10g}"
        same = f"{sum(pair.equal for pair in row)} of {len(row)}"
        most = f"{100 * off:+.4f} %" if shares else "0"
        lines.append([one["case"], f"{one['on']}, {one['date']}", ends, same, most])
    columns = ["peak of", "on", "published, measured (MiB)", "equal", "replayed, off by at most"]
    return str(table(columns, lines).data)


def printed(path: Path, replayed: Path) -> str:
    """What whole programs of others printed, beside what they print here."""
    told = tomllib.loads(path.read_text("utf-8"))["row"]
    again = json.loads(replayed.read_text("utf-8"))["printed"]
    lines = [
        [
            f"[{one['case']}]({one['url']})",
            one["on"],
            " / ".join(one["printed"]),
            "the same" if row == one["printed"] else " / ".join(row),
        ]
        for one, row in zip(told, again, strict=True)
    ]
    return str(table(["program", "on", "printed, measured", "replayed"], lines).data)


def outliers(replayed: Path) -> str:
    """The single operations whose replay is not what was measured, by cause."""
    again = json.loads(replayed.read_text("utf-8"))
    same = again["operations"] - len(again["others"])
    by_cause: dict[str, list[str]] = {}
    for signature in again["others"]:
        by_cause.setdefault(cause_of(signature), []).append(f"`{signature}`")
    lines = [[cause, "<br>".join(some)] for cause, some in by_cause.items()]
    share = math.floor(10_000 * same / again["operations"]) / 100
    told = (
        f"Of {again['operations']:,} calls of single operations that the H200 measured, {same:,} "
        f"({share} %) take and give back the same blocks in the same order when replayed. "
        "Convolutions, linear algebra and Fourier transforms are not among them. The others:"
    )
    return f"{told}\n\n{table(['cause', 'operations'], lines).data}"


# What else was measured


def _measured_on(told: dict[str, Any]) -> str:
    return f"Measured on one {told['card']} with {told['versions']}, on {told['date']}."


def context(path: Path) -> str:
    """What a process holds on the cards outside PyTorch's allocator, step by step."""
    cards = tomllib.loads(path.read_text("utf-8"))["measured"]
    steps = [{step["after"]: step for step in told["step"]} for told in cards]
    # In the order of the longest list, then what only another has.
    lists = sorted(map(list, steps), key=len, reverse=True)
    order = dict.fromkeys(chain.from_iterable(lists))
    rows = [
        (after, *(of.get(after, {}).get(figure, "") for of in steps for figure in _CONTEXT))
        for after in order
    ]
    columns = [
        f"{named(told['card']) or told['card']}, {words}"
        for told in cards
        for words in _CONTEXT.values()
    ]
    said = "\n\n".join(map(_measured_on, cards))
    return f"{said}\n\n{table(['after the', *columns], rows).data}"


_CONTEXT = {"outside": "outside PyTorch (B)", "nvidia_smi_mib": "all in nvidia-smi (MiB)"}


def articles(path: Path) -> str:
    """What the articles' own scripts print on a newer card."""
    told = tomllib.loads(path.read_text("utf-8"))
    rows = [(row["script"], row["stage"], row["allocated"]) for row in told["row"]]
    columns = ["script", "stage", "allocated, measured (B)"]
    return f"{_measured_on(told)}\n\n{table(columns, rows).data}"


class Measured(SphinxDirective):
    """``{measured}``: everything that was measured, against its replay, in one figure."""

    def run(self) -> list[nodes.Node]:
        """The share that is equal in words, then the figure."""
        pairs = all_pairs()
        said, within = told(pairs), " within 1 %."
        counted = runs_counted(MEASURED, FOLDER / "replayed" / "proof.json")
        text = self.parse_text_to_nodes(f"**{said.partition(within)[0]}{within}** {counted}")
        svg = inline(figure(pairs), "measured", f"Measured against replayed bytes. {said}")
        return [*text, nodes.raw("", svg, format="html")]


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


class Unwatched(SphinxDirective):
    """``{unwatched}``: programs on a card while nobody looked on, and their replay."""

    def run(self) -> list[nodes.Node]:
        """How they agree, the peaks that differ, and the least memory."""
        return self.parse_text_to_nodes(programs(read_unwatched()))


class Series(SphinxDirective):
    """``{series}``: what others published as data, beside its replay."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(
            series(FOLDER / "liger.toml", FOLDER / "replayed" / "proof.json")
        )


class Outliers(SphinxDirective):
    """``{outliers}``: single operations whose replay differs, and why."""

    def run(self) -> list[nodes.Node]:
        """The share that is equal, then the table."""
        return self.parse_text_to_nodes(outliers(FOLDER / "replayed" / "proof.json"))


class Printed(SphinxDirective):
    """``{printed}``: what whole programs of others printed, beside what they print here."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(
            printed(FOLDER / "printed.toml", FOLDER / "replayed" / "proof.json")
        )


class Published(SphinxDirective):
    """``{published}``: what others measured and printed."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        return self.parse_text_to_nodes(published(FOLDER / "published.toml"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("measured", Measured)
    app.add_directive("records", Records)
    app.add_directive("context", Context)
    app.add_directive("articles", Articles)
    app.add_directive("outliers", Outliers)
    app.add_directive("printed", Printed)
    app.add_directive("published", Published)
    app.add_directive("series", Series)
    app.add_directive("unwatched", Unwatched)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
