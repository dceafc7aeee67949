"""Turns pairs of channels of some heads by the angle of a token's place: rotary positions in lanes.

    x (m, C, 16), cos (m, D, 16), sin (m, D, 16)  →  y (m, C, 16), with e = d + D / 2
    y[d] = x[d] cos[d] - x[e] sin[d],  y[e] = x[e] cos[e] + x[d] sin[e]

for the first ``heads`` heads of D channels (Q and K, where x is qkv); the rest is copied. A token's
place is that in its own sequence: ``tokens_in`` brings cos and sin into lanes by the same table as
everything else, once for all layers. As an operator of its own this reads and writes qkv once more,
which is a small part of the product before it; where nobody else reads that product, its epilogue
turns them instead (``dense``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cpu import lanes
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task


def _no_space(task: Task, row: Row) -> Space:
    return {}


def _default(task: Task, row: Row) -> Knobs:
    return {}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, cos, sin, y)."""
    channels, heads, size = (int(task.shape[name]) for name in ("channels", "heads", "head_size"))
    half = size // 2
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", channels)
        cos, sin = builder.activation("cos", size), builder.activation("sin", size)
        y = builder.activation("y", channels)
        with T.parallel(builder.blocks) as block:
            with T.serial(heads) as head, T.serial(half) as d:
                low, high = head * size + d, head * size + d + half
                first, second = (T.Bind(lanes.load(x, block, c)) for c in (low, high))
                turned = first * lanes.load(cos, block, d) - second * lanes.load(sin, block, d)
                lanes.store(y, turned, block, low)
                c, s = (lanes.load(of, block, d + half) for of in (cos, sin))
                lanes.store(y, second * c + first * s, block, high)
            with T.serial(channels - heads * size) as c:
                lanes.store(y, lanes.load(x, block, heads * size + c), block, heads * size + c)
    return builder.func


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two sequences where the blocks allow it, the second of which starts at place 0 again."""
    channels, heads, size = (int(task.shape[name]) for name in ("channels", "heads", "head_size"))
    x = rng.standard_normal((blocks * BLOCK_TOKENS, channels)).astype("float32")
    cos, sin = sample_angles(blocks, size)
    expected = reference.rotary_heads(x.astype("float64"), cos, sin, heads)
    operands = [lanes.to_lanes(array) for array in (x, cos, sin)]
    return Sample(operands, [], lanes.to_lanes(expected.astype("float32")))


def sample_angles(blocks: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (tokens, size) of two sequences where the blocks allow it, else of one."""
    counts = [blocks] if blocks < 3 else [blocks - blocks // 3, blocks // 3]
    places = np.concatenate([np.arange(count * BLOCK_TOKENS) for count in counts])
    angles = places[:, None] * 10000.0 ** (-np.arange(size // 2) / (size // 2))
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")


def flops(task: Task, tokens: int) -> float:
    """Three per channel that is turned: two products and their sum."""
    return 3.0 * tokens * task.shape["heads"] * task.shape["head_size"]


rotary = Schedule("rotary", _no_space, _default, kernel, sample, flops)
