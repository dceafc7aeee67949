"""What zeros have cut off is gone, and the graph computes what it computed."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
import pytest
import tvm
from helpers.graph_values import evaluate
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.remove_zeros import remove_zeros
from bertile.graph.rewriting.dataflow import Dataflow
from bertile.numerics.precision import LayerPlan
from bertile.numerics.zeros import analyse
from bertile.schedules.attention_spec import AttentionSpec

batch, length = TypeVar("batch"), TypeVar("length")

WEIGHTS = {  # 16 neurons of 32 read nothing: they are always relu(2)
    "w": np.repeat([[0.0, 1.0], [0.0, 3.0]], 16, axis=1).astype("float32"),
    "b": np.full(32, 2, "float32"),
    "v": np.ones((32, 1), "float32"),
    "c": np.array([5], "float32"),
}
SMALLER = {
    "w": np.repeat([[1.0], [3.0]], 16, axis=1).astype("float32"),
    "b": np.full(16, 2, "float32"),
    "v": np.ones((16, 1), "float32"),
    "c": np.array([5 + 16 * 2], "float32"),
}


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 2), "float32"),
        w: R.Tensor((2, 32), "float32"),
        b: R.Tensor((32,), "float32"),
        v: R.Tensor((32, 1), "float32"),
        c: R.Tensor((1,), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        return ops.dense(ops.dense(x, w, b, activation="relu"), v, c)


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 2), "float32"),
        w: R.Tensor((2, 16), "float32"),
        b: R.Tensor((16,), "float32"),
        v: R.Tensor((16, 1), "float32"),
        c: R.Tensor((1,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        return ops.dense(ops.dense(x, w, b, activation="relu"), v, c)


def test_neurons_that_read_zeros_go_into_the_bias(becomes):
    becomes(remove_zeros, Before, After, values=(WEIGHTS, SMALLER))


C, N, HEADS, SIZE = 32, 64, 4, 16
WIDTH = HEADS * SIZE
NEURONS = {"w": (C, N), "b": (N,), "v": (N, C), "c": (C,)}
ATTENTION = {"w": (C, 3 * WIDTH), "b": (3 * WIDTH,), "v": (WIDTH, C), "c": (C,)}
X = {"x": ("batch", "length", C)}
MASKED = {**X, "mask": ("batch", 1, 1, "length")}


def feed_forward(emit, ids, x, w, b, v, c, activation="gelu"):
    return ops.dense(emit(ops.dense(x, w, b, activation=activation)), v, c, x)


def attend(emit, ids, x, mask, w, b, v, c, *bias, heads=HEADS, size=SIZE):
    qkv = emit(ops.dense(x, w, b))
    spec = AttentionSpec(heads, heads, size, 0.25, bias="tensor" if bias else "none")
    return ops.dense(emit(ops.attention(spec, qkv, mask, *bias)), v, c, x)


def neurons(left):
    """The sizes of the weights around so many neurons."""
    return {"w": (C, left), "b": (left,), "v": (left, C)}


def channels(left):
    """The sizes of the weights around heads of so many channels."""
    return {"w": (C, 3 * left), "b": (3 * left,), "v": (left, C)}


def zero(name, *where):
    """A change that sets this part of a weight to zero."""
    return lambda params: params[name].__setitem__(where, 0)


UNREAD = zero("v", slice(16))


@pytest.fixture
def pruned(graph):
    """A graph whose weights `change` has set to zero here and there."""

    def make(build, weights, activations=X, change=lambda params: None, plan=None):
        start = graph(build, activations=activations, weights=weights)
        params = {name: value.copy() for name, value in start.params.items()}
        change(params)
        exported = dataclasses.replace(start.exported, notes=("first",))
        return dataclasses.replace(start, params=params, exported=exported, plan=plan or {})

    return make


def check(start, **sizes):
    """The graph after the pass: its weights have these sizes, and it computes what it did."""
    after = remove_zeros(start)
    want = [(name, sizes.get(name, value.shape)) for name, value in start.params.items()]
    assert [(name, value.shape) for name, value in after.params.items()] == want
    weights = after.main.params[int(after.main.attrs["num_input"]) :]
    assert [(var.name, tuple(map(int, var.ty.shape))) for var in weights] == want
    relax.analysis.well_formed(after.mod)
    np.testing.assert_allclose(evaluate(after), evaluate(start), rtol=1e-5, atol=1e-5)
    tvm.ir.assert_structural_equal(remove_zeros(after).main, after.main)
    return after


def untouched(start):
    assert remove_zeros(start) is start


def test_dense_weights_are_left_alone(pruned):
    untouched(pruned(feed_forward, NEURONS))
    untouched(pruned(attend, ATTENTION, MASKED))


def test_neurons_that_nobody_reads_are_removed(pruned):
    start = pruned(feed_forward, NEURONS, change=zero("v", slice(5, 37)))
    after = check(start, **neurons(N - 32))
    assert after.exported.notes == ("first", "zeros: 32 neurons have no effect and were removed")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "tanh", "none"])
def test_neurons_that_never_change_become_part_of_the_bias(pruned, activation):
    def build(emit, ids, *weights):
        return feed_forward(emit, ids, *weights, activation=activation)

    start = pruned(build, NEURONS, change=zero("w", slice(None), slice(0, N, 2)))
    after = check(start, **neurons(N - 32))
    assert not np.allclose(after.params["c"], start.params["c"], atol=0.1)


GATED = {**NEURONS, "w": (C, 2 * N), "b": (2 * N,)}


def gated_feed_forward(emit, ids, x, w, b, v, c):
    return ops.dense(emit(ops.gated_dense(x, w, b, "gelu")), v, c, x)


@pytest.mark.parametrize("which", ["unread", "constant"])
def test_neurons_of_a_gated_layer_go_with_both_their_columns(pruned, which):
    def change(params):
        if which == "unread":
            params["v"][:16] = 0
        else:
            params["w"].reshape(C, 2, N)[:, :, :16] = 0

    smaller = {"w": (C, 2 * (N - 16)), "b": (2 * (N - 16),), "v": (N - 16, C)}
    check(pruned(gated_feed_forward, GATED, change=change), **smaller)


def test_neuron_of_a_gated_layer_that_one_half_moves_stays(pruned):
    untouched(pruned(gated_feed_forward, GATED, change=zero("w", slice(None), slice(16))))


def test_layers_without_biases_have_neurons_too(pruned):
    def build(emit, ids, x, w, v):
        zeros = [relax.const(np.zeros(size, "float32")) for size in (N, C)]
        return feed_forward(emit, ids, x, w, zeros[0], v, zeros[1])

    start = pruned(build, {"w": (C, N), "v": (N, C)}, change=zero("w", slice(None), slice(16, 32)))
    check(start, w=(C, N - 16), v=(N - 16, C))


@pytest.mark.parametrize(
    ("before", "zeros", "left"), [(64, 15, 64), (64, 16, 48), (64, 47, 32), (70, 8, 64)]
)
def test_what_is_left_is_a_multiple_of_16(pruned, before, zeros, left):
    weights = {**neurons(before), "c": (C,)}
    check(pruned(feed_forward, weights, change=zero("v", slice(zeros))), **neurons(left))


def test_of_all_neurons_a_few_are_kept(pruned):
    check(pruned(feed_forward, NEURONS, change=zero("v")), **neurons(16))


@pytest.mark.parametrize("which", ["rows", "values", "either"])
def test_heads_without_effect_are_removed(pruned, which):
    def change(params):
        rows = params["v"].reshape(HEADS, SIZE, C)[1]
        values = params["w"].reshape(C, 3, HEADS, SIZE)[:, 2, 1]
        unread, constant = {"rows": (16, 0), "values": (0, 16), "either": (9, 7)}[which]
        rows[:unread] = 0
        values[:, SIZE - constant :] = 0

    after = check(pruned(attend, ATTENTION, MASKED, change), **channels(WIDTH - SIZE))
    (call,) = (
        b.value for b in Dataflow(after.main).bindings if ops.is_call(b.value, "bertile.attention")
    )
    assert int(call.attrs["heads"]) == HEADS - 1
    assert after.exported.notes[-1] == "zeros: 1 attention heads have no effect and were removed"


def test_heads_with_rotary_positions_are_removed(pruned):
    def build(emit, ids, x, mask, cos, sin, w, b, v, c):
        qkv = emit(ops.turned_dense(x, w, b, cos, sin, 2 * HEADS))
        return ops.dense(
            emit(ops.attention(AttentionSpec(HEADS, HEADS, SIZE, 0.25), qkv, mask)), v, c
        )

    angles = {name: (1, "length", SIZE) for name in ("cos", "sin")}
    change = zero("v", slice(SIZE, 2 * SIZE))
    after = check(pruned(build, ATTENTION, {**MASKED, **angles}, change), **channels(WIDTH - SIZE))
    (layer,) = (b.value for b in Dataflow(after.main).bindings if "turned" in b.value.attrs)
    assert ops.turned(layer) == 2 * (HEADS - 1)


def test_head_whose_queries_are_zero_stays(pruned):
    """It still takes the mean of its values."""
    untouched(pruned(attend, ATTENTION, MASKED, zero("w", slice(None), slice(2 * WIDTH))))


@pytest.mark.parametrize(
    ("heads", "size", "outputs", "every", "left"),
    [
        *((4, 16, C, 1, 1), (8, 8, C, 1, 2), (2, 32, C, 1, 1)),  # of all heads a few are kept
        (12, 26, 20, 2, 8),  # 26 rows of zeros are no blocks of 4
    ],
)
def test_channels_of_the_heads_left_are_a_multiple_of_16(pruned, heads, size, outputs, every, left):
    def build(emit, ids, *operands):
        return attend(emit, ids, *operands, heads=heads, size=size)

    before, after = (
        {"w": (outputs, 3 * n), "b": (3 * n,), "v": (n, outputs), "c": (outputs,)}
        for n in (heads * size, left * size)
    )
    start = pruned(build, before, {**MASKED, "x": ("batch", "length", outputs)})
    start.params["v"].reshape(heads, size, outputs)[::every] = 0
    check(start, **after)


@pytest.mark.parametrize("extent", [1, HEADS])
def test_heads_that_a_bias_tells_apart_stay(pruned, extent):
    def build(emit, ids, x, mask, bias, *weights):
        return attend(emit, ids, x, mask, *weights, bias)

    activations = {**MASKED, "bias": (1, extent, "length", "length")}
    start = pruned(build, ATTENTION, activations, zero("v", slice(SIZE)))
    untouched(start) if extent == HEADS else check(start, **channels(WIDTH - SIZE))


def test_blocks_of_zeros_stay_blocks(pruned):
    """A neuron that goes alone would move all others within their blocks."""
    kept = np.kron(np.random.default_rng(2).random((N // 4, C)) < 0.3, np.ones((4, 1)))

    def change(params):
        params["v"] *= kept
        params["v"][8:24] = 0
        params["w"][:, [0, 1, 2, 40, 41, 42, 43, 60]] = 0

    start = pruned(feed_forward, NEURONS, change=change)
    assert analyse(start.params["v"]).pattern == "4x1"
    after = check(start, **neurons(N - 16))
    assert analyse(after.params["v"]).pattern == "4x1"
    assert np.array_equal(after.params["w"][:, :4], start.params["w"][:, :4]), "a block's 4 stay"


def test_blocks_of_outputs_stay_blocks(pruned):
    kept = np.kron(np.random.default_rng(2).random((C, N // 16)) < 0.4, np.ones((1, 16)))

    def change(params):
        params["w"] *= kept
        params["v"][[*range(8), *range(48, 56)]] = 0  # 16 neurons, of two blocks

    start = pruned(feed_forward, NEURONS, change=change)
    assert analyse(start.params["w"]).pattern == "1x16"
    untouched(start)
    start.params["v"][:16] = 0
    after = check(start, **neurons(N - 16))
    assert analyse(after.params["w"]).pattern == "1x16"


def twice(place=None):
    """Two layers of the same weights; in one place the second has a weight of its own, `other`."""

    def build(emit, ids, x, w, b, v, c, *other):
        weights = {"w": w, "b": b, "v": v, "c": c}
        y = emit(feed_forward(emit, ids, x, *weights.values()))
        weights.update(zip([place], other))
        return feed_forward(emit, ids, y, *weights.values())

    return build


def test_shared_weights_are_cut_for_all_layers(pruned):
    after = check(pruned(twice(), NEURONS, change=UNREAD), **neurons(N - 16))
    assert "zeros: 32 neurons" in after.exported.notes[-1]


@pytest.mark.parametrize("place", NEURONS)
def test_weights_that_are_shared_in_part_are_left_alone(pruned, place):
    weights = {**NEURONS, "other": NEURONS[place]}
    untouched(pruned(twice(place), weights, change=UNREAD))


def test_weight_that_something_else_reads_is_left_alone(pruned):
    def build(emit, ids, x, w, b, v, c):
        y = emit(feed_forward(emit, ids, x, w, b, v, c))
        return op.add(y, op.matmul(op.matmul(y, w), v))

    untouched(pruned(build, NEURONS, change=UNREAD))


def test_bias_that_something_else_reads_stays_for_it(pruned):
    def build(emit, ids, x, w, b, v, c):
        return op.multiply(feed_forward(emit, ids, x, w, b, v, c), c)

    start = pruned(build, NEURONS, change=zero("w", slice(None), slice(16)))
    after = remove_zeros(start)
    assert list(after.params) == ["w", "b", "v", "c", "c_resized"]
    assert np.array_equal(after.params["c"], start.params["c"])
    np.testing.assert_allclose(evaluate(after), evaluate(start), rtol=1e-5, atol=1e-5)


def test_channels_with_other_readers_stay(pruned):
    def read_twice(emit, ids, x, w, b, v, c):
        inner = emit(ops.dense(x, w, b))
        return relax.Tuple([ops.dense(inner, v, c), inner])

    def with_residual(emit, ids, x, y, w, b, v, c):
        return ops.dense(emit(ops.dense(x, w, b, y)), v, c)

    def with_other_readers_of_qkv(emit, ids, x, mask, w, b, v, c):
        qkv = emit(ops.dense(x, w, b))
        context = ops.attention(AttentionSpec(HEADS, HEADS, SIZE, 1.0), qkv, mask)
        return relax.Tuple([ops.dense(emit(context), v, c), qkv])

    untouched(pruned(read_twice, NEURONS, change=UNREAD))
    untouched(pruned(with_residual, NEURONS, {**X, "y": ("batch", "length", N)}, UNREAD))
    untouched(pruned(with_other_readers_of_qkv, ATTENTION, MASKED, UNREAD))


def test_three_layers_in_a_row_are_cut_between_each_two(pruned):
    def build(emit, ids, x, w, b, v, c, u, d):
        inner = emit(ops.dense(x, w, b, activation="gelu"))
        return ops.dense(emit(ops.dense(inner, v, c, activation="tanh")), u, d)

    weights = {**NEURONS, "v": (N, N), "c": (N,), "u": (N, C), "d": (C,)}
    start = pruned(build, weights, change=UNREAD)
    zero("u", slice(16, 48))(start.params)
    check(start, w=(C, 48), b=(48,), v=(48, 32), c=(32,), u=(32, C))


def test_constant_is_folded_as_the_range_rounds_it(pruned):
    """Coarse enough that folding the constant itself would be seen."""
    factors = np.linspace(0.5, 2, N).astype("float32")
    for smooth in (None, factors):
        plan = {"v": LayerPlan("int8", -30.0, 50.0, smooth)}
        change = zero("w", slice(None), slice(8, 40))
        start = pruned(feed_forward, NEURONS, change=change, plan=plan)
        after = check(start, **neurons(32))
        left = after.plan["v"]
        assert (left.low, left.high) == (-30.0, 50.0)
        if smooth is not None:
            assert np.array_equal(left.smooth, np.delete(factors, np.s_[8:40]))
        in_floats = evaluate(remove_zeros(dataclasses.replace(start, plan={})))
        assert np.abs(evaluate(after) - in_floats).max() > 0.01
