"""Moves what a quantized model says of its linear layers from the graph into the plan.

    dense(fake_quantize(x) {low, high}, w, …)      →  dense(x, w, …), plan[w] = int8, low, high
    dense(fake_quantize(x · s) {low, high}, w, …)  →  dense(x, w · s, …), and smooth = s besides
    dense(x · s, w, …)                             →  dense(x, w · s, …)
    fake_quantize(x) before anything else          →  x, with a note

The factors s, one for each channel, are SmoothQuant's as NNCF writes them: w has been divided by s
already.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.ops import is_call
from bertile.graph.passes.fold_weights import fold_weights
from bertile.graph.rewriting.dataflow import Dataflow, replace
from bertile.numerics.precision import LayerPlan

WHY = "quantized in the model's file"


def collect_quantization(graph: Graph) -> Graph:
    """Take every ``bertile.fake_quantize`` out of the graph.

    A weight that several layers share has one entry, with the widest of their ranges; it has none
    where one of them is not quantized.
    """
    flow = Dataflow(graph.main)
    calls = [b for b in flow.bindings if isinstance(b.value, relax.Call)]
    marks = {b.var: b.value.args[0] for b in calls if is_call(b.value, "bertile.fake_quantize")}
    if not marks:
        return graph
    sharing: dict[str, list[_Layer]] = {}
    for binding in calls:
        if is_call(binding.value, "bertile.dense") and binding.value.args[1] in flow.weights:
            weight = binding.value.args[1].name
            sharing.setdefault(weight, []).append(_layer(graph, flow, binding))
    values: dict[relax.Var, Any] = dict(marks)
    params, plan = dict(graph.params), dict(graph.plan)
    used: set[relax.Var] = set()
    for weight, layers in sharing.items():
        smooth = _common(layers)
        if smooth is not None:
            params[weight] = np.ascontiguousarray(params[weight] * smooth[:, None])
        if all(layer.mark is not None for layer in layers):
            plan[weight] = _planned(layers, smooth)
            used |= {layer.call.args[0] for layer in layers}
        for layer in layers:
            values[layer.var] = layer.reading(layer.x if smooth is None else layer.unsmoothed)
    graph = dataclasses.replace(graph, params=params, plan=plan)
    # once more, to drop what only smoothing read
    return _noted(fold_weights(replace(graph, values)), len(marks) - len(used))


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """One dense; `mark` is the fake_quantize that it reads, or None, and `x` what is before that.

    `smooth` (K,) is what `x` is `unsmoothed` multiplied by; None where it is no such product.
    """

    var: relax.Var
    call: relax.Call
    mark: relax.Call | None
    x: Any
    unsmoothed: Any = None
    smooth: np.ndarray | None = None

    def reading(self, x: Any) -> relax.Call:
        return relax.Call(self.call.op, [x, *self.call.args[1:]], self.call.attrs)


def _layer(graph: Graph, flow: Dataflow, binding: relax.VarBinding) -> _Layer:
    mark = flow.call(binding.value.args[0], "bertile.fake_quantize")
    x = mark.args[0] if mark is not None else binding.value.args[0]
    product = flow.call(x, "multiply")
    for value, other in (product.args, list(product.args)[::-1]) if product is not None else ():
        smooth = _vector(graph, flow, other)
        if smooth is not None and len(smooth) == int(x.ty.shape[-1]):
            return _Layer(binding.var, binding.value, mark, x, value, smooth)
    return _Layer(binding.var, binding.value, mark, x)


def _vector(graph: Graph, flow: Dataflow, expr: Any) -> np.ndarray | None:
    """A weight (1, …, 1, K) as (K,)."""
    source = flow.definition(expr)
    if isinstance(source, tvm.ir.GenericConst):
        value = source.value.numpy()
    elif source in flow.weights:
        value = graph.params[source.name]
    else:
        return None
    return value.reshape(-1) if value.size > 1 and value.shape[-1] == value.size else None


def _common(layers: list[_Layer]) -> np.ndarray | None:
    """What all layers are smoothed by; None where that differs, and stays in the graph."""
    first = layers[0].smooth
    same = all(layer.smooth is not None and np.array_equal(layer.smooth, first) for layer in layers)
    return first if same else None


def _planned(layers: list[_Layer], smooth: np.ndarray | None) -> LayerPlan:
    if any(layer.mark.attrs["dynamic"] for layer in layers):
        return LayerPlan("int8", smooth=smooth, why=WHY)
    low = min(float(layer.mark.attrs["low"]) for layer in layers)
    high = max(float(layer.mark.attrs["high"]) for layer in layers)
    return LayerPlan("int8", low, high, smooth, WHY)


def _noted(graph: Graph, dropped: int) -> Graph:
    if not dropped:
        return graph
    note = f"quantized: {dropped} inputs of other than linear layers are computed in float32"
    exported = graph.exported
    exported = dataclasses.replace(exported, notes=(*exported.notes, note))
    return dataclasses.replace(graph, exported=exported)
