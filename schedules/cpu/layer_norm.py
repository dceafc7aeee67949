"""Normalises layers in lanes: mean and variance in one pass over the channels, the result in
another; all sums are vertical.

x (m, C, 16), gamma (C), beta (C)  →  y (m, C, 16)

With a ``kind`` the result is also written in that narrow form (see ``narrow``). ``rms`` is
RMSNorm: x by the root of its mean square, without the mean taken off.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cpu import lanes
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
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", channels)
        gamma, beta = builder.tensor("gamma", channels), builder.tensor("beta", channels)
        if narrow:
            narrow.declare_inputs(builder, bool(task.shape.get("smooth")))
        y = builder.activation("y", channels)
        if narrow:
            narrow.declare_results(builder)
        with T.parallel(builder.blocks) as block:
            operands = (x, block, y, block, gamma, beta)
            rest = (channels, task.shape["epsilon"], knobs["sums"], narrow, is_rms(task))
            normalize_and_narrow(*operands, *rest)
    return builder.func


def is_rms(task: Task) -> bool:
    """Whether it is RMSNorm, and the mean is not taken off."""
    return bool(task.shape.get("rms", False))


def normalize_and_narrow(
    x: Any,
    source: Any,
    y: Any,
    block: Any,
    gamma: Any,
    beta: Any,
    channels: int,
    epsilon: float,
    sums: int,
    narrow: Narrow | None,
    rms: bool = False,
) -> None:
    """Emit the LayerNorm of ``x[source]`` into ``y[block]``, and what ``narrow`` makes of it.

    Mean and variance come from one pass over x - s, where s is the mean of four channels: E[x²] -
    E[x]² itself would lose as many digits as the mean is larger than the deviation (Chan, Golub &
    LeVeque 1983, shifted data).
    """
    mean = None
    if not rms:
        places = [channels * i // 4 for i in range(4)]
        shift = T.Bind(sum(lanes.load(x, source, c) for c in places) * lanes.splat(1 / len(places)))
        moments = _moments(lambda c: lanes.load(x, source, c) - shift, channels, sums)
        first, second = (T.Bind(total * lanes.splat(1 / channels)) for total in moments)
        variance = tirx.max(second - first * first, lanes.splat(0.0))
        mean = T.Bind(first + shift)
    else:
        _, total = _moments(lambda c: lanes.load(x, source, c), channels, sums)
        variance = total * lanes.splat(1 / channels)
    scale = T.Bind(lanes.splat(1.0) / tirx.sqrt(variance + lanes.splat(epsilon)))
    see = narrow.watch() if narrow else None
    with T.serial(channels) as c:
        value = lanes.load(x, source, c)
        value = (value if mean is None else value - mean) * scale
        value = T.Bind(value * lanes.splat(gamma[c]) + lanes.splat(beta[c]))
        lanes.store(y, value, block, c)
        if see:
            see(value, c)
    if narrow:
        narrow.emit(lambda c: lanes.load(y, block, c), block)


def _moments(term: Callable[[Any], Any], channels: int, sums: int) -> tuple[Any, Any]:
    """The sum of a term over the channels, and of its square, in ``sums`` chains each."""
    partial = lanes.registers(2 * sums)
    for register in partial:
        lanes.write(register, lanes.splat(0.0))
    with T.serial(channels // sums) as c:
        for s in range(sums):
            value = T.Bind(term(c * sums + s))
            lanes.write(partial[s], lanes.read(partial[s]) + value)
            lanes.write(partial[sums + s], lanes.read(partial[sums + s]) + value * value)
    values = [lanes.read(register) for register in partial]
    return reduce(operator.add, values[:sums]), reduce(operator.add, values[sums:])


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Activations off centre, so that a variance that loses digits shows."""
    channels = task.shape["channels"]
    gamma, beta = (rng.standard_normal(channels).astype("float32") for _ in range(2))
    weights = [gamma, beta, *sample_weights(task, rng)]
    x = (rng.standard_normal((blocks * BLOCK_TOKENS, channels)) * 3 + 5).astype("float32")
    more = (task.shape["epsilon"], is_rms(task))
    expected = reference.layer_norm(x.astype("float64"), gamma, beta, *more)
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
    """Eight per value: shift, sum, square and sum, centre, normalise, scale and shift."""
    return 8.0 * tokens * task.shape["channels"]


layer_norm = Schedule("layer_norm", space, default, kernel, sample, flops)
