"""Multiplies matrices in lanes, skipping lanes of weights that are zero, with the epilogue of
``dense``: y = activation(x W + b) + residual, any number of tokens, in every precision.

A lane of weights is what one multiply-add takes: 1, 2 or 4 inputs (G) of one output. So one kernel
serves every pattern of zeros; the pattern decides how many lanes are not zero, ``density`` percent.
Zeros in blocks of 4 inputs (4x1) with bytes, or anywhere with float32, leave no lane half empty.

    x (m, K / G, 16), [range (m, 2, 16)], [residual (m, N, 16)],
    values (nonzeros), index (nonzeros), starts, slots, units (see ``sparse_pack``),
    [scale, [shift]], b  →  y (m, N, 16)

    parallel over equal shares of chunks of token blocks × groups of outputs
      for each tile of token blocks
        for each part of K, panel of outputs whose lists have about the same length
          outputs × token_blocks accumulators in registers
            for each position, output: load value and index, multiply-add once per block
          sums to a buffer in the cache
        values, activation, residual, packing of the group's sums

Why lists of equal length side by side: a list has some 20 entries, so that a wrongly predicted end
costs as much as half of them; and four sums of one token block hide the multiply-add's latency.
"""

from __future__ import annotations

from bertile.schedules.cpu import lanes, sparse_samples
from bertile.schedules.cpu.product import group, group_size, unit
from bertile.schedules.cpu.sparse_kernel import kernel
from bertile.schedules.cpu.sparse_pack import PARTS, pack
from bertile.schedules.schedule import Knobs, Row, Schedule, Space
from bertile.schedules.task import Task


def space(task: Task, row: Row) -> Space:
    """The register tile, the parts of K, and how the work is cut between threads.

    A tile of ``accumulators`` vectors is ``token_blocks`` blocks by ``accumulators //
    token_blocks`` outputs.
    """
    depth = -(-task.shape["inputs"] // group(task))
    units = -(-task.shape["outputs"] // unit(task))
    fits = _accumulators(task, row)
    return {
        "accumulators": tuple(n for n in (4, 8, 16) if n <= fits),
        "token_blocks": tuple(b for b in (1, 2, 4) if b <= fits),
        "parts": tuple(p for p in (1, 2, 3, 4, 6, 8, 12, 16) if p == 1 or depth // p >= 64),
        "groups": tuple(g for g in (1, 2, 4, 8, 16, 32, 64) if g <= max(1, units // 4)),
    }


def default(task: Task, row: Row) -> Knobs:
    """Two blocks by four outputs: the activations of two blocks and 256 lanes fill the first-level
    cache, and from the next one they come at two thirds of the speed.
    """
    choices = space(task, row)
    depth = -(-task.shape["inputs"] // group(task))
    return {
        "accumulators": min(8, max(choices["accumulators"])),
        "token_blocks": 2,
        "parts": min(choices["parts"], key=lambda p: abs(p - depth / 224)),
        "groups": min(choices["groups"], key=lambda g: abs(task.shape["outputs"] / g - 160)),
    }


def flops(task: Task, tokens: int) -> float:
    """Two per multiply-add of a lane that is not zero; the epilogue is not counted."""
    dense = 2.0 * tokens * task.shape["inputs"] * task.shape["outputs"]
    return dense * task.shape["density"] / 100


def _accumulators(task: Task, row: Row) -> int:
    """Vectors that may accumulate: what an activation and a broadcast weight leave of the
    registers. Bytes that are widened first take more.
    """
    widened = group(task) == 4 and row.dot_product is None
    capacity = lanes.vector_capacity(row)
    return capacity - (capacity // 4 if widened else 2)


def refuses(task: Task) -> str | None:
    """What of a task has no kernel here, None if nothing."""
    return "weights of 4 bits" if group_size(task) else None


sparse = Schedule(
    "sparse", space, default, kernel, sparse_samples.sample, flops, pack, PARTS, refuses
)
