"""Finds what each tensor of an ONNX graph depends on: weights, shapes, or inputs' values."""

from __future__ import annotations

import math

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, attributes

_SAME_NUMBERS = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_BROADCAST = 65536  # elements
KINDS = ("constant", "shape", "light", "heavy")


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


def source_input(graph: OnnxGraph, name: str) -> str:
    """Follow casts and reshapes back from a tensor; the name it ends at may be a graph input's."""
    producers = graph.producers()
    while name in producers and producers[name].op_type in _SAME_NUMBERS:
        name = producers[name].input[0]
    return name


def _is_weight(graph: OnnxGraph, name: str) -> bool:
    if not graph.is_constant(name) or not graph.is_float(name) or len(graph.shape(name)) < 2:
        return False
    # a small tensor of equal numbers is what something is broadcast by: TensorFlow's masks
    small = math.prod(graph.shape(name)) <= _BROADCAST
    return not (small and np.ptp(graph.array(name)) == 0)
