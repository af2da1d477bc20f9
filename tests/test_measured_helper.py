"""What the chapters print of a real card."""

import pytest

from helpers.measured import beside_replay, of_articles, of_experiments


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


def test_what_is_replayed_stands_beside_it() -> None:
    rows = beside_replay("fsdp-fp32", figure="max_memory_allocated")
    both = of_experiments("fsdp-fp32")
    assert [row[:2] for row in rows] == [one[:2] for one in both]
    for (_, _, measured, off), (_, _, told, again) in zip(rows, both, strict=True):
        assert measured == told["max_memory_allocated"]
        assert measured + off == again["max_memory_allocated"]
    assert any(off for *_, off in rows)  # so that a sum of nothing would be found
