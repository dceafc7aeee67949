"""Masks, positions and shapes in an exporter's spelling come in; Bertile's one spelling goes out.

Nothing is matched by its spelling: a tensor is judged by its values over several random batches.

    Where(And(GatherND(Cast(mask), …)), 0, -inf)   →  (1 - Cast(mask)[:, None, None, :]) * -10000
    Gather(table, Slice(…) | Range(…) | Expand(…)) →  Gather(table, Slice(0 … max, 0, length))
    Reshape(x, Concat(Shape(x)[0], …, -1, 64))     →  Reshape(x, [0, 0, 2, 64])
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from bertile.onnx_graph import OnnxGraph, attributes
from bertile.onnx_rewrites import merge_transposes, write_reshapes
from bertile.probing import Probes, evaluate, merge

MASKED = -10000.0
FOLD_LIMIT = 65536  # elements; larger results of a computation stay computed


@dataclass
class Canonical:
    """One pass over a graph; the values that its tensors had are in `probes`."""

    graph: OnnxGraph
    probes: Probes
    opset: int
    max_length: int | None = None
    notes: list[str] = field(default_factory=list)
    _mask: str | None = None
    _made: dict[str, str] = field(default_factory=dict)

    def rewrite(self) -> None:
        """Rewrite lookups, masks, shapes and constants, in the order that each needs."""
        self.lookups()
        self.graph.clean()
        self.masks()
        self.graph.clean()
        merge_transposes(self.graph, self.probes.sizes)
        write_reshapes(self.graph, self.probes.sizes)
        self.constants()
        self.graph.clean()
        self.shapes()
        self.graph.clean()

    # Embedding lookups

    def lookups(self) -> None:
        """Give every position lookup its canonical index, and drop constant token types."""
        inputs = {one.name for one in self.graph.inputs}
        positions: list[onnx.NodeProto] = []
        rows: list[onnx.NodeProto] = []
        distances: list[onnx.NodeProto] = []
        for node in list(self.graph.nodes):
            if not is_lookup(self.graph, node) or source_input(self.graph, node.input[1]) in inputs:
                continue
            index = self._index(node.input[1])
            if index is None:
                continue
            if not any(one.any() for one in index):
                rows.append(node)
            elif self._counted(node, index) or self._after_padding(node, index):
                positions.append(node)
            elif not self.graph.is_constant(node.input[1]):
                distances.append(node)
        for node in rows:
            self._constant_row(node, positions)
        for node in distances:
            self._by_distance(node)

    def _index(self, name: str) -> list[np.ndarray] | None:
        if self.graph.is_constant(name):
            return [self.graph.array(name)] * len(self.probes.feeds)
        return self.probes.of(name)

    def _counted(self, node: onnx.NodeProto, index: list[np.ndarray]) -> bool:
        """Position = place in the sequence + offset."""
        offset = int(index[0].reshape(-1)[0])
        for feed, value in zip(self.probes.feeds, index):
            want = np.arange(feed["input_ids"].shape[1]) + offset
            if value.shape[-1:] != want.shape or not (value == want).all():
                return False
        rows = self.graph.shape(node.input[0])[0]
        self._limit(rows - offset)
        node.input[1] = self._places(offset, rows)
        return True

    def _places(self, offset: int, rows: int) -> str:
        table = np.arange(offset, rows, dtype=np.int64)[None]
        length = merge(one["input_ids"].shape[1] for one in self.probes.feeds)
        if isinstance(length, int):
            return self.graph.constant(table[:, :length], "positions")
        vector = [self.graph.constant(np.asarray([one], np.int64)) for one in (0, 1, 1)]
        slicing = [vector[0], self._length(), vector[1], vector[2]]
        return self.graph.add("Slice", [self.graph.constant(table, "positions"), *slicing])

    def _after_padding(self, node: onnx.NodeProto, index: list[np.ndarray]) -> bool:
        """Position = count of real tokens so far + padding id; RoBERTa's and MPNet's."""
        padding = int(min(one.min() for one in index))
        for feed, value in zip(self.probes.feeds, index):
            real = (feed["input_ids"] != padding).astype(np.int64)
            want = np.cumsum(real, axis=1) * real + padding
            if value.shape != want.shape or not (value == want).all():
                return False
        add, number = self.graph.add, self.graph.constant
        dtype = self.probes.feeds[0]["input_ids"].dtype
        same = add("Equal", ["input_ids", number(np.asarray(padding, dtype))])
        real = add("Cast", [add("Not", [same])], to=onnx.TensorProto.INT64)
        count = add("CumSum", [real, number(np.asarray(1, np.int64))])
        kept = add("Mul", [count, real])
        node.input[1] = add("Add", [kept, number(np.asarray(padding, np.int64))])
        self._limit(self.graph.shape(node.input[0])[0] - padding - 1)
        return True

    def _by_distance(self, node: onnx.NodeProto) -> None:
        """Row = a function of key position - query position: list it for every distance."""
        limit, index = self.max_length, self.probes.of(node.input[1])
        lengths = [length for _, length in self._shapes()]
        square = all(one.shape[-2:] == (size, size) for one, size in zip(index, lengths))
        if limit is None or not square or dependence(self.graph)[node.input[1]] != "shape":
            return
        feed = {name: np.ones((1, limit), one.dtype) for name, one in self.probes.feeds[0].items()}
        whole = evaluate(self.graph, node.input[1], feed, self.opset)
        if whole.size != limit * limit:
            return
        whole = whole.reshape(limit, limit)
        rows = np.concatenate([whole[:0:-1, 0], whole[0]])
        places = np.arange(limit)
        if (rows[places[None] - places[:, None] + limit - 1] != whole).any():
            return
        across = self._places(0, limit)
        down = self.graph.add("Transpose", [across], perm=[1, 0])
        distance = self.graph.add("Sub", [across, down])
        last = self.graph.constant(np.asarray(limit - 1, np.int64))
        made = self.graph.add("Add", [distance, last])
        if index[0].ndim == 3:
            made = self.graph.add("Unsqueeze", [made, self.graph.constant(np.zeros(1, np.int64))])
        table = self.graph.array(node.input[0])[rows]
        node.input[:] = [self.graph.constant(table, "distances"), made]

    def _limit(self, positions: int) -> None:
        self.max_length = min(self.max_length or positions, positions)

    def _constant_row(self, node: onnx.NodeProto, positions: list[onnx.NodeProto]) -> None:
        """Row 0 is the only one ever looked up: add it to the positions, or make it a constant."""
        row = self.graph.array(node.input[0])[0]
        adds = [one for one in self.graph.nodes if node.output[0] in one.input]
        if len(adds) == 1 and adds[0].op_type == "Add" and len(positions) == 1:
            other = next((name for name in adds[0].input if name != node.output[0]), None)
            if other is not None and self._summed(adds[0], other, positions[0].output[0]):
                table = self.graph.array(positions[0].input[0])
                positions[0].input[0] = self.graph.constant(table + row, "positions")
                self.graph.replace(adds[0].output[0], other)
                return
        constant = self.graph.constant(np.ascontiguousarray(row[None, None]), "token_type")
        self.graph.replace(node.output[0], constant)

    def _summed(self, add: onnx.NodeProto, other: str, position: str) -> bool:
        """Say whether `position` is added just before or just after `add`."""
        before = self.graph.producers().get(other)
        if before is not None and before.op_type == "Add" and position in before.input:
            return True
        after = self.graph.consumers().get(add.output[0], [])
        return all(one.op_type == "Add" and position in one.input for one in after) and bool(after)

    # Attention masks

    def masks(self) -> None:
        """Replace what is added to the scores before each softmax by the one canonical mask."""
        kinds = dependence(self.graph)
        producers = self.graph.producers()
        for node in [one for one in self.graph.nodes if one.op_type == "Softmax"]:
            name = node.input[0]
            while name in producers:
                name = self._unmask(producers[name], kinds)

    def _unmask(self, node: onnx.NodeProto, kinds: dict[str, str]) -> str:
        """Look at one step before a softmax; return the tensor to look at next, "" to stop."""
        if node.op_type == "Add":
            light = [name for name in node.input if kinds.get(name) != "heavy"]
            heavy = [name for name in node.input if kinds.get(name) == "heavy"]
            if len(light) == 1:
                self._replace_mask(node, light[0], heavy[0], self.probes.of(light[0]))
                return heavy[0]
            return heavy[0] if heavy else ""
        if node.op_type == "Where" and kinds.get(node.input[0]) != "heavy":
            heavy = [name for name in node.input[1:] if kinds.get(name) == "heavy"]
            if len(heavy) == 1:
                self._replace_mask(node, node.input[0], heavy[0], self._chosen(node, heavy[0]))
                return heavy[0]
        return ""

    def _chosen(self, node: onnx.NodeProto, scores: str) -> list[np.ndarray] | None:
        """Return what a Where does to the scores as numbers to be added."""
        condition = self.probes.of(node.input[0])
        other = next(name for name in node.input[1:] if name != scores)
        if condition is None or not self.graph.is_constant(other):
            return None
        fill = self.graph.array(other).astype(np.float64)
        keep = node.input[1] == scores
        return [np.where(one == keep, 0.0, fill) for one in condition]

    def _replace_mask(
        self, node: onnx.NodeProto, mask: str, scores: str, values: list[np.ndarray] | None
    ) -> None:
        if values is None:
            return
        if not any(one.any() for one in values):
            self.graph.replace(node.output[0], scores)
        elif self._by_key(values):
            self._mask = self._mask or self._new_mask()
            node.CopyFrom(onnx.helper.make_node("Add", [scores, self._mask], list(node.output)))
        elif mask not in self.notes and any((one <= -1e3).any() for one in values):
            self.notes.append(mask)

    def _by_key(self, values: list[np.ndarray]) -> bool:
        """Say whether each value is 0 at real keys and very negative at padded ones."""
        for feed, value in zip(self.probes.feeds, values):
            if "attention_mask" not in feed or value.ndim > 4:
                return False
            mask = feed["attention_mask"]
            batch, length = mask.shape
            try:
                shape = (batch, *np.broadcast_shapes(value.shape, (batch, 1, 1, length))[1:])
                whole = np.broadcast_to(value, shape)
            except ValueError:
                return False
            real = np.broadcast_to(mask[:, None, None, :] == 1, shape)
            if (whole[real] != 0).any() or not (whole[~real] <= -1e3).all():
                return False
        return any((feed["attention_mask"] == 0).any() for feed in self.probes.feeds)

    def _new_mask(self) -> str:
        add, number = self.graph.add, self.graph.constant
        mask = add("Cast", ["attention_mask"], to=onnx.TensorProto.FLOAT)
        wide = add("Unsqueeze", [mask, number(np.asarray([1, 2], np.int64))])
        padded = add("Sub", [number(np.asarray(1.0, np.float32)), wide])
        return add("Mul", [padded, number(np.asarray(MASKED, np.float32))])

    # Shapes and constants

    def constants(self) -> None:
        """Fold what depends on no input's values and came out the same for every shape."""
        kinds = dependence(self.graph)
        for node in self.graph.nodes:
            if is_lookup(self.graph, node) or kinds[node.output[0]] not in ("constant", "shape"):
                continue
            for name in node.output:
                value = self.probes.constant(name) if name else None
                weights = kinds[node.output[0]] == "constant"
                if value is not None and (value.size <= FOLD_LIMIT or weights):
                    self.graph.replace(name, self.graph.constant(value, "folded"))

    def shapes(self) -> None:
        """Build each small vector or number of sizes from the input's batch and length."""
        kinds = dependence(self.graph)
        small = {
            name
            for name, kind in kinds.items()
            if kind == "shape" and not name.startswith("bertile.") and self._is_small(name)
        }
        for node in list(self.graph.nodes):
            if node.output[0] in small:
                continue
            for name in set(node.input) & small:
                made = self._made.get(name) or self._sizes(name)
                if made is not None:
                    self._made[name] = made
                    node.input[:] = [made if one == name else one for one in node.input]

    def _is_small(self, name: str) -> bool:
        values = self.probes.of(name)
        if values is None or values[0].dtype.kind != "i" or values[0].dtype.itemsize != 8:
            return False
        return all(one.ndim < 2 and one.shape == values[0].shape for one in values)

    def _sizes(self, name: str) -> str | None:
        values = self.probes.of(name)
        parts = [self._size(merge(column)) for column in zip(*(one.reshape(-1) for one in values))]
        if not parts or any(one is None for one in parts):
            return None
        if values[0].ndim == 0:
            return self.graph.add("Squeeze", [parts[0], self.graph.constant(np.zeros(1, np.int64))])
        return parts[0] if len(parts) == 1 else self.graph.add("Concat", parts, axis=0)

    def _size(self, value: object) -> str | None:
        if isinstance(value, int):
            return self.graph.constant(np.asarray([value], np.int64))
        batch, length = (np.asarray(one) for one in zip(*self._shapes()))
        for base, make in (
            (length, self._length),
            (batch, self._batch),
            (batch * length, self._tokens),
        ):
            if (base == base[0]).all():
                continue
            found = np.asarray(value)
            factor = (found[1] - found[0]) / (base[1] - base[0]) if base[1] != base[0] else 0
            rest = found[0] - factor * base[0]
            if factor == int(factor) and factor and (found == factor * base + rest).all():
                return self._scaled(make(), int(factor), int(rest))
        return None

    def _scaled(self, base: str, factor: int, rest: int) -> str:
        for op, number, neutral in (("Mul", factor, 1), ("Add", rest, 0)):
            if number != neutral:
                base = self.graph.add(op, [base, self.graph.constant(np.asarray([number]))])
        return base

    def _shapes(self) -> list[tuple[int, int]]:
        return [feed["input_ids"].shape for feed in self.probes.feeds]

    def _batch(self) -> str:
        return self._axis("batch", 0)

    def _length(self) -> str:
        return self._axis("length", 1)

    def _tokens(self) -> str:
        return self.graph.add("Mul", [self._batch(), self._length()])

    def _axis(self, name: str, axis: int) -> str:
        if name not in self._made:
            made = self.graph.add("Shape", ["input_ids"], start=axis, end=axis + 1)
            self._made[name] = made
        return self._made[name]


