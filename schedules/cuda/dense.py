"""Multiplies matrices on the GPU, with the epilogue: y = activation(x W + b) + residual, any number
of rows, in float16, bfloat16, tf32, float32 or bytes (of these, ``schedules/cpu/dense.py`` has the
formulas); or what ``outputs_that_meet`` make: gated networks, rotary positions.

    x (rows, pitch(K)), [range (rows, 2)], [residual (rows, pitch(N))], [cos, sin (rows, pitch(D))],
    w (panels of 128 bytes of K, pitch(N), 128 bytes), [scale (N), [shift (N)]], b (N), [limits (2)]
        →  y (rows, pitch(N))

    for each tile of the result, a block of threads
      for each slot of panels (``dense.cuh``), filled by cp.async some slots ahead
        warps: ldmatrix, mma.sync on their part of the tile, and on their panel of the slot
      add up what groups of warps have, finish, store by rows

Why not W in the order in which a warp holds it: then each way to multiply (ldmatrix and mma.sync,
wgmma, float32) needs a packing of its own; in rows of 128 swizzled bytes one serves all, and every
tile, at the same number of reads of shared memory.

One task is run on 16 rows and on many thousands: there are three entries, each with a tile of its
own (``dense_space``). Where there are many, the product may go by wgmma (``dense_wgmma.cuh``).

H200, the four products of a layer of BERT-base in float16, as counted and not measured. 128 rows:
14 MB of W from memory (3.3 µs), 1.8 GFLOP (2.3 µs), 91 MB from the second-level cache by 96 to 128
blocks, one to a multiprocessor: 18 µs. 4096 rows: 58 GFLOP (73 µs), 128 to 384 blocks, one to a
multiprocessor: 114 µs, of which the cache's bytes and the epilogues, which nothing hides, are most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bertile.schedules.cuda.dense_kernel import kernel
from bertile.schedules.cuda.dense_samples import sample
from bertile.schedules.cuda.dense_space import default, space
from bertile.schedules.cuda.dense_tile import PANEL, Operands, rounded_tf32
from bertile.schedules.cuda.forms import to_device
from bertile.schedules.outputs_that_meet import ordered
from bertile.schedules.schedule import Knobs, Row, Schedule
from bertile.schedules.task import Task


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """w (K, N) → (panels, pitch(N), elements of 128 bytes of K), outputs that meet side by side,
    each 16 bytes where the swizzle has them; vectors (N) padded to the pitch. Padding is zero.
    """
    of = Operands.of(task)
    limits = list(weights[-1:]) if of.result == "u8" else []
    w, *vectors = ordered(task, weights[: len(weights) - len(limits)])
    each = PANEL // of.size
    columns = of.columns
    w = np.pad(w.T, ((0, columns - of.outputs), (0, of.panels * each - of.inputs)))
    if of.precision.rounds:
        w = rounded_tf32(w)
    stored = w if of.precision.in_bytes else to_device(w, of.read)
    chunks = stored.reshape(columns, of.panels, 8, each // 8).transpose(1, 0, 2, 3)
    order = np.arange(8) ^ (np.arange(columns) % 8)[:, None]  # its own inverse
    packed = np.take_along_axis(chunks, order[None, :, :, None], 2)
    packed = np.ascontiguousarray(packed.reshape(of.panels, columns, each))
    padding = columns - of.outputs
    return [packed, *(np.pad(v, (0, padding)) for v in vectors), *limits]


def flops(task: Task, tokens: int) -> float:
    """Two per multiply-add; the epilogue is not counted."""
    return 2.0 * tokens * task.shape["inputs"] * task.shape["outputs"]


dense = Schedule("dense", space, default, kernel, sample, flops, pack)
