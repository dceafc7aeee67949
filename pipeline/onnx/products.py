"""Makes one product of tokens by a matrix of what exporters write in its place.

Einsum("abc,cde->abde", x, w)              →  Reshape(MatMul(x, w as [c, d·e]), [0, 0, d, e])
MatMul(OneHot(ids), table)                 →  Gather(table, ids)
MatMul(Unsqueeze(x, 1), w [heads, c, d])   →  Transpose(Reshape(MatMul(x, w as [c, heads·d])))
Split(MatMul(x, w) + b), also in heads     →  MatMul(x, part of w) + part of b, for each part
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes


def expand_einsums(graph: OnnxGraph) -> None:
    """Write each Einsum of two operands as Transpose, Reshape and MatMul where these can."""
    for node in [node for node in graph.nodes if node.op_type == "Einsum"]:
        letters = _letters(node)
        if letters is None:
            continue
        for place in (1, 0):
            if graph.is_constant(node.input[place]):
                written = _by_weight(graph, node, letters, place)
                break
        else:
            written = _of_two(graph, node, letters)
        if written is not None:
            graph.rewrite(node.output[0], *written)
    graph.clean()


class _Letters(NamedTuple):
    """The axes of both operands and of the result."""

    operands: tuple[str, str]
    result: str


_Written = tuple[str, list[str]] | None


def _letters(node: onnx.NodeProto) -> _Letters | None:
    equation = attributes(node)["equation"].decode().replace(" ", "")
    if len(node.input) != 2 or "." in equation:
        return None
    left, _, result = equation.partition("->")
    operands = tuple(left.split(","))
    if "->" not in equation:
        once = sorted(set(left) - {","})
        result = "".join(letter for letter in once if left.count(letter) == 1)
    repeated = any(len(set(term)) < len(term) for term in (*operands, result))
    both = set(operands[0]) & set(operands[1])
    alone = (set(operands[0]) ^ set(operands[1])) - set(result)
    if repeated or alone or not both - set(result):
        return None  # sums of one operand, or no product of matrices
    return _Letters(operands, result)


def _by_weight(graph: OnnxGraph, node: onnx.NodeProto, letters: _Letters, place: int) -> _Written:
    x, w = letters.operands[1 - place], letters.operands[place]
    summed = [letter for letter in x if letter in w]
    if any(letter in letters.result for letter in summed):
        return None
    kept = [letter for letter in letters.result if letter in x]
    new = [letter for letter in letters.result if letter in w]
    shape = dict(zip(w, graph.shape(node.input[place])))
    sizes = [math.prod(shape[letter] for letter in part) for part in (summed, new)]
    order = [w.index(letter) for letter in (*summed, *new)]
    matrix = graph.array(node.input[place]).transpose(order).reshape(sizes)
    name = f"{node.input[place]}.{''.join(summed)}_{''.join(new)}"
    matrix = graph.set_constant(name, np.ascontiguousarray(matrix))
    rows = _permuted(graph, node.input[1 - place], x, [*kept, *summed])
    if len(summed) > 1:
        rows = graph.add("Reshape", [rows, graph.integers(*[0] * len(kept), -1)])
    product = graph.add("MatMul", [rows, matrix])
    if len(new) == 1 and letters.result == "".join((*kept, *new)):
        return "Identity", [product]
    if len(new) != 1:
        split = graph.integers(*[0] * len(kept), *(shape[letter] for letter in new))
        product = graph.add("Reshape", [product, split])
    return "Identity", [_permuted(graph, product, "".join((*kept, *new)), letters.result)]


def _of_two(graph: OnnxGraph, node: onnx.NodeProto, letters: _Letters) -> _Written:
    """A product of matrices for each row and head."""
    pairs = list(zip(letters.operands, node.input))
    own = [
        [letter for letter in term if letters.operands[1 - i].find(letter) < 0]
        for i, term in enumerate(letters.operands)
    ]
    if any(len(part) != 1 for part in own):
        return None
    if letters.result.index(own[0][0]) > letters.result.index(own[1][0]):
        pairs, own = pairs[::-1], own[::-1]
    (left, first), (right, second) = pairs
    batch = [letter for letter in letters.result if letter in left and letter in right]
    summed = [letter for letter in left if letter in right and letter not in batch]
    if len(summed) != 1:
        return None
    rows = _permuted(graph, first, left, [*batch, *own[0], *summed])
    columns = _permuted(graph, second, right, [*batch, *summed, *own[1]])
    product = graph.add("MatMul", [rows, columns])
    return "Identity", [_permuted(graph, product, [*batch, *own[0], *own[1]], letters.result)]


def _permuted(graph: OnnxGraph, name: str, axes: object, wanted: object) -> str:
    perm = [list(axes).index(letter) for letter in wanted]
    return name if perm == sorted(perm) else graph.add("Transpose", [name], perm=perm)


def look_up_one_hots(graph: OnnxGraph) -> None:
    """MatMul(one-hot of ids, table) → Gather(table, ids)."""
    producers = graph.producers()
    for node in [node for node in graph.nodes if node.op_type == "MatMul"]:
        if not graph.is_constant(node.input[1]) or len(graph.shape(node.input[1])) != 2:
            continue
        rows, table = node.input[0], node.input[1]
        targets: list[np.ndarray] = []
        hot = producers.get(rows)
        while hot is not None and hot.op_type in ("Cast", "Reshape", "Identity"):
            if hot.op_type == "Reshape":
                if not graph.is_constant(hot.input[1]):
                    break
                targets.insert(0, graph.array(hot.input[1]))
            hot = producers.get(hot.input[0])
        looked_up = _looked_up(graph, hot, table, producers) if hot is not None else None
        if looked_up is None or any(target[-1:] != graph.shape(table)[0] for target in targets):
            continue
        for target in targets:
            other = graph.integers(*target[:-1], graph.shape(table)[1])
            looked_up = graph.add("Reshape", [looked_up, other])
        graph.rewrite(node.output[0], "Identity", [looked_up])
    graph.clean()


def _looked_up(
    graph: OnnxGraph, hot: onnx.NodeProto, table: str, producers: dict[str, onnx.NodeProto]
) -> str | None:
    rows = graph.shape(table)[0]
    if hot.op_type == "OneHot" and attributes(hot).get("axis", -1) == -1:
        depth, values = hot.input[1:]
        plain = graph.is_constant(values) and graph.array(values).tolist() == [0, 1]
        fits = graph.is_constant(depth) and int(graph.array(depth).reshape(())) == rows
        return graph.add("Gather", [table, hot.input[0]]) if plain and fits else None
    if hot.op_type != "Equal":
        return None
    for ids, numbers in (hot.input, hot.input[::-1]):
        if not graph.is_constant(numbers) or graph.shape(numbers)[-1:] != (rows,):
            continue
        if graph.array(numbers).reshape(-1).tolist() != list(range(rows)):
            continue
        if _ends_in_one(graph, producers.get(ids)):
            return graph.add("Gather", [table, graph.add("Squeeze", [ids, graph.integers(-1)])])
    return None


def _ends_in_one(graph: OnnxGraph, node: onnx.NodeProto | None) -> bool:
    """Whether the last axis of what a node makes has one element."""
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = graph.producers().get(node.input[0])
    if node is None or node.op_type not in ("Unsqueeze", "Reshape"):
        return False
    if len(node.input) < 2 or not graph.is_constant(node.input[1]):
        return False
    last = int(graph.array(node.input[1]).reshape(-1)[-1])
    if node.op_type == "Reshape":
        return last == 1
    rank = _rank(graph, node.output[0])
    return last == -1 or (rank is not None and last == rank - 1)


def _rank(graph: OnnxGraph, name: str) -> int | None:
    """How many axes a tensor has that is an input, reshaped in any way."""
    if any(value.name == name for value in graph.inputs):
        return len(next(v for v in graph.inputs if v.name == name).type.tensor_type.shape.dim)
    node = graph.producers().get(name)
    if node is not None and node.op_type in ("Cast", "Identity"):
        return _rank(graph, node.input[0])
    if node is None or len(node.input) < 2 or not graph.is_constant(node.input[1]):
        return None
    if node.op_type == "Reshape":
        return graph.array(node.input[1]).size
    before = _rank(graph, node.input[0]) if node.op_type == "Unsqueeze" else None
    return None if before is None else before + graph.array(node.input[1]).size


def join_heads(graph: OnnxGraph, probes: Probes) -> None:
    """MatMul with a matrix for each head → one product of all heads' channels side by side."""
    for node in [node for node in graph.nodes if node.op_type == "MatMul"]:
        if not graph.is_constant(node.input[1]):
            continue
        weight = graph.array(node.input[1])
        if weight.ndim == 4 and weight.shape[0] == 1:
            weight = weight[0]
        x, result = probes.sizes(node.input[0]), probes.sizes(node.output[0])
        tokens = probes.sizes("input_ids")
        if weight.ndim != 3 or x is None or len(x) != 4 or (x[0], x[2]) != tuple(tokens):
            continue
        heads, channels, width = weight.shape
        if x[1] == 1 and result == [tokens[0], heads, tokens[1], width]:
            _join_projection(graph, probes, node, weight)
        elif x[1] == heads and channels * heads > 1:
            _join_output(graph, node, weight)
    graph.clean()


