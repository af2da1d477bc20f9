"""The page of accuracy, made from files at each build.

``{accuracy-figure}`` draws how far each system is from what was measured, ``{accuracy}`` counts
it, ``{accuracy-cells}`` has every workload. What was measured stands in ``tests/data`` and
``book/records``, the replay in ``book/records/replayed``, and what the peers say in
``book/accuracy.json``: ``python -m benchmarks.accuracy`` writes it.
"""

import io
import json
import lzma
import statistics
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from docutils import nodes
from inline_figures import inline
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from every_byte.units import MB, MiB
from helpers.plots import use_book_style
from helpers.tables import table

FOLDER = Path(__file__).parent.parent / "records"
RUNS = FOLDER.parent.parent / "tests" / "data" / "h200-torch-2.11" / "workloads.json.xz"
SYSTEMS = {
    "replay": "This book's replay",
    "estimator": "This book's estimator",
    "mem_tracker": "PyTorch's MemTracker",
    "accelerate": "accelerate estimate-memory",
    "deepspeed": "DeepSpeed's ZeRO estimator",
    "transformer_math": "Transformer Math 101",
    "vram_estimator": "VRAM Estimator",
}
"""The names in the file, and on the page."""
SHORT = ("replay", "estimator", "MemTracker", "accelerate", "DeepSpeed", "Math 101", "VRAM Est.")
FIRST = ("loaded", "quantised")  # checkpoints: before them a model is only made
LEFT_OUT = {
    "gemma2-2l": "transformers 5.23 no longer runs it as it was measured",
    "stream-record": "no model, but a test of the allocator",
    "compile-mlp-train": "compiled: the replay has no compiler",
    "compile-gpt2-train-bf16": "compiled: the replay has no compiler",
}
"""What was measured, but asked of no system."""

Said = int | str


class Row(NamedTuple):
    """A workload: what was measured at its peak, in bytes, and what each system says."""

    name: str
    measured: float
    said: Mapping[str, Said]
    digits: bool = False  # known as MiB in float32 only

    def off(self, system: str) -> float | None:
        """A system's figure less the measured, as a share of it; None if it has none."""
        said = self.said.get(system)
        if said is None or isinstance(said, str):
            return None
        if self.digits and torch.tensor(said / MiB).item() == self.measured / MiB:
            return 0.0
        return said / self.measured - 1


def runs() -> list[Row]:
    """The runs of models that the H200 measured: the most allocated once a model is there."""
    with lzma.open(RUNS, "rt") as file:
        measured = json.load(file)["workloads"]
    replayed = json.loads((FOLDER / "replayed" / "proof.json").read_text("utf-8"))["workloads"]
    peers = json.loads((FOLDER.parent / "accuracy.json").read_text("utf-8"))["workloads"]

    def peak(checkpoints: Mapping[str, Sequence[int]]) -> int:
        return max(row[2] for name, row in checkpoints.items() if name not in FIRST)

    found = []
    for name, told in measured.items():
        if name not in LEFT_OUT:
            ours: Said = peak(replayed[name]) if name in replayed else "not replayed yet"
            said = {"replay": ours} | peers[name]
            found.append(Row(name, peak(told["checkpoints"]), said))
    return found


def series() -> list[Row]:
    """What Liger-Kernel's authors published: single layers and losses, no whole models."""
    told = tomllib.loads((FOLDER / "liger.toml").read_text("utf-8"))["series"]
    replayed = json.loads((FOLDER / "replayed" / "proof.json").read_text("utf-8"))["series"]
    peers = json.loads((FOLDER.parent / "accuracy.json").read_text("utf-8"))["series"]
    found = []
    for number, (one, ours) in enumerate(zip(told, replayed, strict=True)):
        tracker = peers.get(str(number), "not asked")
        for at, printed in enumerate(one["printed"]):
            said = {
                "replay": ours[at],
                "mem_tracker": tracker if isinstance(tracker, str) else tracker[at],
            }
            name = f"{one['case']}: {one['sizes'][at]:,}"
            found.append(Row(name, printed * MiB, said, digits=True))
    return found


# The figure


def percent(share: float) -> str:
    """A difference as it stands in a table: two digits that count, and its sign."""
    if not share:
        return "0"
    number = 100 * share
    return f"{number:+.0f}" if abs(number) >= 10 else f"{float(f'{number:.2g}'):+}"


