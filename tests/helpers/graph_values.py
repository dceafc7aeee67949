"""What a small graph computes, in float64 by numpy, for tests that change graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.numerics.eight_bit import quantize_input
from bertile.schedules.reference import apply_activation, gated, rotary_heads

BATCH, LENGTH = 2, 5


def evaluate(graph: Graph, seed: int = 0) -> np.ndarray:
    """The result of a graph of dense layers, attention and additions, in float64 by numpy; the
    input of a layer whose plan has a range is rounded as that says.
    """
    rng = np.random.default_rng(seed)
    extents = {"batch": BATCH, "length": LENGTH, "m": 1}
    values = {}
    for var in graph.main.params:
        shape = [extents[e.name] if hasattr(e, "name") else int(e) for e in var.ty.shape]
        random = rng.standard_normal(shape) if var.name not in graph.params else None
        values[var] = graph.params[var.name].astype("float64") if random is None else random

    def value(expr: Any) -> np.ndarray:
        if isinstance(expr, relax.Var):
            return values[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy().astype("float64")
        return COMPUTED[expr.op.name](graph, expr, *map(value, expr.args))

    for binding in graph.main.body.blocks[0].bindings:
        values[binding.var] = value(binding.value)
    return values[graph.main.body.body]


def _dense(graph, call, x, w, b, *others):
    plan = graph.plan.get(getattr(call.args[1], "name", ""))
    if plan is not None and plan.static:
        smooth = 1.0 if plan.smooth is None else plan.smooth
        rows = (x * smooth).reshape(-1, x.shape[-1])
        x = quantize_input(rows, plan.low, plan.high).values().reshape(x.shape) / smooth
    product, activation = x @ w + b, str(call.attrs["activation"])
    if ops.is_gated(call):
        return gated(activation, product)
    if heads := ops.turned(call):
        return rotary_heads(product, *others, heads)
    (residual,) = others or (0.0,)
    return apply_activation(activation, product) + residual


def _attention(graph, call, qkv, mask, bias=None):
    spec = ops.attention_spec(call)
    q, k, v = (
        part.reshape(BATCH, LENGTH, -1, spec.head_size).transpose(0, 2, 1, 3)
        for part in np.split(qkv, np.cumsum(spec.channels())[:2], axis=2)
    )
    context = spec.reference(q, k, v, mask, bias)
    return context.transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, -1)


COMPUTED = {
    "bertile.dense": _dense,
    "bertile.attention": _attention,
    "relax.add": lambda graph, call, a, b: a + b,
    "relax.multiply": lambda graph, call, a, b: a * b,
    "relax.matmul": lambda graph, call, a, b: a @ b,
    "relax.permute_dims": lambda graph, call, a: a.T,
}
