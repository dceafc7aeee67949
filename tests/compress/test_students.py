"""Students of fewer layers: which stay, and that they compute what the teacher's layers do."""

from __future__ import annotations

import pytest
import torch

from bertile.compress import students
from bertile.compress.recipe import Depth
from bertile.errors import UsageError
from bertile.export import checkpoints
from bertile.families import table


def test_layers_are_taken_evenly_with_the_first_and_the_last():
    assert students.evenly(6, 3) == (0, 2, 5)
    assert students.evenly(12, 6) == (0, 2, 4, 7, 9, 11)
    assert students.evenly(4, 4) == (0, 1, 2, 3)
    assert students.evenly(4, 1) == (3,)


@pytest.mark.parametrize("name", ["bert-tiny", "distilbert-tiny", "roberta-tiny"])
def test_student_is_the_teacher_without_some_layers(tmp_path, name):
    checkpoint = checkpoints.load(f"synthetic:{name}")
    model, family = checkpoint.model, table.named(checkpoint.family)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        assert students.shorten(model, family, Depth(keep=(0,))) == (0,)
        got = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, wanted)
    model.save_pretrained(tmp_path)
    again = checkpoints.load(tmp_path).model
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).last_hidden_state, wanted)


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("bert-tiny", Depth(layers=3), "wants 3 of 2 layers"),
        ("bert-tiny", Depth(keep=(0, 2)), "keeps the layers 0, 2 of 2"),
        ("albert-tiny", Depth(layers=1), "no list of layers of its own"),
        ("modernbert-tiny", Depth(layers=2), "of several kinds"),
    ],
)
def test_what_cannot_be_shortened_is_refused(name, depth, message):
    checkpoint = checkpoints.load(f"synthetic:{name}")
    with pytest.raises(UsageError, match=message):
        students.shorten(checkpoint.model, table.named(checkpoint.family), depth)
