"""Sums embedding rows and normalises them in one kernel: a token's rows are added in registers.

    ids (B or 1, S or 1) for each table, place (blocks, 4), tables (V, C), gamma (C), beta (C),
    [smooth (C)], [limits (2)]  →  y (rows, pitch(C)), [q, [range]]

Tables are stored in the type of the activations, padded to the pitch. An index outside its table
is clamped, so that a caller without the loader's checks reads a wrong row, not memory that is not
ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cuda import row_kernel
from bertile.schedules.cuda.forms import (
    element,
    from_rows,
    symbols,
    to_rows,
    token_table,
)
from bertile.schedules.cuda.layer_norm import normalizing_kernel
from bertile.schedules.cuda.narrow import narrow_sample, sample_weights
from bertile.schedules.cuda.row_kernel import padded
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task

INTEGERS = {"int64": "long long", "int32": "int"}

LOOKUP = """
// The row of a table that a token wants; a row behind the sequence's end repeats its last token.
template <typename I>
__device__ inline long long wanted(const I* ids, int batch, int length, const int* place, int row,
                                   int vocabulary) {
  const int* mine = place + row / BLOCK_TOKENS * 4;
  const int of = mine[0] < batch ? mine[0] : batch - 1;
  const int at = mine[1] + row % BLOCK_TOKENS;
  const I id = ids[static_cast<long long>(of) * length + (at < length ? at : length - 1)];
  return id < 0 ? 0 : id < vocabulary ? static_cast<long long>(id) : vocabulary - 1;
}
"""


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(ids…, place, tables…, gamma, beta, [smooth], [limits], y, [q, [range]]); ``ids`` and
    ``rows`` of the task name one dtype and one V a table.
    """
    dtypes, counts = _ids(task), _counts(task)
    first = [(f"const {INTEGERS[dtype]}", f"ids{i}") for i, dtype in enumerate(dtypes)]
    first.append(("const int", "place"))
    first += [(f"const {element(task)}", f"table{i}") for i in range(len(counts))]
    extents = [f"ids{i}_{axis}" for i in range(len(dtypes)) for axis in range(2)]
    lines = []
    for i, count in enumerate(counts):
        target = "x" if i == 0 else f"x{i}"
        where = f"wanted(ids{i}, ids{i}_0, ids{i}_1, place, row.row, {count})"
        if i:
            lines.append(f"  float {target}[CHUNKS][8];")
        lines.append(f"  row.load<X>(table{i} + {where} * PITCH, {target});")
    lines += [f"  row.add(x, x{i});" for i in range(1, len(counts))]
    return normalizing_kernel(task, knobs, first, extents, LOOKUP, "\n".join(lines))


def _ids(task: Task) -> list[str]:
    return str(task.shape["ids"]).split("_")


def _counts(task: Task) -> list[int]:
    return [int(v) for v in str(task.shape["rows"]).split("_")]


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """The tables as they are stored, vectors padded to the pitch."""
    count = len(_counts(task))
    tables = [to_rows(table, element(task)) for table in weights[:count]]
    return tables + padded(weights[count:], int(task.shape["channels"]))


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two sequences where the blocks allow it; the ids of the last table serve both."""
    channels = int(task.shape["channels"])
    tables = [rng.standard_normal((count, channels)).astype("float32") for count in _counts(task)]
    scale = [rng.standard_normal(channels).astype("float32") for _ in range(2)]
    weights = [*tables, *scale, *sample_weights(task, rng)]
    lengths = [blocks * BLOCK_TOKENS] if blocks < 2 else [(blocks - 1) * BLOCK_TOKENS - 3, 7]
    place, length = token_table(lengths), max(lengths)
    ids, total, of = [], np.zeros((blocks * BLOCK_TOKENS, channels)), {}
    last = len(tables) - 1
    for i, (table, dtype) in enumerate(zip(tables, _ids(task))):
        batch = 1 if i == last and last > 0 else len(lengths)
        mine = rng.integers(0, len(table), (batch, length)).astype(dtype)
        ids.append(mine)
        of |= {f"ids{i}_0": batch, f"ids{i}_1": length}
        stored = from_rows(to_rows(table, element(task)), channels).astype("float64")
        at = np.minimum(place[:, 1:2] + np.arange(BLOCK_TOKENS), length - 1)
        total += stored[mine[np.minimum(place[:, :1], batch - 1), at].reshape(-1)]
    total = reference.layer_norm(total, *scale, task.shape["epsilon"])
    of = symbols(blocks * BLOCK_TOKENS, len(lengths), length, **of)
    return narrow_sample(task, [*ids, place], weights, total, of, wide=True)


def flops(task: Task, tokens: int) -> float:
    """One addition per further table, eight for the LayerNorm."""
    return tokens * task.shape["channels"] * (len(_counts(task)) - 1 + 8.0)


embedding = Schedule("embedding", row_kernel.space, row_kernel.default, kernel, sample, flops, pack)
