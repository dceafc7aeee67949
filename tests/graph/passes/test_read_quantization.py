"""Pairs of quantize and dequantize become one operator."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.read_quantization import read_quantization

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
    ):
        scale = R.const(0.5, "float32")
        zero = R.const(100, "uint8")
        integers = R.quantize(x, scale, zero, axis=0, out_dtype="uint8")
        y = R.dequantize(integers, scale, zero, axis=0, out_dtype="float32")
        return R.add(y, x)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
    ):
        y = ops.fake_quantize(x, low=-50.0, high=77.5)  # (0 - 100) / 2 and (255 - 100) / 2
        return R.add(y, x)


def test_pair_of_one_scale_becomes_its_range(becomes):
    becomes(read_quantization, Before, After)


def constant(value, dtype="float32"):
    return relax.const(np.asarray(value, dtype))


def pair(x, scale, zero):
    integers = op.quantize(x, scale, zero, axis=0, out_dtype="uint8")
    return op.dequantize(integers, scale, zero, axis=0, out_dtype="float32")


def test_pair_whose_scale_is_computed_is_dynamic(becomes):
    def before(emit, ids, x):
        scale = emit(op.divide(op.max(x), constant(255.0)))
        return pair(x, scale, op.astype(op.round(scale), "uint8"))

    becomes(read_quantization, before, lambda emit, ids, x: ops.fake_quantize(x))


def test_range_has_the_precision_of_the_file(graph):
    scale = np.float32(0.0123456789)
    after = read_quantization(
        graph(lambda emit, ids, x: pair(x, constant(scale), constant(3, "uint8")))
    )
    (binding,) = after.main.body.blocks[0].bindings[:1]
    attrs = binding.value.attrs
    step = (float(attrs["high"]) - float(attrs["low"])) / 255
    assert step == pytest.approx(float(scale), rel=1e-12)
    assert float(attrs["low"]) == pytest.approx(-3 * float(scale), rel=1e-12)


def test_pairs_of_other_integers_stay(leaves_alone):
    def before(emit, ids, x):
        scale, zero = constant(0.5), constant(0, "int8")
        integers = op.quantize(x, scale, zero, axis=0, out_dtype="int8")
        return op.dequantize(integers, scale, zero, axis=0, out_dtype="float32")

    leaves_alone(read_quantization, before)
