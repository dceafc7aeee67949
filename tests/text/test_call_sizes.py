"""How large the calls of a list are: small where there are few texts for each place."""

from __future__ import annotations

import pytest

from bertile.text import batches


@pytest.mark.parametrize(
    ("lengths", "places", "most"),
    [
        ([16] * 2048, 2, batches.CALL_BLOCKS),
        ([17] * 160, 2, 20),  # 320 blocks in 8 calls for each place
        ([16] * 160, 2, 10),
        ([16] * 160, 8, batches.PASS_BLOCKS),
        ([], 1, batches.PASS_BLOCKS),
    ],
)
def test_calls_are_a_share_of_what_each_place_has(
    lengths: list[int], places: int, most: int
) -> None:
    assert batches.call_blocks([range(length) for length in lengths], places) == most


@pytest.mark.parametrize("count", [64, 100, 250, 1000])
@pytest.mark.parametrize("places", [2, 4])
def test_places_end_at_about_the_same_time(count: int, places: int) -> None:
    texts = [range(1 + number * number % 250) for number in range(count)]
    ends = [0] * places  # of blocks, each taken by who is free first
    for group in batches.groups(texts, batches.call_blocks(texts, places)):
        ends[ends.index(min(ends))] += sum(batches.blocks(texts[index]) for index in group)
    assert sum(ends) >= 0.9 * max(ends) * places
