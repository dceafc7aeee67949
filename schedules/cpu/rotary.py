"""Turns pairs of channels of some heads by the angle of a token's place: rotary positions in lanes.

    x (m, C, 16), cos (m, D, 16), sin (m, D, 16), [gamma (heads D)]  →  y (m, C, 16)

    with e = d + D / 2:  y[d] = x[d] cos[d] - x[e] sin[d],  y[e] = x[e] cos[e] + x[d] sin[e]

for the first ``heads`` heads of D channels (Q and K, where x is qkv); the rest is copied. A token's
place is that in its own sequence: ``tokens_in`` brings cos and sin into lanes by the same table as
everything else, once for all layers. As an operator of its own this reads and writes qkv once more,
which is a small part of the product before it; where nobody else reads that product, its epilogue
turns them instead (``dense``).

With an ``epsilon`` each of these heads is RMSNorm's of itself before, times gamma (Qwen3, Gemma 3).
That wants all channels of a head at once, which no tile of a product holds. ``writes`` "to_bf16" is
as for dense layers: a lane holds the two channels that were turned, and V, from ``values_from``
on, is in pairs of tokens.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cpu import arithmetic, lanes
from bertile.schedules.cpu.product import packed
from bertile.schedules.cpu.samples import result_sample
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task


def _no_space(task: Task, row: Row) -> Space:
    return {}


def _default(task: Task, row: Row) -> Knobs:
    return {}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, cos, sin, [gamma], y)."""
    channels, heads, size = _sizes(task)
    half, rest = size // 2, channels - heads * size
    if packed(task) == 2 and (rest % 2 or task.shape["values_from"] != heads * size):
        raise ValueError("what is written in bfloat16 is all of Q and K turned, and V behind them")
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", channels)
        cos, sin = builder.activation("cos", size), builder.activation("sin", size)
        gamma = builder.tensor("gamma", heads * size) if "epsilon" in task.shape else None
        wide = packed(task)
        y = builder.activation("y", channels // wide, "float32" if wide == 1 else "int32")
        with T.parallel(builder.blocks * (heads + 1)) as job:  # of one block too there are many
            block, head = T.Bind(job // (heads + 1)), T.Bind(job % (heads + 1))
            with T.If(head < heads):
                with T.Then():
                    first = T.Bind(head * size)
                    scale = None
                    if gamma is not None:
                        scale = _inverse_root(x, block, first, size, float(task.shape["epsilon"]))
                    with T.serial(half) as d:
                        pair = []
                        for place in (first + d, first + half + d):
                            value = lanes.load(x, block, place)
                            if scale is not None:
                                value = value * scale * lanes.splat(gamma[place])
                            pair.append(T.Bind(value))
                        _store_turned(y, block, first, half, d, _turned(pair, cos, sin, block, d))
                with T.Else():
                    _copy(x, y, block, heads * size, rest)
    return builder.func


def _sizes(task: Task) -> tuple[int, int, int]:
    """Channels, heads that are turned, channels of a head."""
    channels, heads, size = (task.shape[name] for name in ("channels", "heads", "head_size"))
    return int(channels), int(heads), int(size)


def _inverse_root(x: Any, block: Any, first: Any, size: int, epsilon: float) -> Any:
    """What RMSNorm multiplies the channels of a head by; in some sums, to hide the latency."""
    sums = lanes.registers(4 if size % 4 == 0 else 2)
    for total in sums:
        lanes.write(total, lanes.splat(0.0))
    with T.serial(size // len(sums)) as c:
        for i, total in enumerate(sums):
            value = T.Bind(lanes.load(x, block, first + c * len(sums) + i))
            lanes.write(total, lanes.read(total) + value * value)
    whole = reduce(operator.add, map(lanes.read, sums))
    mean = whole * lanes.splat(1 / size) + lanes.splat(epsilon)
    return T.Bind(lanes.splat(1.0) / tirx.sqrt(mean))


def _turned(pair: list[Any], cos: Any, sin: Any, block: Any, d: Any) -> list[Any]:
    """Channels d and d + D / 2 by their angles."""
    half, (first, second) = int(cos.shape[1]) // 2, pair
    c, s = (lanes.load(of, block, d) for of in (cos, sin))
    other_c, other_s = (lanes.load(of, block, d + half) for of in (cos, sin))
    return [T.Bind(first * c - second * s), T.Bind(second * other_c + first * other_s)]


def _store_turned(y: Any, block: Any, first: Any, half: int, d: Any, pair: list[Any]) -> None:
    if y.dtype == "int32":
        lanes.store(y, arithmetic.pack_bf16(*pair), block, first // 2 + d)
        return
    for i, value in enumerate(pair):
        lanes.store(y, value, block, first + d + i * half)


def _copy(x: Any, y: Any, block: Any, start: int, count: int) -> None:
    """The channels that are not turned, in pairs of tokens where y is bfloat16."""
    width = BLOCK_TOKENS // 2
    with T.serial(count) as c:
        value = lanes.load(x, block, start + c)
        if y.dtype == "int32":
            ramp = tirx.Ramp(c % 2 * width, 1, width)
            lane = start // 2 + c // 2
            T.buffer_store(y, T.Bind(arithmetic.pack_bf16_tokens(value)), [block, lane, ramp])
        else:
            lanes.store(y, value, block, start + c)


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two sequences where the blocks allow it, the second of which starts at place 0 again."""
    channels, heads, size = _sizes(task)
    x = rng.standard_normal((blocks * BLOCK_TOKENS, channels)).astype("float32")
    cos, sin = sample_angles(blocks, size)
    weights, before = [], x.astype("float64")
    if "epsilon" in task.shape:
        weights = [rng.standard_normal(heads * size).astype("float32")]
        gamma = weights[0].reshape(heads, size)
        before = reference.rms_heads(before, gamma, float(task.shape["epsilon"]))
    expected = reference.rotary_heads(before, cos, sin, heads).astype("float32")
    stored = {"outputs": channels, "turned": heads, **task.shape}  # as a product's are
    operands = [lanes.to_lanes(array) for array in (x, cos, sin)]
    return result_sample(Task("rotary", stored), operands, weights, expected)


def sample_angles(blocks: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (tokens, size) of two sequences where the blocks allow it, else of one."""
    counts = [blocks] if blocks < 3 else [blocks - blocks // 3, blocks // 3]
    places = np.concatenate([np.arange(count * BLOCK_TOKENS) for count in counts])
    return reference.angles(places, size)


def flops(task: Task, tokens: int) -> float:
    """Three per channel that is turned: two products and their sum."""
    return 3.0 * tokens * task.shape["heads"] * task.shape["head_size"]


rotary = Schedule("rotary", _no_space, _default, kernel, sample, flops)
