"""Replaces arithmetic on shapes, in any spelling, by Shape(input_ids) and constants.

    Concat(Shape(Transpose(x))[0], -1, …)  →  Concat(Shape(input_ids)[0], 12, …)
    Sqrt(Cast(Shape(q)[3]))                →  8.0

What a tensor means is judged by its values over several random batches.
"""

from __future__ import annotations

import numpy as np

from bertile.onnx.dependence import dependence, is_lookup
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import Probes, merge

FOLD_LIMIT = 65536  # elements; a larger result that varies with no shape stays computed


class Axes:
    """The batch and length of `input_ids` as tensors of the graph, each made at most once."""

    def __init__(self, graph: OnnxGraph, probes: Probes):
        self.graph = graph
        shapes = [feed["input_ids"].shape for feed in probes.feeds]
        self.sizes = {
            "batch": np.asarray([batch for batch, _ in shapes]),
            "length": np.asarray([length for _, length in shapes]),
        }
        self._vectors: dict[str, str] = {}

    def tensor(self, name: str) -> str:
        """Return a vector of one element, the size of axis "batch" or "length"."""
        if name not in self._vectors:
            axis = list(self.sizes).index(name)
            vector = self.graph.add("Shape", ["input_ids"], start=axis, end=axis + 1)
            self._vectors[name] = vector
        return self._vectors[name]

    def static(self, name: str) -> int | None:
        """Return the size of an axis that does not vary."""
        size = merge(self.sizes[name])
        return size if isinstance(size, int) else None

    def expression(self, size: object) -> str | None:
        """Return a vector of one element that has this size, an int or one int for each probe."""
        if isinstance(size, int):
            return self.graph.integers(size)
        batch, length = self.sizes["batch"], self.sizes["length"]
        for names, base in (
            (("length",), length),
            (("batch",), batch),
            (("batch", "length"), batch * length),
        ):
            line = _line(base, np.asarray(size))
            if line is not None and all(self.static(name) is None for name in names):
                return self._scaled(names, *line)
        return None

    def _scaled(self, names: tuple[str, ...], factor: int, rest: int) -> str:
        """The product of these axes, times a number plus another, as a vector of one element.

        TVM's importer knows the size of a tensor, but no arithmetic on it. So what is not an axis
        itself is the size of a tensor made for that, of which nothing is left in a bundle. One that
        cannot be made so stays arithmetic.
        """
        if len(names) == 1 and (factor, rest) == (1, 0):
            return self.tensor(names[0])
        add, integers = self.graph.add, self.graph.integers
        if factor < 1 or rest < 0:
            tensors = [self.tensor(name) for name in names]
            base = tensors[0] if len(tensors) == 1 else add("Mul", tensors)
            for op, number, neutral in (("Mul", factor, 1), ("Add", rest, 0)):
                base = add(op, [base, integers(number)]) if number != neutral else base
            return base
        whole, rank, axis = "input_ids", 2, int(names == ("length",))
        if len(names) == 2:
            whole, rank = add("Reshape", [whole, integers(-1)]), 1
        if factor > 1:
            whole = add(
                "Tile", [whole, integers(*(factor if i == axis else 1 for i in range(rank)))]
            )
        if rest:
            ends = integers(*(rest if i == rank + axis else 0 for i in range(2 * rank)))
            whole = add("Pad", [whole, ends])
        return add("Shape", [whole], start=axis, end=axis + 1)


def fold_constants(graph: OnnxGraph, probes: Probes) -> None:
    """Replace what depends on no input's values and came out the same for every shape."""
    kinds = dependence(graph)
    for node in graph.nodes:
        kind = kinds[node.output[0]]
        # A table of positions with static axes stays a lookup, as it is with dynamic ones.
        if is_lookup(graph, node) or kind not in ("constant", "shape"):
            continue
        for name in node.output:
            value = probes.constant(name) if name else None
            if value is not None and (value.size <= FOLD_LIMIT or kind == "constant"):
                graph.replace(name, graph.constant(value, "folded"))
    graph.clean()


def write_shapes(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Build each vector or number of sizes anew from the input's batch and length."""
    kinds = dependence(graph)
    known = {name for name, kind in kinds.items() if kind == "shape" and _is_small(name, probes)}
    rebuilt: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.output[0] in known:
            continue
        for name in set(node.input) & known:
            new = rebuilt.get(name) or _rebuilt(name, probes, axes)
            if new is not None:
                rebuilt[name] = new
                node.input[:] = [new if source == name else source for source in node.input]
    graph.clean()


def _line(base: np.ndarray, values: np.ndarray) -> tuple[int, int] | None:
    """Return the integers with `values` = factor * base + rest, None where there are none."""
    other = next((i for i in range(1, len(base)) if base[i] != base[0]), None)
    if other is None:
        return None
    factor, left = divmod(int(values[other] - values[0]), int(base[other] - base[0]))
    rest = int(values[0] - factor * base[0])
    fits = left == 0 and factor != 0 and (values == factor * base + rest).all()
    return (factor, rest) if fits else None


def _is_small(name: str, probes: Probes) -> bool:
    values = probes.of(name)
    if values is None or values[0].dtype != np.int64:
        return False
    return all(value.ndim < 2 and value.shape == values[0].shape for value in values)


def _rebuilt(name: str, probes: Probes, axes: Axes) -> str | None:
    values = probes.of(name)
    parts = [axes.expression(merge(column)) for column in zip(*(value.flat for value in values))]
    if not parts or None in parts:
        return None
    if values[0].ndim == 0:
        return axes.graph.add("Squeeze", [parts[0], axes.graph.integers(0)])
    return parts[0] if len(parts) == 1 else axes.graph.add("Concat", parts, axis=0)
