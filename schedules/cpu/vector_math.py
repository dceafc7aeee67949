"""Computes exp, erf, tanh and the activations on 16 lanes, as polynomials: libm's scalar calls
would cost 50 times as much.

Each takes and gives a float32x16 expression. The stated errors are measured by
tests/schedules/test_vector_math.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu.lanes import splat
from bertile.schedules.intrinsics import x86
from bertile.schedules.schedule import Row


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    """The polynomial with the highest coefficient first."""
    x = T.Bind(x)
    value = splat(coefficients[0])
    for c in coefficients[1:]:
        value = value * x + splat(c)
    return value


# Added to a number of few digits, this leaves its rounded value in the lowest bits.
ROUND = 12582912.0
LOG2E = 1.44269504
# Two to this is nothing beside one, but its product with a value is no denormal number, for which
# Intel's processors stop: with 2**-125 attention in windows took twice to four times as long.
LEAST = -100.0


def exp(x: Any) -> Any:
    """e**x for x ≤ 88, relative error below 1e-7; below -87 it is e**-87 (about 1.6e-38).

    2**n by the exponent bits times a polynomial of degree 5 on the rest, |r| ≤ ln2/2 (Cephes expf).
    """
    x = T.Bind(tirx.max(x, splat(-87.0)))
    bits, n = _rounded(x * splat(LOG2E))
    r = T.Bind(x - n * splat(0.693359375) + n * splat(2.12194440e-4))
    p = _horner(
        r,
        (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5),
    )
    return _scaled(p * r * r + r + splat(1.0), bits)


def exp2(x: Any) -> Any:
    """2**x for x ≤ 127, relative error below 2e-7; below -100 it is 2**-100."""
    x = T.Bind(tirx.max(x, splat(LEAST)))
    bits, n = _rounded(x)
    r = T.Bind(x - n)
    p = _horner(
        r,
        (
            0.000153456501,
            0.0013399876,
            0.00961848905,
            0.0555032892,
            0.240226469,
            0.693147206,
            1.0,
        ),
    )
    return _scaled(p, bits)


def exp2_coarse(x: Any) -> Any:
    """2**x for x ≤ 127, relative error below 8e-5, for results that are rounded to bfloat16; below
    -100 it is 2**-100.
    """
    x = T.Bind(tirx.max(x, splat(LEAST)))
    bits, n = _rounded(x)
    r = T.Bind(x - n)
    return _scaled(_horner(r, (0.0551715516, 0.242611357, 0.693261019, 0.99992806)), bits)


def exp2_scaled(x: Any) -> Any:
    """As ``exp2``, relative error below 2e-7: a polynomial of degree 5 on what is left of x below
    its whole number, by which the result is scaled; with ``bertile_fraction``, ``bertile_scale``.
    """
    return _power(
        x, (0.00187757668, 0.00898934009, 0.0558263181, 0.240153617, 0.693153073, 0.999999925)
    )


def exp2_scaled_coarse(x: Any) -> Any:
    """As ``exp2_coarse``, relative error below 8e-5; likewise."""
    return _power(x, (0.0780245226, 0.226067155, 0.695833540, 0.999925219))


def _power(x: Any, coefficients: Sequence[float]) -> Any:
    vector = f"float32x{BLOCK_TOKENS}"
    x = T.Bind(tirx.max(x, splat(LEAST)))
    value = _horner(tirx.call_extern(vector, "bertile_fraction", x), coefficients)
    return tirx.call_extern(vector, "bertile_scale", value, x)


class Powers(NamedTuple):
    """2**x on a machine, and for results that are rounded to bfloat16; ``llvm`` is to be linked."""

    fine: Callable[[Any], Any]
    coarse: Callable[[Any], Any]
    llvm: str = ""


PLAIN = Powers(exp2, exp2_coarse)


def powers(row: Row) -> Powers:
    """What raises two to a power on a machine, in the fewest instructions that it has."""
    if row.arch == "x86_64" and row.vector_bits == 512:
        return Powers(exp2_scaled, exp2_scaled_coarse, x86.SCALE)
    return PLAIN


def _rounded(x: Any) -> tuple[Any, Any]:
    """The nearest whole number, in the lowest bits of an int32 and as a float32."""
    bits = T.Bind(tirx.reinterpret(f"int32x{BLOCK_TOKENS}", x + splat(ROUND)))
    # by way of the bits, or TVM would take the addition and the subtraction for nothing
    return bits, T.Bind(tirx.reinterpret(f"float32x{BLOCK_TOKENS}", bits) - splat(ROUND))


def _scaled(value: Any, n: Any) -> Any:
    """A value between 1/2 and 2 times 2**n, n being the lowest bits of an int32."""
    exponent = n << tirx.Broadcast(tirx.const(23, "int32"), BLOCK_TOKENS)
    bits = tirx.reinterpret(f"int32x{BLOCK_TOKENS}", value) + exponent
    return tirx.reinterpret(f"float32x{BLOCK_TOKENS}", bits)


def erf(x: Any) -> Any:
    """The error function, absolute error below 4e-7: a rational function of x on [-4, 4] (Eigen's
    coefficients).
    """
    x = T.Bind(tirx.max(tirx.min(x, splat(4.0)), splat(-4.0)))
    x2 = T.Bind(x * x)
    p = _horner(
        x2,
        (
            -2.72614225801306e-10,
            2.77068142495902e-08,
            -2.10102402082508e-06,
            -5.69250639462346e-05,
            -7.34990630326855e-04,
            -2.95459980854025e-03,
            -1.60960333262415e-02,
        ),
    )
    q = _horner(
        x2,
        (
            -1.45660718464996e-05,
            -2.13374055278905e-04,
            -1.68282697438203e-03,
            -7.37332916720468e-03,
            -1.42647390514189e-02,
        ),
    )
    return x * p / q


def tanh(x: Any) -> Any:
    """The hyperbolic tangent, absolute error below 3e-7: a rational function on [-7.9, 7.9]
    (Eigen's coefficients).
    """
    x = T.Bind(tirx.max(tirx.min(x, splat(7.90531110763549805)), splat(-7.90531110763549805)))
    x2 = T.Bind(x * x)
    p = _horner(
        x2,
        (
            -2.76076847742355e-16,
            2.00018790482477e-13,
            -8.60467152213735e-11,
            5.12229709037114e-08,
            1.48572235717979e-05,
            6.37261928875436e-04,
            4.89352455891786e-03,
        ),
    )
    q = _horner(
        x2, (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
    )
    return x * p / q


def gelu(x: Any) -> Any:
    """x Φ(x) = x/2 (1 + erf(x/√2)), Hendrycks & Gimpel 2016; error below 3e-7 max(1, |x|)."""
    x = T.Bind(x)
    return splat(0.5) * x * (splat(1.0) + erf(x * splat(0.7071067811865476)))


def gelu_bf16(x: Any) -> Any:
    """As ``gelu``, error below 5e-5 max(1, |x|), for results that are rounded to 16 bits."""
    return _gelu(
        x,
        3.74,
        (
            3.77472489e-08,
            -2.30615751e-06,
            6.0954364e-05,
            -0.000930550101,
            0.00929494575,
            -0.0656342432,
            0.398583949,
        ),
    )


def gelu_int8(x: Any) -> Any:
    """As ``gelu``, error below 4e-4 max(1, |x|), for results that are rounded to 8 bits."""
    return _gelu(
        x, 3.2, (1.50231353e-05, -0.000521167007, 0.0075681163, -0.0624809936, 0.396795034)
    )


def _gelu(x: Any, edge: float, coefficients: Sequence[float]) -> Any:
    """x Φ(x), with Φ - 1/2 as an odd polynomial on [-edge, edge], fitted so that the largest
    error of the product over max(1, |x|) is the least, the ends included.
    """
    x = T.Bind(x)
    inside = T.Bind(tirx.max(tirx.min(x, splat(edge)), splat(-edge)))
    return x * (inside * _horner(inside * inside, coefficients) + splat(0.5))


def gelu_tanh(x: Any) -> Any:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), the approximation of the same paper; error below
    3e-7 max(1, |x|).
    """
    x = T.Bind(x)
    return (
        splat(0.5)
        * x
        * (splat(1.0) + tanh(splat(0.7978845608028654) * (x + splat(0.044715) * x * x * x)))
    )


def relu(x: Any) -> Any:
    """max(x, 0)."""
    return tirx.max(x, splat(0.0))


def silu(x: Any) -> Any:
    """x / (1 + e**-x), Elfwing et al. 2017; error below 3e-7 max(1, |x|).

    Far below zero, where e**-x has no room, it is x e**x; the result is nothing there.
    """
    x = T.Bind(x)
    return x / (splat(1.0) + exp(tirx.min(splat(0.0) - x, splat(87.0))))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "tanh": tanh,
    "silu": silu,
}
# For layers whose inputs and results have fewer digits anyway.
ACTIVATIONS_BF16 = {**ACTIVATIONS, "gelu": gelu_bf16}
ACTIVATIONS_INT8 = {**ACTIVATIONS, "gelu": gelu_int8}
