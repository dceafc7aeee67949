"""Linear layers under a concatenation become one product."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph.passes.fuse_qkv import fuse_qkv

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        wq: R.Tensor((8, 8), "float32"),
        bq: R.Tensor((8,), "float32"),
        wk: R.Tensor((8, 8), "float32"),
        bk: R.Tensor((8,), "float32"),
        wv: R.Tensor((8, 4), "float32"),
        bv: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        q = R.add(R.matmul(x, wq), bq)
        k = R.add(R.matmul(x, wk), bk)
        v = R.add(R.matmul(x, wv), bv)
        return R.concat([q, k, v], axis=2)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        wq: R.Tensor((8, 8), "float32"),
        bq: R.Tensor((8,), "float32"),
        wk: R.Tensor((8, 8), "float32"),
        bk: R.Tensor((8,), "float32"),
        wv: R.Tensor((8, 4), "float32"),
        bv: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        w = R.concat([wq, wk, wv], axis=1)
        y = R.matmul(x, w)
        return R.add(y, R.concat([bq, bk, bv], axis=0))


def test_three_layers_of_one_input_become_one(becomes):
    becomes(fuse_qkv, Before, After)


WEIGHTS = {
    "wq": (8, 8),
    "bq": (8,),
    "wk": (8, 8),
    "bk": (8,),
    "wv": (8, 4),
    "bv": (4,),
}


def layers(emit, x, wq, bq, wk, bk, wv, bv):
    return [op.add(emit(op.matmul(x, w)), b) for w, b in ((wq, bq), (wk, bk), (wv, bv))]


def joined(emit, ids, x, wq, bq, wk, bk, wv, bv):
    w = op.concat([wq, wk, wv], axis=1)
    b = op.concat([bq, bk, bv], axis=0)
    return op.add(op.matmul(x, w), b)


def test_layer_without_a_bias_gets_zeros(becomes):
    zeros = relax.const([0.0] * 4, "float32")
    weights = {"a": (8, 8), "b": (8,), "c": (8, 4)}

    def before(emit, ids, x, wa, ba, wc):
        return op.concat([op.add(emit(op.matmul(x, wa)), ba), op.matmul(x, wc)], axis=2)

    def after(emit, ids, x, wa, ba, wc):
        w = op.concat([wa, wc], axis=1)
        return op.add(op.matmul(x, w), op.concat([ba, zeros], axis=0))

    becomes(fuse_qkv, before, after, weights=weights)


def test_layers_that_are_read_elsewhere_stay_for_their_readers(becomes):
    def shared(whole):
        def build(emit, ids, x, *weights):
            q, k, v = map(emit, layers(emit, x, *weights))
            together = (
                op.concat([q, k, v], axis=2) if whole is None else whole(emit, ids, x, *weights)
            )
            return relax.Tuple([emit(together), q])

        return build

    becomes(fuse_qkv, shared(None), shared(joined), weights=WEIGHTS)


def test_concatenation_along_the_tokens_is_left_alone(leaves_alone):
    def build(emit, ids, x, *weights):
        first, second, _ = layers(emit, x, *weights)
        return op.concat([first, second], axis=1)

    leaves_alone(fuse_qkv, build, weights=WEIGHTS)


def test_layers_of_different_inputs_are_left_alone(leaves_alone):
    def build(emit, ids, x, y, w, b):
        return op.concat([op.add(emit(op.matmul(i, w)), b) for i in (x, y)], axis=2)

    activations = {name: ("batch", "length", 8) for name in "xy"}
    leaves_alone(fuse_qkv, build, activations=activations, weights={"w": (8, 8), "b": (8,)})


@pytest.mark.parametrize("last", [op.nn.relu, lambda y: op.multiply(y, y)])
def test_layer_with_more_behind_it_is_left_alone(leaves_alone, last):
    def build(emit, ids, x, *weights):
        q, k, v = layers(emit, x, *weights)
        return op.concat([q, k, last(emit(v))], axis=2)

    leaves_alone(fuse_qkv, build, weights=WEIGHTS)


def test_product_with_an_activation_is_left_alone(leaves_alone):
    def build(emit, ids, x, y):
        return op.concat([op.matmul(x, y), op.matmul(x, y)], axis=2)

    activations = {"x": ("batch", "length", 8), "y": (8, 8)}
    leaves_alone(fuse_qkv, build, activations=activations)