def figure(own: Sequence[Row], others: Sequence[Row]) -> str:
    """How far each system is from what was measured: a dot for each workload, as SVG."""
    use_book_style()
    shown, axes = plt.subplots(figsize=(5.4, 5.8))
    axes.axvline(0, color="black", linewidth=0.6)
    marks = (("H200, whole models", own, "o", "#0a7d5c"), ("published", others, "s", "#2f6fd0"))
    for at, (system, title) in enumerate(SYSTEMS.items()):
        off = [one for one in (row.off(system) for row in (*own, *others)) if one is not None]
        said = f"{title}: {len(off)}, {off.count(0.0)} exact"
        axes.text(0.0, at - 0.3, said, transform=axes.get_yaxis_transform())
        for label, rows, mark, color in marks:
            places = Counter[float]()
            xs, ys = [], []
            for row in rows:
                if (share := row.off(system)) is not None:
                    # Dots on one place are heaped up a little, the same at each build.
                    place = round(share, 3) if abs(share) > 0.01 else round(share, 5)
                    height = min(places[place], 12)
                    places[place] += 1
                    xs.append(100 * share)
                    ys.append(at + 0.2 - 0.03 * height)
            axes.scatter(
                *(xs, ys, 15, color),
                marker=mark,
                alpha=0.75,
                linewidths=0,
                label=label if at == 0 else None,
            )
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    ticks = [-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100, 1000]
    axes.set_xticks(ticks, ["−100", "−10", "−1", "−.1", "0", ".1", "1", "10", "100", "1000"])
    axes.minorticks_off()
    axes.set_xlim(-150, 1500)
    axes.set_ylim(len(SYSTEMS) - 0.5, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("how far off (% of what was measured)")
    shown.legend(loc="outside lower center", ncols=2, handletextpad=0.2)
    file = io.StringIO()
    shown.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(shown)
    return file.getvalue()


# The numbers


class Score(NamedTuple):
    """How a system does on what it answered."""

    answered: int
    exact: int
    median: float
    worst: float
    replay: float  # the replay's median on the same workloads


def score(rows: Sequence[Row], system: str) -> Score | None:
    """A system's score; None if it answered nothing."""
    pairs = [(row, row.off(system)) for row in rows]
    found = [(row, off) for row, off in pairs if off is not None]
    if not found:
        return None
    same = [abs(off) for row, _ in found if (off := row.off("replay")) is not None]
    return Score(
        len(found),
        sum(off == 0 for _, off in found),
        statistics.median(abs(off) for _, off in found),
        max((off for _, off in found), key=abs),
        statistics.median(same),
    )


def scores(rows: Sequence[Row]) -> str:
    """The table of the systems: answered, exact, median, worst."""
    lines = []
    for system, title in SYSTEMS.items():
        if told := score(rows, system):
            lines.append(
                (
                    title,
                    f"{told.answered} of {len(rows)}",
                    f"{told.exact}",
                    percent(told.median).lstrip("+"),
                    percent(told.worst),
                    percent(told.replay).lstrip("+"),
                )
            )
    columns = ["", "answers", "exact", "median (%)", "worst (%)", "replay (%)"]
    return str(table(columns, lines).data)


def cells(rows: Sequence[Row]) -> str:
    """Every workload and what each system says of it, a letter where it refuses."""
    reasons: dict[str, str] = {}
    lines: list[list[str | int]] = []
    for row in rows:
        line: list[str | int] = [row.name, round(row.measured / MB)]
        for system in SYSTEMS:
            off = row.off(system)
            why = str(row.said.get(system, "not asked"))
            if off is None:
                line.append(reasons.setdefault(why, chr(ord("a") + len(reasons))))
            else:
                line.append(percent(off))
        lines.append(line)
    said = "\n".join(f"- {letter}: {why}" for why, letter in reasons.items())
    shown = table(["peak of", "measured (MB)", *(f"{name} (%)" for name in SHORT)], lines).data
    return f"{shown}\n\nNo figure:\n\n{said}"


def summary(own: Sequence[Row], others: Sequence[Row]) -> str:
    """The share that is exact, the median and the worst, in words."""
    every = [*own, *others]
    ours, tracker = score(every, "replay"), score(every, "mem_tracker")
    assert ours is not None
    said = (
        f"{ours.exact} of the replay's {ours.answered} peaks are exact, "
        f"its median is {percent(ours.median).lstrip('+')} % off, "
        f"its worst {percent(ours.worst)} %."
    )
    if tracker is not None:
        said += (
            f" PyTorch's tracker: {tracker.exact} of {tracker.answered} "
            f"exact, median {percent(tracker.median).lstrip('+')} %, "
            f"worst {percent(tracker.worst)} %."
        )
    return said


def left_out(rows: Sequence[Row]) -> str:
    """What was not tried, as a list."""
    lines = [f"- `{name}`: {why}." for name, why in LEFT_OUT.items()]
    for system in ("replay", "mem_tracker"):
        because: dict[str, list[str]] = {}
        for row in rows:
            said = row.said.get(system, "not asked")
            if isinstance(said, str):
                because.setdefault(said, []).append(f"`{row.name}`")
        for why, names in because.items():
            lines.append(f"- {SYSTEMS[system]}, {', '.join(names)}: {why}.")
    return "\n".join(lines)


class AccuracyFigure(SphinxDirective):
    """``{accuracy-figure}``: the sum in words, then every workload as a dot."""

    def run(self) -> list[nodes.Node]:
        """A sentence and the figure."""
        own, others = runs(), series()
        said = summary(own, others)
        first, _, rest = said.partition("%. ")
        text = self.parse_text_to_nodes(f"**{first}%.** {rest}" if rest else f"**{said}**")
        svg = inline(figure(own, others), "accuracy", f"Error against the measured peak. {said}")
        return [*text, nodes.raw("", svg, format="html")]


class Accuracy(SphinxDirective):
    """``{accuracy}``: the systems' scores."""

    def run(self) -> list[nodes.Node]:
        """The tables."""
        own, others = runs(), series()
        parts = ["**Whole models, measured on an H200:**", scores(own)]
        parts += ["**Layers and losses, published by others:**", scores(others)]
        return self.parse_text_to_nodes("\n\n".join(parts))


class AccuracyCells(SphinxDirective):
    """``{accuracy-cells}``: every whole model, and what was not tried."""

    def run(self) -> list[nodes.Node]:
        """The table and the list."""
        return self.parse_text_to_nodes(cells(runs()))


class NotTried(SphinxDirective):
    """``{accuracy-not-tried}``: what was measured, but not asked."""

    def run(self) -> list[nodes.Node]:
        """The list."""
        return self.parse_text_to_nodes(left_out(runs()))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("accuracy-figure", AccuracyFigure)
    app.add_directive("accuracy", Accuracy)
    app.add_directive("accuracy-cells", AccuracyCells)
    app.add_directive("accuracy-not-tried", NotTried)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
