"""Makes one operator of the marks of a quantized model, as TVM's frontend spells them.

dequantize(quantize(x, scale, zero), scale, zero)      →  bertile.fake_quantize(x) {low, high}
the same with scale and zero computed of max x, min x  →  bertile.fake_quantize(x) {dynamic}
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite


def read_quantization(graph: Graph) -> Graph:
    """Read each pair, as the normalizer writes them, to uint8 with one scale."""
    return rewrite(graph, _pair)


def _pair(flow: Dataflow, call: relax.Call) -> Any:
    quantize = flow.call(call.args[0], "quantize") if flow.is_op(call, "dequantize") else None
    if quantize is None or quantize.ty.dtype != "uint8":
        return None
    x, scale, zero = quantize.args[0], flow.scalar(call.args[1]), flow.scalar(call.args[2])
    if scale is None or zero is None:
        return ops.fake_quantize(x)
    return ops.fake_quantize(x, -zero * scale, (255 - zero) * scale)
