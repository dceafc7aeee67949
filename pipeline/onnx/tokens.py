"""Gives tensors whose first axis holds two, tokens of all rows or heads of all rows, both axes.

    Reshape(x, (-1, 128)) → MatMul → Add → Reshape(…, (B, S, 128))  →  MatMul → Add
    Reshape(q, (-1, S, 32)) → MatMul → Softmax → Reshape(…, (B, H, S, S))  →  MatMul → Softmax

An exporter of TensorFlow multiplies rows of tokens, one of torch's batched products heads of rows;
our kernels know tokens by (batch, length, channels). Which axis holds two is seen in the probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from bertile.onnx.arithmetic import ELEMENTWISE
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes
from bertile.onnx.rewrites import RESHAPES, reshape_target
from bertile.onnx.shapes import Axes

_ELEMENTWISE = {
    *ELEMENTWISE,
    *("And", "Ceil", "Clip", "Equal", "Floor", "Gelu", "Greater", "GreaterOrEqual", "IsNaN"),
    *("LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Not", "Or", "Relu"),
    *("Round", "Sign", "Softplus", "Where", "HardSwish", "Elu", "Mish"),
    *("QuantizeLinear", "DequantizeLinear"),
}
_LAST = ("LayerNormalization", "Softmax", "LogSoftmax")
Inputs = list[str]
Rule = Callable[["_Unfolding", onnx.NodeProto], tuple[Inputs, dict[str, Any]] | None]


def unfold_first_axes(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Compute what has two axes in its first with both of them, between the reshapes around it."""
    unfolding = _Unfolding(graph, probes, axes)
    for node in list(graph.nodes):
        unfolding.visit(node)
    unfolding.fold_what_others_read()
    graph.clean()


