import re

import matplotlib
import pytest

matplotlib.use("agg")

from matplotlib import pyplot as plt

from helpers.accounting import KINDS, Breakdown, Timeline
from helpers.plots import loss_curves, stacked_bars, timeline
from helpers.tables import table


def test_numbers_stand_to_the_right_and_their_thousands_apart() -> None:
    lines = table(["kind", "bytes", "share"], [("a", 204032512, "1.50"), ("b", 7, "0.02")]).data
    header, rule, first, second = lines.splitlines()
    assert re.fullmatch(r"\|:-+\|-+:\|-+:\|", rule)
    assert "204,032,512" in first
    assert second.split("|")[2].endswith(" 7 ")
    assert "share" in header


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


def test_loss_curves_count_steps_from_one() -> None:
    (axes,) = loss_curves({"run": [3.0, 2.0, 1.0]}).axes
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
