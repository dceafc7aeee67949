"""A matrix product in lanes with its epilogue: y = activation(x W + b) + residual, any number of
tokens, in float32, bfloat16 or bytes (see ``arithmetic``: a lane is 1, 2 or 4 channels, G).

    x (m, K / G, 16), [range (m, 2, 16)], [residual (m, N, 16)], w (panels, K / G, width), b (N)
        →  y (m, N, 16)

    parallel over tasks = groups of panels × chunks of token blocks
      for each pass over a part of K, panel of the group, tile of token blocks
        width × token_blocks accumulators in registers
          for k: load x once per block, broadcast w once per output, multiply-add
        one store per value; then the activation, while the tile is in the first-level cache

``precision`` "int8" has a range per token, and ``scale`` and ``shift`` (N) behind ``w``:
y = range.scale (scale Σ) + (range.low shift + b). "int8_static" has one range for all tokens,
which is folded into ``scale`` and ``b``. ``writes`` "to_bf16" or "to_int8" stores y as the layer
that reads it wants it, the latter by ``limits`` (2): low, and steps per unit. Channels from
``values_from`` on are written for attention in bfloat16, in pairs of tokens instead of channels.

Why not tokens in rows and outputs in lanes: as fast for dense products, but then sparse weights,
softmax, LayerNorm and per-token scales all need shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bertile.schedules.cpu import dense_samples, lanes
from bertile.schedules.cpu.dense_kernel import kernel, panel_count, panel_width
from bertile.schedules.cpu.product import group, precision, weight_lanes, writes
from bertile.schedules.schedule import Knobs, Row, Schedule, Space
from bertile.schedules.task import Task


def space(task: Task, row: Row) -> Space:
    """The register tile, the unrolling, and how the work is cut between caches and threads.

    A tile of ``accumulators`` vectors is ``token_blocks`` blocks by ``accumulators //
    token_blocks`` outputs: two knobs that keep inside the register file whatever is chosen.
    """
    depth = -(-task.shape["inputs"] // group(task))
    halves = precision(task) in ("fp32", "fp16") and writes(task) == "to_fp32"
    fits = _accumulators(task, row)
    return {
        "accumulators": tuple(range(min(4, fits), fits + 1)),
        "token_blocks": tuple(b for b in (1, 2, 3, 4) if b <= fits // 2),
        "unroll": tuple(u for u in (1, 2, 4) if depth % u == 0),
        "passes": (1, 2) if halves and depth % 2 == 0 and depth >= 256 else (1,),
        "panels": (1, 2, 4, 8),
        "chunk": (4, 8, 16, 32),
    }


def default(task: Task, row: Row) -> Knobs:
    """The widest tile of four token blocks (ten loads for 24 multiply-adds, where two blocks take
    fourteen), of one where their activations would push accumulators out of the registers.
    """
    choices = space(task, row)
    room = lanes.vector_capacity(row) - _accumulators(task, row)
    token_blocks = 4 if room >= 4 and 4 in choices["token_blocks"] else 1
    widest = min(_accumulators(task, row), 24) // token_blocks
    # one output less where that pads nothing; else padding costs less than a narrower tile
    even = [n for n in (widest, widest - 1) if task.shape["outputs"] % n == 0]
    width = max(even, default=widest)
    return {
        "accumulators": max(width * token_blocks, min(choices["accumulators"])),
        "token_blocks": token_blocks,
        "unroll": max(choices["unroll"]),
        "passes": 1,
        "panels": 4,
        "chunk": 16,
    }


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """w (K, N) → (panels, K / G, width): each panel is read front to back; vectors (N) padded.

    ``weights`` are w (float32, or int8 for bytes), then the vectors in the kernel's order.
    """
    w, *vectors = weights
    width, panels = panel_width(task, knobs), panel_count(task, knobs)
    padding = panels * width - w.shape[1]
    w = np.pad(weight_lanes(task, w), ((0, 0), (0, padding)))
    w = np.ascontiguousarray(w.reshape(-1, panels, width).transpose(1, 0, 2))
    limits = vectors.pop() if writes(task) == "to_int8" else None
    padded = [np.pad(v, (0, padding)) for v in vectors]
    return [w, *padded] + ([] if limits is None else [limits])


def flops(task: Task, tokens: int) -> float:
    """Two per multiply-add; the epilogue is not counted."""
    return 2.0 * tokens * task.shape["inputs"] * task.shape["outputs"]


def _accumulators(task: Task, row: Row) -> int:
    """Vectors that may accumulate: what the activations and a broadcast weight leave of the
    registers. Bytes that are widened first take twice as many.
    """
    capacity = lanes.vector_capacity(row)
    widened = group(task) == 4 and row.dot_product != "vnni"
    return capacity - max(4 if widened else 2, capacity // 8)


dense = Schedule("dense", space, default, kernel, dense_samples.sample, flops, pack)