class _Unfolding:
    """`twins` maps a tensor with two axes in its first to the same elements with both axes."""

    def __init__(self, graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
        self.graph, self.probes, self.axes = graph, probes, axes
        self.sizes = probes.sizes
        self.tokens = tuple(probes.sizes("input_ids"))
        self.twins: dict[str, str] = {}
        self.pairs: dict[str, tuple[object, object]] = {}
        self.visited: set[str] = set()  # outputs of nodes that have a twin
        self.added: set[str] = set()

    def visit(self, node: onnx.NodeProto) -> None:
        if node.op_type in RESHAPES:
            if self._reshaped(node) or node.op_type in ("Reshape", "Flatten"):
                return
        read = [self.pairs[name] for name in node.input if name in self.pairs]
        if not read or any(pair != read[0] for pair in read):
            return
        folded = product(read[0])
        dynamic = node.op_type == "DynamicQuantizeLinear"  # whose other outputs are numbers
        whole = node.output[:1] if dynamic else list(node.output)
        sizes = [self.sizes(name) for name in whole if name]
        if not all(size and size[0] == folded for size in sizes):
            return
        rule = _RULES.get(node.op_type, _same if node.op_type in _ELEMENTWISE else None)
        adapted = rule(self, node) if rule else None
        if adapted is None:
            return
        inputs, options = adapted
        names = [self.graph.fresh(f"tokens_{node.op_type.lower()}") for _ in whole]
        numbers = node.output[len(whole) :]
        node.output[len(whole) :] = [self.graph.fresh("unused") for _ in numbers]
        names += numbers
        twin = onnx.helper.make_node(node.op_type, inputs, names, name=names[0], **options)
        self.graph.nodes.append(twin)
        self.visited.add(node.output[0])
        self.added.add(names[0])
        for name, new in zip(whole, names):
            self._learn(name, new, read[0])

    def _learn(self, name: str, twin: str, pair: tuple[object, object]) -> None:
        self.twins[name], self.pairs[name] = twin, pair
        if self.probes.of(twin) is None:
            runs = zip(self.probes.of(name), *map(self._each, pair))
            self.probes.learn(twin, [value.reshape(a, b, *value.shape[1:]) for value, a, b in runs])

    def _each(self, size: object) -> list[int]:
        return [size] * len(self.probes.feeds) if isinstance(size, int) else list(size)

    def _reshaped(self, node: onnx.NodeProto) -> bool:
        """Begin or end with a node that keeps the order of elements; say whether it did either."""
        before, after = self.sizes(node.input[0]), self.sizes(node.output[0])
        if before is None or after is None or node.output[0] in self.graph.outputs:
            return False
        if node.input[0] in self.twins:
            pair = self.pairs[node.input[0]]
            source, before = self.twins[node.input[0]], [*pair, *before[1:]]
            stays = after[:1] == [product(pair)]
            target = [*pair, *after[1:]] if stays else after
        elif (pair := self._begins(before, after)) is not None:
            stays, source, target = True, node.input[0], [*pair, *after[1:]]
        else:
            return False
        numbers = reshape_target(before, target)
        if target != before and numbers is None:
            return False
        if target == before:
            twin = source
        else:
            shape = self.graph.constant(np.asarray(numbers, np.int64), "shape")
            twin = self.graph.add("Reshape", [source, shape])
            self.added.add(twin)
        self.visited.add(node.output[0])
        if stays:
            self._learn(node.output[0], twin, pair)
        else:
            if twin in self.added:
                self.probes.learn(twin, self.probes.of(node.output[0]))
            self.graph.replace(node.output[0], twin)
        return True

    def _begins(self, before: list[object], after: list[object]) -> tuple[object, object] | None:
        """The two axes that a reshape joins, None if it does not join the first two."""
        if len(before) < 2 or not after:
            return None
        pair = (before[0], before[1])
        if after[0] != product(pair):
            return None
        if pair == self.tokens:
            return pair if all(isinstance(size, int) for size in after[1:]) else None
        heads = pair[0] == self.tokens[0] and isinstance(pair[1], int) and pair[1] > 1
        return pair if heads and before[2:] == after[1:] and len(before) == 4 else None

    def operand(self, name: str, rank: int) -> str | None:
        """The operand of an elementwise node with both axes; None where it does not broadcast."""
        if not name:
            return name
        if name in self.twins:
            return self.twins[name] if len(self.sizes(name)) == rank else None
        constant = self.graph.is_constant(name)
        sizes = list(self.graph.shape(name)) if constant else self.sizes(name)
        if sizes is None:
            return None
        return name if len(sizes) < rank or sizes[0] == 1 else self._unfolded(name, sizes, rank)

    def _unfolded(self, name: str, sizes: list[object], rank: int) -> str | None:
        """Another tensor of the same first axis, reshaped."""
        pair = next((pair for pair in self.pairs.values() if product(pair) == sizes[0]), None)
        rest = sizes[1:]
        if pair is None or len(sizes) != rank or self.graph.is_constant(name):
            return None
        if sum(not isinstance(size, int) for size in rest) or not isinstance(pair[1], int):
            parts = [self.axes.expression(size) for size in (*pair, *rest)]
            if None in parts:
                return None
            shape = self.graph.add("Concat", parts, axis=0)
        else:
            shape = self.graph.integers(-1, pair[1], *rest)
        twin = self.graph.add("Reshape", [name, shape])
        self.added.add(twin)
        self._learn(name, twin, pair)
        return twin

    def fold_what_others_read(self) -> None:
        """Make nodes that have no twin read the twins of what they read, reshaped again."""
        consumers = self.graph.consumers()
        for name, twin in list(self.twins.items()):
            readers = consumers.get(name, [])
            others = [
                node
                for node in readers
                if node.output[0] not in self.visited and node.output[0] not in self.added
            ]
            rest = self.sizes(name)[1:]
            known = all(isinstance(size, int) for size in rest)
            began = not any(name in node.output for node in self.graph.nodes)
            if (others or name in self.graph.outputs) and known and not began:
                self.graph.replace(
                    name, self.graph.add("Reshape", [twin, self.graph.integers(-1, *rest)])
                )


def product(pair: tuple[object, object]) -> object:
    """The size of an axis that holds two, as ``Probes.sizes`` says it."""
    if all(isinstance(size, int) for size in pair):
        return math.prod(pair)
    count = max(len(size) for size in pair if not isinstance(size, int))
    first, second = ([s] * count if isinstance(s, int) else s for s in pair)
    values = tuple(a * b for a, b in zip(first, second))
    return values[0] if len(set(values)) == 1 else values


def _same(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    """Elementwise: all operands broadcast as before."""
    rank = len(unfolding.sizes(node.output[0]))
    inputs = [unfolding.operand(name, rank) for name in node.input]
    return None if None in inputs else (inputs, attributes(node))


def _product(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    """Rows by a matrix, or matrices by matrices of the same row and head."""
    x, w = node.input
    rank = len(unfolding.sizes(node.output[0]))
    if rank == 2 and x in unfolding.twins and w not in unfolding.twins:
        return [unfolding.twins[x], w], {}
    if rank < 3:
        return None
    both = [unfolding.operand(name, rank) for name in (x, w)]
    return None if None in both else (both, {})


def _along(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    """What has an axis as an attribute, which is not the first."""
    options, rank = attributes(node), len(unfolding.sizes(node.input[0]))
    default = 1 if node.op_type == "Split" else -1
    axis = options.get("axis", default if node.op_type != "Split" else 0) % rank
    if axis == 0:
        return None
    inputs = [unfolding.twins.get(node.input[0]), *node.input[1:]]
    if node.op_type == "Concat":
        inputs = [unfolding.operand(name, rank) for name in node.input]
        if any(name not in unfolding.twins for name in node.input):
            return None
    if None in inputs:
        return None
    return inputs, {**options, "axis": -1 if axis == rank - 1 else axis + 1}


def _shifted(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    """What has axes as an input, of which none is the first."""
    if len(node.input) < 2 or not unfolding.graph.is_constant(node.input[1]):
        return None
    shaped = node.output[0] if node.op_type == "Unsqueeze" else node.input[0]
    rank = len(unfolding.sizes(shaped))
    numbers = [int(axis) for axis in unfolding.graph.array(node.input[1]).reshape(-1)]
    if not numbers or any(axis % rank == 0 for axis in numbers):
        return None
    axes = [axis if axis < 0 else axis + 1 for axis in numbers]
    inputs = [unfolding.twins[node.input[0]], unfolding.graph.integers(*axes)]
    return inputs, attributes(node)


def _transposed(
    unfolding: _Unfolding, node: onnx.NodeProto
) -> tuple[Inputs, dict[str, Any]] | None:
    perm = attributes(node).get("perm")
    if perm is None or perm[0] != 0:
        return None
    return [unfolding.twins[node.input[0]]], {"perm": [0, 1, *(axis + 1 for axis in perm[1:])]}


def _gathered(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    data, index = node.input
    options = attributes(node)
    rank = len(unfolding.sizes(data) or unfolding.graph.shape(data))
    axis = options.get("axis", 0) % rank
    if index in unfolding.twins and data not in unfolding.twins and axis == 0:
        return [data, unfolding.twins[index]], options
    if data in unfolding.twins and axis and unfolding.graph.is_constant(index):
        return [unfolding.twins[data], index], {**options, "axis": axis + 1}
    return None


def _elements(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    """Along the last axis, by an index of as many axes."""
    rank = len(unfolding.sizes(node.output[0]))
    if attributes(node).get("axis", 0) % rank != rank - 1:
        return None
    both = [unfolding.operand(name, rank) for name in node.input]
    return None if None in both else (both, {"axis": -1})


def _sliced(unfolding: _Unfolding, node: onnx.NodeProto) -> tuple[Inputs, dict[str, Any]] | None:
    if len(node.input) < 4 or not unfolding.graph.is_constant(node.input[3]):
        return None
    rank = len(unfolding.sizes(node.input[0]))
    numbers = [int(axis) % rank for axis in unfolding.graph.array(node.input[3])]
    if 0 in numbers:
        return None
    axes = unfolding.graph.integers(*(axis + 1 for axis in numbers))
    return [unfolding.twins[node.input[0]], *node.input[1:3], axes, *node.input[4:]], {}


def _first_operand(
    unfolding: _Unfolding, node: onnx.NodeProto
) -> tuple[Inputs, dict[str, Any]] | None:
    """Each row by itself, which nothing but the first input tells."""
    if node.input[0] not in unfolding.twins:
        return None
    return [unfolding.twins[node.input[0]], *node.input[1:]], attributes(node)


_RULES: dict[str, Rule] = {
    "MatMul": _product,
    "Transpose": _transposed,
    "Gather": _gathered,
    "GatherElements": _elements,
    "Slice": _sliced,
    "DynamicQuantizeLinear": _first_operand,
    "OneHot": lambda unfolding, node: (
        _first_operand(unfolding, node) if attributes(node).get("axis", -1) == -1 else None
    ),
    **dict.fromkeys((*_LAST, "Concat", "Split"), _along),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _shifted),
    **dict.fromkeys(
        [f"Reduce{kind}" for kind in ("Mean", "Sum", "Max", "Min", "L2", "Prod", "SumSquare")],
        _shifted,
    ),
}
