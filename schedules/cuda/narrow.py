"""Narrows activations to unsigned bytes, which a layer in int8 reads: q = round((x smooth - low) /
scale).

    x (rows, pitch(C)), [smooth (C)], [limits (2)]  →  q u8 (rows, pitch(C)), [range (rows, 2)]

``kind`` "int8" finds the range of each row and writes its (scale, low), "int8_static" is given one
for all of them as ``limits``: low, and steps per unit. Kernels that normalise write the same beside
their result (``layer_norm``, ``embedding``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cuda import row_kernel
from bertile.schedules.cuda.forms import (
    ROUNDING,
    element,
    empty_rows,
    from_rows,
    symbols,
    to_rows,
)
from bertile.schedules.cuda.row_kernel import Narrow, padded
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.reference import LEVELS, byte_limits
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task

STATIC = (-5.0, 5.0)  # the range of a sample's values


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(x, [smooth], [limits], q, [range])."""
    made_for = Narrow.of(task)
    kinds = {"q": "u8", "range": "float"}
    parameters = [
        (f"const {element(task)}", "source"),
        *(("const float", name) for name in made_for.inputs),
        *((kinds[name], name) for name in made_for.results),
    ]
    load = "row.load<X>(source + static_cast<long long>(row.row) * PITCH, x);"
    body = f"  {load}\n  {made_for.call}"
    return row_kernel.row_kernel(task, knobs, parameters, [], "", body)


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """``smooth`` padded to the pitch."""
    return padded(weights, int(task.shape["channels"]))


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Values off centre, whose ranges differ between rows."""
    channels = int(task.shape["channels"])
    weights = sample_weights(task, rng)
    x = rng.standard_normal((blocks * BLOCK_TOKENS, channels))
    x = x * rng.uniform(0.1, 2.0, (len(x), 1)) + 0.3
    stored = to_rows(x, element(task))
    return narrow_sample(task, [stored], weights, from_rows(stored, channels), symbols(len(x)))


def sample_weights(task: Task, rng: np.random.Generator) -> list[np.ndarray]:
    """Values of ``smooth`` and ``limits``, where the task has them."""
    weights = []
    if task.shape.get("smooth"):
        weights.append(rng.uniform(0.5, 2.0, int(task.shape["channels"])).astype("float32"))
    if task.shape.get("kind") == "int8_static":
        weights.append(byte_limits(*STATIC))
    return weights


def narrow_sample(
    task: Task,
    activations: list[np.ndarray],
    weights: list[np.ndarray],
    values: np.ndarray,
    of: dict[str, int],
    wide: bool = False,
) -> Sample:
    """The sample of a kernel that writes ``values`` (rows, C): as they are if ``wide``, and in the
    task's narrow form if it has one.
    """
    kind, (rows, channels) = str(task.shape.get("kind", "")), values.shape
    values = values.astype("float32")
    expected = [values] if wide else []
    results = [empty_rows(rows, channels, element(task))] if wide else []
    largest, rounding = max(1.0, float(np.abs(values).max())), 0.0
    if kind:
        smooth = weights[-2 if kind == "int8_static" else -1] if task.shape.get("smooth") else 1.0
        low, high = STATIC
        narrowed = values * smooth
        narrowed = np.clip(narrowed, low, high) if kind == "int8_static" else narrowed
        spread = float((narrowed.max(1) - narrowed.min(1)).max())
        largest = max(largest if wide else 1.0, float(np.abs(narrowed).max()))
        rounding = 0.51 * (spread if kind == "int8" else high - low) / LEVELS / largest
        expected.append(narrowed)
        results.append(empty_rows(rows, channels, "u8"))
        if kind == "int8":
            results.append(np.zeros((rows, 2), "float32"))

    def decode(buffers: list[np.ndarray]) -> np.ndarray:
        decoded = [from_rows(buffers[0], channels)] if wide else []
        if kind == "int8":
            q, range_ = buffers[-2:]
            decoded.append(range_[:, 1:] + range_[:, :1] * from_rows(q, channels))
        elif kind:
            step = np.float32((high - low) / LEVELS)
            decoded.append(np.float32(low) + step * from_rows(buffers[-1], channels))
        return np.stack(decoded)

    tolerance = rounding + (2 * ROUNDING[element(task)] if wide else 0.0) + 1e-5
    return Sample(activations, weights, np.stack(expected), results, decode, tolerance, of)


def flops(task: Task, tokens: int) -> float:
    """Four per value: smallest, largest, difference, product; packing is not counted."""
    return 4.0 * tokens * task.shape["channels"]


narrow = Schedule("narrow", row_kernel.space, row_kernel.default, kernel, sample, flops, pack)
