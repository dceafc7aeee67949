"""Moves rotary positions before attention into the epilogue of the product that makes Q, K and V.

    attention(rotary(bertile.dense(x, w, b), cos, sin) {heads}, …)
        →  attention(bertile.dense(x, w, b, cos, sin) {turned = heads}, …)

So Q and K are turned while they are in the first-level cache. Only where attention alone reads
them: beside bfloat16, and on GPUs, it takes the channels of a head in pairs that are turned, which
nobody else could read, vectors by distance neither; so all heads of Q and K must be. Heads that are
normed before are left alone: a tile of outputs is less than a head.

Why not on loading Q and K in attention: each is loaded once for every block of queries or keys that
meets it, so that they would be turned again and again.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape


def fuse_angles(graph: Graph) -> Graph:
    """Recognise attention of a linear layer whose first heads are turned."""
    return rewrite(graph, _turned)


def _turned(flow: Dataflow, call: relax.Call) -> Any:
    if not ops.is_call(call, "bertile.attention"):
        return None
    rotary = flow.call(call.args[0], "bertile.rotary")
    layer = flow.call(rotary.args[0], "bertile.dense") if rotary is not None else None
    alone = layer is not None and all(map(flow.used_once, (call.args[0], rotary.args[0])))
    if not alone or len(layer.args) > 3 or str(layer.attrs["activation"]) != "none":
        return None
    heads, spec = int(rotary.attrs["heads"]), ops.attention_spec(call)
    alike = heads == spec.heads + spec.kv_heads and not spec.tables()
    if (
        len(rotary.args) > 3
        or ops.is_gated(layer)
        or not alike
        or shape(rotary.args[1])[-1] != spec.head_size
    ):
        return None
    qkv = ops.turned_dense(*layer.args, *rotary.args[1:], heads)
    return ops.attention(spec, qkv, *call.args[1:])
