"""LayerNorm in lanes: mean, variance and result are vertical, one pass over the channels each.

x (m, C, 16), gamma (C), beta (C)  →  y (m, C, 16)

With a ``kind`` the result is also written in that narrow form (see ``narrow``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import reference
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.lanes import LANES
from bertile.schedules.cpu.narrow import Narrow, narrow_sample, sample_weights
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task


def space(task: Task, row: Row) -> Space:
    """How many partial sums run side by side."""
    return {"sums": tuple(s for s in (1, 2, 4, 8) if task.shape["channels"] % s == 0)}


def default(task: Task, row: Row) -> Knobs:
    """As many partial sums as hide the latency of an addition."""
    return {"sums": max(s for s in space(task, row)["sums"] if s <= 4)}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, gamma, beta, [smooth], [limits], y, [values, [range]])."""
    channels, narrow = task.shape["channels"], Narrow.of(task)
    with lanes.kernel(task.name) as made:
        x = made.activation("x", channels)
        gamma, beta = made.tensor("gamma", channels), made.tensor("beta", channels)
        if narrow:
            narrow.declare_inputs(made, bool(task.shape.get("smooth")))
        y = made.activation("y", channels)
        if narrow:
            narrow.declare_results(made)
        with T.parallel(made.blocks) as block:
            normalize(
                x, block, y, block, gamma, beta, channels, task.shape["epsilon"], knobs["sums"]
            )
            if narrow:
                narrow.emit(lambda c: lanes.load(y, block, c), block)
    return made.func


def normalize(
    x: Any,
    source: Any,
    y: Any,
    block: Any,
    gamma: Any,
    beta: Any,
    channels: int,
    epsilon: float,
    sums: int,
) -> None:
    """Emit the LayerNorm of ``x[source]`` into ``y[block]``; variance about the mean, not E[x²] -
    E[x]².
    """
    mean = T.Bind(
        _sum(lambda c: lanes.load(x, source, c), channels, sums) * lanes.splat(1 / channels)
    )

    def squared(c: Any) -> Any:
        return (lanes.load(x, source, c) - mean) * (lanes.load(x, source, c) - mean)

    variance = _sum(squared, channels, sums) * lanes.splat(1 / channels)
    root = tirx.sqrt(variance + lanes.splat(epsilon))
    scale = T.Bind(lanes.splat(1.0) / root)
    with T.serial(channels) as c:
        value = (lanes.load(x, source, c) - mean) * scale
        lanes.store(y, value * lanes.splat(gamma[c]) + lanes.splat(beta[c]), block, c)


def _sum(term: Any, channels: int, sums: int) -> Any:
    partial = lanes.registers(sums)
    for s in range(sums):
        lanes.write(partial[s], lanes.splat(0.0))
    with T.serial(channels // sums) as c:
        for s in range(sums):
            lanes.write(partial[s], lanes.read(partial[s]) + term(c * sums + s))
    total = lanes.read(partial[0])
    for s in range(1, sums):
        total = total + lanes.read(partial[s])
    return total


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Activations off centre, so that a variance that loses digits shows."""
    channels = task.shape["channels"]
    gamma, beta = (rng.standard_normal(channels).astype("float32") for _ in range(2))
    weights = [gamma, beta, *sample_weights(task, rng)]
    x = (rng.standard_normal((blocks * LANES, channels)) * 3 + 5).astype("float32")
    expected = reference.layer_norm(x.astype("float64"), gamma, beta, task.shape["epsilon"])
    return normalized_sample(task, [lanes.to_lanes(x)], weights, expected.astype("float32"))


def normalized_sample(
    task: Task, activations: list[np.ndarray], weights: list[np.ndarray], expected: np.ndarray
) -> Sample:
    """The sample of a kernel that ends in a LayerNorm, in the task's narrow form too if it has
    one.
    """
    if not task.shape.get("kind"):
        return Sample(activations, weights, lanes.to_lanes(expected))
    smooth = weights[-2 if task.shape["kind"] == "int8_static" else -1]
    narrowed = expected * smooth if task.shape.get("smooth") else expected
    return narrow_sample(task, activations, weights, narrowed, expected)


def flops(task: Task, tokens: int) -> float:
    """Seven per value: sum, centre and square and sum, normalise and scale and shift."""
    return 7.0 * tokens * task.shape["channels"]


layer_norm = Schedule("layer_norm", space, default, kernel, sample, flops)
