"""Holds what matrix products have in common: how a task multiplies and stores, a kernel's
arguments, and what becomes of its sums:

    y = activation(value) + residual
    y = activation(value) · other value, where a task is ``gated``: of the two halves of its outputs
    y = two values turned by an angle, where it has ``turned`` heads: rotary positions

Two sums that meet stand side by side in the order in which weights are packed
(``outputs_that_meet``), so that a tile of registers holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import arithmetic as arithmetics
from bertile.schedules.cpu import lanes, precisions
from bertile.schedules.cpu.arithmetic import Arithmetic
from bertile.schedules.intrinsics import llvm
from bertile.schedules.outputs_that_meet import channels, is_gated, turned
from bertile.schedules.schedule import Row
from bertile.schedules.task import Task

# Which jobs follow each other: of some panels with all chunks of tokens, or of a chunk with all
# panels. What is the same in neighbours stays in a thread's caches.
ORDERS = BY_PANELS, BY_CHUNKS = 0, 1


@contextmanager
def jobs(
    blocks: Any, chunk: int, groups: int, order: int = BY_PANELS
) -> Iterator[tuple[Any, Any, Any]]:
    """A parallel loop over groups of panels × chunks of token blocks: the group, the first block of
    the chunk, and how many it has.
    """
    chunks = T.Bind((blocks + (chunk - 1)) // chunk)
    with T.parallel(groups * chunks) as job:
        group, number = job // chunks, job % chunks
        if order == BY_CHUNKS:
            group, number = job % groups, job // groups
        first = T.Bind(number * chunk)
        yield group, first, T.Bind(T.min(chunk, blocks - first))


def multiplies(task: Task, row: Row) -> Arithmetic:
    """The arithmetic of a task on a machine."""
    return precisions.of(task).arithmetic(row)


def writes(task: Task) -> str:
    """How the task stores its result: to_fp32, to_bf16 or to_int8."""
    return str(task.shape.get("writes", "to_fp32"))


def group(task: Task) -> int:
    """Channels of one lane of x."""
    return precisions.of(task).group


def group_size(task: Task) -> int:
    """Inputs that share a scale of 4-bit weights; 0 where weights are not in 4 bits."""
    return int(task.shape["group"]) if precisions.of(task).grouped else 0


def packed(task: Task) -> int:
    """Channels of one lane of y."""
    return {"to_fp32": 1, "to_bf16": 2, "to_int8": 4}[writes(task)]


def unit(task: Task) -> int:
    """Outputs that are finished together: those of a lane of y, and those that meet."""
    return max(packed(task) * (2 if is_gated(task) else 1), 2 if turned(task)[0] else 1)


def weight_lanes(task: Task, w: np.ndarray) -> np.ndarray:
    """w (K, N), float32 or int8 → (K / G, N) in the kernel's form of a lane; zeros behind K."""
    each, w = group(task), precisions.of(task).stored(w)
    if each == 1:
        return w
    w = np.pad(w, ((0, -len(w) % each), (0, 0)))
    w = w.reshape(-1, each, w.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(w).view("int32")[..., 0]


def byte_offset(w: np.ndarray) -> np.ndarray:
    """What sums of x less 128 lack, for w (K, N) of signed bytes (N)."""
    return 128 * w.sum(0, dtype="int32")


@dataclass(frozen=True)
class Epilogue:
    """The arguments of a kernel that its sums meet; None is what the task has not.

    A place is where an output's scale, shift and bias lie.
    """

    task: Task
    range: Any
    residual: Any
    angles: Any  # cos and sin
    scale: Any
    shift: Any
    b: Any
    limits: Any
    offset: Any
    y: Any
    signed: bool = False

    def value(self, total: Any, place: Any, block: Any) -> Any:
        """The float32 that a sum of bytes stands for; one of floats is that already, one of groups
        but for the range of the tokens.
        """
        value = total
        if self.scale is not None:
            if self.offset is not None:
                total = total + tirx.Broadcast(self.offset[place], BLOCK_TOKENS)
            value = total.astype(f"float32x{BLOCK_TOKENS}") * lanes.splat(self.scale[place])
            if self.range is None:
                return value + lanes.splat(self.b[place])
        if self.range is None:
            return value
        scale, low = lanes.load(self.range, block, 0), lanes.load(self.range, block, 1)
        if self.scale is None and self.signed:  # sums of x less 128
            low = low + scale * lanes.splat(128.0)
        shift = low * lanes.splat(self.shift[place]) + lanes.splat(self.b[place])
        return value * scale + shift

    def activation(self) -> Callable[[Any], Any]:
        """The activation on a vector, as exact as the operands are."""
        return precisions.of(self.task).activations[self.task.shape["activation"]]

    def finished(self, value: Any, block: Any, channel: Any) -> Any:
        """A value with activation and residual."""
        value = self.activation()(value)
        if self.residual is not None:
            value = value + lanes.load(self.residual, block, channel)
        return value

    def finish(self, values: Sequence[Any], block: Any, number: Any) -> None:
        """Finish the values of the unit of that number, and write the lanes of y that it fills."""
        if is_gated(self.task):
            pairs = zip(values[::2], values[1::2])
            activation = self.activation()
            self._store([T.Bind(activation(a) * b) for a, b in pairs], block, number)
        elif self.angles is not None:
            self._turn(values, block, number)
        else:
            first = number * len(values)
            finished = [self.finished(v, block, first + i) for i, v in enumerate(values)]
            self._store([T.Bind(value) for value in finished], block, number)

    def _turn(self, values: Sequence[Any], block: Any, number: Any) -> None:
        """Two channels of a head by the angles of their token, Su et al. 2021; the rest as it is.

        float32 is written to where the channels belong. A lane of bfloat16 holds the two that are
        turned: attention multiplies the channels of Q and K in whatever order both have.
        """
        heads, size = turned(self.task)
        half, (first, second) = size // 2, values
        cos, sin = self.angles
        with T.If(number < heads * half):
            with T.Then():
                low = T.Bind(number % half)
                c, d = (lanes.load(cos, block, low + i) for i in (0, half))
                s, t = (lanes.load(sin, block, low + i) for i in (0, half))
                pair = [T.Bind(first * c - second * s), T.Bind(second * d + first * t)]
                if packed(self.task) == 2:
                    lanes.store(self.y, arithmetics.pack_bf16(*pair), block, number)
                else:
                    place = T.Bind(number // half * size + low)
                    for i, value in enumerate(pair):
                        lanes.store(self.y, value, block, place + i * half)
            with T.Else():
                if packed(self.task) == 2:
                    self._store(values, block, number)
                else:
                    for i, value in enumerate(values):
                        with T.If(number * 2 + i < channels(self.task)), T.Then():
                            lanes.store(self.y, value, block, number * 2 + i)

    def _store(self, values: Sequence[Any], block: Any, lane: Any) -> None:
        """Write the finished values of one lane of y."""
        if self.limits is not None:
            low, inverse = (lanes.splat(self.limits[i]) for i in range(2))
            inside = [arithmetics.clamp(arithmetics.steps(v, low, inverse)) for v in values]
            lanes.store(self.y, arithmetics.pack_bytes(inside), block, lane)
        elif writes(self.task) == "to_fp32":
            lanes.store(self.y, *values, block, lane)
        else:
            self._store_bf16(values, block, lane)

    def _store_bf16(self, values: Sequence[Any], block: Any, lane: Any) -> None:
        values_from = self.task.shape.get("values_from")
        if values_from is None:
            lanes.store(self.y, arithmetics.pack_bf16(*values), block, lane)
            return
        with T.If(lane < values_from // 2):
            with T.Then():
                lanes.store(self.y, arithmetics.pack_bf16(*values), block, lane)
            with T.Else():
                for i, value in enumerate(values):
                    half = T.Bind(arithmetics.pack_bf16_tokens(value))
                    width = BLOCK_TOKENS // 2
                    ramp = tirx.Ramp(i * width, 1, width)
                    T.buffer_store(self.y, half, [block, lane, ramp])


def arguments(
    builder: lanes.KernelBuilder,
    task: Task,
    math: Arithmetic,
    places: int,
    weights: Callable[[], Any],
    rescaled: bool = False,
) -> tuple[Any, Any, Epilogue]:
    """Declare (x, [range], [residual], [cos, sin], weights, [scale, [shift]], b, [limits],
    [offset], y).

    ``weights`` declares its own and may give anything; scale, shift, b and the offset of signed
    bytes have ``places``. Groups have no scale here, but where they were ``rescaled`` to that of
    their output: it stands in the offset's place.
    Gives x, what ``weights`` gave, and the rest.
    """
    wide = channels(task)
    in_bytes, per_token = precisions.of(task).in_bytes, precisions.of(task).per_token
    x = builder.activation("x", math.lanes(task.shape["inputs"]), math.lane)
    range_ = builder.activation("range", 2) if per_token else None
    residual = builder.activation("residual", wide) if task.shape["residual"] else None
    heads, size = turned(task)
    angles = [builder.activation(name, size) for name in ("cos", "sin")] if heads else None
    w = weights()
    grouped = precisions.of(task).grouped  # scales are among the weights
    scale = builder.tensor("scale", places) if in_bytes and not grouped else None
    shift = builder.tensor("shift", places) if per_token else None
    b = builder.tensor("b", places)
    limits = builder.tensor("limits", 2) if writes(task) == "to_int8" else None
    folded = grouped or not math.signed
    offset = None if folded else builder.tensor("offset", places, dtype="int32")
    scale = builder.tensor("scale", places) if rescaled else scale
    form = "float32" if writes(task) == "to_fp32" else "int32"
    y = builder.activation("y", wide // packed(task), form)
    builder.link(math.llvm + llvm.PREFETCH)
    rest = (residual, angles, scale, shift, b, limits, offset, y)
    return x, w, Epilogue(task, range_, *rest, signed=math.signed)
