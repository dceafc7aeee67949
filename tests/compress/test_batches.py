"""Batches of a step: whole, of like lengths, and the same whoever asks for whichever first."""

from __future__ import annotations

from collections import Counter

from bertile.compress.batches import Batches

LENGTHS = [3 + number * 7 % 50 for number in range(203)]


def test_a_pass_has_every_example_once_but_for_the_rest():
    batches = Batches(LENGTHS, 8, 1)
    assert batches.in_pass == 25
    seen = Counter(place for step in range(25) for place in batches.at(step))
    assert set(seen.values()) == {1} and len(seen) == 200
    assert all(len(batches.at(step)) == 8 for step in range(100))


def test_any_step_can_be_asked_for_at_once_and_passes_differ():
    forward = [Batches(LENGTHS, 8, 1).at(step) for step in range(60)]
    batches = Batches(LENGTHS, 8, 1)
    assert [batches.at(step) for step in reversed(range(60))] == forward[::-1]
    assert forward[:25] != forward[25:50]
    assert Batches(LENGTHS, 8, 2).at(0) != forward[0]


def test_texts_of_a_batch_are_about_as_long():
    batches = Batches(LENGTHS, 8, 1)
    spans = []
    for step in range(25):
        lengths = [LENGTHS[place] for place in batches.at(step)]
        spans.append(max(lengths) - min(lengths))
    assert sorted(spans)[20] < 15, "of lengths from 3 to 52"


def test_few_examples_are_repeated():
    assert sorted(Batches([1, 2, 3], 8, 0).at(0)) != []
    assert len(Batches([1, 2, 3], 8, 0).at(5)) == 8
