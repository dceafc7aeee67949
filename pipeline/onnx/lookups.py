"""Lookups of positions, token types and distances in any spelling come in; one form goes out.

    Gather(table, Slice | Range | Expand(…))     →  Gather(table, Slice([[0, 1, …]], 0, length))
    Gather(table, CumSum(…) * … + 1)             →  Gather(table, CumSum(real) * real + 1)
    Gather(table, zeros) + …                     →  the row added to the table of positions
    Gather(bias, Where(Log(Abs(i - j)) …))       →  Gather(bias by distance, j - i + last)

An index is judged by its values over several random batches, not by how it is computed.
"""

from __future__ import annotations

import numpy as np
import onnx

from bertile.onnx.dependence import dependence, is_lookup, lookup_source
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import Probes, evaluate, evaluated
from bertile.onnx.shapes import Axes

LONGEST = 32768  # tokens: where an index is within its table so far, nothing limits the length
MOST = 1 << 22  # elements of an index that is computed to see whether it is


def write_lookups(graph: OnnxGraph, probes: Probes, axes: Axes, opset: int) -> int | None:
    """Rewrite the lookups that are understood; return how many positions the model has."""
    lookups = _Lookups(graph, probes, axes)
    kinds = dependence(graph)
    inputs = {value.name for value in graph.inputs}
    gathers = [node for node in graph.nodes if is_lookup(graph, node)]
    others = [node for node in gathers if lookup_source(graph, node)[0] not in inputs]
    # In this order: a row goes into the table of positions, which also limits the distances.
    rest = [node for node in others if not lookups.positions(node)]
    rest = [node for node in rest if not lookups.single_row(node)]
    for node in rest:
        if kinds.get(node.input[1]) != "shape" or not lookups.distances(node, opset):
            lookups.tried(node, opset)
    for node in graph.nodes:
        if node.op_type == "Slice" and graph.is_constant(node.input[0]):
            lookups.sliced(node, opset)
    graph.clean()
    return lookups.limit


