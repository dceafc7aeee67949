"""Fuses linear layers with what follows them.

    x w + b                    →  bertile.dense(x, w, b)
    gelu(bertile.dense(…))     →  bertile.dense(…) {activation = gelu}; the others alike
    bertile.dense(…) + r       →  bertile.dense(…, r)

An epilogue is taken only where nobody else reads the value before it.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, same_shape
from bertile.graph.rewriting.linear import linear

ACTIVATIONS = {
    **{f"nn.{name}": name for name in ("gelu", "gelu_tanh", "relu", "silu")},
    "tanh": "tanh",
}


def fuse_dense(graph: Graph) -> Graph:
    """Products first, then the epilogues from the inside out."""
    # biased products before bare ones: a bare rule first would hide the bias from the other
    for rule in (_biased, _bare, _activation, _residual):
        graph = rewrite(graph, rule)
    return graph


def _biased(flow: Dataflow, call: relax.Call) -> Any:
    layer = linear(flow, call)
    return ops.dense(layer.x, layer.w, layer.b) if layer and layer.b is not None else None


def _bare(flow: Dataflow, call: relax.Call) -> Any:
    layer = linear(flow, call) if flow.is_op(call, "matmul") else None
    return ops.dense(layer.x, layer.w, layer.bias()) if layer else None


def _activation(flow: Dataflow, call: relax.Call) -> Any:
    for name, activation in ACTIVATIONS.items():
        if flow.is_op(call, name) and flow.used_once(call.args[0]):
            inner = flow.call(call.args[0], "bertile.dense")
            if inner is not None and inner.attrs["activation"] == "none":
                return ops.dense(*inner.args, activation=activation)
    return None


def _residual(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "add"):
        return None
    for value, other in (call.args, list(call.args)[::-1]):
        inner = flow.call(value, "bertile.dense")
        if inner is None or len(inner.args) != 3 or not flow.used_once(value):
            continue
        if same_shape(value, other):
            return ops.dense(*inner.args, other, activation=str(inner.attrs["activation"]))
    return None
