"""Spells rotary positions that turn neighbouring channels by halves of a head, as kernels do.

    y = x * cos + (-x1, x0, -x3, x2, …) * sin
        →  u = Gather(x, [0, 2, …, 1, 3, …])          which becomes the order of a weight's columns
           y = Gather(u * cos' + (-second half of u, first half of u) * sin', the order back)

The order back is left out where a query meets a key: a score is a sum over the channels of a head.
Pairs are recognised by their values over several random batches, not by how they are written.
"""

from __future__ import annotations

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes

DEPTH = 6  # operators between x and its turned pairs, as exporters write them
_Runs = list[np.ndarray]


def turn_halves(graph: OnnxGraph, probes: Probes) -> None:
    """Rewrite every rotation by pairs of channels, in place."""
    turned: dict[str, str] = {}
    angles: dict[str, str] = {}  # reordered once for all that they turn
    for node in [node for node in graph.nodes if node.op_type == "Add"]:
        rotation, name = _rotation(graph, probes, node), node.output[0]
        if rotation is not None:
            x, *names = rotation
            order = _order(probes, x)
            for part in names:
                angles[part] = angles.get(part) or _reordered(graph, probes, part, order)
            turned[name] = _by_halves(graph, probes, name, x, *(angles[part] for part in names))
    for product in [node for node in graph.nodes if node.op_type == "MatMul"]:
        _meet(graph, probes, product, turned)
    graph.clean()


def _rotation(
    graph: OnnxGraph, probes: Probes, node: onnx.NodeProto
) -> tuple[str, str, str] | None:
    """x, cos and sin of x * cos + pairs(x) * sin, of heads (B, H, S, D) or (B, S, H, D)."""
    producers = graph.producers()
    terms = [producers.get(name) for name in node.input]
    if any(term is None or term.op_type != "Mul" for term in terms):
        return None
    for straight, turned in (terms, terms[::-1]):
        for pairs, sin in (turned.input, turned.input[::-1]):
            x = _source(graph, probes, pairs)
            if x is None or x not in straight.input:
                continue
            cos = next(name for name in straight.input if name != x)
            if all(_in_pairs(_values(graph, probes, name)) for name in (cos, sin)):
                return x, cos, sin
    return None


def _source(graph: OnnxGraph, probes: Probes, name: str) -> str | None:
    """The tensor whose pairs of channels one is, turned by a right angle."""
    values, producers = probes.of(name), graph.producers()
    if values is None or values[0].ndim != 4 or values[0].shape[-1] % 2:
        return None
    names = [name]
    for _ in range(DEPTH):
        before = [producers[output] for output in names if output in producers]
        names = list(dict.fromkeys(source for node in before for source in node.input))
        for source in names:
            runs = probes.of(source)
            if runs is not None and all(map(_are_turned, runs, values)):
                return source
    return None


def _are_turned(x: np.ndarray, pairs: np.ndarray) -> bool:
    if x.shape != pairs.shape or not x.any():
        return False
    wanted = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return np.array_equal(wanted, pairs)


def _values(graph: OnnxGraph, probes: Probes, name: str) -> _Runs | None:
    return [graph.array(name)] if graph.is_constant(name) else probes.of(name)


def _in_pairs(values: _Runs | None) -> bool:
    """Whether the two channels of each pair have the same angle."""
    return values is not None and all(
        value.shape[-1] % 2 == 0 and np.array_equal(value[..., ::2], value[..., 1::2])
        for value in values
    )


def _order(probes: Probes, x: str) -> np.ndarray:
    """The first channels of all pairs, then the second ones."""
    size = probes.of(x)[0].shape[-1]
    return np.asarray([*range(0, size, 2), *range(1, size, 2)])


def _reordered(graph: OnnxGraph, probes: Probes, name: str, order: np.ndarray) -> str:
    if graph.is_constant(name):
        return graph.constant(np.ascontiguousarray(graph.array(name)[..., order]))
    result = graph.add("Gather", [name, graph.integers(*order)], axis=-1)
    probes.learn(result, [value[..., order] for value in probes.of(name)])
    return result


def _by_halves(graph: OnnxGraph, probes: Probes, name: str, x: str, cos: str, sin: str) -> str:
    """Write the rotation that makes a tensor, its order back included; return what it is without
    that. The angles are reordered already.
    """
    order = _order(probes, x)
    size, half = len(order), len(order) // 2
    channels = _reordered(graph, probes, x, order)

    def cut(begin: int, end: int) -> str:
        numbers = (graph.integers(number) for number in (begin, end, 3, 1))
        result = graph.add("Slice", [channels, *numbers])
        probes.learn(result, [value[..., begin:end] for value in probes.of(channels)])
        return result

    negative = graph.add("Neg", [cut(half, size)])
    halves = graph.add("Concat", [negative, cut(0, half)], axis=-1)
    total = graph.add("Add", [graph.add("Mul", [channels, cos]), graph.add("Mul", [halves, sin])])
    probes.learn(total, [value[..., order] for value in probes.of(name)])
    graph.rewrite(name, "Gather", [total, graph.integers(*np.argsort(order))], axis=-1)
    return total


def _meet(
    graph: OnnxGraph, probes: Probes, product: onnx.NodeProto, turned: dict[str, str]
) -> None:
    """Leave the order back out where both operands of a product have it, along what is summed."""
    ways = [_way(graph, probes, name, turned) for name in product.input]
    if any(way is None for way in ways):
        return
    columns = [sum(node.op_type == "Transpose" for node in way) % 2 for _, way in ways]
    if columns != [0, 1]:
        return
    for place, (name, way) in enumerate(ways):
        result = turned[name]
        for node in way:
            operands = [result, *node.input[1:]]
            if node.op_type == "Mul" and graph.is_constant(node.input[0]):
                operands = [result, node.input[0]]
            result = graph.add(node.op_type, operands, **attributes(node))
        probes.learn(result, probes.of(product.input[place]))
        product.input[place] = result


def _way(
    graph: OnnxGraph, probes: Probes, name: str, turned: dict[str, str]
) -> tuple[str, list[onnx.NodeProto]] | None:
    """The rotation that an operand comes from, and what is done to it: it is scaled, and transposed
    to columns of keys.
    """
    producers, way = graph.producers(), []
    while name not in turned:
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type == "Transpose":
            if list(attributes(node).get("perm", ())) != [0, 1, 3, 2]:
                return None
            name = node.input[0]
        elif node.op_type in ("Mul", "Div") and _is_number(graph, probes, node.input[1]):
            name = node.input[0]
        elif node.op_type == "Mul" and _is_number(graph, probes, node.input[0]):
            name = node.input[1]
        else:
            return None
        way.insert(0, node)
    return name, way


def _is_number(graph: OnnxGraph, probes: Probes, name: str) -> bool:
    values = _values(graph, probes, name)
    return values is not None and all(value.size == 1 for value in values)
