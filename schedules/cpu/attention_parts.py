"""Holds what kernels of attention have in common: their operands, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cpu import arithmetic as arithmetics
from bertile.schedules.cpu import lanes, precisions, product, vector_math
from bertile.schedules.cpu.distances import Distances
from bertile.schedules.task import Task

LOWEST = -1e30  # below any score, and small enough that differences of two stay finite
NEVER = -1e38  # its weight is nothing, even beside the lowest score


@dataclass(frozen=True)
class Operands:
    """The arguments of a kernel; None is what the task has not. y packs channels in lanes."""

    spec: AttentionSpec
    packed: int
    qkv: Any
    keys: Any
    table: Any
    bias: Any
    distances: Distances
    limits: Any
    y: Any

    @staticmethod
    def declare(builder: lanes.KernelBuilder, task: Task) -> Operands:
        """qkv, keys, table, [bias], [tables by distance], [limits], y."""
        spec, packed = AttentionSpec.from_shape(task.shape), product.packed(task)
        group = precisions.of(task).group
        lane = "float32" if group == 1 else "int32"
        qkv = builder.activation("qkv", sum(spec.channels()) // group, lane)
        keys = builder.tensor("keys", builder.blocks, BLOCK_TOKENS)
        table = builder.tensor("table", builder.blocks, 4, dtype="int32")
        bias = None
        if spec.bias == "tensor":
            extents = [T.int32() for _ in range(4)]
            bias = builder.tensor("bias", *extents, BLOCK_TOKENS)
        distances = Distances.declare(builder, spec, group, lane)
        limits = builder.tensor("limits", 2) if packed == 4 else None
        dtype = "float32" if packed == 1 else "int32"
        y = builder.activation("y", spec.channels()[0] // packed, dtype)
        return Operands(spec, packed, qkv, keys, table, bias, distances, limits, y)

    def starts(self, kv_head: Any) -> tuple[Any, Any]:
        """The first channels of K and of V of a head that queries share."""
        q, k, _ = self.spec.channels()
        own = kv_head * self.spec.head_size
        return q + own, q + k + own

    def mask(self, block: Any) -> Any:
        """The masks of a block of keys, as powers of two."""
        mask = lanes.load(self.keys, block) * lanes.splat(vector_math.LOG2E)
        return tirx.max(mask, lanes.splat(LOWEST))

    def bias_of(self, query: Any, head: Any, key: Any) -> Any:
        """The additive bias of one key, as powers of two; one of one row or one head serves all."""
        row, start = self.table[query, 0], self.table[query, 1]
        rows, heads = self.bias.shape[0], self.bias.shape[1]
        bias = lanes.load(
            self.bias, T.min(row, rows - 1), T.min(head, heads - 1), start // BLOCK_TOKENS, key
        )
        return bias * lanes.splat(vector_math.LOG2E)

    def store(self, value: Callable[[Any], Any], query: Any, head: Any) -> None:
        """The context of a block of queries, channel by channel, in the form that is asked for."""
        wide = self.spec.head_size // self.packed
        with T.serial(wide) as d:
            values = [value(self.packed * d + i) for i in range(self.packed)]
            if self.limits is not None:
                low, steps = (lanes.splat(self.limits[i]) for i in range(2))
                inside = [arithmetics.clamp(arithmetics.steps(v, low, steps)) for v in values]
                whole = arithmetics.pack_bytes(inside)
            else:
                whole = values[0] if self.packed == 1 else arithmetics.pack_bf16(*values)
            lanes.store(self.y, whole, query, head * wide + d)


def scaled(product: Any, spec: AttentionSpec) -> Any:
    """The score of q · k before its mask, as a power of two, in the bounds that a spec has."""
    if not spec.softcap:
        return product * lanes.splat(spec.scale * vector_math.LOG2E)
    inside = T.Bind(vector_math.tanh(product * lanes.splat(spec.scale / spec.softcap)))
    return inside * lanes.splat(spec.softcap * vector_math.LOG2E)


class Sight:
    """The keys that a block of 16 queries sees, those that lie in their spec's reach.

    ``own`` is the queries' block among the ``count`` of their sequence.
    """

    def __init__(self, spec: AttentionSpec, own: Any, count: Any) -> None:
        self.before, self.behind = spec.reach()
        self.own, self.count = own, count

    def blocks(self) -> tuple[Any, Any]:
        """The first block of keys that any of the queries sees, and the one behind the last."""
        low, stop = 0, self.count
        if self.before is not None:
            low = T.Bind(T.max(self.own - -(-self.before // BLOCK_TOKENS), 0))
        if self.behind is not None:
            stop = T.Bind(T.min(self.own + (-(-self.behind // BLOCK_TOKENS) + 1), self.count))
        return low, stop

    def sees_all_of(self, block: Any) -> Any:
        """Whether every query sees every key of a block; True where that is so of any block."""
        distance, last = block - self.own, BLOCK_TOKENS - 1
        sides = ((distance, self.behind), (-distance, self.before))
        near = [far <= (most - last) // BLOCK_TOKENS for far, most in sides if most is not None]
        return tirx.all(*near) if near else True

    def bounded(self, value: Any) -> Any:
        """Scores of keys that are seen, not below LOWEST: a query whose keys are all masked takes
        the mean of those that it sees.
        """
        return tirx.max(value, lanes.splat(LOWEST))

    def score(self, value: Any, key: Any) -> Any:
        """The scores of the queries with one key, given by its place in the sequence."""
        if self.before is None and self.behind is None:
            return value
        queries, key = (
            tirx.Ramp(self.own * BLOCK_TOKENS, 1, BLOCK_TOKENS),
            tirx.Broadcast(key, BLOCK_TOKENS),
        )
        value = self.bounded(value)
        for distance, most in ((key - queries, self.behind), (queries - key, self.before)):
            if most is not None:
                seen = distance <= tirx.Broadcast(most, BLOCK_TOKENS)
                value = tirx.Select(seen, value, lanes.splat(NEVER))
        return value
