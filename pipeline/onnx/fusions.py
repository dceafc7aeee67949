"""Fusions of what older opsets spell out: LayerNormalization (new in 17) and Gelu (new in 20).

Both are judged by the values that the arithmetic has, in whatever order it is written:

    (x - mean) / Sqrt(variance + eps) * gamma + beta
    x * scale + (beta - mean * scale), scale = gamma * Pow(variance + eps, -½)

Every public function changes the graph in place and is harmless where nothing matches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx

from bertile.onnx.arithmetic import ELEMENTWISE, ERF, REDUCTIONS, Arithmetic
from bertile.onnx.graph import OnnxGraph, Sizes

_POINTS = np.linspace(-4.0, 4.0, 33)
_INNER = math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3)
_GELU = {
    "none": _POINTS * 0.5 * (1 + ERF(_POINTS / math.sqrt(2))),
    "tanh": _POINTS * 0.5 * (1 + np.tanh(_INNER)),
}
_GATES = ("Erf", "Tanh", "Sigmoid")
# What may stand between the root of a variance and the end of a LayerNorm.
_AFFINE = ("Add", "Sub", "Mul", "Div", "Neg", "Reciprocal", "Identity", "Cast", "Unsqueeze")
_SMALL, _FAR = 1e-6, 1e6  # the variances of the rows that tell epsilon, and their ratio
_EXACT = 1e-6  # largest error of what is a LayerNorm, relative to its largest value


class _Norm(NamedTuple):
    """gamma (x - mean) / Sqrt(variance + epsilon) + beta of the last axis of x."""

    gamma: np.ndarray
    beta: np.ndarray
    epsilon: float

    def of(self, rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + self.epsilon) * self.gamma + self.beta


def fuse_layer_norms(graph: OnnxGraph, sizes: Sizes) -> None:
    """Any arithmetic around the root of a variance that equals a LayerNorm → LayerNormalization."""
    for root in [node for node in graph.nodes if _is_root(graph, node)]:
        arithmetic, consumers = Arithmetic(graph, sizes), graph.consumers()
        if root.output[0] not in arithmetic.producers:
            continue
        for source in _normalized_sources(arithmetic, root):
            channels = (sizes(source) or [None])[-1]
            if not isinstance(channels, int) or channels < 2:
                continue
            end, norm = _furthest(arithmetic, consumers, root, source, channels)
            if norm is not None:
                _write_norm(graph, arithmetic, source, end, norm)
                break
    graph.clean()


def _is_root(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether a node takes a square root, or one by it."""
    if node.op_type == "Pow":
        return graph.scalar(node.input[1]) in (0.5, -0.5)
    return node.op_type == "Sqrt"


def _normalized_sources(arithmetic: Arithmetic, root: onnx.NodeProto) -> list[str]:
    """Return the tensors whose last axis is reduced before `root`, the furthest first.

    They are few: a mean of x, and one of (x - mean)² or of x².
    """
    sources, queue, seen = [], [root], set()
    while queue and len(seen) < 32:
        node = queue.pop(0)
        if node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in REDUCTIONS:
            sources.append(node.input[0])
        before = (arithmetic.producers.get(name) for name in node.input)
        queue += [other for other in before if other and arithmetic.is_arithmetic(other)]
    # x itself is read by a Sub or Mul too, where only its square is reduced
    others = [name for source in sources for name in _factors(arithmetic, source)]
    return list(dict.fromkeys([*sources[::-1], *others]))


def _factors(arithmetic: Arithmetic, name: str) -> list[str]:
    node = arithmetic.producers.get(name)
    return list(node.input[:1]) if node is not None and node.op_type in ("Mul", "Pow") else []


def _furthest(
    arithmetic: Arithmetic,
    consumers: dict[str, list[onnx.NodeProto]],
    root: onnx.NodeProto,
    source: str,
    channels: int,
) -> tuple[str, _Norm | None]:
    """Return the last tensor behind `root` that is a LayerNorm of `source`, and which."""
    for end in _behind(consumers, root.output[0]):
        norm = _fitted(arithmetic, end, source, channels)
        if norm is None:
            continue
        while len(readers := consumers.get(end, [])) == 1 and readers[0].op_type in _AFFINE:
            further = _fitted(arithmetic, readers[0].output[0], source, channels)
            if further is None:
                break
            end, norm = readers[0].output[0], further
        return end, norm
    return "", None


def _behind(consumers: dict[str, list[onnx.NodeProto]], name: str) -> Iterator[str]:
    """The tensors behind one through arithmetic alone, the nearest first."""
    queue = [(name, 0)]
    while queue:
        name, steps = queue.pop(0)
        if steps:
            yield name
        for node in consumers.get(name, []) if steps < 6 else []:
            if node.op_type in _AFFINE and (node.output[0], steps + 1) not in queue:
                queue.append((node.output[0], steps + 1))


