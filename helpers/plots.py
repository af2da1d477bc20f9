"""The book's figures: memory by kind, as stacked bars and as a timeline.

SVG, the same bytes at every run, so that nbval can compare them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from every_byte.allocator import SegmentInfo
from every_byte.estimate import Memory
from every_byte.kinds import COLORS as COLORS
from every_byte.kinds import FIELDS
from every_byte.tracker import Breakdown, Timeline
from every_byte.units import KiB, MiB, short, unit


def use_book_style() -> None:
    """Let figures come out as reproducible SVG, wide enough for a phone's screen to hold."""
    plt.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: it can be searched and recoloured
            "svg.hashsalt": "every-byte",
            "figure.figsize": (5.4, 3.2),
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "legend.frameon": False,
        }
    )
    set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None})


def by_kind(memory: Memory) -> Breakdown:
    """An estimate as a bar: the kinds that an estimate has, zero for the others."""
    kinds = {name: getattr(memory, field) for field, name in FIELDS.items()}
    return Breakdown({kind: kinds.get(kind, 0) for kind in COLORS})


def stacked_bars(groups: Mapping[str, Mapping[str, Breakdown]]) -> Figure:
    """One horizontal bar for each breakdown, its bytes stacked by kind.

    Args:
        groups: title of a group: label of a bar: its bytes by kind.
    """
    labels: list[str] = []
    places: list[float] = []
    rows: list[Breakdown] = []
    figure, axes = plt.subplots(
        figsize=(5.4, 0.6 + 0.34 * sum(len(g) + 1 for g in groups.values()))
    )
    place = 0.0
    for title, bars in groups.items():
        axes.text(0, place, title, weight="bold", va="center")
        for label, row in bars.items():
            place += 1
            labels.append(label)
            places.append(place)
            rows.append(row)
        place += 1.3
    left = [0.0] * len(rows)
    one, name = unit(max(row.total for row in rows))
    for kind in _present(rows):
        widths = [row.get(kind, 0) / one for row in rows]
        axes.barh(places, widths, 0.78, left, color=COLORS[kind], label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, row in zip(places, rows, strict=True):
        end = row.total / one
        _note(axes, f"{end:.{2 if end >= 1 else 3}f}", (end, at), va="center")
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(left))
    axes.set_xlabel(f"memory ({name})")
    _legend(figure, axes)
    return figure


def timeline(recorded: Timeline, limit: int | None = None) -> Figure:
    """Allocated bytes after each operation that changed them visibly, stacked by kind.

    Args:
        limit: what the card has in bytes, drawn as a dashed line.
    """
    figure, axes = plt.subplots(figsize=(5.4, 3.9))
    steps = _told_apart(recorded)
    kinds = _present(recorded.steps)
    highest = recorded.steps[recorded.peak].total
    one, name = unit(highest)
    axes.stackplot(
        range(len(steps)),
        [[recorded.steps[i][kind] / one for i in steps] for kind in kinds],
        colors=[COLORS[kind] for kind in kinds],
        labels=kinds,
        step="post",
    )
    peak = highest / one
    axes.set_xlim(0, len(steps) - 1)
    places = {phase: bisect_left(steps, begin) for phase, begin in recorded.marks.items()}
    levels = _levels(places, len(steps) - 1)
    top = 1.22 + 0.07 * max(levels.values(), default=0)
    axes.set_ylim(0, top * peak)
    free = 1.01 * peak  # above which the peak's name can stand
    if limit is not None:
        axes.axhline(limit / one, color="black", linestyle="--")
        if peak <= limit / one < 1.08 * peak:
            free = 1.01 * limit / one
    for phase, at in places.items():
        axes.axvline(at, color="black", linewidth=0.8, linestyle=":")
        _note(axes, phase, (at, (top - 0.02 - 0.07 * levels[phase]) * peak), va="top")
    at = steps.index(recorded.peak)
    axes.hlines(peak, 0, at, color="black", linewidth=0.8)
    _note(axes, f"peak {short(highest)}", (at, free), va="bottom", ha="right")
    axes.set_xlabel("changes of memory, in order")
    axes.set_ylabel(f"allocated ({name})")
    _legend(figure, axes)
    return figure


