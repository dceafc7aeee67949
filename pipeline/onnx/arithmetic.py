"""Computes a part of a graph in float64, as a function of one of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, Sizes, attributes

ERF = np.vectorize(math.erf, otypes=[np.float64])
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Add": np.add,
    "Cast": lambda x: x,
    "Div": np.divide,
    "Erf": ERF,
    "Exp": np.exp,
    "Identity": lambda x: x,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "Reciprocal": lambda x: 1 / x,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Tanh": np.tanh,
}
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": np.mean,
    "ReduceSum": np.sum,
    "ReduceSumSquare": lambda x, **options: np.sum(x * x, **options),
}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


class Arithmetic:
    """Evaluates tensors that are computed of a tensor `source` and constants alone.

    Rows of `source` may stand for any axes but the last: what is reduced is the last axis.
    """

    def __init__(self, graph: OnnxGraph, sizes: Sizes = lambda name: None):
        self.graph, self.sizes = graph, sizes
        self.producers = graph.producers()

    def value(self, name: str, source: str, at: np.ndarray, depth: int = 40) -> np.ndarray | None:
        """Return the value of tensor `name` where `source` has the value `at`, (points) or (rows,
        channels); None where anything else is read, or another operator stands between.
        """
        with np.errstate(all="ignore"):
            return self._value(name, {source: at}, at, depth)

    def _value(
        self, name: str, known: dict[str, np.ndarray | None], at: np.ndarray, depth: int
    ) -> np.ndarray | None:
        if name not in known:
            known[name] = self._computed(name, known, at, depth) if depth else None
        return known[name]

    def _computed(
        self, name: str, known: dict[str, np.ndarray | None], at: np.ndarray, depth: int
    ) -> np.ndarray | None:
        if self.graph.is_constant(name):
            return self._constant(name, at)
        node = self.producers.get(name)
        if node is None or not self.is_arithmetic(node):
            return None
        read = node.input[: 1 if node.op_type in REDUCTIONS or node.op_type == "Unsqueeze" else 3]
        values = [self._value(operand, known, at, depth - 1) for operand in read]
        if any(value is None for value in values):
            return None
        if node.op_type == "Unsqueeze":
            return values[0][..., None] if values[0].ndim == at.ndim - 1 else None
        if node.op_type in REDUCTIONS:
            if at.ndim < 2 or values[0].shape[-1:] != at.shape[-1:]:
                return None
            kept = bool(attributes(node).get("keepdims", 1))
            return REDUCTIONS[node.op_type](values[0], axis=-1, keepdims=kept)
        return ELEMENTWISE[node.op_type](*values)

    def _constant(self, name: str, at: np.ndarray) -> np.ndarray | None:
        shape = self.graph.shape(name)
        size = math.prod(shape)
        if size == 1:
            return self.graph.array(name).astype(np.float64).reshape(())
        vector = at.ndim > 1 and shape[-1] == size == at.shape[-1]
        return self.graph.array(name).astype(np.float64).reshape(-1) if vector else None

    def is_arithmetic(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes each element of its own, or reduces the last axis."""
        if node.op_type == "Cast":
            return attributes(node)["to"] in _FLOATS
        if node.op_type in ELEMENTWISE:
            return True
        if node.op_type not in REDUCTIONS and node.op_type != "Unsqueeze":
            return False
        axes = self.axes(node)
        shaped = node.output[0] if node.op_type == "Unsqueeze" else node.input[0]
        sizes = self.sizes(shaped)
        return axes == [-1] or (sizes is not None and axes == [len(sizes) - 1])

    def axes(self, node: onnx.NodeProto) -> list[int] | None:
        """Return the axes of a reduction, an attribute or an input; None if not known."""
        if len(node.input) > 1 and node.input[1]:
            if not self.graph.is_constant(node.input[1]):
                return None
            return [int(axis) for axis in self.graph.array(node.input[1]).reshape(-1)]
        return attributes(node).get("axes")