def _join_projection(
    graph: OnnxGraph, probes: Probes, node: onnx.NodeProto, weight: np.ndarray
) -> None:
    """(B, 1, S, K) by (heads, K, D) is (B, S, K) by (K, heads · D), in heads."""
    heads, channels, width = weight.shape
    matrix = weight.transpose(1, 0, 2).reshape(channels, heads * width)
    name = graph.set_constant(f"{node.input[1]}.heads", np.ascontiguousarray(matrix))
    rows = graph.add("Squeeze", [node.input[0], graph.integers(1)])
    product = graph.add("MatMul", [rows, name])
    split = graph.add("Reshape", [product, graph.integers(0, 0, heads, width)])
    in_heads = [value.transpose(0, 2, 1, 3) for value in probes.of(node.output[0])]
    probes.learn(rows, [value[:, 0] for value in probes.of(node.input[0])])
    probes.learn(product, [v.reshape(*v.shape[:2], heads * width) for v in in_heads])
    probes.learn(split, in_heads)
    graph.rewrite(node.output[0], "Transpose", [split], perm=[0, 2, 1, 3])


def _join_output(graph: OnnxGraph, node: onnx.NodeProto, weight: np.ndarray) -> None:
    """The sum over heads of (B, heads, S, D) by (heads, D, C) is (B, S, heads · D) by one."""
    readers = graph.consumers().get(node.output[0], [])
    total = readers[0] if len(readers) == 1 else None
    if total is None or total.op_type != "ReduceSum" or attributes(total).get("keepdims", 1):
        return
    if len(total.input) < 2 or not graph.is_constant(total.input[1]):
        return
    if graph.array(total.input[1]).reshape(-1).tolist() not in ([1], [-3]):
        return
    heads, width, channels = weight.shape
    name = f"{node.input[1]}.heads"
    name = graph.set_constant(name, weight.reshape(heads * width, channels))
    rows = graph.add("Transpose", [node.input[0]], perm=[0, 2, 1, 3])
    rows = graph.add("Reshape", [rows, graph.integers(0, 0, heads * width)])
    graph.rewrite(total.output[0], "MatMul", [rows, name])