def _levels(places: Mapping[str, int], last: int) -> dict[str, int]:
    """For names that begin at these places of 0 to `last`: lines on which none meet."""
    ends: list[float] = []
    levels: dict[str, int] = {}
    for name, at in places.items():
        level = next((i for i, end in enumerate(ends) if end <= at), len(ends))
        width = 0.014 + 0.018 * len(name)  # of the axes, at the book's size
        ends[level : level + 1] = [at + width * last]
        levels[name] = level
    return levels


def _told_apart(recorded: Timeline) -> list[int]:
    """The steps that a figure can show: the ends, the peak, and changes by 1 % of the peak."""
    peak = recorded.steps[recorded.peak].total
    ends = {0, recorded.peak, recorded.peak + 1, len(recorded.steps) - 1}
    drawn: list[int] = []
    for index, row in enumerate(recorded.steps):
        last = recorded.steps[drawn[-1]] if drawn else row
        changed = any(abs(row[kind] - last[kind]) * 100 > peak for kind in row)
        if changed or index in ends:
            drawn.append(index)
    return drawn


def segments(snapshot: Sequence[SegmentInfo]) -> Figure:
    """One horizontal bar for each segment of the allocator, block beside block.

    Segments that hold the same share a bar, which says how many they are.

    A block handed out shows the bytes asked for, then what was added to them:
    rounding to 512 B, or a rest that was not split off. Free blocks are empty
    frames. Segments stand in order of pool and size, not of address, which is
    the driver's affair.

    Args:
        snapshot: of `GPU.memory_snapshot` or ``torch.cuda.memory_snapshot``.

    Raises:
        ValueError: it holds no segment.
    """
    if not snapshot:
        raise ValueError("the snapshot holds no segment: allocate something first")
    alike = Counter(
        (
            segment["segment_type"] != "small",
            segment["total_size"],
            tuple((b["size"], b["state"], b["requested_size"]) for b in segment["blocks"]),
        )
        for segment in snapshot
    )
    widest = max(total for _, total, _ in alike)
    figure, axes = plt.subplots(figsize=(5.4, 1.3 + 0.52 * len(alike)))
    used, added, free = "asked for", "rounding, or not split off", "free"
    looks: dict[str, dict[str, Any]] = {
        used: {"color": COLORS["parameters"]},
        added: {"color": COLORS["rounding"]},
        free: {"facecolor": "none", "edgecolor": "black", "linewidth": 0.7},
    }
    for place, ((large, total, blocks), count) in enumerate(sorted(alike.items())):
        sizes = dict.fromkeys(looks, 0)
        begin = 0
        for size, state, requested in blocks:
            asked = 0 if state == "inactive" else requested
            rest = free if state == "inactive" else added
            for kind, part in ((used, asked), (rest, size - asked)):
                if part:
                    axes.barh(place, part / MiB, 0.42, begin / MiB, **looks[kind])
                sizes[kind] += part
                begin += part
            if widest < 200 * size and begin < total:
                ends = (place - 0.21, place + 0.21)
                axes.vlines(begin / MiB, *ends, color="black", linewidth=0.7)
        said = [f"{_short(n)} {kind}" for kind, n in sizes.items() if n]
        said = [text.replace(added, "added") for text in said]
        title = f"{'large' if large else 'small'} pool, {_short(total)}: {', '.join(said)}"
        many = f"{count} × " if count > 1 else ""
        axes.text(0, place - 0.27, many + title, va="bottom")
    for kind, look in looks.items():
        axes.fill_between([], [], label=kind, **look)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(alike) - 0.6, -0.75)
    axes.set_xlim(0, 1.01 * widest / MiB)
    axes.set_xlabel("bytes of the segment (MiB)")
    _legend(figure, axes)
    return figure


