"""The polynomials against numpy in float64: they hold the errors that their docstrings state."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes, vector_math
from bertile.schedules.reference import apply_activation

POINTS = 1 << 18
erf = np.vectorize(math.erf, otypes=[np.float64])


@pytest.fixture(scope="module")
def evaluate(kernels):
    """A function of ``vector_math`` on an array of float32."""
    built = {}

    def run(name, x, llvm=""):
        if name not in built:
            function = vector_math.ACTIVATIONS.get(name) or getattr(vector_math, name)
            built[name] = kernels.compile(elementwise(function, llvm))
        x = np.asarray(x, "float32")
        padded = np.zeros((-(-x.size // BLOCK_TOKENS), BLOCK_TOKENS), "float32")
        padded.reshape(-1)[: x.size] = x
        return kernels.call(built[name], [padded], padded.shape).reshape(-1)[: x.size]

    return run


def elementwise(function, llvm):
    with lanes.kernel("elementwise") as builder:
        x = builder.tensor("x", builder.blocks, BLOCK_TOKENS)
        y = builder.tensor("y", builder.blocks, BLOCK_TOKENS)
        builder.link(llvm)
        with T.serial(builder.blocks) as block:
            lanes.store(y, function(lanes.load(x, block)), block)
    return builder.func


def grid(low, high):
    """Evenly spread values, and values of every magnitude around zero."""
    magnitudes = 10.0 ** np.linspace(-37, 0, 1 << 12)
    values = np.concatenate([np.linspace(low, high, POINTS), magnitudes, -magnitudes])
    return values[(values >= low) & (values <= high)].astype("float32")


def stated(function) -> float:
    """The bound that a docstring gives as ``error below …``."""
    return float(re.search(r"error\s+below\s+([\d.e-]+\d)", function.__doc__).group(1))


def test_exp_holds_its_relative_error(evaluate):
    x = grid(-87, 88)
    expected = np.exp(x.astype("float64"))
    assert np.max(np.abs(evaluate("exp", x) / expected - 1)) < stated(vector_math.exp)


@pytest.mark.parametrize("name", ["exp2", "exp2_coarse", "exp2_scaled", "exp2_scaled_coarse"])
def test_powers_of_2_hold_their_relative_error(evaluate, kernels, name):
    powers = vector_math.powers(kernels.row)
    if "scaled" in name and not powers.llvm:
        pytest.skip("scaling is an instruction of AVX-512")
    llvm = powers.llvm if "scaled" in name else ""
    x = grid(vector_math.LEAST, 127)
    error = np.abs(evaluate(name, x, llvm) / np.exp2(x.astype("float64")) - 1)
    assert error.max() < stated(getattr(vector_math, name))
    low = evaluate(
        name, [vector_math.LEAST - 0.5, -1e4, -1e30, np.finfo("float32").min, -np.inf], llvm
    )
    np.testing.assert_allclose(low, 2.0**vector_math.LEAST, rtol=1e-4)


@pytest.mark.parametrize("name", ["gelu_bf16", "gelu_int8"])
def test_gelu_of_few_digits_holds_its_error(evaluate, name):
    x = grid(-100, 100)
    expected = apply_activation("gelu", x.astype("float64"))
    error = np.abs(evaluate(name, x) - expected) / np.maximum(1, np.abs(x))
    assert error.max() < stated(getattr(vector_math, name))


def test_exp_stays_positive_and_tiny_below_its_range(evaluate):
    powers = evaluate("exp", [-87.0, -88.0, -1e4, -1e30, np.finfo("float32").min, -np.inf])
    assert np.all(powers > 0) and np.all(powers < 1.7e-38)


def test_exp_is_exactly_one_at_zero(evaluate):
    assert np.array_equal(evaluate("exp", [0.0, -0.0]), [1, 1])


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_erf_holds_its_absolute_error(evaluate, limit):
    x = grid(-limit, limit)
    error = np.abs(evaluate("erf", x) - erf(x.astype("float64")))
    assert error.max() < stated(vector_math.erf)


@pytest.mark.parametrize("limit", [1, 10, 100])
def test_tanh_holds_its_absolute_error(evaluate, limit):
    x = grid(-limit, limit)
    error = np.abs(evaluate("tanh", x) - np.tanh(x.astype("float64")))
    assert error.max() < stated(vector_math.tanh)


@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_saturating_functions_are_odd_and_end_at_one(evaluate, name):
    x = grid(0, 50)
    assert np.array_equal(evaluate(name, -x), -evaluate(name, x))
    assert np.abs(evaluate(name, [1e30, np.inf, -np.inf]) - [1, 1, -1]).max() < 3e-7


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("limit", [1, 10, 600])
def test_gelu_and_silu_hold_their_error(evaluate, name, limit):
    x = grid(-limit, limit)
    error = np.abs(evaluate(name, x) - apply_activation(name, x.astype("float64")))
    bound = stated(getattr(vector_math, name))
    assert np.max(error / np.maximum(1, np.abs(x))) < bound


def test_silu_is_nothing_far_below_zero(evaluate):
    assert np.abs(evaluate("silu", [-90.0, -1e4, -1e20])).max() < 1e-15


def test_relu_is_exact(evaluate):
    x = grid(-10, 10)
    assert np.array_equal(evaluate("relu", x), np.maximum(x, 0))


def test_reference_knows_every_activation(evaluate):
    x = np.linspace(-3, 3, 64)
    for name in vector_math.ACTIVATIONS:
        assert np.abs(evaluate(name, x) - apply_activation(name, x)).max() < 1e-6
    with pytest.raises(KeyError, match="swish"):
        apply_activation("swish", x)
