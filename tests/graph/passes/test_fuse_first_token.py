"""The first token of what a kernel of ours computed."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_first_token import fuse_first_token

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        gamma: R.Tensor((8,), "float32"),
        beta: R.Tensor((8,), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        y = ops.layer_norm(x, gamma, beta, 1e-12)
        return R.take(y, R.const(0, "int64"), axis=1, mode="clip")


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        gamma: R.Tensor((8,), "float32"),
        beta: R.Tensor((8,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        y = ops.layer_norm(x, gamma, beta, 1e-12)
        return ops.first_token(y)


def test_index_of_the_first_token_becomes_one_operator(becomes):
    becomes(fuse_first_token, Before, After)


WEIGHTS = {"gamma": (8,), "beta": (8,)}


def zero():
    return relax.const(np.array(0, "int64"))


def slice_of(y, axis=1, begin=0, end=1):
    return op.strided_slice(y, axes=[axis], begin=[begin], end=[end], assume_inbound=True)


def behind_a_kernel(first):
    def build(emit, ids, x, gamma, beta):
        return first(emit(ops.layer_norm(x, gamma, beta, 1e-12)))

    return build


def index(y):
    return op.take(y, zero(), axis=1, mode="clip")


FORMS = {
    "slice and squeeze": lambda y: op.squeeze(slice_of(y), axis=[1]),
    "slice and reshape": lambda y: op.reshape(
        slice_of(y), relax.ShapeExpr([y.ty.shape[0], y.ty.shape[2]])
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_slice_of_the_first_token_is_taken(becomes, form):
    becomes(
        fuse_first_token,
        behind_a_kernel(form),
        behind_a_kernel(ops.first_token),
        weights=WEIGHTS,
    )


def test_value_that_is_also_a_result_stays(becomes):
    def both(first):
        return behind_a_kernel(lambda y: relax.Tuple([y, first(y)]))

    becomes(fuse_first_token, both(index), both(ops.first_token), weights=WEIGHTS)


ALONE = {
    "second token": lambda y: op.take(y, relax.const(np.array(1)), axis=1, mode="clip"),
    "first channel": lambda y: op.take(y, zero(), axis=2, mode="clip"),
    "first row": lambda y: op.take(y, zero(), axis=0, mode="clip"),
    "a list of tokens": lambda y: op.take(y, relax.const(np.array([0])), axis=1, mode="clip"),
    "second token by a slice": lambda y: op.squeeze(slice_of(y, 1, 1, 2), axis=[1]),
    "two tokens as one row": lambda y: op.reshape(
        slice_of(y, 1, 0, 2), relax.ShapeExpr([y.ty.shape[0], 16])
    ),
    "the tokens of all rows as one": lambda y: op.reshape(
        slice_of(y), relax.ShapeExpr([1, y.ty.shape[0] * 8])
    ),
    "a token in two rows": lambda y: op.reshape(
        slice_of(y), relax.ShapeExpr([y.ty.shape[0] * 2, 4])
    ),
}


@pytest.mark.parametrize("form", ALONE.values(), ids=ALONE)
def test_look_alike_is_left_alone(leaves_alone, form):
    leaves_alone(fuse_first_token, behind_a_kernel(form), weights=WEIGHTS)


def test_first_token_of_another_operator_is_left_alone(leaves_alone):
    leaves_alone(fuse_first_token, lambda emit, ids, x: index(emit(op.nn.relu(x))))
