"""Rows of unequal lengths, and padding that no mask says."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

from bertile.loading.boxes import SIDES
from bertile.loading.errors import InputError
from bertile.loading.inputs import check_inputs

SPECS = [
    {"name": "input_ids", "dtype": "int64", "below": 100, "default": None},
    {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
    {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
]
RAGGED = [[5, 6, 7], [8], [9, 10]]


def checked(padding_id=None, specs=SPECS, **inputs):
    return check_inputs(inputs, specs, 16, padding_id)


@pytest.mark.parametrize("form", [list, tuple, np.array], ids=["lists", "tuples", "arrays"])
def test_rows_of_unequal_lengths_are_padded_and_masked(form):
    arrays = checked(input_ids=[form(row) for row in RAGGED])
    assert arrays["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_other_inputs_are_padded_likewise():
    types = [[0, 1, 1], [1], [0, 0]]
    holes = [[1, 0, 1], [1], [1, 1]]
    arrays = checked(input_ids=RAGGED, token_type_ids=types, attention_mask=holes)
    assert arrays["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(input_ids=[[1, 2], []]), "input_ids[1] has no token"),
        (dict(input_ids=RAGGED, token_type_ids=[[0], [0, 1], [0]]), "not as long as"),
        (dict(input_ids=RAGGED, token_type_ids=[[0] * 3] * 2), "has shape"),
        (dict(input_ids=[[1, 2], [3.5]]), "float64"),
        (dict(input_ids=[[1, 2], ["a"]]), "dtype"),
        (dict(input_ids=[[[1, 2]], [[1], [2]]]), "input_ids"),
        (dict(input_ids=[[1] * 17, [2]]), "17 tokens"),
    ],
)
def test_rows_that_make_no_sense_are_refused(inputs, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        checked(**inputs)


def test_model_without_mask_takes_no_unequal_rows():
    with pytest.raises(InputError, match="no attention_mask"):
        checked(specs=SPECS[:1], input_ids=RAGGED)


@pytest.mark.parametrize("ids", [[[5, 6, 0]], [[5, 6], [7, 0]], [[0, 5], [6, 7]]])
def test_padding_without_a_mask_is_warned_of(ids):
    with pytest.warns(UserWarning, match="no attention_mask"):
        checked(0, input_ids=ids)


@pytest.mark.parametrize(
    "inputs",
    [
        dict(input_ids=[[5, 0, 6]]),
        dict(input_ids=[[5, 0]], attention_mask=[[1, 0]]),
        dict(input_ids=RAGGED),
    ],
)
def test_what_is_no_padding_is_not_warned_of(inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(0, **inputs)


BOXED = [
    *SPECS[:2],
    *({"name": side, "dtype": "int64", "below": 100, "default": "zeros"} for side in SIDES),
]
BOX = [1, 2, 30, 40]


@pytest.mark.parametrize("form", [list, np.array], ids=["lists", "arrays"])
def test_boxes_become_an_input_for_each_side(form):
    arrays = checked(specs=BOXED, input_ids=[[5, 6, 7], [8]], bbox=[form([BOX] * 3), form([BOX])])
    assert [arrays[side].tolist() for side in SIDES] == [[[n] * 3, [n, 0, 0]] for n in BOX]
    whole = checked(specs=BOXED, input_ids=[[5, 6]], bbox=np.array([[BOX, BOX]]))
    assert [whole[side].tolist() for side in SIDES] == [[[n, n]] for n in BOX]
    left_out = checked(specs=BOXED, input_ids=[[5, 6]], bbox=None)
    assert set(left_out) == {"input_ids"}


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[BOX[:3]]], "bbox is not (batch, length, 4)"),
        ([BOX], "bbox is not (batch, length, 4)"),
        (5, "bbox cannot be read as an array"),
        ([[[1, 2, 0, 40]]], "bbox_right[0, 0] is wrong: 0 is less than the 1 of bbox_left"),
        ([[[1, 50, 3, 40]]], "bbox_bottom[0, 0] is wrong: 40 is less than the 50 of bbox_top"),
        ([[[1, 2, 100, 40]]], "bbox_right[0, 0] is 100, the model takes 0 to 99"),
    ],
)
def test_boxes_that_make_no_sense_are_refused(boxes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        checked(specs=BOXED, input_ids=[[5]], bbox=boxes)


def test_side_beside_its_boxes_is_refused():
    with pytest.raises(InputError, match="bbox_left is given beside bbox"):
        checked(specs=BOXED, input_ids=[[5]], bbox=[[BOX]], bbox_left=[[1]])
