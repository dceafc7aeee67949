"""What a model says of its quantized layers goes into the plan, and out of the graph."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
import pytest
import tvm
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.collect_quantization import collect_quantization
from bertile.numerics.precision import LayerPlan

batch, length = TypeVar("batch"), TypeVar("length")

WEIGHTS = {
    "w": np.array([[1, 2], [3, 4]], "float32"),
    "b": np.array([0, 1], "float32"),
    "s": np.array([[[10, 0.5]]], "float32"),
}
SMOOTHED_WEIGHTS = {"w": np.array([[10, 20], [1.5, 2]], "float32"), "b": WEIGHTS["b"]}


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 2), "float32"),
        w: R.Tensor((2, 2), "float32"),
        b: R.Tensor((2,), "float32"),
        s: R.Tensor((1, 1, 2), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        smooth = R.multiply(x, s)
        return ops.dense(ops.fake_quantize(smooth, low=-1.5, high=2.0), w, b, activation="gelu")


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 2), "float32"),
        w: R.Tensor((2, 2), "float32"),
        b: R.Tensor((2,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        return ops.dense(x, w, b, activation="gelu")


def test_range_and_factors_go_into_plan_and_weight(becomes):
    rewritten = becomes(collect_quantization, Before, After, values=(WEIGHTS, SMOOTHED_WEIGHTS))
    assert rewritten.plan.keys() == {"w"}
    layer = rewritten.plan["w"]
    assert (layer.precision, layer.low, layer.high) == ("int8", -1.5, 2.0)
    assert layer.smooth.tolist() == [10, 0.5]


LAYER = {"w": (8, 4), "b": (4,)}
TWO = {**LAYER, "v": (8, 4), "c": (4,)}


@pytest.fixture
def collected(graph):
    """The graph of an expression after the pass; its main is that of ``expected``."""

    def check(before, expected, *, weights, kept=None):
        start = dataclasses.replace(graph(before, weights=weights), plan={"old": LayerPlan("bf16")})
        rewritten = collect_quantization(start)
        kept = weights if kept is None else {name: weights[name] for name in kept}
        tvm.ir.assert_structural_equal(rewritten.main, graph(expected, weights=kept).main)
        assert rewritten.plan["old"].precision == "bf16"
        return (
            rewritten,
            start,
            {name: layer_plan for name, layer_plan in rewritten.plan.items() if name != "old"},
        )

    return check


def test_range_of_a_layer_is_in_the_plan(collected):
    def before(emit, ids, x, w, b):
        return ops.dense(ops.fake_quantize(x, -1.5, 2.0), w, b, activation="gelu")

    def after(emit, ids, x, w, b):
        return ops.dense(x, w, b, activation="gelu")

    _, _, plan = collected(before, after, weights=LAYER)
    assert plan.keys() == {"w"}
    layer = plan["w"]
    assert (layer.precision, layer.low, layer.high, layer.smooth) == ("int8", -1.5, 2.0, None)
    assert layer.why


def test_dynamic_layers_of_one_mark_have_no_range(collected):
    def before(emit, ids, x, w, b, v, c):
        mark = emit(ops.fake_quantize(x))
        return op.add(ops.dense(mark, w, b), ops.dense(mark, v, c))

    def after(emit, ids, x, w, b, v, c):
        return op.add(ops.dense(x, w, b), ops.dense(x, v, c))

    _, _, plan = collected(before, after, weights=TWO)
    assert plan.keys() == {"w", "v"}
    assert not any(layer_plan.static for layer_plan in plan.values())


def test_smoothing_of_a_layer_in_floats_goes_into_its_weight(collected):
    def before(emit, ids, x, w, b, v, c, s):
        marked = ops.dense(ops.fake_quantize(x, 0.0, 1.0), v, c)
        return op.add(ops.dense(op.multiply(x, s), w, b), marked)

    def after(emit, ids, x, w, b, v, c):
        return op.add(ops.dense(x, w, b), ops.dense(x, v, c))

    weights = {**TWO, "s": (1, 1, 8)}
    rewritten, start, plan = collected(before, after, weights=weights, kept=tuple(TWO))
    factors = start.params["s"].reshape(8, 1)
    np.testing.assert_allclose(rewritten.params["w"], start.params["w"] * factors)
    assert np.array_equal(rewritten.params["v"], start.params["v"])
    assert plan.keys() == {"v"}


def test_factors_that_differ_stay_where_layers_share_a_weight(collected):
    weights = {**LAYER, "s": (1, 1, 8), "t": (1, 1, 8)}

    def layers(mark):
        def build(emit, ids, x, w, b, s, t):
            first, second = (mark(op.multiply(x, factors)) for factors in (s, t))
            return op.add(ops.dense(first, w, b), ops.dense(second, w, b))

        return build

    rewritten, start, plan = collected(
        layers(lambda x: ops.fake_quantize(x, 0.0, 1.0)), layers(lambda x: x), weights=weights
    )
    assert plan["w"].smooth is None
    assert np.array_equal(rewritten.params["w"], start.params["w"])


def test_layers_that_share_a_weight_have_the_widest_range(collected):
    def layers(mark):
        def build(emit, ids, x, w, b):
            first = ops.dense(mark(x, -1.0, 2.0), w, b)
            return op.add(first, ops.dense(mark(op.exp(x), -3.0, 1.0), w, b))

        return build

    _, _, plan = collected(layers(ops.fake_quantize), layers(lambda x, *_: x), weights=LAYER)
    assert (plan["w"].low, plan["w"].high) == (-3.0, 2.0)


def test_mark_before_no_layer_is_dropped_with_a_note(graph):
    start = graph(lambda emit, ids, x: op.exp(ops.fake_quantize(x, 0.0, 1.0)))
    exported = dataclasses.replace(start.exported, notes=("first",))
    rewritten = collect_quantization(dataclasses.replace(start, exported=exported))
    assert "fake_quantize" not in rewritten.mod.script()
    assert rewritten.plan == {}
    assert rewritten.exported.notes[0] == "first" and "quantized: 1" in rewritten.exported.notes[1]


def test_model_in_floats_is_left_alone(graph):
    start = graph(lambda emit, ids, x, w, b: ops.dense(x, w, b), weights=LAYER)
    assert collect_quantization(start) is start
