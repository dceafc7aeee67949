"""Turns an ONNX model that is quantized in any form into a float model, in which the inputs of
quantized linear layers are marked.

    DequantizeLinear(integers)                              →  the floats, exactly scale · integers
    MatMul(DequantizeLinear(QuantizeLinear(x)), weight)     →  MatMul(marked x, weight)
    any other DequantizeLinear(QuantizeLinear(x))           →  x

A mark is itself such a pair, so that any runtime still reads the model: QuantizeLinear to uint8, or
DynamicQuantizeLinear where the range is taken from the values, and DequantizeLinear. All linear
layers that read a tensor share its mark.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from bertile.base.errors import ModelError
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.integer import MOVES, PAIRS, expand_integers, is_quantized
from bertile.onnx.probing import Probes
from bertile.onnx.weights import Weights

_SHIFT = {np.dtype(np.uint8): 0, np.dtype(np.int8): 128}  # what makes such integers uint8


@dataclass(frozen=True)
class _Range:
    """x ≈ scale (q - zero), q uint8; no scale where the range is that of the values."""

    scale: np.float32 | None = None
    zero: int = 0

    def low(self) -> float:
        return float(self.scale) * -self.zero

    def high(self) -> float:
        return float(self.scale) * (255 - self.zero)

    def joined(self, other: _Range) -> _Range:
        """The narrowest range that holds both."""
        low, high = min(self.low(), other.low()), max(self.high(), other.high())
        scale = np.float32((high - low) / 255)
        return _Range(scale, round(-low / float(scale)))


Ranges = dict[str, _Range | None]


def lift_quantization(graph: OnnxGraph) -> tuple[str, ...]:
    """Rewrite the graph in place and return notes; both nothing for a model in floats.

    Raises ModelError, naming the node, for integers whose scales are not known.
    """
    if not any(map(is_quantized, graph.nodes)):
        return ()
    expand_integers(graph)
    weights = Weights(graph)
    weights.dequantize()
    ranges = _take_pairs(graph)
    _sink(graph, ranges)
    return _Marks(graph, weights, ranges).write()


def settle_quantization(graph: OnnxGraph, probes: Probes) -> tuple[str, ...]:
    """Decide by values what the graph alone does not tell; return notes.

    A Relu that stands for a range from zero goes where no value was ever below zero; a mark goes
    where a tensor has not a row for each token: there is too little to gain behind a pooler.
    """
    tokens, dropped = probes.sizes("input_ids"), 0
    for node in graph.nodes:
        values = probes.of(node.input[0]) if node.output[0].startswith("bertile.relu.") else None
        if values is not None and not any((value < 0).any() for value in values):
            node.op_type = "Identity"
        marked = node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")
        sizes = probes.sizes(node.input[0]) if marked else None
        if sizes is not None and (len(sizes) != 3 or sizes[:2] != tokens):
            _turn(node, "Identity")
            dropped += 1
    producers = graph.producers()
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and producers[node.input[0]].op_type == "Identity":
            _turn(node, "Identity")
    graph.clean()
    return (f"quantized: {dropped} inputs behind the pooler are computed in float32",)[
        : dropped > 0
    ]


def drop_marks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a model compute in floats alone, in place, and return it."""
    _drop_pairs(model.graph.node)
    return model


