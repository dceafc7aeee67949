"""Draws trial operands of the matrix product in each precision; multiplies them by numpy."""

from __future__ import annotations

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cuda.dense_tile import Operands, rounded_tf32
from bertile.schedules.cuda.forms import ROUNDING, empty_rows, from_rows, symbols, to_rows
from bertile.schedules.outputs_that_meet import order
from bertile.schedules.reference import (
    LEVELS,
    angles,
    apply_activation,
    byte_limits,
    gated,
    rotary_heads,
)
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task

BYTES = (-4.0, 4.0)  # the range of bytes, read or written, where one serves all rows
EPILOGUE = 2e-5  # what sums and activations may be off by


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Random operands, scaled as in a trained network, and the product by numpy in float64."""
    return row_sample(task, blocks * BLOCK_TOKENS, rng)


def row_sample(task: Task, rows: int, rng: np.random.Generator) -> Sample:
    """A sample of any number of rows, as sequences are."""
    of = Operands.of(task)
    w = (rng.standard_normal((of.inputs, of.outputs)) * of.inputs**-0.5).astype("float32")
    b = rng.standard_normal(of.outputs).astype("float32")
    x = rng.standard_normal((rows, of.inputs)).astype("float32")
    activations, weights, product = _operands(of, x, w, b)
    finish = gated if of.gated else apply_activation
    expected = finish(str(task.shape["activation"]), product)
    if of.residual:
        residual = to_rows(rng.standard_normal((rows, of.outputs)), of.wide)
        activations.append(residual)
        expected = expected + from_rows(residual, of.outputs)
    if of.turned:
        turns = angles(rng.integers(0, 300, rows), of.head_size)
        activations += [to_rows(values, "float") for values in turns]
        expected = rotary_heads(expected, *turns, of.turned // of.head_size)
    results = [empty_rows(rows, of.channels, of.result)]
    tolerance = EPILOGUE
    if of.result == "u8":
        low, high = BYTES
        weights.append(byte_limits(low, high))
        step = (high - low) / LEVELS
        expected = np.clip(expected, low, high)
        tolerance += 0.51 * step / max(1.0, float(np.abs(expected).max()))
    else:
        low, step = 0.0, 1.0
        tolerance += ROUNDING[of.wide]

    def decode(buffers: list[np.ndarray]) -> np.ndarray:
        values = low + step * from_rows(buffers[0], of.channels)
        if of.turned:  # channels that were turned lie side by side
            values[:, order(task)] = values.copy()
        return values

    return Sample(activations, weights, expected, results, decode, tolerance, symbols(rows))


def _operands(
    of: Operands, x: np.ndarray, w: np.ndarray, b: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Activations and weights as the schedule has them, and x w + b of what they stand for."""
    if not of.precision.in_bytes:
        stored = to_rows(x, of.read)
        read = [from_rows(stored, of.inputs), from_rows(to_rows(w, of.read), of.outputs)]
        if of.precision.rounds:
            read = [rounded_tf32(values) for values in read]
        return [stored], [w, b], read[0].astype("float64") @ read[1] + b
    largest = np.abs(w).max(0)
    scale = np.where(largest > 0, largest, np.float32(1)) / 127
    q = np.rint(w / scale).astype("int8")
    if of.ranges:
        low = x.min(1, keepdims=True)
        step = (x.max(1, keepdims=True) - low) / np.float32(LEVELS)
        ranges = [np.ascontiguousarray(np.concatenate([step, low], 1))]
        vectors = [scale, (q.astype("float64").sum(0) * scale).astype("float32"), b]
    else:
        low, step = np.float32(BYTES[0]), np.float32((BYTES[1] - BYTES[0]) / LEVELS)
        ranges = []
        folded = low * (q.astype("float64") * scale).sum(0) + b
        vectors = [(scale * step).astype("float32"), folded.astype("float32")]
    stored = np.clip(np.rint((x - low) / step), 0, LEVELS).astype("uint8")
    values = np.float64(low) + np.float64(step) * stored
    padding = empty_rows(len(x), of.inputs, "u8")
    padding[:, : of.inputs] = stored
    return [padding, *ranges], [q, *vectors], values @ (q * scale.astype("float64")) + b
