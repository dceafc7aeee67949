"""Texts go together by their length, as many as a call should have."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.text_models import Counting

from bertile.text import batches


class Encoding:
    """Stands in for a `tokenizers.Encoding` of as many ids 4."""

    def __init__(self, length: int) -> None:
        self.ids = [4] * length
        self.attention_mask = [1] * length

    def __len__(self) -> int:
        return len(self.ids)


def encodings(*lengths: int) -> list[Encoding]:
    return [Encoding(length) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "most", "groups"),
    [
        ((), 4, []),
        ((5,), 4, [[0]]),
        ((3, 16, 9), 4, [[1, 2, 0]]),  # a block each
        ((3, 17, 9), 4, [[1, 2], [0]]),  # two blocks each, with padding
        ((100, 3, 3), 4, [[0], [1, 2]]),  # more than a call, by itself
        ((5, 5, 5, 5, 5), 2, [[0, 1], [2, 3], [4]]),
    ],
)
def test_groups_have_at_most_so_many_blocks_with_padding(lengths, most, groups) -> None:
    assert list(batches.groups(encodings(*lengths), most)) == groups


def test_groups_without_padding_are_equally_long() -> None:
    groups = batches.groups(encodings(3, 4, 3, 4, 4), 64, padded=False)
    assert list(groups) == [[1, 3, 4], [0, 2]]


def test_outputs_come_in_the_order_of_the_texts() -> None:
    model = Counting()
    outputs = batches.run_all(model, encodings(2, 40, 7, 0), most=3)
    assert [row["sentence_embedding"].tolist() for row in outputs] == [
        [2, 0],
        [40, 0],
        [7, 0],
        [0, 0],
    ]
    assert model.shapes == [(1, 40), (3, 7)]
    assert batches.run_all(model, []) == []


def test_inputs_that_no_text_says_are_left_to_the_loader() -> None:
    asked: list[set[str]] = []

    def model(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(set(arrays))
        return {"x": arrays["input_ids"]}

    model.inputs = ("input_ids", "position_ids")  # type: ignore[attr-defined]
    batches.run(model, encodings(2))
    assert asked == [{"input_ids"}]
