"""Computes what depends on constants alone before anything else looks at the graph.

Transpose(Reshape(Cast(w)))  →  w     ConstantOfShape([2])  →  [0, 0]
"""

from __future__ import annotations

from bertile.onnx.dependence import dependence
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import opened

# What is quantized is read by scales and zero points, which integers that are folded would lose.
_KEPT = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_RANDOM = ("RandomNormal", "RandomUniform", "Bernoulli", "Multinomial")


def fold(graph: OnnxGraph, opset: int) -> None:
    """Replace every tensor that constants alone decide, and that something else reads."""
    graph.clean()
    kinds, computed = dependence(graph), {}
    for node in graph.nodes:
        fixed = kinds[node.output[0]] == "constant" and node.op_type not in (*_KEPT, *_RANDOM)
        known = all(not name or graph.is_constant(name) or name in computed for name in node.input)
        if fixed and known and node.domain in ("", "ai.onnx") and not _has_graph(node):
            computed.update(dict.fromkeys((name for name in node.output if name), node))
    read = {name for node in graph.nodes if node.output[0] not in computed for name in node.input}
    wanted = [name for name in computed if name in read]
    if not wanted:
        return
    part = graph.cut(*wanted)
    with opened(part.to_model(opset), optimize=False) as runner:
        for name, value in zip(wanted, runner.run(wanted, {})):
            graph.replace(name, graph.set_constant(graph.fresh("constant"), value))
    graph.clean()


def _has_graph(node: object) -> bool:
    return any(hasattr(value, "node") for value in attributes(node).values())
