"""The loops of the matrix product in lanes; what it computes is said in ``dense``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules.cpu import arithmetic as arithmetics
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic, arithmetic
from bertile.schedules.cpu.vector_math import ACTIVATIONS, ACTIVATIONS_BF16, ACTIVATIONS_INT8
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task


def precision(task: Task) -> str:
    """How the task multiplies: fp32, fp16 (as fp32, of stored halves), bf16, int8, int8_static."""
    return str(task.shape.get("precision", "fp32"))


def writes(task: Task) -> str:
    """How the task stores its result: to_fp32, to_bf16 or to_int8."""
    return str(task.shape.get("writes", "to_fp32"))


def group(task: Task) -> int:
    """Channels of one lane of x."""
    return {"fp32": 1, "fp16": 1, "bf16": 2}.get(precision(task), 4)


def panel_width(task: Task, knobs: Knobs) -> int:
    """How many outputs a panel of packed weights is wide: those of the tile of most blocks.

    A whole number of the lanes that are stored.
    """
    packed = {"to_fp32": 1, "to_bf16": 2, "to_int8": 4}[writes(task)]
    width = min(knobs["accumulators"] // knobs["token_blocks"], task.shape["outputs"])
    return max(packed, width // packed * packed)


def panel_count(task: Task, knobs: Knobs) -> int:
    """How many panels there are, padded so that a tile of fewer blocks can take several at once."""
    panels = -(-task.shape["outputs"] // panel_width(task, knobs))
    return -(-panels // knobs["token_blocks"]) * knobs["token_blocks"]


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [range], [residual], w, [scale, [shift]], b, [limits], y)."""
    math = arithmetic(precision(task).removesuffix("_static"), row)
    outputs, depth = task.shape["outputs"], math.lanes(task.shape["inputs"])
    width, panels = panel_width(task, knobs), panel_count(task, knobs)
    group = min(knobs["panels"] * knobs["token_blocks"], panels)
    groups = -(-panels // group)
    bytes_, narrow = math.group == 4, writes(task) != "to_fp32"
    with lanes.kernel(task.name) as made:
        x = made.activation("x", depth, math.lane)
        per_token = precision(task) == "int8"
        range_ = made.activation("range", 2) if per_token else None
        residual = made.activation("residual", outputs) if task.shape["residual"] else None
        w = made.tensor("w", panels, depth, width, dtype=math.weight)
        scale = made.tensor("scale", panels * width) if bytes_ else None
        shift = made.tensor("shift", panels * width) if per_token else None
        b = made.tensor("b", panels * width)
        limits = made.tensor("limits", 2) if writes(task) == "to_int8" else None
        packed = {"to_fp32": 1, "to_bf16": 2, "to_int8": 4}[writes(task)]
        y = made.activation("y", outputs // packed, "int32" if narrow else "float32")
        made.link(math.llvm)
        operands = _Operands(x, range_, residual, w, scale, shift, b, limits, y)
        chunk = knobs["chunk"]
        chunks = T.Bind((made.blocks + (chunk - 1)) // chunk)
        with T.parallel(groups * chunks) as job:
            scratch = T.alloc_buffer((width * knobs["token_blocks"], lanes.LANES), "float32")
            tile = _Tile(task, knobs, math, operands, scratch if narrow else None)
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


@dataclass(frozen=True)
class _Operands:
    """A kernel's buffers; None is what the task has not."""

    x: Any
    range: Any
    residual: Any
    w: Any
    scale: Any
    shift: Any
    b: Any
    limits: Any
    y: Any


class _Tile:
    """Emits the product of some panels of outputs and a few token blocks, over one part of K."""

    def __init__(
        self, task: Task, knobs: Knobs, math: Arithmetic, operands: _Operands, scratch: Any
    ) -> None:
        self.task, self.knobs, self.math, self.scratch = task, knobs, math, scratch
        self.width, self.outputs = panel_width(task, knobs), task.shape["outputs"]
        self.of = operands

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
        with T.serial(depth // unroll) as outer, T.unroll(unroll) as inner:
            k = part * depth + outer * unroll + inner
            for total, p, n, t in tile:
                x, w = lanes.load(self.of.x, t, k), self.math.spread(self.of.w[p, k, n])
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

    def _start(self, tile: list, part: int) -> None:
        """Floats: the first part begins at the bias, a later one at what the parts before it left
        in y. Bytes begin at zero.
        """
        for total, p, n, t in tile:
            channel = p * self.width + n
            if self.math.group == 4:
                lanes.write(total, self.math.zero())
            elif part == 0:
                lanes.write(total, lanes.splat(self.of.b[channel]))
            else:
                # a padded output has nothing in y: read a channel that exists, drop it later
                channel = T.min(channel, self.outputs - 1)
                lanes.write(total, lanes.load(self.of.y, t, channel))

    def _value(self, total: Any, channel: Any, t: Any) -> Any:
        """The float32 that an accumulator stands for."""
        value = lanes.read(total)
        if self.math.group != 4:
            return value
        value = value.astype("float32x16") * lanes.splat(self.of.scale[channel])
        if self.of.range is None:
            return value + lanes.splat(self.of.b[channel])
        scale, low = lanes.load(self.of.range, t, 0), lanes.load(self.of.range, t, 1)
        shift = low * lanes.splat(self.of.shift[channel]) + lanes.splat(self.of.b[channel])
        return value * scale + shift

    def _store(self, tile: list, last: bool, padded: bool) -> None:
        """One store per sum; what has no activation gets its residual on the way."""
        residual = self.of.residual if self.task.shape["activation"] == "none" else None
        for total, p, n, t in tile:
            channel = p * self.width + n
            value = self._value(total, channel, t)
            if residual is not None and last:
                value = value + lanes.load(residual, t, channel)
            if padded:
                with T.If(channel < self.outputs), T.Then():
                    lanes.store(self.of.y, value, t, channel)
            else:
                lanes.store(self.of.y, value, t, channel)

    def _activate(self, low: Any, count: int, block: Any, token_blocks: int) -> None:
        """The activation on what was just stored and still is in the first-level cache.

        A loop, not an expression per accumulator: that would be a hundred copies of a polynomial,
        which take TVM a second to compile and are no faster.
        """
        activation = self._activation()
        last = T.min(count, self.outputs - low)
        with T.serial(token_blocks) as t, T.serial(last) as n:
            value = activation(lanes.load(self.of.y, block + t, low + n))
            if self.of.residual is not None:
                value = value + lanes.load(self.of.residual, block + t, low + n)
            lanes.store(self.of.y, value, block + t, low + n)

    def _activation(self) -> Callable[[Any], Any]:
        known = {1: ACTIVATIONS, 2: ACTIVATIONS_BF16, 4: ACTIVATIONS_INT8}
        return known[self.math.group][self.task.shape["activation"]]

    def _narrow(self, low: Any, count: int, block: Any, token_blocks: int) -> None:
        """Activation, residual and packing of the tile in the scratch buffer."""
        activation = self._activation()
        packed = {"to_bf16": 2, "to_int8": 4}[writes(self.task)]
        last = T.min(count, self.outputs - low) // packed
        with T.serial(token_blocks) as t, T.serial(last) as n:
            values = []
            for i in range(packed):
                value = activation(lanes.load(self.scratch, t * count + n * packed + i))
                if self.of.residual is not None:
                    channel = low + n * packed + i
                    value = value + lanes.load(self.of.residual, block + t, channel)
                values.append(T.Bind(value))
            self._pack(values, block + t, T.Bind((low + n * packed) // packed))

    def _pack(self, values: list, block: Any, lane: Any) -> None:
        if self.of.limits is not None:
            low, inverse = (lanes.splat(self.of.limits[i]) for i in range(2))
            inside = [arithmetics.clamp(arithmetics.steps(v, low, inverse)) for v in values]
            lanes.store(self.of.y, arithmetics.pack_bytes(inside), block, lane)
            return
        values_from = self.task.shape.get("values_from")
        if values_from is None:
            lanes.store(self.of.y, arithmetics.pack_bf16(*values), block, lane)
            return
        with T.If(lane < values_from // 2):
            with T.Then():
                lanes.store(self.of.y, arithmetics.pack_bf16(*values), block, lane)
            with T.Else():
                for i, value in enumerate(values):
                    half = T.Bind(arithmetics.pack_bf16_tokens(value))
                    width = lanes.LANES // 2
                    ramp = tirx.Ramp(i * width, 1, width)
                    T.buffer_store(self.of.y, half, [block, lane, ramp])
