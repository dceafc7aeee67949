"""Rotary positions before attention are turned by the product that makes Q, K and V."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_angles import fuse_angles
from bertile.schedules.attention_spec import AttentionSpec

batch, length = TypeVar("batch"), TypeVar("length")
HEADS, SIZE = 2, 4
SPEC = AttentionSpec(HEADS, HEADS, SIZE, 0.5, keys="window", window=3)


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        mask: R.Tensor((batch, 1, 1, length), "float32"),
        cos: R.Tensor((1, length, 4), "float32"),
        sin: R.Tensor((1, length, 4), "float32"),
        w: R.Tensor((8, 24), "float32"),
        b: R.Tensor((24,), "float32"),
    ):
        R.func_attr({"num_input": 5})  # then weights
        qkv = ops.dense(x, w, b)
        turned = ops.rotary(qkv, cos, sin, heads=4)
        return ops.attention(SPEC, turned, mask)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        mask: R.Tensor((batch, 1, 1, length), "float32"),
        cos: R.Tensor((1, length, 4), "float32"),
        sin: R.Tensor((1, length, 4), "float32"),
        w: R.Tensor((8, 24), "float32"),
        b: R.Tensor((24,), "float32"),
    ):
        R.func_attr({"num_input": 5})
        qkv = ops.turned_dense(x, w, b, cos, sin, heads=4)
        return ops.attention(SPEC, qkv, mask)


def test_the_product_turns_q_and_k(becomes):
    becomes(fuse_angles, Before, After)


ROWS = ("batch", "length", 24)
OPERANDS = {
    **{"x": ("batch", "length", 8), "r": ROWS, "mask": ("batch", 1, 1, "length")},
    **{name: (1, "length", SIZE) for name in ("cos", "sin")},
}
WEIGHTS = {"w": (8, 24), "b": (24,)}


def attend(mask, qkv):
    return ops.attention(SPEC, qkv, mask)


LOOK_ALIKES = {
    "read by others too": lambda emit, x, r, mask, cos, sin, w, b: op.concat(
        [attend(mask, qkv := emit(ops.rotary(ops.dense(x, w, b), cos, sin, 4))), qkv], axis=2
    ),
    "read before it is turned": lambda emit, x, r, mask, cos, sin, w, b: op.concat(
        [attend(mask, ops.rotary(qkv := emit(ops.dense(x, w, b)), cos, sin, 4)), qkv], axis=2
    ),
    "a residual": lambda emit, x, r, mask, cos, sin, w, b: attend(
        mask, ops.rotary(ops.dense(x, w, b, r), cos, sin, 4)
    ),
    "an activation": lambda emit, x, r, mask, cos, sin, w, b: attend(
        mask, ops.rotary(ops.dense(x, w, b, activation="tanh"), cos, sin, 4)
    ),
    "V too": lambda emit, x, r, mask, cos, sin, w, b: attend(
        mask, ops.rotary(ops.dense(x, w, b), cos, sin, 6)
    ),
    "Q alone": lambda emit, x, r, mask, cos, sin, w, b: attend(
        mask, ops.rotary(ops.dense(x, w, b), cos, sin, 2)
    ),
    "no product": lambda emit, x, r, mask, cos, sin, w, b: attend(mask, ops.rotary(r, cos, sin, 4)),
    "no attention": lambda emit, x, r, mask, cos, sin, w, b: ops.rotary(
        ops.dense(x, w, b), cos, sin, 4
    ),
}


@pytest.mark.parametrize("build", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alike_is_left_alone(leaves_alone, build):
    leaves_alone(
        fuse_angles,
        lambda emit, ids, *operands: build(emit, *operands),
        activations=OPERANDS,
        weights=WEIGHTS,
    )


def test_heads_of_another_size_stay(leaves_alone):
    angles = {name: (1, "length", 2 * SIZE) for name in ("cos", "sin")}
    leaves_alone(
        fuse_angles,
        lambda emit, ids, x, r, mask, cos, sin, w, b: attend(
            mask, ops.rotary(ops.dense(x, w, b), cos, sin, 2)
        ),
        activations={**OPERANDS, **angles},
        weights=WEIGHTS,
    )
