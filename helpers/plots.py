"""The book's figures: memory by kind, as stacked bars and as a timeline.

SVG, the same bytes at every run, so that nbval can compare them.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from helpers.accounting import KINDS, Breakdown, Timeline
from helpers.units import MB

# Each at least 3 : 1 against white and against the dark theme's background
# (WCAG 1.4.11), after the palette of Okabe and Ito for all kinds of sight.
COLORS = dict(
    zip(
        KINDS,
        (
            "#0072b2",  # parameters
            "#d55e00",  # gradients
            "#009070",  # optimizer states
            "#8a6fc0",  # buffers
            "#2a8fc9",  # batch
            "#a07c00",  # activations
            "#c2568f",  # temporaries
            "#767676",  # workspaces
            "#8c6d5a",  # rounding
        ),
        strict=True,
    )
)


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
    for kind in _present(rows):
        widths = [row[kind] / MB for row in rows]
        axes.barh(places, widths, 0.78, left, color=COLORS[kind], label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, row in zip(places, rows, strict=True):
        _note(axes, f"{row.total / MB:.2f}", (row.total / MB, at), va="center")
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(left))
    axes.set_xlabel("allocated (MB)")
    _legend(figure, axes)
    return figure


def timeline(recorded: Timeline) -> Figure:
    """Allocated bytes after each operation that changed them, stacked by kind."""
    figure, axes = plt.subplots(figsize=(5.4, 3.9))
    steps = range(len(recorded.steps))
    kinds = _present(recorded.steps)
    axes.stackplot(
        steps,
        [[row[kind] / MB for row in recorded.steps] for kind in kinds],
        colors=[COLORS[kind] for kind in kinds],
        labels=kinds,
        step="post",
    )
    peak = recorded.steps[recorded.peak].total / MB
    axes.set_ylim(0, 1.22 * peak)
    axes.set_xlim(0, len(steps) - 1)
    for name, begin in recorded.marks.items():
        axes.axvline(begin, color="black", linewidth=0.8, linestyle=":")
        _note(axes, name, (begin, 1.2 * peak), va="top")
    axes.hlines(peak, 0, recorded.peak, color="black", linewidth=0.8)
    _note(axes, f"peak {peak:,.2f} MB", (recorded.peak, 1.01 * peak), va="bottom", ha="right")
    axes.set_xlabel("operations that allocate or free, in order")
    axes.set_ylabel("allocated (MB)")
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


def _note(axes: Axes, text: str, at: tuple[float, float], va: str, ha: str = "left") -> None:
    """Write beside a point, a little apart from it."""
    apart = 4 if ha == "left" else 0
    axes.annotate(text, at, (apart, 0), textcoords="offset points", va=va, ha=ha)


def _present(rows: Sequence[Breakdown]) -> list[str]:
    """The kinds that are large enough in any row to be seen: 0.1 % of the largest."""
    largest = max(row.total for row in rows)
    return [kind for kind in KINDS if max(row[kind] for row in rows) * 1000 > largest]


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6)
