"""The clean-up before fusion: constants, equal expressions, what imported lookups drag along."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph.passes.simplify import simplify

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        words: R.Tensor((100, 8), "float32"),
    ):
        R.func_attr({"num_input": 1})  # then weights
        negative = R.less(input_ids, R.const(0, "int64"))
        from_the_end = R.add(input_ids, R.const(100, "int64"))
        index = R.where(negative, from_the_end, input_ids)
        return R.take(words, index, axis=0, mode="fast")


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        words: R.Tensor((100, 8), "float32"),
    ):
        R.func_attr({"num_input": 1})
        return R.take(words, input_ids, axis=0, mode="clip")


def test_index_that_is_corrected_for_negatives_becomes_plain(becomes):
    becomes(simplify, Before, After)


def c(value, dtype="int64"):
    return relax.const(value, dtype)


def lookup(words, ids, mode="fast"):
    return op.take(words, ids, axis=0, mode=mode)


WORDS = {"words": (100, 8)}


def test_correction_by_the_rows_of_the_table_becomes_plain(becomes):
    """As TVM's importer writes it: the number of rows is asked of the table."""

    def before(emit, ids, words):
        rows = op.take(op.shape_to_tensor(op.shape_of(words)), c(0), axis=0, mode="wrap")
        return lookup(words, op.where(op.less(ids, c(0)), op.add(ids, rows), ids))

    becomes(
        simplify,
        before,
        lambda emit, ids, words: lookup(words, ids, "clip"),
        activations={},
        weights=WORDS,
    )


@pytest.mark.parametrize("mode", ["clip", "wrap"])
def test_checked_index_is_left_alone(leaves_alone, mode):
    leaves_alone(
        simplify,
        lambda emit, ids, words: lookup(words, ids, mode),
        activations={},
        weights=WORDS,
    )


LOOK_ALIKES = {
    "below one": lambda emit, ids, words: op.where(op.less(ids, c(1)), op.add(ids, c(100)), ids),
    "another tensor": lambda emit, ids, other_ids, words: op.where(
        op.less(other_ids, c(0)), op.add(ids, c(100)), ids
    ),
    "a product": lambda emit, ids, words: op.where(
        op.less(ids, c(0)), op.multiply(ids, c(-1)), ids
    ),
    "of something else": lambda emit, ids, other_ids, words: op.where(
        op.less(ids, c(0)), op.add(other_ids, c(100)), ids
    ),
}


@pytest.mark.parametrize("build", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_choice_that_corrects_no_index_is_left_alone(leaves_alone, build):
    more = {"other_ids": ("batch", "length")} if build.__code__.co_argcount == 4 else {}
    leaves_alone(
        simplify,
        lambda *operands: lookup(operands[-1], build(*operands), "clip"),
        activations=more,
        weights=WORDS,
    )


@pytest.mark.parametrize("decided", [True, False])
def test_decided_choice_takes_its_side(becomes, decided):
    activations = {"a": ("batch", 4), "b": ("batch", 4)}
    becomes(
        simplify,
        lambda emit, ids, a, b: op.nn.relu(op.where(c(decided, "bool"), a, b)),
        lambda emit, ids, a, b: op.nn.relu(a if decided else b),
        activations=activations,
    )


def test_decided_choice_that_broadcasts_is_left_alone(leaves_alone):
    leaves_alone(
        simplify,
        lambda emit, ids, a, b: op.nn.relu(op.where(c(True, "bool"), a, b)),
        activations={"a": (1, 4), "b": ("batch", 4)},
    )


def test_constants_are_folded(becomes):
    becomes(
        simplify,
        lambda emit, ids, x: op.add(x, op.multiply(c(2, "float32"), c(3, "float32"))),
        lambda emit, ids, x: op.add(x, c(6, "float32")),
    )


def test_equal_expressions_are_computed_once(becomes):
    def once(emit, ids, x):
        y = emit(op.nn.relu(x))
        return op.multiply(y, y)

    becomes(
        simplify,
        lambda emit, ids, x: op.multiply(op.nn.relu(x), emit(op.nn.relu(x))),
        once,
    )


def test_what_nobody_reads_is_dropped(becomes):
    def before(emit, ids, x):
        emit(op.tanh(x))
        return op.nn.relu(x)

    becomes(simplify, before, lambda emit, ids, x: op.nn.relu(x))


@pytest.mark.parametrize("again", [False, True])
def test_cast_to_its_own_type_disappears(becomes, again):
    """`.to(device)` between the words' lookup and the sum, as TorchScript exports it."""

    def before(emit, ids, words):
        rows = emit(op.astype(lookup(words, ids, "clip"), "float32"))
        return op.exp(op.astype(rows, "float32") if again else rows)

    becomes(
        simplify,
        before,
        lambda emit, ids, words: op.exp(emit(lookup(words, ids, "clip"))),
        activations={},
        weights=WORDS,
    )


def test_cast_to_another_type_is_left_alone(leaves_alone):
    leaves_alone(
        simplify,
        lambda emit, ids, words: op.astype(emit(lookup(words, ids, "clip")), "float16"),
        activations={},
        weights=WORDS,
    )
