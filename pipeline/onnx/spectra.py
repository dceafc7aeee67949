"""Writes discrete Fourier transforms as products by cosines and sines, which TVM's importer knows.

    DFT(x, axis)  →  stack(cos · re + sin · im, cos · im - sin · re)

Of an axis whose size varies the angles are computed of the places along it.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from bertile.base.errors import ModelError
from bertile.onnx.counts import Counts
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes
from bertile.onnx.shapes import Axes


def write_spectra(graph: OnnxGraph, probes: Probes, axes: Axes) -> None:
    """Rewrite each DFT over one of the last two axes, in place; ModelError for another."""
    counts = Counts(graph, axes)
    for node in [node for node in graph.nodes if node.op_type == "DFT"]:
        source, *rest = node.input
        options, sizes = attributes(node), probes.sizes(source)
        axis = options.get("axis", 1)
        if len(rest) > 1 and rest[1]:
            axis = int(graph.array(rest[1]).reshape(()))
        usual = not options.get("inverse") and not options.get("onesided") and not any(rest[:1])
        from_end = None if sizes is None else len(sizes) - axis % len(sizes)
        if not usual or from_end not in (2, 3):
            raise ModelError(
                f"operator DFT (node '{node.name or node.output[0]}') cannot be imported: it is"
                " inverse, one-sided, cut, or not over one of the last two axes"
            )
        cos, sin = _waves(graph, counts, probes, source, axis % len(sizes))
        parts = [_part(graph, source, place) for place in range(int(sizes[-1]))]
        of_cos, of_sin = (
            [graph.add("MatMul", [part, wave] if from_end == 2 else [wave, part]) for part in parts]
            for wave in (cos, sin)
        )
        real, imaginary = of_cos[0], graph.add("Neg", [of_sin[0]])
        if len(parts) == 2:
            real = graph.add("Add", [real, of_sin[1]])
            imaginary = graph.add("Add", [of_cos[1], imaginary])
        last = graph.integers(-1)
        stacked = [graph.add("Unsqueeze", [part, last]) for part in (real, imaginary)]
        graph.rewrite(node.output[0], "Concat", stacked, axis=-1)
    graph.clean()


def _part(graph: OnnxGraph, source: str, place: int) -> str:
    return graph.add("Gather", [source, graph.constant(np.asarray(place, np.int64))], axis=-1)


def _waves(
    graph: OnnxGraph, counts: Counts, probes: Probes, source: str, axis: int
) -> tuple[str, str]:
    """cos and sin of 2π · i · j / n, (n, n) along an axis of n."""
    sizes = [value.shape[axis] for value in probes.of(source)]
    if len(set(sizes)) == 1:
        places = np.arange(sizes[0])
        angles = 2 * math.pi * (np.outer(places, places) % sizes[0]) / sizes[0]
        cos, sin = (wave(angles).astype(np.float32) for wave in (np.cos, np.sin))
        return graph.constant(cos, "cosines"), graph.constant(sin, "sines")
    places = counts.write([np.arange(size) for size in sizes])
    count = counts.write([np.asarray(size) for size in sizes])
    if places is None or count is None:
        raise ModelError("operator DFT cannot be imported: what it is over is no axis of tokens")
    add, integers = graph.add, graph.integers
    pairs = add("Mul", [add("Unsqueeze", [places, integers(axis)]) for axis in (0, 1)])
    turns = [
        add("Cast", [n], to=onnx.TensorProto.FLOAT) for n in (add("Mod", [pairs, count]), count)
    ]
    angles = add("Mul", [add("Div", turns), graph.number(2 * math.pi)])
    return add("Cos", [angles]), add("Sin", [angles])