def loss_curves(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Loss at each step of a training, one line for each run.

    Args:
        curves: what the legend says of a run: its losses in order.
    """
    figure, axes = plt.subplots()
    styles = zip(COLORS.values(), ("-", "--", "-.", ":"), strict=False)
    for (label, losses), (color, line) in zip(curves.items(), styles, strict=False):
        axes.plot(range(1, len(losses) + 1), losses, line, color=color, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    _legend(figure, axes, columns=1)
    return figure


_MARKERS = ("o", "s", "D", "^", "v", "<", ">", "p", "h", "P", "X", "*", "d", "x", "+", "1")


def against_bytes(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[int, Sequence[float]]]]],
) -> Figure:
    """Quality against size, both logarithmic: a colour for each model, a marker for each format.

    A marker stands at the median of its values, with a bar from the least to the
    largest. A line joins a model's formats in order of size; of several that take
    about the same bytes (2 % apart at most) it goes through the best.

    Args:
        panels: what is measured (less is better): model: format: its bytes, and a
            value for each seed.

    Raises:
        ValueError: there are more models than colours, or more formats than markers.
    """
    models = list(dict.fromkeys(model for panel in panels.values() for model in panel))
    rows = [found for panel in panels.values() for found in panel.values()]
    formats = list(dict.fromkeys(name for found in rows for name in found))
    colors = dict(zip(models, COLORS.values(), strict=False))
    markers = dict(zip(formats, _MARKERS, strict=False))
    if len(colors) < len(models) or len(markers) < len(formats):
        raise ValueError(
            f"{len(models)} models and {len(formats)} formats: expected at most "
            f"{len(COLORS)} and {len(_MARKERS)}"
        )
    figure, column = plt.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(5.4, 1.6 + 3.2 * len(panels))
    )
    for axes, (label, panel) in zip(column[:, 0], panels.items(), strict=True):
        for model, found in panel.items():
            drawn = {name: (nbytes, median(seeds)) for name, (nbytes, seeds) in found.items()}
            edge = _lower_edge(drawn.values())
            axes.plot(*zip(*edge, strict=True), color=colors[model], lw=0.8)
            axes.annotate(model, edge[-1], (4, 6), textcoords="offset points", ha="right")
            look: dict[str, Any] = {"color": colors[model], "ms": 5, "fillstyle": "none"}
            for name, (nbytes, middle) in drawn.items():
                seeds = found[name][1]
                axes.vlines(nbytes, min(seeds), max(seeds), color=colors[model], lw=0.8)
                axes.plot(nbytes, middle, markers[name], **look)
        axes.set(xscale="log", yscale="log", ylabel=label)
        axes.xaxis.set_major_locator(LogLocator(4))
        axes.xaxis.set_major_formatter(lambda nbytes, _: _short(int(nbytes)))
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_xlabel("bytes of the model")
    grey: dict[str, Any] = {"color": COLORS["workspaces"], "ls": "", "ms": 5, "fillstyle": "none"}
    keys = [Line2D([], [], marker=mark, label=name, **grey) for name, mark in markers.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, handlelength=1.6)
    return figure


def _lower_edge(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """In order of bytes; of points at most 2 % apart the least."""
    edge: list[tuple[int, float]] = []
    for nbytes, value in sorted(points):
        if edge and nbytes < 1.02 * edge[-1][0]:
            edge[-1] = min(edge[-1], (nbytes, value), key=lambda point: point[1])
        else:
            edge.append((nbytes, value))
    return edge


def _short(nbytes: int) -> str:
    """Bytes in MiB, KiB or B, without needless digits: ``'18.75 MiB'``, ``'5 KiB'``, ``'40 B'``."""
    one, name = next(((u, n) for u, n in ((MiB, "MiB"), (KiB, "KiB")) if nbytes >= u), (1, "B"))
    return f"{nbytes / one:.2f}".rstrip("0").rstrip(".") + f" {name}"


def _note(axes: Axes, text: str, at: tuple[float, float], va: str, ha: str = "left") -> None:
    """Write beside a point, a little apart from it."""
    apart = 4 if ha == "left" else 0
    axes.annotate(text, at, (apart, 0), textcoords="offset points", va=va, ha=ha)


def _present(rows: Sequence[Breakdown]) -> list[str]:
    """The kinds that are large enough in any row to be seen: 0.1 % of the largest."""
    largest = max(row.total for row in rows)
    return [kind for kind in COLORS if max(row.get(kind, 0) for row in rows) * 1000 > largest]


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6)
