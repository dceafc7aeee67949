"""Says how far rounding alone moves a model's outputs, by the scores before its softmaxes.

A score of 2000 is known to 0.0001 in float32 at best, and two programs that add up its products in
another order differ by several times that; the softmax makes a relative error of it. So what two
correct results may differ by grows with the scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.inputs import Fed
from bertile.onnx.probing import opened
from bertile.onnx.reader import read

USUAL = 100.0  # scores up to here come with the tolerances as they are
NEAR = 20.0  # below the largest of its row, a score has no weight that counts


def room(
    tolerance: float,
    difference: float,
    path: Path,
    feeds: Iterable[Mapping[str, np.ndarray]],
    rename: Iterable[str] = (),
) -> float:
    """Return how far results for these inputs of an ONNX file may be apart: the tolerance, and
    where the difference is beyond it, what it has grown to by the scores.
    """
    if difference <= tolerance:
        return tolerance
    return tolerance * rounding(path, feeds, rename)


def rounding(
    path: Path, feeds: Iterable[Mapping[str, np.ndarray]], rename: Iterable[str] = ()
) -> float:
    """Return by what to multiply a tolerance for these inputs of an ONNX file: 1 or more."""
    model, opset = read(path)
    graph = OnnxGraph(model)
    axes = dict(_scores(graph))
    if not axes:
        return 1.0
    largest = 0.0
    with opened(graph.to_model(opset, outputs=axes)) as runner:
        fed = Fed.of(runner, path, rename)
        for feed in feeds:
            for value, axis in zip(fed.run(list(axes), feed), axes.values()):
                largest = max(largest, _largest(value, axis))
    return max(1.0, largest / USUAL)


def _scores(graph: OnnxGraph) -> list[tuple[str, int]]:
    """The inputs of softmaxes whose results weigh something in a product, and their axes."""
    consumers = graph.consumers()
    inputs = []
    for node in graph.nodes:
        readers = consumers.get(node.output[0], [])
        if node.op_type == "Softmax" and any(
            reader.op_type in ("MatMul", "Einsum", "Where", "Cast", "Dropout") for reader in readers
        ):
            inputs.append((node.input[0], attributes(node).get("axis", -1)))
    return inputs


def _largest(scores: np.ndarray, axis: int) -> float:
    """The largest magnitude of scores that count, which those of masked keys do not."""
    scores = scores.astype(np.float64)
    counts = scores >= scores.max(axis=axis, keepdims=True) - NEAR
    values = np.abs(scores[counts & np.isfinite(scores) & (scores > -1e20)])
    return float(values.max(initial=0.0))
