"""Writes the loops of the sparse matrix product in lanes; ``sparse`` says what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic
from bertile.schedules.cpu.inputs import Inputs
from bertile.schedules.cpu.product import Epilogue, arguments, multiplies
from bertile.schedules.cpu.sparse_pack import Layout
from bertile.schedules.intrinsics import x86
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [range], [residual], [cos, sin], values, index, starts, slots, units,
    [scale, [shift]], b, [limits], y).
    """
    math = multiplies(task, row)
    # a broadcast from memory takes the place of a vector load, a shuffle takes none
    shuffle = row.vector_bits == 512 and math.weight != "int16"
    math = replace(math, llvm=math.llvm + x86.INDEX + (x86.FOUR if shuffle else ""))
    of = Layout.of(task, knobs)
    with lanes.kernel(task.name) as builder:

        def weights() -> list[Any]:
            nonzeros = T.int32()
            values = builder.tensor("values", nonzeros, dtype=math.weight)
            index = builder.tensor("index", nonzeros, dtype=of.index)
            return [
                _Entries(math, shuffle, values, index),
                builder.tensor("starts", of.groups * of.parts * of.panels + 1, dtype="int32"),
                builder.tensor("slots", of.groups, of.parts, of.places, dtype=of.slot),
                builder.tensor("units", of.groups, of.places // of.unit, dtype="int32"),
            ]

        x, lists, epilogue = arguments(builder, task, math, of.groups * of.places, weights)
        shares = SHARES * -(-row.threads // SHARES)
        with T.parallel(shares) as share:
            # the sums of a group's outputs; too long for registers, short enough for the caches
            room = of.places * knobs["token_blocks"]
            sums = T.alloc_buffer((room, BLOCK_TOKENS), math.total)
            inputs = Inputs(x, math, knobs["token_blocks"])
            tile = _Tile(task, of, math, inputs, lists, epilogue, sums)
            for group, first, count in _work(share, shares, builder.blocks, of.groups):
                _tiles(tile, group, first, count, knobs["token_blocks"])
    return builder.func


# As many pieces of equal work as any number of threads, which take neighbouring ones, divides well;
# more only where a kernel is made for more threads, since a piece without work costs its start.
SHARES = 48
# Token blocks for which a group's lists stay in the cache. A thread has that many even where a
# request is short: it reads in one kernel the tokens that it wrote in the one before.
CHUNK = 4


def _work(share: Any, shares: int, blocks: Any, groups: int) -> Iterator[tuple[Any, Any, Any]]:
    """Loops over a share of all (token block, group of outputs): group, first block, how many.

    Chunks of blocks come one after the other; what a share has of a chunk is whole groups of it.
    """
    whole = CHUNK * groups
    low = T.Bind(share * blocks * groups // shares)
    high = T.Bind((share + 1) * blocks * groups // shares)
    begin = T.Bind(low // whole)
    with T.serial((high + (whole - 1)) // whole - begin) as step:
        first = T.Bind((begin + step) * CHUNK)
        count = T.Bind(T.min(CHUNK, blocks - first))
        start = T.Bind((T.max(low - first * groups, 0) + (count - 1)) // count)
        end = T.Bind(T.min((high - first * groups + (count - 1)) // count, groups))
        with T.serial(T.max(end - start, 0)) as group:
            yield start + group, first, count


def _tiles(tile: _Tile, group: Any, first: Any, count: Any, wide: int) -> None:
    """``count`` blocks by tiles of ``wide``, what is left by tiles of half the width, and again."""
    with T.serial(count // wide) as t:
        tile.emit(group, first + t * wide, wide)
    while wide > 1:
        rest, wide = first + count // wide * wide, wide // 2
        with T.If(count // wide % 2 == 1), T.Then():
            tile.emit(group, rest, wide)


# In a model the lists come from memory, faster than the processor's own prefetching asks for them:
# without this 16 tokens take a fifth longer, 128 tokens 4%. Half or twice as far makes no odds.
AHEAD = 4  # panels


@dataclass(frozen=True)
class _Entries:
    """Reads lists of entries: where a lane of x lies, and its weights in all lanes."""

    math: Arithmetic
    shuffle: bool  # four weights by one load
    values: Any
    index: Any

    def read(self, first: Any, count: int) -> Iterator[tuple[Any, Any]]:
        """``count`` entries from ``first``, four at a time as far as they go."""
        for start in range(0, count, 4):
            some = min(4, count - start)
            places = self._places(first + start, some)
            weights = self._weights(first + start, some)
            for n in range(some):
                yield T.Bind(places(n)), T.Bind(weights(n))

    def prefetch(self, first: Any, count: int) -> None:
        """Ask for ``count`` entries from ``first``."""
        for buffer in (self.values, self.index):
            per_line = lanes.CACHE_LINE // np.dtype(buffer.dtype).itemsize
            for line in range(-(-count // per_line)):
                lanes.prefetch(buffer, first + line * per_line, level=1)

    def _places(self, first: Any, count: int) -> Callable[[int], Any]:
        bits = {"uint8": 8, "uint16": 16, "int32": 32}[self.index.dtype]
        if count * bits not in (32, 64):
            return lambda n: self.index[first + n].astype("int32")
        word = self.index[tirx.Ramp(first, 1, count)]
        word = tirx.reinterpret(f"uint{count * bits}", word).astype("int64")
        word = T.Bind(tirx.call_extern("int64", "bertile_index", word))
        mask = tirx.const((1 << bits) - 1, "int64")
        return lambda n: (word >> tirx.const(n * bits, "int64")) & mask

    def _weights(self, first: Any, count: int) -> Callable[[int], Any]:
        if not self.shuffle or count < 4:
            return lambda n: self.math.spread(self.values[first + n])
        four = tirx.reinterpret("int32x4", self.values[tirx.Ramp(first, 1, 4)])
        four = T.Bind(tirx.call_extern(f"int32x{BLOCK_TOKENS}", "bertile_four", four))

        def spread(n: int) -> Any:
            w = tirx.call_extern(f"int32x{BLOCK_TOKENS}", f"bertile_pick{n}", four)
            return tirx.reinterpret(f"{self.math.lane}x{BLOCK_TOKENS}", w)

        return spread


class _Tile:
    """Emits the product of a group's outputs and a few token blocks."""

    def __init__(
        self,
        task: Task,
        of: Layout,
        math: Arithmetic,
        inputs: Inputs,
        lists: list[Any],
        epilogue: Epilogue,
        sums: Any,
    ) -> None:
        self.of, self.math, self.epilogue, self.sums = of, math, epilogue, sums
        self.inputs = inputs
        self.entries, self.starts, self.slots, self.units = lists
        # entries of a panel
        self.usual = ceil(task.shape["density"] / 100 * of.part * of.outputs)

    def emit(self, group: Any, block: Any, token_blocks: int) -> None:
        """The outputs of ``group`` for ``token_blocks`` blocks from ``block``."""
        self.inputs.fill(block, token_blocks)
        for part in range(self.of.parts):
            with T.serial(self.of.panels) as panel:
                self._panel(group, part, panel, block, token_blocks)
        self._finish(group, block, token_blocks)

    def _panel(self, group: Any, part: int, panel: Any, block: Any, token_blocks: int) -> None:
        outputs = self.of.outputs
        registers = iter(lanes.registers(outputs * token_blocks, dtype=self.math.total))
        tile = [[next(registers) for _ in range(token_blocks)] for _ in range(outputs)]
        slots = [
            T.Bind(self.slots[group, part, panel * outputs + n].astype("int32") * token_blocks)
            for n in range(outputs)
        ]
        for totals, slot in zip(tile, slots):
            for t, total in enumerate(totals):
                value = self.math.zero() if part == 0 else lanes.load(self.sums, slot + t)
                lanes.write(total, value)
        at = T.Bind((group * self.of.parts + part) * self.of.panels + panel)
        low = T.Bind(self.starts[at])
        self.entries.prefetch(low * outputs + AHEAD * self.usual, self.usual)
        with T.serial(self.starts[at + 1] - low) as position:
            first = T.Bind((low + position) * outputs)
            for totals, (k, w) in zip(tile, self.entries.read(first, outputs)):
                for t, total in enumerate(totals):
                    x = self.inputs.load(block, t, part * self.of.part + k)
                    lanes.write(total, self.math.multiply_add(lanes.read(total), x, w))
        for totals, slot in zip(tile, slots):
            for t, total in enumerate(totals):
                lanes.store(self.sums, lanes.read(total), slot + t)

    def _finish(self, group: Any, block: Any, token_blocks: int) -> None:
        """The group's sums as values, and what becomes of those that are finished together."""
        each = self.of.unit
        with T.serial(self.of.places // each) as i:
            unit = T.Bind(self.units[group, i])
            with T.If(unit < self.of.units), T.Then():
                with T.serial(token_blocks) as t:
                    values = []
                    for j in range(each):
                        total = lanes.load(self.sums, (i * each + j) * token_blocks + t)
                        place = group * self.of.places + i * each + j
                        values.append(T.Bind(self._value(total, place, block + t)))
                    self.epilogue.finish(values, block + t, unit)

    def _value(self, total: Any, place: Any, block: Any) -> Any:
        value = self.epilogue.value(total, place, block)
        # sums of floats start at zero, and get their bias here
        return value if self.math.group == 4 else value + lanes.splat(self.epilogue.b[place])
