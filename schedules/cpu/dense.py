"""A matrix product in lanes with its epilogue: y = activation(x W + b) + residual, any number of
tokens.

    x (m, K, 16), w (N / width, K, width), b (N), residual (m, N, 16)  →  y (m, N, 16)

    parallel over tasks = groups of panels × chunks of token blocks
      for each pass over a part of K, panel of the group, tile of token blocks
        width × token_blocks accumulators in registers
          for k: load x once per block, broadcast w once per output, multiply-add
        epilogue on the registers, one store per value

Why not tokens in rows and outputs in lanes: as fast for dense products, but then sparse weights,
softmax, LayerNorm and per-token scales all need shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.lanes import LANES
from bertile.schedules.cpu.vector_math import ACTIVATIONS
from bertile.schedules.reference import apply_activation
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task


def space(task: Task, row: Row) -> Space:
    """The register tile, the unrolling, and how the work is cut between caches and threads.

    A tile of ``accumulators`` vectors is ``accumulators // token_blocks`` outputs wide: two knobs
    that any
    choice of keeps inside the register file.
    """
    inputs = task.shape["inputs"]
    fits = _accumulators(row)
    return {
        "accumulators": tuple(range(min(4, fits), fits + 1)),
        "token_blocks": tuple(b for b in (1, 2, 3, 4) if b <= fits // 2),
        "unroll": tuple(u for u in (1, 2, 4, 8) if inputs % u == 0),
        "passes": tuple(
            p for p in (1, 2, 3, 4) if p == 1 or (inputs % p == 0 and inputs >= 128 * p)
        ),
        "panels": (1, 2, 4, 8, 16),
        "chunk": (8, 16, 32, 64),
    }


def default(task: Task, row: Row) -> Knobs:
    """The widest tile of two token blocks, of one where their activations would push accumulators
    out of the registers; K in parts whose activations stay in a second-level cache.
    """
    choices = space(task, row)
    inputs, outputs = task.shape["inputs"], task.shape["outputs"]
    token_blocks = 2 if _accumulators(row) + 2 < lanes.vector_capacity(row) else 1
    widest = _accumulators(row) // token_blocks
    even = [n for n in range(widest * 2 // 3, widest + 1) if n and outputs % n == 0]
    # an even width pads nothing; without one, padding the last panel costs less than a narrow tile
    width = max(even, default=widest)
    passes = min(choices["passes"], key=lambda p: abs(inputs // p - 1024))
    return {
        "accumulators": max(width * token_blocks, min(choices["accumulators"])),
        "token_blocks": token_blocks,
        "unroll": max(u for u in choices["unroll"] if u <= 4),
        "passes": passes,
        "panels": 1 if passes == 1 else 8,
        "chunk": 32,
    }


def tile_outputs(task: Task, knobs: Knobs) -> int:
    """How many outputs a register tile, and a panel of packed weights, is wide."""
    return min(knobs["accumulators"] // knobs["token_blocks"], task.shape["outputs"])


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [residual], w, b, y)."""
    inputs, outputs = task.shape["inputs"], task.shape["outputs"]
    width, chunk = tile_outputs(task, knobs), knobs["chunk"]
    panels = -(-outputs // width)
    group = min(knobs["panels"], panels)
    groups = -(-panels // group)
    with lanes.kernel(task.name) as made:
        x = made.activation("x", inputs)
        residual = made.activation("residual", outputs) if task.shape["residual"] else None
        w = made.tensor("w", panels, inputs, width)
        b = made.tensor("b", panels * width)
        y = made.activation("y", outputs)
        tile = _Tile(task, knobs, x, residual, w, b, y)
        chunks = T.Bind((made.blocks + (chunk - 1)) // chunk)
        with T.parallel(groups * chunks) as job:
            first = T.Bind(job // groups * chunk)
            count = T.Bind(T.min(chunk, made.blocks - first))
            for part in range(knobs["passes"]):
                with T.serial(group) as member:
                    panel = T.Bind(job % groups * group + member)
                    if panels % group:
                        with T.If(panel < panels), T.Then():
                            _token_tiles(tile, panel, first, count, part)
                    else:
                        _token_tiles(tile, panel, first, count, part)
    return made.func


def _token_tiles(tile: _Tile, panel: Any, first: Any, count: Any, part: int) -> None:
    """Tiles of ``token_blocks`` blocks, then one smaller tile for the rest."""
    wide = tile.knobs["token_blocks"]
    with T.serial(count // wide) as t:
        tile.emit(panel, first + t * wide, wide, part)
    for rest in range(1, wide):
        with T.If(count % wide == rest), T.Then():
            tile.emit(panel, first + count // wide * wide, rest, part)


class _Tile:
    """Emits the product of one panel of outputs and a few token blocks, over one part of K."""

    def __init__(
        self, task: Task, knobs: Knobs, x: Any, residual: Any, w: Any, b: Any, y: Any
    ) -> None:
        self.task, self.knobs = task, knobs
        self.width = tile_outputs(task, knobs)
        self.x, self.residual, self.w, self.b, self.y = x, residual, w, b, y

    def emit(self, panel: Any, block: Any, token_blocks: int, part: int) -> None:
        width, unroll = self.width, self.knobs["unroll"]
        depth = self.task.shape["inputs"] // self.knobs["passes"]
        unroll = unroll if depth % unroll == 0 else 1
        total = lanes.registers(token_blocks, width)
        tile = [(n, t) for n in range(width) for t in range(token_blocks)]
        self._start(total, panel, block, tile, part)
        with T.serial(depth // unroll) as outer:
            with T.unroll(unroll) as inner:
                k = part * depth + outer * unroll + inner
                for n, t in tile:
                    product = lanes.load(self.x, block + t, k) * lanes.splat(self.w[panel, k, n])
                    lanes.write(total[t][n], lanes.read(total[t][n]) + product)
        outputs = self.task.shape["outputs"]
        if outputs % width == 0:
            self._finish(total, panel, block, tile, part)
            return
        with T.If(panel < outputs // width):
            with T.Then():
                self._finish(total, panel, block, tile, part)
            with T.Else():
                kept = [(n, t) for n, t in tile if n < outputs % width]
                self._finish(total, panel, block, kept, part)

    def _start(self, total: Any, panel: Any, block: Any, tile: list, part: int) -> None:
        """The first part begins at the bias, a later one at what the parts before it left in y."""
        outputs, width = self.task.shape["outputs"], self.width
        for n, t in tile:
            channel = panel * width + n
            if part == 0:
                lanes.write(total[t][n], lanes.splat(self.b[channel]))
            else:
                # a padded output has nothing in y: read a channel that exists, drop it later
                inside = channel if outputs % width == 0 else T.min(channel, outputs - 1)
                lanes.write(total[t][n], lanes.load(self.y, block + t, inside))

    def _finish(self, total: Any, panel: Any, block: Any, tile: list, part: int) -> None:
        last = part == self.knobs["passes"] - 1
        for n, t in tile:
            channel = panel * self.width + n
            value = lanes.read(total[t][n])
            if last:
                value = ACTIVATIONS[self.task.shape["activation"]](value)
                if self.residual is not None:
                    value = value + lanes.load(self.residual, block + t, channel)
            lanes.store(self.y, value, block + t, channel)


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """w (K, N), b (N) → w (panels, K, width), b padded: each panel is read front to back."""
    w, b = weights
    inputs, outputs = w.shape
    width = tile_outputs(task, knobs)
    panels = -(-outputs // width)
    padding = panels * width - outputs
    w = np.pad(w, ((0, 0), (0, padding))) if padding else w
    packed = np.ascontiguousarray(w.reshape(inputs, panels, width).transpose(1, 0, 2))
    return [packed, np.pad(b, (0, padding))]


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Random operands, scaled as in a trained network, and the product by numpy in float64."""
    inputs, outputs = task.shape["inputs"], task.shape["outputs"]
    x = rng.standard_normal((blocks * LANES, inputs)).astype("float32")
    w = (rng.standard_normal((inputs, outputs)) * inputs**-0.5).astype("float32")
    b = rng.standard_normal(outputs).astype("float32")
    expected = apply_activation(task.shape["activation"], x.astype("float64") @ w + b)
    activations = [lanes.to_lanes(x)]
    if task.shape["residual"]:
        r = rng.standard_normal((blocks * LANES, outputs)).astype("float32")
        activations.append(lanes.to_lanes(r))
        expected = expected + r
    return Sample(activations, [w, b], lanes.to_lanes(expected.astype("float32")))


def flops(task: Task, tokens: int) -> float:
    """Two per multiply-add; the epilogue is not counted."""
    return 2.0 * tokens * task.shape["inputs"] * task.shape["outputs"]


def _accumulators(row: Row) -> int:
    """Vectors that may accumulate: what the activations and a broadcast weight leave of the
    registers.
    """
    capacity = lanes.vector_capacity(row)
    return capacity - max(2, capacity // 8)


dense = Schedule("dense", space, default, kernel, sample, flops, pack)