def _fitted(arithmetic: Arithmetic, end: str, source: str, channels: int) -> _Norm | None:
    """Return the LayerNorm that tensor `end` is of `source`, None if it is none."""
    random = np.random.default_rng(0)
    pairs = random.uniform(0.5, 1.5, channels // 2)
    centred = np.concatenate([pairs, -pairs, np.zeros(channels % 2)])
    if channels % 2:  # no zero, and the mean stays zero
        centred[[0, -1]] = centred[0] / 2
    small = centred * np.sqrt(_SMALL / (centred * centred).mean())
    large = small * np.sqrt(_FAR)
    others = random.normal(size=(4, channels)) * [[0.01], [1], [3], [30]] + [[0.1], [-2], [5], [1]]
    rows = np.concatenate([[small, -small, large, -large], others])
    values = arithmetic.value(end, source, rows)
    if values is None or values.shape != rows.shape or not np.isfinite(values).all():
        return None
    turned = [(values[place] - values[place + 1]) / 2 for place in (0, 2)]
    grown = float((turned[1] ** 2).sum() / max((turned[0] ** 2).sum(), 1e-300))
    if not 1 - 1e-9 <= grown < _FAR * (1 - 1e-9):
        return None
    epsilon = max(0.0, _FAR * _SMALL * (grown - 1) / (_FAR - grown))
    epsilon = _nearest_scalar(arithmetic, end, source, epsilon)
    gamma = turned[1] * np.sqrt(_FAR * _SMALL + epsilon) / large
    norm = _Norm(gamma, (values[2] + values[3]) / 2, epsilon)
    room = _EXACT * max(1e-30, float(np.abs(values).max()))
    return norm if np.abs(norm.of(rows) - values).max() <= room else None


def _nearest_scalar(arithmetic: Arithmetic, end: str, source: str, value: float) -> float:
    """Return the constant that a measured number is, where the graph has one that near."""
    for name in _constants(arithmetic, end, source):
        scalar = arithmetic.graph.scalar(name)
        if scalar is not None and abs(scalar - value) <= max(1e-3 * scalar, 1e-13):
            return scalar
    return value


def _constants(arithmetic: Arithmetic, end: str, source: str) -> list[str]:
    """The constants that a tensor is computed of, back to `source`."""
    constants, queue, seen = [], [end], {source}
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if arithmetic.graph.is_constant(name):
            constants.append(name)
        elif name in arithmetic.producers:
            queue.extend(arithmetic.producers[name].input)
    return constants


def _write_norm(
    graph: OnnxGraph, arithmetic: Arithmetic, source: str, end: str, norm: _Norm
) -> None:
    constants = _constants(arithmetic, end, source)
    weights = [
        _vector(graph, constants, value, hint)
        for value, hint in ((norm.gamma, "gamma"), (norm.beta, "beta"))
    ]
    options = {"axis": -1, "epsilon": norm.epsilon}
    graph.rewrite(end, "LayerNormalization", [source, *weights], **options)


def _vector(graph: OnnxGraph, constants: list[str], value: np.ndarray, hint: str) -> str:
    """Return the constant with this value, by its own name where the graph has it."""
    room = 1e-6 * max(1e-30, float(np.abs(value).max()))
    for name in constants:
        if graph.shape(name) == value.shape and np.abs(graph.array(name) - value).max() <= room:
            return name
    return graph.constant(value.astype(np.float32), hint)


def fuse_gelus(graph: OnnxGraph) -> None:
    """Any arithmetic around an Erf, Tanh or Sigmoid that equals GELU of one tensor → Gelu."""
    for start in [node for node in graph.nodes if node.op_type in _GATES]:
        arithmetic, consumers = Arithmetic(graph), graph.consumers()
        if start.output[0] not in arithmetic.producers:
            continue
        end = start
        for _ in range(5):
            end = next(iter(consumers.get(end.output[0], [])), None)
            if end is None or end.op_type not in ELEMENTWISE:
                break
            kind, source = _is_gelu(arithmetic, end, start)
            if kind is not None:
                graph.rewrite(end.output[0], "Gelu", [source], approximate=kind)
                break
    graph.clean()


def _is_gelu(
    arithmetic: Arithmetic, end: onnx.NodeProto, start: onnx.NodeProto
) -> tuple[str | None, str]:
    for source in _sources(arithmetic, start):
        value = arithmetic.value(end.output[0], source, _POINTS)
        for kind, want in _GELU.items():
            if value is not None and np.abs(value - want).max() < 2e-6:
                return kind, source
    return None, ""


def _sources(arithmetic: Arithmetic, start: onnx.NodeProto) -> list[str]:
    """Return the tensors before `start` through elementwise nodes, the nearest first."""
    sources, queue = [], list(start.input)
    while queue and len(sources) < 12:
        name = queue.pop(0)
        if arithmetic.graph.is_constant(name) or name in sources:
            continue
        sources.append(name)
        before = arithmetic.producers.get(name)
        if before is not None and before.op_type in ELEMENTWISE:
            queue.extend(before.input)
    return sources