def _drop_pairs(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        if node.op_type in PAIRS:
            _turn(node, "Identity")


def _turn(node: onnx.NodeProto, op: str) -> None:
    """Make of a node one that reads its first input and makes its first output."""
    node.CopyFrom(onnx.helper.make_node(op, [node.input[0]], [node.output[0]], name=node.name))


def _take_pairs(graph: OnnxGraph) -> Ranges:
    """Leave of each pair one node "Mark"; return its range by the tensor that it makes.

    A range that begins at zero may stand for a Relu, which quantizers leave out before it.
    """
    ranges: Ranges = {}
    producers = graph.producers()
    for end in [node for node in graph.nodes if node.op_type == "DequantizeLinear"]:
        ranges[end.output[0]] = _range(graph, end, producers)
    for node in list(graph.nodes):
        if node.op_type == "QuantizeLinear" and _begins_at_zero(graph, node):
            node.input[0] = graph.add("Relu", [node.input[0]])
        if node.op_type == "DequantizeLinear":
            _turn(node, "Mark")
    _drop_pairs(graph.nodes)
    graph.clean()
    return ranges


def _begins_at_zero(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether the smallest integer stands for zero, and the largest for a number."""
    if not np.isfinite(graph.array(node.input[1])).all():
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    zero = graph.array(node.input[2])
    return zero.size == 1 and int(zero.reshape(())) == np.iinfo(zero.dtype).min


def _range(
    graph: OnnxGraph, node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> _Range | None:
    """The range of a quantized activation; None where it has several, or not 8 bits."""
    before = producers.get(node.input[0])
    while before is not None and before.op_type in MOVES:
        before = producers.get(before.input[0])
    if before is not None and before.op_type == "DynamicQuantizeLinear":
        return _Range()
    if before is None or before.op_type != "QuantizeLinear":
        raise ModelError(
            f"operator DequantizeLinear (node '{node.name or node.output[0]}') reads integers that"
            " no QuantizeLinear made",
            "quantize the model with ONNX Runtime's quantize_dynamic or quantize_static",
        )
    if not graph.is_constant(node.input[1]):
        return None
    scale = graph.array(node.input[1])
    zeros = [graph.array(half.input[2]) for half in (node, before) if len(half.input) > 2]
    zero = zeros[0] if zeros else np.zeros((), np.uint8)
    shift = _SHIFT.get(zero.dtype)
    if shift is None or scale.size > 1 or not np.isfinite(scale).all():
        return None
    return _Range(np.float32(scale.reshape(())), int(zero.reshape(())) + shift)


def _sink(graph: OnnxGraph, ranges: Ranges) -> None:
    """Move(Mark(x)) → Mark(Move(x)), so that a mark stands right before what computes with it."""
    consumers = graph.consumers()
    marks = [node for node in graph.nodes if node.op_type == "Mark"]
    while marks:
        mark = marks.pop()
        for node in consumers.get(mark.output[0], []):
            if node.op_type not in MOVES or node.input[0] != mark.output[0]:
                continue
            node.input[0], after = mark.input[0], node.output[0]
            node.output[0] = graph.fresh("moved")
            sunk = onnx.helper.make_node("Mark", [node.output[0]], [after], name=after)
            graph.nodes.append(sunk)
            ranges[after] = ranges[mark.output[0]]
            marks.append(sunk)
    graph.clean()


class _Marks:
    """The nodes "Mark" of a graph; `write` keeps those that linear layers read."""

    def __init__(self, graph: OnnxGraph, weights: Weights, ranges: Ranges):
        self.graph, self.weights, self.ranges = graph, weights, ranges
        self.consumers = graph.consumers()
        self.layers: dict[tuple[str, bool], list[onnx.NodeProto]] = {}
        self.joined: dict[tuple[str, bool], _Range] = {}
        self.widened = self.dropped = 0

    def write(self) -> tuple[str, ...]:
        """Write the marks as pairs, drop the others, and return notes."""
        for mark in [node for node in self.graph.nodes if node.op_type == "Mark"]:
            self._gather(mark)
            _turn(mark, "Identity")
        for (source, dynamic), readers in self.layers.items():
            pair = self._dynamic(source) if dynamic else self._static(source)
            for node in readers:
                node.input[0] = pair
        notes = self._notes()
        self.graph.clean()
        return notes

    def _gather(self, mark: onnx.NodeProto) -> None:
        """Note the range of a mark for the tensor that it stands behind."""
        span = self.ranges[mark.output[0]]
        readers = self.consumers.get(mark.output[0], [])
        layers = [node for node in readers if self._is_layer(node, mark.output[0])]
        self.dropped += span is None or len(layers) < len(readers)
        if span is None or not layers:
            return
        key = (mark.input[0], span.scale is None)
        before = self.joined.get(key, span)
        if span != before:
            self.widened += 1
            span = before.joined(span)
        self.joined[key] = span
        self.layers.setdefault(key, []).extend(layers)

    def _is_layer(self, node: onnx.NodeProto, source: str) -> bool:
        if node.op_type not in ("MatMul", "Gemm") or node.input[0] != source:
            return False
        weight = node.input[1]
        return self.weights.largest(weight) is not None and not attributes(node).get("transA")

    def _static(self, source: str) -> str:
        span = self.joined[source, False]
        scale = self.graph.constant(np.asarray(span.scale, np.float32))
        zero = self.graph.constant(np.asarray(span.zero, np.uint8))
        integers = self.graph.add("QuantizeLinear", [source, scale, zero])
        return self.graph.add("DequantizeLinear", [integers, scale, zero])

    def _dynamic(self, source: str) -> str:
        names = [self.graph.fresh(hint) for hint in ("quantized", "scale", "zero")]
        node = onnx.helper.make_node("DynamicQuantizeLinear", [source], names, name=names[0])
        self.graph.nodes.append(node)
        return self.graph.add("DequantizeLinear", names)

    def _notes(self) -> tuple[str, ...]:
        count = {True: 0, False: 0}
        for (_, dynamic), readers in self.layers.items():
            count[dynamic] += len(readers)
        layers = [node for readers in self.layers.values() for node in readers]
        wide = sum(self.weights.largest(node.input[1]) > 127 for node in layers)
        return _counted(
            (count[False], "linear layers have int8 weights and inputs of a fixed range"),
            (count[True], "linear layers have int8 weights and inputs quantized as they come"),
            (wide, "of them have a zero point, or -128, in their weights and leave -127 … 127"),
            (self.widened, "inputs have several ranges, of which the widest is used"),
            (self.dropped, "other activations that the file quantizes are computed in float32"),
        )


def _counted(*said: tuple[int, str]) -> tuple[str, ...]:
    return tuple(f"quantized: {number} {what}" for number, what in said if number)
