"""Fuses attention in lanes: scores, scale, mask, softmax and context in one pass, for sequences of
any lengths.

    qkv (m, (H + 2 KV) D, 16), keys (m, 16) additive, table (m, 4), [bias (B, H, S/16, S, 16)],
    [keys and queries by distance (H, D, distances)]  →  y (m, H D, 16)

    parallel over heads × one or two blocks of 16 queries (queries in lanes), or, where heads are
    grouped, over some heads of a group × blocks: what is side by side shares K and V in registers
      for each tile of those key blocks of their sequence that the queries see
        scores: some keys × the queries in registers, keys broadcast
        online softmax (Milakov & Gimelshein 2018): running maximum and sum, context rescaled per
        tile
        context: values broadcast

The score matrix is never written: a tile of 16 × key_tile × 16 floats stays in the first-level
cache. The table says where each block's sequence lies (see ``bertile.loader.token_blocks``), so
that packed sequences of unequal lengths need no padding and no other kernel.

What an ``AttentionSpec`` may vary are two hooks of ``attention_parts.Sight``: which blocks of keys
a block of queries sees, so that no others are visited, and what is done to a score, where a query
sees some keys of a block and not others.

Where keys or queries by distance add to a score, a vector of 16 of them is read as it lies in its
table (see ``distances``): neither their products with all tokens nor any index is ever written.

With ``precision`` "bf16" both products are of bfloat16, and qkv (half as many channels) holds Q and
K in pairs of channels, V in pairs of tokens (a dense layer writes it so: ``values_from``); the
softmax stays in float32. ``writes`` "to_bf16" or "to_int8" is as for dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.attention_spec import REACH, RELATIVE, AttentionSpec
from bertile.schedules.cpu import arithmetic as arithmetics
from bertile.schedules.cpu import (
    attention_tiles,
    distances,
    lanes,
    precisions,
    product,
    vector_math,
)
from bertile.schedules.cpu.arithmetic import Arithmetic
from bertile.schedules.cpu.attention_parts import LOWEST, Operands, Sight, scaled
from bertile.schedules.cpu.samples import result_sample
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task


def refuses(task: Task) -> str | None:
    """What of a task has no kernel here, None if nothing."""
    spec = AttentionSpec.from_shape(task.shape)
    return spec.lacking(tuple(REACH), ("none", "tensor"), tuple(RELATIVE), grouped_and_capped=True)


def space(task: Task, row: Row) -> Space:
    """Key blocks per tile of the online softmax, and the register tiles of the two products."""
    if attention_tiles.takes(task, row):
        return attention_tiles.space(task, row)
    fits = lanes.vector_capacity(row)
    return {
        "key_tile": (2, 4, 8, 16, 32),
        "keys": tuple(k for k in (2, 4, 8, 16) if k < fits),
        "channels": tuple(c for c in (2, 4, 6, 8, 12, 16, 20, 24) if c < fits),
        "queries": _together(AttentionSpec.from_shape(task.shape)),
    }


def _together(spec: AttentionSpec) -> tuple[int, ...]:
    """How many blocks of queries may share each number of K and V that is broadcast: those of heads
    of a group; else two neighbours, which see all keys or most of the same.
    """
    if spec.group > 1:
        return tuple(count for count in (1, 2, 3, 4) if spec.group % count == 0)
    return (1, 2)


def default(task: Task, row: Row) -> Knobs:
    """Register tiles of two blocks of queries, and as many keys as the first-level cache holds of K
    and V; or the widest tiles of one, where registers are few: the keys of a window at once, as far
    as their scores fit in that cache.
    """
    if attention_tiles.takes(task, row):
        return attention_tiles.default(task, row)
    choices = space(task, row)
    channels = [c for c in choices["channels"] if c <= 16]
    spec = AttentionSpec.from_shape(task.shape)
    size = spec.head_size
    even = [c for c in channels if size % c == 0 and c * 2 >= max(channels)]
    queries = max(choices["queries"]) if row.vector_bits == 512 else 1
    key_tile, widest = 8, {"keys": max(choices["keys"]), "channels": max(even or channels)}
    if queries > 1:
        key_tile, wide = 4, 4 if queries == 4 else 8
        widest = {"keys": wide, "channels": wide}
    elif None not in spec.reach():
        seen = 1 + sum(-(-most // BLOCK_TOKENS) for most in spec.reach())
        key_tile = next(tile for tile in choices["key_tile"] if tile >= min(seen, 16))
    return {"key_tile": key_tile, **widest, "queries": queries}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (qkv, keys, table, [bias], [tables by distance], [limits], y)."""
    if lacks := refuses(task):
        raise ValueError(f"there is no kernel for {lacks}")
    spec = AttentionSpec.from_shape(task.shape)
    if attention_tiles.takes(task, row):
        return attention_tiles.kernel(task, knobs, row)
    math = product.multiplies(task, row)
    with lanes.kernel(task.name) as builder:
        operands = Operands.declare(builder, task)
        powers = vector_math.powers(row)
        builder.link(math.llvm + powers.llvm)
        kind = _QUERIES[precisions.name(task)]
        # registers of four: LLVM makes one load and products by its lanes of four broadcasts
        unroll = 4 if row.vector_bits == 128 else 1
        together = knobs["queries"]

        def emit(shared: Any, *members: tuple[Any, Any]) -> None:
            kind(spec, knobs, math, powers, unroll, operands, shared, members).emit()

        if spec.group > 1 or together == 1:
            parts = spec.group // together
            with T.parallel(spec.kv_heads * parts * builder.blocks) as job:
                shared = T.Bind(job // (builder.blocks * parts))
                part = job % (builder.blocks * parts) // builder.blocks if parts > 1 else 0
                first = T.Bind(shared * spec.group + part * together)
                query = T.Bind(job % builder.blocks)
                emit(shared, *((query, first + i) for i in range(together)))
        else:
            groups = T.Bind((builder.blocks + (together - 1)) // together)
            with T.parallel(spec.heads * groups) as job:
                _neighbours(builder, operands, emit, job, groups, together)
    return builder.func


def _neighbours(
    builder: lanes.KernelBuilder,
    operands: Operands,
    emit: Callable[..., None],
    job: Any,
    groups: Any,
    together: int,
) -> None:
    """Emit the blocks of queries of a job: together where they are of one sequence."""
    head = T.Bind(job // groups)
    first = T.Bind(job % groups * together)
    last = T.Bind(T.min(first + together, builder.blocks) - 1)
    whole = last - first == together - 1
    same = operands.table[first, 2] == operands.table[last, 2]
    with T.If(tirx.all(whole, same)):
        with T.Then():
            emit(head, *((first + i, head) for i in range(together)))
        with T.Else(), T.serial(last - first + 1) as i:
            emit(head, (first + i, head))


class _Query:
    """Emits the attention of some blocks of 16 queries of a sequence, each of a head, that read the
    same keys and values, those of head ``shared``: ``members`` are neighbours of one head, or one
    block in heads of a group.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        knobs: Knobs,
        math: Arithmetic,
        powers: vector_math.Powers,
        unroll: int,
        operands: Operands,
        shared: Any,
        members: Sequence[tuple[Any, Any]],
    ) -> None:
        self.operands, self.queries = operands, len(members)
        self.members = [(T.Bind(query), T.Bind(head)) for query, head in members]
        self.qkv, self.table = operands.qkv, operands.table
        self.math, self.powers, self.unroll = math, powers, unroll
        self.spec, self.size, self.knobs = spec, spec.head_size, knobs
        query, _ = self.members[0]
        self.starts = operands.starts(shared)
        self.first = T.Bind(self.table[query, 2])
        self.count = T.Bind(self.table[query, 3])
        self.sights = [
            Sight(spec, self.table[query, 1] // BLOCK_TOKENS, self.count)
            for query, _ in self.members
        ]

    def emit(self) -> None:
        tile, every = self.knobs["key_tile"], range(self.queries)
        # as powers of two; behind those of the last block of queries, the masks of the tile's keys
        scores = T.alloc_buffer((self.queries + 1, tile * BLOCK_TOKENS, BLOCK_TOKENS), "float32")
        weights = self._weights(scores)
        context = T.alloc_buffer((self.queries, self.size, BLOCK_TOKENS), "float32")
        # of each block of queries the running maximum, the sum, and the tile's maximum
        state = T.alloc_buffer((3 * self.queries, BLOCK_TOKENS), "float32")
        for i in every:
            lanes.store(state, lanes.splat(LOWEST), 3 * i)
            lanes.store(state, lanes.splat(0.0), 3 * i + 1)
        with T.serial(self.size) as d:
            for i in every:
                lanes.store(context, lanes.splat(0.0), i, d)
        low, stop = self.sights[0].blocks()[0], self.sights[-1].blocks()[1]
        with T.serial((stop - low + (tile - 1)) // tile) as step:
            start = T.Bind(low + step * tile)
            blocks = T.Bind(T.min(tile, stop - start))
            for i in every:
                lanes.store(state, lanes.load(state, 3 * i), 3 * i + 2)
            with T.serial(blocks) as block:
                self._scores(scores, state, start, block)
            for i in every:
                self._rescale(context, state, step, i)
                self._softmax(scores, weights, state, blocks, i)
            self._context(weights, context, start, blocks)
        for i in every:
            inverse = T.Bind(lanes.splat(1.0) / lanes.load(state, 3 * i + 1))

            def value(d: Any, i: int = i, inverse: Any = inverse) -> Any:
                return lanes.load(context, i, d) * inverse

            self.operands.store(value, *self.members[i])

    def _weights(self, scores: Any) -> Any:
        """Where the softmax leaves what V is multiplied by: over the scores."""
        return scores

    def _query(self, i: int, d: Any) -> Any:
        """Channel d of Q of a member; of lanes, where they hold several."""
        query, head = self.members[i]
        return lanes.load(self.qkv, query, head * self.size // self.math.group + d)

    def _scores(self, scores: Any, state: Any, start: Any, block: Any) -> None:
        """scores[key] = (q · k scale + mask) log2(e), for the 16 keys of a block; the largest of
        the tile on the way.
        """
        per_tile, every = self.knobs["keys"], range(self.queries)
        where = T.Bind(self.first + start + block)
        lanes.store(scores, self.operands.mask(where), self.queries, block)
        with T.serial(BLOCK_TOKENS // per_tile) as part:
            low = T.Bind(part * per_tile)
            registers = iter(lanes.registers(per_tile * self.queries))
            total = [[next(registers) for _ in range(per_tile)] for _ in every]
            for i in every:
                for j in range(per_tile):
                    lanes.write(total[i][j], lanes.splat(0.0))
            near = self.operands.distances.near(
                self.sights[0].own,
                (start + block) * BLOCK_TOKENS + low,
                self.members[0][1],
                self.math,
            )
            with lanes.loop(self.size // self.math.group, self.unroll) as d:
                q = [self._query(i, d) for i in every]
                for j in range(per_tile):
                    channel = self.starts[0] // self.math.group + d
                    k = lanes.splat(self.qkv[where, channel, low + j])
                    for i in every:
                        value = self.math.multiply_add(lanes.read(total[i][j]), q[i], k)
                        lanes.write(total[i][j], near.added(value, q[i], k, d, i, j))
            for i in every:
                self._scaled(scores, state, total[i], i, start, block, low)

    def _scaled(
        self,
        scores: Any,
        state: Any,
        total: Sequence[Any],
        i: int,
        start: Any,
        block: Any,
        low: Any,
    ) -> None:
        """Store some keys' scores of one block of queries, and see the largest."""

        def store(score: Callable[[Any, Any], Any]) -> None:
            for j, register in enumerate(total):
                value = scaled(lanes.read(register), self.spec)
                value = value + lanes.splat(scores[self.queries, block, low + j])
                key = (start + block) * BLOCK_TOKENS + low + j
                if self.operands.bias is not None:
                    value = value + self.operands.bias_of(*self.members[i], key)
                lanes.store(scores, score(value, key), i, block * BLOCK_TOKENS + low + j)

        sight = self.sights[i]
        whole = sight.sees_all_of(start + block)
        if whole is True:
            store(lambda value, key: value)
        else:  # most blocks of a window are seen by all queries, key for key
            with T.If(whole):
                with T.Then():
                    store(lambda value, key: sight.bounded(value))
                with T.Else():
                    store(sight.score)
        highest = lanes.load(state, 3 * i + 2)
        for j in range(len(total)):
            highest = tirx.max(highest, lanes.load(scores, i, block * BLOCK_TOKENS + low + j))
        lanes.store(state, highest, 3 * i + 2)

    def _rescale(self, context: Any, state: Any, step: Any, i: int) -> None:
        """What was summed before is rescaled to the new maximum."""
        with T.If(step > 0), T.Then():
            lowered = lanes.load(state, 3 * i) - lanes.load(state, 3 * i + 2)
            shrink = T.Bind(self.powers.fine(lowered))
            lanes.store(state, lanes.load(state, 3 * i + 1) * shrink, 3 * i + 1)
            with T.serial(self.size) as d:
                lanes.store(context, lanes.load(context, i, d) * shrink, i, d)
        lanes.store(state, lanes.load(state, 3 * i + 2), 3 * i)

    def _softmax(self, scores: Any, weights: Any, state: Any, blocks: Any, i: int) -> None:
        """Powers of two of what scores are above the new maximum, and their sum."""
        highest = T.Bind(lanes.load(state, 3 * i))
        with T.serial(blocks * BLOCK_TOKENS) as j:
            weight = T.Bind(self.powers.fine(lanes.load(scores, i, j) - highest))
            lanes.store(weights, weight, i, j)
            lanes.store(state, lanes.load(state, 3 * i + 1) + weight, 3 * i + 1)

    def _context(self, weights: Any, context: Any, start: Any, blocks: Any) -> None:
        """context[d] += weights · v, a few channels at a time in registers."""
        widest, every = self.knobs["channels"], range(self.queries)
        full = self.size // widest

        def channels(low: Any, width: int) -> None:
            registers = iter(lanes.registers(width * self.queries))
            total = [[next(registers) for _ in range(width)] for _ in every]
            for i in every:
                for d in range(width):
                    lanes.write(total[i][d], lanes.load(context, i, low + d))
            with T.serial(blocks) as block:
                steps = BLOCK_TOKENS // self.math.group
                with lanes.loop(steps, self.unroll) as j:
                    weight = [lanes.load(weights, i, block * steps + j) for i in every]
                    for d in range(width):
                        v = lanes.splat(self._value(self.first + start + block, low + d, j))
                        for i in every:
                            value = self.math.multiply_add(lanes.read(total[i][d]), weight[i], v)
                            lanes.write(total[i][d], value)
            for i in every:
                for d in range(width):
                    lanes.store(context, lanes.read(total[i][d]), i, low + d)

        with T.serial(full) as part:
            channels(part * widest, widest)
        if self.size % widest:
            channels(full * widest, self.size % widest)

    def _value(self, block: Any, d: Any, j: Any) -> Any:
        """V of key j, channel d."""
        return self.qkv[block, self.starts[1] + d, j]


class _HalfQuery(_Query):
    """In bfloat16: a lane of weights holds those of two neighbouring keys, one of V too."""

    def _weights(self, scores: Any) -> Any:
        pairs = self.knobs["key_tile"] * BLOCK_TOKENS // 2
        return T.alloc_buffer((self.queries, pairs, BLOCK_TOKENS), "int32")

    def _softmax(self, scores: Any, weights: Any, state: Any, blocks: Any, i: int) -> None:
        highest = T.Bind(lanes.load(state, 3 * i))
        with T.serial(blocks * (BLOCK_TOKENS // 2)) as j:
            pair = []
            for odd in range(2):
                score = lanes.load(scores, i, 2 * j + odd)
                pair.append(T.Bind(self.powers.coarse(score - highest)))
            lanes.store(weights, arithmetics.pack_bf16(*pair), i, j)
            total = lanes.load(state, 3 * i + 1) + (pair[0] + pair[1])
            lanes.store(state, total, 3 * i + 1)

    def _value(self, block: Any, d: Any, j: Any) -> Any:
        # two channels of 8 pairs of tokens share the place of one pair of channels
        channel = self.starts[1] + d
        return self.qkv[block, channel // 2, channel % 2 * (BLOCK_TOKENS // 2) + j]


_QUERIES = {"fp32": _Query, "bf16": _HalfQuery}


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two sequences where the blocks allow it, the last few keys of each masked."""
    spec = AttentionSpec.from_shape(task.shape)
    heads, size, widths = spec.heads, spec.head_size, spec.channels()
    halves, values = product.group(task) == 2, widths[0] + widths[1]
    tables = distances.sample(spec, rng, halves)
    counts = [blocks] if blocks < 3 else [blocks - blocks // 3, blocks // 3]
    qkv = rng.standard_normal((blocks * BLOCK_TOKENS, sum(widths))).astype("float32")
    if halves:
        qkv = arithmetics.bf16_values(arithmetics.bf16_pairs(qkv))
    keys = np.zeros((blocks, BLOCK_TOKENS), "float32")
    table = np.zeros((blocks, 4), "int32")
    longest = max(counts)
    bias = rng.standard_normal((1, heads, longest, longest * BLOCK_TOKENS, BLOCK_TOKENS)).astype(
        "float32"
    )
    expected, first = [], 0
    for row, count in enumerate(counts):
        keys[first + count - 1, -5:] = -10000.0
        for i in range(count):
            table[first + i] = row, i * BLOCK_TOKENS, first, count
        part = slice(first * BLOCK_TOKENS, (first + count) * BLOCK_TOKENS)
        parts = np.split(qkv[part], [widths[0], values], 1)
        q, k, v = (a.reshape(len(a), -1, size).transpose(1, 0, 2) for a in parts)
        mask, added = keys[first : first + count].reshape(-1), None
        if spec.bias == "tensor":  # (H, query block, key, query) → (H, query, key)
            mine = bias[0, :, :count, : count * BLOCK_TOKENS]
            added = mine.transpose(0, 1, 3, 2).reshape(
                heads, count * BLOCK_TOKENS, count * BLOCK_TOKENS
            )
        context = spec.reference(q, k, v, mask, added, **tables)
        expected.append(context.transpose(1, 0, 2).reshape(-1, heads * size))
        first += count
    in_lanes = arithmetics.bf16_qkv_lanes(qkv, values) if halves else lanes.to_lanes(qkv)
    activations = [in_lanes, keys, table] + ([bias] if spec.bias == "tensor" else [])
    return result_sample(
        task,
        activations,
        list(tables.values()),
        np.concatenate(expected).astype("float32"),
        # the softmax's weights are rounded too
        tolerance=2.0**-8 if halves else 1e-4,
    )


def flops(task: Task, tokens: int) -> float:
    """Of one sequence of that many tokens."""
    return AttentionSpec.from_shape(task.shape).flops(tokens)


attention = Schedule(
    "attention",
    space,
    default,
    kernel,
    sample,
    flops,
    distances.pack,
    refuses=refuses,
    later={"queries": 1},
)
