"""What a library says of itself is a text, and its first line that is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertile.base.errors import BundleError
from bertile.loading.interface import check_interface, interface

MANIFEST = {
    "lanes": 16,
    "model": {"max_length": None},
    "static": {"batch": 8, "length": None, "together": True},
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 50, "default": None},
        {"name": "attention_mask", "dtype": "int32", "below": 2, "default": "ones"},
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "axes": ["batch", "length", 3]}],
}
WEIGHTS = [("words", "F32", (50, 8)), ("scale", "BF16", ())]
TEXT = """\
lanes 16
max_length 0
static 8 0 1 0
input input_ids int64 50 none
input attention_mask int32 2 ones
output logits float32 batch length 3
weight words F32 50 8
weight scale BF16
"""


def test_interface_is_one_line_for_each_thing_that_a_call_depends_on():
    assert interface(MANIFEST, WEIGHTS) == TEXT


def test_library_of_an_older_bertile_is_compared_with_nothing():
    check_interface(None, TEXT, Path("lib.so"))
    check_interface(TEXT, TEXT, Path("lib.so"))


@pytest.mark.parametrize(
    ("said", "wanted", "sentence"),
    [
        (TEXT, TEXT.replace("50 none", "51 none"), "'input input_ids int64 50 none', .* 51 none'"),
        (TEXT, TEXT + "weight more F32 1\n", "'nothing more', .* say 'weight more F32 1'"),
        (TEXT, TEXT.rpartition("weight scale")[0], "'weight scale BF16', .* say 'nothing more'"),
    ],
)
def test_first_line_that_differs_is_named(said, wanted, sentence):
    with pytest.raises(BundleError, match=f"lib.so: it was compiled for {sentence}; compile the"):
        check_interface(said, wanted, Path("lib.so"))
