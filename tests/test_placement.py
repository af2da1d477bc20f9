"""Where segments lie: upwards, or as the driver does, and what follows for what is reserved."""

from every_byte.allocator import CachingAllocator, Downwards, Recorded
from every_byte.units import MiB

G = Downwards.GRANULE


def test_granules_are_taken_from_the_top_down() -> None:
    placement = Downwards()
    places = [placement.place(size * MiB) for size in (32, 64, 502)]
    assert places == [placement.TOP - G, placement.TOP - 3 * G, placement.TOP - 19 * G]


def test_what_is_left_of_a_granule_is_filled_upwards() -> None:
    placement = Downwards()
    places = [placement.place(size * MiB) for size in (20, 2, 10, 2)]
    begin = placement.TOP - G
    assert places == [begin, begin + 20 * MiB, begin + 22 * MiB, begin - G]


def test_a_segment_is_as_large_as_whole_pages_of_two_mebibytes() -> None:
    placement = Downwards()
    begin = placement.TOP - G
    assert placement.place(31 * MiB) == begin  # and nothing is left of the granule
    assert placement.place(1) == begin - G
    assert placement.place(1) == begin - G + 2 * MiB
    placement.give_back(begin, 31 * MiB)
    assert placement.place(32 * MiB) == begin - G + 4 * MiB  # in what was left, joined
    placement.give_back(begin - G, 1)
    assert [placement.place(2 * MiB) for _ in range(2)] == [begin - G, begin - G + 36 * MiB]


def test_a_hole_of_just_the_size_is_filled_whole() -> None:
    placement = Downwards()
    begin = placement.place(20 * MiB)
    assert placement.place(12 * MiB) == begin + 20 * MiB
    assert placement.place(2 * MiB) == begin - G
    assert placement.place(32 * MiB) == begin - 2 * G  # which the hole of 30 MiB does not hold


def test_freed_segments_are_filled_upwards_and_join() -> None:
    placement = Downwards()
    first, second = placement.place(32 * MiB), placement.place(32 * MiB)
    placement.give_back(first, 32 * MiB)
    placement.give_back(second, 32 * MiB)
    assert placement.place(20 * MiB) == second
    assert placement.place(40 * MiB) == second + 20 * MiB


def test_a_recorded_run_has_the_addresses_of_its_driver() -> None:
    high, low = 9 * G, 7 * G
    placement = Recorded([(high, 20 * MiB), (low, 2 * MiB)])
    assert placement.place(20 * MiB) == high
    elsewhere = placement.place(32 * MiB)  # of which the record does not know
    assert elsewhere + 32 * MiB <= low
    assert placement.place(2 * MiB) == low
    assert placement.place(2 * MiB) == elsewhere + 32 * MiB


def test_of_equal_free_blocks_the_one_with_the_lowest_address_is_taken() -> None:
    """So the placement decides which of two segments stays whole."""
    taken = []
    for placement in (None, Downwards()):
        card = CachingAllocator(placement=placement)
        held = [card.malloc(64 * MiB) for _ in range(2)]
        for handle in held:
            card.free(handle)
        card.malloc(64 * MiB)
        first = [s for s in card.memory_snapshot() if s["allocated_size"]]
        taken.append([s["address"] for s in card.memory_snapshot()].index(first[0]["address"]))
        card.empty_cache()
        card.malloc(64 * MiB)
        assert card.memory_reserved() == 128 * MiB
    assert taken == [0, 0]
