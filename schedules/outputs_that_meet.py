"""Says which outputs of a matrix product meet behind it, and in which order they are packed so that
they stand side by side there.

    gated    y = activation(value) · other value: of the two halves of its outputs
    turned   two values of a head turned by an angle: rotary positions
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bertile.schedules.task import Task


def is_gated(task: Task) -> bool:
    """Whether a channel of y is made of two outputs."""
    return bool(task.shape.get("gated", False))


def turned(task: Task) -> tuple[int, int]:
    """How many of the first heads have rotary positions, and how many channels each has."""
    return int(task.shape.get("turned", 0)), int(task.shape.get("head_size", 0))


def channels(task: Task) -> int:
    """Channels of y."""
    outputs = int(task.shape["outputs"])
    return outputs // 2 if is_gated(task) else outputs


def order(task: Task) -> np.ndarray:
    """The outputs in the order in which weights are packed: who meets, side by side.

    Of a gated task an output of the first half, then that of the second; of a turned head channel d
    of the first half of the head, then d of the second.
    """
    places = np.arange(task.shape["outputs"])
    if is_gated(task):
        return places.reshape(2, -1).T.reshape(-1)
    heads, size = turned(task)
    if not heads:
        return places
    of_heads = places[: heads * size].reshape(heads, 2, -1).swapaxes(1, 2)
    return np.concatenate([of_heads.reshape(-1), places[heads * size :]])


def ordered(task: Task, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays whose last axis is the outputs, in the order of ``order``."""
    places = order(task)
    if (places[1:] > places[:-1]).all():
        return list(weights)
    return [np.ascontiguousarray(array[..., places]) for array in weights]
