"""A matrix product in lanes with its epilogue: y = activation(x W + b) + residual, any number of
tokens.

    x (m, K, 16), w (N / width, K, width), b (N), residual (m, N, 16)  →  y (m, N, 16)

    parallel over tasks = groups of panels × chunks of token blocks
      for each pass over a part of K, panel of the group, tile of token blocks
        width × token_blocks accumulators in registers
          for k: load x once per block, broadcast w once per output, multiply-add
        one store per value; then the activation, while the tile is in the first-level cache

Why not tokens in rows and outputs in lanes: as fast for dense products, but then sparse weights,
softmax, LayerNorm and per-token scales all need shuffles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    A tile of ``accumulators`` vectors is ``token_blocks`` blocks by ``accumulators //
    token_blocks`` outputs: two knobs that keep inside the register file whatever is chosen.
    """
    inputs = task.shape["inputs"]
    fits = _accumulators(row)
    return {
        "accumulators": tuple(range(min(4, fits), fits + 1)),
        "token_blocks": tuple(b for b in (1, 2, 3, 4) if b <= fits // 2),
        "unroll": tuple(u for u in (1, 2, 4) if inputs % u == 0),
        "passes": tuple(p for p in (1, 2) if p == 1 or (inputs % p == 0 and inputs >= 256)),
        "panels": (1, 2, 4, 8),
        "chunk": (8, 16, 32),
    }


def default(task: Task, row: Row) -> Knobs:
    """The widest tile of four token blocks (ten loads for 24 multiply-adds, where two blocks take
    fourteen), of one where their activations would push accumulators out of the registers.
    """
    choices = space(task, row)
    token_blocks = 4 if _accumulators(row) + 4 <= lanes.vector_capacity(row) else 1
    widest = min(_accumulators(row), 24) // token_blocks
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


def panel_width(task: Task, knobs: Knobs) -> int:
    """How many outputs a panel of packed weights is wide: those of the tile of most blocks."""
    return min(knobs["accumulators"] // knobs["token_blocks"], task.shape["outputs"])


def panel_count(task: Task, knobs: Knobs) -> int:
    """How many panels there are, padded so that a tile of fewer blocks can take several at once."""
    panels = -(-task.shape["outputs"] // panel_width(task, knobs))
    return -(-panels // knobs["token_blocks"]) * knobs["token_blocks"]


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [residual], w, b, y)."""
    inputs, outputs = task.shape["inputs"], task.shape["outputs"]
    width, panels, chunk = panel_width(task, knobs), panel_count(task, knobs), knobs["chunk"]
    group = min(knobs["panels"] * knobs["token_blocks"], panels)
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
                _tiles(tile, job % groups * group, group, first, count, part)
    return made.func


def _tiles(tile: _Tile, base: Any, group: int, first: Any, count: Any, part: int) -> None:
    """Tiles of ``token_blocks`` blocks by one panel; then the blocks that are left, by as many
    panels at once as fill the registers, so that a short request runs at full speed too.
    """
    wide = tile.knobs["token_blocks"]
    with tile.panels(base, group, 1) as panel, T.serial(count // wide) as t:
        tile.emit(panel, 1, first + t * wide, wide, part)
    for rest in range(1, wide):
        with T.If(count % wide == rest), T.Then():
            together = wide // rest
            with tile.panels(base, group, together) as panel:
                tile.emit(panel, together, first + count // wide * wide, rest, part)


class _Tile:
    """Emits the product of some panels of outputs and a few token blocks, over one part of K."""

    def __init__(
        self, task: Task, knobs: Knobs, x: Any, residual: Any, w: Any, b: Any, y: Any
    ) -> None:
        self.task, self.knobs = task, knobs
        self.width = panel_width(task, knobs)
        self.x, self.residual, self.w, self.b, self.y = x, residual, w, b, y

    @contextmanager
    def panels(self, base: Any, group: int, together: int) -> Iterator[Any]:
        """A loop over the panels of a group, ``together`` at a time; gives the first of them."""
        count = panel_count(self.task, self.knobs)
        with T.serial(group // together) as member:
            panel = T.Bind(base + member * together)
            if count % group:  # the last group is not full
                with T.If(panel < count), T.Then():
                    yield panel
            else:
                yield panel

    def emit(self, panel: Any, panels: int, block: Any, token_blocks: int, part: int) -> None:
        """The tile of ``panels`` panels from ``panel``, ``token_blocks`` blocks from ``block``."""
        unroll = self.knobs["unroll"]
        depth = self.task.shape["inputs"] // self.knobs["passes"]
        unroll = unroll if depth % unroll == 0 else 1
        # (accumulator, panel, output within it, block)
        registers = iter(lanes.registers(panels * self.width * token_blocks))
        tile = [
            (next(registers), panel + p, n, block + t)
            for p in range(panels)
            for n in range(self.width)
            for t in range(token_blocks)
        ]
        self._start(tile, part)
        with T.serial(depth // unroll) as outer, T.unroll(unroll) as inner:
            k = part * depth + outer * unroll + inner
            for total, p, n, t in tile:
                product = lanes.load(self.x, t, k) * lanes.splat(self.w[p, k, n])
                lanes.write(total, lanes.read(total) + product)
        fits = (panel + panels) * self.width <= self.task.shape["outputs"]
        if panel_count(self.task, self.knobs) * self.width == self.task.shape["outputs"]:
            self._store(tile, part, padded=False)
        else:
            with T.If(fits):
                with T.Then():
                    self._store(tile, part, padded=False)
                with T.Else():
                    self._store(tile, part, padded=True)
        if part == self.knobs["passes"] - 1 and self.task.shape["activation"] != "none":
            self._activate(panel * self.width, panels * self.width, block, token_blocks)

    def _start(self, tile: list, part: int) -> None:
        """The first part begins at the bias, a later one at what the parts before it left in y."""
        outputs = self.task.shape["outputs"]
        for total, p, n, t in tile:
            channel = p * self.width + n
            if part == 0:
                lanes.write(total, lanes.splat(self.b[channel]))
            else:
                # a padded output has nothing in y: read a channel that exists, drop it later
                lanes.write(total, lanes.load(self.y, t, T.min(channel, outputs - 1)))

    def _store(self, tile: list, part: int, padded: bool) -> None:
        """One store per sum; what has no activation gets its residual on the way."""
        residual = self.residual if self.task.shape["activation"] == "none" else None
        for total, p, n, t in tile:
            channel = p * self.width + n
            value = lanes.read(total)
            if residual is not None and part == self.knobs["passes"] - 1:
                value = value + lanes.load(residual, t, channel)
            if padded:
                with T.If(channel < self.task.shape["outputs"]), T.Then():
                    lanes.store(self.y, value, t, channel)
            else:
                lanes.store(self.y, value, t, channel)

    def _activate(self, low: Any, count: int, block: Any, token_blocks: int) -> None:
        """The activation on what was just stored and still is in the first-level cache.

        A loop, not an expression per accumulator: that would be a hundred copies of a polynomial,
        which take TVM a second to compile and are no faster.
        """
        activation = ACTIVATIONS[self.task.shape["activation"]]
        last = T.min(count, self.task.shape["outputs"] - low)
        with T.serial(token_blocks) as t, T.serial(last) as n:
            value = activation(lanes.load(self.y, block + t, low + n))
            if self.residual is not None:
                value = value + lanes.load(self.residual, block + t, low + n)
            lanes.store(self.y, value, block + t, low + n)


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """w (K, N), b (N) → w (panels, K, width), b padded: each panel is read front to back."""
    w, b = weights
    inputs, outputs = w.shape
    width, panels = panel_width(task, knobs), panel_count(task, knobs)
    padding = panels * width - outputs
    w = np.pad(w, ((0, 0), (0, padding))) if padding else w
    packed = np.ascontiguousarray(w.reshape(inputs, panels, width).transpose(1, 0, 2))
    return [packed, np.pad(b, (0, padding))]


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Random operands, scaled as in a trained network, and the product by numpy in float64."""
    inputs, outputs = task.shape["inputs"], task.shape["outputs"]
    w = (rng.standard_normal((inputs, outputs)) * inputs**-0.5).astype("float32")
    b = rng.standard_normal(outputs).astype("float32")
    x = rng.standard_normal((blocks * LANES, inputs)).astype("float32")
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
