"""LayerNorm, one operator or spelled out, and normalisations that are something else."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_layer_norm import fuse_layer_norm

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
        centred = R.subtract(x, R.mean(x, axis=-1, keepdims=True))
        variance = R.mean(R.multiply(centred, centred), axis=-1, keepdims=True)
        deviation = R.sqrt(R.add(variance, R.const(2**-16, "float32")))
        return R.add(R.multiply(R.divide(centred, deviation), gamma), beta)


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
        return ops.layer_norm(x, gamma, beta, epsilon=2**-16)


def test_norm_that_is_spelled_out_becomes_one_operator(becomes):
    becomes(fuse_layer_norm, Before, After)


WEIGHTS = {"gamma": (8,), "beta": (8,)}
EPSILON = float(np.float32(1e-5))


def c(value):
    return relax.const(value, "float32")


def expected(emit, ids, x, gamma, beta):
    return ops.layer_norm(x, gamma, beta, EPSILON)


def operator(axes=(-1,), **attrs):
    def build(emit, ids, x, gamma, beta):
        return op.nn.layer_norm(x, gamma, beta, list(axes), epsilon=EPSILON, **attrs)

    return build


def rms(x, by="reciprocal", square=None, of=None, axis=-1, epsilon=EPSILON):
    of = x if of is None else of
    squares = op.multiply(of, of) if square is None else op.power(of, c(square))
    root = op.sqrt(op.add(op.mean(squares, axis, keepdims=True), c(epsilon)))
    return op.divide(x, root) if by == "root" else op.multiply(x, op.divide(c(1.0), root))


RMS = {
    "powers": lambda x, gamma: op.multiply(gamma, rms(x, square=2.0)),
    "products": lambda x, gamma: op.multiply(gamma, rms(x)),
    "a divisor": lambda x, gamma: op.multiply(rms(x, "root"), gamma),
    "one more than the weight": lambda x, gamma: op.multiply(rms(x), op.add(gamma, c(1.0))),
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm_becomes_the_same_operator(becomes, spelling):
    def after(emit, ids, x, gamma, beta):
        gamma = op.add(gamma, c(1.0)) if "one" in spelling else gamma
        zeros = relax.const(np.zeros(8, "float32"))
        return ops.layer_norm(x, gamma, zeros, EPSILON, rms=True)

    def before(emit, ids, x, gamma, beta):
        return RMS[spelling](x, gamma)

    becomes(fuse_layer_norm, before, after, weights=WEIGHTS)


NO_RMS = {
    "another power": lambda x, gamma: op.multiply(gamma, rms(x, square=3.0)),
    "the root of another": lambda x, gamma: op.multiply(gamma, rms(x, of=op.nn.relu(x))),
    "along the tokens": lambda x, gamma: op.multiply(gamma, rms(x, axis=1)),
    "no weight": lambda x, gamma: op.multiply(x, rms(x)),
}


@pytest.mark.parametrize("build", NO_RMS.values(), ids=NO_RMS)
def test_what_looks_like_rms_norm_is_left_alone(leaves_alone, build):
    leaves_alone(
        fuse_layer_norm, lambda emit, ids, x, gamma, beta: build(x, gamma), weights=WEIGHTS
    )


def spelled_out(square=None, swap=False, axis=-1, keepdims=True, outside=False):
    """(x - mean) / sqrt(mean((x - mean)²) + epsilon) · gamma + beta, as before opset 17."""

    def build(emit, ids, x, gamma, beta):
        d = emit(op.subtract(x, op.mean(x, axis, keepdims=keepdims)))
        squared = op.multiply(d, d) if square is None else op.power(d, c(square))
        variance = op.mean(squared, axis, keepdims=keepdims)
        if outside:  # sqrt(variance) + epsilon
            root = op.add(op.sqrt(variance), c(EPSILON))
        else:
            root = op.sqrt(op.add(*([c(EPSILON), variance] if swap else [variance, c(EPSILON)])))
        ratio = op.divide(d, root)
        scaled = op.multiply(gamma, ratio) if swap else op.multiply(ratio, gamma)
        return op.add(beta, scaled) if swap else op.add(scaled, beta)

    return build


@pytest.mark.parametrize("axes", [(-1,), (2,)])
def test_operator_over_the_last_axis_is_taken(becomes, axes):
    becomes(fuse_layer_norm, operator(axes), expected, weights=WEIGHTS)


@pytest.mark.parametrize("square,swap", [(2.0, False), (None, True), (2.0, True)])
def test_other_spelling_is_taken(becomes, square, swap):
    becomes(fuse_layer_norm, spelled_out(square, swap), expected, weights=WEIGHTS)


@pytest.mark.parametrize("build", [operator(), spelled_out()], ids=["operator", "spelled out"])
def test_rows_of_a_matrix_are_taken(becomes, build):
    becomes(fuse_layer_norm, build, expected, weights=WEIGHTS, activations={"x": ("batch", 8)})


def test_result_that_is_used_twice_is_taken_once(becomes):
    def twice(norm):
        def build(emit, ids, x, gamma, beta):
            y = emit(norm(emit, ids, x, gamma, beta))
            return op.add(y, op.nn.relu(y))

        return build

    becomes(fuse_layer_norm, twice(spelled_out()), twice(expected), weights=WEIGHTS)


@pytest.mark.parametrize("attrs", [{"center": False}, {"scale": False}], ids=str)
def test_operator_without_centre_or_scale_is_left_alone(leaves_alone, attrs):
    leaves_alone(fuse_layer_norm, operator(**attrs), weights=WEIGHTS)


def test_operator_over_two_axes_is_left_alone(leaves_alone):
    leaves_alone(
        fuse_layer_norm,
        operator((1, 2)),
        weights={"gamma": (8, 8), "beta": (8, 8)},
        activations={"x": ("batch", 8, 8)},
    )


def test_operator_over_an_inner_axis_is_left_alone(leaves_alone):
    leaves_alone(
        fuse_layer_norm, operator((1,)), weights=WEIGHTS, activations={"x": ("batch", 8, 8)}
    )


def test_operator_on_four_axes_is_left_alone(leaves_alone):
    leaves_alone(
        fuse_layer_norm,
        operator(),
        weights=WEIGHTS,
        activations={"x": ("batch", 2, "length", 8)},
    )


def test_scale_that_is_no_weight_is_left_alone(leaves_alone):
    def build(emit, ids, x, gamma, beta):
        return op.nn.layer_norm(x, gamma, beta, [-1], epsilon=EPSILON)

    activations = {"x": ("batch", "length", 8), "gamma": (8,), "beta": (8,)}
    leaves_alone(fuse_layer_norm, build, activations=activations)


@pytest.mark.parametrize(
    "build",
    [
        spelled_out(outside=True),
        spelled_out(square=3.0),
        spelled_out(axis=1),
    ],
    ids=["epsilon outside of the root", "mean of the cube", "another axis"],
)
def test_look_alike_is_left_alone(leaves_alone, build):
    leaves_alone(fuse_layer_norm, build, weights=WEIGHTS)


def test_mean_of_another_tensor_stays_before_an_rms_norm(becomes):
    def build(emit, ids, x, gamma, beta):
        d = emit(op.subtract(x, op.mean(op.nn.relu(x), -1, keepdims=True)))
        variance = op.mean(op.multiply(d, d), -1, keepdims=True)
        ratio = op.divide(d, op.sqrt(op.add(variance, c(EPSILON))))
        return op.add(op.multiply(ratio, gamma), beta)

    def after(emit, ids, x, gamma, beta):
        d = op.subtract(x, op.mean(op.nn.relu(x), -1, keepdims=True))
        zeros = relax.const(np.zeros(8, "float32"))
        return op.add(ops.layer_norm(d, gamma, zeros, EPSILON, rms=True), beta)

    becomes(fuse_layer_norm, build, after, weights=WEIGHTS)


def test_scale_of_one_channel_is_left_alone(leaves_alone):
    leaves_alone(fuse_layer_norm, spelled_out(), weights={"gamma": (1,), "beta": (8,)})
