"""Turns pairs of channels of some heads by the angle of a token's place: rotary positions by
themselves, where heads are normed before (``dense`` turns what is not, as it makes it).

    x (rows, pitch(C)), cos, sin float32 (rows, pitch(D)), [gamma (heads D)]  →  y (rows, pitch(C))

    with e = d + D / 2:  y[d] = x[d] cos[d] - x[e] sin[d],  y[e] = x[e] cos[e] + x[d] sin[e]

for the first ``heads`` heads of D channels; the rest is copied. With an ``epsilon`` each of these
heads is RMSNorm's of itself before, times gamma. A warp has a head of a row, in registers; one more
has what is not turned.
"""

from __future__ import annotations

import numpy as np

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cuda.forms import (
    ROUNDING,
    constants,
    element,
    empty_rows,
    from_rows,
    pitch,
    symbols,
    to_rows,
)
from bertile.schedules.cuda.program import program
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task

WARPS = 4  # of a thread block

BODY = """
  const int warp = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / (HEADS + 1), head = warp % (HEADS + 1);
  if (row >= rows) return;
  const X* const from = x + static_cast<long long>(row) * PITCH;
  X* const to = y + static_cast<long long>(row) * PITCH;
  if (head == HEADS) {  // what is not turned, and the padding
    for (int c = HEADS * SIZE + lane; c < PITCH; c += 32) to[c] = from[c];
    return;
  }
  float pair[EACH][2], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int d = 32 * i + lane;
      pair[i][k] = d < HALF ? to_float(from[head * SIZE + k * HALF + d]) : 0.0f;
      squares += pair[i][k] * pair[i][k];
    }
  NORM
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = 32 * i + lane;
    if (d >= HALF) continue;
    const float* const c = cos + static_cast<long long>(row) * ANGLES_PITCH + d;
    const float* const s = sin + static_cast<long long>(row) * ANGLES_PITCH + d;
    X* const turned = to + head * SIZE + d;
    turned[0] = from_float<X>(pair[i][0] * c[0] - pair[i][1] * s[0]);
    turned[HALF] = from_float<X>(pair[i][1] * c[HALF] + pair[i][0] * s[HALF]);
  }"""
NORM = """
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
  const float scale = reciprocal_sqrt(squares * (1.0f / SIZE) + EPSILON);
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (32 * i + lane < HALF)
        pair[i][k] *= scale * gamma[head * SIZE + k * HALF + 32 * i + lane];"""


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(x, cos, sin, [gamma], y)."""
    channels, heads, size = _sizes(task)
    kind, normed = element(task), "epsilon" in task.shape
    pointers = [(f"const {kind}", "x"), ("const float", "cos"), ("const float", "sin")]
    pointers += [("const float", "gamma")] if normed else []
    values = constants(
        WARPS=WARPS,
        HEADS=heads,
        SIZE=size,
        HALF=size // 2,
        EACH=-(-size // 64),
        PITCH=pitch(channels),
        ANGLES_PITCH=pitch(size),
        EPSILON=float(task.shape.get("epsilon", 0.0)),
    )
    grid = (f"(rows * {heads + 1} + {WARPS - 1}) // {WARPS}", 1, 1)
    body = BODY.replace("  NORM\n", f"{NORM.lstrip()}\n" if normed else "")
    helpers = f"using X = {kind};\n{values}"
    return program(task.name, 32 * WARPS, grid, [*pointers, (kind, "y")], ["rows"], helpers, body)


def _sizes(task: Task) -> tuple[int, int, int]:
    """Channels, heads that are turned, channels of a head."""
    channels, heads, size = (task.shape[name] for name in ("channels", "heads", "head_size"))
    return int(channels), int(heads), int(size)


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Tokens of any places."""
    (channels, heads, size), kind = _sizes(task), element(task)
    weights = []
    if "epsilon" in task.shape:
        weights.append(rng.standard_normal(heads * size).astype("float32"))
    rows = blocks * BLOCK_TOKENS
    x = to_rows(rng.standard_normal((rows, channels)), kind)
    angles = reference.angles(rng.integers(0, 300, rows), size)
    values = from_rows(x, channels).astype("float64")
    if weights:
        gamma = weights[0].reshape(heads, size)
        values = reference.rms_heads(values, gamma, float(task.shape["epsilon"]))
    expected = reference.rotary_heads(values, *angles, heads).astype("float32")
    activations = [x, *(to_rows(each, "float") for each in angles)]

    def decode(buffers: list[np.ndarray]) -> np.ndarray:
        return from_rows(buffers[0], channels)

    results, tolerance = [empty_rows(rows, channels, kind)], 2 * ROUNDING[kind] + 1e-5
    return Sample(activations, weights, expected, results, decode, tolerance, symbols(rows))


def flops(task: Task, tokens: int) -> float:
    """Three per channel that is turned: two products and their sum."""
    return 3.0 * tokens * task.shape["heads"] * task.shape["head_size"]


rotary = Schedule("rotary", lambda t, r: {}, lambda t, r: {}, kernel, sample, flops)
