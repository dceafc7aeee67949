"""Writes numbers that shapes alone decide, and that are read as values, by counting tokens.

    table[:length]                        →  Gather(table, Slice([[0, 1, …]], 0, length))
    x * (Range(length) + 1)               →  x * Slice(CumSum(ones), 0, 1)
    x + Cast(Shape(input_ids)[1])         →  x + the last of them

TVM's importer knows a shape only where another shape is made of it. What a tensor is, is judged by
its values over several random batches.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import onnx

from bertile.onnx.dependence import dependence, is_lookup
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes
from bertile.onnx.shapes import Axes

# The operands that an operator reads as a shape, or as a place in one.
_OF_SHAPES: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Where", "Equal", "Less", "Greater", "And", "Or")
_Runs = list[np.ndarray]


def gather_places(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Slice(table, 0, length) → Gather(table, places), so that it is a lookup like others."""
    for node, place, name in _read_as_values(graph):
        values = probes.of(name)
        table = None if values is None else _sliced_table(graph, name)
        if table is None or is_lookup(graph, node):
            continue
        rows = graph.array(table)
        rows = rows.reshape(-1, rows.shape[-1])
        first = _first_row(rows, values, axes.sizes["length"])
        broadcast = node.op_type in _BROADCAST and len(probes.sizes(node.output[0]) or []) > 2
        if first is None or not (broadcast or values[0].ndim == 2):
            continue
        places = [np.arange(first, first + size)[None] for size in axes.sizes["length"]]
        index = _cut(graph, axes, np.arange(first, len(rows))[None])
        probes.learn(index, places)
        looked_up = graph.add("Gather", [_flat(graph, table, rows), index])
        if not broadcast:
            looked_up = graph.add("Squeeze", [looked_up, graph.integers(0)])
        node.input[place] = looked_up
    graph.clean()


