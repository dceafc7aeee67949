"""Finds what each tensor of an ONNX graph depends on: weights, shapes, or inputs' values."""

from __future__ import annotations

import math

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, attributes

_BROADCAST = 65536  # elements
KINDS = ("constant", "shape", "light", "heavy")
# Operators that keep the values of their first operand, or some of them.
_MOVING = {
    *("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"),
    *("Slice", "Gather", "Tile"),
}


def dependence(graph: OnnxGraph) -> dict[str, str]:
    """Say what each tensor of a sorted graph depends on; each kind includes those before it.

    "constant": initializers alone; "shape": also the inputs' shapes; "light": also their values;
    "heavy": both values of an input and a weight, that is a float constant of two axes or more.
    """
    kinds = {value.name: "light" for value in graph.inputs}
    for node in graph.nodes:
        read = [name for name in node.input if name]
        read_kinds = [kinds.get(name, "constant") for name in read]
        kind = max(read_kinds, key=KINDS.index, default="constant")
        if node.op_type in ("Shape", "Size"):
            kind = min(kind, "shape", key=KINDS.index)
        elif kind == "light" and any(_is_weight(graph, name) for name in read):
            kind = "heavy"
        kinds.update(dict.fromkeys(node.output, kind))
    return kinds


def is_lookup(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Say whether a node gathers rows of a table of floats."""
    if node.op_type != "Gather" or attributes(node).get("axis", 0) != 0:
        return False
    return _is_weight(graph, node.input[0]) and len(graph.shape(node.input[0])) == 2


def lookup_source(graph: OnnxGraph, node: onnx.NodeProto) -> tuple[str, int]:
    """Follow the index of a lookup back to a tensor that it is, plus a number.

    What moves elements about, or only changes their type, is passed through; the name it ends at
    may be a graph input's.
    """
    producers, name, offset = graph.producers(), node.input[1], 0
    while name in producers:
        before = producers[name]
        if before.op_type in ("Add", "Sub"):
            number = graph.scalar(before.input[1])
            if number is None:
                break
            offset += int(number) if before.op_type == "Add" else -int(number)
        elif before.op_type not in _MOVING:
            break
        name = before.input[0]
    return name, offset


def _is_weight(graph: OnnxGraph, name: str) -> bool:
    if not graph.is_constant(name) or not graph.is_float(name) or len(graph.shape(name)) < 2:
        return False
    # a small tensor of equal numbers is what something is broadcast by: TensorFlow's masks
    small = math.prod(graph.shape(name)) <= _BROADCAST
    return not (small and np.ptp(graph.array(name)) == 0)