def is_lookup(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Say whether a node gathers rows of a table of floats."""
    if node.op_type != "Gather" or attributes(node).get("axis", 0) != 0:
        return False
    table = node.input[0]
    return graph.is_constant(table) and len(graph.shape(table)) == 2 and graph.is_float(table)


def source_input(graph: OnnxGraph, name: str) -> str:
    """Follow casts back from a tensor; the name it ends at may be a graph input's."""
    producers = graph.producers()
    while name in producers and producers[name].op_type in ("Cast", "Identity"):
        name = producers[name].input[0]
    return name


def dependence(graph: OnnxGraph) -> dict[str, str]:
    """Say what each tensor depends on; each kind includes those before it.

    "constant": initializers alone; "shape": also the inputs' shapes; "light": also their values;
    "heavy": both values of an input and a weight, that is a float constant of two axes or more.
    """
    order = ("constant", "shape", "light", "heavy")
    kinds = {one.name: "light" for one in graph.inputs}
    for node in graph.nodes:
        if node.op_type in ("Shape", "Size"):
            kind = "constant" if kinds.get(node.input[0], "constant") == "constant" else "shape"
        else:
            read = [name for name in node.input if name]
            kind = max((kinds.get(name, "constant") for name in read), key=order.index, default="constant")
            if kind == "light" and any(_is_weight(graph, name) for name in read):
                kind = "heavy"
        kinds.update(dict.fromkeys(node.output, kind))
    return kinds


def _is_weight(graph: OnnxGraph, name: str) -> bool:
    return graph.is_constant(name) and graph.is_float(name) and len(graph.shape(name)) > 1
