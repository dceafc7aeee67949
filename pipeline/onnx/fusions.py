"""Fusions of what older opsets spell out: LayerNormalization (new in 17) and Gelu (new in 20).

Every public function changes the graph in place and is harmless where nothing matches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, attributes

_ERF = np.vectorize(math.erf, otypes=[np.float64])
_POINTS = np.linspace(-4.0, 4.0, 33)
_INNER = math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3)
_GELU = {
    "none": _POINTS * 0.5 * (1 + _ERF(_POINTS / math.sqrt(2))),
    "tanh": _POINTS * 0.5 * (1 + np.tanh(_INNER)),
}
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Erf": _ERF,
    "Tanh": np.tanh,
}
_Producers = dict[str, onnx.NodeProto]


def fuse_layer_norms(graph: OnnxGraph) -> None:
    """(x - mean) / Sqrt(mean((x - mean)^2) + eps) * weight + bias → LayerNormalization."""
    producers, consumers = graph.producers(), graph.consumers()
    for division in [node for node in graph.nodes if node.op_type == "Div"]:
        normalized = _normalized(graph, division, producers)
        product = _only(consumers.get(division.output[0]), "Mul")
        total = _only(consumers.get(product.output[0]), "Add") if product is not None else None
        if normalized is None or total is None:
            continue
        weight = _constant_vector(graph, product, division.output[0])
        bias = _constant_vector(graph, total, product.output[0])
        if weight is None or bias is None:
            continue
        source, epsilon = normalized
        norm = graph.add("LayerNormalization", [source, weight, bias], axis=-1, epsilon=epsilon)
        graph.replace(total.output[0], norm)
    graph.clean()


def _normalized(
    graph: OnnxGraph, division: onnx.NodeProto, producers: _Producers
) -> tuple[str, float] | None:
    centred, root = (producers.get(name) for name in division.input)
    if centred is None or root is None or (centred.op_type, root.op_type) != ("Sub", "Sqrt"):
        return None
    mean, shifted = producers.get(centred.input[1]), producers.get(root.input[0])
    if mean is None or shifted is None or shifted.op_type != "Add":
        return None
    epsilon = next((e for e in map(graph.scalar, shifted.input) if e is not None), None)
    variance = next((producers[name] for name in shifted.input if name in producers), None)
    if epsilon is None or variance is None:
        return None
    if not (_over_last(graph, mean) and _over_last(graph, variance)):
        return None
    square = producers.get(variance.input[0])
    if square is None or square.input[0] != centred.output[0] or mean.input[0] != centred.input[0]:
        return None
    power = square.op_type == "Pow" and graph.scalar(square.input[1]) == 2.0
    product = square.op_type == "Mul" and square.input[1] == square.input[0]
    return (centred.input[0], epsilon) if power or product else None


def _over_last(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    if node.op_type != "ReduceMean" or not attributes(node).get("keepdims", 1):
        return False
    return len(node.input) > 1 and graph.scalar(node.input[1]) == -1.0


def _only(nodes: list[onnx.NodeProto] | None, op: str) -> onnx.NodeProto | None:
    return nodes[0] if nodes and len(nodes) == 1 and nodes[0].op_type == op else None


def _constant_vector(graph: OnnxGraph, node: onnx.NodeProto, other: str) -> str | None:
    for name in node.input:
        if name != other and graph.is_constant(name) and len(graph.shape(name)) == 1:
            return name
    return None


def fuse_gelus(graph: OnnxGraph) -> None:
    """Any arithmetic around an Erf or Tanh that equals GELU of one tensor → Gelu."""
    for start in [node for node in graph.nodes if node.op_type in ("Erf", "Tanh")]:
        producers, consumers = graph.producers(), graph.consumers()
        if start.output[0] not in producers:
            continue
        end = start
        for _ in range(4):
            end = next(iter(consumers.get(end.output[0], [])), None)
            if end is None or end.op_type not in ("Add", "Mul"):
                break
            kind, source = _is_gelu(graph, end, start, producers)
            if kind is not None:
                gelu = graph.add("Gelu", [source], approximate=kind)
                graph.replace(end.output[0], gelu)
                break
    graph.clean()


def _is_gelu(
    graph: OnnxGraph, end: onnx.NodeProto, start: onnx.NodeProto, producers: _Producers
) -> tuple[str | None, str]:
    for source in _sources(graph, start, producers):
        value = _evaluate(graph, end.output[0], source, producers, depth=12)
        for kind, want in _GELU.items():
            if value is not None and np.abs(value - want).max() < 2e-6:
                return kind, source
    return None, ""


def _sources(graph: OnnxGraph, start: onnx.NodeProto, producers: _Producers) -> list[str]:
    """Return the tensors before `start` through elementwise nodes, the nearest first."""
    sources, queue = [], list(start.input)
    while queue and len(sources) < 8:
        name = queue.pop(0)
        if graph.is_constant(name) or name in sources:
            continue
        sources.append(name)
        if name in producers and producers[name].op_type in _ELEMENTWISE:
            queue.extend(producers[name].input)
    return sources


def _evaluate(
    graph: OnnxGraph, name: str, source: str, producers: _Producers, depth: int
) -> np.ndarray | None:
    """Compute tensor `name` as a function of tensor `source` at a few points."""
    if name == source:
        return _POINTS
    if graph.is_constant(name):
        scalar = graph.scalar(name)
        return None if scalar is None else np.asarray(scalar)
    node = producers.get(name)
    if node is None or node.op_type not in _ELEMENTWISE or depth == 0:
        return None
    values = [_evaluate(graph, operand, source, producers, depth - 1) for operand in node.input]
    if any(value is None for value in values):
        return None
    return _ELEMENTWISE[node.op_type](*values)
