"""Multiplies matrices by tiles (AMX), on the operands and to the results of ``dense``.

Lanes are as tiles want them: 16 lanes of x of a block are one operand of an instruction, 16 outputs
by as many lanes of weights the other, and their product is 16 channels of y in lanes.

    w (panels, K / 16 G, tiles, 16, 16): of each 16 lanes the outputs of some tiles, one behind the
    other, so that all of it is read front to back

    parallel over tasks = groups of panels × chunks of token blocks
      for each panel of the group, one or two blocks of tokens
        for k: load the tiles of x and w, multiply-add
        sums to a buffer in the first-level cache; from there the epilogue

Weights of 4 bits are unpacked to a buffer of a panel's bytes first, each group rescaled to the
output's own scale: what that rounds is little beside what 4 bits have rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes, precisions
from bertile.schedules.cpu.product import (
    BY_PANELS,
    ORDERS,
    Epilogue,
    arguments,
    group_size,
    jobs,
    multiplies,
    unit,
    weight_lanes,
    writes,
)
from bertile.schedules.cpu.tile_words import keep_whole, load_tile, store_tile, tile
from bertile.schedules.intrinsics import amx
from bertile.schedules.outputs_that_meet import ordered
from bertile.schedules.schedule import Knobs, Row, Space
from bertile.schedules.task import Task

OUTPUTS = LANES = amx.ROWS  # of a tile of weights


def takes(task: Task, row: Row) -> bool:
    """Whether the machine has tiles for the task's precision."""
    return row.tiles and precisions.of(task).tiled


def space(task: Task, row: Row) -> Space:
    """Sums in tiles, by how many blocks of tokens; and how the work is cut between threads."""
    return {
        "tiles": (1, 2, 4),
        "token_blocks": (1, 2),
        "panels": (1, 2, 4, 8),
        "chunk": (4, 8, 16, 32),
        "order": ORDERS,
    }


def default(task: Task, row: Row) -> Knobs:
    """Two tiles of outputs by two of tokens: a load for each product."""
    return {"tiles": 4, "token_blocks": 2, "panels": 4, "chunk": 16, "order": BY_PANELS}


