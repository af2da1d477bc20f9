import re

import matplotlib
import pytest

matplotlib.use("agg")

from matplotlib import pyplot as plt

from every_byte.tracker import KINDS, Breakdown, Timeline
from helpers.plots import COLORS, against_bytes, loss_curves, stacked_bars, timeline
from helpers.tables import table


def test_numbers_stand_to_the_right_and_their_thousands_apart() -> None:
    lines = table(["kind", "bytes", "share"], [("a", 204032512, "1.50"), ("b", 7, "0.02")]).data
    header, rule, first, second = lines.splitlines()
    assert re.fullmatch(r"\|:-+\|-+:\|-+:\|", rule)
    assert "204,032,512" in first
    assert second.split("|")[2].endswith(" 7 ")
    assert "share" in header


def test_a_column_of_numbers_may_have_empty_cells() -> None:
    _, rule, *_ = table(["kind", "GB"], [("a", "4"), ("b", "")]).data.splitlines()
    assert re.fullmatch(r"\|:-+\|-+:\|", rule)


def row(**kinds: int) -> Breakdown:
    return Breakdown({kind: 0 for kind in KINDS} | kinds)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_bars_end_at_their_totals() -> None:
    small, large = row(parameters=10**6), row(parameters=10**6, gradients=2 * 10**6, rounding=1)
    figure = stacked_bars({"one": {"small": small, "large": large}})
    (axes,) = figure.axes
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in axes.patches}
    assert ends == {1, 3}
    assert {text.get_text() for text in axes.texts} == {"one", "1.00", "3.00"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["parameters", "gradients"]  # a byte of rounding is too small to be seen


def test_a_timeline_names_its_peak_and_its_phases() -> None:
    steps = [row(parameters=10**6), row(parameters=5 * 10**6), row(parameters=2 * 10**6)]
    recorded = Timeline(steps, {"forward": 0, "backward": 1})
    assert recorded.peak == 1
    figure = timeline(recorded)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"forward", "backward", "peak 5.00 MB"}


@pytest.mark.parametrize(
    ("peak", "axis", "said"),
    [
        (5_000_000, "MB", "peak 5.00 MB"),
        (834_632_192, "MB", "peak 835 MB"),
        (999_600_000, "GB", "peak 1.00 GB"),
        (1_038_658_560, "GB", "peak 1.04 GB"),
        (20_420_000_000, "GB", "peak 20.4 GB"),
    ],
)
def test_figures_count_in_the_unit_of_their_largest(peak: int, axis: str, said: str) -> None:
    rows = [row(parameters=peak // 10), row(parameters=peak)]
    (axes,) = timeline(Timeline(rows, {"forward": 0})).axes
    assert axes.get_ylabel() == f"allocated ({axis})"
    assert said in {text.get_text() for text in axes.texts}
    (bars,) = stacked_bars({"one": {"small": rows[0], "large": rows[1]}}).axes
    assert bars.get_xlabel() == f"memory ({axis})"


def test_a_timelines_peak_is_named_above_the_card_that_it_nearly_fills() -> None:
    recorded = Timeline([row(parameters=10**9), row(parameters=5 * 10**9)], {"forward": 0})
    heights = []
    for limit in (None, 5_100_000_000, 9_000_000_000):
        (axes,) = timeline(recorded, limit).axes
        (name,) = (text for text in axes.texts if text.get_text() == "peak 5.00 GB")
        heights.append(name.xy[1])
        drawn = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_ydata()[0] * 10**9 for line in drawn] == ([limit] if limit else [])
    assert heights[0] == heights[2] == pytest.approx(5.05)
    assert heights[1] > 5.1


def test_a_bar_below_one_keeps_three_digits() -> None:
    (axes,) = stacked_bars(
        {"one": {"a": row(parameters=559_360_000), "b": row(parameters=3_172_250_000)}}
    ).axes
    assert {text.get_text() for text in axes.texts} == {"one", "0.559", "3.17"}


def test_the_names_of_short_phases_stand_on_lines_of_their_own() -> None:
    steps = [row(parameters=n * 10**6) for n in range(100)]
    marks = {"forward": 0, "loss": 50, "backward": 52, "optimizer": 54, "end": 90}
    (axes,) = timeline(Timeline(steps, marks)).axes
    heights = {text.get_text(): text.xy[1] for text in axes.texts if text.get_text() in marks}
    assert heights["forward"] == heights["loss"] == heights["end"]
    assert heights["loss"] > heights["backward"] > heights["optimizer"]
    assert axes.get_ylim()[1] > heights["forward"]


def test_a_timeline_leaves_out_what_cannot_be_seen() -> None:
    small = [row(parameters=10**6 + n, activations=n) for n in range(1000)]
    steps = [*small, *(row(parameters=n * 10**6) for n in (3, 5, 1, 1))]
    (axes,) = timeline(Timeline(steps, {"forward": 0, "optimizer": 999})).axes
    # The beginning, a large change, the peak, what follows it, the end: from 0 to 4.
    assert axes.get_xlim() == (0, 4)
    (stack,) = axes.collections[:1]
    assert stack.get_paths()[0].get_extents().xmin == 0
    phases = {text.get_text(): text.xy[0] for text in axes.texts if hasattr(text, "xy")}
    assert phases["forward"] == 0 and phases["optimizer"] == 1
    heights = {round(y, 3) for _, y in stack.get_paths()[0].vertices}
    assert heights == {0, 1.0, 3.0, 5.0}


def test_loss_curves_count_steps_from_one() -> None:
    (axes,) = loss_curves({"run": [3.0, 2.0, 1.0]}).axes
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]


def test_quality_against_bytes_draws_the_median_and_joins_the_best_of_a_size() -> None:
    small = {"FP32": (4000, [3.0, 1.0, 2.0]), "A": (1010, [7.0]), "B": (1000, [5.0])}
    panels = {"loss": {"small": small, "large": {"FP32": (8000, [0.5])}}}
    figure = against_bytes(panels)
    (axes,) = figure.axes
    edges = [line for line in axes.lines if line.get_marker() == "None"]
    assert [list(edge.get_xydata().flatten()) for edge in edges] == [
        [1000, 5, 4000, 2],
        [8000, 0.5],
    ]
    (bar, *_) = axes.collections
    assert bar.get_segments()[0].tolist() == [[4000, 1], [4000, 3]]
    assert {text.get_text() for text in axes.texts} == {"small", "large"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FP32", "A", "B"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_ylabel() == "loss"
    marks = {line.get_marker() for line in axes.lines} - {"None"}
    assert len(marks) == 3  # the same format, the same marker in both models
    assert len({edge.get_color() for edge in edges}) == 2


def test_panels_share_their_axis_of_bytes() -> None:
    one = {"model": {"FP32": (4000, [1.0])}}
    upper, lower = against_bytes({"error": one, "loss": one}).axes
    assert upper.get_shared_x_axes().joined(upper, lower)
    assert (upper.get_xlabel(), lower.get_xlabel()) == ("", "bytes of the model")


def test_more_formats_than_markers_are_refused() -> None:
    many = {str(n): (n + 1, [1.0]) for n in range(17)}
    with pytest.raises(
        ValueError, match=f"1 models and 17 formats: expected at most {len(COLORS)} and 16"
    ):
        against_bytes({"loss": {"model": many}})
