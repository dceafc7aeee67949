"""Spells products with vectors that DeBERTa's own code picks by the distance of two tokens.

    GatherElements(q · T, index of (query, key))              →  Gather(Reshape(q · K), places)
    Transpose(GatherElements(k · T, index of (key, query)))   →  Gather(Reshape(k · Q), places)

    places of query i and key j  =  rows[i - j + last] + R i  of K, + R j  of Q

K and Q (1, H, D, R) are tables of each distance, with whatever scales a term otherwise than the
product of q and k. ``graph.rewriting.by_distance`` reads this form. Tables and rows are judged by
their values in requests of several lengths, the longest one too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes, evaluated
from bertile.onnx.shapes import Axes

UNLIMITED = 2048  # tokens of a model that names no limit: an index has an element for each two
_ACROSS = [0, 1, 3, 2]  # queries and keys change places


class Term(NamedTuple):
    """A product by distance, of which GatherElements makes a tensor: ``table`` (1, H, D, R), and
    ``rows`` of each distance first - second from -last to last, of the index's two axes.
    """

    name: str
    table: np.ndarray
    rows: np.ndarray

    @property
    def last(self) -> int:
        return len(self.rows) // 2


def find_distances(
    graph: OnnxGraph, probes: Probes, axes: Axes, limit: int | None, opset: int
) -> tuple[list[Term], int | None]:
    """The products by distance, and how many tokens their tables are for; ``limit`` is how many the
    model has, None where it names none.
    """
    if axes.static("length") is not None:
        return [], limit
    terms, producers = [], graph.producers()
    nodes = [node for node in graph.nodes if node.op_type == "GatherElements"]
    pairs = [(node, _operands(probes, producers, node)) for node in nodes]
    pairs = [(node, operands) for node, operands in pairs if operands is not None]
    longest = limit
    for _, operands in pairs:
        longest = _longest(graph, probes, axes, operands, longest or UNLIMITED, opset)
    for node, operands in pairs:
        term = _term(graph, probes, axes, node, operands, longest, opset)
        if term is not None:
            terms.append(term)
    return terms, longest if terms else limit


def write_distances(graph: OnnxGraph, terms: list[Term]) -> None:
    """Write these products, and the scores that they are added to, in place."""
    places = _Places(graph)
    written: dict[str, tuple[str, float]] = {}
    for term in terms:
        written.update(_written(graph, places, term))
    for top in _tops(graph, written):
        _write_sum(graph, top, written)
    for name, (term, factor) in written.items():
        graph.replace(name, graph.add("Mul", [term, graph.number(factor)]))
    graph.clean()


def _operands(
    probes: Probes, producers: dict[str, onnx.NodeProto], node: onnx.NodeProto
) -> tuple[str, str] | None:
    """The vectors and the index of a product by distance: (B, H, D, R) and (…, S, S)."""
    data, index = node.input
    product = producers.get(data)
    sizes, ids = probes.sizes(data), probes.sizes("input_ids")
    if product is None or product.op_type != "MatMul" or sizes is None or len(sizes) != 4:
        return None
    if attributes(node).get("axis", 0) not in (-1, 3):
        return None
    while probes.sizes(index) is not None and probes.sizes(index)[-2:] == [ids[1], ids[1]]:
        before = producers.get(index)
        if before is None or before.op_type not in ("Expand", "Reshape", "Identity"):
            break
        inner = probes.sizes(before.input[0])
        if inner is None or inner[-2:] != [ids[1], ids[1]]:
            break
        index = before.input[0]
    return product.input[1], index


def _longest(
    graph: OnnxGraph,
    probes: Probes,
    axes: Axes,
    operands: tuple[str, str],
    limit: int,
    opset: int,
) -> int:
    """How many tokens, up to the limit, keep the index within the vectors."""

    def fits(length: int) -> bool:
        vectors, index = _at(graph, probes, axes, operands, length, opset)
        if vectors is None or index is None or not index.size:
            return False
        count = vectors.shape[-1]
        return bool((index < count).all() and (index >= -count).all())

    limit = min(limit, 2 * UNLIMITED)
    if fits(limit):
        return limit
    fine, wrong = 1, limit
    while wrong - fine > 1:
        middle = (fine + wrong) // 2
        fine, wrong = (middle, wrong) if fits(middle) else (fine, middle)
    return fine


def _at(
    graph: OnnxGraph,
    probes: Probes,
    axes: Axes,
    operands: tuple[str, str],
    length: int,
    opset: int,
) -> list[np.ndarray | None]:
    """The vectors and the index in a request of that length."""
    batch = axes.static("batch") or 1
    feed = {name: np.ones((batch, length), a.dtype) for name, a in probes.feeds[0].items()}
    return [
        graph.array(name) if graph.is_constant(name) else evaluated(graph, name, feed, opset)
        for name in operands
    ]


def _term(
    graph: OnnxGraph,
    probes: Probes,
    axes: Axes,
    node: onnx.NodeProto,
    operands: tuple[str, str],
    longest: int,
    opset: int,
) -> Term | None:
    vectors, index = _at(graph, probes, axes, operands, longest, opset)
    if vectors is None or index is None or vectors.ndim != 4:
        return None
    index = index.reshape(-1, longest, longest)[0]
    rows = np.concatenate([index[0, :0:-1], index[:, 0]])
    places = np.arange(longest)
    if (rows[places[:, None] - places + longest - 1] != index).any():
        return None
    table = vectors[:1]
    rows = rows % table.shape[-1]
    if not all(np.array_equal(each, table[0]) for each in vectors):
        return None
    runs = probes.of(node.input[1]), probes.of(node.input[0]), _runs(graph, probes, operands[0])
    if any(run is None for run in runs):
        return None
    for indices, _, other in zip(*runs):
        length = indices.shape[-1]
        wanted = table[..., rows[places[:length, None] - places[:length] + longest - 1]]
        first = indices.reshape(-1, length, length)
        picked = other[..., first[0]]
        if (first != first[0]).any() or not np.allclose(picked, wanted, rtol=0, atol=1e-6):
            return None
    return Term(node.output[0], np.ascontiguousarray(table), rows)


def _runs(graph: OnnxGraph, probes: Probes, name: str) -> list[np.ndarray] | None:
    if graph.is_constant(name):
        return [graph.array(name)] * len(probes.feeds)
    return probes.of(name)


class _Places:
    """The places of pairs of tokens in a product with R vectors, each made at most once."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._made: dict[object, str] = {}

    def of(self, rows: np.ndarray, count: int, of_queries: bool) -> str:
        """(S, S) for each query and key, whose own vector was multiplied."""
        key = (rows.tobytes(), count, of_queries)
        if key not in self._made:
            row = self._row(rows)
            own = self._down(rows) if of_queries else self._across(rows)
            number = self.graph.constant(np.asarray(count, np.int64))
            start = self.graph.add("Mul", [own, number])
            self._made[key] = self.graph.add("Add", [row, start])
        return self._made[key]

    def _across(self, rows: np.ndarray) -> str:
        if "across" not in self._made:
            add, integers = self.graph.add, self.graph.integers
            whole = self.graph.constant(np.arange(len(rows) // 2 + 1, dtype=np.int64)[None])
            length = add("Shape", ["input_ids"], start=1, end=2)
            self._made["across"] = add(
                "Slice", [whole, integers(0), length, integers(1), integers(1)]
            )
        return self._made["across"]

    def _down(self, rows: np.ndarray) -> str:
        if "down" not in self._made:
            self._made["down"] = self.graph.add("Transpose", [self._across(rows)], perm=[1, 0])
        return self._made["down"]

    def _row(self, rows: np.ndarray) -> str:
        if rows.tobytes() not in self._made:
            distance = self.graph.add("Sub", [self._down(rows), self._across(rows)])
            last = self.graph.constant(np.asarray(len(rows) // 2, np.int64))
            index = self.graph.add("Add", [distance, last])
            known = self.graph.constant(rows.astype(np.int64), "row_of_distance")
            self._made[rows.tobytes()] = self.graph.add("Gather", [known, index])
        return self._made[rows.tobytes()]


def _written(graph: OnnxGraph, places: _Places, term: Term) -> dict[str, tuple[str, float]]:
    """By the name of what it replaces, a term without its scale, and that."""
    producers, consumers = graph.producers(), graph.consumers()
    x, factor = _unscaled(graph, producers[producers[term.name].input[0]].input[0])
    name, of_queries, rows = term.name, True, term.rows
    readers = consumers.get(name, [])
    if len(readers) == 1 and attributes(readers[0]).get("perm") == _ACROSS:
        name, of_queries, rows = readers[0].output[0], False, term.rows[::-1]
    count = term.table.shape[-1]
    flat = graph.add("MatMul", [x, graph.constant(term.table, "vectors_by_distance")])
    flat = graph.add("Reshape", [flat, graph.integers(0, 0, -1)])
    index = places.of(np.ascontiguousarray(rows), count, of_queries)
    return {name: (graph.add("Gather", [flat, index], axis=2), factor)}


def _unscaled(graph: OnnxGraph, name: str) -> tuple[str, float]:
    """What a tensor is a number times, and that number."""
    producers, factor = graph.producers(), 1.0
    while (node := producers.get(name)) is not None and node.op_type in ("Mul", "Div"):
        numbers = [graph.scalar(operand) for operand in node.input]
        if numbers[1] is not None:
            factor *= numbers[1] if node.op_type == "Mul" else 1 / numbers[1]
            name = node.input[0]
        elif numbers[0] is not None and node.op_type == "Mul":
            factor, name = factor * numbers[0], node.input[1]
        else:
            break
    return name, factor


def _tops(graph: OnnxGraph, written: dict[str, tuple[str, float]]) -> list[str]:
    """The sums that terms end in, through scales and further sums."""
    consumers, tops = graph.consumers(), []
    for name in written:
        top = ""
        while len(readers := consumers.get(name, [])) == 1:
            node = readers[0]
            if node.op_type not in ("Add", "Mul", "Div"):
                break
            name = node.output[0]
            top = name if node.op_type == "Add" else top
        if top and top not in tops:
            tops.append(top)
    return tops


def _write_sum(graph: OnnxGraph, top: str, written: dict[str, tuple[str, float]]) -> None:
    """(q · k + terms) * scale + what else is added; left as it is where there is no q · k."""
    producers = graph.producers()
    leaves: list[tuple[str, float]] = []
    waiting = [(top, 1.0)]
    while waiting:
        name, factor = waiting.pop()
        inner, number = (name, 1.0) if name in written else _unscaled(graph, name)
        node = producers.get(inner)
        if inner not in written and node is not None and node.op_type == "Add":
            waiting += [(operand, factor * number) for operand in node.input[::-1]]
        elif graph.is_constant(inner) and not graph.array(inner).any():
            continue  # the 0 that a sum began with
        else:
            leaves.append((inner, factor * number))
    products = [
        (name, factor)
        for name, factor in leaves
        if name not in written and name in producers and producers[name].op_type == "MatMul"
    ]
    terms = [(name, factor) for name, factor in leaves if name in written]
    if len(products) != 1 or not terms:
        return
    (product, scale), operands = products[0], []
    for operand in producers[product].input:
        name, number = _unscaled(graph, operand)
        before = producers.get(name)
        if before is not None and attributes(before).get("perm") == _ACROSS:
            inner, more = _unscaled(graph, before.input[0])
            name, number = graph.add("Transpose", [inner], perm=_ACROSS), number * more
        operands.append(name)
        scale *= number
    total = graph.add("MatMul", operands)
    for name, factor in terms:
        term, own = written.pop(name)
        _scale_table(graph, term, factor * own / scale)
        total = graph.add("Add", [total, term])
    total = graph.add("Mul", [total, graph.number(scale)])
    for name, factor in leaves:
        if (name, factor) in (products[0], *terms):
            continue
        if factor != 1:
            name = graph.add("Mul", [name, graph.number(factor)])
        total = graph.add("Add", [total, name])
    graph.replace(top, total)


def _scale_table(graph: OnnxGraph, term: str, factor: float) -> None:
    producers = graph.producers()
    product = producers[producers[producers[term].input[0]].input[0]]
    table = (graph.array(product.input[1]) * np.float64(factor)).astype(np.float32)
    product.input[1] = graph.constant(table, "vectors_by_distance")
