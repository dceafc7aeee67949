"""Makes one operator of GELU or SiLU that is spelled out, in any order of its factors.

    x · ½ · (1 + erf(x / √2))                         →  relax.nn.gelu(x)
    x · ½ · (1 + tanh(√(2/π) (x + 0.044715 x³)))      →  relax.nn.gelu_tanh(x)
    x · sigmoid(x)                                    →  relax.nn.silu(x)

Factors and terms are flattened first: exporters differ only in how they pair them.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite


def fuse_gelu(graph: Graph) -> Graph:
    """Recognise all three."""
    return rewrite(rewrite(graph, _gelu), _silu)


def _silu(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "multiply"):
        return None
    for x, gate in (call.args, list(call.args)[::-1]):
        sigmoid = flow.call(gate, "sigmoid")
        if sigmoid is not None and _same(flow, sigmoid.args[0], x):
            return relax.op.nn.silu(x)
    return None


def _gelu(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "multiply", "divide"):
        return None
    factors, constant = _factors(flow, call)
    if len(factors) != 2 or not math.isclose(constant, 0.5, rel_tol=1e-4):
        return None
    for x, gate in (factors, factors[::-1]):
        one_plus = flow.call(gate, "add")
        split = flow.split_scalar(one_plus) if one_plus is not None else None
        if split is None or split[1] != 1.0:
            continue
        inner = flow.call(split[0], "erf")
        if inner is not None and _is_multiple(flow, inner.args[0], x, 2**-0.5):
            return relax.op.nn.gelu(x)
        inner = flow.call(split[0], "tanh")
        if inner is not None and _is_cubic(flow, inner.args[0], x):
            return relax.op.nn.gelu_tanh(x)
    return None


def _factors(flow: Dataflow, expr: Any) -> tuple[list[Any], float]:
    """The factors of a product that are no constants, and the product of those that are."""
    call = flow.call(expr, "multiply", "divide")
    if call is None:
        value = flow.scalar(expr)
        return ([expr], 1.0) if value is None else ([], value)
    left, c = _factors(flow, call.args[0])
    if flow.is_op(call, "divide"):
        divisor = flow.scalar(call.args[1])
        return ([expr], 1.0) if divisor is None else (left, c / divisor)
    right, d = _factors(flow, call.args[1])
    return left + right, c * d


def _same(flow: Dataflow, a: Any, b: Any) -> bool:
    return flow.definition(a).same_as(flow.definition(b))


def _is_multiple(flow: Dataflow, expr: Any, x: Any, factor: float) -> bool:
    """Whether expr = factor · x, where x itself may be a product."""
    mine, c = _factors(flow, expr)
    whole, d = _factors(flow, x)
    equal = len(mine) == len(whole) and all(_same(flow, a, b) for a, b in zip(mine, whole))
    return equal and math.isclose(c, factor * d, rel_tol=1e-4)


def _is_cubic(flow: Dataflow, expr: Any, x: Any) -> bool:
    """Whether expr = √(2/π) (x + 0.044715 x³), or √(2/π) x (1 + 0.044715 x²)."""
    factors, c = _factors(flow, expr)
    if not math.isclose(c, math.sqrt(2 / math.pi), rel_tol=1e-4):
        return False
    total = [flow.call(f, "add") for f in factors]
    outside = [f for f, t in zip(factors, total) if t is None]
    total = [t for t in total if t is not None]
    if len(total) != 1 or len(outside) > 1 or not all(_same(flow, f, x) for f in outside):
        return False
    power = 3 - len(outside)
    for low, high in (total[0].args, list(total[0].args)[::-1]):
        is_low = flow.scalar(low) == 1.0 if outside else _same(flow, low, x)
        if is_low and _is_power(flow, high, x, power):
            return True
    return False


def _is_power(flow: Dataflow, expr: Any, x: Any, power: int) -> bool:
    """Whether expr = 0.044715 xᵖ, the power written as such or as a product."""
    factors, c = _factors(flow, expr)
    count = 0.0
    for factor in factors:
        raised = flow.call(factor, "power")
        exponent = flow.scalar(raised.args[1]) if raised is not None else 1.0
        if exponent is None or not _same(flow, raised.args[0] if raised is not None else factor, x):
            return False
        count += exponent
    return count == power and math.isclose(c, 0.044715, rel_tol=1e-3)
