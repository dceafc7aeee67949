"""Turns the angles of rotary positions, however they are computed, into a table cut to the length.

    Unsqueeze(Cos(Concat(Range(length) * frequencies, …)))      also: of a table of cosines
        →  Unsqueeze(Slice(table (1, positions, D), 0, length))

TVM knows no shape behind a Range whose end is dynamic, and a table costs nothing in a request. What
a tensor is, is judged by its values over the probes and in longer sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from bertile.onnx.dependence import dependence, is_lookup
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import Probes, evaluated
from bertile.onnx.shapes import Axes

POSITIONS = 8192  # of a model that has no limit of its own: it gets this one
LARGEST = 32768  # positions that a table may have
ANGLES = ("Sin", "Cos")


def write_place_tables(
    graph: OnnxGraph, probes: Probes, axes: Axes, limit: int | None, opset: int
) -> int | None:
    """Replace the angles of places by tables; return how many positions these have, None where
    there are none.
    """
    if axes.static("length") is not None:
        return None  # they are constants, which are folded
    positions = min(limit or POSITIONS, LARGEST)
    kinds, tables = dependence(graph), {}
    for node in list(graph.nodes):
        if kinds[node.output[0]] != "heavy":
            continue
        for name in dict.fromkeys(node.input):
            if kinds.get(name) != "shape":
                continue
            if name not in tables and _turns_heads(graph, probes, name):
                tables[name] = _table(graph, probes, axes, name, positions, opset)
            if tables.get(name):
                node.input[:] = [
                    tables[name] if source == name else source for source in node.input
                ]
    graph.clean()
    return positions if any(tables.values()) else None


def _turns_heads(graph: OnnxGraph, probes: Probes, name: str) -> bool:
    """Say whether a tensor is of angles, computed or looked up (RoFormer's, of four axes)."""
    if _has(graph, name, _is_angle):
        return True
    looked_up = _has(graph, name, lambda node: is_lookup(graph, node))
    return looked_up and len(probes.sizes(name) or ()) == 4


def _is_angle(node: onnx.NodeProto) -> bool:
    return node.op_type in ANGLES


def _has(graph: OnnxGraph, name: str, sought: Callable[[onnx.NodeProto], bool]) -> bool:
    """Say whether one of the operators that a tensor is computed by is sought."""
    producers, waiting, seen = graph.producers(), [name], set()
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        if sought(node):
            return True
        seen.add(node.output[0])
        if node.op_type not in ("Shape", "Size"):  # which tell nothing of how a tensor is computed
            waiting.extend(node.input)
    return False


def _table(
    graph: OnnxGraph, probes: Probes, axes: Axes, name: str, positions: int, opset: int
) -> str | None:
    """Return a tensor that is cut from a table and equals that of this name, None if none does."""
    values = probes.of(name)
    if values is None or values[0].dtype != np.float32 or values[0].ndim < 2:
        return None
    rank = values[0].ndim
    place = next((axis for axis in range(rank - 1) if _is_length(values, axis, axes)), None)
    if place is None:
        return None
    others = [axis for axis in range(rank - 1) if axis != place]
    batch = axes.static("batch") or 1
    feed = {key: np.ones((batch, positions), array.dtype) for key, array in probes.feeds[0].items()}
    whole = evaluated(graph, name, feed, opset)
    if whole is None or whole.ndim != rank:
        return None
    first = tuple(0 if axis in others else slice(None) for axis in range(rank))
    table = whole[first]  # (positions, D)
    if table.shape != (positions, values[0].shape[-1]) or not np.isfinite(table).all():
        return None
    for value in values:  # the same in all rows, and whatever the length is
        wanted = np.expand_dims(table[: value.shape[place]], others)
        if not np.allclose(value, wanted, rtol=0, atol=1e-6):
            return None
    whole = graph.constant(table[None], "places")
    zero, unit = graph.integers(0), graph.integers(1)
    cut = graph.add("Slice", [whole, zero, axes.tensor("length"), unit, unit])
    missing = [axis for axis in others if axis != (0 if place else rank)]
    if place == 0:
        cut = graph.add("Squeeze", [cut, zero])
    return graph.add("Unsqueeze", [cut, graph.integers(*missing)]) if missing else cut


def _is_length(values: list[np.ndarray], axis: int, axes: Axes) -> bool:
    return all(value.shape[axis] == size for value, size in zip(values, axes.sizes["length"]))
