"""Sums embedding rows and normalises them in one kernel, which leaves the result in lanes.

    ids (B or 1, S) for each table, place (m, 4), tables (V, C), gamma (C), beta (C)
        →  y (m, C, 16)

With ``precision`` "fp16" the tables are stored in float16. An index outside its table is clamped,
so that a caller without the loader's checks reads a wrong row, not memory that is not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.layer_norm import normalize_and_narrow, normalized_sample
from bertile.schedules.cpu.narrow import Narrow, sample_weights
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task


def space(task: Task, row: Row) -> Space:
    """Partial sums of the LayerNorm."""
    return {"sums": tuple(s for s in (1, 2, 4, 8) if task.shape["channels"] % s == 0)}


def default(task: Task, row: Row) -> Knobs:
    """As for LayerNorm alone."""
    return {"sums": max(s for s in space(task, row)["sums"] if s <= 4)}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (ids…, place, tables…, gamma, beta, [smooth], [limits], y, [values, [range]]);
    ``ids`` and ``rows`` name one dtype and one V a table.
    """
    channels = task.shape["channels"]
    dtypes = str(task.shape["ids"]).split("_")
    rows = [int(v) for v in str(task.shape["rows"]).split("_")]
    with lanes.kernel(task.name) as builder:
        ids = [
            builder.tensor(f"ids{i}", T.int32(), T.int32(), dtype=dtype)
            for i, dtype in enumerate(dtypes)
        ]
        place = builder.tensor("place", builder.blocks, 4, dtype="int32")
        dtype = "float16" if halves(task) else "float32"
        tables = [
            builder.tensor(f"table{i}", count, channels, dtype=dtype)
            for i, count in enumerate(rows)
        ]
        gamma, beta = (builder.tensor(name, channels) for name in ("gamma", "beta"))
        narrow = Narrow.of(task)
        if narrow:
            narrow.declare_inputs(builder, bool(task.shape.get("smooth")))
        y = builder.activation("y", channels)
        if narrow:
            narrow.declare_results(builder)
        with T.parallel(builder.blocks) as block:
            with T.serial(BLOCK_TOKENS) as lane:
                token_rows = [
                    T.Bind(_row(index, place, block, lane, count))
                    for index, count in zip(ids, rows)
                ]
                with T.serial(channels) as c:
                    value = tables[0][token_rows[0], c].astype("float32")
                    for table, at in zip(tables[1:], token_rows[1:]):
                        value = value + table[at, c].astype("float32")
                    T.buffer_store(y, value, [block, c, lane])
            operands = (y, block, y, block, gamma, beta)
            normalize_and_narrow(*operands, channels, task.shape["epsilon"], knobs["sums"], narrow)
    return builder.func


def halves(task: Task) -> bool:
    """Whether the tables are stored in float16."""
    return task.shape.get("precision") == "fp16"


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """The tables as they are stored; the rest as it comes."""
    if not halves(task):
        return list(weights)
    count = len(str(task.shape["rows"]).split("_"))
    return [w.astype("float16") for w in weights[:count]] + list(weights[count:])


def _row(ids: Any, place: Any, block: Any, lane: Any, count: int) -> Any:
    """Which row of a table a token wants; a lane past the sequence's end repeats its last token."""
    batch, length = ids.shape
    at = T.min(place[block, 1] + lane, length - 1)
    index = ids[T.min(place[block, 0], batch - 1), at]
    return T.min(T.max(index.astype("int32"), 0), count - 1)


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """One sequence that fills the blocks."""
    channels, tokens = task.shape["channels"], blocks * BLOCK_TOKENS
    rows = [int(v) for v in str(task.shape["rows"]).split("_")]
    tables = [rng.standard_normal((count, channels)).astype("float32") for count in rows]
    scale = [rng.standard_normal(channels).astype("float32") for _ in range(2)]
    weights = [*tables, *scale, *sample_weights(task, rng)]
    ids = [
        rng.integers(0, count, (1, tokens)).astype(dtype)
        for count, dtype in zip(rows, str(task.shape["ids"]).split("_"))
    ]
    place = np.array([[0, i * BLOCK_TOKENS, 0, blocks] for i in range(blocks)], "int32")
    if halves(task):
        tables = [table.astype("float16") for table in tables]
    total = sum(table[index[0]].astype("float64") for table, index in zip(tables, ids))
    total = reference.layer_norm(total, *scale, task.shape["epsilon"])
    return normalized_sample(task, [*ids, place], weights, total.astype("float32"))


def flops(task: Task, tokens: int) -> float:
    """One addition per further table, seven for the LayerNorm."""
    tables = len(str(task.shape["rows"]).split("_"))
    return tokens * task.shape["channels"] * (tables - 1 + 8.0)


embedding = Schedule("embedding", space, default, kernel, sample, flops, pack)