@dataclass(frozen=True)
class Layout:
    """How weights are packed: ``panels`` of ``tiles`` tiles of outputs, by ``depth`` of lanes."""

    tiles: int
    token_blocks: int
    depth: int
    panels: int

    @staticmethod
    def of(task: Task, knobs: Knobs, row: Row) -> Layout:
        """What the knobs make of the task's shape."""
        token_blocks = min(knobs["token_blocks"], knobs["tiles"])
        tiles = knobs["tiles"] // token_blocks
        depth = -(-multiplies(task, row).lanes(task.shape["inputs"]) // LANES)
        panels = -(-task.shape["outputs"] // (OUTPUTS * tiles))
        return Layout(tiles, token_blocks, depth, panels)

    @property
    def outputs(self) -> int:
        """Outputs of a panel."""
        return OUTPUTS * self.tiles


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """w (K, N) → (panels, K / 16 G, tiles, 16 outputs, 16 lanes); vectors (N) padded."""
    limits = [weights[-1]] if writes(task) == "to_int8" else []
    w, *vectors = ordered(task, weights[: len(weights) - len(limits)])
    of = Layout.of(task, knobs, row)
    padding = of.panels * of.outputs - w.shape[1]
    if size := group_size(task):
        scales, _, *vectors = vectors
        multipliers, scale, shift = _rescaled(w, scales, size)
        vectors = [np.pad(v, (0, padding)) for v in (shift, *vectors)]
        packed_ = _pack_nibbles(w, multipliers, size, of, padding)
        return [*packed_, *vectors, *limits, np.pad(scale, (0, padding))]
    w = weight_lanes(task, w)
    w = np.pad(w, ((0, of.depth * LANES - len(w)), (0, padding)))
    w = w.reshape(of.depth, LANES, of.panels, of.tiles, OUTPUTS).transpose(2, 0, 3, 4, 1)
    return [np.ascontiguousarray(w), *(np.pad(v, (0, padding)) for v in vectors), *limits]


def _rescaled(
    levels: np.ndarray, scales: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of levels (K, N): multipliers (G, N) int16, eighths by which they become bytes; the scale (N)
    of these, and the sum (N) of what they stand for. The largest multiplier is 15, so that a byte
    is at most 120.
    """
    wide = scales.astype("float32")
    largest = np.abs(wide).max(0)
    scale = np.where(largest > 0, largest / np.float32(15), np.float32(1)).astype("float32")
    multipliers = np.rint(8 * wide / scale).astype("int16")
    each = multipliers.astype("int64").repeat(size, 0)[: len(levels)]
    bytes_ = (levels * each + 4) // 8
    return multipliers, scale, (bytes_.sum(0) * scale.astype("float64")).astype("float32")


def _pack_nibbles(
    levels: np.ndarray, multipliers: np.ndarray, size: int, of: Layout, padding: int
) -> list[np.ndarray]:
    """w (panels, depth, tiles, 8, 16) int32, two rows of a tile in 64 bytes, and the multipliers
    (panels, depth, tiles, 16, 1 or 2) of each row.
    """
    inputs = 4 * LANES * of.depth
    levels = np.pad(levels, ((0, inputs - len(levels)), (0, padding))).view("uint8") & 15
    levels = levels.reshape(of.depth, 4 * LANES, of.panels, of.tiles, OUTPUTS)
    pairs = levels.transpose(2, 0, 3, 4, 1).reshape(of.panels, of.depth, of.tiles, 8, 2, -1, 2)
    first, second = pairs.astype("uint16").transpose(4, 0, 1, 2, 3, 5, 6)
    words = first[..., 0] | first[..., 1] << 4 | second[..., 0] << 8 | second[..., 1] << 12
    w = np.ascontiguousarray(words).view("int32")
    halves = 4 * LANES // size
    short = halves * of.depth - len(multipliers)
    m = np.pad(multipliers, ((0, short), (0, padding)))
    m = m.reshape(of.depth, halves, of.panels, of.tiles, OUTPUTS).transpose(2, 0, 3, 4, 1)
    return [w, np.ascontiguousarray(m)]


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [range], [residual], [cos, sin], w, [scale, [shift]], b, [limits], y)."""
    of, math = Layout.of(task, knobs, row), multiplies(task, row)
    group = min(knobs["panels"], of.panels)
    groups = -(-of.panels // group)
    chunk = knobs["chunk"]
    with lanes.kernel(task.name) as builder:
        kind = _Nibbles if group_size(task) else _Tiles
        x, w, epilogue = arguments(
            builder,
            task,
            math,
            of.panels * of.outputs,
            lambda: kind(builder, task, of),
            rescaled=kind is _Nibbles,
        )
        builder.link(amx.TILES + w.llvm)
        with jobs(builder.blocks, chunk, groups, knobs["order"]) as (member, first, count):
            _Job(task, of, math.total, x, w, epilogue).emit(member * group, group, first, count)
    return builder.func


class _Tiles:
    """Weights that lie in memory as tiles want them."""

    llvm = ""

    def __init__(self, builder: lanes.KernelBuilder, task: Task, of: Layout) -> None:
        self.of = of
        shape = (of.panels, of.depth, of.tiles, OUTPUTS, LANES)
        self.w = builder.tensor("w", *shape, dtype="int32")

    def allocate(self) -> None:
        """To be called where a job's buffers are."""

    def open(self, panel: Any) -> None:
        """To be called before the tiles of a panel are loaded."""

    def load(self, number: int, panel: Any, k: Any, i: int) -> None:
        """Tile i of the lanes k."""
        load_tile(number, self.w, panel, k, i, 0, 0)

    def passing(self, panel: Any, k: Any, share: tuple[Any, Any]) -> None:
        """To be called where the lanes k are multiplied, by one of all products of a panel.

        Each asks for its share of the next panel, line by line: all of it at once is more than a
        core may have asked for, and products would wait.
        """
        with T.serial(*share) as n:
            self.prefetch(panel + 1, k, n)

    def prefetch(self, panel: Any, k: Any, n: Any) -> None:
        """Ask for a line of each tile of a panel before its turn: in a model all of them come from
        memory.
        """
        for i in range(self.of.tiles):
            lanes.prefetch(self.w, panel, k, i, n, 0)


class _Nibbles(_Tiles):
    """Weights in 4 bits, of which a panel is unpacked."""

    def __init__(self, builder: lanes.KernelBuilder, task: Task, of: Layout) -> None:
        self.of, self.halves = of, 4 * LANES // group_size(task)
        self.llvm = amx.nibbles(self.halves)
        shape = (of.panels, of.depth, of.tiles)
        self.w = builder.tensor("w", *shape, OUTPUTS // 2, LANES, dtype="int32")
        self.m = builder.tensor("m", *shape, OUTPUTS, self.halves, dtype="int16")

    def allocate(self) -> None:
        self.bytes = T.alloc_buffer((self.of.depth, self.of.tiles, OUTPUTS, LANES), "int32")

    def open(self, panel: Any) -> None:
        keep_whole(self.bytes)
        with T.serial(self.of.depth) as k:
            for n in range(OUTPUTS // 2):
                self.prefetch(panel + 1, k, n)
            for i in range(self.of.tiles):
                for r in range(OUTPUTS // 2):
                    source = (self.w[panel, k, i, r, 0], self.m[panel, k, i, 2 * r, 0])
                    places = (*source, self.bytes[k, i, 2 * r, 0])
                    tile(f"nibbles{self.halves}", *map(T.address_of, places))

    def passing(self, panel: Any, k: Any, share: tuple[Any, Any]) -> None:
        """The next panel was asked for while this one was unpacked."""

    def load(self, number: int, panel: Any, k: Any, i: int) -> None:
        load_tile(number, self.bytes, k, i, 0, 0)


class _Job:
    """Emits the product of a group of panels with a chunk of token blocks."""

    def __init__(
        self, task: Task, of: Layout, total: str, x: Any, w: _Tiles, epilogue: Epilogue
    ) -> None:
        self.task, self.of, self.x, self.w, self.epilogue = task, of, x, w, epilogue
        self.dot = f"dot{precisions.of(task).group}"
        self.rest = int(x.shape[1]) % LANES  # lanes of x that fill no tile
        w.allocate()
        shape = (of.token_blocks, of.tiles, OUTPUTS, BLOCK_TOKENS)
        self.sums = T.alloc_buffer(shape, total)
        self.last = None
        if self.rest:
            self.last = T.alloc_buffer((of.token_blocks, LANES, BLOCK_TOKENS), "int32")

    def emit(self, base: Any, group: int, first: Any, count: Any) -> None:
        """Panels ``base`` to ``base + group``, blocks ``first`` to ``first + count``."""
        wide = self.of.token_blocks
        tile("tiles_open")
        if self.last is not None:
            nothing = tirx.Broadcast(tirx.const(0, "int32"), BLOCK_TOKENS)
            with T.serial(wide) as t, T.serial(LANES) as k:
                lanes.store(self.last, nothing, t, k)
        with T.serial(group) as member:
            panel = T.Bind(base + member)
            with T.If(panel < self.of.panels), T.Then():
                self.w.open(panel)
                products = count // wide
                with T.serial(products) as t:
                    share = T.Bind(t * OUTPUTS // products), T.Bind((t + 1) * OUTPUTS // products)
                    self._product(panel, first + t * wide, wide, share)
                if wide > 1:
                    with T.If(count % wide == 1), T.Then():
                        alone = tirx.if_then_else(count == 1, OUTPUTS, 0)
                        self._product(panel, first + count - 1, 1, (0, alone))
        tile("tiles_close")

    def _product(self, panel: Any, block: Any, blocks: int, share: tuple[Any, Any]) -> None:
        sums = [(i, t) for i in range(self.of.tiles) for t in range(blocks)]
        for c in range(len(sums)):
            tile(f"tile_zero{c}")
        whole = int(self.x.shape[1]) // LANES
        with T.serial(whole) as k:
            for t in range(blocks):
                load_tile(amx.INPUTS[t], self.x, block + t, k * LANES, 0)
            self.w.passing(panel, k, share)
            self._multiply(panel, k, sums)
        if self.last is not None:
            for t in range(blocks):
                with T.serial(self.rest) as k:
                    value = lanes.load(self.x, block + t, whole * LANES + k)
                    lanes.store(self.last, value, t, k)
                load_tile(amx.INPUTS[t], self.last, t, 0, 0)
            self._multiply(panel, whole, sums)
        for c, (i, t) in enumerate(sums):
            store_tile(c, self.sums, t, i, 0, 0)
        self._finish(panel, block, blocks)

    def _multiply(self, panel: Any, k: Any, sums: list[tuple[int, int]]) -> None:
        for c, (i, t) in enumerate(sums):
            w, x = amx.WEIGHTS[i % 2], amx.INPUTS[t]
            if t == 0:
                self.w.load(w, panel, k, i)
            tile(f"tile_{self.dot}_{c}_{w}_{x}")

    def _finish(self, panel: Any, block: Any, blocks: int) -> None:
        """Scale and bias; then what becomes of outputs that are finished together."""
        each, outputs = unit(self.task), self.task.shape["outputs"]
        low = panel * self.of.outputs
        last = T.Bind((T.min(self.of.outputs, outputs - low) + (each - 1)) // each)
        in_bytes = precisions.of(self.task).in_bytes
        with T.serial(blocks) as t, T.serial(last) as n:
            values = []
            for i in range(each):
                place = n * each + i
                total = self.sums[t, place // OUTPUTS, place % OUTPUTS, lanes.RAMP]
                value = self.epilogue.value(total, low + place, block + t)
                if not in_bytes:
                    value = value + lanes.splat(self.epilogue.b[low + place])
                values.append(T.Bind(value))
            self.epilogue.finish(values, block + t, T.Bind((low + n * each) // each))