def cut_products(graph: OnnxGraph, probes: Probes) -> None:
    """Give each part that is cut out of a product of tokens a product of its own.

    Which channels a part has is seen by moving the numbers of channels as the graph moves them.
    """
    for product in [node for node in graph.nodes if node.op_type == "MatMul"]:
        weight = product.input[1]
        if not graph.is_constant(weight) or len(graph.shape(weight)) != 2:
            continue
        sizes = probes.sizes(product.output[0])
        if sizes is None or len(sizes) != 3 or sizes[:2] != probes.sizes("input_ids"):
            continue
        parts = _Parts(graph, probes, product)
        plans = parts.plans()
        in_order = sorted(plans.items(), key=lambda item: int(item[1].channels[0]))
        for number, (part, plan) in enumerate(in_order, 1):
            parts.write(part, plan, number)
    graph.clean()


_CUTS = ("Split", "Slice", "Gather")
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


class _Plan(NamedTuple):
    """A part of a product: its channels, what is added to them, and how they are arranged."""

    channels: np.ndarray
    bias: np.ndarray
    shape: tuple[int, ...]  # of the channels' axes
    perm: list[int]  # of (batch, length, *shape)


class _Parts:
    """What is made of a product by moving its elements and by adding constants."""

    def __init__(self, graph: OnnxGraph, probes: Probes, product: onnx.NodeProto) -> None:
        self.graph, self.probes, self.product = graph, probes, product
        self.consumers = graph.consumers()
        self.width = graph.shape(product.input[1])[1]

    def plans(self) -> dict[str, _Plan]:
        """The parts that others read, each with its plan; nothing unless there is one for all."""
        ends, cut = self._ends()
        if not cut:
            return {}
        plans: dict[str, _Plan] = {}
        for end, chain in ends.items():
            plan = self._plan(end, chain)
            if plan is None:
                return {}
            plans[end] = plan
        return plans

    def write(self, part: str, plan: _Plan, number: int) -> None:
        """Compute a part by a product of its own, whose weight has the layer's name and a number,
        where it has a name.
        """
        graph, (x, weight) = self.graph, self.product.input
        whole = np.array_equal(plan.channels, np.arange(self.width))
        if not whole:
            columns = np.ascontiguousarray(graph.array(weight)[:, plan.channels])
            layer, _, kind = weight.rpartition(".")
            named = f"{layer}.{number}.weight" if kind == "weight" else ""
            if named and not graph.is_constant(named):
                weight = graph.set_constant(named, columns)
            else:
                weight = graph.constant(columns, f"{weight}.part")
        value = graph.add("MatMul", [x, weight])
        if plan.bias.any():
            value = graph.add("Add", [value, graph.constant(plan.bias, "bias")])
        if len(plan.shape) != 1:
            value = graph.add("Reshape", [value, graph.integers(0, 0, *plan.shape)])
        if plan.perm != sorted(plan.perm):
            value = graph.add("Transpose", [value], perm=plan.perm)
        graph.rewrite(part, "Identity", [value])

    def _ends(self) -> tuple[dict[str, list[tuple[onnx.NodeProto, str]]], bool]:
        """The parts that something else reads, with the nodes that lead to each; whether any is cut
        out, or gets its bias in heads.
        """
        ends: dict[str, list[tuple[onnx.NodeProto, str]]] = {}
        waiting, cut = [(self.product.output[0], [])], False
        while waiting:
            name, chain = waiting.pop()
            # who asks for a shape alone reads no part; shapes are written anew later
            readers = [n for n in self.consumers.get(name, []) if n.op_type != "Shape"]
            moved = [node for node in readers if self._moves(node, name)]
            if len(moved) < len(readers) or name in self.graph.outputs or not readers:
                ends[name] = chain
                continue  # halves that rotary positions take beside the whole are no parts
            for node in moved:
                late = node.op_type == "Add" and bool(chain)
                cut = cut or node.op_type in _CUTS or late
                waiting += [(output, [*chain, (node, output)]) for output in node.output]
        return ends, cut

    def _moves(self, node: onnx.NodeProto, name: str) -> bool:
        if node.op_type == "Add":
            other = node.input[1] if node.input[0] == name else node.input[0]
            return self.graph.is_constant(other)
        moves = node.op_type in (*_CUTS, *_RESHAPES, "Transpose")
        return moves and node.input[0] == name and name not in node.input[1:]

    def _plan(self, end: str, chain: list[tuple[onnx.NodeProto, str]]) -> _Plan | None:
        plans = [self._seen(run, chain) for run in range(len(self.probes.feeds))]
        first = plans[0]
        for plan in plans:
            if plan is None or (plan.shape, plan.perm) != (first.shape, first.perm):
                return None
            if not np.array_equal(plan.channels, first.channels):
                return None
        return first

    def _seen(self, run: int, chain: list[tuple[onnx.NodeProto, str]]) -> _Plan | None:
        """Move the numbers of all elements in one of the probes' runs."""
        batch, length = self.probes.feeds[run]["input_ids"].shape
        count = batch * length * self.width
        numbers = np.arange(count).reshape(batch, length, self.width)
        bias = np.zeros(numbers.shape, np.float32)
        for node, output in chain:
            moved = self._moved(run, node, output, numbers), self._moved(run, node, output, bias)
            if moved[0] is None or moved[1] is None:
                return None
            numbers, bias = moved
            if node.op_type == "Add":
                bias = bias + self.graph.array(next(filter(self.graph.is_constant, node.input)))
                if bias.shape != numbers.shape:
                    return None
        return _arranged(numbers, bias, (batch, length, self.width))

    def _moved(
        self, run: int, node: onnx.NodeProto, output: str, array: np.ndarray
    ) -> np.ndarray | None:
        if node.op_type == "Add":
            return array
        if node.op_type == "Transpose":
            return array.transpose(attributes(node).get("perm"))
        value = self._value(run, output)
        if node.op_type in _RESHAPES:
            return None if value is None else array.reshape(value.shape)
        if node.op_type == "Gather":
            index = self._value(run, node.input[1])
            return None if index is None else np.take(array, index, attributes(node).get("axis", 0))
        if node.op_type == "Split":
            axis = attributes(node).get("axis", 0)
            sizes = [self._value(run, name) for name in node.output if name]
            if any(size is None for size in sizes):
                return None
            ends = np.cumsum([size.shape[axis] for size in sizes])
            place = list(node.output).index(output)
            start = 0 if place == 0 else ends[place - 1]
            return np.take(array, range(start, ends[place]), axis)
        return self._sliced(run, node, array)

    def _sliced(self, run: int, node: onnx.NodeProto, array: np.ndarray) -> np.ndarray | None:
        numbers = [self._value(run, name) if name else None for name in node.input[1:]]
        if any(name and number is None for name, number in zip(node.input[1:], numbers)):
            return None
        starts, ends, axes, steps = (*numbers, None, None)[:4]
        axes = range(len(starts)) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        cut = [slice(None)] * array.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps):
            if step < 1:
                return None
            cut[int(axis)] = slice(int(start), int(end), int(step))
        return array[tuple(cut)]

    def _value(self, run: int, name: str) -> np.ndarray | None:
        if self.graph.is_constant(name):
            return self.graph.array(name)
        values = self.probes.of(name)
        return None if values is None else values[run]


def _arranged(numbers: np.ndarray, bias: np.ndarray, sizes: tuple[int, int, int]) -> _Plan | None:
    """Tell how elements of (batch, length, channels) are arranged, by their numbers."""
    batch, length, width = sizes
    tokens, channels = numbers // width, numbers % width
    for rows in range(numbers.ndim):
        for places in range(numbers.ndim):
            if rows == places or (numbers.shape[rows], numbers.shape[places]) != (batch, length):
                continue
            others = [axis for axis in range(numbers.ndim) if axis not in (rows, places)]
            order = [rows, places, *others]
            of_tokens, of_channels, added = (a.transpose(order) for a in (tokens, channels, bias))
            wanted = np.arange(batch * length).reshape(batch, length, *[1] * len(others))
            if (of_tokens == wanted).all() and (of_channels == of_channels[0, 0]).all():
                shape = tuple(numbers.shape[axis] for axis in others)
                perm = [order.index(axis) for axis in range(numbers.ndim)]
                return _Plan(of_channels[0, 0].reshape(-1), added[0, 0].reshape(-1), shape, perm)
    return None
