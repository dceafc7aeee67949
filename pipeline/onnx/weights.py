"""Turns quantized constants of an ONNX graph into floats.

DequantizeLinear(integers)                  →  scale · (integers - zero), in float32
DequantizeLinear(QuantizeLinear(floats))    →  the same of the integers that they round to
DequantizeLinear(Gather(integers, ids))     →  Gather(floats, ids)
"""

from __future__ import annotations

import numpy as np
import onnx

from bertile.base.errors import ModelError
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.integer import MOVES
from bertile.onnx.rewrites import transpose_weights


class Weights:
    """The constants that were integers. `dequantize` makes them floats, in place."""

    def __init__(self, graph: OnnxGraph):
        self.graph = graph
        self._largest: dict[str, int] = {}  # of their integers, less the zero point

    def dequantize(self) -> None:
        """Replace each constant that is dequantized by its floats.

        Raises ModelError, naming the node, where scale or zero point are not constants.
        """
        transpose_weights(self.graph)  # also those of integers, so that axes are as they are read
        producers = self.graph.producers()
        floats: dict[tuple[str, ...], str] = {}
        for node in list(self.graph.nodes):
            if node.op_type == "QuantizeLinear" and self.graph.is_constant(node.input[0]):
                self.graph.replace(node.output[0], self._quantized(node))
            if node.op_type != "DequantizeLinear":
                continue
            reader, base = self._base(node, producers)
            if base and not self.graph.is_float(base):
                key = (base, *node.input[1:], str(attributes(node).get("axis")))
                if key not in floats:
                    floats[key] = self._floats(node, base)
                reader.input[0] = floats[key]
            if base:
                self.graph.replace(node.output[0], node.input[0])
        self.graph.clean()

    def largest(self, name: str) -> int | None:
        """Of a tensor that was integers: the largest magnitude among them; None for others.

        Through operators that move elements, as Transpose.
        """
        producers = self.graph.producers()
        while name in producers and producers[name].op_type in MOVES:
            name = producers[name].input[0]
        return self._largest.get(name)

    def _base(
        self, node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
    ) -> tuple[onnx.NodeProto, str]:
        """The constant that a node dequantizes, "" for none, and who reads it."""
        while not self.graph.is_constant(node.input[0]):
            before = producers.get(node.input[0])
            if before is None or before.op_type not in MOVES:
                return node, ""
            node = before
        return node, node.input[0]

    def _floats(self, node: onnx.NodeProto, base: str) -> str:
        scale, zero = self._numbers(node)
        if "float" in str(self.graph.array(base).dtype):
            raise _unknown(node, "reads floats of 8 bits or fewer, which are unsupported")
        integers = self.graph.array(base).astype(np.int32)
        moved = base != node.input[0]
        if moved and scale.size > 1:
            raise _unknown(node, "has a scale for each channel of what another operator moved")
        scale, zero = (_spread(numbers, integers, attributes(node)) for numbers in (scale, zero))
        integers = integers - zero.astype(np.int32)
        name = self.graph.set_constant(
            self.graph.fresh("weight"), integers.astype(np.float32) * scale.astype(np.float32)
        )
        self._largest[name] = int(np.abs(integers).max(initial=0))
        return name

    def _quantized(self, node: onnx.NodeProto) -> str:
        scale, zero = self._numbers(node)
        value, limits = self.graph.array(node.input[0]), np.iinfo(zero.dtype)
        scale, wide = (_spread(numbers, value, attributes(node)) for numbers in (scale, zero))
        integers = np.rint(value / scale) + wide
        integers = np.clip(integers, limits.min, limits.max).astype(zero.dtype)
        return self.graph.set_constant(self.graph.fresh("integers"), integers)

    def _numbers(self, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray]:
        names = [name for name in node.input[1:] if name]
        if not all(map(self.graph.is_constant, names)):
            raise _unknown(node, "has a scale that is computed")
        scale = self.graph.array(names[0])
        return scale, self.graph.array(names[1]) if len(names) > 1 else np.zeros((), np.uint8)


def _spread(numbers: np.ndarray, array: np.ndarray, options: dict[str, int]) -> np.ndarray:
    """Numbers per tensor, per channel or per block of an axis, shaped to fit `array`."""
    if numbers.size == 1:
        return numbers.reshape(())
    axis = options.get("axis", 1) if array.ndim > 1 else 0
    if numbers.ndim == array.ndim > 1:
        places = np.arange(array.shape[axis]) // options["block_size"]
        return np.take(numbers, places, axis)
    shape = [1] * array.ndim
    shape[axis] = -1
    return numbers.reshape(shape)


def _unknown(node: onnx.NodeProto, what: str) -> ModelError:
    return ModelError(
        f"operator {node.op_type} (node '{node.name or node.output[0]}') {what}",
        "quantize the model with ONNX Runtime's quantize_dynamic or quantize_static",
    )
