"""Converts between row-major tensors and lanes: what ids, masks and results look like outside, and
what kernels read.

``table`` (m, 4) says of each block: row of the batch, first token, the sequence's first block, its
number of blocks.
None of these has knobs: together they are a few microseconds of a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.attention_parts import LOWEST
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task


def _zero() -> Any:
    return tirx.const(0.0, "float32")


def _tokens_in(task: Task, knobs: Knobs, row: Row) -> Any:
    """x (B or 1, S, C), table  →  y (m, C, 16); lanes past the sequence's end are zero."""
    channels = task.shape["channels"]
    with lanes.kernel(task.name) as builder:
        batch, length = T.int32(), T.int32()
        x = builder.tensor("x", batch, length, channels)
        table = builder.tensor("table", builder.blocks, 4, dtype="int32")
        y = builder.activation("y", channels)
        with (
            T.parallel(builder.blocks) as block,
            T.serial(BLOCK_TOKENS) as lane,
            T.serial(channels) as c,
        ):
            at = table[block, 1] + lane
            row_of = T.min(table[block, 0], batch - 1)
            value = tirx.if_then_else(at < length, x[row_of, at, c], _zero())
            T.buffer_store(y, value, [block, c, lane])
    return builder.func


def _tokens_out(task: Task, knobs: Knobs, row: Row) -> Any:
    """x (m, C, 16), table  →  y (B, S, C); tokens that no block holds are zero."""
    channels = task.shape["channels"]
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", channels)
        table = builder.tensor("table", builder.blocks, 4, dtype="int32")
        batch, length = T.int32(), T.int32()
        y = builder.tensor("y", batch, length, channels)
        with T.parallel(builder.blocks) as block:
            start = T.Bind(table[block, 1])
            with T.serial(T.min(BLOCK_TOKENS, length - start)) as lane, T.serial(channels) as c:
                T.buffer_store(y, x[block, c, lane], [table[block, 0], start + lane, c])
            with T.If(start // BLOCK_TOKENS == table[block, 3] - 1), T.Then():
                with (
                    T.serial(T.max(length - start - BLOCK_TOKENS, 0)) as t,
                    T.serial(channels) as c,
                ):
                    T.buffer_store(y, _zero(), [table[block, 0], start + BLOCK_TOKENS + t, c])
    return builder.func


def _rows_in(task: Task, knobs: Knobs, row: Row) -> Any:
    """x (N, C)  →  y (ceil(N / 16), C, 16), rows in lanes; lanes past the end are zero."""
    channels = task.shape["channels"]
    with lanes.kernel(task.name) as builder:
        count = T.int32()
        x = builder.tensor("x", count, channels)
        y = builder.activation("y", channels)
        with (
            T.parallel(builder.blocks) as block,
            T.serial(BLOCK_TOKENS) as lane,
            T.serial(channels) as c,
        ):
            at = block * BLOCK_TOKENS + lane
            T.buffer_store(y, tirx.if_then_else(at < count, x[at, c], _zero()), [block, c, lane])
    return builder.func


def _rows_out(task: Task, knobs: Knobs, row: Row) -> Any:
    """x (ceil(N / 16), C, 16)  →  y (N, C)."""
    channels = task.shape["channels"]
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", channels)
        count = T.int32()
        y = builder.tensor("y", count, channels)
        with T.parallel(count) as at, T.serial(channels) as c:
            T.buffer_store(y, x[at // BLOCK_TOKENS, c, at % BLOCK_TOKENS], [at, c])
    return builder.func


def _first_token(task: Task, knobs: Knobs, row: Row) -> Any:
    """x (m, C, 16), table  →  y (B, C): the first token ([CLS]) of each sequence."""
    channels = task.shape["channels"]
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", channels)
        table = builder.tensor("table", builder.blocks, 4, dtype="int32")
        y = builder.tensor("y", T.int32(), channels)
        with T.serial(builder.blocks) as block:
            with T.If(table[block, 1] == 0), T.Then(), T.serial(channels) as c:
                T.buffer_store(y, x[block, c, 0], [table[block, 0], c])
    return builder.func


def _key_mask(task: Task, knobs: Knobs, row: Row) -> Any:
    """mask (B or 1, 1, 1, S) additive, table  →  y (m, 16); keys past the end never win."""
    with lanes.kernel(task.name) as builder:
        batch, length = T.int32(), T.int32()
        mask = builder.tensor("mask", batch, 1, 1, length)
        table = builder.tensor("table", builder.blocks, 4, dtype="int32")
        y = builder.tensor("y", builder.blocks, BLOCK_TOKENS)
        with T.parallel(builder.blocks) as block, T.serial(BLOCK_TOKENS) as lane:
            at = table[block, 1] + lane
            row_of = T.min(table[block, 0], batch - 1)
            value = tirx.if_then_else(
                at < length, mask[row_of, 0, 0, at], tirx.const(LOWEST, "float32")
            )
            T.buffer_store(y, value, [block, lane])
    return builder.func


def _query_bias(task: Task, knobs: Knobs, row: Row) -> Any:
    """bias (B or 1, H or 1, S, S)  →  y (B or 1, H or 1, S / 16, S rounded up, 16): queries in
    lanes.
    """
    with lanes.kernel(task.name) as builder:
        batch, heads, length, tiles, padded = (T.int32() for _ in range(5))
        bias = builder.tensor("bias", batch, heads, length, length)
        y = builder.tensor("y", batch, heads, tiles, padded, BLOCK_TOKENS)
        with T.parallel(batch * heads * tiles) as job, T.serial(padded) as key:
            plane, tile = job // tiles, job % tiles
            with T.serial(BLOCK_TOKENS) as lane:
                query = tile * BLOCK_TOKENS + lane
                inside = tirx.all(query < length, key < length)
                source = bias[plane // heads, plane % heads, query, key]
                value = tirx.if_then_else(inside, source, _zero())
                T.buffer_store(y, value, [plane // heads, plane % heads, tile, key, lane])
    return builder.func


def _table(lengths: list[int]) -> np.ndarray:
    blocks, first = [], 0
    for row, length in enumerate(lengths):
        count = -(-length // BLOCK_TOKENS)
        blocks += [[row, i * BLOCK_TOKENS, first, count] for i in range(count)]
        first += count
    return np.array(blocks, "int32")


def _rounded(length: int) -> int:
    return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


def _sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two sequences, the second one shorter (or of one token), neither a multiple of 16."""
    channels, kind = int(task.shape.get("channels", 1)), task.operation
    length = max(1, (blocks - 1) * BLOCK_TOKENS - 3)
    lengths = [length, 1]
    table = _table(lengths)
    rows = rng.standard_normal((2, length, channels)).astype("float32")
    packed = np.concatenate([lanes.to_lanes(rows[i, :n]) for i, n in enumerate(lengths)])
    if (
        kind == "tokens_in"
    ):  # the lanes past a row's own end hold what the row-major tensor has there
        wide = [np.zeros((_rounded(n), channels), "float32") for n in lengths]
        for i, w in enumerate(wide):
            w[: min(length, len(w))] = rows[i, : len(w)]
        return Sample([rows, table], [], np.concatenate([lanes.to_lanes(w) for w in wide]))
    if kind == "tokens_out":
        expected = np.zeros_like(rows)
        for i, n in enumerate(lengths):
            expected[i, :n] = rows[i, :n]
        return Sample([packed, table], [], expected)
    if kind == "first_token":
        return Sample([packed, table], [], rows[:, 0])
    if kind == "rows_in":
        return Sample([rows[0]], [], lanes.to_lanes(rows[0]))
    if kind == "rows_out":
        return Sample([lanes.to_lanes(rows[0])], [], rows[0])
    if kind == "key_mask":
        mask = rng.standard_normal((2, 1, 1, length)).astype("float32")
        expected = np.full((len(table), BLOCK_TOKENS), LOWEST, "float32")
        for i, (r, start, _, _) in enumerate(table):
            stop = min(length, start + BLOCK_TOKENS)
            expected[i, : stop - start] = mask[r, 0, 0, start:stop]
        return Sample([mask, table], [], expected)
    bias = rng.standard_normal((1, 3, length, length)).astype("float32")
    full = np.zeros((1, 3, _rounded(length), _rounded(length)), "float32")
    full[:, :, :length, :length] = bias
    tiles = full.reshape(1, 3, -1, BLOCK_TOKENS, full.shape[-1]).transpose(0, 1, 2, 4, 3)
    return Sample([bias], [], np.ascontiguousarray(tiles))


def _layout(operation: str, kernel: Callable[[Task, Knobs, Row], Any]) -> Schedule:
    return Schedule(operation, lambda t, r: {}, lambda t, r: {}, kernel, _sample, lambda t, n: 0.0)


tokens_in = _layout("tokens_in", _tokens_in)
tokens_out = _layout("tokens_out", _tokens_out)
rows_in = _layout("rows_in", _rows_in)
rows_out = _layout("rows_out", _rows_out)
first_token = _layout("first_token", _first_token)
key_mask = _layout("key_mask", _key_mask)
query_bias = _layout("query_bias", _query_bias)
