"""Writes the canonical ONNX model in the operators of opset 17.

Tools made for what torch exported for years know GELU and LayerNorm by their parts and an attention
mask by its two Unsqueezes: ONNX Runtime's optimizer fuses those, DeepSparse runs nothing newer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx

from bertile.base.errors import ModelError
from bertile.onnx.graph import OnnxGraph, attributes, save

OPSET, IR_VERSION = 17, 8
# Their axes became an input in opset 18; ReduceSum's are one since 13.
_REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")


def rewrite(source: Path, target: Path) -> None:
    """Write the model of `source` as `target`; ModelError where opset 17 cannot express it."""
    graph = OnnxGraph(onnx.load(source))
    for node in list(graph.nodes):
        parts = _PARTS.get(node.op_type)
        replacement = parts(graph, node) if parts else None
        if replacement:
            graph.replace(node.output[0], replacement)
    graph.clean()
    model = graph.to_model(OPSET)
    model.ir_version = IR_VERSION
    save(model, target)
    try:
        onnx.checker.check_model(target)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the model cannot be written in ONNX opset {OPSET}: {reason}") from error


def _gelu(graph: OnnxGraph, node: Any) -> str | None:
    """x · (1 + erf(x / √2)) · ½; the approximation by tanh is left as it is."""
    if attributes(node).get("approximate", b"none") != b"none":
        return None
    x = node.input[0]
    erf = graph.add("Erf", [graph.add("Div", [x, graph.number(math.sqrt(2))])])
    twice = graph.add("Mul", [x, graph.add("Add", [erf, graph.number(1)])])
    return graph.add("Mul", [twice, graph.number(0.5)])


def _layer_norm(graph: OnnxGraph, node: Any) -> str | None:
    """(x - mean) / √(variance + ε) · gamma + beta over the last axis."""
    options = attributes(node)
    if options.get("axis", -1) != -1 or len(node.input) != 3:
        return None
    x, gamma, beta = node.input
    centred = graph.add("Sub", [x, graph.add("ReduceMean", [x], axes=[-1])])
    square = graph.add("Pow", [centred, graph.number(2)])
    variance = graph.add("ReduceMean", [square], axes=[-1])
    epsilon = graph.number(options.get("epsilon", 1e-5))
    deviation = graph.add("Sqrt", [graph.add("Add", [variance, epsilon])])
    scaled = graph.add("Mul", [graph.add("Div", [centred, deviation]), gamma])
    return graph.add("Add", [scaled, beta])


def _reduction(graph: OnnxGraph, node: Any) -> str | None:
    if len(node.input) < 2:
        return None
    axes = graph.array(node.input[1]).tolist()
    keepdims = attributes(node).get("keepdims", 1)
    return graph.add(node.op_type, node.input[:1], axes=axes, keepdims=keepdims)


def _unsqueeze(graph: OnnxGraph, node: Any) -> str | None:
    """Unsqueeze(x, [1, 2]) → Unsqueeze(Unsqueeze(x, [1]), [2])."""
    axes = sorted(graph.array(node.input[1]).tolist())
    if len(axes) != 2 or axes[0] < 0:
        return None
    once = graph.add("Unsqueeze", [node.input[0], graph.integers(axes[0])])
    return graph.add("Unsqueeze", [once, graph.integers(axes[1])])


def _scale(graph: OnnxGraph, node: Any) -> str | None:
    """MatMul(q, k) · ⅛ → MatMul(q, k) / 8, by which attention's scores tell themselves apart from
    the mask's own Mul.
    """
    before = graph.producers().get(node.input[0])
    factor = graph.scalar(node.input[1])
    if before is None or before.op_type != "MatMul" or not factor:
        return None
    return graph.add("Div", [node.input[0], graph.number(1 / factor)])


_PARTS = {
    "Gelu": _gelu,
    "LayerNormalization": _layer_norm,
    "Mul": _scale,
    "Unsqueeze": _unsqueeze,
    **dict.fromkeys(_REDUCTIONS, _reduction),
}