def write_counts(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Write every number that is read as a value and decided by shapes.

    Of one that is no sum of counts, what it is computed of is written so.
    """
    counts = Counts(graph, axes)
    written = _Written(graph, probes, counts)
    for node, place, name in _read_as_values(graph):
        node.input[place] = written.value(name, node.op_type == "Concat")
    graph.clean()


class _Written:
    """Tensors of shapes as values, each made at most once."""

    def __init__(self, graph: OnnxGraph, probes: Probes, counts: Counts) -> None:
        self.graph, self.probes, self.counts = graph, probes, counts
        self.producers, self.kinds = graph.producers(), dependence(graph)
        self._names: dict[tuple[str, bool], str] = {}

    def value(self, name: str, whole: bool = False) -> str:
        """Return the tensor that has the same value; the same where that is not known.

        One of size 1 along an axis on which nothing of it depends will do, but for who asks for the
        `whole`.
        """
        if (name, whole) not in self._names:
            self._names[name, whole] = self._counted(name, whole) or self._computed(name)
        return self._names[name, whole]

    def _counted(self, name: str, whole: bool) -> str | None:
        values = self.probes.of(name)
        return None if values is None else self.counts.write(values, whole)

    def _computed(self, name: str) -> str:
        node = self.producers.get(name)
        if node is None or node.op_type in ("Shape", "Size") or len(node.output) > 1:
            return name
        kept = _OF_SHAPES.get(node.op_type, ())
        whole = node.op_type == "Concat"  # which broadcasts nothing
        inputs = [
            self.value(operand, whole)
            if self.kinds.get(operand) == "shape" and place not in kept
            else operand
            for place, operand in enumerate(node.input)
        ]
        if inputs == list(node.input):
            return name
        return self.graph.add(node.op_type, inputs, **attributes(node))


def write_flips(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Slice(x, …, step -1) → Gather(x, [last, …, 0]): TVM slices no axis backwards whose length
    varies.
    """
    counts = Counts(graph, axes)
    for node in [node for node in graph.nodes if node.op_type == "Slice"]:
        before, after = probes.of(node.input[0]), probes.of(node.output[0])
        if before is None or after is None or before[0].shape != after[0].shape:
            continue
        steps = graph.array(node.input[4]) if len(node.input) > 4 else np.ones(1)
        if steps.size != 1 or int(steps.reshape(-1)[0]) != -1:
            continue
        axis = int(graph.array(node.input[3]).reshape(-1)[0]) % before[0].ndim
        if not all(np.array_equal(np.flip(x, axis), y) for x, y in zip(before, after)):
            continue
        places = [np.arange(x.shape[axis])[::-1] for x in before]
        if len({len(place) for place in places}) == 1:
            index = graph.constant(places[0])
        else:
            index = counts.write(places)
        if index is not None:
            graph.rewrite(node.output[0], "Gather", [node.input[0], index], axis=axis)
    graph.clean()


def write_tails(graph: OnnxGraph, probes: Probes, axes: Axes) -> int | None:
    """Slice(table, n - length, n) → Gather(table, places + n - length), as ALiBi is cut out of its
    biases; return the least n, which is how many tokens there may be.
    """
    counts, limits = Counts(graph, axes), []
    lengths = axes.sizes["length"]
    for node in [node for node in graph.nodes if node.op_type == "Slice"]:
        name, after = node.input[0], probes.of(node.output[0])
        if after is None or not graph.is_constant(name) or graph.is_constant(node.input[1]):
            continue
        table = graph.array(name)
        for axis, n in enumerate(table.shape):
            tails = [np.take(table, range(max(0, n - size), n), axis) for size in lengths]
            index = None
            if all(np.array_equal(*both) for both in zip(tails, after)):
                index = counts.write([np.arange(n - size, n) for size in lengths])
            if index is not None:
                graph.rewrite(node.output[0], "Gather", [name, index], axis=axis)
                limits.append(n)
                break
    graph.clean()
    return min(limits, default=None)


def write_shifts(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Pad(Slice(tokens)) of the same length → Gather(tokens, places + k) * (they are within it).

    The importer loses the length of what is sliced up to the last token but one.
    """
    counts, producers = Counts(graph, axes), graph.producers()
    for node in [node for node in graph.nodes if node.op_type == "Pad"]:
        cut = producers.get(node.input[0])
        if cut is None or cut.op_type != "Slice":
            continue
        before, after = probes.of(cut.input[0]), probes.of(node.output[0])
        if before is None or after is None or before[0].ndim != 3:
            continue
        if before[0].dtype != np.float32 or probes.sizes(cut.input[0])[:2] != probes.sizes(
            "input_ids"
        ):
            continue
        shift = next((k for k in (1, -1, 2, -2) if _are_shifted(before, after, k)), None)
        if shift is None:
            continue
        add = graph.add
        zero = graph.constant(np.asarray(0, np.int64))
        places = counts.write([np.arange(x.shape[1]) + shift for x in before])
        last = counts.write([np.asarray(x.shape[1] - 1) for x in before])
        within = add("Min", [add("Max", [places, zero]), last])
        same = add("Cast", [add("Equal", [places, within])], to=onnx.TensorProto.FLOAT)
        kept = add("Unsqueeze", [same, graph.integers(1)])
        moved = add("Gather", [cut.input[0], within], axis=1)
        graph.rewrite(node.output[0], "Mul", [moved, kept])
    graph.clean()


def _are_shifted(before: _Runs, after: _Runs, shift: int) -> bool:
    """Whether token i of one is token i + shift of the other, and zero where there is none."""
    for x, y in zip(before, after):
        if x.shape != y.shape:
            return False
        wanted, length = np.zeros_like(x), x.shape[1]
        begin, end = max(0, -shift), min(length, length - shift)
        if begin < end:
            wanted[:, begin:end] = x[:, begin + shift : end + shift]
        if not np.array_equal(wanted, y):
            return False
    return True


def pick_rows(graph: OnnxGraph, probes: Probes) -> None:
    """GatherElements(table, the same place for all channels) → Gather(table, places)."""
    for node in [node for node in graph.nodes if node.op_type == "GatherElements"]:
        name, index = node.input[0], probes.of(node.input[1])
        if not graph.is_constant(name) or attributes(node).get("axis", 0) not in (1, -2):
            continue
        shape = graph.shape(name)
        if len(shape) != 3 or shape[0] != 1 or index is None:
            continue
        if any(i.shape[::2] != shape[::2] or (i != i[:, :, :1]).any() for i in index):
            continue
        places = _narrow(graph, probes, node.input[1], [i[:, :, :1] for i in index])
        if places is not None:
            places = graph.add("Squeeze", [places, graph.integers(-1)])
            probes.learn(places, [i[:, :, 0] for i in index])
            table = graph.constant(graph.array(name)[0], "table")
            graph.rewrite(node.output[0], "Gather", [table, places], axis=0)
    graph.clean()


def pick_tokens(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """GatherElements(tokens, the same place for all channels) → MatMul(one-hot places, tokens)."""
    counts = Counts(graph, axes)
    for node in [node for node in graph.nodes if node.op_type == "GatherElements"]:
        tokens, index = (probes.of(name) for name in node.input)
        if tokens is None or index is None or attributes(node).get("axis", 0) not in (1, -2):
            continue
        if any(i.ndim != 3 or i.shape[2] != t.shape[2] for t, i in zip(tokens, index)):
            continue
        if any((i != i[:, :, :1]).any() or t.dtype != np.float32 for t, i in zip(tokens, index)):
            continue
        add = graph.add
        first = _narrow(graph, probes, node.input[1], [i[:, :, :1] for i in index])
        places = counts.write([np.arange(t.shape[1])[None, None] for t in tokens])
        if first is None or places is None:
            continue
        number = graph.constant(np.asarray(0, np.int64))
        behind = add("Add", [first, counts.length()])
        first = add("Where", [add("Less", [first, number]), behind, first])
        hot = add("Cast", [add("Equal", [first, places])], to=onnx.TensorProto.FLOAT)
        graph.rewrite(node.output[0], "MatMul", [hot, node.input[0]])
    graph.clean()


def _narrow(graph: OnnxGraph, probes: Probes, name: str, wanted: _Runs) -> str | None:
    """The tensor that an index is expanded from, with its last axis of one element."""
    producers = graph.producers()
    while (values := probes.of(name)) is not None:
        if all(np.array_equal(value, want) for value, want in zip(values, wanted)):
            cast = graph.add("Cast", [name], to=onnx.TensorProto.INT64)
            return cast if values[0].dtype != np.int64 else name
        node = producers.get(name)
        if node is None or node.op_type not in ("Expand", "Tile", "Identity", "Cast"):
            return None
        name = node.input[0]
    return None


def _read_as_values(graph: OnnxGraph) -> list[tuple[onnx.NodeProto, int, str]]:
    """Each operand that shapes decide, of a node that more than shapes decide."""
    kinds = dependence(graph)
    return [
        (node, place, name)
        for node in graph.nodes
        if kinds[node.output[0]] not in ("constant", "shape")
        for place, name in enumerate(node.input)
        if kinds.get(name) == "shape"
        and place not in _OF_SHAPES.get(node.op_type, ())
        and not (node.op_type.startswith("Reduce") and place == 1)
    ]


def _sliced_table(graph: OnnxGraph, name: str) -> str | None:
    """The table of floats that a tensor is part of, through operators that move its rows."""
    producers = graph.producers()
    for _ in range(6):
        if graph.is_constant(name):
            shape = graph.shape(name)
            whole = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
            return name if whole and graph.is_float(name) else None
        node = producers.get(name)
        if node is None or node.op_type not in ("Slice", "Unsqueeze", "Squeeze", "Cast", "Expand"):
            return None
        name = node.input[0]
    return None


def _first_row(rows: np.ndarray, values: _Runs, lengths: np.ndarray) -> int | None:
    """Where the table begins to be read, None if not all of so many rows follow one another."""
    channels = rows.shape[1]
    if any(value.shape[-2:] != (size, channels) for value, size in zip(values, lengths)):
        return None
    start = values[0].reshape(-1, channels)[0]
    for first in np.flatnonzero((rows == start).all(1))[:4]:
        if all(
            first + size <= len(rows) and (value == rows[first : first + size]).all()
            for value, size in zip(values, lengths)
        ):
            return int(first)
    return None


def _flat(graph: OnnxGraph, table: str, rows: np.ndarray) -> str:
    return table if graph.shape(table) == rows.shape else graph.constant(rows, "position_table")


def _cut(graph: OnnxGraph, axes: Axes, table: np.ndarray) -> str:
    """A constant (1, P) cut to the length of the request."""
    length = axes.static("length")
    if length is not None:
        return graph.constant(table[:, :length], "places")
    zero, unit = graph.integers(0), graph.integers(1)
    whole = graph.constant(table, "places")
    return graph.add("Slice", [whole, zero, axes.tensor("length"), unit, unit])


class Counts:
    """Tensors that count rows and tokens of the request, each made at most once.

    A tensor is c + a·(its place along an axis) + b·length + …, whole numbers of the terms below.
    """

    def __init__(self, graph: OnnxGraph, axes: Axes) -> None:
        self.graph, self.axes = graph, axes
        self._terms: dict[str, str] = {}

    def write(self, values: _Runs, whole: bool = False) -> str | None:
        """Return a tensor with these values in each run, None where counting does not tell.

        It may be of size 1 along an axis on which nothing of it depends, unless the `whole` is
        asked for.
        """
        rank = values[0].ndim
        dtype = values[0].dtype
        if dtype.kind not in "iuf" or any(value.ndim != rank for value in values):
            return None
        terms = self._candidates(values)
        for count in range(1, min(3, len(terms)) + 1):
            for chosen in combinations(terms, count):
                factors = _whole_factors([terms[term] for term in chosen], values)
                if factors is not None:
                    if whole:
                        across = _across(terms, chosen)
                        chosen, factors = (
                            (*chosen, *across),
                            [*factors[:-1], *(0 for _ in across), factors[-1]],
                        )
                    return self._sum(chosen, factors, rank, dtype)
        return None

    def _candidates(self, values: _Runs) -> dict[tuple[str, int], _Runs]:
        """What a tensor may be made of: by the term's name and the axis that it goes along."""
        sizes = self.axes.sizes
        terms: dict[tuple[str, int], _Runs] = {}
        for name in ("length", "batch"):
            if self.axes.static(name) is None:
                terms[name, -1] = [np.full(v.shape, n) for v, n in zip(values, sizes[name])]
        for name, along in (("place", "length"), ("row", "batch")):
            for axis in range(values[0].ndim):
                if all(value.shape[axis] == n for value, n in zip(values, sizes[along])):
                    terms[name, axis] = [_along(value.shape, axis) for value in values]
        by_row = [(key, runs) for key, runs in terms.items() if key[0] == "row"]
        for (_, axis), runs in by_row:  # where a row begins among the tokens of all
            terms["start", axis] = [run * n for run, n in zip(runs, sizes["length"])]
        return terms

    def _sum(
        self, chosen: tuple[tuple[str, int], ...], factors: list[int], rank: int, dtype: Any
    ) -> str:
        add, constant = self.graph.add, self.graph.constant
        total = ""
        for (name, axis), factor in zip(chosen, factors):
            term = self._term(name, axis, rank)
            if factor != 1:
                term = add("Mul", [term, constant(np.asarray(factor, np.int64))])
            total = add("Add", [total, term]) if total else term
        if factors[-1] or not total:
            total = add("Add", [total, constant(np.asarray(factors[-1], np.int64))])
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return total if dtype == np.int64 else add("Cast", [total], to=kind)

    def _term(self, name: str, axis: int, rank: int) -> str:
        """A vector of int64 along its axis, or a number, from 0 on."""
        vector = self._vector(name)
        if name in ("length", "batch") or rank == 1:
            return vector
        others = [other for other in range(rank) if other != axis]
        return self.graph.add("Unsqueeze", [vector, self.graph.integers(*others)])

    def length(self) -> str:
        """The number of tokens of a sequence."""
        return self._vector("length")

    def _vector(self, name: str) -> str:
        if name not in self._terms:
            self._terms[name] = getattr(self, f"_{name}")()
        return self._terms[name]

    def _ones(self) -> str:
        same = self.graph.add("Equal", ["input_ids", "input_ids"])
        return self.graph.add("Cast", [same], to=onnx.TensorProto.INT64)

    def _counted(self, axis: int) -> str:
        """1, 2, 3, … along an axis of the ids."""
        number = self.graph.constant(np.asarray(axis, np.int64))
        counted = self.graph.add("CumSum", [self._vector("ones"), number])
        return self._first(counted, 1 - axis)

    def _first(self, name: str, axis: int) -> str:
        zero = self.graph.constant(np.asarray(0, np.int64))
        return self.graph.add("Gather", [name, zero], axis=axis)

    def _from_zero(self, name: str) -> str:
        return self.graph.add("Sub", [name, self.graph.constant(np.asarray(1, np.int64))])

    def _place(self) -> str:
        return self._from_zero(self._counted(1))

    def _row(self) -> str:
        return self._from_zero(self._counted(0))

    def _start(self) -> str:
        return self.graph.add("Mul", [self._vector("row"), self._vector("length")])

    def _length(self) -> str:
        return self._summed(1)

    def _batch(self) -> str:
        return self._summed(0)

    def _summed(self, axis: int) -> str:
        summed = self.graph.add(
            "ReduceSum", [self._vector("ones"), self.graph.integers(axis)], keepdims=0
        )
        return self._first(summed, 0)


def _across(
    terms: dict[tuple[str, int], _Runs], chosen: tuple[tuple[str, int], ...]
) -> list[tuple[str, int]]:
    """Terms along the axes of several elements that none of those chosen goes along."""
    held = {axis for _, axis in chosen}
    others = {axis: (name, axis) for name, axis in terms if name in ("place", "row")}
    return [term for axis, term in others.items() if axis not in held]


def _along(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Each element's place along an axis."""
    places = np.arange(shape[axis]).reshape(
        [-1 if other == axis else 1 for other in range(len(shape))]
    )
    return np.broadcast_to(places, shape)


def _whole_factors(terms: list[_Runs], values: _Runs) -> list[int] | None:
    """The whole numbers by which the terms, and 1 as the last, add up to the values in all runs."""
    columns = [np.concatenate([run.reshape(-1) for run in term]) for term in terms]
    wanted = np.concatenate([value.reshape(-1) for value in values]).astype(np.float64)
    matrix = np.stack([*columns, np.ones(len(wanted))], 1).astype(np.float64)
    if not np.isfinite(wanted).all() or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return None
    factors = np.rint(np.linalg.lstsq(matrix, wanted, rcond=None)[0]).astype(np.int64)
    exact = (matrix @ factors == wanted).all() and factors[:-1].all()
    return [int(factor) for factor in factors] if exact else None
