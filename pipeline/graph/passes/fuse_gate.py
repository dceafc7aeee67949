"""Joins the two products of a gated feed-forward network into one, whose epilogue multiplies them.

    bertile.dense(x, v, a) {gelu} · bertile.dense(x, w, b)
        →  bertile.dense(x, concat(v, w), concat(a, b)) {gelu, gated}

So x is read once, and neither product is written. Any activation of a dense layer will do (GeGLU,
SwiGLU, and without one the bilinear form), on either side; nobody else may read either product.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, same_shape


def fuse_gate(graph: Graph) -> Graph:
    """Recognise the product of two linear layers of the same input, one of them activated."""
    return rewrite(graph, _gated)


def _gated(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "multiply") or not same_shape(*call.args):
        return None
    if not all(map(flow.used_once, call.args)):
        return None
    layers = [flow.call(side, "bertile.dense") for side in call.args]
    if any(layer is None or len(layer.args) > 3 or ops.is_gated(layer) for layer in layers):
        return None
    first, second = layers if _activation(layers[1]) == "none" else layers[::-1]
    if _activation(second) != "none" or not first.args[0].same_as(second.args[0]):
        return None
    w, b = (relax.op.concat([first.args[i], second.args[i]], axis=2 - i) for i in (1, 2))
    return ops.gated_dense(first.args[0], w, b, _activation(first))


def _activation(layer: relax.Call) -> str:
    return str(layer.attrs["activation"])
