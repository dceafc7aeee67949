"""Multiplies matrices in lanes, with the epilogue: y = activation(x W + b) + residual, any number
of tokens, in float32, bfloat16 or bytes (see ``arithmetic``).

    x (m, K / G, 16), [range (m, 2, 16)], [residual (m, N, 16)], [cos, sin (m, D, 16)],
    w (panels, K / G, width), b (N)  →  y (m, N, 16)

    parallel over tasks = groups of panels × chunks of token blocks, in one order or the other
      for each pass over a part of K, panel of the group, tile of token blocks
        width × token_blocks accumulators in registers
          for k: load x once per block, broadcast w once per output, multiply-add
        one store per value; then the activation, while the tile is in the first-level cache

``precision`` "int8" has a range per token, and ``scale`` and ``shift`` (N) behind ``w``:
y = range.scale (scale Σ) + (range.low shift + b). "int8_static" has one range for all tokens,
which is folded into ``scale`` and ``b``. "int4" has a range per token, weights of 4 bits and
scales (panels, K / group, width) in float16 behind ``w``: y = range.scale Σ scales Σ +
(range.low shift + b). ``writes`` "to_bf16" or "to_int8" stores y as the layer
that reads it wants it, the latter by ``limits`` (2): low, and steps per unit. Channels from
``values_from`` on are written for attention in bfloat16, in pairs of tokens instead of channels.

Of a ``gated`` task y has N / 2 channels: the first half of the outputs, activated, times the second
(GeGLU, SwiGLU). As many heads of ``head_size`` channels as are ``turned`` get the rotary positions
of their tokens. Weights are packed so that two outputs that meet are in one tile of registers; it
goes through a buffer in the first-level cache, as one that is written in fewer bits does.

Why not tokens in rows and outputs in lanes: as fast for dense products, but then sparse weights,
softmax, LayerNorm and per-token scales all need shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import dense_kernel, dense_samples, lanes, tiles
from bertile.schedules.cpu.dense_kernel import Layout, step_count
from bertile.schedules.cpu.nibbles import pack_nibbles
from bertile.schedules.cpu.panels import pack_panels
from bertile.schedules.cpu.product import (
    BY_CHUNKS,
    BY_PANELS,
    ORDERS,
    byte_offset,
    group,
    group_size,
    multiplies,
    unit,
    weight_lanes,
    writes,
)
from bertile.schedules.outputs_that_meet import ordered
from bertile.schedules.reference import BOUND, largest_sums
from bertile.schedules.schedule import Knobs, Row, Schedule, Space
from bertile.schedules.task import Task

# Of x, which each panel of a chunk reads again, where a panel is unpacked for each chunk: from a
# third-level cache that is shared with others 3072 inputs take a third longer than from the second
# level. Elsewhere the smallest chunks are the best: what is left of a cache holds weights.
CHUNK_BYTES = 1 << 20


def space(task: Task, row: Row) -> Space:
    """The register tile, the unrolling, and how the work is cut between caches and threads.

    A tile of ``accumulators`` vectors is ``token_blocks`` blocks by ``accumulators //
    token_blocks`` outputs: two knobs that keep inside the register file whatever is chosen.
    """
    if tiles.takes(task, row):
        return tiles.space(task, row)
    math = multiplies(task, row)
    steps = step_count(task, math)
    # the sums of one part of K wait for the next in y, where outputs that meet have no room
    has_room = group(task) == 1 and writes(task) == "to_fp32" and unit(task) == 1
    in_parts = has_room and steps % 2 == 0 and steps >= 256 and not math.unpacked
    fits = _accumulators(task, row)
    if size := group_size(task):
        return {
            "accumulators": tuple(range(min(4, fits), fits + 1)),
            "token_blocks": (1,),
            "unroll": tuple(u for u in (1, 2, 4, 8) if size // 4 % u == 0 and u <= 8 // math.run),
            "passes": (1,),
            "panels": (1, 2, 4, 8),
            "chunk": (4, 8, 16, 32),
            "order": ORDERS,
        }
    unrolls = (1, 2, 4, 8) if row.dot_product == "sdot" and math.signed else (1, 2, 4)
    # for one block, or unpacked for all of them, and better for more outputs
    ready = bool(math.signed or math.pairs or math.matrix)
    # more than two take LLVM twice as long where a step has several instructions, for no speed; a
    # panel that was unpacked has too few sums for one block where it is made for four
    most = min(2 if math.run > 1 or math.unpacked else 4, fits // 2)
    return {
        "accumulators": tuple(range(min(4, fits), fits + 1, 2 if math.matrix else 1)),
        "token_blocks": (1,) if ready else tuple(range(1, most + 1)),
        "unroll": tuple(u for u in unrolls if steps % u == 0),
        "passes": (1, 2) if in_parts else (1,),
        "panels": (2, 4, 8, 16) if ready else (1, 2, 4, 8),
        "chunk": (4, 8, 16, 32),
        "order": ORDERS,
    }


def default(task: Task, row: Row) -> Knobs:
    """The widest tile of four token blocks (ten loads for 24 multiply-adds, where two blocks take
    fourteen), of one where their activations would push accumulators out of the registers.
    """
    if tiles.takes(task, row):
        return tiles.default(task, row)
    choices = space(task, row)
    room = lanes.vector_capacity(row) - _accumulators(task, row)
    # sums of groups leave few registers to those of a run
    most = 12 if group_size(task) and multiplies(task, row).run > 1 else 24
    most = min(_accumulators(task, row), most)
    wide = [blocks for blocks in choices["token_blocks"] if 4 * blocks <= most]
    token_blocks = max(wide) if room >= 4 else 1
    token_blocks = max(1, min(token_blocks, most // unit(task)))
    widest = most // token_blocks
    # one output less where that pads nothing; else padding costs less than a narrower tile
    math = multiplies(task, row)
    step = 2 if math.matrix else 1
    block = 4 * BLOCK_TOKENS * math.lanes(task.shape["inputs"])  # bytes of x
    room = CHUNK_BYTES if math.unpacked or group_size(task) else 0
    even = [n for n in (widest, widest - step) if task.shape["outputs"] % n == 0]
    width = max(even, default=widest)
    return {
        "accumulators": max(width * token_blocks, min(choices["accumulators"])),
        "token_blocks": token_blocks,
        "unroll": 1 if math.pairs or math.run > 1 else max(choices["unroll"]),
        "passes": 1,
        # what is made ready for a job serves all of its panels
        "panels": 16 if 16 in choices["panels"] else 4,
        "chunk": next(c for c in (16, 8, 4) if c == 4 or c * block <= room),
        "order": BY_CHUNKS,
    }


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """w (K, N) → (panels, K / G, width): each panel is read front to back; vectors (N) padded.

    ``weights`` are w (float32, or int8 for bytes), then the vectors in the kernel's order.
    """
    if tiles.takes(task, row):
        return tiles.pack(task, knobs, weights, row)
    limits = [weights[-1]] if writes(task) == "to_int8" else []
    w, *vectors = ordered(task, weights[: len(weights) - len(limits)])
    of = Layout.of(task, knobs, row)
    padding = of.panels * of.width - w.shape[1]
    if size := group_size(task):
        scales, *vectors = vectors
        nibbles = pack_nibbles(w, scales, of.panels, of.width, size)
        return [*nibbles, *(np.pad(v, (0, padding)) for v in vectors), *limits]
    if of.math.run > 1 and largest_sums(w).max() > BOUND:
        raise ValueError(f"{task.name}: weights are not bounded")
    offset = [np.pad(byte_offset(w), (0, padding))] if of.math.signed else []
    w = np.pad(weight_lanes(task, w), ((0, 0), (0, padding)))
    if of.math.unpacked:
        w = pack_panels(w, of.panels)
    else:
        if (each := of.math.together) > 1:
            w = np.pad(w, ((0, -len(w) % each), (0, 0)))
            w = w.reshape(of.steps, each, -1).transpose(0, 2, 1)
        w = np.ascontiguousarray(w.reshape(of.steps, of.panels, -1).transpose(1, 0, 2))
    return [w, *(np.pad(v, (0, padding)) for v in vectors), *limits, *offset]


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc, by tiles where the machine has them."""
    write = tiles.kernel if tiles.takes(task, row) else dense_kernel.kernel
    return write(task, knobs, row)


def flops(task: Task, tokens: int) -> float:
    """Two per multiply-add; the epilogue is not counted."""
    return 2.0 * tokens * task.shape["inputs"] * task.shape["outputs"]


def _accumulators(task: Task, row: Row) -> int:
    """Vectors that may accumulate: what the activations and a broadcast weight leave of the
    registers. Bytes that are widened at each product take twice as many.
    """
    capacity = lanes.vector_capacity(row)
    widens = group(task) == 4 and row.dot_product is None and not multiplies(task, row).pairs
    return capacity - max(4 if widens else 2, capacity // 8)


dense = Schedule(
    *("dense", space, default, kernel, dense_samples.sample, flops, pack),
    later={"order": BY_PANELS},
)
