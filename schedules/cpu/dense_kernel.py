"""The loops of the matrix product in lanes; what it computes is said in ``dense``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic, arithmetic
from bertile.schedules.cpu.product import Epilogue, arguments, packed, precision
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task


def panel_width(task: Task, knobs: Knobs) -> int:
    """How many outputs a panel of packed weights is wide: those of the tile of most blocks.

    A whole number of the lanes that are stored.
    """
    lane = packed(task)
    width = min(knobs["accumulators"] // knobs["token_blocks"], task.shape["outputs"])
    return max(lane, width // lane * lane)


def panel_count(task: Task, knobs: Knobs) -> int:
    """How many panels there are, padded so that a tile of fewer blocks can take several at once."""
    panels = -(-task.shape["outputs"] // panel_width(task, knobs))
    return -(-panels // knobs["token_blocks"]) * knobs["token_blocks"]


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [range], [residual], w, [scale, [shift]], b, [limits], y)."""
    math = arithmetic(precision(task).removesuffix("_static"), row)
    depth = math.lanes(task.shape["inputs"])
    width, panels = panel_width(task, knobs), panel_count(task, knobs)
    group = min(knobs["panels"] * knobs["token_blocks"], panels)
    groups = -(-panels // group)
    with lanes.kernel(task.name) as made:

        def weights() -> Any:
            return made.tensor("w", panels, depth, width, dtype=math.weight)

        x, w, epilogue = arguments(made, task, math, panels * width, weights)
        chunk = knobs["chunk"]
        chunks = T.Bind((made.blocks + (chunk - 1)) // chunk)
        with T.parallel(groups * chunks) as job:
            scratch = T.alloc_buffer((width * knobs["token_blocks"], lanes.LANES), "float32")
            tile = _Tile(task, knobs, math, x, w, epilogue, scratch if packed(task) > 1 else None)
            # threads take their jobs in this order: each some panels of all tokens, so that no
            # thread is left with the shorter chunk
            first = T.Bind(job % chunks * chunk)
            count = T.Bind(T.min(chunk, made.blocks - first))
            for part in range(knobs["passes"]):
                _tiles(tile, job // chunks * group, group, first, count, part)
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
        self,
        task: Task,
        knobs: Knobs,
        math: Arithmetic,
        x: Any,
        w: Any,
        epilogue: Epilogue,
        scratch: Any,
    ) -> None:
        self.task, self.knobs, self.math, self.scratch = task, knobs, math, scratch
        self.width, self.outputs = panel_width(task, knobs), task.shape["outputs"]
        self.x, self.w, self.epilogue = x, w, epilogue

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
        depth = self.math.lanes(self.task.shape["inputs"]) // self.knobs["passes"]
        unroll = unroll if depth % unroll == 0 else 1
        registers = iter(lanes.registers(panels * self.width * token_blocks, dtype=self.math.total))
        # (accumulator, panel, output within it, block)
        tile = [
            (next(registers), panel + p, n, block + t)
            for p in range(panels)
            for n in range(self.width)
            for t in range(token_blocks)
        ]
        self._start(tile, part)
        with T.serial(depth // unroll) as outer:
            start = T.Bind(part * depth + outer * unroll)
            self._prefetch(panel + panels, panels, start, unroll)
            with T.unroll(unroll) as inner:
                for total, p, n, t in tile:
                    k = start + inner
                    x, w = lanes.load(self.x, t, k), self.math.spread(self.w[p, k, n])
                    lanes.write(total, self.math.multiply_add(lanes.read(total), x, w))
        last = part == self.knobs["passes"] - 1
        low, count = panel * self.width, panels * self.width
        if self.scratch is not None:
            for i, (total, p, n, t) in enumerate(tile):
                place = i % token_blocks * count + i // token_blocks
                lanes.store(self.scratch, self._value(total, p * self.width + n, t), place)
            self._narrow(low, count, block, token_blocks)
            return
        if panel_count(self.task, self.knobs) * self.width == self.outputs:
            self._store(tile, last, padded=False)
        else:
            with T.If((panel + panels) * self.width <= self.outputs):
                with T.Then():
                    self._store(tile, last, padded=False)
                with T.Else():
                    self._store(tile, last, padded=True)
        if last and self.task.shape["activation"] != "none":
            self._activate(low, count, block, token_blocks)

    def _prefetch(self, panel: Any, panels: int, start: Any, unroll: int) -> None:
        """Ask for what the next tile reads where this one reads the ``unroll`` rows from ``start``.

        In a model every panel comes from memory, and the processor's own prefetching starts anew
        with each: without this 16 and 32 tokens take a quarter longer, 48 a tenth, 128 2%.
        """
        per_line = lanes.CACHE_LINE // (self.width * np.dtype(self.math.weight).itemsize)
        for p in range(panels):
            for row in range(0, unroll, max(per_line, 1)):
                lanes.prefetch(self.w, panel + p, start + row, 0)

    def _start(self, tile: list, part: int) -> None:
        """Floats: the first part begins at the bias, a later one at what the parts before it left
        in y. Bytes begin at zero.
        """
        for total, p, n, t in tile:
            channel = p * self.width + n
            if self.math.group == 4:
                lanes.write(total, self.math.zero())
            elif part == 0:
                lanes.write(total, lanes.splat(self.epilogue.b[channel]))
            else:
                # a padded output has nothing in y: read a channel that exists, drop it later
                channel = T.min(channel, self.outputs - 1)
                lanes.write(total, lanes.load(self.epilogue.y, t, channel))

    def _value(self, total: Any, channel: Any, t: Any) -> Any:
        return self.epilogue.value(lanes.read(total), channel, t)

    def _store(self, tile: list, last: bool, padded: bool) -> None:
        """One store per sum; what has no activation gets its residual on the way."""
        residual = self.epilogue.residual if self.task.shape["activation"] == "none" else None
        for total, p, n, t in tile:
            channel = p * self.width + n
            value = self._value(total, channel, t)
            if residual is not None and last:
                value = value + lanes.load(residual, t, channel)
            if padded:
                with T.If(channel < self.outputs), T.Then():
                    lanes.store(self.epilogue.y, value, t, channel)
            else:
                lanes.store(self.epilogue.y, value, t, channel)

    def _activate(self, low: Any, count: int, block: Any, token_blocks: int) -> None:
        """The activation on what was just stored and still is in the first-level cache.

        A loop, not an expression per accumulator: that would be a hundred copies of a polynomial,
        which take TVM a second to compile and are no faster.
        """
        last = T.min(count, self.outputs - low)
        y = self.epilogue.y
        with T.serial(token_blocks) as t, T.serial(last) as n:
            value = self.epilogue.finished(lanes.load(y, block + t, low + n), block + t, low + n)
            lanes.store(y, value, block + t, low + n)

    def _narrow(self, low: Any, count: int, block: Any, token_blocks: int) -> None:
        """Activation, residual and packing of the tile in the scratch buffer."""
        lane = packed(self.task)
        last = T.min(count, self.outputs - low) // lane
        with T.serial(token_blocks) as t, T.serial(last) as n:
            values = []
            for i in range(lane):
                value = lanes.load(self.scratch, t * count + n * lane + i)
                channel = low + n * lane + i
                values.append(T.Bind(self.epilogue.finished(value, block + t, channel)))
            self.epilogue.store(values, block + t, T.Bind((low + n * lane) // lane))
