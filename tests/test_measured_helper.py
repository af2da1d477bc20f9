"""What the chapters print of a real card."""

import pytest

from helpers.measured import of_articles, of_experiments


def test_a_chapter_prints_what_the_card_measured() -> None:
    rows = {row["stage"]: row["allocated"] for row in of_articles("Adam")}
    assert rows["after training"] == 884_695_552
    after = {at: row for _, at, row, _ in of_experiments("amp-fp16")}
    assert after["training"]["memory_allocated"] == 834_621_952


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(KeyError, match="'Lion' was not measured"):
        of_articles("Adam", "Lion")
    with pytest.raises(KeyError, match="mlp-lion"):
        of_experiments("mlp-lion")
