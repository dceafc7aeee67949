"""Fuses attention by tiles (AMX), in bfloat16, on the operands and to the results of ``attention``.

    parallel over heads × chunks of blocks of queries
      for each sequence in the chunk, for each tile of its key blocks
        K turned so that a key's channels lie side by side, V so that 32 keys do: once for all
        queries of the chunk
        for each block of 16 queries
          scores: 16 keys × 16 queries a tile, four tiles at once
          online softmax, on lanes of queries
          context: 16 channels × 16 queries a tile, rescaled where there is more than one key tile

Scores are kept as exponents of 2, so that scale, mask and log2(e) are one multiply-add; they, and
the tiles of K and V, are in the caches of the core. Memory is linear in the length.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cpu import arithmetic as arithmetics
from bertile.schedules.cpu import lanes, precisions, vector_math
from bertile.schedules.cpu.attention_parts import LOWEST, Operands, Sight, scaled
from bertile.schedules.cpu.product import jobs
from bertile.schedules.cpu.tile_words import keep_whole, load_tile, store_tile, tile
from bertile.schedules.intrinsics import amx
from bertile.schedules.schedule import Knobs, Row, Space
from bertile.schedules.task import Task

AT_ONCE = len(amx.SUMS)  # tiles of sums
PAIRS = BLOCK_TOKENS // 2  # of the keys of a block


def takes(task: Task, row: Row) -> bool:
    """Whether the machine has tiles for the task's precision. What lies in vectors by distance is
    for registers.
    """
    relative = AttentionSpec.from_shape(task.shape).relative != "none"
    return row.tiles and precisions.name(task) == "bf16" and not relative


def space(task: Task, row: Row) -> Space:
    """Key blocks per tile of the online softmax, blocks of queries per job."""
    return {"key_tile": (4, 8, 16, 32), "chunk": (1, 2, 4, 8, 16)}


def default(task: Task, row: Row) -> Knobs:
    """256 keys and 128 queries at a time."""
    return {"key_tile": 16, "chunk": 8}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (qkv, keys, table, [bias], [limits], y)."""
    spec = AttentionSpec.from_shape(task.shape)
    with lanes.kernel(task.name) as builder:
        operands = Operands.declare(builder, task)
        powers = vector_math.powers(row)
        builder.link(amx.TILES + amx.turned(_rows(spec)) + powers.llvm)
        with jobs(builder.blocks, knobs["chunk"], spec.heads) as (number, first, count):
            head = T.Bind(number)
            shared = T.Bind(head // spec.group)
            _Chunk(spec, knobs, powers, operands, shared, head).emit(first, count)
    return builder.func


def _rows(spec: AttentionSpec) -> tuple[int, ...]:
    """How many lanes of K fill each of its tiles."""
    pairs = spec.head_size // 2
    return tuple(min(amx.ROWS, pairs - low) for low in range(0, pairs, amx.ROWS))


class _Chunk:
    """Emits the attention of a head, by the keys of head ``shared``, for some blocks of queries."""

    def __init__(
        self,
        spec: AttentionSpec,
        knobs: Knobs,
        powers: vector_math.Powers,
        operands: Operands,
        shared: Any,
        head: Any,
    ) -> None:
        self.spec, self.powers, self.operands, self.head = spec, powers, operands, head
        self.qkv, self.table = operands.qkv, operands.table
        self.size, self.starts = spec.head_size, operands.starts(shared)
        self.rows, self.tile, self.chunk = _rows(spec), knobs["key_tile"], knobs["chunk"]
        self.parts = -(-self.size // amx.ROWS)  # tiles of channels of the context
        self.parts = -(-self.parts // AT_ONCE) * AT_ONCE if self.parts > AT_ONCE else self.parts
        square = (amx.ROWS, amx.ROWS)
        self.k = T.alloc_buffer((self.tile, len(self.rows), *square), "int32")
        self.v = T.alloc_buffer((self.tile // 2, self.parts * amx.ROWS, amx.ROWS), "int32")
        self.q = T.alloc_buffer((len(self.rows), *square), "int32")
        # behind the scores the masks of the key blocks: by themselves they would lie on the stack,
        # where TVM aligns what is read number by number for single numbers
        self.masks = self.tile * BLOCK_TOKENS
        self.scores = T.alloc_buffer((self.masks + self.tile, BLOCK_TOKENS), "float32")
        self.weights = T.alloc_buffer((self.tile * PAIRS, BLOCK_TOKENS), "int32")
        channels = self.parts * amx.ROWS
        self.context = T.alloc_buffer((self.chunk, channels, BLOCK_TOKENS), "float32")
        self.more = T.alloc_buffer((channels, BLOCK_TOKENS), "float32")
        self.state = T.alloc_buffer((self.chunk, 2, BLOCK_TOKENS), "float32")  # maximum, sum

    def emit(self, first: Any, count: Any) -> None:
        """The blocks of queries from ``first`` on, sequence by sequence."""
        tile("tiles_open")
        nothing = tirx.Broadcast(tirx.const(0, "int32"), BLOCK_TOKENS)
        keep_whole(self.k)
        if self.parts * amx.ROWS > self.size:
            with T.serial(self.tile // 2) as pair, T.serial(self.parts * amx.ROWS) as c:
                lanes.store(self.v, nothing, pair, c)
        if self.rows[-1] < amx.ROWS:
            with T.serial(self.rows[-1], amx.ROWS) as lane:
                lanes.store(self.q, nothing, len(self.rows) - 1, lane)
        with T.serial(count) as i:
            block = T.Bind(first + i)
            own = T.Bind(self.table[block, 1] // BLOCK_TOKENS)
            with T.If(tirx.any(i == 0, own == 0)), T.Then():
                rest = T.Bind(T.min(count - i, self.table[block, 3] - own))
                self._sequence(block, own, rest)
        tile("tiles_close")

    def _sequence(self, block: Any, own: Any, count: Any) -> None:
        """The queries of ``count`` blocks of one sequence, of which ``own`` is the first."""
        first, length = T.Bind(self.table[block, 2]), T.Bind(self.table[block, 3])
        # every query sees a key of the first tile, but where a spec says which they see
        everywhere = self.spec.reach() == (None, None)
        with T.serial(count) as i:
            lanes.store(self.state, lanes.splat(LOWEST), i, 0)
            lanes.store(self.state, lanes.splat(0.0), i, 1)
            if not everywhere:
                with T.serial(self.parts * amx.ROWS) as d:
                    lanes.store(self.context, lanes.splat(0.0), i, d)
        low, _ = Sight(self.spec, own, length).blocks()
        _, stop = Sight(self.spec, own + count - 1, length).blocks()
        with T.serial((stop - low + (self.tile - 1)) // self.tile) as step:
            start = T.Bind(low + step * self.tile)
            blocks = T.Bind(T.min(self.tile, stop - start))
            self._turn(first + start, blocks)
            with T.serial(count) as i:
                sight = Sight(self.spec, own + i, length)
                lowest, highest = sight.blocks()
                inside = tirx.all(start < highest, start + blocks > lowest)
                with T.If(inside), T.Then():
                    self._scores(block + i, blocks)
                    shrink = self._softmax(i, block + i, sight, start, blocks)
                    self._context(i, blocks, shrink, step == 0 if everywhere else None)
        with T.serial(count) as i:
            inverse = T.Bind(lanes.splat(1.0) / lanes.load(self.state, i, 1))

            def value(d: Any, i: Any = i, inverse: Any = inverse) -> Any:
                return lanes.load(self.context, i, d) * inverse

            self.operands.store(value, block + i, self.head)

    def _turn(self, first: Any, blocks: Any) -> None:
        """Make ready K, V and the mask of some key blocks."""
        with T.serial(blocks) as b:
            lanes.store(self.scores, self.operands.mask(first + b), self.masks + b)
            for part, rows in enumerate(self.rows):
                lane = self.starts[0] // 2 + part * amx.ROWS
                source = T.address_of(self.qkv[first + b, lane, 0])
                tile(f"turn{rows}", source, T.address_of(self.k[b, part, 0, 0]))
            with T.serial(self.size) as c:
                half = self._values(first + b, c)
                ramp = tirx.Ramp(b % 2 * PAIRS, 1, PAIRS)
                T.buffer_store(self.v, half, [b // 2, c, ramp])
        with T.If(blocks % 2 == 1), T.Then(), T.serial(self.size) as c:
            nothing = tirx.Broadcast(tirx.const(0, "int32"), PAIRS)
            T.buffer_store(self.v, nothing, [blocks // 2, c, tirx.Ramp(PAIRS, 1, PAIRS)])

    def _values(self, block: Any, c: Any) -> Any:
        """V of a block's keys in one channel, in pairs."""
        channel = self.starts[1] + c
        return self.qkv[block, channel // 2, tirx.Ramp(channel % 2 * PAIRS, 1, PAIRS)]

    def _scores(self, query: Any, blocks: Any) -> None:
        """q · k of the keys of all blocks, four of which are multiplied at once; those behind the
        last are never read.
        """
        for part, rows in enumerate(self.rows):
            lane = self.head * self.size // 2 + part * amx.ROWS
            if rows == amx.ROWS:
                if len(self.rows) <= len(amx.INPUTS):
                    load_tile(amx.INPUTS[part], self.qkv, query, lane, 0)
            else:
                with T.serial(rows) as i:
                    lanes.store(self.q, lanes.load(self.qkv, query, lane + i), part, i)
        with T.serial((blocks + (AT_ONCE - 1)) // AT_ONCE) as some:
            for c in range(AT_ONCE):
                tile(f"tile_zero{c}")
            for part, rows in enumerate(self.rows):
                q = amx.INPUTS[part % 2]
                lane = self.head * self.size // 2 + part * amx.ROWS
                if rows < amx.ROWS:
                    load_tile(q, self.q, part, 0, 0)
                elif len(self.rows) > len(amx.INPUTS):
                    load_tile(q, self.qkv, query, lane, 0)
                for c in range(AT_ONCE):
                    k = amx.WEIGHTS[c % 2]
                    load_tile(k, self.k, some * AT_ONCE + c, part, 0, 0)
                    tile(f"tile_dot2_{c}_{k}_{q}")
            for c in range(AT_ONCE):
                store_tile(c, self.scores, (some * AT_ONCE + c) * BLOCK_TOKENS, 0)

    def _softmax(self, i: Any, query: Any, sight: Sight, start: Any, blocks: Any) -> Any:
        """Powers of 2 of the scores less their largest, in pairs of keys, and their sum; gives what
        the context that was summed before shrinks by.
        """
        chains = 4
        highest = lanes.registers(chains)
        before = T.Bind(lanes.load(self.state, i, 0))
        for chain in highest:
            lanes.write(chain, before)
        with T.serial(blocks) as b:
            for low in range(0, BLOCK_TOKENS, chains):
                for j, chain in enumerate(highest):
                    at, key = b * BLOCK_TOKENS + low + j, (start + b) * BLOCK_TOKENS + low + j
                    value = scaled(lanes.load(self.scores, at), self.spec)
                    value = value + lanes.splat(self.scores[self.masks + b, low + j])
                    if self.operands.bias is not None:
                        value = value + self.operands.bias_of(query, self.head, key)
                    value = T.Bind(sight.score(value, key))
                    lanes.store(self.scores, value, at)
                    lanes.write(chain, tirx.max(lanes.read(chain), value))
        first, second, third, fourth = (lanes.read(chain) for chain in highest)
        largest = T.Bind(tirx.max(tirx.max(first, second), tirx.max(third, fourth)))
        sums = lanes.registers(2)
        for chain in sums:
            lanes.write(chain, lanes.splat(0.0))
        with lanes.loop(blocks * (PAIRS // 2), 1) as some:
            for j, chain in enumerate(sums):
                at = some * 2 + j
                pair = []
                for odd in range(2):
                    score = lanes.load(self.scores, 2 * at + odd)
                    pair.append(T.Bind(self.powers.coarse(score - largest)))
                lanes.store(self.weights, arithmetics.pack_bf16(*pair), at)
                lanes.write(chain, lanes.read(chain) + (pair[0] + pair[1]))
        with T.If(blocks % 2 == 1), T.Then(), T.serial(PAIRS) as at:
            nothing = tirx.Broadcast(tirx.const(0, "int32"), BLOCK_TOKENS)
            lanes.store(self.weights, nothing, blocks * PAIRS + at)
        shrink = T.Bind(self.powers.coarse(before - largest))
        total = lanes.load(self.state, i, 1) * shrink + (lanes.read(sums[0]) + lanes.read(sums[1]))
        lanes.store(self.state, total, i, 1)
        lanes.store(self.state, largest, i, 0)
        return shrink

    def _context(self, i: Any, blocks: Any, shrink: Any, is_first: Any) -> None:
        """context = context shrink + weights · v, four tiles of channels at once; without what was
        before where that is the first.
        """
        for low in range(0, self.parts, AT_ONCE):
            sums = range(min(AT_ONCE, self.parts - low))
            for c in sums:
                tile(f"tile_zero{c}")
            with T.serial((blocks + 1) // 2) as pair:
                weights = amx.INPUTS[0]
                load_tile(weights, self.weights, pair * amx.ROWS, 0)
                for c in sums:
                    v = amx.WEIGHTS[c % 2]
                    load_tile(v, self.v, pair, (low + c) * amx.ROWS, 0)
                    tile(f"tile_dot2_{c}_{v}_{weights}")
            for c in sums:
                store_tile(c, self.more, (low + c) * amx.ROWS, 0)
        with T.serial(self.parts * amx.ROWS) as d:
            value = lanes.load(self.context, i, d) * shrink + lanes.load(self.more, d)
            if is_first is not None:
                value = tirx.if_then_else(is_first, lanes.load(self.more, d), value)
            lanes.store(self.context, value, i, d)