class _Lookups:
    def __init__(self, graph: OnnxGraph, probes: Probes, axes: Axes):
        self.graph, self.probes, self.axes = graph, probes, axes
        self.limit: int | None = None
        self._tables: list[onnx.NodeProto] = []

    def positions(self, node: onnx.NodeProto) -> bool:
        index = self._index(node)
        if index is None or not any(ids.any() for ids in index):
            return False
        if self._place(node, index) or self._after_padding(node, index):
            self._tables.append(node)
            return True
        return False

    def _index(self, node: onnx.NodeProto) -> list[np.ndarray] | None:
        name = node.input[1]
        if self.graph.is_constant(name):
            return [self.graph.array(name)] * len(self.probes.feeds)
        return self.probes.of(name)

    def _place(self, node: onnx.NodeProto, index: list[np.ndarray]) -> bool:
        """Position = place in the sequence + offset."""
        offset = int(index[0].flat[0])
        for length, value in zip(self.axes.sizes["length"], index):
            want = np.arange(length) + offset
            if value.shape[-1:] != want.shape or (value != want).any():
                return False
        rows = self.graph.shape(node.input[0])[0]
        node.input[1] = self._places(offset, rows)
        if index[0].ndim == 1 and not self._is_broadcast(node):
            looked_up = self.graph.fresh("positions")
            squeezed, node.output[0] = node.output[0], looked_up
            self.graph.nodes.append(
                onnx.helper.make_node(
                    "Squeeze", [looked_up, self.graph.integers(0)], [squeezed], name=looked_up
                )
            )
        self._limit(rows - offset)
        return True

    def _is_broadcast(self, node: onnx.NodeProto) -> bool:
        """Whether all that read a lookup add it to something of three axes or more."""
        readers = self.graph.consumers().get(node.output[0], [])
        ranks = [len(self.probes.sizes(reader.output[0]) or ()) for reader in readers]
        return all(reader.op_type == "Add" for reader in readers) and min(ranks, default=0) > 2

    def _places(self, start: int, stop: int) -> str:
        """Return the int64 tensor (1, length) that counts from `start`."""
        table = np.arange(start, stop, dtype=np.int64)[None]
        length = self.axes.static("length")
        if length is not None:
            return self.graph.constant(table[:, :length], "positions")
        zero, unit = self.graph.integers(0), self.graph.integers(1)
        whole = self.graph.constant(table, "positions")
        return self.graph.add("Slice", [whole, zero, self.axes.tensor("length"), unit, unit])

    def _after_padding(self, node: onnx.NodeProto, index: list[np.ndarray]) -> bool:
        """Position = count of real tokens so far + padding id, as in RoBERTa and MPNet."""
        padding = int(min(ids.min() for ids in index))
        for feed, value in zip(self.probes.feeds, index):
            real = (feed["input_ids"] != padding).astype(np.int64)
            want = np.cumsum(real, axis=1) * real + padding
            if value.shape != want.shape or (value != want).any():
                return False
        add, constant = self.graph.add, self.graph.constant
        dtype = self.probes.feeds[0]["input_ids"].dtype
        same = add("Equal", ["input_ids", constant(np.asarray(padding, dtype))])
        real = add("Cast", [add("Not", [same])], to=onnx.TensorProto.INT64)
        count = add("CumSum", [real, constant(np.asarray(1, np.int64))])
        kept = add("Mul", [count, real])
        node.input[1] = add("Add", [kept, constant(np.asarray(padding, np.int64))])
        self._limit(self.graph.shape(node.input[0])[0] - padding - 1)
        return True

    def _limit(self, positions: int) -> None:
        self.limit = min(self.limit or positions, positions)

    def single_row(self, node: onnx.NodeProto) -> bool:
        """Row 0 is the only one ever looked up: add it to the positions, or make it a constant."""
        index = self._index(node)
        if index is None or any(ids.any() for ids in index):
            return False
        row = self.graph.array(node.input[0])[0]
        readers = self.graph.consumers().get(node.output[0], [])
        if len(readers) == 1 and len(self._tables) == 1 and readers[0].op_type == "Add":
            position = self._tables[0]
            other = next((name for name in readers[0].input if name != node.output[0]), "")
            if self._are_summed(readers[0], other, position.output[0]):
                table = self.graph.array(position.input[0]) + row
                position.input[0] = self.graph.constant(table, "position_embeddings")
                self.graph.replace(readers[0].output[0], other)
                return True
        if any(reader.op_type == "Concat" for reader in readers):  # which broadcasts nothing
            return False
        constant = self.graph.constant(row[None, None], "token_type")
        self.graph.replace(node.output[0], constant)
        return True

    def _are_summed(self, add: onnx.NodeProto, other: str, position: str) -> bool:
        """Say whether `position` is added just before or just after `add`."""
        before = self.graph.producers().get(other)
        if other == position or (before is not None and self._adds(before, position)):
            return True
        after = self.graph.consumers().get(add.output[0], [])
        return bool(after) and all(self._adds(reader, position) for reader in after)

    def _adds(self, node: onnx.NodeProto, name: str) -> bool:
        return node.op_type == "Add" and name in node.input

    def distances(self, node: onnx.NodeProto, opset: int) -> bool:
        """Row = a function of key position - query position: list it for every distance."""
        index, limit = self._index(node), self.limit
        if index is None or limit is None or self.axes.static("length") is not None:
            return False
        sizes = self.axes.sizes["length"]
        if any(ids.shape[-2:] != (size, size) for ids, size in zip(index, sizes)):
            return False
        whole = evaluate(self.graph, node.input[1], self._ones(limit), opset).reshape(
            -1, limit, limit
        )[0]
        rows = np.concatenate([whole[:0:-1, 0], whole[0]])
        places = np.arange(limit)
        if (rows[places[None] - places[:, None] + limit - 1] != whole).any():
            return False
        across = self._places(0, limit)
        down = self.graph.add("Transpose", [across], perm=[1, 0])
        distance = self.graph.add("Sub", [across, down])
        last = self.graph.constant(np.asarray(limit - 1, np.int64))
        row = self.graph.add("Add", [distance, last])
        if index[0].ndim == 3:
            row = self.graph.add("Unsqueeze", [row, self.graph.integers(0)])
        table = self.graph.array(node.input[0])[rows]
        node.input[:] = [self.graph.constant(table, "distances"), row]
        return True

    def sliced(self, node: onnx.NodeProto, opset: int) -> None:
        """Limit the length by the rows of a table that is cut to it."""
        sizes, table = self.probes.sizes(node.output[0]), self.graph.shape(node.input[0])
        if sizes is None or not self.graph.is_float(node.input[0]):
            return
        lengths = tuple(int(size) for size in self.axes.sizes["length"])
        for axis in (axis for axis, size in enumerate(sizes) if size == lengths):
            feed = self._ones(table[axis])
            longest = evaluated(self.graph, node.output[0], feed, opset)
            if longest is not None:
                self._limit(longest.shape[axis])

    def _ones(self, length: int) -> dict[str, np.ndarray]:
        """A request of one sequence, or as many as the batch has, where all there is is 1."""
        feed, batch = self.probes.feeds[0], self.axes.static("batch") or 1
        return {name: np.ones((batch, length), array.dtype) for name, array in feed.items()}

    def tried(self, node: onnx.NodeProto, opset: int) -> None:
        """Limit the length by trying how long a sequence keeps an index within its table.

        Lengths double until one does not, or the index has too many elements to go on: one by pairs
        of places grows with their square.
        """
        rows = self.graph.shape(node.input[0])[0]
        if self.axes.static("length") is not None or self.graph.is_constant(node.input[1]):
            return

        def elements(length: int) -> int | None:
            """How many the index has; None where one of them is outside of the table."""
            index = evaluated(self.graph, node.input[1], self._ones(length), opset)
            fits = index is not None and bool((index < rows).all() and (index >= -rows).all())
            return index.size if fits else None

        fine, size = 1, elements(1)
        while size is not None:
            if fine >= LONGEST or size > MOST:
                return
            fine, size = 2 * fine, elements(2 * fine)
        fine, wrong = fine // 2, fine
        while wrong - fine > 1:
            middle = (fine + wrong) // 2
            fine, wrong = (middle, wrong) if elements(middle) else (fine, middle)
        if fine:
            self._limit(fine)
