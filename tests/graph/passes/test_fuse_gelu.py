"""GELU as it is written in the wild, and what only looks like it."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph.passes.fuse_gelu import fuse_gelu

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
    ):
        scaled = R.divide(x, R.const(1.4142135623730951, "float32"))  # x / √2
        gate = R.add(R.erf(scaled), R.const(1.0, "float32"))
        return R.multiply(R.multiply(x, gate), R.const(0.5, "float32"))


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
    ):
        return R.nn.gelu(x)


def test_gelu_of_the_legacy_exporter_becomes_one_operator(becomes):
    becomes(fuse_gelu, Before, After)


ROOT_HALF = 0.7071067811865476
ROOT_TWO = 1.4142135623730951
ROOT_TWO_OVER_PI = 0.7978845608028654


def c(value):
    return relax.const(value, "float32")


def gate(x, scaled=None):
    """1 + erf(x / √2)."""
    scaled = op.divide(x, c(ROOT_TWO)) if scaled is None else scaled
    return op.add(op.erf(scaled), c(1.0))


ERF_FORMS = {
    "half first: (½ x) · gate": lambda x: op.multiply(op.multiply(c(0.5), x), gate(x)),
    "gate first": lambda x: op.multiply(gate(x), op.multiply(x, c(0.5))),
    "half of the gate": lambda x: op.multiply(x, op.multiply(c(0.5), gate(x))),
    "x times 1/√2": lambda x: op.multiply(
        op.multiply(x, c(0.5)), gate(x, op.multiply(c(ROOT_HALF), x))
    ),
    "divided by 2": lambda x: op.divide(op.multiply(x, gate(x)), c(2.0)),
    "one first": lambda x: op.multiply(
        op.multiply(x, c(0.5)), op.add(c(1.0), op.erf(op.divide(x, c(ROOT_TWO))))
    ),
}


@pytest.mark.parametrize("form", ERF_FORMS.values(), ids=ERF_FORMS)
def test_other_erf_form_becomes_gelu(becomes, form):
    becomes(fuse_gelu, lambda emit, ids, x: form(x), lambda emit, ids, x: op.nn.gelu(x))


def gelu_new(x):
    """Hugging Face's NewGELUActivation."""
    cubic = op.add(x, op.multiply(c(0.044715), op.power(x, c(3.0))))
    return op.multiply(
        op.multiply(c(0.5), x), op.add(c(1.0), op.tanh(op.multiply(c(ROOT_TWO_OVER_PI), cubic)))
    )


def gelu_fast(x):
    """Hugging Face's FastGELUActivation."""
    square = op.multiply(op.multiply(c(0.044715), x), x)
    inner = op.multiply(op.multiply(x, c(0.7978845608)), op.add(c(1.0), square))
    return op.multiply(op.multiply(c(0.5), x), op.add(c(1.0), op.tanh(inner)))


def cubic_as_products(x):
    cube = op.multiply(op.multiply(x, x), op.multiply(c(0.044715), x))
    inner = op.multiply(op.add(cube, x), c(ROOT_TWO_OVER_PI))
    return op.multiply(op.multiply(op.add(op.tanh(inner), c(1.0)), c(0.5)), x)


@pytest.mark.parametrize("form", [gelu_new, gelu_fast, cubic_as_products])
def test_tanh_form_becomes_gelu_tanh(becomes, form):
    becomes(fuse_gelu, lambda emit, ids, x: form(x), lambda emit, ids, x: op.nn.gelu_tanh(x))


@pytest.mark.parametrize("operator", [op.nn.gelu, op.nn.gelu_tanh])
def test_operator_is_left_as_it_is(leaves_alone, operator):
    leaves_alone(fuse_gelu, lambda emit, ids, x: operator(x))


def test_gelu_of_a_sum_takes_the_sum_as_its_operand(becomes):
    def before(emit, ids, x, b):
        total = emit(op.add(x, b))
        return op.multiply(op.multiply(total, c(0.5)), gate(total))

    becomes(
        fuse_gelu,
        before,
        lambda emit, ids, x, b: op.nn.gelu(op.add(x, b)),
        weights={"b": (8,)},
    )


def wrong_cube(factor=0.044715, power=3.0, scale=ROOT_TWO_OVER_PI):
    def build(emit, ids, x):
        cubic = op.add(x, op.multiply(c(factor), op.power(x, c(power))))
        return op.multiply(
            op.multiply(c(0.5), x), op.add(c(1.0), op.tanh(op.multiply(c(scale), cubic)))
        )

    return build


@pytest.mark.parametrize("first", [False, True])
def test_silu_is_found_from_either_side(becomes, first):
    def build(emit, ids, x):
        gate = emit(op.sigmoid(x))
        return op.multiply(gate, x) if first else op.multiply(x, gate)

    becomes(fuse_gelu, build, lambda emit, ids, x: op.nn.silu(x))


LOOK_ALIKES = {
    "sigmoid of another tensor": lambda emit, ids, x: op.multiply(x, op.sigmoid(op.nn.relu(x))),
    "twice as much": lambda emit, ids, x: op.multiply(x, gate(x)),
    "erf of x": lambda emit, ids, x: op.multiply(op.multiply(x, c(0.5)), gate(x, x)),
    "x of another tensor": lambda emit, ids, x: op.multiply(
        op.multiply(emit(op.nn.relu(x)), c(0.5)), gate(x)
    ),
    "1 - erf": lambda emit, ids, x: op.multiply(
        op.multiply(x, c(0.5)), op.subtract(c(1.0), op.erf(op.divide(x, c(ROOT_TWO))))
    ),
    "2 + erf": lambda emit, ids, x: op.multiply(
        op.multiply(x, c(0.5)), op.add(op.erf(op.divide(x, c(ROOT_TWO))), c(2.0))
    ),
    "sigmoid form": lambda emit, ids, x: op.multiply(x, op.sigmoid(op.multiply(x, c(1.702)))),
    "another factor of the cube": wrong_cube(factor=0.05),
    "another power": wrong_cube(power=2.0),
    "a power that is no integer": wrong_cube(power=3.7),
    "another scale": wrong_cube(scale=1.0),
}


@pytest.mark.parametrize("build", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alike_is_left_alone(leaves_alone, build):
    leaves_alone(fuse_gelu, build)
