"""Sums of embedding rows with their LayerNorm, and sums of something else."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_embedding import fuse_embedding

batch, length = TypeVar("batch"), TypeVar("length")
POSITIONS = np.arange(64)[None]  # of which our exporter cuts as many as a request has tokens


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        type_ids: R.Tensor((batch, length), "int64"),
        words: R.Tensor((100, 8), "float32"),
        types: R.Tensor((2, 8), "float32"),
        places: R.Tensor((64, 8), "float32"),
        gamma: R.Tensor((8,), "float32"),
        beta: R.Tensor((8,), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        word = R.take(words, input_ids, axis=0, mode="clip")
        kind = R.take(types, type_ids, axis=0, mode="clip")
        position_ids = R.strided_slice(R.const(POSITIONS), [1], [0], [length], assume_inbound=True)
        place = R.take(places, position_ids, axis=0, mode="clip")
        return ops.layer_norm(R.add(R.add(word, kind), place), gamma, beta, 1e-12)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        type_ids: R.Tensor((batch, length), "int64"),
        words: R.Tensor((100, 8), "float32"),
        types: R.Tensor((2, 8), "float32"),
        places: R.Tensor((64, 8), "float32"),
        gamma: R.Tensor((8,), "float32"),
        beta: R.Tensor((8,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        position_ids = R.strided_slice(R.const(POSITIONS), [1], [0], [length], assume_inbound=True)
        return ops.embedding(
            ids=(input_ids, type_ids, position_ids),
            tables=(words, types, places),
            norm=(gamma, beta),
            epsilon=1e-12,
        )


def test_three_lookups_and_their_norm_become_one_operator(becomes):
    becomes(fuse_embedding, Before, After)


EPSILON = 1e-12
WEIGHTS = {"words": (100, 8), "types": (2, 8), "places": (64, 8), "gamma": (8,), "beta": (8,)}
TYPES = {"type_ids": ("batch", "length")}


def lookup(table, ids):
    return op.take(table, ids, axis=0, mode="clip")


def positions(ids):
    """(1, S)."""
    return op.strided_slice(
        relax.const(POSITIONS), [1], [0], [ids.ty.shape[1]], assume_inbound=True
    )


def norm(x, gamma, beta):
    return ops.layer_norm(x, gamma, beta, EPSILON)


SUMS = {
    "words + (types + positions)": ((0, 1, 2), True),
    "(positions + words) + types": ((2, 0, 1), False),
    "positions + (words + types)": ((2, 0, 1), True),
    "(words + positions) + types": ((0, 2, 1), False),
    "words + (positions + types)": ((0, 2, 1), True),
}


@pytest.mark.parametrize("order,right", SUMS.values(), ids=SUMS)
def test_lookups_are_added_in_any_order(becomes, order, right):
    def operands(emit, ids, type_ids, words, types, places):
        pairs = [(ids, words), (type_ids, types), (emit(positions(ids)), places)]
        return [pairs[i] for i in order]

    def before(emit, ids, type_ids, words, types, places, gamma, beta):
        pairs = operands(emit, ids, type_ids, words, types, places)
        a, b, c = (emit(lookup(table, index)) for index, table in pairs)
        return norm(op.add(a, op.add(b, c)) if right else op.add(op.add(a, b), c), gamma, beta)

    def after(emit, ids, type_ids, words, types, places, gamma, beta):
        indices, tables = zip(*operands(emit, ids, type_ids, words, types, places))
        return ops.embedding(indices, tables, (gamma, beta), EPSILON)

    becomes(fuse_embedding, before, after, activations=TYPES, weights=WEIGHTS)


ONE = {name: WEIGHTS[name] for name in ("words", "gamma", "beta")}


def test_one_lookup_becomes_a_kernel(becomes):
    becomes(
        fuse_embedding,
        lambda emit, ids, words, gamma, beta: norm(lookup(words, ids), gamma, beta),
        lambda emit, ids, words, *scale: ops.embedding([ids], [words], scale, EPSILON),
        activations={},
        weights=ONE,
    )


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)], ids=str)
def test_row_that_an_exporter_folded_becomes_a_table_of_one_row(becomes, shape):
    """Token types that are always 0: their embedding is a weight by itself."""
    row_zero = relax.const(np.zeros((1, 1), "int32"))

    def after(emit, ids, words, row, *scale):
        return ops.embedding([ids, row_zero], [words, op.reshape(row, (1, 8))], scale, EPSILON)

    becomes(
        fuse_embedding,
        lambda emit, ids, words, row, *scale: norm(op.add(lookup(words, ids), row), *scale),
        after,
        activations={},
        weights={"words": (100, 8), "row": shape, "gamma": (8,), "beta": (8,)},
    )


def test_sum_that_is_read_elsewhere_stays_for_its_reader(becomes):
    def build(make):
        def inner(emit, ids, words, *scale):
            x = emit(lookup(words, ids))
            return relax.Tuple([make(x, ids, words, *scale), x])

        return inner

    becomes(
        fuse_embedding,
        build(lambda x, ids, words, *scale: norm(x, *scale)),
        build(lambda x, ids, words, *scale: ops.embedding([ids], [words], scale, EPSILON)),
        activations={},
        weights=ONE,
    )


ALONE = {
    "an activation in the sum": (
        lambda emit, ids, x, words, *scale: norm(op.add(lookup(words, ids), x), *scale),
        {"x": ("batch", "length", 8)},
        ONE,
    ),
    "no lookup by ids of the request": (
        lambda emit, ids, x, *scale: norm(x, *scale),
        {"x": ("batch", "length", 8)},
        {"gamma": (8,), "beta": (8,)},
    ),
    "a table that is no weight": (
        lambda emit, ids, words, *scale: norm(lookup(words, ids), *scale),
        {"words": (100, 8)},
        {"gamma": (8,), "beta": (8,)},
    ),
    "a factor": (
        lambda emit, ids, words, *scale: norm(
            op.multiply(lookup(words, ids), relax.const(2.0)), *scale
        ),
        {},
        ONE,
    ),
    "a lookup along the channels": (
        lambda emit, ids, other_ids, words, *scale: norm(
            op.take(words, other_ids, axis=1, mode="clip"), *scale
        ),
        {"other_ids": (8,)},
        ONE,
    ),
}


@pytest.mark.parametrize("build,activations,weights", ALONE.values(), ids=ALONE)
def test_look_alike_is_left_alone(leaves_alone, build, activations, weights):
    leaves_alone(fuse_embedding, build, activations=activations, weights=weights)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_type_is_that_of_the_whole_batch_when_the_axes_are_static(order):
    """With a static batch, nothing but the extents tells positions (1, S) from ids (B, S)."""
    ids = relax.Var("ids", relax.TensorType([3, 5], "int64"))
    place = relax.Var("place", relax.TensorType([1, 5], "int64"))
    tables = [relax.Var(n, relax.TensorType([9, 8], "float32")) for n in ("words", "places")]
    scale = [relax.Var(n, relax.TensorType([8], "float32")) for n in ("gamma", "beta")]
    pairs = [(ids, tables[0]), (place, tables[1])]
    indices, rows = zip(*(pairs[i] for i in order))
    call = relax.BlockBuilder().normalize(ops.embedding(indices, rows, scale, EPSILON))
    assert [int(extent) for extent in call.ty.shape] == [3, 5, 8]
