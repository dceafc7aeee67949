"""Says what a kernel must give, in each form that a result can have."""

from __future__ import annotations

import numpy as np

from bertile.schedules import BLOCK_TOKENS, outputs_that_meet
from bertile.schedules.cpu import arithmetic, lanes
from bertile.schedules.reference import LEVELS, byte_limits
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task

BYTES = (-4.0, 4.0)  # the range of a result in bytes


def result_sample(
    task: Task,
    activations: list[np.ndarray],
    weights: list[np.ndarray],
    expected: np.ndarray,
    tolerance: float = 1e-4,
) -> Sample:
    """The sample of a kernel whose result (tokens, N) is ``writes`` of its task.

    ``tolerance`` is that of float32; a narrow form adds its own rounding.
    """
    writes = task.shape.get("writes", "to_fp32")
    if writes == "to_fp32":
        return Sample(activations, weights, lanes.to_lanes(expected), tolerance=tolerance)
    blocks, outputs = len(expected) // BLOCK_TOKENS, expected.shape[1]
    if writes == "to_bf16":
        split = int(task.shape.get("values_from", outputs))

        def decode(buffers: list[np.ndarray]) -> np.ndarray:
            rows = arithmetic.bf16_rows(buffers[0][:, : split // 2])
            values = arithmetic.bf16_values(buffers[0][:, split // 2 :])  # (m, N / 2, 32)
            values = values.reshape(blocks, outputs - split, BLOCK_TOKENS)
            stored = np.concatenate([rows, lanes.from_lanes(values)], 1)
            if outputs_that_meet.turned(task)[0]:  # lanes hold the two channels that were turned
                stored[:, outputs_that_meet.order(task)] = stored.copy()
            return stored

        results, rounding = np.zeros((blocks, outputs // 2, BLOCK_TOKENS), "int32"), 2.0**-8
    else:
        low, high = BYTES
        weights.append(byte_limits(low, high))
        step = (high - low) / LEVELS
        expected = np.clip(expected, low, high)

        def decode(buffers: list[np.ndarray]) -> np.ndarray:
            return low + step * arithmetic.ungrouped(buffers[0], "uint8").astype("float32")

        results = np.zeros((blocks, outputs // 4, BLOCK_TOKENS), "int32")
        rounding = 0.51 * step / max(1.0, float(np.abs(expected).max()))
    return Sample(activations, weights, expected, [results], decode, tolerance + rounding)
