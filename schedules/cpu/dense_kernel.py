"""Writes the loops of the matrix product in lanes; what it computes is said in ``dense``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic
from bertile.schedules.cpu.inputs import Inputs, unzipped, zipped
from bertile.schedules.cpu.nibbles import Nibbles
from bertile.schedules.cpu.panels import Panels
from bertile.schedules.cpu.product import (
    Epilogue,
    arguments,
    group_size,
    jobs,
    multiplies,
    unit,
)
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task


def step_count(task: Task, math: Arithmetic) -> int:
    """Lanes of x, or as many of them together as a step multiplies; of groups always one."""
    depth = math.lanes(task.shape["inputs"])
    return depth if group_size(task) else -(-depth // math.together)


@dataclass(frozen=True)
class Layout:
    """How weights are packed.

    A panel has the outputs of the tile of most blocks, a whole number of those that are finished
    together, and of the pairs of a matrix. There are as many panels as a tile of fewer blocks can
    take several of at once.
    """

    math: Arithmetic
    steps: int
    width: int
    panels: int

    @staticmethod
    def of(task: Task, knobs: Knobs, row: Row) -> Layout:
        """What the knobs make of the task's shape."""
        math = multiplies(task, row)
        lane = max(unit(task), 2 if math.matrix else 1)
        width = min(knobs["accumulators"] // knobs["token_blocks"], task.shape["outputs"])
        width = max(lane, width // lane * lane)
        panels = -(-task.shape["outputs"] // width)
        panels = -(-panels // knobs["token_blocks"]) * knobs["token_blocks"]
        return Layout(math, step_count(task, math), width, panels)


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [range], [residual], [cos, sin], w, [scale, [shift]], b, [limits], y); with
    groups (x, range, [residual], [cos, sin], w, scales, shift, b, [limits], y).
    """
    of = Layout.of(task, knobs, row)
    math = of.math
    group = min(knobs["panels"] * knobs["token_blocks"], of.panels)
    groups = -(-of.panels // group)
    numbers = of.width * math.together  # of a step
    with lanes.kernel(task.name) as builder:

        def weights() -> Any:
            sizes = (builder, math, of.panels, of.steps, of.width)
            if size := group_size(task):
                return Nibbles.of_groups(*sizes, size)
            if math.unpacked:
                return Panels.declare(*sizes)
            return builder.tensor("w", of.panels, of.steps, numbers, dtype=math.weight)

        linked = replace(math, llvm=math.matrix or math.llvm)
        x, w, epilogue = arguments(builder, task, linked, of.panels * of.width, weights)
        chunk = knobs["chunk"]
        with jobs(builder.blocks, chunk, groups, knobs["order"]) as (member, first, count):
            scratch = T.alloc_buffer((of.width * knobs["token_blocks"], BLOCK_TOKENS), "float32")
            scratch = scratch if unit(task) > 1 else None
            if isinstance(w, Panels):
                w.allocate()
                inputs = Inputs(x, math, chunk, widened=bool(math.pairs), ready=False)
                of_panels = _NibbleTile if isinstance(w, Nibbles) else _PanelTile
                tile: _Tile = of_panels(task, knobs, of, inputs, w, epilogue, scratch)
            else:
                inputs = Inputs(x, math, knobs["token_blocks"], bool(math.matrix))
                of_lanes = _RunTile if math.run > 1 else _Tile
                tile = of_lanes(task, knobs, of, inputs, w, epilogue, scratch)
            for part in range(knobs["passes"]):
                tile.walk(member * group, group, first, count, part)
    return builder.func


class _Tile:
    """Emits the product of some panels of outputs and a few token blocks, over one part of K."""

    def __init__(
        self,
        task: Task,
        knobs: Knobs,
        of: Layout,
        inputs: Inputs,
        w: Any,
        epilogue: Epilogue,
        scratch: Any,
    ) -> None:
        self.task, self.knobs, self.of, self.scratch = task, knobs, of, scratch
        self.math, self.width, self.outputs = of.math, of.width, task.shape["outputs"]
        self.inputs, self.w, self.epilogue = inputs, w, epilogue
        self.total = self.math.total  # of the registers of a tile

    def walk(self, base: Any, group: int, first: Any, count: Any, part: int) -> None:
        """Tiles of ``token_blocks`` blocks by a panel; then the blocks that are left, by as many
        panels at once as fill the registers, so that a short request runs at full speed too.
        """
        wide = self.knobs["token_blocks"]
        if self.inputs.buffer is not None:  # a block at a time, made ready for all panels
            with T.serial(count) as t:
                self.inputs.fill(first + t, 1)
                with self.panels(base, group, 1) as panel:
                    self.emit(panel, 1, first + t, 1, part)
            return
        with self.panels(base, group, 1) as panel, T.serial(count // wide) as t:
            self.emit(panel, 1, first + t * wide, wide, part)
        for rest in range(1, wide):
            with T.If(count % wide == rest), T.Then():
                together = wide // rest
                with self.panels(base, group, together) as panel:
                    self.emit(panel, together, first + count // wide * wide, rest, part)

    @contextmanager
    def panels(self, base: Any, group: int, together: int) -> Iterator[Any]:
        """A loop over the panels of a group, ``together`` at a time; gives the first of them."""
        with T.serial(group // together) as member:
            panel = T.Bind(base + member * together)
            if self.of.panels % group:  # the last group is not full
                with T.If(panel < self.of.panels), T.Then():
                    yield panel
            else:
                yield panel

    def emit(self, panel: Any, panels: int, block: Any, token_blocks: int, part: int) -> None:
        """The tile of ``panels`` panels from ``panel``, ``token_blocks`` blocks from ``block``."""
        registers = iter(lanes.registers(panels * self.width * token_blocks, dtype=self.total))
        # (accumulator, panel, output within it, block)
        tile = [
            (next(registers), p, n, block + t)
            for p in [panel + i for i in range(panels)]
            for n in range(self.width)
            for t in range(token_blocks)
        ]
        self._start(tile, part)
        self._sum(tile, panel, panels, part)
        last = part == self.knobs["passes"] - 1
        low, count = panel * self.width, panels * self.width
        if self.scratch is not None:
            for i, (total, p, n, t) in enumerate(tile):
                place = i % token_blocks * count + i // token_blocks
                lanes.store(self.scratch, self._value(total, p * self.width + n, t), place)
            self._finish(low, count, block, token_blocks)
            return
        if self.of.panels * self.width == self.outputs:
            self._store(tile, last, padded=False)
        else:
            with T.If((panel + panels) * self.width <= self.outputs):
                with T.Then():
                    self._store(tile, last, padded=False)
                with T.Else():
                    self._store(tile, last, padded=True)
        if last and self.task.shape["activation"] != "none":
            self._activate(low, count, block, token_blocks)

    def _sum(self, tile: list, panel: Any, panels: int, part: int) -> None:
        """Add the products of one part of K to the tile's registers."""
        unroll = self.knobs["unroll"]
        depth = self.of.steps // self.knobs["passes"]
        unroll = unroll if depth % unroll == 0 else 1
        step, together = self._multiply, 1
        if self.math.by_lane:
            wanted = 4 // gcd(self.width, 4)  # lanes whose weights fill whole registers
            together = wanted if unroll % wanted == 0 else 1
            step = partial(self._multiply_rows, count=together)
        if self.math.matrix:
            step = self._multiply_matrix
            _exchange(tile, zipped, self.math.total)
        with T.serial(depth // unroll) as outer:
            start = T.Bind(part * depth + outer * unroll)
            self._prefetch(panel + panels, panels, start, unroll)
            with T.unroll(unroll // together) as inner:
                step(tile, start + inner * together)
        if self.math.matrix:
            _exchange(tile, unzipped, self.math.total)

    def _multiply(self, tile: list, k: Any) -> None:
        for total, p, n, t in tile:
            x, w = self.inputs.load(t, 0, k), self.math.spread(self.w[p, k, n])
            lanes.write(total, self.math.multiply_add(lanes.read(total), x, w))

    def _multiply_rows(self, tile: list, k: Any, count: int) -> None:
        """As ``_multiply``, ``count`` lanes from k, whose weights lie one behind the other."""
        rows: dict[int, list[Any]] = {}
        for _, p, _, _ in tile:
            if id(p) not in rows:
                rows[id(p)] = list(self.math.spread_row(self.w, (p, k), count * self.width))
        for i in range(count):
            for total, p, n, t in tile:
                x, w = self.inputs.load(t, 0, k + i), rows[id(p)][i * self.width + n]
                lanes.write(total, self.math.multiply_add(lanes.read(total), x, w))

    def _multiply_matrix(self, tile: list, k: Any) -> None:
        """Lanes 2 k and 2 k + 1, by half of the tokens: beside the sums, the weights of all outputs
        and the activations of one half fit in the registers.
        """
        pairs = list(zip(tile[::2], tile[1::2]))
        weights = [T.Bind(self.w[p, k, tirx.Ramp(2 * n, 1, 4)]) for (_, p, n, _), _ in pairs]
        for half in range(2):
            x = T.Bind(self.inputs.load(tile[0][3], 0, 2 * k + half))
            for pair, w in zip(pairs, weights):
                total = pair[half][0]
                lanes.write(total, self.math.multiply_matrix(lanes.read(total), x, w))

    def _prefetch(self, panel: Any, panels: int, start: Any, unroll: int) -> None:
        """Ask for what the next tile reads where this one reads the ``unroll`` rows from ``start``.

        In a model every panel comes from memory, and the processor's own prefetching starts anew
        with each: without this 16 and 32 tokens take a quarter longer, 48 a tenth, 128 2%.
        """
        size, line = int(self.w.shape[2]), lanes.CACHE_LINE // np.dtype(self.math.weight).itemsize
        for p in range(panels):
            for place in range(0, unroll * size, line):
                row, number = divmod(place, size)
                lanes.prefetch(self.w, panel + p, start + row, number)

    def _start(self, tile: list, part: int) -> None:
        """Floats: the first part begins at the bias, a later one at what the parts before it left
        in y. Bytes begin at zero.
        """
        for total, p, n, t in tile:
            channel = p * self.width + n
            if self.math.group == 4:
                lanes.write(total, tirx.Broadcast(tirx.const(0, self.total), BLOCK_TOKENS))
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

    def _finish(self, low: Any, count: int, block: Any, token_blocks: int) -> None:
        """What becomes of the tile in the scratch buffer, by outputs that are finished together."""
        each = unit(self.task)
        last = (T.min(count, self.outputs - low) + (each - 1)) // each
        with T.serial(token_blocks) as t, T.serial(last) as n:
            first = T.Bind(t * count + n * each)
            values = [T.Bind(lanes.load(self.scratch, first + i)) for i in range(each)]
            self.epilogue.finish(values, block + t, T.Bind((low + n * each) // each))


class _RunTile(_Tile):
    """The same of bounded weights: the products of a run of lanes are summed in 16 bits first."""

    def _sum(self, tile: list, panel: Any, panels: int, part: int) -> None:
        run, unroll = self.math.run, self.knobs["unroll"]
        whole, rest = divmod(self.inputs.depth, run)
        unroll = unroll if whole % unroll == 0 else 1
        with T.serial(whole // unroll) as outer:
            start = T.Bind(outer * unroll)
            self._prefetch(panel + panels, panels, start, unroll)
            with T.unroll(unroll) as inner:
                self._multiply_run(tile, start + inner, run)
        if rest:
            self._multiply_run(tile, whole, rest)

    def _multiply_run(self, tile: list, step: Any, count: int) -> None:
        """The first ``count`` lanes of a run."""
        for total, p, n, t in tile:
            at = range(count)
            xs = [self.inputs.load(t, 0, step * self.math.run + i) for i in at]
            ws = [self.math.spread(self.w[p, step, n * self.math.run + i]) for i in at]
            lanes.write(total, self.math.multiply_run(lanes.read(total), xs, ws))


class _PanelTile(_Tile):
    """The same of weights that are unpacked panel by panel, for all blocks of a job."""

    w: Panels

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.math = self.math.wide()

    def walk(self, base: Any, group: int, first: Any, count: Any, part: int) -> None:
        self.inputs.fill(first, count)
        with self.panels(base, group, 1) as panel:
            self.w.unpack(panel)
            wide = self.knobs["token_blocks"]
            with T.serial(count // wide) as t:
                self.emit(panel, 1, first + t * wide, wide, part)
            for rest in range(1, wide):
                with T.If(count % wide == rest), T.Then():
                    self.emit(panel, 1, first + count // wide * wide, rest, part)

    def _sum(self, tile: list, panel: Any, panels: int, part: int) -> None:
        unroll = self.knobs["unroll"]
        with T.serial(self.of.steps // unroll) as outer:
            self.w.prefetch(panel + 1, outer * unroll, unroll)
            with T.unroll(unroll) as inner:
                self._multiply_unpacked([total for total, *_ in tile], tile, outer * unroll + inner)

    def _multiply_unpacked(self, sums: list, tile: list, k: Any) -> None:
        """Add the products of lane k to the sum of each place of the tile."""
        parts = self.math.parts
        for part in range(parts):
            for total, (_, _, n, t) in zip(sums, tile):
                x = self.inputs.load(t, 0, parts * k + part)
                w = self.math.spread(self.w.lane(k, n, part))
                lanes.write(total, self.math.multiply_add(lanes.read(total), x, w))


class _NibbleTile(_PanelTile):
    """Of weights in 4 bits: the sum of each group of inputs is added, times the group's scale, to
    one in float32.
    """

    w: Nibbles

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.total = "float32"

    def _sum(self, tile: list, panel: Any, panels: int, part: int) -> None:
        depth, size = self.of.steps, self.w.steps
        with T.serial(depth // size) as number:
            self.w.prefetch(panel + 1, number * size, size)
            self._group(tile, number, size)
        if depth % size:
            self._group(tile, depth // size, depth % size)

    def _group(self, tile: list, number: Any, steps: int) -> None:
        """Add the products of the group of that number, which has so many lanes."""
        if self.math.run > 1:
            self._runs(tile, number, steps)
            return
        sums = lanes.registers(len(tile), dtype=self.math.total)
        for total in sums:
            lanes.write(total, self.math.zero())
        with lanes.loop(steps, self.knobs["unroll"]) as step:
            self._multiply_unpacked(sums, tile, number * self.w.steps + step)
        for total, (whole, _, n, _) in zip(sums, tile):
            self._add(whole, lanes.read(total), number, n)

    def _runs(self, tile: list, number: Any, steps: int) -> None:
        """As ``_group``, an output at a time, by runs of lanes."""
        first = T.Bind(number * self.w.steps)
        for whole, _, n, t in tile:
            total = self.math.zero()
            for start in range(0, steps, self.math.run):
                places = [first + k for k in range(start, min(start + self.math.run, steps))]
                xs = [self.inputs.load(t, 0, k) for k in places]
                ws = [self.math.spread(self.w.lane(k, n, 0)) for k in places]
                total = T.Bind(self.math.multiply_run(total, xs, ws))
            self._add(whole, total, number, n)

    def _add(self, whole: Any, total: Any, number: Any, n: int) -> None:
        """Add a group's sum, times its scale, to that of an output."""
        value = total.astype(f"float32x{BLOCK_TOKENS}")
        lanes.write(whole, lanes.read(whole) + value * lanes.splat(self.w.scale(number, n)))


def _exchange(tile: list, both: Callable[..., tuple[Any, Any]], dtype: str) -> None:
    """The sums of two neighbouring outputs by token, as the two halves of a matrix, or back."""
    for (even, *_), (odd, *_) in zip(tile[::2], tile[1::2]):
        first, second = both(lanes.read(even), lanes.read(odd), dtype)
        lanes.write(even, first)
        lanes.write(odd, second)
