"""Sums along the rows of a matrix, running: where RoBERTa's positions come from.

    x (N, S) int64  →  y (N, S), y[i, j] = x[i, 0] + … + x[i, j]

One warp for each row: a thread adds up a piece of it, and then has before it what the others found.
"""

from __future__ import annotations

import numpy as np

from bertile.schedules.cuda.program import program
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task

BODY = """
  __shared__ long long sums[32];
  const long long first = static_cast<long long>(blockIdx.x) * x_1;
  const int lane = threadIdx.x, each = (x_1 + 31) / 32;
  const int begin = lane * each, end = begin + each < x_1 ? begin + each : x_1;
  long long sum = 0;
  for (int i = begin; i < end; i++) sum += x[first + i];
  sums[lane] = sum;
  block_sync();
  sum = 0;
  for (int i = 0; i < lane; i++) sum += sums[i];
  for (int i = begin; i < end; i++) y[first + i] = sum += x[first + i];"""


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(x, y)"""
    pointers = [("const long long", "x"), ("long long", "y")]
    return program("cumsum", 32, ("x_0", 1, 1), pointers, ["x_1"], "", BODY)


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two rows of lengths that are no multiple of 32."""
    x = rng.integers(-3, 4, (2, 16 * blocks + 5)).astype("int64")
    rows, length = x.shape
    symbols = {"x_0": rows, "x_1": length, "rows": rows, "batch": rows, "length": length}
    return Sample([x], [], x.cumsum(1), tolerance=0.0, symbols={**symbols, "blocks": blocks})


cumsum = Schedule("cumsum", lambda t, r: {}, lambda t, r: {}, kernel, sample, lambda t, n: 0.0)
