"""Linear layers take their bias, activation and residual, where nobody else reads the value."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_dense import fuse_dense

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        residual: R.Tensor((batch, length, 6), "float32"),
        w: R.Tensor((8, 6), "float32"),
        b: R.Tensor((6,), "float32"),
    ):
        R.func_attr({"num_input": 3})  # then weights
        y = R.add(R.matmul(x, w), b)
        return R.add(R.nn.gelu(y), residual)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        residual: R.Tensor((batch, length, 6), "float32"),
        w: R.Tensor((8, 6), "float32"),
        b: R.Tensor((6,), "float32"),
    ):
        R.func_attr({"num_input": 3})
        return ops.dense(x, w, b, residual, activation="gelu")


def test_product_takes_bias_activation_and_residual(becomes):
    becomes(fuse_dense, Before, After)


WEIGHTS = {"w": (8, 6), "b": (6,)}
ZEROS = relax.const(np.zeros(6, "float32"))


def layer(emit, x, w, b):
    return emit(op.add(emit(op.matmul(x, w)), b))


def test_biased_product_becomes_dense(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: op.add(op.matmul(x, w), b),
        lambda emit, ids, x, w, b: ops.dense(x, w, b),
        weights=WEIGHTS,
    )


def test_bias_may_stand_first(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: op.add(b, op.matmul(x, w)),
        lambda emit, ids, x, w, b: ops.dense(x, w, b),
        weights=WEIGHTS,
    )


def test_bare_product_gets_a_bias_of_zeros(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w: op.matmul(x, w),
        lambda emit, ids, x, w: ops.dense(x, w, ZEROS),
        weights={"w": (8, 6)},
    )


def test_rows_of_a_matrix_are_taken(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: op.tanh(layer(emit, x, w, b)),
        lambda emit, ids, x, w, b: ops.dense(x, w, b, activation="tanh"),
        weights=WEIGHTS,
        activations={"x": ("batch", 8)},
    )


def test_transposed_weight_is_a_weight(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: op.add(op.matmul(x, op.permute_dims(w)), b),
        lambda emit, ids, x, w, b: ops.dense(x, op.permute_dims(w), b),
        weights={"w": (6, 8), "b": (6,)},
    )


ACTIVATIONS = {
    "gelu": op.nn.gelu,
    "gelu_tanh": op.nn.gelu_tanh,
    "relu": op.nn.relu,
    "tanh": op.tanh,
    "silu": op.nn.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_taken(becomes, name):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: ACTIVATIONS[name](layer(emit, x, w, b)),
        lambda emit, ids, x, w, b: ops.dense(x, w, b, activation=name),
        weights=WEIGHTS,
    )


RESIDUAL = {"x": ("batch", "length", 8), "r": ("batch", "length", 6)}


@pytest.mark.parametrize("first", [False, True])
def test_residual_is_taken_from_either_side(becomes, first):
    def before(emit, ids, x, r, w, b):
        y = layer(emit, x, w, b)
        return op.add(r, y) if first else op.add(y, r)

    becomes(
        fuse_dense,
        before,
        lambda emit, ids, x, r, w, b: ops.dense(x, w, b, r),
        weights=WEIGHTS,
        activations=RESIDUAL,
    )


def test_activation_behind_a_residual_stays(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, r, w, b: op.nn.relu(op.add(layer(emit, x, w, b), r)),
        lambda emit, ids, x, r, w, b: op.nn.relu(ops.dense(x, w, b, r)),
        weights=WEIGHTS,
        activations=RESIDUAL,
    )


def test_sum_of_two_layers_takes_one_as_the_residual_of_the_other(becomes):
    def before(emit, ids, x, w, b):
        return op.add(layer(emit, x, w, b), op.nn.relu(layer(emit, x, w, b)))

    def after(emit, ids, x, w, b):
        first = emit(ops.dense(x, w, b, activation="relu"))
        return ops.dense(x, w, b, first)

    becomes(fuse_dense, before, after, weights=WEIGHTS)


def test_activation_that_no_kernel_has_stays(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: op.nn.softplus(layer(emit, x, w, b)),
        lambda emit, ids, x, w, b: op.nn.softplus(ops.dense(x, w, b)),
        weights=WEIGHTS,
    )


@pytest.mark.parametrize("operator", [op.nn.gelu, op.nn.relu])
def test_value_that_is_read_twice_keeps_its_own_dense(becomes, operator):
    def build(make):
        def inner(emit, ids, x, w, b):
            y = emit(make(emit, x, w, b))
            return op.multiply(operator(y), y)

        return inner

    becomes(
        fuse_dense,
        build(layer),
        build(lambda emit, x, w, b: ops.dense(x, w, b)),
        weights=WEIGHTS,
    )


def test_product_that_is_read_twice_keeps_its_bias_apart(becomes):
    def build(make):
        def inner(emit, ids, x, w, b):
            y = emit(make(x, w))
            return op.multiply(op.add(y, b), y)

        return inner

    becomes(
        fuse_dense,
        build(op.matmul),
        build(lambda x, w: ops.dense(x, w, ZEROS)),
        weights=WEIGHTS,
    )


def test_residual_that_is_broadcast_stays(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, r, w, b: op.add(layer(emit, x, w, b), r),
        lambda emit, ids, x, r, w, b: op.add(ops.dense(x, w, b), r),
        weights=WEIGHTS,
        activations={"x": ("batch", "length", 8), "r": (1, "length", 6)},
    )


def test_bias_of_another_width_is_no_bias(becomes):
    becomes(
        fuse_dense,
        lambda emit, ids, x, w, b: op.add(op.matmul(x, w), b),
        lambda emit, ids, x, w, b: op.add(ops.dense(x, w, ZEROS), b),
        weights={"w": (8, 6), "b": (1,)},
    )


ALONE = {
    "weights on the left": (
        lambda emit, ids, x, w: op.matmul(w, x),
        {"x": (8, "length")},
        {"w": (6, 8)},
    ),
    "no weight": (
        lambda emit, ids, x, y: op.matmul(x, y),
        {"x": ("batch", "length", 8), "y": (8, 6)},
        {},
    ),
    "batched weight": (
        lambda emit, ids, x, w: op.matmul(x, w),
        {"x": ("batch", "length", 8)},
        {"w": (1, 8, 6)},
    ),
    "heads": (
        lambda emit, ids, x, w: op.matmul(x, w),
        {"x": ("batch", 2, "length", 8)},
        {"w": (8, 6)},
    ),
    "vector": (lambda emit, ids, x, w: op.matmul(x, w), {"x": (8,)}, {"w": (8, 6)}),
    "another length": (
        lambda emit, ids, x, w: op.matmul(x, w),
        {"x": ("batch", 5, 8)},
        {"w": (8, 6)},
    ),
}


@pytest.mark.parametrize("build,activations,weights", ALONE.values(), ids=ALONE)
def test_product_that_no_kernel_computes_is_left_alone(leaves_alone, build, activations, weights):
    leaves_alone(fuse_dense, build, activations=activations, weights=weights)
