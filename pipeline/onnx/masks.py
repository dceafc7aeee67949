"""What any exporter adds to the scores before a softmax comes in; one mask for all goes out.

    Where(And(GatherND(Cast(mask), …)), 0, -inf)  →  (1 - Cast(mask)[:, None, None, :]) * -10000
    Where(mask == 0, -inf, scores)                →  scores + the same

A tensor is judged by its values over several random masks, not by how it is written.
"""

from __future__ import annotations

import numpy as np
import onnx

from bertile.onnx.dependence import dependence
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import Probes

MASKED = -10000.0  # as in the exporter: exp() of it is 0 in float32, and float16 can hold it
CLOSED = -1e3  # what another exporter's mask must reach at padded keys
SCALED = -500.0  # what ours must still be where the sum of scores and mask is scaled


def write_masks(graph: OnnxGraph, probes: Probes) -> tuple[str, ...]:
    """Replace every mask that depends on the keys alone; return the names of those kept."""
    masks = _Masks(graph, probes)
    kinds, producers = dependence(graph), graph.producers()
    for softmax in [one for one in graph.nodes if one.op_type == "Softmax"]:
        name = softmax.input[0]
        while name in producers:
            name = masks.step(producers[name], kinds)
    graph.clean()
    return tuple(masks.kept)


class _Masks:
    def __init__(self, graph: OnnxGraph, probes: Probes):
        self.graph, self.probes = graph, probes
        self.kept: dict[str, None] = {}
        self._mask: str | None = None

    def step(self, node: onnx.NodeProto, kinds: dict[str, str]) -> str:
        """Look at one node before a softmax; return the tensor to look at next, "" to stop."""
        light = [name for name in node.input if kinds.get(name) != "heavy"]
        heavy = [name for name in node.input if kinds.get(name) == "heavy"]
        if node.op_type == "Add" and len(light) == 1:
            self._replace(node, light[0], heavy[0], self._values(light[0]))
        elif node.op_type == "Where" and len(heavy) == 1 and node.input[0] in light:
            self._replace(node, node.input[0], heavy[0], self._chosen(node, heavy[0]))
        elif node.op_type != "Add" and not self._scales(node, light):
            return ""
        return heavy[0] if heavy else ""

    def _scales(self, node: onnx.NodeProto, light: list[str]) -> bool:
        """Say whether scores are scaled behind their mask, and the mask stays a mask."""
        if node.op_type not in ("Mul", "Div") or len(light) != 1 or light[0] == node.input[0]:
            return False
        if not self.graph.is_constant(light[0]) or self.graph.array(light[0]).size != 1:
            return False
        number = float(self.graph.array(light[0]).item())
        factor = number if node.op_type == "Mul" else 1 / number if number else 0.0
        return MASKED * factor <= SCALED

    def _values(self, name: str) -> list[np.ndarray] | None:
        if self.graph.is_constant(name):
            return [self.graph.array(name)] * len(self.probes.feeds)
        return self.probes.of(name)

    def _chosen(self, node: onnx.NodeProto, scores: str) -> list[np.ndarray] | None:
        """Return what a Where does to the scores as numbers to be added."""
        condition = self._values(node.input[0])
        other = next(name for name in node.input[1:] if name != scores)
        if condition is None or not self.graph.is_constant(other):
            return None
        fill = self.graph.array(other).astype(np.float64)
        keep = node.input[1] == scores
        return [np.where(one == keep, 0.0, fill) for one in condition]

    def _replace(
        self, node: onnx.NodeProto, mask: str, scores: str, values: list[np.ndarray] | None
    ) -> None:
        if values is not None and not any(one.any() for one in values):
            self.graph.replace(node.output[0], scores)
        elif values is not None and self._is_by_key(values):
            self._mask = self._mask or self._canonical()
            node.CopyFrom(onnx.helper.make_node("Add", [scores, self._mask], list(node.output)))
        elif values is None or any((one <= CLOSED).any() for one in values):
            self.kept[mask] = None

    def _is_by_key(self, values: list[np.ndarray]) -> bool:
        """Say whether each value is 0 at real keys and very negative at padded ones."""
        masks = [feed.get("attention_mask") for feed in self.probes.feeds]
        if any(mask is None for mask in masks) or all(mask.all() for mask in masks):
            return False
        for mask, value in zip(masks, values):
            real = mask[:, None, None, :] != 0
            try:
                value, real = np.broadcast_arrays(value, real)
            except ValueError:
                return False
            if (value[real] != 0).any() or not (value[~real] <= CLOSED).all():
                return False
        return True

    def _canonical(self) -> str:
        mask = self.graph.add("Cast", ["attention_mask"], to=onnx.TensorProto.FLOAT)
        keys = self.graph.add("Unsqueeze", [mask, self.graph.integers(1, 2)])
        padded = self.graph.add("Sub", [self.graph.number(1.0), keys])
        return self.graph.add("Mul", [padded, self.graph.number(MASKED)])
