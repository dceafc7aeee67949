"""Two products of the same input, one multiplied by the other, become one."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_gate import fuse_gate

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        v: R.Tensor((8, 6), "float32"),
        a: R.Tensor((6,), "float32"),
        w: R.Tensor((8, 6), "float32"),
        b: R.Tensor((6,), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        activated = ops.dense(x, v, a, activation="gelu")
        gate = ops.dense(x, w, b)
        return R.multiply(activated, gate)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        v: R.Tensor((8, 6), "float32"),
        a: R.Tensor((6,), "float32"),
        w: R.Tensor((8, 6), "float32"),
        b: R.Tensor((6,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        both = R.concat([v, w], axis=1)
        biases = R.concat([a, b], axis=0)
        return ops.gated_dense(x, both, biases, activation="gelu")


def test_two_products_of_a_gated_network_become_one(becomes):
    becomes(fuse_gate, Before, After)


WEIGHTS = {"v": (8, 6), "a": (6,), "w": (8, 6), "b": (6,)}


@pytest.mark.parametrize("activation", ["none", "silu", "gelu_tanh"])
@pytest.mark.parametrize("behind", [False, True])
def test_any_activation_on_either_side_is_taken(becomes, activation, behind):
    def before(emit, ids, x, v, a, w, b):
        sides = ops.dense(x, v, a, activation=activation), ops.dense(x, w, b)
        return op.multiply(*(sides[::-1] if behind else sides))

    def after(emit, ids, x, v, a, w, b):
        pairs = [(w, v), (b, a)] if behind and activation == "none" else [(v, w), (a, b)]
        both, biases = (op.concat(pair, axis=1 - i) for i, pair in enumerate(pairs))
        return ops.gated_dense(x, both, biases, activation)

    becomes(fuse_gate, before, after, weights=WEIGHTS)


X = ("batch", "length", 8)
LOOK_ALIKES = {
    "two activations": lambda emit, x, y, v, a, w, b: op.multiply(
        ops.dense(x, v, a, activation="gelu"), ops.dense(x, w, b, activation="relu")
    ),
    "two inputs": lambda emit, x, y, v, a, w, b: op.multiply(
        ops.dense(x, v, a, activation="gelu"), ops.dense(y, w, b)
    ),
    "a sum": lambda emit, x, y, v, a, w, b: op.add(
        ops.dense(x, v, a, activation="gelu"), ops.dense(x, w, b)
    ),
    "one product": lambda emit, x, y, v, a, w, b: op.multiply(ops.dense(x, v, a), b),
}


@pytest.mark.parametrize("build", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alike_is_left_alone(leaves_alone, build):
    leaves_alone(
        fuse_gate,
        lambda emit, ids, *operands: build(emit, *operands),
        activations={"x": X, "y": X},
        weights=WEIGHTS,
    )


def test_a_product_that_somebody_else_reads_stays(leaves_alone):
    def build(emit, ids, x, v, a, w, b):
        gate = emit(ops.dense(x, w, b))
        return op.add(op.multiply(ops.dense(x, v, a, activation="gelu"), gate), gate)

    leaves_alone(fuse_gate, build, weights=WEIGHTS)


def test_a_product_with_a_residual_stays(leaves_alone):
    def build(emit, ids, x, r, v, a, w, b):
        return op.multiply(ops.dense(x, v, a, r, "gelu"), ops.dense(x, w, b))

    activations = {"x": X, "r": ("batch", "length", 6)}
    leaves_alone(fuse_gate, build, activations=activations, weights=WEIGHTS)
