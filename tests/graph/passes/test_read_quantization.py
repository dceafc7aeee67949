"""Pairs of quantize and dequantize become one operator."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from bertile.graph import ops
from bertile.graph.passes.read_quantization import read_quantization


def constant(value, dtype="float32"):
    return relax.const(np.asarray(value, dtype))


def pair(x, scale, zero):
    integers = op.quantize(x, scale, zero, axis=0, out_dtype="uint8")
    return op.dequantize(integers, scale, zero, axis=0, out_dtype="float32")


def static(emit, ids, x):
    return op.add(emit(pair(x, constant(0.5), constant(100, "uint8"))), x)


def test_pair_of_one_scale_becomes_its_range(becomes):
    def after(emit, ids, x):
        return op.add(emit(ops.fake_quantize(x, -50.0, 77.5)), x)

    becomes(read_quantization, static, after)


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
