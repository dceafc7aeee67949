"""A matrix product on the GPU with its epilogue: y = activation(x W + b) + residual, any number of
rows, in float16, bfloat16, tf32, float32 or bytes (formulas of bytes: ``schedules/cpu/dense.py``).

    x (rows, pitch(K)), [range (rows, 2)], [residual (rows, pitch(N))],
    w (panels of 128 bytes of K, pitch(N), 128 bytes), [scale (N), [shift (N)]], b (N), [limits (2)]
        →  y (rows, pitch(N))

    for each tile of the result, a block of threads
      for each slot of panels (``dense.cuh``), filled by cp.async some slots ahead
        warps: ldmatrix, mma.sync on their part of the tile, and on their panel of the slot
      add up what groups of warps have, finish, store by rows

Why not W in the order in which a warp holds it: then each way to multiply (ldmatrix and mma.sync,
wgmma, float32) needs a packing of its own; in rows of 128 swizzled bytes one serves all, and every
tile, at the same number of reads of shared memory.

One task is run on 16 rows and on many thousands: there are two entries, for fewer than ``few`` rows
and for others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bertile.schedules.cuda.dense_cost import cycles
from bertile.schedules.cuda.dense_kernel import kernel
from bertile.schedules.cuda.dense_samples import sample
from bertile.schedules.cuda.dense_tile import PANEL, Operands, Tile, rounded_tf32
from bertile.schedules.cuda.forms import pitch, to_device
from bertile.schedules.schedule import Gpu, Knobs, Row, Schedule, Space
from bertile.schedules.task import Task

SPLITS = (192, 384, 768, 1536)
TILES: Space = {
    "rows": (32, 64, 128, 256),
    "columns": (32, 64, 96, 128, 192, 256),
    "tall": (1, 2, 4),
    "wide": (2, 4, 8),
    "slices": (1, 2),
    "stages": (2, 3, 4),
    "band": (1, 4, 16),
}
FEW: Space = {
    "few_rows": (16, 32, 64, 128),
    "few_columns": (16, 32, 48, 64, 96, 128),
    "few_tall": (1, 2, 4),
    "few_wide": (2, 4, 8),
    "few_slices": (1, 2, 4, 8),
    "few_stages": (2, 3, 4, 6, 8),
    "few_band": (1, 8),
}


def space(task: Task, row: Row) -> Space:
    """Two tiles, and below how many rows the first is taken. A tile that a GPU cannot run stands
    for the nearest one that it can.
    """
    return {"few": (0, *SPLITS), **FEW, **TILES}


def default(task: Task, row: Row) -> Knobs:
    """What ``dense_cost`` thinks fastest for 128 and for 4096 rows, and where they meet."""
    few, few_tile = _fastest(task, row.gpu, 128, "few_")
    many, many_tile = _fastest(task, row.gpu, 4096, "")
    meet = [n for n in SPLITS if cycles(many_tile, n, row.gpu) < cycles(few_tile, n, row.gpu)]
    return {"few": min(meet, default=SPLITS[-1]), **few, **many}


@lru_cache(maxsize=256)
def _fastest(task: Task, gpu: Gpu, rows: int, prefix: str) -> tuple[Knobs, Tile]:
    """The knobs of a tile, of those that are what they say."""
    choices = FEW if prefix else TILES
    band = f"{prefix}band"  # the cost does not tell bands apart
    searched = {**choices, band: choices[band][1:2]}
    best: tuple[float, Knobs, Tile] | None = None
    for values in itertools.product(*searched.values()):
        knobs = dict(zip(choices, values))
        plain = {key.removeprefix(prefix): value for key, value in knobs.items()}
        if plain["tall"] * 16 > plain["rows"] or plain["tall"] * plain["wide"] % plain["slices"]:
            continue
        tile = Tile.of(task, knobs, gpu, prefix)
        plain["columns"] = min(plain["columns"], pitch(tile.operands.outputs))
        if any(getattr(tile, key) != value for key, value in plain.items()):
            continue
        found = cycles(tile, rows, gpu)
        if best is None or found < best[0]:
            best = found, knobs, tile
    return best[1], best[2]


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """w (K, N) → (panels, pitch(N), elements of 128 bytes of K), each 16 bytes where the swizzle
    has them; vectors (N) padded to the pitch. Padding is zero.
    """
    of = Operands.of(task)
    w, *vectors = weights
    each = PANEL // of.size
    columns = pitch(of.outputs)
    w = np.pad(w.T, ((0, columns - of.outputs), (0, of.panels * each - of.inputs)))
    if of.precision == "tf32":
        w = rounded_tf32(w)
    stored = w if of.read == "u8" else to_device(w, of.read)
    chunks = stored.reshape(columns, of.panels, 8, each // 8).transpose(1, 0, 2, 3)
    order = np.arange(8) ^ (np.arange(columns) % 8)[:, None]  # its own inverse
    packed = np.take_along_axis(chunks, order[None, :, :, None], 2)
    packed = np.ascontiguousarray(packed.reshape(of.panels, columns, each))
    padding = columns - of.outputs
    return [packed, *(np.pad(v, (0, padding)) if len(v) != 2 else v for v in vectors)]


def flops(task: Task, tokens: int) -> float:
    """Two per multiply-add; the epilogue is not counted."""
    return 2.0 * tokens * task.shape["inputs"] * task.shape["outputs"]


dense = Schedule("dense", space, default, kernel, sample, flops, pack)
