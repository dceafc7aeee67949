"""Joins Q, K and V of the same input into one matrix product.

    concat(x Wq + bq, x Wk + bk, x Wv + bv)  →  x concat(Wq, Wk, Wv) + concat(bq, bk, bv)

TVM's CombineParallelMatmul does this before attention is fused, and leaves a split and copies
behind.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite
from bertile.graph.rewriting.linear import linear


def fuse_qkv(graph: Graph) -> Graph:
    """Join the linear layers under each concatenation along the channels."""
    return rewrite(graph, _join)


def _join(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "concat") or int(call.attrs["axis"]) != len(call.ty.shape) - 1:
        return None
    layers = [linear(flow, part) for part in flow.definition(call.args[0]).fields]
    if not all(layers) or not all(layer.x.same_as(layers[0].x) for layer in layers):
        return None
    w = relax.op.concat([layer.w for layer in layers], axis=1)
    b = relax.op.concat([layer.bias() for layer in layers], axis=0)
    return relax.op.add(relax.op.matmul(layers[0].x, w), b)
